"""Weights of which each process holds a shard: the ``DTensor`` of FSDP2 (``fully_shard``) and tensor parallelism.

All processes must call what adds up or gathers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether other processes hold other parts of it."""
    return isinstance(tensor, DTensor)


def has_shards(model: nn.Module) -> bool:
    """Whether other processes hold other parts of some of its weights."""
    managed = any(isinstance(module, FSDPModule) for module in model.modules())
    return managed or any(is_sharded(parameter) for parameter in model.parameters())


def reshard(model: nn.Module) -> None:
    """The shards that are trained in the place of whole weights, as FSDP2 leaves some after a forward pass."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def computing_device(tensor: Tensor) -> torch.device:
    """Where a tensor is when it is whole: shards may be offloaded to the CPU."""
    return torch.device(tensor.device_mesh.device_type) if isinstance(tensor, DTensor) else tensor.device


def shard(tensor: Tensor) -> Tensor:
    """What this process holds: the tensor itself where it is not sharded. Shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of it, on every process; the tensor itself where it is not sharded."""
    if not isinstance(tensor, DTensor):
        return tensor
    # Processes of a GPU's mesh talk by GPU, also of shards that FSDP2 has offloaded to the CPU.
    there = tensor.to(tensor.device_mesh.device_type)
    assert isinstance(there, DTensor)
    return there.full_tensor()


def sharded_like(tensor: Tensor, other: Tensor) -> Tensor:
    """A tensor in type, device and shards of another one; whole, if that is.

    Args:
        tensor: whole and the same on all processes, or sharded in the same way.
    """
    if not isinstance(other, DTensor):
        return whole(tensor).to(other)
    tensor = tensor.to(other.device, other.dtype)
    if isinstance(tensor, DTensor):
        return tensor
    # Each process cuts its own part out, on the mesh's device: nothing is sent.
    return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None).to(other.device)


def over_shards(value: Tensor, weight: Tensor, how: Literal["sum", "max"] = "sum") -> Tensor:
    """Sum or maximum, over the processes that hold different parts of a weight, of what each found of its own part."""
    if not isinstance(weight, DTensor):
        return value
    placements = [Replicate() if p.is_replicate() else Partial(how) for p in weight.placements]
    total = DTensor.from_local(value, weight.device_mesh, placements, run_check=False).full_tensor()
    return total.to(value.device)


def over_shards_at_once(values: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
    """Sums as :func:`over_shards` gives, of one number for each weight, by one reduction for all weights alike."""
    alike: dict[object, list[int]] = {}
    for i, weight in enumerate(weights):
        if isinstance(weight, DTensor):
            alike.setdefault((weight.device_mesh, weight.placements), []).append(i)
    found = list(values)
    for places in alike.values():
        summed = over_shards(torch.stack([values[i] for i in places]), weights[places[0]])
        for i, value in zip(places, summed, strict=True):
            found[i] = value
    return found


def sharded_dims(weight: Tensor) -> tuple[int, ...]:
    """The dimensions along which a weight is cut."""
    if not isinstance(weight, DTensor):
        return ()
    dims = (getattr(placement, "dim", None) for placement in weight.placements)  # of a replica there is none
    return tuple({dim % weight.dim() for dim in dims if dim is not None})
