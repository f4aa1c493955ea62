"""T as a product of two that are easier to estimate (Yao et al. 2020, arXiv 2006.07805)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..noise import Matrix
from .inputs import check_class_labels, check_features

# The anchor of class i is the example at this quantile of P(ỹ = i | x), not the most extreme one: the maximum of a
# sample follows the head's largest error. 97 % is what the authors' released code uses for noisy data.
ANCHOR_QUANTILE = 0.97


def dual_t_transition(probabilities: npt.ArrayLike, labels: npt.ArrayLike) -> Matrix:
    """Dual-T: ``T = T♣ T♠`` through an intermediate class Y' whose posterior *is* the head's.

    ``T♣[i, l] = P(Y' = l | Y = i)`` is read off at an anchor example of i, without estimation error by construction of
    Y'. ``T♠[l, j] = P(ỹ = j | Y' = l)`` is a frequency: of label j among the examples that the head predicts as l.

    It is made for a network that is surer than it should be. Where the head predicts the true class with probability
    near 1, T♣ is the identity and T♠ is T. The better calibrated the head, the more of T the anchors hold already,
    which the counts then apply once more: on classes that are told apart exactly, calibrated probabilities give ``T²``.
    So on out-of-fold probabilities expect too much noise. It is here for comparison, and as a start for the joint
    likelihood.

    Args:
        probabilities: [n, K], out-of-fold ``P(ỹ | x)``.
        labels: [n] integers in 0..K-1, noisy.

    Returns:
        [K, K], ``T[i, j] = P(noisy = j | true = i)``. Where the head predicts a class for no example, labels of that
        intermediate class are taken as right.

    Raises:
        ValueError: bad probabilities or labels.
    """
    p = check_features(probabilities, "probabilities")
    y, num_classes = check_class_labels(labels, len(p), p.shape[1])
    rank = min(int(np.ceil(ANCHOR_QUANTILE * len(p))), len(p)) - 1
    anchors = np.argsort(p, axis=0, kind="stable")[rank]
    first: Matrix = p[anchors] / p[anchors].sum(axis=1, keepdims=True)
    counts = np.zeros((num_classes, num_classes))
    np.add.at(counts, (p.argmax(axis=1), y), 1)
    sums = counts.sum(axis=1, keepdims=True)
    second = np.where(sums > 0, counts / np.where(sums > 0, sums, 1), np.eye(num_classes))
    product: Matrix = first @ second
    return product
