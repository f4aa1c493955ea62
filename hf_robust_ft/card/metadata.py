"""The YAML head of a card, as the Hub reads it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

from huggingface_hub import EvalResult, ModelCardData

from ..bounds.bound import Bound
from ..curvature import HessianReport
from .data import CardData, plain
from .text import one_line

TAGS = ("hf_robust_ft", "generalization-bound")
# What the Hub takes for a name of its own; anything else is said in the text only.
HUB_ID = re.compile(r"(?!.*(\.\.|--))[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")
SHORT = re.compile(r"[a-z0-9][a-z0-9._-]*", re.I)
TIMES = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")


def hub_metadata(data: CardData, report: HessianReport | None) -> ModelCardData:
    """Model-index with metrics and bounds, tags, base model, data sets, license, library."""
    results = [*_metrics(data), *_bounds(data), *_curvature(data, report)]
    tags = [
        *TAGS,
        *(["generated_from_trainer"] if data.training_known else []),
        *(["label-noise"] if data.noise_source else []),
        *map(one_line, data.tags),
    ]
    language = [each for each in data.language if SHORT.fullmatch(each)]
    ids = [each for each in data.dataset_ids if HUB_ID.fullmatch(each)]
    return ModelCardData(
        model_name=one_line(data.model_name or "model"),
        library_name="transformers",
        license=data.license if data.license and SHORT.fullmatch(data.license) else None,
        language=language or None,
        base_model=data.base_model if data.base_model and HUB_ID.fullmatch(data.base_model) else None,
        datasets=ids or None,
        pipeline_tag=data.tasks[0] if data.tasks and SHORT.fullmatch(data.tasks[0]) else None,
        tags=list(dict.fromkeys(tag for tag in tags if tag)),
        metrics=sorted({each.metric_type for each in results if each.metric_type in ("accuracy", "f1")}) or None,
        eval_results=results or None,
    )


def finite_metrics(data: CardData) -> dict[str, float]:
    """Metrics of evaluation that are numbers, without times."""
    return {
        name: value
        for name, value in plain(data.metrics).items()
        if isinstance(value, (int, float)) and not name.endswith(TIMES)
    }


def evaluation_prefixes(metrics: Iterable[str]) -> list[str]:
    """The prefixes that evaluations logged their metrics under: each logs its time, too."""
    return [name.removesuffix("_runtime") for name in metrics if name.endswith("_runtime")]


def labels_of(data: CardData, metric: str) -> str:
    """What the labels of a metric's examples are, by the longest prefix that is known."""
    known = [prefix for prefix in data.metric_labels if metric.startswith(f"{prefix}_")]
    return data.metric_labels[max(known, key=len)] if known else "as given"


def _result(data: CardData, kind: str, name: str, value: float, split: str | None = None) -> EvalResult:
    names, ids = data.datasets or ["not named"], [each for each in data.dataset_ids if HUB_ID.fullmatch(each)]
    return EvalResult(
        task_type=data.tasks[0] if data.tasks and SHORT.fullmatch(data.tasks[0]) else "other",
        dataset_type=ids[0] if ids else "other",
        dataset_name=one_line(names[0]),
        dataset_config=one_line(data.dataset_args[0]) if ids and data.dataset_args else None,
        dataset_split=split,
        metric_type=kind,
        metric_name=name,
        metric_value=value,
    )


def _metrics(data: CardData) -> list[EvalResult]:
    found, prefixes = [], evaluation_prefixes(data.metrics)
    for name, value in finite_metrics(data).items():
        prefix = max((p for p in prefixes if name.startswith(f"{p}_")), key=len, default=name.split("_")[0])
        kind = one_line(name.removeprefix(f"{prefix}_"))
        labels = labels_of(data, name)
        said = "" if labels == "as given" else f" ({labels} labels)"
        found.append(_result(data, kind, f"{one_line(name)}{said}", value, one_line(prefix)))
    return found


def _bounds(data: CardData) -> list[EvalResult]:
    return [
        _result(
            data, f"bound_{_slug(bound.name)}", f"{one_line(bound.name)}: {_claim(bound)}", float(f"{bound.value:.6g}")
        )
        for bound in (*data.bounds, *data.other_bounds)
        if bound.value is not None and math.isfinite(bound.value)
    ]


def _claim(bound: Bound) -> str:
    sure = "" if bound.confidence is None else f", with probability {bound.confidence:.4g}"
    return one_line(f"{bound.kind} on {bound.bounds_what}{sure}")


def _curvature(data: CardData, report: HessianReport | None) -> list[EvalResult]:
    if report is None:
        return []
    total = math.fsum(math.sqrt(max(layer.upper.maximum, 0.0)) for layer in report.layers)
    return [
        _result(data, "hessian_total", "sum over layers of the root of the Hessian distance measure", total, "train")
    ]


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
