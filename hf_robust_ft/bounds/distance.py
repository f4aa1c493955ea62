"""Measures of generalization from weights and the way that they travelled, without any curvature.

Each is the part of a published bound that depends on the weights. What is left out (norms of inputs, Lipschitz
constants, logarithms of widths) is the same for models of one kind trained on one task, so the measures compare such
models; their scale says nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from .bound import Bound, check_count

ASSUMPTIONS = (
    "up to constants: comparable between models of one architecture and task only",
    "the bound that it comes from is for feed-forward networks without residual connections or attention",
)
WHAT = "generalization gap, up to constants"


def distance_measures(
    layers: Iterable[tuple[Tensor, Tensor]], *, n: int, margin: float | None = None, largest_loss: float | None = None
) -> list[Bound]:
    """Five measures that the Hessian distance measure is usually compared with.

    With ``D_i = W_i - W_i^ref``, ``‖·‖_F`` the Frobenius, ``‖·‖₂`` the spectral, ``‖·‖_∞`` the largest row sum and
    ``‖·‖_2,1`` the sum of the lengths of the rows:

    - *distance*: ``√(Σ ‖D_i‖_F²) / √n`` (Nagarajan & Kolter 2019);
    - *row sums*: ``Π 2‖W_i‖_∞ · Σ ‖D_i‖_∞ / ‖W_i‖_∞ / √n`` (Gouk et al. 2021, theorem 1);
    - *spectral*: ``Π ‖W_i‖₂ · √(Σ ‖D_i‖_F² / ‖W_i‖₂²) / (γ √n)`` (Neyshabur et al. 2018, theorem 1, with distances
      from the reference, as in Jiang et al. 2020);
    - *spectral, row lengths*: ``Π ‖W_i‖₂ · (Σ (‖D_i‖_2,1 / ‖W_i‖₂)^(2/3))^(3/2) / (γ √n)`` (Bartlett et al. 2017,
      theorem 1);
    - *parameters*: ``C √(P (Σ ‖D_i‖₂ + log n) / n)``, P the number of weights (Long & Sedghi 2020, theorem 2.1).

    Args:
        layers: pairs of a weight and its reference, rows are outputs; kernels are read as [out, everything else].
        n: number of training examples.
        margin: γ > 0 of the logits, such as the 10th percentile over training examples; None: measures that need one
            are not measured.
        largest_loss: C; None: the measure that needs it is not measured.

    Returns:
        Five measures. Terms: ``log10`` of the value, which may be beyond floats, and its factors.

    Raises:
        ValueError: no layer, shapes that differ, weights that are not finite, n below 1, a margin or largest loss
            that is not positive.
    """
    check_count(n)
    for label, number in (("margin", margin), ("largest_loss", largest_loss)):
        if number is not None and not (number > 0 and math.isfinite(number)):
            raise ValueError(f"{label} is {number}; it is positive and finite, or None where it is not known")
    # One pair after the other: together they may be more than fits into memory.
    parameters, norms = 0, []
    for weight, centre in layers:
        norms.append(_norms(weight, centre))
        parameters += weight.numel()
    if not norms:
        raise ValueError("layers is empty; give at least one pair of weight and reference")
    spectral, row_sums = [w["spectral"] for w, _ in norms], [w["row_sum"] for w, _ in norms]
    frobenius = math.sqrt(math.fsum(d["frobenius"] ** 2 for _, d in norms))
    root = math.log(n) / 2
    travelled = math.fsum(d["spectral"] for _, d in norms)
    degenerate = None if min(spectral) > 0 else "a weight is zero, and its norm a divisor"
    no_margin = degenerate or ("no margin was given" if margin is None else None)
    found = [
        _measure(
            "distance", "Nagarajan & Kolter 2019 (arXiv 1901.01672)", n, _log(frobenius) - root, {"norm": frobenius}
        )
    ]

    def product(name: str, source: str, of: list[float], factor: float, divisor: float, missing: str | None) -> Bound:
        logs = math.fsum(map(_log, of))
        terms = {"log10_product": logs / math.log(10), "factor": factor}
        return _measure(name, source, n, logs + _log(factor) - divisor - root, terms, missing)

    def ratios(divisors: list[float], norm: str, power: float) -> float:
        if degenerate:
            return math.nan
        pairs = zip(norms, divisors, strict=True)
        return float(math.fsum((d[norm] / divisor) ** power for (_, d), divisor in pairs) ** (1 / power))

    gamma = math.log(margin) if margin is not None else 0.0
    found += [
        product(
            "row sums", "Gouk et al. 2021 (arXiv 2002.08253), theorem 1", [2 * each for each in row_sums],
            ratios(row_sums, "row_sum", 1), 0.0, degenerate,
        ),
        product(
            "spectral", "Neyshabur et al. 2018 (arXiv 1707.09564), theorem 1; Jiang et al. 2020", spectral,
            ratios(spectral, "frobenius", 2), gamma, no_margin,
        ),
        product(
            "spectral, row lengths", "Bartlett et al. 2017 (arXiv 1706.08498), theorem 1", spectral,
            ratios(spectral, "row_lengths", 2 / 3), gamma, no_margin,
        ),
        _measure(
            "parameters",
            "Long & Sedghi 2020 (arXiv 1905.12600), theorem 2.1",
            n,
            _log(largest_loss or 1.0) + _log(parameters * (travelled + math.log(n))) / 2 - root,
            {"parameters": float(parameters), "distance": travelled},
            "no largest loss was given" if largest_loss is None else None,
        ),
    ]  # fmt: skip
    return found


def _measure(name: str, source: str, n: int, log: float, terms: dict[str, float], missing: str | None = None) -> Bound:
    if missing is not None:
        return Bound(name, None, "measure", WHAT, {}, (missing,), source, n=n)
    value = math.exp(log) if log < 700 else math.inf
    return Bound(name, value, "measure", WHAT, {"log10": log / math.log(10), **terms}, ASSUMPTIONS, source, n=n)


def _norms(weight: Tensor, centre: Tensor) -> tuple[dict[str, float], dict[str, float]]:
    """Of a weight and of its way."""
    if weight.shape != centre.shape or weight.dim() < 2:
        raise ValueError(
            f"a layer has shape {tuple(weight.shape)} and its reference {tuple(centre.shape)}; give matrices or "
            "kernels of one shape"
        )
    matrix = weight.detach().flatten(1).double()
    way = matrix - centre.detach().to(matrix.device).flatten(1).double()
    if not bool(way.isfinite().all()):
        raise ValueError("a layer holds NaN or infinity; look at the model's weights")
    return _of(matrix), _of(way)


def _of(matrix: Tensor) -> dict[str, float]:
    rows = torch.linalg.vector_norm(matrix, dim=1)
    return {
        "frobenius": torch.linalg.vector_norm(matrix).item(),
        "spectral": torch.linalg.matrix_norm(matrix, 2).item(),
        "row_sum": matrix.abs().sum(1).max().item(),
        "row_lengths": rows.sum().item(),
    }


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf if value == 0 else math.nan
