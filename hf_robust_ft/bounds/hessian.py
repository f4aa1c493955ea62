"""The leading term of the Hessian distance-based generalization bound, from measured numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..noise import invert_transition, load_transition
from .bound import Bound, check_count

EPSILON = 0.1
"""The theorem holds for any ε > 0 that is fixed in advance, but ξ may hide constants that grow as ε shrinks: a tiny one
would flatter. A tenth makes the leading term 10 % larger than its limit."""

SOURCE = "Ju, Li & Zhang 2022 (arXiv 2206.02659), theorem 2.1"

ASSUMPTIONS = (
    "only the leading term: ξ = O(n^-3/4) is not known, and the theorem holds with probability 0.99",
    "the theorem is for feed-forward networks with smooth activations",
    "𝓗 and C are maxima over the examples measured, so biased low",
)


def hessian_bound(
    measures: Sequence[float],
    *,
    n: int,
    mean_loss: float,
    largest_loss: float,
    smallest_loss: float = 0.0,
    transition: Any = None,
    epsilon: float = EPSILON,
    name: str = "Hessian distance",
    assumptions: Sequence[str] = (),
) -> Bound:
    """``(1 + ε) L̂ + (1 + ε) √C Σ_i √𝓗_i / √n``, which bounds the expected loss up to ξ.

    𝓗_i is the maximum over examples of ``v_iᵀ H_i⁺ v_i``, the Hessian of one example's loss in layer i, of which only
    the positive part counts, along the way v_i that the layer travelled; C bounds the loss.

    *Noisy labels.* The theorem is applied to the backward-corrected loss ``ℓ̄ = Σ_k (T^-1)[ỹ, k] ℓ(z, k)``, whose
    expectation over noisy labels is the clean loss. It takes losses from 0 on, so it is applied to ``ℓ̄ - min ℓ̄``,
    which has the same Hessian, with ``C̄ = max ℓ̄ - min ℓ̄``, and the shift is taken back:
    ``min ℓ̄ + (1 + ε) (L̄ - min ℓ̄) + (1 + ε) √C̄ Σ_i √𝓗_i / √n``.

    Args:
        measures: 𝓗_i, one for each layer, at least 0 (negative rounding counts as 0).
        n: number of *training* examples, of which a sample may have been measured.
        mean_loss, largest_loss, smallest_loss: of the loss that was measured, in nats; the smallest counts only with T.
        transition: T, [K, K], ``T[i, j] = P(noisy label = j | true label = i)``: the loss was backward-corrected by it.
        epsilon: ε, chosen before the measurement.
        name, assumptions: of this variant, to be reported.

    Returns:
        An estimate. Terms: ``loss`` (L̂), ``C``, ``root_sum`` (Σ √𝓗_i), ``epsilon``, ``layers``, ``gap`` (value - L̂),
        and with T ``shift`` (min ℓ̄) and ``amplification`` (ρ = max_j Σ_k |T^-1[j, k]|: |ℓ̄| is at most ρ times the
        largest plain loss over classes).

    Raises:
        ValueError: n below 1, ε not positive, a loss or measure that is NaN or infinite, a loss below 0 without T,
            losses out of order, losses that are all the same (C = 0), no layer, a singular T.
    """
    check_count(n)
    if not (epsilon > 0 and math.isfinite(epsilon)):
        raise ValueError(f"epsilon is {epsilon}; the theorem is for a positive one, such as {EPSILON}")
    if not measures:
        raise ValueError("measures is empty; give 𝓗 of at least one layer")
    named = {"mean_loss": mean_loss, "largest_loss": largest_loss, "smallest_loss": smallest_loss}
    for label, value in {**named, **{f"measures[{i}]": each for i, each in enumerate(measures)}}.items():
        if not math.isfinite(value):
            raise ValueError(f"{label} is {value}; a bound needs finite numbers. Look at the loss that was measured")
    shift = 0.0
    extra: dict[str, float] = {}
    what, known = "expected loss", ("cross entropy is not bounded: C is the largest loss seen",)
    if transition is not None:
        shift = smallest_loss
        inverse = invert_transition(load_transition(transition))
        extra = {"shift": shift, "amplification": inverse.amplification}
        what = "expected loss on clean labels"
        known = (
            "noise depends on the true class alone, and T is known",
            "the corrected loss is not bounded: C is the range of losses seen",
        )
    elif min(smallest_loss, mean_loss) < 0:
        raise ValueError(
            f"smallest_loss is {min(smallest_loss, mean_loss):g}; the theorem is for losses from 0 on. Give the "
            "transition if the loss is backward-corrected: it is shifted then"
        )
    if not shift <= mean_loss <= largest_loss:
        raise ValueError(
            f"mean_loss is {mean_loss:g}, outside of [{shift:g}, {largest_loss:g}]; losses are out of order"
        )
    width = largest_loss - shift
    if width == 0:
        raise ValueError(
            f"largest_loss is {largest_loss:g} and C = 0: every loss is the same, and the bound would be empty. "
            "Measure more examples, or look at the loss"
        )
    roots = math.fsum(math.sqrt(max(each, 0.0)) for each in measures)
    value = shift + (1 + epsilon) * (mean_loss - shift) + (1 + epsilon) * math.sqrt(width) * roots / math.sqrt(n)
    return Bound(
        name=name,
        value=value,
        kind="estimate",
        bounds_what=what,
        terms={
            "loss": mean_loss,
            "C": width,
            "root_sum": roots,
            "epsilon": epsilon,
            "layers": float(len(measures)),
            "gap": value - mean_loss,
            **extra,
        },
        assumptions=(*ASSUMPTIONS, *known, *assumptions),
        source=SOURCE,
        n=n,
    )
