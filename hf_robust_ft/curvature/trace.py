"""The trace of each layer's Hessian block by Hutchinson's estimator, with its standard error."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..corrected_loss import CorrectedLoss
from ..layers import NotALayer
from ..processes import merged
from .batches import Batches
from .directions import Group, Layers, group_layers
from .engine import Engine
from .interval import mean_and_error, student_interval
from .loss import ExampleLoss, LossFunction
from .mean import MeanLoss
from .model import measuring
from .placement import processes_of, unwrapped
from .probes import Probes
from .products import Bend

# Entries of the probes that are swept together: 64 MB in float32.
SWEPT_ELEMENTS = 2**24


@dataclass(frozen=True)
class TraceEstimate:
    """What :func:`hessian_trace` measured."""

    layers: tuple[str, ...]
    values: Tensor
    """``Tr H_i`` of each layer, [layers], float64 on the CPU: the mean over the probes."""
    standard_errors: Tensor
    """[layers]."""
    samples: Tensor
    """What each probe gave, [probes, layers]. Traces of layers add up probe by probe, and so do their errors: those
    of a joint measurement are correlated."""
    probes: int
    joint: bool
    seed: int
    examples: int
    """How many the mean Hessian was taken over."""
    left_out: tuple[NotALayer, ...]
    """Every trained parameter that belongs to no measured layer, and why."""
    notes: tuple[str, ...]
    """What autograd did in place of the sweep, and why."""

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """Lower and upper end for each layer, [layers] each, by Student's t with probes - 1 degrees of freedom.

        It covers the randomness of the probes, not that of the examples.

        Raises:
            ValueError: a level outside (0, 1).
        """
        return student_interval(self.values, self.standard_errors, self.probes, level)


def hessian_trace(
    model: nn.Module,
    dataloader: Iterable[Any],
    *,
    layers: Layers = "weights",
    loss: CorrectedLoss | LossFunction | None = None,
    probes: int = 30,
    joint: bool = False,
    seed: int = 0,
    distributed: bool = False,
) -> TraceEstimate:
    """Trace of each layer's diagonal block of the mean Hessian, ``H = 1/N Σ_n ∇²ℓ_n``, by random probes.

    Hutchinson (1990): ``E[zᵀ H z] = Tr H`` for independent entries of mean 0 and variance 1. Entries are ±1
    (Rademacher), of all distributions the one of least variance, ``2 Σ_{j≠k} H_jk²``: a diagonal H comes out exactly.

    - Separate probes (the default): along its own direction for each layer, ``z_iᵀ H_ii z_i``. The tangent sweep
      does all layers and examples at once; a probe costs a little less than one forward pass a layer.
    - ``joint=True``: one direction for all layers and ``z_i · (H z)_i``, by one Hessian-vector product of the whole
      batch: a few forward passes a probe. The terms between layers, ``z_iᵀ H_ij z_j``, have mean 0 and add
      ``Σ_{j≠i} ‖H_ij‖²`` to the variance: on DINOv2-small (74 layers) a layer's variance became 80 times as large
      (median), but that of the sum over all layers only 1.5 times. So: separate for single layers, joint for sums.

    One pass over the dataloader. The same probe meets every example, whatever the batches, so the result does not
    depend on how examples are batched. Probes of more than 2^26 numbers in all are drawn again for every batch, which
    tiny batches make slow.

    Args:
        model: measured in eval mode, as it is; nothing in it is changed.
        dataloader: batches: mappings with ``labels``, or pairs of inputs and labels. Any iterable.
        layers: what counts as a layer: ``"weights"``, ``"blocks"``, or name → pattern(s) of the weights.
        loss: None for cross entropy, a :class:`CorrectedLoss`, or a function of logits and labels that returns one
            loss for each example. An example of several targets counts by their mean.
        probes: at least 2. 30 are enough for Student's interval to be little wider (4 %) than the normal one; the
            error falls with ``1/√probes``.
        joint: see above.
        seed: of the probes.
        distributed: see :func:`~.measure.measure_hessian`.

    Raises:
        ValueError: fewer than 2 probes, a negative seed, a dataloader without examples, no or unknown layers.
        NonFiniteLoss: the message has the number of the example in the pass.
        NotTwiceDifferentiable: an operation without a second derivative in autograd (joint=True).
    """
    if probes < 2:
        raise ValueError(f"probes is {probes}; a standard error needs at least 2")
    model = unwrapped(model)
    processes = processes_of(model, distributed)
    notes: list[str] = []
    with processes.together(), measuring(model):
        groups, left_out = group_layers(model, layers)
        example_loss = ExampleLoss(loss, model)
        if joint:
            mean = MeanLoss(model, groups, dataloader, example_loss, "Hessian trace", processes)
            samples, examples = joint_samples(mean, probes, seed), mean.examples
        else:
            batches = Batches(dataloader, model, "Hessian trace", processes)
            samples, notes = _swept_samples(model, groups, batches, example_loss, probes, seed)
            processes.add_(samples, token=batches.token)
            samples, examples = samples / batches.read, batches.read
            notes = merged(processes.gather(notes))
    return trace_estimate(samples, groups, joint, seed, examples, left_out, notes)


def trace_estimate(
    samples: Tensor,
    groups: Sequence[Group],
    joint: bool,
    seed: int,
    examples: int,
    left_out: Sequence[NotALayer],
    notes: Sequence[str] = (),
) -> TraceEstimate:
    """From what each probe gave, [probes, groups]."""
    values, errors = mean_and_error(samples)
    return TraceEstimate(
        tuple(group.name for group in groups), values, errors, samples, len(samples), joint, seed, examples,
        tuple(left_out), tuple(notes),
    )  # fmt: skip


def joint_samples(mean: MeanLoss, probes: int, seed: int) -> Tensor:
    """``z_i · (H z)_i`` for each probe and group, [probes, groups], in one pass."""
    members = mean.weights.members
    directions = Probes("rademacher", probes, mean.weights.leaves, seed)
    samples = torch.zeros(probes, len(members), dtype=torch.float64)

    def add(bend: Bend) -> None:
        for p in range(probes):
            z = directions[p]
            inner = [(a * b).sum(dtype=torch.float64).item() for a, b in zip(z, bend(z), strict=True)]
            samples[p] += torch.tensor([sum(inner[i] for i in some) for some in members], dtype=torch.float64)

    mean.each_bend(add, samples)
    return samples / mean.examples


def _swept_samples(
    model: nn.Module, groups: Sequence[Group], batches: Batches, loss: ExampleLoss, probes: int, seed: int
) -> tuple[Tensor, list[str]]:
    """``z_iᵀ H_ii z_i`` summed over examples, [probes, groups], with the engine's notes."""
    engine = Engine(model, groups, loss)
    directions = Probes("rademacher", probes, engine.weights.leaves, seed)
    together = max(1, SWEPT_ELEMENTS // directions.size)
    samples = torch.zeros(probes, len(groups), dtype=torch.float64)
    for first, inputs, labels in batches:
        for at in range(0, probes, together):
            some = [directions[p] for p in range(at, min(at + together, probes))]
            moves = [{i: z[i] for i in members} for z in some for members in engine.weights.members]
            forms = engine.sweep(inputs, labels, moves, first=first).hessian
            samples[at : at + len(some)] += forms.sum(0).view(len(some), len(groups))
    return samples, engine.notes
