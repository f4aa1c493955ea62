"""Clean accuracy from noisy labels: closed forms, the coverage of its intervals, the metric, the refusals."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest

from hf_robust_ft import (
    CLEAN_ACCURACY_METRIC,
    CleanAccuracy,
    clean_accuracy,
    corrupt_labels,
    pair_flip_transition,
    symmetric_transition,
)

ASYMMETRIC = np.array([[0.8, 0.15, 0.05], [0.1, 0.7, 0.2], [0.0, 0.1, 0.9]])
TRANSITIONS = {
    "symmetric": symmetric_transition(3, 0.4),
    "pair flip": pair_flip_transition(3, 0.4),
    "random": 0.6 * np.eye(3) + 0.4 * np.random.default_rng(0).dirichlet(np.ones(3), 3),
    "almost clean": 0.97 * np.eye(3) + 0.03 * np.random.default_rng(0).dirichlet(np.ones(3), 3),
}
# Rows are the true class; P(prediction | true class), of classes that are unequally frequent.
CONFUSION = np.array([[0.9, 0.07, 0.03], [0.1, 0.8, 0.1], [0.02, 0.0, 0.98]])
FREQUENCY = np.array([0.5, 0.3, 0.2])


def pairs(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Noisy labels and predictions with these counts [label, prediction]."""
    labels, predictions = np.indices(table.shape).reshape(2, -1)
    return np.repeat(labels, table.ravel()), np.repeat(predictions, table.ravel())


def expected_counts(transition: np.ndarray, n: int) -> np.ndarray:
    return np.rint(n * transition.T @ (FREQUENCY[:, None] * CONFUSION)).astype(int)


def wilson(hits: int, n: int) -> tuple[float, float]:
    interval = binomtest(hits, n).proportion_ci(0.95, "wilson")
    return interval.low, interval.high


@pytest.mark.parametrize("transition", TRANSITIONS.values(), ids=TRANSITIONS)
def test_the_noise_is_taken_out(transition: np.ndarray) -> None:
    labels, predictions = pairs(expected_counts(transition, 10**7))
    found = clean_accuracy(predictions, labels, transition)
    assert found.accuracy == pytest.approx(FREQUENCY @ CONFUSION.diagonal(), abs=1e-5)
    assert found.recall == pytest.approx(CONFUSION.diagonal(), abs=1e-5)
    assert found.accuracy == pytest.approx(np.linalg.inv(transition)[labels, predictions].mean())
    assert found.noisy_accuracy == pytest.approx(np.mean(labels == predictions))
    assert found.n == len(labels)


def test_without_noise_these_are_the_textbook_s_intervals() -> None:
    table = np.array([[50, 3, 0], [4, 20, 1], [0, 0, 7]])
    labels, predictions = pairs(table)
    found = clean_accuracy(predictions, labels, np.eye(3))
    exact = binomtest(77, 85).proportion_ci(0.95, "exact")
    assert found.kind == "certificate"
    assert found.accuracy == found.noisy_accuracy == pytest.approx(77 / 85)
    assert found.interval == pytest.approx((exact.low, exact.high))
    for k in range(3):
        assert found.recall[k] == pytest.approx(table[k, k] / table[k].sum())
        assert found.recall_interval[k] == pytest.approx(wilson(table[k, k], table[k].sum()))


def test_a_symmetric_transition_gives_a_certificate() -> None:
    labels, predictions = pairs(expected_counts(symmetric_transition(3, 0.4), 500))
    found = clean_accuracy(predictions, labels, symmetric_transition(3, 0.4), confidence=0.9)
    right = int((labels == predictions).sum())
    exact = binomtest(right, len(labels)).proportion_ci(0.9, "exact")
    assert found.kind == "certificate"
    assert found.accuracy == pytest.approx((right / len(labels) - 0.2) / 0.4)
    assert found.interval == pytest.approx(((exact.low - 0.2) / 0.4, min((exact.high - 0.2) / 0.4, 1)))


def test_more_noise_than_chance_turns_the_interval_round() -> None:
    labels, predictions = pairs(expected_counts(symmetric_transition(3, 0.9), 500))
    low, high = clean_accuracy(predictions, labels, symmetric_transition(3, 0.9)).interval
    assert 0 < low < FREQUENCY @ CONFUSION.diagonal() < high <= 1


def test_a_certificate_needs_a_symmetric_and_known_transition() -> None:
    labels, predictions = pairs(expected_counts(ASYMMETRIC, 500))
    assert clean_accuracy(predictions, labels, ASYMMETRIC).kind == "estimate"
    symmetric = symmetric_transition(3, 0.3)
    found = clean_accuracy(predictions, labels, symmetric, transition_samples=[symmetric, symmetric])
    assert found.kind == "estimate"
    assert found.interval == pytest.approx(clean_accuracy(predictions, labels, symmetric).interval, abs=0.005)
    assert clean_accuracy(predictions, labels, symmetric.round(6)).kind == "certificate"


def simulated(rng: np.random.Generator, transition: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    true = rng.choice(3, n, p=FREQUENCY)
    predictions = (rng.random((n, 1)) > CONFUSION[true].cumsum(1)).sum(1).clip(max=2)
    return predictions, corrupt_labels(true, transition, seed=int(rng.integers(2**32)))


def covered(found: CleanAccuracy) -> list[bool]:
    """Whether the intervals hold the truth: of the accuracy, and of each recall."""
    intervals = [found.interval, *found.recall_interval]
    truths = [FREQUENCY @ CONFUSION.diagonal(), *CONFUSION.diagonal()]
    return [low <= truth <= high for (low, high), truth in zip(intervals, truths, strict=True)]


@pytest.mark.parametrize("n", [200, 500, 2000])
@pytest.mark.parametrize("transition", TRANSITIONS.values(), ids=TRANSITIONS)
def test_intervals_hold_the_truth_as_often_as_they_say(transition: np.ndarray, n: int) -> None:
    rng = np.random.default_rng(n)
    trials = [covered(clean_accuracy(*simulated(rng, transition, n), transition)) for _ in range(500)]
    rates = np.mean(trials, axis=0)
    assert rates.min() >= 0.92
    assert rates.max() <= 0.99


def test_a_percentile_bootstrap_would_be_too_short() -> None:
    """The reason for score intervals: labels almost clean, 200 examples, 98 % of predictions right."""
    transition, recall, n = TRANSITIONS["almost clean"], 0.98, 200
    joint = transition.T @ (FREQUENCY[:, None] * (recall * np.eye(3) + (1 - recall) / 2 * (1 - np.eye(3))))
    rng = np.random.default_rng(0)
    score, bootstrap = [], []
    for _ in range(400):
        table = rng.multinomial(n, joint.ravel())
        labels, predictions = pairs(table.reshape(3, 3))
        found = clean_accuracy(predictions, labels, transition)
        score.append([low <= recall <= high for low, high in (found.interval, *found.recall_interval)])
        draws = np.linalg.inv(transition).T @ rng.multinomial(n, table / n, 1000).reshape(-1, 3, 3)
        hits = np.diagonal(draws, axis1=1, axis2=2)
        values = np.column_stack([hits.sum(1) / n, hits / draws.sum(2)])
        low, high = np.clip(np.quantile(values, [0.025, 0.975], axis=0), 0, 1)
        bootstrap.append((low <= recall) & (recall <= high))
    assert np.mean(score, axis=0).min() >= 0.92
    assert np.mean(bootstrap, axis=0)[1:].max() < 0.9


@pytest.mark.parametrize("n", [200, 500, 2000])
@pytest.mark.parametrize("transition", TRANSITIONS.values(), ids=TRANSITIONS)
def test_intervals_hold_the_truth_with_an_estimated_transition(transition: np.ndarray, n: int) -> None:
    """T counted on 200 trusted examples of each class; its draws are a bootstrap of these."""
    rng = np.random.default_rng(n)

    def counted(rows: np.ndarray, *size: int) -> np.ndarray:
        return np.stack([rng.multinomial(200, row, size) / 200 for row in rows], axis=-2)

    trials, without = [], []
    for _ in range(400):
        estimate = counted(transition)
        predictions, labels = simulated(rng, transition, n)
        draws = counted(estimate, 200)
        trials.append(covered(clean_accuracy(predictions, labels, estimate, transition_samples=draws)))
        without.append(covered(clean_accuracy(predictions, labels, estimate)))
    rates = np.mean(trials, axis=0)
    assert rates.min() >= 0.90
    assert rates.max() <= 0.9925
    if n == 2000:
        # T's uncertainty is the larger part by then, and taking it as known is found out.
        assert np.mean(without, axis=0).min() < rates.min() - 0.05


def test_the_interval_shrinks_with_the_square_root_of_n() -> None:
    widths = []
    for n in (1_000, 100_000):
        low, high = clean_accuracy(*reversed(pairs(expected_counts(ASYMMETRIC, n))), ASYMMETRIC).interval
        widths.append(high - low)
    assert widths[0] / widths[1] == pytest.approx(10, rel=0.05)


def test_a_class_that_is_not_seen_has_no_recall() -> None:
    found = clean_accuracy([0, 1, 0, 1] * 10, [0, 1, 0, 1] * 10, np.eye(3))
    assert math.isnan(found.recall[2])
    assert found.recall_interval[2] == (0, 1)
    assert "recall of class 2: not seen [0.0000, 1.0000]" in str(found)
    assert json.loads(json.dumps(found.to_dict()))["recall"] == [1, 1, None]


def test_one_example_says_little() -> None:
    found = clean_accuracy([0], [0], symmetric_transition(3, 0.4))
    assert found.interval == (0, 1)
    assert found.accuracy == pytest.approx(2)  # unbiased, not clipped
    assert found.recall_interval[1:] == ((0, 1), (0, 1))
    assert found.recall_interval[0][0] < 0.5


def test_many_classes_of_three_examples_each() -> None:
    labels = np.random.default_rng(0).integers(100, size=300)
    transition = symmetric_transition(100, 0.3)
    found = clean_accuracy(labels, corrupt_labels(labels, transition, 1), transition)
    assert 0.9 < found.interval[0] < found.interval[1] <= 1
    for recall, (low, high) in zip(found.recall, found.recall_interval, strict=True):
        assert 0 <= low <= recall <= high <= 1 or (math.isnan(recall) and (low, high) == (0, 1))


def test_ignored_labels_are_left_out() -> None:
    labels, predictions = pairs(expected_counts(ASYMMETRIC, 100))
    expected = clean_accuracy(predictions, labels, ASYMMETRIC)
    found = clean_accuracy(np.append(predictions, [7, -1]), np.append(labels, [-100, -100]), ASYMMETRIC)
    assert found == expected


def test_clean_labels_contradict_the_noise() -> None:
    labels = np.arange(300) % 3
    found = clean_accuracy(labels, labels, symmetric_transition(3, 0.4))
    assert not found.consistent
    assert "contradict T" in str(found)
    assert clean_accuracy(labels, labels, np.eye(3)).consistent
    assert not clean_accuracy(labels, labels, ASYMMETRIC).consistent


def test_the_report_in_words() -> None:
    text = str(clean_accuracy([0, 1, 1, 0] * 20, [0, 1, 0, -100] * 20, symmetric_transition(2, 0.1)))
    assert text.splitlines() == [
        "clean accuracy 0.7083, 95 % certificate [0.5414, 0.8539]; noisy accuracy 0.6667; 60 examples",
        "recall of class 0: 0.5294 [0.3745, 0.6845]",
        "recall of class 1: 1.0000 [0.9097, 1.0000]",
    ]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"predictions": [[0.1, 0.9, 0]]}, r"predictions have shape \(1, 3\).*argmax"),
    ({"noisy_labels": [[0, 1, 0]]}, r"noisy_labels have shape \(1, 3\).*soft or multi-label"),
    ({"noisy_labels": [0.5, 1, 2]}, "noisy_labels have dtype float64; clean accuracy is for class indices"),
    ({"noisy_labels": [0, 1]}, "3 predictions, but 2 noisy_labels"),
    ({"noisy_labels": [0, 1, 3]}, r"label 3 lies outside 0\.\.2"),
    ({"noisy_labels": [0, 1, -1]}, r"label -1 lies outside 0\.\.2"),
    ({"predictions": [0, 1, 3]}, r"prediction 3 lies outside 0\.\.2.*for all classes of the model"),
    ({"predictions": np.zeros(0, int), "noisy_labels": np.zeros(0, int)}, "of no example"),
    ({"noisy_labels": [-100, -100, -100]}, "of no example: noisy_labels is empty or holds -100 only"),
    ({"transition": symmetric_transition(3, 2 / 3)}, "noise_transition is singular"),
    ({"transition": [[1, 1], [0, 1]]}, "row 0 of noise_transition sums to 2"),
    ({"transition": 0.4}, "give the matrix: symmetric_transition"),
    ({"confidence": 95}, "confidence is 95"),
    ({"transition_samples": ASYMMETRIC}, r"transition_samples have shape \(3, 3\)"),
    ({"transition_samples": [ASYMMETRIC]}, r"shape \(1, 3, 3\).*two at least"),
    ({"transition_samples": [ASYMMETRIC, 2 * ASYMMETRIC]}, r"transition_samples\[1\] is no transition matrix"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_is_refused(changes: dict[str, Any], message: str) -> None:
    given = {"predictions": [0, 1, 2], "noisy_labels": [0, 1, 2], "transition": ASYMMETRIC}
    with pytest.raises(ValueError, match=message):
        clean_accuracy(**{**given, **changes})


def test_draws_beyond_a_singular_matrix_leave_nothing_known() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 200)
    draws = np.stack([ASYMMETRIC] * 97 + [ASYMMETRIC[[1, 0, 2]]] + [np.full((3, 3), 1 / 3)] * 2)
    bounded = clean_accuracy(labels, labels, ASYMMETRIC, transition_samples=np.concatenate([draws, draws[:97]]))
    assert bounded.interval != (0, 1)
    found = clean_accuracy(labels, labels, ASYMMETRIC, transition_samples=draws)
    assert found.interval == (0, 1)
    assert set(found.recall_interval) == {(0, 1)}
    assert found.accuracy == bounded.accuracy
    assert clean_accuracy(labels, labels, ASYMMETRIC, transition_samples=draws[-2:]).interval == (0, 1)


def test_many_classes_and_heavy_noise_leave_the_sign_of_a_determinant() -> None:
    """``|T| = (1 - rate K / (K - 1))^(K - 1)`` is here 1e-343, which no float holds; rows that swap turn its sign."""
    matrix = symmetric_transition(340, 0.9)
    assert np.linalg.det(matrix) == 0
    swapped = matrix[[1, 0, *range(2, 340)]]
    labels = np.arange(680) % 340
    assert clean_accuracy(labels, labels, matrix, transition_samples=[matrix, matrix]).interval != (0, 1)
    assert clean_accuracy(labels, labels, matrix, transition_samples=[swapped, swapped]).interval == (0, 1)


METRIC = """
import json, sys
import evaluate
from hf_robust_ft import CLEAN_ACCURACY_METRIC
metric = evaluate.load(CLEAN_ACCURACY_METRIC)
metric.add_batch(predictions=[0, 1], references=[0, 1])
print(json.dumps(metric.compute(predictions=[2, 0, 0], references=[2, 1, -100], transition=json.loads(sys.argv[1]))))
"""


def test_the_metric_loads_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    done = subprocess.run(
        [sys.executable, "-c", METRIC, json.dumps(ASYMMETRIC.tolist())],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    expected = clean_accuracy([0, 1, 2, 0], [0, 1, 2, 1], ASYMMETRIC)
    assert found["clean_accuracy"] == pytest.approx(expected.accuracy)
    assert (found["clean_accuracy_low"], found["clean_accuracy_high"]) == pytest.approx(expected.interval)
    assert found["noisy_accuracy"] == 0.75
    for k in range(3):
        assert found[f"clean_recall_{k}"] == pytest.approx(expected.recall[k])
        assert (found[f"clean_recall_{k}_low"], found[f"clean_recall_{k}_high"]) == pytest.approx(
            expected.recall_interval[k]
        )


def test_the_metric_takes_what_the_function_takes() -> None:
    evaluate = pytest.importorskip("evaluate")
    metric = evaluate.load(CLEAN_ACCURACY_METRIC)
    given = {"predictions": [0, 1, 2], "references": [0, 1, 2]}
    wide = metric.compute(**given, transition=ASYMMETRIC, transition_samples=[ASYMMETRIC] * 3, confidence=0.99)
    assert wide["clean_accuracy_low"] <= metric.compute(**given, transition=ASYMMETRIC)["clean_accuracy_low"]
    with pytest.raises(ValueError, match="noise_transition is singular"):
        metric.compute(**given, transition=symmetric_transition(3, 2 / 3))
    with pytest.raises(ValueError, match="noisy_labels have dtype float"):
        metric.compute(predictions=[0, 1], references=[0.5, 1], transition=ASYMMETRIC)
