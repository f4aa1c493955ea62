"""The largest eigenvalues of a symmetric matrix of which only products are known: restarted Lanczos."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

# What has not converged by then lies in a dense part of the spectrum, or below the rounding of the products.
MAX_PRODUCTS = 2000

# Numbers of the basis in one product with it. A sum within is made in the precision of the vectors, one of sums in
# float64: float32 sums of 20 million numbers lose the fourth digit. A restart needs room for as many.
BLOCK_NUMBERS = 1 << 20


def largest_eigenpairs(
    product: Callable[[Tensor], Tensor], start: Tensor, count: int, kept: int, tolerance: float
) -> tuple[Tensor, Tensor, Tensor]:
    """By thick-restart Lanczos (Wu & Simon 2000, SIAM J. Matrix Anal. Appl. 22(2)).

    Lanczos until ``kept`` vectors are there, then on from the Ritz vectors of the largest Ritz values, and so on. In
    exact arithmetic it searches the spaces of implicitly restarted Lanczos, ARPACK's; but its vectors lie on the device
    of ``start`` and in its precision, for work on vectors costs as much as products where there are millions of
    weights. Each is made orthogonal to all others, twice. Where nothing is left of one, a random one goes on, so that
    copies of an eigenvalue are found.

    Args:
        product: H applied to [P].
        start: [P], not zero.
        count: how many, at least 1.
        kept: vectors in memory, more than ``count`` and less than P.
        tolerance: of ``‖H u - θ u‖``, relative to ``|θ|``, by what the recurrence says of it. Nothing is judged before
            ``kept`` products: of two eigenvalues that are nearly the same, the smaller one may converge first.

    Returns:
        Ritz values θ, largest first, [count] in float64 on the CPU; Ritz vectors u, [count, P], orthonormal; whether
        each is within the tolerance, [count]: after ``MAX_PRODUCTS`` not all may be.
    """
    basis = start.new_empty(kept, len(start))
    projected = torch.zeros(kept, kept, dtype=torch.float64)  # V H Vᵀ
    rounding = 10 * torch.finfo(start.dtype).eps
    generator = torch.Generator(start.device).manual_seed(0)
    following = start / _length(start)
    filled, longest = 0, 0.0
    values = turn = within = torch.empty(0)  # eigenpairs of what is projected
    for products in range(1, MAX_PRODUCTS + 1):
        if filled == kept:
            filled = count + (kept - count) // 2
            _turn(basis, turn[:, -filled:])
            projected.zero_().diagonal()[:filled] = values[-filled:]
        basis[filled] = following
        filled += 1
        image = product(following).to(start, copy=True)
        longest = max(longest, _length(image))
        following, along = _orthogonal(image, basis[:filled])
        projected[:filled, filled - 1] = projected[filled - 1, :filled] = along.cpu()
        beyond = _length(following)
        if beyond <= rounding * longest:  # H does not lead out of this space
            beyond = 0.0
            random = torch.randn(start.shape, generator=generator, dtype=start.dtype, device=start.device)
            following, _ = _orthogonal(random, basis[:filled])
        following /= _length(following)
        values, turn = torch.linalg.eigh(projected[:filled, :filled])
        within = beyond * turn[-1].abs() <= tolerance * values.abs()
        if products >= kept and within[-count:].all():
            break
    largest = turn[:, -count:].flip(1)
    vectors = largest.t().to(start) @ basis[:filled]
    return values[-count:].flip(0), vectors, within[-count:].flip(0)


def _orthogonal(vector: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """What of a vector lies beyond an orthonormal basis [k, P], [P], and along it, [k] in float64; vector changes."""
    along = torch.zeros(len(basis), dtype=torch.float64, device=basis.device)
    for _ in range(2):  # the first leaves its own rounding
        parts = list(zip(_blocks(basis), torch.split(vector, _width(basis)), strict=True))
        lengths = torch.stack([part @ of_vector for part, of_vector in parts]).sum(0, dtype=torch.float64)
        for part, of_vector in parts:
            of_vector -= lengths.to(basis) @ part
        along += lengths
    return vector, along


def _turn(basis: Tensor, turn: Tensor) -> None:
    """In place: the first rows of a basis [k, P] become ``turnᵀ basis``, turn [k, m]."""
    rows = turn.t().to(basis)
    for part in _blocks(basis):
        part[: len(rows)] = rows @ part


def _blocks(basis: Tensor) -> tuple[Tensor, ...]:
    """Views of some columns each."""
    return torch.split(basis, _width(basis), dim=1)


def _width(basis: Tensor) -> int:
    return max(1, BLOCK_NUMBERS // len(basis))


def _length(vector: Tensor) -> float:
    squares = torch.stack([part @ part for part in torch.split(vector, BLOCK_NUMBERS)])
    return math.sqrt(squares.sum(dtype=torch.float64).item())
