"""Diagnose real data whose labels were corrupted on purpose, and compare the diagnosis with the truth.

    python recipes/diagnose_noise.py --data ../shared/data --models .assets/models

runs offline on a CPU: DINOv2-small on 5,000 Fashion-MNIST images, MiniLM on 5,000 definitions. Columns: the noise rate
with its interval; of the first m suspects (m: the number of wrong labels) the share that is wrong; how many labels are
flagged, and the share of those that is wrong; the same of cleanlab, by the same head's out-of-fold probabilities; the
share of wrong labels whose true class is suggested; seconds by the clock, and of CPU time.

"size" noise is four times as frequent in the darker images, or the shorter texts, of each class: no T describes it.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from cleanlab.filter import find_label_issues
from cleanlab.rank import get_label_quality_scores
from datasets import Dataset, load_dataset
from instance_noise import corrupt_unevenly, sizes
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification, AutoTokenizer
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from hf_robust_ft import (
    corrupt_dataset,
    crossfit,
    diagnose,
    frozen_features,
    pair_flip_transition,
    symmetric_transition,
)

TASKS = {"fashion-mnist": "dinov2-small", "wordnet-supersense": "minilm-l6"}
NOISES = ("none", "symmetric-0.1", "symmetric-0.2", "symmetric-0.4", "pair_flip-0.4", "size-0.2", "size-0.4")


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
        "| data | n | noise | estimated (%) | shape | right in first m | flagged | of these wrong | cleanlab: right in "
        "first m | flagged | of these wrong | right suggestion | recommended | seconds (CPU) |\n|" + "---|" * 14
    )
    records = []
    for task in args.tasks:
        file = str(args.data / task / "train.parquet")
        clean = load_dataset("parquet", data_files=file, split="train")
        for size in args.sizes:
            for seed in args.seeds:
                few = clean.shuffle(seed=seed).select(range(min(size, len(clean))))
                features = features_of(args.models / TASKS[task], few)
                for noise in args.noises:
                    record = measure(args.models / TASKS[task], few, features, noise, seed)
                    records.append({"task": task, "size": len(few), "noise": noise, "seed": seed} | record)
                    show(records[-1])
                    # After each, so that a run that is cut off has not been for nothing.
                    args.output.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")


def features_of(model: Path, data: Dataset) -> npt.NDArray[np.float64]:
    """[n, d], those that a diagnosis looks at."""
    rows = (data[i : i + 32] for i in range(0, len(data), 32))
    if "image" in data.column_names:
        loaded, processor = (
            AutoModelForImageClassification.from_pretrained(model),
            AutoImageProcessor.from_pretrained(model),
        )
        batches = (processor([x.convert("RGB") for x in few["image"]], return_tensors="pt") for few in rows)
    else:
        loaded, processor = (
            AutoModelForSequenceClassification.from_pretrained(model),
            AutoTokenizer.from_pretrained(model),
        )
        batches = (processor(few["text"], padding=True, return_tensors="pt") for few in rows)
    return frozen_features(loaded, batches).double().numpy()


def corrupt(clean: Dataset, noise: str, seed: int) -> Dataset:
    """Noisy labels; the clean ones go to ``clean_label``."""
    num_classes = clean.features["label"].num_classes
    kind, _, rate = noise.partition("-")
    if kind != "size":
        make = pair_flip_transition if kind == "pair_flip" else symmetric_transition
        return corrupt_dataset(clean, make(num_classes, float(rate or 0)), seed)
    (column,) = set(clean.column_names) - {"label"}
    labels = np.array(clean["label"])
    noisy = corrupt_unevenly(labels, sizes(clean[column][:]), float(rate), num_classes, seed)
    kept = clean.rename_column("label", "clean_label")
    return kept.add_column("label", noisy, feature=clean.features["label"])


def measure(model: Path, clean: Dataset, features: npt.NDArray[np.float64], noise: str, seed: int) -> dict[str, Any]:
    """Corrupt, diagnose, compare."""
    noisy = corrupt(clean, noise, seed)
    truth = np.array(noisy["clean_label"][:])
    wall, cpu = time.perf_counter(), time.process_time()
    found = diagnose(model, noisy.remove_columns("clean_label"), seed=seed)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    wrong = found.labels != truth
    flagged = found.suspects
    first = np.argsort(found.suspect_rank)[: wrong.sum()]
    # As cleanlab is mostly used: ranked by the probability of the label, flagged by its default filter.
    probabilities = crossfit(features, found.labels, seed=seed).probabilities
    worst = np.argsort(get_label_quality_scores(found.labels, probabilities))[: wrong.sum()]
    issues = np.flatnonzero(find_label_issues(found.labels, probabilities, n_jobs=1))
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
        "cleanlab_precision": float(wrong[worst].mean()) if wrong.any() else None,
        "cleanlab_flagged": len(issues),
        "cleanlab_flagged_precision": float(wrong[issues].mean()) if len(issues) else None,
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
        f"{share('precision')} | {record['flagged']} | {share('flagged_precision')} | "
        f"{share('cleanlab_precision')} | {record['cleanlab_flagged']} | {share('cleanlab_flagged_precision')} | "
        f"{share('suggestion')} | {correction} | {record['seconds']:.0f} ({record['cpu_seconds']:.0f}) |",
        flush=True,
    )


if __name__ == "__main__":
    main()
