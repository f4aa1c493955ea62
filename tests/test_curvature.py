"""Quadratic forms of every layer and example, against dense Hessians."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import oracle
import pytest
import torch
from oracle import CASES, LABELS, VECTORS, Apply, Case, Loss, assert_agree, find_case, layer_groups, perturbed_reference
from torch import Tensor, nn
from torch.nn import functional as F

from hf_robust_ft.corrected_loss import CorrectedLoss
from hf_robust_ft.curvature import (
    NotTwiceDifferentiable,
    QuadraticForms,
    elementwise_rules,
    layer_quadratic_forms,
    rules,
)
from hf_robust_ft.curvature.engine import Kind
from hf_robust_ft.curvature.local import Local, Rule, Tangents
from hf_robust_ft.curvature.tangent import Tangent
from hf_robust_ft.curvature.tape import Op, aten

KINDS: list[Kind] = ["hessian", "gauss_newton", "hessian_upper", "hessian_psd"]
EXACT = 1000
"""More Lanczos steps than any layer here has weights."""
# Operations without a second derivative in torch: only the sweep, which has rules for them, measures these.
NOT_TWICE = {"hardsigmoid", "embedding_bag"}

each_kind = pytest.mark.parametrize("kind", KINDS)


def batch_of(case: Case, rows: Sequence[int] = range(oracle.EXAMPLES)) -> dict[str, Tensor]:
    return {name: x[list(rows)] for name, x in {**case.inputs, "labels": case.labels}.items()}


def forms(case: Case, kind: Kind = "hessian", *, rows: Sequence[int] = range(3), **settings: Any) -> QuadraticForms:
    """Of a case around its perturbed reference, Lanczos to the end."""
    model = case.model()
    if case.name == "tied_embedding":  # a language model that the engine can't recognize
        settings.setdefault("loss", case.loss())
    settings.setdefault("lanczos_steps", EXACT)
    return layer_quadratic_forms(model, batch_of(case, rows), perturbed_reference(model), kind=kind, **settings)


@functools.cache
def expected(case: Case) -> oracle.Measures:
    return case.measure()


def tolerance(case: Case) -> float:
    return 1e-8 if case.tolerance < 1e-8 else max(1e-7, case.tolerance)


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
    "gelu", "tanh", "relu", "conv2d", "bert", "bert_tokens", "vit", "gpt2_causal", "token_labels", "tied_linear",
    "tied_embedding", "embedding", "gru", "dinov2_swiglu",
]  # fmt: skip


@each_kind
@pytest.mark.parametrize("correction", ["forward", "backward"])
@pytest.mark.parametrize("name", WITH_LOSSES)
def test_corrected_losses_agree_with_the_oracle(name: str, correction: Any, kind: Kind) -> None:
    case = find_case(name)
    transition = oracle.some_transition(case.classes).numpy()
    loss = CorrectedLoss(correction, transition, num_classes=case.classes, shift=case.shift)
    measures = case.measure(correction)
    assert_agree(forms(case, kind, loss=loss).values.T, getattr(measures, kind), tolerance(case))
    # The correction matters: plain cross entropy is something else.
    assert (getattr(measures, kind) - getattr(expected(case), kind)).abs().max() > 1e-5 or correction == "backward"


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


@each_kind
@pytest.mark.parametrize("loss", [Generalized, Smoothed, Margin])
@pytest.mark.parametrize("name", ["gelu", "conv2d", "bert", "bert_tokens", "gpt2_causal", "tied_embedding"])
def test_a_users_function_agrees_with_the_oracle(name: str, loss: type[Loss], kind: Kind) -> None:
    case, model = find_case(name), find_case(name).model()
    function = loss("plain", oracle.some_transition(case.classes), case.shift)
    measures = oracle.measure(
        model, case.inputs, case.labels, function, layer_groups(model), perturbed_reference(model)
    )
    assert_agree(forms(case, kind, loss=function).values.T, getattr(measures, kind), 1e-8)


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


@pytest.mark.parametrize("kind", ["hessian", "gauss_newton", "hessian_upper", "hessian_psd"])
@pytest.mark.parametrize(
    "name",
    [
        "gelu", "tied_linear", "products_of_weights", "transformer_layer_pre_norm", "multihead_attention", "bert",
        "bert_two_blocks", "albert", "gpt2_causal", "resnet", "vit", "lstm", "conv2d", "weight_norm",
    ],
)  # fmt: skip
def test_blocks_agree_with_the_oracle(name: str, kind: Kind) -> None:
    case, model = find_case(name), find_case(name).model()
    measures = case.measure(groups=oracle.block_groups(model))
    assert_agree(forms(case, kind, layers="blocks").values.T, getattr(measures, kind), 1e-8)


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
@pytest.mark.parametrize("name", ["tied_linear", "gpt2_causal", "tied_embedding", "albert", "products_of_weights"])
def test_all_weights_may_be_one_group(name: str, kind: Kind) -> None:
    case = find_case(name)
    found = forms(case, kind, layers={"all": "*"})
    measures = case.measure(groups=[[name for (name,) in layer_groups(case.model())]])
    assert_agree(found.values.T, getattr(measures, kind), 1e-8)


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
    "gelu", "layer_norm", "conv2d", "batch_norm2d", "group_norm", "conv1d", "attention", "multihead_attention",
    "transformer_layer_post_norm", "embedding", "embedding_padding", "token_labels", "tied_linear",
    "products_of_weights", "weight_norm", "gru", "bert", "bert_tokens", "vit", "gpt2", "gpt2_causal", "resnet",
    "swin", "deberta_v2", "mixtral_causal",
]  # fmt: skip
ORDERS = [[0, 1, 2], [2, 0], [1], [2, 1, 1, 0, 2, 0, 1]]


@each_kind
@pytest.mark.parametrize("name", STEADY)
def test_an_example_gives_the_same_in_any_batch(name: str, kind: Kind) -> None:
    case = find_case(name)
    expected_values = getattr(expected(case), kind)
    for rows in ORDERS[1:]:
        found = forms(case, kind, rows=rows).values
        assert_agree(found.T, expected_values[:, rows], tolerance(case))


@each_kind
@pytest.mark.parametrize("name", ["gelu", "conv2d", "embedding", "bert_two_blocks", "gpt2_causal", "products_of_weights"])
def test_chunks_do_not_matter(name: str, kind: Kind) -> None:
    case, rows = find_case(name), ORDERS[-1]
    expected_values = getattr(expected(case), kind)[:, rows]
    for examples, directions in itertools.product((1, 2, 3, 100), (None, 1, 3, 100)):
        if directions is None or kind in ("hessian", "gauss_newton"):
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
    model = case.model()
    groups = layer_groups(model) if layers == "weights" else oracle.block_groups(model)
    measures = case.measure(groups=groups)
    assert_agree(forms(case, kind, layers=layers).values.T, getattr(measures, kind), 1e-8)


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


@each_kind
@pytest.mark.parametrize("rows", [[0], [1, 2], [0, 1, 2]])
@pytest.mark.parametrize("name", SMOOTH_CONVOLUTIONS)
def test_images_agree_with_the_oracle_alone_and_together(name: str, rows: list[int], kind: Kind) -> None:
    path: oracle.Path = "row by row" if name == "group_norm" else "reverse over reverse"
    case = Case(name, SMOOTH_CONVOLUTIONS[name], oracle.IMAGES, LABELS, path=path)
    assert_agree(forms(case, kind, rows=rows).values.T, getattr(case.measure(), kind)[:, rows], 1e-8)


# ------------------------------------------------------------------------------------------- precision and ordering


def single(case: Case) -> tuple[nn.Module, dict[str, Tensor], dict[str, Tensor]]:
    """Model, batch and reference of a case in float32."""
    model = case.model().float()
    batch = {name: x.float() if x.is_floating_point() else x for name, x in batch_of(case).items()}
    return model, batch, perturbed_reference(model)


def as_double(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.double() if x.is_floating_point() else x for name, x in tensors.items()}


# Where a kink or a choice is within rounding, both precisions are right, each at its place.
SMOOTH_ENOUGH = [case for case in CASES if case.name != "tied_embedding"]


@pytest.mark.parametrize("kind", ["hessian", "hessian_upper"])
@pytest.mark.parametrize("case", SMOOTH_ENOUGH, ids=str)
def test_single_precision_is_close_to_double(case: Case, kind: Kind) -> None:
    if case.name in NOT_TWICE and kind == "hessian_upper":
        pytest.skip("not twice differentiable")
    model, batch, reference = single(case)
    found = layer_quadratic_forms(model, batch, reference, kind=kind).values
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    double = layer_quadratic_forms(model.double(), as_double(batch), as_double(reference), kind=kind).values
    assert_agree(found.T, double.T, 1e-4)


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


# ------------------------------------------------------------------------------------------------- self-check and notes


def test_rules_leave_no_note() -> None:
    for name in ("gelu", "conv2d", "batch_norm2d", "bert", "vit", "gpt2_causal", "swin", "deberta_v2"):
        assert forms(find_case(name)).notes == ()


@pytest.mark.parametrize(
    ("name", "note"),
    [
        ("amax", "amax.* has no rule: autograd differentiates it along each direction"),
        ("cumsum_cumprod", "cumprod.* has no rule"),
        ("bilinear", "_trilinear.* has no rule"),
        ("convnext", None),
        ("instance_norm", "statistics from its input: all derivatives are taken by autograd"),
        ("inplace_ops", "copy_.* changes a tensor in place through a view: all derivatives"),
        ("lstm", "in place through a view: all derivatives"),
        ("custom_function", "custom autograd.Function.*: all derivatives"),
        ("custom_function_old_style", "custom autograd.Function.*: all derivatives"),
    ],
)
def test_what_has_no_rule_is_named(name: str, note: str | None) -> None:
    found = forms(find_case(name))
    assert_agree(found.values.T, expected(find_case(name)).hessian, 1e-8)
    assert (len(found.notes) == 1 and re.search(note, found.notes[0])) if note else found.notes == ()


OTHERS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "two results": (lambda x: sum(torch.var_mean(x, -1, keepdim=True), x), "var_mean.* has several results and no rule"),
    "sinc": (lambda x: torch.sinc(x) * x, "sinc.* has no rule"),
    "determinant": (lambda x: x * torch.linalg.det(x.view(-1, 2, 2)).unsqueeze(-1), "linalg_det"),
    "inverse": (lambda x: torch.linalg.inv(x.view(-1, 2, 2) + 3 * torch.eye(2).double()).flatten(1), "linalg_inv"),
}


@each_kind
@pytest.mark.parametrize("name", OTHERS)
def test_operations_that_nobody_thought_of_are_named_and_right(name: str, kind: Kind) -> None:
    function, note = OTHERS[name]
    case = Case(name, lambda: oracle._mlp(nn.Sequential(nn.Tanh(), Apply(function))), VECTORS, LABELS)
    found = forms(case, kind)
    assert_agree(found.values.T, getattr(case.measure(), kind), 1e-8)
    assert any(note.partition(".*")[0] in said for said in found.notes) == (kind in ("hessian", "gauss_newton"))


def wrong_bend(factor: float) -> Rule:
    """The right first derivative, and a wrong second one."""

    def rule(op: Op, tangents: Tangents, local: Local) -> Sequence[Tangent | None]:
        own = Local(torch.zeros_like(local.values))
        result = RIGHT(op, tangents, own)
        local.values += factor * own.values
        return result

    return rule


def wrong_slope(op: Op, tangents: Tangents, local: Local) -> Sequence[Tangent | None]:
    return [t and Tangent(t.directions, 1.01 * t.data) for t in RIGHT(op, tangents, local)]


RIGHT = elementwise_rules.pointwise
WRONG: dict[str, Rule] = {"bend": wrong_bend(1.01), "no bend": wrong_bend(0), "slope": wrong_slope}


@pytest.fixture
def replaced_gelu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "POINTWISE", rules.POINTWISE - {aten.gelu})
    monkeypatch.setitem(rules.NORMS, aten.gelu, WRONG[request.param])


each_wrong_rule = pytest.mark.parametrize("replaced_gelu", WRONG, indirect=True)


@each_wrong_rule
@pytest.mark.parametrize("kind", ["hessian", "gauss_newton"])
@pytest.mark.parametrize("name", ["gelu", "conv2d", "bert", "vit", "token_labels"])
def test_a_wrong_rule_is_noticed_and_not_used(name: str, kind: Kind, replaced_gelu: None) -> None:
    case = find_case(name)
    for layers, groups in (("weights", layer_groups), ("blocks", oracle.block_groups)):
        found = forms(case, kind, layers=layers)
        assert found.notes == ("the sweep and autograd differ on the first example: all derivatives are taken by autograd",)
        assert_agree(found.values.T, getattr(case.measure(groups=groups(case.model())), kind), 1e-8)


@pytest.mark.parametrize("replaced_gelu", ["no bend", "slope"], indirect=True)
def test_a_wrong_rule_is_noticed_in_single_precision(replaced_gelu: None) -> None:
    model, batch, reference = single(find_case("gelu"))
    found = layer_quadratic_forms(model, batch, reference)
    assert "differ" in found.notes[0]
    assert_agree(found.values.T, expected(find_case("gelu")).hessian, 1e-4)


@each_wrong_rule
def test_a_wrong_rule_is_noticed_though_the_first_example_has_no_target(replaced_gelu: None) -> None:
    case = find_case("token_labels")
    found = forms(case, rows=[2, 0, 1])
    assert_agree(found.values.T, expected(case).hessian[:, [2, 0, 1]], 1e-8)


def test_a_right_rule_passes_for_a_wrong_one_nowhere() -> None:
    notes = {case.name: forms(case).notes for case in CASES}
    assert [name for name, said in notes.items() if any("differ" in note for note in said)] == []
