"""A mean of independent samples with its standard error and interval."""

from __future__ import annotations

import math

from scipy.special import stdtrit
from torch import Tensor


def mean_and_error(samples: Tensor) -> tuple[Tensor, Tensor]:
    """The mean over the first dimension and its standard error, of [N, …] with N at least 2."""
    return samples.mean(0), samples.std(0) / math.sqrt(len(samples))


def student_interval(mean: Tensor, error: Tensor, samples: int, level: float) -> tuple[Tensor, Tensor]:
    """``mean ± t · error``, with t of Student's distribution with samples - 1 degrees of freedom.

    It holds the truth with probability ``level`` for normal samples, and nearly so for others that are many or
    not skewed.

    Raises:
        ValueError: a level outside (0, 1).
    """
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; a confidence level lies between 0 and 1, such as 0.95")
    # The quantile that scipy.stats.t.ppf gives, without the half second that importing scipy.stats takes.
    t = float(stdtrit(samples - 1, (1 + level) / 2))
    return mean - t * error, mean + t * error
