"""The public estimate: what it finds, how sure it says to be, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mixture import draw, mixture, row_tv

from hf_robust_ft import (
    TransitionEstimate,
    corrupt_labels,
    crossfit,
    estimate_transition,
    pair_flip_transition,
    symmetric_transition,
)
from hf_robust_ft.estimation.verdict import trusted_verdict, write_verdict

T3 = np.array([[0.7, 0.2, 0.1], [0.05, 0.8, 0.15], [0.3, 0.1, 0.6]])


@pytest.fixture(scope="module")
def estimate() -> TransitionEstimate:
    x, y, _ = mixture(2000)
    return estimate_transition(x, corrupt_labels(y, T3, 1), bootstrap=20)


@pytest.mark.parametrize("method", ["joint", "confident_joint", "dual_t", "trusted"])
@pytest.mark.parametrize("truth", [T3, symmetric_transition(3, 0.3), pair_flip_transition(3, 0.3)])
def test_every_method_finds_the_noise(method: str, truth: np.ndarray) -> None:
    x, y, _ = mixture(3000, distance=4)
    trusted = (x[:150], y[:150]) if method == "trusted" else None
    found = estimate_transition(
        x[150:], corrupt_labels(y[150:], truth, 1), method=method, trusted=trusted, bootstrap=10
    )
    assert row_tv(found.transition, truth) < {"joint": 0.04, "dual_t": 0.16}.get(method, 0.1)
    assert found.method == method
    np.testing.assert_allclose(found.transition.sum(axis=1), 1)
    np.testing.assert_allclose(found.clean_prior, 1 / 3, atol=0.06)
    assert found.noise_rate == pytest.approx((1 - np.diag(truth)).mean(), abs=0.16 if method == "dual_t" else 0.08)


def test_clean_labels_give_nearly_the_identity_and_say_so() -> None:
    x, y, _ = mixture(3000)
    found = estimate_transition(x, y, bootstrap=10)
    np.testing.assert_allclose(found.transition, np.eye(3), atol=0.02)
    assert found.verdict.startswith("Little or no noise")
    assert "can be inverted" in found.verdict
    assert found.identifiable


def test_an_estimate_carries_what_it_takes_to_judge_it(estimate: TransitionEstimate) -> None:
    assert estimate.interval.shape == (3, 3, 2)
    assert (estimate.interval[..., 0] <= estimate.transition).all()
    assert (estimate.transition <= estimate.interval[..., 1]).all()
    assert estimate.standard_error.min() > 0
    assert estimate.noise_rate_interval[0] < estimate.noise_rate < estimate.noise_rate_interval[1]
    assert estimate.noise_rate == pytest.approx(1 - estimate.clean_prior @ np.diag(estimate.transition))
    assert estimate.condition_number == pytest.approx(np.linalg.cond(estimate.transition))
    assert estimate.smallest_singular_value == pytest.approx(np.linalg.svd(estimate.transition)[1][-1])
    assert estimate.counts.sum() == estimate.n == 2000
    assert (estimate.effective_counts < 2000 * estimate.clean_prior).all()
    assert (estimate.bootstrap, estimate.folds, estimate.seed) == (20, 5, 0)
    assert estimate.verdict.startswith("There is noise")


def test_the_same_seed_gives_the_same_estimate(estimate: TransitionEstimate) -> None:
    x, y, _ = mixture(2000)
    noisy = corrupt_labels(y, T3, 1)
    again = estimate_transition(x.tolist(), noisy.tolist(), num_classes=3, bootstrap=20)
    np.testing.assert_array_equal(again.transition, estimate.transition)
    np.testing.assert_array_equal(again.interval, estimate.interval)
    other = estimate_transition(x, noisy, bootstrap=20, seed=1)
    assert (other.transition != estimate.transition).any()


def test_an_estimate_survives_a_file(estimate: TransitionEstimate, tmp_path: Path) -> None:
    path = tmp_path / "new" / "noise.json"
    estimate.save(path)
    again = TransitionEstimate.load(path)
    for name, value in vars(estimate).items():
        np.testing.assert_array_equal(getattr(again, name), value)
        assert type(getattr(again, name)) is type(value)
    assert [p.name for p in path.parent.iterdir()] == ["noise.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is not JSON"), ("[]", "holds no transition estimate"), ('{"format": "x"}', "holds no transition estimate")],
)
def test_another_file_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "noise.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        TransitionEstimate.load(path)


def test_a_file_of_an_estimate_is_plain_json(estimate: TransitionEstimate, tmp_path: Path) -> None:
    estimate.save(tmp_path / "noise.json")
    content = json.loads((tmp_path / "noise.json").read_text())
    assert np.shape(content["transition"]) == (3, 3)
    assert content["format"] == "hf_robust_ft.TransitionEstimate/1"


def test_an_estimate_reads_well(estimate: TransitionEstimate) -> None:
    text = str(estimate)
    assert "Noise transition matrix of 3 classes, from 2000 examples (joint)" in text
    assert re.search(r"noise rate +\d+\.\d% +\[\d+\.\d%, \d+\.\d%\]", text)
    assert estimate.verdict in text
    assert max(map(len, text.splitlines()[:-1])) < 100


def test_many_classes_are_summed_up() -> None:
    x, y, _ = mixture(1500, num_classes=15, dimensions=20, distance=6)
    truth = pair_flip_transition(15, 0.3)
    found = estimate_transition(x, corrupt_labels(y, truth, 0), bootstrap=10)
    assert row_tv(found.transition, truth) < 0.1
    lines = str(found).split("most frequent mistakes")[1].splitlines()[1:11]
    pairs = [tuple(map(int, re.findall(r"(\d+) -> (\d+)", line)[0])) for line in lines]
    assert all(j == (i + 1) % 15 for i, j in pairs)


def test_classes_of_a_few_examples_are_estimated_and_named() -> None:
    x, y, _ = mixture(900, num_classes=4, distance=5)
    kept = (y != 3) | (np.cumsum(y == 3) <= 3)
    found = estimate_transition(x[kept], y[kept], bootstrap=10)
    assert np.isfinite(found.transition).all()
    assert "Few sure examples of class 3" in found.verdict


def test_chance_is_not_identifiable() -> None:
    x, y, _ = mixture(1500)
    found = estimate_transition(x, corrupt_labels(y, symmetric_transition(3, 2 / 3), 0), bootstrap=20)
    assert not found.identifiable
    assert found.singular_value_interval[0] == 0
    assert "not identifiable" in found.verdict


def test_intervals_cover_the_truth() -> None:
    """95 % intervals for all entries, the diagonal and the rate, over 30 simulated data sets."""
    covered, of_rate = [], []
    for seed in range(30):
        x, y, _ = mixture(1000, seed=seed)
        noisy = corrupt_labels(y, T3, 1000 + seed)
        found = estimate_transition(x, noisy, bootstrap=20, seed=seed)
        covered.append((found.interval[..., 0] <= T3) & (found.interval[..., 1] >= T3))
        of_rate.append(found.noise_rate_interval[0] <= (noisy != y).mean() <= found.noise_rate_interval[1])
    share = np.mean(covered, axis=0)
    assert share.mean() > 0.88, share
    assert np.mean(of_rate) > 0.85


def test_trusted_examples_make_the_estimate_better_and_surer() -> None:
    truth = pair_flip_transition(4, 0.4)
    x, y, _ = mixture(900, num_classes=4, dimensions=20, distance=2.5)
    noisy = corrupt_labels(y, truth, 1)
    plain = estimate_transition(x[:600], noisy[:600], bootstrap=20)
    relabelled = estimate_transition(
        x[:600], noisy[:600], trusted=(x[600:], y[600:], noisy[600:]), bootstrap=20, num_classes=4
    )
    assert row_tv(relabelled.transition, truth) < row_tv(plain.transition, truth)
    assert relabelled.standard_error.mean() < 0.8 * plain.standard_error.mean()
    assert relabelled.noise_rate_error < plain.noise_rate_error


def test_trusted_examples_tell_of_errors_that_follow_from_the_features() -> None:
    x, y, _ = mixture(900, seed=0)
    # As a rule does that takes a kind of class 0 for class 1.
    taken = (y == 0) & (np.arange(900) % 2 == 0)
    x[taken, 5] += 6
    weak = np.where(taken, 1, y)
    trusted = (x[800:], y[800:], weak[800:])
    missed = estimate_transition(x[:800], weak[:800], trusted=trusted, bootstrap=10)
    assert missed.noise_rate < 0.06 < (weak != y).mean()
    wrong = int((weak[800:] != y[800:]).sum())
    assert f"of 100 trusted examples {wrong} carry a wrong label, where T says" in missed.verdict
    # Nothing is said against noise that depends on the class alone, or without noisy labels.
    noisy = corrupt_labels(y, T3, 1)
    seen = estimate_transition(x[:800], noisy[:800], trusted=(x[800:], y[800:], noisy[800:]), bootstrap=10)
    assert "trusted examples" not in seen.verdict
    assert (
        "carry a wrong label" not in estimate_transition(x[:800], weak[:800], trusted=trusted[:2], bootstrap=10).verdict
    )


def test_the_verdict_on_trusted_examples_is_seldom_wrong() -> None:
    """Given T, wrong labels among them are a sum of coin flips: 2.5 deviations and up in 1 of 160 draws."""
    clean = np.arange(200) % 3
    said = [trusted_verdict(T3, T3[None], clean, corrupt_labels(clean, T3, seed)) for seed in range(300)]
    assert sum(map(bool, said)) <= 6
    assert all(trusted_verdict(np.eye(3), np.eye(3)[None], clean, corrupt_labels(clean, T3, seed)) for seed in range(9))


def test_a_trusted_set_may_lack_a_class() -> None:
    x, y, _ = mixture(1500)
    noisy = corrupt_labels(y, T3, 1)
    few = np.flatnonzero(y[:200] < 2)
    found = estimate_transition(x[200:], noisy[200:], trusted=(x[few], y[few]), bootstrap=10)
    assert row_tv(found.transition, T3) < 0.08


def test_an_estimate_from_the_probabilities_of_a_model() -> None:
    x, y, _ = mixture(2000)
    noisy = corrupt_labels(y, T3, 1)
    p = crossfit(x, noisy, 3).probabilities
    found = estimate_transition(None, noisy, probabilities=p, bootstrap=10)
    assert row_tv(found.transition, T3) < 0.08
    assert 0 < found.class_conditional_p_value <= 1
    some = estimate_transition(
        None, noisy[300:], probabilities=p[300:], trusted=(p[:300], y[:300], noisy[:300]), bootstrap=10
    )
    assert row_tv(some.transition, T3) < 0.08


def instance_dependent(along: np.ndarray, y: np.ndarray, seed: int) -> np.ndarray:
    """Symmetric noise of 5 % on one side, 45 % on the other."""
    rng = np.random.default_rng(seed)
    flipped = rng.random(len(y)) < np.where(along > 0, 0.45, 0.05)
    return np.where(flipped, (y + rng.integers(1, 3, len(y))) % 3, y)


def test_the_class_conditional_test_keeps_its_level_and_has_power() -> None:
    null, power = [], []
    for seed in range(20):
        x, y, _ = mixture(800, seed=seed)
        conditional = estimate_transition(x, corrupt_labels(y, symmetric_transition(3, 0.25), seed), bootstrap=19)
        null.append(conditional.class_conditional_p_value)
        if seed < 8:
            # Along a direction in which classes do not differ; half the time one of little variance.
            x[:, -1] *= 2.0 if seed % 2 else 0.1
            found = estimate_transition(x, instance_dependent(x[:, -1], y, seed), bootstrap=19)
            power.append(found.class_conditional_p_value)
            assert found.class_conditional_effect > 0.1
    # Of 20 at a level of 5 %, four or more are rejected with probability 1.6 %.
    assert np.sum(np.array(null) <= 0.05) <= 3
    assert np.mean(null) > 0.3
    assert np.mean(np.array(power) <= 0.05) >= 0.75


def arguments(**changes: Any) -> dict[str, Any]:
    x, y, _ = mixture(60)
    return {"features": x, "labels": y, "bootstrap": 10} | changes


X, Y, _ = mixture(60)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": np.eye(3)[Y]}, r"labels have shape \(60, 3\), which looks like soft or multi-label targets"),
        ({"labels": Y.astype(float)}, "labels have dtype float64; class labels are integers"),
        ({"labels": Y - 1}, r"label -1 lies outside 0\.\.1"),
        ({"labels": Y, "num_classes": 2}, r"label 2 lies outside 0\.\.1"),
        ({"labels": Y[:50]}, "there are 50 labels for 60 rows of features"),
        ({"labels": np.zeros(60, dtype=int)}, "num_classes is 1; a transition matrix needs at least 2 classes"),
        ({"features": X[:0], "labels": Y[:0]}, "labels are empty"),
        ({"num_classes": 5}, r"labels hold no example of class 3, 4 \(of 5\).*add examples of them, or drop"),
        ({"features": np.where(X[4, 2] == X, np.nan, X)}, r"features\[4, 2\] is nan; features must be finite"),
        ({"features": X[:, 0]}, r"features have shape \(60,\); give one row an example"),
        ({"features": [["a"]] * 60}, "features are not a matrix of numbers"),
        ({"labels": np.where(Y == 1, -100, Y)}, r"labels: label -100 lies.*leave out.*features\[labels != -100\]"),
        ({"labels": Y + 10**10}, "num_classes is 10000000003, and labels reach 10000000002; .* at most 10000 classes"),
        ({"method": "magic"}, "method is 'magic'; choose one of joint, confident_joint, dual_t, trusted"),
        ({"bootstrap": 5}, "bootstrap is 5; standard errors need at least 10 replicates"),
        ({"folds": 1}, "folds is 1"),
        ({"method": "trusted"}, r"method='trusted' needs trusted=\(features, clean labels\)"),
        (
            {"method": "dual_t", "trusted": (X, Y)},
            "trusted examples are given, but method='dual_t' does not use them; set method='joint' or 'trusted'",
        ),
        ({"trusted": X}, r"trusted is ndarray; give a tuple \(features, clean labels\), or with their noisy labels"),
        ({"trusted": (X, Y, Y[:3])}, "there are 3 trusted noisy labels for 60 rows of features"),
        ({"features": None}, "got neither of features and probabilities; give one of the two"),
        ({"probabilities": np.eye(3)[Y]}, "got both of features and probabilities; give one of the two"),
        (
            {"method": "trusted", "trusted": (X[Y < 2], Y[Y < 2])},
            r"trusted labels hold no example of class 2 \(of 3\)",
        ),
        ({"method": "trusted", "trusted": (X[:, :2], Y)}, "new features have 2 dimensions, but the others 6"),
        ({"method": "trusted", "trusted": (X, Y[:9])}, "there are 9 trusted labels for 60 rows of features"),
    ],
)
def test_what_cannot_be_estimated_from_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        estimate_transition(**arguments(**changes))


@pytest.mark.parametrize(
    ("rate", "interval", "p_value", "effect", "expected"),
    [
        (0.01, (0.0, 0.02), 0.5, 0.0, "Little or no noise: an estimated 1% of the labels are wrong"),
        (0.08, (0.0, 0.16), 0.5, 0.0, "Perhaps noise: an estimated 8%"),
        (0.4, (0.37, 0.43), 0.5, 0.0, "There is noise: an estimated 40% of the labels are wrong (95 % interval 37% to"),
        (0.4, (0.37, 0.43), 0.02, 0.2, "The noise depends on more than the class (p = 0.02, effect size 0.20)"),
        (0.4, (0.37, 0.43), 0.02, 0.05, "no sign that the noise depends on more than the class"),
    ],
)
def test_the_verdict(rate: float, interval: tuple[float, float], p_value: float, effect: float, expected: str) -> None:
    assert expected in write_verdict(rate, interval, (0.3, 0.5), np.full(3, 100.0), 1500, p_value, effect)


def test_of_no_noise_the_verdict_says_nothing_more() -> None:
    said = write_verdict(0.01, (0.0, 0.02), (0.3, 0.5), np.full(3, 100.0), 1500, 0.02, 0.2)
    assert "more than the class" not in said


def test_draws_lie_about_the_estimate_with_its_errors() -> None:
    features, labels, _ = mixture(1500, num_classes=3)
    noisy = draw(symmetric_transition(3, 0.3)[labels], seed=1)
    found = estimate_transition(features, noisy, bootstrap=60)
    assert found.draws.shape == (60, 3, 3)
    np.testing.assert_allclose(found.draws.sum(2), 1, rtol=0, atol=1e-5)
    np.testing.assert_allclose(found.draws.mean(0), found.transition, rtol=0, atol=0.02)
    spread = np.sqrt(((found.draws - found.transition) ** 2).mean(0))
    np.testing.assert_allclose(spread, found.standard_error, rtol=1e-4)


@pytest.mark.parametrize("features", [np.ones((90, 4)), np.zeros((90, 2)), 1e10 * np.ones((90, 4))])
def test_features_that_do_not_vary_are_refused(features: np.ndarray) -> None:
    with pytest.raises(ValueError, match="features are the same for all examples"):
        estimate_transition(features, np.arange(90) % 3)


@pytest.mark.parametrize(("factor", "shift"), [(1e-12, 0.0), (1e100, 0.0), (1.0, 1e6)])
def test_scale_and_place_of_the_features_make_no_difference(factor: float, shift: float) -> None:
    features, labels, _ = mixture(600, num_classes=3)
    noisy = draw(symmetric_transition(3, 0.2)[labels], seed=1)
    expected = estimate_transition(features, noisy, bootstrap=10)
    found = estimate_transition(factor * features + shift, noisy, bootstrap=10)
    np.testing.assert_allclose(found.transition, expected.transition, rtol=0, atol=1e-2)


def test_features_may_be_a_tensor_of_any_precision() -> None:
    x, y, _ = mixture(60)
    half = torch.tensor(x, requires_grad=True).bfloat16()
    found = estimate_transition(half, y, bootstrap=10)  # type: ignore[arg-type]
    expected = estimate_transition(half.detach().double().numpy(), y, bootstrap=10)
    np.testing.assert_array_equal(found.transition, expected.transition)


@pytest.mark.parametrize("row", [[1 / 3, 1 / 3, 1 / 3], [0.2, 0.3, 0.5]])
def test_probabilities_that_say_nothing_identify_nothing(row: list[float]) -> None:
    """Every replicate then finds the same T, whose entries are all about 1/3."""
    found = estimate_transition(None, np.arange(60) % 3, probabilities=np.tile(row, (60, 1)), bootstrap=10)
    np.testing.assert_allclose(found.transition, 1 / 3, atol=1e-4)
    assert not found.identifiable
    assert not found.informative
    assert "not identifiable" in found.verdict


def test_features_whose_squares_overflow_are_refused() -> None:
    features, labels, _ = mixture(90)
    with pytest.raises(ValueError, match="whose square overflows; scale them down"):
        estimate_transition(1e160 * features, labels)


@pytest.mark.parametrize(("num_classes", "n"), [(10, 100), (10, 60), (5, 50)])
def test_clean_labels_of_few_examples_are_not_called_noisy(num_classes: int, n: int) -> None:
    features, labels, _ = mixture(n, num_classes=num_classes, dimensions=num_classes, distance=12.0)
    labels[:num_classes] = range(num_classes)
    features[:num_classes] = 12.0 * np.eye(num_classes)
    assert "There is noise" not in estimate_transition(features, labels, bootstrap=10).verdict
