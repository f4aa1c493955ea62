"""What a training changes, and the way back."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# What accelerate leaves on a model that it has prepared for a training.
PREPARED = ("forward", "_original_forward", "_is_accelerate_prepared")


def snapshot(model: nn.Module | None) -> tuple[dict[str, Tensor], Callable[[], None]]:
    """What training changes: random numbers (Python, numpy, torch on CPU and CUDA) and, of a model, weights and modes.

    Returns:
        The trained weights by name, copied on their device, and a function that puts everything back.
    """
    weights: dict[str, Tensor] = {}
    others: list[tuple[Tensor, Tensor]] = []
    modes: list[tuple[nn.Module, bool]] = []
    prepared: dict[str, Any] = {}
    if model is not None:
        weights = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        others = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
        modes = [(module, module.training) for module in model.modules()]
        prepared = {name: vars(model)[name] for name in PREPARED if name in vars(model)}
    numbers = random.getstate(), np.random.get_state(), torch.get_rng_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []

    @torch.no_grad()
    def restore() -> None:
        if model is not None:
            for name, parameter in model.named_parameters():
                parameter.grad = None
                if name in weights:
                    parameter.copy_(weights[name])
            for name in PREPARED:
                vars(model).pop(name, None)
            vars(model).update(prepared)
        for buffer, value in others:
            buffer.copy_(value)
        for module, mode in modes:
            module.training = mode
        random.setstate(numbers[0])
        np.random.set_state(numbers[1])
        torch.set_rng_state(numbers[2])
        if devices:
            torch.cuda.set_rng_state_all(devices)

    return weights, restore
