"""Estimate a noise transition matrix from features and noisy labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from tqdm.auto import tqdm

from ..noise import Matrix
from .class_conditional import dependence_statistic, effect_size, regions, simulated_p_value
from .confident_joint import confident_joint_transition
from .crossfit import CrossFit, crossfit
from .dual_t import dual_t_transition
from .inputs import Labels, check_class_labels, check_every_class, check_features
from .joint_likelihood import JointFit, head_for, joint_transition, refit
from .result import TransitionEstimate
from .shrinkage import shrink
from .trusted import trusted_transition
from .verdict import write_verdict

METHODS = ("joint", "confident_joint", "dual_t", "trusted")

# A standard error from B replicates is itself off by 1 / √(2B): 9 % at 60. The smallest p-value is 1 / 61.
BOOTSTRAP = 60

# Two-sided 95 % of a normal distribution.
NORMAL_QUANTILE = 1.959964

# One example's worth of smoothing a row for the counting methods, as the joint likelihood's prior has.
SMOOTHING = 1.0


class _Spread(NamedTuple):
    """What the replicates found."""

    transitions: Matrix
    priors: Matrix
    statistics: Matrix
    components: int


def estimate_transition(
    features: npt.ArrayLike,
    labels: npt.ArrayLike,
    *,
    num_classes: int | None = None,
    method: str = "joint",
    trusted: tuple[npt.ArrayLike, npt.ArrayLike] | None = None,
    folds: int = 5,
    bootstrap: int = BOOTSTRAP,
    seed: int = 0,
) -> TransitionEstimate:
    """Estimate ``T[i, j] = P(noisy label = j | true label = i)`` without a clean label.

    Features come from a frozen pretrained model; the head is linear and cross-fitted (:func:`crossfit`). It takes
    seconds at 5,000 examples of 768 dimensions and 10 classes, the bootstrap some more. The cost of a replicate
    grows as n K², so that of 100 classes takes minutes; ``bootstrap=10`` gives rough errors sooner.

    Methods:
        - ``"joint"``: maximum likelihood of head and T (:func:`joint_transition`), climbed from the two below, then
          shrunk as far as its sampling error allows (:func:`shrink`). The most accurate one here.
        - ``"confident_joint"``: by counting, through cleanlab.
        - ``"dual_t"``: Yao et al. 2020; with calibrated probabilities it finds too much noise
          (:func:`dual_t_transition`).
        - ``"trusted"``: gold loss correction, from ``trusted`` examples that the features' labels don't include. It
          takes ambiguous examples for wrong ones: unless the features tell classes apart well, ``"joint"`` is better.

    What the bootstrap covers: for ``"joint"`` it is parametric. Labels are drawn anew from the fitted ``p(x) T``, and
    head and T are fitted again on the same out-of-fold scores. The errors so cover the labels of the second
    stage, and the head's K (K + 1) weights; not the direction of the scores in feature space, and not that the true
    posterior is no softmax of linear scores. For the other methods examples (for ``"trusted"``, trusted ones) are drawn
    with replacement, with their out-of-fold probabilities fixed; these methods have a bias, which errors don't show.
    Intervals are ``estimate ± 1.96 errors``, cut at 0 and 1.

    The test of the class-conditional assumption compares the labels that regions of the features hold with those
    expected of ``p(x) T``; its null is simulated by the same parametric bootstrap, with the fit repeated. The scores
    are not made anew, so it can be too eager (5 % became up to 22 % under simulated pair flips); the verdict asks for
    an effect size of 0.1, too.

    Args:
        features: [n, d], finite.
        labels: [n] integers in 0..K-1, noisy. Every class must occur.
        num_classes: K; by default the largest label plus one.
        method: one of the above.
        trusted: (features [m, d], clean labels [m]); only for ``method="trusted"``, which needs at least one example a
            class.
        folds: of the cross-fitting.
        bootstrap: replicates, at least 10.
        seed: of folds and replicates. Same input and seed, same estimate.

    Raises:
        ValueError: an unknown method; soft, multi-label or missing classes; features that are not finite; trusted
            examples that are missing, not asked for, or lack a class; fewer than 10 replicates.
    """
    x = check_features(features)
    y, num_classes = check_class_labels(labels, len(x), num_classes)
    check_every_class(y, num_classes)
    if method not in METHODS:
        raise ValueError(f"method is '{method}'; choose one of {', '.join(METHODS)}")
    if bootstrap < 10:
        raise ValueError(f"bootstrap is {bootstrap}; standard errors need at least 10 replicates")
    if (trusted is not None) != (method == "trusted"):
        raise ValueError(
            "method='trusted' needs trusted=(features, clean labels)"
            if trusted is None
            else f"trusted examples are given, but method='{method}' does not use them; set method='trusted'"
        )
    trusted_features, trusted_labels = None, np.empty(0, dtype=np.int64)
    if trusted is not None:
        trusted_features = check_features(trusted[0], "trusted features")
        trusted_labels, _ = check_class_labels(trusted[1], len(trusted_features), num_classes, "trusted labels")
        check_every_class(trusted_labels, num_classes, "trusted labels")
    rng = np.random.default_rng(seed)
    cross = crossfit(x, y, num_classes, folds=folds, seed=seed, new_features=trusted_features)

    if method == "joint":
        fit = joint_transition(cross.scores, y, _starts(cross, y))
        spread = _parametric(cross.scores, y, x, fit, bootstrap, rng)
        error = spread.transitions.std(axis=0, ddof=1)
        fit = head_for(cross.scores, y, shrink(fit.transition, error))
        transitions = spread.transitions
    else:
        counting = _counting(method, cross, y, trusted_labels)
        transition = counting(np.arange(len(trusted_labels) if method == "trusted" else len(y)))
        fit = head_for(cross.scores, y, transition)
        spread = _parametric(cross.scores, y, x, fit, bootstrap, rng, fixed_transition=True)
        size = len(trusted_labels) if method == "trusted" else len(y)
        strata = trusted_labels if method == "trusted" else y
        transitions = np.stack([counting(_resample(strata, size, rng)) for _ in range(bootstrap)])
        error = transitions.std(axis=0, ddof=1)
    return _assemble(fit, cross, y, transitions, spread, error, method, folds, seed)


def _starts(cross: CrossFit, labels: Labels) -> list[Matrix]:
    num_classes = cross.scores.shape[1]
    even = 0.7 * np.eye(num_classes) + 0.3 / num_classes
    found = [confident_joint_transition(cross.probabilities, labels), dual_t_transition(cross.probabilities, labels)]
    # A row of zeros off the diagonal would stay so: every start has a little of every entry.
    return [0.9 * start + 0.1 * even for start in found] + [even]


def _parametric(
    scores: Matrix,
    labels: Labels,
    features: Matrix,
    fit: JointFit,
    bootstrap: int,
    rng: np.random.Generator,
    fixed_transition: bool = False,
) -> _Spread:
    """Refit to labels drawn from the fit. The first statistic is the observed one."""
    p = fit.clean_probabilities(scores)
    noisy = p @ fit.transition
    predicted = p.argmax(axis=1)
    sides = regions(features, predicted)
    statistics = [dependence_statistic(noisy, labels, predicted, sides)]
    transitions, priors = [], []
    cumulative = noisy.cumsum(axis=1)
    for _ in tqdm(range(bootstrap), desc="bootstrap", delay=5, disable=None):
        drawn = (rng.random((len(labels), 1)) * cumulative[:, -1:] >= cumulative).sum(axis=1)
        again = refit(scores, drawn, fit, fixed_transition=fixed_transition)
        q = again.clean_probabilities(scores)
        transitions.append(again.transition)
        priors.append(q.mean(axis=0))
        statistics.append(dependence_statistic(q @ again.transition, drawn, predicted, sides))
    return _Spread(np.stack(transitions), np.stack(priors), np.array(statistics), sides.shape[1])


def _counting(
    method: str, cross: CrossFit, labels: Labels, trusted_labels: Labels
) -> Callable[[npt.NDArray[np.int64]], Matrix]:
    """T from the examples with these indices, by one of the counting methods, with smoothing."""

    def estimate(rows: npt.NDArray[np.int64]) -> Matrix:
        if method == "trusted":
            chosen = trusted_labels[rows]
            raw = trusted_transition(cross.new_probabilities[rows], chosen)
        else:
            chosen = labels[rows]
            count = confident_joint_transition if method == "confident_joint" else dual_t_transition
            raw = count(cross.probabilities[rows], chosen)
        num_classes = len(raw)
        # Towards an even row, with the weight of one example among those of the class.
        weight = SMOOTHING / (SMOOTHING + np.bincount(chosen, minlength=num_classes))
        smoothed: Matrix = (1 - weight)[:, None] * raw + weight[:, None] / num_classes
        return smoothed

    return estimate


def _resample(labels: Labels, size: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Indices with replacement, in which every class occurs: within classes, so that none drops out."""
    rows = np.arange(size)
    return np.concatenate([rng.choice(rows[labels == c], (labels == c).sum()) for c in np.unique(labels)])


def _assemble(
    fit: JointFit,
    cross: CrossFit,
    labels: Labels,
    transitions: Matrix,
    spread: _Spread,
    error: Matrix,
    method: str,
    folds: int,
    seed: int,
) -> TransitionEstimate:
    transition = fit.transition
    p = fit.clean_probabilities(cross.scores)
    prior = p.mean(axis=0)
    rates = 1 - (spread.priors * np.diagonal(transitions, axis1=1, axis2=2)).sum(axis=1)
    rate = float(1 - prior @ np.diag(transition))
    rate_error = float(rates.std(ddof=1))
    rate_interval = _interval(rate, rate_error)
    left, singular, right = np.linalg.svd(transition)
    smallest = float(singular[-1])
    # σ = uᵀ T v along the direction in which T is nearest to singular, so its error is that of a linear form of T.
    along = np.einsum("i,bij,j->b", left[:, -1], transitions, right[-1])
    singular_interval = _interval(smallest, float(along.std(ddof=1)))
    observed, simulated = float(spread.statistics[0]), spread.statistics[1:]
    p_value = simulated_p_value(observed, simulated)
    effect = effect_size(observed, simulated, len(labels), spread.components)
    # Those of the unshrunk fit, about the shrunk one.
    draws = np.clip(transition + transitions - transitions.mean(axis=0), 1e-9, None)
    draws = (draws / draws.sum(axis=2, keepdims=True)).round(6)  # short in a file
    reach = NORMAL_QUANTILE * error
    interval = np.clip(np.stack([transition - reach, transition + reach], axis=2), 0, 1)
    effective = (p**2).sum(axis=0)
    return TransitionEstimate(
        transition=transition,
        standard_error=error,
        interval=interval,
        noise_rate=rate,
        noise_rate_error=rate_error,
        noise_rate_interval=rate_interval,
        clean_prior=prior,
        condition_number=float(singular[0] / smallest) if smallest > 0 else float("inf"),
        smallest_singular_value=smallest,
        singular_value_interval=singular_interval,
        effective_counts=effective,
        counts=np.bincount(labels, minlength=len(transition)).astype(np.float64),
        class_conditional_p_value=p_value,
        class_conditional_effect=effect,
        method=method,
        n=len(labels),
        bootstrap=len(transitions),
        draws=draws,
        folds=folds,
        seed=seed,
        verdict=write_verdict(rate, rate_interval, singular_interval, effective, len(labels), p_value, effect),
    )


def _interval(value: float, error: float) -> tuple[float, float]:
    return max(0.0, value - NORMAL_QUANTILE * error), min(1.0, value + NORMAL_QUANTILE * error)
