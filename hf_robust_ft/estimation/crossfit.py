"""Out-of-fold class probabilities of a linear head on frozen features.

The head is a ridge regression on one-hot labels, whose scores a small softmax regression (K x K) turns into
probabilities. Both are linear, so together they are one linear head, but

- the ridge has a closed form, left-one-out predictions included (:mod:`.ridge`);
- its scores estimate ``E[onehot(ỹ) | x] = p(x) T``, a linear map of the clean posterior. The *subspace* of the
  features that they span is therefore the same for clean and for noisy labels (as in linear discriminant analysis),
  whatever T is, so later stages can look for T in K dimensions instead of d;
- the second stage is matrix scaling, of which temperature scaling (Guo et al. 2017, arXiv 1706.04599) is the case of
  one parameter.

The score of an example comes from a head that did not see its label, its probability from a calibration that did not
see its fold's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax

from ..noise import Matrix
from .inputs import Labels, check_class_labels, check_features, check_probabilities
from .ridge import Spectrum, best_penalty, decompose, head, left_out_scores, standardised

# Weights of the second stage have a standard normal prior, for scores of unit mean square: a score one unit off moves
# a logit by about one. It is weak (worth a few examples), but keeps separable classes from infinite weights.
WEIGHT_PRECISION = 1.0
# Intercepts: only so weak a one that a class absent from a fold gets a finite one.
INTERCEPT_PRECISION = 0.01

# A model in half precision gives zeros, whose logarithm would outweigh all else.
SMALLEST_PROBABILITY = 1e-9


class CrossFit(NamedTuple):
    """Out-of-fold scores and probabilities of the noisy label."""

    scores: Matrix
    """[n, K]: ridge scores without intercept, each example's from a head without its label, of unit mean square."""
    probabilities: Matrix
    """[n, K]: calibrated ``P(ỹ = j | x)``, out of fold."""
    fold: npt.NDArray[np.int64]
    """[n]: the fold that held each example out of the calibration."""
    ridge: float
    """The penalty chosen, of ``RIDGE_GRID``; NaN for probabilities that were given."""
    new_scores: Matrix
    """[m, K]: of the new features (none: m = 0), from the head of all examples."""
    new_probabilities: Matrix
    """[m, K]: ``P(ỹ = j | x)`` of the new features."""
    rescore: Callable[[Labels], tuple[Matrix, Matrix]]
    """Scores and new scores as they would have been with other labels of the same examples, for a bootstrap."""
    spectrum: Spectrum
    """Of the standardised features, or of the centred log probabilities that were given."""


def crossfit(
    features: npt.ArrayLike,
    labels: npt.ArrayLike,
    num_classes: int | None = None,
    *,
    folds: int = 5,
    seed: int = 0,
    new: npt.ArrayLike | None = None,
) -> CrossFit:
    """Out-of-fold, calibrated probabilities of the *noisy* label from a linear head.

    The penalty is the one of least left-out squared error. That is the Brier score of the ridge up to a constant,
    a proper score: it is least, in expectation over noisy labels, at the true ``P(ỹ | x)``.

    Args:
        features: [n, d], finite. They are standardised here. d well above 2 K: with fewer dimensions than classes, what
            the left-out scores of n examples know of each other's labels is no longer small.
        labels: [n] integers in 0..K-1, noisy.
        num_classes: K; by default the largest label plus one.
        folds: of the calibration, at least 2. A class with fewer examples is absent from some held-out folds.
        seed: of the split into folds.
        new: [m, d], features of other examples to predict, for instance trusted ones.

    Raises:
        ValueError: bad features or labels, fewer than 2 folds, or fewer examples than folds.
    """
    x = check_features(features)
    y, num_classes = check_class_labels(labels, len(x), num_classes)
    others = _new_rows(new, x.shape[1])
    fold = stratified_folds(y, folds, seed)
    x, others = standardised(x, others)
    spectrum = decompose(x)
    ridge = best_penalty(spectrum, np.eye(num_classes)[y])

    def rescore(drawn: Labels) -> tuple[Matrix, Matrix]:
        targets = np.eye(num_classes)[drawn]
        raw = left_out_scores(spectrum, targets, ridge)
        unit = np.sqrt((raw**2).mean()) or 1.0
        return raw / unit, others @ head(spectrum, targets, ridge) / unit

    return _calibrated(rescore, y, num_classes, fold, ridge, spectrum)


def given_probabilities(
    probabilities: npt.ArrayLike,
    labels: npt.ArrayLike,
    num_classes: int | None = None,
    *,
    folds: int = 5,
    seed: int = 0,
    new: npt.ArrayLike | None = None,
) -> CrossFit:
    """The same from out-of-fold probabilities of any model, which need not be calibrated.

    Their scores are centred log probabilities, the logits of a softmax. They stay as they are in a bootstrap: the model
    can't be trained anew for each replicate, so errors don't include its own.

    Args:
        probabilities: [n, K], ``P(ỹ | x)`` by a model that did not see the example.
        labels: [n] integers in 0..K-1, noisy.
        num_classes: K.
        folds: of the calibration, at least 2.
        seed: of the split into folds.
        new: [m, K], probabilities of other examples.

    Raises:
        ValueError: no probabilities (negative, or rows that don't sum to 1), not one for each class, or bad labels.
    """
    p = check_probabilities(probabilities)
    y, num_classes = check_class_labels(labels, len(p), num_classes)
    if p.shape[1] != num_classes:
        raise ValueError(f"probabilities have {p.shape[1]} columns for {num_classes} classes; give one for each class")
    others = _new_rows(new, num_classes)
    if new is not None:
        others = check_probabilities(others, "new probabilities")
    scores, new_scores = _centred_logits(p), _centred_logits(others)
    mean = scores.mean(axis=0)
    unit = np.sqrt(((scores - mean) ** 2).mean()) or 1.0
    fixed = ((scores - mean) / unit, (new_scores - mean) / unit)
    fold = stratified_folds(y, folds, seed)
    return _calibrated(lambda drawn: fixed, y, num_classes, fold, float("nan"), decompose(fixed[0]))


def _centred_logits(probabilities: Matrix) -> Matrix:
    logits = np.log(np.clip(probabilities, SMALLEST_PROBABILITY, None))
    centred: Matrix = logits - logits.mean(axis=1, keepdims=True)
    return centred


def _new_rows(new: npt.ArrayLike | None, dimensions: int) -> Matrix:
    rows = np.empty((0, dimensions)) if new is None else check_features(new, "new features")
    if rows.shape[1] != dimensions:
        raise ValueError(f"new features have {rows.shape[1]} dimensions, but the others {dimensions}; use one model")
    return rows


def _calibrated(
    rescore: Callable[[Labels], tuple[Matrix, Matrix]],
    labels: Labels,
    num_classes: int,
    fold: npt.NDArray[np.int64],
    ridge: float,
    spectrum: Spectrum,
) -> CrossFit:
    scores, new_scores = rescore(labels)
    probabilities = out_of_fold(scores, labels, fold, num_classes)
    weights, intercepts = softmax_regression(scores, labels, num_classes)
    new_probabilities = softmax(new_scores @ weights + intercepts, axis=1)
    return CrossFit(scores, probabilities, fold, ridge, new_scores, new_probabilities, rescore, spectrum)


def out_of_fold(scores: Matrix, labels: Labels, fold: npt.NDArray[np.int64], num_classes: int) -> Matrix:
    """Calibrated ``P(ỹ | x)``, [n, K]: of each fold by the softmax regression of the others."""
    probabilities = np.empty((len(scores), num_classes))
    for f in range(int(fold.max()) + 1):
        held = fold == f
        weights, intercepts = softmax_regression(scores[~held], labels[~held], num_classes)
        probabilities[held] = softmax(scores[held] @ weights + intercepts, axis=1)
    return probabilities


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
