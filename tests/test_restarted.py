"""Restarted Lanczos against matrices of known eigenvalues."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_robust_ft.curvature import restarted
from hf_robust_ft.curvature.restarted import largest_eigenpairs


def gaussian(size: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def spectrum(name: str, size: int, seed: int) -> Tensor:
    """Eigenvalues [size] in no order."""
    if name == "dense":
        return torch.linspace(-1, 1, size, dtype=torch.float64)
    if name == "geometric":
        return 5 * 0.9 ** torch.arange(size, dtype=torch.float64)
    values = 0.01 * gaussian(size, seed)
    values[:10] = torch.linspace(1, 5, 10, dtype=torch.float64)
    if name == "near":
        values[10] = 5 * 1.003
    if name == "indefinite":
        values[:5] -= 20
    return values


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", ["outliers", "near", "indefinite", "geometric", "dense"])
def test_largest_of_known_ones(name: str, count: int) -> None:
    for seed in range(8):
        values = spectrum(name, 500, seed)
        mirror = gaussian(500, seed + 100)
        mirror /= mirror.norm()

        def reflect(v: Tensor, mirror: Tensor = mirror) -> Tensor:
            return v - 2 * (mirror @ v) * mirror

        def product(v: Tensor, values: Tensor = values, reflect: object = reflect) -> Tensor:
            return reflect(values * reflect(v))  # type: ignore[operator]

        found, vectors, within = largest_eigenpairs(product, gaussian(500, seed + 200), count, 14, 1e-8)
        assert within.all()
        exact = values.sort(descending=True).values[:count]
        torch.testing.assert_close(found, exact, rtol=1e-7, atol=0)
        torch.testing.assert_close(vectors @ vectors.t(), torch.eye(count).double(), rtol=0, atol=1e-12)
        for value, vector in zip(found, vectors, strict=True):
            assert (product(vector) - value * vector).norm() <= 2e-8 * value


def test_a_smaller_eigenvalue_next_to_the_largest_does_not_pass_for_it() -> None:
    # With a tolerance below their distance the first to converge can be the wrong one, if it is asked too soon.
    for seed in range(60):
        values = spectrum("near", 2000, seed)
        found, _, within = largest_eigenpairs(lambda v, w=values: w * v, gaussian(2000, seed + 100), 1, 14, 1e-4)
        assert within.all()
        assert found.item() == pytest.approx(5 * 1.003, rel=1e-5)


def test_copies_of_an_eigenvalue_and_zeros() -> None:
    """H has rank 4 in 40 dimensions; the space of the start is closed after three products."""
    values = torch.zeros(40).double()
    values[:4] = torch.tensor([3.0, 3.0, 2.0, 2.0])
    found, vectors, within = largest_eigenpairs(lambda v: values * v, gaussian(40, 0), 6, 14, 1e-10)
    assert within.all()
    torch.testing.assert_close(found, torch.tensor([3.0, 3.0, 2.0, 2.0, 0.0, 0.0]).double(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(vectors @ vectors.t(), torch.eye(6).double(), rtol=0, atol=1e-12)


def test_millions_of_weights_in_float32() -> None:
    """Where plain float32 sums would lose the fourth digit."""
    size = 4_000_000
    values = 0.01 * gaussian(size, 0, torch.float32)
    values[:10] = torch.linspace(1, 5, 10)
    found, vectors, within = largest_eigenpairs(lambda v: values * v, gaussian(size, 1, torch.float32), 2, 14, 1e-4)
    assert within.all()
    assert vectors.dtype == torch.float32
    torch.testing.assert_close(found, values[[9, 8]].double(), rtol=1e-5, atol=0)
    for value, vector in zip(found, vectors, strict=True):
        assert (values * vector - value * vector).norm() <= 1.1e-4 * value


def test_what_has_not_converged_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restarted, "MAX_PRODUCTS", 16)
    values = spectrum("dense", 500, 0)
    found, vectors, within = largest_eigenpairs(lambda v: values * v, gaussian(500, 0), 2, 14, 1e-8)
    assert not within.any()
    assert (found < 1).all()
    torch.testing.assert_close(vectors @ vectors.t(), torch.eye(2).double(), rtol=0, atol=1e-12)
