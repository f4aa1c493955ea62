"""Two penalties on weights: noise that makes a loss see its Hessian, and the gradient of a pull to a reference.

Sources: noise-stability optimization, Zhang, Li & Ju 2024 (arXiv 2306.08553); L2-SP, Li, Grandvalet & Davoine 2018
(arXiv 1802.01483).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from .sharding import shard, sharded_like


@contextlib.contextmanager
def antithetic_noise(weights: Sequence[Tensor], sigma: float, seed: Sequence[int]) -> Iterator[Callable[[], None]]:
    """Hold some weights at ``W + u``, and after a call of what this yields at ``W - u``, with ``u ~ N(0, σ² I)``.

    The mean of a loss at both points is ``ℓ(W) + ½ uᵀ H u + O(u⁴)``, which over u is ``ℓ(W) + σ²/2 · tr H + O(σ⁴)``:
    what is odd in u cancels within each pair. Afterwards every weight is W again bit for bit, also after an exception
    or Ctrl-C: it is a copy that is put back, as ``(W + u) - u`` is not W in floating point.

    Memory: one copy of the weights. The noise is not kept: the second point is the mirror image of the first one,
    ``2 W - (W + u)``, which is as symmetric as the type of the weights allows.

    Args:
        weights: edited in place while the context lasts; any shapes, types and devices.
        sigma: σ, standard deviation of the noise in each weight, in the units of the weights.
        seed: non-negative numbers that the noise hangs on, and on nothing else but the order, shapes and devices of
            the weights: not on the global random state, which stays as it was.
    """

    def own() -> list[Tensor]:  # anew each time: FSDP2 may give a shard other memory in a forward pass
        return [shard(weight.detach()) for weight in weights]

    starts = [weight.clone() for weight in own()]
    # A stream for each weight: the same seed on two devices would give both the same noise.
    streams = np.random.SeedSequence(seed).generate_state(len(weights), np.uint64).tolist()

    @torch.no_grad()
    def reflect() -> None:
        for weight, start in zip(own(), starts, strict=True):
            weight.neg_().add_(start, alpha=2)

    try:
        with torch.no_grad():
            for weight, part, stream in zip(weights, own(), streams, strict=True):
                generator = torch.Generator(weight.device).manual_seed(stream)
                noise = torch.randn(weight.shape, generator=generator, dtype=weight.dtype, device=weight.device)
                # Of a sharded weight all processes draw the whole, so that the noise is that of one process.
                part.add_(shard(sharded_like(noise, weight)), alpha=sigma)
        yield reflect
    finally:
        with torch.no_grad():
            # One call into C++: a second Ctrl-C can't leave it half done.
            torch._foreach_copy_(own(), starts)


@torch.no_grad()
def add_l2sp_gradient(weight: Tensor, reference: Tensor, penalty: float) -> None:
    """Add the gradient of ``λ/2 ‖W - W_ref‖_F²``, which is ``λ (W - W_ref)``, to ``weight.grad``.

    Args:
        weight: a weight that needs a gradient; one that has none yet gets one.
        reference: W_ref, same shape.
        penalty: λ.
    """
    difference = weight - reference  # first, as λ W and λ W_ref could drown a small gradient
    if weight.grad is None:
        weight.grad = difference.mul_(penalty)
    else:
        weight.grad.add_(difference, alpha=penalty)
