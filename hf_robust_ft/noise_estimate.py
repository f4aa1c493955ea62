"""What the frozen model tells of the training labels of a Trainer: T and posteriors, on all processes the same."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, Subset
from transformers import TrainingArguments

from .arguments import ESTIMATE
from .estimation import TransitionEstimate, estimate_transition
from .estimation.inputs import Labels
from .features import one_class_an_example
from .frozen_features import backbone_of, frozen_features
from .label_posteriors import label_posteriors
from .label_targets import LabelTargets
from .noise import IGNORE_INDEX, Matrix, load_transition
from .sharding import has_shards
from .snapshot import snapshot
from .stored import read_json

logger = logging.getLogger(__name__)

FILE = "transition_estimate.json"

# Errors of T hardly fall beyond (recipes/RESULTS.md), and the time goes on growing.
MOST_EXAMPLES = 10_000


def check_estimable(
    model: nn.Module,
    dataset: Any,
    label_names: list[str],
    asked: str,
    world_size: int = 1,
    *,
    only_first_loads: bool = False,
) -> None:
    """Refuse what T can't be estimated for, and labels have no posteriors for.

    Args:
        asked: the setting that needs it, for the message.
        only_first_loads: whether the other processes have no weights yet.

    Raises:
        ValueError: a model that is sharded, or that only one process has; no training set, one without a length or
            places, or with fewer examples than processes; several label columns; a model without a backbone, or one
            that does not predict one class an example.
    """
    problem = None
    if dataset is None:
        problem = "train_dataset is None"
    elif not hasattr(dataset, "__len__"):
        problem = f"{type(dataset).__name__} has no length"
    elif isinstance(dataset, IterableDataset):
        problem = f"{type(dataset).__name__} is an IterableDataset, which gives no example by its place"
    if has_shards(model) or only_first_loads:
        why = "the model is sharded"
        if only_first_loads:
            why = "with cpu_ram_efficient_loading only the first one has the model (False works)"
        raise ValueError(
            f"{asked} needs features that each process computes by itself, but {why}; estimate T before (hf-robust-ft "
            "diagnose, or estimate_transition) and give its file as noise_transition, with loss_correction='forward'"
        )
    if problem is not None:
        raise ValueError(
            f"{asked} needs a train_dataset with a length, but {problem}; give T itself, or such a data set"
        )
    if len(dataset) < world_size:
        raise ValueError(f"{asked} has {len(dataset)} examples for {world_size} processes; give more examples")
    one_class_an_example(model, label_names, asked)
    backbone_of(model)


class LabelStudy(NamedTuple):
    """T as it was estimated, now or before, and the posteriors; None for what was not asked for, or can't be had."""

    estimate: TransitionEstimate | None
    targets: LabelTargets | None


def study_labels(
    model: nn.Module,
    dataset: Any,
    collate: Callable[[list[Any]], Any],
    label_name: str,
    num_classes: int | None,
    args: TrainingArguments,
    *,
    transition: Any = None,
    estimate: TransitionEstimate | None = None,
    posteriors: bool = False,
) -> LabelStudy:
    """T, or the posteriors of the training labels, or both, from the frozen features of the model as it is now.

    T comes from at most 10,000 labelled examples, drawn by ``args.seed``. Each process computes the features of its
    share; the first one does the rest, writes it to ``args.output_dir`` (``transition_estimate.json``,
    ``_label_posteriors.safetensors``) and tells the others.

    Args:
        transition: T where it is given; None: it is estimated.
        estimate: T where it was estimated before.
        posteriors: whether to find :func:`label_posteriors`. Where T is estimated and there is little or no noise,
            they are the labels themselves.

    Raises:
        ValueError: labels that don't suit :func:`estimate_transition`. What they say is left to :func:`check_estimate`.
    """
    chosen = np.random.default_rng(args.seed).permutation(len(dataset))
    if not posteriors:
        chosen = _labelled_first(chosen, dataset, label_name)[:MOST_EXAMPLES]
    asked = f"noise_transition='{ESTIMATE}'" if transition is None else "loss_correction='posterior'"
    features, labels = _features_and_labels(model, dataset, chosen, collate, label_name, asked, args)
    message: list[Any] = [None]
    if features is not None:
        try:
            message = [_study(features, labels, chosen, num_classes, args, transition, estimate, posteriors)]
        except Exception as error:  # noqa: BLE001 - any at all: the other processes wait
            message = [error]
    found = broadcast_object_list(message)[0]
    if isinstance(found, ValueError):
        sampled = transition is None and estimate is None and len(dataset) > MOST_EXAMPLES
        drew = f" (at most {MOST_EXAMPLES} of {len(dataset)} examples were drawn)" if sampled else ""
        raise ValueError(f"{asked}: {found}{drew}") from found
    if isinstance(found, Exception):
        raise found
    assert isinstance(found, LabelStudy)
    if estimate is None and found.estimate is not None:
        logger.info("%s", found.estimate)
    return found


def _labelled_first(chosen: Labels, dataset: Any, label_name: str) -> Labels:
    """The places of examples that have a target before the others, where a column says which have one."""
    names = dataset.column_names if isinstance(dataset, datasets.Dataset) else []
    column = next((name for name in (label_name, "label", "label_ids") if name in names), None)
    if column is None:
        return chosen
    # Only a draw: a collator may still make other labels of these.
    labels = np.asarray(dataset.select_columns([column]).with_format("numpy")[:][column])
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        return chosen
    return chosen[np.argsort(labels[chosen] == IGNORE_INDEX, kind="stable")]


def _study(
    features: Matrix,
    labels: Labels,
    chosen: Labels,
    num_classes: int | None,
    args: TrainingArguments,
    transition: Any,
    estimate: TransitionEstimate | None,
    posteriors: bool,
) -> LabelStudy:
    folder = Path(str(args.output_dir))
    kept = labels != IGNORE_INDEX
    odd = chosen[kept & ~np.isfinite(features).all(axis=1)]
    if odd.size:
        raise ValueError(
            f"the features of train_dataset[{odd.min()}] are not finite (of {odd.size} examples in all): did the model "
            "overflow in half precision, or is the example empty?"
        )
    if transition is None:
        if estimate is None:
            first = np.flatnonzero(kept)[:MOST_EXAMPLES]
            estimate = estimate_transition(features[first], labels[first], num_classes=num_classes, seed=args.seed)
            estimate.save(folder / FILE)
        transition = estimate.transition
        posteriors = posteriors and estimate.informative
    if not posteriors:
        return LabelStudy(estimate, None)
    matrix = load_transition(transition, num_classes)
    rows = np.full((len(labels), len(matrix)), IGNORE_INDEX, dtype=np.float32)
    if estimate is not None and estimate.noise_level == "none":
        # Ambiguous examples look like 1 to 5 % of noise. A label that is right teaches more than a posterior.
        rows[kept] = np.eye(len(matrix))[labels[kept]]
    else:
        rows[kept] = label_posteriors(features[kept], labels[kept], matrix, seed=args.seed)
    back = np.argsort(chosen)
    targets = LabelTargets(torch.from_numpy(rows[back]), torch.from_numpy(labels[back]), torch.from_numpy(matrix))
    targets.save(folder)
    return LabelStudy(estimate, targets)


def _features_and_labels(
    model: nn.Module,
    dataset: Any,
    chosen: Labels,
    collate: Callable[[list[Any]], Any],
    label_name: str,
    asked: str,
    args: TrainingArguments,
) -> tuple[Matrix | None, Labels]:
    """[n, d] and [n] of the chosen examples in their order, on the first process; None on the others."""
    own = chosen[args.process_index :: args.world_size]
    loader = DataLoader(
        Subset(dataset, [int(i) for i in own]),
        batch_size=args.per_device_eval_batch_size,
        collate_fn=collate,
        num_workers=args.dataloader_num_workers,
    )
    found: list[torch.Tensor] = []

    def batches() -> Iterator[Mapping[str, Any]]:
        for batch in loader:
            if label_name not in batch:
                raise ValueError(
                    f"{asked} needs '{label_name}', but the batch has {', '.join(batch)}; name the column of the "
                    "labels with label_names"
                )
            found.append(_class_indices(batch[label_name], label_name, asked))
            yield batch

    # Loaders and random transforms draw numbers, and training shall go on as with a T that was given.
    _, restore = snapshot(None)
    failure: Exception | None = None
    part: Any = None
    try:
        part = frozen_features(model, batches(), total=len(loader)).numpy(), torch.cat(found).numpy()
        if not len(part[0]) == len(part[1]) == len(own):
            raise ValueError(
                f"{asked}: the collator made {len(part[0])} inputs and {len(part[1])} labels of {len(own)} examples; "
                "it must keep every example, and make one row of it"
            )
    except Exception as error:  # noqa: BLE001 - any at all: the other processes wait
        failure = error
    finally:
        restore()
    parts = gather_object([part if failure is None else f"{type(failure).__name__}: {failure}"])
    if failure is not None:
        raise failure
    for rank, part in enumerate(parts):
        if isinstance(part, str):
            raise RuntimeError(f"process {rank} could not compute the features of its examples: {part}")
    if args.process_index > 0:
        return None, chosen
    # In the order of one process, so that any number of them gives the same folds.
    order = np.argsort(np.concatenate([np.arange(rank, len(chosen), len(parts)) for rank in range(len(parts))]))
    x, y = (np.concatenate(arrays)[order] for arrays in zip(*parts, strict=True))
    return x, y


def _class_indices(labels: Any, name: str, asked: str) -> torch.Tensor:
    """The labels of a batch, int64 [B]."""
    if not isinstance(labels, torch.Tensor) or labels.dim() != 1 or labels.is_floating_point():
        what = f"{labels.dtype} {list(labels.shape)}" if isinstance(labels, torch.Tensor) else type(labels).__name__
        raise ValueError(
            f"{asked} is for one class an example, but a batch has {what} as '{name}'; give integers [B] (soft and "
            "multi-label targets have no T)"
        )
    return labels.cpu().long()


def check_estimate(estimate: TransitionEstimate, posteriors: bool) -> None:
    """Refuse to train with a T that may be singular, or on posteriors of labels that say nothing.

    Raises:
        ValueError: it may, or they do.
    """
    if estimate.informative if posteriors else estimate.identifiable:
        return
    instead = (
        "" if posteriors or not estimate.informative else "on posteriors of the labels (loss_correction='posterior'), "
    )
    raise ValueError(
        f"noise_transition='{ESTIMATE}': {estimate.verdict} (The estimate is in {FILE}.) Train {instead}without T "
        "(loss_correction='gce' with noise_transition=None), give T, or more examples"
    )


def saved_estimate(source: Any) -> TransitionEstimate | None:
    """The estimate that a path leads to; None for anything else that ``noise_transition`` may be.

    Raises:
        ValueError: a file that is no JSON, or an object that is no estimate.
    """
    if not isinstance(source, (str, Path)) or not str(source).endswith(".json") or not Path(source).is_file():
        return None
    try:
        content = read_json(source)
    except ValueError as error:
        raise ValueError(f"the noise_transition file {source} is not valid JSON ({error}); give T as JSON") from None
    return TransitionEstimate.from_dict(content, str(source)) if isinstance(content, dict) else None
