"""What a few examples of a model need: bytes that are alive, counted by running them once, not guessed."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .elementwise_rules import pointwise, sloped
from .loss import ExampleLoss
from .model import Inputs, Weights
from .norm_rules import NORMS
from .product_rules import PRODUCTS
from .products import Use, differentiating_twice, find_uses
from .rules import rule_of
from .sweep import Direction, passing_all, prepare, reached
from .tape import Op, Tape, Untraceable, Widest, aten, record

SWEPT = ("adjoints", "remembered", "tangents", "joined", "stacked", "compared")
SOFTMAXES = (aten._softmax, aten._safe_softmax)


@dataclass(frozen=True)
class Footprint:
    """Bytes that some examples keep alive together, in the precision of the measurement; 0 where there is nothing."""

    examples: int
    inputs: int
    """What the model is given."""
    width: int
    """Elements of the largest activation of all examples."""
    passing: int
    """The most in a forward pass without gradients."""
    tape: int
    """Results of a recorded forward pass: all of them are kept."""
    graph: int
    """Of them what autograd saves for a backward pass."""
    used: int
    """What products in activation space hold besides: outputs of layers, and patches of convolutions."""
    adjoints: int
    """Gradients in the outputs of non-linear operations, kept by a sweep."""
    remembered: int
    """Derivatives of the non-linear operations, kept for all directions of a sweep."""
    tangents: int
    """The most tangents along one direction that moves everything, or the loss's derivatives along it."""
    joined: int
    """The same along one direction for each layer, all at once: few of them move the first layers."""
    stacked: int
    """The same with copies of the directions, until their weights are read: several of one weight travel joined."""
    compared: int
    """Elements of the weights whose second derivatives a sweep compares with autograd."""
    told: int
    """While it is found out whether the layers that have products in activation space hold examples one by one."""
    second: int
    """The graph of a backward pass, beyond ``graph``."""
    bend: int
    """The most that a backward pass through both graphs holds besides, for the first layer."""
    vector: int
    """Elements of the largest vectors of Lanczos in activation space, one each example."""
    group: int
    """Elements of the largest one in weight space: the weights of a layer that is a group, or tied."""


@dataclass(frozen=True)
class Footprints:
    """Of any number of examples, from what one and what some hold.

    Not proportional: attention copies more for two examples than for one, and a convolution's backward pass holds
    tensors of the weight's size, whatever the number of examples.
    """

    one: Footprint
    some: Footprint
    """The same as ``one`` where a chunk is one example."""

    def of(self, examples: int) -> Footprint:
        """On the line through both; proportional where they are the same."""
        more = self.some.examples - self.one.examples
        sizes = {}
        for field in fields(Footprint):
            one, some = getattr(self.one, field.name), getattr(self.some, field.name)
            share = (some - one) / more if more else one
            sizes[field.name] = max(0, round(one + share * (examples - self.one.examples)))
        kept = {name: getattr(self.one, name) for name in ("group", "compared")}
        return Footprint(**{**sizes, "examples": examples, **kept})


class Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes that were made inside and are still alive."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in given and key not in self._sizes:
                    self._sizes[key] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    # Of the storage: autograd saves tensors of its own that share it.
                    weakref.finalize(storage, self._freed, key)
        return result

    def _freed(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


def footprint(
    weights: Weights, loss: ExampleLoss, inputs: Inputs, labels: Tensor, directions: Sequence[Direction]
) -> Footprint:
    """Run some examples forward, backward and backward again, and count. Use it inside :func:`~.model.measuring`.

    Args:
        weights: of the model.
        loss: of one example.
        inputs, labels: the examples.
        directions: one each layer; only their shapes count.

    Raises:
        NotTwiceDifferentiable: an operation without a second derivative in autograd.
    """
    values = list(inputs.values() if hasattr(inputs, "values") else inputs)
    with torch.no_grad(), Alive() as alive, Widest(weights.all) as widest:
        weights.logits(inputs)
    found = {**dict.fromkeys(SWEPT, 0), "passing": alive.peak}
    uses: dict[int, Use] = {}
    told = 0
    with Alive() as alive:
        try:
            tape = record(lambda: weights.logits(inputs), weights.leaves)
        except Untraceable:
            losses = loss(weights.logits(inputs), labels)
            kept = alive.now
        else:
            losses = loss(tape.logits, labels)
            kept = alive.now
            if losses.requires_grad:
                uses = find_uses(tape, directions, losses)
                # Patches of convolutions are there already; and gradients in the outputs, twice.
                told = alive.now + 2 * sum(use.out.nbytes for use in uses.values())
                found |= _swept(tape, directions, losses, loss, labels, weights.all, alive)
            del tape
        rest = [direction for d, direction in enumerate(directions) if d not in uses]
        vectors = [_vector(use) for use in uses.values()]
        leaves = [weights.leaves[i] for direction in rest for i in direction]
        second, bend = _twice(losses, list(uses.values()), leaves, alive) if losses.requires_grad else (0, 0)
        with_uses = alive.now
        uses.clear()
        graph = alive.now
    return Footprint(
        examples=len(labels),
        inputs=sum(value.nbytes for value in values if isinstance(value, Tensor)),
        width=widest.elements,
        tape=kept,
        graph=graph,
        used=with_uses - graph,
        told=told,
        second=second,
        bend=bend,
        vector=max(vectors, default=0),
        group=max((sum(v.numel() for v in direction.values()) for direction in rest), default=0),
        **found,
    )


def _vector(use: Use) -> int:
    rows, width = use.inputs.shape[1:]
    return min(rows, width) * use.out.numel() // rows


def _twice(losses: Tensor, uses: Sequence[Use], leaves: Sequence[Tensor], alive: Alive) -> tuple[int, int]:
    """The graph of the backward pass, and the most of one through it to the first of uses and leaves; no results."""
    before = alive.now
    outs = [*(use.out for use in uses), *leaves]
    with differentiating_twice():
        gradients = torch.autograd.grad(losses.sum(), outs, create_graph=True, allow_unused=True)
    results = sum(g.nbytes for g, out in zip(gradients, outs, strict=True) if g is not None and out.is_leaf)
    second = alive.now - before - results
    curved = [(i, g) for i, g in enumerate(gradients) if g is not None and g.requires_grad]
    if not curved:
        return second, 0
    first, gradient = curved[0]
    out = outs[first]
    before = alive.peak = alive.now
    if first < len(uses):  # as products do it: by rows, which convolutions copy
        moved = uses[first].rows(torch.ones_like(gradient)).clone(memory_format=torch.contiguous_format)
        along = uses[first].unrows(moved)
    else:
        along = torch.ones_like(gradient)
    with differentiating_twice():
        torch.autograd.grad(gradient, out, along, retain_graph=True, allow_unused=True)
    return second, alive.peak - before - (along.nbytes + out.nbytes if out.is_leaf else 0)


def _swept(
    tape: Tape,
    directions: Sequence[Direction],
    losses: Tensor,
    loss: ExampleLoss,
    labels: Tensor,
    weights: Sequence[Tensor],
    alive: Alive,
) -> dict[str, int]:
    """Of a sweep; zeros for a model that can't have one."""
    before = alive.now
    try:
        curved = prepare(tape, directions, losses)
    except Untraceable:
        return {}
    adjoints = alive.now - before
    remembered = sum(_remembered(op) for op in tape.ops)
    for op in curved:
        op.adjoint = None
    before = alive.peak = alive.now
    loss.curvature(tape.logits.detach(), labels, torch.zeros_like(tape.logits).unsqueeze(0))
    head = alive.peak - before
    one, *all_of_them = _tangents(tape, weights, directions)
    chosen = passing_all(tape, directions, range(len(directions)))
    compared = sum(v.numel() for d in chosen for v in directions[d].values())
    heads = len(directions) * head
    sizes = adjoints, remembered, max(one, head), *(max(most, heads) for most in all_of_them), compared
    return dict(zip(SWEPT, sizes, strict=True))


def _remembered(op: Op) -> int:
    """What the rule of an operation remembers (see there)."""
    rule, active = rule_of(op), len(op.active())
    if rule is sloped:
        tables = 1
    elif rule is pointwise:  # slopes, and second derivatives of all pairs
        tables = active + active * (active + 1) // 2
    elif op.packet in NORMS:
        tables = 1 if op.packet in SOFTMAXES else 2
    else:
        return 0
    return tables * int(op.outs[0].nbytes)


def _tangents(tape: Tape, weights: Sequence[Tensor], directions: Sequence[Direction]) -> list[int]:
    """The most bytes that tangents hold at once: along one direction that moves all activations, along all, and along
    all with a copy of the directions themselves.

    The tangent of a view is a view, so storages count: those that an operation makes, those that it reads, and those
    that others will still read. Its rule may hold more, of the size of its result.
    """
    reach = reached(tape, directions)
    readers = Counter(_storage(op.leaves[i]) for op in tape.ops for i in op.active())
    sizes = {_storage(w): (0, 0, w.nbytes if readers[_storage(w)] else 0) for w in weights}  # V is there already
    live = most = [0, 0, sum(copy for _, _, copy in sizes.values())]
    for op in tape.ops:
        for out, slot in zip(op.outs, op.out_slots, strict=True):
            if slot is not None and _storage(out) not in sizes:
                size = out.untyped_storage().nbytes()
                moved = size * reach[slot].bit_count()
                sizes[_storage(out)] = size, moved, moved
                live = [have + more for have, more in zip(live, sizes[_storage(out)], strict=True)]
        moving = [i for i in op.active() if any(sizes.get(_storage(op.leaves[i]), ())[:2])]
        if op.packet is aten.convolution:  # where its own direction joins those that arrive
            extra = 1 if op.active()[1:] else 0
        else:
            extra = 1 if op.packet in SOFTMAXES else 2 if op.packet in PRODUCTS and moving[1:] else 0
        made = sizes.get(_storage(op.outs[0]), (0, 0, 0))
        most = [max(m, have + extra * more) for m, have, more in zip(most, live, made, strict=True)]
        for i in op.active():
            key = _storage(op.leaves[i])
            readers[key] -= 1
            if not readers[key]:
                live = [have - less for have, less in zip(live, sizes.get(key, (0, 0, 0)), strict=True)]
    return most


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
