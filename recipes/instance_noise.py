"""Noise that no transition matrix describes: it depends on the example, not on its class alone."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hf_robust_ft import corrupt_labels, symmetric_transition

Labels = npt.NDArray[np.int64]


def corrupt_unevenly(
    labels: Labels, values: npt.NDArray[np.float64], rate: float, num_classes: int, seed: int
) -> Labels:
    """Symmetric noise, four times as frequent in the lower half of each class, by ``values``, as in the upper one.

    Args:
        labels: [n], clean.
        values: [n], what the examples are ordered by.
        rate: of wrong labels in all, at most 0.625.
        num_classes: K.
        seed: of the noise.
    """
    middle = np.zeros(num_classes)
    for k in np.unique(labels):
        middle[k] = np.median(values[labels == k])
    lower, noisy = values <= middle[labels], labels.copy()
    for rows, times in ((lower, 1.6), (~lower, 0.4)):
        noisy[rows] = corrupt_labels(labels[rows], symmetric_transition(num_classes, times * rate), seed)
    return noisy


def sizes(examples: list[object]) -> npt.NDArray[np.float64]:
    """How bright each image is, or how long each text."""
    return np.array([len(x) if isinstance(x, str) else np.asarray(x).mean() for x in examples], dtype=np.float64)


def along_leading_component(features: npt.NDArray[np.float64], labels: Labels) -> npt.NDArray[np.float64]:
    """Where each example lies along the first principal component within classes, [n], of either sign.

    Args:
        features: [n, d].
        labels: [n], clean.
    """
    within = features.copy()
    for k in np.unique(labels):
        within[labels == k] -= within[labels == k].mean(axis=0)
    along: npt.NDArray[np.float64] = within @ np.linalg.svd(within, full_matrices=False)[2][0]
    return along
