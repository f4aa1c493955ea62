"""Labels of a data set as the class numbers of a model that was trained elsewhere."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Value
from transformers import PreTrainedModel

from .estimation.inputs import Labels
from .noise import IGNORE_INDEX
from .raw_examples import read_labels

logger = logging.getLogger(__name__)


def model_labels(dataset: Dataset, column: str, model: PreTrainedModel, data: str) -> Labels:
    """Labels as numbers of the model's classes, [n]; -100 stays.

    Words and names go by the model's own names (``id2label``) where it has some that are these; else numbers stay
    as they are, and words are numbered in alphabetical order.

    Args:
        data: which data these are, for messages.

    Raises:
        ValueError: no such column, labels that are no classes, or classes that are not those of the model's head.
    """
    labels, names = read_labels(dataset, column)
    count = int(model.config.num_labels or 0)
    own = _names(model, count)
    feature = dataset.features[column]
    words = isinstance(feature, Value) and feature.dtype in ("string", "large_string")
    if words or isinstance(feature, ClassLabel):
        if own is not None and set(names) <= set(own):
            number = {name: k for k, name in enumerate(own)}
            numbers = np.array([number[name] for name in names])
            return np.where(labels == IGNORE_INDEX, IGNORE_INDEX, numbers[np.maximum(labels, 0)])
        if len(names) != count or (words and own is not None):
            raise ValueError(
                f"label_column '{column}' of {data} has {len(names)} classes ({_some(names)}), and the head of the "
                f"model {count}{'' if own is None else f' ({_some(own)})'}: they don't fit. Give the data that the "
                "model was trained on, or rename the classes as the model's id2label has them"
            )
        if own is not None:
            logger.warning(
                "classes of %s go by number: the data name them %s, the model %s", data, _some(names), _some(own)
            )
    outside = labels[((labels < 0) | (labels >= count)) & (labels != IGNORE_INDEX)]
    if len(outside):
        raise ValueError(
            f"label_column '{column}' of {data} holds the label {outside[0]}, but the head of the model has {count} "
            f"classes, 0 to {count - 1}: they don't fit. Give the data that the model was trained on, or another column"
        )
    return labels


def _names(model: PreTrainedModel, count: int) -> list[str] | None:
    """Of the model's classes; None where transformers made them up."""
    known: dict[Any, str] = dict(model.config.id2label or {})
    names = [str(known.get(k, f"LABEL_{k}")) for k in range(count)]
    return None if names == [f"LABEL_{k}" for k in range(count)] else names


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (", …" if len(names) > 4 else "")
