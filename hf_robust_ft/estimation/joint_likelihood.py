"""T and the clean posterior together, by maximum likelihood."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment, minimize
from scipy.special import log_softmax, softmax

from ..noise import Matrix
from .crossfit import INTERCEPT_PRECISION, WEIGHT_PRECISION
from .inputs import Labels

# Smallest entry of a start: softmax can't reach 0, and L-BFGS would not leave it.
START_FLOOR = 1e-3

# Iterations after which the best start, or split, leads.
TRIAL_ITERATIONS = 60
MAX_ITERATIONS = 500
# Replicates start at the optimum of other labels, and need only be as exact as their own spread.
REFIT_ITERATIONS = 150

# Splits that are tried in a round, each in the place of one of the smallest classes, and how many rounds.
LARGEST, SMALLEST, ROUNDS = 3, 2, 3
# Only a class with less than this share of the examples that carry the rarest label is given up: a rare class is none.
NEARLY_EMPTY = 0.5
# Of the log posterior in all, that a split, or the end of another start, must gain. Those that led out of a trap gained
# 34 to 41 at 1,000 examples; those of a few nats made T worse more often than better.
LEAST_GAIN = 10.0


class Gold(NamedTuple):
    """Trusted examples: what they add to the likelihood."""

    scores: Matrix
    """[m, K_in], from a head that saw none of their labels."""
    labels: Labels
    """[m], the true classes."""
    noisy: Labels | None
    """[m], their noisy labels where those are known."""

    def counts(self, num_classes: int) -> Matrix:
        """[K, K]: trusted examples of each true class and noisy label."""
        found = np.zeros((num_classes, num_classes))
        if self.noisy is not None:
            np.add.at(found, (self.labels, self.noisy), 1)
        return found


class JointFit(NamedTuple):
    """Where the likelihood is largest."""

    transition: Matrix
    """[K, K]."""
    weights: Matrix
    """[K_in, K] of the head on scores."""
    intercepts: Matrix
    """[K]."""
    objective: float
    """Mean negative log posterior of an example at the optimum."""

    def clean_probabilities(self, scores: Matrix) -> Matrix:
        """``P(y = i | x)`` of the true class, [n, K]."""
        p: Matrix = softmax(scores @ self.weights + self.intercepts, axis=1)
        return p


def joint_transition(scores: Matrix, labels: Labels, starts: Sequence[Matrix], gold: Gold | None = None) -> JointFit:
    """Maximise ``Σ_n log[(softmax(s_n W + b) T)[ỹ_n]]`` over W, b and T, with weak priors.

    A trusted example m adds ``log softmax(s_m W + b)[y_m]`` and, where its noisy label is known, ``log T[y_m, ỹ_m]``:
    the two factors of its own likelihood. The first tells how sure the head may be, which is what T is uncertain by;
    the second counts transitions. (Hendrycks et al. 2018 average ``P(ỹ | x)`` over trusted examples instead, which adds
    to T what the head is unsure of.)

    The scores s_n are the left-out ones of :func:`crossfit`, K numbers an example. They carry the noise-blind part
    of the head. On all d features, the head would memorise noisy labels and the identity would win (measured on
    Fashion-MNIST with 40 % symmetric noise: the diagonal came out 0.25 to 0.30 too large, at any L2); on K
    such scores it has K (K + 1) weights and can't.

    What identifies T is that the logits of p are linear in the scores: the plateau that ``P(ỹ | x)`` reaches as
    logits grow is a row of T. The likelihood has several maxima, so it is climbed from several starts, and on from the
    best by splitting classes (:func:`_by_splits`). It does not tell which class is which: the names under which
    most labels are right are taken, unless trusted examples tell.

    Priors: standard normal on W (scores have unit mean square), and Dirichlet(1 + 1/K) on each row of T, one example's
    worth in all (Perks). A Dirichlet(2), one example an entry, is not weak: it pulls the diagonal of clean data
    from 0.99 to 0.91 at 100 examples a class.

    Args:
        scores: [n, K_in].
        labels: [n] integers in 0..K-1, noisy.
        starts: matrices [K, K] to climb from.
        gold: trusted examples.
    """
    blank = [_theta(_blank(scores.shape[1], start)) for start in starts]
    trials = sorted((_climb(scores, labels, start, TRIAL_ITERATIONS, gold) for start in blank), key=lambda end: end[1])
    first, *others = (_climb(scores, labels, trial, MAX_ITERATIONS, gold) for trial, _ in trials)
    # The one that leads at first may be in a trap that the others go around.
    found = min(others, key=lambda end: end[1], default=first)
    if found[1] > first[1] - LEAST_GAIN / len(labels):
        found = first
    fit = _by_splits(_unpack(*found, scores.shape[1], len(starts[0])), scores, labels, gold)
    return _named(fit, scores) if gold is None else fit


def _by_splits(fit: JointFit, scores: Matrix, labels: Labels, gold: Gold | None) -> JointFit:
    """A higher maximum, if splitting one of the largest classes and giving up a nearly empty one leads there.

    Under pair flips a climb can end where one class stands for two true ones and another for next to none. No small
    step leads out of there, as the classes in between would have to take each other's places. (Split and merge: Ueda
    et al. 2000.)
    """
    shape, fewest = fit.weights.shape, np.bincount(labels).min()
    for _ in range(ROUNDS):
        examples = fit.clean_probabilities(scores).sum(axis=0)
        order = np.argsort(examples)
        best = fit
        for given_up in order[:SMALLEST]:
            if examples[given_up] > NEARLY_EMPTY * fewest:
                break
            for divided in set(order[-LARGEST:]) - {given_up}:
                start = _theta(_split(fit, divided, given_up))
                tried = _unpack(*_climb(scores, labels, start, TRIAL_ITERATIONS, gold), *shape)
                if tried.objective < min(best.objective, fit.objective - LEAST_GAIN / len(labels)):
                    best = tried
        if best is fit:
            break
        fit = _unpack(*_climb(scores, labels, _theta(best), MAX_ITERATIONS, gold), *shape)
    return fit


def _split(fit: JointFit, divided: int, given_up: int) -> JointFit:
    """Two classes in the place of one, which share its examples and its first label, and deal the others out."""
    transition, weights, intercepts = fit.transition.copy(), fit.weights.copy(), fit.intercepts.copy()
    falling = np.argsort(-transition[divided])
    for row, left_out in ((given_up, falling[1::2]), (divided, falling[2::2])):
        transition[row] = fit.transition[divided]
        transition[row, left_out] *= 0.1
        transition[row] /= transition[row].sum()
    weights[:, given_up] = weights[:, divided]
    intercepts[[divided, given_up]] = intercepts[divided] - math.log(2)
    return fit._replace(transition=transition, weights=weights, intercepts=intercepts)


def _named(fit: JointFit, scores: Matrix) -> JointFit:
    """The same fit with its classes renamed so that ``Σ_i P(y = i) T[i, i]`` is largest."""
    prior = fit.clean_probabilities(scores).mean(axis=0)
    rows, names = linear_sum_assignment(prior[:, None] * fit.transition, maximize=True)
    order = rows[np.argsort(names)]
    return fit._replace(
        transition=fit.transition[order], weights=fit.weights[:, order], intercepts=fit.intercepts[order]
    )


def refit(
    scores: Matrix,
    labels: Labels,
    fit: JointFit,
    gold: Gold | None = None,
    *,
    fixed_transition: bool = False,
    precision: float = WEIGHT_PRECISION,
) -> JointFit:
    """Climb again from a fit, with other labels or (with ``fixed_transition``) for the head alone."""
    start = _theta(fit, 1e-12 if fixed_transition else START_FLOOR)
    found = _climb(scores, labels, start, REFIT_ITERATIONS, gold, fixed_transition, precision)
    result = _unpack(*found, *fit.weights.shape)
    return result._replace(transition=fit.transition) if fixed_transition else result


def head_for(scores: Matrix, labels: Labels, transition: Matrix, gold: Gold | None = None) -> JointFit:
    """The head alone, for a T that is known."""
    return refit(scores, labels, _blank(scores.shape[1], transition), gold, fixed_transition=True)


def negative_log_posterior(
    theta: Matrix,
    scores: Matrix,
    labels: Labels,
    num_classes: int,
    fixed_transition: bool = False,
    gold: Gold | None = None,
    precision: float = WEIGHT_PRECISION,
) -> tuple[float, Matrix]:
    """The objective of an example, and its gradient.

    With ``p = softmax(s W + b)``, ``q = (p T)[ỹ]`` and the responsibilities ``r = p ⊙ T[:, ỹ] / q``, the gradient is
    ``p - r`` in the logits, and ``T ⊙ R·1 - R`` in the logits of T, where ``R[i, j]`` sums r_i over the examples with
    label j.

    Args:
        theta: W (row by row), b, and the logits of T (row by row).
        labels: [n], in ascending order.
    """
    n, inputs = scores.shape
    split = inputs * num_classes
    weights = theta[:split].reshape(inputs, num_classes)
    intercepts = theta[split : split + num_classes]
    log_transition = log_softmax(theta[split + num_classes :].reshape(num_classes, num_classes), axis=1)
    transition = np.exp(log_transition)
    p = softmax(scores @ weights + intercepts, axis=1)
    responsible = p * transition.T[labels]
    # Not zero unless both factors underflow; then the example counts as impossible, not as NaN.
    q = np.maximum(responsible.sum(axis=1), 1e-300)
    responsible /= q[:, None]
    pseudo = 1 / num_classes
    loss = -np.log(q).sum() - pseudo * log_transition.sum()
    loss += 0.5 * (precision * (weights**2).sum() + INTERCEPT_PRECISION * (intercepts**2).sum())
    of_logits = p - responsible
    of_weights, of_intercepts = scores.T @ of_logits, of_logits.sum(axis=0)
    known = np.zeros_like(transition)
    if gold is not None:
        logits = log_softmax(gold.scores @ weights + intercepts, axis=1)
        rows = np.arange(len(gold.labels))
        known = gold.counts(num_classes)
        loss -= logits[rows, gold.labels].sum() + (known * log_transition).sum()
        excess = np.exp(logits)
        excess[rows, gold.labels] -= 1
        of_weights += gold.scores.T @ excess
        of_intercepts += excess.sum(axis=0)
    if fixed_transition:
        of_transition = np.zeros_like(transition)
    else:
        present, first = np.unique(labels, return_index=True)
        counts = known + pseudo
        counts[:, present] += np.add.reduceat(responsible, first).T
        of_transition = transition * counts.sum(axis=1, keepdims=True) - counts
    gradient = np.concatenate(
        [
            (of_weights + precision * weights).ravel(),
            of_intercepts + INTERCEPT_PRECISION * intercepts,
            of_transition.ravel(),
        ]
    )
    return loss / n, gradient / n


def _climb(
    scores: Matrix,
    labels: Labels,
    theta: Matrix,
    iterations: int,
    gold: Gold | None = None,
    fixed_transition: bool = False,
    precision: float = WEIGHT_PRECISION,
) -> tuple[Matrix, float]:
    order = np.argsort(labels, kind="stable")
    found = minimize(
        negative_log_posterior,
        theta,
        args=(scores[order], labels[order], _classes(theta, scores.shape[1]), fixed_transition, gold, precision),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": iterations, "ftol": 1e-8, "gtol": 1e-6, "maxcor": 20},
    )
    return found.x, float(found.fun)


def _classes(theta: Matrix, inputs: int) -> int:
    """K, of ``len(theta) = K² + (inputs + 1) K``."""
    return round((math.sqrt((inputs + 1) ** 2 + 4 * len(theta)) - inputs - 1) / 2)


def _blank(inputs: int, transition: Matrix) -> JointFit:
    """Zero weights, so that every class is equally likely at first."""
    num_classes = len(transition)
    return JointFit(transition, np.zeros((inputs, num_classes)), np.zeros(num_classes), math.inf)


def _theta(fit: JointFit, floor: float = START_FLOOR) -> Matrix:
    """Where to climb from. The softmax is flat near a boundary, and a start there would stay."""
    return np.concatenate([fit.weights.ravel(), fit.intercepts, np.log(np.clip(fit.transition, floor, None)).ravel()])


def _unpack(theta: Matrix, objective: float, inputs: int, num_classes: int) -> JointFit:
    split = inputs * num_classes
    return JointFit(
        softmax(theta[split + num_classes :].reshape(num_classes, num_classes), axis=1),
        theta[:split].reshape(inputs, num_classes),
        theta[split : split + num_classes],
        objective,
    )
