"""``noise_transition="estimate"``: from the training set of a Trainer to an estimated T, on all processes the same."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn
from torch.utils.data import DataLoader, Subset
from transformers import TrainingArguments

from .estimation import TransitionEstimate, estimate_transition
from .features import one_class_an_example
from .frozen_features import backbone_of, frozen_features
from .noise import IGNORE_INDEX
from .snapshot import snapshot

logger = logging.getLogger(__name__)

ESTIMATE = "estimate"
FILE = "transition_estimate.json"

# Errors of T hardly fall beyond (recipes/RESULTS.md), and the time goes on growing.
MOST_EXAMPLES = 10_000


def check_estimable(model: nn.Module, dataset: Any, label_names: list[str], world_size: int = 1) -> None:
    """Refuse what T can't be estimated for.

    Raises:
        ValueError: no training set, one without a length or with fewer examples than processes; several label
            columns; a model without a backbone, or one that does not predict one class an example.
    """
    asked = f"noise_transition='{ESTIMATE}'"
    if dataset is None or not hasattr(dataset, "__len__"):
        what = "train_dataset is None" if dataset is None else f"{type(dataset).__name__} has no length"
        raise ValueError(f"{asked} needs a train_dataset with a length, but {what}; give T itself, or such a data set")
    if len(dataset) < world_size:
        raise ValueError(f"{asked} has {len(dataset)} examples for {world_size} processes; give more examples")
    one_class_an_example(model, label_names, asked)
    backbone_of(model)


def estimate_noise(
    model: nn.Module,
    dataset: Any,
    collate: Callable[[list[Any]], Any],
    label_name: str,
    num_classes: int | None,
    args: TrainingArguments,
) -> TransitionEstimate:
    """T from the labels of a training set and the frozen features of the model as it is now.

    At most 10,000 examples, drawn by ``args.seed``. Each process computes the features of its share; the first one
    estimates, writes ``transition_estimate.json`` to ``args.output_dir`` and tells the others.

    Raises:
        ValueError: the labels do not identify T (the estimate is written all the same), or don't suit
            :func:`estimate_transition`.
    """
    chosen = np.random.default_rng(args.seed).permutation(len(dataset))[:MOST_EXAMPLES]
    own = chosen[args.process_index :: args.world_size]
    loader = DataLoader(
        Subset(dataset, [int(i) for i in own]),
        batch_size=args.per_device_eval_batch_size,
        collate_fn=collate,
        num_workers=args.dataloader_num_workers,
    )
    labels: list[torch.Tensor] = []

    def batches() -> Iterator[Mapping[str, Any]]:
        for batch in loader:
            if label_name not in batch:
                raise ValueError(
                    f"noise_transition='{ESTIMATE}' needs '{label_name}', but the batch has {', '.join(batch)}; name "
                    "the column of the labels with label_names"
                )
            labels.append(batch[label_name])
            yield batch

    # Loaders and random transforms draw numbers, and training shall go on as with a T that was given.
    _, restore = snapshot(None)
    try:
        features = frozen_features(model, batches(), total=len(loader)).numpy()
    finally:
        restore()
    parts = gather_object([(features, torch.cat(labels).cpu().numpy())])
    message: list[Any] = [None]
    if args.process_index == 0:
        # In the order of one process, so that any number of them gives the same folds.
        order = np.argsort(np.concatenate([np.arange(rank, len(chosen), len(parts)) for rank in range(len(parts))]))
        x, y = (np.concatenate(arrays)[order] for arrays in zip(*parts, strict=True))
        kept = y != IGNORE_INDEX
        try:
            estimate = estimate_transition(x[kept], y[kept], num_classes=num_classes, seed=args.seed)
            estimate.save(Path(str(args.output_dir)) / FILE)
            message = [estimate]
        except (ValueError, OSError, ArithmeticError, MemoryError) as error:  # the other processes wait
            message = [error]
    found = broadcast_object_list(message)[0]
    if isinstance(found, ValueError):
        drawn = f" ({MOST_EXAMPLES} of {len(dataset)} examples were drawn)" if len(chosen) < len(dataset) else ""
        raise ValueError(f"noise_transition='{ESTIMATE}': {found}{drawn}") from found
    if isinstance(found, Exception):
        raise found
    assert isinstance(found, TransitionEstimate)
    logger.info("%s", found)
    check_identifiable(found)
    return found


def check_identifiable(estimate: TransitionEstimate) -> None:
    """Refuse to train with a T that may be singular.

    Raises:
        ValueError: it may.
    """
    if not estimate.identifiable:
        raise ValueError(
            f"noise_transition='{ESTIMATE}': {estimate.verdict} (The estimate is in {FILE}.) Train without T "
            "(loss_correction='gce' with noise_transition=None), give T, or more examples"
        )


def saved_estimate(source: Any) -> TransitionEstimate | None:
    """The estimate that a path leads to; None for anything else that ``noise_transition`` may be."""
    if not isinstance(source, (str, Path)) or not str(source).endswith(".json") or not Path(source).is_file():
        return None
    content = json.loads(Path(source).read_text(encoding="utf-8"))
    return TransitionEstimate.from_dict(content, str(source)) if isinstance(content, dict) else None
