"""Radii by number, pattern, schedule and scale; the audit; refusals."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import transformers
from torch import nn

from hf_robust_ft import LayerConstraints, ReferenceMismatch, find_layers, layer_distances
from hf_robust_ft.constraints import Ball
from hf_robust_ft.projection import magnitude


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return tiny.bert()


def shake(model: nn.Module, scale: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def test_a_number_holds_for_every_layer(model: nn.Module) -> None:
    constraints = LayerConstraints(model, 0.3)
    assert constraints.radii == {layer.name: 0.3 for layer in find_layers(model)[0] if not layer.fresh}
    before = tiny.weights(model)
    shake(model)
    moved = tiny.weights(model)
    constraints.project_()
    distances = layer_distances(model, before)
    for name in constraints.radii:
        assert 0.2999 < distances[name] <= 0.3
        # The direction is kept.
        now, then = model.get_parameter(name) - before[name], moved[name] - before[name]
        assert torch.cosine_similarity(now.flatten(), then.flatten(), dim=0) > 0.99999
    assert constraints.distances().items() < distances.items()
    assert distances["classifier.weight"] > 0.3


def test_what_is_no_layer_is_not_moved(model: nn.Module) -> None:
    constraints = LayerConstraints(model, 0.01)
    shake(model)
    moved = tiny.weights(model)
    constraints.project_()
    _, others = find_layers(model)
    assert others
    for other in others:
        assert torch.equal(model.state_dict()[other.name], moved[other.name])


def test_a_fresh_head_is_free_unless_it_is_named(tmp_path: Path, model: Any) -> None:
    model.bert.save_pretrained(tmp_path)
    loaded = transformers.BertForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    rows = {row.name: row for row in LayerConstraints(loaded, 0.3).table()}
    assert rows["classifier.weight"].free == "freshly initialised, and layer_radius names no radius for it"
    assert rows["bert.pooler.dense.weight"].centre == "pretrained"
    rows = {row.name: row for row in LayerConstraints(loaded, {"classifier": 2.0, "*": 0.3}).table()}
    assert (rows["classifier.weight"].centre, rows["classifier.weight"].radius) == ("initial", 2.0)


def test_the_first_matching_pattern_decides(model: nn.Module) -> None:
    constraints = LayerConstraints(
        model, {"*.layer.0.*": 0.1, "*.query": 0.2, "*pooler.dense.weight": math.inf, "*embeddings.*": None}
    )
    radii = constraints.radii
    assert radii["bert.encoder.layer.0.attention.self.query.weight"] == 0.1
    assert radii["bert.encoder.layer.1.attention.self.query.weight"] == 0.2
    assert "bert.encoder.layer.1.attention.self.key.weight" not in radii
    free = {row.name: row.free for row in constraints.table()}
    assert free["bert.encoder.layer.1.attention.self.key.weight"] == "no pattern of layer_radius matches"
    assert free["bert.pooler.dense.weight"] == "freed by the pattern '*pooler.dense.weight'"
    assert free["bert.embeddings.word_embeddings.weight"] == "freed by the pattern '*embeddings.*'"


def test_a_tied_weight_answers_to_all_its_names() -> None:
    constraints = LayerConstraints(tiny.gpt2(causal=True), {"lm_head": 0.5})
    assert constraints.radii == {"transformer.wte.weight": 0.5}


def test_radii_grow_with_depth(model: nn.Module) -> None:
    radii = LayerConstraints(model, 0.1, growth=2.0).radii
    assert radii["bert.embeddings.word_embeddings.weight"] == 0.1
    assert radii["bert.encoder.layer.0.output.dense.weight"] == 0.2
    assert radii["bert.encoder.layer.1.output.dense.weight"] == 0.4
    assert radii["bert.pooler.dense.weight"] == 0.8


@pytest.mark.parametrize("norm", ["frobenius", "inf_op"])
def test_relative_radii_scale_with_the_reference(model: nn.Module, norm: Any) -> None:
    constraints = LayerConstraints(model, 0.1, norm=norm, mode="relative")
    for layer in find_layers(model)[0]:
        if layer.fresh:
            continue
        size = magnitude(layer.parameter, norm, layer.row_dims or ())
        assert constraints.radii[layer.name] == pytest.approx(0.1 * size)


def test_row_sum_balls_bound_the_change_of_every_output() -> None:
    model = tiny.gpt2()
    constraints = LayerConstraints(model, 0.05, norm="inf_op")
    attention = model.transformer.h[0].attn.c_attn
    before = attention.weight.detach().clone()
    shake(model)
    constraints.project_()
    # Conv1D is x @ W: an input with |x| <= 1 moves an output by at most the column sum of |W - W_ref|.
    columns = (attention.weight - before).abs().sum(0)
    assert columns.max() <= 0.05
    assert columns.min() > 0.0499


def test_an_infinite_radius_keeps_nothing(model: nn.Module) -> None:
    constraints = LayerConstraints(model, math.inf)
    assert not constraints
    assert constraints.reference == {}
    assert {row.free for row in constraints.table()} >= {"layer_radius is infinite", "bias"}


def test_the_table_lists_every_trained_parameter(model: nn.Module) -> None:
    constraints = LayerConstraints(model, {"*.query": 0.1})
    shake(model)
    constraints.project_()
    table = constraints.table()
    assert {row.name for row in table} == {name for name, _ in model.named_parameters()}
    for row in table:
        assert (row.free is None) == (row.radius is not None) == (row.distance is not None)
        assert row.shape == tuple(model.get_parameter(row.name).shape)
    assert list(constraints.table(distances=False)) == [replace(row, distance=None) for row in table]
    query = next(row for row in table if row.name.endswith("layer.1.attention.self.query.weight"))
    assert query.active
    assert query.norm == "frobenius"
    lines = str(table).splitlines()
    assert len(lines) == len(table) + 1
    assert next(line for line in lines if "layer.1.attention.self.query" in line).split()[-1] == "active"
    assert next(line for line in lines if "classifier.bias" in line).split()[-2:] == ["free", "bias"]


@pytest.mark.parametrize(
    ("radius", "settings", "message"),
    [
        (-0.1, {}, r"layer_radius is -0.1; a radius is a number >= 0"),
        (math.nan, {}, r"layer_radius is nan"),
        (True, {}, r"layer_radius is True"),
        ({"*.query": -1}, {}, r"layer_radius\['\*.query'\] is -1"),
        (0.1, {"norm": "fro"}, r"radius_norm is 'fro'; choose 'frobenius' or 'inf_op'"),
        (0.1, {"mode": "rel"}, r"radius_mode is 'rel'; choose 'absolute' or 'relative'"),
        ({"*": "0.1"}, {}, r"layer_radius\['\*'\] is '0.1'"),
        ({"querry": 1}, {}, r"pattern 'querry' matches no layer. Layers are bert"),
        ({"*": 1, "query": 1}, {}, r"pattern 'query' matches no layer; '\*query\*' would match 2"),
        ({"classifier.bias": 1}, {}, r"matches only parameters that are no layers"),
        (0.1, {"growth": 0}, r"radius_growth is 0"),
        (0.1, {"growth": math.inf}, r"radius_growth is inf"),
    ],
)
def test_radii_that_make_no_sense_are_refused(model: nn.Module, radius: Any, settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LayerConstraints(model, radius, **settings)


def test_a_model_without_layers_is_refused(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="no trained weight matrix to constrain"):
        LayerConstraints(model, 0.1)


def test_zero_weights_have_no_relative_radius(model: Any) -> None:
    nn.init.zeros_(model.bert.pooler.dense.weight)
    with pytest.raises(ValueError, match=r"radius_mode='relative', but the reference of bert.pooler.* is zero"):
        LayerConstraints(model, 0.1, mode="relative")


def test_a_kernel_without_rows_is_refused_by_the_row_sum_norm() -> None:
    model = nn.Sequential(nn.ConvTranspose1d(4, 6, 3, groups=2))
    with pytest.raises(ValueError, match=r"radius_norm='inf_op' has no rows in 0.weight \(ConvTranspose1d"):
        LayerConstraints(model, 0.1, norm="inf_op")
    assert LayerConstraints(model, 0.1).radii == {"0.weight": 0.1}


def test_a_reference_of_another_model_is_refused(model: nn.Module) -> None:
    reference = LayerConstraints(model, 0.1).reference
    with pytest.raises(ReferenceMismatch, match=r"has shape \(16, 16\), the model's has \(20, 20\)"):
        LayerConstraints(tiny.bert(hidden_size=20), {"*.query": 0.1}, reference=reference)
    del reference["bert.pooler.dense.weight"]
    with pytest.raises(ReferenceMismatch, match=r"no weights for bert\.pooler.* constrain the layers of"):
        LayerConstraints(model, 0.1, reference=reference)
    with pytest.raises(ReferenceMismatch, match="no weights for bert"):
        layer_distances(model, {})


def test_numbers_of_numpy_are_numbers(model: nn.Module) -> None:
    assert set(LayerConstraints(model, np.float32(0.5)).radii.values()) == {0.5}


def test_what_an_earlier_run_found_fresh_stays_fresh(model: nn.Module) -> None:
    constraints = LayerConstraints(model, 0.1, fresh=["bert.pooler.dense.weight"])
    assert "classifier.weight" in constraints.radii
    assert "bert.pooler.dense.weight" not in constraints.radii
    assert constraints.fresh == ["bert.pooler.dense.weight"]


def test_a_given_reference_is_the_centre(model: nn.Module) -> None:
    reference = LayerConstraints(model, 0.1).reference
    shake(model)
    constraints = LayerConstraints(model, 0.1, reference=reference)
    assert min(constraints.distances().values()) > 0.1
    constraints.project_()
    assert max(constraints.distances().values()) <= 0.1


def test_a_penalty_holds_all_pretrained_layers_beside_the_balls(tmp_path: Path, model: Any) -> None:
    model.bert.save_pretrained(tmp_path)
    loaded = transformers.BertForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    constraints = LayerConstraints(loaded, {"classifier": 2.0, "*query*": 0.1}, norm="inf_op", penalty=0.5)
    pretrained = {layer.name for layer in find_layers(loaded)[0] if not layer.fresh}
    assert constraints.reference.keys() == pretrained | {"classifier.weight"}
    assert constraints.radii.keys() == {name for name in pretrained if "query" in name} | {"classifier.weight"}
    assert len(constraints) == len(pretrained) + 1

    before = tiny.weights(loaded)
    shake(loaded)
    for parameter in loaded.parameters():
        parameter.grad = torch.ones_like(parameter)
    constraints.add_pull(4.0)
    for name, parameter in loaded.named_parameters():
        pull = 4.0 * 0.5 * (parameter.detach() - before[name]) if name in pretrained else 0.0
        torch.testing.assert_close(parameter.grad, torch.ones_like(parameter) + pull)
    assert constraints.distances().keys() == constraints.reference.keys()
    key = "bert.encoder.layer.0.attention.self.key.weight"
    assert constraints.distances()[key] == layer_distances(loaded, before)[key]


def test_a_penalty_asks_nothing_of_the_layers_that_only_balls_need() -> None:
    """Zero weights have no relative radius, and transposed convolutions in groups no rows."""
    model = nn.Sequential(nn.Linear(3, 2), nn.ConvTranspose1d(2, 2, 3, groups=2))
    nn.init.zeros_(model[0].weight)
    constraints = LayerConstraints(model, None, norm="inf_op", mode="relative", penalty=1.0)
    assert constraints.distances() == {"0.weight": 0.0, "1.weight": 0.0}
    constraints.project_()


def test_layers_that_go_together_end_where_they_do_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU many are projected at once: each with its own radius and norm."""

    def projected() -> dict[str, Any]:
        torch.manual_seed(0)
        model = tiny.bert()
        constraints = LayerConstraints(model, {"*query*": 0.1, "*dense*": 0.3})
        shake(model)
        constraints.project_()
        return tiny.weights(model)

    alone = projected()
    monkeypatch.setattr(Ball, "goes_with", lambda self: (self.centre.device, self.centre.dtype))
    for name, weight in projected().items():
        torch.testing.assert_close(weight, alone[name], rtol=0, atol=1e-6)
