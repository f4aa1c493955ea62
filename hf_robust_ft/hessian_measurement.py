"""What a Trainer measures of the curvature: from which weights, on which examples, and under which names it is logged.

The mathematics is :func:`~hf_robust_ft.measure_hessian`'s.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from transformers import PreTrainedModel, TrainingArguments

from .adapters import find_adapters, without_adapters
from .base_model import kept_reference, read_reference
from .bounds.bound import Bound
from .bounds.held_out import held_out_error
from .checkpoint import STATE_FILE
from .corrected_loss import CorrectedLoss, loss_type
from .curvature import HessianReport, measure_hessian
from .features import num_classes
from .files import NotWritten, written_whole
from .layers import find_layers
from .noise import inverse_of, load_transition, read_transition
from .reference import ReferenceMismatch, capture_reference, load_reference, reference_digest, save_reference
from .report_bounds import report_bounds
from .risks import Labels, MeasuredRisk, measure_risk
from .stored import checked, read_json

logger = logging.getLogger(__name__)

FILE = "hessian_report.json"
"""The report, in the output folder."""
# Beside the checkpoints, and the hash in each of them. Names with an underscore stay off the Hub.
START_FILE = "_start.safetensors"
START_RECORD = "_start.json"

EXAMPLES = 500
"""Where the user does not say: a maximum over fewer is lower still, and time grows with them."""

# Forward passes are cheap beside curvature; beyond this their standard errors are.
MOST_HELD_OUT = 5000


# The weights that a training starts from


def start_weights(model: nn.Module, known: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The present weights of every trained layer by name; those already ``known`` are not copied again.

    Of a layer with a LoRA adapter nothing is kept: its base weight does not move.

    Raises:
        ValueError: other adapters, whose layers can't be measured.
    """
    find_adapters(model).refuse("hessian_examples", "Set it to 0, and measure the model that merge_and_unload() makes")
    layers, _ = find_layers(model)
    return {**capture_reference(layer for layer in layers if layer.name not in known), **known}


def trained_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Of every layer, by the names of :func:`start_weights`."""
    return {layer.name: layer.parameter for layer in find_layers(model)[0]}


def save_start(start: Mapping[str, Tensor], folder: Path) -> str:
    """Write them beside the checkpoints; the hash that :func:`record_start` wants."""
    save_reference(start, folder, START_FILE)
    return reference_digest(start)


def record_start(digest: str, checkpoint: Path) -> None:
    """Say in a checkpoint which weights it came from."""
    with written_whole(checkpoint / START_RECORD) as temporary:
        temporary.write_text(json.dumps({"sha256": digest}), encoding="utf-8")


def load_start(checkpoint: Path) -> dict[str, Tensor]:
    """The weights that the run of a checkpoint started from.

    Raises:
        ReferenceMismatch: they are not there, or are another run's.
    """
    try:
        digest = checked(dict[str, str], read_json(checkpoint / START_RECORD), "the whole").get("sha256", "")
    except (OSError, ValueError) as error:
        raise ReferenceMismatch(
            f"{checkpoint / START_RECORD} can't be read ({type(error).__name__}: {error}): the checkpoint was written "
            "without hessian_examples"
        ) from None
    return load_reference(checkpoint.parent, digest, START_FILE)


def base_weights(model: nn.Module) -> tuple[dict[str, Tensor], str]:
    """The pretrained weights, read again from where the model was loaded from, and what they are in words.

    A layer that they lack, such as a new head, starts at zero: any point that was fixed before training will do. With
    adapters nothing is read: the model still holds its base weights.

    Raises:
        ReferenceMismatch: the model does not say where it came from, or there is nothing there, or a training's own
            checkpoint.
    """
    remedy = (
        "give measure_hessian(reference=…) a state dict or the model that training started from, or set "
        "hessian_examples before training"
    )
    if without_adapters(model) is not model:
        return kept_reference(model)
    name = getattr(getattr(model, "config", None), "_name_or_path", "") or ""
    if not isinstance(model, PreTrainedModel) or not name:
        raise ReferenceMismatch(
            f"the weights that training started from are not known: nothing kept them, and a {type(model).__name__} "
            f"does not say where it was loaded from; {remedy}"
        )
    if (Path(name) / STATE_FILE).is_file():
        raise ReferenceMismatch(
            f"the model was loaded from {name}, a checkpoint of a training, not from its pretrained weights; {remedy}"
        )
    try:
        return read_reference(model, name)
    except ReferenceMismatch as error:
        raise ReferenceMismatch(f"{error}; {remedy}") from error
    except (OSError, ValueError) as error:
        raise ReferenceMismatch(f"the pretrained weights can't be read from {name} ({error}); {remedy}") from error


# The examples, and their loss


def measured_loss(model: nn.Module, transition: Any) -> CorrectedLoss | None:
    """The loss that theorem 2.1 is applied to: backward-corrected for noisy labels, else None, plain cross entropy.

    Args:
        transition: T of the labels; None without a noise model.
    """
    if transition is None:
        return None
    kind = loss_type(model)
    return CorrectedLoss("backward", transition, num_classes=num_classes(model, kind), shift=kind == "ForCausalLM")


def correctable(model: nn.Module, transition: Any) -> Any:
    """T for :func:`measured_loss`; None, and a warning, where it has no inverse.

    Raises:
        ValueError: a T that is no transition matrix, or is of other classes than the model's.
    """
    if transition is None:
        return None
    noise, classes = read_transition(transition), num_classes(model, loss_type(model))
    if classes is None and isinstance(noise, float):  # the first logits will tell
        return noise
    if inverse_of(load_transition(noise, classes)) is not None:
        return noise
    logger.warning(
        "noise_transition can't be inverted, so the backward-corrected loss is not defined: the plain loss is "
        "measured, on labels as given"
    )
    return None


def example_batches(
    dataset: Any, collate: Callable[[list[Any]], Any], label_name: str, examples: int, args: TrainingArguments
) -> DataLoader[Any]:
    """Some examples of a data set in its own order, in evaluation batches, labels under the name ``labels``.

    Args:
        examples: how many; drawn without replacement by ``args.seed``, or the first ones of a data set without length.
    """
    chosen: Any
    if hasattr(dataset, "__len__"):
        drawn = np.random.default_rng(args.seed).permutation(len(dataset))[:examples]
        chosen = Subset(dataset, sorted(drawn.tolist()))
    else:
        chosen = list(itertools.islice(dataset, examples))

    def collated(rows: list[Any]) -> Any:
        batch = collate(rows)
        if label_name in ("labels", "label") or label_name not in batch:
            return batch
        return {"labels" if key == label_name else key: value for key, value in batch.items()}

    # All processes share each batch. No workers: the collator above can't be sent to them everywhere.
    batch_size = args.per_device_eval_batch_size * args.world_size
    return DataLoader(chosen, batch_size=batch_size, collate_fn=collated)


# Names in logs


def block_of(layer: str) -> str:
    """The group of layers that a weight is shown with, from its name: up to the last number, or the module's parent.

    >>> block_of("vit.layers.0.mlp.fc1.weight"), block_of("vit.pooler.dense.weight"), block_of("classifier.weight")
    ('vit.layers.0', 'vit.pooler', 'classifier')
    """
    parts = layer.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    if numbers:
        return ".".join(parts[: numbers[-1] + 1])
    owner = parts[:-1] if len(parts) > 1 else parts
    return ".".join(owner[:-1] or owner)


def hessian_metrics(report: HessianReport, prefix: str) -> dict[str, float]:
    """What goes into logs and trackers.

    ``{prefix}_hessian_total`` is Σ √𝓗_i of all layers by the sound bounds, ``{prefix}_hessian_in_BLOCK`` a block's
    share of it; ``_hessian_total_lanczos`` takes the Lanczos values of settled layers; ``_hessian_distance`` is the
    distance of all layers together.
    """
    found: dict[str, float] = {"total": 0.0, "total_lanczos": 0.0}
    blocks: dict[str, float] = {}
    for layer in report.layers:
        root = math.sqrt(max(layer.upper.maximum, 0.0))
        best = layer.positive
        settled = best is not None and best.settled
        found["total"] += root
        found["total_lanczos"] += math.sqrt(max(best.maximum, 0.0)) if best is not None and settled else root
        block = block_of(layer.name)
        blocks[f"in_{block}"] = blocks.get(f"in_{block}", 0.0) + root
    found["distance"] = math.sqrt(math.fsum(layer.distance**2 for layer in report.layers))
    found["loss"] = report.losses.mean
    found["settled"] = report.settled
    found["examples"] = float(report.examples)
    found["runtime"] = round(report.seconds, 3)
    return {f"{prefix}_hessian_{name}": value for name, value in {**found, **blocks}.items()}


# All of it


@dataclass(frozen=True)
class Measurement:
    """What one measurement of a Trainer found, beside the report."""

    report: HessianReport
    bounds: tuple[Bound, ...]
    """Those of training examples only where their number is known."""
    risks: tuple[MeasuredRisk, ...]
    """Of the measured examples, then of each evaluation data set that has labels."""
    reference: str
    """Where the distances are measured from, in words."""


class ExampleSet(NamedTuple):
    """Examples for a measurement."""

    name: str
    dataset: Any
    collate: Callable[[list[Any]], Any]
    labels: Labels
    selected_on: bool = False
    """Something was chosen by them, such as the epoch: what they say of the model is flattered."""


def measure(
    model: nn.Module,
    reference: tuple[Mapping[str, Tensor], str],
    measured: ExampleSet,
    held_out: Sequence[ExampleSet],
    label_name: str,
    args: TrainingArguments,
    *,
    transition: Any,
    examples: int,
    time_budget: float,
) -> Measurement:
    """Curvature, losses and bounds, by all processes of the training together.

    Args:
        reference: weights by name, and what they are in words.
        measured: training examples, for the bounds to be bounds.
        held_out: evaluation data, of which at most 5,000 examples each are looked at.
        transition: T of noisy labels; None without a noise model.

    Raises:
        ValueError, ReferenceMismatch, MeasurementStopped, OtherProcessFailed: see
            :func:`~hf_robust_ft.measure_hessian`.
    """
    weights, described = reference
    loss = measured_loss(model, transition)
    distributed = args.world_size > 1

    def batches(of: ExampleSet, count: int) -> DataLoader[Any]:
        return example_batches(of.dataset, of.collate, label_name, count, args)

    report = measure_hessian(
        model, weights, batches(measured, examples), loss=loss, time_budget=time_budget, distributed=distributed
    )
    risks = []
    for of, count in [(measured, examples), *((each, MOST_HELD_OUT) for each in held_out)]:
        try:
            corrected = loss if of.labels == "noisy" else None
            risks.append(
                measure_risk(
                    model, batches(of, count), data=of.name, labels=of.labels, loss=corrected, distributed=distributed
                )
            )
        except Exception as error:  # noqa: BLE001 - any at all, of any process: the curvature is worth more
            logger.warning("the loss of %s data was not measured: %s", of.name, error)
    matrix = None if loss is None or loss.matrices is None else loss.matrices[0]
    fair = [each.name for each in held_out if not each.selected_on and each.labels != "noisy"]
    certified = [
        held_out_error(
            round(risk.error * risk.judged), risk.judged, name=f"held-out, {risk.data}", clean=risk.labels == "clean"
        )
        for risk in risks
        if risk.data in fair and risk.error is not None and risk.judged
    ]
    bounds = (*_bounds(report, measured, risks, matrix, model, weights), *certified)
    return Measurement(report, bounds, tuple(risks), described)


def _bounds(
    report: HessianReport,
    measured: ExampleSet,
    risks: Sequence[MeasuredRisk],
    transition: Any,
    model: nn.Module,
    weights: Mapping[str, Tensor],
) -> tuple[Bound, ...]:
    if not hasattr(measured.dataset, "__len__"):
        return ()
    margin = risks[0].margin if risks and risks[0].data == measured.name else None
    try:
        found = report_bounds(
            report,
            len(measured.dataset),
            transition=transition,
            model=model,
            reference=weights,
            margin=margin if margin is not None and margin > 0 else None,
        )
    except (ValueError, NotWritten) as error:  # weights that don't fit go to the disk
        logger.warning("no bound was computed: %s", error)
        return ()
    return tuple(found)
