"""The reference: the weights that the balls are centred on, in memory and on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from .files import written_whole
from .layers import Layer, find_layers
from .projection import distance, magnitude
from .sharding import sharded_like, whole

# The Trainer does not upload names that start with an underscore: readers have the base model.
REFERENCE_FILE = "_reference.safetensors"


class ReferenceMismatch(ValueError):
    """A stored reference is missing, damaged, or not the one that a run was started from."""


def capture_reference(layers: Iterable[Layer]) -> dict[str, Tensor]:
    """Copy the present weights of some layers: parameter name → tensor on the same device, sharded as they are.

    Not of layers with an adapter: their base weights don't move, and are the reference.
    """
    return {layer.name: layer.parameter.detach().clone() for layer in layers if layer.adapter is None}


def layer_distances(model: nn.Module, reference: Mapping[str, Tensor]) -> dict[str, float]:
    """How far each trained layer of a model is from a reference, ``‖W_i - W_i^ref‖_F``.

    Args:
        model: unwrapped.
        reference: weights by parameter name, such as ``base_model.state_dict()``; more than are needed is fine. Of a
            layer with a LoRA adapter the base weight is the reference, unless another is given.

    Returns:
        Distances in float64 by parameter name, in the model's order.

    Raises:
        ReferenceMismatch: a layer that the reference lacks, or has in another shape.
    """
    found: dict[str, float] = {}
    for layer in find_layers(model)[0]:
        if layer.adapter is None:
            found[layer.name] = distance(layer.parameter, reference_weight(layer, reference), "frobenius")
        else:
            found[layer.name] = magnitude(adapted_way(layer, reference, torch.float64), "frobenius")
    return found


def stored_weight(layer: Layer, reference: Mapping[str, Tensor]) -> Tensor | None:
    """The weight of a layer in a reference, by any of its names; None if it has none."""
    return next((reference[name] for name in (layer.name, *layer.tied, layer.stored) if name in reference), None)


def reference_weight(layer: Layer, reference: Mapping[str, Tensor]) -> Tensor:
    """The reference of one layer, on the layer's device, in its type and, if it is sharded, in its shards.

    Of a layer with an adapter that the reference lacks, its base weight.

    Raises:
        ReferenceMismatch: the reference lacks the layer, or has it in another shape.
    """
    weight = stored_weight(layer, reference)
    if weight is None and layer.adapter is not None:
        weight = layer.parameter
    if weight is None:
        raise ReferenceMismatch(
            f"the reference has no weights for {layer.name}: it belongs to another model, or to a training that "
            "constrained fewer layers. Give the reference of this model, or constrain the layers of that training"
        )
    shape = tuple(layer.parameter.shape)
    if tuple(weight.shape) != shape:
        raise ReferenceMismatch(
            f"the reference of {layer.name} has shape {tuple(weight.shape)}, the model's has {shape}: "
            "it belongs to another model. Give the reference of this one"
        )
    return sharded_like(weight.detach(), layer.parameter)


def gathered(reference: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """A reference whole and on the CPU, one layer after the other, for the process that saves it.

    Args:
        reference: sharded or not; of sharded tensors all processes must call this.
        keep: whether this process wants it; the others help to gather, and get nothing.
    """
    found = {}
    for name, tensor in reference.items():
        weight = whole(tensor.detach())
        if keep:
            found[name] = weight.cpu()
    return found


def adapted_way(layer: Layer, reference: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """``W + Δ - W_ref`` of a layer with an adapter. It is Δ, bit for bit, if the reference has W or lacks the layer.

    A reference with the names of PEFT has an adapter, too, and W_ref is what that makes of the weight.

    Raises:
        ReferenceMismatch: the reference has the layer in another shape.
    """
    assert layer.adapter is not None
    way = layer.adapter.change(dtype)
    way -= layer.adapter.change(dtype, reference)
    if stored_weight(layer, reference) is not None:
        way += layer.parameter.detach().to(dtype) - reference_weight(layer, reference).to(dtype)
    return way


def weight_and_reference(layer: Layer, reference: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The weight of a layer, merged where it has an adapter, and its reference, on one device and in one type.

    Raises:
        ReferenceMismatch: see :func:`reference_weight`.
    """
    if layer.adapter is None:
        return layer.parameter.detach(), reference_weight(layer, reference)
    dtype = torch.promote_types(layer.parameter.dtype, torch.float32)
    weight = layer.parameter.detach().to(dtype) + layer.adapter.change(dtype)
    return weight, weight - adapted_way(layer, reference, dtype)


def reference_digest(reference: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes, as hexadecimal; the order of names does not count."""
    digest = hashlib.sha256()
    for name in sorted(reference):
        tensor = reference[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        # A byte view, as numpy has no bfloat16.
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_reference(reference: Mapping[str, Tensor], folder: str | Path, file: str = REFERENCE_FILE) -> Path:
    """Write ``_reference.safetensors`` (or another name) into a folder; a reader never sees half of it."""
    path = Path(folder) / file
    with written_whole(path) as temporary:
        safetensors.torch.save_file({n: t.detach().cpu().contiguous() for n, t in reference.items()}, temporary)
    return path


def load_reference(folder: str | Path, digest: str, file: str = REFERENCE_FILE) -> dict[str, Tensor]:
    """Read ``_reference.safetensors`` (or another name) from a folder and check that it is the one with this digest.

    Raises:
        ReferenceMismatch: no such file, not a safetensors file, or another digest.
    """
    path = Path(folder) / file
    if not path.is_file():
        raise ReferenceMismatch(
            f"the reference weights {path} are missing, and the distance of a layer can't be measured without "
            "them. Put the file back (it lies beside the checkpoints of the run that wrote them), or start "
            "a new run instead of resuming"
        )
    try:
        reference = safetensors.torch.load_file(path)
    except SafetensorError as error:
        raise ReferenceMismatch(f"{path} can't be read ({error}): restore it, or start a new run") from error
    found = reference_digest(reference)
    if found != digest:
        raise ReferenceMismatch(
            f"{path} has SHA-256 {found[:12]}…, but the checkpoint was trained around the reference "
            f"{digest[:12]}…: another run has overwritten it, or the checkpoint is from another run. "
            "Restore the file, or start a new run in an empty output_dir"
        )
    return reference
