"""Ridge regression on one-hot labels, each example predicted by a head that did not see its label.

With ``H = 1 1ᵀ/n + X (XᵀX + λI)^-1 Xᵀ`` (X centred, intercept not penalised), the head fitted without example i
predicts it as ``((H Y)_i - H_ii Y_i) / (1 - H_ii)`` exactly (Allen 1974; Golub, Heath & Wahba 1979). So one
eigendecomposition of the features gives n heads, every penalty, and the same for any other labels of these examples,
which a bootstrap wants.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..noise import Matrix

# Penalty of the ridge, in units of the mean variance of a standardised feature and example. Below it, heads on d near
# n interpolate the noise; above it, they say little more than the prior.
RIDGE_GRID = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)


class Spectrum(NamedTuple):
    """``X = left · diag(√values) · rightᵀ`` of centred features, without their null space."""

    left: Matrix
    """[n, r], orthonormal columns."""
    values: Matrix
    """[r], eigenvalues of ``XᵀX``, ascending."""
    right: Matrix
    """[d, r], orthonormal columns."""


def standardised(x: Matrix, others: Matrix) -> tuple[Matrix, Matrix]:
    """Features [n, d] of zero mean and unit variance, and other rows [m, d] on the same scale.

    Raises:
        ValueError: features that are the same for all examples.
    """
    mean, deviation = x.mean(axis=0), x.std(axis=0)
    # A constant feature says nothing, and dividing by its rounding error would make it loud.
    varies = deviation > 1e-12 * np.abs(x).max(axis=0)
    if not varies.any():
        raise ValueError(
            "features are the same for all examples: they can't tell classes apart. Was the backbone given its inputs?"
        )
    scale = np.where(varies, deviation, np.inf)
    return (x - mean) / scale, (others - mean) / scale


def decompose(x: Matrix) -> Spectrum:
    """Of centred features [n, d], by the smaller of their two Gram matrices."""
    if x.shape[1] <= len(x):
        values, right = np.linalg.eigh(x.T @ x)
        kept = values > 1e-10 * values[-1]
        values, right = values[kept], right[:, kept]
        return Spectrum(x @ right / np.sqrt(values), values, right)
    values, left = np.linalg.eigh(x @ x.T)
    kept = values > 1e-10 * values[-1]
    values, left = values[kept], left[:, kept]
    return Spectrum(left, values, x.T @ left / np.sqrt(values))


def leave_one_out(spectrum: Spectrum, targets: Matrix, penalty: float) -> Matrix:
    """[n, K]: each example's targets as predicted by the ridge that is fitted to all others."""
    n = len(targets)
    gain = spectrum.values / (spectrum.values + penalty * n)
    fitted = spectrum.left @ (gain[:, None] * (spectrum.left.T @ targets)) + targets.mean(axis=0)
    leverage = (spectrum.left**2 @ gain + 1 / n)[:, None]
    predicted: Matrix = (fitted - leverage * targets) / (1 - leverage)
    return predicted


def left_out_scores(spectrum: Spectrum, targets: Matrix, penalty: float) -> Matrix:
    """[n, K]: what each example's features add, in that prediction, to the mean target of the others.

    Without the intercept, as that mean gives the example's own target away: ``(n ȳ - y_i) / (n - 1)`` is lower for the
    class that it has. By ever so little, but scores are scaled, and where features say nothing it would be all of them.
    """
    n = len(targets)
    others = (targets.sum(axis=0) - targets) / (n - 1)
    scores: Matrix = leave_one_out(spectrum, targets, penalty) - others
    return scores


def best_penalty(spectrum: Spectrum, targets: Matrix) -> float:
    """The penalty of ``RIDGE_GRID`` with the least squared error left out: for one-hot targets, a Brier score."""
    errors = [((leave_one_out(spectrum, targets, penalty) - targets) ** 2).sum() for penalty in RIDGE_GRID]
    return RIDGE_GRID[int(np.argmin(errors))]


def head(spectrum: Spectrum, targets: Matrix, penalty: float) -> Matrix:
    """[d, K]: weights of the ridge on all examples, for centred features."""
    n = len(targets)
    gain = np.sqrt(spectrum.values) / (spectrum.values + penalty * n)
    weights: Matrix = spectrum.right @ (gain[:, None] * (spectrum.left.T @ targets))
    return weights
