"""What the template prints: rows of tables and sentences, from what was measured."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from typing import Any

from ..bounds.bound import Bound
from ..constraints import ConstraintRow
from ..curvature import HessianReport
from ..curvature.report import LayerCurvature
from ..estimation import TransitionEstimate
from ..hessian_measurement import block_of
from ..risks import MeasuredRisk
from .data import CardData, plain
from .metadata import TIMES, labels_of
from .text import NOT_MEASURED, Markup, escaped, fenced, number, one_line, percent, whole

WORST = 5
PRINTED_CLASSES = 12


def sections(data: CardData, report: HessianReport | None, estimate: TransitionEstimate | None) -> dict[str, Any]:
    """The values that the template has names for."""
    bounds = [*data.bounds, *data.other_bounds]
    gap = measured_gap(data)
    return {
        "metrics": _metrics(data),
        "risks": [_risk(risk) for risk in data.risks],
        "gap": None if gap is None else _gap(data, gap),
        "transition": _transition(data),
        "singular": _singular(data),
        "constrained": _constrained(data.constraints),
        "free": _free(data.constraints),
        "blocks": [] if report is None else _blocks(report),
        "worst": [] if report is None else _worst(report),
        "left_out": [] if report is None else _reasons([(other.reason, other.name) for other in report.left_out]),
        "bounds": [_bound(bound) for bound in bounds],
        "assumptions": _assumptions(bounds),
        "limits": [*_limits(data, report), *data.limits],
        "arguments": [(name, _value(value)) for name, value in data.arguments.items()],
        "command": _command(data.command),
        "measured_by": _command(data.measured_by),
    }


# The measured gap


def measured_pair(data: CardData) -> tuple[MeasuredRisk, MeasuredRisk] | None:
    """Training and evaluation data, clean labels first, whose losses estimate one thing; None where there are none."""
    training = next((risk for risk in data.risks if risk.data == "training"), None)
    others = sorted((risk for risk in data.risks if risk.data != "training"), key=lambda risk: risk.labels == "noisy")
    return None if training is None or not others else (training, others[0])


def measured_gap(data: CardData) -> float | None:
    """Loss on evaluation data minus loss on training data, in nats."""
    pair = measured_pair(data)
    return None if pair is None else pair[1].loss - pair[0].loss


def measured_error(data: CardData) -> float | None:
    """On evaluation labels that do not count as noisy."""
    pair = measured_pair(data)
    return None if pair is None or pair[1].labels == "noisy" else pair[1].error


def _gap(data: CardData, gap: float) -> dict[str, Any]:
    pair = measured_pair(data)
    assert pair is not None  # there is a gap
    errors = [risk.loss_error for risk in pair]
    both = None if None in errors else math.hypot(*(error or 0.0 for error in errors))
    return {
        "value": number(gap, 3),
        "error": number(both, 2),
        "training": _said(pair[0]),
        "evaluation": f"{pair[1].data}: {_said(pair[1])}",
        "caveat": _caveat(*pair),
    }


def _caveat(training: MeasuredRisk, evaluation: MeasuredRisk) -> str | None:
    """What keeps the two losses from estimating one thing."""
    if training.corrected and evaluation.labels == "as given":
        return "Evaluation labels are taken as given: where they are wrong, the gap holds their noise, too."
    if training.labels == "noisy" != evaluation.labels and not training.corrected:
        return "The training loss is not corrected for noise: the gap holds what noise adds to that loss, too."
    return None


def _said(risk: MeasuredRisk) -> str:
    loss = "backward-corrected cross entropy" if risk.corrected else "cross entropy"
    return f"{loss} on {risk.n} examples, {_labels(risk.labels)}"


def _labels(labels: str) -> str:
    return "labels as given" if labels == "as given" else f"{labels} labels"


def _risk(risk: MeasuredRisk) -> tuple[str, ...]:
    loss = f"{risk.loss:.4g}" + ("" if risk.loss_error is None else f" ± {risk.loss_error:.2g}")
    kind = "backward-corrected" if risk.corrected else "plain"
    return risk.data, _labels(risk.labels), str(risk.n), kind, loss, percent(risk.error)


# Tables


def _metrics(data: CardData) -> list[tuple[str, str, str]]:
    return [
        (name, _labels(labels_of(data, name)), "not a finite number" if value is None else f"{value:.4g}")
        for name, value in plain(data.metrics).items()
        if not name.endswith(TIMES)
    ]


def _singular(data: CardData) -> bool:
    """Whether T is known, but not its inverse."""
    return data.noise_rate is not None and data.amplification is None


def _transition(data: CardData) -> Markup | None:
    if data.transition is None or len(data.transition) > PRINTED_CLASSES:
        return None
    classes = len(data.transition)
    names = data.classes if len(data.classes) == classes else [str(i) for i in range(classes)]
    head = "| true \\ noisy | " + " | ".join(map(escaped, names)) + " |"
    rows = [head, "|---|" + "---:|" * classes]
    for name, row in zip(names, data.transition, strict=True):
        rows.append(f"| {escaped(name)} | " + " | ".join("·" if v < 0.005 else f"{v:.2f}" for v in row) + " |")
    return Markup("\n".join(rows))


def _constrained(rows: Sequence[ConstraintRow]) -> list[tuple[str, ...]]:
    groups: dict[str, list[ConstraintRow]] = {}
    for row in rows:
        if row.free is None:
            groups.setdefault(block_of(row.name), []).append(row)
    found: list[tuple[str, ...]] = []
    for block, members in groups.items():
        radii = [row.radius for row in members if row.radius is not None]
        distances = [row.distance for row in members if row.distance is not None]
        active = sum(row.active for row in members)
        norms = "/".join(dict.fromkeys(str(row.norm) for row in members))
        found.append((block, str(len(members)), norms, _range(radii), _range(distances), f"{active} of {len(members)}"))
    return found


def _range(values: Sequence[float]) -> str:
    if not values:
        return NOT_MEASURED
    low, high = f"{min(values):.3g}", f"{max(values):.3g}"
    return low if low == high else f"{low} to {high}"


def _free(rows: Sequence[ConstraintRow]) -> list[tuple[str, str]]:
    return _reasons([(row.free, row.name) for row in rows if row.free is not None])


def _reasons(pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Reason → how many parameters, and the first of them."""
    groups: dict[str, list[str]] = {}
    for reason, name in pairs:
        groups.setdefault(reason, []).append(name)
    shown = []
    for reason, names in groups.items():
        more = f" and {len(names) - 2} more" if len(names) > 2 else ""
        shown.append((reason, ", ".join(names[:2]) + more))
    return shown


def _root(value: float) -> float:
    return math.sqrt(max(value, 0.0))


def _blocks(report: HessianReport) -> list[tuple[str, ...]]:
    groups: dict[str, list[LayerCurvature]] = {}
    for layer in report.layers:
        groups.setdefault(block_of(layer.name), []).append(layer)
    total = math.fsum(_root(layer.upper.maximum) for layer in report.layers)
    found: list[tuple[str, ...]] = []
    for block, members in groups.items():
        distance = math.sqrt(math.fsum(layer.distance**2 for layer in members))
        bound = math.fsum(_root(layer.upper.maximum) for layer in members)
        known = [x.positive for x in members if x.positive is not None and x.positive.settled]
        lanczos = f"{math.fsum(_root(x.maximum) for x in known):.3g}" if len(known) == len(members) else NOT_MEASURED
        if 0 < len(known) < len(members):
            lanczos = f"{len(known)} of {len(members)} settled"
        share = percent(bound / total) if total else NOT_MEASURED
        found.append((block, str(len(members)), f"{distance:.3g}", f"{bound:.3g}", lanczos, share))
    return found


def _worst(report: HessianReport) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    for layer in sorted(report.layers, key=lambda layer: -layer.upper.maximum)[:WORST]:
        best = layer.positive
        value = NOT_MEASURED if best is None else f"{'' if best.settled else '≥ '}{best.maximum:.3g}"
        numbers = (f"{layer.distance:.3g}", f"{layer.hessian.maximum:.3g}", value, f"{layer.upper.maximum:.3g}")
        found.append((layer.name, *numbers))
    return found


def _bound(bound: Bound) -> tuple[str, ...]:
    gap = bound.terms.get("gap")
    kind = bound.kind if bound.confidence is None else f"{bound.kind}, {100 * bound.confidence:.4g} %"
    return bound.name, number(bound.value), "" if gap is None else number(gap), kind, bound.bounds_what, bound.source


def _assumptions(bounds: Sequence[Bound]) -> list[tuple[str, str]]:
    """Each assumption once, with the bounds that rest on it."""
    found: dict[str, list[str]] = {}
    for bound in bounds:
        for text in bound.assumptions:
            found.setdefault(text, []).append(bound.name)
    return [(whole(text), whole(", ".join(names))) for text, names in found.items()]


def _limits(data: CardData, report: HessianReport | None) -> list[str]:
    said = []
    if report is None:
        said.append("The curvature of this model was not measured, so there is no bound from it.")
    else:
        if data.training_examples is not None and report.examples < data.training_examples:
            said.append(
                f"The curvature was measured on {report.examples} of {data.training_examples} training examples: the "
                "largest value of all may be higher."
            )
        if not report.complete:
            said.append("The measurement was stopped early.")
        if report.left_out:
            said.append(
                f"{len(report.left_out)} trained parameters belong to no measured layer (biases, norms and the like); "
                "the theorem says nothing of a model that moves them."
            )
        said += [f"Measured by autograd in part: {note}" for note in report.notes]
    if report is not None and _singular(data):
        said.append(
            "T can't be inverted, so the backward-corrected loss is not defined: the curvature and the bounds from it "
            "are those of the plain cross entropy, on training labels as given."
        )
    if data.noise_source is not None:
        said.append("Noise is taken to depend on the true class alone; where it does not, corrected losses are biased.")
    if data.selected_by is not None:
        said.append(
            f"The epoch was selected by {data.selected_by}: evaluation on the same examples is flattered by it."
        )
    if not data.metrics:
        said.append("No evaluation of these weights was recorded.")
    return said


# How to reproduce


def _value(value: Any) -> str:
    text = one_line(value if isinstance(value, str) else json.dumps(value))
    return text if len(text) <= 60 else f"{text[:59]}…"


def _command(words: Sequence[str]) -> Markup | None:
    """One option a line, so that it fits a page."""
    if not words:
        return None
    lines: list[str] = []
    for word in map(one_line, words):
        quoted = shlex.quote(word)
        if word.startswith("--") and lines:
            lines.append(f"    {quoted}")
        else:
            lines[-1:] = [f"{lines[-1]} {quoted}" if lines else quoted]
    return fenced(" \\\n".join(lines), "bash")
