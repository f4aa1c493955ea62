"""What a measurement found, layer by layer; JSON out and in."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from ..files import written_whole
from ..layers import NotALayer
from ..stored import Count, Size, Within, checked_fields, in_json, read_json

FORMAT = "hf_robust_ft.HessianReport/1"


@dataclass(frozen=True)
class Statistic:
    """One number a layer and example, over all examples."""

    maximum: float
    example: Count
    """The one that attains the maximum, counted from 0 in the order of the dataloader."""
    mean: float
    standard_error: Size = field(metadata=in_json({None: math.nan}))
    """Of the mean, over examples; NaN for a single one."""


@dataclass(frozen=True)
class PositivePart:
    """``vᵀ H⁺ v`` by Lanczos, of the examples that can hold the maximum."""

    maximum: float
    """The largest value found."""
    example: Count
    gap: float
    """What half the Lanczos steps would have changed there: an indicator of convergence, not an error."""
    examples: Count
    """How many were looked at."""
    settled: bool
    """Whether no other example can hold a larger value: the sound bounds of all others are lower."""


@dataclass(frozen=True)
class LayerCurvature:
    """One layer, with ``v = vec(W - W_ref)`` and H the Hessian of one example's loss in this layer alone."""

    name: str
    members: tuple[str, ...]
    """The weights that form it."""
    distance: Size
    """``‖v‖``."""
    hessian: Statistic
    """``vᵀ H v``."""
    upper: Statistic
    """``½ (vᵀ H v + ‖P v‖ ‖H v‖)``, at least ``vᵀ H⁺ v`` for every example; see :func:`measure_hessian`."""
    positive: PositivePart | None
    """None: no example was looked at within the time."""


@dataclass(frozen=True)
class HessianReport:
    """What :func:`measure_hessian` found."""

    layers: tuple[LayerCurvature, ...]
    left_out: tuple[NotALayer, ...]
    """Every trained parameter that belongs to no measured layer, and why."""
    examples: Annotated[int, Within(1)]
    losses: Statistic
    smallest_loss: float
    lanczos_steps: Count
    complete: bool
    """False: stopped before the end of the data."""
    seconds: Size
    estimated_seconds: Size
    """For the sound bounds, as told before the start."""
    notes: tuple[str, ...]
    """What autograd did in place of the sweep, and why."""

    @property
    def settled(self) -> float:
        """Share of the layers whose largest ``vᵀ H⁺ v`` is known, up to the convergence of Lanczos."""
        return sum(layer.positive is not None and layer.positive.settled for layer in self.layers) / len(self.layers)

    def __str__(self) -> str:
        """A table, one line a layer; ``≥`` where a larger ``vᵀ H⁺ v`` is possible."""
        head = ("layer", "distance", "max vᵀHv", "max vᵀH⁺v", "bound", "example")
        rows = [head]
        for layer in self.layers:
            best = layer.positive
            found = "not measured" if best is None else f"{'' if best.settled else '≥ '}{best.maximum:.4g}"
            numbers = (f"{layer.distance:.4g}", f"{layer.hessian.maximum:.4g}", found, f"{layer.upper.maximum:.4g}")
            rows.append((layer.name, *numbers, str(layer.upper.example if best is None else best.example)))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        loss = f"loss {self.losses.mean:.4g} ± {self.losses.standard_error:.2g}, at most {self.losses.maximum:.4g}"
        stopped = "" if self.complete else ", stopped early"
        lines.append(f"{self.examples} examples{stopped}; {loss}; {self.settled:.0%} of the layers settled")
        return "\n".join(lines)

    def save(self, path: str | Path) -> None:
        """Write JSON; a reader never sees half of it."""
        # JSON has no NaN: the standard error of one example is null.
        content = json.dumps({"format": FORMAT, **_without_nan(dataclasses.asdict(self))}, indent=1, allow_nan=False)
        with written_whole(Path(path)) as temporary:
            temporary.write_text(content + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> HessianReport:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: the file is no such report, or one of another format.
            OSError: it can't be read.
        """
        try:
            found = read_json(path)
            written = found.pop("format", None) if isinstance(found, dict) else None
            if written == FORMAT:
                report = cls(**checked_fields(cls, found))
                report._check_examples()
                return report
        except ValueError as error:
            raise ValueError(f"{path} is no report of measure_hessian ({error}): measure again") from error
        if isinstance(written, str) and written.startswith(FORMAT.partition("/")[0]):
            raise ValueError(
                f"{path} is written as {written:.60}, and this version of hf_robust_ft reads {FORMAT}: measure again, "
                "or read it with the version that wrote it"
            )
        raise ValueError(f"{path} is no report of measure_hessian (its format is not {FORMAT}): measure again")

    def _check_examples(self) -> None:
        """Raise ``ValueError`` unless there are layers, and every example that is named was looked at."""
        if not self.layers:
            raise ValueError("layers is empty")
        named = [self.losses.example]
        for layer in self.layers:
            named += [layer.hessian.example, layer.upper.example]
            named += [] if layer.positive is None else [layer.positive.example]
        if max(named) >= self.examples:
            raise ValueError(f"example {max(named)} is named, but examples is {self.examples}")


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
