"""Hessian-vector products, eigenpairs and spectral densities against dense mean Hessians."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import oracle
import pytest
import tiny
import torch
from dense import CASES, LAYERS, X, Y, batches, case_batches, case_hessian, mean_hessian, smooth, squares
from torch import Tensor, nn

from hf_robust_ft import find_layers
from hf_robust_ft.curvature import NonFiniteLoss, restarted
from hf_robust_ft.curvature.directions import group_layers
from hf_robust_ft.curvature.loss import ExampleLoss
from hf_robust_ft.curvature.mean import MeanLoss
from hf_robust_ft.curvature.model import measuring
from hf_robust_ft.curvature.spectrum import (
    WHOLE_MODEL,
    NotConverged,
    ritz_values,
    spectral_density,
    top_eigenpairs,
)
from hf_robust_ft.curvature.trace import hessian_trace


def flat(vectors: dict[str, Tensor], names: list[str]) -> Tensor:
    """Eigenvectors as rows, [count, P]."""
    return torch.cat([vectors[name].flatten(1) for name in names], dim=1)


def assert_eigenpairs(values: Tensor, vectors: Tensor, hessian: Tensor) -> None:
    """That they are the largest ones, to 1e-6 of the largest size of an eigenvalue, and have the promised sign."""
    expected = torch.linalg.eigvalsh(hessian)
    scale = expected.abs().max().item()
    torch.testing.assert_close(values, expected.flip(0)[: len(values)], rtol=0, atol=1e-6 * scale)
    torch.testing.assert_close(vectors @ hessian, values.unsqueeze(1) * vectors, rtol=0, atol=1e-6 * scale)
    torch.testing.assert_close(vectors @ vectors.t(), torch.eye(len(values)).double(), rtol=0, atol=1e-6)
    assert (vectors.gather(1, vectors.abs().argmax(1, keepdim=True)) > 0).all()


# ------------------------------------------------------------------------------------------------------ products


@pytest.mark.parametrize("name", CASES)
def test_products(name: str) -> None:
    case = oracle.find_case(name)
    model = case.model()
    names = [layer.name for layer in find_layers(model)[0]]
    (hessian,) = case_hessian(case, [names])
    vectors = torch.randn(2, len(hessian), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with measuring(model):
        mean = MeanLoss(
            model, group_layers(model, WHOLE_MODEL)[0], case_batches(case), ExampleLoss(case.loss(), model), ""
        )
        found = mean.products(vectors)
    assert (found - vectors @ hessian).abs().max() < 1e-10 * hessian.abs().sum()
    assert (mean.examples, mean.passes) == (oracle.EXAMPLES, 1)


# ---------------------------------------------------------------------------------------------------- eigenpairs


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_eigenpairs_of_the_whole_model(name: str, count: int) -> None:
    case = oracle.find_case(name)
    model = case.model()
    names = [layer.name for layer in find_layers(model)[0]]
    found = top_eigenpairs(model, case_batches(case), count=count, loss=case.loss(), tolerance=1e-9)
    assert found.layers == ("model",)
    (hessian,) = case_hessian(case, [names])
    assert_eigenpairs(found.values[0], flat(found.vectors, names), hessian)
    assert found.examples == oracle.EXAMPLES


def test_eigenpairs_of_each_layer() -> None:
    model = smooth()
    found = top_eigenpairs(model, batches(3), layers="weights", count=2, tolerance=1e-9)
    assert found.layers == tuple(LAYERS)
    for name, values, hessian in zip(LAYERS, found.values, mean_hessian(model, [[n] for n in LAYERS]), strict=True):
        assert_eigenpairs(values, flat(found.vectors, [name]), hessian)
    assert found.vectors["0.weight"].shape == (2, 5, 4)


@pytest.mark.parametrize("count", [10, 20])
def test_as_many_as_a_layer_has(count: int) -> None:
    model = smooth()
    (hessian,) = mean_hessian(model, [["0.weight"]])
    found = top_eigenpairs(model, batches(3), layers={"first": "0"}, count=count)
    assert_eigenpairs(found.values[0], flat(found.vectors, ["0.weight"]), hessian)


def test_the_residual_bounds_the_error() -> None:
    model = smooth()
    (hessian,) = mean_hessian(model, [LAYERS])
    exact = torch.linalg.eigvalsh(hessian)
    for tolerance in (0.3, 1e-2, 1e-4):
        found = top_eigenpairs(model, batches(7), count=2, tolerance=tolerance)
        errors = (found.values[0].unsqueeze(1) - exact).abs().amin(1)
        # The recurrence's own estimate of the residual is what the tolerance is for.
        assert (errors <= found.residuals[0] + 1e-12).all()
        assert (found.residuals[0] <= 1.01 * tolerance * found.values[0] + 1e-12).all()
        u = flat(found.vectors, LAYERS)
        expected = (u @ hessian - found.values[0].unsqueeze(1) * u).norm(dim=1)
        torch.testing.assert_close(found.residuals[0], expected, rtol=1e-6, atol=1e-12)


def test_the_largest_not_the_largest_magnitude() -> None:
    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return logits[:, 0].square() / 2 - 5 * logits[:, 1].square()

    model = nn.Linear(30, 2, bias=False).double()
    x = torch.randn(9, 30, generator=torch.Generator().manual_seed(0)).double()
    found = top_eigenpairs(model, batches(4, x, torch.zeros(9).long()), loss=loss, tolerance=1e-9)
    # H = diag(1, -10) ⊗ mean(x xᵀ)
    assert found.values.item() == pytest.approx(torch.linalg.matrix_norm(x, 2).item() ** 2 / 9, rel=1e-8)
    (vector,) = found.vectors["weight"]
    assert vector[1].abs().max() < 1e-6
    assert vector.flatten()[vector.abs().argmax()] > 0


def test_no_curvature_at_all() -> None:
    model = nn.Linear(30, 2).double()
    x = torch.ones(3, 30).double()
    found = top_eigenpairs(model, batches(2, x, Y[:3]), count=3, loss=lambda z, y: z.sum(1))
    assert not found.values.any()
    assert not found.residuals.any()
    assert_eigenpairs(found.values[0], flat(found.vectors, ["weight"]), torch.zeros(60, 60).double())


def test_more_than_the_rank() -> None:
    model = nn.Linear(30, 2, bias=False).double()
    x = torch.randn(2, 30, generator=torch.Generator().manual_seed(0)).double()
    found = top_eigenpairs(model, batches(2, x, Y[:2]), count=6, loss=squares, tolerance=1e-9)
    hessian = torch.block_diag(*2 * [x.t() @ x / 2])  # rank 4, each eigenvalue twice
    vectors = flat(found.vectors, ["weight"])
    torch.testing.assert_close(vectors @ hessian, found.values[0].unsqueeze(1) * vectors, rtol=0, atol=1e-6)
    assert found.values[0, 0].item() == pytest.approx(torch.linalg.eigvalsh(hessian)[-1].item())


@pytest.mark.parametrize("size", [1, 2])
def test_batches_make_no_difference(size: int) -> None:
    one, other = (top_eigenpairs(smooth(), batches(s), count=2, tolerance=1e-9) for s in (7, size))
    torch.testing.assert_close(other.values, one.values, rtol=1e-8, atol=0)
    for name in LAYERS:
        torch.testing.assert_close(other.vectors[name], one.vectors[name], rtol=0, atol=1e-6)
    densities = [spectral_density(smooth(), batches(s), probes=2, steps=10) for s in (7, size)]
    torch.testing.assert_close(densities[1].density, densities[0].density, rtol=1e-8, atol=1e-9)


def test_float32_with_the_default_tolerance() -> None:
    torch.manual_seed(0)
    model = tiny.bert().train()
    data = [{"input_ids": torch.arange(3, 18).view(3, 5), "labels": torch.tensor([0, 2, 1])}]
    before = tiny.weights(model)
    found = top_eigenpairs(model, data, count=2)
    tiny.assert_equal_weights(before, tiny.weights(model))
    assert model.training
    assert found.vectors["classifier.weight"].dtype == torch.float32
    exact = top_eigenpairs(model.double(), data, count=2, tolerance=1e-8)
    torch.testing.assert_close(found.values, exact.values, rtol=1e-4, atol=0)


# ------------------------------------------------------------------------------------------------------- density


def test_lanczos_is_gauss_quadrature() -> None:
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    matrix, start = half + half.t(), torch.randn(12, generator=generator, dtype=torch.float64)
    for steps in (1, 3, 6):
        values, weights = ritz_values(lambda v: matrix @ v, start, steps)
        power = start
        for k in range(2 * steps):  # exact for polynomials of degree below 2 · steps
            expected = start @ power / start.square().sum()
            assert (weights * values**k).sum().item() == pytest.approx(expected.item(), rel=1e-9, abs=1e-9)
            power = matrix @ power


def test_lanczos_stops_when_the_krylov_space_is_exhausted() -> None:
    matrix = torch.diag(torch.tensor([1.0, 2.0, 2.0, 5.0, 5.0, 5.0])).double()
    values, weights = ritz_values(lambda v: matrix @ v, torch.ones(6).double(), 6)
    torch.testing.assert_close(values, torch.tensor([1.0, 2.0, 5.0]).double())
    torch.testing.assert_close(weights, torch.tensor([1 / 6, 2 / 6, 3 / 6]).double())


def test_the_first_moment_is_the_trace_of_the_same_probe() -> None:
    found = spectral_density(smooth(), batches(3), probes=4, steps=5, seed=3)
    moments = 35 * (found.weights * found.ritz_values).sum(2)
    trace = hessian_trace(smooth(), batches(3), probes=4, seed=3, joint=True, layers=WHOLE_MODEL)
    torch.testing.assert_close(moments.t(), trace.samples)
    torch.testing.assert_close(found.weights.sum(2), torch.ones(1, 4).double())


@pytest.mark.parametrize("layers", [WHOLE_MODEL, "weights"], ids=["model", "layers"])
def test_density(layers: Any) -> None:
    model = smooth()
    groups = [LAYERS] if layers is WHOLE_MODEL else [[name] for name in LAYERS]
    found = spectral_density(model, batches(7), layers=layers, probes=40, points=301)
    assert found.density.shape == (len(groups), 301)
    for g, hessian in enumerate(mean_hessian(model, groups)):
        eigenvalues, width = torch.linalg.eigvalsh(hessian), found.widths[g]
        at = (found.grid[g] - eigenvalues.unsqueeze(1)) / width
        exact = torch.exp(-at.square() / 2).mean(0) / (width * math.sqrt(2 * math.pi))
        # With as many steps as weights, the probes are the only error.
        assert ((found.density[g] - exact).abs() <= 4.5 * found.standard_errors[g] + 1e-6 * exact.max()).all()
        assert found.standard_errors[g].max() < 0.15 * exact.max()
        assert torch.trapezoid(found.density[g], found.grid[g]).item() == pytest.approx(1, abs=1e-3)
        assert found.grid[g, 0] < eigenvalues[0]
        assert found.grid[g, -1] > eigenvalues[-1]


def test_the_error_of_the_density_falls_with_the_root_of_the_probes() -> None:
    few, many = (spectral_density(smooth(), batches(7), probes=n, steps=10, width=0.05) for n in (10, 160))
    ratio = few.standard_errors.square().mean().sqrt() / many.standard_errors.square().mean().sqrt()
    assert ratio.item() == pytest.approx(4, rel=0.4)


def test_a_spectrum_of_one_value() -> None:
    model = nn.Linear(3, 2, bias=False).double()
    for loss, value in ((squares, 1.0), (lambda z, y: z.sum(1), 0.0)):
        found = spectral_density(model, [(3**0.5 * torch.eye(3).double(), Y[:3])], loss=loss, probes=2, steps=4)
        torch.testing.assert_close(found.ritz_values[0, :, 0], torch.full((2,), value).double())
        torch.testing.assert_close(found.weights[0], torch.tensor([1.0, 0, 0, 0]).double().expand(2, 4))
        assert found.widths.item() == pytest.approx(0.25)
        assert torch.trapezoid(found.density[0], found.grid[0]).item() == pytest.approx(1, abs=1e-3)


# ----------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": 0}, "count is 0; ask for at least one eigenvalue"),
        ({"count": 16, "layers": "weights"}, "count is 16, but 2.weight has 15 weights"),
        ({"count": 36}, "count is 36, but model has 35 weights; ask for at most as many"),
        ({"tolerance": 0.0}, "tolerance is 0.0; give a positive relative residual"),
        ({"tolerance": math.nan}, "tolerance is nan; give a positive relative residual"),
        ({"seed": -2}, "seed is -2; give 0 or a positive number"),
        ({"layers": {"head": "classifier"}}, "match no layer"),
    ],
)
def test_bad_arguments_for_eigenpairs(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        top_eigenpairs(smooth(), batches(7), **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"probes": 1}, "probes is 1; give at least 2"),
        ({"steps": 0}, "steps is 0; give at least 1"),
        ({"points": 1}, "points is 1; give at least 2"),
        ({"width": 0.0}, "width is 0.0; give a positive number, or None"),
        ({"width": math.inf}, "width is inf; give a positive number, or None"),
        ({"seed": -2}, "seed is -2; give 0 or a positive number"),
    ],
)
def test_bad_arguments_for_the_density(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spectral_density(smooth(), batches(7), **arguments)


@pytest.mark.parametrize("measure", [top_eigenpairs, spectral_density])
def test_bad_data(measure: Any) -> None:
    with pytest.raises(ValueError, match="dataloader gave no batch: there is nothing to measure"):
        measure(smooth(), [])
    with pytest.raises(ValueError, match=r"Give it a list or a DataLoader, as an iterator is used up"):
        measure(smooth(), iter(batches(7)))
    x = X.clone()
    x[4] = math.nan
    with pytest.raises(NonFiniteLoss, match="the loss of example 4 is nan"):
        measure(smooth(), batches(3, x))

    class Augmented:
        calls = 0

        def __iter__(self) -> Iterator[Any]:
            self.calls += 1
            return iter(batches(3, X + 0.1 * self.calls))

    with pytest.raises(ValueError, match=r"dataloader gave 7 examples .* it must give the same ones each time"):
        measure(smooth(), Augmented())


def test_eigenvalues_that_do_not_converge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restarted, "MAX_PRODUCTS", 20)
    with pytest.raises(NotConverged, match=r"of 4 eigenvalues of model reached the tolerance 1e-15 in \d+ passes"):
        top_eigenpairs(smooth(), batches(7), count=4, tolerance=1e-15)
