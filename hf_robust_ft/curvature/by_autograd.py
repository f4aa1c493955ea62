"""An operation without a rule, differentiated by autograd along each direction: right, and slow."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .local import Local, Tangents, adjoint_of
from .tangent import Tangent, union
from .tape import Op, Untraceable


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
            results.append(
                [
                    d if d is not None else torch.zeros_like(out)
                    for d, out in zip(
                        torch.autograd.grad(pulled, dummies, retain_graph=True, allow_unused=True), outs, strict=True
                    )
                ]
            )
            # Along the line ⟨ā, f⟩ of each example; ā of the others is put to zero.
            for n in range(local.examples):
                (slope,) = torch.autograd.grad(
                    outs[0], s, _example(adjoint_of(op), n, local.examples), create_graph=True
                )
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
