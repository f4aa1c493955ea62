"""Choose the settings of the benchmark from its development runs, and make tables and pictures of its reported runs.

    python recipes/benchmark_report.py --freeze outputs/benchmark_development.jsonl
    python recipes/benchmark_report.py recipes/results/benchmark.jsonl

A setting is chosen for each method and source by the clean accuracy that noisy validation labels and the estimated T
tell of after the last epoch, the mean over all development runs; clean labels play no part in it.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmark import SETTINGS, read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="JSON lines that benchmark.py wrote")
    parser.add_argument("--freeze", action="store_true", help="choose settings from these runs, of --tune")
    parser.add_argument("--settings", type=Path, default=SETTINGS, help="where chosen settings go")
    options = parser.parse_args()
    runs = read(options.runs)
    if options.freeze:
        options.settings.parent.mkdir(parents=True, exist_ok=True)
        before = json.loads(options.settings.read_text()) if options.settings.is_file() else {}
        options.settings.write_text(json.dumps(before | chosen_settings(runs), indent=1) + "\n")
        return


def chosen_settings(runs: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Source → method → the setting of the highest mean score; of equals the first."""
    scores: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for run in runs:
        scores[run["source"], run["method"], json.dumps(run["setting"])].append(run["validation_clean"][-1])
    best: dict[str, dict[str, tuple[float, Any]]] = defaultdict(dict)
    for (source, method, setting), found in scores.items():
        score = statistics.fmean(found)
        if method not in best[source] or score > best[source][method][0]:
            best[source][method] = score, json.loads(setting)
    return {source: {method: each for method, (_, each) in methods.items()} for source, methods in best.items()}


if __name__ == "__main__":
    main()
