"""What the recipes print, draw and write when they have trained one model in several ways."""

from __future__ import annotations

import json
import platform
import statistics
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import version
from math import isnan, nan
from pathlib import Path

import matplotlib
import torch
from matplotlib import pyplot

# Okabe and Ito's colours: told apart by colour-blind readers, on light and on dark paper.
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#D55E00", "#0072B2", "#F0E442")


@dataclass(frozen=True)
class Run:
    """One training: a method and a seed."""

    method: str
    seed: int
    accuracy: list[float]
    """On clean test labels, after each epoch."""
    validation: list[float]
    """Clean accuracy as estimated on noisy validation labels, after each epoch; empty without them."""
    distances: dict[str, float]
    """``‖W_i - W_i^ref‖_F`` at the end, by parameter name."""
    depths: dict[str, int]
    """Block of each layer, counted from the input."""
    seconds: float

    @property
    def selected(self) -> float:
        """Accuracy on clean test labels at the epoch that the noisy validation labels choose; NaN without them."""
        return (
            self.accuracy[max(range(len(self.validation)), key=self.validation.__getitem__)] if self.validation else nan
        )


def mean_and_error(values: list[float]) -> str:
    """Mean ± standard error in percent; the mean alone for one value."""
    mean = 100 * statistics.fmean(values)
    if isnan(mean):
        return "not measured"
    if len(values) == 1:
        return f"{mean:.1f}"
    return f"{mean:.1f} ± {100 * statistics.stdev(values) / len(values) ** 0.5:.1f}"


def accuracy_table(runs: list[Run]) -> str:
    """Markdown: one row a method, clean test accuracy at the last, the selected and the best epoch."""
    lines = [
        "| method | clean accuracy, last epoch (%) | selected epoch (%) | best epoch (%) | seeds | mean layer distance "
        "| seconds a run |",
        "|---|---|---|---|---|---|---|",
    ]
    for method in _methods(runs):
        chosen = [run for run in runs if run.method == method]
        distance = statistics.fmean(d for run in chosen for d in run.distances.values())
        lines.append(
            f"| {method} | {mean_and_error([run.accuracy[-1] for run in chosen])} "
            f"| {mean_and_error([run.selected for run in chosen])} "
            f"| {mean_and_error([max(run.accuracy) for run in chosen])} | {len(chosen)} | {distance:.3f} "
            f"| {statistics.median(run.seconds for run in chosen):.0f} |"
        )
    return "\n".join(lines)


def distance_table(runs: list[Run]) -> str:
    """Markdown: one row a block, the mean Frobenius distance of its layers for each method."""
    methods = _methods(runs)
    lines = ["| block | layers | " + " | ".join(methods) + " |", "|---|---|" + "---|" * len(methods)]
    names = runs[0].depths
    for depth in sorted(set(names.values())):
        block = [name for name in names if names[name] == depth]
        cells = [
            f"{statistics.fmean(run.distances[n] for run in runs if run.method == method for n in block):.3f}"
            for method in methods
        ]
        lines.append(f"| {_common_prefix(block)} | {len(block)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(runs: list[Run], path: Path) -> None:
    """Clean accuracy by epoch and distance by block, one colour a method, as a PNG."""
    matplotlib.use("Agg")
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for colour, method in zip(COLOURS, _methods(runs), strict=False):
        chosen = [run for run in runs if run.method == method]
        epochs = range(1, len(chosen[0].accuracy) + 1)
        for run in chosen:
            left.plot(epochs, [100 * a for a in run.accuracy], color=colour, alpha=0.3, linewidth=1)
        means = [100 * statistics.fmean(values) for values in zip(*(r.accuracy for r in chosen), strict=True)]
        left.plot(epochs, means, color=colour, label=method, linewidth=2, marker="o", markersize=3)
        depths = sorted(set(chosen[0].depths.values()))
        right.plot(
            depths,
            [
                statistics.fmean(run.distances[name] for run in chosen for name, d in run.depths.items() if d == depth)
                for depth in depths
            ],
            color=colour,
            marker="o",
            markersize=3,
        )
    left.set(xlabel="epoch", ylabel="clean test accuracy (%)")
    right.set(xlabel="block, from the input to the head", ylabel="mean distance of its layers")
    left.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.get_major_locator().set_params(integer=True)
    right.set_ylim(bottom=0)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def save(runs: list[Run], settings: dict[str, object], folder: Path) -> None:
    """Write results.json: the command, settings, versions, machine and every run."""
    folder.mkdir(parents=True, exist_ok=True)
    versions = {name: version(name) for name in ("hf-robust-ft", "torch", "transformers", "accelerate", "datasets")}
    content = {
        "command": " ".join(sys.argv),
        "settings": settings,
        "versions": versions | {"python": platform.python_version()},
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {_device()}",
        "runs": [asdict(run) for run in runs],
    }
    (folder / "results.json").write_text(json.dumps(content, indent=1), encoding="utf-8")


def report(runs: list[Run], folder: Path) -> None:
    """Print the tables and draw curves.png."""
    plot(runs, folder / "curves.png")
    print(f"\n{accuracy_table(runs)}\n\nMean distance from the pretrained weights, by block:\n\n{distance_table(runs)}")
    print(f"\nWritten to {folder}: results.json, curves.png")


def _methods(runs: list[Run]) -> list[str]:
    return list(dict.fromkeys(run.method for run in runs))


def _common_prefix(names: list[str]) -> str:
    parts = [name.split(".")[:-1] for name in names]
    shared = [level[0] for level in zip(*parts, strict=False) if len(set(level)) == 1]
    return ".".join(shared)


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
