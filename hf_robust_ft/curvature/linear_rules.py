"""Rules of the operations that are linear in what depends on a layer: no curvature of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .local import Local, Rule, Tangents, broadcast, shifted
from .tangent import Tangent, total, union
from .tape import Op, Untraceable, aten


def _view(op: Op, tangents: Tangents, local: Local) -> list[Tangent | None]:
    t = tangents[0]
    return [Tangent(t.directions, t.data.reshape(len(t.data), *op.outs[0].shape))]


def _transpose(op: Op, tangents: Tangents, local: Local) -> list[Tangent | None]:
    t = tangents[0]
    first, second = op.leaves[1:3] if len(op.leaves) >= 3 else (-1, -2)
    return [Tangent(t.directions, t.data.transpose(shifted(first), shifted(second)))]


def _permute(op: Op, tangents: Tangents, local: Local) -> list[Tangent | None]:
    t = tangents[0]
    return [Tangent(t.directions, t.data.permute(0, *(dim % op.leaves[0].dim() + 1 for dim in op.args[1])))]


def _expand(op: Op, tangents: Tangents, local: Local) -> list[Tangent | None]:
    t = tangents[0]
    return [Tangent(t.directions, broadcast(t.data, op.outs[0].shape))]


def _same(op: Op, tangents: Tangents, local: Local) -> list[Tangent | None]:
    # A copy for the sake of memory layout; the rules make their own where they need one.
    return [tangents[0]]


def _add(op: Op, tangents: Tangents, local: Local) -> list[Tangent | None]:
    alpha = op.kwargs.get("alpha", 1)
    parts = []
    for i, t in tangents.items():
        data = broadcast(t.data, op.outs[0].shape)
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
    return [Tangent(directions, join(parts, shifted(dim)))]


def _embedding(op: Op, tangents: Tangents, local: Local) -> list[Tangent | None]:
    t = tangents[0]
    indices, padding = op.leaves[1], op.args[2] if len(op.args) > 2 else -1
    data = t.data[:, indices]
    if padding >= 0:  # The padding row has no gradient: it is no part of the layer.
        data = data.masked_fill((indices == padding).unsqueeze(-1), 0)
    return [Tangent(t.directions, data)]


def _embedding_bag(op: Op, tangents: Tangents, local: Local) -> list[Tangent | None]:
    mode = op.args[4] if len(op.args) > 4 else 0
    if mode == 2 or set(tangents) != {0}:
        raise Untraceable(f"{op.func} that takes a maximum, or has trained weights for its samples")
    t = tangents[0]
    return [Tangent(t.directions, torch.stack([op.call({0: v})[0] for v in t.data])), *[None] * (len(op.outs) - 1)]


def _masked_fill(op: Op, tangents: Tangents, local: Local) -> list[Tangent | None]:
    t = tangents[0]
    return [Tangent(t.directions, broadcast(t.data, op.outs[0].shape).masked_fill(op.leaves[1], 0))]


def _pad(op: Op, tangents: Tangents, local: Local) -> list[Tangent | None]:
    t = tangents[0]
    return [Tangent(t.directions, F.pad(t.data, list(op.args[1])))]


def _as_strided(op: Op, tangents: Tangents, local: Local) -> list[Tangent | None]:
    x, size, stride, *offset = op.args
    # The same view of a tensor that holds the place of each element.
    places = torch.empty_strided(x.shape, x.stride(), dtype=torch.long, device=x.device)
    places.copy_(torch.arange(x.numel(), device=x.device).view(x.shape))
    start = (offset[0] if offset and offset[0] is not None else x.storage_offset()) - x.storage_offset()
    try:
        view = places.as_strided(size, stride, start)
    except RuntimeError as error:
        raise Untraceable(f"{op.func} looks outside the tensor that it is given") from error
    t = tangents[0]
    return [Tangent(t.directions, t.data.reshape(len(t.data), -1)[:, view])]


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
        raise Untraceable(f"{op.func} takes its statistics from its input")
    t = tangents[0]
    weight, variance = op.args[1], op.args[4]
    eps = op.args[6 if op.packet is aten._native_batch_norm_legit_no_training else 7]
    factor = (variance + eps).rsqrt() * (1 if weight is None else weight)
    shape = [-1] + [1] * (op.leaves[0].dim() - 2)
    return [Tangent(t.directions, t.data * factor.detach().reshape(shape)), *[None] * (len(op.outs) - 1)]


def jointly_linear(op: Op, tangents: Tangents, local: Local) -> list[Tangent | None]:
    """Any operation that is linear in its active arguments together, through its batching rule."""
    directions = union(list(tangents.values()))
    places = list(tangents)
    replaced: dict[int, Any] = {}
    for i in JOINTLY_LINEAR[op.packet] if len(JOINTLY_LINEAR[op.packet]) > 1 else ():
        # What is constant in a linear place has no tangent.
        if i not in tangents and isinstance(op.leaves[i], Tensor):
            replaced[i] = torch.zeros_like(op.leaves[i])

    def apply(*data: Tensor) -> Any:
        return op.call({**replaced, **dict(zip(places, data, strict=True))})

    result = torch.vmap(apply)(*(tangents[i].spread(directions) for i in places))
    results = result if isinstance(result, (tuple, list)) else [result]
    return [Tangent(directions, data) for data in results]


LINEAR: dict[Any, Rule] = {
    **dict.fromkeys([aten.view, aten._unsafe_view], _view),
    **dict.fromkeys([aten.squeeze, aten.unsqueeze], _view),
    **dict.fromkeys([aten.t, aten.transpose], _transpose),
    aten.permute: _permute,
    aten.expand: _expand,
    **dict.fromkeys([aten.clone, aten.alias, aten.lift_fresh], _same),
    **dict.fromkeys([aten.add, aten.sub], _add),
    **dict.fromkeys([aten.cat, aten.stack], _concatenate),
    aten.embedding: _embedding,
    aten._embedding_bag: _embedding_bag,
    aten.masked_fill: _masked_fill,
    aten.constant_pad_nd: _pad,
    aten.as_strided: _as_strided,
    **dict.fromkeys([aten.max_pool2d_with_indices, aten.max_pool3d_with_indices], _max_pool),
    **dict.fromkeys([aten.max, aten.min], _max_dim),
    **dict.fromkeys([aten.native_batch_norm, aten._native_batch_norm_legit_no_training], _batch_norm),
    aten.cudnn_batch_norm: _batch_norm,
}

JOINTLY_LINEAR: dict[Any, tuple[int, ...]] = {aten.index_add: (0, 3), aten.scatter_add: (0, 3)}
"""Linear in the leaves with these indices together, all else constant."""

for _packet in [
    aten.slice, aten.select, aten.split, aten.split_with_sizes, aten.unbind, aten.sum,
    aten.mean, aten.cumsum, aten.neg, aten.flip, aten.roll, aten.rot90, aten.repeat, aten.index,
    aten.index_select, aten.gather, aten.tril, aten.triu, aten.diagonal, aten.diag_embed,
    aten.unfold, aten.im2col, aten.col2im, aten.reflection_pad1d, aten.reflection_pad2d, aten.replication_pad1d,
    aten.replication_pad2d, aten.avg_pool2d, aten.avg_pool3d, aten._adaptive_avg_pool2d,
    aten._adaptive_avg_pool3d, aten.upsample_nearest1d, aten.upsample_nearest2d, aten.upsample_linear1d,
    aten.upsample_bilinear2d, aten.upsample_bicubic2d, aten._upsample_bilinear2d_aa,
    aten._upsample_bicubic2d_aa, aten.pixel_shuffle, aten.pixel_unshuffle, aten._to_copy,
]:  # fmt: skip
    JOINTLY_LINEAR[_packet] = (0,)
