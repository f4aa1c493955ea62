"""Name the shape of a transition matrix."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

from .noise import Matrix

Shape = Literal["symmetric", "pair_flip", "particular_classes", "class_dependent"]

# Share of the wrong labels that a shape must explain to give its name.
EXPLAINED = 0.75


class NoiseShape(NamedTuple):
    """The simplest shape that explains at least 75 % of the wrong labels."""

    name: Shape
    explained: float
    """Share of the wrong labels that it explains; 1 for ``"class_dependent"``, which can be anything."""


def noise_shape(transition: Matrix, prior: Matrix) -> NoiseShape:
    """What T looks like, weighted by how often each mistake is made.

    - ``"symmetric"``: wrong labels are spread evenly over all mistakes. It explains what they share with the even
      spread, 1 minus their total variation from it.
    - ``"pair_flip"``: at most K kinds of mistakes, out of K (K - 1), make nearly all of them, one out of (nearly) every
      class.
    - ``"particular_classes"``: the same, with classes that are hardly ever mistaken.
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
        largest = np.argsort(-mistakes, axis=None)[:num_classes]
        explained = min(1.0, float(mistakes.ravel()[largest].sum() / total))
        if explained >= EXPLAINED:
            sources = len(np.unique(largest // num_classes))
            every = sources >= 0.9 * num_classes
            return NoiseShape("pair_flip" if every else "particular_classes", explained)
    return NoiseShape("class_dependent", 1.0)
