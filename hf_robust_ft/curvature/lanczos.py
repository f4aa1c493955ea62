"""Lanczos quadrature: ``vᵀ H⁺ v`` from products with H, for many examples at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def positive_part(product: Callable[[Tensor], Tensor], start: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """``vᵀ H⁺ v`` for a batch of symmetric matrices, H⁺ the part with non-negative eigenvalues.

    Lanczos started at v/‖v‖ is Gauss quadrature for the spectral measure of v (Golub & Meurant 1994):
    ``‖v‖² Σ_k ω_k max(θ_k, 0)``, with θ_k the Ritz values and ω_k the squared first components of the Ritz
    vectors. Exact once steps reach the dimension of the Krylov space. Every new vector is made orthogonal to all
    others, twice.

    Args:
        product: H applied to [B, …], each example's own H.
        start: v, [B, …].
        steps: the number of products; memory is that of as many vectors.

    Returns:
        The values [B] in float64, and what half as many steps would have changed, [B]: an indicator of
        convergence, not an error bound.
    """
    shape, batch = start.shape, len(start)
    v = start.reshape(batch, -1)
    steps = min(steps, v.shape[1])
    if not steps:  # an example that the layer never sees
        nothing = torch.zeros(batch, dtype=torch.float64, device=v.device)
        return nothing, nothing
    norm = v.norm(dim=1, keepdim=True)
    q = _divided(v, norm)
    basis = q.new_zeros(batch, steps, v.shape[1])
    diagonal = torch.zeros(batch, steps, dtype=torch.float64, device=v.device)
    beside = torch.zeros(batch, steps, dtype=torch.float64, device=v.device)
    scale = torch.zeros_like(norm)
    for k in range(steps):
        basis[:, k] = q
        w = product(q.view(shape)).reshape(batch, -1)
        scale = torch.maximum(scale, w.norm(dim=1, keepdim=True))
        diagonal[:, k] = (q * w).sum(1, dtype=torch.float64)
        found = basis[:, : k + 1]
        for _ in range(2):
            w = w - torch.bmm(torch.bmm(found, w.unsqueeze(-1)).transpose(1, 2), found)[:, 0]
        length = w.norm(dim=1, keepdim=True)
        # What is left of an exhausted Krylov space is rounding.
        length = length.where(length > 10 * torch.finfo(w.dtype).eps * scale, 0)
        q = _divided(w, length)
        beside[:, k] = length[:, 0].double()
    square = norm[:, 0].double().square()
    whole = square * _quadrature(diagonal, beside)
    half = (steps + 1) // 2
    return whole, (whole - square * _quadrature(diagonal[:, :half], beside[:, :half])).abs()


def _quadrature(diagonal: Tensor, beside: Tensor) -> Tensor:
    off = torch.diag_embed(beside[:, :-1], 1)
    values, vectors = torch.linalg.eigh(torch.diag_embed(diagonal) + off + off.transpose(1, 2))
    total: Tensor = (vectors[:, 0].square() * values.clamp(min=0)).sum(1)
    return total


def _divided(vectors: Tensor, lengths: Tensor) -> Tensor:
    return torch.where(lengths > 0, vectors / lengths.where(lengths > 0, 1), 0)
