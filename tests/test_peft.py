"""LoRA adapters: balls around what they change, their curvature in the full layer, and what is refused."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import oracle
import pytest
import safetensors.torch
import tiny
import torch
import transformers
from measured import EXACT, Snapshot, each_kind
from oracle import assert_agree
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from hf_robust_ft import (
    LayerConstraints,
    ReferenceMismatch,
    find_layers,
    hessian_trace,
    layer_distances,
    report_bounds,
    top_eigenpairs,
)
from hf_robust_ft.adapters import find_adapters, merged_name
from hf_robust_ft.checkpoint import ConstraintRecord, last_complete_checkpoint
from hf_robust_ft.curvature import layer_quadratic_forms, measure_hessian
from hf_robust_ft.curvature.directions import group_layers
from hf_robust_ft.curvature.engine import Kind
from hf_robust_ft.curvature.model import Weights
from hf_robust_ft.hessian_measurement import base_weights, start_weights
from hf_robust_ft.low_rank import product_gradients, product_norm, project_product_
from hf_robust_ft.projection import Norm
from hf_robust_ft.reference import REFERENCE_FILE

peft = pytest.importorskip("peft", reason="adapters need peft")

QUERY = "bert.encoder.layer.0.attention.self.query.weight"
BATCH = {
    "input_ids": torch.randint(1, 50, (3, 6), generator=torch.Generator().manual_seed(0)),
    "labels": torch.tensor([0, 1, 2]),
}


class Picture(nn.Module):
    """Convolutions of three kinds and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, stride=2, padding=1)
        self.point = nn.Conv2d(4, 3, 1)
        self.line = nn.Conv1d(3, 4, 2)
        self.head = nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.point(torch.tanh(self.conv(x))))
        return self.head(torch.tanh(self.line(hidden.flatten(2)[..., :6])).flatten(1))  # type: ignore[no-any-return]


MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], Any]] = {
    "bert": (tiny.bert, {"target_modules": ["query", "value"], "task_type": "SEQ_CLS", "lora_dropout": 0.5}, BATCH),
    "rslora": (tiny.bert, {"target_modules": ["query", "dense"], "use_rslora": True, "lora_alpha": 3}, BATCH),
    "embedding": (tiny.bert, {"target_modules": ["word_embeddings", "value"], "task_type": "SEQ_CLS"}, BATCH),
    "gpt2": (
        tiny.gpt2,
        {"target_modules": ["c_attn", "c_proj"], "task_type": "SEQ_CLS", "fan_in_fan_out": True},
        BATCH,
    ),
    "bias": (tiny.bert, {"target_modules": ["query", "value"], "lora_bias": True, "bias": "lora_only"}, BATCH),
    "convolution": (
        Picture,
        {"target_modules": ["conv", "point", "line"], "modules_to_save": ["head"]},
        (torch.randn(3, 2, 6, 6, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2])),
    ),
}
each_model = pytest.mark.parametrize("name", MODELS)


def shake(model: nn.Module, scale: float = 0.2, seed: int = 1) -> None:
    """Move what is trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += scale * torch.randn(parameter.shape, generator=generator).to(parameter)


def adapted(name: str = "bert", dtype: torch.dtype = torch.float32, scale: float = 0.2, **changes: Any) -> Any:
    """A model with adapters that have moved, and the state of its base model."""
    build, settings, _ = MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build().to(dtype)
        reference = tiny.weights(model)
        config = peft.LoraConfig(**{"r": 2, **settings, **changes})
        model = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    shake(model, scale)
    return model, reference


def merged(model: Any) -> nn.Module:
    """Another model, without adapters, of which the same layers are trained."""
    names = {layer.name for layer in find_layers(model)[0]} | {other.name for other in find_layers(model)[1]}
    found: nn.Module = copy.deepcopy(model).merge_and_unload()
    for name, parameter in found.named_parameters():
        parameter.requires_grad_(name in names)
    return found


def changes(model: nn.Module, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Δ of each adapted layer as peft computes it, by the layer's name."""
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight"):
            exact = copy.deepcopy(module).to(dtype)
            found[f"{merged_name(name, model)}.weight"] = exact.get_delta_weight("default").detach()
    return found


def dense_norm(change: Tensor, norm: Norm, rows: tuple[int, ...]) -> float:
    if norm == "frobenius":
        return change.norm().item()
    return change.abs().sum([d for d in range(change.dim()) if d not in rows]).max().item()


# ----------------------------------------------------------------------------------------------------- names, table


@each_model
def test_layers_are_those_of_the_merged_model(name: str) -> None:
    model, _ = adapted(name)
    layers, others = find_layers(model)
    expected, expected_others = find_layers(merged(model))
    compared = ("name", "kind", "row_dims", "block", "depth", "fresh", "tied")
    for layer, other in zip(layers, expected, strict=True):
        assert [getattr(layer, field) for field in compared] == [getattr(other, field) for field in compared]
        assert layer.parameter.shape == other.parameter.shape
    assert {other.name for other in expected_others} <= {other.name for other in others}
    assert all("bias" in other.name for other in others)


def test_the_table_shows_adapters_with_their_layer() -> None:
    model, _ = adapted()
    table = LayerConstraints(model, {"*query": 0.3, "classifier.weight": 2.0}, mode="relative").table()
    rows = {row.name: row for row in table}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    shown = {factor for row in table for factor in row.factors}
    assert shown == {name for name in trained if "lora_" in name}
    assert rows.keys() == {*(layer.name for layer in find_layers(model)[0]), "classifier.bias"}
    base = model.get_base_model().bert.encoder.layer[0].attention.self.query.base_layer.weight
    assert (rows[QUERY].centre, rows[QUERY].radius) == ("pretrained", pytest.approx(0.3 * base.norm().item()))
    assert rows[QUERY].distance == pytest.approx(changes(model)[QUERY].norm().item())
    assert rows[QUERY.replace("query", "value")].free == "no pattern of layer_radius matches"
    assert f"{QUERY} (LoRA)  16×16  pretrained" in str(table)


def test_patterns_mean_the_same_with_and_without_adapters() -> None:
    pattern = {"*.layer.0.*.query": 0.1, "*.query.weight": 0.2, "classifier": 0.5, "*pooler*": None, "*": 0.7}
    model, _ = adapted(target_modules=["query", "value", "pooler.dense"])
    full = LayerConstraints(merged(model), pattern, growth=1.5)
    found = LayerConstraints(model, pattern, growth=1.5)
    assert found.radii == full.radii
    assert [(row.name, row.free) for row in found.table()] == [(row.name, row.free) for row in full.table()]
    with pytest.raises(ValueError, match=r"pattern 'base_model\.\*' matches no layer"):
        LayerConstraints(model, {"base_model.*": 0.1})


def test_a_new_head_is_free_and_a_loaded_one_is_not(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tiny.bert().bert.save_pretrained(tmp_path / "base")
    tiny.bert().save_pretrained(tmp_path / "whole")
    for folder, fresh in (("base", True), ("whole", False)):
        model = transformers.BertForSequenceClassification.from_pretrained(tmp_path / folder, num_labels=3)
        model = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
        layers = {layer.name: layer for layer in find_layers(model)[0]}
        assert layers["classifier.weight"].fresh is fresh
        assert not layers[QUERY].fresh
        weights, described = base_weights(model)
        assert described == "the weights of the base model" + (
            "; classifier.weight, which it lacks, from zero" if fresh else ""
        )
        assert bool(weights["classifier.weight"].any()) is not fresh


def test_adapters_that_are_injected_count_too() -> None:
    torch.manual_seed(0)
    model = tiny.bert()
    reference = tiny.weights(model)
    config = peft.LoraConfig(target_modules=["query"], init_lora_weights=False)
    model = peft.inject_adapter_in_model(config, model)
    constraints = LayerConstraints(model, 0.1)
    constraints.project_()
    assert constraints.radii.keys() == {QUERY, QUERY.replace(".0.", ".1.")}
    assert layer_distances(model, reference) == pytest.approx(constraints.distances())
    assert all(0.0999 < distance <= 0.1 for distance in constraints.distances().values())


# ------------------------------------------------------------------------------------------------------- projection


@pytest.mark.parametrize("norm", ["frobenius", "inf_op"])
@each_model
def test_projection_is_that_of_the_dense_change(name: str, norm: Norm) -> None:
    model, reference = adapted(name, torch.float64)
    before, radius = changes(model), 0.1
    assert before
    constraints = LayerConstraints(model, {"*": radius}, norm=norm)
    rows = {layer.name: layer.row_dims for layer in find_layers(model)[0]}
    found = constraints.distances()
    others = {n: p.clone() for n, p in model.named_parameters() if "lora_" not in n and "modules_to_save" not in n}
    constraints.project_()
    after = changes(model)
    for layer, change in before.items():
        assert found[layer] == pytest.approx(dense_norm(change, norm, rows[layer]))
        if norm == "frobenius":
            keep = torch.tensor(radius / change.norm().item()).clamp(max=1)
        else:
            dims = [d for d in range(change.dim()) if d not in rows[layer]]
            keep = (radius / change.abs().sum(dims, keepdim=True)).clamp(max=1)
        assert torch.allclose(after[layer], keep * change, rtol=2e-5, atol=1e-12)
        assert dense_norm(after[layer], norm, rows[layer]) <= radius
    now = dict(model.named_parameters())
    assert all(torch.equal(now[n], p) for n, p in others.items())
    now_distances = layer_distances(model, reference)
    for layer, change in after.items():
        assert now_distances[layer] == pytest.approx(change.norm().item(), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", ["frobenius", "inf_op"])
@each_model
def test_projection_is_idempotent_and_leaves_the_inside_alone(name: str, norm: Norm, dtype: torch.dtype) -> None:
    model, _ = adapted(name, dtype)
    far = LayerConstraints(model, {"*": 100.0}, norm=norm)
    start = tiny.weights(model)
    far.project_()
    tiny.assert_equal_weights(tiny.weights(model), start)
    near = LayerConstraints(model, {"*": 0.05}, norm=norm)
    near.project_()
    once = tiny.weights(model)
    near.project_()
    tiny.assert_equal_weights(tiny.weights(model), once)
    rows = {layer.name: layer.row_dims for layer in find_layers(model)[0]}
    assert max(dense_norm(change, norm, rows[layer]) for layer, change in changes(model).items()) <= 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", ["frobenius", "inf_op"])
def test_small_steps_do_not_creep_out(norm: Norm, dtype: torch.dtype) -> None:
    model, _ = adapted(dtype=dtype)
    constraints = LayerConstraints(model, {"*query": 0.05}, norm=norm)
    constraints.project_()
    (up,) = [p for n, p in model.named_parameters() if "layer.0" in n and "query.lora_B" in n]
    for _ in range(100):
        with torch.no_grad():
            torch.nextafter(up, torch.full_like(up, math.inf).copysign(up), out=up)
        constraints.project_()
        assert dense_norm(changes(model)[QUERY], norm, (0,)) <= 0.05
    assert dense_norm(changes(model)[QUERY], norm, (0,)) > 0.045


def factors(seed: int, rows: int = 7, rank: int = 3, columns: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = 10 ** (4 * torch.rand(2, rank, generator=generator, dtype=torch.float64) - 2)
    left = torch.randn(rows, rank, generator=generator, dtype=torch.float64) * sizes[0]
    return left, torch.randn(rank, columns, generator=generator, dtype=torch.float64) * sizes[1].unsqueeze(1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", ["frobenius", "inf_op"])
def test_products_of_all_sizes(norm: Norm, dtype: torch.dtype) -> None:
    for seed in range(50):
        left, right = (factor.to(dtype) for factor in factors(seed))
        scale, radius = 10.0 ** (seed % 5 - 2), 10.0 ** (seed % 3 - 1)
        dense = scale * left.double() @ right.double()
        assert product_norm(left, right, scale, norm) == pytest.approx(dense_norm(dense, norm, (0,)), rel=1e-9)
        project_product_(left, right, scale, radius, norm)
        after = scale * left.double() @ right.double()
        assert dense_norm(after, norm, (0,)) <= radius
        once = left.clone()
        project_product_(left, right, scale, radius, norm)
        assert torch.equal(left, once)
        if dtype == torch.float64 and dense_norm(dense, norm, (0,)) > radius:
            assert dense_norm(after, norm, (0,)) == pytest.approx(radius, rel=2e-5)


@pytest.mark.parametrize("norm", ["frobenius", "inf_op"])
def test_numbers_too_small_for_their_type_do_not_creep_out(norm: Norm) -> None:
    """Rounded to nearest, a third of 3e-7 would be 1.2e-7 in float16, a fifth too much."""
    left, right = torch.full((2, 1), 3e-7).half(), torch.full((1, 3), 100.0).half()
    radius = dense_norm(left.double() @ right.double(), norm, (0,)) / 3
    project_product_(left, right, 1.0, radius, norm)
    once = left.clone()
    assert dense_norm(left.double() @ right.double(), norm, (0,)) <= radius
    project_product_(left, right, 1.0, radius, norm)
    assert torch.equal(left, once)


def test_rows_of_blocks_are_those_of_the_whole() -> None:
    left, right = factors(0, rows=40, columns=3000)  # more than a block
    assert left.shape[0] * right.shape[1] > 1 << 16
    assert product_norm(left, right, -2.0, "inf_op") == pytest.approx(dense_norm(2 * left @ right, "inf_op", (0,)))


@pytest.mark.parametrize("norm", ["frobenius", "inf_op"])
def test_a_radius_of_zero_takes_the_change_away(norm: Norm) -> None:
    model, _ = adapted()
    constraints = LayerConstraints(model, {"*query": 0.0}, norm=norm)
    constraints.project_()
    assert not changes(model)[QUERY].any()
    assert changes(model)[QUERY.replace("query", "value")].any()


def test_what_is_not_finite_is_left_for_the_user_to_see() -> None:
    left, right = factors(0)
    left[2, 1] = math.nan
    before = left.clone()
    project_product_(left, right, 1.0, 0.1, "frobenius")
    assert torch.equal(left.nan_to_num(), before.nan_to_num())
    project_product_(left, right, 1.0, 0.1, "inf_op")
    assert left[2].isnan().any()
    assert dense_norm((left @ right)[:2], "inf_op", (0,)) <= 0.1


@each_model
def test_the_pull_is_the_gradient_of_the_penalty(name: str) -> None:
    model, reference = adapted(name, torch.float64)
    constraints = LayerConstraints(model, None, penalty=0.3)
    penalty = torch.zeros((), dtype=torch.float64)
    for module in model.modules():
        if hasattr(module, "get_delta_weight"):
            penalty = penalty + 0.15 * module.get_delta_weight("default").square().sum()
    for layer in find_layers(model)[0]:
        if layer.adapter is None and not layer.fresh:
            penalty = penalty + 0.15 * (layer.parameter - reference[layer.name]).square().sum()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    expected = torch.autograd.grad(penalty, trained, allow_unused=True)
    start = {layer.name: reference[layer.name] for layer in find_layers(model)[0]}
    constraints = LayerConstraints(model, None, penalty=0.3, reference=start)
    for parameter in trained[::2]:
        parameter.grad = torch.ones_like(parameter)  # it is added to what is there
    before = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in trained]
    constraints.add_pull(2.0)
    assert any(gradient is not None for gradient in expected)
    for parameter, gradient, old in zip(trained, expected, before, strict=True):
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        wanted = old if gradient is None else old + 2 * gradient
        assert torch.allclose(found, wanted, rtol=1e-10, atol=1e-12)


def test_gradients_of_half_precision_are_computed_in_float32() -> None:
    left, right = (factor.bfloat16() for factor in factors(0))
    assert {gradient.dtype for gradient in product_gradients(left, right, 1.0)} == {torch.float32}


# --------------------------------------------------------------------------------------------------------- training


def lora_trainer(folder: Path, trainer: Any = tiny.trainer, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = {"task_type": "SEQ_CLS", "r": 2, "target_modules": ["query", "value"]}
    model = peft.get_peft_model(tiny.bert(), peft.LoraConfig(**config))
    return trainer(folder, model, **changes)


class Watch(TrainerCallback):
    """Distances after every step."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.seen.append({name: change.norm().item() for name, change in changes(model).items()})


def test_training_keeps_every_change_within_its_radius(tmp_path: Path) -> None:
    free, held = Watch(), Watch()
    lora_trainer(tmp_path, callbacks=[free]).train()
    trainer = lora_trainer(
        tmp_path, callbacks=[held], layer_radius={"*query": 0.02, "*value": 0.05, "classifier": 0.01}
    )
    trainer.train()
    assert len(held.seen) == 4
    for seen in held.seen:
        assert all(change <= (0.02 if "query" in name else 0.05) for name, change in seen.items())
    assert max(free.seen[-1].values()) > 0.05
    assert sum(row.active for row in trainer.constraint_table()) >= 3
    assert layer_distances(trainer.model, tiny.weights(tiny_bert()))["classifier.weight"] <= 0.01


def tiny_bert() -> nn.Module:
    """As in :func:`lora_trainer`."""
    torch.manual_seed(0)
    return tiny.bert()


def test_an_infinite_radius_changes_nothing(tmp_path: Path) -> None:
    def plain(folder: Path, model: nn.Module) -> Trainer:
        return Trainer(model, tiny.arguments(folder), train_dataset=tiny.texts())

    finals = []
    for trainer in (lora_trainer(tmp_path, plain), lora_trainer(tmp_path, layer_radius=math.inf)):
        trainer.train()
        finals.append(tiny.weights(trainer.model))
    tiny.assert_equal_weights(*finals)


def test_a_penalty_pulls_the_change_back(tmp_path: Path) -> None:
    far = lora_trainer(tmp_path)
    near = lora_trainer(tmp_path, l2sp_penalty=30.0)
    for trainer in (far, near):
        trainer.train()
    there, here = (sum(layer_distances(t.model, {}).values()) for t in map(only_adapters, (far, near)))
    assert here < 0.8 * there


def only_adapters(trainer: Any) -> Any:
    trainer.model.get_base_model().classifier.requires_grad_(False)
    return trainer


def test_a_radius_is_chosen_for_adapters(tmp_path: Path) -> None:
    trainer = lora_trainer(tmp_path, layer_radius={"*layer*": "auto"}, eval_dataset=tiny.texts(12, seed=1), max_steps=2)
    trainer.train()
    radius = trainer.radius_choice.radius
    base = {layer.name: layer.parameter.norm().item() for layer in find_layers(trainer.model)[0] if layer.adapter}
    assert trainer.constraints.radii == pytest.approx(
        {} if math.isinf(radius) else {n: radius * b for n, b in base.items()}
    )
    assert len(trainer.radius_choice.candidates) == 4


RESUMED = {"save_strategy": "steps", "save_steps": 2, "layer_radius": {"*": 0.02}, "hessian_examples": 3}


def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole = lora_trainer(tmp_path / "whole", **RESUMED)
    whole.train()
    cut = tmp_path / "whole" / "checkpoint-2"
    assert (cut / "adapter_model.safetensors").is_file()
    assert not (cut / "model.safetensors").exists()
    record = ConstraintRecord.load(cut)
    assert QUERY in record.radii
    # What moves by itself, and nothing of the base model.
    kept = safetensors.torch.load_file(tmp_path / "whole" / REFERENCE_FILE)
    assert kept.keys() == {"classifier.weight"}
    again = lora_trainer(tmp_path / "again", **RESUMED)
    again.train(resume_from_checkpoint=str(cut))
    tiny.assert_equal_weights(tiny.weights(again.model), tiny.weights(whole.model))
    assert again.constraints.radii == whole.constraints.radii
    assert [layer.upper for layer in again.hessian_report.layers] == [
        layer.upper for layer in whole.hessian_report.layers
    ]
    assert last_complete_checkpoint(tmp_path / "whole") == str(tmp_path / "whole" / "checkpoint-4")


def test_a_run_with_adapters_alone_is_resumed(tmp_path: Path) -> None:
    settings = {**RESUMED, "layer_radius": {"*query": 0.02}, "hessian_examples": 0}
    whole = lora_trainer(tmp_path, **settings)
    whole.train()
    assert safetensors.torch.load_file(tmp_path / REFERENCE_FILE) == {}
    again = lora_trainer(tmp_path / "again", **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    tiny.assert_equal_weights(tiny.weights(again.model), tiny.weights(whole.model))


def test_another_reference_is_refused(tmp_path: Path) -> None:
    lora_trainer(tmp_path, **RESUMED).train()
    safetensors.torch.save_file({"classifier.weight": torch.zeros(3, 16)}, tmp_path / REFERENCE_FILE)
    with pytest.raises(ReferenceMismatch, match="another run has overwritten it"):
        lora_trainer(tmp_path, **RESUMED).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


# ------------------------------------------------------------------------------------------------------ measurement


@each_kind
@each_model
def test_curvature_is_that_of_the_merged_model(name: str, kind: Kind) -> None:
    model, reference = adapted(name, torch.float64)
    batch = as_double(MODELS[name][2])
    expected = layer_quadratic_forms(merged(model), batch, reference, kind=kind)
    before = Snapshot(model)
    found = layer_quadratic_forms(model, batch, reference, kind=kind)
    before.check()
    assert found.layers == expected.layers
    assert_agree(found.values.T, expected.values.T, 1e-10)
    assert torch.allclose(found.losses, expected.losses, rtol=1e-12)
    assert found.values.abs().amin(1).min() > 0
    assert all("bias" in other.name for other in found.left_out)


def as_double(batch: Any) -> Any:
    return (batch[0].double(), batch[1]) if isinstance(batch, tuple) else batch


@each_kind
def test_curvature_agrees_with_a_dense_hessian(kind: Kind) -> None:
    """In the base weights: the loss bends there as it does in the sums that they are part of."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, oracle.CLASSES)).double()
    reference = tiny.weights(net)
    model = peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["0", "2"]))
    shake(model, 0.5)
    names = {n: f"base_model.model.{n.replace('.', '.base_layer.')}" for n in ("0.weight", "2.weight")}
    free = copy.deepcopy(model).requires_grad_()
    origin = {names[n]: reference[n] - change for n, change in changes(model).items()}
    inputs, labels = {"input": oracle.VECTORS["input"]}, oracle.LABELS
    loss = oracle.Loss("plain", torch.eye(oracle.CLASSES))
    expected = oracle.measure(free, inputs, labels, loss, [[n] for n in names.values()], origin)
    found = layer_quadratic_forms(model, (inputs["input"], labels), reference, kind=kind, lanczos_steps=EXACT)
    assert found.layers == tuple(names)
    assert_agree(found.values.T, getattr(expected, kind), 1e-10)


def test_reports_traces_and_eigenvalues_are_those_of_the_merged_model() -> None:
    model, reference = adapted("bert", torch.float64)
    other = merged(model)
    before = Snapshot(model)
    found, expected = (measure_hessian(m, reference, [BATCH], time_budget=None) for m in (model, other))
    for layer, wanted in zip(found.layers, expected.layers, strict=True):
        assert layer.name == wanted.name
        assert layer.distance == pytest.approx(wanted.distance, rel=1e-12)
        assert layer.upper.maximum == pytest.approx(wanted.upper.maximum, rel=1e-10)
        assert layer.positive.maximum == pytest.approx(wanted.positive.maximum, rel=1e-10)
    traces = [hessian_trace(m, [BATCH], probes=3) for m in (model, other)]
    assert_agree(traces[0].samples.T, traces[1].samples.T, 1e-10)
    pairs = [top_eigenpairs(m, [BATCH]) for m in (model, other)]
    assert torch.allclose(pairs[0].values, pairs[1].values, rtol=1e-6)
    bounds = [
        report_bounds(report, 24, model=m, reference=reference, margin=0.1)
        for report, m in ((found, model), (expected, other))
    ]
    assert [bound.value for bound in bounds[0]] == pytest.approx([bound.value for bound in bounds[1]], rel=1e-8)
    before.check()


def test_any_reference_of_the_same_weights_will_do() -> None:
    torch.manual_seed(0)
    base = tiny.bert().double()
    reference = tiny.weights(base)
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"])
    model = peft.get_peft_model(base, config)
    started, start_model = tiny.weights(model), copy.deepcopy(model)
    shake(model)
    expected = layer_quadratic_forms(model, BATCH, reference).values
    for given in (started, start_model, {"classifier.weight": reference["classifier.weight"]}):
        assert torch.equal(layer_quadratic_forms(model, BATCH, given).values, expected)
    assert layer_distances(model, started) == layer_distances(model, reference)
    with pytest.raises(ReferenceMismatch, match=r"reference has no weights for classifier\.weight:"):
        layer_quadratic_forms(model, BATCH, {})
    with pytest.raises(
        ReferenceMismatch, match=rf"another shape for {QUERY} \(\(2, 2\) there, \(16, 16\) in the model"
    ):
        layer_quadratic_forms(model, BATCH, {**reference, QUERY: torch.zeros(2, 2)})
    # From where the adapter stood, not from the base weights.
    moved = tiny.weights(model)
    assert max(layer_distances(model, moved).values()) == 0
    shake(model, 0.1, seed=2)
    before, after = (adapted_weights(state, model) for state in (moved, tiny.weights(model)))
    assert layer_distances(model, moved) == pytest.approx({n: (after[n] - before[n]).norm().item() for n in after})


def adapted_weights(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The merged weights of a state dict with the names of PEFT."""
    other = copy.deepcopy(model)
    other.load_state_dict(state)
    weights = merged(other).state_dict()
    return {layer.name: weights[layer.name] for layer in find_layers(model)[0]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision_is_measured_in_float32(dtype: torch.dtype) -> None:
    model, reference = adapted("bert", dtype)
    before = Snapshot(model)
    found = layer_quadratic_forms(model, BATCH, reference, kind="hessian_upper").values
    before.check()
    exact = layer_quadratic_forms(
        merged(model.double()), BATCH, {n: w.double() for n, w in reference.items()}, kind="hessian_upper"
    )
    assert_agree(found.T, exact.values.T, 1e-3)


def test_the_adapter_is_back_after_an_error() -> None:
    model, reference = adapted()
    expected = model.eval()(input_ids=BATCH["input_ids"]).logits
    before = Snapshot(model)
    value = model.get_base_model().bert.encoder.layer[1].attention.self.value.base_layer
    hook = value.register_forward_hook(failing)
    with pytest.raises(ValueError, match="nothing to be seen"):
        layer_quadratic_forms(model, BATCH, reference)
    hook.remove()
    before.check()
    assert torch.equal(model(input_ids=BATCH["input_ids"]).logits, expected)


def failing(*_: Any) -> Any:
    raise ValueError("nothing to be seen")


def test_merged_weights_count_as_weights() -> None:
    """Else the engine would take what is computed from them alone for activations, and travel in small chunks."""
    model, _ = adapted()
    weights = Weights(model, group_layers(model, "weights")[0])
    assert {id(leaf) for leaf in weights.leaves} <= {id(tensor) for tensor in weights.all}


def test_an_adapted_weight_that_another_layer_shares_is_measured_alone() -> None:
    """The head of a language model with an adapter, the table that it is tied to without one."""
    torch.manual_seed(0)
    base = tiny.gpt2(causal=True).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of merging tied weights
        model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["lm_head"], r=2))
    shake(model)
    apart = copy.deepcopy(model)
    head = apart.get_base_model().lm_head
    head.base_layer.weight = nn.Parameter(head.base_layer.weight.detach().clone(), requires_grad=False)
    batch = {"input_ids": BATCH["input_ids"], "labels": BATCH["input_ids"]}
    found = layer_quadratic_forms(model, batch, {})
    assert found.layers == ("lm_head.weight",)
    assert_agree(found.values.T, layer_quadratic_forms(merged(apart), batch, merged_start(apart)).values.T, 1e-10)


def merged_start(model: Any) -> dict[str, Tensor]:
    return {"lm_head.weight": model.get_base_model().lm_head.base_layer.weight.detach()}


def test_the_trainer_measures_from_the_base_weights(tmp_path: Path) -> None:
    trainer = lora_trainer(tmp_path, hessian_examples=3, hessian_time_budget=0, layer_radius=0.05)
    reference = tiny.weights(tiny_bert())
    trainer.train()
    report = trainer.hessian_report
    model = trainer.model.cpu()
    kept = trainer._start
    assert kept.keys() == {"classifier.weight"}  # the base weights don't move, so no copy of them is kept
    names = [layer.name for layer in report.layers]
    assert names == [layer.name for layer in find_layers(merged(model))[0]]
    assert {layer.name: layer.distance for layer in report.layers} == pytest.approx(layer_distances(model, reference))
    assert {other.name for other in report.left_out} == {"classifier.bias"}
    assert any("train_hessian_in_bert.encoder.layer.1" in entry for entry in trainer.state.log_history)
    trainer.create_model_card()
    text = (tmp_path / "README.md").read_text()
    assert "lora_A" not in text
    assert "base_layer" not in text
    # Without what training kept: the base weights are still in the model.
    trainer._start = None
    again = trainer.measure_hessian(examples=3, time_budget=0)
    upper = {layer.name: layer.upper.maximum for layer in report.layers}
    assert {layer.name: layer.upper.maximum for layer in again.layers if layer.name != "classifier.weight"} == {
        name: value for name, value in upper.items() if name != "classifier.weight"
    }


def test_base_weights_that_nothing_kept() -> None:
    model, _ = adapted()
    model.get_base_model().bert.pooler.dense.weight.requires_grad_()
    with pytest.raises(ReferenceMismatch, match=r"keeps no base weights of bert\.pooler\.dense\.weight, which are"):
        base_weights(model)


# --------------------------------------------------------------------------------------------------------- refusals


def lora(**settings: Any) -> Any:
    return peft.LoraConfig(**{"target_modules": ["query"], "r": 2, **settings})


def with_two_adapters() -> Any:
    model = peft.get_peft_model(tiny.bert(), lora())
    model.add_adapter("other", lora())
    model.base_model.set_adapter(["default", "other"])
    return model


def merged_already() -> Any:
    model = peft.get_peft_model(tiny.bert(), lora())
    model.merge_adapter()
    return model


def with_trained_base() -> Any:
    model = peft.get_peft_model(tiny.bert(), lora())
    model.get_base_model().bert.encoder.layer[0].attention.self.query.base_layer.weight.requires_grad_()
    return model


def with_quantized_base() -> Any:
    model = peft.get_peft_model(tiny.bert(), lora())
    query = model.get_base_model().bert.encoder.layer[0].attention.self.query.base_layer
    query.weight = nn.Parameter(query.weight.detach().to(torch.int8), requires_grad=False)
    return model


def with_shared_factor() -> Any:
    model = peft.get_peft_model(tiny.bert(), lora())
    first, second = (
        layer.attention.self.query.lora_A["default"] for layer in model.get_base_model().bert.encoder.layer
    )
    second.weight = first.weight
    return model


def with_convolution(**settings: Any) -> Any:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 4, 3, **settings), nn.Flatten(), nn.Linear(4, 3))
    return peft.get_peft_model(net, peft.LoraConfig(target_modules=["0"], r=2))


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "dora": (lambda: peft.get_peft_model(tiny.bert(), lora(use_dora=True)), r"a variant of LoRA \(DoraLinear\)"),
    "ia3": (
        lambda: peft.get_peft_model(tiny.bert(), peft.IA3Config(target_modules=["query"], feedforward_modules=[])),
        "the model has IA3 adapters",
    ),
    "loha": (
        lambda: peft.get_peft_model(tiny.bert(), peft.LoHaConfig(target_modules=["query"])),
        "the model has LOHA adapters",
    ),
    "adalora": (
        lambda: peft.get_peft_model(tiny.bert(), peft.AdaLoraConfig(target_modules=["query"], total_step=9)),
        "the model has ADALORA adapters",
    ),
    "prompt": (
        lambda: peft.get_peft_model(tiny.bert(), peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2)),
        "the model has PROMPT_TUNING adapters",
    ),
    "tokens": (
        lambda: peft.get_peft_model(tiny.bert(), lora(trainable_token_indices={"word_embeddings": [1, 2]})),
        r"word_embeddings\.weight has an adapter of the kind peft\.tuners\.trainable_tokens",
    ),
    "two": (with_two_adapters, r"query\.weight has several active adapters \(default, other\)"),
    "merged": (merged_already, "is merged into its base weight"),
    "pissa": (
        lambda: peft.get_peft_model(tiny.bert(), lora(init_lora_weights="pissa")),
        "init_lora_weights='pissa' has moved the base weight bert",
    ),
    "base": (with_trained_base, r"the base weight bert\..*query\.weight is trained beside its adapter"),
    "quantized": (with_quantized_base, r"the base weight bert\..*query\.weight is quantized \(torch\.int8\)"),
    "shared": (with_shared_factor, "share a factor"),
    "dilation": (lambda: with_convolution(dilation=2), r"the convolution 0\.weight does not share its dilation"),
    "groups": (lambda: with_convolution(groups=2), r"the convolution 0\.weight does not share its groups"),
}


@pytest.fixture(params=REFUSED)
def refused(request: pytest.FixtureRequest) -> Iterator[tuple[Any, str]]:
    build, message = REFUSED[request.param]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own, of what it can't merge
        yield build(), message


def test_changes_that_are_no_plain_product_are_refused(refused: tuple[Any, str]) -> None:
    model, message = refused
    with pytest.raises(ValueError, match=rf"layer_radius needs adapters whose .*{message}.*or set layer_radius=None"):
        LayerConstraints(model, 0.1)
    with pytest.raises(ValueError, match=rf"l2sp_penalty needs adapters whose .*{message}.*or set l2sp_penalty=0"):
        LayerConstraints(model, None, penalty=0.1)
    with pytest.raises(ValueError, match=rf"curvature needs .*{message}.*merge_and_unload\(\)"):
        layer_quadratic_forms(model, BATCH, {})
    with pytest.raises(ValueError, match=rf"hessian_examples needs .*{message}.*Set it to 0"):
        start_weights(model, {})
    # With nothing asked it trains as before, and every parameter has a place that is no layer of the model.
    table = LayerConstraints(model, None).table()
    assert len(table) == len({row.name for row in table})
    strays = find_adapters(model).strays
    assert strays or "share" in message
    assert {o.reason for o in find_layers(model)[1]} >= set(strays.values())


def test_an_adapter_that_is_not_active_has_its_place() -> None:
    model = peft.get_peft_model(tiny_bert(), lora(modules_to_save=["classifier"]))
    model.add_adapter("other", lora(target_modules=["query", "value"], modules_to_save=["classifier"]))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or "modules_to_save" in name)
    layers, others = find_layers(model)
    assert [layer.name for layer in layers] == [QUERY, QUERY.replace(".0.", ".1."), "classifier.weight"]
    assert [other.reason for other in others].count("of an adapter that is not active") == 8 + 2
    assert [other.name for other in others if other.reason == "bias"] == ["classifier.bias"]
    assert "classifier.modules_to_save.other.weight" in {other.name for other in others}
    found = layer_quadratic_forms(model, BATCH, {"classifier.weight": torch.zeros(3, 16)})
    assert found.layers == tuple(layer.name for layer in layers)
    with model.disable_adapter():
        assert not find_adapters(model).products


def test_a_factor_that_is_frozen_can_not_be_scaled() -> None:
    model, _ = adapted()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.requires_grad_(False)
    with pytest.raises(
        ValueError, match=r"by scaling a factor of its adapter, but .*query\.lora_B\.default\.weight is froz"
    ):
        LayerConstraints(model, {"*query": 0.1})
    assert LayerConstraints(model, {"classifier": 0.1}).radii == {"classifier.weight": 0.1}


def test_frozen_adapters_are_part_of_the_model() -> None:
    """As loaded for inference: nothing of them is a layer, and they still count in the forward pass."""
    model, reference = adapted("bert", torch.float64)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("modules_to_save" in name)
    other = merged(model)
    found, expected = (layer_quadratic_forms(m, BATCH, reference) for m in (model, other))
    assert found.layers == expected.layers == ("classifier.weight",)
    assert_agree(found.values.T, expected.values.T, 1e-10)
