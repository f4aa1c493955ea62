"""Curvature of one example's loss in one group of weights, from dense float64 Hessians: slow, short, plain.

Nothing here is shared with the engine that it checks. The Hessian is that of the loss *as a function of the
weights*, in eval mode. It comes by paths that share little but the model's own code: reverse over reverse on the
parameters themselves, forward over reverse by ``torch.func.hessian``, and finite differences of the gradient. Forward
over forward is left out on purpose: ``jvp`` of ``jvp`` through ``layer_norm`` is silently wrong in torch 2.13.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import transformers
from huggingface_hub.errors import StrictDataclassFieldValidationError
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.activations import NewGELUActivation, QuickGELUActivation, ReLUSquaredActivation

from hf_robust_ft import find_layers

Inputs = Mapping[str, Tensor]
Group = Sequence[str]
"""Names of parameters whose weights, one after the other, make one vector. A tied one counts once."""
PerExampleLoss = Callable[[Tensor, Tensor], Tensor]
"""(logits, labels) → one loss for each example, [B]."""
LossKind = Literal["plain", "forward", "backward"]
Path = Literal["reverse over reverse", "row by row", "forward over reverse", "differences"]
"""How to find a Hessian. Row by row is reverse over reverse without ``vmap``, which lacks rules for some operations;
differences are for operations that have no second derivative in torch."""

CLASSES = 3
VOCABULARY = 7
IGNORED = -100
EXAMPLES = 3


# ------------------------------------------------------------------------------------------------------- losses


@dataclass(frozen=True)
class Loss:
    """Cross entropy, plain or corrected; with token labels the mean over an example's targets.

    An example without any target has the loss 0.
    """

    kind: LossKind
    transition: Tensor
    """T, [K, K], ``T[i, j] = P(noisy = j | true = i)``; the plain loss makes no use of it."""
    shift: bool = False
    """Whether position t predicts label t + 1 (causal language models)."""

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """One loss for each example, [B], of logits [B, K] or [B, S, K] and labels [B] or [B, S]."""
        logits, labels = self._align(logits, labels)
        picked = self.of_every_label(logits).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        return _mean_over_targets(picked, labels)

    def of_every_label(self, logits: Tensor) -> Tensor:
        """What the loss would be for each label, [..., K]."""
        log_p = logits.log_softmax(-1)
        if self.kind == "forward":
            return -(log_p.exp() @ self.transition).log()
        if self.kind == "backward":
            return -log_p @ torch.linalg.inv(self.transition).T
        return -log_p

    def gauss_newton(self, logits: Tensor, labels: Tensor, tangent: Tensor) -> Tensor:
        """``z1ᵀ ∇²ℓ(z) z1`` of each example, [B], with the Fisher information for ∇²ℓ in the forward loss.

        Args:
            logits: z, [B, …, K].
            labels: [B, …].
            tangent: z1, like the logits.
        """
        if self.kind != "forward":
            forms = [
                tangent[[i]].flatten() @ self._logit_hessian(logits[[i]], labels[[i]]) @ tangent[[i]].flatten()
                for i in range(len(logits))
            ]
            return torch.stack(forms)
        # The forward loss' own logit Hessian is indefinite. Fisher: E over noisy labels y ~ q = Tᵀp of (g_y · z1)².
        (z, labels), (z1, _) = self._align(logits, labels), self._align(tangent, labels)
        forms = []
        for at, along in zip(z.reshape(-1, z.shape[-1]), z1.reshape(-1, z.shape[-1]), strict=True):
            gradients = torch.autograd.functional.jacobian(self.of_every_label, at)
            q = torch.exp(-self.of_every_label(at))
            forms.append((q * (gradients @ along) ** 2).sum())
        return _mean_over_targets(torch.stack(forms).reshape(labels.shape), labels)

    def _logit_hessian(self, logits: Tensor, labels: Tensor) -> Tensor:
        hessian = torch.autograd.functional.hessian(lambda z: self(z, labels).sum(), logits)
        return hessian.reshape(logits.numel(), logits.numel())

    def _align(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if not self.shift:
            return logits, labels
        return logits[:, :-1], labels[:, 1:]


def _mean_over_targets(values: Tensor, labels: Tensor) -> Tensor:
    kept = (labels != IGNORED).to(values.dtype).reshape(len(labels), -1)
    return (values.reshape(len(labels), -1) * kept).sum(1) / kept.sum(1).clamp(min=1)


def some_transition(classes: int) -> Tensor:
    """A transition matrix that is neither symmetric nor near singular."""
    noise = torch.rand(classes, classes, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return 0.7 * torch.eye(classes, dtype=torch.float64) + 0.3 * noise / noise.sum(1, keepdim=True)


# ------------------------------------------------------------------------------------------- groups and reference


def layer_groups(model: nn.Module) -> list[list[str]]:
    """One group for each layer, in the order of ``find_layers``."""
    return [[layer.name] for layer in find_layers(model)[0]]


def block_groups(model: nn.Module) -> list[list[str]]:
    """One group for each depth: a transformer block as one group."""
    groups: dict[int, list[str]] = {}
    for layer in find_layers(model)[0]:
        groups.setdefault(layer.depth, []).append(layer.name)
    return list(groups.values())


def perturbed_reference(model: nn.Module, seed: int = 0, scale: float = 0.1) -> dict[str, Tensor]:
    """The model's state dict with every parameter moved by ``scale`` × standard normal numbers.

    The names of a tied parameter move together; buffers stay.
    """
    generator = torch.Generator().manual_seed(seed)
    moved: dict[nn.Parameter, Tensor] = {}
    reference = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, nn.Parameter):
            if tensor not in moved:
                offset = torch.randn(tensor.shape, dtype=torch.float64, generator=generator)
                moved[tensor] = tensor.detach() + (scale * offset).to(tensor)
            reference[name] = moved[tensor]
        else:
            reference[name] = tensor.detach().clone()
    return reference


def directions(model: nn.Module, reference: Mapping[str, Tensor], groups: Sequence[Group]) -> list[Tensor]:
    """v = vec(W - W_ref) of each group, [P_g] in float64."""

    def offset(name: str) -> Tensor:
        return (model.get_parameter(name).detach().double() - reference[name].double()).flatten()

    return [torch.cat([offset(name) for name in _once(model, group)]) for group in groups]


def _once(model: nn.Module, group: Group) -> list[str]:
    """The first name of each parameter of a group."""
    first: dict[nn.Parameter, str] = {}
    for name in group:
        first.setdefault(model.get_parameter(name), name)
    return list(first.values())


# --------------------------------------------------------------------------------------------------- derivatives


def dense_hessians(
    model: nn.Module,
    inputs: Inputs,
    labels: Tensor,
    loss: PerExampleLoss,
    groups: Sequence[Group],
    *,
    path: Path = "reverse over reverse",
) -> list[Tensor]:
    """The Hessian of each example's loss in the weights of one group alone.

    Args:
        model: in any mode and type; what is measured is its :func:`function_of_weights`.
        inputs: what the model takes by name, [examples, …] each; one example at a time goes in.
        labels: [examples, …].
        loss: (logits, labels) → [B].
        groups: names of parameters.
        path: how to differentiate.

    Returns:
        For each group [examples, P_g, P_g].
    """
    model = function_of_weights(model)
    hessians: list[list[Tensor]] = [[] for _ in groups]
    with sdpa_kernel(SDPBackend.MATH):  # the only attention kernel that has a second derivative
        for example, label in one_at_a_time(inputs, labels):
            for group, found in zip(groups, hessians, strict=True):
                found.append(_hessian(model, example, label, loss, group, path))
    return [torch.stack(found) for found in hessians]


def dense_jacobians(model: nn.Module, inputs: Inputs, groups: Sequence[Group]) -> tuple[Tensor, list[Tensor]]:
    """The logits, [examples, …], and for each group their Jacobian, [examples, logits of one example, P_g]."""
    model = function_of_weights(model)
    logits: list[Tensor] = []
    jacobians: list[list[Tensor]] = [[] for _ in groups]
    with sdpa_kernel(SDPBackend.MATH):
        for example, _ in one_at_a_time(inputs):
            logits.append(logits_of(model(**example)))
            for group, found in zip(groups, jacobians, strict=True):
                found.append(_rows(logits[-1].flatten(), weights_of(model, group)))
    return torch.cat(logits).detach(), [torch.stack(found) for found in jacobians]


def difference_product(
    model: nn.Module, example: dict[str, Tensor], label: Tensor, loss: PerExampleLoss, group: Group, u: Tensor
) -> Tensor:
    """``H u`` [P] of one example, from central differences of the gradient, of fourth order.

    Args:
        model: a :func:`function_of_weights`; its weights are moved and put back.
        example: a batch of one, as of :func:`one_at_a_time`.
        label: [1, …].
        loss: (logits, labels) → [1].
        group: names of parameters.
        u: [P], of a length near 1.
    """
    weights = weights_of(model, group)
    start, h = torch.nn.utils.parameters_to_vector(weights).detach(), 1e-3

    def slope(step: float) -> Tensor:
        torch.nn.utils.vector_to_parameters(start + step * u, weights)
        return gradient(loss(logits_of(model(**example)), label).sum(), weights)

    product = (8 * (slope(h) - slope(-h)) - (slope(2 * h) - slope(-2 * h))) / (12 * h)
    torch.nn.utils.vector_to_parameters(start, weights)
    return product


def function_of_weights(model: nn.Module) -> nn.Module:
    """A copy in float64 and eval mode whose gradient is that of the loss as a function of all its weights.

    Autograd leaves the row of ``padding_idx`` out of an embedding's gradient, but the logits depend on that row
    wherever a padding token is looked up and not masked. The copy forgets ``padding_idx``; its logits stay.
    """
    model = copy.deepcopy(model).double().eval().requires_grad_(True)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.padding_idx = None
    return model


def one_at_a_time(inputs: Inputs, labels: Tensor | None = None) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Batches of one, floating-point inputs in float64; without labels, no labels."""
    inputs = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    examples = len(next(iter(inputs.values())))
    labels = torch.zeros(examples, 0) if labels is None else labels
    for i in range(examples):
        yield {name: x[i : i + 1] for name, x in inputs.items()}, labels[i : i + 1]


def logits_of(outputs: Any) -> Tensor:
    """A model's logits: what it returns, or their ``logits``."""
    return outputs if isinstance(outputs, Tensor) else outputs.logits


def weights_of(model: nn.Module, group: Group) -> list[nn.Parameter]:
    """The parameters of a group."""
    return [model.get_parameter(name) for name in _once(model, group)]


def gradient(value: Tensor, weights: Sequence[Tensor], *, create_graph: bool = False) -> Tensor:
    """Of a scalar in some weights, as one vector [P]; 0 for a weight that takes no part."""
    parts = torch.autograd.grad(value, weights, create_graph=create_graph, retain_graph=True, allow_unused=True)
    return torch.cat([(torch.zeros_like(w) if g is None else g).flatten() for g, w in zip(parts, weights, strict=True)])


def _hessian(
    model: nn.Module, example: dict[str, Tensor], label: Tensor, loss: PerExampleLoss, group: Group, path: Path
) -> Tensor:
    weights = weights_of(model, group)
    if path == "forward over reverse":
        return _forward_over_reverse(model, example, label, loss, group)
    if path == "differences":
        units = torch.eye(sum(w.numel() for w in weights)).to(weights[0])
        return torch.stack([difference_product(model, example, label, loss, group, u) for u in units], dim=1)
    slopes = gradient(loss(logits_of(model(**example)), label).sum(), weights, create_graph=True)
    if path == "row by row" and slopes.requires_grad:
        return torch.stack([gradient(slope, weights) for slope in slopes])
    return _rows(slopes, weights)


def _rows(vector: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """The Jacobian of a vector [N] in some weights, [N, P]."""
    if not vector.requires_grad:  # the gradient of something linear, or of nothing
        return torch.zeros(len(vector), sum(w.numel() for w in weights)).to(vector)
    rows = torch.autograd.grad(
        vector, weights, torch.eye(len(vector)).to(vector), is_grads_batched=True, retain_graph=True, allow_unused=True
    )
    zeros = [torch.zeros(len(vector), *w.shape).to(vector) for w in weights]
    return torch.cat([(z if r is None else r).flatten(1) for r, z in zip(rows, zeros, strict=True)], dim=1).detach()


def _forward_over_reverse(
    model: nn.Module, example: dict[str, Tensor], label: Tensor, loss: PerExampleLoss, group: Group
) -> Tensor:
    names = _once(model, group)
    weights = [model.get_parameter(name).detach() for name in names]

    def value(vector: Tensor) -> Tensor:
        parts = vector.split([w.numel() for w in weights])
        replaced = {name: part.reshape(w.shape) for name, part, w in zip(names, parts, weights, strict=True)}
        return loss(logits_of(functional_call(model, replaced, (), example)), label).sum()

    return torch.func.hessian(value)(torch.cat([w.flatten() for w in weights])).detach()


# ------------------------------------------------------------------------------------------------------ measures


def quadratic(hessian: Tensor, v: Tensor) -> Tensor:
    """``vᵀ H v`` of each example, [B], of H [B, P, P] and v [P]."""
    return torch.einsum("p,bpq,q->b", v, hessian, v)


def quadratic_upper(hessian: Tensor, v: Tensor) -> Tensor:
    """``½ (vᵀ H v + ‖v‖ ‖H v‖)``, at least ``vᵀ H⁺ v``."""
    return (quadratic(hessian, v) + v.norm() * (hessian @ v).norm(dim=-1)) / 2


def quadratic_psd(hessian: Tensor, v: Tensor) -> Tensor:
    """``vᵀ H⁺ v``, with H⁺ the part of H with non-negative eigenvalues."""
    eigenvalues, vectors = torch.linalg.eigh(hessian)
    return (eigenvalues.clamp(min=0) * (vectors.mT @ v) ** 2).sum(-1)


@dataclass(frozen=True)
class Measures:
    """Of every group and example, [groups, examples] each."""

    hessian: Tensor
    hessian_upper: Tensor
    hessian_psd: Tensor
    gauss_newton: Tensor
    trace: Tensor


def measure(
    model: nn.Module,
    inputs: Inputs,
    labels: Tensor,
    loss: Loss,
    groups: Sequence[Group],
    reference: Mapping[str, Tensor],
    *,
    path: Path = "reverse over reverse",
) -> Measures:
    """All quantities of all groups along their own directions v = vec(W - W_ref)."""
    vs = directions(model, reference, groups)
    hessians = dense_hessians(model, inputs, labels, loss, groups, path=path)
    logits, jacobians = dense_jacobians(model, inputs, groups)
    tangents = [(jacobian @ v).reshape(logits.shape) for jacobian, v in zip(jacobians, vs, strict=True)]
    pairs = list(zip(hessians, vs, strict=True))
    return Measures(
        hessian=torch.stack([quadratic(h, v) for h, v in pairs]),
        hessian_upper=torch.stack([quadratic_upper(h, v) for h, v in pairs]),
        hessian_psd=torch.stack([quadratic_psd(h, v) for h, v in pairs]),
        gauss_newton=torch.stack([loss.gauss_newton(logits, labels, tangent) for tangent in tangents]),
        trace=torch.stack([h.diagonal(dim1=-2, dim2=-1).sum(-1) for h in hessians]),
    )


def assert_agree(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """That values of groups agree, relative to the largest of their group.

    Args:
        found: [groups, …].
        expected: likewise.
        tolerance: relative; 1e-12 absolute is let through, for groups whose values are all 0.
    """
    assert found.shape == expected.shape
    error = (found - expected).abs().flatten(1).amax(1)
    allowed = tolerance * expected.abs().flatten(1).amax(1) + 1e-12
    wrong = [
        f"group {i}: off by {e:.1e} > {a:.1e}"
        for i, (e, a) in enumerate(zip(error, allowed, strict=True))
        if not e <= a
    ]
    assert not wrong, "; ".join(wrong)


# --------------------------------------------------------------------------------------------------------- cases


@dataclass(frozen=True, eq=False)
class Case:
    """A tiny model with inputs and labels of a few examples."""

    name: str
    factory: Callable[[], nn.Module]
    inputs: dict[str, Tensor]
    labels: Tensor
    classes: int = CLASSES
    shift: bool = False
    tolerance: float = 1e-9
    """How well two right computations agree, see :func:`assert_agree`."""
    path: Path = "reverse over reverse"
    """How to differentiate the model."""
    functional: bool = True
    """Whether ``torch.func.hessian`` can differentiate it."""
    stops_gradient: bool = False
    """Whether a weight acts through something detached, so that autograd's Hessian, which is the one measured
    here, is not that of the loss as a function of the weights."""

    def __str__(self) -> str:
        return self.name

    def model(self) -> nn.Module:
        """The same weights at each call, in float64 and eval mode."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self.factory().double().eval()
            # Fresh norms are the identity, fresh biases 0 and fresh transformers nearly constant: too easy.
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter += 0.4 * torch.randn_like(parameter)
                for name, buffer in model.named_buffers():
                    if name.endswith(("running_mean", "running_var")):
                        buffer += torch.rand_like(buffer)
        return model

    def loss(self, kind: LossKind = "plain") -> Loss:
        return Loss(kind, some_transition(self.classes), self.shift)

    def measure(self, kind: LossKind = "plain", groups: Sequence[Group] | None = None) -> Measures:
        """The oracle of this case, by layer unless told otherwise, around ``perturbed_reference(model)``."""
        model = self.model()
        groups = layer_groups(model) if groups is None else groups
        reference = perturbed_reference(model)
        return measure(model, self.inputs, self.labels, self.loss(kind), groups, reference, path=self.path)


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


LABELS = torch.arange(EXAMPLES) % CLASSES
VECTORS = {"input": _random(EXAMPLES, 4)}
LINES = {"input": _random(EXAMPLES, 2, 6)}
IMAGES = {"input": _random(EXAMPLES, 2, 5, 5)}
SEQUENCES = {"input": _random(EXAMPLES, 3, 4)}
TOKENS = {"input": torch.tensor([[3, 1, 4, 1], [5, 0, 2, 6], [5, 3, 0, 0]])}


class Apply(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, input: Tensor) -> Tensor:
        return self.function(input)


def _mlp(act: nn.Module) -> nn.Module:
    """An activation that its own layer's direction flows into, and one that others' flow into, too."""
    return nn.Sequential(nn.Linear(4, 4), act, nn.Linear(4, 4), act, nn.Linear(4, CLASSES))


def _function_cases() -> Iterator[Case]:
    activations: dict[str, Callable[[], nn.Module]] = {
        "identity": nn.Identity,
        "relu": nn.ReLU,
        "relu_inplace": lambda: nn.ReLU(inplace=True),
        "leaky_relu": nn.LeakyReLU,
        "prelu": nn.PReLU,
        "relu6": nn.ReLU6,
        "relu_squared": ReLUSquaredActivation,
        "elu": nn.ELU,
        "selu": nn.SELU,
        "celu": nn.CELU,
        "gelu": nn.GELU,
        "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
        "gelu_new": NewGELUActivation,
        "quick_gelu": QuickGELUActivation,
        "silu": nn.SiLU,
        "silu_inplace": lambda: nn.SiLU(inplace=True),
        "mish": nn.Mish,
        "tanh": nn.Tanh,
        "sigmoid": nn.Sigmoid,
        "log_sigmoid": nn.LogSigmoid,
        "softplus": nn.Softplus,
        "softsign": nn.Softsign,
        "tanhshrink": nn.Tanhshrink,
        "softshrink": lambda: nn.Softshrink(0.1),
        "hardshrink": lambda: nn.Hardshrink(0.1),
        "hardswish": nn.Hardswish,
        "hardtanh": nn.Hardtanh,
        "dropout": nn.Dropout,
        "softmax": lambda: nn.Softmax(-1),
        "log_softmax": lambda: nn.LogSoftmax(-1),
        "layer_norm": lambda: nn.LayerNorm(4),
        "layer_norm_plain": lambda: nn.LayerNorm(4, elementwise_affine=False),
        "rms_norm": lambda: nn.RMSNorm(4),
        "batch_norm": lambda: nn.BatchNorm1d(4),
    }
    for name, act in activations.items():
        yield Case(name, lambda act=act: _mlp(act()), VECTORS, LABELS)
    # The second backward pass of group norm fails under vmap, in torch 2.13.
    yield Case("group_norm_vectors", lambda: _mlp(nn.GroupNorm(1, 4)), VECTORS, LABELS, path="row by row")
    # torch has no second derivative of it, not even 0.
    yield Case(
        "hardsigmoid",
        lambda: _mlp(nn.Hardsigmoid()),
        VECTORS,
        LABELS,
        path="differences",
        functional=False,
        tolerance=1e-8,
    )

    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "exp": torch.exp,
        "expm1": torch.expm1,
        "sin_cos": lambda x: x.sin() * (2 * x).cos(),
        "atan": torch.atan,
        "erf": torch.erf,
        "log": lambda x: x.square().add(1).log(),
        "log1p": lambda x: x.square().log1p(),
        "sqrt": lambda x: (x.square() + 1).sqrt(),
        "rsqrt": lambda x: x * (x.square() + 1).rsqrt(),
        "pow": lambda x: (x.square() + 0.5).pow(1.7) - x.pow(3),
        "pow_tensor": lambda x: torch.pow(x.square() + 0.5, x),
        "pow_scalar_base": lambda x: torch.pow(1.5, x),
        "divide": lambda x: x / (1 + x.square().sum(-1, keepdim=True)),
        "reciprocal": lambda x: (x.square() + 1).reciprocal(),
        "abs": torch.abs,
        "clamp": lambda x: x.clamp(-0.7, 0.8),
        "maximum": lambda x: torch.maximum(x, 0.5 * x.square()) - torch.minimum(x, x.flip(-1) ** 2),
        "where": lambda x: torch.where(x > 0.1, x.square(), 0.3 * x),
        "amax": lambda x: x.square() - x.amax(-1, keepdim=True),
        "sort_topk": lambda x: torch.cat([x.sort(-1).values[:, :2], x.square().topk(2, -1).values], -1),
        "glu": lambda x: torch.cat([F.glu(x, -1), F.glu(x.flip(-1), -1)], -1),
        "normalize": lambda x: F.normalize(x, dim=-1),
        "norm": lambda x: x * torch.linalg.vector_norm(x, dim=-1, keepdim=True),
        "cosine_similarity": lambda x: x * F.cosine_similarity(x, x.square(), dim=-1).unsqueeze(-1),
        "variance": lambda x: (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 0.1).sqrt(),
        "standard_deviation": lambda x: x / (x.std(-1, keepdim=True) + 0.1),
        "logsumexp": lambda x: x.square() - x.logsumexp(-1, keepdim=True),
        "cumsum_cumprod": lambda x: x.cumsum(-1) + x.cumprod(-1),
        "prod": lambda x: x + x.prod(-1, keepdim=True),
        "addcmul_lerp": lambda x: torch.lerp(torch.addcmul(x, x, x.flip(-1)), x.square(), x),
        "outer_product": lambda x: (x.unsqueeze(-1) * x.unsqueeze(-2)).sum(-1),
        "baddbmm": lambda x: torch.baddbmm(
            x.view(-1, 2, 2), x.view(-1, 2, 2), x.view(-1, 2, 2).transpose(1, 2), beta=0.5, alpha=2.0
        ).flatten(1),
        "einsum": lambda x: torch.einsum("bij,bjk,bik->bij", *3 * [x.view(-1, 2, 2)]).flatten(1),
        "view_ops": _view_ops,
        "gather_scatter": _gather_scatter,
        "inplace_ops": _inplace_ops,
        "no_grad_mask": _no_grad_mask,
        "fft": lambda x: torch.fft.fft(x, dim=-1).abs(),
        "checkpoint": lambda x: torch.utils.checkpoint.checkpoint(torch.tanh, x, use_reentrant=False),
    }
    without_functional = {"checkpoint"}  # hooks on what is saved
    for name, function in functions.items():
        yield Case(
            name,
            lambda function=function: _mlp(nn.Sequential(nn.Tanh(), Apply(function))),
            VECTORS,
            LABELS,
            functional=name not in without_functional,
        )
    yield Case("detached", lambda: _mlp(Apply(_detached)), VECTORS, LABELS, stops_gradient=True)
    yield Case("custom_function", lambda: _mlp(Apply(CustomSin.apply)), VECTORS, LABELS)
    # An autograd.Function of the old style has no rule for torch.func.
    yield Case("custom_function_old_style", lambda: _mlp(Apply(OldSin.apply)), VECTORS, LABELS, functional=False)


def _view_ops(x: Tensor) -> Tensor:
    x = torch.stack([x, x.roll(1, -1)], 1).permute(0, 2, 1).reshape(len(x), 8).square()
    first, second = x.chunk(2, -1)
    x = torch.cat([first.flip(-1), second.unsqueeze(1).expand(-1, 2, -1).sum(1)], -1)
    parts = F.pad(x, (1, 1)).unfold(-1, 4, 2).tril().split([1, 3], dim=1)
    return parts[0].squeeze(1) + parts[1].mean(1) + x.repeat(1, 2)[:, 3:7] - x[:, ::2] + x.narrow(1, 2, 4)


def _gather_scatter(x: Tensor) -> Tensor:
    order = torch.tensor([2, 0, 3, 1]).expand_as(x)
    squares = x.square().gather(-1, order) + x[:, order[0]] + x.index_select(-1, order[0])
    scattered = torch.scatter_add(x, -1, order, squares).masked_fill(order == 3, 0.5)
    return torch.index_add(scattered, 1, order[0, :2], x[:, :2] ** 2)


def _inplace_ops(x: Tensor) -> Tensor:
    x = x.square().mul_(0.5).add_(x).sub_(0.2)
    x[:, 0] = x[:, 1] - x[:, 2]
    x[:, 1:3].mul_(2)
    x.masked_fill_(torch.tensor([False, False, False, True]), 0.3).tanh_()
    return (x * x.flip(-1)).relu_()


def _no_grad_mask(x: Tensor) -> Tensor:
    """What is computed without gradients is constant near the weights: nothing stops that would matter."""
    with torch.no_grad():
        mask = (x > 0).to(x.dtype)
    return x.square() * mask + x.sign() * x


def _detached(x: Tensor) -> Tensor:
    return x.tanh() * x.detach().square()


class CustomSin(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.sin()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, adjoint: Tensor) -> Tensor:
        return adjoint * ctx.saved_tensors[0].cos()

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return tangent * ctx.saved_tensors[0].cos()


class OldSin(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, adjoint: Tensor) -> Tensor:
        return adjoint * ctx.saved_tensors[0].cos()


def _net(*modules: nn.Module, features: int) -> nn.Module:
    return nn.Sequential(*modules, nn.Flatten(), nn.Linear(features, CLASSES))


def _convolution_cases() -> Iterator[Case]:
    act = nn.GELU
    nets: dict[str, tuple[Callable[[], nn.Module], dict[str, Tensor]]] = {
        "conv1d": (lambda: _net(nn.Conv1d(2, 3, 3), act(), nn.Conv1d(3, 2, 2), nn.Tanh(), features=6), LINES),
        "conv1d_strided": (
            lambda: _net(nn.Conv1d(2, 4, 3, stride=2, padding=1, groups=2), act(), nn.AvgPool1d(2, 1), features=8),
            LINES,
        ),
        "conv2d": (lambda: _net(nn.Conv2d(2, 3, 3), act(), nn.Conv2d(3, 2, 2), nn.Tanh(), features=8), IMAGES),
        "conv2d_groups": (
            lambda: _net(nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2, bias=False), act(), features=36),
            IMAGES,
        ),
        "conv2d_dilated": (
            lambda: _net(nn.Conv2d(2, 3, 2, dilation=2, padding="same"), act(), nn.AdaptiveAvgPool2d(2), features=12),
            IMAGES,
        ),
        "conv2d_depthwise": (
            lambda: _net(nn.Conv2d(2, 2, (1, 3), groups=2), act(), nn.Conv2d(2, 3, 1), act(), features=45),
            IMAGES,
        ),
        "conv2d_circular": (
            lambda: _net(nn.Conv2d(2, 2, 3, padding=1, stride=2, padding_mode="circular"), act(), features=18),
            IMAGES,
        ),
        "conv2d_reflect": (
            lambda: _net(nn.Conv2d(2, 2, 3, padding=1, stride=2, padding_mode="reflect"), act(), features=18),
            IMAGES,
        ),
        "conv3d": (
            lambda: _net(nn.Unflatten(1, (1, 2)), nn.Conv3d(1, 3, (2, 3, 3), stride=2), act(), features=12),
            IMAGES,
        ),
        "conv_transpose1d": (
            lambda: _net(nn.ConvTranspose1d(2, 2, 2, stride=2, padding=1), act(), nn.MaxPool1d(2), features=10),
            LINES,
        ),
        "conv_transpose2d": (
            lambda: _net(
                nn.Conv2d(2, 2, 3, stride=2),
                act(),
                nn.ConvTranspose2d(2, 2, 3, stride=2, padding=1, output_padding=1, groups=2, dilation=2),
                act(),
                nn.AvgPool2d(3),
                features=8,
            ),
            IMAGES,
        ),
        "max_pool2d": (
            lambda: _net(
                nn.Conv2d(2, 3, 2), act(), nn.MaxPool2d(2), nn.Conv2d(3, 3, 1), nn.AdaptiveMaxPool2d(1), features=3
            ),
            IMAGES,
        ),
        "avg_pool2d": (
            lambda: _net(nn.Conv2d(2, 3, 2), act(), nn.AvgPool2d(3, 1, 1, count_include_pad=False), features=48),
            IMAGES,
        ),
        "batch_norm2d": (
            lambda: _net(
                nn.Conv2d(2, 3, 3, bias=False), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Conv2d(3, 2, 2), features=8
            ),
            IMAGES,
        ),
        "instance_norm": (
            lambda: _net(nn.Conv2d(2, 3, 3), nn.InstanceNorm2d(3, affine=True), act(), features=27),
            IMAGES,
        ),
        "local_response_norm": (
            lambda: _net(nn.Conv2d(2, 3, 3), nn.LocalResponseNorm(2), nn.AdaptiveAvgPool2d(1), features=3),
            IMAGES,
        ),
        "upsample": (
            lambda: _net(
                nn.Conv2d(2, 4, 3, stride=2),
                nn.PixelShuffle(2),
                nn.Tanh(),
                nn.Upsample(scale_factor=1.5, mode="bilinear"),
                nn.ZeroPad2d(1),
                nn.Conv2d(1, 2, 3, stride=2),
                act(),
                nn.Upsample(scale_factor=2),
                nn.AvgPool2d(4),
                features=2,
            ),
            IMAGES,
        ),
        "unfold": (lambda: _net(nn.Unfold(2, stride=2), nn.Conv1d(8, 3, 1), act(), features=12), IMAGES),
    }
    for name, (factory, inputs) in nets.items():
        yield Case(name, factory, inputs, LABELS)
    yield Case(
        "group_norm",
        lambda: _net(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), act(), nn.AdaptiveAvgPool2d(1), features=4),
        IMAGES,
        LABELS,
        path="row by row",
    )


class Tied(nn.Module):
    """One Linear used twice, and a classifier that is its weight once more."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.head = nn.Linear(4, 4, bias=False)
        self.head.weight = self.inner.weight

    def forward(self, input: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(torch.tanh(self.inner(input)))))[:, :CLASSES]


class TiedEmbedding(nn.Module):
    """A language model in little: the head is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 3)
        self.inner = nn.Linear(3, 3)
        self.head = nn.Linear(3, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, input: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(self.embedding(input))))


class Products(nn.Module):
    """Weights that meet each other or themselves before they meet the input."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(4, 2, bias=False), nn.Linear(2, 4, bias=False)
        self.cosine = nn.Linear(4, 4, bias=False)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, input: Tensor) -> Tensor:
        x = torch.tanh(F.linear(input, self.up.weight @ self.down.weight))
        x = F.linear(x, F.normalize(self.cosine.weight, dim=1))
        return F.linear(x, self.head.weight**2, self.head.bias)


class WithSpare(nn.Module):
    """A layer that is never called, one that is frozen, and a matrix that no known module holds."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.spare = nn.Linear(4, 2)
        self.matrix = nn.Parameter(torch.zeros(2, 2, 3))
        self.head = nn.Linear(6, CLASSES)

    def forward(self, input: Tensor) -> Tensor:
        x = torch.tanh(self.frozen(input)).view(-1, 2, 2)
        return self.head(torch.einsum("bgi,gio->bgo", x, self.matrix).exp().flatten(1))


class TwoInputs(nn.Module):
    """Arguments that are added by broadcasting, and a bilinear form."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 3), nn.Linear(4, 2)
        self.bilinear = nn.Bilinear(3, 2, CLASSES)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.bilinear(torch.tanh(self.left(x)), torch.tanh(self.right(y)))


class Pooled(nn.Module):
    """The mean over a sequence of what a sequence module returns, classified."""

    def __init__(self, inner: nn.Module, width: int, **arguments: Any) -> None:
        super().__init__()
        self.inner, self.head, self.arguments = inner, nn.Linear(width, CLASSES), arguments

    def forward(self, input: Tensor) -> Tensor:
        attends = isinstance(self.inner, nn.MultiheadAttention)
        x = self.inner(*(3 if attends else 1) * [input], **self.arguments)
        return self.head(torch.tanh((x[0] if isinstance(x, tuple) else x).mean(1)))


class SelfAttention(nn.Module):
    """Attention written out, causal, so that queries, keys and values are three layers."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, input: Tensor) -> Tensor:
        q, k, v = (layer(input).unflatten(-1, (2, 2)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


def _module_cases() -> Iterator[Case]:
    yield Case("softmax_regression", lambda: nn.Linear(4, CLASSES), VECTORS, LABELS)
    yield Case("tied_linear", Tied, VECTORS, LABELS)
    yield Case(
        "tied_embedding",
        TiedEmbedding,
        TOKENS,
        TOKENS["input"],
        classes=VOCABULARY,
        shift=True,
    )
    yield Case("products_of_weights", Products, VECTORS, LABELS)
    yield Case("unused_and_frozen", WithSpare, VECTORS, LABELS)
    yield Case("bilinear", TwoInputs, {"x": VECTORS["input"], "y": VECTORS["input"].flip(1)}, LABELS)
    yield Case(
        "embedding",
        lambda: nn.Sequential(
            nn.Embedding(VOCABULARY, 3), nn.Flatten(), nn.Tanh(), nn.Linear(12, 4), nn.GELU(), nn.Linear(4, CLASSES)
        ),
        TOKENS,
        LABELS,
    )
    # The padding token 0 is in the texts, and nothing masks it.
    yield Case(
        "embedding_padding",
        lambda: nn.Sequential(
            nn.Embedding(VOCABULARY, 3, padding_idx=0), nn.Flatten(), nn.Tanh(), nn.Linear(12, CLASSES)
        ),
        TOKENS,
        LABELS,
    )
    # Neither backward nor forward mode differentiates it twice.
    yield Case(
        "embedding_bag",
        lambda: nn.Sequential(nn.EmbeddingBag(VOCABULARY, 3), nn.Tanh(), nn.Linear(3, CLASSES)),
        TOKENS,
        LABELS,
        path="differences",
        functional=False,
        tolerance=1e-8,
    )
    yield Case(
        "weight_norm",
        lambda: nn.Sequential(
            nn.Linear(4, 3),
            nn.Tanh(),
            nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)),
            nn.Tanh(),
            nn.Linear(3, 3),
        ),
        VECTORS,
        LABELS,
    )
    # Token labels, of which some do not count; the last example has none.
    yield Case(
        "token_labels",
        lambda: nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, CLASSES)),
        SEQUENCES,
        torch.tensor([[0, IGNORED, 2], [IGNORED, 1, IGNORED], [IGNORED, IGNORED, IGNORED]]),
    )
    yield Case("attention", lambda: Pooled(SelfAttention(), 4), SEQUENCES, LABELS)
    yield Case(
        "multihead_attention",
        lambda: Pooled(nn.MultiheadAttention(4, 2, batch_first=True), 4, need_weights=False),
        SEQUENCES,
        LABELS,
    )
    yield Case(
        "multihead_attention_weights",
        lambda: Pooled(nn.MultiheadAttention(4, 2, batch_first=True), 4),
        SEQUENCES,
        LABELS,
    )
    for norm_first in (False, True):
        yield Case(
            f"transformer_layer_{'pre' if norm_first else 'post'}_norm",
            lambda norm_first=norm_first: Pooled(
                nn.TransformerEncoderLayer(4, 2, 5, batch_first=True, norm_first=norm_first), 4
            ),
            SEQUENCES,
            LABELS,
        )
    recurrent: dict[str, tuple[Callable[[], nn.Module], int]] = {
        "rnn": (lambda: nn.RNN(4, 3, batch_first=True), 3),
        "gru": (lambda: nn.GRU(4, 3, batch_first=True), 3),
        "lstm": (lambda: nn.LSTM(4, 2, batch_first=True, num_layers=2), 2),
        "lstm_bidirectional": (lambda: nn.LSTM(4, 2, batch_first=True, bidirectional=True), 4),
    }
    for name, (inner, width) in recurrent.items():
        yield Case(name, lambda inner=inner, width=width: Pooled(inner(), width), SEQUENCES, LABELS)
    yield Case("gru_cell", GruCell, SEQUENCES, LABELS)


class GruCell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(4, 3), nn.Linear(3, CLASSES)

    def forward(self, input: Tensor) -> Tensor:
        hidden = None
        for x in input.unbind(1):
            hidden = self.cell(x, hidden)
        return self.head(hidden)


# Hidden size 4 throughout: the largest layer of a model decides what its oracle costs.
ENCODER: dict[str, Any] = {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 6}
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "num_labels": CLASSES,
    "pad_token_id": 0,
    "max_position_embeddings": 8,
}
PICTURE: dict[str, Any] = {"image_size": 4, "patch_size": 2, "num_channels": 1, "num_labels": CLASSES}
GPT2: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "num_labels": CLASSES,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "n_embd": 4,
    "n_layer": 1,
    "n_head": 2,
    "n_positions": 8,
}

IDS = torch.tensor([[3, 1, 4, 1, 5], [5, 2, 6, 4, 0], [5, 3, 5, 0, 0]])
TEXTS = {"input_ids": IDS, "attention_mask": (IDS != 0).long()}
NEXT = IDS.where(IDS != 0, IGNORED)
PICTURES = {"pixel_values": _random(EXAMPLES, 1, 4, 4)}
LARGER_PICTURES = {"pixel_values": _random(EXAMPLES, 1, 8, 8)}

# transformers computes some things of these models in float32 whatever type they are in: RMS norms, rotary positions,
# the softmax of eager attention (of ViT and Llama, but not of BERT). No two computations agree to more than that.
FLOAT32 = {"vit_eager", "modernbert", "t5_encoder", "llama_causal", "mixtral_causal"}


def _transformers_cases() -> Iterator[Case]:
    t = transformers
    texts: dict[str, Callable[[], nn.Module]] = {
        "bert": lambda: t.BertForSequenceClassification(t.BertConfig(**TEXT, **ENCODER)),
        "bert_eager": lambda: t.BertForSequenceClassification(
            t.BertConfig(**TEXT, **ENCODER, attn_implementation="eager")
        ),
        "bert_two_blocks": lambda: t.BertForSequenceClassification(
            t.BertConfig(**{**TEXT, **ENCODER, "num_hidden_layers": 2, "hidden_act": "gelu_new"})
        ),
        "roberta": lambda: t.RobertaForSequenceClassification(t.RobertaConfig(**TEXT, **ENCODER)),
        "distilbert": lambda: t.DistilBertForSequenceClassification(
            t.DistilBertConfig(**TEXT, dim=4, n_layers=1, n_heads=2, hidden_dim=6)
        ),
        # Both blocks are the same weights.
        "albert": lambda: t.AlbertForSequenceClassification(
            t.AlbertConfig(**{**TEXT, **ENCODER, "num_hidden_layers": 2}, embedding_size=3)
        ),
        "deberta_v2": lambda: t.DebertaV2ForSequenceClassification(
            t.DebertaV2Config(
                **TEXT,
                **ENCODER,
                relative_attention=True,
                position_buckets=2,
                pos_att_type=["c2p", "p2c"],
                norm_rel_ebd="layer_norm",
                share_att_key=True,
            )
        ),
        "modernbert": lambda: t.ModernBertForSequenceClassification(
            t.ModernBertConfig(**TEXT, **ENCODER, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2)
        ),
        "gpt2": lambda: t.GPT2ForSequenceClassification(t.GPT2Config(**GPT2)),
    }
    try:
        with torch.random.fork_rng(devices=[]):
            texts["modernbert"]()
    except StrictDataclassFieldValidationError:  # transformers 5.6 refuses what its own defaults become
        del texts["modernbert"]
    for name, factory in texts.items():
        yield Case(name, factory, TEXTS, LABELS, tolerance=_tolerance(name))

    tokens = torch.tensor([[0, IGNORED, 2, 1, 0], [IGNORED, 1, 1, IGNORED, IGNORED], [2, 0, 1, IGNORED, IGNORED]])
    yield Case("bert_tokens", lambda: t.BertForTokenClassification(t.BertConfig(**TEXT, **ENCODER)), TEXTS, tokens)
    t5 = t.T5Config(
        vocab_size=VOCABULARY,
        num_labels=CLASSES,
        pad_token_id=0,
        d_model=4,
        d_kv=2,
        d_ff=6,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        relative_attention_num_buckets=4,
        relative_attention_max_distance=8,
    )
    yield Case("t5_encoder", lambda: t.T5ForTokenClassification(t5), TEXTS, tokens, tolerance=_tolerance("t5_encoder"))

    llama: dict[str, Any] = {**TEXT, **ENCODER, "num_key_value_heads": 1}
    causal: dict[str, Callable[[], nn.Module]] = {
        "gpt2_causal": lambda: t.GPT2LMHeadModel(t.GPT2Config(**GPT2)),
        "llama_causal": lambda: t.LlamaForCausalLM(t.LlamaConfig(**llama)),
        "mixtral_causal": lambda: t.MixtralForCausalLM(
            t.MixtralConfig(**llama, num_local_experts=3, num_experts_per_tok=2, experts_implementation="eager")
        ),
    }
    for name, factory in causal.items():
        yield Case(name, factory, TEXTS, NEXT, classes=VOCABULARY, shift=True, tolerance=_tolerance(name))

    pictures: dict[str, tuple[Callable[[], nn.Module], dict[str, Tensor]]] = {
        "vit": (lambda: t.ViTForImageClassification(t.ViTConfig(**PICTURE, **ENCODER)), PICTURES),
        "vit_eager": (
            lambda: t.ViTForImageClassification(t.ViTConfig(**PICTURE, **ENCODER, attn_implementation="eager")),
            PICTURES,
        ),
        "dinov2": (lambda: t.Dinov2ForImageClassification(t.Dinov2Config(**PICTURE, **ENCODER, mlp_ratio=2)), PICTURES),
        "dinov2_swiglu": (
            lambda: t.Dinov2ForImageClassification(
                t.Dinov2Config(**PICTURE, **ENCODER, mlp_ratio=1, use_swiglu_ffn=True)
            ),
            PICTURES,
        ),
        "swin": (
            lambda: t.SwinForImageClassification(
                t.SwinConfig(
                    **{**PICTURE, "patch_size": 1}, embed_dim=4, depths=[2], num_heads=[2], window_size=2, mlp_ratio=2
                )
            ),
            PICTURES,
        ),
        "resnet": (
            lambda: t.ResNetForImageClassification(
                t.ResNetConfig(
                    num_channels=1,
                    embedding_size=2,
                    hidden_sizes=[2, 3],
                    depths=[1, 1],
                    layer_type="basic",
                    num_labels=CLASSES,
                )
            ),
            LARGER_PICTURES,
        ),
        "convnext": (
            lambda: t.ConvNextForImageClassification(
                t.ConvNextConfig(
                    num_channels=1, hidden_sizes=[3, 4], depths=[1, 1], num_stages=2, patch_size=2, num_labels=CLASSES
                )
            ),
            LARGER_PICTURES,
        ),
    }
    for name, (factory, inputs) in pictures.items():
        yield Case(name, factory, inputs, LABELS, tolerance=_tolerance(name))


def _tolerance(name: str) -> float:
    return 1e-4 if name in FLOAT32 else 1e-9


CASES = [*_function_cases(), *_convolution_cases(), *_module_cases(), *_transformers_cases()]


def find_case(name: str) -> Case:
    """The case of that name."""
    return next(case for case in CASES if case.name == name)
