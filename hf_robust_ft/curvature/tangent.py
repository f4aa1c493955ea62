"""Tangents along several directions at once, of which an operation may see a few only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tangent:
    """First-order change of one tensor along some directions; along all others it is zero."""

    directions: tuple[int, ...]
    """Ascending."""
    data: Tensor
    """[len(directions), *shape of the tensor]."""

    def rows(self, directions: Sequence[int]) -> Tensor:
        """The part along some of its directions."""
        if tuple(directions) == self.directions:
            return self.data
        runs = list(_runs(directions, self.directions))
        if len(runs) == 1:
            return self.data[runs[0][1]]
        return torch.cat([self.data[at] for _, at in runs])

    def spread(self, directions: Sequence[int]) -> Tensor:
        """The data along more directions, with zeros for those that it lacks."""
        if tuple(directions) == self.directions:
            return self.data
        out = self.data.new_zeros(len(directions), *self.data.shape[1:])
        for source, at in _runs(self.directions, directions):
            out[at] = self.data[source]
        return out


def union(tangents: Sequence[Tangent]) -> tuple[int, ...]:
    """All directions of some tangents."""
    return tuple(sorted({d for tangent in tangents for d in tangent.directions}))


def shared(first: Tangent, second: Tangent) -> tuple[int, ...]:
    """Directions of both."""
    both = set(first.directions) & set(second.directions)
    return tuple(d for d in first.directions if d in both)


def total(tangents: Sequence[Tangent]) -> Tangent:
    """Their sum. Data of one operand may lack leading sizes that broadcasting gives it."""
    if len(tangents) == 1:
        return tangents[0]
    first, second, *more = tangents
    if first.directions == second.directions:
        result = Tangent(first.directions, first.data + second.data)
    elif first.directions[-1] < second.directions[0]:
        result = Tangent(first.directions + second.directions, torch.cat([first.data, second.data]))
    elif second.directions[-1] < first.directions[0]:
        result = Tangent(second.directions + first.directions, torch.cat([second.data, first.data]))
    else:
        directions = union([first, second])
        large, small = (first, second) if len(first.directions) >= len(second.directions) else (second, first)
        data = large.spread(directions)
        if data is large.data:
            data = data.clone()
        for source, at in _runs(small.directions, directions):
            data[at] += small.data[source]
        result = Tangent(directions, data)
    return total([result, *more])


def _runs(some: Sequence[int], of: Sequence[int]) -> Iterator[tuple[slice, slice]]:
    """Where some directions stand: pairs of slices, in themselves and in a longer list, as few as possible."""
    position = {d: i for i, d in enumerate(of)}
    start = 0
    for i in range(1, len(some) + 1):
        if i == len(some) or position[some[i]] != position[some[i - 1]] + 1:
            at = position[some[start]]
            yield slice(start, i), slice(at, at + i - start)
            start = i
