"""Choose the settings of the benchmark from its development runs, and make tables and a picture of its reported runs.

    python recipes/benchmark_report.py recipes/results/benchmark_development.jsonl --freeze
    python recipes/benchmark_report.py recipes/results/benchmark.jsonl

A setting is chosen for each method and source by the clean accuracy that noisy validation labels and the estimated T
tell of after the last epoch, the mean over all development runs; clean labels play no part in it.

Methods are compared on the same draws of examples and noise. A draw (a source and a seed) counts once, with the mean
over its kinds of noise, as these share examples: intervals are Student's, over draws.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib
from benchmark import SETTINGS
from benchmark_tuning import chosen_settings
from comparison import COLOURS, mean_and_error
from matplotlib import pyplot
from resumable import read_lines
from scipy import stats

Run = dict[str, Any]
Case = tuple[str, str, int]
"""Source, noise, seed."""
CLEAN = "none"
OURS = "recommended"
# Of the same training, the epoch that noisy validation labels choose, and the one that clean test labels would.
SELECTED, BEST = "plain, selected epoch", "plain, best epoch (clean labels)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="JSON lines that benchmark.py wrote")
    parser.add_argument("--freeze", action="store_true", help="choose settings from these runs, of --tune")
    parser.add_argument("--settings", type=Path, default=SETTINGS, help="where chosen settings go")
    options = parser.parse_args()
    runs = read_lines(options.runs)
    if options.freeze:
        before = json.loads(options.settings.read_text()) if options.settings.is_file() else {}
        options.settings.parent.mkdir(parents=True, exist_ok=True)
        options.settings.write_text(json.dumps(before | chosen_settings(runs), indent=1) + "\n")
        return
    scores = accuracies(runs)
    for source in dict.fromkeys(case[0] for case in scores):
        print(f"\n### {source}\n\n{source_table(scores, source)}")
    print(f"\n### All noisy settings\n\n{overall_table(scores)}")
    picture = options.runs.with_suffix(".png")
    plot(scores, picture)
    print(f"\nDrawn to {picture}")


def accuracies(runs: Iterable[Run]) -> dict[Case, dict[str, float]]:
    """Case → method → accuracy on clean test labels after the last epoch; plain fine-tuning has two more entries."""
    found: dict[Case, dict[str, float]] = defaultdict(dict)
    for run in runs:
        row, accuracy = found[run["source"], run["noise"], run["seed"]], run["accuracy"]
        row[run["method"]] = accuracy[-1]
        if run["method"] == "plain":
            selected = max(range(len(accuracy)), key=run["validation_clean"].__getitem__)
            row[SELECTED], row[BEST] = accuracy[selected], max(accuracy)
    return dict(found)


def differences(scores: dict[Case, dict[str, float]], method: str, *, clean: bool) -> dict[tuple[str, int], float]:
    """Draw → how far the recommendation is ahead of a method, the mean over the noisy cases (or the clean one).

    Of draws in which both have run under each noise that their source has.
    """
    found: dict[tuple[str, int], list[float]] = defaultdict(list)
    noises: dict[str, set[str]] = defaultdict(set)
    for (source, noise, seed), row in scores.items():
        if (noise == CLEAN) == clean:
            noises[source].add(noise)
            if {method, OURS} <= row.keys():
                found[source, seed].append(row[OURS] - row[method])
    return {draw: statistics.fmean(values) for draw, values in found.items() if len(values) == len(noises[draw[0]])}


def mean_and_interval(values: Iterable[float]) -> tuple[float, float]:
    """The mean, and half the width of its 95 % interval (Student's); NaN for one value."""
    found = list(values)
    mean = statistics.fmean(found)
    if len(found) < 2:
        return mean, math.nan
    spread = statistics.stdev(found) / math.sqrt(len(found))
    return mean, float(stats.t.ppf(0.975, len(found) - 1)) * spread


def source_table(scores: dict[Case, dict[str, float]], source: str) -> str:
    """Markdown: one row a method, the best on noisy labels first; the mean ± standard error over seeds."""
    noises = list(dict.fromkeys(noise for name, noise, _ in scores if name == source))
    columns: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for (name, noise, _), row in scores.items():
        if name == source:
            for method, accuracy in row.items():
                columns[method][noise].append(accuracy)

    def noisy(method: str) -> float:
        found = [statistics.fmean(values) for noise, values in columns[method].items() if noise != CLEAN]
        return statistics.fmean(found) if found else 0.0

    lines = [f"| method | noisy, mean | {' | '.join(noises)} |", "|---|---|" + "---|" * len(noises)]
    for method in sorted(columns, key=noisy, reverse=True):
        cells = [mean_and_error(columns[method][noise]) if noise in columns[method] else "" for noise in noises]
        lines.append(f"| {method} | {100 * noisy(method):.1f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def overall_table(scores: dict[Case, dict[str, float]]) -> str:
    """Markdown: how far the recommendation is ahead of each method, with 95 % intervals: on how many draws, and the
    mean over those of each source."""
    sources = list(dict.fromkeys(case[0] for case in scores))
    lines = [
        f"| recommended ahead of | noisy | draws | {' | '.join(sources)} | clean |",
        "|---" * (4 + len(sources)) + "|",
    ]
    for method in ranked(scores):
        ahead = differences(scores, method, clean=False)
        means = [[100 * value for (name, _), value in ahead.items() if name == source] for source in sources]
        both = [differences(scores, method, clean=clean).values() for clean in (False, True)]
        noisy, clean = ["{:+.1f} ± {:.1f}".format(*(100 * x for x in mean_and_interval(v))) if v else "" for v in both]
        parts = " | ".join(f"{statistics.fmean(values):+.1f}" if values else "" for values in means)
        lines.append(f"| {method} | {noisy} | {len(ahead)} | {parts} | {clean} |")
    return "\n".join(lines)


def ranked(scores: dict[Case, dict[str, float]]) -> list[str]:
    """Methods but the recommendation, the closest to it on noisy labels first."""
    methods = dict.fromkeys(method for row in scores.values() for method in row if method != OURS)
    ahead = {m: list(differences(scores, m, clean=False).values()) for m in methods}
    return sorted((m for m in methods if ahead[m]), key=lambda m: statistics.fmean(ahead[m]))


def plot(scores: dict[Case, dict[str, float]], path: Path) -> None:
    """How far each method lies from the recommendation: each draw a dot, and the mean with its interval."""
    matplotlib.use("Agg")
    methods = ranked(scores)
    sources = list(dict.fromkeys(case[0] for case in scores))
    figure, panels = pyplot.subplots(1, 2, figsize=(10, 0.3 * len(methods) + 1.3), layout="constrained", sharey=True)
    for axes, clean in zip(panels, (False, True), strict=True):
        for y, method in enumerate(methods):
            found = differences(scores, method, clean=clean)
            for (source, _), value in found.items():
                axes.plot(-100 * value, y, "o", color=COLOURS[sources.index(source)], markersize=4, alpha=0.8)
            if len(found) > 1:
                mean, half = mean_and_interval(found.values())
                axes.errorbar(-100 * mean, y, xerr=100 * half, color="black", fmt="|", capsize=3, linewidth=1)
        axes.axvline(0, color="grey", linewidth=0.8)
        axes.set(title="clean labels" if clean else "mean over noisy settings")
        axes.set(xlabel=f"accuracy less that of '{OURS}' (points)")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(methods)), methods)
    panels[0].invert_yaxis()
    for source, colour in zip(sources, COLOURS, strict=False):
        panels[1].plot([], [], "o", color=colour, label=source)
    panels[1].errorbar([], [], xerr=1, color="black", fmt="|", capsize=3, label="mean, 95 % interval")
    figure.legend(frameon=False, loc="outside lower center", ncols=len(sources) + 1)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
