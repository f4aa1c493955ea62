"""Posteriors of the training labels, and how they reach the loss: each batch gets those of its examples as labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.data import Dataset

from .fields import check_shapes
from .files import written_whole
from .noise import ROW_SUM_TOLERANCE, load_transition

# The Trainer does not upload names that start with an underscore: these are the user's labels.
FILE = "_label_posteriors.safetensors"


class LabelTargets(NamedTuple):
    """In the order of the training set."""

    posteriors: Tensor
    """[n, K], float32: ``P(true class | features, label)``. Rows of -100 for labels that are -100."""
    labels: Tensor
    """[n], int64: the labels that they are of."""
    transition: Tensor
    """[K, K], float64: T that they were computed with."""

    def are_of(self, transition: Any) -> bool:
        """Whether they were computed with this T, which may be whatever ``noise_transition`` may."""
        given = load_transition(transition, len(self.transition))
        return np.allclose(given, self.transition.numpy(), rtol=0, atol=ROW_SUM_TOLERANCE)

    def save(self, folder: str | Path) -> None:
        """Write ``_label_posteriors.safetensors``; a reader never sees half of it."""
        with written_whole(Path(folder) / FILE) as temporary:
            safetensors.torch.save_file(self._asdict(), temporary)

    @classmethod
    def load(cls, folder: str | Path) -> LabelTargets:
        """Read ``_label_posteriors.safetensors``.

        Raises:
            ValueError: a damaged file, or another kind of file.
        """
        path = Path(folder) / FILE
        try:
            targets = cls(**safetensors.torch.load_file(path))
            n, classes = targets.posteriors.shape
            check_shapes(targets, {"labels": (n,), "transition": (classes, classes)})
            return targets
        except (SafetensorError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} can't be read ({error}): restore it, or remove it, so that it is computed again"
            ) from error


def check_posteriors(labels: Any) -> None:
    """Refuse to train on labels where posteriors should be.

    Raises:
        ValueError: the labels of a batch are no posteriors.
    """
    if isinstance(labels, Tensor) and not labels.is_floating_point():
        raise ValueError(
            f"loss_correction='posterior' trains on posteriors, but a batch has labels of {labels.dtype}: is "
            "get_train_dataloader overridden? Let it change what its super() returns, or set loss_correction='forward'"
        )


class Numbered(Dataset[tuple[int, Any]]):
    """The examples of a data set, each with its place."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        return index, self.dataset[index]

    def __getitems__(self, indices: list[int]) -> list[tuple[int, Any]]:
        """A batch at once, which is faster where the data set can do it."""
        fetch = getattr(self.dataset, "__getitems__", None)
        rows = fetch(indices) if callable(fetch) else [self.dataset[index] for index in indices]
        return list(zip(indices, rows, strict=True))


@dataclass
class TargetCollator:
    """Collates numbered examples, and puts their posteriors in the place of their labels.

    Raises:
        ValueError: when called, if the labels are not those that the posteriors are of.
    """

    collate: Callable[[list[Any]], Any]
    targets: LabelTargets
    label_name: str

    def __call__(self, numbered: list[tuple[int, Any]]) -> Any:
        batch = self.collate([example for _, example in numbered])
        places = torch.tensor([place for place, _ in numbered])
        labels, expected = batch.get(self.label_name), self.targets.labels[places]
        if not isinstance(labels, Tensor) or not torch.equal(labels.cpu().long(), expected):
            raise ValueError(
                f"loss_correction='posterior' was computed for the labels {expected[:5].tolist()} of the examples "
                f"{places[:5].tolist()}, but the batch has {labels if labels is None else labels[:5].tolist()} as "
                f"'{self.label_name}': the training set or its collator has changed since, or draws labels at random. "
                "Make a new Trainer for other data"
            )
        batch[self.label_name] = self.targets.posteriors[places]
        return batch
