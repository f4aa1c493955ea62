"""The pictures of a card: small PNGs on a light ground of their own, so that they read on light and dark pages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..bounds.bound import Bound
from ..curvature import HessianReport
from ..figures import BLUE, GREEN, GREY, ORANGE, PINK, block_ticks, new_figure, plain_text, power, save_small, tidy
from ..hessian_measurement import block_of

LAYERS_FILE = "plots/hessian_by_layer.png"
BOUNDS_FILE = "plots/bounds.png"
TRANSITION_FILE = "plots/transition.png"

WIDTH, DPI = 8.0, 110
BEYOND = 4
"""Decades around the gap and its bounds that are shown."""


def plot_layers(report: HessianReport, path: Path) -> bool:
    """𝓗_i and distance of every layer, in the model's order; False without matplotlib."""
    figure = new_figure(WIDTH, 5.2, str(path))
    if figure is None:
        return False
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(1.6, 1))
    layers, at = report.layers, range(len(report.layers))

    def positive(values: Sequence[float | None]) -> list[float]:
        return [value if value is not None and value > 0 else math.nan for value in values]

    found = [layer.positive for layer in layers]
    settled = positive([each.maximum if each is not None and each.settled else None for each in found])
    open_ended = positive([each.maximum if each is not None and not each.settled else None for each in found])
    size = 5 if len(layers) <= 100 else 3
    marks: dict[str, Any] = {"linestyle": "none", "markersize": size}
    upper.plot(at, positive([x.upper.maximum for x in layers]), "^", color=ORANGE, label="sound bound", **marks)
    if any(not math.isnan(value) for value in settled):
        upper.plot(at, settled, "o", color=BLUE, label="Lanczos, settled", **marks)
    if any(not math.isnan(value) for value in open_ended):
        upper.plot(at, open_ended, "o", mfc="none", color=BLUE, label="Lanczos, not settled (at least)", **marks)
    upper.plot(at, positive([x.hessian.maximum for x in layers]), "_", color=GREY, label="largest vᵀHv", **marks)
    lower.plot(at, [layer.distance for layer in layers], "s", color=GREEN, **marks)
    if any(layer.upper.maximum > 0 for layer in layers):
        upper.set_yscale("log")
    upper.set_ylabel("Hessian distance measure")
    upper.set_title("Hessian distance measure and distance from the reference, by layer", fontsize=11, loc="left")
    upper.legend(fontsize=8, ncols=4, loc="lower left", bbox_to_anchor=(0, -0.02), framealpha=0.85)
    upper.margins(y=0.22)
    lower.set_ylabel("distance ‖W − W₀‖")
    lower.set_ylim(bottom=0)
    for axes in (upper, lower):
        tidy(axes)
    block_ticks([upper, lower], [block_of(layer.name) for layer in layers])
    save_small(figure, path, DPI)
    return True


def plot_bounds(bounds: Sequence[Bound], gap: float | None, error: float | None, path: Path) -> bool:
    """Bounds on the loss beside the measured gap on a log axis, and those on the error, if any, beside the error.

    Args:
        bounds: all of them; those without a value are left out.
        gap: measured loss on evaluation data minus that on training data.
        error: measured on evaluation labels that do not count as noisy.
    """
    known = [bound for bound in bounds if bound.value is not None]
    losses = [(bound, where) for bound in known if (where := log10_gap(bound)) is not None]
    errors = [bound for bound in known if "error" in bound.bounds_what]
    if not losses and not errors:
        return False
    rows = [len(losses), len(errors)] if errors and losses else [len(losses) or len(errors)]
    figure = new_figure(WIDTH, 1.3 * len(rows) + 0.34 * sum(rows) + 0.4, str(path))
    if figure is None:
        return False
    panels = figure.subplots(len(rows), 1, height_ratios=[r + 1.5 for r in rows], squeeze=False)[:, 0]
    if losses:
        _losses(panels[0], losses, gap)
    if errors:
        _errors(panels[-1], errors, error)
    save_small(figure, path, DPI)
    return True


def _losses(axes: Any, losses: Sequence[tuple[Bound, float]], gap: float | None) -> None:
    title = "Bounds on the gap (dots) and measures known up to constants (diamonds)"
    # The axis is for what has a scale: the gap and its bounds. Products of norms lie beyond the edge of any other.
    scaled = [where for bound, where in losses if bound.kind != "measure"]
    if gap is not None:
        title += f"\nMeasured gap: {gap:.3g}"
        title += " (vertical line)" if gap > 0 else ", not above 0 and so not on this axis"
    if gap is not None and gap > 0:
        scaled.append(math.log10(gap))
        axes.axvline(scaled[-1], color=ORANGE, linewidth=2)
    scaled = scaled or [where for _, where in losses]
    wheres = [min(max(where, min(scaled) - BEYOND), max(scaled) + BEYOND) for _, where in losses]
    low, high = math.floor(min(wheres + scaled)), math.ceil(max(wheres + scaled))
    span = max(high - low, 1)
    for y, (at, (bound, where)) in enumerate(reversed(list(zip(wheres, losses, strict=True)))):
        measure = bound.kind == "measure"
        colour, marker = (PINK, "D") if measure else (BLUE, "o")
        if at != where:
            marker = ">" if where > at else "<"
        axes.plot(at, y, marker, color=colour, mfc="none" if measure else colour, markersize=7, markeredgewidth=1.5)
        text = power(where) + ("" if at == where else " (off the axis)")
        side, align = ((-9, 0), "right") if at > low + 0.7 * span else ((9, 0), "left")
        axes.annotate(text, (at, y), side, textcoords="offset points", va="center", ha=align, fontsize=8)
    axes.set_yticks(range(len(losses)), [plain_text(bound.name) for bound, _ in reversed(losses)], fontsize=9)
    axes.set_ylim(-0.6, len(losses) - 0.4)
    axes.set_xlim(low - 0.05 * span, high + 0.05 * span)
    ticks = range(low, high + 1, max(1, -(-span // 8)))
    axes.set_xticks(list(ticks), [f"$10^{{{tick}}}$" for tick in ticks])
    axes.set_xlabel("loss on new examples minus loss on training examples (nats; log axis)", fontsize=9)
    axes.set_title(title, fontsize=10, loc="left", x=-0.3)
    tidy(axes)


def _errors(axes: Any, errors: Sequence[Bound], error: float | None) -> None:
    for y, bound in enumerate(reversed(errors)):
        assert bound.value is not None  # what was asked for
        axes.plot(bound.value, y, "o" if bound.kind == "certificate" else "D", color=BLUE, markersize=7)
        axes.annotate(
            f"{bound.value:.3f}", (bound.value, y), (9, 0), textcoords="offset points", va="center", fontsize=8
        )
    axes.set_yticks(range(len(errors)), [f"{plain_text(b.name)} ({b.kind})" for b in reversed(errors)], fontsize=9)
    axes.set_ylim(-0.6, len(errors) - 0.4)
    axes.set_xlim(0, 1)
    title = "Bounds on the error: certificates (dots) and estimates (diamonds)"
    if error is not None:
        axes.axvline(error, color=ORANGE, linewidth=2)
        title += f"\nMeasured error: {error:.3f} (vertical line)"
    axes.set_xlabel("error on new examples", fontsize=9)
    axes.set_title(title, fontsize=10, loc="left", x=-0.3)
    tidy(axes)


def log10_gap(bound: Bound) -> float | None:
    """Where a bound stands on the axis of the gap; None if it does not."""
    if bound.kind == "measure":
        where = bound.terms.get("log10")
        return where if where is not None and math.isfinite(where) else None
    gap = bound.terms.get("gap")
    return math.log10(gap) if gap is not None and 0 < gap < math.inf else None
