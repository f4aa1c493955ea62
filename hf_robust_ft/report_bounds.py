"""Every bound that a Hessian report and a model's weights give, side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .bounds.bound import Bound, check_count
from .bounds.distance import distance_measures
from .bounds.hessian import EPSILON, SOURCE, hessian_bound
from .curvature.placement import processes_of, whole_weights
from .curvature.report import HessianReport, LayerCurvature
from .layers import find_layers
from .reference import weight_and_reference

SOUND, LANCZOS = "Hessian distance, sound bound", "Hessian distance, Lanczos"


def report_bounds(
    report: HessianReport,
    n: int,
    *,
    transition: Any = None,
    epsilon: float = EPSILON,
    model: nn.Module | None = None,
    reference: Mapping[str, Tensor] | None = None,
    margin: float | None = None,
    others: Sequence[Bound] = (),
) -> list[Bound]:
    """The bounds of one model, for one figure: Hessian distance twice, and the distance-only measures.

    Args:
        report: of :func:`~hf_robust_ft.measure_hessian`, on training examples.
        n: number of training examples; the report may be of a sample.
        transition: T, [K, K], if the report's loss is the *backward*-corrected one; the bound is then one on the
            clean loss.
        epsilon: ε of theorem 2.1.
        model, reference: to measure distances that the report lacks; both or neither.
        margin: see :func:`~.bounds.distance.distance_measures`.
        others: bounds from elsewhere (held-out, PAC-Bayes), put last.

    Raises:
        ValueError: what :func:`~.bounds.hessian.hessian_bound` and ``distance_measures`` say; a model without
            reference.
        ReferenceMismatch: a reference that lacks a layer.
    """
    if (model is None) != (reference is None):
        raise ValueError("give model and reference, or neither: distances are from one to the other")
    check_count(n)
    found = [_hessian(report, n, transition, epsilon, lanczos=lanczos) for lanczos in (False, True)]
    if model is not None and reference is not None:
        with processes_of(model, distributed=False).together(), whole_weights(model):
            pairs = _weights_and_references(model, reference)
            found += distance_measures(pairs, n=n, margin=margin, largest_loss=report.losses.maximum)
    return [*found, *others]


def _weights_and_references(model: nn.Module, reference: Mapping[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    for layer in find_layers(model)[0]:
        weight, centre = weight_and_reference(layer, reference)
        if layer.row_dims == (1,):  # outputs second
            weight, centre = weight.transpose(0, 1), centre.transpose(0, 1)
        yield weight, centre


def _hessian(report: HessianReport, n: int, transition: Any, epsilon: float, *, lanczos: bool) -> Bound:
    assumptions = []
    if report.left_out:
        names = [other.name for other in report.left_out]
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        assumptions.append(f"trained parameters outside of every measured layer void the theorem: {shown}")
    if not report.complete:
        assumptions.append("the measurement was stopped before the end")
    if report.examples < n:
        assumptions.append(f"{report.examples} of {n} training examples were measured")
    settled = sum(_settled(layer) for layer in report.layers)
    if lanczos and not settled:
        what = "expected loss" if transition is None else "expected loss on clean labels"
        return Bound(LANCZOS, None, "estimate", what, {}, ("Lanczos settled no layer",), SOURCE, n=n)
    if lanczos:
        assumptions.append(
            f"𝓗 by Lanczos, up to its convergence, in {settled} of {len(report.layers)} layers; sound bounds in others"
        )
    return hessian_bound(
        [_measure(layer, lanczos) for layer in report.layers],
        n=n,
        mean_loss=report.losses.mean,
        largest_loss=report.losses.maximum,
        smallest_loss=report.smallest_loss,
        transition=transition,
        epsilon=epsilon,
        name=LANCZOS if lanczos else SOUND,
        assumptions=assumptions,
    )


def _settled(layer: LayerCurvature) -> bool:
    return layer.positive is not None and layer.positive.settled


def _measure(layer: LayerCurvature, lanczos: bool) -> float:
    if lanczos and layer.positive is not None and layer.positive.settled:
        return layer.positive.maximum
    return layer.upper.maximum
