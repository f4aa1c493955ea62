"""Changes of a weight that are a product of two thin factors, ``Δ = s L R`` (LoRA): norms, projection, penalty.

With L of shape [rows, rank] and R of shape [rank, columns], nothing of the size of Δ is needed for its Frobenius norm,
``‖L R‖² = ⟨Lᵀ L, R Rᵀ⟩``. Scaling L scales Δ, so the nearest point of a ball around zero is reached by L alone.
Balls: see :mod:`~hf_robust_ft.projection`. LoRA: Hu et al. 2022 (arXiv 2106.09685).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .projection import CPU_BLOCK, GPU_BLOCK, MARGIN, Norm


def product_norm(left: Tensor, right: Tensor, scale: float, norm: Norm) -> float:
    """``‖s L R‖`` in float64.

    The error is that of a difference of numbers of the size of ``(‖L‖ ‖R‖)²``: it would show where the columns of L
    cancel each other to one part in a million.

    Args:
        left: L, [rows, rank]; the rows are those of the row-sum norm.
        right: R, [rank, columns].
        scale: s.
        norm: ``"frobenius"``, or ``"inf_op"`` for the largest row sum of absolute values.
    """
    reach, _, _ = _reach(left, right, scale, norm)
    return float(reach.max())


@torch.no_grad()
def project_product_(left: Tensor, right: Tensor, scale: float, radius: float, norm: Norm) -> None:
    """Move ``Δ = s L R`` into the ball of ``radius`` around zero by scaling L in place; by rows for ``"inf_op"``.

    ``L ← min(1, α / ‖Δ‖) L``, which is the Euclidean projection of Δ. A product inside the ball is left bit for bit as
    it is, and projecting twice is projecting once. Rounding L can add up to ``ε/2 s ‖L‖ ‖R‖`` to ‖Δ‖, so Δ is aimed
    that much farther inside: next to nothing in float32. In half precision, where rounding could else undo the whole
    step, it is ``ε/2 ‖L‖ ‖R‖ / ‖L R‖`` of the radius, in bfloat16 some percent.

    Args:
        left: edited in place; further arguments as in :func:`product_norm`.
        radius: α ≥ 0. Zero makes L zero.
    """
    reach, sizes, steps = _reach(left, right, scale, norm)
    # See MARGIN. A product that is not finite is left for the user to see.
    outside = (reach > radius * (1 - MARGIN / 2)) & reach.isfinite()
    if left.device.type == "cpu" and not outside.any():
        return
    numbers = torch.finfo(left.dtype)
    # An entry is rounded by half of ε times itself, or of the smallest number that there is.
    room = radius * (1 - MARGIN) - numbers.eps * numbers.smallest_normal / 2 * steps
    keep = torch.where(outside, room.clamp(min=0) / (reach + numbers.eps / 2 * sizes), 1.0)
    left.copy_(left.double() * keep)


@torch.no_grad()
def product_gradients(left: Tensor, right: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Gradients of ``½ ‖s L R‖_F²`` in L and R: ``s² L R Rᵀ`` and ``s² Lᵀ L R``.

    Arguments as in :func:`product_norm`.

    Returns:
        In the shapes of L and R, at least float32.
    """
    dtype = torch.promote_types(left.dtype, torch.float32)
    left, right = left.detach().to(dtype), right.detach().to(dtype)
    return scale**2 * (left @ (right @ right.t())), scale**2 * ((left.t() @ left) @ right)


def _reach(left: Tensor, right: Tensor, scale: float, norm: Norm) -> tuple[Tensor, Tensor, Tensor]:
    """``‖Δ‖``, and what it grows by if each entry of L grows by its own size, or by one. float64.

    Of all of Δ, or for ``"inf_op"`` of each row, [rows, 1].
    """
    left, right, scale = left.detach().double(), right.detach().double(), abs(scale)
    if norm == "frobenius":
        square = ((left.t() @ left) * (right @ right.t())).sum()
        length = torch.linalg.vector_norm(right)
        sizes = torch.linalg.vector_norm(left) * length
        return scale * square.clamp(min=0).sqrt(), scale * sizes, scale * length * left.numel() ** 0.5
    lengths = right.abs().sum(1, keepdim=True)
    block = CPU_BLOCK if left.device.type == "cpu" else GPU_BLOCK
    some = torch.split(left, max(1, block // max(1, right.shape[1])))  # Δ in blocks of rows
    sums = torch.cat([(rows @ right).abs_().sum(1, keepdim=True) for rows in some])
    return scale * sums, scale * (left.abs() @ lengths), scale * lengths.sum()
