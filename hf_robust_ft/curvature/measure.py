"""The Hessian distance measure over a data set: streaming, bounded in memory and time."""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from operator import length_hint
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..corrected_loss import CorrectedLoss
from ..processes import OtherProcessFailed, Processes, merged
from . import cost
from .batches import Batches
from .candidates import CANDIDATES, Candidate, Candidates
from .directions import Group, Layers, group_layers, lengths_of, travelled
from .division import Pair, divided
from .engine import Engine
from .estimate import footprints, work_of
from .forms import LANCZOS_STEPS, check_counts
from .loss import ExampleLoss, LossFunction
from .model import Inputs, measuring, some_examples
from .placement import processes_of, unwrapped
from .report import HessianReport, LayerCurvature, PositivePart
from .sums import Sums
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
    distributed: bool = False,
) -> HessianReport:
    """Measure how sharply the loss bends along the way that each layer travelled, over all examples.

    For each layer i, with ``v_i = vec(W_i - W_i^ref)`` and ``H_i`` the Hessian of one example's loss in this layer
    alone, the Hessian distance measure of Ju, Li & Zhang (ICML 2022, theorem 2.1) is
    ``𝓗_i = max over examples of v_iᵀ H_i⁺ v_i``. Two passes:

    1. for every example ``v_iᵀ H_i v_i`` and the sound bound ``½ (v_iᵀ H_i v_i + ‖P v_i‖ ‖H_i v_i‖) ≥ v_iᵀ H_i⁺ v_i``,
       with P the projection on the span of the inputs that the layer gets from this example, outside of which H_i is
       zero (for a group of weights, P is the identity);
    2. ``v_iᵀ H_i⁺ v_i`` by Lanczos, for the examples that can still hold the maximum, the largest bounds first (1, 1, 2
       and 4 at a time), until the largest of the others is below the largest value found (the layer is *settled*), the
       time is over, or 8 examples a layer have been looked at.

    Cost on a CPU: about 2.4 forward passes a layer and batch for the first pass (for a group of weights 3 of each
    example alone), and 2 of one example for each step of Lanczos; both are logged before they start. Memory: a chunk of
    examples, and the inputs of those that may go to the second pass; there, for a group of weights or a tied one,
    ``lanczos_steps`` times as much as these weights.

    Args:
        model: any transformers model, or a module that takes the batch's inputs. Measured in eval mode and at least
            float32, and put back afterwards.
        reference: the weights that it started from: a state dict, or the model itself.
        dataloader: batches, each a mapping with ``labels`` or a pair (inputs, labels). Use no augmentation. For the
            bound these are the training examples.
        loss, layers, examples_at_once, directions_at_once: see :func:`layer_quadratic_forms`.
        time_budget: seconds for the second pass; None sets no limit, 0 leaves it out. The first always runs.
        lanczos_steps: Hessian-vector products for each Lanczos value.
        distributed: True: all processes of the launch (``accelerate launch``, ``torchrun``) make this call together,
            with the same arguments, and return the same report. Each measures its share of every batch, so give
            batches of as many examples as all of them take at once; the dataloader is the same for all, whole (not
            what ``accelerator.prepare`` makes of it). They meet once after the first pass, and once in each of the
            at most four rounds of the second. False: this process measures everything by itself.

    Returns:
        A report, which Ctrl-C cuts short (``complete`` is False then).

    Raises:
        ValueError: no batches, or an argument that doesn't fit.
        ReferenceMismatch: the reference lacks layers, or has them in another shape.
        MeasurementStopped: any error once a batch was measured, with the report so far.
        OtherProcessFailed: an error of another process, before a batch was measured.
    """
    if time_budget is not None and not time_budget >= 0:
        raise ValueError(f"time_budget is {time_budget!r}; give seconds >= 0, or None for no limit")
    check_counts(lanczos_steps=lanczos_steps, examples_at_once=examples_at_once, directions_at_once=directions_at_once)
    model = unwrapped(model)
    processes = processes_of(model, distributed)
    with processes.together(), measuring(model):
        groups, left_out = group_layers(model, layers)
        ways = travelled(groups, reference)
        engine = Engine(
            model,
            groups,
            ExampleLoss(loss, model),
            examples_at_once=examples_at_once,
            directions_at_once=directions_at_once,
        )
        run = _Run(engine, groups, engine.weights.directions(ways), lanczos_steps, processes)
        batches = Batches(dataloader, model, "sound bounds", processes)
        problem = run.first_pass(batches, length_hint(dataloader) or None, budget=time_budget)
        if problem is None:
            problem = run.second_pass(time_budget)
        report = run.report(left_out, complete=problem is None)
    if isinstance(problem, KeyboardInterrupt):
        logger.warning("stopped after %d examples; the report holds what was measured", run.examples)
    elif problem is not None:
        raise MeasurementStopped(
            f"{problem} (after {run.examples} examples; .report of this error holds what was measured)", report
        ) from problem
    return report


class _Run:
    """The sums, maxima and candidates of one measurement."""

    def __init__(
        self,
        engine: Engine,
        groups: Sequence[Group],
        directions: Sequence[Direction],
        steps: int,
        processes: Processes,
    ) -> None:
        self.examples = 0
        """Measured by all processes; while the first pass goes on, by this one."""
        self._engine = engine
        self._groups = groups
        self._directions = directions
        self._lengths = lengths_of(directions)
        self._steps = steps
        self._processes = processes
        self._hessian = Sums(len(groups))
        self._upper = Sums(len(groups))
        self._losses = Sums(1)
        self._smallest = math.inf
        self._candidates = [Candidates() for _ in groups]
        self._positive: list[PositivePart | None] = [None] * len(groups)
        self._start = time.perf_counter()
        self._estimate = math.nan

    def first_pass(self, batches: Batches, count: int | None, *, budget: float | None) -> BaseException | None:
        """The sound bounds of every example; what stopped it, if something did.

        Raises:
            Exception, KeyboardInterrupt: what stopped it before any process had measured a batch.
        """
        problem: BaseException | None = None
        try:
            for first, inputs, labels in batches:
                if not self.examples:
                    self._predict(inputs, labels, count)
                self._add(inputs, labels, first)
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - any at all: what was measured is kept
            problem = error
        return self._unite(problem, batches.token if problem is None else None, shared=budget != 0)

    def _unite(self, problem: BaseException | None, token: int | None, *, shared: bool) -> BaseException | None:
        """One pass, whoever measured its examples: this is where the processes meet."""
        own = {c.example: (c.inputs, c.labels) for found in self._candidates for c in found}
        parts = self._processes.gather((
            token, self._said(problem), self.examples, self._smallest, self._lengths.tolist(),
            self._hessian, self._upper, self._losses, self._candidates,
        ))  # fmt: skip
        tokens, said, counts, smallest, lengths, hessian, upper, losses, candidates = zip(*parts, strict=True)
        problem = self._first_problem(problem, said)
        self.examples = sum(counts)
        if problem is not None and not self.examples:
            raise problem
        if len({*tokens} - {None}) > 1:
            raise ValueError(
                "dataloader gave the processes different batches; give each the same, whole and in the same order "
                "(without shuffling, or shuffled by torch's own generator)"
            )
        if any(other != lengths[0] for other in lengths):
            raise ValueError("model or reference has other weights on another process; give all of them the same")
        self._smallest = min(smallest)
        self._hessian, self._upper, self._losses = (Sums.merged(part) for part in (hessian, upper, losses))
        self._candidates = [Candidates.merged(of_layer) for of_layer in zip(*candidates, strict=True)]
        if shared and problem is None:
            self._share_inputs(own)
        return problem

    def _said(self, problem: BaseException | None) -> tuple[bool, str] | None:
        """A problem in words, for other processes."""
        if problem is None:
            return None
        return isinstance(problem, KeyboardInterrupt), f"process {self._processes.rank}: {problem}"

    def _first_problem(
        self, own: BaseException | None, said: Sequence[tuple[bool, str] | None]
    ) -> BaseException | None:
        """The same for all processes: that of the first one that has any."""
        first = next((rank for rank, words in enumerate(said) if words is not None), None)
        if first is None or first == self._processes.rank:
            return own
        interrupted, words = said[first] or (False, "")
        return KeyboardInterrupt(words) if interrupted else OtherProcessFailed(words)

    def _predict(self, inputs: Inputs, labels: Tensor, batches: int | None) -> None:
        """How long it will take and, if that is logged, what it needs: found out by one process, for all."""
        if self._processes.rank:
            return
        examples = len(labels) * (batches or 1) * self._processes.count
        work = work_of(self._engine, self._directions, inputs, labels, examples, self._processes.count)
        self._estimate = cost.bound_seconds(work)
        if not logger.isEnabledFor(logging.INFO):
            return
        sizes = footprints(self._engine, self._directions, inputs, labels, work)
        value = cost.lanczos_value(work, sizes, self._steps).seconds
        logger.info(
            "sound bounds of %d layers: about %.0f s for %s; then Lanczos within time_budget: about %.2g s a value, "
            "%.0f s for one value a layer, at most %d times that. Memory: %.3g GB more than the model, its reference "
            "and a batch",
            work.layers, self._estimate, f"{batches} batches" if batches else "a batch", value, work.layers * value,
            CANDIDATES, cost.measure(work, sizes, self._steps).bytes / 1e9,
        )  # fmt: skip

    def _add(self, inputs: Inputs, labels: Tensor, first: int) -> None:
        forms = self._engine.products(inputs, labels, self._directions, first=first)
        assert forms.length is not None
        assert forms.reach is not None
        upper = (forms.hessian + forms.reach * forms.length) / 2
        self._hessian.add(forms.hessian, first)
        self._upper.add(upper, first)
        self._losses.add(forms.losses.unsqueeze(1), first)
        self._smallest = min(self._smallest, forms.losses.min().item())
        kept: dict[int, tuple[Any, Any]] = {}
        for i, found in enumerate(self._candidates):
            for bound, n in found.promising(upper[:, i]):
                if n not in kept:
                    one = some_examples(inputs, len(labels), n, n + 1)
                    kept[n] = (_copied(one), labels[n : n + 1].clone())
                found.add(Candidate(bound, first + n, *kept[n]))
        self.examples += len(labels)

    def _share_inputs(self, own: Mapping[int, tuple[Any, Any]]) -> None:
        """Any process may be the one that looks at a candidate: all get the inputs of all that are left."""
        if self._processes.count == 1:
            return
        chosen = {c.example for found in self._candidates for c in found}
        everyone = self._processes.gather(
            {n: (_copied(inputs, "cpu"), labels.cpu()) for n, (inputs, labels) in own.items() if n in chosen}
        )
        kept = {n: both for part in everyone for n, both in part.items()}
        device = next(iter(self._engine.weights.all)).device
        kept = {n: (_copied(inputs, device), labels.to(device)) for n, (inputs, labels) in kept.items()}
        for found in self._candidates:
            for candidate in found:
                candidate.inputs, candidate.labels = kept[candidate.example]

    def second_pass(self, budget: float | None) -> BaseException | None:
        """``vᵀ H⁺ v`` of the candidates, round by round; what stopped it, if something did."""
        end = math.inf if budget is None else time.perf_counter() + budget
        quiet = True if self._processes.rank else None
        with tqdm(desc="Lanczos", unit="value", disable=quiet) as bar:
            while todo := self._next():
                shares = divided(list(todo), len(self._groups), self._steps, self._processes.count)
                mine = [(layer, todo[layer, example]) for layer, example in shares[self._processes.rank]]
                found: list[tuple[int, int, float, float]] = []
                problem: BaseException | None = None
                try:
                    in_time = self._round(mine, end, found)
                except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - as in the first pass
                    problem, in_time = error, False
                parts = self._processes.gather((found, in_time, self._said(problem)))
                for values, _, _ in parts:
                    for i, example, value, gap in values:
                        self._take(i, example, value, gap)
                    bar.update(len(values))
                problem = self._first_problem(problem, [said for _, _, said in parts])
                if problem is not None or not all(whole for _, whole, _ in parts):
                    return problem
        return None

    def _next(self) -> dict[Pair, Candidate]:
        """The next candidates of each layer; none of one that is settled."""
        best = [-math.inf if part is None else part.maximum for part in self._positive]
        return {(i, c.example): c for i, found in enumerate(self._candidates) for c in found.next(best[i])}

    def _round(
        self, todo: Sequence[tuple[int, Candidate]], end: float, found: list[tuple[int, int, float, float]]
    ) -> bool:
        """Add layer, example, value and gap of each to ``found``; False if the time was over before the last."""
        for _, layers in itertools.groupby(todo, key=lambda pair: pair[1].example):
            if time.perf_counter() >= end:
                return False
            found += self._lanczos(list(layers))
        return True

    def _lanczos(self, layers: Sequence[tuple[int, Candidate]]) -> list[tuple[int, int, float, float]]:
        one = layers[0][1]
        forms = self._engine.products(
            one.inputs, one.labels, [self._directions[i] for i, _ in layers], steps=self._steps, first=one.example
        )
        assert forms.positive is not None
        assert forms.gap is not None
        pairs = zip(layers, forms.positive[0].tolist(), forms.gap[0].tolist(), strict=True)
        return [(i, one.example, value, gap) for (i, _), value, gap in pairs]

    def _take(self, i: int, example: int, value: float, gap: float) -> None:
        count = self._candidates[i].looked_at(example)
        best = self._positive[i]
        if best is None or value > best.maximum:
            best = PositivePart(value, example, gap, count, False)
        self._positive[i] = PositivePart(best.maximum, best.example, best.gap, count, False)

    def _is_settled(self, i: int) -> bool:
        best = self._positive[i]
        return best is not None and best.maximum >= self._candidates[i].largest_other()

    def report(self, left_out: Sequence[Any], *, complete: bool) -> HessianReport:
        """The same on all processes."""
        parts = self._processes.gather((time.perf_counter() - self._start, self._estimate, self._engine.notes))
        seconds, estimate, _ = parts[0]
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
            seconds=seconds,
            estimated_seconds=estimate,
            notes=tuple(merged(notes for _, _, notes in parts)),
        )


def _copied(inputs: Inputs, device: torch.device | str | None = None) -> Any:
    """Examples on their own, so that the batch that they were a view of can be freed."""

    def copied(value: Any) -> Any:
        return value.to(device or value.device, copy=True) if isinstance(value, Tensor) else value

    if isinstance(inputs, Mapping):
        return {key: copied(value) for key, value in inputs.items()}
    return tuple(copied(value) for value in inputs)
