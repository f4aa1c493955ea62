"""Rules of elementwise functions: autograd differentiates the primal value only, once for all directions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .local import Local, Tangents, adjoint_of, broadcast, remembered
from .tangent import Tangent, shared, total
from .tape import Op, aten


def sloped(op: Op, tangents: Tangents, local: Local) -> list[Tangent | None]:
    """Piecewise linear, one argument."""
    ((i, t),) = tangents.items()

    def slope() -> Tensor:
        x = op.value(i).requires_grad_()
        with torch.enable_grad():
            return torch.autograd.grad(op.call({i: x}).sum(), x)[0]

    return [Tangent(t.directions, t.data * remembered(op, "slope", slope))]


def pointwise(op: Op, tangents: Tangents, local: Local) -> list[Tangent | None]:
    """Any elementwise function of any number of arguments."""
    shape = op.outs[0].shape
    places = tuple(tangents)
    slopes, weights = remembered(op, places, lambda: _derivatives(op, places))
    data = {i: Tangent(tangents[i].directions, broadcast(tangents[i].data, shape)) for i in places}
    for (i, j), weight in weights.items():
        if both := shared(data[i], data[j]):
            local.add(both, weight, data[i].rows(both) * data[j].rows(both))
    parts = [Tangent(data[i].directions, data[i].data * slope) for i, slope in zip(places, slopes, strict=True)]
    return [total(parts), *[None] * (len(op.outs) - 1)]


def _derivatives(op: Op, places: Sequence[int]) -> tuple[list[Tensor], dict[tuple[int, int], Tensor]]:
    """First derivatives, and second ones times the adjoint, those of mixed arguments twice."""
    shape = op.outs[0].shape
    with torch.enable_grad():
        xs = [op.value(i).expand(shape).detach().requires_grad_() for i in places]
        y = op.call(dict(zip(places, xs, strict=True)))
        y = y if isinstance(y, Tensor) else y[0]
        slopes = torch.autograd.grad(y.sum(), xs, create_graph=True)
        bends = [_gradients(slope, xs) for slope in slopes]
    weights = {
        (i, j): adjoint_of(op) * bend * (1 if i == j else 2)
        for m, i in enumerate(places)
        for n, j in enumerate(places[: m + 1])
        if (bend := bends[m][n]) is not None
    }
    return [slope.detach() for slope in slopes], weights


def _gradients(slope: Tensor, xs: list[Tensor]) -> Sequence[Tensor | None]:
    if not slope.requires_grad:
        return [None] * len(xs)
    return torch.autograd.grad(slope.sum(), xs, retain_graph=True, allow_unused=True)


SLOPED = {
    aten.sign, aten.floor, aten.ceil, aten.round, aten.trunc, aten.softshrink, aten.hardshrink,
    aten.relu, aten.leaky_relu, aten.hardtanh, aten.abs, aten.clamp, aten.clamp_min, aten.clamp_max,
    aten.threshold, aten.hardsigmoid,
}  # fmt: skip
POINTWISE = {
    aten.gelu, aten.celu, aten.silu, aten.sigmoid, aten.tanh, aten.softplus, aten.elu, aten.mish, aten.hardswish,
    aten.log_sigmoid_forward, aten.exp, aten.expm1, aten.log, aten.log1p, aten.log2, aten.sqrt, aten.rsqrt,
    aten.reciprocal, aten.square, aten.pow, aten.sin, aten.cos, aten.tan, aten.sinh, aten.cosh, aten.asinh,
    aten.atan, aten.atan2, aten.erf, aten.erfc, aten.maximum, aten.minimum, aten.where, aten.lerp,
    aten.addcmul, aten.addcdiv, aten.logaddexp, aten.xlogy, aten.rsub, aten._prelu_kernel,
}  # fmt: skip
