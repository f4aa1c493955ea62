"""T from the confident joint (Northcutt, Jiang & Chuang 2021, arXiv 1911.00068), computed by cleanlab."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..noise import Matrix
from .inputs import check_class_labels, check_features


def confident_joint_transition(probabilities: npt.ArrayLike, labels: npt.ArrayLike) -> Matrix:
    """T by counting: an example counts as truly i if its probability of i exceeds the mean over those labelled i.

    cleanlab's ``noise_matrix`` is ``P(noisy = row | true = column)``; it is transposed here.

    Args:
        probabilities: [n, K], out-of-fold ``P(ỹ | x)``.
        labels: [n] integers in 0..K-1, noisy.

    Returns:
        [K, K], ``T[i, j] = P(noisy = j | true = i)``. A class without labels has the identity's row: cleanlab has no
        threshold for it, and nothing counts as truly of that class.

    Raises:
        ValueError: bad probabilities or labels.
    """
    # Importing cleanlab takes seconds (pandas, scikit-learn), which import hf_robust_ft should not.
    from cleanlab.count import compute_confident_joint, estimate_latent

    p = check_features(probabilities, "probabilities")
    y, num_classes = check_class_labels(labels, len(p), p.shape[1])
    present = np.flatnonzero(np.bincount(y, minlength=num_classes))
    transition = np.eye(num_classes)
    if present.size < 2:
        return transition
    # cleanlab wants labels 0..K-1 that all occur.
    renumbered = np.searchsorted(present, y)
    among = p[:, present]
    total = among.sum(axis=1, keepdims=True)
    among = np.where(total > 0, among / np.where(total > 0, total, 1), 1 / present.size)
    joint = compute_confident_joint(renumbered, among, calibrate=True)
    _, noise_matrix, _ = estimate_latent(joint, renumbered)
    rows = np.clip(np.nan_to_num(noise_matrix.T), 0, None)
    sums = rows.sum(axis=1, keepdims=True)
    rows = np.where(sums > 0, rows / np.where(sums > 0, sums, 1), np.eye(present.size))
    transition[np.ix_(present, present)] = rows
    return transition
