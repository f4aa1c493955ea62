"""Corrected losses against dense oracles in float64."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import hessian

from hf_robust_ft import (
    backward_corrected,
    cross_entropy,
    forward_corrected,
    generalized_cross_entropy,
    invert_transition,
    nonnegative_backward,
    pair_flip_transition,
    symmetric_transition,
)
from hf_robust_ft.losses import reduce_loss

K = 4


def some_transition(seed: int = 0) -> Tensor:
    rng = np.random.default_rng(seed)
    return torch.tensor(0.6 * np.eye(K) + 0.4 * rng.dirichlet(np.ones(K), K))


def some_batch(seed: int = 0, examples: int = 9) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(examples, K, dtype=torch.float64, generator=generator)
    return logits, torch.randint(K, (examples,), generator=generator)


def naive_forward(z: list[float], label: int, t: list[list[float]]) -> float:
    exponentials = [math.exp(v) for v in z]
    p = [e / sum(exponentials) for e in exponentials]
    return -math.log(sum(p[i] * t[i][label] for i in range(K)))


def naive_backward(z: list[float], label: int, inverse: list[list[float]]) -> float:
    exponentials = [math.exp(v) for v in z]
    return sum(inverse[label][k] * -math.log(exponentials[k] / sum(exponentials)) for k in range(K))


def test_forward_is_the_definition() -> None:
    (logits, labels), t = some_batch(), some_transition()
    expected = [naive_forward(z, y, t.tolist()) for z, y in zip(logits.tolist(), labels.tolist(), strict=True)]
    torch.testing.assert_close(forward_corrected(logits, labels, t).tolist(), expected, rtol=0, atol=1e-12)


def test_backward_is_the_definition() -> None:
    (logits, labels), t = some_batch(), some_transition()
    inverse = torch.linalg.inv(t)
    expected = [naive_backward(z, y, inverse.tolist()) for z, y in zip(logits.tolist(), labels.tolist(), strict=True)]
    torch.testing.assert_close(backward_corrected(logits, labels, inverse).tolist(), expected, rtol=0, atol=1e-12)


def test_backward_is_unbiased_for_the_clean_loss() -> None:
    logits, labels = some_batch()
    t = some_transition()
    inverse = torch.linalg.inv(t)
    every = [backward_corrected(logits, torch.full_like(labels, k), inverse) for k in range(K)]
    expectation = (t[labels] * torch.stack(every, dim=1)).sum(1)
    torch.testing.assert_close(expectation, cross_entropy(logits, labels), rtol=0, atol=1e-12)


def test_forward_is_minimised_by_the_clean_posterior() -> None:
    # The expectation over noisy labels of a point with clean posterior η is a cross entropy of ηT, so its
    # gradient in the logits vanishes where softmax(z) = η.
    t = some_transition()
    posterior = torch.tensor([0.5, 0.2, 0.2, 0.1], dtype=torch.float64)
    logits = posterior.log().requires_grad_()
    every = torch.stack([forward_corrected(logits, torch.tensor(k), t) for k in range(K)])
    (gradient,) = torch.autograd.grad((posterior @ t @ every), logits)
    assert gradient.abs().max() < 1e-14


@pytest.mark.parametrize("label", range(K))
def test_logit_hessian_of_backward_is_that_of_cross_entropy(label: int) -> None:
    logits = some_batch()[0][0]
    inverse = torch.linalg.inv(some_transition())
    p = logits.softmax(-1)
    found = hessian(lambda z: backward_corrected(z, torch.tensor(label), inverse))(logits)
    torch.testing.assert_close(found, torch.diag(p) - torch.outer(p, p), rtol=0, atol=1e-12)


@pytest.mark.parametrize("label", range(K))
def test_logit_hessian_of_forward_is_cov_p_minus_cov_q(label: int) -> None:
    logits, t = some_batch(1)[0][0], some_transition()
    p = logits.softmax(-1)
    q = p * t[:, label] / (p * t[:, label]).sum()
    expected = (torch.diag(p) - torch.outer(p, p)) - (torch.diag(q) - torch.outer(q, q))
    found = hessian(lambda z: forward_corrected(z, torch.tensor(label), t))(logits)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_logit_hessian_of_forward_is_indefinite() -> None:
    # Where the model already says that the label is wrong, the loss bends down.
    t = torch.tensor(symmetric_transition(K, 0.4))
    logits = torch.tensor([4.0, 0, 0, 0], dtype=torch.float64)
    eigenvalues = torch.linalg.eigvalsh(hessian(lambda z: forward_corrected(z, torch.tensor(1), t))(logits))
    assert eigenvalues[0] < -1e-3
    assert eigenvalues[-1] > 1e-3


def test_identity_gives_plain_cross_entropy() -> None:
    logits, labels = some_batch()
    reference = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    identity = torch.eye(K, dtype=torch.float64)
    for losses in (
        cross_entropy(logits, labels),
        forward_corrected(logits, labels, identity),
        backward_corrected(logits, labels, identity),
    ):
        torch.testing.assert_close(losses, reference, rtol=0, atol=1e-14)


@pytest.mark.parametrize("correct", [forward_corrected, backward_corrected])
def test_gradients_agree_with_finite_differences(correct: object) -> None:
    logits, labels = some_batch()
    matrix = some_transition()
    if correct is backward_corrected:
        matrix = torch.linalg.inv(matrix)
    assert torch.autograd.gradcheck(lambda z: correct(z, labels, matrix), logits.requires_grad_())  # type: ignore[operator]


def test_a_zero_in_the_matrix_gives_finite_gradients() -> None:
    logits, labels = some_batch()
    t = torch.tensor(pair_flip_transition(K, 0.3))
    logits.requires_grad_()
    losses = forward_corrected(logits, labels, t)
    losses.sum().backward()
    assert losses.isfinite().all()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_extreme_logits_stay_finite_in_float32() -> None:
    # softmax(z) @ T would be 0 here; log space is not.
    logits = torch.tensor([[0.0, 200.0, 0.0, 0.0]], requires_grad=True)
    t = torch.tensor(pair_flip_transition(K, 0.3), dtype=torch.float32)
    loss = forward_corrected(logits, torch.tensor([0]), t)
    torch.testing.assert_close(loss, torch.tensor([200.0]), rtol=0.01, atol=0)
    loss.sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_an_impossible_label_costs_infinity() -> None:
    t = torch.tensor([[0.5, 0.5, 0.0], [0.1, 0.9, 0.0], [1.0, 0.0, 0.0]])
    assert forward_corrected(torch.zeros(1, 3), torch.tensor([2]), t).item() == math.inf


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_lossless(dtype: torch.dtype) -> None:
    logits, labels = some_batch()
    half = logits.to(dtype)
    t = some_transition()
    losses = forward_corrected(half, labels, t)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, forward_corrected(half.double(), labels, t).float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("correct", [forward_corrected, backward_corrected])
def test_ignored_labels_give_neither_loss_nor_gradient(correct: object) -> None:
    logits, labels = some_batch()
    labels = labels.view(3, 3).clone()
    labels[0, 1] = labels[2, 2] = -100
    logits = logits.view(3, 3, K).clone().requires_grad_()
    losses = correct(logits, labels, some_transition())  # type: ignore[operator]
    losses.sum().backward()
    ignored = labels == -100
    assert (losses[ignored] == 0).all()
    assert (losses[~ignored] != 0).all()
    assert (logits.grad[ignored] == 0).all()  # type: ignore[index]


def test_sum_over_all_targets_makes_micro_batches_add_up() -> None:
    logits, labels = some_batch(examples=12)
    labels[[1, 2, 7]] = -100
    losses = cross_entropy(logits, labels)
    count = (labels != -100).sum()
    whole = reduce_loss(losses, labels, None)
    torch.testing.assert_close(whole, torch.nn.functional.cross_entropy(logits, labels))
    parts = [reduce_loss(losses[rows], labels[rows], count) for rows in (slice(0, 5), slice(5, 12))]
    torch.testing.assert_close(sum(parts), whole)


@pytest.mark.parametrize("count", [None, 0, torch.tensor(0)], ids=str)
@pytest.mark.parametrize("correct", [forward_corrected, backward_corrected, lambda z, y, _: cross_entropy(z, y)])
def test_a_batch_without_targets_gives_zero_and_no_gradient(count: Any, correct: Any) -> None:
    # Infinite losses, too, where they do not count.
    logits = torch.tensor([[1e4, 0, 0, 0], [0, 0, 0, 0]], dtype=torch.float16).requires_grad_()
    labels = torch.tensor([-100, -100])
    loss = reduce_loss(correct(logits, labels, some_transition()), labels, count)
    loss.backward()
    assert loss == 0
    assert (logits.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_labels_of_any_integer_type_are_indices(dtype: torch.dtype) -> None:
    logits, _ = some_batch(examples=K)
    labels, t = torch.ones(K, dtype=torch.int64), some_transition()
    for correct in (forward_corrected, backward_corrected):
        assert torch.equal(correct(logits, labels.to(dtype), t), correct(logits, labels, t))


def test_backward_is_bounded_by_the_amplification() -> None:
    # |ℓ̄| ≤ ρ max_k ℓ(z, k), with equality for some sign pattern of the losses.
    for matrix in (symmetric_transition(K, 0.4), pair_flip_transition(K, 0.3), some_transition().numpy()):
        inverse, _, rho = invert_transition(matrix)
        signs = np.array(list(itertools.product([-1, 1], repeat=K)))
        assert np.abs(inverse @ signs.T).max() == pytest.approx(rho)


@pytest.mark.parametrize("q", [0.2, 0.7, 1.0])
def test_generalized_cross_entropy_is_the_definition(q: float) -> None:
    logits, labels = some_batch()
    p = torch.softmax(logits, -1)[range(len(labels)), labels]
    torch.testing.assert_close(generalized_cross_entropy(logits, labels, q), (1 - p**q) / q, rtol=0, atol=1e-12)


def test_generalized_cross_entropy_tends_to_cross_entropy_and_is_bounded() -> None:
    logits, labels = some_batch()
    torch.testing.assert_close(
        generalized_cross_entropy(logits, labels, 1e-7), cross_entropy(logits, labels), rtol=1e-5, atol=0
    )
    far = generalized_cross_entropy(torch.tensor([[200.0, 0.0]]), torch.tensor([1]))
    assert far.item() == pytest.approx(1 / 0.7)


def test_generalized_cross_entropy_trusts_unlikely_labels_less() -> None:
    # Its gradient is p^q times that of cross entropy (Zhang & Sabuncu 2018, equation 7).
    logits, labels = some_batch()
    logits.requires_grad_()
    (found,) = torch.autograd.grad(generalized_cross_entropy(logits, labels).sum(), logits)
    (plain,) = torch.autograd.grad(cross_entropy(logits, labels).sum(), logits)
    p = torch.softmax(logits.detach(), -1)[range(len(labels)), labels]
    torch.testing.assert_close(found, p.pow(0.7).unsqueeze(-1) * plain, rtol=0, atol=1e-12)


def test_the_nonnegative_risk_is_the_definition() -> None:
    (logits, labels), t = some_batch(), some_transition()
    inverse = torch.linalg.inv(t).tolist()
    risks = [
        sum(
            inverse[y][k] * -math.log(math.exp(z[k]) / sum(map(math.exp, z)))
            for z, y in zip(logits.tolist(), labels.tolist(), strict=True)
        )
        for k in range(K)
    ]
    assert min(risks) < 0 < max(risks)
    found = nonnegative_backward(logits, labels, torch.linalg.inv(t))
    assert found.item() == pytest.approx(sum(max(0, risk) for risk in risks), abs=1e-12)


def test_the_nonnegative_risk_is_that_of_backward_where_no_class_is_below_zero() -> None:
    logits, t = torch.zeros(40, K, dtype=torch.float64), some_transition()
    labels = torch.arange(40) % K
    inverse = torch.linalg.inv(t)
    assert inverse[labels].sum(0).min() > 0
    whole = backward_corrected(logits, labels, inverse).sum()
    torch.testing.assert_close(nonnegative_backward(logits, labels, inverse), whole, rtol=0, atol=1e-12)


def test_the_nonnegative_risk_cannot_be_driven_down_for_ever() -> None:
    labels, inverse = torch.arange(8) % K, torch.linalg.inv(torch.tensor(symmetric_transition(K, 0.5)))
    sure = 100 * torch.nn.functional.one_hot(labels, K).double()
    assert backward_corrected(sure, labels, inverse).sum() < -100
    assert nonnegative_backward(sure, labels, inverse) >= 0
    logits = sure.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(nonnegative_backward(logits, labels, inverse), logits)
    assert gradient.abs().max() == 0  # every class is below zero: nothing to learn from


def test_both_new_losses_leave_out_what_has_no_target() -> None:
    (logits, labels), inverse = some_batch(), torch.linalg.inv(some_transition())
    kept = torch.arange(len(labels)) % 2 == 0
    some = labels.where(kept, -100)
    logits = logits.where(kept.unsqueeze(-1), math.nan)
    found = nonnegative_backward(logits, some, inverse)
    torch.testing.assert_close(found, nonnegative_backward(logits[kept], labels[kept], inverse))
    torch.testing.assert_close(
        generalized_cross_entropy(logits, some),
        torch.zeros(len(labels)).double().masked_scatter(kept, generalized_cross_entropy(logits[kept], labels[kept])),
    )
