"""What a measurement is said to cost, beside the bytes that torch's allocator gives it."""

from __future__ import annotations

import dataclasses
import gc
import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import tiny
import torch
from oracle import perturbed_reference
from torch import Tensor
from torch.autograd.profiler import profile

from hf_robust_ft import (
    hessian_trace,
    layer_quadratic_forms,
    measure_hessian,
    measurement_costs,
    noise_stability,
    spectral_density,
    top_eigenpairs,
)
from hf_robust_ft.curvature import cost
from hf_robust_ft.curvature.cost import OVERHEAD, Work
from hf_robust_ft.curvature.footprint import Alive, Footprint, Footprints

BATCH = 4
TOKENS = 24
WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
TEXTS = {
    "input_ids": torch.randint(1, 50, (BATCH, TOKENS), generator=torch.Generator().manual_seed(0)),
    "labels": torch.arange(BATCH) % tiny.CLASSES,
}
IMAGES = {
    "pixel_values": torch.randn(BATCH, 1, 16, 16, generator=torch.Generator().manual_seed(0)),
    "labels": TEXTS["labels"],
}
MODELS: dict[str, tuple[Callable[[], Any], dict[str, Tensor]]] = {
    "bert": (lambda: tiny.bert(**WIDE), TEXTS),
    "vit": (lambda: tiny.vit(**WIDE, image_size=16), IMAGES),
    "resnet": (lambda: tiny.resnet(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1]), IMAGES),
}
COUNTS: dict[str, Any] = {
    "examples": BATCH, "lanczos_steps": 5, "probes": 2, "density_probes": 2, "density_steps": 5
}  # fmt: skip


def first(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value[:1] for key, value in batch.items()}


MEASUREMENTS: dict[str, Callable[..., Any]] = {
    "layer_quadratic_forms": lambda model, batch, reference, **kw: layer_quadratic_forms(model, batch, reference, **kw),
    "sound bounds": lambda model, batch, reference, **kw: measure_hessian(
        model, reference, [batch], time_budget=0, **kw
    ),
    "Lanczos value": lambda model, batch, reference, **kw: layer_quadratic_forms(
        model, first(batch), reference, kind="hessian_psd", lanczos_steps=5, **kw
    ),
    "hessian_trace": lambda model, batch, _, **kw: hessian_trace(model, [batch], probes=2, **kw),
    "joint hessian_trace": lambda model, batch, _, **kw: hessian_trace(model, [batch], probes=2, joint=True, **kw),
    "top_eigenpairs": lambda model, batch, _, **kw: top_eigenpairs(model, [batch], tolerance=0.1, **kw),
    "spectral_density": lambda model, batch, _, **kw: spectral_density(model, [batch], probes=2, steps=5, **kw),
    "noise_stability": lambda model, batch, _, **kw: noise_stability(
        model, [batch], sigma=0.01, draws=2, probes=2, **kw
    ),
}

WHOLE = ("top_eigenpairs", "spectral_density")
"""What measures all layers as one by default."""


def peak(action: Callable[[], Any]) -> int:
    """The most bytes that torch's allocator had given at once: every kernel's, not only those that Python sees."""
    gc.collect()
    with profile(use_cpu=True, profile_memory=True) as found:
        action()
    assert found.kineto_results is not None
    events = [e for e in found.kineto_results.events() if e.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most


KINDS = [("bert", "weights"), ("bert", "blocks"), ("vit", "weights"), ("vit", "blocks"), ("resnet", "weights")]


@pytest.mark.parametrize("name", MEASUREMENTS)
@pytest.mark.parametrize(("kind", "layers"), KINDS)
def test_memory_is_within_15_percent(kind: str, name: str, layers: str) -> None:
    make, batch = MODELS[kind]
    chosen: Any = {"model": "*"} if name in WHOLE else layers
    torch.manual_seed(0)
    model = make()
    reference = perturbed_reference(model)
    predicted = measurement_costs(model, batch, layers=chosen, **COUNTS)[name].bytes - OVERHEAD
    measured = peak(lambda: MEASUREMENTS[name](model, batch, reference, layers=chosen))
    assert predicted == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("kind", ["bert", "resnet"])
def test_memory_of_several_batches(kind: str) -> None:
    make, batch = MODELS[kind]
    torch.manual_seed(0)
    model = make()
    counts = {**COUNTS, "examples": 2 * BATCH, "layers": {"model": "*"}}
    predicted = measurement_costs(model, batch, **counts)["spectral_density"].bytes - OVERHEAD
    measured = peak(lambda: spectral_density(model, 2 * [batch], probes=2, steps=5))
    assert predicted == pytest.approx(measured, rel=0.15)


def test_the_graph_of_a_single_batch_stays() -> None:
    # A sum of float64 is divided while graph and gradients stay; of two batches they are gone by then.
    nothing = dict.fromkeys((field.name for field in dataclasses.fields(Footprint)), 0)
    some = Footprint(**{**nothing, "examples": 4, "graph": 1000, "second": 2000})
    sizes = Footprints(some, some)
    work = Work(layers=1, measured=1000, largest=1000, tensor=1000, examples=4, batch=4)
    two = dataclasses.replace(work, examples=8)
    for costs in (lambda w: cost.density(w, sizes, 2, 5), lambda w: cost.eigenpairs(w, sizes, 1, 30)):
        assert costs(work).bytes - costs(two).bytes == (16 + 4) * 1000 + 3000 - (4 + 4 + 8) * 1000 - 3000
        assert costs(dataclasses.replace(work, processes=2)).bytes == costs(two).bytes


def test_what_examples_hold_lies_on_a_line() -> None:
    fields = [field.name for field in dataclasses.fields(Footprint)]
    one, some = (Footprint(**{**dict.fromkeys(fields, size), "examples": n}) for n, size in ((1, 10), (4, 25)))
    sizes = Footprints(one, some)
    assert (sizes.of(1), sizes.of(4)) == (one, dataclasses.replace(some, group=10, compared=10))
    assert (sizes.of(2).graph, sizes.of(7).graph, sizes.of(7).examples, sizes.of(7).group) == (15, 40, 7, 10)
    assert Footprints(one, one).of(3).graph == 30


def test_half_precision_is_measured_on_copies() -> None:
    make, batch = MODELS["bert"]
    whole = measurement_costs(make(), batch, **COUNTS)
    half = measurement_costs(make().bfloat16(), batch, **COUNTS)
    size = sum(p.numel() for p in make().parameters())
    for name in whole:
        assert half[name].bytes - whole[name].bytes == pytest.approx(4 * size, rel=0.01)


def test_a_model_without_memory_is_counted_alike() -> None:
    make, batch = MODELS["vit"]
    one = first(batch)

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return -logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1))[:, 0]

    real = measurement_costs(make(), one, loss=loss, **COUNTS)
    meta = measurement_costs(make().to("meta"), one, loss=loss, **COUNTS)
    for name, expected in real.items():
        assert meta[name].bytes == pytest.approx(expected.bytes, rel=0.01)
        assert math.isnan(meta[name].seconds)
        assert expected.seconds > 0


WORK = Work(
    layers=3, measured=100, largest=50, tensor=50, examples=40, batch=4, forward=0.5, forward_alone=2.0, reading=0.1
)  # fmt: skip
EIGHT = Footprint(**{field.name: 8 for field in dataclasses.fields(Footprint)})
SIZES = Footprints(EIGHT, EIGHT)


def test_time_is_that_of_forward_passes() -> None:
    assert cost.forms(WORK, SIZES).seconds == pytest.approx(0.9 * 3 * 40 * 0.5)
    assert cost.bounds(WORK, SIZES).seconds == pytest.approx(2.4 * 3 * 40 * 0.5)
    assert cost.lanczos_value(WORK, SIZES, steps=20).seconds == pytest.approx(2.0 * 20 * 2.0)
    shared = dataclasses.replace(WORK, processes=4)
    assert cost.bounds(shared, SIZES).seconds == pytest.approx(cost.bounds(WORK, SIZES).seconds / 4)
    assert cost.bounds(shared, SIZES).bytes == cost.bounds(WORK, SIZES).bytes


def test_groups_take_one_example_at_a_time() -> None:
    grouped = dataclasses.replace(WORK, grouped=2)
    expected = 2.4 * 1 * 40 * 0.5 + 40 * (3.0 * 2 * 2.0 + 50 * 0.1)
    assert cost.bound_seconds(grouped) == pytest.approx(expected)
    assert cost.measure(grouped, SIZES, steps=20).seconds == pytest.approx(expected)


def test_the_graph_of_a_single_batch_is_made_once() -> None:
    single = dataclasses.replace(WORK, batch=40)
    vectors = 30 * 120 * 0.1 / 2  # half of the weights
    assert cost.eigenpairs(WORK, SIZES, 1, 30).seconds == pytest.approx(30 * 9.5 * 40 * 0.5 + vectors)
    assert cost.eigenpairs(single, SIZES, 1, 30).seconds == pytest.approx((3 + 30 * 6.5) * 40 * 0.5 + vectors)
    assert cost.density(single, SIZES, 5, 6).seconds == pytest.approx(3 * ((3 + 30 * 6.5) * 40 * 0.5 + vectors))
    two = dataclasses.replace(single, processes=2)  # each reads every batch each time
    assert cost.eigenpairs(two, SIZES, 1, 30).seconds == pytest.approx(30 * 9.5 * 20 * 0.5 + vectors)


def test_what_is_alive_is_counted() -> None:
    with Alive() as alive:
        a = torch.ones(1000)
        b = a.view(10, 100)  # shows the same memory
        c = (b * 2).sum()
        del a
        assert (alive.now, alive.peak) == (4000 + c.nbytes, 8000 + c.nbytes)
        del b
        assert alive.now == c.nbytes


@pytest.mark.parametrize("name", ["examples", "batch_size", "processes", "lanczos_steps", "probes"])
def test_counts_are_positive(name: str) -> None:
    make, batch = MODELS["vit"]
    with pytest.raises(ValueError, match=rf"{name} is 0; give a whole number >= 1"):
        measurement_costs(make(), batch, **{"examples": 1, name: 0})


def test_an_empty_batch_is_refused() -> None:
    make, batch = MODELS["vit"]
    with pytest.raises(ValueError, match="batch is empty; give at least one example"):
        measurement_costs(make(), {key: value[:0] for key, value in batch.items()}, examples=1)
