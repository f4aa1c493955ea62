"""What measuring a given model would cost: a few of its examples are counted, and timed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..corrected_loss import CorrectedLoss
from . import cost
from .cost import Cost, Work
from .directions import Layers, group_layers
from .engine import Engine
from .footprint import Footprint, Footprints, footprint
from .forms import LANCZOS_STEPS, check_counts
from .loss import ExampleLoss, LossFunction
from .model import Inputs, measuring, some_examples, split_batch
from .placement import unwrapped
from .sweep import Direction


def measurement_costs(
    model: nn.Module,
    batch: Any,
    *,
    examples: int,
    layers: Layers = "weights",
    loss: CorrectedLoss | LossFunction | None = None,
    batch_size: int | None = None,
    processes: int = 1,
    lanczos_steps: int = LANCZOS_STEPS,
    probes: int = 30,
    eigenvalues: int = 1,
    eigenvalue_passes: int = 30,
    density_probes: int = 10,
    density_steps: int = 50,
    examples_at_once: int | None = None,
    directions_at_once: int | None = None,
) -> dict[str, Cost]:
    """Peak memory and time of each measurement, before any is made: see ``curvature/cost.py`` for the formulas.

    A chunk of examples runs forward, backward and backward again while its bytes are counted, and the batch forward to
    be timed. A model on the ``meta`` device costs nothing to count, so that one too large for this machine can be asked
    about, too: give it a batch of one example, and a loss that doesn't look at values.

    Args:
        model: as for :func:`~.forms.layer_quadratic_forms`.
        batch: some examples of the data set, as there.
        examples: of the whole data set.
        layers, loss, examples_at_once, directions_at_once: as there.
        batch_size: of the dataloader; default: that of ``batch``.
        processes: that share the examples.
        lanczos_steps: of each value of ``vᵀ H⁺ v``.
        probes: of the traces and of the noise stability, which gets as many pairs of draws.
        eigenvalues, eigenvalue_passes: how many, and how often the data set is read for each layer.
        density_probes, density_steps: of the spectral density.

    Returns:
        By the name of the function that measures: ``"layer_quadratic_forms"`` (exact ones), ``"sound bounds"``,
        ``"Lanczos value"`` (one layer, one example), ``"measure_hessian"`` (without the time of Lanczos),
        ``"hessian_trace"``, ``"joint hessian_trace"``, ``"top_eigenpairs"`` (one layer), ``"spectral_density"``,
        ``"noise_stability"``. Seconds of a model on the meta device are NaN.

    Raises:
        ValueError: an argument that doesn't fit.
        NotTwiceDifferentiable: an operation without a second derivative in autograd.
    """
    check_counts(
        examples=examples, batch_size=batch_size, processes=processes, lanczos_steps=lanczos_steps, probes=probes,
        eigenvalues=eigenvalues, eigenvalue_passes=eigenvalue_passes, density_probes=density_probes,
        density_steps=density_steps, examples_at_once=examples_at_once, directions_at_once=directions_at_once,
    )  # fmt: skip
    model = unwrapped(model)
    with measuring(model):
        groups, _ = group_layers(model, layers)
        inputs, labels = split_batch(batch, model)
        if not len(labels):
            raise ValueError("batch is empty; give at least one example")
        engine = Engine(
            model, groups, ExampleLoss(loss, model),
            examples_at_once=examples_at_once, directions_at_once=directions_at_once,
        )  # fmt: skip
        # The way that a layer travelled has the shapes of its weights.
        ways = {name: leaf.detach() for name, leaf in zip(engine.weights.names, engine.weights.leaves, strict=True)}
        directions = engine.weights.directions(ways)
        work = work_of(engine, directions, inputs, labels, examples, processes, batch_size)
        sizes = footprints(engine, directions, inputs, labels, work)
    return {
        "layer_quadratic_forms": cost.forms(work, sizes),
        "sound bounds": cost.bounds(work, sizes),
        "Lanczos value": cost.lanczos_value(work, sizes, lanczos_steps),
        "measure_hessian": cost.measure(work, sizes, lanczos_steps),
        "hessian_trace": cost.trace(work, sizes, probes),
        "joint hessian_trace": cost.joint_trace(work, sizes, probes),
        "top_eigenpairs": cost.eigenpairs(work, sizes, eigenvalues, eigenvalue_passes),
        "spectral_density": cost.density(work, sizes, density_probes, density_steps),
        "noise_stability": cost.stability(work, sizes, probes, probes),
    }


def work_of(
    engine: Engine,
    directions: Sequence[Direction],
    inputs: Inputs,
    labels: Tensor,
    examples: int,
    processes: int = 1,
    batch_size: int | None = None,
) -> Work:
    """What there is to measure; a batch runs forward to be timed. Use it inside :func:`~.model.measuring`.

    Args:
        engine: that will measure it.
        directions: one each layer.
        inputs, labels: a batch.
        examples, processes, batch_size: see :func:`measurement_costs`.
    """
    batch, weights = len(labels), engine.weights
    swept, together, products = engine.at_once(inputs, labels, len(directions))
    sizes = [[v.numel() for v in direction.values()] for direction in directions]
    return Work(
        layers=len(directions),
        measured=sum(map(sum, sizes)),
        largest=max(map(sum, sizes)),
        tensor=max(map(max, sizes)),
        examples=examples,
        batch=batch_size or batch,
        products_at_once=products,
        swept_at_once=swept,
        directions_at_once=together,
        copied=weights.copied,
        number=weights.dtype.itemsize,
        processes=processes,
        forward=_seconds(partial(weights.logits, inputs), labels.device) / batch,
        forward_alone=_seconds(partial(weights.logits, some_examples(inputs, batch, 0, 1)), labels.device),
        grouped=sum(len(direction) > 1 for direction in directions),
        reading=_seconds(lambda: torch.stack([leaf.sum() for leaf in weights.leaves]), labels.device),
    )


def footprints(
    engine: Engine, directions: Sequence[Direction], inputs: Inputs, labels: Tensor, work: Work
) -> Footprints:
    """What one example and a chunk of products hold, which takes some twenty passes of them. See :func:`work_of`."""

    def first(size: int) -> Footprint:
        some = some_examples(inputs, len(labels), 0, size)
        return footprint(engine.weights, engine.loss, some, labels[:size], directions)

    one, size = first(1), work.products_at_once
    return Footprints(one, one if size == 1 else first(size))


@torch.no_grad()
def _seconds(action: Callable[[], Tensor], device: torch.device) -> float:
    """Of the fastest of three runs, after a first one, which is slower; of one thread what it computes: other programs
    may run beside it."""
    if device.type == "meta":
        return math.nan
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    _synchronized(action())
    taken = []
    for _ in range(3):
        start = clock()
        _synchronized(action())
        taken.append(clock() - start)
    return min(taken)


def _synchronized(tensor: Tensor) -> None:
    if tensor.device.type == "cuda":
        torch.cuda.synchronize(tensor.device)
