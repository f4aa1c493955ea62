"""The local terms of a sweep, and what its rules share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .tangent import Tangent
from .tape import Op

Tangents = Mapping[int, Tangent]
"""By the index of the leaf (flattened argument) that they belong to."""


class Local:
    """The sum of the local terms, [directions, examples]."""

    def __init__(self, values: Tensor) -> None:
        self.examples = values.shape[1]
        self.values = values

    def part(self, first: int, end: int) -> Local:
        """For some consecutive directions, which count from 0 there."""
        return Local(self.values[first:end])

    def add(self, directions: Sequence[int], weight: Tensor, change: Tensor) -> None:
        """Add ``⟨weight, change⟩`` example by example.

        Args:
            weight: [*shape], the batch in the leading dimension, perhaps folded with others.
            change: [len(directions), *shape].
        """
        change = change.reshape(len(directions), self.examples, -1)
        weight = weight.reshape(self.examples, -1, 1)
        found = torch.bmm(change.transpose(0, 1), weight)[..., 0].t()
        first, last = directions[0], directions[-1]
        if last - first + 1 == len(directions):
            self.values[first : last + 1] += found
        else:
            self.values[list(directions)] += found


Rule = Callable[[Op, Tangents, Local], Sequence[Tangent | None]]


def remembered(op: Op, key: Any, compute: Callable[[], Any]) -> Any:
    """What depends on primal values alone, computed for the first chunk of directions."""
    if key not in op.memo:
        op.memo[key] = compute()
    return op.memo[key]


def along_rows(change: Tensor, rows: Tensor) -> Tensor:
    """Inner product of each row, [D, R, n] with [R, n] → [D, R]: no product is ever stored."""
    return torch.bmm(change.transpose(0, 1), rows.unsqueeze(-1))[..., 0].t()


def adjoint_of(op: Op) -> Tensor:
    assert op.adjoint is not None, f"{op.func} was taken for linear"
    return op.adjoint


def shifted(dim: int) -> int:
    """A dimension of a tensor, in the tangents."""
    return dim + 1 if dim >= 0 else dim


def aligned(data: Tensor, rank: int) -> Tensor:
    """Give tangents the rank of the result, so that they broadcast as the tensor does."""
    return data.reshape(len(data), *[1] * (rank + 1 - data.dim()), *data.shape[1:])


def broadcast(data: Tensor, shape: Iterable[int]) -> Tensor:
    shape = tuple(shape)
    return aligned(data, len(shape)).expand(len(data), *shape)
