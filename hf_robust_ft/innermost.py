"""The transformers model inside of what others wrap around it."""

from __future__ import annotations

from torch import nn


def innermost(model: nn.Module) -> nn.Module:
    """Without torch.compile or PEFT around it."""
    model = getattr(model, "_orig_mod", model)  # torch.compile
    if hasattr(model, "get_base_model"):  # PEFT
        model = model.get_base_model()  # type: ignore[operator]
    return model
