"""What a GPU does otherwise than a CPU: it gives the same numbers. Skipped where there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from accelerate import cpu_offload
from torchrun import WORKERS, launch

from hf_robust_ft import (
    HessianReport,
    LayerConstraints,
    hessian_trace,
    layer_quadratic_forms,
    measure_hessian,
    top_eigenpairs,
)
from hf_robust_ft.curvature import paging

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def moved(dtype: torch.dtype = torch.float64) -> tuple[Any, dict[str, Any], Any]:
    """A small ViT some way from its reference, and a batch."""
    torch.manual_seed(0)
    model = tiny.vit().to(dtype).eval()
    reference = tiny.weights(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=generator, dtype=torch.float64).to(dtype))
    pixels = torch.tensor(tiny.images(6)["pixel_values"][:], dtype=dtype)
    return model, reference, (pixels, torch.arange(6) % 3)


def numbers(report: HessianReport) -> list[float]:
    found = [value for layer in report.layers for value in (layer.hessian.maximum, layer.upper.maximum)]
    return found + [layer.positive.maximum for layer in report.layers if layer.positive is not None]


def test_a_measurement_is_that_of_the_cpu() -> None:
    model, reference, batch = moved()
    expected = measure_hessian(model, reference, [batch], lanczos_steps=8)
    found = measure_hessian(model.cuda(), reference, [batch], lanczos_steps=8)
    assert found.settled == expected.settled
    assert numbers(found) == pytest.approx(numbers(expected), rel=1e-6)


def test_forms_traces_and_eigenvalues_are_those_of_the_cpu() -> None:
    model, reference, batch = moved()
    forms = layer_quadratic_forms(model, batch, reference, kind="hessian_psd")
    trace = hessian_trace(model, [batch], probes=4)
    pairs = top_eigenpairs(model, [batch])
    model.cuda()
    on_gpu = layer_quadratic_forms(model, batch, reference, kind="hessian_psd")
    torch.testing.assert_close(on_gpu.values.cpu(), forms.values.cpu(), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(hessian_trace(model, [batch], probes=4).samples.cpu(), trace.samples)
    torch.testing.assert_close(top_eigenpairs(model, [batch]).values.cpu(), pairs.values, rtol=1e-4, atol=0)


@pytest.mark.parametrize("norm", ["frobenius", "inf_op"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_projection_is_that_of_the_cpu(dtype: torch.dtype, norm: Any) -> None:
    model, reference, _ = moved(dtype)
    here = LayerConstraints(model, {"*": 0.2}, norm=norm, reference=reference)
    here.project_()
    expected = tiny.weights(model)
    model, reference, _ = moved(dtype)
    model.cuda()
    on_gpu = {name: weight.cuda() for name, weight in reference.items()}
    there = LayerConstraints(model, {"*": 0.2}, norm=norm, reference=on_gpu)
    there.project_()
    once = tiny.weights(model)
    for name, weight in once.items():
        torch.testing.assert_close(
            weight.cpu(), expected[name], rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6
        )
    there.project_()
    tiny.assert_equal_weights(tiny.weights(model), once)


@pytest.mark.parametrize("precision", [{}, {"bf16": True}, {"fp16": True}])
def test_training_with_everything_on(tmp_path: Path, precision: dict[str, bool]) -> None:
    trainer = tiny.trainer(
        tmp_path,
        use_cpu=False,
        noise_transition=0.2,
        layer_radius=0.05,
        hessian_penalty=0.01,
        l2sp_penalty=0.1,
        hessian_examples=6,
        hessian_time_budget=2,
        **precision,
    )
    trainer.train()
    assert next(trainer.model.parameters()).is_cuda
    table = trainer.constraint_table()
    assert any(row.active for row in table)
    assert all(row.distance <= row.radius for row in table if row.radius is not None)
    assert trainer.hessian_report is not None


def test_training_under_fsdp_in_bf16(tmp_path: Path) -> None:
    """The worker asserts that the model was sharded, that the balls hold, and that a resumed run is the same."""
    launch(WORKERS / "fsdp_gpu.py", 1, str(tmp_path))


def test_a_model_spread_over_cpu_and_gpu_is_measured() -> None:
    from accelerate import dispatch_model

    model, reference, batch = moved(torch.float32)
    expected = measure_hessian(model, reference, [batch], time_budget=0)
    names = [name for name, _ in model.named_children()]
    spread = dispatch_model(model, {name: (0 if i else "cpu") for i, name in enumerate(names)}, main_device=0)
    found = measure_hessian(spread, reference, [batch], time_budget=0)
    assert numbers(found) == pytest.approx(numbers(expected), rel=1e-3)


def test_a_model_that_the_gpu_has_no_room_for_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    model, reference, batch = moved()
    expected = measure_hessian(model, reference, [batch], lanczos_steps=8)
    model, _, _ = moved()
    cpu_offload(model, torch.device("cuda", 0))
    monkeypatch.setattr(paging, "room", lambda device: 3 * max(8 * w.numel() for w in reference.values()))
    found = measure_hessian(model, reference, [batch], lanczos_steps=8)
    assert numbers(found) == pytest.approx(numbers(expected), rel=1e-6)
    monkeypatch.undo()
    free, _ = torch.cuda.mem_get_info()
    assert 0 < paging.room(torch.device("cuda", 0)) <= (free + torch.cuda.memory_reserved()) / 2
