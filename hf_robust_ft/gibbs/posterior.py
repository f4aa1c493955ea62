"""A Gaussian over the trained weights of a model, and the Gaussian prior that it is measured against."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from ..bounds.pac_bayes import PRIOR_SCALES, gaussian_kl
from .injection import noise_owners
from .noise_rules import Noise


@dataclass(frozen=True)
class WeightPosterior:
    """``N(mean, (ratio · prior_std)²)`` of one parameter, with the prior ``N(centre, prior_std²)``."""

    name: str
    mean: Tensor
    centre: Tensor
    """The reference's value, or 0 for a parameter that the reference lacks."""
    prior_std: float
    ratio: Tensor
    """Posterior over prior deviation: a scalar, or in the parameter's shape, in the coordinates of ``basis``."""
    basis: Tensor | None = None
    """Orthogonal, [in, in]: an isotropic prior is the same in every basis, so the posterior may choose one."""

    @property
    def kl(self) -> float:
        """In nats."""
        ratio = gaussian_kl(torch.zeros_like(self.mean), self.ratio, 0.0, 1.0)
        return ratio + gaussian_kl(self.mean, self.prior_std, self.centre, self.prior_std)

    @property
    def noise(self) -> Noise:
        return Noise(
            self.ratio.to(self.mean) * self.prior_std, None if self.basis is None else self.basis.to(self.mean)
        )


@dataclass(frozen=True)
class Posterior:
    """Of every trained parameter of a model."""

    weights: tuple[WeightPosterior, ...]
    groups: int
    """Parameters with a prior scale of their own."""

    @property
    def kl(self) -> float:
        """``KL(Q‖P)`` over every trained parameter, in nats."""
        return math.fsum(weight.kl for weight in self.weights)

    @property
    def priors(self) -> int:
        """How many priors there were to choose from."""
        return int(len(PRIOR_SCALES) ** self.groups)

    @property
    def noises(self) -> dict[str, Noise]:
        return {weight.name: weight.noise for weight in self.weights}


def prior_unit(centre: Tensor) -> float:
    """A scale that knows no data: the root mean square of the reference, or ``1/√in`` where that is zero.

    (For a bias or a norm's shift at zero: 1.)
    """
    size = centre.double().square().mean().sqrt().item()
    return size if size > 0 else 1 / math.sqrt(centre.shape[-1] if centre.dim() > 1 else 1)


def group_of(name: str, patterns: Sequence[str]) -> int:
    """The first pattern (``*`` and ``?``) that a parameter's name matches; ``len(patterns)`` for those without one."""
    return next((i for i, pattern in enumerate(patterns) if fnmatchcase(name, pattern)), len(patterns))


def centres(model: nn.Module, reference: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The prior's mean of each trained parameter, after a check that nothing else was trained.

    Args:
        model: its trained parameters are those that require a gradient.
        reference: the weights that it started from, by name. Trained parameters that it lacks are centred on 0.

    Raises:
        NoNoiseRule: see :func:`~.injection.noise_owners`.
        ValueError: no trained parameter, another shape, or a frozen parameter or buffer that differs from the
            reference, or that it lacks: then it may have learned from the examples, and no KL would count it.
    """
    owners = noise_owners(model)
    if not owners:
        raise ValueError("the model has no parameter with requires_grad: there is no posterior to speak of")
    found: dict[str, Tensor] = {}
    frozen: dict[str, Tensor] = dict(model.named_buffers())
    stored: Collection[str] = model.state_dict().keys()
    for name, parameter in model.named_parameters():
        if name not in owners:
            frozen[name] = parameter
            continue
        centre = reference.get(name)
        if centre is not None and centre.shape != parameter.shape:
            raise ValueError(
                f"the reference of {name} has shape {tuple(centre.shape)}, the model's has {tuple(parameter.shape)}: "
                "give the reference of this model"
            )
        found[name] = torch.zeros_like(parameter) if centre is None else centre.detach().to(parameter, copy=True)
    for name, tensor in frozen.items():
        if name not in stored:  # a buffer that is computed from the configuration
            continue
        centre = reference.get(name)
        if centre is None or not torch.equal(centre.to(tensor.device), tensor):
            state = "is not in the reference" if centre is None else "differs from the reference"
            raise ValueError(
                f"{name} is frozen but {state}: if it was trained, its divergence from the prior has to count. Let it "
                "require a gradient, or give the reference that it comes from"
            )
    return found
