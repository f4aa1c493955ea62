"""What the estimators accept: finite features, one integer label an example, every class present."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..noise import IGNORE_INDEX, MAX_CLASSES, Matrix

# The sum of its squares is finite for any number of examples.
LARGEST = 1e145

# Probabilities of a model in half precision sum to 1 within this.
SUM_TOLERANCE = 0.01

Labels = npt.NDArray[np.int64]


def check_features(features: Any, name: str = "features") -> Matrix:
    """Features as float64 [n, d].

    Raises:
        ValueError: another shape, no numbers, or an entry that is not finite.
    """
    if isinstance(features, torch.Tensor):  # numpy takes none in bfloat16, on a GPU or with a gradient
        features = features.detach().cpu().double()
    try:
        array = np.asarray(features, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} are not a matrix of numbers ({error}); give [examples, dimensions]") from None
    if array.ndim != 2 or array.shape[1] == 0:
        raise ValueError(f"{name} have shape {array.shape}; give one row an example, [examples, dimensions]")
    if not np.isfinite(array).all():
        row, column = np.argwhere(~np.isfinite(array))[0]
        raise ValueError(
            f"{name}[{row}, {column}] is {array[row, column]}; features must be finite: "
            "did the model overflow in half precision, or is the example empty?"
        )
    if np.abs(array).max(initial=0) > LARGEST:
        raise ValueError(f"{name} reach {np.abs(array).max():.3g}, whose square overflows; scale them down")
    return array


def check_probabilities(probabilities: Any, name: str = "probabilities") -> Matrix:
    """Class probabilities as float64 [n, K].

    Raises:
        ValueError: no finite matrix, or rows that are no probabilities.
    """
    p = check_features(probabilities, name)
    if p.size and (p.min() < 0 or np.abs(p.sum(axis=1) - 1).max() > SUM_TOLERANCE):
        worst = int(np.argmax(np.maximum(-p.min(axis=1), np.abs(p.sum(axis=1) - 1))))
        raise ValueError(
            f"{name}[{worst}] has the least entry {p[worst].min():.3g} and the sum {p[worst].sum():.3g}; give "
            "probabilities that sum to 1: of logits, their softmax"
        )
    return p


def check_class_labels(
    labels: Any, examples: int, num_classes: int | None = None, name: str = "labels"
) -> tuple[Labels, int]:
    """Labels as int64 [n], and K.

    Args:
        examples: n that the features have.
        num_classes: K; by default the largest label plus one.

    Raises:
        ValueError: soft or multi-label targets, labels that are no integers or lie outside 0..K-1, another
            number of them than of features, or K below 2 or above 10,000.
    """
    array = np.asarray(labels)
    if array.ndim != 1:
        raise ValueError(
            f"{name} have shape {array.shape}, which looks like soft or multi-label targets; a transition matrix "
            "describes one class an example: give integers of shape [n] (labels.argmax(1) hardens soft labels)"
        )
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} have dtype {array.dtype}; class labels are integers")
    if len(array) != examples:
        raise ValueError(f"there are {len(array)} {name} for {examples} rows of features; give one label a row")
    if examples == 0:
        raise ValueError(f"{name} are empty; there is nothing to estimate from")
    classes = int(array.max()) + 1 if num_classes is None else num_classes
    if classes < 2:
        raise ValueError(f"num_classes is {classes}; a transition matrix needs at least 2 classes")
    if classes > MAX_CLASSES:
        raise ValueError(
            f"num_classes is {classes}, and {name} reach {array.max()}; a transition matrix has at most {MAX_CLASSES} "
            "classes: number them 0..K-1, or are these ids?"
        )
    array = array.astype(np.int64)
    outside = array[(array < 0) | (array >= classes)]
    if outside.size:
        raise ValueError(
            f"{name}: label {outside[0]} lies outside 0..{classes - 1} ({outside.size} such labels); map labels to "
            f"0..{classes - 1}, and leave out the examples that have none (features[labels != {IGNORE_INDEX}])"
        )
    return array, classes


def check_every_class(labels: Labels, num_classes: int, name: str = "labels") -> None:
    """Raise ``ValueError`` naming the classes that no label has: nothing can be said of their rows and columns."""
    missing = np.flatnonzero(np.bincount(labels, minlength=num_classes) == 0)
    if missing.size:
        classes = ", ".join(str(c) for c in missing[:10]) + (", …" if missing.size > 10 else "")
        raise ValueError(
            f"{name} hold no example of class {classes} (of {num_classes}), so their part of the transition matrix "
            "can't be estimated; add examples of them, or drop those classes and renumber the others 0..K-1"
        )
