"""The binary kl divergence and its inverse, and what they say of the mean of bounded losses."""

from __future__ import annotations

import math

from scipy.optimize import brentq
from scipy.stats import beta


def binary_kl(q: float, p: float) -> float:
    """``kl(q‖p) = q log(q/p) + (1 - q) log((1 - q)/(1 - p))`` between two coin flips, in nats.

    Args:
        q, p: probabilities.

    Raises:
        ValueError: one outside [0, 1].
    """
    for name, value in (("q", q), ("p", p)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is {value}; it is a probability in [0, 1]")
    total = 0.0
    for a, b in ((q, p), (1 - q, 1 - p)):
        if a > 0:
            total += a * math.log(a / b) if b > 0 else math.inf
    return max(total, 0.0)


def kl_inverse(q: float, bound: float) -> float:
    """The largest p with ``kl(q‖p) <= bound``.

    Rounded up, so that no rounding error makes it smaller than the true one.

    Args:
        q: a probability.
        bound: in nats, at least 0.

    Raises:
        ValueError: q outside [0, 1], or a bound that is negative or NaN.
    """
    if not 0 <= q <= 1:
        raise ValueError(f"q is {q}; it is a mean loss in [0, 1]")
    if not bound >= 0:
        raise ValueError(f"bound is {bound}; a divergence is at least 0")
    # Pinsker: kl(q‖p) >= 2 (p - q)², so the root lies below this.
    top = q + math.sqrt(bound / 2)
    if top >= 1:
        top = math.nextafter(1.0, 0.0)
        if q >= top or binary_kl(q, top) <= bound:
            return 1.0
    if top <= q:
        return q
    root = brentq(lambda p: binary_kl(q, p) - bound, q, top, xtol=1e-15, rtol=1e-14)
    return min(1.0, float(root) + 1e-12)


def mean_bound(mean: float, n: int, delta: float, *, binary: bool) -> float:
    """Upper bound of the expected mean of n independent losses in [0, 1], that holds with probability ``1 - delta``.

    Losses that are 0 or 1: Clopper-Pearson. It holds for flips of different coins, too, as their sum is less spread
    than that of equal ones, wherever the bound is at least (sum + 1)/n (Hoeffding 1956, theorem 4): for delta <= 1/4 it
    is so for all sums but n - 1, where the bound is 1. Other losses: ``kl(mean‖p) <= log(1/delta)/n`` (Hoeffding 1963,
    theorem 1).

    Args:
        mean: of the losses seen.
        n: how many.
        delta: probability of failure, in (0, 1/4].
        binary: whether each loss is 0 or 1.
    """
    if not 0 < delta <= 0.25:
        raise ValueError(f"delta is {delta}; it is a probability of failure in (0, 1/4]")
    if not binary:
        return kl_inverse(mean, math.log(1 / delta) / n)
    ones = round(mean * n)
    return float(beta.ppf(1 - delta, ones + 1, n - ones)) if ones < n - 1 else 1.0
