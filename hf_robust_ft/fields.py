"""Whether what was read from a file has the types that its dataclass declares."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np


def check_fields(record: Any, where: str = "", *, nan_is_none: bool = False) -> None:
    """Compare the values of a dataclass, and of those within it, with their annotations.

    Args:
        where: how to reach the record in its file, for the message.
        nan_is_none: whether None may stand where a float is declared.

    Raises:
        TypeError: a value of another type, with the way to it.
    """
    declared = typing.get_type_hints(type(record))
    for each in fields(record):
        _check(getattr(record, each.name), declared[each.name], f"{where}.{each.name}".lstrip("."), nan_is_none)


def _check(value: Any, declared: Any, where: str, nan_is_none: bool) -> None:
    kind, inner = typing.get_origin(declared), typing.get_args(declared)
    if kind in (typing.Union, types.UnionType):
        if value is None and type(None) in inner:
            return
        (declared,) = (each for each in inner if each is not type(None))
        kind, inner = typing.get_origin(declared), typing.get_args(declared)
    if declared is Any or (declared is float and value is None and nan_is_none):
        return
    if kind is typing.Literal:
        good = value in inner
    elif declared is float:
        good = isinstance(value, (int, float)) and not isinstance(value, bool)
    elif declared is int:
        good = isinstance(value, int) and not isinstance(value, bool)
    else:
        good = isinstance(value, kind or declared)
    if not good:
        raise TypeError(f"{where} is {str(value)[:60]!r}, a {type(value).__name__}")
    if is_dataclass(value):
        check_fields(value, where, nan_is_none=nan_is_none)
    elif isinstance(value, Mapping):
        for key, each in value.items():
            _check(each, inner[1], f"{where}.{key}", nan_is_none)
    elif kind in (list, tuple):
        alike = kind is list or inner[-1] is Ellipsis
        if not alike and len(value) != len(inner):
            raise TypeError(f"{where} has {len(value)} values, not {len(inner)}")
        for i, each in enumerate(value):
            _check(each, inner[0 if alike else i], f"{where}.{i}", nan_is_none)


def check_shapes(record: Any, shapes: dict[str, tuple[int, ...]]) -> None:
    """Compare the shapes of arrays by the names of their fields.

    Raises:
        TypeError: an array of another shape.
    """
    for name, shape in shapes.items():
        found = np.shape(getattr(record, name))
        if found != shape:
            raise TypeError(f"{name} has shape {found}, not {shape}")
