"""From raw images or texts with labels to what a model's backbone takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from datasets import ClassLabel, Dataset, Image
from torch import Tensor
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification, AutoTokenizer

# The one at the top of transformers asks for torchvision before 5.19.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from .estimation.inputs import Labels
from .noise import IGNORE_INDEX
from .pretrained import CodeRefused, load_pretrained, refuse_code

Kind = Literal["image", "text"]
AUTO: dict[Kind, Any] = {"image": AutoModelForImageClassification, "text": AutoModelForSequenceClassification}
PROCESSORS: dict[Kind, str] = {"image": "ImageProcessor", "text": "Tokenizer"}

# Fast on a CPU, whose caches larger batches leave.
BATCH_SIZE = 32

# A text's class shows in its first words, as a rule, and the time of a long text is that of many short ones.
MOST_TOKENS = 256

# More than the largest classifiers know (21,843 of ImageNet): such numbers are ids.
MOST_CLASSES = 100_000


def read_labels(dataset: Dataset, column: str) -> tuple[Labels, tuple[str, ...]]:
    """Labels as integers, and the names of their classes.

    Integers stay as they are. Words become the numbers of their alphabetical order. -100 stays: no label.

    Raises:
        ValueError: no ``datasets.Dataset``, no such column, a label that is missing, or labels that are no classes:
            soft, multi-label, numbers with a fraction, or above 100,000.
    """
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"dataset is of type {type(dataset).__name__}; give a datasets.Dataset, whose rows have numbers: one split "
            "of a DatasetDict, and load_dataset without streaming=True"
        )
    if column not in dataset.column_names:
        raise ValueError(f"label_column '{column}' is not among the columns {dataset.column_names}; name the labels'")
    # Arrow format: applies a selection of rows and decodes no images.
    values = dataset.select_columns([column]).with_format("arrow")[:].column(column)
    kind = values.type
    if pa.types.is_nested(kind):
        raise ValueError(
            f"label_column '{column}' holds {kind}, which looks like soft or multi-label targets; noise is diagnosed "
            "for one class an example: give integers or words"
        )
    if values.null_count:
        raise ValueError(
            f"label_column '{column}' lacks a value in {values.null_count} of {len(values)} rows; drop them: "
            f"dataset.filter(lambda row: row['{column}'] is not None)"
        )
    feature = dataset.features[column]
    if pa.types.is_boolean(kind):
        return values.cast(pa.int64()).to_numpy(), ("False", "True")
    if pa.types.is_integer(kind):
        labels: Labels = values.cast(pa.int64()).to_numpy()
        if isinstance(feature, ClassLabel):
            return labels, tuple(feature.names)
        largest = int(labels.max(initial=0))
        if largest >= MOST_CLASSES:
            raise ValueError(
                f"label_column '{column}' holds the number {largest}, which looks like an id; name the column of the "
                "labels, or number the classes 0..K-1"
            )
        return labels, tuple(str(k) for k in range(largest + 1))
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise ValueError(
            f"label_column '{column}' holds {kind}, which looks like a regression target; noise is diagnosed for "
            "classes: give integers or words"
        )
    names, labels = np.unique(np.array(values.to_pylist(), dtype=np.str_), return_inverse=True)
    return labels.astype(np.int64), tuple(str(name) for name in names)


def find_inputs(
    dataset: Dataset, label_column: str, image_column: str | None, text_column: str | Sequence[str] | None
) -> tuple[Kind, tuple[str, ...]]:
    """Which columns a model reads: those named, else the only column of images, else the only one of texts.

    Raises:
        ValueError: both kinds are named, a column doesn't exist or holds no texts, or there is not exactly one to
            choose.
    """
    if image_column is not None and text_column is not None:
        raise ValueError(f"image_column '{image_column}' and text_column {text_column!r} are both given; give one")
    if image_column is not None or text_column is not None:
        kind: Kind = "text" if image_column is None else "image"
        named = image_column if image_column is not None else text_column
        columns = (named,) if isinstance(named, str) else tuple(named or ())
        for column in columns:
            if column not in dataset.column_names:
                raise ValueError(f"{kind}_column '{column}' is not among the columns {dataset.column_names}")
            if kind == "text" and not _holds_texts(dataset.features[column]):
                raise ValueError(
                    f"text_column '{column}' holds no texts but {dataset.features[column]}; name a column of texts, or "
                    f"make it one: dataset.cast_column('{column}', Value('string'))"
                )
        return kind, columns
    others = {name: feature for name, feature in dataset.features.items() if name != label_column}
    images = [name for name, feature in others.items() if isinstance(feature, Image)]
    texts = [name for name, feature in others.items() if _holds_texts(feature)]
    if len(images) == 1:
        return "image", (images[0],)
    if len(texts) == 1 and not images:
        return "text", (texts[0],)
    raise ValueError(
        f"the columns {dataset.column_names} hold {len(images)} of images and {len(texts)} of texts, so it isn't clear "
        "what the model reads; set image_column or text_column"
    )


def _holds_texts(feature: Any) -> bool:
    return getattr(feature, "dtype", None) in ("string", "large_string")


def load_backbone(model: str | Path, kind: Kind, num_classes: int) -> tuple[Any, Any]:
    """A pretrained model (the head is a new one, and not used) and its image processor or tokenizer.

    Raises:
        ValueError: the model is of another kind, or needs code of its own.
        OSError: there is no such model, none with weights in safetensors, or no processor with it.
    """
    settings = {"num_labels": num_classes, "ignore_mismatched_sizes": True}
    try:
        loaded, _ = load_pretrained(AUTO[kind].from_pretrained, model, **settings)
        processor = load_processor(model, kind)
    except CodeRefused:
        raise
    except ValueError as error:
        raise ValueError(
            f"model '{model}' can't be loaded to classify {kind}s: {error} "
            f"Give a pretrained {kind} model, or name the columns with image_column or text_column"
        ) from error
    if kind == "text":
        # On the right, so that words keep the positions that they have without padding. The mask hides it from the
        # backbone, so any token will do where there is none for it, as with many decoders.
        processor.padding_side = "right"
        if processor.pad_token is None:
            processor.pad_token = processor.eos_token
    return loaded, processor


def load_processor(model: str | Path, kind: Kind) -> Any:
    """The image processor or tokenizer that lies with a model.

    Raises:
        OSError: there is none.
        ValueError: it needs code of its own.
    """
    remedy = (
        f"; save that of its base model there: Auto{PROCESSORS[kind]}.from_pretrained('BASE').save_pretrained('DIR')"
    )
    try:
        auto: Any = AutoImageProcessor if kind == "image" else AutoTokenizer
        found = auto.from_pretrained(model, trust_remote_code=False)
    except ImportError:
        raise
    except Exception as error:  # damaged files make tokenizers raise Exception itself
        refuse_code(model, error)
        first = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise OSError(f"model '{model}' comes without a usable {PROCESSORS[kind]} ({first}){remedy}") from error
    # From a configuration alone, transformers makes a tokenizer that knows no word.
    if kind == "text" and not set(found.get_vocab()) - set(found.all_special_tokens):
        raise OSError(f"model '{model}' comes without the vocabulary of a tokenizer{remedy}")
    return found


def model_inputs(
    dataset: Dataset,
    kind: Kind,
    columns: Sequence[str],
    processor: Any,
    image_size: int | None,
    order: Sequence[int],
) -> Iterator[dict[str, Tensor]]:
    """Batches of what the model takes, of the rows in this order.

    Args:
        image_size: pixels of each side, without cropping; by default what the processor says.

    Raises:
        ValueError: a row without its image.
    """
    data = dataset.with_format(None).select_columns(list(columns))
    if kind == "image" and not isinstance(data.features[columns[0]], Image):
        data = data.cast_column(columns[0], Image())  # file names, as a csv file has
    resized: dict[str, Any] = {}
    if image_size is not None:
        resized = {"size": {"height": image_size, "width": image_size}, "do_center_crop": False}
    for start in range(0, len(order), BATCH_SIZE):
        batch = data[list(order[start : start + BATCH_SIZE])]
        if kind == "image":
            if None in batch[columns[0]]:
                raise ValueError(
                    f"image_column '{columns[0]}' lacks the image in a row; drop such rows: "
                    f"dataset.filter(lambda row: row['{columns[0]}'] is not None)"
                )
            pictures = [picture.convert("RGB") for picture in batch[columns[0]]]
            yield dict(processor(pictures, return_tensors="pt", **resized))
        else:
            texts = [[text or "" for text in batch[column]] for column in columns]
            limit = min(MOST_TOKENS, processor.model_max_length)
            yield dict(processor(*texts, padding=True, truncation=True, max_length=limit, return_tensors="pt"))


def reading_order(dataset: Dataset, kind: Kind, columns: Sequence[str]) -> list[int]:
    """Rows so that texts of a batch are about equally long, and little of it is padding."""
    if kind == "image":
        return list(range(len(dataset)))
    data = dataset.with_format(None)
    lengths = np.sum([[len(text or "") for text in data[column][:]] for column in columns], axis=0)
    return [int(i) for i in np.argsort(lengths, kind="stable")]


def labelled_rows(labels: Labels, most: int | None, seed: int) -> Labels:
    """Rows that have a label, in order; at most so many, drawn by seed.

    Raises:
        ValueError: fewer than one.
    """
    if most is not None and most < 1:
        raise ValueError(f"max_examples is {most}; give a whole number from 1 on, or None for all")
    rows = np.flatnonzero(labels != IGNORE_INDEX)
    if most is not None and most < len(rows):
        rows = np.sort(np.random.default_rng(seed).permutation(rows)[:most])
    return rows


def default_device() -> torch.device:
    """A GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
