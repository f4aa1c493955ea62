"""The Hessian distance measure over a data set: streaming, bounded in memory and time."""

from __future__ import annotations

import heapq
import logging
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import length_hint
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..corrected_loss import CorrectedLoss
from . import cost
from .directions import Group, Layers, group_layers, lengths_of, travelled, unwrapped
from .engine import Engine
from .estimate import work_of
from .forms import LANCZOS_STEPS, check_counts
from .loss import ExampleLoss, LossFunction
from .mean import numbered_batches
from .model import Inputs, measuring, some_examples
from .report import HessianReport, LayerCurvature, PositivePart, Statistic
from .sweep import Direction

logger = logging.getLogger(__name__)


class MeasurementStopped(RuntimeError):
    """A measurement met an error; ``report`` holds what it had found."""

    def __init__(self, message: str, report: HessianReport) -> None:
        super().__init__(message)
        self.report = report


def measure_hessian(
    model: nn.Module,
    reference: Mapping[str, Tensor] | nn.Module,
    dataloader: Iterable[Any],
    *,
    loss: CorrectedLoss | LossFunction | None = None,
    layers: Layers = "weights",
    time_budget: float | None = None,
    lanczos_steps: int = LANCZOS_STEPS,
    examples_at_once: int | None = None,
    directions_at_once: int | None = None,
) -> HessianReport:
    """Measure how sharply the loss bends along the way that each layer travelled, over all examples.

    For each layer i, with ``v_i = vec(W_i - W_i^ref)`` and ``H_i`` the Hessian of one example's loss in this layer
    alone, the Hessian distance measure of Ju, Li & Zhang (ICML 2022, theorem 2.1) is
    ``𝓗_i = max over examples of v_iᵀ H_i⁺ v_i``. Two passes:

    1. for every example ``v_iᵀ H_i v_i`` and the sound bound ``½ (v_iᵀ H_i v_i + ‖P v_i‖ ‖H_i v_i‖) ≥ v_iᵀ H_i⁺ v_i``,
       with P the projection on the span of the inputs that the layer gets from this example, outside of which H_i is
       zero (for a group of weights, P is the identity);
    2. ``v_iᵀ H_i⁺ v_i`` by Lanczos, for the examples that can still hold the maximum, the largest bounds first, until
       the largest of the others is below the largest value found (the layer is *settled*), the time is over, or
       8 examples a layer have been looked at.

    Cost on a CPU: about 2.4 forward passes a layer and batch for the first pass, and 2 of one example for each step of
    Lanczos; both are logged before they start. Memory: a chunk of examples, and the inputs of those that may go to the
    second pass; there, for a group of weights or a tied one, ``lanczos_steps`` times as much as these weights.

    Args:
        model: any transformers model, or a module that takes the batch's inputs. Measured in eval mode and at least
            float32, and put back afterwards.
        reference: the weights that it started from: a state dict, or the model itself.
        dataloader: batches, each a mapping with ``labels`` or a pair (inputs, labels). Use no augmentation. For the
            bound these are the training examples.
        loss, layers, examples_at_once, directions_at_once: see :func:`layer_quadratic_forms`.
        time_budget: seconds for the second pass; None sets no limit, 0 leaves it out. The first always runs.
        lanczos_steps: Hessian-vector products for each Lanczos value.

    Returns:
        A report, which Ctrl-C cuts short (``complete`` is False then).

    Raises:
        ValueError: no batches, or an argument that doesn't fit.
        ReferenceMismatch: the reference lacks layers, or has them in another shape.
        MeasurementStopped: any error once a batch was measured, with the report so far.
    """
    if time_budget is not None and not time_budget >= 0:
        raise ValueError(f"time_budget is {time_budget!r}; give seconds >= 0, or None for no limit")
    check_counts(lanczos_steps=lanczos_steps, examples_at_once=examples_at_once, directions_at_once=directions_at_once)
    model = unwrapped(model)
    groups, left_out = group_layers(model, layers)
    ways = travelled(groups, reference)
    with measuring(model):
        engine = Engine(
            model,
            groups,
            ExampleLoss(loss, model),
            examples_at_once=examples_at_once,
            directions_at_once=directions_at_once,
        )
        run = _Run(engine, groups, engine.weights.directions(ways), lanczos_steps)
        complete = False
        try:
            run.first_pass(dataloader, model)
            run.second_pass(time_budget)
            complete = True
        except KeyboardInterrupt:
            if not run.examples:
                raise
            logger.warning("stopped after %d examples; the report holds what was measured", run.examples)
        except Exception as error:
            if not run.examples:
                raise
            report = run.report(left_out, complete=False)
            raise MeasurementStopped(
                f"{error} (after {run.examples} examples; .report of this error holds what was measured)", report
            ) from error
        return run.report(left_out, complete=complete)


@dataclass(order=True)
class _Candidate:
    """An example that may hold the maximum of a layer."""

    bound: float
    example: int
    inputs: Any = field(compare=False)
    labels: Any = field(compare=False)
    done: bool = field(default=False, compare=False)


class _Run:
    """The sums, maxima and candidates of one measurement."""

    def __init__(self, engine: Engine, groups: Sequence[Group], directions: Sequence[Direction], steps: int) -> None:
        self.examples = 0
        self._engine = engine
        self._groups = groups
        self._directions = directions
        self._lengths = lengths_of(directions)
        self._steps = steps
        self._hessian = _Sums(len(groups))
        self._upper = _Sums(len(groups))
        self._losses = _Sums(1)
        self._smallest = math.inf
        # The largest sound bounds; the smallest of them goes first when there are too many.
        self._candidates: list[list[_Candidate]] = [[] for _ in groups]
        self._beyond = [-math.inf] * len(groups)
        """Largest sound bound of the examples that are no candidates any more."""
        self._positive: list[PositivePart | None] = [None] * len(groups)
        self._start = time.perf_counter()
        self._estimate = math.nan

    def first_pass(self, dataloader: Iterable[Any], model: nn.Module) -> None:
        batches = length_hint(dataloader) or None
        for _, inputs, labels in numbered_batches(dataloader, model, "sound bounds"):
            if not self.examples:
                self._predict(inputs, labels, batches)
            self._add(inputs, labels)

    def _predict(self, inputs: Inputs, labels: Tensor, batches: int | None) -> None:
        work, some = work_of(self._engine, self._directions, inputs, labels, len(labels) * (batches or 1))
        whole, value = cost.measure(work, some, self._steps), cost.lanczos_value(work, some, self._steps).seconds
        self._estimate = whole.seconds
        logger.info(
            "sound bounds of %d layers: about %.0f s for %s; then Lanczos within time_budget: about %.2g s a value, "
            "%.0f s for one value a layer, at most %d times that. Memory: %.3g GB more than the model, its reference "
            "and a batch",
            work.layers, whole.seconds, f"{batches} batches" if batches else "a batch", value, work.layers * value,
            cost.CANDIDATES, whole.bytes / 1e9,
        )  # fmt: skip

    def _add(self, inputs: Inputs, labels: Tensor) -> None:
        forms = self._engine.products(inputs, labels, self._directions, first=self.examples)
        assert forms.length is not None
        assert forms.reach is not None
        upper = (forms.hessian + forms.reach * forms.length) / 2
        self._hessian.add(forms.hessian, self.examples)
        self._upper.add(upper, self.examples)
        self._losses.add(forms.losses.unsqueeze(1), self.examples)
        self._smallest = min(self._smallest, forms.losses.min().item())
        self._keep(upper, inputs, labels)
        self.examples += len(labels)

    def _keep(self, upper: Tensor, inputs: Inputs, labels: Tensor) -> None:
        kept: dict[int, tuple[Any, Any]] = {}
        for i, found in enumerate(self._candidates):
            values, order = upper[:, i].topk(min(cost.CANDIDATES + 1, len(upper)))
            for bound, n in zip(values.tolist(), order.tolist(), strict=True):
                if len(found) == cost.CANDIDATES and bound <= found[0].bound:
                    self._beyond[i] = max(self._beyond[i], bound)
                    continue
                if n not in kept:
                    one = some_examples(inputs, len(labels), n, n + 1)
                    kept[n] = (_copied(one), labels[n : n + 1].clone())
                candidate = _Candidate(bound, self.examples + n, *kept[n])
                if len(found) < cost.CANDIDATES:
                    heapq.heappush(found, candidate)
                else:
                    self._beyond[i] = max(self._beyond[i], heapq.heapreplace(found, candidate).bound)

    def second_pass(self, budget: float | None) -> None:
        end = math.inf if budget is None else time.perf_counter() + budget
        with tqdm(desc="Lanczos", unit="value", disable=None) as bar:
            while todo := self._next():
                for layers in todo.values():
                    if time.perf_counter() >= end:
                        return
                    self._lanczos(layers)
                    bar.update(len(layers))

    def _next(self) -> dict[int, list[tuple[int, _Candidate]]]:
        """For each layer that isn't settled its most promising candidate, by example."""
        todo: dict[int, list[tuple[int, _Candidate]]] = {}
        for i, candidates in enumerate(self._candidates):
            best = max((c for c in candidates if not c.done), default=None)
            if best is not None and not self._is_settled(i):
                todo.setdefault(best.example, []).append((i, best))
        return todo

    def _lanczos(self, layers: Sequence[tuple[int, _Candidate]]) -> None:
        one = layers[0][1]
        forms = self._engine.products(
            one.inputs, one.labels, [self._directions[i] for i, _ in layers], steps=self._steps, first=one.example
        )
        assert forms.positive is not None
        assert forms.gap is not None
        for (i, candidate), value, gap in zip(layers, forms.positive[0].tolist(), forms.gap[0].tolist(), strict=True):
            candidate.done = True
            best, count = self._positive[i], sum(c.done for c in self._candidates[i])
            if best is None or value > best.maximum:
                best = PositivePart(value, candidate.example, gap, count, False)
            self._positive[i] = PositivePart(best.maximum, best.example, best.gap, count, False)

    def _is_settled(self, i: int) -> bool:
        best = self._positive[i]
        others = max([self._beyond[i], *(c.bound for c in self._candidates[i] if not c.done)])
        return best is not None and best.maximum >= others

    def report(self, left_out: Sequence[Any], *, complete: bool) -> HessianReport:
        layers = []
        for i, group in enumerate(self._groups):
            part = self._positive[i]
            layers.append(
                LayerCurvature(
                    name=group.name,
                    members=tuple(layer.name for layer in group.members),
                    distance=self._lengths[i].item(),
                    hessian=self._hessian.statistic(i),
                    upper=self._upper.statistic(i),
                    positive=None
                    if part is None
                    else PositivePart(part.maximum, part.example, part.gap, part.examples, self._is_settled(i)),
                )
            )
        return HessianReport(
            layers=tuple(layers),
            left_out=tuple(left_out),
            examples=self.examples,
            losses=self._losses.statistic(0),
            smallest_loss=self._smallest,
            lanczos_steps=self._steps,
            complete=complete,
            seconds=time.perf_counter() - self._start,
            estimated_seconds=self._estimate,
            notes=tuple(self._engine.notes),
        )


class _Sums:
    """Mean, variance and maximum of a few columns, a batch at a time (Chan, Golub & LeVeque 1983)."""

    def __init__(self, columns: int) -> None:
        self._count = 0
        self._mean = torch.zeros(columns, dtype=torch.float64)
        self._squares = torch.zeros(columns, dtype=torch.float64)
        self._maximum = torch.full((columns,), -math.inf, dtype=torch.float64)
        self._example = torch.zeros(columns, dtype=torch.long)

    def add(self, values: Tensor, first: int) -> None:
        """[examples, columns], the examples numbered from ``first``."""
        count, mean = len(values), values.mean(0)
        change = mean - self._mean
        total = self._count + count
        self._squares += (values - mean).square().sum(0) + change.square() * (self._count * count / total)
        self._mean += change * (count / total)
        self._count = total
        largest, example = values.max(0)
        better = largest > self._maximum
        self._maximum = torch.where(better, largest, self._maximum)
        self._example = torch.where(better, example + first, self._example)

    def statistic(self, i: int) -> Statistic:
        n = self._count
        error = math.sqrt(self._squares[i].item() / (n - 1) / n) if n > 1 else math.nan
        return Statistic(self._maximum[i].item(), int(self._example[i]), self._mean[i].item(), error)


def _copied(inputs: Inputs) -> Any:
    """Examples on their own, so that the batch that they were a view of can be freed."""

    def copied(value: Any) -> Any:
        return value.clone() if isinstance(value, Tensor) else value

    if isinstance(inputs, Mapping):
        return {key: copied(value) for key, value in inputs.items()}
    return tuple(copied(value) for value in inputs)
