"""Each way to estimate T, against closed forms and mixtures with a known posterior."""

from __future__ import annotations

import numpy as np
import pytest
from mixture import draw, mixture, row_tv
from scipy.optimize import approx_fprime
from scipy.special import softmax

from hf_robust_ft import (
    confident_joint_transition,
    corrupt_labels,
    crossfit,
    dual_t_transition,
    pair_flip_transition,
    symmetric_transition,
    trusted_transition,
)
from hf_robust_ft.estimation import joint_likelihood
from hf_robust_ft.estimation.class_conditional import PENALTY, dependence, excess_wrongness, simulated_p_value
from hf_robust_ft.estimation.crossfit import given_probabilities, stratified_folds
from hf_robust_ft.estimation.joint_likelihood import Gold, head_for, joint_transition, negative_log_posterior
from hf_robust_ft.estimation.ridge import RIDGE_GRID, best_penalty, decompose, leave_one_out
from hf_robust_ft.estimation.shrinkage import shrink

T3 = np.array([[0.7, 0.2, 0.1], [0.05, 0.8, 0.15], [0.3, 0.1, 0.6]])


def test_folds_deal_every_class_evenly() -> None:
    labels = np.repeat(np.arange(4), [17, 5, 3, 1])
    fold = stratified_folds(labels, 5, seed=0)
    assert np.ptp(np.bincount(fold, minlength=5)) <= 1
    for c in range(4):
        assert np.ptp(np.bincount(fold[labels == c], minlength=5)) <= 1
    assert (fold == stratified_folds(labels, 5, seed=0)).all()
    assert (fold != stratified_folds(labels, 5, seed=1)).any()


@pytest.mark.parametrize(("folds", "message"), [(1, "folds is 1; .* at least 2"), (9, "8 examples for 9 folds; lower")])
def test_impossible_folds_are_refused(folds: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stratified_folds(np.arange(8) % 2, folds, 0)


@pytest.mark.parametrize(("n", "dimensions"), [(60, 5), (40, 90)])
def test_left_out_scores_are_those_of_heads_without_the_example(n: int, dimensions: int) -> None:
    """Both Gram matrices, against a naive solve for each example with d + 1 unknowns."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((n, dimensions)), rng.integers(0, 3, n)
    found = crossfit(x, y, 3, folds=4)
    standard, onehot = (x - x.mean(0)) / x.std(0), np.eye(3)[y]
    design = np.c_[standard, np.ones(n)]
    penalty = found.ridge * n * np.diag([1.0] * dimensions + [0.0])
    expected = np.empty((n, 3))
    for i in range(n):
        others = design[np.arange(n) != i]
        head = np.linalg.solve(others.T @ others + penalty, others.T @ np.delete(onehot, i, 0))
        expected[i] = design[i] @ head - np.delete(onehot, i, 0).mean(0)
    np.testing.assert_allclose(found.scores, expected / np.sqrt((expected**2).mean()), atol=1e-8)
    assert found.ridge in RIDGE_GRID


def test_scores_of_other_labels_are_those_of_a_fit_to_them() -> None:
    x, y, _ = mixture(200)
    other = draw(np.full((200, 3), 1 / 3), 1)
    found = crossfit(x[:150], y[:150], 3, new=x[150:])
    spectrum = decompose((x[:150] - x[:150].mean(0)) / x[:150].std(0))
    onehot = np.eye(3)[other[:150]]
    expected = leave_one_out(spectrum, onehot, found.ridge) - (onehot.sum(0) - onehot) / 149
    scores, new = found.rescore(other[:150])
    np.testing.assert_allclose(scores, expected / np.sqrt((expected**2).mean()))
    assert new.shape == (50, 3)
    for again, first in zip(found.rescore(y[:150]), (found.scores, found.new_scores), strict=True):
        np.testing.assert_array_equal(again, first)


def test_the_penalty_has_the_least_error_left_out() -> None:
    x, y, _ = mixture(80, dimensions=60)
    onehot = np.eye(3)[y]
    spectrum = decompose(x - x.mean(0))
    errors = {g: ((leave_one_out(spectrum, onehot, g) - onehot) ** 2).sum() for g in RIDGE_GRID}
    assert best_penalty(spectrum, onehot) == min(errors, key=errors.__getitem__)


def test_probabilities_are_those_of_the_noisy_label() -> None:
    errors = []
    for n in (300, 3000, 30000):
        x, y, posterior = mixture(n)
        p = crossfit(x, corrupt_labels(y, T3, 1), 3).probabilities
        np.testing.assert_allclose(p.sum(1), 1)
        errors.append(np.abs(p - posterior @ T3).mean())
    # Not to 0: p T flattens at the rows of T, which no softmax of linear scores does.
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.08


def test_new_examples_are_predicted_alike() -> None:
    x, y, posterior = mixture(6000)
    found = crossfit(x[:4000], y[:4000], 3, new=x[4000:])
    assert found.new_probabilities.shape == (2000, 3)
    assert np.abs(found.new_probabilities - posterior[4000:]).mean() < 0.02
    with pytest.raises(ValueError, match="new features have 5 dimensions, but the others 6; use one model"):
        crossfit(x, y, 3, new=x[:, :5])


@pytest.mark.parametrize("dimensions", [20, 300])
def test_no_example_is_predicted_from_its_own_label(dimensions: int) -> None:
    """On labels of pure chance, an honest probability knows no more than the class frequencies."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((400, dimensions)), rng.integers(0, 4, 400)
    p = crossfit(x, y, 4).probabilities
    assert -np.log(p[np.arange(400), y]).mean() > np.log(4) - 0.02


def test_constant_features_and_rare_classes_survive() -> None:
    x, y, _ = mixture(200)
    y[y == 2] = 1
    y[0] = 2
    p = crossfit(np.c_[x, np.full(200, 1e6)], y, 3).probabilities
    assert np.isfinite(p).all()


@pytest.mark.parametrize("fixed", [False, True])
def test_the_gradient_of_the_joint_likelihood(fixed: bool) -> None:
    rng = np.random.default_rng(0)
    scores, labels = rng.standard_normal((50, 4)), np.sort(rng.integers(0, 3, 50))
    theta = rng.standard_normal(4 * 3 + 3 + 9)
    _, gradient = negative_log_posterior(theta, scores, labels, 3, fixed)
    numeric = approx_fprime(theta, lambda t: negative_log_posterior(t, scores, labels, 3)[0], 1e-7)
    free = slice(0, 15) if fixed else slice(None)
    np.testing.assert_allclose(gradient[free], numeric[free], atol=1e-6)
    assert not fixed or (gradient[15:] == 0).all()


@pytest.mark.parametrize("noisy", [None, np.array([0, 0, 2, 1])])
def test_the_likelihood_of_trusted_examples(noisy: np.ndarray | None) -> None:
    rng = np.random.default_rng(0)
    scores, labels = rng.standard_normal((30, 2)), np.sort(rng.integers(0, 3, 30))
    gold = Gold(rng.standard_normal((4, 2)), np.array([0, 1, 2, 1]), noisy)
    theta = rng.standard_normal(2 * 3 + 3 + 9)
    value, gradient = negative_log_posterior(theta, scores, labels, 3, gold=gold)
    numeric = approx_fprime(theta, lambda t: negative_log_posterior(t, scores, labels, 3, gold=gold)[0], 1e-7)
    np.testing.assert_allclose(gradient, numeric, atol=1e-6)
    p = softmax(gold.scores @ theta[:6].reshape(2, 3) + theta[6:9], axis=1)
    transition = softmax(theta[9:].reshape(3, 3), axis=1)
    expected = -np.log(p[np.arange(4), gold.labels]).sum()
    if noisy is not None:
        expected -= np.log(transition[gold.labels, noisy]).sum()
    assert 30 * (value - negative_log_posterior(theta, scores, labels, 3)[0]) == pytest.approx(expected)


@pytest.mark.parametrize("truth", [symmetric_transition(5, 0.4), pair_flip_transition(5, 0.4)])
def test_trusted_examples_help_and_more_of_them_more(truth: np.ndarray) -> None:
    errors = np.zeros((6, 4))
    for seed in range(6):
        x, y, _ = mixture(1400, num_classes=5, dimensions=30, distance=2.5, seed=seed)
        noisy = corrupt_labels(y, truth, seed + 100)
        cross = crossfit(x[:400], noisy[:400], 5, new=x[400:])
        for k, count in enumerate((0, 50, 200, 1000)):
            few = slice(400, 400 + count)
            gold = Gold(cross.new_scores[:count], y[few], noisy[few]) if count else None
            fit = joint_transition(cross.scores, noisy[:400], [0.7 * np.eye(5) + 0.06], gold)
            errors[seed, k] = row_tv(fit.transition, truth)
    mean = errors.mean(0)
    assert mean[0] > mean[1] > mean[2] > mean[3]
    assert mean[3] < 0.06


def test_trusted_examples_name_the_classes() -> None:
    """Where most labels of a class are wrong, only they can."""
    features, labels, _ = mixture(3000, distance=4)
    truth = np.array([[0.3, 0.7, 0.0], [0.0, 0.3, 0.7], [0.7, 0.0, 0.3]])
    noisy = draw(truth[labels], seed=1)
    cross = crossfit(features[:2800], noisy[:2800], 3, new=features[2800:])
    start = [np.full((3, 3), 1 / 3) + 0.01 * np.eye(3)]
    gold = Gold(cross.new_scores, labels[2800:], None)
    assert row_tv(joint_transition(cross.scores, noisy[:2800], start, gold).transition, truth) < 0.06
    assert row_tv(joint_transition(cross.scores, noisy[:2800], start).transition, truth) > 0.3


def test_probabilities_of_a_model_serve_as_scores() -> None:
    _, y, posterior = mixture(8000)
    noisy = corrupt_labels(y, T3, 1)
    # A model that is twice as sure as it may be: calibration undoes it.
    sure = softmax(2 * np.log(posterior), axis=1)
    cross = given_probabilities(sure, noisy, 3)
    np.testing.assert_allclose(cross.scores.mean(0), 0, atol=1e-10)
    assert (cross.scores**2).mean() == pytest.approx(1)
    fit = joint_transition(cross.scores, noisy, [0.7 * np.eye(3) + 0.1])
    assert row_tv(fit.transition, T3) < 0.03
    assert np.abs(fit.clean_probabilities(cross.scores) - posterior).mean() < 0.02
    new = given_probabilities(sure[:4000], noisy[:4000], 3, new=sure[4000:]).new_scores
    again, _ = cross.rescore(noisy[::-1])
    np.testing.assert_array_equal(again, cross.scores)
    assert new.shape == (4000, 3)


@pytest.mark.parametrize(
    ("p", "message"),
    [
        (np.full((6, 3), 0.5), r"probabilities\[0\] has the least entry 0\.5 and the sum 1\.5; give .* softmax"),
        (np.tile([1.2, -0.2, 0.0], (6, 1)), r"probabilities\[0\] has the least entry -0\.2 and the sum 1"),
        (np.full((6, 2), 0.5), "probabilities have 2 columns for 3 classes"),
    ],
)
def test_what_is_no_probability_is_refused(p: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        given_probabilities(p, np.arange(6) % 3, 3, folds=2)


def test_the_gradient_where_a_label_is_absent() -> None:
    rng = np.random.default_rng(0)
    scores, labels = rng.standard_normal((20, 3)), np.repeat([0, 2], 10)
    theta = rng.standard_normal(21)
    numeric = approx_fprime(theta, lambda t: negative_log_posterior(t, scores, labels, 3)[0], 1e-7)
    np.testing.assert_allclose(negative_log_posterior(theta, scores, labels, 3)[1], numeric, atol=1e-6)


def test_the_joint_likelihood_converges_to_the_truth() -> None:
    errors = []
    for n in (500, 5000, 50000):
        x, y, _ = mixture(n)
        noisy = corrupt_labels(y, T3, 1)
        fit = joint_transition(crossfit(x, noisy, 3).scores, noisy, [0.7 * np.eye(3) + 0.1])
        errors.append(row_tv(fit.transition, T3))
    assert errors[2] < errors[1] < errors[0]
    assert errors[2] < 0.01


def test_classes_that_the_likelihood_confuses_get_their_names_back() -> None:
    features, labels, _ = mixture(2000, num_classes=4)
    truth = np.roll(0.4 * np.eye(4), 1, axis=1) + 0.6 * np.eye(4)
    noisy = draw(truth[labels], seed=1)
    scores = crossfit(features, noisy, 4).scores
    right = joint_transition(scores, noisy, [0.9 * truth + 0.025])
    swapped = joint_transition(scores, noisy, [0.9 * truth[[0, 2, 1, 3]] + 0.025])
    np.testing.assert_allclose(swapped.transition, right.transition, rtol=0, atol=0.01)
    np.testing.assert_allclose(
        swapped.clean_probabilities(scores), right.clean_probabilities(scores), rtol=0, atol=0.02
    )
    assert row_tv(swapped.transition, truth) < 0.08


def test_a_class_that_stands_for_two_is_split(monkeypatch: pytest.MonkeyPatch) -> None:
    """Started where flips go one way in some classes, the other way in the rest: one class too many, one too few."""
    features, labels, _ = mixture(600, num_classes=5, dimensions=10)
    truth = 0.6 * np.eye(5) + np.roll(0.4 * np.eye(5), 1, axis=1)
    noisy = draw(truth[labels], seed=0)
    scores = crossfit(features, noisy, 5).scores
    start = [0.98 * np.concatenate([truth[:2], truth.T[2:]]) + 0.02 / 5]
    found = joint_transition(scores, noisy, start)
    assert row_tv(found.transition, truth) < 0.06
    monkeypatch.setattr(joint_likelihood, "ROUNDS", 0)
    caught = joint_transition(scores, noisy, start)
    assert row_tv(caught.transition, truth) > 0.15
    assert found.objective < caught.objective - 50 / len(noisy)


def test_a_start_that_leads_at_first_gives_way_to_one_that_ends_far_higher(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels, _ = mixture(600, num_classes=5, dimensions=10)
    truth = 0.6 * np.eye(5) + np.roll(0.4 * np.eye(5), 1, axis=1)
    noisy = draw(truth[labels], seed=0)
    scores = crossfit(features, noisy, 5).scores
    trap, other = 0.98 * np.concatenate([truth[:2], truth.T[2:]]) + 0.02 / 5, 0.1 * truth + 0.9 / 5
    monkeypatch.setattr(joint_likelihood, "ROUNDS", 0)
    monkeypatch.setattr(joint_likelihood, "TRIAL_ITERATIONS", 3)
    caught = joint_transition(scores, noisy, [trap])
    assert row_tv(caught.transition, truth) > 0.15
    found = joint_transition(scores, noisy, [trap, other])
    assert row_tv(found.transition, truth) < 0.06
    monkeypatch.setattr(joint_likelihood, "LEAST_GAIN", np.inf)
    leading = joint_transition(scores, noisy, [trap, other])
    assert leading.objective == pytest.approx(caught.objective)


def test_the_head_for_a_known_transition_is_the_clean_posterior() -> None:
    x, y, posterior = mixture(20000)
    noisy = corrupt_labels(y, T3, 1)
    scores = crossfit(x, noisy, 3).scores
    fit = head_for(scores, noisy, T3)
    assert (fit.transition == T3).all()
    assert np.abs(fit.clean_probabilities(scores) - posterior).mean() < 0.01


TRUTHS = [np.eye(3), T3, symmetric_transition(3, 0.3), pair_flip_transition(3, 0.3)]


@pytest.mark.parametrize("truth", TRUTHS)
def test_the_confident_joint_is_right_where_classes_are_plain(truth: np.ndarray) -> None:
    clean = np.arange(30000) % 3
    noisy = corrupt_labels(clean, truth, 0)
    assert row_tv(confident_joint_transition(truth[clean], noisy), truth) < 0.01


@pytest.mark.parametrize("truth", TRUTHS)
def test_dual_t_is_right_for_a_sure_head_and_squared_for_a_calibrated_one(truth: np.ndarray) -> None:
    clean = np.arange(30000) % 3
    noisy = corrupt_labels(clean, truth, 0)
    assert row_tv(dual_t_transition(np.eye(3)[clean], noisy), truth) < 0.01
    assert row_tv(dual_t_transition(truth[clean], noisy), truth @ truth) < 0.01


def test_trusted_examples_give_the_mean_of_their_predictions() -> None:
    rng = np.random.default_rng(0)
    p, clean = rng.dirichlet(np.ones(3), 30), np.arange(30) % 3
    expected = [p[clean == c].mean(0) for c in range(3)]
    np.testing.assert_allclose(trusted_transition(p, clean), expected)


def test_an_absent_class_has_a_row_of_the_identity() -> None:
    noisy = corrupt_labels(np.arange(3000) % 2, [[0.8, 0.2], [0.3, 0.7]], 0)
    p = np.c_[np.array([[0.8, 0.2], [0.3, 0.7]])[np.arange(3000) % 2], np.zeros(3000)][:, [0, 2, 1]]
    found = confident_joint_transition(p, np.where(noisy == 1, 2, 0))
    np.testing.assert_allclose(found, [[0.8, 0, 0.2], [0, 1, 0], [0.3, 0, 0.7]], atol=0.05)


def test_shrinking_takes_away_noise_and_leaves_structure() -> None:
    rng = np.random.default_rng(0)
    error = np.full((10, 10), 0.01)
    for truth, factor in ((symmetric_transition(10, 0.4), 0.3), (pair_flip_transition(10, 0.4), 1.05)):
        noisy = truth + error * rng.standard_normal((10, 10))
        noisy /= noisy.sum(axis=1, keepdims=True)
        found = shrink(noisy, error)
        np.testing.assert_allclose(found.sum(axis=1), 1)
        assert np.abs(found - truth).mean() < factor * np.abs(noisy - truth).mean()


def test_shrinking_changes_nothing_without_error_and_everything_without_difference() -> None:
    np.testing.assert_allclose(shrink(T3, np.zeros((3, 3))), T3)
    for truth in (np.eye(4), symmetric_transition(4, 0.3)):
        np.testing.assert_allclose(shrink(truth, np.full((4, 4), 0.1)), truth)
    np.testing.assert_allclose(np.diag(shrink(T3, np.ones((3, 3)))), np.diag(T3), err_msg="three entries are too few")


def test_no_entry_shrinks_further_than_its_error_explains() -> None:
    truth = symmetric_transition(10, 0.3)
    truth[2, 2], truth[2, 7] = 0.3, truth[2, 7] + 0.4
    found = shrink(truth, np.full((10, 10), 0.01))
    assert np.abs(found - truth)[2, [2, 7]].max() < 0.03
    assert np.abs(shrink(truth, np.full((10, 10), 10.0)) - truth)[2, 7] > 0.3


def test_the_excess_is_zero_on_average_over_the_labels_of_an_example() -> None:
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(3), 40)
    every = [excess_wrongness(p, T3, np.full(40, label)) for label in range(3)]
    np.testing.assert_allclose(sum((p @ T3)[:, label] * every[label] for label in range(3)), 0, atol=1e-12)
    # Bayes' rule by the joint distribution of true and noisy label.
    joint = p[7][:, None] * T3
    wrong = 1 - joint[2, 2] / joint[:, 2].sum()
    assert every[2][7] == pytest.approx(wrong - (joint.sum() - np.trace(joint)))


@pytest.mark.parametrize(("n", "dimensions"), [(50, 6), (30, 45)])
def test_dependence_is_the_correlation_with_what_the_other_examples_foretell(n: int, dimensions: int) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((n, dimensions))
    x -= x.mean(0)
    excess = x[:, 0] + rng.standard_normal(n)
    foretold = []
    for i in range(n):
        others = np.arange(n) != i
        design = np.c_[x[others], np.ones(n - 1)]
        penalty = PENALTY * n * np.diag([1.0] * dimensions + [0.0])
        weights = np.linalg.solve(design.T @ design + penalty, design.T @ excess[others])
        foretold.append(x[i] @ weights[:-1] + weights[-1] - excess[others].mean())
    assert dependence(decompose(x), excess) == pytest.approx(np.corrcoef(foretold, excess)[0, 1])


def test_features_that_are_all_alike_foretell_nothing() -> None:
    assert dependence(decompose(np.zeros((9, 4))), np.arange(9.0)) == 0
    assert dependence(decompose(np.eye(9)), np.zeros(9)) == 0


def test_the_p_value_counts_what_is_as_large() -> None:
    assert simulated_p_value(3.0, np.array([1.0, 2.0, 3.0, 4.0])) == pytest.approx(3 / 5)
    assert simulated_p_value(9.0, np.zeros(19)) == pytest.approx(1 / 20)
