"""Does the noise depend on the example, beyond its class? A statistic for a simulated null."""

from __future__ import annotations

import numpy as np

from ..noise import Matrix
from .inputs import Labels
from .ridge import Spectrum, left_out_scores

# Of the ridge, in the units of RIDGE_GRID. From 1 to 10 the statistic changes by 0.05 at most.
PENALTY = 3.0


def excess_wrongness(clean_probabilities: Matrix, transition: Matrix, labels: Labels) -> Matrix:
    """How much likelier each label is to be wrong than a label of such an example, [n].

    ``P(y ≠ ỹ_n | x_n, ỹ_n) - P(y ≠ ỹ | x_n)``, both by p and T: ``1 - p_ỹ T[ỹ, ỹ] / (p T)_ỹ`` less ``1 - Σ_i p_i
    T[i, i]``. If noise depends on the class alone, its mean given x is zero, whatever x.

    Args:
        clean_probabilities: p, ``P(y = i | x)``, [n, K].
        transition: T, [K, K].
        labels: ỹ, [n], noisy.
    """
    rows, right = np.arange(len(labels)), np.diag(transition)
    likelihood = np.maximum((clean_probabilities @ transition)[rows, labels], 1e-300)  # may underflow
    is_right = clean_probabilities[rows, labels] * right[labels] / likelihood
    excess: Matrix = clean_probabilities @ right - is_right
    return excess


def dependence(spectrum: Spectrum, excess: Matrix) -> float:
    """How well features foretell which labels are wrong, beyond p and T: a correlation.

    Of the excess of each example with what a ridge regression on the features of all *other* examples predicts. Under
    class-conditional noise it is about zero, or a little below, as the mean of the others falls where one's own rises.

    Args:
        spectrum: of the features, [n, d].
        excess: [n], of :func:`excess_wrongness`.
    """
    predicted = left_out_scores(spectrum, excess[:, None], PENALTY)[:, 0]
    if predicted.std() <= 1e-9 * excess.std():  # features that say nothing, up to rounding
        return 0.0
    return float(np.corrcoef(predicted, excess)[0, 1])


def simulated_p_value(observed: float, simulated: Matrix) -> float:
    """``(1 + #{simulated ≥ observed}) / (1 + B)``: valid at any B (Davison & Hinkley 1997, equation 4.11)."""
    return float((1 + (simulated >= observed).sum()) / (1 + len(simulated)))
