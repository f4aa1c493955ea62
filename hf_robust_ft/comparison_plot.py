"""Measured models in one picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .card.plots import DPI, WIDTH, log10_gap
from .card.sections import measured_error, measured_gap
from .comparison import Compared, all_bounds, roots
from .figures import BLUE, GREEN, GREY, ORANGE, PINK, block_ticks, new_figure, plain_text, save_small, tidy
from .hessian_measurement import block_of

FILE = "compare.png"
COLOURS = (BLUE, ORANGE, GREEN, PINK, GREY)
SHAPES = "o^sDvP*X"
GAP = "measured gap"
ERROR = "measured error"
NAME = 40


def plot_comparison(models: Sequence[Compared], path: str | Path) -> bool:
    """√𝓗 of the layers that all models have, bounds beside the gap, and bounds on the error; each where there is any.

    Returns:
        False where there is nothing to draw, or no matplotlib.
    """
    measured = [model for model in models if model.report is not None]
    layers = _shared(measured)
    gaps = {model.name: _gaps(model) for model in models}
    errors = {model.name: _errors(model) for model in models}
    rows = [list(dict.fromkeys(name for found in part.values() for name in found)) for part in (gaps, errors)]
    heights = [4.0 if layers else 0, *(0.34 * len(names) + 1.2 if names else 0 for names in rows)]
    shown = [height for height in heights if height]
    figure = new_figure(WIDTH, sum(shown) + 0.5, str(path)) if shown else None
    if figure is None:
        return False
    panels = list(figure.subplots(len(shown), 1, height_ratios=shown, squeeze=False)[:, 0])
    styles = {
        model.name: {"color": COLOURS[i % len(COLOURS)], "marker": SHAPES[i % len(SHAPES)]}
        for i, model in enumerate(models)
    }
    first = panels[0]
    if layers:
        _layers(panels.pop(0), measured, layers, styles)
    if rows[0]:
        axes = panels.pop(0)
        _dots(axes, gaps, rows[0], styles)
        low, high = (math.floor(axes.get_xlim()[0]), math.ceil(axes.get_xlim()[1]))
        ticks = range(low, high + 1, max(1, -(-(high - low) // 8)))
        axes.set_xticks(list(ticks), [f"$10^{{{tick}}}$" for tick in ticks])
        axes.set_xlim(low, high)
        axes.set_xlabel("loss on new examples minus loss on training examples (nats; log axis)", fontsize=9)
        axes.set_title(f"Bounds on the gap, and the gap{_off_axis(models)}", fontsize=10, loc="left")
    if rows[1]:
        axes = panels.pop(0)
        _dots(axes, errors, rows[1], styles)
        axes.set_xlim(0, 1)
        axes.set_xlabel("error on new examples", fontsize=9)
        axes.set_title("Bounds on the error, and the error", fontsize=10, loc="left")
    handles = [
        first.plot([], [], linestyle="none", label=_cut(model.name), **styles[model.name])[0] for model in models
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=min(len(models), 3), fontsize=9, frameon=False)
    save_small(figure, path, DPI)
    return True


def _shared(models: Sequence[Compared]) -> list[str]:
    """Layers that all have, in the order of the first; with one model there is nothing to share."""
    if len(models) < 2:
        return []
    others = [roots(model.report) for model in models if model.report is not None]
    return [name for name in others[0] if all(name in other for other in others)]


def _layers(axes: Any, models: Sequence[Compared], layers: Sequence[str], styles: Mapping[str, Any]) -> None:
    above = False
    for model in models:
        assert model.report is not None  # what is asked for
        found = roots(model.report)
        values = [found[name] if found[name] > 0 else math.nan for name in layers]
        above = above or any(value > 0 for value in values)
        size = 5 if len(layers) <= 100 else 3
        axes.plot(range(len(layers)), values, linestyle="none", markersize=size, alpha=0.8, **styles[model.name])
    if above:
        axes.set_yscale("log")
    most = max(len(model.report.layers) for model in models if model.report is not None)
    common = "" if most == len(layers) else f"\nOnly layers that all have: {len(layers)}"
    axes.set_title(f"Root of the Hessian distance measure (sound bound) by layer{common}", fontsize=10, loc="left")
    axes.set_ylabel("√H")
    tidy(axes)
    axes.grid(visible=False, axis="x")
    block_ticks([axes], [block_of(name) for name in layers])


def _dots(axes: Any, found: Mapping[str, Mapping[str, float]], names: Sequence[str], styles: Mapping[str, Any]) -> None:
    """One row a name, one mark a model."""
    for y, name in enumerate(reversed(names)):
        for model, values in found.items():
            if name in values:
                axes.plot(values[name], y, markersize=7, alpha=0.85, linestyle="none", **styles[model])
    axes.set_yticks(range(len(names)), [_cut(name) for name in reversed(names)], fontsize=9)
    axes.set_ylim(-0.6, len(names) - 0.4)
    tidy(axes)


def _gaps(model: Compared) -> dict[str, float]:
    """Decimal logarithms of the measured gap and of what bounds it; measures have no scale of their own."""
    gap = measured_gap(model.data)
    found = {GAP: math.log10(gap)} if gap is not None and gap > 0 else {}
    for bound in all_bounds(model):
        where = None if bound.kind == "measure" else log10_gap(bound)
        if where is not None:
            found[bound.name] = where
    return found


def _off_axis(models: Sequence[Compared]) -> str:
    """Gaps that a log axis has no place for."""
    gaps = {model.name: measured_gap(model.data) for model in models}
    said = [f"{_cut(name)} {gap:.2g}" for name, gap in gaps.items() if gap is not None and gap <= 0]
    return f"\nNot above 0, and so not on this axis: {', '.join(said)}" if said else ""


def _errors(model: Compared) -> dict[str, float]:
    error = measured_error(model.data)
    bounds = {
        f"{bound.name} ({bound.kind})": bound.value
        for bound in all_bounds(model)
        if bound.value is not None and "error" in bound.bounds_what
    }
    return {**({ERROR: error} if error is not None and bounds else {}), **bounds}


def _cut(name: str) -> str:
    text = plain_text(name)
    return text if len(text) <= NAME else f"{text[: NAME - 1]}…"
