"""Quadratic forms of every layer and example, against dense Hessians."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

import oracle
import pytest
import torch
from measured import EXACT, KINDS, NOT_TWICE, as_double, batch_of, each_kind, expected, forms, single, tolerance
from oracle import CASES, LABELS, VECTORS, Case, Loss, assert_agree, find_case, layer_groups, perturbed_reference
from torch import Tensor, nn
from torch.nn import functional as F

from hf_robust_ft.corrected_loss import CorrectedLoss
from hf_robust_ft.curvature import NotTwiceDifferentiable, layer_quadratic_forms
from hf_robust_ft.curvature.engine import Kind


def test_kinds_are_those_of_the_engine() -> None:
    assert tuple(KINDS) == get_args(Kind)


@each_kind
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_case_agrees_with_the_oracle(case: Case, kind: Kind) -> None:
    if case.name in NOT_TWICE and kind in ("hessian_upper", "hessian_psd"):
        with pytest.raises(NotTwiceDifferentiable, match=r"hardsigmoid|embedding_bag"):
            forms(case, kind)
        return
    found = forms(case, kind)
    assert found.kind == kind
    assert found.values.dtype == torch.float64
    assert [[name] for name in found.layers] == layer_groups(case.model())
    assert_agree(found.values.T, getattr(expected(case), kind), tolerance(case))
    logits = oracle.logits_of(case.model()(**case.inputs))
    torch.testing.assert_close(found.losses, case.loss()(logits, case.labels).detach(), rtol=tolerance(case), atol=0)
    assert (found.gap is not None) == (kind == "hessian_psd")


# -------------------------------------------------------------------------------------------------------- losses

WITH_LOSSES = [
    "gelu", "conv2d", "bert", "bert_tokens", "vit", "gpt2_causal", "token_labels", "tied_linear", "tied_embedding",
    "embedding",
]  # fmt: skip


@each_kind
@pytest.mark.parametrize("correction", ["forward", "backward"])
@pytest.mark.parametrize("name", WITH_LOSSES)
def test_corrected_losses_agree_with_the_oracle(name: str, correction: Any, kind: Kind) -> None:
    case = find_case(name)
    transition = oracle.some_transition(case.classes).numpy()
    loss = CorrectedLoss(correction, transition, num_classes=case.classes, shift=case.shift)
    corrected, plain = getattr(expected(case, correction), kind), getattr(expected(case), kind)
    assert_agree(forms(case, kind, loss=loss).values.T, corrected, tolerance(case))
    if (correction, kind) != ("backward", "gauss_newton"):  # whose logit Hessian is that of plain cross entropy
        assert (corrected - plain).abs().max() > 1e-3 * plain.abs().max()


@dataclass(frozen=True)
class Generalized(Loss):
    """Generalized cross entropy (Zhang & Sabuncu 2018), ``(1 - p^q) / q``."""

    def of_every_label(self, logits: Tensor) -> Tensor:
        return (1 - logits.softmax(-1) ** 0.7) / 0.7


@dataclass(frozen=True)
class Smoothed(Loss):
    """Cross entropy against labels smoothed by 0.1."""

    def of_every_label(self, logits: Tensor) -> Tensor:
        log_p = logits.log_softmax(-1)
        return -0.9 * log_p - 0.1 * log_p.mean(-1, keepdim=True)


@dataclass(frozen=True)
class Margin(Loss):
    """Linear in the logits: all curvature is the model's."""

    def of_every_label(self, logits: Tensor) -> Tensor:
        return logits.mean(-1, keepdim=True) - logits

    def gauss_newton(self, logits: Tensor, labels: Tensor, tangent: Tensor) -> Tensor:
        return torch.zeros(len(logits), dtype=torch.float64)


@functools.cache
def user_loss(loss: type[Loss], case: Case) -> Loss:
    return loss("plain", oracle.some_transition(case.classes), case.shift)


@each_kind
@pytest.mark.parametrize("loss", [Generalized, Smoothed, Margin])
@pytest.mark.parametrize("name", ["gelu", "conv2d", "bert", "bert_tokens", "gpt2_causal", "tied_embedding"])
def test_a_users_function_agrees_with_the_oracle(name: str, loss: type[Loss], kind: Kind) -> None:
    case = find_case(name)
    function = user_loss(loss, case)
    assert_agree(forms(case, kind, loss=function).values.T, getattr(expected(case, function), kind), 1e-8)


@pytest.mark.parametrize("kind", ["hessian", "gauss_newton"])
def test_targets_may_be_real_numbers_where_the_loss_is_given(kind: Kind) -> None:
    case, model = find_case("gelu"), find_case("gelu").model()
    targets, reference = torch.randn(3, 3, dtype=torch.float64), perturbed_reference(model)

    def squared(logits: Tensor, labels: Tensor) -> Tensor:
        return (logits - labels).square().sum(-1) / 2

    batch = {**case.inputs, "labels": targets}
    found = layer_quadratic_forms(model, batch, reference, kind=kind, loss=squared).values.T
    groups = layer_groups(model)
    vs = oracle.directions(model, reference, groups)
    if kind == "hessian":
        hessians = oracle.dense_hessians(model, case.inputs, targets, squared, groups)
        forms = [oracle.quadratic(hessian, v) for hessian, v in zip(hessians, vs, strict=True)]
    else:  # the Hessian in the logits is the identity
        _, jacobians = oracle.dense_jacobians(model, case.inputs, groups)
        forms = [(jacobian @ v).square().sum(-1) for jacobian, v in zip(jacobians, vs, strict=True)]
    assert_agree(found, torch.stack(forms), 1e-8)


# -------------------------------------------------------------------------------------------------------- groups


@each_kind
@pytest.mark.parametrize(
    "name",
    [
        "tied_linear", "products_of_weights", "transformer_layer_pre_norm", "multihead_attention", "bert_two_blocks",
        "albert", "gpt2_causal", "resnet", "vit", "lstm", "conv2d", "weight_norm",
    ],
)  # fmt: skip
def test_blocks_agree_with_the_oracle(name: str, kind: Kind) -> None:
    case = find_case(name)
    found = forms(case, kind, layers="blocks").values.T
    assert_agree(found, getattr(expected(case, layers="blocks"), kind), 1e-8)


def test_blocks_are_named_after_the_modules_that_hold_them() -> None:
    assert forms(find_case("bert_two_blocks"), layers="blocks").layers == (
        "bert.embeddings", "bert.encoder.layer.0", "bert.encoder.layer.1", "bert.pooler", "classifier",
    )  # fmt: skip


def names_of(case: Case, *parts: str) -> list[str]:
    return [name for (name,) in layer_groups(case.model()) if any(part in name for part in parts)]


@each_kind
def test_patterns_form_groups_and_the_rest_is_left_out(kind: Kind) -> None:
    case = find_case("bert")
    layers = {"ends": ["*embeddings*", "classifier"], "query": "*.query.weight", "attention": "*.attention.*"}
    groups = [
        names_of(case, "embeddings", "classifier"),
        names_of(case, "query"),
        names_of(case, ".key", ".value", "attention.output"),  # the first match decides
    ]
    found = forms(case, kind, layers=layers)
    assert found.layers == tuple(layers)
    assert_agree(found.values.T, getattr(case.measure(groups=groups), kind), 1e-8)
    reasons = {other.name: other.reason for other in found.left_out}
    outside = {name for (name,) in layer_groups(case.model())} - {name for group in groups for name in group}
    assert outside == names_set(reasons, "no pattern")
    assert reasons.keys() == dict(case.model().named_parameters()).keys() - {name for g in groups for name in g}


def names_set(reasons: Mapping[str, str], part: str) -> set[str]:
    return {name for name, reason in reasons.items() if part in reason}


@each_kind
@pytest.mark.parametrize("name", ["tied_linear", "gpt2_causal", "tied_embedding", "products_of_weights"])
def test_all_weights_may_be_one_group(name: str, kind: Kind) -> None:
    case = find_case(name)
    found = forms(case, kind, layers={"all": "*"})
    assert_agree(found.values.T, getattr(expected(case, layers="all"), kind), 1e-8)


def test_a_tied_weight_goes_by_each_of_its_names() -> None:
    case = find_case("gpt2_causal")
    by_name = [forms(case, layers={"tied": name}).values for name in ("transformer.wte", "lm_head.weight", "lm_head")]
    whole = forms(case)
    for values in by_name:
        assert torch.equal(values[:, 0], whole.values[:, whole.layers.index("transformer.wte.weight")])


def test_a_group_is_more_than_the_sum_of_its_layers() -> None:
    case = find_case("gelu")
    alone, together = forms(case).values.sum(1), forms(case, layers={"all": "*"}).values[:, 0]
    assert ((alone - together).abs() > 1e-3 * together.abs()).all()


# -------------------------------------------------------------------------------------------------- batch and chunks

STEADY = [
    "gelu", "conv2d", "batch_norm2d", "group_norm", "conv1d", "attention", "multihead_attention", "embedding",
    "embedding_padding", "token_labels", "tied_linear", "products_of_weights", "weight_norm", "gru", "bert_tokens",
    "vit", "gpt2", "gpt2_causal", "resnet", "mixtral_causal",
]  # fmt: skip
SEVEN = [2, 1, 1, 0, 2, 0, 1]


@pytest.mark.parametrize("kind", ["hessian", "hessian_upper", "hessian_psd"])
@pytest.mark.parametrize("name", STEADY)
def test_an_example_gives_the_same_in_any_batch(name: str, kind: Kind) -> None:
    case = find_case(name)
    expected_values = getattr(expected(case), kind)
    for rows in ([1], [2, 0], SEVEN):
        found = forms(case, kind, rows=rows).values
        # With all examples beside it, so that errors are relative to the layer's maximum over all of them.
        assert_agree(
            torch.cat([found.T, expected_values], 1),
            torch.cat([expected_values[:, rows], expected_values], 1),
            tolerance(case),
        )


@each_kind
@pytest.mark.parametrize("name", ["gelu", "conv2d", "embedding", "bert", "gpt2_causal", "products_of_weights"])
def test_chunks_do_not_matter(name: str, kind: Kind) -> None:
    case, rows = find_case(name), SEVEN
    expected_values = getattr(expected(case), kind)[:, rows]
    sweeps = kind in ("hessian", "gauss_newton")
    for examples, directions in [(1, 1), (2, None), (3, 3), (None, 2), (100, 100)] if sweeps else [(2, None), (100, 1)]:
        found = forms(case, kind, rows=rows, examples_at_once=examples, directions_at_once=directions)
        assert_agree(found.values.T, expected_values, 1e-8)


class ClassToken(nn.Module):
    """The first position of a transformer decides; nn.MultiheadAttention puts positions before examples inside."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.inner = nn.TransformerEncoderLayer(4, 2, 5, batch_first=batch_first)
        self.head = nn.Linear(4, 3)

    def forward(self, input: Tensor) -> Tensor:
        if self.batch_first:
            return self.head(self.inner(input)[:, 0])
        return self.head(self.inner(input.transpose(0, 1))[0])


class PositionsFirst(nn.Module):
    """[positions, examples, …] throughout."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, input: Tensor) -> Tensor:
        x = input.transpose(0, 1).contiguous()
        return self.head(F.gelu(self.second(F.gelu(self.first(x))))).transpose(0, 1)


class Sorting(nn.Module):
    """The examples in the order of their first feature, as packed sequences and mixtures of experts put them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, input: Tensor) -> Tensor:
        order = input[:, 0].argsort()
        return self.head(F.gelu(self.second(F.gelu(self.first(input[order])))))[order.argsort()]


SQUARE = {"input": torch.randn(3, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))}
FIRST_HAS_NO_TARGET = torch.tensor([[-100, -100, -100], [0, 1, 2], [1, -100, 0]])
ORDERED = {"input": VECTORS["input"].clone()}
ORDERED["input"][:, 0] = torch.tensor([0.0, 1.0, 2.0])
LAST_TWO_SWAPPED = {"input": VECTORS["input"].clone()}
LAST_TWO_SWAPPED["input"][:, 0] = torch.tensor([0.0, 2.0, 1.0])
SHUFFLED = [
    Case("class_token", lambda: ClassToken(True), SQUARE, LABELS),
    Case("class_token_positions_first", lambda: ClassToken(False), SQUARE, LABELS),
    Case("positions_first", PositionsFirst, SQUARE, FIRST_HAS_NO_TARGET.flip(0)),
    Case("positions_first_without_target", PositionsFirst, SQUARE, FIRST_HAS_NO_TARGET),
    Case("sorting", Sorting, ORDERED, LABELS),
    Case("sorting_swapped", Sorting, LAST_TWO_SWAPPED, LABELS),
]


@each_kind
@pytest.mark.parametrize("layers", ["weights", "blocks"])
@pytest.mark.parametrize("case", SHUFFLED, ids=str)
def test_examples_are_told_apart_wherever_they_lie(case: Case, layers: Any, kind: Kind) -> None:
    found = forms(case, kind, layers=layers).values.T
    assert_agree(found, getattr(expected(case, layers=layers), kind), 1e-8)


@pytest.mark.parametrize("kind", ["hessian", "hessian_upper"])
def test_where_examples_lie_may_change_from_chunk_to_chunk(kind: Kind) -> None:
    model = find_sorting().model()
    x = torch.cat([ORDERED["input"], LAST_TWO_SWAPPED["input"]])
    batch = {"input": x, "labels": LABELS.repeat(2)}
    reference = perturbed_reference(model)
    chunked = layer_quadratic_forms(model, batch, reference, kind=kind, examples_at_once=3).values
    alone = layer_quadratic_forms(model, batch, reference, kind=kind, examples_at_once=1).values
    assert_agree(chunked.T, alone.T, 1e-8)


def find_sorting() -> Case:
    return next(case for case in SHUFFLED if case.name == "sorting")


SMOOTH_CONVOLUTIONS: dict[str, Callable[[], nn.Module]] = {
    "batch_norm": lambda: nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.SiLU(), nn.Conv2d(3, 3, 3), nn.Flatten(), nn.Linear(3, 3)
    ),
    "pointwise": lambda: nn.Sequential(
        nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.SiLU(), nn.Conv2d(3, 3, 5, groups=3), nn.BatchNorm2d(3), nn.Tanh(),
        nn.Flatten(), nn.Linear(3, 3),
    ),
    "valid": lambda: nn.Sequential(
        nn.Conv2d(2, 3, 3, padding="valid"), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3)
    ),
    "same": lambda: nn.Sequential(
        nn.Conv2d(2, 3, 3, padding="same", dilation=(1, 2)), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(3, 3),
    ),
    "group_norm": lambda: nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 3, 3), nn.Flatten(), nn.Linear(3, 3)
    ),
}  # fmt: skip


@functools.cache
def image_case(name: str) -> Case:
    # The second backward pass of group norm fails under vmap, in torch 2.13.
    path: oracle.Path = "row by row" if name == "group_norm" else "reverse over reverse"
    return Case(name, SMOOTH_CONVOLUTIONS[name], oracle.IMAGES, LABELS, path=path)


@each_kind
@pytest.mark.parametrize("rows", [[0], [1, 2], [0, 1, 2]])
@pytest.mark.parametrize("name", SMOOTH_CONVOLUTIONS)
def test_images_agree_with_the_oracle_alone_and_together(name: str, rows: list[int], kind: Kind) -> None:
    case = image_case(name)
    assert_agree(forms(case, kind, rows=rows).values.T, getattr(expected(case), kind)[:, rows], 1e-8)


# ------------------------------------------------------------------------------------------- precision and ordering


# Where a kink or a choice is within rounding, both precisions are right, each at its place.
SMOOTH_ENOUGH = [case for case in CASES if case.name != "tied_embedding"]


@pytest.mark.parametrize("case", SMOOTH_ENOUGH, ids=str)
def test_single_precision_is_close_to_double(case: Case) -> None:
    model, batch, reference = single(case)
    kinds: list[Kind] = ["hessian"] if case.name in NOT_TWICE else ["hessian", "hessian_upper"]
    found = [layer_quadratic_forms(model, batch, reference, kind=kind).values for kind in kinds]
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    model, batch, reference = model.double(), as_double(batch), as_double(reference)
    for kind, values in zip(kinds, found, strict=True):
        double = layer_quadratic_forms(model, batch, reference, kind=kind).values
        assert_agree(values.T, double.T, 1e-4)


@pytest.mark.parametrize("steps", [2, 5, EXACT])
@pytest.mark.parametrize("name", ["gelu", "conv2d", "attention", "tied_linear", "bert_tokens", "vit", "gpt2_causal"])
def test_the_positive_part_lies_between_the_form_and_the_sound_bound(name: str, steps: int) -> None:
    case = find_case(name)
    for dtype, slack in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        model, batch, reference = single(case)
        if dtype == torch.float64:
            model, batch, reference = model.double(), as_double(batch), as_double(reference)
        lower, positive, upper = (
            layer_quadratic_forms(model, batch, reference, kind=kind, lanczos_steps=steps).values
            for kind in ("hessian", "hessian_psd", "hessian_upper")
        )
        allowed = slack * upper.abs().amax(0)
        assert (lower <= positive + allowed).all()
        assert (positive <= upper + allowed).all()
        assert (positive >= 0).all()
        assert ((positive - lower) > 10 * allowed).any()  # there is something negative to leave out


def test_lanczos_needs_its_steps_and_the_gap_tells() -> None:
    case = find_case("bert")
    exact = expected(case).hessian_psd
    found = [forms(case, "hessian_psd", lanczos_steps=steps) for steps in (1, 3, 16, EXACT)]
    errors = [((f.values.T - exact).abs().amax(1) / exact.amax(1)).max().item() for f in found]
    assert errors[0] > 0.1
    assert errors[-1] < 1e-8
    assert errors == sorted(errors, reverse=True)
    assert found[1].gap is not None
    assert found[1].gap.max() > 1e-3 * exact.max()


def test_a_layer_that_did_not_move_has_no_curvature() -> None:
    case = find_case("bert")
    model = case.model()
    reference = perturbed_reference(model)
    still = "bert.encoder.layer.0.intermediate.dense.weight"
    reference[still] = model.get_parameter(still).detach().clone()
    for kind in KINDS:
        found = layer_quadratic_forms(model, batch_of(case), reference, kind=kind)
        assert (found.values[:, found.layers.index(still)] == 0).all()
        assert (found.values.abs().amax(0) > 0).sum() == len(found.layers) - 1


def test_the_direction_counts_squared_and_without_sign() -> None:
    case = find_case("gelu")
    model = case.model()
    reference = perturbed_reference(model)
    further = {name: model.state_dict()[name] - 3 * (model.state_dict()[name] - reference[name]) for name in reference}
    opposite = {name: 2 * model.state_dict()[name] - reference[name] for name in reference}
    for kind in KINDS:
        values = [
            layer_quadratic_forms(model, batch_of(case), given, kind=kind, lanczos_steps=EXACT).values
            for given in (reference, further, opposite)
        ]
        torch.testing.assert_close(values[1], 9 * values[0], rtol=1e-8, atol=1e-12)
        torch.testing.assert_close(values[2], values[0], rtol=1e-8, atol=1e-12)


def test_a_model_may_be_the_reference() -> None:
    case = find_case("bert")
    model, other = case.model(), case.model()
    other.load_state_dict(perturbed_reference(other))
    assert torch.equal(layer_quadratic_forms(model, batch_of(case), other).values, forms(case).values)


@pytest.mark.parametrize(
    "batch",
    [
        {"input": VECTORS["input"], "label": LABELS},
        (VECTORS["input"], LABELS),
        [VECTORS["input"], LABELS],
        ({"input": VECTORS["input"]}, LABELS),
        {"input": VECTORS["input"], "labels": LABELS.int()},
    ],
)
def test_batches_come_in_several_forms(batch: Any) -> None:
    case = find_case("gelu")
    model = case.model()
    assert torch.equal(layer_quadratic_forms(model, batch, perturbed_reference(model)).values, forms(case).values)
