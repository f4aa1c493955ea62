"""Mean, variance and maximum of values that come a batch at a time, from one process or several."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .report import Statistic


class Sums:
    """Mean, variance and maximum of a few columns (Chan, Golub & LeVeque 1983)."""

    def __init__(self, columns: int) -> None:
        self._count = 0
        self._mean = torch.zeros(columns, dtype=torch.float64)
        self._squares = torch.zeros(columns, dtype=torch.float64)
        self._maximum = torch.full((columns,), -math.inf, dtype=torch.float64)
        self._example = torch.zeros(columns, dtype=torch.long)

    @staticmethod
    def merged(parts: Sequence[Sums]) -> Sums:
        """Those of all examples, from those of some each."""
        whole = Sums(len(parts[0]._mean))
        for part in parts:
            whole._join(part._count, part._mean, part._squares, part._maximum, part._example)
        return whole

    def add(self, values: Tensor, first: int) -> None:
        """[examples, columns], float64, the examples numbered from ``first``."""
        mean = values.mean(0)
        largest, example = values.max(0)
        self._join(len(values), mean, (values - mean).square().sum(0), largest, example + first)

    def _join(self, count: int, mean: Tensor, squares: Tensor, maximum: Tensor, example: Tensor) -> None:
        total = self._count + count
        if not count:
            return
        change = mean - self._mean
        self._squares += squares + change.square() * (self._count * count / total)
        self._mean += change * (count / total)
        self._count = total
        # Of two examples with the same value the first one, whoever measured it.
        better = (maximum > self._maximum) | ((maximum == self._maximum) & (example < self._example))
        self._maximum = torch.where(better, maximum, self._maximum)
        self._example = torch.where(better, example, self._example)

    def statistic(self, i: int) -> Statistic:
        """Of one column."""
        n = self._count
        error = math.sqrt(self._squares[i].item() / (n - 1) / n) if n > 1 else math.nan
        return Statistic(self._maximum[i].item(), int(self._example[i]), self._mean[i].item(), error)
