"""All that a card prints, as what JSON can hold."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..bounds.bound import Bound
from ..constraints import ConstraintRow
from ..files import written_whole
from ..noise import validate_transition
from ..risks import MeasuredRisk
from ..stored import Count, Share, Size, checked_fields, read_json

FILE = "robust_card.json"
FORMAT = "hf_robust_ft.CardData/1"


@dataclass
class CardData:
    """What is known of a model, in three strata. What is None or empty reads "not measured"."""

    # Given by the user

    model_name: str | None = None
    description: str | None = None
    """A sentence or two of what the model is for."""
    language: list[str] = field(default_factory=list)
    license: str | None = None
    tags: list[str] = field(default_factory=list)
    datasets: list[str] = field(default_factory=list)
    """Names to read."""
    dataset_ids: list[str] = field(default_factory=list)
    """Names on the Hub."""
    dataset_args: list[str] = field(default_factory=list)
    """Their configurations."""
    limits: list[str] = field(default_factory=list)
    """Beside those that follow from what was measured."""
    other_bounds: list[Bound] = field(default_factory=list)
    """From elsewhere: held-out estimates, PAC-Bayes certificates."""

    # Filled by the Trainer

    base_model: str | None = None
    """A name on the Hub; of a local folder its last part, with words that make it no such name."""
    model_class: str | None = None
    tasks: list[str] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    trained_parameters: Count | None = None
    training_examples: Count | None = None
    metrics: dict[str, float | None] = field(default_factory=dict)
    """Of these weights, with prefixes such as ``eval_``; None for what was not a finite number."""
    metric_labels: dict[str, str] = field(default_factory=dict)
    """Prefix of metrics → ``"noisy"``, ``"clean"`` or ``"as given"``."""
    selected_by: str | None = None
    """The metric that the epoch was chosen by."""
    correction: str | None = None
    noise_source: str | None = None
    """How T was got; None without a noise model."""
    transition: list[list[float]] | None = None
    """T, up to 100 classes."""
    noise_rate: Share | None = None
    """By T, of classes that are equally frequent."""
    condition_number: Size | None = None
    """Like ``amplification`` None where T can't be inverted, though ``noise_rate`` is known."""
    amplification: Size | None = None
    constraints: list[ConstraintRow] = field(default_factory=list)
    """Empty where no layer was constrained."""
    radius_choice: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    """Those that are not the defaults."""

    # Computed once

    report: str | None = None
    """Name of the Hessian report beside this file."""
    estimate: str | None = None
    """Name of the transition estimate beside this file."""
    reference: str | None = None
    """What distances are measured from."""
    bounds: list[Bound] = field(default_factory=list)
    risks: list[MeasuredRisk] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    """What was run, without secrets."""
    seeds: dict[str, int] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    hardware: str | None = None
    train_seconds: Size | None = None
    measured_by: list[str] = field(default_factory=list)
    """What measured a model that was trained by another command."""

    @property
    def training_known(self) -> bool:
        """Whether this package's Trainer filled the card: else losses and constraints of the training are not known."""
        return self.correction is not None

    def save(self, path: str | Path) -> None:
        """Write JSON; a reader never sees half of it. NaN becomes null, numpy's numbers Python's."""
        content = {name: value for name, value in asdict(self).items() if name not in ("bounds", "other_bounds")}
        content["bounds"] = [bound.to_dict() for bound in self.bounds]
        content["other_bounds"] = [bound.to_dict() for bound in self.other_bounds]
        text = json.dumps(plain({"format": FORMAT, **content}), indent=1, allow_nan=False, ensure_ascii=False)
        with written_whole(Path(path)) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> CardData:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: the file is something else, or of another format.
            OSError: there is no such file.
        """
        try:
            content = read_json(path)
            written = content.pop("format", None) if isinstance(content, dict) else None
            if written != FORMAT:
                named = f"{written:.60}" if isinstance(written, str) else "something else"
                raise ValueError(f"it is written as {named}, and this version of hf_robust_ft reads {FORMAT}")
            data = cls(**checked_fields(cls, content))
            if data.transition is not None:
                validate_transition(data.transition)
            return data
        except ValueError as error:
            raise ValueError(
                f"{path} holds no card of this version ({error}): make the card again with "
                "trainer.create_model_card() or hf-robust-ft measure"
            ) from error


def plain(value: Any) -> Any:
    """The same as what JSON can hold: numpy's numbers as Python's, numbers that are not finite as None."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)
