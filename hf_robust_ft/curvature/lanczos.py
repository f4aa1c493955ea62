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
    if not v.shape[1]:  # an example that the layer never sees
        nothing = torch.zeros(batch, dtype=torch.float64, device=v.device)
        return nothing, nothing
    square = v.double().square().sum(1)
    diagonal, beside = tridiagonal(lambda q: product(q.view(shape)).reshape(batch, -1), v, steps)
    half = (min(steps, v.shape[1]) + 1) // 2

    def positive(first: int) -> Tensor:
        values, weights = quadrature(diagonal[:, :first], beside[:, :first])
        return square * (weights * values.clamp(min=0)).sum(1)

    whole = positive(steps)
    return whole, (whole - positive(half)).abs()


def tridiagonal(product: Callable[[Tensor], Tensor], start: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """The matrices of Lanczos: their diagonals and what stands beside, [B, steps taken] each, in float64.

    Args:
        product: H applied to [B, P], each example's own H.
        start: [B, P]; Lanczos vectors are kept in its precision.
        steps: at most so many products; fewer where all Krylov spaces are exhausted. One that is exhausted before
            the others goes on with zeros.
    """
    batch, size = start.shape
    steps = min(steps, size)
    q = _divided(start, start.norm(dim=1, keepdim=True))
    basis = q.new_zeros(batch, steps, size)
    diagonal = torch.zeros(batch, steps, dtype=torch.float64, device=q.device)
    beside = torch.zeros(batch, steps, dtype=torch.float64, device=q.device)
    scale = q.new_zeros(batch, 1)
    for k in range(steps):
        basis[:, k] = q
        w = product(q).to(q)
        scale = torch.maximum(scale, w.norm(dim=1, keepdim=True))
        diagonal[:, k] = (q * w).sum(1, dtype=torch.float64)
        found = basis[:, : k + 1]
        for _ in range(2):
            w = w - torch.bmm(torch.bmm(found, w.unsqueeze(-1)).transpose(1, 2), found)[:, 0]
        length = w.norm(dim=1, keepdim=True)
        # What is left of an exhausted Krylov space is rounding.
        length = length.where(length > 10 * torch.finfo(w.dtype).eps * scale, 0)
        beside[:, k] = length[:, 0].double()
        if not length.any():
            break
        q = _divided(w, length)
    return diagonal[:, : k + 1], beside[:, : k + 1]


def quadrature(diagonal: Tensor, beside: Tensor) -> tuple[Tensor, Tensor]:
    """Ritz values, and weights that sum to 1, [B, steps] each: Gauss quadrature for the spectral measure."""
    off = torch.diag_embed(beside[:, :-1], 1)
    values, vectors = torch.linalg.eigh(torch.diag_embed(diagonal) + off + off.transpose(1, 2))
    return values, vectors[:, 0].square()


def _divided(vectors: Tensor, lengths: Tensor) -> Tensor:
    return torch.where(lengths > 0, vectors / lengths.where(lengths > 0, 1), 0)
