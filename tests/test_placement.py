"""Models that ``device_map`` lays out: with Accelerate's hooks, and with weights on the disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from hf_robust_ft import hessian_trace, layer_quadratic_forms, measure_hessian
from hf_robust_ft.curvature import paging, placement
from hf_robust_ft.curvature.paging import Pages
from hf_robust_ft.curvature.placement import whole_weights

BATCH = {
    "input_ids": torch.randint(1, 20, (5, 6), generator=torch.Generator().manual_seed(0)),
    "labels": torch.tensor([0, 1, 2, 0, 1]),
}

ROOM = 140_000
"""Bytes for the largest weight and its way from the reference, and little more."""


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


@pytest.fixture
def paging_rooms(monkeypatch: pytest.MonkeyPatch) -> list[Pages]:
    """All pages that are made, from then on with little room."""
    made: list[Pages] = []

    class Watched(Pages):
        def __init__(self) -> None:
            super().__init__()
            made.append(self)

    monkeypatch.setattr(placement, "Pages", Watched)
    monkeypatch.setattr(paging, "room", lambda device: ROOM)
    return made


@pytest.mark.parametrize("how", ["hooks", "CPU", "disk", "some on the disk"])
def test_it_is_measured_where_it_lies(how: str, tmp_path: Path, paging_rooms: list[Pages]) -> None:
    plain = _model()
    sizes = [p.numel() * p.element_size() for p in plain.parameters()]
    assert 2 * max(sizes) <= ROOM < 1.4 * sum(sizes)  # all weights and ways together take twice their sum
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

    assert len(paging_rooms) == (0 if how == "hooks" else 5)
    assert all(0 < pages.most <= ROOM for pages in paging_rooms)
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


def test_half_precision_is_loaded_in_float32(
    tmp_path: Path, paging_rooms: list[Pages], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paging, "room", lambda device: ROOM // 2)
    plain = _model().bfloat16()
    reference = _reference(plain)
    expected = measure_hessian(plain, reference, [BATCH], lanczos_steps=4)
    model = _model().bfloat16()
    disk_offload(model, tmp_path, torch.device("cpu"))
    got = measure_hessian(model, reference, [BATCH], lanczos_steps=4)
    for a, b in zip(got.layers, expected.layers, strict=True):
        assert (a.distance, a.upper.maximum) == pytest.approx((b.distance, b.upper.maximum), rel=1e-6)
    assert all(0 < pages.most <= ROOM // 2 for pages in paging_rooms)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_lora_layers_are_merged_as_they_are_used(paging_rooms: list[Pages], dtype: torch.dtype) -> None:
    peft = pytest.importorskip("peft")

    def adapted() -> Any:
        torch.manual_seed(1)
        model = peft.get_peft_model(_model(), peft.LoraConfig(target_modules=["query", "dense"], r=2, lora_alpha=3))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
        return model.to(dtype)

    expected = layer_quadratic_forms(adapted(), BATCH, {}, kind="hessian_psd", lanczos_steps=3)
    model = adapted()
    cpu_offload(model, torch.device("cpu"))
    got = layer_quadratic_forms(model, BATCH, {}, kind="hessian_psd", lanczos_steps=3)
    assert got.layers == expected.layers
    assert expected.values.abs().max() > 1e-6
    exact = dtype == torch.float64
    torch.testing.assert_close(got.values, expected.values, rtol=1e-9 if exact else 1e-4, atol=1e-14 if exact else 1e-8)
    assert len(paging_rooms) == 1


def test_tied_weights_stay_tied(paging_rooms: list[Pages]) -> None:
    class Twice(nn.Module):
        """``tanh(x Wᵀ) Wᵀ``, by one weight in two modules."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.second(torch.tanh(self.first(x)))
            return found

    batch = torch.randn(3, 4, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 2])
    plain, model = Twice(), Twice()
    reference = _reference(plain)
    cpu_offload(model, torch.device("cpu"))
    assert model.first.weight.is_meta
    with whole_weights(model):
        assert model.first.weight is model.second.weight
        assert model.first.bias is not model.second.bias
    expected = layer_quadratic_forms(plain, batch, reference)
    got = layer_quadratic_forms(model, batch, reference)
    assert expected.layers == ("first.weight",)
    torch.testing.assert_close(got.values[:, 0], expected.values[:, 0])


@pytest.mark.parametrize("ran", [False, True])
@pytest.mark.parametrize("head", ["disk", "cpu"])
@pytest.mark.parametrize("body", ["disk", "cpu"])
def test_weights_that_are_tied_by_name_stay_tied(
    body: str, head: str, ran: bool, tmp_path: Path, paging_rooms: list[Pages]
) -> None:
    def language_model() -> nn.Module:
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=30, n_positions=8, n_embd=16, n_layer=1, n_head=2)
        model: nn.Module = GPT2LMHeadModel(config).double().eval()
        return model

    ids = BATCH["input_ids"]
    batch = {"input_ids": ids, "labels": ids}
    reference = _reference(language_model())
    expected = layer_quadratic_forms(language_model(), batch, reference)
    laid_out = {"transformer": body, "lm_head": head}
    model = dispatch_model(language_model(), laid_out, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    if ran:  # which takes weights that were one apart
        with torch.no_grad():
            model(input_ids=ids)
    got = layer_quadratic_forms(model, batch, reference)
    assert got.layers == expected.layers
    assert len(got.layers) == 6
    torch.testing.assert_close(got.values, expected.values, rtol=1e-12, atol=1e-14)


def test_weights_that_only_the_configuration_ties_stay_two(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=30, n_positions=8, n_embd=16, n_layer=1, n_head=2)).double()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() + 1)
    assert "lm_head.weight" in model.all_tied_weights_keys
    disk_offload(model, tmp_path, torch.device("cpu"))
    with whole_weights(model):
        assert model.lm_head.weight is not model.transformer.wte.weight


def test_quantized_weights_that_are_offloaded_are_refused() -> None:
    class Quantized(nn.Parameter):
        pass

    model = nn.Sequential(nn.Linear(4, 3))
    cpu_offload(model, torch.device("cpu"))
    model[0]._parameters["weight"] = Quantized(torch.empty(3, 4, device="meta"))
    with pytest.raises(
        ValueError, match="model has weight offloaded as Quantized: quantized weights are measured where"
    ):
        layer_quadratic_forms(model, (torch.ones(1, 4), torch.tensor([0])), {"0.weight": torch.zeros(3, 4)})
    assert model[0]._hf_hook.offload
