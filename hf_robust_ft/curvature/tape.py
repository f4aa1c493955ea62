"""A tape: the ATen operations through which the logits of an unmodified model depend on its layers.

One ordinary forward pass, watched from below autograd. Autograd stays in charge of what is differentiable:
an operation is on the tape if one of its inputs requires a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

aten = torch.ops.aten


class Untraceable(RuntimeError):
    """The sweep can't follow this model; the message names the operation."""


@dataclass
class Op:
    """One operation, with a slot (a number) for each tensor that depends on a layer."""

    func: Any
    leaves: list[Any]
    """Its arguments, flattened; tensors are the primal values."""
    spec: Any
    slots: list[int | None]
    """For each leaf the slot whose value it is; None for what depends on no layer."""
    versions: list[int | None]
    """Of each tensor when it was read, so that a later change in place is noticed."""
    outs: list[Any]
    out_slots: list[int | None]
    adjoint: Tensor | None = field(default=None)
    """Gradient of the summed loss in ``outs[0]``, where the sweep needs it."""
    memo: dict[Any, Any] = field(default_factory=dict)
    """What a rule derives from primal values alone: the same for every chunk of directions."""

    @property
    def packet(self) -> Any:
        return self.func.overloadpacket

    @cached_property
    def _arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return tree_unflatten(self.leaves, self.spec)  # type: ignore[no-any-return]

    @property
    def args(self) -> tuple[Any, ...]:
        return self._arguments[0]

    @property
    def kwargs(self) -> dict[str, Any]:
        return self._arguments[1]

    def call(self, replaced: Mapping[int, Any]) -> Any:
        """The operation with some leaves replaced."""
        leaves = [replaced.get(i, leaf) for i, leaf in enumerate(self.leaves)]
        args, kwargs = tree_unflatten(leaves, self.spec)
        return self.func(*args, **kwargs)

    def active(self) -> list[int]:
        """Indices of the leaves that depend on a layer."""
        return [i for i, slot in enumerate(self.slots) if slot is not None]

    def value(self, index: int) -> Tensor:
        """The primal value of a leaf, which must still be what the operation read."""
        leaf: Tensor = self.leaves[index]
        if leaf._version != self.versions[index]:
            raise Untraceable(f"an input of {self.func} is changed in place later on")
        return leaf.detach()


@dataclass
class Tape:
    """What :func:`record` saw. The weights have the slots 0, 1, …"""

    ops: list[Op]
    """In the order of execution; only those that the logits depend on."""
    logits: Tensor
    """With autograd's graph."""
    logits_slot: int | None
    """None: no weight has any influence on the logits."""
    overwritten: set[int]
    """Slots whose tensor has been changed in place since."""

    @cached_property
    def readers(self) -> dict[int | None, list[Op]]:
        """For each slot the operations that read it, once for each time that they do."""
        readers: dict[int | None, list[Op]] = {}
        for op in self.ops:
            for i in op.active():
                readers.setdefault(op.slots[i], []).append(op)
        return readers


def record(forward: Callable[[], Tensor], weights: Sequence[Tensor]) -> Tape:
    """Run a forward pass and write down how its result depends on some weights.

    Args:
        forward: returns the logits.
        weights: leaves that require a gradient; ``forward`` computes with these very tensors or views of them.

    Raises:
        Untraceable: something changes in place what other operations see through a view, or hides from
            autograd (a custom ``autograd.Function``).
    """
    recorder = _Recorder(weights)
    with torch.enable_grad(), recorder:
        logits = forward()
    slot = recorder.slot_of(logits, "the loss") if logits.requires_grad else None
    return Tape(_live(recorder.ops, slot), logits, slot, recorder.overwritten)


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, weights: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ops: list[Op] = []
        self.overwritten: set[int] = set()
        # A tensor is known by the memory that it shows. Autograd gives views a new identity behind our back, but
        # two tensors that show the same memory in the same way have the same value, hence the same tangent.
        # The tape holds every tensor that it knows, so no memory is used twice.
        self._slots: dict[tuple[Any, ...], int] = {_region(weight): i for i, weight in enumerate(weights)}
        self._hidden: set[int] = set()
        self._count = len(weights)

    def slot_of(self, tensor: Tensor, reader: Any) -> int:
        slot = self._slots.get(_region(tensor))
        if slot is None or slot in self._hidden:
            raise Untraceable(
                f"{reader} reads a tensor of shape {tuple(tensor.shape)} whose origin is hidden: a custom "
                "autograd.Function, a computation without gradients or in complex numbers, or a change through a view"
            )
        return slot

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Autograd keeps what it needs of a result through a detached view of it.
        if func is aten.detach.default:
            return func(*args)
        kwargs = kwargs or {}
        leaves, spec = tree_flatten((args, kwargs))
        slots = [
            self.slot_of(leaf, func) if isinstance(leaf, Tensor) and leaf.requires_grad else None for leaf in leaves
        ]
        if all(slot is None for slot in slots):
            return func(*args, **kwargs)
        pure, target = func, _written(func, args)
        if target is not None:
            pure = _out_of_place(func)
            if pure is None or self._is_viewed(target):
                raise Untraceable(f"{func} changes a tensor in place through a view")
            # What the operation read is about to be lost.
            leaves = [leaf.clone() if leaf is target else leaf for leaf in leaves]
        versions = [leaf._version if isinstance(leaf, Tensor) else None for leaf in leaves]
        result = func(*args, **kwargs)
        if target is not None and (old := self._slots.pop(_region(target), None)) is not None:
            self.overwritten.add(old)
        self._write(Op(pure, leaves, spec, slots, versions, tree_leaves(result), []))
        return result

    def _write(self, op: Op) -> None:
        for out in op.outs:
            if not isinstance(out, Tensor) or not out.is_floating_point():
                op.out_slots.append(None)
            elif len(op.outs) == 1 and _region(out) in self._slots:
                return  # an alias, such as a view of the same shape
            else:
                op.out_slots.append(self._new_slot(out))
        self.ops.append(op)

    def _new_slot(self, out: Tensor) -> int:
        slot = self._slots[_region(out)] = self._count
        self._count += 1
        if not torch.is_grad_enabled():
            self._hidden.add(slot)
        return slot

    def _is_viewed(self, tensor: Tensor) -> bool:
        storage, own = tensor.untyped_storage()._cdata, _region(tensor)
        return any(region[0] == storage and region != own for region in self._slots)


class Widest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the elements of the largest result that depends on an input.

    What is computed from weights alone, such as positions fitted to another image size, travels along few directions.
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements = 1
        # Held, so that no memory is used twice.
        self._of_weights = {weight.untyped_storage()._cdata: weight for weight in weights}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        alone = bool(read) and all(leaf.untyped_storage()._cdata in self._of_weights for leaf in read)
        for out in tree_leaves(result):
            if isinstance(out, Tensor) and alone:
                self._of_weights[out.untyped_storage()._cdata] = out
            elif isinstance(out, Tensor):
                self.elements = max(self.elements, out.numel())
        return result


def _region(tensor: Tensor) -> tuple[Any, ...]:
    storage = tensor.untyped_storage()._cdata
    return storage, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def _written(func: Any, args: tuple[Any, ...]) -> Tensor | None:
    """The tensor that an operation changes."""
    for argument, value in zip(func._schema.arguments, args, strict=False):
        if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, Tensor):
            return value
    return None


def _out_of_place(func: Any) -> Any:
    name = func._schema.name.partition("::")[2].removesuffix("_")
    return getattr(getattr(aten, name, None), func._overloadname, None)


def _live(ops: Sequence[Op], slot: int | None) -> list[Op]:
    """The operations that a slot depends on."""
    needed: set[int | None] = {slot} - {None}
    kept: list[Op] = []
    for op in reversed(ops):
        if needed.intersection(op.out_slots):
            kept.append(op)
            needed.update(s for s in op.slots if s is not None)
    return kept[::-1]
