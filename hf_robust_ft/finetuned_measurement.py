"""Curvature, losses and bounds of a classifier that was fine-tuned elsewhere, from raw images or texts."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import TrainingArguments

from .arguments import RobustTrainingArguments
from .base_model import freeze_unmoved, read_reference
from .bounds import Bound, held_out_bound
from .card.facts import model_facts, noise_facts
from .clean_accuracy import clean_accuracy
from .features import one_class_an_example
from .finetuned import Finetuned, load_finetuned
from .hessian_measurement import EXAMPLES, ExampleSet, Measurement, measure
from .layers import find_layers
from .model_labels import model_labels
from .noise import Matrix, load_transition, read_transition, symmetric_transition
from .raw_examples import BATCH_SIZE, default_device, find_inputs, labelled_rows, model_inputs, reading_order
from .reference import ReferenceMismatch
from .risks import Labels, MeasuredRisk

logger = logging.getLogger(__name__)

TIME_BUDGET = RobustTrainingArguments.hessian_time_budget


class FinetunedMeasurement(NamedTuple):
    """What :func:`measure_finetuned` found."""

    measurement: Measurement
    bounds: tuple[Bound, ...]
    """Those of the measurement, and one from evaluation data where there are some."""
    facts: dict[str, Any]
    """Of the model, its labels and its losses, by the names of :class:`CardData`."""


def measure_finetuned(
    model: str,
    reference: str | None,
    dataset: Dataset,
    eval_dataset: Dataset | None = None,
    *,
    label_column: str = "label",
    image_column: str | None = None,
    text_column: str | Sequence[str] | None = None,
    image_size: int | None = None,
    examples: int = EXAMPLES,
    time_budget: float = TIME_BUDGET,
    noise_transition: Any = None,
    eval_labels: Labels = "as given",
    seed: int = 0,
) -> FinetunedMeasurement:
    """Measure a fine-tuned model: a whole one, or a PEFT adapter, which is merged into its base model.

    Parameters that equal those of the reference, bit for bit, count as frozen.

    Args:
        model: a folder, or a name on the Hub.
        reference: the model that its training started from; None for an adapter's own base model.
        dataset: the training examples, as raw images or texts with labels: see :func:`~hf_robust_ft.diagnose`.
        eval_dataset: other examples, for the measured gap and a bound on the error.
        image_size: pixels of each side; by default what the image processor says.
        examples, time_budget: see :meth:`HessianRegularizedTrainer.measure_hessian`.
        noise_transition: T of the labels of ``dataset``, see :func:`~hf_robust_ft.load_transition`; None takes them as
            they are.
        eval_labels: ``"clean"``; ``"noisy"`` (T is that of the evaluation labels, too); ``"as given"``, if not known.
        seed: of the draw of examples.

    Raises:
        ValueError: noisy evaluation labels without T, a column that is missing or not clear, classes that are not those
            of the head, a model without head or reference, weights or losses that are not finite, a T of other classes.
        ReferenceMismatch: a reference of another kind, with other shapes, or the model's very weights.
        OSError: no such model or file, or a model without image processor or tokenizer.
        ImportError: an adapter, without peft.
        MeasurementStopped: an error after some examples.
    """
    kind, columns = find_inputs(dataset, label_column, image_column, text_column)
    matrix = None if noise_transition is None else read_transition(noise_transition)
    if matrix is None and eval_labels == "noisy":
        raise ValueError("eval_labels is 'noisy', but noise_transition is not given; give T, or leave eval_labels out")
    logger.info("loading %s", model)
    found = load_finetuned(model, kind, reference)
    reference = reference or found.base
    if reference is None:
        raise ValueError(
            f"reference is not given, and model '{model}' does not tell what it was fine-tuned from; give the "
            "base model"
        )
    loaded = found.model
    one_class_an_example(loaded, [label_column], "measuring")
    classes = int(loaded.config.num_labels or 0)
    transition = None if matrix is None else load_transition(matrix, classes)

    def example_set(name: str, data: Dataset, labels: Labels) -> ExampleSet:
        if find_inputs(data, label_column, image_column, text_column) != (kind, columns):
            raise ValueError(f"the {name} data hold other columns than the training data; name the columns of both")
        return _example_set(name, data, labels, found, kind, columns, label_column, image_size)

    known: Labels = "as given" if transition is None else "noisy"
    training = example_set("training", dataset, known)
    held_out = [] if eval_dataset is None else [example_set("eval", eval_dataset, eval_labels)]
    logger.info("loading %s", reference)
    weights, described = read_reference(loaded, reference)
    frozen = freeze_unmoved(loaded, weights)
    if not find_layers(loaded)[0]:
        raise ReferenceMismatch(
            f"reference '{reference}' has the very weights of model '{model}': there is no way to measure along. Give "
            "the model that training started from"
        )
    if frozen:
        logger.info(
            "%d of %d parameters are those of the reference, and count as frozen",
            frozen,
            len(list(loaded.parameters())),
        )
    torch.nn.Module.to(loaded, default_device())
    args = TrainingArguments(per_device_eval_batch_size=BATCH_SIZE, seed=seed, report_to="none")
    measurement = measure(
        loaded,
        (weights, described),
        training,
        held_out,
        "labels",
        args,
        transition=transition,
        examples=examples,
        time_budget=time_budget,
    )
    held = next((risk for risk in measurement.risks if risk.data == "eval"), None)
    facts = {
        **model_facts(loaded),
        **noise_facts(transition, classes, _source(noise_transition, matrix)),
        **_metrics(held),
        "base_model": reference,
        "training_examples": len(training.dataset),
    }
    bounds = (*measurement.bounds, *_by_noisy_labels(held, transition, classes))
    return FinetunedMeasurement(measurement, bounds, facts)


def _example_set(
    name: str,
    data: Dataset,
    labels: Labels,
    found: Finetuned,
    kind: Any,
    columns: Sequence[str],
    label_column: str,
    image_size: int | None,
) -> ExampleSet:
    """Rows with a label, by number; what the model takes of them is made batch by batch."""
    targets = model_labels(data, label_column, found.model, f"the {name} data")
    rows = labelled_rows(targets, None, 0)
    if not len(rows):
        raise ValueError(
            f"label_column '{label_column}' of the {name} data holds no label; give examples that have one"
        )
    order = rows[reading_order(data.select(rows), kind, columns)]

    def collate(chosen: list[int]) -> dict[str, Tensor]:
        (batch,) = model_inputs(data, kind, columns, found.processor, image_size, chosen)
        return {**batch, "labels": torch.from_numpy(targets[chosen])}

    return ExampleSet(name, order.tolist(), collate, labels)


def _by_noisy_labels(risk: MeasuredRisk | None, transition: Matrix | None, classes: int) -> list[Bound]:
    """The clean error by noisy evaluation labels, where their share of errors alone tells: under a symmetric T."""
    if risk is None or risk.labels != "noisy" or transition is None or risk.error is None or not risk.judged:
        return []
    matrix = symmetric_transition(classes, 1 - transition[0, 0])
    if not np.allclose(matrix, transition, atol=1e-6):
        return []
    # Only whether label and prediction agree counts then.
    wrong = np.arange(risk.judged) < round(risk.error * risk.judged)
    found = clean_accuracy(wrong.astype(np.int64), np.zeros(risk.judged, dtype=np.int64), matrix)
    return [held_out_bound(found, f"held-out, {risk.data}")]


def _metrics(held: MeasuredRisk | None) -> dict[str, Any]:
    if held is None:
        return {}
    found = {"eval_accuracy": None if held.error is None else 1 - held.error}
    if not held.corrected:
        found["eval_loss"] = held.loss
    return {"metrics": found, "metric_labels": {} if held.labels == "as given" else {"eval": held.labels}}


def _source(given: Any, read: Any) -> str:
    if isinstance(read, float):
        return f"symmetric noise of rate {read:g}, as given"
    return f"read from {Path(given).name}" if str(given).endswith((".json", ".npy")) else "a matrix that was given"
