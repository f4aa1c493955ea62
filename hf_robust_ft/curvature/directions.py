"""Layers to measure, each with the way that it travelled from its reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from ..adapters import find_adapters
from ..layers import Layer, NotALayer, find_layers
from ..reference import ReferenceMismatch, adapted_way, stored_weight
from ..sharding import is_sharded, whole
from .paging import derived, kept, paged_by
from .placement import stored_weights, unwrapped

Layers = Literal["weights", "blocks"] | Mapping[str, str | Sequence[str]]
"""Each weight alone, each block of the model as one layer, or name → pattern(s) of the weights that form it."""

PART = 2**20


@dataclass(frozen=True)
class Group:
    """One or more weights that are measured as one layer."""

    name: str
    members: tuple[Layer, ...]


def group_layers(model: nn.Module, layers: Layers) -> tuple[list[Group], list[NotALayer]]:
    """The layers to measure, and every trained parameter that belongs to none of them.

    Raises:
        ValueError: a model without a trained layer, an unknown name, a pattern that matches no layer, or adapters
            other than plain LoRA.
    """
    find_adapters(model).refuse("curvature", "Measure the model that merge_and_unload() makes of it, all of it trained")
    found, left_out = find_layers(model)
    if not found:
        raise ValueError("model has no trained layer (every weight matrix is frozen): there is nothing to measure")
    if layers == "weights":
        return [Group(layer.name, (layer,)) for layer in found], left_out
    members: dict[str, list[Layer]] = {}
    if layers == "blocks":
        for layer in found:
            members.setdefault(layer.block, []).append(layer)
    elif isinstance(layers, Mapping) and layers:
        members = _match(found, layers)
        taken = {layer.name for group in members.values() for layer in group}
        left_out = left_out + [
            NotALayer(layer.name, tuple(layer.parameter.shape), "no pattern of layers matches")
            for layer in found
            if layer.name not in taken
        ]
    else:
        raise ValueError(f"layers is {layers!r}; choose 'weights', 'blocks', or a mapping from name to pattern")
    return [Group(name, tuple(group)) for name, group in members.items()], left_out


def _match(found: Sequence[Layer], layers: Mapping[str, str | Sequence[str]]) -> dict[str, list[Layer]]:
    patterns = {name: [given] if isinstance(given, str) else list(given) for name, given in layers.items()}
    members: dict[str, list[Layer]] = {name: [] for name in patterns}
    for layer in found:
        # The first match decides, so that no weight counts twice.
        name = next((n for n, ps in patterns.items() if any(layer.matches(p) for p in ps)), None)
        if name is not None:
            members[name].append(layer)
    empty = [name for name, group in members.items() if not group]
    if empty:
        names = [layer.name for layer in found]
        shown = names if len(names) <= 6 else [*names[:3], "…", *names[-2:]]
        raise ValueError(
            f"layers: the patterns of {', '.join(empty)} match no layer that is still free (whole names, with * and "
            f"?; the first match decides). Layers are {', '.join(shown)}"
        )
    return members


def travelled(groups: Sequence[Group], reference: Mapping[str, Tensor] | nn.Module) -> dict[str, Tensor]:
    """``V = W - W_ref`` of every weight, by parameter name, at least float32, on the weight's device.

    With W merged where there is an adapter; of such a layer the reference may lack the weight, as that didn't move.

    Raises:
        ReferenceMismatch: weights that the reference lacks, or has in another shape; the message names them.
    """
    if isinstance(reference, nn.Module):
        reference = stored_weights(unwrapped(reference))
    layers = [layer for group in groups for layer in group.members]
    # Shards are gathered by all processes together, so now; what is whole can be read again.
    now = any(map(is_sharded, reference.values()))
    ways: dict[str, Tensor] = {}
    missing, misshapen, infinite = [], [], []
    problem: Exception | None = None
    for layer in layers:
        base = stored_weight(layer, reference)
        if base is None and layer.adapter is None:
            missing.append(layer.name)
        elif base is not None and base.shape != layer.parameter.shape:
            misshapen.append(f"{layer.name} ({tuple(base.shape)} there, {tuple(layer.parameter.shape)} in the model)")
        else:
            compute = partial(_way, layer, base, reference)
            try:
                way = compute() if now else derived(layer.parameter, compute)
                if not way.norm().isfinite():
                    infinite.append(layer.name)
                ways[layer.name] = kept(layer.parameter, way) if now else way
            except Exception as error:  # noqa: BLE001 - any at all: other processes wait for this one at the next layer
                problem = problem or error
    if problem is not None:
        raise problem
    if now and (pages := paged_by(layer.parameter for layer in layers)) is not None:
        pages.share()
    problems = [
        *([f"has no weights for {', '.join(missing)}"] if missing else []),
        *([f"has another shape for {', '.join(misshapen)}"] if misshapen else []),
    ]
    if infinite:
        raise ValueError(
            f"reference or model has weights that are not finite in {', '.join(infinite)}: there is nothing to "
            "measure. Look for a training that diverged, or for a damaged checkpoint"
        )
    if problems:
        raise ReferenceMismatch(
            f"reference {' and '.join(problems)}: it belongs to another model, or lacks a new head. Give the weights "
            "that this model started from (its state_dict before training), or leave these layers out with layers="
        )
    return ways


def _way(layer: Layer, base: Tensor | None, reference: Mapping[str, Tensor]) -> Tensor:
    dtype = torch.promote_types(layer.parameter.dtype, torch.float32)
    if layer.adapter is not None:
        return adapted_way(layer, reference, dtype)
    assert base is not None
    base = whole(base.detach())  # first: other processes wait for it
    weight = layer.parameter.detach().to(dtype)
    return weight - base.to(weight.device, dtype)


def lengths_of(directions: Sequence[Mapping[int, Tensor]]) -> Tensor:
    """``‖v‖`` of each direction, float64 on the CPU."""
    # In parts: a whole embedding in float64 would be the peak of some measurements.
    squares = [
        sum(part.double().square().sum().item() for v in direction.values() for part in torch.split(v.flatten(), PART))
        for direction in directions
    ]
    return torch.tensor(squares, dtype=torch.float64).sqrt()
