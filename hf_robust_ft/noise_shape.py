"""Name the shape of a transition matrix."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

from .noise import Matrix

Shape = Literal["symmetric", "pair_flip", "particular_classes", "class_dependent"]

# Share of the wrong labels that a shape must explain to give its name.
EXPLAINED = 0.75

# A class counts as mistaken if its most frequent mistake has this share of the usual rate, as a few labels of every
# class look wrong. Rates and not counts, so that a rare class counts like the others.
MISTAKEN = 0.25


class NoiseShape(NamedTuple):
    """The simplest shape that explains at least 75 % of the wrong labels."""

    name: Shape
    explained: float
    """Share of the wrong labels that it explains; 1 for ``"class_dependent"``, which can be anything."""


def noise_shape(transition: Matrix, prior: Matrix) -> NoiseShape:
    """What T looks like, weighted by how often each mistake is made.

    - ``"symmetric"``: wrong labels are spread evenly over all mistakes. It explains what they share with the even
      spread, 1 minus their total variation from it.
    - ``"pair_flip"``: (nearly) every class is mistaken, and the most frequent mistake of each makes nearly all of them.
    - ``"particular_classes"``: K kinds of mistakes, out of K (K - 1), make nearly all of them.
    - ``"class_dependent"``: all else.

    Of two classes there is one mistake each, so only the first and the last can be told apart.

    Args:
        transition: T, [K, K], rows are the true class.
        prior: [K], ``P(y = i)`` of the true class.
    """
    num_classes = len(transition)
    off = ~np.eye(num_classes, dtype=bool)
    mistakes = np.where(off, prior[:, None] * transition, 0)
    # Even rates out of every class: classes then differ by how frequent they are.
    even = np.where(off, prior[:, None] / (num_classes - 1), 0)
    total = mistakes.sum()
    if total <= 0:
        return NoiseShape("symmetric", 1.0)
    shared = min(1.0, float(np.minimum(mistakes / total, even / even.sum()).sum()))
    if shared >= EXPLAINED:
        return NoiseShape("symmetric", shared)
    if num_classes > 2:
        rates = np.where(off, transition, 0)
        usual = (mistakes * rates).sum() / total
        every = (rates.max(axis=1) >= MISTAKEN * usual).mean() >= 0.9
        one_each = min(1.0, float(mistakes.max(axis=1).sum() / total))
        if every and one_each >= EXPLAINED:
            return NoiseShape("pair_flip", one_each)
        explained = min(1.0, float(np.sort(mistakes, axis=None)[-num_classes:].sum() / total))
        if explained >= EXPLAINED:
            return NoiseShape("particular_classes", explained)
    return NoiseShape("class_dependent", 1.0)
