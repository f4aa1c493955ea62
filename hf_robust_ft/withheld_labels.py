"""What some models make of labels beside their loss, and would miss where a corrected loss withholds them."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig

from .innermost import innermost


def with_decoder_inputs(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """A batch with the ``decoder_input_ids`` that an encoder-decoder makes of its labels where it sees them.

    Args:
        inputs: the batch, labels [B], posteriors [B, K] or labels [B, T] (token by token) under the name ``labels``.

    Raises:
        ValueError: a language model that has no method to make them.
    """
    model, labels = innermost(model), inputs["labels"]
    # One class an example is no text to decode: such models decode their input.
    if labels.dim() < 2 or not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return inputs
    if labels.is_floating_point() or "decoder_input_ids" in inputs or "decoder_inputs_embeds" in inputs:
        return inputs
    prepare: Any = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if prepare is not None:
        return {**inputs, "decoder_input_ids": prepare(labels=labels)}
    if "decoder_input_ids" in inspect.signature(model.forward).parameters:
        raise ValueError(
            f"a corrected loss keeps the labels from the model, but {type(model).__name__} makes its decoder_input_ids "
            f"from them, and the batch has {', '.join(inputs)}; let the collator add decoder_input_ids (the labels, "
            "one place later), or set loss_correction='none'"
        )
    return inputs


def router_loss(model: nn.Module, outputs: Any) -> Tensor | None:
    """What a mixture of experts itself adds to its loss so that the experts share the work; None for other models.

    Raises:
        ValueError: a model that adds something, but does not say how much.
    """
    model = innermost(model)
    loss, config = getattr(outputs, "aux_loss", None), getattr(model, "config", None)
    if loss is not None and isinstance(config, PretrainedConfig):
        factor = getattr(config.get_text_config(), "router_aux_loss_coef", None)
        if factor is not None:
            return factor * loss  # type: ignore[no-any-return]
    # Encoder-decoders have two, and some compute them only where they see labels.
    if loss is not None or (hasattr(outputs, "encoder_aux_loss") and getattr(config, "output_router_logits", False)):
        raise ValueError(
            f"{type(model).__name__} adds a router loss to its own, but a corrected loss can't tell how much: it "
            "needs the output aux_loss and router_aux_loss_coef in the config; set output_router_logits=False in the "
            "config, or loss_correction='none'"
        )
    return None
