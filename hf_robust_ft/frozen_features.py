"""Features of a frozen pretrained model: what a linear head would see."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .innermost import innermost


def backbone_of(model: nn.Module) -> nn.Module:
    """The pretrained part of a transformers model, without its head.

    Raises:
        ValueError: a model without one.
    """
    model = innermost(model)
    base = getattr(model, "base_model", None)
    if not isinstance(base, nn.Module) or base is model:
        raise ValueError(
            f"{type(model).__name__} has no backbone beneath its head (base_model), so there are no frozen features. "
            "Compute features yourself and give them to estimate_transition(features, labels)"
        )
    return base


@torch.no_grad()
def frozen_features(model: nn.Module, batches: Iterable[Mapping[str, Any]], *, total: int | None = None) -> Tensor:
    """Pooled last hidden states of the backbone, one row an example.

    For sequences (tokens of text, patches of images) the first hidden state beside the mean over all that
    ``attention_mask`` keeps; for feature maps the mean over places. Run in eval mode; the head is not used.

    Args:
        model: a transformers model with a head.
        batches: keyword arguments of the model; what its backbone doesn't take (labels) is left out.
        total: the number of batches, for the progress bar.

    Returns:
        [examples, d], float32 on the CPU.

    Raises:
        ValueError: a model without a backbone, or one whose output is neither of these.
    """
    base = backbone_of(model)
    weight = next(base.parameters())
    device, dtype = weight.device, weight.dtype
    accepted = inspect.signature(base.forward).parameters
    modes = {module: module.training for module in base.modules()}
    base.eval()
    rows = []
    try:
        for batch in tqdm(batches, desc="features", total=total, delay=5, disable=None):
            inputs = {k: v.to(device) for k, v in batch.items() if k in accepted and isinstance(v, Tensor)}
            inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
            rows.append(_pooled(base(**inputs), inputs.get("attention_mask")).float().cpu())
    finally:
        for module, mode in modes.items():
            module.training = mode
    if not rows:
        raise ValueError("the data set has no batch: there are no features")
    return torch.cat(rows)


def _pooled(output: Any, mask: Tensor | None) -> Tensor:
    hidden = getattr(output, "last_hidden_state", None)
    if isinstance(hidden, Tensor) and hidden.dim() == 4:
        return hidden.mean((2, 3))
    if not isinstance(hidden, Tensor) or hidden.dim() != 3:
        raise ValueError(
            f"the backbone returns {type(output).__name__} without hidden states [batch, tokens, width] or "
            "[batch, channels, height, width]. Compute features yourself and give them to "
            "estimate_transition(features, labels)"
        )
    if mask is None or mask.shape != hidden.shape[:2]:
        mask = hidden.new_ones(hidden.shape[:2])
    weights = mask.to(hidden.dtype).unsqueeze(-1)
    # Padding may stand on the left.
    first = hidden[torch.arange(len(hidden), device=hidden.device), mask.long().argmax(1)]
    return torch.cat([first, (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)], 1)
