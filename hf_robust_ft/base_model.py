"""The pretrained weights that a fine-tuned model is measured from, read from where they are published or saved."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedConfig, PreTrainedModel

from .adapters import find_adapters
from .layers import Layer, find_layers
from .pretrained import load_pretrained
from .reference import ReferenceMismatch
from .snapshot import snapshot


def read_reference(model: PreTrainedModel, source: str | Path) -> tuple[dict[str, Tensor], str]:
    """The weights of a base model under the names that they have in a fine-tuned one, and what they are in words.

    A layer that the base model's files lack, or a head of other shape, starts at zero: any point that was fixed before
    training will do.

    Args:
        model: fine-tuned, as loaded.
        source: a folder, or a name on the Hub.

    Returns:
        A state dict of the base model's own weights, and zeros for layers that it lacks.

    Raises:
        ReferenceMismatch: a model of another kind, or one that lacks layers beneath the head or has them in other
            shapes.
        OSError: there is no such model, or none with weights in safetensors.
        ValueError: it can't be loaded.
    """
    # Of the file itself: AutoConfig would ask whether to run code where a model of the user's own has some.
    config: Any = PreTrainedConfig.get_config_dict(source)[0]
    wanted = model.config.model_type
    own = config.get("model_type", wanted)
    if own != wanted:
        raise ReferenceMismatch(
            f"reference '{source}' is a {own} model, but the fine-tuned one is a {wanted}; give the model that "
            "training started from"
        )
    _, restore = snapshot(None)  # a new head draws numbers
    try:
        # FSDP2 gives a sharded model a class of its own.
        own_class: Any = next(c for c in type(model).__mro__ if not issubclass(c, FSDPModule))
        base, info = load_pretrained(own_class.from_pretrained, source, ignore_mismatched_sizes=True)
    finally:
        restore()
    new = {*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])}
    known = base.state_dict()
    zeros, lacking, misshapen = {}, [], []
    for layer in find_layers(model)[0]:
        names = (layer.name, *layer.tied)
        found = next((name for name in names if name in known and name not in new), None)
        if found is not None and known[found].shape == layer.parameter.shape:
            continue
        if found is not None and _beneath_head(model, layer):
            there, here = tuple(known[found].shape), tuple(layer.parameter.shape)
            misshapen.append(f"{layer.name} ({there} there, {here} in the model)")
        elif _beneath_head(model, layer) and not any(name in known for name in names):
            lacking.append(layer.name)
        else:
            zeros[layer.name] = torch.zeros_like(layer.parameter)
    problems = [
        *([f"has no weights for {_some(lacking)}"] if lacking else []),
        *([f"has another shape for {_some(misshapen)}"] if misshapen else []),
    ]
    if problems:
        raise ReferenceMismatch(
            f"reference '{source}' {' and '.join(problems)}: it is another model. Give the one that "
            "training started from"
        )
    state = {name: weight for name, weight in known.items() if name not in new and name not in zeros}
    centred = f"; {', '.join(sorted(zeros))}, which they lack, from zero" if zeros else ""
    return {**state, **zeros}, f"the weights of {source}{centred}"


def kept_reference(model: nn.Module) -> tuple[dict[str, Tensor], str]:
    """The weights of the base model that a PEFT model keeps, of all trained layers, and what they are in words.

    A freshly initialised head counts from zero, as in :func:`read_reference`.

    Raises:
        ReferenceMismatch: a layer that is trained in place, so that its first weights are gone.
    """
    originals = find_adapters(model).originals
    kept: dict[str, Tensor] = {}
    zeros, moved = [], []
    for layer in find_layers(model)[0]:
        if layer.adapter is not None:
            kept[layer.name] = layer.parameter.detach()
        elif layer.parameter not in originals:
            moved.append(layer.name)
        elif layer.fresh:
            zeros.append(layer.name)
            kept[layer.name] = torch.zeros_like(layer.parameter)
        else:
            kept[layer.name] = originals[layer.parameter].detach()
    if moved:
        raise ReferenceMismatch(
            f"the model keeps no base weights of {_some(moved)}, which are trained without an adapter; give "
            "measure_hessian(reference=…) a state dict of the base model, or set hessian_examples before training"
        )
    centred = f"; {', '.join(sorted(zeros))}, which it lacks, from zero" if zeros else ""
    return kept, f"the weights of the base model{centred}"


def _beneath_head(model: PreTrainedModel, layer: Layer) -> bool:
    return layer.name.startswith(f"{model.base_model_prefix}.") or model.base_model is model


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def freeze_unmoved(model: nn.Module, reference: Mapping[str, Tensor]) -> int:
    """Count parameters that are those of the reference, bit for bit, as frozen: training has not moved them.

    They add nothing to any measure, and measuring them would take as long as for the others.

    Returns:
        How many parameters (tensors) that are.
    """
    count = 0
    for name, parameter in model.named_parameters():
        base = reference.get(name)
        if base is not None and base.shape == parameter.shape and torch.equal(base.to(parameter), parameter.detach()):
            parameter.requires_grad_(False)
            count += 1
    return count
