"""The recipe that compares diagnoses with the truth: its noise that no T describes."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import numpy as np
from datasets import ClassLabel, Dataset, Features, Value


def test_size_noise_is_four_times_as_frequent_in_shorter_texts(recipe: Callable[[str], ModuleType]) -> None:
    n = 8000
    labels = np.arange(n) % 4
    texts = ["x" * (1 + i % 97 + 50 * (i % 4)) for i in range(n)]  # some classes have longer ones
    features = Features({"text": Value("string"), "label": ClassLabel(num_classes=4)})
    clean = Dataset.from_dict({"text": texts, "label": labels}, features=features)
    noisy = recipe("diagnose_noise").corrupt(clean, "size-0.4", seed=1)
    assert noisy["text"][:] == texts  # in the order that the features have
    assert (np.array(noisy["clean_label"][:]) == labels).all()
    wrong = np.array(noisy["label"][:]) != labels
    lengths = np.array([len(text) for text in texts])
    for k in range(4):
        short = lengths <= np.median(lengths[labels == k])
        assert abs(wrong[(labels == k) & short].mean() - 0.64) < 0.05
        assert abs(wrong[(labels == k) & ~short].mean() - 0.16) < 0.05
