"""Out-of-fold class probabilities of a linear head on frozen features.

The head is a ridge regression on one-hot labels, whose scores a small softmax regression (K x K) turns into
probabilities. Both are linear, so together they are one linear head, but

- the ridge has a closed form: one eigendecomposition a fold gives every strength of the penalty;
- its scores estimate ``E[onehot(ỹ) | x] = p(x) T``, a linear map of the clean posterior. The *subspace* of the
  features that they span is therefore the same for clean and for noisy labels (as in linear discriminant analysis),
  whatever T is, so later stages can look for T in K dimensions instead of d;
- the second stage is matrix scaling, of which temperature scaling (Guo et al. 2017, arXiv 1706.04599) is the case of
  one parameter.

Every probability of an example comes from heads and calibrations that did not see its label.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax

from ..noise import Matrix
from .inputs import Labels, check_class_labels, check_features

# Penalty of the ridge, in units of the mean variance of a standardised feature and example. Below it, heads on d near
# n interpolate the noise; above it, they say little more than the prior.
RIDGE_GRID = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)

# Weights of the second stage have a standard normal prior, for scores of unit mean square: a score one unit off moves
# a logit by about one. It is weak (worth a few examples), but keeps separable classes from infinite weights.
WEIGHT_PRECISION = 1.0
# Intercepts: only so weak a one that a class absent from a fold gets a finite one.
INTERCEPT_PRECISION = 0.01


class CrossFit(NamedTuple):
    """Out-of-fold scores and probabilities of the noisy label."""

    scores: Matrix
    """[n, K]: ridge scores, out of fold, of unit mean square."""
    probabilities: Matrix
    """[n, K]: calibrated ``P(ỹ = j | x)``, out of fold."""
    fold: npt.NDArray[np.int64]
    """[n]: the fold that held each example out."""
    ridge: float
    """The penalty chosen, of ``RIDGE_GRID``."""
    new_probabilities: Matrix
    """[m, K]: ``P(ỹ = j | x)`` of the new features (none: m = 0), averaged over the heads of all folds."""


def crossfit(
    features: npt.ArrayLike,
    labels: npt.ArrayLike,
    num_classes: int | None = None,
    *,
    folds: int = 5,
    seed: int = 0,
    new_features: npt.ArrayLike | None = None,
) -> CrossFit:
    """Out-of-fold, calibrated probabilities of the *noisy* label from a linear head.

    The penalty is the one of least out-of-fold squared error. That is the Brier score of the ridge up to a constant,
    a proper score: it is least, in expectation over noisy labels, at the true ``P(ỹ | x)``.

    Args:
        features: [n, d], finite. They are standardised here.
        labels: [n] integers in 0..K-1, noisy.
        num_classes: K; by default the largest label plus one.
        folds: at least 2. A class with fewer examples than folds is simply absent from some held-out folds.
        seed: of the split into folds.
        new_features: [m, d] of other examples to predict, for instance trusted ones.

    Raises:
        ValueError: bad features or labels, fewer than 2 folds, or fewer examples than folds.
    """
    x = check_features(features)
    y, num_classes = check_class_labels(labels, len(x), num_classes)
    new = check_features(new_features, "new_features") if new_features is not None else np.empty((0, x.shape[1]))
    if new.shape[1] != x.shape[1]:
        raise ValueError(f"new_features have {new.shape[1]} dimensions, but features have {x.shape[1]}; use one model")
    fold = stratified_folds(y, folds, seed)
    mean, deviation = x.mean(axis=0), x.std(axis=0)
    # A constant feature says nothing, and dividing by its rounding error would make it loud.
    varies = deviation > 1e-12 * np.abs(x).max(axis=0)
    if not varies.any():
        raise ValueError(
            "features are the same for all examples: they can't tell classes apart. Was the backbone given its inputs?"
        )
    scale = np.where(varies, deviation, np.inf)
    x, new = (x - mean) / scale, (new - mean) / scale
    raw, raw_new, ridge = _ridge_scores(x, y, num_classes, fold, new)
    unit = np.sqrt((raw**2).mean()) or 1.0
    scores, new_scores = raw / unit, raw_new / unit
    probabilities = np.empty_like(scores)
    for f in range(folds):
        held = fold == f
        weights, intercepts = softmax_regression(scores[~held], y[~held], num_classes)
        probabilities[held] = softmax(scores[held] @ weights + intercepts, axis=1)
    weights, intercepts = softmax_regression(scores, y, num_classes)
    return CrossFit(scores, probabilities, fold, ridge, softmax(new_scores @ weights + intercepts, axis=1))


def stratified_folds(labels: Labels, folds: int, seed: int) -> npt.NDArray[np.int64]:
    """Deal the examples of each class to the folds in turn, starting where the last class ended.

    Returns:
        [n] integers in 0..folds-1. Sizes of folds, and counts of a class in them, differ by at most 1.

    Raises:
        ValueError: fewer than 2 folds, or fewer examples than folds.
    """
    if folds < 2:
        raise ValueError(f"folds is {folds}; out-of-fold predictions need at least 2")
    if len(labels) < folds:
        raise ValueError(f"there are {len(labels)} examples for {folds} folds; lower folds or give more examples")
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    fold = np.empty(len(labels), dtype=np.int64)
    fold[order] = np.arange(len(labels)) % folds
    return fold


def softmax_regression(scores: Matrix, labels: Labels, num_classes: int) -> tuple[Matrix, Matrix]:
    """Multinomial logistic regression with the weak normal prior above: weights [K_in, K] and intercepts [K]."""
    n, inputs = scores.shape
    rows = np.arange(n)

    def objective(theta: Matrix) -> tuple[float, Matrix]:
        weights, intercepts = theta[:-num_classes].reshape(inputs, num_classes), theta[-num_classes:]
        logits = log_softmax(scores @ weights + intercepts, axis=1)
        gradient = np.exp(logits)
        gradient[rows, labels] -= 1
        loss = -logits[rows, labels].sum()
        loss += 0.5 * (WEIGHT_PRECISION * (weights**2).sum() + INTERCEPT_PRECISION * (intercepts**2).sum())
        of_weights = scores.T @ gradient + WEIGHT_PRECISION * weights
        of_intercepts = gradient.sum(axis=0) + INTERCEPT_PRECISION * intercepts
        return loss / n, np.concatenate([of_weights.ravel(), of_intercepts]) / n

    start = np.zeros((inputs + 1) * num_classes)
    found = minimize(objective, start, jac=True, method="L-BFGS-B", options={"maxiter": 500, "gtol": 1e-6})
    return found.x[:-num_classes].reshape(inputs, num_classes), found.x[-num_classes:]


def _ridge_scores(
    x: Matrix, labels: Labels, num_classes: int, fold: npt.NDArray[np.int64], new: Matrix
) -> tuple[Matrix, Matrix, float]:
    """Out-of-fold ridge scores at the best penalty, [n, K] and [m, K] for new rows, less the class frequencies."""
    onehot = np.eye(num_classes)[labels]
    folds = int(fold.max()) + 1
    held_out = np.zeros((len(RIDGE_GRID), len(x), num_classes))
    of_new = np.zeros((len(RIDGE_GRID), len(new), num_classes))
    for f in range(folds):
        held = fold == f
        center, frequency = x[~held].mean(axis=0), onehot[~held].mean(axis=0)
        train, target = x[~held] - center, onehot[~held] - frequency
        # The smaller of the two Gram matrices: with more dimensions than examples, the ridge lives in their span.
        if x.shape[1] <= len(train):
            values, basis = np.linalg.eigh(train.T @ train)
            projected = basis.T @ (train.T @ target)
        else:
            values, left = np.linalg.eigh(train @ train.T)
            kept = values > 1e-10 * values[-1]
            values, left = values[kept], left[:, kept]
            basis = train.T @ (left / np.sqrt(values))
            projected = np.sqrt(values)[:, None] * (left.T @ target)
        inputs, new_inputs = (x[held] - center) @ basis, (new - center) @ basis
        for k, penalty in enumerate(RIDGE_GRID):
            head = projected / (values + penalty * len(train))[:, None]
            held_out[k, held] = inputs @ head
            of_new[k] += new_inputs @ head / folds
    errors = ((held_out - (onehot - onehot.mean(axis=0))) ** 2).sum(axis=(1, 2))
    best = int(errors.argmin())
    return held_out[best], of_new[best], RIDGE_GRID[best]
