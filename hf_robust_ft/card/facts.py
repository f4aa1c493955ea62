"""What a training knows of itself, for its card."""

from __future__ import annotations

import dataclasses
import os
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import get_token
from torch import nn
from transformers import TrainingArguments
from transformers.modelcard import TASK_MAPPING
from transformers.trainer_callback import TrainerState

from ..noise import inverse_of, load_transition
from ..redaction import redacted
from .data import CardData, plain

PACKAGES = ("hf-robust-ft", "transformers", "torch", "datasets", "accelerate", "tokenizers", "numpy")
# Where and how a run was watched says nothing of the model, and some of it is secret.
LEFT_OUT = (
    "dir",
    "token",
    "hub",
    "report_to",
    "run_name",
    "logging",
    "log_level",
    "tqdm",
    "project",
    "trackio",
    "key",
    "accelerator",
)
# A data set read from files is no data set of the Hub.
READERS = ("csv", "json", "pandas", "parquet", "text", "arrow", "imagefolder", "generator")
MOST_CLASSES = 100


def listed(value: str | Iterable[str] | None) -> list[str]:
    """One or several names as a list."""
    if value is None:
        return []
    return [value] if isinstance(value, str) else [str(each) for each in value]


def model_facts(model: nn.Module) -> dict[str, Any]:
    """What the model is, and what it was loaded from."""
    config = getattr(model, "config", None)
    source = getattr(config, "_name_or_path", None) or None
    name = type(model).__name__
    tasks = []
    mappings: dict[str, Any] = TASK_MAPPING
    for task, mapping in mappings.items():
        names: set[str] = set()
        for value in mapping.values():
            names.update([value] if isinstance(value, str) else value)
        if name in names:
            tasks.append(task)
    labels: dict[Any, Any] = getattr(config, "id2label", None) or {}
    return {
        "model_class": name,
        "base_model": named_source(source) if source else None,
        "tasks": tasks[:1],
        "classes": [str(labels[key]) for key in sorted(labels)] if tasks and "classification" in tasks[0] else [],
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


def named_source(source: str) -> str:
    """What a model was loaded from: a name on the Hub, or the last part of a folder, marked as no such name."""
    # Where a folder lies on this machine is nobody's business.
    return f"{Path(source).name} (a local folder)" if Path(source).is_absolute() or os.path.isdir(source) else source


def data_facts(dataset: Any) -> dict[str, Any]:
    """Number of examples, and the name on the Hub where the data set came from there."""
    builder, config = (getattr(dataset, name, None) for name in ("builder_name", "config_name"))
    named = isinstance(builder, str) and builder not in READERS
    return {
        "training_examples": len(dataset) if hasattr(dataset, "__len__") else None,
        "datasets": [builder] if named else [],
        "dataset_ids": [builder] if named else [],
        "dataset_args": [str(config)] if named and config else [],
    }


def metric_facts(state: TrainerState, *, best: bool) -> dict[str, float | None]:
    """The evaluation metrics of the weights as they are: after training, else at the step that they are of.

    Args:
        best: whether the best checkpoint was loaded at the end of training.
    """
    history = state.log_history
    ends = [i for i, entry in enumerate(history) if "train_runtime" in entry]
    step = state.best_global_step if best and state.best_global_step is not None else state.global_step
    found: dict[str, float | None] = {}
    for i, entry in enumerate(history):
        after = bool(ends) and i > ends[-1]
        if after or entry.get("step") == step:
            metrics = {k: v for k, v in entry.items() if k not in ("epoch", "step") and not k.startswith("train_")}
            evaluated = any(name.endswith("_runtime") for name in metrics)
            found.update({k: v for k, v in plain(metrics).items() if evaluated and not isinstance(v, str)})
    return found


def noise_facts(transition: Any, classes: int | None, source: str) -> dict[str, Any]:
    """T and what correction by it costs; nothing without T."""
    if transition is None:
        return {}
    try:
        matrix = load_transition(transition, classes)
    except ValueError:  # a rate, and the number of classes is not known
        return {"noise_source": source}
    inverse = inverse_of(matrix)
    return {
        "noise_source": source,
        "transition": matrix.tolist() if len(matrix) <= MOST_CLASSES else None,
        "noise_rate": float(1 - np.diag(matrix).mean()),
        "condition_number": None if inverse is None else inverse.condition_number,
        "amplification": None if inverse is None else inverse.amplification,
    }


def run_facts(args: TrainingArguments, state: TrainerState) -> dict[str, Any]:
    """Settings, seeds, versions, machine and time. Tokens are left out, those of no known shape, too."""
    tokens = [token for token in (args.hub_token, get_token()) if token]
    seconds = [entry["train_runtime"] for entry in state.log_history if "train_runtime" in entry]
    return {
        "arguments": _arguments(args, tokens),
        "seeds": {"training": args.seed, **({} if args.data_seed is None else {"data": args.data_seed})},
        "command": command(sys.argv, tokens),
        "versions": package_versions(),
        "hardware": hardware(),
        "train_seconds": seconds[-1] if seconds else None,
    }


def _arguments(args: TrainingArguments, tokens: Sequence[str]) -> dict[str, Any]:
    found = {}
    for each in dataclasses.fields(args):
        value = getattr(args, each.name, None)
        default = each.default if each.default_factory is dataclasses.MISSING else each.default_factory()
        if not each.init or any(word in each.name for word in LEFT_OUT) or value == default or not (value or default):
            continue
        value = plain(value)
        if each.name == "noise_transition" and isinstance(value, list):
            value = "a matrix, see above"
        found[each.name] = redacted(value, *tokens) if isinstance(value, str) else value
    return found


def command(words: list[str], tokens: Sequence[str] = ()) -> list[str]:
    """What was run, without tokens; nothing where it was no script."""
    if not words or not words[0].endswith(".py"):
        return []
    path = os.path.relpath(words[0])
    found = ["python", Path(words[0]).name if path.startswith("..") else path]
    hide = False
    for word in words[1:]:
        name, equals, _ = word.partition("=")
        secret = name.startswith("-") and any(
            part in name.lower() for part in ("token", "password", "secret", "api_key")
        )
        found.append("***" if hide else f"{name}=***" if secret and equals else redacted(word, *tokens))
        hide = secret and not equals
    return found


def package_versions() -> dict[str, str]:
    """Of Python and of the packages that a result may hang on, where they are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> str:
    """Accelerators, or the processor."""
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names))
    return f"CPU ({platform.machine()}), {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def merged(*strata: Mapping[str, Any]) -> CardData:
    """Each field from the first of the strata that says something of it."""
    found = CardData()
    for each in dataclasses.fields(CardData):
        said = (stratum[each.name] for stratum in strata if stratum.get(each.name) not in (None, [], {}))
        setattr(found, each.name, next(said, getattr(found, each.name)))
    return found
