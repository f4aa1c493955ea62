"""Curvature of one batch along some directions: by the sweep where it can, by autograd where it must."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .chunks import product_chunk, sweep_chunk
from .directions import Group
from .loss import ExampleLoss, finite
from .model import Inputs, Weights, some_examples
from .products import (
    Products,
    Use,
    differentiating_twice,
    each_gradient,
    find_uses,
    in_activation_space,
    in_weight_space,
)
from .sweep import Direction, passing_all, prepare, separable, sweep, unruled
from .tape import Tape, Untraceable, Widest, record

logger = logging.getLogger(__name__)

Kind = Literal["hessian", "gauss_newton", "hessian_upper", "hessian_psd"]


@dataclass
class Forms:
    """Second derivatives of each example's loss along each direction, [examples, directions], float64."""

    losses: Tensor
    """[examples]."""
    hessian: Tensor
    """``vᵀ H v``."""
    gauss_newton: Tensor | None = None
    length: Tensor | None = None
    """``‖H v‖``."""
    reach: Tensor | None = None
    """``‖P v‖``, P a projection with ``P H = H``."""
    positive: Tensor | None = None
    """``vᵀ H⁺ v``."""
    gap: Tensor | None = None
    """What half the Lanczos steps would have changed."""

    def tables(self) -> dict[str, Tensor]:
        """What there is, [examples, directions] each, by name."""
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "losses"}
        return {name: table for name, table in found.items() if table is not None}

    @staticmethod
    def joined(parts: Sequence[Forms]) -> Forms:
        """Of several groups of examples."""
        tables = [part.tables() for part in parts]
        return Forms(
            losses=torch.cat([part.losses for part in parts]),
            **{name: torch.cat([table[name] for table in tables]) for name in tables[0]},
        )


class Engine:
    """Measures batches of one model. Use it inside :func:`~.model.measuring`.

    Args:
        model: unwrapped.
        groups: the layers whose weights may move.
        loss: of one example.
        examples_at_once, directions_at_once: what travels together; None fits them to the cache or the GPU.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        loss: ExampleLoss,
        *,
        examples_at_once: int | None = None,
        directions_at_once: int | None = None,
    ) -> None:
        self.weights = Weights(model, groups)
        self.notes: list[str] = []
        """What was done otherwise than by the sweep's rules, and why."""
        self.loss = loss
        self._examples_at_once = examples_at_once
        self._directions_at_once = directions_at_once
        self._sweeps = True
        self._widths: dict[tuple[Any, ...], int] = {}
        self._cut = False
        self._checked = False

    def sweep(self, inputs: Inputs, labels: Tensor, directions: Sequence[Direction], first: int = 0) -> Forms:
        """``vᵀ H v`` and Gauss-Newton of every example along every direction.

        Args:
            inputs, labels: a batch.
            directions: each a mapping from the index of a leaf (:attr:`Weights.leaves`) to V.
            first: number of the first example, for messages.
        """
        parts = []
        for at, some_inputs, some_labels, together in self._chunks(inputs, labels, len(directions)):
            parts.append(self._swept(some_inputs, some_labels, directions, together, first + at))
        return _finite_forms(Forms.joined(parts), first)

    def products(
        self,
        inputs: Inputs,
        labels: Tensor,
        directions: Sequence[Direction],
        *,
        steps: int | None = None,
        first: int = 0,
    ) -> Forms:
        """``vᵀ H v`` (as in :meth:`sweep`), ``‖H v‖``, ``‖P v‖`` and, with Lanczos steps, ``vᵀ H⁺ v``."""
        _, _, size = self.at_once(inputs, labels, len(directions))
        parts = []
        for at in range(0, len(labels), size):
            some = some_examples(inputs, len(labels), at, at + size)
            with differentiating_twice():
                parts.append(self._multiplied(some, labels[at : at + size], directions, steps, first + at))
        return _finite_forms(Forms.joined(parts), first)

    def _swept(
        self, inputs: Inputs, labels: Tensor, directions: Sequence[Direction], together: int, first: int
    ) -> Forms:
        if not self._sweeps:
            return self._differentiated(inputs, labels, directions, first)
        batch = len(labels)
        try:
            tape, losses = self._record(inputs, labels, first)
            if tape.logits_slot is None or not losses.requires_grad:
                return self._flat(losses, len(directions))
            curved = prepare(tape, directions, losses)
        except Untraceable as problem:
            return self._given_up(str(problem), inputs, labels, directions, first)
        outs, adjoints = [op.outs[0] for op in curved], [op.adjoint for op in curved if op.adjoint is not None]
        if not all(separable(outs, adjoints, losses)):
            self._note("examples don't lie one after the other in memory: they are measured one at a time")
            del tape, losses, curved, outs, adjoints
            return self._one_by_one(inputs, labels, lambda i, y, n: self._swept(i, y, directions, together, n), first)
        gauss_newton = torch.zeros(len(directions), batch, dtype=torch.float64, device=labels.device)
        hessian, slopes = gauss_newton.clone(), gauss_newton.clone()

        def head(moving: Sequence[int], tangents: Tensor) -> None:
            found = self.loss.curvature(tape.logits, labels, tangents)
            for total, value in zip((hessian, gauss_newton, slopes), found, strict=True):
                total[list(moving)] = value

        try:
            hessian += sweep(tape, directions, batch, head, at_once=together)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, ValueError, IndexError) as problem:
            # Untraceable, or a case that a rule was not written for.
            return self._given_up(str(problem), inputs, labels, directions, first)
        for name in sorted(unruled(tape)):
            self._note(f"{name} has no rule: autograd differentiates it along each direction")
        forms = Forms(losses.detach().double().cpu(), hessian.t().cpu(), gauss_newton.t().cpu())
        # An example without any target would show nothing.
        n = int(slopes.abs().sum(0).argmax())
        if not self._checked and slopes[:, n].any():
            self._checked = True
            moving = slopes[:, n].nonzero()[:, 0].tolist()
            chosen = passing_all(tape, directions, moving) or moving[:1]
            exact = all(out.dtype == torch.float64 for op in tape.ops for out in op.outs if isinstance(out, Tensor))
            tape.ops.clear()
            tape.readers.clear()
            tape.logits = tape.logits.detach()
            del losses, curved, outs, adjoints  # The check needs their memory.
            one = some_examples(inputs, batch, n, n + 1), labels[n : n + 1]
            if not self._agrees(*one, directions, chosen, hessian[:, n], slopes[:, n], exact):
                why = f"the sweep and autograd differ on example {first + n}"
                return self._given_up(why, inputs, labels, directions, first)
        return forms

    def _given_up(
        self, problem: str, inputs: Inputs, labels: Tensor, directions: Sequence[Direction], first: int
    ) -> Forms:
        self._sweeps = False
        self._note(f"{problem}: all derivatives are taken by autograd, one example at a time")
        return self._differentiated(inputs, labels, directions, first)

    def _flat(self, losses: Tensor, directions: int) -> Forms:
        """Of a loss that depends on none of the weights."""
        zeros = torch.zeros(len(losses), directions, dtype=torch.float64)
        return Forms(losses.detach().double().cpu(), zeros, zeros, zeros, zeros, zeros, zeros)

    def _agrees(
        self,
        inputs: Inputs,
        labels: Tensor,
        directions: Sequence[Direction],
        chosen: Sequence[int],
        hessian: Tensor,
        slopes: Tensor,
        exact: bool,
    ) -> bool:
        """Compare one example with autograd: all first derivatives, and the second ones along some directions.

        Catches what no rule can know: an operation that autograd treats in a way of its own, or a wrong rule.
        """
        loss = self.loss(self.weights.logits(inputs), labels)[0]
        # Some models take a softmax or a norm in float32 even where all else is float64.
        tolerance = 1e-8 if exact else 1e-3
        leaves = self.weights.leaves

        def along(direction: Direction, vectors: Mapping[int, Tensor | None]) -> tuple[float, float]:
            """Inner product with V, and the largest that it could be."""
            pairs = [(v.flatten(), g.flatten()) for i, v in direction.items() if (g := vectors.get(i)) is not None]
            return sum((v @ g).item() for v, g in pairs), sum((v.norm() * g.norm()).item() for v, g in pairs)

        expected = [0.0] * len(directions)
        scales = [0.0] * len(directions)
        reached: set[int] = set()

        def take(i: int, gradient: Tensor) -> None:
            reached.add(i)
            for d, direction in enumerate(directions):
                inner, most = along(direction, {i: gradient})
                expected[d] += inner
                scales[d] += most

        each_gradient(loss, leaves, take)
        for slope, inner, scale in zip(slopes.tolist(), expected, scales, strict=True):
            if not abs(slope - inner) <= tolerance * scale:
                return False
        used = sorted(reached & {i for d in chosen for i in directions[d]})
        graphs = torch.autograd.grad(loss, [leaves[i] for i in used], create_graph=True)
        gradients = dict(zip(used, graphs, strict=True))
        for d in chosen:
            moving = [i for i in directions[d] if i in gradients]
            bending = [(gradients[i], directions[d][i]) for i in moving if gradients[i].requires_grad]
            if not bending:
                continue
            try:
                bent = torch.autograd.grad(
                    [g for g, _ in bending], [leaves[i] for i in moving], [v for _, v in bending],
                    allow_unused=True, retain_graph=True,
                )  # fmt: skip
            except (RuntimeError, NotImplementedError):
                continue  # An operation that only the sweep knows how to differentiate twice.
            inner, scale = along(directions[d], dict(zip(moving, bent, strict=True)))
            if not abs(hessian[d].item() - inner) <= tolerance * scale:
                return False
        return True

    def _multiplied(
        self, inputs: Inputs, labels: Tensor, directions: Sequence[Direction], steps: int | None, first: int
    ) -> Forms:
        batch = len(labels)
        uses: dict[int, Use] = {}
        try:
            tape, losses = self._record(inputs, labels, first)
            if not losses.requires_grad:
                return self._flat(losses, len(directions))
            uses = find_uses(tape, directions, losses)
            del tape  # It keeps more than the graph of the losses does.
        except Untraceable as problem:
            self._note(f"{problem}: products are taken in weight space, one example at a time")
            uses, losses = {}, self._losses(inputs, labels, first)
        found = in_activation_space(list(uses.values()), losses, steps) if uses else []
        columns = {d: _column(product) for d, product in zip(uses, found, strict=True)}
        uses.clear()
        rest = [d for d in range(len(directions)) if d not in columns]
        some = [directions[d] for d in rest]
        if batch == 1:
            for d, direction in zip(rest, some, strict=True):
                leaves = [self.weights.leaves[i] for i in direction]
                columns[d] = _column(in_weight_space(leaves, list(direction.values()), losses[0], steps))
        elif rest:
            losses = losses.detach()  # The graph of all examples is of no use for each.
            forms = self._one_by_one(inputs, labels, lambda i, y, n: self._multiplied(i, y, some, steps, n), first)
            for k, d in enumerate(rest):
                columns[d] = {name: table[:, k] for name, table in forms.tables().items()}
        tables = {name: torch.stack([columns[d][name] for d in range(len(directions))], 1) for name in columns[0]}
        return Forms(losses=losses.detach().double().cpu(), **tables)

    def _differentiated(self, inputs: Inputs, labels: Tensor, directions: Sequence[Direction], first: int) -> Forms:
        """What the sweep gives, by autograd, one example at a time."""
        if len(labels) > 1:
            return self._one_by_one(inputs, labels, lambda i, y, n: self._differentiated(i, y, directions, n), first)
        logits = self.weights.logits(inputs)
        losses = finite(self.loss(logits, labels), first)
        if not losses.requires_grad:
            return self._flat(losses, len(directions))
        with differentiating_twice():
            return self._reversed(logits, losses, labels, directions)

    def _reversed(self, logits: Tensor, losses: Tensor, labels: Tensor, directions: Sequence[Direction]) -> Forms:
        # The tangents of the logits by reversing the reverse pass.
        dummy = torch.zeros_like(logits, requires_grad=True)
        pulled = torch.autograd.grad(logits, self.weights.leaves, dummy, create_graph=True, allow_unused=True)
        hessian, gauss_newton = [], []
        for direction in directions:
            leaves = [self.weights.leaves[i] for i in direction]
            hessian.append(in_weight_space(leaves, list(direction.values()), losses[0], None).form)
            used = [(p, v) for i, v in direction.items() if (p := pulled[i]) is not None and p.requires_grad]
            tangents = None
            if used:
                (tangents,) = torch.autograd.grad(
                    [p for p, _ in used], dummy, [v for _, v in used], retain_graph=True, allow_unused=True
                )
            if tangents is None:
                tangents = torch.zeros_like(logits)
            gauss_newton.append(self.loss.curvature(logits, labels, tangents.unsqueeze(0))[1][0])
        return Forms(losses.detach().double().cpu(), torch.stack(hessian, 1).cpu(), torch.stack(gauss_newton, 1).cpu())

    def _record(self, inputs: Inputs, labels: Tensor, first: int) -> tuple[Tape, Tensor]:
        tape = record(lambda: self.weights.logits(inputs), self.weights.leaves)
        return tape, finite(self.loss(tape.logits, labels), first)

    def _losses(self, inputs: Inputs, labels: Tensor, first: int) -> Tensor:
        return finite(self.loss(self.weights.logits(inputs), labels), first)

    def _chunks(self, inputs: Inputs, labels: Tensor, directions: int) -> Iterator[tuple[int, Inputs, Tensor, int]]:
        batch = len(labels)
        size, together, _ = self.at_once(inputs, labels, directions)
        for at in range(0, batch, size):
            end = min(batch, at + size)
            yield at, some_examples(inputs, batch, at, end), labels[at:end], together

    def at_once(self, inputs: Inputs, labels: Tensor, directions: int) -> tuple[int, int, int]:
        """Examples and directions of a batch that a sweep takes together, and examples for products."""
        batch, width = len(labels), self._width(inputs, labels)
        size, together = sweep_chunk(
            batch, width, directions, labels.device, self._examples_at_once, self._directions_at_once
        )
        return size, together, product_chunk(batch, width, labels.device, self._examples_at_once)

    def _width(self, inputs: Inputs, labels: Tensor) -> int:
        """Elements of the largest activation of one example.

        Raises:
            ValueError: the first example of the first batch is another one alone than in its batch.
        """
        batch, one = len(labels), some_examples(inputs, len(labels), 0, 1)
        values = one.values() if isinstance(one, Mapping) else one
        shapes = tuple(value.shape if isinstance(value, Tensor) else None for value in values)
        if shapes in self._widths and (self._cut or batch == 1):
            return self._widths[shapes]
        with torch.no_grad(), Widest(self.weights.all) as widest:
            alone = self.weights.logits(one)
        self._widths[shapes] = widest.elements
        if not self._cut and batch > 1:
            self._cut = True
            self._check_cut(inputs, batch, alone)
        return self._widths[shapes]

    @torch.no_grad()
    def _check_cut(self, inputs: Inputs, examples: int, alone: Tensor) -> None:
        """Refuse a model whose first example is another one alone than in its batch."""
        whole = self.weights.logits(inputs)
        tolerance = 1e-3 * whole.abs().max().item()
        if not math.isfinite(tolerance):
            return  # The loss will name the example.
        if len(whole) == examples and not torch.allclose(whole[:1], alone, rtol=0, atol=tolerance):
            raise ValueError(
                f"batch: the first of {examples} examples has other logits alone than in the batch. Either an input "
                "that all examples share has as many rows as there are examples (give a batch of another size), or the "
                "examples of a batch influence each other, and then there is no loss of one example"
            )

    def _one_by_one(
        self, inputs: Inputs, labels: Tensor, measure: Callable[[Inputs, Tensor, int], Forms], first: int
    ) -> Forms:
        batch = len(labels)
        return Forms.joined(
            [measure(some_examples(inputs, batch, n, n + 1), labels[n : n + 1], first + n) for n in range(batch)]
        )

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)
            logger.warning("curvature: %s", text)


def _finite_forms(forms: Forms, first: int) -> Forms:
    for name, table in forms.tables().items():
        bad = (~table.isfinite()).nonzero()
        if len(bad):
            n, d = bad[0].tolist()
            raise ValueError(
                f"the curvature ({name}) of example {first + n} is {table[n, d].item()} in layer {d}: its loss has "
                "no second derivative there (such as the square root of 0). Leave the example out"
            )
    return forms


def _column(product: Products) -> dict[str, Tensor]:
    found = {"hessian": product.form, "length": product.length, "reach": product.reach}
    if product.positive is not None and product.gap is not None:
        found |= {"positive": product.positive, "gap": product.gap}
    return {name: value.cpu() for name, value in found.items()}
