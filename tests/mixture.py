"""Gaussian mixtures: classes whose posterior is known, and linear in its logits."""

from __future__ import annotations

import numpy as np
from scipy.special import softmax


def mixture(
    n: int, num_classes: int = 3, dimensions: int = 6, distance: float = 3.0, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features [n, d], classes [n] and their posterior [n, K]; unit covariance, means on the first axes."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes, n)
    means = distance * np.eye(num_classes, dimensions)
    features = means[labels] + rng.standard_normal((n, dimensions))
    return features, labels, softmax(features @ means.T, axis=1)


def draw(probabilities: np.ndarray, seed: int) -> np.ndarray:
    """One label a row of probabilities [n, K]."""
    rng = np.random.default_rng(seed)
    return (rng.random((len(probabilities), 1)) > probabilities.cumsum(axis=1)[:, :-1]).sum(axis=1)


def row_tv(estimate: np.ndarray, truth: np.ndarray) -> float:
    return float(np.abs(estimate - truth).sum(axis=1).mean() / 2)
