"""Does the noise depend on the example, beyond its class? A χ² statistic for a simulated null."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..noise import Matrix
from .inputs import Labels

# Cells expected to hold fewer labels than this are pooled: χ² terms with tiny expectations are all variance.
MIN_EXPECTED = 5.0

# Principal components looked at. Instance-dependence along a direction of little variance is not seen.
COMPONENTS = 3


def leading_components(features: Matrix, predicted: Labels) -> Matrix:
    """Features along the leading principal components within classes, [n, COMPONENTS].

    They are of the features less their predicted class's mean: so that regions along them are not the classes again.

    Args:
        features: [n, d].
        predicted: [n], the likeliest true class.
    """
    within = features - features.mean(axis=0)
    for c in np.unique(predicted):
        within[predicted == c] -= within[predicted == c].mean(axis=0)
    count = min(COMPONENTS, features.shape[1])
    # Leading eigenvectors of the smaller Gram matrix.
    if features.shape[1] <= len(features):
        _, vectors = np.linalg.eigh(within.T @ within)
        projected: Matrix = within @ vectors[:, -count:]
    else:
        values, vectors = np.linalg.eigh(within @ within.T)
        projected = vectors[:, -count:] * np.sqrt(np.maximum(values[-count:], 0))
    return projected


def regions(components: Matrix, predicted: Labels) -> npt.NDArray[np.int64]:
    """Halve the examples of each predicted class at the median of each component.

    Returns:
        [n, COMPONENTS] of 0 or 1: on which side an example lies.
    """
    side = np.zeros(components.shape, dtype=np.int64)
    for c in np.unique(predicted):
        members = predicted == c
        side[members] = components[members] > np.median(components[members], axis=0)
    return side


def dependence_statistic(
    noisy_probabilities: Matrix, labels: Labels, predicted: Labels, sides: npt.NDArray[np.int64]
) -> float:
    """χ² of observed against expected labels in cells of (predicted class, side of a component).

    ``Σ (O - E)² / E`` with ``E = Σ_{n in cell} (p_n T)_j``. Cells that expect fewer than 5 labels are pooled, for each
    component.

    Args:
        noisy_probabilities: [n, K], ``p_n T``.
        labels: [n], noisy.
        predicted: [n], the likeliest true class.
        sides: [n, C], of :func:`regions`.
    """
    num_classes = noisy_probabilities.shape[1]
    excess = -noisy_probabilities
    excess[np.arange(len(labels)), labels] += 1
    total = 0.0
    for component in sides.T:
        cell = 2 * predicted + component
        indicator = np.zeros((len(cell), 2 * num_classes))
        indicator[np.arange(len(cell)), cell] = 1
        expected, difference = indicator.T @ noisy_probabilities, indicator.T @ excess
        enough = expected >= MIN_EXPECTED
        total += float((difference[enough] ** 2 / expected[enough]).sum())
        pooled = float(expected[~enough].sum())
        if pooled > 0:
            total += float(difference[~enough].sum()) ** 2 / pooled
    return total


def effect_size(observed: float, simulated: Matrix, examples: int, components: int) -> float:
    """Cohen's w: ``√((χ² - E₀ χ²)⁺ / n)`` of one component, with the mean under the null simulated.

    It does not grow with n, as -log p does: it tells a dependence that matters from a head that fits nearly.
    """
    return float(np.sqrt(max(0.0, observed - float(simulated.mean())) / (examples * components)))


def simulated_p_value(observed: float, simulated: Matrix) -> float:
    """``(1 + #{simulated ≥ observed}) / (1 + B)``: valid at any B (Davison & Hinkley 1997, equation 4.11)."""
    return float((1 + (simulated >= observed).sum()) / (1 + len(simulated)))
