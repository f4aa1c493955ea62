"""Fresh weight noise for every example of a batch, in one forward pass of an unmodified model.

A linear layer whose weight has the noise ``σ E`` (E standard normal) adds ``σ X Eᵀ`` to its output. Over the tokens X
[t, in] of one example this is normal with covariance ``σ² X Xᵀ``, the same and independent for every output. So with
``Xᵀ = Q R`` it can be drawn as ``σ Rᵀ Z``, Z standard normal [min(t, in), out], without a weight for each example
(local reparametrisation: Kingma, Salimans & Welling 2015). A triangular factor of X itself needs no jitter where tokens
repeat, as one of X Xᵀ would.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D


class NoNoiseRule(ValueError):
    """A trained parameter that noise can't be drawn for, example by example."""


@dataclass(frozen=True)
class Noise:
    """Of one parameter."""

    std: Tensor
    """A scalar, or in the parameter's shape; of a weight with ``basis``, in the coordinates of that basis."""
    basis: Tensor | None = None
    """Orthogonal, [in, in], columns: the noise of a weight is ``(std · E) basisᵀ``. Means nothing for a scalar."""


def noise_owners(model: nn.Module) -> dict[str, nn.Module]:
    """The module of each trained parameter that noise can be drawn for: all of them, or an error.

    Raises:
        NoNoiseRule: a trained parameter outside of ``Linear``, ``Conv1D`` (GPT-2) and ``LayerNorm``, or a tied one.
    """
    modules = dict(model.named_modules())
    owners: dict[str, nn.Module] = {}
    names: dict[nn.Parameter, str] = {}
    wrong = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:
            continue
        owner = modules[name.rpartition(".")[0]]
        if parameter in names:
            wrong.append(f"{name} (tied to {names[parameter]})")
        elif type(owner) not in _RULES:
            wrong.append(f"{name} ({type(owner).__name__})")
        names[parameter] = name
        owners[name] = owner
    if wrong:
        raise NoNoiseRule(
            f"no noise can be drawn, example by example, for {_some(wrong)}; noise has rules for untied weights "
            "and biases of Linear, Conv1D and LayerNorm. Freeze the others (requires_grad_(False)) before "
            "training: frozen parameters cost nothing"
        )
    return owners


@contextlib.contextmanager
def fresh_noise(
    model: nn.Module, noises: Mapping[str, Noise], examples: int, generator: torch.Generator
) -> Iterator[None]:
    """Within it, each forward pass of a batch uses weights drawn anew for each example.

    Args:
        model: every trained parameter has a rule (:func:`noise_owners`).
        noises: by parameter name; a parameter that is not named has none.
        examples: B. Every module with noise must see B rows, so that they can be told apart.
        generator: on the model's device.

    Raises:
        NoNoiseRule: a module that sees other than B rows, is called twice, or was not called in the pass: its weight
            may have been used behind the module's back.
    """
    by_module: dict[str, dict[str, Noise]] = {}
    for name, noise in noises.items():
        owner, _, short = name.rpartition(".")
        by_module.setdefault(owner, {})[short] = noise
    calls = dict.fromkeys(by_module, 0)

    def add(name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        calls[name] += 1
        if not args:
            raise NoNoiseRule(f"{name} is called with keyword arguments, where its input is not found: freeze it")
        x = args[0]
        if calls[name] > 1:
            raise NoNoiseRule(f"{name} is called twice in a forward pass: both calls need the same noise. Freeze it")
        if len(x) != examples:
            raise NoNoiseRule(
                f"the input of {name} has {len(x)} rows for {examples} examples, so they can't be told apart: freeze it"
            )
        drawn = _RULES[type(module)](module, x, by_module[name], generator)
        return output + drawn.reshape(output.shape).to(output.dtype)

    handles = []
    try:
        for name in by_module:
            module = model.get_submodule(name)
            handles.append(module.register_forward_hook(partial(add, name)))
        yield
    finally:
        for handle in handles:
            handle.remove()
    silent = [name for name, count in calls.items() if not count]
    if silent:
        raise NoNoiseRule(
            f"{_some(silent)} had no call of its own in the forward pass, so its noise was not added: freeze it"
        )


def _linear(module: nn.Module, x: Tensor, noises: Mapping[str, Noise], generator: torch.Generator) -> Tensor:
    transposed = isinstance(module, Conv1D)
    weight = module.weight
    assert isinstance(weight, Tensor)
    outputs = weight.shape[1 if transposed else 0]
    flat = x.reshape(len(x), -1, x.shape[-1])
    draw = partial(torch.randn, generator=generator, device=x.device, dtype=x.dtype)
    total = x.new_zeros(len(x), flat.shape[1], outputs)
    if "weight" in noises:
        noise = noises["weight"]
        std = noise.std.t() if transposed and noise.std.dim() == 2 else noise.std
        if std.numel() == 1:
            with torch.no_grad():  # a gradient through the spread of the tokens is not worth that of a QR
                factor = torch.linalg.qr(flat.mT, mode="r").R.mT
            total = total + std * (factor @ draw(len(x), factor.shape[-1], outputs))
        else:
            seen = flat if noise.basis is None else flat @ noise.basis
            if flat.shape[1] == 1:
                # Not below the smallest float, whose root still has a gradient.
                variance = (seen.square() @ std.square().t()).clamp(min=torch.finfo(x.dtype).tiny)
                total = total + variance.sqrt() * draw(*total.shape)
            else:
                total = total + seen @ (std * draw(len(x), *std.shape)).mT
    if "bias" in noises:
        total = total + noises["bias"].std * draw(len(x), 1, outputs)
    return total


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


_Rule = Callable[[nn.Module, Tensor, Mapping[str, Noise], torch.Generator], Tensor]
_RULES: dict[type[nn.Module], _Rule] = {nn.Linear: _linear, Conv1D: _linear, nn.LayerNorm: _layer_norm}


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
