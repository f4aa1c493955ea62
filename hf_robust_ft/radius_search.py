"""``layer_radius="auto"``: one training a candidate, scored on noisy validation labels; the best radius is kept.

Source: Ju, Li & Zhang 2022 take the radius of algorithm 1 from a validation set; scores on noisy labels as in
:mod:`hf_robust_ft.clean_accuracy`.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from torch import nn
from tqdm.auto import tqdm
from transformers import TrainingArguments

from .arguments import AUTO
from .corrected_loss import loss_type
from .features import make_constraints, num_classes, one_class_an_example
from .files import written_whole
from .noise import IGNORE_INDEX, check_labels, invert_transition, load_transition, read_transition
from .sharding import has_shards
from .stored import Size, Within, checked_fields, in_json, read_json

logger = logging.getLogger(__name__)

FILE = "radius_choice.json"

# Shares of the norm of each layer's pretrained weights, so that one grid serves layers and models of any size. 0.01 was
# best on images under noise, and on texts nothing from 0.01 on could be told from none (recipes/RESULTS.md); 0.003 is
# for heavier noise. A factor of three, as accuracy changes slowly with the radius while every candidate costs a
# training. And no constraint at all, which clean labels want.
CANDIDATES = (0.003, 0.01, 0.03, math.inf)

Scores = npt.NDArray[np.float64]


@dataclass(frozen=True)
class RadiusCandidate:
    """One training of the search."""

    radius: Size = field(metadata=in_json({None: math.inf}))
    """Relative to the norm of each layer's pretrained weights; infinite for no constraint."""
    score: float
    """Mean over the examples. Flattered if it is the best one: it was chosen by it."""
    standard_error: Size
    """Of the score, over examples, T taken as known. Not over seeds."""
    behind: float
    """How far the score lies below the best one, on the same examples."""
    behind_error: Size
    """Standard error of that difference, over examples: smaller than those of the two scores, as they share most of
    their predictions."""


@dataclass(frozen=True)
class RadiusChoice:
    """The radius that was chosen, and from what."""

    radius: Size = field(metadata=in_json({None: math.inf}))
    candidates: tuple[RadiusCandidate, ...]
    """In the order of their radii."""
    score: str
    """``"clean_accuracy"`` (estimated from noisy labels and T) or ``"accuracy"`` (on the labels as they are)."""
    n: Annotated[int, Within(1)]
    """Number of validation examples."""
    seed: int
    """Of each training."""

    def __str__(self) -> str:
        lines = [f"layer_radius='{AUTO}': {self.radius:g} of each layer's norm, by {self.score} on {self.n} examples"]
        for c in self.candidates:
            behind = f"{c.behind:.4f} ± {c.behind_error:.4f} behind" if c.behind else "the best"
            lines.append(f"  {c.radius:g}: {c.score:.4f} ± {c.standard_error:.4f}, {behind}")
        return "\n".join(lines)

    def save(self, path: str | Path) -> None:
        """Write JSON, with ``null`` for infinity; a reader never sees half of it."""
        content = asdict(self)
        for row in (content, *content["candidates"]):
            row["radius"] = None if math.isinf(row["radius"]) else row["radius"]
        with written_whole(Path(path)) as temporary:
            temporary.write_text(json.dumps(content, indent=2, allow_nan=False), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> RadiusChoice:
        """Read what :meth:`save` writes.

        Raises:
            ValueError: there is no such file, or it is damaged.
        """
        remedy = f"give the radius itself (layer_radius=0.01, radius_mode='relative') instead of '{AUTO}'"
        try:
            choice = cls(**checked_fields(cls, read_json(path)))
            if choice.radius not in [each.radius for each in choice.candidates]:
                raise ValueError(f"the radius {choice.radius:g} is none of the candidates")
            return choice
        except FileNotFoundError:
            raise ValueError(
                f"layer_radius='{AUTO}', but {path} is missing, so the radius of this run is not known; put the file "
                f"back, or {remedy}"
            ) from None
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}); restore it, or {remedy}") from None


def search_radius(
    train_and_score: Callable[[float], Scores],
    *,
    score: str,
    seed: int,
    candidates: Sequence[float] = CANDIDATES,
    show_progress: bool = False,
) -> RadiusChoice:
    """Train with each radius; choose the one with the best mean score, of equal ones the smallest.

    The best, and not the smallest within one standard error of it: with 500 noisy labels the standard error of a
    difference is 2 points, and that rule pays them for a preference that accuracy does not share.

    Args:
        train_and_score: trains from the same start with a relative radius, and returns a score of each validation
            example, [n]: the same examples in the same order each time, the mean an estimate of accuracy.
        score: what the scores are, for the record.
        seed: of each training, for the record.
        candidates: relative radii, rising.
        show_progress: whether a bar shows which training runs.

    Raises:
        Whatever ``train_and_score`` raises, with a note of what had been found.
    """
    found: dict[float, Scores] = {}
    with tqdm(candidates, desc=f"layer_radius='{AUTO}'", unit="training", disable=not show_progress) as bar:
        for radius in bar:
            try:
                found[radius] = train_and_score(radius)
            except (Exception, KeyboardInterrupt) as error:
                error.add_note(_stopped(radius, found, len(candidates)))
                raise
            bar.set_postfix({f"{r:g}": f"{s.mean():.3f}" for r, s in found.items()})
            logger.info("layer_radius='%s': %s = %.4f at %g", AUTO, score, found[radius].mean(), radius)
    best = found[max(found, key=lambda radius: (found[radius].mean(), -radius))]
    rows = tuple(
        RadiusCandidate(radius, *_mean_and_error(scores), *_mean_and_error(best - scores))
        for radius, scores in found.items()
    )
    chosen = next(row.radius for row in rows if found[row.radius] is best)
    choice = RadiusChoice(chosen, rows, score, len(best), seed)
    logger.info("%s", choice)
    if any(row.score - 3 * row.standard_error > 1 for row in rows):
        logger.warning(
            "layer_radius='%s': the labels of eval_dataset contradict noise_transition, as accuracy would be above 1. "
            "If they are clean, set eval_labels='clean'",
            AUTO,
        )
    return choice


def example_scores(labels: npt.ArrayLike, predictions: npt.ArrayLike, transition: Any, num_classes: int) -> Scores:
    """A score of each example whose mean is the accuracy: ``T^-1[ỹ, pred]``, or without T 1 if right and 0 if wrong.

    Args:
        labels, predictions: class indices, [n]; examples of label -100 are left out.
        transition: what :func:`~hf_robust_ft.noise.load_transition` reads; None for labels taken as they are.

    Raises:
        ValueError: a label outside 0..K-1, no label at all, or a T that is singular.
    """
    given, chosen = np.asarray(labels), np.asarray(predictions)
    kept = given != IGNORE_INDEX
    given, chosen = given[kept], chosen[kept]
    if not len(given):
        raise ValueError(f"layer_radius='{AUTO}' needs labels, but eval_dataset holds {IGNORE_INDEX} only; label it")
    check_labels(given, num_classes)
    matrix = np.eye(num_classes) if transition is None else load_transition(transition, num_classes)
    scores: Scores = invert_transition(matrix).matrix[given, chosen]
    return scores


def validation_set(
    args: TrainingArguments,
    model: nn.Module,
    label_names: list[str],
    eval_dataset: Any,
    transition: Any,
    sharded_by: str | None = None,
    awaits_shards: bool = False,
) -> tuple[Any, str]:
    """The data set that the candidates are scored on, and the prefix of its metrics; or a refusal of the search.

    Of several it is the one that ``metric_for_best_model`` names (``eval_NAME_…``).

    Args:
        transition: the noise model of the labels, None if they are taken as they are.
        sharded_by: see :func:`~hf_robust_ft.features.make_constraints`.
        awaits_shards: whether the model will be sharded when its training begins.

    Raises:
        ValueError: no data set, or one of several to be named; a model that does not predict one class an example, or
            without a layer to constrain; a singular T; what :class:`~hf_robust_ft.LayerConstraints` refuses.
    """
    asked = f"layer_radius='{AUTO}'"
    dataset, prefix = eval_dataset, "eval"
    if isinstance(eval_dataset, dict):
        metric = (args.metric_for_best_model or "").removeprefix("eval_")
        named = [name for name in eval_dataset if metric.startswith(f"{name}_") or len(eval_dataset) == 1]
        if not named:
            raise ValueError(
                f"{asked} scores on one data set, but eval_dataset has {', '.join(map(repr, eval_dataset))} and "
                f"metric_for_best_model is {args.metric_for_best_model!r}; name one in it, as in "
                f"'eval_{next(iter(eval_dataset), 'NAME')}_loss', or give one data set"
            )
        name = max(named, key=len)
        dataset, prefix = eval_dataset[name], f"eval_{name}"
    if dataset is None:
        raise ValueError(
            f"{asked} chooses on validation examples, which may be noisy, but eval_dataset is None; give one, or a "
            "radius such as layer_radius=0.01 with radius_mode='relative'"
        )
    if awaits_shards or has_shards(model):
        raise ValueError(
            f"{asked} trains several times from the same weights, which it can't do with a sharded model; choose on a "
            "whole one, or give a radius such as layer_radius=0.01 with radius_mode='relative'"
        )
    one_class_an_example(model, label_names, asked)
    classes = num_classes(model, loss_type(model))
    if transition is not None and (noise := read_transition(transition)) is not None and classes is not None:
        invert_transition(load_transition(noise, classes))
    if not make_constraints(args, model, sharded_by=sharded_by, chosen=CANDIDATES[0]):
        raise ValueError(
            f"{asked} has no layer to constrain: every trained weight matrix of this model is freshly initialised. "
            "Give a pretrained model, or set layer_radius=None"
        )
    return dataset, prefix


def _mean_and_error(values: Scores) -> tuple[float, float]:
    """The mean and its standard error, which of a single example is not known: infinite would be no JSON, so 0."""
    spread = float(values.std(ddof=1)) if len(values) > 1 else 0.0
    return float(values.mean()), spread / math.sqrt(len(values))


def _stopped(radius: float, found: dict[float, Scores], total: int) -> str:
    scores = ", ".join(f"{scores.mean():.4f} at {r:g}" for r, scores in found.items()) or "nothing"
    return (
        f"layer_radius='{AUTO}' was stopped in training {len(found) + 1} of {total}, with a radius of {radius:g}. The "
        f"model has its weights from before. Found so far: {scores}. To go on without a search, give a radius with "
        "radius_mode='relative'"
    )
