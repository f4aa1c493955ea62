"""Clean accuracy on held-out examples, as a bound on the error."""

from __future__ import annotations

from ..clean_accuracy import CleanAccuracy
from .bound import Bound


def held_out_bound(found: CleanAccuracy) -> Bound:
    """The upper end of the error's interval, of the published weights, on examples that training never saw.

    Args:
        found: of :func:`~hf_robust_ft.clean_accuracy.clean_accuracy`.

    Returns:
        A certificate where T is known and symmetric (the identity, for clean labels), else an estimate. Terms:
        ``error`` (the point estimate), ``low`` and ``high`` of its interval, ``noisy_accuracy``. Not measured where
        the labels contradict T.
    """
    low, high = found.interval
    assumptions = (
        "the examples were used neither to train nor to select, and are independent draws",
        "noise depends on the true class alone, and T is the one of these labels",
    )
    if found.kind == "estimate":
        assumptions += ("the interval is asymptotic",)
    if not found.consistent:
        assumptions = ("the labels contradict T: they were not corrupted by it",)
    return Bound(
        name="held-out",
        value=1 - low if found.consistent else None,
        kind=found.kind,
        bounds_what="error on clean labels",
        terms={"error": 1 - found.accuracy, "low": 1 - high, "high": 1 - low, "noisy_accuracy": found.noisy_accuracy},
        assumptions=assumptions,
        source="Clopper & Pearson 1934 through T^-1" if found.kind == "certificate" else "Wilson 1927 through T^-1",
        confidence=found.confidence,
        n=found.n,
    )
