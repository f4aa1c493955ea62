"""What the true labels probably are, from features, noisy labels and T."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from tqdm.auto import tqdm

from .estimation.crossfit import stratified_folds
from .estimation.inputs import check_class_labels, check_features
from .estimation.joint_likelihood import head_for
from .estimation.ridge import best_penalty, decompose, left_out_scores, standardised
from .noise import Matrix, validate_transition

# The first round's scores predict noisy labels, those of the next ones the posteriors of the round before, which are
# less noisy. On both shared data sets the third still helps, a fourth no longer.
ROUNDS = 3


def label_posteriors(
    features: npt.ArrayLike, labels: npt.ArrayLike, transition: npt.ArrayLike, *, folds: int = 5, seed: int = 0
) -> Matrix:
    """``P(y = i | x, ỹ) ∝ P(y = i | x) T[i, ỹ]``: the true class of each example, given its features and its label.

    ``P(y | x)`` comes from a linear head that did not see the example's label: leave-one-out ridge scores, turned into
    class probabilities by the likelihood ``Σ_n log[(softmax(s_n W + b) T)[ỹ_n]]`` of the other folds
    (:func:`~hf_robust_ft.estimation.joint_likelihood.head_for`). The ridge is fitted to one-hot labels, then twice more
    to the posteriors found, a step of expectation maximisation each. (The posterior of another example may have seen
    this one's label; what comes back of it is of the order 1 / n.)

    Args:
        features: [n, d], finite, of a frozen pretrained model.
        labels: [n] integers in 0..K-1, noisy.
        transition: T, [K, K], ``T[i, j] = P(noisy label = j | true label = i)``.
        folds: of the likelihood, at least 2.
        seed: of the folds.

    Returns:
        [n, K]; rows sum to 1. A label that T rules out for every class that the head thinks possible stands as it is.

    Raises:
        ValueError: bad features or labels, a T that is no transition matrix of their classes, fewer than 2 folds, or
            fewer examples than folds.
    """
    matrix = validate_transition(transition)
    x = check_features(features)
    y, num_classes = check_class_labels(labels, len(x), len(matrix))
    fold = stratified_folds(y, folds, seed)
    spectrum = decompose(standardised(x, x[:0])[0])
    posterior: Matrix = np.eye(num_classes)[y]
    steps = tqdm(total=ROUNDS * folds, desc="label posteriors", delay=5, disable=None)
    for _ in range(ROUNDS):
        scores = left_out_scores(spectrum, posterior, best_penalty(spectrum, posterior))
        scores /= np.sqrt((scores**2).mean()) or 1.0
        likelihood = matrix.T[y]
        for f in range(folds):
            held = fold == f
            head = head_for(scores[~held], y[~held], matrix)
            likelihood[held] *= head.clean_probabilities(scores[held])
            steps.update()
        total = likelihood.sum(axis=1, keepdims=True)
        posterior = np.where(total > 0, likelihood / np.where(total > 0, total, 1), np.eye(num_classes)[y])
    steps.close()
    return posterior
