"""How much the mean loss rises under Gaussian noise in the weights, beside what the Hessian predicts."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..corrected_loss import CorrectedLoss
from .directions import Group, Layers, group_layers
from .interval import mean_and_error, student_interval
from .loss import ExampleLoss, LossFunction
from .mean import MeanLoss
from .model import Inputs, measuring
from .placement import processes_of, unwrapped
from .probes import Probes
from .trace import TraceEstimate, joint_samples, trace_estimate


@dataclass(frozen=True)
class NoiseStability:
    """What :func:`noise_stability` measured."""

    sigma: float
    loss: float
    """Mean loss at the model's own weights."""
    increase: float
    """By how much noise raises the mean loss, on average."""
    standard_error: float
    """Of the increase, over the pairs of draws."""
    samples: Tensor
    """The increase of each pair, [draws], float64."""
    draws: int
    """Pairs of noise and its opposite."""
    trace: TraceEstimate
    """``Tr H`` of all measured layers together, as one layer."""
    layers: tuple[str, ...]
    """The layers that the noise moved."""
    seed: int
    examples: int

    @property
    def second_order(self) -> float:
        """``σ²/2 · Tr H``: what the increase would be for a quadratic loss."""
        return self.sigma**2 / 2 * self.trace.values.item()

    @property
    def second_order_standard_error(self) -> float:
        """Of :attr:`second_order`, over the probes of the trace."""
        return self.sigma**2 / 2 * self.trace.standard_errors.item()

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Of the increase, by Student's t with draws - 1 degrees of freedom.

        It covers the randomness of the noise, not that of the examples.

        Raises:
            ValueError: a level outside (0, 1).
        """
        mean, error = torch.tensor([self.increase, self.standard_error], dtype=torch.float64)
        low, high = student_interval(mean, error, self.draws, level)
        return low.item(), high.item()


def noise_stability(
    model: nn.Module,
    dataloader: Iterable[Any],
    *,
    sigma: float,
    layers: Layers = "weights",
    loss: CorrectedLoss | LossFunction | None = None,
    draws: int = 30,
    probes: int = 30,
    seed: int = 0,
    distributed: bool = False,
) -> NoiseStability:
    """Mean increase of the mean loss L when every measured weight gets noise, and its second-order prediction.

    ``E[L(W + σ ε)] - L(W) = σ²/2 · Tr H + O(σ⁴)`` with standard normal ε (Zhang, Li & Ju 2024, arXiv 2306.08553).
    Noise comes in antithetic pairs, ``½ (L(W + σ ε) + L(W - σ ε)) - L(W)``: the first-order term cancels within each
    pair. Where increase and prediction differ by more than their errors, σ has left the region in which the Hessian
    describes the loss.

    Two passes over the dataloader: the noise (two forward passes a pair), and the trace by joint probes. The same
    noise meets every example, so the result does not depend on how examples are batched. In float32 an increase
    below some 1e-7 of the loss is rounding.

    Args:
        model: measured in eval mode; its parameters are not touched.
        dataloader: batches, as for :func:`~.trace.hessian_trace`; readable twice, with the same examples.
        sigma: standard deviation σ of the noise in each weight, in the units of the weights.
        layers: the layers that get noise, all at once.
        loss: as for :func:`~.trace.hessian_trace`.
        draws: pairs, at least 2; 30, as for the probes.
        probes: of the trace.
        seed: of noise and probes, which are independent.
        distributed: see :func:`~.measure.measure_hessian`.

    Raises:
        ValueError: sigma not positive or not finite, fewer than 2 draws or probes, a negative seed, a dataloader
            without examples or with other ones in its second pass, no or unknown layers.
        NonFiniteLoss: the message has the number of the example in the pass.
        NotTwiceDifferentiable: an operation without a second derivative in autograd.
    """
    if not (sigma > 0 and math.isfinite(sigma)):
        raise ValueError(f"sigma is {sigma}; give a positive standard deviation, such as 0.01")
    if draws < 2:
        raise ValueError(f"draws is {draws}; a standard error needs at least 2")
    if probes < 2:
        raise ValueError(f"probes is {probes}; a standard error needs at least 2")
    model = unwrapped(model)
    processes = processes_of(model, distributed)
    with processes.together(), measuring(model):
        groups, left_out = group_layers(model, layers)
        whole = [Group("measured layers", tuple(layer for group in groups for layer in group.members))]
        mean = MeanLoss(model, whole, dataloader, ExampleLoss(loss, model), "noise stability", processes)
        samples, value = _increases(mean, sigma, draws, seed)
        trace = trace_estimate(joint_samples(mean, probes, seed), whole, True, seed, mean.examples, left_out)
    increase, error = mean_and_error(samples)
    return NoiseStability(
        sigma, value, increase.item(), error.item(), samples, draws, trace, tuple(group.name for group in groups),
        seed, mean.examples,
    )  # fmt: skip


def _increases(mean: MeanLoss, sigma: float, draws: int, seed: int) -> tuple[Tensor, float]:
    """For each pair, [draws], in one pass, and the mean loss."""
    noise = Probes("gaussian", draws, mean.weights.leaves, seed)
    samples = torch.zeros(draws, dtype=torch.float64)

    @torch.no_grad()
    def measure(inputs: Inputs, labels: Tensor, first: int) -> Tensor:
        still = mean.losses(inputs, labels, first)
        for d in range(draws):
            epsilon = noise[d]
            for step in (sigma, -sigma):
                with _moved(mean.weights.leaves, epsilon, step):
                    # Example by example, before rounding can hide a small difference of large sums.
                    samples[d] += (mean.losses(inputs, labels, first).double() - still.double()).sum().item() / 2
        return still

    value = mean.each_batch(measure, samples)
    return samples / mean.examples, value


@contextlib.contextmanager
def _moved(weights: Sequence[Tensor], direction: Sequence[Tensor], step: float) -> Iterator[None]:
    """The leaves elsewhere for a while. They let go of the memory that they share with the model's parameters."""
    starts = [weight.data for weight in weights]
    try:
        for weight, start, way in zip(weights, starts, direction, strict=True):
            weight.data = torch.add(start, way, alpha=step)
        yield
    finally:
        for weight, start in zip(weights, starts, strict=True):
            weight.data = start
