"""Out-of-fold probabilities of a trained model: nobody predicts what it has learnt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from torch import nn
from torch.utils.data import Subset
from transformers import Trainer

from hf_robust_ft import out_of_fold_probabilities
from hf_robust_ft.estimation.crossfit import stratified_folds

DATA = tiny.texts(18, seed=1)
LABELS = np.array(DATA["label"])


def train(folder: Path, part: Any, model: nn.Module | None = None) -> Trainer:
    trainer = tiny.trainer(folder, model, train_dataset=part, max_steps=1)
    trainer.train()
    return trainer


@pytest.mark.parametrize("as_dataset", [True, False])
def test_each_fold_is_predicted_by_the_model_of_the_others(as_dataset: bool, tmp_path: Path) -> None:
    data: Any = DATA if as_dataset else Subset(DATA, range(18))
    parts, trainers = [], []

    def train_fold(part: Any) -> Trainer:
        parts.append([part[i]["input_ids"] for i in range(len(part))])
        trainers.append(train(tmp_path, part))
        return trainers[-1]

    found = out_of_fold_probabilities(train_fold, data, LABELS, folds=3, seed=2)
    assert found.shape == (18, tiny.CLASSES)
    np.testing.assert_allclose(found.sum(1), 1)
    fold = stratified_folds(LABELS, 3, 2)
    for f in range(3):
        assert parts[f] == [DATA[i]["input_ids"] for i in range(18) if fold[i] != f]
        held = np.flatnonzero(fold == f)
        logits = trainers[f].predict(DATA.select(held)).predictions
        expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        np.testing.assert_allclose(found[held], expected, rtol=1e-5)


def test_a_model_that_has_seen_the_fold_is_refused(tmp_path: Path) -> None:
    model = tiny.bert()
    with pytest.raises(ValueError, match="the same model twice, which has seen the examples of this fold; make a new"):
        out_of_fold_probabilities(lambda part: train(tmp_path, part, model), DATA, LABELS, folds=2)


def test_a_model_that_was_not_trained_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has made no step on fold 0; call train"):
        out_of_fold_probabilities(lambda part: tiny.trainer(tmp_path, train_dataset=part), DATA, LABELS, folds=2)


def test_labels_of_other_data_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="predictions of fold 0 come with other labels than those given"):
        out_of_fold_probabilities(lambda part: train(tmp_path, part), DATA, (LABELS + 1) % 3, folds=2)


def test_another_number_of_classes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"predictions of fold 0 have shape \(\d+, 5\) for \d+ examples of 3 classes"):
        out_of_fold_probabilities(lambda part: train(tmp_path, part, tiny.bert(num_labels=5)), DATA, LABELS, folds=2)
