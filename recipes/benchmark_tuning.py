"""Which setting of each method the development runs of the benchmark speak for, and which they leave to be tried."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from benchmark_methods import Setting

LADDER = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
"""Factors of a source's learning rate."""

Scores = dict[tuple[str, str], dict[str, float]]
"""Source and method → setting, as JSON → score."""


def scores_of(runs: Iterable[dict[str, Any]]) -> Scores:
    """The clean accuracy that noisy validation labels and the estimated T tell of after the last epoch, a mean over
    noises and seeds: clean labels play no part in it."""
    found: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        found[run["source"], run["method"]][json.dumps(run["setting"])].append(run["validation_clean"][-1])
    return {of: {setting: statistics.fmean(each) for setting, each in tried.items()} for of, tried in found.items()}


def chosen_settings(runs: Iterable[dict[str, Any]]) -> dict[str, dict[str, Setting]]:
    """Source → method → the setting of the highest score; of equals the first."""
    best: dict[str, dict[str, Setting]] = defaultdict(dict)
    for (source, method), tried in scores_of(runs).items():
        best[source][method] = json.loads(max(tried, key=tried.__getitem__))
    return dict(best)


def outward(tried: dict[str, float]) -> list[Setting]:
    """What is left to try of one method: where the best learning rate is the highest or the lowest of those that were
    tried with the same other numbers, the next one on that side.

    So no method is held back by where its list of learning rates ends.

    >>> outward({'{"learning_rate": 0.1}': 0.8, '{"learning_rate": 0.3}': 0.7})
    [{'learning_rate': 0.03}]
    """
    best: Setting = json.loads(max(tried, key=tried.__getitem__))
    if "learning_rate" not in best:
        return []
    others = {name: value for name, value in best.items() if name != "learning_rate"}
    alike = [json.loads(setting) for setting in tried]
    rates = {each["learning_rate"] for each in alike if {**each, **others} == each}
    at = LADDER.index(best["learning_rate"])
    near = [LADDER[i] for i in (at - 1, at + 1) if 0 <= i < len(LADDER)]
    return [
        {**best, "learning_rate": rate}
        for rate in near
        if rate not in rates and (rate < min(rates) or rate > max(rates))
    ]
