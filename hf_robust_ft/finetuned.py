"""A fine-tuned classifier from a folder or the Hub, whoever trained it: whole models and PEFT adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, but not in an __all__
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.peft_utils import find_adapter_config_file

from .pretrained import CodeRefused, adapter_weights, load_pretrained
from .raw_examples import AUTO, Kind, load_processor
from .stored import checked, read_json

# By these peft loads more adapters, and some of its releases import any module, that the configuration names.
REFUSED = ("megatron_config", "adapters")


class Finetuned(NamedTuple):
    """What :func:`load_finetuned` found."""

    model: PreTrainedModel
    """With the adapter merged into its weights, if it is one."""
    processor: Any
    base: str | None
    """The base model that an adapter names; None for a whole model, which does not tell."""


def load_finetuned(source: str, kind: Kind, reference: str | None = None) -> Finetuned:
    """Load a model that was fine-tuned to classify, with its image processor or tokenizer.

    Args:
        source: a folder, or a name on the Hub; of a whole model or a PEFT adapter.
        kind: what it reads.
        reference: of an adapter whose base model is no longer where its configuration says.

    Raises:
        ValueError: a model of another kind, one without a trained head, an adapter that can't be merged, or a model
            that needs code of its own.
        OSError: no such model, none with weights in safetensors, or no processor.
        ImportError: an adapter, without peft.
    """
    adapter = find_adapter_config_file(source)
    if adapter is None:
        model, missing = _load(source, kind)
        _check_head(source, missing)
        return Finetuned(model, load_processor(source, kind), None)
    base, model = _merged(source, Path(adapter), kind, reference)
    try:
        processor = load_processor(source, kind)
    except OSError:
        processor = load_processor(base, kind)
    return Finetuned(model, processor, base)


def _load(source: str, kind: Kind, **settings: Any) -> tuple[PreTrainedModel, set[str]]:
    """The model, and the names of the weights that its files lack."""
    try:
        model, info = load_pretrained(AUTO[kind].from_pretrained, source, **settings)
    except CodeRefused:
        raise
    except ValueError as error:
        raise ValueError(
            f"model '{source}' can't be loaded to classify {kind}s: {error} Give a "
            f"fine-tuned {kind} model, or name the columns with image_column or text_column"
        ) from error
    return model, set(info["missing_keys"])


def _check_head(source: str, missing: set[str]) -> None:
    if missing:
        names = ", ".join(sorted(missing)[:4])
        raise ValueError(
            f"model '{source}' lacks the weights of {names}, so it has no trained head: measure a model that was "
            "fine-tuned to classify, and give its base model as the reference"
        )


def _merged(source: str, adapter: Path, kind: Kind, reference: str | None) -> tuple[str, PreTrainedModel]:
    """The name of an adapter's base model, and that model with the adapter in its weights."""
    try:
        import peft
    except ImportError as error:
        raise ImportError(f"model '{source}' is a PEFT adapter, which needs peft: pip install peft") from error
    base = _base_of(source, adapter) or reference
    if base is None:
        raise ValueError(f"model '{source}' is an adapter that names no base model; give it as the reference")
    file = adapter_weights(source)
    try:
        weights = safetensors.torch.load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is no safetensors file ({error}): save the adapter again") from error
    try:
        model, missing = _load(base, kind)
    except OSError as error:
        if reference is None:
            raise OSError(
                f"model '{source}' is an adapter of '{base}', which can't be loaded ({error}); give the place of that "
                "base model as the reference"
            ) from error
        base = reference
        model, missing = _load(base, kind)
    for name, module in model.named_modules():
        saved = weights.get(f"base_model.model.{name}.weight")
        # A head of the adapter's own, saved beside it: the base model is made for as many classes.
        if isinstance(module, nn.Linear) and saved is not None and saved.dim() and len(saved) != module.out_features:
            model, missing = _load(base, kind, num_labels=len(saved), ignore_mismatched_sizes=True)
            break
    _check_head(source, {name for name in missing if f"base_model.model.{name}" not in weights})
    try:
        # From the folder of the file: peft, asked for a name, may take pickled weights in its place.
        merged: Any = peft.PeftModel.from_pretrained(model, str(file.parent)).merge_and_unload()
    except Exception as error:  # what a configuration holds can make peft fail in any way
        said = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise ValueError(
            f"model '{source}' is an adapter that can't be merged into the weights of '{base}': "
            f"{said} Give a model whose adapter changes weight matrices (such as LoRA) and "
            "fits its base model"
        ) from error
    return base, merged.requires_grad_(True)


def _base_of(source: str, adapter: Path) -> str | None:
    """The base model that the configuration of an adapter names, if it names one.

    Raises:
        ValueError: no configuration of an adapter, or one that makes peft import or load what it names.
    """
    try:
        config = checked(dict[str, Any], read_json(adapter), "the whole")
        base: str | None = checked(str | None, config.get("base_model_name_or_path"), "base_model_name_or_path")
        if named := [name for name in REFUSED if config.get(name)]:
            raise ValueError(f"it has '{named[0]}', by which it could load other code or adapters")
    except ValueError as error:
        raise ValueError(f"{adapter} is no configuration of an adapter to merge ({error}); save it again") from None
    if base and not Path(source).is_dir():
        # What comes from the Hub has no say in which folder of this machine is read.
        try:
            validate_repo_id(base)
        except HFValidationError:
            return None
    return base or None
