"""What a measurement leaves as it was, and what it refuses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from measured import KINDS, Snapshot, batch_of, each_kind, expected, forms, single
from oracle import IMAGES, LABELS, VECTORS, Apply, Case, assert_agree, find_case, perturbed_reference
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_robust_ft import ReferenceMismatch
from hf_robust_ft.corrected_loss import CorrectedLoss
from hf_robust_ft.curvature import NonFiniteLoss, NotTwiceDifferentiable, layer_quadratic_forms
from hf_robust_ft.curvature.directions import group_layers
from hf_robust_ft.curvature.engine import Kind
from hf_robust_ft.curvature.model import Weights, measuring
from hf_robust_ft.curvature.tape import Widest

GELU = find_case("gelu")
UNTOUCHED = [
    "gelu", "relu_inplace", "batch_norm", "resnet", "tied_linear", "tied_embedding", "embedding_padding", "bert",
    "vit_eager", "gpt2_causal", "albert", "weight_norm", "lstm", "unused_and_frozen", "custom_function", "dropout",
]  # fmt: skip


def in_training(case: Case) -> nn.Module:
    """In the midst of a training: some modules in train mode and some not, gradients on some parameters."""
    model = case.model().train()
    for module in list(model.modules())[1::2]:
        module.training = False
    for parameter in list(model.parameters())[::2]:
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    return model


def loss_of(case: Case) -> oracle.Loss | None:
    return case.loss() if case.name == "tied_embedding" else None


@each_kind
@pytest.mark.parametrize("name", UNTOUCHED)
def test_the_model_stays_as_it_was(name: str, kind: Kind) -> None:
    case = find_case(name)
    model, reference = in_training(case), perturbed_reference(case.model())
    batch, before = batch_of(case), Snapshot(model)
    given = {key: x.clone() for key, x in {**batch, **reference}.items()}
    layer_quadratic_forms(model, batch, reference, kind=kind, loss=loss_of(case))
    before.check()
    assert all(torch.equal(given[key], x) for key, x in {**batch, **reference}.items())


@pytest.mark.parametrize("name", ["gelu", "batch_norm", "embedding_padding", "bert", "gpt2_causal", "tied_linear"])
@pytest.mark.parametrize("calls", [0, 1, 2])
@each_kind
def test_the_model_stays_as_it_was_after_an_error(name: str, calls: int, kind: Kind) -> None:
    case = find_case(name)
    model = in_training(case)
    before = Snapshot(model)
    seen = []

    def failing(logits: Tensor, labels: Tensor) -> Tensor:
        if len(seen) == calls:
            raise ArithmeticError("on purpose")
        seen.append(1)
        return case.loss()(logits, labels)

    with pytest.raises(ArithmeticError, match="on purpose"):
        layer_quadratic_forms(
            model, batch_of(case), perturbed_reference(model), kind=kind, loss=failing, examples_at_once=1
        )
    before.check()


def test_the_model_stays_as_it_was_after_an_interrupt() -> None:
    class Interrupted(nn.Sequential):
        def forward(self, input: Tensor) -> Tensor:
            raise KeyboardInterrupt

    model = Interrupted(nn.Dropout(), nn.Linear(4, 3)).double()
    before = Snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        layer_quadratic_forms(model, (VECTORS["input"], LABELS), copy.deepcopy(model))
    before.check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_module_that_stands_in_two_places_stays_as_it_was(dtype: torch.dtype) -> None:
    shared = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh())
    model = nn.Sequential(shared, shared, nn.Linear(4, 3)).to(dtype)
    before = Snapshot(model)
    layer_quadratic_forms(model, (VECTORS["input"].to(dtype), LABELS), perturbed_reference(model))
    before.check()


@pytest.mark.parametrize("name", ["dropout", "batch_norm", "bert", "resnet"])
def test_measured_in_eval_mode(name: str) -> None:
    case = find_case(name)
    model = case.model().train()
    found = layer_quadratic_forms(model, batch_of(case), perturbed_reference(model)).values
    assert_agree(found.T, expected(case).hessian, 1e-8)


@each_kind
@pytest.mark.parametrize("name", ["gelu", "bert", "lstm", "tied_linear"])
@pytest.mark.parametrize(
    "around",
    [
        torch.no_grad,
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: torch.set_grad_enabled(True),
        lambda: sdpa_kernel(SDPBackend.FLASH_ATTENTION),
    ],
    ids=["no_grad", "autocast", "grad", "flash attention"],
)
def test_the_callers_modes_do_not_matter(name: str, kind: Kind, around: Callable[[], Any]) -> None:
    # In float32, as autocast leaves float64 alone.
    model, batch, reference = single(find_case(name))
    outside = layer_quadratic_forms(model, batch, reference, kind=kind).values
    with around():
        inside = layer_quadratic_forms(model, batch, reference, kind=kind).values
    assert_agree(inside.T, outside.T, 1e-5)


def test_the_default_type_does_not_matter() -> None:
    case = find_case("bert")
    model, reference = case.model(), perturbed_reference(case.model())
    torch.set_default_dtype(torch.float64)
    try:
        found = [layer_quadratic_forms(model, batch_of(case), reference, kind=kind).values for kind in KINDS]
    finally:
        torch.set_default_dtype(torch.float32)
    for kind, values in zip(KINDS[:3], found[:3], strict=True):
        assert_agree(values.T, getattr(expected(case), kind), 1e-8)


def test_hooks_of_the_user_run_on_and_stay() -> None:
    model = GELU.model()
    shapes: list[Any] = []
    handle = model[0].register_forward_hook(lambda module, args, out: shapes.append(out.shape))
    values = layer_quadratic_forms(model, batch_of(GELU), perturbed_reference(model)).values
    assert_agree(values.T, expected(GELU).hessian, 1e-8)
    before = len(shapes)
    model(**GELU.inputs)
    assert len(shapes) == before + 1 > 1
    handle.remove()


def test_inputs_that_require_a_gradient_get_none() -> None:
    x = VECTORS["input"].clone().requires_grad_()
    model = GELU.model()
    for kind in KINDS:
        found = layer_quadratic_forms(model, (x, LABELS), perturbed_reference(model), kind=kind, lanczos_steps=100)
        assert_agree(found.values.T, getattr(expected(GELU), kind), 1e-8)
    assert x.grad is None


def test_an_embedding_of_ones_own_counts_its_padding_row_too() -> None:
    class Scaled(nn.Embedding):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    def model() -> nn.Module:
        return nn.Sequential(Scaled(7, 3, padding_idx=0), nn.Flatten(), nn.Tanh(), nn.Linear(12, 3))

    case = Case("scaled_embedding", model, oracle.TOKENS, LABELS)
    for kind in KINDS:
        assert_agree(forms(case, kind).values.T, getattr(expected(case), kind), 1e-8)


# ----------------------------------------------------------------------------------------------------- bad arguments


def measure(model: nn.Module | None = None, batch: Any = None, reference: Any = None, **settings: Any) -> Tensor:
    model = GELU.model() if model is None else model
    batch = batch_of(GELU) if batch is None else batch
    reference = perturbed_reference(model) if reference is None else reference
    return layer_quadratic_forms(model, batch, reference, **settings).values


@each_kind
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("chunk", [1, 2, None])
def test_a_loss_that_is_not_finite_names_the_example(value: float, chunk: int | None, kind: Kind) -> None:
    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return torch.where(labels == 2, value, F.cross_entropy(logits, labels, reduction="none"))

    with pytest.raises(NonFiniteLoss, match=rf"loss of example 2 is {value}.*inputs and label.*half-precision"):
        measure(loss=loss, kind=kind, examples_at_once=chunk)


@each_kind
def test_a_model_whose_weights_are_not_finite_is_refused_by_name(kind: Kind) -> None:
    model = GELU.model()
    with torch.no_grad():
        model[2].weight[0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"not finite in 2\.weight"):
        measure(model, reference=perturbed_reference(GELU.model()), kind=kind)
    with torch.no_grad():
        model = GELU.model()
        model[2].bias[0] = torch.nan
    with pytest.raises(NonFiniteLoss, match="loss of example 0 is nan"):
        measure(model, reference=perturbed_reference(GELU.model()), kind=kind)


@each_kind
def test_a_label_without_any_probability_is_not_finite(kind: Kind) -> None:
    transition = [[0.5, 0.5, 0.0], [0.2, 0.8, 0.0], [0.4, 0.6, 0.0]]
    with pytest.raises(ValueError, match=r"singular|column|example 2"):
        measure(loss=CorrectedLoss("forward", transition, num_classes=3), kind=kind)


class Root(nn.Module):
    """The square root of an absolute value: no curvature where that is 0."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 4, bias=False), nn.Linear(4, 3)

    def forward(self, input: Tensor) -> Tensor:
        return self.head(self.first(input).abs().sqrt())


@each_kind
def test_curvature_that_is_not_finite_names_the_example(kind: Kind) -> None:
    x = VECTORS["input"].clone()
    x[1] = 0
    with pytest.raises(ValueError, match="example 1"):
        measure(Root().double(), (x, LABELS), kind=kind)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: {}, r"has no weights for 0\.weight, 2\.weight, 4\.weight: it belongs to another model"),
        (
            lambda r: {n: w for n, w in r.items() if n != "4.weight"},
            r"has no weights for 4\.weight: .*lacks a new head",
        ),
        (lambda r: {**r, "2.weight": torch.zeros(4, 5)}, r"another shape for 2\.weight \(\(4, 5\) there, \(4, 4\) in"),
        (lambda r: {"2.weight": torch.zeros(1)}, r"no weights for 0\.weight, 4\.weight and has another shape for 2"),
    ],
)
def test_a_reference_that_does_not_fit_is_refused_by_name(change: Callable[..., Any], message: str) -> None:
    with pytest.raises(ReferenceMismatch, match=message):
        measure(reference=change(perturbed_reference(GELU.model())))


def test_a_reference_may_lack_what_is_not_measured() -> None:
    reference = {"2.weight": perturbed_reference(GELU.model())["2.weight"]}
    found = measure(reference=reference, layers={"middle": "2"})
    assert_agree(found.T, expected(GELU).hessian[[1]], 1e-8)


def test_a_reference_that_is_not_finite_is_refused() -> None:
    reference = perturbed_reference(GELU.model())
    reference["2.weight"][0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"2\.weight"):
        measure(reference=reference)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "hesian"}, "kind is 'hesian'; choose one of hessian, gauss_newton, hessian_upper, hessian_psd"),
        ({"layers": "block"}, "layers is 'block'; choose 'weights', 'blocks', or a mapping"),
        ({"layers": ["0"]}, r"layers is \['0'\]"),
        ({"layers": {"a": "0", "b": "nothing*"}}, r"patterns of b match no layer.* Layers are 0\.weight, 2\.weight"),
        ({"layers": {"a": "*", "b": "0"}}, "patterns of b match no layer that is still free"),
        ({"layers": {"a": []}}, "patterns of a match no layer"),
        ({"layers": {}}, "layers"),
        ({"loss": lambda logits, labels: F.cross_entropy(logits, labels)}, r"loss returned \(\) for a batch of \d"),
        ({"loss": lambda logits, labels: logits}, r"loss returned \(\d, 3\) .*one loss for each example, of shape"),
        ({"loss": lambda logits, labels: 1.0}, "loss returned float for a batch"),
        ({"lanczos_steps": 0, "kind": "hessian_psd"}, "lanczos_steps is 0"),
        ({"examples_at_once": -1}, "examples_at_once is -1"),
        ({"examples_at_once": 0}, "examples_at_once is 0"),
        ({"directions_at_once": -1}, "directions_at_once is -1"),
        ({"directions_at_once": 0}, "directions_at_once is 0"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure(**settings)


X = VECTORS["input"]


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"input": X}, r"batch has the keys \['input'\]; it needs 'labels'"),
        ((X, LABELS, LABELS), "batch is a tuple; give a mapping with 'labels', or a pair"),
        (X, "batch is a Tensor; give a mapping"),
        ([X], "batch is a list"),
        ({"input": X, "labels": LABELS.double()}, "labels have dtype torch.float64; without a loss, .*give loss="),
        ({"input": X, "labels": LABELS[:, None]}, r"logits have shape \(\d, 3\) and labels \(\d, 1\)"),
        ({"input": X, "labels": LABELS[:2]}, "logits have shape|examples"),
        ({"input": X[:0], "labels": LABELS[:0]}, "at least one example"),
    ],
    ids=["no labels", "triple", "tensor", "list", "real labels", "one dimension more", "too few", "empty"],
)
@each_kind
def test_batches_that_do_not_fit_are_refused(batch: Any, message: str, kind: Kind) -> None:
    with pytest.raises(ValueError, match=message):
        measure(batch=batch, kind=kind)


@pytest.mark.parametrize("kind", ["hessian_upper", "hessian_psd"])
def test_operations_without_second_derivative_are_named(kind: Kind) -> None:
    for name in ("hardsigmoid", "embedding_bag"):
        message = f"can't differentiate this model twice: .*{name}.* kind='hessian' or 'gauss_newton' of .* do without"
        with pytest.raises(NotTwiceDifferentiable, match=message):
            forms(find_case(name), kind)


def test_what_neither_has_a_rule_nor_a_second_derivative_is_named() -> None:
    case = Case("both", lambda: oracle._mlp(nn.Sequential(nn.Hardsigmoid(), Apply(hides))), VECTORS, LABELS)
    with pytest.raises(NotTwiceDifferentiable, match="hardsigmoid"):
        forms(case)


def hides(x: Tensor) -> Tensor:
    y: Tensor = oracle.CustomSin.apply(x)
    return y


@pytest.mark.parametrize("layers", ["weights", "blocks", {"all": "*"}])
def test_a_model_without_trained_layers_is_refused(layers: Any) -> None:
    frozen = GELU.model().requires_grad_(False)
    for model in (frozen, nn.Sequential(nn.BatchNorm1d(4), nn.Flatten()), nn.Flatten()):
        with pytest.raises(ValueError, match=r"no trained layer .*nothing to measure"):
            measure(model, reference={}, layers=layers)


def test_a_mistake_in_the_model_is_shown_as_it_is() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        measure(batch=(X[:, :3], LABELS))


def test_pictures_may_be_measured_with_any_layout() -> None:
    case = find_case("conv2d")
    model = case.model()
    x = IMAGES["input"].to(memory_format=torch.channels_last)
    for kind in KINDS:
        found = layer_quadratic_forms(
            model.to(memory_format=torch.channels_last), (x, LABELS), perturbed_reference(model), kind=kind,
            lanczos_steps=1000,
        )  # fmt: skip
        assert_agree(found.values.T, getattr(expected(case), kind), 1e-8)


class Interpolated(nn.Module):
    """Positions from a large table of weights, fitted to the input, as vision transformers do."""

    def __init__(self, frozen: bool) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, 2, 90, 90), requires_grad=not frozen)
        self.layer = nn.Linear(18, 3)

    def forward(self, input: Tensor) -> Tensor:
        positions = nn.functional.interpolate(self.table.clone(), (3, 3), mode="bicubic")
        return self.layer(torch.tanh(input + positions.flatten(1)))


@pytest.mark.parametrize("frozen", [False, True])
def test_chunks_are_fitted_to_activations_and_not_to_weights(frozen: bool) -> None:
    model = Interpolated(frozen)
    groups, _ = group_layers(model, "weights")
    with measuring(model):
        weights = Weights(model, groups)
        with torch.no_grad(), Widest(weights.all) as widest:
            weights.logits({"input": torch.randn(1, 18)})
    assert widest.elements == 18
