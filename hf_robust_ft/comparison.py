"""Measured models side by side, and in what they can't be compared."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .bounds import Bound
from .card import CardData, read_card
from .card.metadata import finite_metrics
from .card.sections import measured_gap, measured_pair
from .card.text import NOT_MEASURED, number, one_line, percent
from .curvature import HessianReport
from .hessian_measurement import hessian_metrics

WIDEST = 34


class Compared(NamedTuple):
    """One model, as its card's files have it."""

    name: str
    data: CardData
    report: HessianReport | None


def read_models(folders: Sequence[str | Path]) -> list[Compared]:
    """The files of some models, named by their folders.

    Raises:
        ValueError: fewer than two folders, or files that are damaged or of another format.
        OSError: a folder without a card's files.
    """
    if len(folders) < 2:
        raise ValueError(f"models: {len(folders)} given; give two or more, to compare one with another")
    short = [Path(folder).absolute().name for folder in folders]
    twice = {name for name, count in Counter(short).items() if count > 1}
    names = [str(folder) if name in twice else name for folder, name in zip(folders, short, strict=True)]
    return [Compared(one_line(name), *read_card(folder)[:2]) for name, folder in zip(names, folders, strict=True)]


def summary(model: Compared) -> dict[str, Any]:
    """What a comparison shows of a model, as numbers; None for what was not measured."""
    data, report = model.data, model.report
    totals = {} if report is None else hessian_metrics(report, "x")
    held = [row for row in data.constraints if row.free is None]
    bounds = [*data.bounds, *data.other_bounds]
    gap = measured_gap(data)
    return {
        "name": model.name,
        "model_class": data.model_class,
        "reference": data.reference,
        "training_examples": data.training_examples,
        "measured_examples": None if report is None else report.examples,
        "measured_loss": measured_loss(data),
        "metrics": finite_metrics(data),
        "noise_rate": data.noise_rate,
        "constrained": len(held) if data.training_known else None,
        "active": sum(row.active for row in held) if data.training_known else None,
        "layers": None if report is None else len(report.layers),
        "distance": totals.get("x_hessian_distance"),
        "hessian_total": totals.get("x_hessian_total"),
        "hessian_total_lanczos": totals.get("x_hessian_total_lanczos"),
        "settled": totals.get("x_hessian_settled"),
        "gap": gap,
        "bounds": [bound.to_dict() for bound in bounds],
        "certificates": {bound.name: bound.value for bound in bounds if bound.kind == "certificate"},
    }


def measured_loss(data: CardData) -> str | None:
    """Which loss was measured, in words."""
    training = next((risk for risk in data.risks if risk.data == "training"), None)
    if training is None:
        return None
    return "backward-corrected cross entropy" if training.corrected else "cross entropy"


def table(models: Sequence[Compared]) -> str:
    """One row a figure, one column a model; metrics that all of them have, bounds that any has."""
    found = [summary(model) for model in models]
    rows: list[list[str]] = [["", *(_short(each["name"]) for each in found)]]

    def row(label: str, show: Callable[[dict[str, Any]], str]) -> None:
        rows.append([label, *(_short(show(each)) for each in found)])

    row("model", lambda each: each["model_class"] or "not named")
    row("training examples", lambda each: _count(each["training_examples"]))
    row("measured examples", lambda each: _count(each["measured_examples"]))
    row("measured loss", lambda each: each["measured_loss"] or NOT_MEASURED)
    shared = [name for name in found[0]["metrics"] if all(name in each["metrics"] for each in found)]
    for name in shared:
        row(one_line(name), lambda each, name=name: number(each["metrics"][name]))  # type: ignore[misc]
    row("noise rate by T", lambda each: percent(each["noise_rate"]) if each["noise_rate"] is not None else "no T")
    row("layers constrained", lambda each: _count(each["constrained"], "not known"))
    row("layers on their ball", lambda each: _count(each["active"], "not known"))
    row("layers measured", lambda each: _count(each["layers"]))
    row("distance", lambda each: number(each["distance"]))
    row("Σ √𝓗, sound bound", lambda each: number(each["hessian_total"]))
    row("Σ √𝓗, Lanczos", lambda each: number(each["hessian_total_lanczos"]) if each["settled"] else NOT_MEASURED)
    row("layers settled", lambda each: percent(each["settled"]))
    row("measured gap", lambda each: number(each["gap"]))
    for name in dict.fromkeys(bound["name"] for each in found for bound in each["bounds"]):
        kinds = {bound["kind"] for each in found for bound in each["bounds"] if bound["name"] == name}
        row(f"{one_line(name)} ({'/'.join(sorted(kinds))})", lambda each, name=name: _bound(each, name))  # type: ignore[misc]
    widths = [max(len(line[i]) for line in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in rows]
    return "\n".join([lines[0], "-" * (sum(widths) + 2 * (len(widths) - 1)), *lines[1:]])


def _bound(each: dict[str, Any], name: str) -> str:
    value = next((bound["value"] for bound in each["bounds"] if bound["name"] == name), None)
    return number(None if value is None else float(value))


def _count(value: int | None, unknown: str = NOT_MEASURED) -> str:
    return unknown if value is None else f"{value:,}"


def _short(text: str) -> str:
    text = one_line(text)
    return text if len(text) <= WIDEST else f"{text[: WIDEST - 1]}…"


def differences(models: Sequence[Compared]) -> list[str]:
    """In what the models can't be compared, and why; empty where they can."""
    said = []

    def differ(key: Callable[[Compared], Hashable], say: Callable[[Any], str], why: str) -> None:
        groups: dict[Any, list[str]] = {}
        for model in models:
            if (value := key(model)) is not None:
                groups.setdefault(value, []).append(model.name)
        if len(groups) > 1:
            parts = [f"{', '.join(names)}: {say(value)}" for value, names in groups.items()]
            said.append(f"{why} ({'; '.join(parts)})")

    differ(
        _layers,
        lambda value: f"{len(value)} layers",
        "other layers were measured: sums compare only if those that one lacks were frozen in it",
    )
    differ(
        lambda model: model.data.model_class, str, "other architectures: curvature and bounds order models of one kind"
    )
    differ(lambda model: measured_loss(model.data), str, "other losses were measured: their curvature does not compare")
    differ(_noise, lambda value: f"rate {value[0]:.3g}" if value else "no T", "the loss was corrected by another T")
    differ(
        lambda model: None if model.report is None else model.report.examples,
        lambda value: f"{value} examples",
        "a maximum over more examples is larger: 𝓗 of these does not compare",
    )
    differ(
        lambda model: model.data.training_examples,
        lambda value: f"n = {value}",
        "trained on other numbers of examples, by whose root bounds are divided: compare Σ √𝓗",
    )
    differ(lambda model: model.data.reference, str, "measured from weights of other names")
    differ(lambda model: tuple(model.data.datasets) or None, ", ".join, "trained on other data")
    differ(_evaluated, str, "the gap was measured on other evaluation labels")
    said += [f"{m.name}: the measurement was stopped early" for m in models if m.report and not m.report.complete]
    said += [f"{m.name}: the curvature was not measured" for m in models if m.report is None]
    return said


def _layers(model: Compared) -> Hashable:
    return None if model.report is None else frozenset(layer.name for layer in model.report.layers)


def _noise(model: Compared) -> Hashable:
    """T of the loss that was measured, as what can be compared; None for a plain loss."""
    if measured_loss(model.data) != "backward-corrected cross entropy":
        return None
    return model.data.noise_rate, json.dumps(model.data.transition)


def _evaluated(model: Compared) -> Hashable:
    pair = measured_pair(model.data)
    return None if pair is None else pair[1].labels


def roots(report: HessianReport) -> dict[str, float]:
    """√𝓗 by the sound bound, by layer."""
    return {layer.name: math.sqrt(max(layer.upper.maximum, 0.0)) for layer in report.layers}


def all_bounds(model: Compared) -> list[Bound]:
    """Its bounds that have a value."""
    return [bound for bound in (*model.data.bounds, *model.data.other_bounds) if bound.value is not None]
