"""Is there label noise, of what shape, where, and what to do about it: before any training."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from datasets import ClassLabel, Dataset, Value
from transformers import PreTrainedModel

from .estimation import TransitionEstimate, estimate_transition
from .estimation.inputs import check_class_labels, check_every_class
from .estimation.verdict import FEW_EXAMPLES, LEVEL, NOTABLE_EFFECT
from .features import one_class_an_example
from .files import written_whole
from .frozen_features import backbone_of, frozen_features
from .heat_map import save_heat_map
from .layers import find_layers
from .noise import Matrix, check_labels
from .noise_estimate import FILE, MOST_EXAMPLES
from .noise_shape import noise_shape
from .raw_examples import (
    BATCH_SIZE,
    default_device,
    find_inputs,
    labelled_rows,
    load_backbone,
    model_inputs,
    read_labels,
    reading_order,
)
from .recommendation import RECOMMENDED, as_code, as_flags, radius_for, recommend
from .stored import Share, Size, checked_fields, read_json
from .suspects import rank_suspects

FORMAT = "hf_robust_ft.Diagnosis/1"
FILES = ("diagnosis.json", FILE, "suspects.csv", "T.png")

# With fewer, a row of T at 40 % noise has a standard error above √(0.4 · 0.6 / 10) = 0.15: no diagnosis.
LEAST_EXAMPLES_A_CLASS = 10

# With fewer, the correlation of noise that depends on the class alone is often above what counts as notable, by chance
# (measured: its standard deviation is 0.08 at 30 a class of ten, and 0.05 at 100).
TESTED_EXAMPLES_A_CLASS = 100

# Lines of the report.
PRINTED_MISTAKES = 5
PRINTED_SUSPECTS = 10

SHAPES = {
    "none": "none to speak of",
    "symmetric": "symmetric: wrong labels are spread evenly",
    "pair_flip": "pair flips: each class is mistaken for one other",
    "particular_classes": "between particular classes",
    "class_dependent": "class-dependent, of no simpler shape",
    "example_dependent": "example-dependent: it varies within classes, so T is an average",
}


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """What :func:`diagnose` found."""

    model: str
    classes: tuple[str, ...]
    """[K] names, in the order of T's rows."""
    shape: str
    """A key of ``SHAPES``."""
    explained: Share
    """Share of the wrong labels that a symmetric, pair-flip or particular-classes shape explains; else 1."""
    identifiable: bool
    """Whether labels can be corrected for by the inverse of T: it is regular throughout its interval."""
    estimate: TransitionEstimate
    rows: npt.NDArray[np.int64]
    """[n]: the rows of the data set that were looked at; all that have a label, as a rule."""
    labels: npt.NDArray[np.int64]
    """[n]: their labels."""
    suspect_score: Matrix
    """[n]: ``P(label wrong | features, label)``."""
    suspect_rank: npt.NDArray[np.int64]
    """[n]: 1 for the most suspect label."""
    suggested_label: npt.NDArray[np.int64]
    """[n]: the likeliest true class; where it isn't the label, the label is a suspect."""
    arguments: dict[str, Any]
    """For :class:`RobustTrainingArguments`; empty where plain fine-tuning is enough."""
    reason: str
    """Why these."""
    seconds: dict[str, Size]
    """By stage."""
    label_column: str | None = None
    """The column of the labels; None from a file of an older version, which does not tell."""

    @property
    def suspects(self) -> npt.NDArray[np.int64]:
        """Positions in ``rows`` of the suspect labels, the most suspect first."""
        order = np.argsort(self.suspect_rank)
        chosen: npt.NDArray[np.int64] = order[self.suggested_label[order] != self.labels[order]]
        return chosen

    def annotate(self, dataset: Dataset) -> Dataset:
        """The data set with columns ``suspect_score``, ``suspect_rank`` and ``suggested_label``.

        Rows that were not looked at hold None.

        Raises:
            ValueError: a data set with fewer rows, with other labels (shuffled, for instance), or with one of these
                columns.
        """
        if len(dataset) <= self.rows.max():
            raise ValueError(
                f"dataset has {len(dataset)} rows, but row {self.rows.max()} was diagnosed; give the same data set"
            )
        if self.label_column is not None:
            labels, _ = read_labels(dataset, self.label_column)
            if others := int((labels[self.rows] != self.labels).sum()):
                raise ValueError(
                    f"label_column '{self.label_column}' of dataset differs from the labels diagnosed in {others} of "
                    f"{len(self.rows)} rows; give the data set as it was then: not shuffled, filtered or relabelled"
                )
        columns = {
            "suspect_score": (self.suspect_score, Value("float64")),
            "suspect_rank": (self.suspect_rank, Value("int64")),
            "suggested_label": (self.suggested_label, ClassLabel(names=list(self.classes))),
        }
        for name, (values, feature) in columns.items():
            if name in dataset.column_names:
                raise ValueError(f"dataset has a column '{name}' already; remove it: dataset.remove_columns('{name}')")
            column: list[Any] = [None] * len(dataset)
            for row, value in zip(self.rows.tolist(), values.tolist(), strict=True):
                column[row] = value
            dataset = dataset.add_column(name, column, feature=feature)
        return dataset

    def summary(self) -> dict[str, Any]:
        """All but the figures of single examples, as what JSON holds."""
        return {
            "format": FORMAT,
            "model": self.model,
            "label_column": self.label_column,
            "classes": list(self.classes),
            "shape": self.shape,
            "explained": self.explained,
            "identifiable": self.identifiable,
            "suspects": len(self.suspects),
            "arguments": self.arguments,
            "reason": self.reason,
            "seconds": self.seconds,
            "estimate": self.estimate.to_dict(),
        }

    def save(self, folder: str | Path) -> Diagnosis:
        """Write ``diagnosis.json``, ``transition_estimate.json``, ``suspects.csv`` and (with matplotlib) ``T.png``.

        Returns:
            The same, with ``noise_transition`` (where it is recommended) naming the file written.
        """
        target = Path(folder)
        arguments = dict(self.arguments)
        if "noise_transition" in arguments:
            arguments["noise_transition"] = str(target / FILE)
        saved = replace(self, arguments=arguments)
        self.estimate.save(target / FILE)
        content = saved.summary() | {"examples": {name: getattr(self, name).tolist() for name in _PER_EXAMPLE}}
        with written_whole(target / "diagnosis.json") as temporary:
            temporary.write_text(json.dumps(content, allow_nan=False) + "\n", encoding="utf-8")
        self._write_suspects(target / "suspects.csv")
        save_heat_map(self.estimate.transition, self.classes, target / "T.png")
        return saved

    @classmethod
    def load(cls, folder: str | Path) -> Diagnosis:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: the folder holds no ``diagnosis.json``.
            ValueError: the file is something else.
        """
        path = Path(folder) / "diagnosis.json"
        try:
            content = read_json(path)
        except ValueError as error:
            raise ValueError(f"{path} is not JSON ({error}); give a folder that Diagnosis.save wrote") from None
        try:
            if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
                raise ValueError(f"its format is not {FORMAT}")
            examples, counted = content.pop("examples", None), content.pop("suspects", None)
            if not isinstance(examples, dict) or set(examples) != set(_PER_EXAMPLE):
                raise ValueError(f"examples is no object with the keys {', '.join(_PER_EXAMPLE)}")
            found = cls(**checked_fields(cls, {**content, **examples}))
            found._check(counted)
        except ValueError as error:
            raise ValueError(f"{path} holds no diagnosis ({error}); give a folder that Diagnosis.save wrote") from None
        return found

    def _check(self, suspects: Any) -> None:
        """Raise ``ValueError`` unless the parts fit each other."""
        n, classes = len(self.rows), len(self.classes)
        if self.shape not in SHAPES:
            raise ValueError(f"shape is {self.shape!a:.60}; it is one of {', '.join(SHAPES)}")
        if len(self.estimate.transition) != classes:
            raise ValueError(f"estimate is of {len(self.estimate.transition)} classes, but classes has {classes}")
        if unknown := set(self.arguments) - set(RECOMMENDED):
            raise ValueError(f"arguments has {sorted(unknown)[0]!a:.60}, which is never recommended")
        for name in _PER_EXAMPLE:
            if (shape := getattr(self, name).shape) != (n,) or not n:
                raise ValueError(f"{name} has shape {shape}; it has one number for each of rows, at least one")
        for name in ("labels", "suggested_label"):
            check_labels(getattr(self, name), classes)
        if (self.rows < 0).any() or len(np.unique(self.rows)) < n:
            raise ValueError("rows holds a negative one, or one twice")
        if not np.array_equal(np.sort(self.suspect_rank), np.arange(1, n + 1)):
            raise ValueError(f"suspect_rank does not number the examples from 1 to {n}")
        if suspects != len(self.suspects):
            raise ValueError(f"suspects is {suspects!a:.60}, but there are {len(self.suspects)}")

    def _write_suspects(self, path: Path) -> None:
        with written_whole(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["suspect_rank", "row", "label", "suggested_label", "suspect_score"])
            for i in self.suspects:
                names = (self.classes[self.labels[i]], self.classes[self.suggested_label[i]])
                writer.writerow([self.suspect_rank[i], self.rows[i], *names, f"{self.suspect_score[i]:.6f}"])

    def __str__(self) -> str:
        found = self.estimate
        low, high = found.noise_rate_interval
        few = [self.classes[k] for k in np.flatnonzero(found.effective_counts < FEW_EXAMPLES)]
        lines = [
            f"{len(self.rows)} examples of {len(self.classes)} classes, {self.model}",
            f"Noise       {found.noise_rate:.1%} of the labels are wrong (95 % interval {low:.1%} to {high:.1%})",
            f"Shape       {SHAPES[self.shape]}"
            + (f" ({self.explained:.0%} of them)" if self.explained < 1 else "")
            + f"; class-conditional test p = {found.class_conditional_p_value:.2g}, "
            f"effect {found.class_conditional_effect:.2f}",
            f"Correction  {'possible' if self.identifiable else 'no inverse: T may be singular'} (condition number "
            f"{found.condition_number:.3g}, {found.effective_counts.min():.0f} sure examples of the rarest class)",
        ]
        if few:
            lines.append(f"            few sure examples of {', '.join(few[:10])}: their rows of T are rough")
        if self.shape not in ("none", "symmetric"):
            lines += ["", "Mistakes    true -> label", *self._mistakes()]
        lines += ["", f"Suspects    {len(self.suspects)} labels", *self._first_suspects()]
        lines += ["", f"Use         {self.reason}"]
        if self.arguments:
            lines += [f"            RobustTrainingArguments(…, {as_code(self.arguments)})"]
            lines += [f"            {as_flags(self.arguments)}"]
        return "\n".join(lines)

    def _mistakes(self) -> list[str]:
        """The most frequent ones."""
        matrix = self.estimate.transition
        count = self.estimate.clean_prior[:, None] * np.where(np.eye(len(matrix), dtype=bool), 0, matrix)
        lines = []
        for flat in np.argsort(-count, axis=None)[: min(PRINTED_MISTAKES, len(matrix) * (len(matrix) - 1))]:
            i, j = divmod(int(flat), len(matrix))
            low, high = self.estimate.interval[i, j]
            lines.append(f"  {matrix[i, j]:.1%} [{low:.1%}, {high:.1%}]  {self.classes[i]} -> {self.classes[j]}")
        return lines

    def _first_suspects(self) -> list[str]:
        first = self.suspects[:PRINTED_SUSPECTS]
        return [
            f"  row {self.rows[i]}  {self.classes[self.labels[i]]}, rather {self.classes[self.suggested_label[i]]}  "
            f"P(wrong) = {self.suspect_score[i]:.3f}"
            for i in first
        ]


_PER_EXAMPLE = ("rows", "labels", "suspect_score", "suspect_rank", "suggested_label")


def diagnose(
    model: str | Path | PreTrainedModel,
    dataset: Dataset,
    *,
    label_column: str = "label",
    image_column: str | None = None,
    text_column: str | Sequence[str] | None = None,
    processing_class: Any = None,
    image_size: int | None = None,
    max_examples: int | None = None,
    seed: int = 0,
) -> Diagnosis:
    """Diagnose the labels of a data set of images or texts with the frozen backbone of a pretrained model.

    T is estimated by :func:`estimate_transition` (joint likelihood, at most 10,000 examples, drawn by seed), suspects
    are ranked by :func:`rank_suspects`, and what to train with follows from T.

    Args:
        model: a folder, a Hub name, or a loaded model with a head (which is not used).
        dataset: of images or texts, and noisy labels: class labels, integers 0..K-1 or words (numbered in alphabetical
            order). -100 is no label.
        label_column: the column of the labels.
        image_column: the column of images, or of their file names. By default the only one.
        text_column: the column of texts, or two of them for pairs. By default the only one.
        processing_class: the image processor or tokenizer of a loaded model.
        image_size: pixels of each side. By default what the image processor says; the time on a CPU grows with its
            square, and 56 to 112 often do for features.
        max_examples: look at no more than so many, drawn by seed. By default at all.
        seed: of the draws, folds and bootstrap.

    Raises:
        ValueError: no ``datasets.Dataset``, a column that is missing, not clear or of another type, a missing image,
            labels that are no classes, fewer than two classes, a class without examples, fewer than 10 examples a class
            on average, max_examples below 1, a model without a backbone or of another kind.
        OSError: there is no such model.
    """
    labels, classes = read_labels(dataset, label_column)
    rows = labelled_rows(labels, max_examples, seed)
    labels = labels[rows]
    check_class_labels(labels, len(rows), len(classes), f"label_column '{label_column}'")
    if len(rows) < LEAST_EXAMPLES_A_CLASS * len(classes):
        raise ValueError(
            f"dataset has {len(rows)} labelled examples of {len(classes)} classes; a diagnosis needs at least "
            f"{LEAST_EXAMPLES_A_CLASS} a class, {LEAST_EXAMPLES_A_CLASS * len(classes)} in all. Give more examples"
        )
    _check_every_class(labels, classes, label_column)
    kind, columns = find_inputs(dataset, label_column, image_column, text_column)
    dataset = dataset.select(rows)

    clock = _Clock()
    if isinstance(model, str | Path):
        name = str(model)
        loaded, processor = load_backbone(model, kind, len(classes))
        loaded.to(default_device())
    else:
        name, loaded, processor = model.name_or_path or type(model).__name__, model, processing_class
        if processor is None:
            raise ValueError("processing_class is None; a loaded model needs its image processor or tokenizer")
    one_class_an_example(loaded, [label_column], "diagnose")
    backbone_of(loaded)
    clock.stage("load model")

    order = reading_order(dataset, kind, columns)
    batches = model_inputs(dataset, kind, columns, processor, image_size, order)
    found = frozen_features(loaded, batches, total=-(-len(order) // BATCH_SIZE)).double().numpy()
    features = np.empty_like(found)
    features[order] = found
    clock.stage("features")

    few = np.random.default_rng(seed).permutation(len(labels))[:MOST_EXAMPLES]
    estimate = estimate_transition(features[few], labels[few], num_classes=len(classes), seed=seed)
    clock.stage("estimate T")
    suspects = rank_suspects(features, labels, estimate.transition, seed=seed)
    clock.stage("rank suspects")

    shape, explained = _shape(estimate)
    layers, _ = find_layers(loaded)
    radius = radius_for([layer.name for layer in layers], kind == "text")
    arguments, reason = recommend(estimate, shape == "example_dependent", radius)
    return Diagnosis(
        model=name,
        classes=classes,
        shape=shape,
        explained=explained,
        identifiable=estimate.identifiable,
        estimate=estimate,
        rows=rows,
        labels=labels,
        suspect_score=suspects.score,
        suspect_rank=suspects.rank,
        suggested_label=suspects.suggested,
        arguments=arguments,
        reason=reason,
        seconds=clock.seconds,
        label_column=label_column,
    )


def _shape(estimate: TransitionEstimate) -> tuple[str, float]:
    """A key of ``SHAPES``, and the share of the wrong labels that it explains."""
    if estimate.noise_level == "none":
        return "none", 1.0
    # Both p and effect: with enough examples, the misfit of a linear head is significant, too.
    enough = estimate.n >= TESTED_EXAMPLES_A_CLASS * len(estimate.transition)
    if enough and estimate.class_conditional_p_value < LEVEL and estimate.class_conditional_effect >= NOTABLE_EFFECT:
        return "example_dependent", 1.0
    return noise_shape(estimate.transition, estimate.clean_prior)


def _check_every_class(labels: npt.NDArray[np.int64], classes: Sequence[str], column: str) -> None:
    """As :func:`check_every_class`, with the names."""
    try:
        check_every_class(labels, len(classes), f"label_column '{column}'")
    except ValueError as error:
        missing = np.flatnonzero(np.bincount(labels, minlength=len(classes)) == 0)[:10]
        names = ", ".join(classes[k] for k in missing)
        raise ValueError(f"{error} (named: {names})") from None


class _Clock:
    """Seconds of each stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def stage(self, name: str) -> None:
        """The stage that ends now."""
        now = time.perf_counter()
        self.seconds[name] = round(now - self._last, 3)
        self._last = now
