"""Models that ``device_map`` lays out: with Accelerate's hooks, and with weights on the disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from torch import Tensor, nn

from hf_robust_ft import hessian_trace, layer_quadratic_forms, measure_hessian
from hf_robust_ft.curvature.placement import whole_weights

BATCH = {
    "input_ids": torch.randint(1, 20, (5, 6), generator=torch.Generator().manual_seed(0)),
    "labels": torch.tensor([0, 1, 2, 0, 1]),
}


def _model() -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = tiny.bert().double().eval()
    return model


def _reference(model: nn.Module) -> dict[str, Tensor]:
    return {name: 0.9 * weight for name, weight in model.state_dict().items()}


def _laid_out(how: str, folder: Path) -> nn.Module:
    model = _model()
    if how == "hooks":
        return dispatch_model(model, {"": "cpu"}, force_hooks=True)
    if how == "CPU":
        return cpu_offload(model, torch.device("cpu"))
    if how == "disk":
        disk_offload(model, folder, torch.device("cpu"))
        return model
    device_map = {"bert.embeddings": "cpu", "bert.encoder": "disk", "bert.pooler": "disk", "classifier": "cpu"}
    return dispatch_model(model, device_map, main_device="cpu", offload_dir=folder, force_hooks=True)


@pytest.mark.parametrize("how", ["hooks", "CPU", "disk", "some on the disk"])
def test_it_is_measured_where_it_lies(how: str, tmp_path: Path) -> None:
    plain = _model()
    reference = _reference(plain)
    model = _laid_out(how, tmp_path)
    lying = [parameter.device for parameter in model.parameters()]
    assert (torch.device("meta") in lying) == (how != "hooks")
    with torch.no_grad():
        logits = model(input_ids=BATCH["input_ids"]).logits

    for kind in ("hessian", "hessian_upper"):
        got = layer_quadratic_forms(model, BATCH, reference, kind=kind)
        expected = layer_quadratic_forms(plain, BATCH, reference, kind=kind)
        assert got.layers == expected.layers
        torch.testing.assert_close(got.values, expected.values, rtol=1e-12, atol=1e-14)
    got_report, expected_report = (measure_hessian(m, reference, [BATCH], lanczos_steps=4) for m in (model, plain))
    assert [layer.positive for layer in got_report.layers] == [layer.positive for layer in expected_report.layers]
    # The model itself may be the reference, too.
    assert all(layer.distance == 0 for layer in measure_hessian(model, model, [BATCH], time_budget=0).layers)
    got_trace, expected_trace = (hessian_trace(m, [BATCH], probes=2).values for m in (model, plain))
    torch.testing.assert_close(got_trace, expected_trace, rtol=1e-12, atol=1e-14)

    assert [parameter.device for parameter in model.parameters()] == lying
    with torch.no_grad():
        assert torch.equal(model(input_ids=BATCH["input_ids"]).logits, logits)


def test_it_lies_there_again_after_an_error(tmp_path: Path) -> None:
    model = _laid_out("disk", tmp_path)
    with pytest.raises(ValueError, match="label 9 lies outside"):
        layer_quadratic_forms(model, {**BATCH, "labels": torch.full((5,), 9)}, _reference(_model()))
    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_whole_model_is_left_alone() -> None:
    model = tiny.bert()
    before = list(model.parameters())
    with whole_weights(model):
        assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
