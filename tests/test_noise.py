"""Transition matrices: closed forms, refusals, and labels drawn from them."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from hf_robust_ft import (
    corrupt_dataset,
    corrupt_labels,
    invert_transition,
    load_transition,
    pair_flip_transition,
    symmetric_transition,
    validate_transition,
)


def random_transition(num_classes: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return 0.6 * np.eye(num_classes) + 0.4 * rng.dirichlet(np.ones(num_classes), num_classes)


def test_symmetric_matrix_is_the_definition() -> None:
    expected = [[0.6, 0.2, 0.2], [0.2, 0.6, 0.2], [0.2, 0.2, 0.6]]
    np.testing.assert_allclose(symmetric_transition(3, 0.4), expected, atol=1e-15)


def test_pair_flip_sends_each_class_to_the_next() -> None:
    expected = [[0.7, 0.3, 0], [0, 0.7, 0.3], [0.3, 0, 0.7]]
    np.testing.assert_allclose(pair_flip_transition(3, 0.3), expected, atol=1e-15)


@pytest.mark.parametrize("num_classes", [2, 3, 10, 100])
@pytest.mark.parametrize("rate", [0.0, 0.2, 0.45])
def test_inverse_has_the_closed_forms_of_symmetric_noise(num_classes: int, rate: float) -> None:
    matrix, condition, amplification = invert_transition(symmetric_transition(num_classes, rate))
    # T = (1 - s) I + s J / K with s = rate K / (K - 1), and J / K is a projection.
    s = rate * num_classes / (num_classes - 1)
    flat = np.full((num_classes, num_classes), 1 / num_classes)
    np.testing.assert_allclose(matrix, (np.eye(num_classes) - s * flat) / (1 - s), atol=1e-10)
    assert condition == pytest.approx(1 / (1 - s))
    off = s / num_classes / (1 - s)
    assert amplification == pytest.approx((1 + off) - off + 2 * (num_classes - 1) * off)


def test_rows_of_an_inverse_sum_to_one() -> None:
    inverse = invert_transition(random_transition(7)).matrix
    np.testing.assert_allclose(inverse.sum(axis=1), 1, atol=1e-12)


@pytest.mark.parametrize("matrix", [symmetric_transition(4, 0.75), pair_flip_transition(4, 0.5), np.full((2, 2), 0.5)])
def test_a_singular_matrix_is_refused(matrix: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"noise_transition is singular .*condition number"):
        invert_transition(matrix)


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        ([[0.9, 0.1]], r"has shape \(1, 2\); a transition matrix is square"),
        ([0.5, 0.5], r"has shape \(2,\)"),
        ([[1.0]], r"has shape \(1, 1\)"),
        ([[0.9, 0.1], [math.nan, 1]], r"noise_transition\[1, 0\] is nan; entries must be finite"),
        ([[1.1, -0.1], [0, 1]], r"noise_transition\[0, 1\] is -0.1; .* must not be negative"),
        ([[0.9, 0.2], [0.1, 0.9]], r"row 0 of noise_transition sums to 1.1, not 1; divide"),
        ([[0.9, 0.3], [0.1, 0.7]], r"looks transposed: .* pass T.T"),
        ([[0.9, 0.1], [0.2]], "not a matrix of numbers"),
        ([["a", "b"], ["c", "d"]], "not a matrix of numbers"),
    ],
)
def test_what_is_no_transition_matrix_is_refused(matrix: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        validate_transition(matrix)


def test_wrong_number_of_classes_names_both() -> None:
    with pytest.raises(ValueError, match=r"is for 3 classes, but the model has 10; give a \[10, 10\]"):
        validate_transition(symmetric_transition(3, 0.1), 10)


def test_rounded_rows_are_normalised_and_the_input_is_not_changed() -> None:
    given = np.array([[0.333333, 0.333333, 0.333334], [0, 1, 0], [0, 0, 1.000009]])
    before = given.copy()
    np.testing.assert_allclose(validate_transition(given).sum(axis=1), 1, atol=1e-15)
    np.testing.assert_array_equal(given, before)


def test_every_source_gives_the_same_matrix(tmp_path: Path) -> None:
    matrix = random_transition(3)
    np.save(tmp_path / "T.npy", matrix)
    (tmp_path / "T.json").write_text(json.dumps(matrix.tolist()))
    sources = [
        matrix,
        matrix.tolist(),
        json.dumps(matrix.tolist()),
        str(tmp_path / "T.npy"),
        tmp_path / "T.json",
    ]
    for source in sources:
        np.testing.assert_allclose(load_transition(source, 3), matrix, atol=1e-15)
    for rate in (0.25, "0.25"):
        np.testing.assert_array_equal(load_transition(rate, 3), symmetric_transition(3, 0.25))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("T.txt", b"1 0", r"ends in '.txt'; give a .npy or .json file"),
        ("T.json", b"[[1, 0], [0", "T.json is not valid JSON"),
        ("T.json", b'{"a": 1}', "not a matrix of numbers"),
        ("T.npy", b"not an array", "T.npy is no plain .npy array"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_transition(str(tmp_path / name))


def test_a_pickle_is_never_run(tmp_path: Path) -> None:
    np.save(tmp_path / "T.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"no plain \.npy array"):
        load_transition(str(tmp_path / "T.npy"))


def test_a_missing_file_is_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"noise_transition='nowhere\.npy' is neither a number"):
        load_transition("nowhere.npy")


def test_a_rate_needs_the_number_of_classes() -> None:
    with pytest.raises(ValueError, match=r"the rate 0\.2, but the number of classes is not known"):
        load_transition(0.2)


@pytest.mark.parametrize("rate", [-0.1, 1.5, math.nan])
def test_a_rate_is_a_probability(rate: float) -> None:
    for build in (symmetric_transition, pair_flip_transition):
        with pytest.raises(ValueError, match=f"noise rate is {rate}"):
            build(3, rate)
    with pytest.raises(ValueError, match="noise_transition is True"):
        load_transition(True, 3)


@pytest.mark.parametrize("num_classes", [0, 1, 1_000_000])
def test_a_number_of_classes_out_of_range_is_refused(num_classes: int) -> None:
    with pytest.raises(ValueError, match=f"num_classes is {num_classes}"):
        symmetric_transition(num_classes, 0.1)


def test_noisy_labels_have_the_frequencies_of_the_matrix() -> None:
    matrix = random_transition(5)
    clean = np.repeat(np.arange(5), 40_000)
    noisy = corrupt_labels(clean, matrix, seed=3)
    found = np.array([np.bincount(noisy[clean == i], minlength=5) for i in range(5)]) / 40_000
    # Six standard errors of a binomial share.
    assert (np.abs(found - matrix) < 6 * np.sqrt(matrix * (1 - matrix) / 40_000)).all()


def test_corruption_is_reproducible_and_depends_on_the_seed() -> None:
    clean = np.arange(1000) % 4
    matrix = symmetric_transition(4, 0.5)
    np.testing.assert_array_equal(corrupt_labels(clean, matrix, 1), corrupt_labels(clean, matrix, 1))
    assert (corrupt_labels(clean, matrix, 1) != corrupt_labels(clean, matrix, 2)).any()


def test_impossible_labels_are_never_drawn_and_ignored_ones_stay() -> None:
    clean = np.full((100, 50), 1)
    clean[:, ::2] = -100
    # The row sums to just below 1 in floating point: no draw may fall off its end.
    matrix = np.array([[1, 0, 0, 0], [0.1, 0.2, 0.7, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    noisy = corrupt_labels(clean, matrix, 0)
    assert (noisy[:, ::2] == -100).all()
    assert set(np.unique(noisy[:, 1::2])) == {0, 1, 2}


def test_the_identity_changes_nothing() -> None:
    clean = np.arange(30) % 3
    np.testing.assert_array_equal(corrupt_labels(clean, np.eye(3), 0), clean)


@pytest.mark.parametrize("label", [-1, 3])
def test_labels_out_of_range_are_refused(label: int) -> None:
    with pytest.raises(ValueError, match=re.escape(f"label {label} lies outside 0..2 (1 such labels)")):
        corrupt_labels([0, label, 1], np.eye(3), 0)


def test_labels_must_be_integers() -> None:
    with pytest.raises(ValueError, match="labels have dtype float64"):
        corrupt_labels([0.5, 1.0], np.eye(2), 0)


def labelled(names: list[str] | None = None) -> Dataset:
    label = ClassLabel(names=names) if names else Value("int64")
    columns = {"text": [f"t{i}" for i in range(60)], "label": [i % 3 for i in range(60)]}
    return Dataset.from_dict(columns, features=Features({"text": Value("string"), "label": label}))


@pytest.mark.parametrize("names", [None, ["a", "b", "c"]])
def test_a_corrupted_data_set_keeps_its_clean_labels(names: list[str] | None) -> None:
    dataset = labelled(names)
    matrix = random_transition(3)
    noisy = corrupt_dataset(dataset, matrix, seed=5)
    assert noisy["clean_label"][:] == dataset["label"][:]
    assert noisy["label"][:] == corrupt_labels(dataset["label"][:], matrix, 5).tolist()
    assert noisy["label"][:] != dataset["label"][:]
    assert noisy["text"][:] == dataset["text"][:]
    assert noisy.features["label"] == noisy.features["clean_label"] == dataset.features["label"]
    assert "clean_label" not in dataset.column_names


def test_a_selection_of_rows_is_corrupted_by_position() -> None:
    dataset = labelled().shuffle(seed=1).select(range(20))
    noisy = corrupt_dataset(dataset, 0.5 * np.eye(3) + 0.5 / 3, seed=5)
    assert noisy["clean_label"][:] == dataset["label"][:]
    assert noisy["label"][:] == corrupt_labels(dataset["label"][:], 0.5 * np.eye(3) + 0.5 / 3, 5).tolist()


def test_a_rate_is_enough_where_the_column_knows_its_classes() -> None:
    dataset = labelled(["a", "b", "c"])
    expected = corrupt_dataset(dataset, symmetric_transition(3, 0.4), seed=0)
    assert corrupt_dataset(dataset, 0.4, seed=0)["label"][:] == expected["label"][:]
    with pytest.raises(ValueError, match="number of classes is not known"):
        corrupt_dataset(labelled(), 0.4, seed=0)


def test_columns_are_checked() -> None:
    with pytest.raises(ValueError, match="label_column 'y' is not among the columns"):
        corrupt_dataset(labelled(), np.eye(3), 0, label_column="y")
    with pytest.raises(ValueError, match="clean_column 'clean_label' exists already"):
        corrupt_dataset(corrupt_dataset(labelled(), np.eye(3), 0), np.eye(3), 0)
