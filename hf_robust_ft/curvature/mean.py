"""The mean loss over a dataloader and products with its Hessian, one batch in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence, Sized
from operator import length_hint
from typing import Any

import torch
from torch import Tensor, nn

from ..processes import Processes
from .batches import Batches
from .directions import Group
from .loss import ExampleLoss, finite
from .model import Inputs, Weights
from .products import Bend, bend_of

# Two passes over the same examples differ by rounding (in float32, and shuffled, by some 1e-6 of the loss).
PASSES_AGREE = 1e-3


class MeanLoss:
    """``L(W) = 1/N Σ_n ℓ_n(W)`` over all N examples of a dataloader. Use it inside :func:`~.model.measuring`.

    Every method that needs the data makes one pass over the dataloader. Each example counts the same, however they
    are batched. Sums over batches are float64; within a batch torch sums in the precision of the model.

    Args:
        model: unwrapped.
        groups: the layers whose weights W may move.
        dataloader: batches, as of :func:`~.model.split_batch`; the same examples at each pass.
        loss: of one example.
        task: what is being measured, for progress bars.
        processes: that share the examples of each pass, and add up what they found at its end, in one reduction; by
            default this one alone.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        dataloader: Iterable[Any],
        loss: ExampleLoss,
        task: str,
        processes: Processes | None = None,
    ) -> None:
        self.weights = Weights(model, groups)
        self.examples = 0
        """N; 0 before the first pass."""
        self.passes = 0
        """Over the dataloader, so far; or over what was kept of its only batch."""
        self._model = model
        self._dataloader = dataloader
        self._loss = loss
        self._task = task
        self._processes = processes or Processes(together=False)
        self._value = 0.0
        self._only: Bend | None = None  # of a dataloader of one batch, after the first pass

    @property
    def size(self) -> int:
        """P, the number of weights that may move."""
        return sum(leaf.numel() for leaf in self.weights.leaves)

    def losses(self, inputs: Inputs, labels: Tensor, first: int) -> Tensor:
        """Of each example of a batch at the present weights, [B], with autograd's graph.

        Raises:
            NonFiniteLoss: a loss that is infinite or NaN; ``first`` is the number of the first example.
        """
        return finite(self._loss(self.weights.logits(inputs), labels), first)

    def each_batch(self, measure: Callable[[Inputs, Tensor, int], Tensor], totals: Tensor) -> float:
        """One pass; returns the mean loss.

        Args:
            measure: takes inputs, labels and the number of the first example; returns the losses of the batch at
                the model's own weights. It gets no batch before the one before is done with, and its memory free.
            totals: what ``measure`` adds to, float64; in the end it holds the sum over all processes.

        Raises:
            ValueError: no example, or other examples than in the pass before.
        """
        batches = Batches(self._dataloader, self._model, self._task, self._processes)
        total = torch.zeros((), dtype=torch.float64, device=totals.device)
        for first, inputs, labels in batches:
            total += measure(inputs, labels, first).detach().sum(dtype=torch.float64).item()
        self._processes.add_(totals, total, token=batches.token)
        examples = batches.read
        value = total.item() / examples
        if self.examples and (
            examples != self.examples or abs(value - self._value) > PASSES_AGREE * (abs(value) + PASSES_AGREE)
        ):
            raise ValueError(
                f"dataloader gave {self.examples} examples of mean loss {self._value:.6g} in one pass and {examples} "
                f"of {value:.6g} in the next; it must give the same ones each time: without random augmentation, and "
                "without drop_last where it shuffles"
            )
        self.examples, self._value = examples, value
        self.passes += 1
        return value

    def each_bend(self, use: Callable[[Bend], None], totals: Tensor) -> float:
        """One pass; ``use`` gets for each batch the function V → ``Σ_n ∇²ℓ_n V``. Returns the mean loss.

        One backward pass with a graph a batch, and one more backward pass each time that the function is called. A
        list or DataLoader of one batch is read in the first pass only, and its graph kept: the weights must stay.
        """
        if self._only is not None:
            use(self._only)
            self.passes += 1
            return self._value
        # Several processes read every batch each time, to know that they measure the same. An iterator of one batch
        # would go where one of two is used up.
        sized = isinstance(self._dataloader, Sized)
        keep = sized and length_hint(self._dataloader) == 1 and self._processes.count == 1
        batches = 0

        def measure(inputs: Inputs, labels: Tensor, first: int) -> Tensor:
            nonlocal batches
            batches += 1
            losses = self.losses(inputs, labels, first)
            bend = bend_of(losses.sum(), self.weights.leaves)
            use(bend)
            # A length may be wrong: some DataLoaders of iterable data sets give more.
            self._only = bend if keep and batches == 1 else None
            return losses

        return self.each_batch(measure, totals)

    def products(self, vectors: Tensor) -> Tensor:
        """``H v`` of some vectors, with H the Hessian of the mean loss in all groups together, in one pass.

        Args:
            vectors: [K, P], the weights in the order of ``weights.leaves``.

        Returns:
            [K, P] in float64, on the device of the first weight.
        """
        directions = [self.split(vector) for vector in vectors]
        totals = torch.zeros(len(vectors), self.size, dtype=torch.float64, device=self.weights.leaves[0].device)

        def add(bend: Bend) -> None:
            for total, direction in zip(totals, directions, strict=True):
                for part, bent in zip(self._parts(total), bend(direction), strict=True):
                    part += bent.to(part.device)

        self.each_bend(add, totals)
        return totals / self.examples

    def split(self, vector: Tensor) -> list[Tensor]:
        """A vector [P] as one tensor for each weight, of its type and on its device."""
        return [part.to(leaf) for part, leaf in zip(self._parts(vector), self.weights.leaves, strict=True)]

    def _parts(self, vector: Tensor) -> list[Tensor]:
        leaves = self.weights.leaves
        sizes = [leaf.numel() for leaf in leaves]
        return [p.view_as(w) for p, w in zip(torch.split(vector, sizes), leaves, strict=True)]
