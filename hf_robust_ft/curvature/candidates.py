"""The examples that may hold the maximum of a layer."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

# Examples kept for Lanczos, those with the largest sound bounds of each layer. Their inputs stay in memory.
CANDIDATES = 8


@dataclass(order=True)
class Candidate:
    """One example, in the order of its sound bound."""

    bound: float
    example: int
    inputs: Any = field(compare=False)
    """None on a process that did not measure it."""
    labels: Any = field(compare=False)
    done: bool = field(default=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        """Other processes are told which example it is; inputs go only to where they are needed."""
        return {**vars(self), "inputs": None, "labels": None}


class Candidates:
    """Those of one layer: the 8 examples with the largest sound bounds, and the largest bound of all others."""

    def __init__(self) -> None:
        # A heap: the smallest goes first when there are too many.
        self._kept: list[Candidate] = []
        self._beyond = -math.inf

    @staticmethod
    def merged(parts: Iterable[Candidates]) -> Candidates:
        """Those of all examples, from those of some each."""
        whole = Candidates()
        for part in parts:
            whole._beyond = max(whole._beyond, part._beyond)
            for candidate in part:
                whole.add(candidate)
        return whole

    def __iter__(self) -> Iterator[Candidate]:
        return iter(self._kept)

    def promising(self, bounds: Tensor) -> Iterator[tuple[float, int]]:
        """The sound bounds [examples] that are among the largest so far, with their places; the others are counted."""
        values, order = bounds.topk(min(CANDIDATES + 1, len(bounds)))
        for bound, n in zip(values.tolist(), order.tolist(), strict=True):
            if len(self._kept) == CANDIDATES and bound <= self._kept[0].bound:
                self._beyond = max(self._beyond, bound)
            else:
                yield bound, n

    def add(self, candidate: Candidate) -> None:
        """Keep it, in the place of the least one if there are too many."""
        if len(self._kept) < CANDIDATES:
            heapq.heappush(self._kept, candidate)
        else:
            self._beyond = max(self._beyond, heapq.heappushpop(self._kept, candidate).bound)

    def next(self, best: float) -> list[Candidate]:
        """The most promising of those that may hold more than the best so far: as many as were looked at already.

        All layers share the graph of an example, and processes wait for each other after each round: with 1, 1, 2 and
        4 at a time there are few rounds, and never twice as many candidates as one at a time would have needed.
        """
        left = sorted((c for c in self._kept if not c.done and c.bound > best), reverse=True)
        return left[: max(1, sum(c.done for c in self._kept))]

    def looked_at(self, example: int) -> int:
        """Mark one; returns how many are."""
        for candidate in self._kept:
            candidate.done = candidate.done or candidate.example == example
        return sum(c.done for c in self._kept)

    def largest_other(self) -> float:
        """The largest sound bound of all examples that were not looked at."""
        return max([self._beyond, *(c.bound for c in self._kept if not c.done)])
