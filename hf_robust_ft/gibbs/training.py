"""Train a Gaussian over a model's weights on its own PAC-Bayes bound."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from operator import length_hint
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..bounds.kl import kl_inverse
from ..bounds.pac_bayes import PRIOR_SCALES, bounded_loss
from ..corrected_loss import find_logits
from ..curvature.batches import BAR_DELAY
from ..curvature.model import Inputs, split_batch
from ..losses import forward_corrected
from ..noise import load_transition
from .injection import TRAINING, check_apart, fresh_noise, generator_of
from .noise_rules import Noise
from .posterior import Posterior, WeightPosterior, centres, group_of, prior_unit

# How far a step of Adam takes all weights of a group together, in prior standard deviations. With one step length for
# each weight, a large group would soon have a KL beyond all use: it is half the square of that distance.
STEP = 2.0
# Of the logarithms of scales and ratios.
LOG_STEP = 0.02
# Prior standard deviations to start from, in the prior's units: noise of a sixteenth of the pretrained weights leaves
# most models working; a head that starts at zero has to grow out of its prior.
START_PRETRAINED, START_FRESH = 2.0**-4, 4.0
# The slopes of kl^-1 are infinite at 0 and 1.
CLIP = 1e-4


def fit_posterior(
    model: nn.Module,
    reference: Mapping[str, Tensor],
    batches: Iterable[Any],
    *,
    transition: Any = None,
    epochs: int = 20,
    groups: Sequence[str] = (),
    move: bool = True,
    delta: float = 0.05,
    seed: int = 0,
) -> Posterior:
    """Find a Gaussian posterior with a small PAC-Bayes bound, by stochastic gradients of that bound.

    Minimises ``kl^-1(e | (KL + log(2 √n priors / δ)) / n)`` (Dziugaite & Roy 2017; Pérez-Ortiz et al. 2021) with
    fresh weight noise for every example. For the first half of the epochs e is the cross entropy over log K (forward-
    corrected by T), which learns from any start; then the probability of a wrong prediction under the softmax, which is
    bounded and closer to the error.

    Standard deviations: one prior scale a group, on its grid in the end. Weights of modules that see one row an
    example (heads) get a posterior deviation for each entry, in the basis of the principal directions of their inputs;
    all other entries keep the prior's, as shrinking millions of them costs more than it wins.

    Args:
        model: in eval mode meanwhile (no dropout). Every trained parameter is part of the posterior; frozen ones are
            taken as they are and must equal the reference. Left at the posterior's means.
        reference: the weights that training started from, by name: the prior's means. A parameter that it lacks is
            centred on 0. It must not depend on the examples.
        batches: all n training examples at each pass, as for :func:`~hf_robust_ft.measure_hessian`, readable
            repeatedly. Labels as trained on.
        transition: T, [K, K], ``T[i, j] = P(noisy label = j | true label = i)``, if labels are noisy.
        epochs: passes over the batches; one more, before them, looks at the inputs of heads.
        groups: name patterns (``*`` and ``?``) chosen before the data are seen. The parameters that match one (and none
            before it) share a prior scale, all others share another. Each scale costs log 33 = 3.5 nats.
        move: False keeps the means where the model is: the posterior of a model that was trained elsewhere.
        delta: what the certificate will be asked for.
        seed: of the noise; batches have their own.

    Raises:
        NoNoiseRule, ValueError: see :func:`~.injection.noise_owners` and :func:`~.posterior.centres`; a pattern
            without a match; no example; a bound that is not finite.
    """
    middle = centres(model, reference)
    members = {name: group_of(name, groups) for name in middle}
    for i, pattern in enumerate(groups):
        if i not in members.values():
            raise ValueError(f"the group '{pattern}' matches no trained parameter that is in no group before it")
    with evaluating(model):
        n, spectra = _principal_directions(model, batches, middle)
        family = _Family(model, middle, members, spectra, n, reference)
        constant = math.log(2 * math.sqrt(n) / delta) + math.log(family.priors)
        total = epochs * (length_hint(batches) or 1)
        optimizer = torch.optim.Adam(family.optimized(move))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, total))))
        )
        generator = generator_of(seed, TRAINING, family.device)
        # The slopes are those at a running mean, as kl^-1 of one batch's risk is not that of the mean risk.
        risks: dict[bool, float] = {}
        _check_first(batches, model, middle)
        with tqdm(total=total, desc="posterior", unit="batch", delay=BAR_DELAY, leave=False, disable=None) as bar:
            for epoch in range(epochs):
                soft = 2 * epoch >= epochs
                for inputs, labels in _batches(batches, model):
                    with fresh_noise(model, family.noises(), len(labels), generator):
                        logits = logits_of(model, inputs)
                    risk = _surrogate(logits, labels, transition, soft)
                    risks[soft] = 0.9 * risks.get(soft, risk.item()) + 0.1 * risk.item()
                    penalty = (family.kl() + constant) / n
                    if not math.isfinite(risk.item() + penalty.item()):
                        raise ValueError(
                            f"in epoch {epoch} the risk became {risk.item()} and the penalty {penalty.item()}: "
                            "look at the inputs and at the model's weights"
                        )
                    by_risk, by_penalty = _slopes(risks[soft], penalty.item())
                    optimizer.zero_grad()
                    torch.autograd.backward(by_risk * risk + by_penalty * penalty)
                    optimizer.step()
                    schedule.step()
                    bar.set_postfix(risk=f"{risks[soft]:.3f}", kl=f"{penalty.item() * n - constant:.0f}", refresh=False)
                    bar.update()
    model.zero_grad(set_to_none=True)
    return family.posterior()


@dataclass(frozen=True)
class Spectrum:
    """Mean square of what a parameter multiplies, along principal directions."""

    values: Tensor
    """[in], or [1] for a bias."""
    basis: Tensor | None
    """[in, in], columns; None for a bias, whose input is 1."""


class _Family:
    """The Gaussians that training chooses from: what it moves, and what follows from that."""

    def __init__(
        self,
        model: nn.Module,
        middle: Mapping[str, Tensor],
        members: Mapping[str, int],
        spectra: Mapping[str, Spectrum],
        n: int,
        reference: Collection[str],
    ) -> None:
        self._middle = middle
        self._parameters = {name: p for name, p in model.named_parameters() if name in middle}
        self._members = members
        self._units = {name: prior_unit(centre) for name, centre in middle.items()}
        self.device = next(iter(middle.values())).device
        self._log_scale: dict[int, Tensor] = {}
        for name, group in members.items():
            start = START_PRETRAINED if name in reference else START_FRESH
            # A group of both kinds starts at the smaller scale.
            known = self._log_scale.get(group)
            if known is None or known.item() > math.log(start):
                self._log_scale[group] = torch.tensor(math.log(start), device=self.device, requires_grad=True)
        self._log_ratio: dict[str, Tensor] = {}
        self._bases: dict[str, Tensor] = {}
        for name, spectrum in spectra.items():
            parameter, scale = self._parameters[name], self._std(name).item()
            # Prior noise would drown the directions that carry signal. How far to shrink it there: as a Gaussian
            # likelihood of a hundredth of the examples would.
            ratio = (1 + scale**2 * n / 100 * spectrum.values.clamp(min=0)).rsqrt()
            if spectrum.basis is not None:
                self._bases[name] = spectrum.basis.to(parameter)
            self._log_ratio[name] = ratio.log().to(parameter).expand_as(parameter).clone().requires_grad_()

    @property
    def priors(self) -> int:
        return int(len(PRIOR_SCALES) ** len(self._log_scale))

    def _std(self, name: str) -> Tensor:
        return self._units[name] * self._log_scale[self._members[name]].exp()

    def optimized(self, move: bool) -> list[dict[str, Any]]:
        """Adam's parameter groups."""
        found: list[dict[str, Any]] = [
            {"params": [*self._log_scale.values(), *self._log_ratio.values()], "lr": LOG_STEP}
        ]
        sizes = dict.fromkeys(self._log_scale, 0)
        for name, parameter in self._parameters.items():
            sizes[self._members[name]] += parameter.numel()
        if move:
            for name, parameter in self._parameters.items():
                step = STEP * self._std(name).item() / math.sqrt(sizes[self._members[name]])
                found.append({"params": [parameter], "lr": step})
        return found

    def noises(self) -> dict[str, Noise]:
        return {
            name: Noise(self._std(name) * self._log_ratio[name].exp(), self._bases.get(name))
            if name in self._log_ratio
            else Noise(self._std(name))
            for name in self._middle
        }

    def kl(self) -> Tensor:
        parts = []
        for name, parameter in self._parameters.items():
            parts.append((parameter - self._middle[name]).square().sum() / self._std(name).square() / 2)
            if name in self._log_ratio:
                log = self._log_ratio[name]
                parts.append(((2 * log).exp() / 2 - 0.5 - log).sum())
        return torch.stack(parts).sum()

    def posterior(self) -> Posterior:
        """With the scales of the grid that are nearest."""
        weights = []
        for name, parameter in self._parameters.items():
            log_scale = self._log_scale[self._members[name]].item()
            nearest = min(
                range(len(PRIOR_SCALES)), key=[abs(math.log(s) - log_scale) for s in PRIOR_SCALES].__getitem__
            )
            ratio = self._log_ratio[name].detach().exp() if name in self._log_ratio else parameter.new_ones(())
            std = self._units[name] * PRIOR_SCALES[nearest]
            mean = parameter.detach().clone()
            weights.append(WeightPosterior(name, mean, self._middle[name], std, ratio, self._bases.get(name)))
        return Posterior(tuple(weights), len(self._log_scale))


def _surrogate(logits: Tensor, labels: Tensor, transition: Any, soft: bool) -> Tensor:
    """The empirical risk that has a gradient; ``soft``: the mean loss of labels drawn from the softmax."""
    classes = logits.shape[-1]
    if soft:
        loss = torch.as_tensor(bounded_loss(classes, transition)[0]).to(logits)
        return (logits.softmax(-1) * loss[labels]).sum(-1).mean()
    known = torch.eye(classes) if transition is None else torch.as_tensor(load_transition(transition, classes))
    return forward_corrected(logits, labels, known.to(logits)).mean() / math.log(classes)


def _slopes(risk: float, penalty: float) -> tuple[float, float]:
    """Derivatives of ``kl^-1(risk | penalty)``."""
    q = min(max(risk, CLIP), 1 - CLIP)
    p = min(max(kl_inverse(q, penalty), q + CLIP**2), 1 - CLIP**2)
    by_p = (1 - q) / (1 - p) - q / p
    return math.log((1 - q) * p / (q * (1 - p))) / by_p, 1 / by_p


@torch.no_grad()
def _principal_directions(
    model: nn.Module, batches: Iterable[Any], trained: Collection[str]
) -> tuple[int, dict[str, Spectrum]]:
    """The number of examples, and the spectra of linear modules that see one row an example, by parameter name."""
    modules = {name: model.get_submodule(name.rpartition(".")[0]) for name in trained if name.endswith("weight")}
    linear = {name: module for name, module in modules.items() if type(module) is nn.Linear}
    moments: dict[str, Tensor] = {}
    excluded: set[str] = set()
    examples = 0

    def look(name: str, args: tuple[Any, ...]) -> None:
        if not args or args[0].numel() != examples * args[0].shape[-1]:
            excluded.add(name)
        elif name not in excluded:
            rows = args[0].reshape(examples, -1).double()
            moments[name] = moments.get(name, 0) + rows.mT @ rows

    handles = [
        module.register_forward_pre_hook(lambda module, args, name=name: look(name, args))
        for name, module in linear.items()
    ]
    total = 0
    try:
        with tqdm(
            total=length_hint(batches) or None, desc="inputs of heads", unit="batch", delay=BAR_DELAY, leave=False,
            disable=None,
        ) as bar:  # fmt: skip
            for inputs, labels in _batches(batches, model):
                examples = len(labels)
                logits_of(model, inputs)
                total += examples
                bar.update()
    finally:
        for handle in handles:
            handle.remove()
    if not total:
        raise ValueError("batches gave no example; give a list or a DataLoader, as an iterator is used up")
    found = {}
    for name in moments.keys() - excluded:
        if not bool(moments[name].isfinite().all()):
            raise ValueError(f"the inputs of {name} hold NaN or infinity: look at the examples and the model's weights")
        values, basis = torch.linalg.eigh(moments[name] / total)
        found[name] = Spectrum(values, basis)
        bias = f"{name.removesuffix('weight')}bias"
        if bias in trained:
            found[bias] = Spectrum(torch.ones(1, dtype=torch.float64), None)
    return total, found


def _check_first(batches: Iterable[Any], model: nn.Module, names: Collection[str]) -> None:
    """On the first batch of several examples."""
    for inputs, labels in _batches(batches, model):
        if len(labels) > 1:
            check_apart(model, names, partial(logits_of, model, inputs), len(labels))
            return


def logits_of(model: nn.Module, inputs: Inputs) -> Tensor:
    """One row of logits for each example.

    Raises:
        ValueError: logits of another shape.
    """
    logits = find_logits(model(**inputs) if isinstance(inputs, Mapping) else model(*inputs))
    if logits.dim() != 2:
        raise ValueError(
            f"the model's logits have shape {tuple(logits.shape)}; the certificate is for one class an example, [B, K]"
        )
    return logits


def _batches(batches: Iterable[Any], model: nn.Module) -> Iterator[tuple[Inputs, Tensor]]:
    for batch in batches:
        inputs, labels = split_batch(batch, model)
        if len(labels):
            yield inputs, labels


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
