"""Rules of elementwise functions: autograd differentiates the primal value only, once for all directions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .local import Local, Tangents, adjoint_of, broadcast
from .tangent import Tangent, shared, total
from .tape import Op, aten


def sloped(op: Op, tangents: Tangents, local: Local) -> list[Tangent | None]:
    """Piecewise linear, one argument."""
    (i,) = tangents
    x = op.value(i).requires_grad_()
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(op.call({i: x}).sum(), x)
    return [Tangent(tangents[i].directions, tangents[i].data * slope)]


def pointwise(op: Op, tangents: Tangents, local: Local) -> list[Tangent | None]:
    """Any elementwise function of any number of arguments."""
    shape = op.outs[0].shape
    places = list(tangents)
    with torch.enable_grad():
        xs = [op.value(i).expand(shape).detach().requires_grad_() for i in places]
        y = op.call(dict(zip(places, xs, strict=True)))
        y = y if isinstance(y, Tensor) else y[0]
        slopes = torch.autograd.grad(y.sum(), xs, create_graph=True)
        bends = [_gradients(slope, xs) for slope in slopes]
    data = {i: broadcast(tangents[i].data, shape) for i in places}
    adjoint = adjoint_of(op)
    for m, i in enumerate(places):
        for n, j in enumerate(places[: m + 1]):
            bend = bends[m][n]
            if bend is None:
                continue
            both = shared(tangents[i], tangents[j])
            if not both:
                continue
            first = Tangent(tangents[i].directions, data[i]).rows(both)
            second = Tangent(tangents[j].directions, data[j]).rows(both)
            local.add(both, adjoint * bend * (1 if i == j else 2), first * second)
    parts = [Tangent(tangents[i].directions, data[i] * s.detach()) for i, s in zip(places, slopes, strict=True)]
    return [total(parts), *[None] * (len(op.outs) - 1)]


def _gradients(slope: Tensor, xs: list[Tensor]) -> Sequence[Tensor | None]:
    if not slope.requires_grad:
        return [None] * len(xs)
    return torch.autograd.grad(slope.sum(), xs, retain_graph=True, allow_unused=True)


SLOPED = {
    aten.sign, aten.floor, aten.ceil, aten.round, aten.trunc, aten.softshrink, aten.hardshrink,
    aten.relu, aten.leaky_relu, aten.hardtanh, aten.abs, aten.clamp, aten.clamp_min, aten.clamp_max,
    aten.threshold, aten.hardsigmoid, aten.relu6,
}  # fmt: skip
POINTWISE = {
    aten.gelu, aten.celu, aten.silu, aten.sigmoid, aten.tanh, aten.softplus, aten.elu, aten.mish, aten.hardswish,
    aten.log_sigmoid_forward, aten.exp, aten.expm1, aten.log, aten.log1p, aten.log2, aten.sqrt, aten.rsqrt,
    aten.reciprocal, aten.square, aten.pow, aten.sin, aten.cos, aten.tan, aten.sinh, aten.cosh, aten.asinh,
    aten.atan, aten.atan2, aten.erf, aten.erfc, aten.maximum, aten.minimum, aten.where, aten.lerp,
    aten.addcmul, aten.addcdiv, aten.logaddexp, aten.xlogy, aten.rsub, aten._prelu_kernel,
}  # fmt: skip
