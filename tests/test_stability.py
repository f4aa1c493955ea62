"""Rise of the loss under noise, against models for which its expectation has a closed form."""

from __future__ import annotations

import math
from typing import Any

import oracle
import pytest
import tiny
import torch
from dense import LAYERS, PLAIN, X, Y, batches, mean_hessian, smooth, squares
from torch import Tensor, nn

from hf_robust_ft.curvature import NonFiniteLoss
from hf_robust_ft.curvature.model import measuring
from hf_robust_ft.curvature.probes import Probes
from hf_robust_ft.curvature.stability import NoiseStability, noise_stability

SIGMA = 0.3


def linear() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Linear(4, 3, bias=False).double()


def exponentials(logits: Tensor, labels: Tensor) -> Tensor:
    """``Σ_k exp z_k``; for a linear model the mean over the noise is log-normal."""
    return logits.exp().sum(1)


def exponential_truth(model: nn.Module, sigma: float) -> float:
    """``E[exp((w + σ ε) x)] = exp(w x + σ² ‖x‖² / 2)``."""
    growth = torch.expm1(sigma**2 * X.square().sum(1) / 2)
    return (growth.unsqueeze(1) * model(X).exp()).sum(1).mean().item()


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    model = linear()
    truth = exponential_truth(model, SIGMA)
    held = 0
    for seed in range(200):
        found = noise_stability(model, batches(7), sigma=SIGMA, loss=exponentials, probes=2, seed=seed)
        low, high = found.interval(0.95)
        held += low <= truth <= high
    print(f"95 % intervals hold the truth in {held / 200} of 200 trials")
    assert 0.90 <= held / 200 <= 0.99


def test_many_draws_find_the_truth_and_the_error_falls_with_the_root() -> None:
    model = linear()
    truth = exponential_truth(model, SIGMA)
    few, many = (
        noise_stability(model, batches(7), sigma=SIGMA, loss=exponentials, draws=n, probes=2) for n in (100, 1600)
    )
    assert abs(many.increase - truth) < 4 * many.standard_error
    assert few.standard_error / many.standard_error == pytest.approx(4, rel=0.3)
    # Too much noise for the Hessian alone.
    second_order = SIGMA**2 / 2 * (X.square().sum(1, keepdim=True) * model(X).exp()).sum(1).mean().item()
    assert many.increase - second_order > 4 * many.standard_error


def test_for_a_quadratic_loss_the_trace_says_it_all() -> None:
    truth = SIGMA**2 / 2 * 3 * X.square().sum(1).mean().item()
    found = noise_stability(linear(), batches(7), sigma=SIGMA, loss=squares, draws=400, probes=400)
    assert abs(found.increase - truth) < 4 * found.standard_error < 0.2 * truth
    assert abs(found.second_order - truth) < 4 * found.second_order_standard_error < 0.2 * truth


def test_each_pair_is_what_its_noise_does() -> None:
    model = smooth()
    found = noise_stability(model, batches(3), sigma=SIGMA, draws=3, probes=2)
    weights = [model.get_parameter(name) for name in LAYERS]
    starts = [weight.detach().clone() for weight in weights]
    noise = Probes("gaussian", 3, weights, seed=0)

    def loss(step: float, pair: int) -> float:
        with torch.no_grad():
            for weight, start, epsilon in zip(weights, starts, noise[pair], strict=True):
                weight.copy_(start + step * epsilon)
            return PLAIN(model(X), Y).mean().item()

    still = loss(0, 0)
    assert found.loss == pytest.approx(still, rel=1e-12)
    for pair, sample in enumerate(found.samples.tolist()):
        assert sample == pytest.approx((loss(SIGMA, pair) + loss(-SIGMA, pair)) / 2 - still, rel=1e-9)
    assert found.increase == pytest.approx(found.samples.mean().item())
    assert found.standard_error == pytest.approx(found.samples.std().item() / math.sqrt(3))


def test_the_prediction_is_that_of_the_dense_hessian() -> None:
    model = smooth()
    (hessian,) = mean_hessian(model, [LAYERS])
    found = noise_stability(model, batches(7), sigma=0.02, draws=500, probes=500)
    truth = 0.02**2 / 2 * hessian.trace().item()
    assert abs(found.second_order - truth) < 4 * found.second_order_standard_error
    assert abs(found.increase - truth) < 4 * found.standard_error  # σ is small
    assert found.second_order_standard_error == pytest.approx(
        0.02**2 / 2 * found.trace.samples.std().item() / math.sqrt(500)
    )
    assert found.layers == tuple(LAYERS)
    assert found.examples == 7
    assert [other.name for other in found.trace.left_out] == ["0.bias", "2.bias"]


def test_what_is_linear_cancels_within_a_pair() -> None:
    found = noise_stability(linear(), batches(7), sigma=10.0, loss=lambda z, y: z.sum(1))
    assert found.samples.abs().max() < 1e-13
    assert found.second_order == 0


def test_only_the_given_layers_get_noise() -> None:
    model = smooth()
    found = noise_stability(model, batches(7), sigma=0.02, layers={"last": "2"}, draws=300)
    (hessian,) = mean_hessian(model, [["2.weight"]])
    assert abs(found.increase - 0.02**2 / 2 * hessian.trace().item()) < 4 * found.standard_error
    assert found.layers == ("last",)
    assert "0.weight" in [other.name for other in found.trace.left_out]


def test_tied_weights_move_together() -> None:
    case = oracle.find_case("tied_linear")
    model = case.model()
    data = [(case.inputs["input"], case.labels)]
    found = noise_stability(model, data, sigma=SIGMA, draws=2, probes=2)
    (epsilon,) = Probes("gaussian", 2, [model.inner.weight], seed=0)[1]
    losses = []
    start = model.inner.weight.detach().clone()
    for step in (SIGMA, -SIGMA, 0):
        with torch.no_grad():
            model.inner.weight.copy_(start + step * epsilon)
            losses.append(case.loss()(model(*data[0][:1]), case.labels).mean().item())
    assert found.samples[1].item() == pytest.approx((losses[0] + losses[1]) / 2 - losses[2], rel=1e-9)


@pytest.mark.parametrize("size", [1, 2])
def test_batches_make_no_difference(size: int) -> None:
    one, other = (noise_stability(smooth(), batches(s), sigma=SIGMA, draws=4, probes=4) for s in (7, size))
    torch.testing.assert_close(other.samples, one.samples, rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(other.trace.samples, one.trace.samples)
    assert other.loss == pytest.approx(one.loss)


def test_the_seed_decides_and_noise_and_probes_are_independent() -> None:
    first, again, other = (noise_stability(smooth(), batches(7), sigma=SIGMA, seed=s) for s in (1, 1, 2))
    assert torch.equal(first.samples, again.samples)
    assert torch.equal(first.trace.samples, again.trace.samples)
    assert not (first.samples[1:] == other.samples[:-1]).any()
    found = noise_stability(linear(), batches(7), sigma=SIGMA, loss=squares, draws=300, probes=300)
    both = torch.stack([found.samples, found.trace.samples[:, 0]])
    assert abs(torch.corrcoef(both)[0, 1].item()) < 0.2


def test_the_model_is_left_as_it_was_also_after_an_error() -> None:
    torch.manual_seed(0)
    model = tiny.bert(hidden_dropout_prob=0.5).train()
    before = tiny.weights(model)
    memory = [parameter.data_ptr() for parameter in model.parameters()]
    data = [{"input_ids": torch.arange(3, 13).view(2, 5), "labels": torch.tensor([0, 2])}]
    found = noise_stability(model, data, sigma=0.01, draws=2, probes=2)
    assert torch.equal(found.samples, noise_stability(model, data, sigma=0.01, draws=2, probes=2).samples)

    def explode(logits: Tensor, labels: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return logits.sum(1) * (math.inf if calls == 3 else 1.0)

    calls = 0
    with pytest.raises(NonFiniteLoss, match=r"the loss of example 0 is .* or noise of a large sigma"):
        noise_stability(model, data, sigma=0.01, loss=explode)
    assert model.training
    assert [parameter.data_ptr() for parameter in model.parameters()] == memory
    tiny.assert_equal_weights(before, tiny.weights(model))
    with measuring(model), torch.no_grad():
        assert model(**data[0]).logits.isfinite().all()


def test_float32_and_half_precision() -> None:
    exact = noise_stability(smooth(), batches(7), sigma=SIGMA, draws=4, probes=4)
    single = noise_stability(smooth().float(), batches(7, X.float()), sigma=SIGMA, draws=4, probes=4)
    torch.testing.assert_close(single.samples, exact.samples, rtol=1e-3, atol=1e-6)
    half = noise_stability(smooth().bfloat16(), batches(7, X.bfloat16()), sigma=1e-3, draws=4, probes=4)
    assert 0 < half.samples.abs().max() < 1e-4  # bfloat16 would round such noise away


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sigma": 0.0}, "sigma is 0.0; give a positive standard deviation"),
        ({"sigma": -1.0}, "sigma is -1.0; give a positive standard deviation"),
        ({"sigma": math.inf}, "sigma is inf; give a positive standard deviation"),
        ({"sigma": math.nan}, "sigma is nan; give a positive standard deviation"),
        ({"draws": 1}, "draws is 1; a standard error needs at least 2"),
        ({"probes": 1}, "probes is 1; a standard error needs at least 2"),
        ({"seed": -1}, "seed is -1; give 0 or a positive number"),
        ({"layers": {"head": "classifier"}}, "match no layer"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        noise_stability(smooth(), batches(7), **{"sigma": 0.1, **arguments})


def test_bad_data() -> None:
    with pytest.raises(ValueError, match="dataloader gave no batch: there is nothing to measure"):
        noise_stability(smooth(), [], sigma=0.1)
    with pytest.raises(ValueError, match="Give it a list or a DataLoader, as an iterator is used up"):
        noise_stability(smooth(), iter(batches(7)), sigma=0.1)
    x = X.clone()
    x[6] = math.nan
    with pytest.raises(NonFiniteLoss, match="the loss of example 6 is nan"):
        noise_stability(smooth(), batches(3, x), sigma=0.1)


def test_a_level_that_is_none() -> None:
    found: NoiseStability = noise_stability(smooth(), batches(7), sigma=0.1, draws=2, probes=2)
    with pytest.raises(ValueError, match="level is 95; a confidence level lies between 0 and 1"):
        found.interval(95)
