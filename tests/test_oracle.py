"""The oracle of curvature against what does not share its code: finite differences, closed forms, other paths."""

from __future__ import annotations

import functools

import oracle
import pytest
import torch
from oracle import CASES, Case, Loss, LossKind, assert_agree, find_case, layer_groups, perturbed_reference
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import hf_robust_ft

KINDS: list[LossKind] = ["plain", "forward", "backward"]
each_case = pytest.mark.parametrize("case", CASES, ids=str)
each_kind = pytest.mark.parametrize("kind", KINDS)


@functools.cache
def hessians_of(case: Case) -> list[Tensor]:
    """Of every layer, under the forward-corrected loss: the one whose logit Hessian is indefinite."""
    model = case.model()
    groups = layer_groups(model)
    return oracle.dense_hessians(model, case.inputs, case.labels, case.loss("forward"), groups, path=case.path)


def relative(error: Tensor, scale: Tensor) -> float:
    return float(error.abs().max() / scale.abs().max().clamp(min=1e-8))


# ------------------------------------------------------------------------------------------------------ Hessians


@pytest.mark.parametrize("case", [case for case in CASES if case.functional], ids=str)
def test_forward_over_reverse_agrees(case: Case) -> None:
    model = case.model()
    others = oracle.dense_hessians(
        model, case.inputs, case.labels, case.loss("forward"), layer_groups(model), path="forward over reverse"
    )
    for hessian, other in zip(hessians_of(case), others, strict=True):
        assert relative(hessian - other, hessian) < max(1e-10, case.tolerance / 10)


@each_case
def test_hessians_are_symmetric_small_and_not_trivial(case: Case) -> None:
    for name, hessian in zip(layer_groups(case.model()), hessians_of(case), strict=True):
        assert hessian.dtype == torch.float64
        assert hessian.shape[-1] <= 200
        assert relative(hessian - hessian.mT, hessian) < max(1e-9, case.tolerance / 10)
        assert hessian.abs().max() > 1e-4 or name == ["spare.weight"]


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.path != "differences" and not case.stops_gradient], ids=str
)
def test_differences_of_the_gradient_agree(case: Case) -> None:
    model = case.model()
    function = oracle.function_of_weights(model)
    batches = list(oracle.one_at_a_time(case.inputs, case.labels))
    generator = torch.Generator().manual_seed(3)
    with sdpa_kernel(SDPBackend.MATH):
        for index, (group, hessian) in enumerate(zip(layer_groups(model), hessians_of(case), strict=True)):
            u = torch.randn(hessian.shape[-1], dtype=torch.float64, generator=generator)
            u /= u.norm()
            example, label = batches[index % len(batches)]
            product = oracle.difference_product(function, example, label, case.loss("forward"), group, u)
            # Where the model computes in float32, a step of 1e-3 leaves three digits.
            allowed = 1e-7 if case.tolerance < 1e-8 else 1e-2
            assert relative(product - hessian[index % len(batches)] @ u, hessian) < allowed


def second_differences(case: Case, model: nn.Module, group: list[str], v: Tensor) -> Tensor:
    """``φ''(0)`` of ``φ(s) = ℓ(W + s v)`` for each example, of values alone and all examples in one batch."""
    weights = oracle.weights_of(model, group)
    start = torch.nn.utils.parameters_to_vector(weights).detach()
    h = 0.003 if case.tolerance < 1e-8 else 0.1

    def losses(s: float) -> Tensor:
        torch.nn.utils.vector_to_parameters(start + s * v, weights)
        with torch.no_grad():
            return case.loss("forward")(oracle.logits_of(model(**case.inputs)), case.labels)

    second = (16 * (losses(h) + losses(-h)) - losses(2 * h) - losses(-2 * h) - 30 * losses(0.0)) / (12 * h * h)
    torch.nn.utils.vector_to_parameters(start, weights)
    return second


@each_case
def test_second_differences_of_the_loss_agree(case: Case) -> None:
    model = case.model()
    groups = layer_groups(model)
    vs = oracle.directions(model, perturbed_reference(model), groups)
    for group, hessian, v in zip(groups, hessians_of(case), vs, strict=True):
        error = (second_differences(case, model, group, v) - oracle.quadratic(hessian, v)).abs().max()
        scale = (v.norm() * (hessian @ v).norm(dim=-1)).max()
        if case.stops_gradient and group != groups[-1]:  # all but the head act through what is detached
            assert error > 0.1 * scale
        else:
            relative_part, absolute_part = (1e-6, 1e-9) if case.tolerance < 1e-8 else (2e-2, 3e-5)
            assert error < relative_part * scale + absolute_part


@pytest.mark.parametrize("name", ["gelu", "conv2d", "gru", "tied_embedding", "bert", "gpt2_causal"])
def test_row_by_row_agrees(name: str) -> None:
    case = find_case(name)
    model = case.model()
    others = oracle.dense_hessians(
        model, case.inputs, case.labels, case.loss("forward"), layer_groups(model), path="row by row"
    )
    for hessian, other in zip(hessians_of(case), others, strict=True):
        assert relative(hessian - other, hessian) < 1e-12


def test_differences_agree_in_every_column() -> None:
    case = find_case("attention")
    model = case.model()
    others = oracle.dense_hessians(
        model, case.inputs, case.labels, case.loss("forward"), layer_groups(model), path="differences"
    )
    for hessian, other in zip(hessians_of(case), others, strict=True):
        assert relative(hessian - other, hessian) < 1e-8


@pytest.mark.parametrize(
    "name", ["tied_linear", "products_of_weights", "transformer_layer_pre_norm", "bert_two_blocks"]
)
def test_the_hessian_of_a_layer_is_a_block_of_its_groups_hessian(name: str) -> None:
    case = find_case(name)
    model = case.model()
    groups = oracle.block_groups(model)
    found = oracle.dense_hessians(model, case.inputs, case.labels, case.loss("forward"), groups)
    of_layer = dict(zip([name for (name,) in layer_groups(model)], hessians_of(case), strict=True))
    for group, hessian in zip(groups, found, strict=True):
        start = 0
        for layer in group:
            stop = start + model.get_parameter(layer).numel()
            torch.testing.assert_close(hessian[:, start:stop, start:stop], of_layer[layer], rtol=0, atol=1e-12)
            start = stop
        assert start == hessian.shape[-1]


def test_tied_names_count_once() -> None:
    case = find_case("tied_linear")
    model = case.model()
    both = ["inner.weight", "head.weight"]
    paths: tuple[oracle.Path, ...] = ("reverse over reverse", "forward over reverse")
    for path in paths:
        for group in (both, both[::-1], both[1:]):
            (hessian,) = oracle.dense_hessians(
                model, case.inputs, case.labels, case.loss("forward"), [group], path=path
            )
            torch.testing.assert_close(hessian, hessians_of(case)[0], rtol=0, atol=1e-12)
    (v,) = oracle.directions(model, perturbed_reference(model), [both])
    assert v.shape == (16,)


def test_the_row_of_the_padding_token_counts() -> None:
    case = find_case("embedding_padding")
    assert (case.inputs["input"] == 0).any(1).tolist() == [False, True, True]
    in_first_row = hessians_of(case)[0][:, :3, :3].flatten(1).abs().amax(1)
    assert in_first_row[0] == 0
    assert (in_first_row[1:] > 1e-4).all()


@each_case
def test_the_measured_copy_computes_the_same(case: Case) -> None:
    model = case.model().train()
    copied = oracle.function_of_weights(model)
    assert model.training
    assert not copied.training
    with torch.no_grad():
        expected = oracle.logits_of(model.eval()(**case.inputs))
        found = torch.cat([oracle.logits_of(copied(**x)) for x, _ in oracle.one_at_a_time(case.inputs)])
    assert found.dtype == torch.float64
    assert found.shape[-1] == case.classes
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11 if case.tolerance < 1e-8 else 1e-5)


def test_a_model_in_single_precision_is_measured_in_double() -> None:
    case = find_case("gelu")
    single = case.model().float().train()
    inputs = {name: x.float() for name, x in case.inputs.items()}
    rounded = {name: x.double() for name, x in inputs.items()}
    loss, groups = case.loss("forward"), layer_groups(single)
    found = oracle.dense_hessians(single, inputs, case.labels, loss, groups)
    expected = oracle.dense_hessians(single.double().eval(), rounded, case.labels, loss, groups)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# -------------------------------------------------------------------------------------------------------- losses


@each_kind
def test_losses_are_the_packages(kind: LossKind) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(4, 5, 3, dtype=torch.float64, generator=generator)
    labels = torch.randint(3, (4, 5), generator=generator)
    labels[torch.rand(4, 5, generator=generator) < 0.3] = oracle.IGNORED
    labels[3] = oracle.IGNORED
    loss = Loss(kind, oracle.some_transition(3))
    of_each_target = {
        "plain": lambda: hf_robust_ft.cross_entropy(logits, labels),
        "forward": lambda: hf_robust_ft.forward_corrected(logits, labels, loss.transition),
        "backward": lambda: hf_robust_ft.backward_corrected(logits, labels, torch.linalg.inv(loss.transition)),
    }[kind]()
    expected = [float(of_each_target[i].sum() / max(1, int((labels[i] >= 0).sum()))) for i in range(4)]
    torch.testing.assert_close(loss(logits, labels).tolist(), expected, rtol=0, atol=1e-12)
    assert expected[3] == 0
    shifted = Loss(kind, loss.transition, shift=True)
    torch.testing.assert_close(shifted(logits, labels), loss(logits[:, :-1], labels[:, 1:]), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["bert", "bert_tokens", "gpt2", "gpt2_causal", "vit"])
def test_the_plain_loss_is_that_of_transformers(name: str) -> None:
    case = find_case(name)
    model = case.model()
    for (example, label), expected in zip(
        oracle.one_at_a_time(case.inputs, case.labels),
        case.loss("plain")(model(**case.inputs).logits, case.labels),
        strict=True,
    ):
        torch.testing.assert_close(model(**example, labels=label).loss.double(), expected, rtol=0, atol=1e-6)


def test_the_identity_corrects_nothing() -> None:
    case = find_case("gelu")
    logits, tangent = 3 * torch.eye(3, dtype=torch.float64), torch.ones(3, 3, dtype=torch.float64).tril()
    plain, *corrected = (Loss(kind, torch.eye(3, dtype=torch.float64)) for kind in KINDS)
    for loss in corrected:
        torch.testing.assert_close(loss(logits, case.labels), plain(logits, case.labels))
        torch.testing.assert_close(
            loss.gauss_newton(logits, case.labels, tangent), plain.gauss_newton(logits, case.labels, tangent)
        )


@pytest.mark.parametrize("shift", [False, True])
@each_kind
def test_gauss_newton_is_its_closed_form(kind: LossKind, shift: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, tangent = torch.randn(2, 2, 4, 3, dtype=torch.float64, generator=generator)
    labels = torch.tensor([[0, oracle.IGNORED, 2, 1], [oracle.IGNORED, oracle.IGNORED, oracle.IGNORED, 1]])
    loss = Loss(kind, oracle.some_transition(3), shift)
    expected = torch.zeros(2, dtype=torch.float64)
    for i in range(2):
        targets = 0
        for position in range(4 - shift):
            if labels[i, position + shift] == oracle.IGNORED:
                continue
            p = logits[i, position].softmax(-1)
            covariance = p.diag() - p.outer(p)
            # dq/dz = Tᵀ (diag p - p pᵀ), and the Fisher information of a distribution q is diag 1/q.
            change = loss.transition.T @ covariance
            fisher = change.T @ (1 / (loss.transition.T @ p)).diag() @ change
            expected[i] += tangent[i, position] @ (fisher if kind == "forward" else covariance) @ tangent[i, position]
            targets += 1
        expected[i] /= max(1, targets)
    torch.testing.assert_close(loss.gauss_newton(logits, labels, tangent), expected, rtol=0, atol=1e-12)


def test_the_fisher_information_is_the_expected_hessian() -> None:
    logits, tangent = torch.tensor([[0.5, -1.0, 2.0]]).double(), torch.tensor([[1.0, 2.0, -0.5]]).double()
    loss = Loss("forward", oracle.some_transition(3))
    q = torch.exp(-loss.of_every_label(logits))[0]
    curvatures = [
        tangent[0] @ torch.autograd.functional.hessian(lambda z, y=y: loss.of_every_label(z)[y], logits[0]) @ tangent[0]
        for y in range(3)
    ]
    expected = (q * torch.stack(curvatures)).sum()
    torch.testing.assert_close(loss.gauss_newton(logits, torch.tensor([1]), tangent)[0], expected, rtol=0, atol=1e-12)
    assert min(curvatures) < 0


# ------------------------------------------------------------------------------------------------------ measures


def test_softmax_regression_has_a_closed_form() -> None:
    case = find_case("softmax_regression")
    model = case.model()
    groups = layer_groups(model)
    x = case.inputs["input"]
    p = model(**case.inputs).softmax(-1).detach()
    expected = torch.stack(
        [torch.kron(p[i].diag() - p[i].outer(p[i]), x[i].outer(x[i])) for i in range(oracle.EXAMPLES)]
    )
    for kind in ("plain", "backward"):
        (found,) = oracle.dense_hessians(model, case.inputs, case.labels, case.loss(kind), groups)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        measures = case.measure(kind)
        assert_agree(measures.hessian_psd, measures.hessian, 1e-12)
        assert_agree(measures.gauss_newton, measures.hessian, 1e-12)
        assert_agree(measures.trace, torch.einsum("bpp->b", expected)[None], 1e-12)


@each_kind
@pytest.mark.parametrize("name", ["tanh", "token_labels", "tied_embedding", "attention", "vit"])
def test_measures_are_in_order(name: str, kind: LossKind) -> None:
    measures = find_case(name).measure(kind)
    assert (measures.hessian <= measures.hessian_psd + 1e-12).all()
    assert (measures.hessian_psd <= measures.hessian_upper + 1e-12).all()
    assert (measures.hessian_psd >= 0).all()
    assert (measures.gauss_newton >= -1e-12).all()
    assert (measures.hessian_psd - measures.hessian).max() > 1e-5  # there is something negative to leave out


@pytest.mark.parametrize("name", ["tanh", "bert"])
def test_the_positive_part_by_polar_decomposition(name: str) -> None:
    case = find_case(name)
    for hessian in hessians_of(case):
        v = torch.linspace(-1, 1, hessian.shape[-1], dtype=torch.float64)
        _, singular, right = torch.linalg.svd(hessian)
        absolute = right.mT @ torch.diag_embed(singular) @ right  # H = U S Vᵀ = (U Vᵀ)(V S Vᵀ)
        expected = oracle.quadratic((hessian + absolute) / 2, v)
        torch.testing.assert_close(oracle.quadratic_psd(hessian, v), expected, rtol=1e-9, atol=1e-12)


@each_case
def test_tangents_of_the_logits_are_their_differences(case: Case) -> None:
    model = case.model()
    groups = layer_groups(model)
    logits, jacobians = oracle.dense_jacobians(model, case.inputs, groups)
    h = 1e-4 if case.tolerance < 1e-8 else 1e-2
    for group, jacobian, v in zip(
        groups, jacobians, oracle.directions(model, perturbed_reference(model), groups), strict=True
    ):
        weights = oracle.weights_of(model, group)
        start = torch.nn.utils.parameters_to_vector(weights).detach()
        moved = []
        for step in (h, -h, 0.0):
            torch.nn.utils.vector_to_parameters(start + step * v, weights)
            moved.append(oracle.logits_of(model(**case.inputs)).detach())
        tangent = (jacobian @ v).reshape(logits.shape)
        torch.testing.assert_close(logits, moved[2], rtol=0, atol=1e-11 if case.tolerance < 1e-8 else 1e-5)
        if not case.stops_gradient:
            assert relative((moved[0] - moved[1]) / (2 * h) - tangent, tangent) < (1e-5 if h == 1e-4 else 1e-2)


@each_kind
def test_measures_are_of_the_dense_hessian(kind: LossKind) -> None:
    case = find_case("bert_tokens")
    model = case.model()
    groups, reference, loss = layer_groups(model), perturbed_reference(model), case.loss(kind)
    measures = case.measure(kind)
    hessians = oracle.dense_hessians(model, case.inputs, case.labels, loss, groups)
    logits, jacobians = oracle.dense_jacobians(model, case.inputs, groups)
    for g, (name,) in enumerate(groups):
        v = (model.get_parameter(name).detach() - reference[name]).flatten()
        for i in range(oracle.EXAMPLES):
            h = hessians[g][i]
            assert measures.hessian[g, i].item() == pytest.approx((v @ h @ v).item(), abs=1e-12)
            upper = (v @ h @ v + v.norm() * (h @ v).norm()) / 2
            assert measures.hessian_upper[g, i].item() == pytest.approx(upper.item(), abs=1e-12)
            assert measures.trace[g, i].item() == pytest.approx(torch.linalg.eigvalsh(h).sum().item(), abs=1e-12)
        form = loss.gauss_newton(logits, case.labels, (jacobians[g] @ v).reshape(logits.shape))
        torch.testing.assert_close(measures.gauss_newton[g], form, rtol=0, atol=1e-12)


def test_an_example_without_targets_has_no_curvature() -> None:
    measures = find_case("token_labels").measure("forward")
    for values in (measures.hessian, measures.hessian_upper, measures.hessian_psd, measures.gauss_newton):
        assert (values[:, -1] == 0).all()
        assert (values[:, 0] != 0).all()


def test_agreement_is_by_group() -> None:
    expected = torch.tensor([[1e3, 1.0], [1e-3, 0.0], [0.0, 0.0]]).double()
    assert_agree(expected + torch.tensor([[0.0, 1e-7], [0.0, 0.0], [0.0, 1e-13]]), expected, 1e-9)
    for wrong in (expected + torch.tensor([[0.0], [1e-7], [0.0]]), torch.full_like(expected, torch.nan)):
        with pytest.raises(AssertionError, match="group 1: off by"):
            assert_agree(wrong, expected, 1e-9)


# ----------------------------------------------------------------------------------------- reference and cases


def test_the_reference_is_deterministic_and_keeps_ties_and_buffers() -> None:
    model = find_case("gpt2_causal").model()
    first, second = perturbed_reference(model), perturbed_reference(model)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first.keys() == model.state_dict().keys()
    assert torch.equal(first["lm_head.weight"], first["transformer.wte.weight"])
    offset = first["lm_head.weight"] - model.get_parameter("lm_head.weight")
    assert 0.05 < offset.std() < 0.2
    assert not torch.equal(first["lm_head.weight"], perturbed_reference(model, seed=1)["lm_head.weight"])
    torch.testing.assert_close(
        perturbed_reference(model, scale=1.0)["lm_head.weight"] - model.get_parameter("lm_head.weight"), 10 * offset
    )
    norms = find_case("batch_norm").model()
    for name, buffer in norms.named_buffers():
        assert torch.equal(perturbed_reference(norms)[name], buffer)


def test_cases_are_reproducible_and_named_once() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    for case in CASES[:3]:
        first, second = case.model(), case.model()
        assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
        assert isinstance(first, nn.Module)
        assert not first.training
