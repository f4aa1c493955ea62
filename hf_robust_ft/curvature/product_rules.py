"""Rules of products: linear in each factor, curved where a direction moves both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .elementwise_rules import pointwise
from .local import Local, Rule, Tangents, adjoint_of, aligned, broadcast
from .tangent import Tangent, shared, total
from .tape import Op, aten


def _mul(op: Op, tangents: Tangents, local: Local) -> list[Tangent | None]:
    shape = op.outs[0].shape
    parts = []
    for i, t in tangents.items():
        other = op.leaves[1 - i]
        factor = op.value(1 - i) if isinstance(other, Tensor) else other
        data = aligned(t.data, len(shape)) * factor
        parts.append(Tangent(t.directions, broadcast(data, shape)))
    if len(tangents) == 2 and (both := shared(tangents[0], tangents[1])):
        first, second = (aligned(tangents[i].rows(both), len(shape)) for i in (0, 1))
        local.add(both, 2 * adjoint_of(op), broadcast(first * second, shape))
    return [total(parts)]


def _div(op: Op, tangents: Tangents, local: Local) -> Sequence[Tangent | None]:
    if 1 in tangents:
        return pointwise(op, tangents, local)
    t, divisor = tangents[0], op.leaves[1]
    data = aligned(t.data, op.outs[0].dim()) / (op.value(1) if isinstance(divisor, Tensor) else divisor)
    return [Tangent(t.directions, broadcast(data, op.outs[0].shape))]


def _matmul(op: Op, tangents: Tangents, local: Local) -> list[Tangent | None]:
    """mm, bmm, addmm, baddbmm."""
    offset = 1 if op.packet in (aten.addmm, aten.baddbmm) else 0
    alpha, beta = op.kwargs.get("alpha", 1), op.kwargs.get("beta", 1)
    a, b = tangents.get(offset), tangents.get(offset + 1)
    if a is not None and b is not None and _appends(op, a, b):
        return [_appended(op, a, b)]
    parts = []
    if a is not None:
        parts.append(Tangent(a.directions, _product(a.data, op.value(offset + 1))))
    if b is not None:
        parts.append(Tangent(b.directions, _left_product(op.value(offset), b.data)))
    if a is not None and b is not None and (both := shared(a, b)):
        _add_cross(local, both, 2 * alpha * adjoint_of(op), a.rows(both), b.rows(both))
    if alpha != 1:
        parts = [Tangent(t.directions, t.data * alpha) for t in parts]
    if offset and 0 in tangents:
        t = tangents[0]
        parts.append(Tangent(t.directions, broadcast(t.data, op.outs[0].shape) * beta))
    return [total(parts)]


def _appends(op: Op, a: Tangent, b: Tangent) -> bool:
    """Whether this is a linear layer whose own direction joins those that arrive, the case that counts for speed."""
    plain = op.packet is aten.mm or (op.packet is aten.addmm and op.slots[0] is None and not op.kwargs)
    return plain and a.directions[-1] < b.directions[0]


def _appended(op: Op, a: Tangent, b: Tangent) -> Tangent:
    """``[x1 W; x0 V]``, written into one tensor."""
    x, weight = len(op.slots) - 2, len(op.slots) - 1
    count = len(a.data)
    data = a.data.new_empty(count + len(b.data), *op.outs[0].shape)
    torch.mm(a.data.reshape(-1, a.data.shape[-1]), op.value(weight), out=data[:count].view(-1, data.shape[-1]))
    torch.matmul(op.value(x), b.data, out=data[count:])
    return Tangent(a.directions + b.directions, data)


def _product(data: Tensor, matrix: Tensor) -> Tensor:
    """``x1 B``, [D, …, n, m]."""
    if matrix.dim() == 2:
        return (data.reshape(-1, data.shape[-1]) @ matrix).reshape(*data.shape[:-1], -1)
    return torch.matmul(data, matrix)


def _left_product(matrix: Tensor, data: Tensor) -> Tensor:
    """``A x1``, [D, …, n, m]. Of a batch of matrices the directions become columns, so that A is not copied."""
    if matrix.dim() == 2 or len(data) == 1 or data.shape[-1] >= matrix.shape[-2]:
        return torch.matmul(matrix, data)
    count, batch, _, columns = data.shape
    wide = torch.bmm(matrix, data.permute(1, 2, 0, 3).reshape(batch, -1, count * columns))
    return wide.view(batch, -1, count, columns).permute(2, 0, 1, 3)


def _add_cross(local: Local, directions: tuple[int, ...], adjoint: Tensor, a: Tensor, b: Tensor) -> None:
    """``⟨ā, a1 b1⟩``, or ``⟨ā b1ᵀ, a1⟩`` or ``⟨a1ᵀ ā, b1⟩``: whichever writes the smallest matrix."""
    rows, inner, columns = a.shape[-2], a.shape[-1], b.shape[-1]
    if adjoint.dim() == 2 or rows * columns <= inner * min(rows, columns):
        local.add(directions, adjoint, torch.matmul(a, b))
    elif rows <= columns:
        found = _left_product(adjoint, b.transpose(-1, -2)) * a
        local.add(directions, torch.ones_like(found[0]), found)
    else:
        found = _product(a.transpose(-1, -2), adjoint) * b
        local.add(directions, torch.ones_like(found[0]), found)


def _convolution(op: Op, tangents: Tangents, local: Local) -> list[Tangent | None]:
    rest = op.args[3:]

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
        local.add(both, 2 * adjoint_of(op), torch.stack([convolve(inputs, kernel) for inputs, kernel in pairs]))
    return [total(parts)]


PRODUCTS: dict[Any, Rule] = {
    aten.mul: _mul,
    aten.div: _div,
    **dict.fromkeys([aten.mm, aten.bmm, aten.addmm, aten.baddbmm], _matmul),
    aten.convolution: _convolution,
}
