"""What the benchmark trains on: examples drawn by seed from four sources, and how their labels are corrupted.

Seeds below 100 are for development, the others for the report. They share no example: development draws from one half
of a training file and looks at clean labels of that half alone, the report draws from the other half and tests on the
test file. (The digits are too few for that: see :func:`Source.parts`.) Posteriors, radii and epochs were found earlier,
without such a division: only wordnet-verbs was never used for anything else.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from datasets import Dataset
from instance_noise import along_leading_component, corrupt_unevenly, sizes
from noisy_runs import train_and_test, transition_of
from supersense_rules import vote
from text_noisy import MINILM, SUPERSENSES, supersenses
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    default_data_collator,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from vit_noisy import HERE, digits

from hf_robust_ft import corrupt_labels, frozen_features, majority_vote

Labels = npt.NDArray[np.int64]
FIRST_REPORT_SEED = 100
TRAIN, VALIDATION, DEVELOPMENT_VALIDATION = 1000, 500, 1000
DINOV2 = MINILM.parent / "dinov2-small"
NOISES = ("none", "symmetric-0.2", "symmetric-0.4", "symmetric-0.6", "pair_flip-0.2", "pair_flip-0.4")
RULES = "rules"
INSTANCE = ("size-0.4", "component-0.4")  # no T describes these
SPECIAL = (*INSTANCE, "symmetric-0.1")  # of no table but their own
UNSEEN = ("none", "symmetric-0.4", "pair_flip-0.4")  # of the data that was never looked at before the report


@dataclass(frozen=True)
class Source:
    """A data set and the pretrained model that learns it."""

    name: str
    kind: str
    """``"image"`` or ``"text"``."""
    model: Path
    load: Callable[[], tuple[Dataset, Dataset]]
    epochs: int
    batch_size: int
    learning_rate: float
    """What a factor of 1 stands for."""
    radius: Any
    """The relative radii that a factor of 1 stands for."""
    noises: tuple[str, ...] = NOISES
    image_size: int | None = None

    @functools.cached_property
    def _loaded(self) -> tuple[Dataset, Dataset]:
        return self.load()

    @property
    def names(self) -> list[str]:
        names: list[str] = self._loaded[0].features["label"].names
        return names

    @functools.cached_property
    def collate(self) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """Makes batches."""
        collator: Any = default_data_collator if self.kind == "image" else DataCollatorWithPadding(self.processor)
        return collator  # type: ignore[no-any-return]

    @functools.cached_property
    def processor(self) -> Any:
        return (AutoImageProcessor if self.kind == "image" else AutoTokenizer).from_pretrained(self.model)

    def make_model(self) -> Any:
        """The pretrained model with a new head; the token embeddings of a text model stay as they are."""
        auto: Any = AutoModelForImageClassification if self.kind == "image" else AutoModelForSequenceClassification
        model = auto.from_pretrained(
            self.model, num_labels=len(self.names), ignore_mismatched_sizes=True, use_safetensors=True
        )
        if self.kind == "text":
            model.get_input_embeddings().requires_grad_(False)
        return model

    def features(self, model: Any, inputs: list[dict[str, Any]]) -> npt.NDArray[np.float64]:
        """[n, d] of the frozen backbone of a model that :meth:`make_model` made."""
        model = model.to("cuda" if torch.cuda.is_available() else "cpu")
        batches = (self.collate(inputs[i : i + 256]) for i in range(0, len(inputs), 256))
        return frozen_features(model, batches).double().numpy()

    @functools.cached_property
    def _inputs(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Of both files: what the model reads of each example."""
        first, second = self._loaded
        return self._encode(first), self._encode(second)

    def _encode(self, data: Dataset) -> list[dict[str, Any]]:
        if self.kind == "text":
            found = self.processor(data["text"][:], truncation=True, max_length=128)
            return [
                {"input_ids": ids, "attention_mask": mask}
                for ids, mask in zip(found["input_ids"], found["attention_mask"], strict=True)
            ]
        size = {} if self.image_size is None else {"size": {"height": self.image_size, "width": self.image_size}}
        pictures = [picture.convert("RGB") for picture in data["image"][:]]
        pixels = self.processor(pictures, return_tensors="pt", **({"do_center_crop": False} | size if size else {}))
        return [{"pixel_values": x} for x in pixels["pixel_values"]]

    def parts(self, seed: int) -> dict[str, tuple[int, Labels]]:
        """Rows of train, validation and test, each as the number of the file and rows in it."""
        train, test = (len(part) for part in self._loaded)
        rng = np.random.default_rng(seed)
        if self.name == "digits":  # 1,000 and 797 in all: both stages draw from the same
            drawn = rng.permutation(train)
            return {"train": (0, drawn[:750]), "validation": (0, drawn[750:]), "test": (1, np.arange(test))}
        # Files of definitions are in no random order: the first half of the nouns has 26 of food, the second 474.
        pool, half = (
            np.random.default_rng(0).permutation(train) if self.kind == "text" else np.arange(train),
            train // 2,
        )
        if seed >= FIRST_REPORT_SEED:
            drawn = rng.permutation(pool[half:])
            return {
                "train": (0, drawn[:TRAIN]),
                "validation": (0, drawn[TRAIN : TRAIN + VALIDATION]),
                "test": (1, np.arange(test)),
            }
        drawn = rng.permutation(pool[:half])
        end = TRAIN + DEVELOPMENT_VALIDATION
        return {"train": (0, drawn[:TRAIN]), "validation": (0, drawn[TRAIN:end]), "test": (0, drawn[end:])}


@dataclass(frozen=True)
class Part:
    """Examples as the model reads them, as they came, and both their labels."""

    inputs: list[dict[str, Any]]
    """With ``labels``, the noisy ones but for the test data, and ``index``, their number."""
    raw: Dataset
    labels: Labels
    clean: Labels


def draw(source: Source, noise: str, seed: int) -> dict[str, Part]:
    """Train and validation with noisy labels, test with clean ones.

    ``"rules"`` are the votes of keyword rules, which leave a third of the examples without a label: these are left out.
    """
    found = {}
    for number, (name, (file, rows)) in enumerate(source.parts(seed).items()):
        raw, inputs = source._loaded[file].select(rows), [source._inputs[file][row] for row in rows]
        clean = np.asarray(raw["label"][:], dtype=np.int64)
        labels = clean if name == "test" else noisy_labels(source, raw, inputs, noise, 3 * seed + number)
        kept = np.flatnonzero(labels >= 0)
        examples = [{**inputs[row], "labels": int(labels[row]), "index": i} for i, row in enumerate(kept)]
        raw = raw.select(kept).remove_columns("label")
        raw = raw.add_column("label", labels[kept], feature=source._loaded[0].features["label"])
        found[name] = Part(examples, raw, labels[kept], clean[kept])
    return found


def noisy_labels(source: Source, raw: Dataset, inputs: list[dict[str, Any]], noise: str, seed: int) -> Labels:
    """The labels after this noise; -100 where rules abstain."""
    clean, classes = np.asarray(raw["label"][:], dtype=np.int64), len(source.names)
    if noise == "none":
        return clean
    if noise == RULES:
        return majority_vote(vote(raw["text"][:], source.names), classes, seed=seed)
    shape, rate = noise.split("-")
    if noise in INSTANCE:
        if shape == "size":
            values = sizes(raw[source.kind][:])
        else:
            values = along_leading_component(source.features(source.make_model(), inputs), clean)
        return corrupt_unevenly(clean, values, float(rate), classes, seed)
    return corrupt_labels(clean, transition_of(shape, float(rate), classes), seed)


TEXT_RADIUS = {"*layer*": 0.02}
SOURCES = {
    source.name: source
    for source in (
        Source("digits", "image", HERE / "glyph_vit", digits, 20, 64, 1e-3, 0.01),
        Source(
            "fashion-mnist",
            "image",
            DINOV2,
            lambda: train_and_test(SUPERSENSES.parent / "fashion-mnist"),
            6,
            32,
            1e-4,
            0.01,
            image_size=56,
        ),
        Source("wordnet-nouns", "text", MINILM, supersenses, 6, 32, 1e-4, TEXT_RADIUS, (*NOISES, RULES)),
        Source(
            "wordnet-verbs",
            "text",
            MINILM,
            lambda: train_and_test(HERE / "wordnet_verbs"),
            6,
            32,
            1e-4,
            TEXT_RADIUS,
            UNSEEN,
        ),
    )
}
