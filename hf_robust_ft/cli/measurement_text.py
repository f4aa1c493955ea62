"""What ``hf-robust-ft measure`` prints."""

from __future__ import annotations

import math
from typing import Any

from ..card import CardData
from ..card.sections import measured_gap, measured_pair
from ..finetuned_measurement import FinetunedMeasurement
from ..hessian_measurement import hessian_metrics

WORST = 5


def summary(data: CardData, found: FinetunedMeasurement) -> dict[str, Any]:
    """As what JSON can hold, but for numbers that are not finite."""
    report = found.measurement.report
    totals = hessian_metrics(report, "x")
    return {
        "model": data.model_name,
        "reference": found.measurement.reference,
        "examples": report.examples,
        "training_examples": data.training_examples,
        "complete": report.complete,
        "seconds": report.seconds,
        "hessian_total": totals["x_hessian_total"],
        "hessian_total_lanczos": totals["x_hessian_total_lanczos"],
        "settled": report.settled,
        "distance": totals["x_hessian_distance"],
        "worst_layers": [
            {"name": layer.name, "distance": layer.distance, "sound_bound": layer.upper.maximum}
            for layer in sorted(report.layers, key=lambda layer: -layer.upper.maximum)[:WORST]
        ],
        "bounds": [bound.to_dict() for bound in found.bounds],
        "risks": [vars(risk) for risk in found.measurement.risks],
        "gap": measured_gap(data),
    }


def text(model: str, data: CardData, found: FinetunedMeasurement) -> str:
    """A short report."""
    report = found.measurement.report
    totals = hessian_metrics(report, "x")
    total, lanczos = totals["x_hessian_total"], totals["x_hessian_total_lanczos"]
    stopped = "" if report.complete else " (stopped early)"
    settled = sum(layer.positive is not None and layer.positive.settled for layer in report.layers)
    tighter = "Lanczos settled no layer within its time"
    if settled:
        tighter = f"{lanczos:.4g} with Lanczos ({settled} of {len(report.layers)} layers settled)"
    lines = [
        f"{model}: {data.model_class}, from {found.measurement.reference}",
        f"Examples    {report.examples} of {data.training_examples} measured{stopped}, {report.seconds:.0f} s",
        f"Curvature   Σ √𝓗 = {total:.4g} by the sound bounds, {tighter}",
        f"Distance    {totals['x_hessian_distance']:.4g} of all layers together",
        "Worst       share of Σ √𝓗, distance, layer",
    ]
    for layer in sorted(report.layers, key=lambda layer: -layer.upper.maximum)[:WORST]:
        share = math.sqrt(max(layer.upper.maximum, 0)) / total if total else 0.0
        lines.append(f"  {share:6.1%}  {layer.distance:<8.3g}  {layer.name}")
    lines.append("Bounds      value, on the gap")
    for bound in found.bounds:
        if bound.value is None or bound.kind == "measure":
            continue
        gap = f"{bound.terms['gap']:.4g}" if "gap" in bound.terms else ""
        sure = "" if bound.confidence is None else f", {100 * bound.confidence:.4g} %"
        lines.append(f"  {bound.value:<8.4g}  {gap:<8}  {bound.name}: {bound.kind}{sure}, of {bound.bounds_what}")
    pair = measured_pair(data)
    if pair is None:
        lines.append("Gap         not measured: give --eval-dataset or --eval-split")
    else:
        training, held = pair
        what = "backward-corrected cross entropy" if training.corrected else "cross entropy"
        lines.append(
            f"Gap         {held.loss - training.loss:.4g} nats: {what} {training.loss:.4g} on training data, "
            f"{held.loss:.4g} on {held.n} others"
        )
        if held.error is not None and training.error is not None:
            lines.append(
                f"Errors      {training.error:.1%} of training labels ({training.labels}), {held.error:.1%} of the "
                f"others ({held.labels})"
            )
    return "\n".join(lines)
