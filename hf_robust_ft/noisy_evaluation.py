"""When an evaluation estimates clean accuracy from noisy labels, and when that is refused."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from .clean_accuracy import CleanAccuracy
from .corrected_loss import find_logits, loss_type
from .features import num_classes, one_class_an_example, setting
from .noise import invert_transition, load_transition, read_transition

logger = logging.getLogger(__name__)

METRICS = ("clean_accuracy", "clean_accuracy_low", "clean_accuracy_high")


def estimates_clean_accuracy(args: TrainingArguments, prefix: str) -> bool:
    """Whether the evaluation of this metric prefix (``eval``, ``eval_NAME``, ``test``) adds clean accuracy."""
    if setting(args, "noise_transition") is None or setting(args, "eval_labels") == "clean":
        return False
    return setting(args, "eval_labels") == "noisy" or _selects(args) in [f"{prefix}_{name}" for name in METRICS]


def make_noisy_evaluation(
    args: TrainingArguments,
    transition: Any,
    model: nn.Module,
    label_names: list[str],
    compute_metrics: Callable[..., Any] | None,
    eval_dataset: Any,
) -> Any:
    """The noise model of the evaluation labels, a rate or T [K, K]; None if no evaluation asks for it.

    Args:
        transition: T, or what :func:`~hf_robust_ft.noise.load_transition` reads; None without a noise model.

    Raises:
        ValueError: clean accuracy is asked for, but T is not given or is singular; the model does not predict one
            class an example; or ``metric_for_best_model`` names an evaluation that there is not. (A metric that
            ``compute_metrics`` may return is left to it.)
    """
    labels = setting(args, "eval_labels")
    if labels == "noisy" and transition is None:
        raise ValueError("eval_labels='noisy' needs noise_transition: give a rate, a path or a matrix")
    possible = [f"{prefix}_{name}" for prefix in _prefixes(eval_dataset).values() for name in METRICS]
    selects = (_selects(args) or "").endswith(METRICS)
    if selects and compute_metrics is None and (transition is None or labels == "clean"):
        what = "noise_transition: give a rate, a path or a matrix" if transition is None else "eval_labels='noisy'"
        raise ValueError(
            f"metric_for_best_model='{args.metric_for_best_model}' needs {what}; or give compute_metrics that "
            "returns a metric of this name"
        )
    if selects and eval_dataset is not None and _selects(args) not in possible:
        if compute_metrics is None:
            raise ValueError(
                f"metric_for_best_model='{args.metric_for_best_model}' names no evaluation of eval_dataset; "
                f"choose one of {', '.join(possible)}"
            )
        selects = False
    if transition is None or labels == "clean" or not (labels or selects):
        return None

    asked = "eval_labels='noisy'" if labels else f"metric_for_best_model='{args.metric_for_best_model}'"
    one_class_an_example(model, label_names, asked)
    if args.use_liger_kernel:
        raise ValueError(f"{asked} needs logits, which use_liger_kernel may leave out; set use_liger_kernel=False")
    noise = read_transition(transition)
    classes = num_classes(model, loss_type(model))
    if classes is not None or not isinstance(noise, float):
        noise = load_transition(noise, classes)
        invert_transition(noise)
    return noise


def noisy_datasets(args: TrainingArguments, eval_dataset: Any) -> dict[str, Any]:
    """The evaluation data sets whose labels count as noisy, by what an error calls them."""
    if eval_dataset is None:
        return {}
    data = eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]
    return {
        argument: dataset
        for (argument, prefix), dataset in zip(_prefixes(eval_dataset).items(), data, strict=True)
        if estimates_clean_accuracy(args, prefix)
    }


def labels_and_predictions(outputs: Any, labels: Tensor) -> tuple[Tensor, int]:
    """Of a batch: pairs (label, predicted class), int64 [B, 2], and the number of classes.

    Raises:
        ValueError: labels that are no class indices, one an example; outputs without logits that fit them.
    """
    if labels.is_floating_point() or labels.is_complex():
        raise ValueError(
            f"labels have dtype {labels.dtype}; clean accuracy is for class indices, not for regression, soft or "
            "multi-label targets. Set eval_labels='clean' to do without it"
        )
    logits = find_logits(outputs)
    if labels.dim() != 1 or logits.dim() != 2 or len(logits) != len(labels):
        raise ValueError(
            f"logits have shape {tuple(logits.shape)} and labels {tuple(labels.shape)}; clean accuracy needs [B, K] "
            "and [B], one label an example. Set eval_labels='clean' to do without it"
        )
    predicted = logits.argmax(-1)
    return torch.stack([labels.to(predicted), predicted], dim=1), logits.shape[-1]


def clean_accuracy_metrics(found: CleanAccuracy, prefix: str, others: dict[str, Any]) -> dict[str, float]:
    """What an evaluation adds to its other metrics.

    Raises:
        ValueError: a metric of this name is there already.
    """
    metrics = dict(
        zip((f"{prefix}_{name}" for name in METRICS), (found.accuracy, *found.interval), strict=True),
    )
    taken = sorted(metrics.keys() & others.keys())
    if taken:
        raise ValueError(
            f"compute_metrics returns {taken[0]} already; rename it there, or set eval_labels='clean' to use it "
            "instead of the estimate from noisy labels"
        )
    if not found.consistent:
        logger.warning(
            "%s labels contradict noise_transition (accuracy on them is %.3f): they were not corrupted by it. If they "
            "are clean, set eval_labels='clean' and read the plain accuracy",
            prefix,
            found.noisy_accuracy,
        )
    return metrics


def _selects(args: TrainingArguments) -> str | None:
    """The metric that the best model is chosen by, with its prefix."""
    name = args.metric_for_best_model
    return name if name is None or name.startswith("eval_") else f"eval_{name}"


def _prefixes(eval_dataset: Any) -> dict[str, str]:
    """The metric prefix of each evaluation data set, by what an error calls the set."""
    if isinstance(eval_dataset, dict):
        return {f"eval_dataset['{name}']": f"eval_{name}" for name in eval_dataset}
    return {"eval_dataset": "eval"}
