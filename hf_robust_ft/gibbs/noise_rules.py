"""What weight noise adds to the output of a module, drawn anew for each example of a batch.

A linear layer whose weight has the noise ``σ E`` (E standard normal) adds ``σ X Eᵀ`` to its output. Over the tokens X
[t, in] of one example this is normal with covariance ``σ² X Xᵀ``, the same and independent for every output. So with
``Xᵀ = Q R`` it can be drawn as ``σ Rᵀ Z``, Z standard normal [min(t, in), out], without a weight for each example
(local reparametrisation: Kingma, Salimans & Welling 2015). A triangular factor of X itself needs no jitter where tokens
repeat, as one of X Xᵀ would. A convolution is a linear layer of patches, an embedding one of one-hot rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class Noise:
    """Of one parameter."""

    std: Tensor
    """A scalar, or in the parameter's shape; of a weight with ``basis``, in the coordinates of that basis."""
    basis: Tensor | None = None
    """Orthogonal, [in, in], columns: the noise of a weight is ``(std · E) basisᵀ``. Means nothing for a scalar."""


def has_rule(module: nn.Module) -> bool:
    """Whether noise of its parameters can be added to its output. Of a convolution: if its patches can be unfolded."""
    if type(module) is nn.Conv2d:
        return module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return type(module) in RULES


def _linear(module: nn.Module, x: Tensor, noises: Mapping[str, Noise], generator: torch.Generator) -> Tensor:
    transposed = isinstance(module, Conv1D)
    weight = module.weight
    assert isinstance(weight, Tensor)
    return _by_rows(
        x.reshape(len(x), -1, x.shape[-1]), weight.shape[1 if transposed else 0], transposed, noises, generator
    )


def _convolution(module: nn.Module, x: Tensor, noises: Mapping[str, Noise], generator: torch.Generator) -> Tensor:
    assert isinstance(module, nn.Conv2d)
    assert not isinstance(module.padding, str)
    patches = F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride).mT
    return _by_rows(patches, module.out_channels, False, noises, generator).mT


def _by_rows(
    flat: Tensor, outputs: int, transposed: bool, noises: Mapping[str, Noise], generator: torch.Generator
) -> Tensor:
    """[examples, rows, outputs], from what the weight multiplies, [examples, rows, in]."""
    draw = partial(torch.randn, generator=generator, device=flat.device, dtype=flat.dtype)
    total = flat.new_zeros(len(flat), flat.shape[1], outputs)
    if "weight" in noises:
        noise = noises["weight"]
        std = noise.std.flatten(1) if noise.std.dim() > 2 else noise.std
        std = std.t() if transposed and std.dim() == 2 else std
        if std.numel() == 1:
            with torch.no_grad():  # a gradient through the spread of the tokens is not worth that of a QR
                factor = torch.linalg.qr(flat.mT, mode="r").R.mT
            total = total + std * (factor @ draw(len(flat), factor.shape[-1], outputs))
        else:
            seen = flat if noise.basis is None else flat @ noise.basis
            if flat.shape[1] == 1:
                # Not below the smallest float, whose root still has a gradient.
                variance = (seen.square() @ std.square().t()).clamp(min=torch.finfo(flat.dtype).tiny)
                total = total + variance.sqrt() * draw(*total.shape)
            else:
                total = total + seen @ (std * draw(len(flat), *std.shape)).mT
    if "bias" in noises:
        total = total + noises["bias"].std * draw(len(flat), 1, outputs)
    return total


def _embedding(module: nn.Module, x: Tensor, noises: Mapping[str, Noise], generator: torch.Generator) -> Tensor:
    assert isinstance(module, nn.Embedding)
    ids, std = x.reshape(len(x), -1), noises["weight"].std
    shape = (*ids.shape, module.embedding_dim)
    drawn = torch.randn(shape, generator=generator, device=x.device, dtype=module.weight.dtype)
    # The same token has the same noise: that of its first occurrence.
    first = (ids.unsqueeze(2) == ids.unsqueeze(1)).to(torch.uint8).argmax(2)
    return drawn.gather(1, first.unsqueeze(-1).expand(shape)) * (std[ids] if std.dim() else std)


def _layer_norm(module: nn.Module, x: Tensor, noises: Mapping[str, Noise], generator: torch.Generator) -> Tensor:
    assert isinstance(module, nn.LayerNorm)
    shape = module.normalized_shape
    ones = (1,) * (x.dim() - 1 - len(shape))
    draw = partial(torch.randn, len(x), *ones, *shape, generator=generator, device=x.device, dtype=x.dtype)
    total = torch.zeros_like(x)
    if "weight" in noises:
        total = total + F.layer_norm(x, shape, None, None, module.eps) * (noises["weight"].std * draw())
    if "bias" in noises:
        total = total + noises["bias"].std * draw()
    return total


Rule = Callable[[nn.Module, Tensor, Mapping[str, Noise], torch.Generator], Tensor]
RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: _linear,
    Conv1D: _linear,
    nn.Conv2d: _convolution,
    nn.Embedding: _embedding,
    nn.LayerNorm: _layer_norm,
}
