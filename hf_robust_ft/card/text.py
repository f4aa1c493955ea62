"""Names and numbers as they stand in a card: whatever they hold, they stay text in their cell."""

from __future__ import annotations

import math
import re
import unicodedata
from typing import Any

NOT_MEASURED = "not measured"
LONGEST = 100

# Character references can't start markup, so they are right in paragraphs, table cells and HTML alike.
MARKUP = re.compile(
    r"[&<>\"`*\[\]|\\~$@#!^]|(?<![^\W_])_|_(?![^\W_])|:(?=//)|(?<=www)\.|^[-+=]|^\d{1,9}[.)](?=\s|$)", re.I
)


class Markup(str):
    """Text that is markdown already."""


def escaped(value: Any) -> str:
    """One line of text that no renderer takes for markup, cut at 100 characters; None reads "not measured"."""
    if isinstance(value, Markup):
        return value
    if value is None:
        return NOT_MEASURED
    text = one_line(value)
    if len(text) > LONGEST:
        text = text[: LONGEST - 1] + "…"
    return _as_references(text)


def whole(value: Any) -> Markup:
    """As :func:`escaped`, however long: for sentences."""
    return Markup(_as_references(one_line(value)))


def _as_references(text: str) -> str:
    return MARKUP.sub(lambda found: "".join(f"&#{ord(c)};" for c in found.group()), text)


def one_line(value: Any) -> str:
    """Without line breaks, control characters and what turns the direction of writing."""
    kept = "".join(" " if unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp", "Cs") else c for c in str(value))
    return " ".join(kept.split())


def number(value: float | None, digits: int = 4) -> str:
    """Four significant digits."""
    if value is None:
        return NOT_MEASURED
    if math.isinf(value):
        return "beyond floats" if value > 0 else "0"
    return f"{value:.{digits}g}"


def percent(value: float | None) -> str:
    """One decimal."""
    return NOT_MEASURED if value is None else f"{100 * value:.1f} %"


def duration(seconds: float | None) -> str:
    """Seconds, or minutes where there are many."""
    if seconds is None:
        return NOT_MEASURED
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def fenced(text: str, language: str = "") -> Markup:
    """A block of code that nothing in it can end."""
    text = text.replace("<!--", "<! --")  # the marks of a section are comments
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return Markup(f"{fence}{language}\n{text}\n{fence}")
