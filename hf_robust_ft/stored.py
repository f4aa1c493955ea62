"""JSON that anybody may have written: parsed strictly, then checked by the types of a dataclass, field by field."""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np

# Whole numbers beyond these have no place in a tensor, and need not fit a float.
LEAST_INT, MOST_INT = -(2**63), 2**63 - 1
# Of what has no type of its own, such as the arguments in a card.
DEEPEST = 20


@dataclass(frozen=True)
class Within:
    """Of a number: where it lies."""

    low: float
    high: float = math.inf


Count = Annotated[int, Within(0)]
Size = Annotated[float, Within(0)]
Share = Annotated[float, Within(0, 1)]


def in_json(instead: Mapping[Any, float]) -> dict[str, Any]:
    """Metadata of a field with numbers that JSON doesn't have: what is written → the number."""
    return {"in_json": dict(instead)}


def read_json(path: str | Path) -> Any:
    """The content of a JSON file.

    Raises:
        ValueError: it is no JSON; see :func:`parse_json`.
        OSError: it can't be read.
    """
    return parse_json(Path(path).read_text(encoding="utf-8"))


def parse_json(text: str) -> Any:
    """What a JSON text says.

    Raises:
        ValueError: it is no JSON, or says something that Python's parser lets through: NaN, infinite numbers, the same
            key twice; or it is nested so deeply that no parser can follow.
    """
    try:
        return json.loads(text, object_pairs_hook=_once, parse_float=_finite, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r:.60} stands there twice")
    return found


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {text:.60} is too large")
    return value


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is no JSON number")


def checked_fields(kind: type, content: Any, where: str = "") -> dict[str, Any]:
    """The fields of a dataclass from a JSON object, each of its type, for the constructor.

    A class with a ``from_dict`` makes itself; other dataclasses are made of their fields. Fields that have defaults may
    be missing. Numbers are finite, unless their field says otherwise (:func:`in_json`).

    Args:
        kind: the dataclass.
        content: what the parser gave.
        where: what the error calls the object, with a trailing dot.

    Raises:
        ValueError: something is missing, unknown or of another type.
    """
    if not isinstance(content, Mapping):
        raise ValueError(f"{where.rstrip('.') or 'the whole'} is {_short(content)}, not an object with keys")
    known, hints = {each.name: each for each in fields(kind)}, _hints(kind)
    if unknown := [key for key in content if key not in known]:
        raise ValueError(f"{where.rstrip('.') or 'it'} has the unknown keys {', '.join(map(_short, unknown[:5]))}")
    missing = [name for name, each in known.items() if name not in content and not _has_default(each)]
    if missing:
        raise ValueError(f"{where.rstrip('.') or 'it'} lacks {', '.join(missing[:5])}: missing keys")
    return {
        name: checked(hints[name], value, f"{where}{name}", known[name].metadata.get("in_json", {}))
        for name, value in content.items()
    }


def checked(kind: Any, value: Any, where: str, instead: Mapping[Any, float] | None = None) -> Any:
    """A JSON value as a type says; see :func:`checked_fields`.

    Raises:
        ValueError: it is something else; the message names ``where``.
    """
    instead = instead or {}
    if instead and (value is None or isinstance(value, str)) and value in instead:
        return instead[value]
    origin, parts = get_origin(kind), get_args(kind)
    if hasattr(origin, "__value__"):  # "type NDArray[...] = ...", as numpy 2.5 has it from Python 3.12 on
        return checked(origin.__value__[parts], value, where, instead)
    if origin is Annotated:
        return _within(checked(parts[0], value, where, instead), where, parts[1:])
    if origin in (Union, UnionType):
        return _one_of(parts, value, where, instead)
    if origin is Literal:
        if not isinstance(value, str) or value not in parts:
            raise ValueError(f"{where} is {_short(value)}; it is one of {', '.join(map(repr, parts))}")
        return value
    if origin is np.ndarray:
        return _array(value, where, np.dtype(get_args(parts[1])[0]))
    if origin in (list, tuple):
        return _sequence(origin, parts, value, where, instead)
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise _wrong(where, value, "an object with keys")
        _, inner = parts
        return {_text(k, where): checked(inner, v, f"{where}[{_short(k)}]", instead) for k, v in value.items()}
    if kind is Any:
        return _any(value, where)
    if is_dataclass(kind) and isinstance(kind, type):
        made: Any = getattr(kind, "from_dict", None)
        return made(value, where) if made is not None else kind(**checked_fields(kind, value, f"{where}."))
    return _scalar(kind, value, where)


def _scalar(kind: Any, value: Any, where: str) -> Any:
    if kind is str:
        return _text(value, where)
    if kind is bool:
        if not isinstance(value, bool):
            raise _wrong(where, value, "true or false")
        return value
    if kind in (int, float):
        if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float):
            raise _wrong(where, value, "a whole number" if kind is int else "a number")
        if (isinstance(value, int) and not LEAST_INT <= value <= MOST_INT) or not math.isfinite(value):
            raise _wrong(where, value, "a finite number of 64 bits")
        return value  # a whole number is a float, too
    raise TypeError(f"{where} has the type {kind}, which no file is read into")


def _one_of(kinds: tuple[Any, ...], value: Any, where: str, instead: Mapping[Any, float]) -> Any:
    if value is None and NoneType in kinds:
        return None
    others = [kind for kind in kinds if kind is not NoneType]
    for kind in others[:-1]:
        try:
            return checked(kind, value, where, instead)
        except ValueError:
            continue
    return checked(others[-1], value, where, instead)


def _sequence(origin: Any, kinds: tuple[Any, ...], value: Any, where: str, instead: Mapping[Any, float]) -> Any:
    if not isinstance(value, list | tuple):
        raise _wrong(where, value, "a list")
    each = kinds[:1] * len(value) if origin is list or kinds[1:] == (...,) else kinds
    if len(each) != len(value):
        raise ValueError(f"{where} has {len(value)} entries; it has {len(each)}")
    return origin(
        checked(kind, item, f"{where}[{i}]", instead) for i, (kind, item) in enumerate(zip(each, value, strict=True))
    )


def _array(value: Any, where: str, dtype: np.dtype[Any]) -> Any:
    """Nested lists of numbers; numpy alone would read booleans, and strings that spell numbers, too."""
    what = "lists of numbers, as long as each other" if dtype.kind == "f" else "lists of whole numbers"
    if not isinstance(value, list):
        raise _wrong(where, value, what)
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError):
        raise _wrong(where, value, what) from None
    kinds = "fi" if dtype.kind == "f" or not array.size else "i"
    leaves: Any = value
    for _ in range(array.ndim - 1):
        leaves = itertools.chain.from_iterable(leaves)
    if array.dtype.kind not in kinds or any(isinstance(leaf, bool) for leaf in leaves):
        raise _wrong(where, value, what)
    if not np.isfinite(array).all():
        raise ValueError(f"{where} holds numbers that are not finite")
    return array.astype(dtype)


def _any(value: Any, where: str, depth: int = 0) -> Any:
    if depth > DEEPEST:
        raise ValueError(f"{where} is nested too deeply")
    if isinstance(value, Mapping):
        return {_text(key, where): _any(item, where, depth + 1) for key, item in value.items()}
    if isinstance(value, list):
        return [_any(item, where, depth + 1) for item in value]
    if isinstance(value, int) and not isinstance(value, bool):
        return _scalar(int, value, where)
    return _text(value, where) if isinstance(value, str) else value


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise _wrong(where, value, "text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where} is {value!a:.60}, which holds half a character; no file can hold it") from None
    return value


def _within(value: Any, where: str, limits: tuple[Any, ...]) -> Any:
    for limit in limits:
        if not limit.low <= value <= limit.high:
            to = "" if math.isinf(limit.high) else f", at most {limit.high:g}"
            raise ValueError(f"{where} is {_short(value)}; it is at least {limit.low:g}{to}")
    return value


def _wrong(where: str, value: Any, what: str) -> ValueError:
    return ValueError(f"{where} is {_short(value)}; it should be {what}")


def _short(value: Any) -> str:
    """For messages, which are short whatever a file holds."""
    if isinstance(value, Mapping):
        return "an object with keys"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, int) and not LEAST_INT <= value <= MOST_INT:
        return f"a number of {value.bit_length()} bits"
    return f"{value!a:.60}"


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _has_default(each: Field[Any]) -> bool:
    return each.default is not MISSING or each.default_factory is not MISSING
