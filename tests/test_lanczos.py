"""Lanczos quadrature of the positive part, against eigendecompositions."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import oracle
import pytest
import torch
from torch import Tensor

from hf_robust_ft.curvature.lanczos import positive_part

N = 24


def matrices(*spectra: Tensor) -> Tensor:
    """[B, N, N] with these eigenvalues and random eigenvectors."""
    generator = torch.Generator().manual_seed(0)
    turned = [torch.linalg.qr(torch.randn(N, N, dtype=torch.float64, generator=generator)).Q for _ in spectra]
    return torch.stack([q @ torch.diag(s.double()) @ q.T for q, s in zip(turned, spectra, strict=True)])


def starts(count: int) -> Tensor:
    return torch.randn(count, N, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def product(h: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda w: (h @ w.unsqueeze(-1)).squeeze(-1)


def dense(h: Tensor, v: Tensor) -> Tensor:
    return torch.stack([oracle.quadratic_psd(h[[i]], v[i])[0] for i in range(len(h))])


def few(*values: float) -> Tensor:
    """Some eigenvalues, all others zero."""
    return torch.tensor([*values, *[0.0] * (N - len(values))])


INDEFINITE = torch.linspace(-2, 3, N)
DECAYING = 4 * (-0.8) ** torch.arange(N)
SPECTRA = {
    "indefinite": INDEFINITE,
    "decaying": DECAYING,
    "low rank": few(5.0, -3.0, 1.0),
    "positive": INDEFINITE.abs() + 0.1,
    "negative": -INDEFINITE.abs() - 0.1,
    "identity": torch.ones(N),
    "zero": torch.zeros(N),
    "degenerate": torch.tensor([1.0, -1.0]).repeat(N // 2),
    "of all sizes": torch.logspace(-12, 3, N) * torch.tensor([1.0, -1.0]).repeat(N // 2),
}


@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA)
def test_all_steps_give_the_positive_part(spectrum: Tensor) -> None:
    h, v = matrices(spectrum, -spectrum), starts(2)
    found, gap = positive_part(product(h), v, N)
    scale = v.square().sum(1) * spectrum.abs().max()
    assert ((found - dense(h, v)).abs() <= 1e-11 * scale).all()
    assert gap.shape == (2,)


def test_definite_matrices_need_no_eigenvalues() -> None:
    h, v = matrices(SPECTRA["positive"], SPECTRA["negative"]), starts(2)
    for steps in (1, 2, 5, N):
        found, _ = positive_part(product(h), v, steps)
        assert found[0].item() == pytest.approx((v[0] @ h[0] @ v[0]).item(), rel=1e-12)
        assert found[1].item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("spectrum", "steps"), [(few(5.0, -3.0, 1.0), 4), (few(-1.0), 2), (torch.ones(N), 1)])
def test_one_step_more_than_different_eigenvalues_is_exact(spectrum: Tensor, steps: int) -> None:
    h, v = matrices(spectrum), starts(1)
    assert positive_part(product(h), v, steps)[0].item() == pytest.approx(dense(h, v).item(), abs=1e-11)
    # What follows is rounding, and adds nothing.
    assert positive_part(product(h), v, N)[0].item() == pytest.approx(dense(h, v).item(), abs=1e-11)


def test_fewer_steps_converge_and_the_gap_shrinks() -> None:
    h, v = matrices(*[DECAYING] * 20), starts(20)
    errors, gaps = [], []
    for steps in (2, 4, 8, 16):
        found, gap = positive_part(product(h), v, steps)
        errors.append((found - dense(h, v)).abs().mean().item())
        gaps.append(gap.mean().item())
    assert all(later < 0.7 * earlier for earlier, later in pairwise(errors)), errors
    assert all(later < 0.7 * earlier for earlier, later in pairwise(gaps)), gaps
    assert errors[0] > 100 * errors[-1]


@pytest.mark.parametrize("steps", [2, 5, 8, N])
def test_the_gap_is_what_half_the_steps_would_have_changed(steps: int) -> None:
    h, v = matrices(INDEFINITE, DECAYING), starts(2)
    whole, gap = positive_part(product(h), v, steps)
    half, _ = positive_part(product(h), v, (steps + 1) // 2)
    torch.testing.assert_close(gap, (whole - half).abs(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("steps", range(1, 10))
def test_any_number_of_steps_stays_between_the_form_and_the_sound_bound(steps: int) -> None:
    h, v = matrices(INDEFINITE, DECAYING, -DECAYING), starts(3)
    found, _ = positive_part(product(h), v, steps)
    form, length = (v * product(h)(v)).sum(1), product(h)(v).norm(dim=1)
    assert (found >= form.clamp(min=0) - 1e-11).all()
    assert (found <= (form + v.norm(dim=1) * length) / 2 + 1e-11).all()


def test_a_batch_gives_what_each_gives_alone() -> None:
    h, v = matrices(INDEFINITE, few(5.0, -3.0, 1.0), torch.zeros(N), DECAYING), starts(4)
    v[3] = 0
    for steps in (3, N):
        together = torch.stack(positive_part(product(h), v, steps))
        alone = [torch.stack(positive_part(product(h[[i]]), v[[i]], steps)) for i in range(4)]
        torch.testing.assert_close(together, torch.cat(alone, 1), rtol=1e-11, atol=1e-11)


def test_a_zero_direction_and_a_zero_matrix_give_zero() -> None:
    h, v = matrices(INDEFINITE, torch.zeros(N)), starts(2)
    v[0] = 0
    for steps in (1, 4, N):
        assert [x.tolist() for x in positive_part(product(h), v, steps)] == [[0, 0], [0, 0]]


@pytest.mark.parametrize("factor", [1e-30, 1e-6, 1e6, 1e30])
def test_units_do_not_matter(factor: float) -> None:
    h, v = matrices(INDEFINITE, few(5.0, -3.0, 1.0)), starts(2)
    expected = dense(h, v)
    torch.testing.assert_close(positive_part(product(factor * h), v, N)[0] / factor, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(positive_part(product(h), factor * v, N)[0] / factor**2, expected, rtol=1e-10, atol=0)


def test_vectors_keep_their_shape_and_no_product_is_wasted() -> None:
    h, v = matrices(INDEFINITE, DECAYING), starts(2)
    shapes = []

    def shaped(w: Tensor) -> Tensor:
        shapes.append(tuple(w.shape))
        return product(h)(w.flatten(1)).view(w.shape)

    found, _ = positive_part(shaped, v.view(2, 4, 6), 1000)
    assert shapes == [(2, 4, 6)] * N
    torch.testing.assert_close(found, dense(h, v), rtol=1e-11, atol=0)


def test_single_precision_has_single_precision_errors() -> None:
    h, v = matrices(INDEFINITE, DECAYING, few(5.0, -3.0, 1.0)).float(), starts(3).float()
    found, gap = positive_part(product(h), v, N)
    assert found.dtype == gap.dtype == torch.float64
    scale = v.double().square().sum(1) * 5
    assert ((found - dense(h.double(), v.double())).abs() <= 1e-5 * scale).all()
