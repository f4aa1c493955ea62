"""The numerical PAC-Bayes certificate: a bound on the error of a randomised classifier, from its training examples.

With a prior P that knows nothing of the n examples, with probability 1 - δ over their draw and for every posterior Q
at once (Maurer 2004, theorem 5, n >= 8; Langford & Seeger 2001)

    kl(L̂(Q) ‖ L(Q)) <= (KL(Q‖P) + log(2 √n / δ)) / n,

where L is the risk of a classifier whose weights are drawn from Q anew for each example, and L̂ the same on the
training examples. Posteriors that are trained on this bound: Dziugaite & Roy 2017; Pérez-Ortiz et al. 2021.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..clean_accuracy import count_pairs
from ..noise import Matrix, check_labels, invert_transition, load_transition
from .bound import Bound, check_count
from .kl import kl_inverse, mean_bound

PRIOR_SCALES = tuple(2.0 ** (j / 2) for j in range(-24, 9))
"""The grid of prior standard deviations, in units that know no data: 2.4e-4 to 16 by factors of √2. A step of the grid
costs a posterior at most 3 % of its KL, and the choice log 33 = 3.5 nats."""

# Of δ, what the Monte Carlo estimate of the empirical risk may spend: with 10 draws an example its slack is small.
MONTE_CARLO_SHARE = 0.1

SOURCE = "Maurer 2004, theorem 5; Dziugaite & Roy 2017; Pérez-Ortiz et al. 2021"


def gaussian_kl(mean: Tensor, std: Tensor | float, prior_mean: Tensor | float, prior_std: Tensor | float) -> float:
    """``KL(N(mean, std²) ‖ N(prior_mean, prior_std²))``, summed over independent entries, in nats.

    Args:
        mean: any shape; the others broadcast to it.

    Raises:
        ValueError: a standard deviation that is not positive and finite.
    """
    mean = mean.double()
    spread, wide = (torch.as_tensor(each, dtype=torch.float64, device=mean.device) for each in (std, prior_std))
    for name, value in (("std", spread), ("prior_std", wide)):
        if not bool(((value > 0) & value.isfinite()).all()):
            raise ValueError(f"{name} has the entry {value.min().item():g}; standard deviations are positive")
    ratio = (spread / wide).square()
    shift = (mean - prior_mean) / wide
    return float((0.5 * (ratio - 1 - ratio.log()).expand_as(mean)).sum() + 0.5 * shift.square().sum())


def pac_bayes_bound(risk: float, kl: float, n: int, *, delta: float = 0.05, priors: int = 1) -> float:
    """``kl^-1(risk | (KL + log(2 √n priors / δ)) / n)``: bounds the posterior's true risk.

    Args:
        risk: of the posterior on the n training examples (or an upper bound of it), in [0, 1].
        kl: ``KL(Q‖P)`` in nats, of the prior that was chosen.
        n: training examples, at least 8.
        delta: probability of failure.
        priors: how many priors there were to choose from; each holds with δ / priors.

    Raises:
        ValueError: an argument out of range.
    """
    if not 0 < delta < 1:
        raise ValueError(f"delta is {delta}; it is a probability of failure between 0 and 1, such as 0.05")
    if not (kl >= 0 and math.isfinite(kl)):
        raise ValueError(f"kl is {kl}; it is a divergence in nats, finite and at least 0")
    return kl_inverse(risk, (kl + _choice(check_count(n, 8), delta, priors)) / n)


def _choice(n: int, delta: float, priors: float) -> float:
    return math.log(2 * math.sqrt(n) / delta) + math.log(priors)


def bounded_loss(num_classes: int, transition: Any = None) -> tuple[Matrix, float, float]:
    """The 0-1 loss on clean labels, seen through T and squeezed into [0, 1].

    ``1 - (T^-1)[ỹ, k]`` has the expectation of the clean 0-1 loss of the prediction k (see
    :func:`~hf_robust_ft.clean_accuracy.clean_accuracy`); it lies between a low and a low + width.

    Args:
        num_classes: K.
        transition: T, [K, K], ``T[i, j] = P(noisy label = j | true label = i)``; None for clean labels.

    Returns:
        U, [K, K], rows are the label seen and columns the prediction, and low and width: loss = low + width · U.

    Raises:
        ValueError: no transition matrix of this size, or a singular one.
    """
    inverse = np.eye(num_classes)
    if transition is not None:
        inverse = invert_transition(load_transition(transition, num_classes)).matrix
    loss = 1 - inverse
    low, width = float(loss.min()), float(np.ptp(loss))
    squeezed: Matrix = (loss - low) / width
    # Of a symmetric T there are but two losses; rounding must not make them more.
    squeezed[np.isclose(squeezed, 0, atol=1e-12)] = 0.0
    squeezed[np.isclose(squeezed, 1, atol=1e-12)] = 1.0
    return squeezed, low, width


def certified_error(
    predictions: npt.ArrayLike,
    labels: npt.ArrayLike,
    *,
    num_classes: int,
    kl: float,
    priors: int = 1,
    transition: Any = None,
    delta: float = 0.05,
    seed: int | None = None,
    assumptions: tuple[str, ...] = (),
) -> Bound:
    """The PAC-Bayes certificate of a randomised classifier, from its predictions on its training examples.

    Args:
        predictions: [R, n], classes; each entry with weights drawn from the posterior for it alone, so that all are
            independent.
        labels: [n], as trained on: noisy ones if T is given.
        num_classes: K.
        kl: of the posterior from the prior, over every trained parameter, in nats.
        priors: size of the grid that the prior was chosen from.
        transition: T, [K, K], ``T[i, j] = P(noisy label = j | true label = i)``, known. The certificate is then one
            on the error on *clean* labels: the loss is ``1 - (T^-1)[ỹ, pred]``, mapped into [0, 1] and back.
        delta: probability of failure of the whole statement. A tenth of it goes to the Monte Carlo estimate of the
            empirical risk.
        seed: of the draws, to be reported.
        assumptions: to add.

    Returns:
        A certificate, at most 1. Terms: ``empirical`` (of the draws) and ``empirical_bound`` (with the Monte Carlo
        slack), both as errors; ``kl``, ``choice`` (``log(2 √n priors / δ')``), ``draws``, ``low`` and ``width``.

    Raises:
        ValueError: shapes, labels or classes that don't fit, a singular T, n below 8, delta outside (0, 1).
    """
    drawn, given = np.asarray(predictions), np.asarray(labels)
    if drawn.ndim != 2 or given.shape != drawn.shape[1:]:
        raise ValueError(
            f"predictions have shape {drawn.shape} and labels {given.shape}; give [R, n] draws and [n] labels"
        )
    n = check_count(given.size, 8)
    if not 0 < delta < 1:
        raise ValueError(f"delta is {delta}; it is a probability of failure between 0 and 1, such as 0.05")
    check_labels(given, num_classes)
    squeezed, low, width = bounded_loss(num_classes, transition)
    table = count_pairs(np.broadcast_to(given, drawn.shape).ravel(), drawn.ravel(), num_classes)
    mean = float((table * squeezed).sum() / table.sum())
    binary = bool(np.isin(squeezed, (0.0, 1.0)).all())
    spent = delta * MONTE_CARLO_SHARE
    upper = mean_bound(mean, drawn.size, spent, binary=binary)
    squeezed_bound = pac_bayes_bound(upper, kl, n, delta=delta - spent, priors=priors)
    known = () if transition is None else ("T is known, and noise depends on the true class alone",)
    return Bound(
        name="PAC-Bayes",
        value=min(1.0, low + width * squeezed_bound),
        kind="certificate",
        bounds_what="error on clean labels of the randomised classifier" if transition is not None
        else "error of the randomised classifier",
        terms={
            "empirical": low + width * mean,
            "empirical_bound": low + width * upper,
            "kl": kl,
            "choice": _choice(n, delta - spent, priors),
            "draws": float(drawn.size),
            "low": low,
            "width": width,
        },
        assumptions=(
            "it holds for weights drawn from the posterior for each example, not for the published weights",
            "the training examples are independent draws, and neither they nor their labels shaped the prior",
            *known,
            *assumptions,
        ),
        source=SOURCE,
        confidence=1 - delta,
        n=n,
        seed=seed,
    )  # fmt: skip
