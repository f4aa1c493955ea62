"""The PAC-Bayes certificate of a model under a Gaussian posterior."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ..bounds.bound import Bound
from ..bounds.pac_bayes import certified_error
from ..curvature.batches import Batches
from .injection import JUDGING, check_apart, fresh_noise, generator_of, noise_owners
from .posterior import Posterior
from .training import evaluating, fit_posterior, logits_of

PASSES = 10
"""Draws of the weights for each example. With 5,000 examples, Monte Carlo then costs the bound about half a point."""


@torch.no_grad()
def pac_bayes_certificate(
    model: nn.Module,
    posterior: Posterior,
    batches: Iterable[Any],
    *,
    transition: Any = None,
    delta: float = 0.05,
    passes: int = PASSES,
    seed: int = 0,
) -> Bound:
    """Bound the error of a model whose weights are drawn from a posterior, from its training examples.

    Each forward pass draws fresh weights for each example, so that all predictions are independent; see
    :func:`~hf_robust_ft.bounds.pac_bayes.certified_error`.

    Args:
        model: the one that the posterior was fitted to. Its weights may be elsewhere meanwhile and are put back.
        posterior: of every trained parameter.
        batches: the n training examples, each once, with the labels that were trained on.
        transition: T, [K, K], ``T[i, j] = P(noisy label = j | true label = i)``, known: the certificate is one on the
            error on clean labels.
        delta: probability of failure.
        passes: draws for each example, in as many passes over the batches.
        seed: of the draws, which are independent of those of :func:`fit_posterior` with the same seed.

    Raises:
        ValueError: a posterior of other parameters, passes below 1, fewer than 8 examples, and what ``certified_error``
            says.
        NoNoiseRule: see :func:`~.injection.fresh_noise`.
    """
    if passes < 1:
        raise ValueError(f"passes is {passes}; give at least one draw for each example")
    trained = noise_owners(model).keys()
    if trained != {weight.name for weight in posterior.weights}:
        different = sorted(trained ^ {weight.name for weight in posterior.weights})
        raise ValueError(
            f"the posterior and the model's trained parameters differ in {', '.join(different[:4])}: the KL has to "
            "count every trained parameter, so fit the posterior of this model"
        )
    parameters = dict(model.named_parameters())
    generator = generator_of(seed, JUDGING, next(iter(parameters.values())).device)
    noises = posterior.noises
    before = {weight.name: parameters[weight.name].clone() for weight in posterior.weights}
    drawn: list[npt.NDArray[np.int64]] = []
    labels_seen: list[Tensor] = []
    classes = 0
    try:
        for weight in posterior.weights:
            parameters[weight.name].copy_(weight.mean)
        with evaluating(model):
            for draw in range(passes):
                chosen = []
                for first, inputs, labels in Batches(batches, model, f"certificate, draw {draw + 1} of {passes}"):
                    if not draw and not first:
                        check_apart(model, noises, partial(logits_of, model, inputs), len(labels))
                    with fresh_noise(model, noises, len(labels), generator):
                        logits = logits_of(model, inputs)
                    classes = logits.shape[-1]
                    chosen.append(logits.argmax(-1).cpu())
                    if not draw:
                        labels_seen.append(labels.cpu())
                drawn.append(torch.cat(chosen).numpy())
    finally:
        for name, weight_before in before.items():
            parameters[name].copy_(weight_before)
    return certified_error(
        np.stack(drawn),
        torch.cat(labels_seen).numpy(),
        num_classes=classes,
        kl=posterior.kl,
        priors=posterior.priors,
        transition=transition,
        delta=delta,
        seed=seed,
        assumptions=("groups of parameters that share a prior scale were chosen before the examples were seen",)
        if posterior.groups > 1
        else (),
    )


def pac_bayes_head(
    features: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    transition: Any = None,
    delta: float = 0.05,
    steps: int = 800,
    seed: int = 0,
) -> tuple[Posterior, Bound]:
    """The certificate of a linear head on frozen features: the weights' prior is centred on 0.

    Args:
        features: [n, d], of a model that these examples had no part in. Don't centre or scale them by their own means
            and deviations: they would be part of the prior. A column of ones adds a bias.
        labels: int64 [n], noisy ones if T is given.
        num_classes: K.
        transition, delta, seed: see :func:`pac_bayes_certificate`.
        steps: of Adam, on all examples at once.

    Returns:
        The posterior of the weight [K, d], and the certificate, of 5 · ``PASSES`` draws an example.

    Raises:
        ValueError: shapes that don't fit, features that are not finite, and what :func:`pac_bayes_certificate` says.
    """
    if features.dim() != 2 or labels.shape != features.shape[:1]:
        raise ValueError(
            f"features have shape {tuple(features.shape)} and labels {tuple(labels.shape)}; give [n, d] and [n]"
        )
    if not bool(features.isfinite().all()):
        raise ValueError("features hold NaN or infinity; look at the inputs and at the model's weights")
    head = nn.Linear(features.shape[1], num_classes, bias=False, device=features.device, dtype=features.dtype)
    nn.init.zeros_(head.weight)
    batches = [(features, labels)]
    posterior = fit_posterior(head, {}, batches, transition=transition, epochs=steps, delta=delta, seed=seed)
    bound = pac_bayes_certificate(
        head, posterior, batches, transition=transition, delta=delta, passes=5 * PASSES, seed=seed
    )
    return posterior, bound
