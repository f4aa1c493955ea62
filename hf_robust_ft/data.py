"""A look at the labels of a training set before training starts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc

from .noise import IGNORE_INDEX, check_labels


def check_dataset_labels(dataset: Any, columns: Sequence[str], num_classes: int) -> None:
    """Refuse a training set with labels that a corrected loss can't be trained on.

    Only columns of a ``datasets.Dataset`` are read, without decoding anything else. Other kinds of data
    sets, and labels that the collator makes, are checked batch by batch by the loss.

    Args:
        dataset: what the Trainer was given.
        columns: names that the label column may have; the first that exists is read.
        num_classes: K.

    Raises:
        ValueError: a label outside 0..K-1 other than -100, or labels that are no integers.
    """
    if not isinstance(dataset, datasets.Dataset):
        return
    column = next((name for name in columns if name in dataset.column_names), None)
    if column is None:
        return
    # Arrow format: applies a selection of rows, but no transform, and decodes no images.
    values = dataset.select_columns([column]).with_format("arrow")[:].column(column)
    while pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
        values = pc.list_flatten(values)
    labels = pc.unique(values).drop_null().to_numpy(zero_copy_only=False)
    if not pa.types.is_integer(values.type):
        raise ValueError(
            f"column '{column}' of train_dataset holds {values.type}; a corrected loss is for class indices, not for "
            "regression, soft or multi-label targets"
        )
    check_labels(labels[labels != IGNORE_INDEX], num_classes)
