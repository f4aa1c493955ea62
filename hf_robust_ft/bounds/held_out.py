"""Clean accuracy on held-out examples, as a bound on the error."""

from __future__ import annotations

from scipy.stats import binomtest

from ..clean_accuracy import CleanAccuracy
from .bound import Bound, check_count

INDEPENDENT = "the examples were used neither to train nor to select, and are independent draws"


def held_out_error(wrong: int, n: int, *, name: str, clean: bool, confidence: float = 0.95) -> Bound:
    """The largest error that is not refuted by ``wrong`` mistakes on n held-out examples: a certificate.

    It is the p with ``P(Binomial(n, p) <= wrong) = 1 - confidence`` (one-sided; Clopper & Pearson 1934).

    Args:
        wrong: examples whose label is not the prediction.
        n: all of them.
        name: of the bound.
        clean: whether the labels are known to be clean; else the error is that on labels as given.
        confidence: in (0, 1).

    Raises:
        ValueError: counts that contradict each other, or a confidence out of range.
    """
    check_count(n)
    if not 0 <= wrong <= n:
        raise ValueError(f"wrong is {wrong} of n={n} examples; give the number of mistakes, from 0 to n")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; it is a probability between 0 and 1, such as 0.95")
    return Bound(
        name=name,
        value=float(binomtest(wrong, n, alternative="less").proportion_ci(confidence, method="exact").high),
        kind="certificate",
        bounds_what="error on clean labels" if clean else "error on labels as given",
        terms={"error": wrong / n},
        assumptions=(INDEPENDENT,),
        source="Clopper & Pearson 1934",
        confidence=confidence,
        n=n,
    )


def held_out_bound(found: CleanAccuracy, name: str = "held-out") -> Bound:
    """The upper end of the error's interval, of the published weights, on examples that training never saw.

    Args:
        found: of :func:`~hf_robust_ft.clean_accuracy.clean_accuracy`.
        name: of the bound.

    Returns:
        A certificate where T is known and symmetric (the identity, for clean labels), else an estimate. Terms:
        ``error`` (the point estimate), ``low`` and ``high`` of its interval, ``noisy_accuracy``. Not measured where
        the labels contradict T.
    """
    low, high = found.interval
    assumptions: tuple[str, ...] = (
        INDEPENDENT,
        "noise depends on the true class alone, and T is the one of these labels",
    )
    if found.kind == "estimate":
        assumptions += ("the interval is asymptotic",)
    if not found.consistent:
        assumptions = ("the labels contradict T: they were not corrupted by it",)
    return Bound(
        name=name,
        value=1 - low if found.consistent else None,
        kind=found.kind,
        bounds_what="error on clean labels",
        terms={"error": 1 - found.accuracy, "low": 1 - high, "high": 1 - low, "noisy_accuracy": found.noisy_accuracy},
        assumptions=assumptions,
        source="Clopper & Pearson 1934 through T^-1" if found.kind == "certificate" else "Wilson 1927 through T^-1",
        confidence=found.confidence,
        n=found.n,
    )
