"""The spectrum of the mean Hessian: its largest eigenvalues, and the density of all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..corrected_loss import CorrectedLoss
from ..layers import NotALayer
from .batches import BAR_DELAY
from .directions import Layers, group_layers
from .interval import mean_and_error
from .lanczos import quadrature, tridiagonal
from .loss import ExampleLoss, LossFunction
from .mean import MeanLoss
from .model import measuring
from .placement import processes_of, unwrapped
from .probes import Distribution, Probes
from .restarted import largest_eigenpairs

WHOLE_MODEL: Layers = {"model": "*"}
"""All layers as one."""

Product = Callable[[Tensor], Tensor]
"""v → H v, [P] → [P] in float64."""


class NotConverged(RuntimeError):
    """An eigenvalue did not reach the tolerance."""


@dataclass(frozen=True)
class Eigenpairs:
    """What :func:`top_eigenpairs` found."""

    layers: tuple[str, ...]
    values: Tensor
    """Largest eigenvalues of each layer, largest first, [layers, count], float64 on the CPU."""
    vectors: dict[str, Tensor]
    """By parameter name, [count, *shape of the weight], in the precision of the measurement, on the CPU. Over all
    weights of a layer an eigenvector has length 1; its entry of largest size is positive."""
    residuals: Tensor
    """``‖H u - λ u‖`` of each pair, [layers, count]: that near to λ, H has an eigenvalue."""
    passes: int
    """Over the dataloader; each but the last of a layer was for one Hessian-vector product."""
    tolerance: float
    seed: int
    examples: int
    left_out: tuple[NotALayer, ...]
    """Every trained parameter that belongs to no measured layer, and why."""


@dataclass(frozen=True)
class SpectralDensity:
    """What :func:`spectral_density` measured."""

    layers: tuple[str, ...]
    grid: Tensor
    """Values of λ, for each layer [layers, points], float64 on the CPU."""
    density: Tensor
    """Share of the eigenvalues for each unit of λ, [layers, points]; its integral over the grid is 1."""
    standard_errors: Tensor
    """Of the density, over the probes, [layers, points]. It does not show the error of too few steps."""
    ritz_values: Tensor
    """θ of each probe, [layers, probes, steps]. Where fewer steps were exact, the last ones are 0, of weight 0."""
    weights: Tensor
    """ω of each probe, [layers, probes, steps]; over the steps they sum to 1."""
    widths: Tensor
    """Standard deviation of the Gaussian around each Ritz value, [layers]."""
    probes: int
    steps: int
    seed: int
    examples: int
    left_out: tuple[NotALayer, ...]
    """Every trained parameter that belongs to no measured layer, and why."""


def top_eigenpairs(
    model: nn.Module,
    dataloader: Iterable[Any],
    *,
    count: int = 1,
    layers: Layers = WHOLE_MODEL,
    loss: CorrectedLoss | LossFunction | None = None,
    tolerance: float = 1e-4,
    seed: int = 0,
    distributed: bool = False,
) -> Eigenpairs:
    """The algebraically largest eigenvalues of each layer's block of the mean Hessian, with eigenvectors.

    The largest is what the field calls sharpness (Keskar et al. 2017; Cohen et al. 2021, arXiv 2103.00065). Power
    iteration, as in PyHessian, finds the largest *magnitude*; the two differ only where the most negative
    eigenvalue outweighs the most positive one, far from a minimum.

    By restarted Lanczos (:func:`~.restarted.largest_eigenpairs`), one layer after the other. Each Hessian-vector
    product is a pass over the dataloader, and a layer takes 15 to 40 of them where its first eigenvalues stand out.
    ``max(2 count + 1, 14)`` vectors of the layer's size are kept on the device of the model and in its precision; a
    layer that is not larger than that is solved densely. Like every method that starts from one vector, this may miss
    copies of a multiple eigenvalue.

    Args:
        model: measured in eval mode, as it is; nothing in it is changed.
        dataloader: batches, as for :func:`~.trace.hessian_trace`; the same examples at each pass.
        count: how many eigenvalues.
        layers: the blocks; by default all layers together are one. See :func:`~.trace.hessian_trace`.
        loss: as for :func:`~.trace.hessian_trace`.
        tolerance: of the residual, ``‖H u - λ u‖ ≤ tolerance · |λ|``. The error of λ is at most that, and of the
            order of its square where λ stands apart; so 1e-4 is about what float32 can resolve.
        seed: of the starting vector.
        distributed: see :func:`~.measure.measure_hessian`. All processes do the same steps with the same vectors; one
            reduction a product.

    Raises:
        ValueError: count below 1 or above the size of a layer, tolerance not positive, a negative seed, a
            dataloader without examples or with other ones in another pass, no or unknown layers.
        NotConverged: an eigenvalue that does not reach the tolerance.
        NonFiniteLoss: the message has the number of the example in the pass.
        NotTwiceDifferentiable: an operation without a second derivative in autograd.
    """
    if count < 1:
        raise ValueError(f"count is {count}; ask for at least one eigenvalue")
    if not tolerance > 0:
        raise ValueError(f"tolerance is {tolerance}; give a positive relative residual, such as 1e-4")
    model = unwrapped(model)
    vectors: dict[str, Tensor] = {}
    passes = examples = 0
    processes = processes_of(model, distributed)
    bar = tqdm(desc="Hessian-vector products", delay=BAR_DELAY, disable=True if processes.rank else None)
    with processes.together(), measuring(model), bar:
        groups, left_out = group_layers(model, layers)
        for group in groups:
            size = sum(layer.parameter.numel() for layer in group.members)
            if count > size:
                raise ValueError(f"count is {count}, but {group.name} has {size} weights; ask for at most as many")
        values, residuals = (torch.zeros(len(groups), count, dtype=torch.float64) for _ in range(2))
        for g, group in enumerate(groups):
            mean = MeanLoss(model, [group], dataloader, ExampleLoss(loss, model), group.name, processes)
            (start,) = _starts("gaussian", 1, mean, seed)
            values[g], found, within = _largest(_counted(mean, bar), start, count, tolerance)
            if not within.all():
                raise NotConverged(
                    f"{within.sum()} of {count} eigenvalues of {group.name} reached the tolerance "
                    f"{tolerance:g} in {mean.passes} passes over the data; raise tolerance, lower count, or measure in "
                    "float64 (model.double()): float32 resolves small eigenvalues beside large ones only roughly"
                )
            for i, (image, u) in enumerate(zip(mean.products(found), found, strict=True)):
                residuals[g, i] = (image - values[g, i].item() * u).norm()
            parts = [mean.split(u) for u in found]
            for name, of_pairs in zip(mean.weights.names, zip(*parts, strict=True), strict=True):
                vectors[name] = torch.stack(of_pairs).cpu()
            passes, examples = passes + mean.passes, mean.examples
    return Eigenpairs(
        tuple(group.name for group in groups), values, vectors, residuals, passes, tolerance, seed, examples,
        tuple(left_out),
    )  # fmt: skip


def spectral_density(
    model: nn.Module,
    dataloader: Iterable[Any],
    *,
    layers: Layers = WHOLE_MODEL,
    loss: CorrectedLoss | LossFunction | None = None,
    probes: int = 10,
    steps: int = 50,
    points: int = 1001,
    width: float | None = None,
    seed: int = 0,
    distributed: bool = False,
) -> SpectralDensity:
    """Density of all eigenvalues of each layer's block of the mean Hessian, by stochastic Lanczos quadrature.

    Lanczos from a random z is Gauss quadrature for the spectral measure of z, whose mean over z is the density of
    eigenvalues: ``1/P Σ_j f(λ_j) ≈ mean over probes of Σ_k ω_k f(θ_k)``, with θ_k the Ritz values and ω_k the squared
    first entries of the Ritz vectors (Ubaru, Chen & Saad 2017, SIAM J. Matrix Anal. Appl. 38(4); Ghorbani, Krishnan &
    Xiao 2019, arXiv 1901.10159; Papyan 2018, arXiv 1811.07062). Here f is a Gaussian around each point of a grid. A
    share of eigenvalues that is much smaller than ``1/(probes · P)`` may be missed. Probes are ±1 (Rademacher): then
    ``P Σ_k ω_k θ_k`` is Hutchinson's ``zᵀ H z``; with the same seed and one layer it is what
    :func:`~.trace.hessian_trace` gives for each probe.

    Costs probes × steps passes over the dataloader for each layer, and memory for ``steps`` vectors of its size:
    every Lanczos vector is made orthogonal to all others, or converged Ritz values would come again as ghosts.

    Args:
        model: measured in eval mode, as it is; nothing in it is changed.
        dataloader: batches, as for :func:`~.trace.hessian_trace`; the same examples at each pass.
        layers: the blocks; by default all layers together are one. See :func:`~.trace.hessian_trace`.
        loss: as for :func:`~.trace.hessian_trace`.
        probes: at least 2. 10 leave a third of one probe's error; the larger the layer, the fewer are needed.
        steps: of Lanczos; the ends of the spectrum converge first, and the middle is resolved to some 1/steps of
            the range. No more than the size of the layer are taken.
        points: of the grid, at least 2; it reaches four widths beyond the outermost Ritz values.
        width: standard deviation of the Gaussians, in units of λ. None for 1/steps of the range of Ritz values: about
            the distance of neighbours, as narrower Gaussians show the nodes of the quadrature, not the spectrum.
        seed: of the probes.
        distributed: see :func:`top_eigenpairs`.

    Raises:
        ValueError: fewer than 2 probes or points, fewer than 1 steps, a width that is not positive, a negative seed,
            a dataloader without examples or with other ones in another pass, no or unknown layers.
        NonFiniteLoss: the message has the number of the example in the pass.
        NotTwiceDifferentiable: an operation without a second derivative in autograd.
    """
    for name, value, least in (("probes", probes, 2), ("steps", steps, 1), ("points", points, 2)):
        if value < least:
            raise ValueError(f"{name} is {value}; give at least {least}")
    if width is not None and not (width > 0 and math.isfinite(width)):
        raise ValueError(f"width is {width}; give a positive number, or None to fit it to the spectrum")
    model = unwrapped(model)
    curves: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    examples = 0
    processes = processes_of(model, distributed)
    bar = tqdm(desc="Hessian-vector products", delay=BAR_DELAY, disable=True if processes.rank else None)
    with processes.together(), measuring(model), bar:
        groups, left_out = group_layers(model, layers)
        bar.total = len(groups) * probes * steps
        ritz, weights = (torch.zeros(len(groups), probes, steps, dtype=torch.float64) for _ in range(2))
        for g, group in enumerate(groups):
            mean = MeanLoss(model, [group], dataloader, ExampleLoss(loss, model), group.name, processes)
            for p, start in enumerate(_starts("rademacher", probes, mean, seed)):
                theta, omega = ritz_values(_counted(mean, bar), start, steps)
                ritz[g, p, : len(theta)], weights[g, p, : len(omega)] = theta, omega
            grid, broadened, sigma = _broadened(ritz[g], weights[g], points, width)
            curves.append((grid, *mean_and_error(broadened), sigma))
            examples = mean.examples
    grids, densities, errors, widths = (torch.stack(parts) for parts in zip(*curves, strict=True))
    return SpectralDensity(
        tuple(group.name for group in groups), grids, densities, errors, ritz,
        weights, widths, probes, steps, seed, examples, tuple(left_out),
    )  # fmt: skip


def _counted(mean: MeanLoss, bar: Any) -> Product:
    def product(vector: Tensor) -> Tensor:
        bar.update()
        return mean.products(vector.unsqueeze(0))[0]

    return product


def _starts(distribution: Distribution, count: int, mean: MeanLoss, seed: int) -> Iterator[Tensor]:
    """Random vectors [P], in the precision and on the device of the first weight."""
    leaves = mean.weights.leaves
    probes = Probes(distribution, count, leaves, seed)
    return (torch.cat([part.to(leaves[0]).flatten() for part in probes[p]]) for p in range(count))


def basis(count: int) -> int:
    """How many vectors are kept for some eigenvalues.

    Where the largest eigenvalues stand out, as they do of networks near a minimum, more take hardly fewer products;
    where they lie dense 14 take clearly fewer than 10 (recipes/RESULTS.md).
    """
    return max(2 * count + 1, 14)


def _largest(product: Product, start: Tensor, count: int, tolerance: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of :func:`largest_eigenpairs`, each eigenvector's entry of largest size positive; densely where H is small."""
    size = len(start)
    if size <= basis(count):
        dense = torch.stack([product(unit) for unit in torch.eye(size).to(start)]).cpu()
        values, columns = torch.linalg.eigh((dense + dense.t()) / 2)
        values, vectors = values[-count:].flip(0), columns[:, -count:].t().flip(0).to(start)
        within = torch.ones(count, dtype=torch.bool)
    else:
        values, vectors, within = largest_eigenpairs(product, start, count, basis(count), tolerance)
    heaviest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    return values, vectors * heaviest.sign(), within


def ritz_values(product: Product, start: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Lanczos from one vector [P]: Ritz values and weights, [steps taken] each, on the CPU."""
    diagonal, beside = tridiagonal(lambda v: product(v[0]).unsqueeze(0), start.unsqueeze(0), steps)
    values, weights = quadrature(diagonal.cpu(), beside.cpu())
    return values[0], weights[0]


def _broadened(values: Tensor, weights: Tensor, points: int, width: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """Grid [points], density of each probe [probes, points], and width, from Ritz values [probes, steps]."""
    found = values[weights > 0]
    low, high = found.min().item(), found.max().item()
    largest, spread = max(abs(low), abs(high)), high - low
    if spread <= 1e-6 * largest:  # all eigenvalues are the same, but for rounding
        spread = largest or 1.0
    sigma = width or spread / values.shape[1]
    grid = torch.linspace(low - 4 * sigma, high + 4 * sigma, points, dtype=torch.float64)
    density = torch.zeros(len(values), points, dtype=torch.float64)
    for theta, omega in zip(values.t(), weights.t(), strict=True):  # step by step, for memory
        density += omega.unsqueeze(1) * torch.exp(-((grid - theta.unsqueeze(1)) / sigma).square() / 2)
    return grid, density / (sigma * math.sqrt(2 * math.pi)), torch.tensor(sigma, dtype=torch.float64)
