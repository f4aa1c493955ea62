"""A look at the labels of a data set before training starts."""

from __future__ import annotations

import inspect
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc

from .noise import IGNORE_INDEX, check_labels


def check_dataset_labels(
    dataset: Any, collator: Any, label_name: str, num_classes: int, *, argument: str = "train_dataset"
) -> None:
    """Refuse a data set with labels that T says nothing of.

    Reads the label column of a ``datasets.Dataset`` without decoding anything else. Where a transform or a
    collator of the user's own may still change the labels, and for other kinds of data sets, nothing is
    read here: the loss checks every batch.

    Args:
        dataset: what the Trainer was given.
        collator: likewise.
        label_name: what the collated batch calls the labels.
        num_classes: K.
        argument: what the error calls the data set.

    Raises:
        ValueError: a label outside 0..K-1 other than -100, or labels that are no integers.
    """
    if not isinstance(dataset, datasets.Dataset) or dataset.format["type"] == "custom":
        return
    kind = collator if inspect.isroutine(collator) else type(collator)
    if not kind.__module__.startswith("transformers."):
        return
    # The collators of transformers rename these two.
    columns = [label_name, *(("label", "label_ids") if label_name == "labels" else ())]
    column = next((name for name in columns if name in dataset.column_names), None)
    if column is None:
        return
    # Arrow format: applies a selection of rows and decodes no images.
    values = dataset.select_columns([column]).with_format("arrow")[:].column(column)
    while hasattr(values.type, "value_type"):  # lists of any kind, in lists
        values = pc.list_flatten(values)
    if pa.types.is_boolean(values.type):
        values = values.cast(pa.int8())
    if not pa.types.is_integer(values.type):
        raise ValueError(
            f"column '{column}' of {argument} holds {values.type}; noise_transition is for class indices, not for "
            "regression, soft or multi-label targets"
        )
    labels = pc.unique(values).drop_null().to_numpy(zero_copy_only=False)
    check_labels(labels[labels != IGNORE_INDEX], num_classes)
