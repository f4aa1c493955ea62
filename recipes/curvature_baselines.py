"""Other ways to the numbers of ``hf_robust_ft.layer_quadratic_forms``, for comparison: slow, simple, independent.

Each function but one returns vᵀHv for every example and every layer, with H the Hessian of that one example's cross
entropy in that one layer's weight and v the direction given for the layer. The one, ``joint_batch_forms``, returns
what the authors of the Hessian distance measure compute instead. They share no code with the package. The measurement
is in eval mode; the model is left as it was found.

PyHessian and curvlinops are needed for their own functions only; ``INSTALL`` says how to install them.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

# `pip install curvlinops-for-pytorch` alone brings torchvision along, and with it may replace torch.
INSTALL = """\
    pip install numpy scipy tqdm einops einconv opt-einsum linear_operator unfoldNd
    pip install --no-deps pyhessian curvlinops-for-pytorch hessian-eigenthings backpack-for-pytorch"""

Inputs = Tensor | Mapping[str, Tensor]


def example_loop(
    model: nn.Module,
    inputs: Inputs,
    labels: Tensor,
    directions: Mapping[str, Tensor],
    *,
    layers: Sequence[str] | None = None,
    examples: Sequence[int] | None = None,
) -> Tensor:
    """Plain autograd: per example one graph of the gradient in all layers, differentiated again layer by layer.

    Args:
        model: a classifier that returns logits, or an output with ``logits``, as those of transformers do.
        inputs: of all examples: the model's only argument, or its keyword arguments. First dimension: examples.
        labels: one class per example.
        directions: the direction v of each layer, by the name of its weight.
        layers: some of the names in ``directions``; all of them if None.
        examples: the numbers of some of the examples; all of them if None.

    Returns:
        float64 ``[examples, layers]``, in the order asked for, on the device of the labels.
    """
    names, examples = _asked(labels, directions, layers, examples)
    values = _empty(labels, examples, names)
    with measuring(model, names) as (logits, weights):
        for n, (x, y) in enumerate(_singles(inputs, labels, examples)):
            loss = nn.functional.cross_entropy(logits(x), y)
            gradients = torch.autograd.grad(loss, weights, create_graph=True)
            for i, name in enumerate(names):
                v = directions[name]
                (product,) = torch.autograd.grad((gradients[i] * v).sum(), weights[i], retain_graph=True)
                values[n, i] = (product * v).sum()
    return values


def joint_batch_forms(
    model: nn.Module, batches: Iterable[tuple[Inputs, Tensor]], directions: Mapping[str, Tensor]
) -> Tensor:
    """The Hessian distance measure as the script of its authors takes it: one Hessian-vector product a batch.

    Written from the description of that script of Ju, Li & Zhang (ICML 2022), not from its text. With L the *mean*
    loss of a batch and v the way of *all* layers together, ``v_i · (∇²L v)_i = Σ_j v_iᵀ H_ij v_j``; the measure of
    layer i is the largest of these over the batches. The theorem asks for something else: one example at a time,
    ``v_iᵀ H_ii v_i`` alone, and of H_ii the positive part.

    Args:
        model: as for ``example_loop``.
        batches: inputs and labels.
        directions: the direction v of each layer, by the name of its weight.

    Returns:
        float64 ``[batches, layers]``, on the CPU.
    """
    rows = []
    with measuring(model, list(directions)) as (logits, weights):
        for inputs, labels in batches:
            loss = nn.functional.cross_entropy(logits(inputs), labels)
            gradients = torch.autograd.grad(loss, weights, create_graph=True)
            products = torch.autograd.grad(gradients, weights, grad_outputs=list(directions.values()))
            rows.append([(p * v).sum().item() for p, v in zip(products, directions.values(), strict=True)])
    return torch.tensor(rows, dtype=torch.float64)


def pyhessian_blocks(
    model: nn.Module,
    inputs: Inputs,
    labels: Tensor,
    directions: Mapping[str, Tensor],
    *,
    layers: Sequence[str] | None = None,
    examples: Sequence[int] | None = None,
    share_graph: bool = False,
) -> Tensor:
    """PyHessian, block by block: a ``hessian`` object for each example and layer, with only that layer trainable.

    Args:
        model, inputs, labels, directions, layers, examples: as for ``example_loop``.
        share_graph: make one object for each example, with all layers trainable, and pass its gradients to
            ``hessian_vector_product`` one by one. PyHessian's own methods never do so, but its functions allow
            it; the work is then that of ``example_loop``.

    Returns:
        float64 ``[examples, layers]``, as ``example_loop``.
    """
    pyhessian = package("pyhessian")
    names, examples = _asked(labels, directions, layers, examples)
    values = _empty(labels, examples, names)
    criterion = nn.CrossEntropyLoss()
    with measuring(model, names) as (logits, weights), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Using backward.* with create_graph=True")
        for n, (x, y) in enumerate(_singles(inputs, labels, examples)):
            # `cuda=False`, on any device: PyHessian need not move the data.
            if share_graph:
                asked = pyhessian.hessian(logits, criterion, data=(x, y), cuda=False)
                gradients = dict(zip(asked.params, asked.gradsH, strict=True))
                for i, (name, weight) in enumerate(zip(names, weights, strict=True)):
                    v = [directions[name]]
                    product = pyhessian.hessian_vector_product([gradients[weight]], [weight], v)
                    values[n, i] = pyhessian.group_product(product, v)
                logits.zero_grad()
                continue
            logits.requires_grad_(False)
            for i, (name, weight) in enumerate(zip(names, weights, strict=True)):
                weight.requires_grad_(True)
                asked = pyhessian.hessian(logits, criterion, data=(x, y), cuda=False)
                v = [directions[name]]
                product = pyhessian.hessian_vector_product(asked.gradsH, asked.params, v)
                values[n, i] = pyhessian.group_product(product, v)
                weight.requires_grad_(False)
                weight.grad = None  # PyHessian would add the next gradient to it
    return values


def curvlinops_blocks(
    model: nn.Module,
    inputs: Inputs,
    labels: Tensor,
    directions: Mapping[str, Tensor],
    *,
    layers: Sequence[str] | None = None,
    examples: Sequence[int] | None = None,
) -> Tensor:
    """curvlinops: per example a ``HessianLinearOperator`` that is block-diagonal in the layers, times all directions.

    An operator for each example and layer takes as long: curvlinops works block by block anyway.

    Args:
        model, inputs, labels, directions, layers, examples: as for ``example_loop``.

    Returns:
        float64 ``[examples, layers]``, as ``example_loop``.
    """
    curvlinops = package("curvlinops")
    names, examples = _asked(labels, directions, layers, examples)
    values = _empty(labels, examples, names)
    vectors = [directions[name] for name in names]
    with measuring(model, names) as (logits, weights):
        for n, (x, y) in enumerate(_singles(inputs, labels, examples)):
            operator = curvlinops.HessianLinearOperator(
                logits,
                nn.CrossEntropyLoss(),
                weights,
                [(x, y)],
                check_deterministic=False,
                num_data=1,
                block_sizes=[1] * len(weights),
                batch_size_fn=lambda _: 1,
            )
            for i, (product, v) in enumerate(zip(operator @ vectors, vectors, strict=True)):
                values[n, i] = (product * v).sum()
    return values


class Logits(nn.Module):
    """The model as these libraries call one: a single argument in, logits out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Inputs) -> Tensor:
        output = self.model(**inputs) if isinstance(inputs, Mapping) else self.model(inputs)
        return output if isinstance(output, Tensor) else output.logits


@contextmanager
def measuring(model: nn.Module, names: Sequence[str]) -> Iterator[tuple[Logits, list[nn.Parameter]]]:
    """Eval mode, gradients in the named weights only, attention that can be differentiated twice; then as before."""
    training = {module: module.training for module in model.modules()}
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    weights = [model.get_parameter(name) for name in names]
    try:
        model.eval().requires_grad_(False).zero_grad()
        for weight in weights:
            weight.requires_grad_(True)
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            yield Logits(model).eval(), weights
    finally:
        for parameter, required, gradient in before:
            parameter.requires_grad_(required)
            parameter.grad = gradient
        for module, mode in training.items():
            module.training = mode


def _asked(
    labels: Tensor, directions: Mapping[str, Tensor], layers: Sequence[str] | None, examples: Sequence[int] | None
) -> tuple[list[str], list[int]]:
    names = list(directions if layers is None else layers)
    return names, list(range(len(labels)) if examples is None else examples)


def _empty(labels: Tensor, examples: Sequence[int], names: Sequence[str]) -> Tensor:
    return torch.empty(len(examples), len(names), dtype=torch.float64, device=labels.device)


def _singles(inputs: Inputs, labels: Tensor, examples: Sequence[int]) -> Iterator[tuple[Inputs, Tensor]]:
    """One batch of one example for each."""
    for n in examples:
        if isinstance(inputs, Mapping):
            yield {key: value[n : n + 1] for key, value in inputs.items()}, labels[n : n + 1]
        else:
            yield inputs[n : n + 1], labels[n : n + 1]


def package(name: str) -> Any:
    """A library that is needed for its own baseline only.

    Raises:
        ImportError: it is not there; the message says how to install it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{name} cannot be imported ({error}). This baseline needs:\n{INSTALL}") from error
