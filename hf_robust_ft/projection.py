"""Distances from a reference weight, and projection onto a ball around it.

Two balls: ``‖W - W_ref‖_F ≤ α`` (equation 7 of Ju, Li & Zhang 2022; Li & Zhang 2021) and
``max_r Σ_j |W - W_ref|[r, j] ≤ α``, the operator norm from l∞ to l∞ (Gouk et al. 2021), enforced row by
row. Rows are outputs.

Weights are read a block at a time, so that no second copy of a weight is ever made, and edited in place.
On a GPU nothing here waits for the device. Of a sharded weight each process reads and edits its own shard, and
only norms are added up.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from .sharding import over_shards, shard, sharded_dims

Norm = Literal["frobenius", "inf_op"]

# Elements of a block: small enough to stay in a core's cache on a CPU and to add nothing to memory
# (256 KB), large enough for two threads. A GPU wants fewer, larger kernels (16 MB).
CPU_BLOCK, GPU_BLOCK = 1 << 16, 1 << 22

# Weights that are projected together: their differences from the centres hold at most so many elements (64 MB in
# float32).
TOGETHER = 1 << 24

# A projected weight aims this share of the radius inside the ball, and half of it is the line that may not
# be crossed: a distance summed in float32 (off by some 1e-7) then never passes for one inside, and a
# second projection has nothing to do.
MARGIN = 1e-5


def distance(weight: Tensor, reference: Tensor, norm: Norm, row_dims: tuple[int, ...] = (0,)) -> float:
    """``‖W - W_ref‖`` in float64; of sharded weights on all processes together.

    Args:
        weight, reference: same shape, same shards.
        norm: ``"frobenius"``, or ``"inf_op"`` for the largest row sum of absolute differences.
        row_dims: the dimensions that number the rows (outputs); used by ``"inf_op"``.
    """
    if norm == "frobenius":
        differences = _differences(shard(weight), shard(reference), torch.float64)
        square = math.fsum(float(d.square().sum()) for _, d in differences)
        total = torch.tensor(square, dtype=torch.float64, device=shard(weight).device)
        return math.sqrt(over_shards(total, weight).item())
    sums = row_sums(weight, reference, row_dims, torch.float64)
    largest = sums.max() if sums.numel() else sums.new_zeros(())  # a process may hold no row
    return over_shards(largest, weight, "max").item()


def magnitude(weight: Tensor, norm: Norm, row_dims: tuple[int, ...] = (0,)) -> float:
    """``‖W‖`` in float64; arguments as in :func:`distance`."""
    return distance(weight, torch.zeros((), device=weight.device).expand_as(shard(weight)), norm, row_dims)


@torch.no_grad()
def project_(
    weight: Tensor,
    reference: Tensor,
    radius: float,
    norm: Norm,
    *,
    reference_norm: float,
    row_dims: tuple[int, ...] = (0,),
    square: Tensor | None = None,
) -> None:
    """Move a weight, in place, into the ball of ``radius`` around ``reference``.

    ``W ← W_ref + min(1, α / ‖W - W_ref‖) (W - W_ref)``, for ``"inf_op"`` with one factor a row. A weight
    inside the ball is left bit for bit as it is, and projecting twice is projecting once. Half-precision
    weights are rounded towards the reference, as rounding to nearest could undo the whole step.

    Args:
        weight: edited in place; of a sharded one this process edits its shard.
        reference: the centre, same shape and shards.
        radius: α ≥ 0. Zero restores the reference.
        norm: which ball.
        reference_norm: ``‖W_ref‖`` in the same norm (:func:`magnitude`): the size of a rounding error.
        row_dims: the dimensions that number the rows; used by ``"inf_op"``.
        square: ``‖W - W_ref‖_F²`` of all shards; None: it is computed here, for a sharded weight with a reduction for
            it alone.
    """
    compute = torch.promote_types(weight.dtype, torch.float32)
    target, line = _aim(radius, reference_norm, compute)
    # A non-finite weight is left for the user to see. `pull` is how far to go back to the reference.
    if norm == "frobenius" and square is None:
        square = over_shards(square_distance(weight, reference), weight)
    own, centre = shard(weight), shard(reference)
    if norm == "frobenius" and own.device.type == "cpu":
        assert square is not None
        # Python's floats: tensors of one number would cost a sixth of the whole projection.
        length = math.sqrt(float(square))
        if not line < length < math.inf:
            return
        pull = torch.tensor(1 - target / length, dtype=compute)
    else:
        reach = row_sums(weight, reference, row_dims, compute) if square is None else square.sqrt()
        outside = (reach > line) & reach.isfinite()
        if own.device.type == "cpu" and not outside.any():
            return
        pull = torch.where(outside, 1 - target / reach, 0.0)
    if own.dtype == compute:
        own.lerp_(centre, pull)
    else:
        _pull_half_(own, centre, pull)


def _aim(radius: float, reference_norm: float, dtype: torch.dtype) -> tuple[float, float]:
    """The length that a projected difference gets, and the one from which on it is projected."""
    # The second term is what rounding each entry of the result can add to the distance.
    target = max(0.0, radius * (1 - MARGIN) - torch.finfo(dtype).eps * reference_norm)
    return target, radius * (1 - MARGIN / 2)


@torch.no_grad()
def project_together_(
    weights: Sequence[Tensor], references: Sequence[Tensor], radii: Sequence[float], reference_norms: Sequence[float]
) -> None:
    """:func:`project_` of many weights in the Frobenius norm: a few kernels for all and one for each, not a dozen.

    A step of a small model on a GPU takes as long as the CPU needs to launch its kernels: a projection one by one made
    it half as long again (recipes/RESULTS.md). A weight that is not finite comes out with NaN.

    Args:
        weights: edited in place; whole (not sharded), on one device, all float32 or all float64.
        references, radii, reference_norms: of each weight, see :func:`project_`.
    """
    aims = [_aim(radius, size, weights[0].dtype) for radius, size in zip(radii, reference_norms, strict=True)]
    start = 0
    while start < len(weights):
        end, elements = start + 1, weights[start].numel()
        while end < len(weights) and elements + weights[end].numel() <= TOGETHER:
            elements += weights[end].numel()
            end += 1
        some, centres = list(weights[start:end]), list(references[start:end])
        targets, lines = zip(*aims[start:end], strict=True)
        lengths = torch._foreach_norm(torch._foreach_sub(some, centres))
        # Scalars travel with the kernels: nothing is copied to the device, and nothing waits for it.
        beyond = torch.stack(torch._foreach_sub(lengths, lines))
        kept = torch.stack(torch._foreach_mul(torch._foreach_reciprocal(lengths), targets))
        pull = torch.where((beyond > 0) & beyond.isfinite(), 1 - kept, 0.0)
        for weight, centre, factor in zip(some, centres, pull.unbind(), strict=True):
            weight.lerp_(centre, factor)
        start = end


def square_distance(weight: Tensor, reference: Tensor) -> Tensor:
    """``‖W - W_ref‖_F²`` of the shard that this process holds, a scalar in at least float32."""
    compute = torch.promote_types(weight.dtype, torch.float32)
    own = shard(weight)
    squares = (_square(block) for _, block in _differences(own, shard(reference), compute))
    if own.device.type == "cpu":
        return torch.tensor(sum(float(square) for square in squares), dtype=torch.float64)
    found = list(squares)
    return torch.stack(found).sum() if found else torch.zeros((), dtype=compute, device=own.device)


def _square(block: Tensor) -> Tensor:
    flat = block.flatten()
    return torch.dot(flat, flat)


def _pull_half_(weight: Tensor, reference: Tensor, pull: Tensor) -> None:
    """``lerp_`` for half precision: no entry ends farther from the reference than exact arithmetic puts it."""
    pull = pull if pull.dim() else pull.reshape([1] * weight.dim())
    for rows, difference in _differences(weight, reference, torch.float32):
        centre = reference[rows]
        keep = 1 - (pull[rows] if pull.shape[0] > 1 else pull)
        exact = difference * keep
        moved = (centre + exact).to(weight.dtype)
        too_far = (moved.float() - centre.float()).abs() > exact.abs()
        weight[rows] = torch.where(too_far, torch.nextafter(moved, centre), moved)


def row_sums(weight: Tensor, reference: Tensor, row_dims: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """``Σ |W - W_ref|`` of each row that this process holds a part of, shaped to broadcast against its shard."""
    sums = _row_sums(shard(weight), shard(reference), row_dims, dtype)
    # Cut between rows, each process has its own ones whole.
    return sums if set(sharded_dims(weight)) <= set(row_dims) else over_shards(sums, weight)


def _row_sums(weight: Tensor, reference: Tensor, row_dims: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    others = [d for d in range(weight.dim()) if d not in row_dims]
    shape = [n if d in row_dims else 1 for d, n in enumerate(weight.shape)]
    sums = torch.zeros(shape, dtype=dtype, device=weight.device)
    for rows, difference in _differences(weight, reference, dtype):
        part = difference.abs_().sum(dim=others, keepdim=True)
        if 0 in row_dims:
            sums[rows] = part
        else:
            sums += part
    return sums


def _differences(weight: Tensor, reference: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """``W - W_ref`` block by block along the first dimension; a block is valid until the next one."""
    block = CPU_BLOCK if weight.device.type == "cpu" else GPU_BLOCK
    step = max(1, block * weight.shape[0] // max(1, weight.numel()))
    weight = weight.detach()
    # One buffer for all blocks: a new one for each costs the CPU more than the subtraction.
    buffer = torch.empty((min(step, len(weight)), *weight.shape[1:]), dtype=dtype, device=weight.device)
    for start in range(0, weight.shape[0], step):
        rows = slice(start, start + step)
        some, centre = weight[rows], reference[rows]
        out = buffer[: len(some)]
        if some.dtype == dtype == centre.dtype:
            torch.sub(some, centre, out=out)
        else:
            out.copy_(some).sub_(centre)  # converted before they are subtracted
        yield rows, out
