"""Which parameters count as layers, on the architectures that people fine-tune."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from torch import nn

from hf_robust_ft import Layer, NotALayer, find_layers


def audit(model: nn.Module) -> tuple[dict[str, Layer], dict[str, NotALayer]]:
    layers, others = find_layers(model)
    return {layer.name: layer for layer in layers}, {other.name: other for other in others}


MODELS: list[Callable[[], nn.Module]] = [
    tiny.vit,
    tiny.dinov2,
    tiny.resnet,
    tiny.convnext,
    tiny.bert,
    tiny.roberta,
    tiny.distilbert,
    tiny.gpt2,
    lambda: tiny.gpt2(causal=True),
    tiny.token_classifier,
    tiny.Mlp,
]


@pytest.mark.parametrize("build", MODELS)
def test_every_trained_parameter_has_one_place(build: Callable[[], nn.Module]) -> None:
    model = build()
    layers, others = audit(model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    statistics = {name for name, _ in model.named_buffers() if name.endswith(("running_mean", "running_var"))}
    assert layers.keys().isdisjoint(others.keys())
    assert layers.keys() | others.keys() == trained | statistics


@pytest.mark.parametrize("build", MODELS)
def test_layers_are_the_weights_of_linear_maps(build: Callable[[], nn.Module]) -> None:
    model = build()
    layers, others = audit(model)
    kinds = (nn.Linear, nn.Conv2d, nn.Embedding, transformers.pytorch_utils.Conv1D)
    expected = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, kinds)}
    tied = {alias for layer in layers.values() for alias in layer.tied}
    assert layers.keys() | tied == expected
    assert all(other.reason for other in others.values())


def test_dinov2_by_name() -> None:
    layers, others = audit(tiny.dinov2())
    assert len(layers) == 1 + 2 * 6 + 1
    first = [name for name in layers if ".layer.0." in name]
    assert {layers[name].depth for name in first} == {1}
    assert layers["dinov2.embeddings.patch_embeddings.projection.weight"].depth == 0
    assert layers["classifier.weight"].depth == 3
    assert others["dinov2.embeddings.cls_token"].reason == "token, position table or scale, not a matrix"
    assert others["dinov2.embeddings.position_embeddings"].reason.startswith("token, position table")
    assert others["dinov2.encoder.layer.0.layer_scale1.lambda1"].reason == "scale or vector, not a matrix"
    assert others["dinov2.encoder.layer.0.norm1.weight"].reason == "norm"
    assert others["classifier.bias"].reason == "bias"


def test_bert_embeddings_share_the_first_block() -> None:
    layers, _ = audit(tiny.bert())
    assert {layers[f"bert.embeddings.{kind}_embeddings.weight"].depth for kind in ("word", "position")} == {0}
    assert layers["bert.encoder.layer.1.output.dense.weight"].depth == 2
    assert layers["bert.pooler.dense.weight"].depth == 3
    assert layers["classifier.weight"].depth == 4


def test_gpt2_rows_are_outputs_and_tied_weights_count_once() -> None:
    model = tiny.gpt2(causal=True)
    layers, _ = audit(model)
    attention = layers["transformer.h.0.attn.c_attn.weight"]
    assert (attention.kind, attention.row_dims, tuple(attention.parameter.shape)) == (
        "Conv1D",
        (1,),
        (16, 48),
    )
    assert layers["transformer.wte.weight"].tied == ("lm_head.weight",)
    assert "lm_head.weight" not in layers
    assert layers["transformer.wte.weight"].matches("lm_head.w*")


def test_resnet_statistics_are_listed() -> None:
    layers, others = audit(tiny.resnet())
    assert all(layer.kind in ("Conv2d", "Linear") for layer in layers.values())
    means = [name for name in others if name.endswith("running_mean")]
    assert means
    assert {others[name].reason for name in means} == {"batch-norm statistic, updated by the data"}
    depths = [layer.depth for layer in layers.values()]
    assert max(depths) == len(set(depths)) - 1
    assert layers["resnet.embedder.embedder.convolution.weight"].depth == 0


def test_frozen_parameters_are_left_out() -> None:
    model = tiny.bert()
    for parameter in model.bert.embeddings.parameters():
        parameter.requires_grad_(False)
    layers, others = audit(model)
    assert not any("embeddings" in name for name in [*layers, *others])
    assert layers["bert.encoder.layer.0.attention.self.query.weight"].depth == 0


def test_only_what_the_checkpoint_lacks_is_fresh(tmp_path: Path) -> None:
    tiny.bert().bert.save_pretrained(tmp_path / "base")
    loaded = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=5)
    layers, _ = audit(loaded)
    assert [name for name, layer in layers.items() if layer.fresh] == ["classifier.weight"]
    loaded.save_pretrained(tmp_path / "whole")
    whole = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "whole")
    assert not any(layer.fresh for layer in find_layers(whole)[0])


def test_the_head_counts_as_fresh_where_the_marks_of_loading_are_lost(tmp_path: Path) -> None:
    tiny.bert().bert.save_pretrained(tmp_path)
    loaded = transformers.BertForSequenceClassification.from_pretrained(tmp_path, num_labels=5)
    for model in (copy.deepcopy(loaded), tiny.bert()):
        assert [layer.name for layer in find_layers(model)[0] if layer.fresh] == ["classifier.weight"]
    # Tied to the embeddings, this head is no new one; and of other models nothing is known.
    assert not any(layer.fresh for layer in find_layers(tiny.gpt2(causal=True))[0])
    assert not any(layer.fresh for layer in find_layers(tiny.Mlp())[0])


def test_modules_of_torch() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.TransformerEncoderLayer(8, 2, 16), nn.LSTM(8, 4)])
            self.up = nn.ConvTranspose2d(4, 6, 3)
            self.grouped = nn.ConvTranspose1d(4, 6, 3, groups=2)
            self.depthwise = nn.Conv2d(6, 6, 3, groups=6)
            self.both = nn.Bilinear(3, 4, 5)
            self.bag = nn.EmbeddingBag(9, 4)
            self.experts = nn.Parameter(torch.randn(3, 4, 5))
            self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
            self.layer_norm = nn.LayerNorm([4, 5])
            self.relative_position_bias_table = nn.Parameter(torch.randn(9, 2))

    layers, others = audit(Mixed())
    assert layers["blocks.0.self_attn.in_proj_weight"].row_dims == (0,)
    assert layers["blocks.0.linear1.weight"].depth == layers["blocks.0.self_attn.in_proj_weight"].depth == 1
    assert layers["blocks.1.weight_ih_l0"].kind == "LSTM"
    assert layers["up.weight"].row_dims == (1,)
    assert layers["grouped.weight"].row_dims is None
    assert layers["depthwise.weight"].row_dims == (0,)
    assert layers["both.weight"].row_dims == (0,)
    assert layers["bag.weight"].kind == "EmbeddingBag"
    assert layers["experts"].row_dims is None
    assert others["relative_position_bias_table"].reason == "bias"
    assert others["layer_norm.weight"].reason == "norm"
    assert others["normed.parametrizations.weight.original1"].reason.startswith("part of a re-parametrized")
