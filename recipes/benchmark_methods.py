"""The methods of the benchmark, what is tuned of each, and one run of one of them.

A setting is a factor of the source's learning rate and, for methods that have one, a number of their own. Every method
has four, so that tuning (benchmark_report.py) gives each the same chance.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from benchmark_baselines import (
    BaselineTrainer,
    ELRTrainer,
    EMATrainer,
    MixupTrainer,
    SAMTrainer,
    kept_by_cleanlab,
    linear_head,
)
from benchmark_data import Part, Source
from transformers import EvalPrediction, set_seed

from hf_robust_ft import Diagnosis, RobustTrainingArguments, invert_transition

Setting = dict[str, float]
RATES: tuple[Setting, ...] = tuple({"learning_rate": factor} for factor in (0.1, 0.3, 1.0, 3.0))


def pairs(name: str, first: float, second: float) -> tuple[Setting, ...]:
    """Two learning rates times two values of something else."""
    return tuple({"learning_rate": rate, name: value} for rate in (0.3, 1.0) for value in (first, second))


@dataclass(frozen=True)
class Method:
    """How to train."""

    settings: tuple[Setting, ...] = RATES
    arguments: Mapping[str, Any] = field(default_factory=dict)
    trainer: type[BaselineTrainer] = BaselineTrainer
    transition: bool = False
    """Whether it is given the estimated T."""
    radius: bool = False
    """Whether layers are kept in balls."""


def corrected(how: str, **also: Any) -> Method:
    return Method(arguments={"loss_correction": how}, transition=how != "gce", **also)


RADII = pairs("radius", 1.0, 2.0)
METHODS: dict[str, Method] = {
    "plain": Method(),
    "label smoothing": Method(pairs("label_smoothing_factor", 0.1, 0.3)),
    "mixup": Method(pairs("alpha", 0.2, 1.0), trainer=MixupTrainer),
    "L2-SP": Method(pairs("l2sp_penalty", 0.1, 1.0)),
    "projection": Method(RADII, radius=True),
    "forward": corrected("forward"),
    "backward": corrected("backward"),
    "backward + projection": corrected("backward", settings=RADII, radius=True),
    "forward + projection": corrected("forward", settings=RADII, radius=True),
    "GCE": corrected("gce"),
    "GCE + projection": corrected("gce", settings=RADII, radius=True),
    "ELR": Method(pairs("weight", 1.0, 3.0), trainer=ELRTrainer),
    "SAM": Method(pairs("rho", 0.02, 0.05), trainer=SAMTrainer),
    "NSO": Method(pairs("hessian_penalty", 0.001, 0.005)),
    "EMA": Method(pairs("decay", 0.9, 0.98), trainer=EMATrainer),
    "cleanlab pruning": Method(),
    "linear probe": Method(tuple({"C": value} for value in (0.001, 0.01, 0.1, 1.0))),
    "posterior": corrected("posterior"),
    "recommended": Method(),
}

OPTIONS = ("alpha", "weight", "rho", "decay")


def run(
    method: str, setting: Setting, source: Source, parts: Mapping[str, Part], diagnosis: Diagnosis, seed: int
) -> dict[str, Any]:
    """Train once. Accuracies are lists, one entry an epoch: on clean test labels, on noisy validation labels, and what
    those and the estimated T say of clean ones."""
    started = time.perf_counter()
    measure = Accuracies(diagnosis)
    set_seed(seed)
    if method == "linear probe":
        found = [probe(setting["C"], source, parts, measure)]
    else:
        found = train(METHODS[method], method, setting, source, parts, diagnosis, measure, seed)
    return {
        "accuracy": [round(scores["test"]["accuracy"], 5) for scores in found],
        "validation": [round(scores["validation"]["accuracy"], 5) for scores in found],
        "validation_clean": [round(scores["validation"]["clean"], 5) for scores in found],
        "seconds": round(time.perf_counter() - started, 1),
    }


class Accuracies:
    """Accuracy, and that on clean labels which noisy ones and the estimated T tell of."""

    def __init__(self, diagnosis: Diagnosis) -> None:
        usable = diagnosis.identifiable and diagnosis.shape != "none"
        matrix = diagnosis.estimate.transition
        self.inverse = invert_transition(matrix).matrix if usable else np.eye(len(matrix))

    def of(self, predicted: Any, labels: Any) -> dict[str, float]:
        return {
            "accuracy": float((predicted == labels).mean()),
            "clean": float(self.inverse[labels, predicted].mean()),
        }

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        return self.of(np.asarray(prediction.predictions).argmax(-1), np.asarray(prediction.label_ids))


def arguments_of(
    method: Method, name: str, setting: Setting, source: Source, diagnosis: Diagnosis
) -> tuple[dict[str, Any], dict[str, float]]:
    """Of the training, and the options of a baseline."""
    arguments = dict(method.arguments)
    if name == "recommended":
        arguments |= diagnosis.arguments
        if arguments.get("noise_transition") is not None:
            arguments["noise_transition"] = diagnosis.estimate.transition
    if method.transition:
        found = diagnosis.estimate
        if found.informative if arguments["loss_correction"] == "posterior" else found.identifiable:
            arguments["noise_transition"] = diagnosis.estimate.transition
        else:  # such a T is refused
            arguments["loss_correction"] = "none"
    if method.radius:
        arguments |= {"layer_radius": scaled(source.radius, setting["radius"]), "radius_mode": "relative"}
    options = {key: value for key, value in setting.items() if key in OPTIONS}
    rest = {key: value for key, value in setting.items() if key not in (*OPTIONS, "radius", "learning_rate")}
    arguments |= {"learning_rate": setting["learning_rate"] * source.learning_rate, **rest}
    return arguments, options


def scaled(radius: Any, factor: float) -> Any:
    if isinstance(radius, Mapping):
        return {pattern: scaled(value, factor) for pattern, value in radius.items()}
    return radius * factor


def train(
    method: Method,
    name: str,
    setting: Setting,
    source: Source,
    parts: Mapping[str, Part],
    diagnosis: Diagnosis,
    measure: Accuracies,
    seed: int,
) -> list[dict[str, dict[str, float]]]:
    """Fine-tune, and evaluate after each epoch."""
    arguments, options = arguments_of(method, name, setting, source, diagnosis)
    model = source.make_model()
    examples = parts["train"].inputs
    if name == "cleanlab pruning":
        kept = kept_by_cleanlab(source.features(model, parts["train"].inputs), parts["train"].labels, seed)
        examples = [{**examples[i], "index": n} for n, i in enumerate(kept)]
    with tempfile.TemporaryDirectory() as folder:
        trainer = method.trainer(
            model,
            RobustTrainingArguments(
                folder,
                num_train_epochs=source.epochs,
                per_device_train_batch_size=source.batch_size,
                per_device_eval_batch_size=256,
                eval_strategy="epoch" if name == "plain" else "no",  # whose best epochs are methods, too
                save_strategy="no",
                logging_strategy="epoch",
                report_to="none",
                disable_tqdm=True,
                remove_unused_columns=method.trainer is not ELRTrainer,
                label_names=["labels"],
                seed=seed,
                **arguments,
            ),
            train_dataset=examples,
            eval_dataset={part: parts[part].inputs for part in ("test", "validation")},
            data_collator=source.collate,
            compute_metrics=measure,
        )
        trainer.options = options
        trainer.train()
        if name != "plain":
            trainer.evaluate()
    rows: list[dict[str, dict[str, float]]] = []
    for entry in trainer.state.log_history:
        for part in ("test", "validation"):
            if f"eval_{part}_accuracy" in entry:
                if part == "test":
                    rows.append({})
                rows[-1][part] = {key: entry[f"eval_{part}_{key}"] for key in ("accuracy", "clean")}
    return rows


def probe(
    strength: float, source: Source, parts: Mapping[str, Part], measure: Accuracies
) -> dict[str, dict[str, float]]:
    """A linear head on frozen features."""
    model = source.make_model()
    found = {name: source.features(model, part.inputs) for name, part in parts.items()}
    head = linear_head(strength).fit(found["train"], parts["train"].labels)
    return {name: measure.of(head.predict(found[name]), parts[name].labels) for name in ("test", "validation")}
