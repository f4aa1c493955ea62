"""Projection onto balls around a reference, against a naive float64 twin."""

from __future__ import annotations

import math
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hf_robust_ft import projection
from hf_robust_ft.projection import Norm, distance, magnitude, project_, project_together_

NORMS: tuple[Norm, ...] = ("frobenius", "inf_op")


def naive_distance(weight: Tensor, reference: Tensor, norm: Norm, row_dims: tuple[int, ...]) -> float:
    difference = (weight.double() - reference.double()).movedim(row_dims, tuple(range(len(row_dims))))
    rows = difference.reshape(math.prod(difference.shape[: len(row_dims)]), -1)
    return float(rows.norm() if norm == "frobenius" else rows.abs().sum(1).max())


def naive_projection(weight: Tensor, reference: Tensor, radius: float, norm: Norm, row_dims: tuple[int, ...]) -> Tensor:
    difference = weight.double() - reference.double()
    if norm == "frobenius":
        factor = min(1.0, radius / float(difference.norm()))
        return reference.double() + factor * difference
    others = [d for d in range(weight.dim()) if d not in row_dims]
    sums = difference.abs().sum(dim=others, keepdim=True)
    return reference.double() + difference * (radius / sums).clamp(max=1)


def pair(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0, scale: float = 0.1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    reference = torch.randn(shape, generator=generator, dtype=torch.float64)
    moved = reference + scale * torch.randn(shape, generator=generator, dtype=torch.float64)
    return moved.to(dtype), reference.to(dtype)


def run(weight: Tensor, reference: Tensor, radius: float, norm: Norm, row_dims: tuple[int, ...] = (0,)) -> Tensor:
    projected = weight.clone(memory_format=torch.preserve_format)
    size = magnitude(reference, norm, row_dims)
    project_(projected, reference, radius, norm, reference_norm=size, row_dims=row_dims)
    return projected


SHAPES = [
    ((7, 5), (0,)),
    ((5, 7), (1,)),
    ((6, 3, 2, 2), (0,)),
    ((3, 6, 2, 2), (1,)),
    ((1, 9), (0,)),
    ((4, 1), (1,)),
]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("shape", "row_dims"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_projection_is_the_definition(
    norm: Norm, shape: tuple[int, ...], row_dims: tuple[int, ...], dtype: torch.dtype
) -> None:
    weight, reference = pair(shape, dtype)
    radius = 0.4 * naive_distance(weight, reference, norm, row_dims)
    projected = run(weight, reference, radius, norm, row_dims)
    # The margin keeps it 1e-5 of the radius inside.
    expected = naive_projection(weight, reference, radius, norm, row_dims)
    torch.testing.assert_close(
        projected.double(), expected, rtol=0, atol=2e-5 * radius + 1e-6 * (dtype == torch.float32)
    )
    assert naive_distance(projected, reference, norm, row_dims) <= radius
    assert naive_distance(projected, reference, norm, row_dims) >= 0.9999 * radius


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", range(20))
def test_projecting_twice_is_projecting_once(norm: Norm, dtype: torch.dtype, seed: int) -> None:
    weight, reference = pair((33, 17), dtype, seed)
    # Radii from far below to just below the distance, also where rounding is as large as the radius.
    factor = 10.0 ** -(seed % 7) if seed < 10 else 1 - 10.0 ** -(seed % 10 + 1)
    radius = factor * naive_distance(weight, reference, norm, (0,))
    once = run(weight, reference, radius, norm)
    assert torch.equal(run(once, reference, radius, norm), once)
    assert naive_distance(once, reference, norm, (0,)) <= radius


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_weight_inside_its_ball_is_not_touched(norm: Norm, dtype: torch.dtype) -> None:
    weight, reference = pair((8, 9), dtype)
    radius = 1.001 * naive_distance(weight, reference, norm, (0,))
    assert torch.equal(run(weight, reference, radius, norm), weight)


@pytest.mark.parametrize("together", [1, 50, 1 << 24])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_together_is_one_by_one(dtype: torch.dtype, together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside, inside, on its reference, around it with no radius, and not finite."""
    monkeypatch.setattr(projection, "TOGETHER", together)
    shapes = [(7, 5), (6, 3, 2, 2), (1, 9), (4, 4), (3, 3), (5, 2)]
    pairs = [pair(shape, dtype, seed) for seed, shape in enumerate(shapes)]
    references = [reference for _, reference in pairs]
    weights = [weight for weight, _ in pairs]
    weights[3] = references[3].clone()
    weights[5][0, 0] = math.nan
    radii = [
        factor * naive_distance(w, r, "frobenius", (0,))
        for factor, (w, r) in zip((0.3, 1.2, 0.999, 1, 0, 1), pairs, strict=True)
    ]
    sizes = [magnitude(reference, "frobenius") for reference in references]
    expected = [run(w, r, radius, "frobenius") for w, r, radius in zip(weights, references, radii, strict=True)]
    found = [weight.clone() for weight in weights]
    project_together_(found, references, radii, sizes)
    for got, one, weight in zip(found, expected, weights, strict=True):
        torch.testing.assert_close(got, one, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-14, equal_nan=True)
        assert torch.equal(got, weight) == torch.equal(one, weight)
    again = [weight.clone() for weight in found]
    project_together_(again, references, radii, sizes)
    for got, one in zip(again, found, strict=True):
        torch.testing.assert_close(got, one, rtol=0, atol=0, equal_nan=True)


def test_rows_inside_their_ball_are_not_touched() -> None:
    weight, reference = pair((4, 6), torch.float32)
    weight[2] = reference[2] + 1e-4
    projected = run(weight, reference, 0.1, "inf_op")
    assert torch.equal(projected[2], weight[2])
    assert not torch.equal(projected[1], weight[1])


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_radius_zero_restores_the_reference(norm: Norm, dtype: torch.dtype) -> None:
    weight, reference = pair((5, 5), dtype)
    assert torch.equal(run(weight, reference, 0.0, norm), reference)


@pytest.mark.parametrize("norm", NORMS)
def test_half_precision_ends_inside_where_rounding_to_nearest_would_not(norm: Norm) -> None:
    # Each entry is one unit in the last place away: scaled by 0.9 and rounded to nearest it would not move.
    reference = torch.full((4, 4), 1.0, dtype=torch.bfloat16)
    weight = torch.nextafter(reference, torch.full_like(reference, 2.0))
    radius = 0.9 * naive_distance(weight, reference, norm, (0,))
    assert naive_distance(run(weight, reference, radius, norm), reference, norm, (0,)) <= radius


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("row_dims", [(0,), (1,)])
def test_blocks_do_not_change_the_result(
    norm: Norm, row_dims: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, reference = pair((50, 40), torch.float64)
    radius = 0.3 * naive_distance(weight, reference, norm, row_dims)
    whole = run(weight, reference, radius, norm, row_dims)
    monkeypatch.setattr(projection, "CPU_BLOCK", 90)  # two rows a block
    torch.testing.assert_close(run(weight, reference, radius, norm, row_dims), whole, rtol=0, atol=1e-15)
    assert distance(weight, reference, norm, row_dims) == pytest.approx(
        naive_distance(weight, reference, norm, row_dims), rel=1e-14
    )


def test_other_memory_layouts_are_projected_in_place() -> None:
    weight, reference = pair((6, 3, 4, 4), torch.float32)
    expected = run(weight, reference, 0.2, "frobenius")
    strided = weight.to(memory_format=torch.channels_last)
    projected = run(strided, reference.to(memory_format=torch.channels_last), 0.2, "frobenius")
    assert projected.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(projected, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_is_left_as_it_is(norm: Norm, bad: float) -> None:
    weight, reference = pair((1, 5), torch.float32)
    weight[0, 3] = bad
    torch.testing.assert_close(run(weight, reference, 0.01, norm), weight, rtol=0, atol=0, equal_nan=True)


def test_no_graph_is_recorded_and_parameters_stay_leaves() -> None:
    weight, reference = pair((3, 3), torch.float32)
    parameter = torch.nn.Parameter(weight)
    before = parameter.data_ptr()
    project_(parameter, reference, 0.1, "frobenius", reference_norm=1.0)
    assert parameter.is_leaf
    assert parameter.data_ptr() == before


@pytest.mark.parametrize("norm", NORMS)
def test_distance_and_magnitude_in_float64(norm: Norm) -> None:
    weight, reference = pair((30, 20), torch.float32, scale=1e-6)
    assert distance(weight, reference, norm) == pytest.approx(naive_distance(weight, reference, norm, (0,)), rel=1e-12)
    zero = torch.zeros_like(weight)
    assert magnitude(weight, norm) == pytest.approx(naive_distance(weight, zero, norm, (0,)), rel=1e-12)


class PeakMemory(TorchDispatchMode):
    """The most bytes that tensors made inside were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {a.untyped_storage()._cdata for a in args if isinstance(a, Tensor)}
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in given | self.seen:
                    self.seen.add(storage._cdata)
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(tensor, self._freed, storage._cdata, storage.nbytes())
        return result

    def _freed(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("row_dims", [(0,), (1,)])
def test_no_second_copy_of_a_weight_is_made(norm: Norm, row_dims: tuple[int, ...]) -> None:
    weight, reference = pair((1024, 1024), torch.float32)
    size = magnitude(reference, norm, row_dims)
    with PeakMemory() as memory:
        project_(weight, reference, 0.1, norm, reference_norm=size, row_dims=row_dims)
    assert distance(weight, reference, norm, row_dims) <= 0.1
    block = 4 * projection.CPU_BLOCK
    assert block <= memory.peak <= 3 * block < 0.2 * weight.nbytes
