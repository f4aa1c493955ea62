"""Models from a folder or the Hub: weights from safetensors alone, and none of the code that may lie beside them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from .files import inside
from .stored import checked, read_json

ADAPTER_WEIGHTS = "adapter_model.safetensors"


class CodeRefused(ValueError):
    """A model that can't be loaded without running code from its repository."""


def load_pretrained(load: Callable[..., Any], source: str | Path, **settings: Any) -> tuple[Any, dict[str, Any]]:
    """A model, and what ``from_pretrained`` says of loading it.

    Args:
        load: the ``from_pretrained`` of a class.
        source: a folder, or a name on the Hub.
        settings: for it.

    Raises:
        CodeRefused: the model needs code of its own.
        OSError: there is no such model, or it has no weights in safetensors.
        ValueError: it can't be loaded: another kind of model, or a damaged one.
        ImportError: it needs a package that is missing.
    """
    _check_shards(Path(source))
    if find_adapter_config_file(str(source)) is not None:
        adapter_weights(source)  # transformers would take pickled ones
    try:
        return load(  # type: ignore[no-any-return]
            source, output_loading_info=True, use_safetensors=True, trust_remote_code=False, **settings
        )
    except OSError as error:
        if "safetensors" in str(error):
            raise OSError(_no_safetensors(source, "from_pretrained(…, use_safetensors=False)")) from error
        raise
    except ImportError:
        raise
    except Exception as error:  # what a configuration holds can make a class fail in any way
        refuse_code(source, error)
        said = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise ValueError(said if isinstance(error, ValueError) else f"{type(error).__name__}: {said}") from error


def refuse_code(source: str | Path, error: Exception) -> None:
    """Say what to do where transformers says that a model, or its processor, needs code of its own.

    Raises:
        CodeRefused: it does.
    """
    if "trust_remote_code" in str(error):
        raise CodeRefused(
            f"model '{source}' needs code that comes with it, which is not run. If you trust that code, load the model "
            "in Python with from_pretrained(…, trust_remote_code=True), and give the loaded model to diagnose() or "
            "measure_hessian()"
        ) from error


def adapter_weights(source: str | Path) -> Path:
    """The weights of a PEFT adapter, as a file here.

    Raises:
        OSError: there are none in safetensors.
    """
    try:
        found = cached_file(str(source), ADAPTER_WEIGHTS)
    except OSError as error:
        raise OSError(_no_safetensors(source, "PeftModel.from_pretrained(…)")) from error
    return Path(str(found))


def _no_safetensors(source: str | Path, load: str) -> str:
    return (
        f"model '{source}' has no weights in safetensors, and others (.bin, .pt) are not read, as they are pickles, "
        f"which can run code. If you trust them, write them anew: {load}.save_pretrained(DIR)"
    )


def _check_shards(folder: Path) -> None:
    """Raise ``ValueError`` if the index of a model in pieces names a file outside of its folder.

    Of the Hub's files, huggingface_hub sees to it.
    """
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return
    try:
        content = checked(dict[str, Any], read_json(index), "the whole")
        for name in checked(dict[str, str], content.get("weight_map"), "weight_map").values():
            inside(folder, name)
    except ValueError as error:
        raise ValueError(f"{index} is no index of weights ({error}); save the model again") from None
