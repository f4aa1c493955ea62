"""T from a small trusted set (gold loss correction, Hendrycks et al. 2018, arXiv 1802.05300)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..noise import Matrix
from .inputs import check_class_labels, check_every_class, check_features


def trusted_transition(probabilities: npt.ArrayLike, clean_labels: npt.ArrayLike) -> Matrix:
    """GLC, equation 2: ``T[i, ·]`` is the mean of ``P(ỹ | x)`` over the trusted examples of class i.

    It is exact where the features tell the classes apart. Where they don't, the mean mixes in the rows of the classes
    that i is confused with, and T looks noisier than it is: :func:`estimate_transition` with ``trusted`` examples and
    its default method uses them without that.

    Args:
        probabilities: [m, K] of a head that was trained on noisy labels and saw none of these examples.
        clean_labels: [m] integers in 0..K-1, trusted.

    Returns:
        [K, K], ``T[i, j] = P(noisy = j | true = i)``.

    Raises:
        ValueError: bad input, or a class of which there is no trusted example.
    """
    p = check_features(probabilities, "probabilities")
    y, num_classes = check_class_labels(clean_labels, len(p), p.shape[1], "trusted labels")
    check_every_class(y, num_classes, "trusted labels")
    sums = np.zeros((num_classes, num_classes))
    np.add.at(sums, y, p)
    transition: Matrix = sums / sums.sum(axis=1, keepdims=True)
    return transition
