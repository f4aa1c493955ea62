"""What bound_study.py found: how well each measure orders its runs by their generalization gap.

    python recipes/bound_study_report.py --input outputs/bound_study.jsonl

prints three tables in Markdown and draws a picture beside the input.

Kendall's tau-b says how much likelier a larger measure goes with a larger gap than with a smaller one (1: always, 0:
as often as not). Over all runs, ``1/√n`` alone makes it high, so the figure that counts is the mean of those within
each n. Two 95 % intervals, by the percentiles of a bootstrap: *runs*, as if each run were a draw of its own, and
*ways*, as if the ways were drawn from many ways to fine-tune, each with all of its runs. Seven ways are few for that.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from comparison import COLOURS
from matplotlib import pyplot
from matplotlib.axis import Axis
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter
from resumable import Line as Record
from resumable import read_lines
from scipy.stats import kendalltau

"""One run."""
Array = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int64]

OUTPUT = Path("outputs/bound_study.jsonl")
AGAINST = "hessian_lanczos"
"""The measure of the paper, that others are compared with."""
MEASURES = {
    "hessian_lanczos": "Hessian distance, max vᵀH⁺v",
    "hessian_exact": "Hessian distance, max vᵀHv",
    "hessian_sound": "Hessian distance, sound bound",
    "hessian_exact_mean": "mean vᵀHv in the place of the maximum",
    "hessian_sound_mean": "mean sound bound in the place of the maximum",
    "roots_lanczos": "Hessian distance without √C",
    "largest_loss": "√C alone",
    "distance": "distance",
    "distance_sum": "sum of the layers' distances",
    "parameters": "parameters (Long & Sedghi)",
    "row_sums": "row sums (Gouk et al.)",
    "spectral": "spectral (Neyshabur et al.)",
    "spectral_rows": "spectral, row lengths (Bartlett et al.)",
    "pac_bayes": "PAC-Bayes, σ by sharpness",
}
SHOWN = ("hessian_lanczos", "largest_loss", "distance", "spectral", "pac_bayes")
LOGARITHMS = ("parameters", "row_sums", "spectral", "spectral_rows")
MARKERS = ("o", "s", "^", "D", "v", "P")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, default=OUTPUT)
    parser.add_argument("--gap", choices=["gap", "error_gap"], default="gap", help="of the loss, or of the error")
    parser.add_argument("--draws", type=int, default=1000, help="of the bootstrap")
    args = parser.parse_args()
    runs = read_lines(args.input)
    print(f"{len(runs)} runs\n\n{correlation_table(runs, args.gap, args.draws)}")
    print(f"\n{scale(runs, args.gap)}\n\n{way_table(runs)}\n\n{ratio_table(runs)}")
    plot(runs, args.gap, args.input.with_suffix(".png"))


def columns(runs: Sequence[Record], gap: str) -> tuple[Array, Array, Array]:
    """Measures [runs, measures], gaps [runs] and sizes [runs]. All measures have their ``1/√n``."""
    values = [
        [run[name] / (math.sqrt(run["n"]) if name.startswith("roots_") else 1) for name in MEASURES] for run in runs
    ]
    return np.array(values, float), np.array([run[gap] for run in runs], float), np.array([run["n"] for run in runs])


def taus(values: Array, gaps: Array, sizes: Array) -> tuple[Array, Array]:
    """Kendall's tau-b of each column of ``values`` with the gap: over all runs, and the mean of those within a size.

    A size in which a column or the gap does not vary has none, and counts not.
    """

    def of(rows: Rows) -> list[float]:
        return [
            float(kendalltau(column, gaps[rows]).statistic)
            if len(rows) > 1 and np.ptp(column) > 0 and np.ptp(gaps[rows]) > 0
            else math.nan
            for column in values[rows].T
        ]

    within = np.array([of(np.flatnonzero(sizes == size)) for size in np.unique(sizes)])
    known = np.isfinite(within)
    mean = np.where(known, within, 0).sum(0) / np.where(known.any(0), known.sum(0), np.nan)
    return np.array(of(np.arange(len(gaps)))), mean


def resamples(keys: Sequence[Any], draws: int, seed: int = 0) -> Iterable[Rows]:
    """Row numbers of bootstrap samples, of runs with these keys: a key is drawn with all of its runs."""
    generator = np.random.default_rng(seed)
    groups = [np.flatnonzero([key == one for key in keys]) for one in dict.fromkeys(keys)]
    for _ in range(draws):
        yield np.concatenate([groups[i] for i in generator.integers(len(groups), size=len(groups))])


def interval(samples: Array) -> tuple[float, float]:
    """The middle 95 %; samples in which there was nothing to compare are left out."""
    known = samples[np.isfinite(samples)]
    if not len(known):
        return math.nan, math.nan
    low, high = np.percentile(known, [2.5, 97.5])
    return float(low), float(high)


def correlation_table(runs: Sequence[Record], gap: str, draws: int) -> str:
    """Markdown: one row a measure, tau over all runs and within a size, and how far Hessian distance is ahead."""
    values, gaps, sizes = columns(runs, gap)
    everything, within = taus(values, gaps, sizes)
    samples = [
        np.array([taus(values[rows], gaps[rows], sizes[rows])[1] for rows in resamples(keys, draws)])
        for keys in (range(len(runs)), [run["way"] for run in runs])
    ]
    reference = list(MEASURES).index(AGAINST)
    lines = [
        f"| measure | τ with the {gap.replace('_', ' ')}, all runs | within n | interval: runs | ways "
        f"| {MEASURES[AGAINST]}, ahead by | interval: runs | ways |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for i, title in enumerate(MEASURES.values()):
        cells = [title, f"{everything[i]:.2f}", f"{within[i]:.2f}"]
        cells += [_between(sample[:, i]) for sample in samples]
        if i == reference:
            cells += [""] * 3
        else:
            cells.append(f"{within[reference] - within[i]:.2f}")
            cells += [_between(sample[:, reference] - sample[:, i]) for sample in samples]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def scale(runs: Sequence[Record], gap: str) -> str:
    """How many times larger than the gap the measure of the paper is, in words."""
    times = sorted(run[AGAINST] / run[gap] for run in runs if run[gap] > 0)
    if not times:
        return "No run has a gap above 0"
    return (
        f"{MEASURES[AGAINST]}, over the gap: {statistics.median(times):.2g} (median of {len(times)} runs with a gap "
        f"above 0), from {times[0]:.2g} to {times[-1]:.2g}"
    )


def way_table(runs: Sequence[Record]) -> str:
    """Markdown: one row a size and way, means ± standard errors over seeds."""
    shown = {
        "train_loss": "training loss",
        "train_error": "training error",
        "test_error": "test error",
        "gap": "gap",
        AGAINST: MEASURES[AGAINST],
        "distance": "distance / √n",
    }
    lines = ["| n | way | " + " | ".join(shown.values()) + " | runs |", "|---" * (len(shown) + 3) + "|"]
    for n, way in sorted({(run["n"], run["way"]) for run in runs}, key=lambda key: (key[0], _ways(runs).index(key[1]))):
        chosen = [run for run in runs if (run["n"], run["way"]) == (n, way)]
        cells = [mean_and_error([run[name] for run in chosen]) for name in shown]
        lines.append(f"| {n} | {way} | {' | '.join(cells)} | {len(chosen)} |")
    return "\n".join(lines)


def ratio_table(runs: Sequence[Record]) -> str:
    """Markdown: how many times smaller each measure is than with plain fine-tuning on the same examples."""
    names = ("roots_lanczos", "roots_sound", AGAINST, "distance", "gap")
    lines = [
        "| way | Σ √𝓗, Lanczos, times smaller | Σ √𝓗, sound bound | with √C | distance | gap |",
        "|---" * (len(names) + 1) + "|",
    ]
    for way in _ways(runs):
        if way != "plain":
            cells = [mean_and_error(ratios(runs, name, way)) for name in names]
            lines.append(f"| {way} | {' | '.join(cells)} |")
    return "\n".join(lines)


def ratios(runs: Sequence[Record], name: str, way: str) -> list[float]:
    """``plain / way`` for each seed: the geometric mean over sizes. A value not above 0 leaves its seed out."""
    found = {(run["seed"], run["n"], run["way"]): run[name] for run in runs}
    by_seed: dict[int, list[float]] = {}
    for (seed, n, other), value in found.items():
        if other == way and (plain := found.get((seed, n, "plain"))) is not None:
            by_seed.setdefault(seed, []).append(plain / value if min(plain, value) > 0 else math.nan)
    return [statistics.geometric_mean(each) for each in by_seed.values() if not any(map(math.isnan, each))]


def mean_and_error(values: Sequence[float]) -> str:
    """Mean ± standard error, to three digits of the mean."""
    if not values:
        return "none"
    mean = statistics.fmean(values)
    digits = max(0, 2 - math.floor(math.log10(abs(mean)))) if mean else 3
    if len(values) == 1:
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ± {statistics.stdev(values) / len(values) ** 0.5:.{digits}f}"


def plot(runs: Sequence[Record], gap: str, path: Path) -> None:
    """The gap against some of the measures, one colour a way and one marker a size, as a PNG."""
    matplotlib.use("Agg")
    figure, panels = pyplot.subplots(1, len(SHOWN), figsize=(3.1 * len(SHOWN), 3.7), sharey=True, layout="constrained")
    ways, sizes = _ways(runs), sorted({run["n"] for run in runs})
    for name, axes in zip(SHOWN, panels, strict=True):
        for way, colour in zip(ways, COLOURS, strict=False):
            for n, marker in zip(sizes, MARKERS, strict=False):
                chosen = [run for run in runs if (run["way"], run["n"]) == (way, n)]
                axes.scatter(
                    [run[name] for run in chosen], [run[gap] for run in chosen], color=colour, marker=marker, s=22,
                    edgecolor="#555555", linewidth=0.4, label=f"{way}, n = {n}",
                )  # fmt: skip
        logarithm = name in LOGARITHMS
        axes.set(xlabel=f"log10 of {MEASURES[name]}" if logarithm else MEASURES[name])
        if not logarithm:
            _logarithmic(axes.xaxis)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set(ylabel=gap.replace("_", " ").replace("gap", "generalization gap"))
    if min(run[gap] for run in runs) > 0:
        _logarithmic(panels[0].yaxis)
    handles = [Line2D([], [], color=c, marker="o", linestyle="", label=w) for w, c in zip(ways, COLOURS, strict=False)]
    handles += [
        Line2D([], [], color="#555555", marker=m, linestyle="", label=f"n = {n}")
        for n, m in zip(sizes, MARKERS, strict=False)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    print(f"\nWritten: {path}")


def _logarithmic(axis: Axis) -> None:
    """Few and plain ticks, also where the values span less than a decade."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def _between(samples: Array) -> str:
    return "[{:.2f}, {:.2f}]".format(*interval(samples))


def _ways(runs: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(run["way"] for run in runs))


if __name__ == "__main__":
    main()
