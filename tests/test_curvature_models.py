"""Curvature of transformers models: heads, types, attention, adapters; real ones; the authors' script."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import oracle
import pytest
import tiny
import torch
import transformers
from datasets import load_dataset
from measured import EXACT, KINDS, Snapshot, as_double, each_kind
from oracle import assert_agree, find_case, perturbed_reference
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AutoModelForImageClassification, AutoModelForSequenceClassification
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hf_robust_ft import Layer, find_layers
from hf_robust_ft.curvature import layer_quadratic_forms, measure_hessian
from hf_robust_ft.curvature.engine import Kind

IGNORED = -100
LABELS = torch.tensor([0, 1, 2])
IDS = torch.randint(1, 50, (3, 6), generator=torch.Generator().manual_seed(0))
MASK = (torch.arange(6) < torch.tensor([[6], [4], [5]])).long()
TEXTS = {"input_ids": IDS * MASK, "attention_mask": MASK, "labels": LABELS}
NEXT = {**TEXTS, "labels": IDS.where(MASK.bool(), IGNORED)}
TOKENS = {**TEXTS, "labels": (IDS % 3).where(MASK.bool() & (IDS % 4 > 0), IGNORED)}
PICTURES = {
    "pixel_values": torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)),
    "labels": LABELS,
}

HEADS: dict[str, tuple[Callable[[], nn.Module], dict[str, Tensor]]] = {
    "vit": (tiny.vit, PICTURES),
    "dinov2": (tiny.dinov2, PICTURES),
    "resnet": (tiny.resnet, PICTURES),
    "convnext": (tiny.convnext, PICTURES),
    "bert": (tiny.bert, TEXTS),
    "roberta": (tiny.roberta, TEXTS),
    "distilbert": (tiny.distilbert, TEXTS),
    "gpt2": (tiny.gpt2, TEXTS),
    "token_classifier": (tiny.token_classifier, TOKENS),
    "causal": (lambda: tiny.gpt2(causal=True), NEXT),
}


def made(build: Callable[[], nn.Module]) -> nn.Module:
    """A model with biases, norms and weights that are not those of a fresh one, in float32 and train mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build().train()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.2 * torch.randn_like(parameter)
    return model


def rows(batch: Mapping[str, Tensor], i: int) -> dict[str, Tensor]:
    return {name: x[i : i + 1] for name, x in batch.items()}


def example_loss(model: nn.Module, one: Mapping[str, Tensor], shift: bool = False) -> Tensor:
    """Of a batch of one: the mean over its targets."""
    logits = oracle.logits_of(model(**{name: x for name, x in one.items() if name != "labels"}))
    labels = one["labels"]
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED)


def by_autograd(
    model: nn.Module, batch: Mapping[str, Tensor], reference: Mapping[str, Tensor], shift: bool = False
) -> dict[str, Tensor]:
    """``vᵀ H v`` and the sound bound by reversing the reverse pass, one example and layer at a time, [layers, B]."""
    model = oracle.function_of_weights(model)
    names = [layer.name for layer in find_layers(model)[0]]
    hessian, upper = torch.zeros(2, len(names), len(batch["labels"]), dtype=torch.float64)
    with sdpa_kernel(SDPBackend.MATH):
        for i in range(len(batch["labels"])):
            loss = example_loss(model, as_double(rows(batch, i)), shift)
            for k, name in enumerate(names):
                weight = model.get_parameter(name)
                v = (weight - reference[name]).detach()
                product = oracle.gradient(
                    (oracle.gradient(loss, [weight], create_graph=True) * v.flatten()).sum(), [weight]
                )
                hessian[k, i] = product @ v.flatten()
                upper[k, i] = (hessian[k, i] + v.norm() * product.norm()) / 2
    return {"hessian": hessian, "hessian_upper": upper}


# ------------------------------------------------------------------------------------------------------------- heads


@pytest.mark.parametrize("kind", ["hessian", "hessian_upper"])
@pytest.mark.parametrize("name", HEADS)
def test_heads_agree_with_autograd(name: str, kind: Kind) -> None:
    build, batch = HEADS[name]
    model = made(build).double()
    reference = perturbed_reference(model)
    found = layer_quadratic_forms(model, as_double(batch), reference, kind=kind)
    expected = by_autograd(model, batch, reference, shift=name == "causal")[kind]
    assert_agree(found.values.T, expected, 1e-8)
    assert found.notes == ()
    assert len(found.layers) >= 7


def without_padding(batch: Mapping[str, Tensor], mask: Tensor) -> list[dict[str, Tensor]]:
    """Each example alone, as long as it is."""
    names = [name for name in batch if name != "attention_mask"]
    return [
        {name: rows(batch, i)[name][:, :length] if batch[name].dim() > 1 else rows(batch, i)[name] for name in names}
        for i, length in enumerate(mask.sum(1).tolist())
    ]


@pytest.mark.parametrize("kind", ["hessian", "gauss_newton", "hessian_upper"])
@pytest.mark.parametrize("name", ["bert", "token_classifier", "causal", "gpt2"])
def test_padding_does_not_matter(name: str, kind: Kind) -> None:
    build, batch = HEADS[name]
    model = made(build).double()
    reference = perturbed_reference(model)
    together = layer_quadratic_forms(model, batch, reference, kind=kind).values
    alone = [layer_quadratic_forms(model, one, reference, kind=kind).values for one in without_padding(batch, MASK)]
    assert_agree(together.T, torch.cat(alone).T, 1e-8)


@pytest.mark.parametrize("name", ["bert", "bert_tokens", "gpt2_causal"])
def test_padding_does_not_matter_once_lanczos_has_converged(name: str) -> None:
    case, model = find_case(name), find_case(name).model()
    batch, mask = {**case.inputs, "labels": case.labels}, case.inputs["attention_mask"]
    assert mask.sum(1).unique().numel() > 1
    together, *alone = (
        layer_quadratic_forms(model, given, perturbed_reference(model), kind="hessian_psd", lanczos_steps=EXACT).values
        for given in (batch, *without_padding(batch, mask))
    )
    assert_agree(together.T, torch.cat(alone).T, 1e-8)


def test_a_causal_model_is_shifted_by_itself() -> None:
    model = made(HEADS["causal"][0])
    found = layer_quadratic_forms(model, NEXT, perturbed_reference(model))
    for i in range(3):
        expected = model.eval()(**rows(NEXT, i)).loss
        assert found.losses[i].item() == pytest.approx(expected.item(), rel=1e-5)


# -------------------------------------------------------------------------------------------------- half precision


@each_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["resnet", "bert"])
def test_half_precision_is_measured_in_single(name: str, dtype: torch.dtype, kind: Kind) -> None:
    build, batch = HEADS[name]
    model = made(build).to(dtype)
    inputs = {key: x.to(dtype) if x.is_floating_point() else x for key, x in batch.items()}
    rounded = {key: x.float() if x.is_floating_point() else x for key, x in inputs.items()}
    single = copy.deepcopy(model).float()
    before = Snapshot(model)
    for reference in (perturbed_reference(single), perturbed_reference(model)):
        found = layer_quadratic_forms(model, inputs, reference, kind=kind, lanczos_steps=3)
        widened = {key: w.float() if w.is_floating_point() else w for key, w in reference.items()}
        expected = layer_quadratic_forms(single, rounded, widened, kind=kind, lanczos_steps=3)
        assert_agree(found.values.T, expected.values.T, 1e-6)
        assert found.values.abs().amax(0).min() > 0
    before.check()


def test_a_short_way_of_a_half_precision_model_is_not_rounded_away() -> None:
    model = made(tiny.bert).bfloat16()
    reference = {name: w.float() * (1 + 1e-4) for name, w in model.state_dict().items()}
    found = measure_hessian(model, reference, [TEXTS], time_budget=0)
    for layer in found.layers:
        assert layer.distance == pytest.approx(1e-4 * model.get_parameter(layer.name).float().norm().item(), rel=1e-2)


# ------------------------------------------------------------------------------------------------------------ attention


def counted(*args: Any, **settings: Any) -> Any:
    """An attention of the user's own."""
    CALLS.append(1)
    return sdpa_attention_forward(*args, **settings)


CALLS: list[int] = []
AttentionInterface.register("counted", counted)


def seeing(model: nn.Module, seen: list[str], fail: bool = False) -> Callable[[Tensor, Tensor], Tensor]:
    """A loss that notes how the model attends at that moment."""

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        seen.append(model.config._attn_implementation)
        if fail:
            raise ArithmeticError("on purpose")
        return F.cross_entropy(logits, labels, reduction="none")

    return loss


@pytest.mark.parametrize(
    ("attention", "measured"), [("eager", "eager"), ("sdpa", "sdpa"), ("counted", "sdpa"), ("flex_attention", "sdpa")]
)
@pytest.mark.parametrize("name", ["vit", "bert"])
def test_attention_is_switched_and_put_back(name: str, attention: str, measured: str) -> None:
    build, batch = HEADS[name]
    model = made(build)
    reference = perturbed_reference(model)
    expected = {
        kind: layer_quadratic_forms(model, batch, reference, kind=kind, lanczos_steps=3).values for kind in KINDS
    }
    model.set_attn_implementation(attention)
    CALLS.clear()
    before, seen = Snapshot(model), list[str]()
    for kind in KINDS:
        found = layer_quadratic_forms(model, batch, reference, kind=kind, loss=seeing(model, seen), lanczos_steps=3)
        assert_agree(found.values.T, expected[kind].T, 1e-4)
        before.check()
        with pytest.raises(ArithmeticError, match="on purpose"):
            layer_quadratic_forms(model, batch, reference, kind=kind, loss=seeing(model, seen, fail=True))
        before.check()
    assert set(seen) == {measured}
    assert model.config._attn_implementation == attention
    assert not CALLS
    if attention == "counted":  # and is in use again
        model(**batch)
        assert CALLS


def attention_of(config: Any) -> dict[str, Any]:
    """Of a configuration and all those inside it."""
    inner = {
        f"{key}.{name}": value
        for key in config.sub_configs
        for name, value in attention_of(getattr(config, key)).items()
    }
    return {"": config._attn_implementation, **inner}


@pytest.mark.parametrize("attention", ["eager", "counted", "flex_attention"])
def test_attention_of_inner_configurations_is_put_back(attention: str) -> None:
    vision = {**tiny.ENCODER, "image_size": 8, "patch_size": 4, "num_channels": 1}
    config = transformers.CLIPConfig(vision_config=vision, text_config={**tiny.ENCODER, "vocab_size": 9}, num_labels=3)
    model = made(lambda: transformers.CLIPForImageClassification(config))
    model.set_attn_implementation(attention)
    before = attention_of(model.config)
    assert set(before.values()) == {attention}
    assert len(before) == 3
    layer_quadratic_forms(model, PICTURES, perturbed_reference(model))
    assert attention_of(model.config) == before


def test_a_transformers_model_inside_another_module_is_switched_too() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = made(tiny.bert)

        def forward(self, **inputs: Tensor) -> Tensor:
            return self.inner(**inputs).logits

    model = Outer()
    reference = perturbed_reference(model)
    expected = layer_quadratic_forms(model, TEXTS, reference, kind="hessian_upper").values
    model.inner.set_attn_implementation("counted")
    CALLS.clear()
    found = layer_quadratic_forms(model, TEXTS, reference, kind="hessian_upper").values
    assert_agree(found.T, expected.T, 1e-4)
    assert not CALLS
    assert model.inner.config._attn_implementation == "counted"


# --------------------------------------------------------------------------------------------------------- adapters

ADAPTED: dict[str, tuple[list[str], str]] = {
    "bert": (["query", "value"], "SEQ_CLS"),
    "causal": (["c_attn"], "CAUSAL_LM"),
}


def adapted(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model with LoRA adapters that have been trained a little, in float64, and the state of its base model."""
    peft = pytest.importorskip("peft", reason="LoRA adapters need peft")
    targets, task = ADAPTED[name]
    model = made(HEADS[name][0])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        settings = peft.LoraConfig(
            task_type=task, r=2, target_modules=targets, lora_dropout=0.5, fan_in_fan_out=name == "causal"
        )
        reference = {key: w.double() for key, w in model.state_dict().items()}
        model = peft.get_peft_model(model, settings).double()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.3 * torch.randn_like(parameter)
    return model, reference


@functools.cache
def of_adapters(name: str, grouped: bool) -> tuple[list[list[str]], oracle.Measures]:
    """Groups and the oracle on the merged model: each weight alone, or those of the first block as one."""
    model, reference = adapted(name)
    names = [layer.name for layer in find_layers(model)[0]]
    of_blocks = [n for n in names if ".0." in n or ".1." in n]
    assert len(of_blocks) == (4 if name == "bert" else 2)
    groups = [[n for n in of_blocks if ".0." in n]] if grouped else [[n] for n in names]
    model = model.merge_and_unload().requires_grad_()
    batch, loss = HEADS[name][1], oracle.Loss("plain", torch.eye(3), shift=name == "causal")
    inputs = {key: x for key, x in batch.items() if key != "labels"}
    return groups, oracle.measure(model, inputs, batch["labels"], loss, groups, reference)


@each_kind
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("name", ADAPTED)
def test_adapters_agree_with_the_oracle(name: str, grouped: bool, kind: Kind) -> None:
    model, reference = adapted(name)
    groups, expected = of_adapters(name, grouped)
    before = Snapshot(model)
    found = layer_quadratic_forms(
        model, HEADS[name][1], reference, kind=kind, lanczos_steps=EXACT,
        layers={"first block": "*.0.*"} if grouped else "weights",
    )  # fmt: skip
    assert_agree(found.values.T, getattr(expected, kind), 1e-8)
    assert found.notes == ()
    trained = {layer.name for layer in find_layers(model)[0]} | ({"classifier.bias"} if name == "bert" else set())
    assert {other.name for other in found.left_out} == trained - {n for group in groups for n in group}
    before.check()


@pytest.mark.parametrize("name", ADAPTED)
def test_adapters_under_gradient_checkpointing_give_the_same(name: str) -> None:
    model, reference = adapted(name)
    expected = layer_quadratic_forms(model, HEADS[name][1], reference).values
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable()
    found = layer_quadratic_forms(model, HEADS[name][1], reference)
    assert_agree(found.values.T, expected.T, 1e-8)


# -------------------------------------------------------------------------------------------------- the authors' script


def authors(
    model: nn.Module, batch: Mapping[str, Tensor], reference: Mapping[str, Tensor]
) -> tuple[list[str], Tensor, Tensor]:
    """What the authors' script computes, and the terms across layers that are in it.

    It takes one Hessian-vector product of the batch's mean loss in all weights at once, and then, layer by layer, the
    inner product with that layer's part of v.

    Returns:
        Names of the layers; ``v_iᵀ (H v)_i`` for each layer; ``v_iᵀ H_ij v_j`` of the mean loss, [layers, layers].
    """
    model = oracle.function_of_weights(model)
    names = [layer.name for layer in find_layers(model)[0]]
    weights = [model.get_parameter(name) for name in names]
    vs = [(weight - reference[name]).detach() for name, weight in zip(names, weights, strict=True)]
    with sdpa_kernel(SDPBackend.MATH):
        losses = [example_loss(model, as_double(rows(batch, i))) for i in range(len(batch["labels"]))]
    gradients = torch.autograd.grad(torch.stack(losses).mean(), weights, create_graph=True)
    slope = sum((g * v).sum() for g, v in zip(gradients, vs, strict=True))
    products = torch.autograd.grad(slope, weights, retain_graph=True)
    quantity = torch.stack([(h * v).sum() for h, v in zip(products, vs, strict=True)])
    blocks = torch.zeros(len(names), len(names), dtype=torch.float64)
    for j, (g, v) in enumerate(zip(gradients, vs, strict=True)):
        column = torch.autograd.grad((g * v).sum(), weights, retain_graph=True)
        blocks[:, j] = torch.stack([(h * u).sum() for h, u in zip(column, vs, strict=True)])
    return names, quantity, blocks


def test_the_authors_quantity_is_ours_for_one_layer_and_one_example() -> None:
    for name in ("bert", "vit"):
        model, batch = made(HEADS[name][0]).double(), rows(as_double(HEADS[name][1]), 1)
        reference = perturbed_reference(model)
        for layer in find_layers(model)[0][1::4]:
            for parameter in model.parameters():
                parameter.requires_grad_(parameter is layer.parameter)
            ours = layer_quadratic_forms(model, batch, reference)
            weight = {n: w if n == layer.name else model.state_dict()[n] for n, w in reference.items()}
            names, theirs, _ = authors(model, batch, weight)
            assert ours.layers == (layer.name,)
            assert ours.values.item() == pytest.approx(theirs[names.index(layer.name)].item(), rel=1e-9)
            model.requires_grad_(True)


def test_for_several_layers_theirs_differs_by_the_terms_across_layers() -> None:
    model, batch = made(tiny.bert).double(), rows(TEXTS, 0)
    reference = perturbed_reference(model)
    names, theirs, blocks = authors(model, batch, reference)
    ours = layer_quadratic_forms(model, batch, reference)
    assert list(ours.layers) == names
    scale = theirs.abs().max().item()
    torch.testing.assert_close(ours.values[0], blocks.diagonal(), rtol=1e-8, atol=1e-10 * scale)
    across = blocks.sum(1) - blocks.diagonal()
    torch.testing.assert_close(theirs - ours.values[0], across, rtol=1e-8, atol=1e-10 * scale)
    # They are no small correction, and can turn the sign.
    assert (across.abs() > ours.values[0].abs()).float().mean() > 0.5
    assert (theirs.sign() != ours.values[0].sign()).any()
    # All layers as one group have them all: then it is the sum of theirs.
    whole = layer_quadratic_forms(model, batch, reference, layers={"all": "*"}).values.item()
    assert whole == pytest.approx(theirs.sum().item(), rel=1e-8)


def test_for_a_batch_theirs_is_the_mean_of_ours_and_not_the_maximum() -> None:
    model = made(tiny.vit).double()
    reference, batch = perturbed_reference(model), as_double(PICTURES)
    for layer in find_layers(model)[0][::5]:
        weight = {n: w if n == layer.name else model.state_dict()[n] for n, w in reference.items()}
        names, theirs, _ = authors(model, batch, weight)
        ours = layer_quadratic_forms(model, batch, reference, layers={"layer": layer.name}).values[:, 0]
        quantity = theirs[names.index(layer.name)].item()
        assert quantity == pytest.approx(ours.mean().item(), rel=1e-8)
        assert quantity < ours.max().item()
        report = measure_hessian(model, reference, [batch], layers={"layer": layer.name}).layers[0]
        assert report.hessian.maximum == pytest.approx(ours.max().item(), rel=1e-8)
        assert report.positive is not None
        assert report.positive.maximum >= report.hessian.maximum * (1 - 1e-9)


# ------------------------------------------------------------------------------------------- real pretrained models

ROOT = Path(__file__).parent.parent
MODELS = ROOT / ".assets" / "models"
DATA = ROOT.parent / "shared" / "data"
real = [
    pytest.mark.real,
    pytest.mark.skipif(
        not (MODELS / "dinov2-small").is_dir() or not DATA.is_dir(),
        reason="needs ../shared/data, and in .assets/models what ../shared/assets/fetch_models.py lays out",
    ),
]


def real_case(name: str, tmp_path: Path) -> tuple[nn.Module, dict[str, Tensor], dict[str, Tensor]]:
    """A pretrained model with a fresh head, four real examples, and a reference 2 % away; float64 but for the model."""
    torch.manual_seed(0)
    kind, files = (
        (AutoModelForImageClassification, "fashion-mnist") if name == "dinov2-small" else
        (AutoModelForSequenceClassification, "wordnet-supersense")
    )  # fmt: skip
    model = kind.from_pretrained(MODELS / name, num_labels=10)
    path = str(DATA / files / "train.parquet")
    data = load_dataset("parquet", data_files=path, cache_dir=str(tmp_path / "cache"))["train"].select(range(4))
    if name == "dinov2-small":
        processor = transformers.models.auto.image_processing_auto.AutoImageProcessor.from_pretrained(MODELS / name)
        batch = processor([image.convert("RGB") for image in data["image"]], return_tensors="pt")
    else:
        batch = transformers.AutoTokenizer.from_pretrained(MODELS / name)(
            list(data["text"]), padding=True, truncation=True, max_length=24, return_tensors="pt"
        )
    reference = {
        key: w.double() + 0.02 * w.double().norm() / w.numel() ** 0.5 * torch.randn(w.shape, dtype=torch.float64)
        if w.is_floating_point() else w
        for key, w in model.state_dict().items()
    }  # fmt: skip
    return model, {**as_double(batch), "labels": torch.tensor(data["label"])}, reference


def second_differences(
    model: nn.Module, batch: Mapping[str, Tensor], weight: nn.Parameter, v: Tensor, step: float
) -> Tensor:
    """``φ''(0)`` of ``φ(s) = ℓ(W + s v)`` for each example, of fourth order."""
    start = weight.detach().clone()
    inputs = {name: x for name, x in batch.items() if name != "labels"}

    def losses(s: float) -> Tensor:
        with torch.no_grad():
            weight.copy_(start + s * v)
            return F.cross_entropy(model(**inputs).logits, batch["labels"], reduction="none")

    near, far = losses(step) + losses(-step), losses(2 * step) + losses(-2 * step)
    second = (16 * near - far - 30 * losses(0)) / (12 * step**2)
    with torch.no_grad():
        weight.copy_(start)
    return second


def probed(model: nn.Module) -> list[Layer]:
    """First (embeddings or patches), second, some in the middle, and the last ones."""
    layers = find_layers(model)[0]
    return [layers[i] for i in (0, 1, 2, len(layers) // 3, len(layers) // 2, -3, -2, -1)]


each_real = pytest.mark.parametrize("name", [pytest.param(name, marks=real) for name in ("dinov2-small", "minilm-l6")])


@each_real
def test_real_models_agree_with_finite_differences_and_single_precision(name: str, tmp_path: Path) -> None:
    model, batch, reference = real_case(name, tmp_path)
    single = layer_quadratic_forms(
        model, {n: x.float() if x.is_floating_point() else x for n, x in batch.items()}, reference
    )
    double = layer_quadratic_forms(model.double(), batch, reference)
    assert single.notes == double.notes == ()
    assert_agree(single.values.T, double.values.T, 1e-4)
    assert double.values.abs().amax(0).min() > 0
    model.eval()
    for layer in probed(model):
        v = (layer.parameter - reference[layer.name]).detach()
        values = double.values[:, double.layers.index(layer.name)]
        errors = [
            (second_differences(model, batch, layer.parameter, v, step) - values).abs().max().item()
            for step in (1.0, 0.3, 0.1, 0.03)
        ]
        assert min(errors) < 1e-5 * values.abs().max(), (layer.name, errors, values)


@each_real
def test_products_of_real_models_agree_with_the_sweep(name: str, tmp_path: Path) -> None:
    model, batch, reference = real_case(name, tmp_path)
    batch = {n: x.float() if x.is_floating_point() else x for n, x in batch.items()}
    layers = {layer.name: layer.name for layer in probed(model)}
    found = measure_hessian(model, reference, [batch], layers=layers, lanczos_steps=4)
    forms = layer_quadratic_forms(model, batch, reference, layers=layers).values
    for layer, values in zip(found.layers, forms.T, strict=True):
        assert layer.hessian.maximum == pytest.approx(values.max().item(), abs=1e-4 * values.abs().max().item())
        assert layer.positive is not None
        assert layer.hessian.maximum <= layer.positive.maximum * (1 + 1e-4) <= layer.upper.maximum * (1 + 1e-3)
    assert found.examples == 4
