"""Out-of-fold probabilities of the model itself, for when frozen features tell the classes apart badly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import softmax
from torch.utils.data import Subset
from transformers import Trainer

from .estimation.crossfit import stratified_folds
from .estimation.inputs import check_class_labels
from .noise import Matrix


def out_of_fold_probabilities(
    train_fold: Callable[[Any], Trainer], dataset: Any, labels: npt.ArrayLike, *, folds: int = 5, seed: int = 0
) -> Matrix:
    """``P(noisy label | x)`` of every example, by a model that was trained on the other folds.

    For ``estimate_transition(None, labels, probabilities=...)``, which calibrates them::

        def train_fold(part):
            model = AutoModelForImageClassification.from_pretrained(name, num_labels=10)
            trainer = Trainer(model, arguments, train_dataset=part)
            trainer.train()
            return trainer

    It takes as long as ``folds`` trainings. Plain cross entropy it should be: a corrected loss predicts true labels.
    Few epochs are better than many, as a model that has learnt wrong labels by heart is sure of wrong things.

    Args:
        train_fold: gets a part of the data set, trains a *new* model on it and returns the Trainer.
        dataset: with a length; ``datasets.Dataset`` or a list-like one of dictionaries.
        labels: [n] integers in 0..K-1, noisy: those that the data set holds.
        folds: at least 2.
        seed: of the split into folds.

    Returns:
        [n, K], in the order of the data set.

    Raises:
        ValueError: bad labels or folds; a Trainer that has not trained, or whose model an earlier fold has trained;
            predictions that are not one row of logits an example, or not in the order of the data set.
    """
    y, num_classes = check_class_labels(labels, len(dataset))
    fold = stratified_folds(y, folds, seed)
    found = np.empty((len(y), num_classes))
    previous: Any = None
    for f in range(folds):
        held = np.flatnonzero(fold == f)
        trainer = train_fold(_part(dataset, np.flatnonzero(fold != f)))
        if trainer.state.global_step == 0:
            raise ValueError(f"train_fold returned a Trainer that has made no step on fold {f}; call train() in it")
        if trainer.model is previous:
            raise ValueError(
                "train_fold returned the same model twice, which has seen the examples of this fold; make a new model "
                "from the pretrained one in each call"
            )
        previous = trainer.model
        output = trainer.predict(_part(dataset, held))
        logits = output.predictions[0] if isinstance(output.predictions, tuple) else output.predictions
        if logits.ndim != 2 or logits.shape != (len(held), num_classes):
            raise ValueError(
                f"predictions of fold {f} have shape {logits.shape} for {len(held)} examples of {num_classes} classes; "
                "the model must give one row of logits an example, and have as many labels as the data"
            )
        if output.label_ids is None or not np.array_equal(np.asarray(output.label_ids).reshape(-1), y[held]):
            raise ValueError(
                f"predictions of fold {f} come with other labels than those given; give the labels of this data "
                "set, in its order, and leave evaluation unshuffled (no grouping by length)"
            )
        found[held] = softmax(logits.astype(np.float64), axis=1)
    return found


def _part(dataset: Any, indices: npt.NDArray[np.int64]) -> Any:
    # A Trainer drops columns that a model doesn't take from a datasets.Dataset, but not from a Subset of one.
    return dataset.select(indices) if hasattr(dataset, "select") else Subset(dataset, indices.tolist())
