"""The noise and the pull against closed forms, dense Hessians and autograd."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from hf_robust_ft.penalties import add_l2sp_gradient, antithetic_noise

N = 6


def _weights(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes]


def _copies(weights: list[nn.Parameter]) -> list[Tensor]:
    return [weight.detach().clone() for weight in weights]


def _matrix() -> Tensor:
    """Symmetric, with negative eigenvalues, too."""
    a = torch.randn(N, N, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return a + a.T


def _two_points(loss: Callable[[Tensor], Tensor], weight: Tensor, sigma: float, draws: int) -> tuple[Tensor, Tensor]:
    """The mean loss [draws] and the mean gradient [draws, N] of each of many pairs around one weight [N]."""
    rows = nn.Parameter(weight.detach().repeat(draws, 1))
    losses, gradients = [], []
    with antithetic_noise([rows], sigma, (0, 0)) as reflect:
        for _ in range(2):
            losses.append(torch.vmap(loss)(rows))
            gradients.append(torch.autograd.grad(losses[-1].sum(), rows)[0])
            reflect()
    return (losses[0].detach() + losses[1].detach()) / 2, (gradients[0] + gradients[1]) / 2


def _mean_and_error(samples: Tensor) -> tuple[Tensor, Tensor]:
    return samples.mean(0), samples.std(0) / math.sqrt(len(samples))


def test_the_gradient_of_a_quadratic_loss_is_exact_in_every_pair() -> None:
    (weight,), matrix = _weights((N,)), _matrix()
    _, gradients = _two_points(lambda w: w @ matrix @ w / 2, weight, 0.5, 5)
    torch.testing.assert_close(gradients, (matrix @ weight.detach()).expand(5, N), rtol=0, atol=1e-13)


def test_the_mean_loss_of_a_quadratic_gains_half_sigma_squared_times_the_trace() -> None:
    (weight,), matrix, sigma = _weights((N,)), _matrix(), 0.3
    losses, _ = _two_points(lambda w: w @ matrix @ w / 2, weight, sigma, 10_000)
    mean, error = _mean_and_error(losses - weight.detach() @ matrix @ weight.detach() / 2)
    expected = sigma**2 / 2 * matrix.trace()
    assert abs(mean - expected) < 4 * error
    assert error < 0.1 * expected.abs()


def test_a_quartic_loss_has_the_gradient_of_its_penalty() -> None:
    """``Σ w⁴/4`` has the Hessian diag(3 w²), and ``σ²/2 tr H`` the gradient 3 σ² w; nothing comes after it."""
    (weight,), sigma = _weights((N,)), 0.4
    mean, error = _mean_and_error(_two_points(lambda w: w.pow(4).sum() / 4, weight, sigma, 10_000)[1])
    w = weight.detach()
    penalty = 3 * sigma**2 * w
    assert ((mean - w**3 - penalty).abs() < 4 * error).all()
    # Another coefficient would show.
    assert (8 * error < penalty.abs()).all()


def test_the_penalty_of_a_network_is_that_of_its_dense_hessian() -> None:
    """Pair by pair, what ``½ uᵀ H u`` leaves falls with the fourth power of σ."""
    x = torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.arange(7) % 2

    def loss(w: Tensor) -> Tensor:
        logits = torch.tanh(x @ w[:12].view(3, 4)) @ w[12:].view(4, 2)
        return nn.functional.cross_entropy(logits, y)

    (weight,) = _weights((20,))
    hessian = torch.autograd.functional.hessian(loss, weight.detach())
    left = []
    for sigma in (0.1, 0.05):
        rows = nn.Parameter(torch.zeros(2000, 20, dtype=torch.float64))
        with antithetic_noise([rows], sigma, (0, 0)):
            u = rows.detach().clone()
        gains = _two_points(loss, weight, sigma, 2000)[0] - loss(weight.detach())
        mean, error = _mean_and_error(gains)
        assert abs(mean / (sigma**2 / 2 * hessian.trace()) - 1) < 4 * error / mean + 20 * sigma**2
        left.append((gains - torch.einsum("di,ij,dj->d", u, hessian, u) / 2).mean())
    assert left[0] / left[1] == pytest.approx(16, rel=0.2)


def test_the_noise_is_standard_normal_times_sigma_and_symmetric() -> None:
    weights = _weights((300, 100), (1000,))
    starts = _copies(weights)
    with antithetic_noise(weights, 0.25, (7, 0)) as reflect:
        plus = [(weight - start).detach() for weight, start in zip(weights, starts, strict=True)]
        reflect()
        minus = [(weight - start).detach() for weight, start in zip(weights, starts, strict=True)]
    for there, back in zip(plus, minus, strict=True):
        torch.testing.assert_close(there, -back, rtol=0, atol=1e-15)
        z = there.flatten() / 0.25
        assert abs(z.mean()) < 4 / math.sqrt(len(z))
        assert abs(z.var() - 1) < 4 * math.sqrt(2 / len(z))
        assert abs((z**4).mean() - 3) < 4 * math.sqrt(96 / len(z))


def test_each_weight_and_each_step_has_noise_of_its_own() -> None:
    weights = _weights((1000,), (1000,))
    starts = _copies(weights)
    state = torch.get_rng_state()

    def noise(*seed: int) -> list[Tensor]:
        with antithetic_noise(weights, 1.0, seed):
            return [(weight - start).detach() for weight, start in zip(weights, starts, strict=True)]

    first, again, other_step, other_seed = noise(0, 1), noise(0, 1), noise(0, 2), noise(1, 1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for a, b in (first, (first[0], other_step[0]), (first[0], other_seed[0]), (other_step[0], other_seed[0])):
        assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 4 / math.sqrt(1000)
    # Seed and step are two numbers: the next step of one seed is not a step of the next seed.
    assert not torch.equal(noise(1, 0)[0], noise(0, 1)[0])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_bit_of_the_weights_comes_back(dtype: torch.dtype) -> None:
    weights = _weights((50, 3), (7,), (2, 3, 4), dtype=dtype)
    weights.append(nn.Parameter(weights[0].detach().t().clone().t()))  # not contiguous
    starts = _copies(weights)
    with antithetic_noise(weights, 0.3, (0, 0)) as reflect:
        plus = _copies(weights)
        reflect()
        minus = _copies(weights)
    for weight, start, a, b in zip(weights, starts, plus, minus, strict=True):
        assert torch.equal(weight, start)
        assert weight.stride() == start.stride()
        assert not torch.equal(a, start)
        # As symmetric as the type allows, also where the noise is rounded.
        assert ((a.double() + b.double()) / 2 - start.double()).abs().max() <= torch.finfo(dtype).eps * b.abs().max()


class Stopped(Exception):
    pass


@pytest.mark.parametrize("reflected", [False, True])
@pytest.mark.parametrize("kind", [Stopped, KeyboardInterrupt])
@pytest.mark.usefixtures("interruptible")
def test_weights_come_back_after_an_exception(kind: type[BaseException], reflected: bool) -> None:
    weights = _weights((5, 3), dtype=torch.float32)
    starts = _copies(weights)

    def stopped() -> None:
        with antithetic_noise(weights, 0.3, (0, 0)) as reflect:
            if reflected:
                reflect()
            assert not torch.equal(weights[0], starts[0])
            if kind is KeyboardInterrupt:
                signal.raise_signal(signal.SIGINT)
            raise Stopped

    with pytest.raises(kind):
        stopped()
    assert torch.equal(weights[0], starts[0])


@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 5), (0, 3)], ids=str)
@pytest.mark.parametrize("given", [False, True], ids=["no gradient yet", "a gradient"])
def test_the_pull_is_the_gradient_of_the_dense_penalty(shape: tuple[int, ...], given: bool) -> None:
    weight, reference, other = _weights(shape, shape, shape)
    penalty = 0.7
    loss = penalty / 2 * (weight - reference.detach()).pow(2).sum()
    if given:
        loss = loss + (other.detach() * weight).sum()
        weight.grad = other.detach().clone()
    (expected,) = torch.autograd.grad(loss, weight)
    add_l2sp_gradient(weight, reference.detach(), penalty)
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, expected, rtol=0, atol=1e-14)


def test_a_strong_pull_at_the_reference_leaves_small_gradients_alone() -> None:
    """λ W and λ W_ref taken one after the other would round them away."""
    (weight,) = _weights((100,), dtype=torch.float32)
    weight.grad = torch.full((100,), 1e-9)
    add_l2sp_gradient(weight, weight.detach().clone(), 1e3)
    assert torch.equal(weight.grad, torch.full((100,), 1e-9))
