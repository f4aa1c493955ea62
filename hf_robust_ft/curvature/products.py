"""Hessian-vector products by autograd: for the positive part, and for models that the sweep can't follow.

For one weight that is used once, by an operation that is linear in it, ``a = X W``, the Hessian of one example is
``H = Xᵀ H_a X`` with H_a the Hessian in that operation's output. So products of all examples of a batch come from
one second backward pass each layer, in activation space. Everything else (groups, tied weights, weights that an
unknown operation reads) takes products in weight space, one example at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from .lanczos import positive_part
from .sweep import Direction, separable
from .tape import Op, Tape, aten

Bend = Callable[[Sequence[Tensor]], list[Tensor]]
"""V → ``∇²f V``, one tensor for each weight."""

_REARRANGED = {aten.t, aten.transpose, aten.view, aten._unsafe_view, aten.permute, aten.clone, aten.alias}


@dataclass
class Use:
    """The one operation that reads a weight, ``a = X W``, by rows."""

    out: Tensor
    """a, with autograd's graph."""
    inputs: Tensor
    """X, [examples, rows, in]."""
    direction: Tensor
    """V as X meets it, [1 or examples, in, out]."""
    rows: Callable[[Tensor], Tensor]
    """Shape of a → [examples, rows, out]."""
    unrows: Callable[[Tensor], Tensor]
    """The way back."""


@dataclass
class Products:
    """For each example, [examples] in float64."""

    form: Tensor
    """``vᵀ H v``."""
    length: Tensor
    """``‖H v‖``."""
    reach: Tensor
    """``‖P v‖``, P a projection with ``P H = H``: what lies outside of it can't matter."""
    positive: Tensor | None
    """``vᵀ H⁺ v`` by Lanczos, where asked for."""
    gap: Tensor | None


def find_use(tape: Tape, weight: int, direction: Tensor, examples: int) -> Use | None:
    """How a weight is used; None if more than once, or by an operation that has no rows."""
    at: int | None = weight
    moved = direction
    while True:
        found = tape.readers.get(at, [])
        if len(found) != 1:
            return None
        (op,) = found
        if op.packet not in _REARRANGED:
            break
        moved, at = op.call({0: moved}), op.out_slots[0]
    if op.out_slots[0] in tape.overwritten:
        return None
    place = op.slots.index(at)
    out = op.outs[0]
    if (op.packet, place) in ((aten.mm, 1), (aten.addmm, 2)) and len(out) % examples == 0:
        x = op.value(place - 1)
        if op.kwargs.get("alpha", 1) != 1:
            return None
        return Use(
            out, x.view(examples, -1, x.shape[1]), moved.unsqueeze(0),
            lambda a: a.reshape(examples, -1, a.shape[-1]), lambda r: r.reshape(out.shape),
        )  # fmt: skip
    if (op.packet, place) == (aten.embedding, 0) and len(out) == examples:
        return _lookup(op, out, moved)
    if (op.packet, place) == (aten.convolution, 1) and out.dim() == 4 and len(out) == examples:
        return _patches(op, out, moved)
    return None


def _lookup(op: Op, out: Tensor, direction: Tensor) -> Use:
    """An embedding: X has a column for each different token of an example, 1 where it stands."""
    examples = len(out)
    ids = op.leaves[1].reshape(examples, -1)
    padding = op.args[2] if len(op.args) > 2 else -1
    # Position of the first occurrence stands for the token: as many columns as positions, the others zero.
    same = ids.unsqueeze(2) == ids.unsqueeze(1)
    first = same.to(torch.uint8).argmax(2)
    hot = F.one_hot(first, ids.shape[1]).to(out.dtype)
    present = (first == torch.arange(ids.shape[1], device=ids.device)).unsqueeze(-1)
    if padding >= 0:
        hot = hot * (ids != padding).unsqueeze(-1)
        present = present & (ids != padding).unsqueeze(-1)
    return Use(
        out, hot, direction[ids] * present,
        lambda a: a.reshape(examples, -1, a.shape[-1]), lambda r: r.reshape(out.shape),
    )  # fmt: skip


def _patches(op: Op, out: Tensor, direction: Tensor) -> Use | None:
    """A two-dimensional convolution: the rows of X are patches."""
    _, _, _, stride, padding, dilation, transposed, _, groups = op.args
    if transposed or groups != 1:
        return None
    kernel = tuple(direction.shape[2:])
    # One number may stand for both dimensions.
    dilation, padding, stride = (tuple(given) * (2 // len(given)) for given in (dilation, padding, stride))
    x = F.unfold(op.value(0), kernel, dilation, padding, stride).transpose(1, 2)
    examples, channels, *spatial = out.shape
    # Contiguous: given strides like those of channels_last, torch 2.13 differentiates some convolutions twice wrongly,
    # without a word, for a batch of one.
    return Use(
        out, x, direction.flatten(1).t().unsqueeze(0),
        lambda a: a.reshape(examples, channels, -1).transpose(1, 2),
        lambda r: r.transpose(1, 2).contiguous().view(examples, channels, *spatial),
    )  # fmt: skip


def find_uses(tape: Tape, directions: Sequence[Direction], losses: Tensor) -> dict[int, Use]:
    """Of the directions whose products are taken in activation space, all examples together."""
    ones = {d: next(iter(direction.items())) for d, direction in enumerate(directions) if len(direction) == 1}
    uses = {d: use for d, (leaf, v) in ones.items() if (use := find_use(tape, leaf, v, len(losses))) is not None}
    if len(losses) == 1 or not uses:
        return uses
    outs = [use.out for use in uses.values()]
    apart = separable(outs, torch.autograd.grad(losses.sum(), outs, retain_graph=True), losses)
    return {d: use for (d, use), alone in zip(uses.items(), apart, strict=True) if alone}


def in_activation_space(uses: Sequence[Use], losses: Tensor, steps: int | None) -> list[Products]:
    """Products for some weights that are used once each, all examples of the batch together.

    Args:
        uses: one each layer.
        losses: [examples], with autograd's graph.
        steps: of Lanczos; None leaves the positive part out.
    """
    gradients = torch.autograd.grad(losses.sum(), [use.out for use in uses], create_graph=True)
    return [_of_use(use, gradient, steps) for use, gradient in zip(uses, gradients, strict=True)]


def _of_use(use: Use, gradient: Tensor, steps: int | None) -> Products:
    def bend(rows: Tensor) -> Tensor:  # H_a times rows
        if not gradient.requires_grad:
            return torch.zeros_like(rows)
        (found,) = torch.autograd.grad(gradient, use.out, use.unrows(rows), retain_graph=True, allow_unused=True)
        return torch.zeros_like(rows) if found is None else use.rows(found)

    x, v = use.inputs, use.direction
    moved = x @ v
    bent = bend(moved)
    form = (moved * bent).flatten(1).sum(1, dtype=torch.float64)
    rows, width, out = x.shape[1], x.shape[2], bent.shape[2]
    if rows * (width + out) < width * out:  # ‖Xᵀ b‖² = ⟨X Xᵀ, b bᵀ⟩, where that is less work
        square = ((x @ x.transpose(1, 2)) * (bent @ bent.transpose(1, 2))).flatten(1).sum(1, dtype=torch.float64)
    else:
        square = (x.transpose(1, 2) @ bent).flatten(1).square().sum(1, dtype=torch.float64)
    length = square.clamp(min=0).sqrt()
    # H sees nothing outside the span of X's rows. In an orthonormal basis of it the vectors are short.
    if rows < width:
        basis = torch.linalg.qr(x.transpose(1, 2)).Q
        x, v = x @ basis, basis.transpose(1, 2) @ v
    start = v.expand(len(x), -1, -1)
    reach = start.flatten(1).double().norm(dim=1)
    if steps is None:
        return Products(form, length, reach, None, None)
    positive, gap = positive_part(lambda w: x.transpose(1, 2) @ bend(x @ w), start, steps)
    return Products(form, length, reach, positive, gap)


def in_weight_space(
    weights: Sequence[Tensor], direction: Sequence[Tensor], loss: Tensor, steps: int | None
) -> Products:
    """Products for one group of weights and one example.

    Args:
        weights: leaves that require a gradient.
        direction: V, one each weight.
        loss: a scalar, with autograd's graph.
    """
    bend, sizes = bend_of(loss, weights), [weight.numel() for weight in weights]

    def product(vector: Tensor) -> Tensor:  # [1, P]
        parts = torch.split(vector[0], sizes)
        bent = bend([part.view_as(weight) for part, weight in zip(parts, weights, strict=True)])
        return torch.cat([part.reshape(-1) for part in bent]).unsqueeze(0)

    v = torch.cat([d.reshape(-1) for d in direction]).unsqueeze(0)
    bent = product(v)
    form, length, reach = (v * bent).sum(1, dtype=torch.float64), bent.double().norm(dim=1), v.double().norm(dim=1)
    if steps is None:
        return Products(form, length, reach, None, None)
    return Products(form, length, reach, *positive_part(product, v, steps))


def bend_of(value: Tensor, weights: Sequence[Tensor]) -> Bend:
    """V → ``∇²f V`` by reverse over reverse; 0 for weights without influence.

    Args:
        value: a scalar f, with autograd's graph.
        weights: that f depends on.

    The function raises:
        NotTwiceDifferentiable: an operation of which autograd knows no second derivative.
    """
    gradients: Sequence[Tensor | None] = [None] * len(weights)
    if value.requires_grad:
        gradients = torch.autograd.grad(value, weights, create_graph=True, allow_unused=True)
    # A gradient that depends on no weight (a loss that is linear in them) has no graph.
    curved = [(i, gradient) for i, gradient in enumerate(gradients) if gradient is not None and gradient.requires_grad]

    def bend(direction: Sequence[Tensor]) -> list[Tensor]:
        found: Sequence[Tensor | None] = [None] * len(weights)
        if curved:
            with differentiating_twice():
                found = torch.autograd.grad(
                    [gradient for _, gradient in curved], weights, [direction[i] for i, _ in curved],
                    retain_graph=True, allow_unused=True,
                )  # fmt: skip
        return [torch.zeros_like(w) if f is None else f for f, w in zip(found, weights, strict=True)]

    return bend


def each_gradient(value: Tensor, weights: Sequence[Tensor], use: Callable[[int, Tensor], None]) -> None:
    """Call ``use(i, ∂f/∂w_i)`` for each weight that f depends on, as soon as it is known: never are all in memory.

    Args:
        value: a scalar f, with autograd's graph, which stays.
        weights: leaves without a gradient of their own.
    """

    def take(i: int, weight: Tensor) -> None:
        gradient, weight.grad = weight.grad, None
        assert gradient is not None
        use(i, gradient)

    hooks = [
        w.register_post_accumulate_grad_hook(partial(take, i))  # type: ignore[no-untyped-call]
        for i, w in enumerate(weights)
    ]
    try:
        value.backward(inputs=list(weights), retain_graph=True)  # type: ignore[no-untyped-call]
    finally:
        for hook in hooks:
            hook.remove()


class NotTwiceDifferentiable(RuntimeError):
    """Autograd has no second derivative for an operation of the model."""


@contextlib.contextmanager
def differentiating_twice() -> Iterator[None]:
    """Name what autograd lacks, and what does without.

    Raises:
        NotTwiceDifferentiable: instead of autograd's own error.
    """
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        if "is not implemented" not in str(error):
            raise
        raise NotTwiceDifferentiable(
            f"autograd can't differentiate this model twice: {error}. Where the sweep has a rule for every operation, "
            "kind='hessian' or 'gauss_newton' of layer_quadratic_forms, and hessian_trace with joint=False, do without"
        ) from error
