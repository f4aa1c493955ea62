"""Random directions in weight space, reproducible from a seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Distribution = Literal["rademacher", "gaussian"]

# A quarter of a gigabyte in float32. Fewer numbers than that are kept, more are drawn again for every batch.
KEPT_ELEMENTS = 2**26


class Probes:
    """A number of independent directions: entries ±1 with equal chances, or standard normal.

    Each is drawn from a generator of its own on the CPU, so that it's the same on every device, in every precision
    and in whatever order it is asked for.

    Args:
        distribution: two distributions of one seed are independent.
        count: the number of directions.
        like: tensors whose shapes, types and devices the parts of a direction get.
        seed: not negative.

    Raises:
        ValueError: a negative seed.
    """

    def __init__(self, distribution: Distribution, count: int, like: Sequence[Tensor], seed: int) -> None:
        if seed < 0:
            raise ValueError(f"seed is {seed}; give 0 or a positive number")
        self._distribution = distribution
        self._count = count
        self._like = like
        self._seed = seed
        self._keeps = count * self.size <= KEPT_ELEMENTS
        self._kept: dict[int, list[Tensor]] = {}

    @property
    def size(self) -> int:
        """Entries of one direction."""
        return sum(tensor.numel() for tensor in self._like)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> list[Tensor]:
        """A direction, one tensor for each of ``like``; not to be changed in place."""
        if not 0 <= number < self._count:
            raise IndexError(number)
        found = self._kept.get(number)
        if found is None:
            found = self._draw(number)
            if self._keeps:
                self._kept[number] = found
        return found

    def _draw(self, number: int) -> list[Tensor]:
        # seed + number would give neighbouring seeds nearly the same directions.
        entropy = (self._seed, number, int(self._distribution == "gaussian"))
        generator = torch.Generator().manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))
        if self._distribution == "gaussian":
            return [torch.randn(t.shape, generator=generator, dtype=torch.float32).to(t) for t in self._like]
        coins = [torch.randint(2, t.shape, generator=generator, dtype=torch.int8) for t in self._like]
        return [coin.to(t).mul_(2).sub_(1) for coin, t in zip(coins, self._like, strict=True)]
