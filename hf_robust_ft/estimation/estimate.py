"""Estimate a noise transition matrix from features and noisy labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from tqdm.auto import tqdm

from ..noise import Matrix
from .class_conditional import dependence, excess_wrongness, simulated_p_value
from .confident_joint import confident_joint_transition
from .crossfit import CrossFit, crossfit, given_probabilities
from .dual_t import dual_t_transition
from .inputs import Labels, check_class_labels, check_every_class, check_features
from .joint_likelihood import Gold, JointFit, head_for, joint_transition, refit
from .result import TransitionEstimate
from .shrinkage import shrink
from .trusted import trusted_transition
from .verdict import trusted_verdict, write_verdict

METHODS = ("joint", "confident_joint", "dual_t", "trusted")

# A standard error from B replicates is itself off by 1 / √(2B): 9 % at 60. The smallest p-value is 1 / 61.
BOOTSTRAP = 60

# Replicates for the errors that shrinkage goes by. It pools them over all entries, so few will do.
SHRINKAGE_REPLICATES = 20

# Of the weights' normal prior in the test of the class-conditional assumption: under pair flips, a test at 5 % rejected
# far too often with the estimate's prior (1.0). With this one it rejects 10 to 15 % of simulated class-conditional
# noise, and the verdict, which also asks for a correlation, none (recipes/RESULTS.md).
TEST_PRECISION = 0.1

# Two-sided 95 % of a normal distribution.
NORMAL_QUANTILE = 1.959964

# One example's worth of smoothing a row for the counting methods, as the joint likelihood's prior has.
SMOOTHING = 1.0


class _Spread(NamedTuple):
    """What the replicates found."""

    transitions: Matrix
    priors: Matrix
    statistics: Matrix
    """The observed one first."""


def estimate_transition(
    features: npt.ArrayLike | None,
    labels: npt.ArrayLike,
    *,
    probabilities: npt.ArrayLike | None = None,
    num_classes: int | None = None,
    method: str = "joint",
    trusted: tuple[npt.ArrayLike, ...] | None = None,
    folds: int = 5,
    bootstrap: int = BOOTSTRAP,
    seed: int = 0,
) -> TransitionEstimate:
    """Estimate ``T[i, j] = P(noisy label = j | true label = i)``: without a clean label, or better with a few.

    Features come from a frozen pretrained model; the head is linear and cross-fitted (:func:`crossfit`). In its place
    the out-of-fold probabilities of any model will do (:func:`~hf_robust_ft.out_of_fold_probabilities`). It takes
    seconds at 5,000 examples of 768 dimensions and 10 classes, the bootstrap some more. The cost of a replicate
    grows as n K², so that of 100 classes takes minutes; ``bootstrap=10`` gives rough errors sooner.

    Methods:
        - ``"joint"``: maximum likelihood of head and T (:func:`joint_transition`), climbed from the two below, then
          shrunk as far as its sampling error allows (:func:`shrink`). The most accurate one here.
        - ``"confident_joint"``: by counting, through cleanlab.
        - ``"dual_t"``: Yao et al. 2020; with calibrated probabilities it finds too much noise
          (:func:`dual_t_transition`).
        - ``"trusted"``: gold loss correction (:func:`trusted_transition`), from ``trusted`` examples alone. It takes
          ambiguous examples for wrong ones. ``"joint"`` with the same ``trusted`` examples is better.

    What the bootstrap covers: for ``"joint"`` it is parametric. Labels are drawn anew from the fitted ``p(x) T``, and
    scores, head and T are made again from them. The errors are root mean squares about the estimate, so that they
    include the bias that the estimate would have if it were the truth; it is not taken off, as its sign is not
    reliable (recipes/RESULTS.md). Not covered: that the true posterior is no softmax of linear scores, and for
    ``probabilities`` the training of their model. For the other methods examples (for ``"trusted"``, trusted ones) are
    drawn with replacement, with their out-of-fold probabilities fixed; these methods have a bias, which errors don't
    show. Intervals are ``estimate ± 1.96 errors``, cut at 0 and 1.

    The test of the class-conditional assumption asks whether features foretell which labels are wrong, beyond what
    ``p(x) T`` says (:func:`dependence`); its null is simulated by the same bootstrap. That covers what a head of few
    examples gets wrong, but not that real features are no Gaussian mixture: the verdict asks for a correlation of some
    size, too. Noise that changes which wrong label it gives, but not how often it strikes, passes.

    Args:
        features: [n, d], finite, d well above 2 K (see :func:`crossfit`); or None, with ``probabilities``.
        labels: [n] integers in 0..K-1, noisy. Every class must occur.
        probabilities: [n, K], ``P(noisy label | x)`` of a model that did not see the example. They need not be
            calibrated.
        num_classes: K; by default the largest label plus one.
        method: one of the above.
        trusted: examples with clean labels, drawn like the others but none of them: a tuple of their features [m, d]
            (or probabilities [m, K]) and clean labels [m] and, where these are known, noisy labels [m]. For "joint"
            (where a class may be missing: what is said of it then comes from the other examples) and "trusted" (where
            none may). With noisy labels the verdict also says whether these examples contradict T.
        folds: of the cross-fitting.
        bootstrap: replicates, at least 10.
        seed: of folds and replicates. Same input and seed, same estimate.

    Raises:
        ValueError: an unknown method; soft, multi-label or missing classes; features that are not finite; trusted
            examples that are missing, not asked for, or lack a class; fewer than 10 replicates; probabilities beside
            features, or that are none.
    """
    rows, name = (features, "features") if probabilities is None else (probabilities, "probabilities")
    if (features is None) == (probabilities is None):
        both = "both" if features is not None else "neither"
        raise ValueError(f"estimate_transition got {both} of features and probabilities; give one of the two")
    x = check_features(rows, name)
    y, num_classes = check_class_labels(labels, len(x), num_classes)
    check_every_class(y, num_classes)
    if method not in METHODS:
        raise ValueError(f"method is '{method}'; choose one of {', '.join(METHODS)}")
    if bootstrap < 10:
        raise ValueError(f"bootstrap is {bootstrap}; standard errors need at least 10 replicates")
    if method == "trusted" and trusted is None:
        raise ValueError("method='trusted' needs trusted=(features, clean labels)")
    if trusted is not None and method not in ("joint", "trusted"):
        raise ValueError(
            f"trusted examples are given, but method='{method}' does not use them; set method='joint' or 'trusted'"
        )
    trusted_rows, trusted_labels, trusted_noisy = _trusted(trusted, num_classes)
    if method == "trusted":
        check_every_class(trusted_labels, num_classes, "trusted labels")
    rng = np.random.default_rng(seed)
    fitted = crossfit if probabilities is None else given_probabilities
    cross = fitted(x, y, num_classes, folds=folds, seed=seed, new=trusted_rows)

    if method == "joint":
        gold = None if trusted is None else Gold(cross.new_scores, trusted_labels, trusted_noisy)
        free = joint_transition(cross.scores, y, _starts(cross, y), gold)
        replicates = [_again(cross, free, rng, gold)[2].transition for _ in range(SHRINKAGE_REPLICATES)]
        error = np.std(replicates, axis=0, ddof=1)
        fit = head_for(cross.scores, y, shrink(free.transition, error), gold)
        spread = _parametric(cross, y, fit, bootstrap, rng, gold)
        transitions = spread.transitions
    else:
        counting = _counting(method, cross, y, trusted_labels)
        transition = counting(np.arange(len(trusted_labels) if method == "trusted" else len(y)))
        fit = head_for(cross.scores, y, transition)
        spread = _parametric(cross, y, fit, bootstrap, rng, fixed_transition=True)
        size = len(trusted_labels) if method == "trusted" else len(y)
        strata = trusted_labels if method == "trusted" else y
        transitions = np.stack([counting(_resample(strata, size, rng)) for _ in range(bootstrap)])
    found = _assemble(fit, cross, y, transitions, spread, method, folds, seed)
    if trusted_noisy is None:
        return found
    said = trusted_verdict(found.transition, transitions, trusted_labels, trusted_noisy)
    return replace(found, verdict=found.verdict + said)


def _trusted(trusted: Any, num_classes: int) -> tuple[Matrix | None, Labels, Labels | None]:
    """Rows, clean labels and, where they are given, noisy labels of the trusted examples."""
    if trusted is None:
        return None, np.empty(0, dtype=np.int64), None
    if not isinstance(trusted, (tuple, list)) or len(trusted) not in (2, 3):
        raise ValueError(
            f"trusted is {type(trusted).__name__}; give a tuple (features, clean labels), or with their noisy labels "
            "as a third"
        )
    rows = check_features(trusted[0], "trusted features")
    clean, _ = check_class_labels(trusted[1], len(rows), num_classes, "trusted labels")
    if len(trusted) == 2:
        return rows, clean, None
    return rows, clean, check_class_labels(trusted[2], len(rows), num_classes, "trusted noisy labels")[0]


def _starts(cross: CrossFit, labels: Labels) -> list[Matrix]:
    num_classes = cross.scores.shape[1]
    even = 0.7 * np.eye(num_classes) + 0.3 / num_classes
    found = [confident_joint_transition(cross.probabilities, labels), dual_t_transition(cross.probabilities, labels)]
    # A row of zeros off the diagonal would stay so: every start has a little of every entry.
    return [0.9 * start + 0.1 * even for start in found] + [even]


def _draw(probabilities: Matrix, rng: np.random.Generator) -> Labels:
    """One label a row."""
    cumulative = probabilities.cumsum(axis=1)
    drawn: Labels = (rng.random((len(probabilities), 1)) * cumulative[:, -1:] >= cumulative).sum(axis=1)
    return drawn


def _again(
    cross: CrossFit, fit: JointFit, rng: np.random.Generator, gold: Gold | None, fixed_transition: bool = False
) -> tuple[Matrix, Labels, JointFit, Gold | None]:
    """One replicate: scores, labels, fit and trusted examples, all made anew from labels drawn from the fit."""
    drawn = _draw(fit.clean_probabilities(cross.scores) @ fit.transition, rng)
    scores, new_scores = cross.rescore(drawn)
    if gold is not None:
        clean = _draw(fit.clean_probabilities(gold.scores), rng)
        noisy = None if gold.noisy is None else _draw(fit.transition[clean], rng)
        gold = Gold(new_scores, clean, noisy)
    return scores, drawn, refit(scores, drawn, fit, gold, fixed_transition=fixed_transition), gold


def _parametric(
    cross: CrossFit,
    labels: Labels,
    fit: JointFit,
    bootstrap: int,
    rng: np.random.Generator,
    gold: Gold | None = None,
    fixed_transition: bool = False,
) -> _Spread:
    """Everything again, for labels drawn from the fit.

    Statistics are of fits of their own, with a weaker prior on the weights: under pair flips the prior makes the head
    visibly less sure than the examples are, which the test would take for a violated assumption.
    """

    def statistic(scores: Matrix, noisy: Labels, start: JointFit, trusted: Gold | None) -> float:
        found = refit(scores, noisy, start, trusted, fixed_transition=fixed_transition, precision=TEST_PRECISION)
        p = found.clean_probabilities(scores)
        return dependence(cross.spectrum, excess_wrongness(p, found.transition, noisy))

    statistics = [statistic(cross.scores, labels, fit, gold)]
    transitions, priors = [], []
    for _ in tqdm(range(bootstrap), desc="bootstrap", delay=5, disable=None):
        scores, drawn, found, trusted = _again(cross, fit, rng, gold, fixed_transition)
        p = found.clean_probabilities(scores)
        transitions.append(found.transition)
        priors.append(p.mean(axis=0))
        statistics.append(statistic(scores, drawn, found, trusted))
    return _Spread(np.stack(transitions), np.stack(priors), np.array(statistics))


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
    method: str,
    folds: int,
    seed: int,
) -> TransitionEstimate:
    transition = fit.transition
    p = fit.clean_probabilities(cross.scores)
    prior = p.mean(axis=0)
    rates = 1 - (spread.priors * np.diagonal(transitions, axis1=1, axis2=2)).sum(axis=1)
    rate = float(1 - prior @ np.diag(transition))
    # Of features that say nothing every replicate finds the same T; no n labels are that sure of it.
    least = 1 / len(labels)
    error, rate_error = _error(transitions, transition), max(float(_error(rates, rate)), least)
    rate_interval = _interval(rate, rate_error)
    left, singular, right = np.linalg.svd(transition)
    smallest = float(singular[-1])
    # σ = uᵀ T v along the direction in which T is nearest to singular, so its error is that of a linear form of T.
    along = np.einsum("i,bij,j->b", left[:, -1], transitions, right[-1])
    singular_interval = _interval(smallest, max(float(_error(along, smallest)), least))
    observed, simulated = float(spread.statistics[0]), spread.statistics[1:]
    p_value = simulated_p_value(observed, simulated)
    effect = max(0.0, observed)
    draws = transitions.round(6)  # short in a file
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


def _error(replicates: Matrix, estimate: Matrix | float) -> Matrix:
    """Root mean square of replicates about the estimate, which they were drawn from: their bias counts as error.

    Resampled ones (of the counting methods) have the estimate as their mean, up to what resampling does to it.
    """
    square: Matrix = ((replicates - estimate) ** 2).mean(axis=0)
    result: Matrix = np.sqrt(square)
    return result


def _interval(value: float, error: float) -> tuple[float, float]:
    return max(0.0, value - NORMAL_QUANTILE * error), min(1.0, value + NORMAL_QUANTILE * error)
