"""Where the sweep's rules end: what has none is named, and a wrong one is noticed; the numbers stay right."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import oracle
import pytest
import torch
from measured import each_kind, expected, forms, single
from oracle import CASES, LABELS, VECTORS, Apply, Case, assert_agree, find_case
from torch import Tensor, nn
from torch.nn import functional as F

from hf_robust_ft.curvature import elementwise_rules, layer_quadratic_forms, rules
from hf_robust_ft.curvature.engine import Kind
from hf_robust_ft.curvature.local import Local, Rule, Tangents
from hf_robust_ft.curvature.tangent import Tangent
from hf_robust_ft.curvature.tape import Op, aten


def test_rules_leave_no_note() -> None:
    for name in ("gelu", "conv2d", "batch_norm2d", "bert", "vit", "gpt2_causal", "swin"):
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
    "two results": (
        lambda x: sum(torch.var_mean(x, -1, keepdim=True), x),
        "var_mean.* has several results and no rule",
    ),
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
    if kind in ("hessian", "gauss_newton"):
        assert any(re.search(note, said) for said in found.notes)


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


DISAGREE = "the sweep and autograd differ .*: all derivatives are taken by autograd"
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
    for layers in ("weights", "blocks"):
        found = forms(case, kind, layers=layers)
        assert len(found.notes) == 1
        assert re.search(DISAGREE, found.notes[0])
        assert_agree(found.values.T, getattr(expected(case, layers=layers), kind), 1e-8)


@pytest.mark.parametrize("replaced_gelu", ["no bend", "slope"], indirect=True)
def test_a_wrong_rule_is_noticed_in_single_precision(replaced_gelu: None) -> None:
    model, batch, reference = single(find_case("gelu"))
    found = layer_quadratic_forms(model, batch, reference)
    assert re.search(DISAGREE, found.notes[0])
    assert_agree(found.values.T, expected(find_case("gelu")).hessian, 1e-4)


@each_wrong_rule
def test_a_wrong_rule_is_noticed_though_the_first_example_has_no_target(replaced_gelu: None) -> None:
    case = find_case("token_labels")
    found = forms(case, rows=[2, 0, 1])
    assert_agree(found.values.T, expected(case).hessian[:, [2, 0, 1]], 1e-8)


class Branches(nn.Module):
    """One branch that never meets gelu, and joins first, and one that does."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, input: Tensor) -> Tensor:
        left = torch.tanh(torch.tanh(torch.tanh(self.left(input))))
        return self.head(left + F.gelu(self.right(input)))


@each_wrong_rule
def test_a_wrong_rule_of_a_branch_is_noticed(replaced_gelu: None) -> None:
    case = Case("branches", Branches, VECTORS, LABELS)
    found = forms(case)
    assert re.search(DISAGREE, found.notes[0])
    assert_agree(found.values.T, expected(case).hessian, 1e-8)


def test_a_right_rule_passes_for_a_wrong_one_nowhere() -> None:
    notes = {case.name: forms(case).notes for case in CASES}
    assert [name for name, said in notes.items() if any(re.search(DISAGREE, note) for note in said)] == []
