"""Diagnose real data whose labels were corrupted on purpose, and compare the diagnosis with the truth.

    python recipes/diagnose_noise.py --data ../shared/data --models .assets/models

runs offline on a CPU: DINOv2-small on 5,000 Fashion-MNIST images, MiniLM on 5,000 definitions. Columns: the noise rate
with its interval; of the first m suspects (m: the number of wrong labels) the share that is wrong; how many labels are
flagged, and the share of those that is wrong; the share of wrong labels whose true class is suggested; seconds by the
clock, and of CPU time.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, load_dataset

from hf_robust_ft import corrupt_dataset, diagnose, pair_flip_transition, symmetric_transition

TASKS = {"fashion-mnist": "dinov2-small", "wordnet-supersense": "minilm-l6"}
NOISES = ("none", "symmetric-0.2", "symmetric-0.4", "pair_flip-0.4")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the parquet files")
    parser.add_argument("--models", type=Path, default=Path(".assets/models"), help="folder of the pretrained models")
    parser.add_argument("--output", type=Path, default=Path("diagnose_noise.json"))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--noises", nargs="+", default=list(NOISES), choices=NOISES)
    parser.add_argument("--sizes", nargs="+", type=int, default=[5000])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    args = parser.parse_args()
    print(
        "| data | n | noise | estimated (%) | shape | right in first m | flagged | of these wrong | "
        "right suggestion | recommended | seconds (CPU) |\n|" + "---|" * 11
    )
    records = []
    for task in args.tasks:
        file = str(args.data / task / "train.parquet")
        clean = load_dataset("parquet", data_files=file, split="train")
        for size in args.sizes:
            for noise in args.noises:
                for seed in args.seeds:
                    few = clean.shuffle(seed=seed).select(range(min(size, len(clean))))
                    record = measure(args.models / TASKS[task], few, noise, seed)
                    records.append({"task": task, "size": len(few), "noise": noise, "seed": seed} | record)
                    show(records[-1])
                    # After each, so that a run that is cut off has not been for nothing.
                    args.output.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")


def measure(model: Path, clean: Dataset, noise: str, seed: int) -> dict[str, Any]:
    """Corrupt, diagnose, compare."""
    num_classes = clean.features["label"].num_classes
    kind, _, rate = noise.partition("-")
    make = pair_flip_transition if kind == "pair_flip" else symmetric_transition
    noisy = corrupt_dataset(clean, make(num_classes, float(rate or 0)), seed)
    truth = np.array(noisy["clean_label"][:])
    wall, cpu = time.perf_counter(), time.process_time()
    found = diagnose(model, noisy.remove_columns("clean_label"), seed=seed)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    wrong = found.labels != truth
    flagged = found.suspects
    first = np.argsort(found.suspect_rank)[: wrong.sum()]
    return {
        "noise_rate": found.estimate.noise_rate,
        "noise_rate_interval": found.estimate.noise_rate_interval,
        "true_rate": float(wrong.mean()),
        "shape": found.shape,
        "explained": found.explained,
        "effect": found.estimate.class_conditional_effect,
        "p_value": found.estimate.class_conditional_p_value,
        "precision": float(wrong[first].mean()) if wrong.any() else None,
        "flagged": len(flagged),
        "flagged_precision": float(wrong[flagged].mean()) if len(flagged) else None,
        "suggestion": float((found.suggested_label == truth)[wrong].mean()) if wrong.any() else None,
        "arguments": found.arguments,
        "seconds": wall,
        "cpu_seconds": cpu,
        "stages": found.seconds,
    }


def show(record: dict[str, Any]) -> None:
    def share(name: str) -> str:
        return "" if record[name] is None else f"{100 * record[name]:.1f}"

    low, high = record["noise_rate_interval"]
    arguments = record["arguments"]
    correction = arguments.get("loss_correction", "radius alone" if arguments else "plain fine-tuning")
    print(
        f"| {record['task']} | {record['size']} | {record['noise']} | {share('noise_rate')} [{100 * low:.1f}, "
        f"{100 * high:.1f}], true {share('true_rate')} | {record['shape']} ({record['explained']:.0%}) | "
        f"{share('precision')} | {record['flagged']} | {share('flagged_precision')} | {share('suggestion')} | "
        f"{correction} | {record['seconds']:.0f} ({record['cpu_seconds']:.0f}) |",
        flush=True,
    )


if __name__ == "__main__":
    main()
