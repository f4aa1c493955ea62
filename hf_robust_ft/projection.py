"""Distances from a reference weight, and projection onto a ball around it.

Two balls: ``‖W - W_ref‖_F ≤ α`` (equation 7 of Ju, Li & Zhang 2022; Li & Zhang 2021) and
``max_r Σ_j |W - W_ref|[r, j] ≤ α``, the operator norm from l∞ to l∞ (Gouk et al. 2021), enforced row by
row. Rows are outputs.

Weights are read a block at a time, so that no second copy of a weight is ever made, and edited in place.
On a GPU nothing here waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

Norm = Literal["frobenius", "inf_op"]

# Elements of a block: small enough to stay in a core's cache on a CPU and to add nothing to memory
# (256 KB), large enough for two threads. A GPU wants fewer, larger kernels (16 MB).
CPU_BLOCK, GPU_BLOCK = 1 << 16, 1 << 22

# A projected weight aims this share of the radius inside the ball, and half of it is the line that may not
# be crossed: a distance summed in float32 (off by some 1e-7) then never passes for one inside, and a
# second projection has nothing to do.
MARGIN = 1e-5


def distance(weight: Tensor, reference: Tensor, norm: Norm, row_dims: tuple[int, ...] = (0,)) -> float:
    """``‖W - W_ref‖`` in float64.

    Args:
        weight, reference: same shape.
        norm: ``"frobenius"``, or ``"inf_op"`` for the largest row sum of absolute differences.
        row_dims: the dimensions that number the rows (outputs); used by ``"inf_op"``.
    """
    if norm == "frobenius":
        squares = [float(d.square().sum()) for _, d in _differences(weight, reference, torch.float64)]
        return math.sqrt(math.fsum(squares))
    return float(_row_sums(weight, reference, row_dims, torch.float64).max())


def magnitude(weight: Tensor, norm: Norm, row_dims: tuple[int, ...] = (0,)) -> float:
    """``‖W‖`` in float64; arguments as in :func:`distance`."""
    return distance(weight, torch.zeros((), device=weight.device).expand_as(weight), norm, row_dims)


@torch.no_grad()
def project_(
    weight: Tensor,
    reference: Tensor,
    radius: float,
    norm: Norm,
    *,
    reference_norm: float,
    row_dims: tuple[int, ...] = (0,),
) -> None:
    """Move a weight, in place, into the ball of ``radius`` around ``reference``.

    ``W ← W_ref + min(1, α / ‖W - W_ref‖) (W - W_ref)``, for ``"inf_op"`` with one factor a row. A weight
    inside the ball is left bit for bit as it is, and projecting twice is projecting once. Half-precision
    weights are rounded towards the reference, as rounding to nearest could undo the whole step.

    Args:
        weight: edited in place.
        reference: the centre, same shape.
        radius: α ≥ 0. Zero restores the reference.
        norm: which ball.
        reference_norm: ``‖W_ref‖`` in the same norm (:func:`magnitude`): the size of a rounding error.
        row_dims: the dimensions that number the rows; used by ``"inf_op"``.
    """
    compute = torch.promote_types(weight.dtype, torch.float32)
    # The second term is what rounding each entry of the result can add to the distance.
    target = max(0.0, radius * (1 - MARGIN) - torch.finfo(compute).eps * reference_norm)
    line = radius * (1 - MARGIN / 2)
    # A non-finite weight is left for the user to see. `pull` is how far to go back to the reference.
    if norm == "frobenius" and weight.device.type == "cpu":
        # Python's floats: tensors of one number would cost a sixth of the whole projection.
        length = math.sqrt(sum(float(_square(block)) for _, block in _differences(weight, reference, compute)))
        if not line < length < math.inf:
            return
        pull = torch.tensor(1 - target / length, dtype=compute)
    else:
        if norm == "frobenius":
            squares = [_square(block) for _, block in _differences(weight, reference, compute)]
            reach = torch.stack(squares).sum().sqrt()
        else:
            reach = _row_sums(weight, reference, row_dims, compute)
        outside = (reach > line) & reach.isfinite()
        if weight.device.type == "cpu" and not outside.any():
            return
        pull = torch.where(outside, 1 - target / reach, 0.0)
    if weight.dtype == compute:
        weight.lerp_(reference, pull)
    else:
        _pull_half_(weight, reference, pull)


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


def _row_sums(weight: Tensor, reference: Tensor, row_dims: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """``Σ |W - W_ref|`` of each row, shaped to broadcast against the weight."""
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
