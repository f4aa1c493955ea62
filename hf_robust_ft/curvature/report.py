"""What a measurement found, layer by layer; JSON out and in."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..fields import check_fields
from ..files import written_whole
from ..layers import NotALayer

FORMAT = "hf_robust_ft.HessianReport/1"


@dataclass(frozen=True)
class Statistic:
    """One number a layer and example, over all examples."""

    maximum: float
    example: int
    """The one that attains the maximum, counted from 0 in the order of the dataloader."""
    mean: float
    standard_error: float
    """Of the mean, over examples; NaN for a single one."""


@dataclass(frozen=True)
class PositivePart:
    """``vᵀ H⁺ v`` by Lanczos, of the examples that can hold the maximum."""

    maximum: float
    """The largest value found."""
    example: int
    gap: float
    """What half the Lanczos steps would have changed there: an indicator of convergence, not an error."""
    examples: int
    """How many were looked at."""
    settled: bool
    """Whether no other example can hold a larger value: the sound bounds of all others are lower."""


@dataclass(frozen=True)
class LayerCurvature:
    """One layer, with ``v = vec(W - W_ref)`` and H the Hessian of one example's loss in this layer alone."""

    name: str
    members: tuple[str, ...]
    """The weights that form it."""
    distance: float
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
    examples: int
    losses: Statistic
    smallest_loss: float
    lanczos_steps: int
    complete: bool
    """False: stopped before the end of the data."""
    seconds: float
    estimated_seconds: float
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
        """
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
            if (written := str(found.pop("format"))) != FORMAT:
                if not written.startswith(FORMAT.partition("/")[0]):
                    raise TypeError(f"its format is {written[:60]}")
                raise ValueError(
                    f"{path} is written as {written}, and this version of hf_robust_ft reads {FORMAT}: measure again, "
                    "or read it with the version that wrote it"
                )
            report = cls(
                **{
                    **found,
                    "layers": tuple(_layer(layer) for layer in found["layers"]),
                    "left_out": tuple(
                        NotALayer(**{**other, "shape": tuple(other["shape"])}) for other in found["left_out"]
                    ),
                    "losses": _statistic(found["losses"]),
                    "notes": tuple(found["notes"]),
                }
            )
            check_fields(report)
            return report
        except (AttributeError, KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is no report of measure_hessian ({error!r}): measure again") from error


def _layer(found: dict[str, Any]) -> LayerCurvature:
    positive = found["positive"]
    return LayerCurvature(
        **{
            **found,
            "members": tuple(found["members"]),
            "hessian": _statistic(found["hessian"]),
            "upper": _statistic(found["upper"]),
            "positive": None if positive is None else PositivePart(**positive),
        }
    )


def _statistic(found: dict[str, Any]) -> Statistic:
    return Statistic(
        **{**found, "standard_error": math.nan if found["standard_error"] is None else found["standard_error"]}
    )


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
