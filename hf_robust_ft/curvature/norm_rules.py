"""Rules of normalisations: softmax, its logarithm, logsumexp, layer and group norm (RMS norm is elementwise work)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .by_autograd import without_rule
from .local import Local, Rule, Tangents, adjoint_of, along_rows, remembered
from .tangent import Tangent
from .tape import Op, Untraceable, aten


def _softmax(op: Op, tangents: Tangents, local: Local) -> list[Tangent | None]:
    """With ``d = x1 - ⟨p, x1⟩``: ``y1 = p d`` and ``D² = p (d² - ⟨p, d²⟩)``."""
    p = op.outs[0].detach()
    d, p, back = _centred(op, tangents[0].data.to(p.dtype), p)
    # ⟨ā, D²⟩ = Σ p d² (ā - ⟨p, ā⟩)
    adjoint = remembered(op, "adjoint", lambda: _less_mean(op, p))
    y1 = p * d
    local.add(tangents[0].directions, adjoint, d.mul_(y1))
    return [Tangent(tangents[0].directions, back(y1))]


def _log_softmax(op: Op, tangents: Tangents, local: Local) -> list[Tangent | None]:
    """``y1 = d`` and ``D² = -⟨p, d²⟩``, the same for the whole row."""
    d, p, back = _centred(op, tangents[0].data, remembered(op, "p", lambda: op.outs[0].detach().exp()))
    weight = remembered(op, "weight", lambda: -p * adjoint_of(op).movedim(op.args[1], -1).sum(-1, keepdim=True))
    local.add(tangents[0].directions, weight, d.square())
    return [Tangent(tangents[0].directions, back(d))]


def _centred(op: Op, x1: Tensor, p: Tensor) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
    """``x1 - ⟨p, x1⟩`` and p with the row in the last dimension, and the way back."""
    dim = op.args[1] % p.dim()
    x1, p = x1.movedim(dim + 1, -1), p.movedim(dim, -1)
    mean = along_rows(x1.reshape(len(x1), -1, p.shape[-1]), p.reshape(-1, p.shape[-1]))
    return x1 - mean.view(*x1.shape[:-1], 1), p, lambda data: data.movedim(-1, dim + 1)


def _less_mean(op: Op, p: Tensor) -> Tensor:
    adjoint = adjoint_of(op).movedim(op.args[1], -1)
    return adjoint - (p * adjoint).sum(-1, keepdim=True)


def _logsumexp(op: Op, tangents: Tangents, local: Local) -> list[Tangent | None]:
    t, x = tangents[0], op.value(0)
    dims = [d % x.dim() for d in op.args[1]]
    if len(dims) > 1:
        return list(without_rule(op, tangents, local))
    (dim,), keep = dims, len(op.args) > 2 and op.args[2]
    p = torch.softmax(x, dim)
    mean = (p * t.data).sum(dim + 1, keepdim=True)
    adjoint = adjoint_of(op) if keep else adjoint_of(op).unsqueeze(dim)
    local.add(t.directions, p * adjoint, (t.data - mean).square())
    return [Tangent(t.directions, mean if keep else mean.squeeze(dim + 1))]


def _layer_norm(op: Op, tangents: Tangents, local: Local) -> list[Tangent | None]:
    x, shape, gain, _, eps = op.args
    size = x.numel() // x.shape[: x.dim() - len(shape)].numel()
    rows = op.value(0).reshape(-1, size)
    gain = None if gain is None else gain.detach().reshape(1, size)
    return _normalised(op, tangents, local, rows, gain, eps)


def _group_norm(op: Op, tangents: Tangents, local: Local) -> list[Tangent | None]:
    _, gain, _, batch, channels, pixels, groups, eps = op.args
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

    def primal() -> tuple[Tensor, ...]:
        centred = rows - rows.mean(-1, keepdim=True)
        scale = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
        h = centred * scale
        weight = adjoint_of(op).reshape(rows.shape)
        weight = weight if gain is None else weight * gain
        return h, scale, weight, (weight * h).sum(-1), torch.ones_like(scale)

    h, scale, weight, aligned_weight, ones = remembered(op, "primal", primal)
    a = t.data.reshape(len(t.data), *rows.shape)
    a = (a - a.mean(-1, keepdim=True)).mul_(scale)
    m1 = along_rows(a, h) / size
    m2 = torch.linalg.vector_norm(a, dim=-1).square() / size
    curved = aligned_weight * (3 * m1.square() - m2) - 2 * m1 * along_rows(a, weight)
    local.add(t.directions, ones, curved)
    y1 = a.addcmul_(h, m1.unsqueeze(-1), value=-1)
    y1 = (y1 if gain is None else y1.mul_(gain)).reshape(len(t.data), *op.outs[0].shape)
    return [Tangent(t.directions, y1), *[None] * (len(op.outs) - 1)]


NORMS: dict[Any, Rule] = {
    **dict.fromkeys([aten._softmax, aten._safe_softmax], _softmax),
    aten._log_softmax: _log_softmax,
    aten.logsumexp: _logsumexp,
    aten.native_layer_norm: _layer_norm,
    aten.native_group_norm: _group_norm,
}
