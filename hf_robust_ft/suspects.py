"""Which labels are wrong, how surely, and what they should be."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .estimation.inputs import Labels
from .label_posteriors import label_posteriors
from .noise import Matrix


class Suspects(NamedTuple):
    """One entry an example, in the order given."""

    score: Matrix
    """[n]: estimated ``P(label wrong | features, label)``."""
    rank: npt.NDArray[np.int64]
    """[n]: 1 for the most suspect label, to n."""
    suggested: Labels
    """[n]: the likeliest true class. Where it isn't the label, the label is a suspect."""


def rank_suspects(
    features: npt.ArrayLike, labels: npt.ArrayLike, transition: npt.ArrayLike, *, folds: int = 5, seed: int = 0
) -> Suspects:
    """Rank labels by the probability that they are wrong.

    cleanlab ranks (self-confidence, Northcutt, Jiang & Chuang 2021, arXiv 1911.00068). What it is given is not the
    usual out-of-fold ``P(ỹ | x)``: that of a label is high where a class is *often given by mistake*, as in pair flips,
    and the ranking is then near chance. It is the posterior of the true class, given features and label
    (:func:`label_posteriors`). Of the first m suspects, m the number of wrong labels, on both shared data sets
    (5,000 examples), recipes/RESULTS.md has the share that is wrong.

    Args:
        features: [n, d], finite, of a frozen pretrained model.
        labels: [n] integers in 0..K-1, noisy.
        transition: T, [K, K], ``T[i, j] = P(noisy label = j | true label = i)``.
        folds: of the cross-fitting, at least 2.
        seed: of the folds.

    Raises:
        ValueError: bad features or labels, a T that is no transition matrix of their classes, fewer than 2 folds, or
            fewer examples than folds.
    """
    # Importing cleanlab takes seconds (pandas, scikit-learn), which import hf_robust_ft should not.
    from cleanlab.rank import get_label_quality_scores

    posterior = label_posteriors(features, labels, transition, folds=folds, seed=seed)
    y = np.asarray(labels, dtype=np.int64)
    score: Matrix = 1 - get_label_quality_scores(y, posterior, method="self_confidence")
    rank = np.empty(len(y), dtype=np.int64)
    rank[np.argsort(-score, kind="stable")] = np.arange(1, len(y) + 1)
    return Suspects(score, rank, posterior.argmax(axis=1))
