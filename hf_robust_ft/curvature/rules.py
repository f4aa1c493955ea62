"""What each ATen operation does to tangents, and how much its own curvature adds.

For ``y = f(x)`` and a tangent ``x1`` of the inputs a rule returns the first-order tangent
``y1 = Df(x)[x1]`` and adds ``⟨ā, D²f(x)[x1, x1]⟩`` to the local term, with ``ā`` the adjoint of y.
A rule never differentiates anything along the directions: its cost is that of the operation, times their number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from .tangent import Tangent, shared, total, union
from .tape import Op, Untraceable, aten

Tangents = Mapping[int, Tangent]
"""By the index of the leaf (flattened argument) that they belong to."""


class Local:
    """The sum of the local terms, [directions, examples]."""

    def __init__(self, values: Tensor) -> None:
        self.examples = values.shape[1]
        self.values = values

    def part(self, first: int, end: int) -> Local:
        """For some consecutive directions, which count from 0 there."""
        return Local(self.values[first:end])

    def add(self, directions: Sequence[int], weight: Tensor, change: Tensor) -> None:
        """Add ``⟨weight, change⟩`` example by example.

        Args:
            weight: [*shape], the batch in the leading dimension, perhaps folded with others.
            change: [len(directions), *shape].
        """
        change = change.reshape(len(directions), self.examples, -1)
        weight = weight.reshape(self.examples, -1, 1)
        found = torch.bmm(change.transpose(0, 1), weight)[..., 0].t()
        first, last = directions[0], directions[-1]
        if last - first + 1 == len(directions):
            self.values[first : last + 1] += found
        else:
            self.values[list(directions)] += found


Rule = Callable[[Op, Tangents, Local], Sequence[Tangent | None]]


def rule_of(op: Op) -> Rule | None:
    """The rule of an operation; None if there is none."""
    if op.packet in (aten.max, aten.min) and op.func._overloadname != "dim":
        return None
    if op.packet in _JOINTLY_LINEAR:
        return _linear
    for packets, rule in ((_SLOPED, _sloped), (_POINTWISE, _pointwise)):
        if op.packet in packets:
            return rule
    return _RULES.get(op.packet)


def needs_adjoint(op: Op, reach: Mapping[int, int]) -> bool:
    """Whether an operation has curvature along some direction.

    Args:
        reach: for each slot the directions along which it moves, as a bit set.
    """
    if op.packet in _JOINTLY_LINEAR or op.packet in _SLOPED or op.packet in _LINEAR_RULES:
        return False
    if op.packet in _BILINEAR:
        parts = [reach[slot] for slot in op.slots if slot is not None]
        return any(a & b for a, b in combinations(parts, 2))
    if op.packet is aten.div and op.slots[1] is None:
        return False
    return True


# Linear operations


def _view(op: Op, tangents: Tangents, local: Local) -> list[Tangent | None]:
    t = tangents[0]
    return [Tangent(t.directions, t.data.reshape(len(t.data), *op.outs[0].shape))]


def _transpose(op: Op, tangents: Tangents, local: Local) -> list[Tangent | None]:
    t = tangents[0]
    first, second = op.leaves[1:3] if len(op.leaves) >= 3 else (-1, -2)
    return [Tangent(t.directions, t.data.transpose(_shift(first), _shift(second)))]


def _permute(op: Op, tangents: Tangents, local: Local) -> list[Tangent | None]:
    t = tangents[0]
    return [Tangent(t.directions, t.data.permute(0, *(dim % op.leaves[0].dim() + 1 for dim in op.args[1])))]


def _expand(op: Op, tangents: Tangents, local: Local) -> list[Tangent | None]:
    t = tangents[0]
    return [Tangent(t.directions, _broadcast(t.data, op.outs[0].shape))]


def _same(op: Op, tangents: Tangents, local: Local) -> list[Tangent | None]:
    # A copy for the sake of memory layout; the rules make their own where they need one.
    return [tangents[0]]


def _add(op: Op, tangents: Tangents, local: Local) -> list[Tangent | None]:
    alpha = op.kwargs.get("alpha", 1)
    parts = []
    for i, t in tangents.items():
        data = _broadcast(t.data, op.outs[0].shape)
        factor = (1 if i == 0 else alpha) * (-1 if i == 1 and op.packet is aten.sub else 1)
        parts.append(Tangent(t.directions, data if factor == 1 else data * factor))
    return [total(parts)]


def _concatenate(op: Op, tangents: Tangents, local: Local) -> list[Tangent | None]:
    directions = union(list(tangents.values()))
    tensors, dim = op.args[0], op.args[1] if len(op.args) > 1 else 0
    parts = [
        tangents[i].spread(directions) if i in tangents else tensor.new_zeros(()).expand(len(directions), *tensor.shape)
        for i, tensor in enumerate(tensors)
        if tensor.shape != (0,)  # which torch.cat passes over, whatever the shape of the others
    ]
    join = torch.stack if op.packet is aten.stack else torch.cat
    return [Tangent(directions, join(parts, _shift(dim)))]


def _embedding(op: Op, tangents: Tangents, local: Local) -> list[Tangent | None]:
    t = tangents[0]
    indices, padding = op.leaves[1], op.args[2] if len(op.args) > 2 else -1
    data = t.data[:, indices]
    if padding >= 0:  # The padding row has no gradient: it is no part of the layer.
        data = data.masked_fill((indices == padding).unsqueeze(-1), 0)
    return [Tangent(t.directions, data)]


def _max_pool(op: Op, tangents: Tangents, local: Local) -> list[Tangent | None]:
    # Linear as long as the largest entries stay the largest.
    t = tangents[0]
    indices = op.outs[1]
    spatial = indices.dim() - (2 if op.packet is aten.max_pool2d_with_indices else 3)
    flat = t.data.flatten(1 + spatial)
    at = indices.flatten(spatial).expand(len(flat), *flat.shape[1:-1], -1)
    return [Tangent(t.directions, flat.gather(-1, at).reshape(len(flat), *indices.shape)), None]


def _max_dim(op: Op, tangents: Tangents, local: Local) -> list[Tangent | None]:
    t = tangents[0]
    dim = op.args[1] % op.leaves[0].dim()
    keep = len(op.args) > 2 and op.args[2]
    indices = op.outs[1] if keep else op.outs[1].unsqueeze(dim)
    data = t.data.gather(dim + 1, indices.expand(len(t.data), *indices.shape))
    return [Tangent(t.directions, data if keep else data.squeeze(dim + 1)), None]


def _batch_norm(op: Op, tangents: Tangents, local: Local) -> list[Tangent | None]:
    # In eval mode: one factor a channel. (x, weight, bias, mean, variance, …, eps)
    if any(isinstance(a, bool) and a for a in op.args):
        raise Untraceable(f"{op.func} uses the statistics of the batch; put the model in eval mode")
    t = tangents[0]
    weight, variance, eps = op.args[1], op.args[4], op.args[7 if op.packet is aten.native_batch_norm else 6]
    factor = (variance + eps).rsqrt() * (1 if weight is None else weight)
    shape = [-1] + [1] * (op.leaves[0].dim() - 2)
    return [Tangent(t.directions, t.data * factor.detach().reshape(shape)), *[None] * (len(op.outs) - 1)]


def _linear(op: Op, tangents: Tangents, local: Local) -> list[Tangent | None]:
    """Any operation that is linear in its active arguments together, through its batching rule."""
    directions = union(list(tangents.values()))
    places = list(tangents)
    replaced: dict[int, Any] = {}
    for i in _JOINTLY_LINEAR[op.packet] if len(_JOINTLY_LINEAR[op.packet]) > 1 else ():
        # What is constant in a linear place has no tangent.
        if i not in tangents and isinstance(op.leaves[i], Tensor):
            replaced[i] = torch.zeros_like(op.leaves[i])

    def apply(*data: Tensor) -> Any:
        return op.call({**replaced, **dict(zip(places, data, strict=True))})

    result = torch.vmap(apply)(*(tangents[i].spread(directions) for i in places))
    results = result if isinstance(result, (tuple, list)) else [result]
    return [Tangent(directions, data) for data in results]


# Products


def _mul(op: Op, tangents: Tangents, local: Local) -> list[Tangent | None]:
    shape = op.outs[0].shape
    parts = []
    for i, t in tangents.items():
        other = op.leaves[1 - i]
        factor = op.value(1 - i) if isinstance(other, Tensor) else other
        data = _align(t.data, len(shape)) * factor
        parts.append(Tangent(t.directions, _broadcast(data, shape)))
    if len(tangents) == 2 and (both := shared(tangents[0], tangents[1])):
        first, second = (_align(tangents[i].rows(both), len(shape)) for i in (0, 1))
        local.add(both, 2 * _adjoint(op), _broadcast(first * second, shape))
    return [total(parts)]


def _div(op: Op, tangents: Tangents, local: Local) -> Sequence[Tangent | None]:
    if 1 in tangents:
        return _pointwise(op, tangents, local)
    t, divisor = tangents[0], op.leaves[1]
    data = _align(t.data, op.outs[0].dim()) / (op.value(1) if isinstance(divisor, Tensor) else divisor)
    return [Tangent(t.directions, _broadcast(data, op.outs[0].shape))]


def _matmul(op: Op, tangents: Tangents, local: Local) -> list[Tangent | None]:
    """mm, bmm, addmm, baddbmm."""
    offset = 1 if op.packet in (aten.addmm, aten.baddbmm) else 0
    alpha, beta = op.kwargs.get("alpha", 1), op.kwargs.get("beta", 1)
    a, b = tangents.get(offset), tangents.get(offset + 1)
    parts = []
    if a is not None:
        parts.append(Tangent(a.directions, _product(a.data, op.value(offset + 1))))
    if b is not None:
        parts.append(Tangent(b.directions, torch.matmul(op.value(offset), b.data)))
    if a is not None and b is not None and (both := shared(a, b)):
        local.add(both, 2 * alpha * _adjoint(op), torch.matmul(a.rows(both), b.rows(both)))
    if alpha != 1:
        parts = [Tangent(t.directions, t.data * alpha) for t in parts]
    if offset and 0 in tangents:
        t = tangents[0]
        parts.append(Tangent(t.directions, _broadcast(t.data, op.outs[0].shape) * beta))
    return [total(parts)]


def _product(data: Tensor, matrix: Tensor) -> Tensor:
    if matrix.dim() == 2:
        return (data.reshape(-1, data.shape[-1]) @ matrix).reshape(*data.shape[:-1], -1)
    return torch.matmul(data, matrix)


def _convolution(op: Op, tangents: Tangents, local: Local) -> list[Tangent | None]:
    x, weight, _, *rest = op.args

    def convolve(inputs: Tensor, kernel: Tensor) -> Tensor:
        return aten.convolution(inputs, kernel, None, *rest)  # type: ignore[no-any-return]

    def each(t: Tangent) -> Tensor:  # the directions join the batch
        out = convolve(t.data.flatten(0, 1), op.value(1))
        return out.reshape(len(t.data), -1, *out.shape[1:])

    parts = []
    if 0 in tangents:
        parts.append(Tangent(tangents[0].directions, each(tangents[0])))
    if 1 in tangents:
        kernels = tangents[1]
        data = torch.stack([convolve(op.value(0), kernel) for kernel in kernels.data])
        parts.append(Tangent(kernels.directions, data))
    if len(tangents) == 2 and (both := shared(tangents[0], tangents[1])):
        pairs = zip(tangents[0].rows(both), tangents[1].rows(both), strict=True)
        local.add(both, 2 * _adjoint(op), torch.stack([convolve(inputs, kernel) for inputs, kernel in pairs]))
    return [total(parts)]


# Normalisation


def _softmax(op: Op, tangents: Tangents, local: Local) -> list[Tangent | None]:
    t, p, dim = tangents[0], op.outs[0].detach(), op.args[1]
    change = t.data.to(p.dtype)
    change = change - (p * change).sum(_shift(dim), keepdim=True)
    adjoint = _adjoint(op)
    weight = p * (adjoint - (p * adjoint).sum(dim, keepdim=True))
    local.add(t.directions, weight, change.square())
    return [Tangent(t.directions, change.mul_(p))]


def _log_softmax(op: Op, tangents: Tangents, local: Local) -> list[Tangent | None]:
    t, p, dim = tangents[0], op.outs[0].detach().exp(), op.args[1]
    change = t.data.to(p.dtype)
    change = change - (p * change).sum(_shift(dim), keepdim=True)
    local.add(t.directions, -p * _adjoint(op).sum(dim, keepdim=True), change.square())
    return [Tangent(t.directions, change)]


def _logsumexp(op: Op, tangents: Tangents, local: Local) -> list[Tangent | None]:
    t, x = tangents[0], op.value(0)
    dims = [d % x.dim() for d in op.args[1]]
    if len(dims) > 1:
        return list(_by_autograd(op, tangents, local))
    (dim,), keep = dims, len(op.args) > 2 and op.args[2]
    p = torch.softmax(x, dim)
    mean = (p * t.data).sum(dim + 1, keepdim=True)
    adjoint = _adjoint(op) if keep else _adjoint(op).unsqueeze(dim)
    local.add(t.directions, p * adjoint, (t.data - mean).square())
    return [Tangent(t.directions, mean if keep else mean.squeeze(dim + 1))]


def _layer_norm(op: Op, tangents: Tangents, local: Local) -> list[Tangent | None]:
    x, shape, gain, _, eps = op.args
    size = x.numel() // x.shape[: x.dim() - len(shape)].numel()
    rows = op.value(0).reshape(-1, size)
    gain = None if gain is None else gain.detach().reshape(1, size)
    return _normalised(op, tangents, local, rows, gain, eps)


def _group_norm(op: Op, tangents: Tangents, local: Local) -> list[Tangent | None]:
    x, gain, _, batch, channels, pixels, groups, eps = op.args
    rows = op.value(0).reshape(batch * groups, -1)
    if gain is not None:
        gain = gain.detach().reshape(groups, -1, 1).expand(groups, channels // groups, pixels)
        gain = gain.reshape(1, groups, -1).expand(batch, groups, -1).reshape(batch * groups, -1)
    return _normalised(op, tangents, local, rows, gain, eps)


def _normalised(
    op: Op, tangents: Tangents, local: Local, rows: Tensor, gain: Tensor | None, eps: float
) -> list[Tangent | None]:
    """``y = γ h + β`` with h the rows made zero-mean and unit-variance.

    With ``a = (x1 - mean x1)·r``, ``m1 = mean(h a)`` and ``m2 = mean(a²)``, each along a row:
    ``y1 = γ (a - h m1)`` and ``D² = γ (h (3 m1² - m2) - 2 a m1)``.
    """
    (t,) = tangents.values()
    if set(tangents) != {0}:
        raise Untraceable(f"{op.func} with a trained weight that is measured as a layer")
    size = rows.shape[-1]
    centred = rows - rows.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    h = centred * scale
    weight = _adjoint(op).reshape(rows.shape)
    weight = weight if gain is None else weight * gain
    a = t.data.reshape(len(t.data), *rows.shape)
    a = (a - a.mean(-1, keepdim=True)).mul_(scale)
    m1 = (a * h).mean(-1)
    m2 = a.square().mean(-1)
    along = (a * weight).sum(-1)
    curved = (weight * h).sum(-1) * (3 * m1.square() - m2) - 2 * m1 * along
    local.add(t.directions, torch.ones_like(scale), curved)
    y1 = a.sub_(h * m1.unsqueeze(-1))
    y1 = (y1 if gain is None else y1.mul_(gain)).reshape(len(t.data), *op.outs[0].shape)
    return [Tangent(t.directions, y1), *[None] * (len(op.outs) - 1)]


# Elementwise operations: autograd differentiates the primal value only, once for all directions.


def _sloped(op: Op, tangents: Tangents, local: Local) -> list[Tangent | None]:
    """Piecewise linear, one argument."""
    (i,) = tangents
    x = op.value(i).requires_grad_()
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(op.call({i: x}).sum(), x)
    return [Tangent(tangents[i].directions, tangents[i].data * slope)]


def _pointwise(op: Op, tangents: Tangents, local: Local) -> list[Tangent | None]:
    """Any elementwise function of any number of arguments."""
    shape = op.outs[0].shape
    places = list(tangents)
    with torch.enable_grad():
        xs = [op.value(i).expand(shape).detach().requires_grad_() for i in places]
        y = op.call(dict(zip(places, xs, strict=True)))
        slopes = torch.autograd.grad(y.sum(), xs, create_graph=True)
        bends = [_gradients(slope, xs) for slope in slopes]
    data = {i: _broadcast(tangents[i].data, shape) for i in places}
    adjoint = _adjoint(op)
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
    return [
        total([Tangent(tangents[i].directions, data[i] * s.detach()) for i, s in zip(places, slopes, strict=True)])
    ]


def _gradients(slope: Tensor, xs: list[Tensor]) -> Sequence[Tensor | None]:
    if not slope.requires_grad:
        return [None] * len(xs)
    return torch.autograd.grad(slope.sum(), xs, retain_graph=True, allow_unused=True)


# What has no rule


def _by_autograd(op: Op, tangents: Tangents, local: Local) -> list[Tangent | None]:
    """Differentiate one operation twice along each direction: right for any that autograd knows, and slow."""
    directions = union(list(tangents.values()))
    places = list(tangents)
    spread = [tangents[i].spread(directions) for i in places]
    primal = [op.value(i) for i in places]
    floating = [i for i, slot in enumerate(op.out_slots) if slot is not None]
    results: list[list[Tensor]] = []
    curvature = torch.zeros(len(directions), local.examples, dtype=torch.float64, device=primal[0].device)
    for k in range(len(directions)):
        with torch.enable_grad():
            s = torch.zeros((), dtype=primal[0].dtype, device=primal[0].device, requires_grad=True)
            moved = [x + s * data[k] for x, data in zip(primal, spread, strict=True)]
            result = op.call(dict(zip(places, moved, strict=True)))
            outs = [result] if isinstance(result, Tensor) else list(result)
            outs = [outs[i] for i in floating]
            dummies = [torch.zeros_like(out, requires_grad=True) for out in outs]
            (pulled,) = torch.autograd.grad(outs, s, dummies, create_graph=True)
            results.append([
                d if d is not None else torch.zeros_like(out)
                for d, out in zip(
                    torch.autograd.grad(pulled, dummies, retain_graph=True, allow_unused=True), outs, strict=True
                )
            ])
            # Along the line ⟨ā, f⟩ of each example; ā of the others is put to zero.
            for n in range(local.examples):
                (slope,) = torch.autograd.grad(outs[0], s, _example(_adjoint(op), n, local.examples), create_graph=True)
                if slope.requires_grad:
                    (bend,) = torch.autograd.grad(slope, s, retain_graph=True, allow_unused=True)
                    curvature[k, n] = 0.0 if bend is None else bend.double()
    local.values[list(directions)] += curvature
    found = iter(torch.stack([r[i] for r in results]) for i in range(len(floating)))
    return [None if slot is None else Tangent(directions, next(found)) for slot in op.out_slots]


def _example(adjoint: Tensor, n: int, examples: int) -> Tensor:
    kept = torch.zeros_like(adjoint).reshape(examples, -1)
    kept[n] = adjoint.reshape(examples, -1)[n]
    return kept.reshape(adjoint.shape)


def without_rule(op: Op, tangents: Tangents, local: Local) -> Sequence[Tangent | None]:
    """Stands in where :func:`rule_of` knows nothing."""
    if sum(slot is not None for slot in op.out_slots) > 1:
        raise Untraceable(f"{op.func} has several results and no rule")
    try:
        return _by_autograd(op, tangents, local)
    except (RuntimeError, NotImplementedError) as error:
        raise Untraceable(f"{op.func} has no rule and can't be differentiated twice ({error})") from error


# Helpers


def _adjoint(op: Op) -> Tensor:
    assert op.adjoint is not None, f"{op.func} was taken for linear"
    return op.adjoint


def _shift(dim: int) -> int:
    """A dimension of a tensor, in the tangents."""
    return dim + 1 if dim >= 0 else dim


def _align(data: Tensor, rank: int) -> Tensor:
    """Give tangents the rank of the result, so that they broadcast as the tensor does."""
    return data.reshape(len(data), *[1] * (rank + 1 - data.dim()), *data.shape[1:])


def _broadcast(data: Tensor, shape: Iterable[int]) -> Tensor:
    shape = tuple(shape)
    return _align(data, len(shape)).expand(len(data), *shape)


_RULES: dict[Any, Rule] = {
    **dict.fromkeys([aten.view, aten._unsafe_view, aten.reshape], _view),
    **dict.fromkeys([aten.squeeze, aten.unsqueeze, aten.flatten], _view),
    **dict.fromkeys([aten.t, aten.transpose, aten.numpy_T], _transpose),
    aten.permute: _permute,
    aten.expand: _expand,
    **dict.fromkeys([aten.clone, aten.contiguous, aten.alias, aten.lift_fresh], _same),
    **dict.fromkeys([aten.add, aten.sub], _add),
    **dict.fromkeys([aten.cat, aten.stack], _concatenate),
    aten.embedding: _embedding,
    **dict.fromkeys([aten.max_pool2d_with_indices, aten.max_pool3d_with_indices], _max_pool),
    **dict.fromkeys([aten.max, aten.min], _max_dim),
    **dict.fromkeys([aten.native_batch_norm, aten._native_batch_norm_legit_no_training], _batch_norm),
    aten.cudnn_batch_norm: _batch_norm,
    aten.mul: _mul,
    aten.div: _div,
    **dict.fromkeys([aten.mm, aten.bmm, aten.addmm, aten.baddbmm], _matmul),
    aten.convolution: _convolution,
    **dict.fromkeys([aten._softmax, aten._safe_softmax], _softmax),
    aten._log_softmax: _log_softmax,
    aten.logsumexp: _logsumexp,
    aten.native_layer_norm: _layer_norm,
    aten.native_group_norm: _group_norm,
}
_BILINEAR = {aten.mul, aten.mm, aten.bmm, aten.addmm, aten.baddbmm, aten.convolution}
_LINEAR_RULES = {
    packet
    for packet, rule in _RULES.items()
    if rule in (_view, _transpose, _permute, _expand, _same, _add, _concatenate, _embedding, _max_pool, _max_dim, _batch_norm)
}
# Linear in the leaves with these indices together, all else constant.
_JOINTLY_LINEAR: dict[Any, tuple[int, ...]] = {
    packet: (0,)
    for packet in [
        aten.slice, aten.select, aten.split, aten.split_with_sizes, aten.unbind, aten.chunk, aten.narrow,
        aten.sum, aten.mean, aten.cumsum, aten.neg, aten.flip, aten.roll, aten.rot90, aten.repeat,
        aten.index, aten.index_select, aten.gather, aten.take_along_dim, aten.masked_fill,
        aten.tril, aten.triu, aten.diagonal, aten.diag_embed, aten.unfold, aten.im2col, aten.col2im,
        aten.constant_pad_nd, aten.reflection_pad1d, aten.reflection_pad2d, aten.replication_pad1d,
        aten.replication_pad2d, aten.avg_pool2d, aten.avg_pool3d, aten._adaptive_avg_pool2d,
        aten._adaptive_avg_pool3d, aten.upsample_nearest1d, aten.upsample_nearest2d, aten.upsample_linear1d,
        aten.upsample_bilinear2d, aten.upsample_bicubic2d, aten._upsample_bilinear2d_aa,
        aten._upsample_bicubic2d_aa, aten.pixel_shuffle, aten.pixel_unshuffle, aten._to_copy,
    ]
}  # fmt: skip
_SLOPED = {
    aten.relu, aten.leaky_relu, aten.hardtanh, aten.abs, aten.clamp, aten.clamp_min, aten.clamp_max,
    aten.threshold, aten.hardsigmoid, aten.relu6,
}  # fmt: skip
_POINTWISE = {
    aten.gelu, aten.silu, aten.sigmoid, aten.tanh, aten.softplus, aten.elu, aten.mish, aten.hardswish,
    aten.log_sigmoid_forward, aten.exp, aten.expm1, aten.log, aten.log1p, aten.log2, aten.sqrt, aten.rsqrt,
    aten.reciprocal, aten.square, aten.pow, aten.sin, aten.cos, aten.tan, aten.sinh, aten.cosh, aten.asinh,
    aten.atan, aten.atan2, aten.erf, aten.erfc, aten.maximum, aten.minimum, aten.where, aten.lerp,
    aten.addcmul, aten.addcdiv, aten.logaddexp, aten.xlogy, aten.rsub, aten._prelu_kernel,
}  # fmt: skip
