"""One figure that says how far a model can be trusted, with all that it rests on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from ..stored import Count, Share, checked_fields, in_json

Kind = Literal["certificate", "estimate", "measure"]
KINDS = get_args(Kind)
INFINITE = in_json({"inf": math.inf, "-inf": -math.inf})


@dataclass(frozen=True)
class Bound:
    """A bound or measure of generalization.

    Three kinds. A *certificate* is a theorem's bound with every constant in it: it holds with the stated confidence,
    however loose it is. An *estimate* may be off in a way that its assumptions name. A *measure* is known up to
    constants and orders models of one kind; its scale means nothing.
    """

    name: str
    value: float | None = field(metadata=INFINITE)
    """None: not measured; ``assumptions`` says what is missing. Infinite: beyond the range of floats."""
    kind: Kind
    bounds_what: str
    """The quantity that ``value`` speaks of, such as ``"error on clean labels"``."""
    terms: Mapping[str, float] = field(default_factory=dict, metadata=INFINITE)
    """What the value is made of; by itself enough to compute it again."""
    assumptions: tuple[str, ...] = ()
    source: str = ""
    """Paper and theorem."""
    confidence: Share | None = None
    """Probability that the statement holds, over the draw of the examples; None where there is none."""
    n: Count | None = None
    """Examples that the statement counts."""
    seed: int | None = None
    """Of the random draws that went into the value; None if there were none."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind is {self.kind!r}; choose one of {', '.join(map(repr, KINDS))}")
        for name, number in {"value": self.value, **self.terms}.items():
            if number is not None and math.isnan(number):
                raise ValueError(f"{name} of the bound {self.name!r} is NaN; a value that is not known is None")

    def to_dict(self) -> dict[str, Any]:
        """All fields as what JSON can hold; an infinite number becomes the text ``"inf"``."""
        content = asdict(self)
        content["value"] = _written(self.value)
        content["terms"] = {name: _written(number) for name, number in self.terms.items()}
        content["assumptions"] = list(self.assumptions)
        return content

    @classmethod
    def from_dict(cls, content: Any, source: str = "this") -> Bound:
        """From what :meth:`to_dict` gave.

        Args:
            source: what the error calls it.

        Raises:
            ValueError: it is something else.
        """
        try:
            return cls(**checked_fields(cls, content))
        except ValueError as error:
            raise ValueError(f"{source} is no bound; give what Bound.to_dict gave ({error})") from None

    def __str__(self) -> str:
        if self.value is None:
            value = f"not measured ({'; '.join(self.assumptions)})"
        else:
            sure = "" if self.confidence is None else f", with probability {self.confidence:.4g}"
            value = f"{self.value:.4g} ({self.kind}{sure})"
        return f"{self.name}: {self.bounds_what} {value}"


def _written(number: float | None) -> float | str | None:
    return str(number) if number is not None and math.isinf(number) else number


def check_count(n: int, least: int = 1) -> int:
    """``n`` as it is.

    Raises:
        ValueError: not a whole number, or below ``least``.
    """
    if isinstance(n, bool) or int(n) != n or n < least:
        raise ValueError(f"n is {n}; give the number of training examples, at least {least}")
    return int(n)
