"""The tangent sweep with adjoints: exact ``v_iᵀ H_i v_i`` for all layers and examples at once.

Put the weights on a line for each direction i, ``W + s V_i``. Then, for the loss ℓ_n of one example,

    ∂²ℓ_n/∂s_i² = z1ᵀ ∇²ℓ_n(z) z1 + Σ over operations f of ⟨ā_f, D²f[x1, x1]⟩

with x1 the tangents of an operation's inputs, z1 those of the logits, and ā_f the gradient of the loss in f's
output. One backward pass gives every ā_f; one forward sweep over the tape carries all tangents, a direction
joining where its weight is used. Cost: half a forward pass a layer, and what the elementwise work adds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from .by_autograd import without_rule
from .local import Local, Rule, remembered
from .rules import curved_along, rule_of
from .tangent import Tangent
from .tape import Op, Tape, Untraceable

Direction = Mapping[int, Tensor]
"""Index of a weight on the tape → V, of the weight's shape. Several weights: they move together."""
Head = Callable[[Sequence[int], Tensor], None]
"""Takes the logits' tangents: some directions, and [directions, examples, …]."""


def prepare(tape: Tape, directions: Sequence[Direction], losses: Tensor) -> list[Op]:
    """Give each operation that has curvature the adjoint of its output, and return these operations.

    Args:
        tape: of the logits that the losses were computed from.
        losses: [examples], with autograd's graph.
    """
    reach = reached(tape, directions)
    curved = [op for op in tape.ops if curved_along(op, reach)]
    if any(op.out_slots[0] in tape.overwritten for op in curved):
        raise Untraceable("the result of a non-linear operation is changed in place")
    outs = [op.outs[0] for op in curved]
    adjoints = torch.autograd.grad(losses.sum(), outs, retain_graph=True, allow_unused=True) if outs else ()
    for op, adjoint in zip(curved, adjoints, strict=True):
        if adjoint is None:
            raise Untraceable(f"autograd finds no way from {op.func} to the loss")
        op.adjoint = adjoint
    return curved


def separable(outs: Sequence[Tensor], adjoints: Sequence[Tensor], losses: Tensor) -> list[bool]:
    """Which tensors hold the examples of a batch one after the other, so that each can be told from the next.

    Each example's loss is multiplied by a power of two of its own, which is exact: then so must be its share of each
    gradient, and no other.

    Args:
        outs: outputs of operations.
        adjoints: gradients of the summed loss in them.
        losses: [examples], with autograd's graph.
    """
    examples = len(losses)
    if examples == 1 or not outs:
        return [True] * len(outs)
    powers = 2.0 ** (torch.arange(examples, dtype=losses.dtype, device=losses.device) - examples // 2)
    marked = torch.autograd.grad((losses * powers).sum(), outs, retain_graph=True, allow_unused=True)

    def apart(found: Tensor, adjoint: Tensor) -> bool:
        if found.dim() == 0 or len(found) % examples:
            return False
        expected = adjoint.reshape(examples, -1) * powers.unsqueeze(1).to(found)
        # What is nearly too small for its type is rounded.
        rounding = 1000 * torch.finfo(found.dtype).tiny
        return torch.allclose(found.reshape(examples, -1), expected, rtol=1e-3, atol=rounding)

    pairs = zip(marked, adjoints, strict=True)
    return [found is not None and apart(found, adjoint) for found, adjoint in pairs]


def sweep(tape: Tape, directions: Sequence[Direction], examples: int, head: Head, *, at_once: int) -> Tensor:
    """The local terms, [directions, examples]; the logits' tangents go to ``head``.

    Args:
        tape: after :func:`prepare`.
        at_once: how many directions travel together; memory and cache use grow with it, results don't change.
    """
    order = _order(tape, directions)
    local = Local(torch.zeros(len(directions), examples, dtype=torch.float64, device=tape.logits.device))
    for first in range(0, len(order), at_once):
        chosen = order[first : first + at_once]
        tangents = _sweep(tape, [directions[d] for d in chosen], local.part(first, first + len(chosen)))
        if tangents is not None:
            head([chosen[d] for d in tangents.directions], tangents.data)
    values = torch.empty_like(local.values)
    values[order] = local.values
    return values


def _sweep(tape: Tape, directions: Sequence[Direction], local: Local) -> Tangent | None:
    tangents = _leaves(directions)
    readers = Counter(slot for op in tape.ops for slot in op.slots if slot is not None)
    for op in tape.ops:
        moving = {i: tangents[slot] for i, slot in enumerate(op.slots) if slot in tangents}
        for slot in op.slots:
            if slot is not None:
                readers[slot] -= 1
                if not readers[slot] and slot != tape.logits_slot:
                    tangents.pop(slot, None)
        if moving:
            for slot, tangent in zip(op.out_slots, _rule(op)(op, moving, local), strict=True):
                if slot is not None and tangent is not None and (readers[slot] or slot == tape.logits_slot):
                    tangents[slot] = tangent
    return tangents.get(tape.logits_slot)  # type: ignore[arg-type]


def _rule(op: Op) -> Rule:
    return remembered(op, "rule", lambda: rule_of(op) or without_rule)  # type: ignore[no-any-return]


def _leaves(directions: Sequence[Direction]) -> dict[int, Tangent]:
    along: dict[int, list[int]] = {}
    for d, direction in enumerate(directions):
        for weight in direction:
            along.setdefault(weight, []).append(d)
    return {
        w: Tangent(
            tuple(ds), torch.stack([directions[d][w] for d in ds]) if ds[1:] else directions[ds[0]][w].unsqueeze(0)
        )
        for w, ds in along.items()
    }


def _order(tape: Tape, directions: Sequence[Direction]) -> list[int]:
    """Directions by where they join, so that those of a tensor are mostly neighbours."""
    first: dict[int, int] = {}
    for place, op in enumerate(tape.ops):
        for slot in op.slots:
            if slot is not None:
                first.setdefault(slot, place)
    end = len(tape.ops)
    return sorted(range(len(directions)), key=lambda d: min((first.get(w, end) for w in directions[d]), default=end))


def reached(tape: Tape, directions: Sequence[Direction]) -> dict[int, int]:
    """For each slot the directions along which it moves, as a bit set."""
    reach: dict[int, int] = Counter()
    for d, direction in enumerate(directions):
        for weight in direction:
            reach[weight] |= 1 << d
    for op in tape.ops:
        moving = 0
        for slot in op.slots:
            if slot is not None:
                moving |= reach[slot]
        for slot in op.out_slots:
            if slot is not None:
                reach[slot] = moving
    return reach


def passing_all(tape: Tape, directions: Sequence[Direction], moving: Sequence[int]) -> list[int]:
    """A few of the ``moving`` directions that together pass all curvature which any of them passes.

    The one that passes most comes first; where several serve as well, the one of the smallest weight.
    """
    reach = reached(tape, [direction if d in moving else {} for d, direction in enumerate(directions)])
    left = [along for op in tape.ops if (along := curved_along(op, reach))]
    sizes = {d: sum(v.numel() for v in directions[d].values()) for d in moving}
    chosen: list[int] = []
    while left:
        chosen.append(max(moving, key=lambda d: (sum(along >> d & 1 for along in left), -sizes[d])))
        left = [along for along in left if not along >> chosen[-1] & 1]
    return chosen


def unruled(tape: Tape) -> set[str]:
    """Names of the operations that have no rule of their own."""
    return {str(op.func) for op in tape.ops if rule_of(op) is None}
