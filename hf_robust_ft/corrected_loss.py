"""The corrected loss of a model's outputs, as the Trainer's ``compute_loss_func`` calls it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .innermost import innermost
from .losses import (
    GCE_Q,
    backward_corrected,
    cross_entropy,
    forward_corrected,
    generalized_cross_entropy,
    nonnegative_backward,
    posterior_cross_entropy,
    reduce_loss,
)
from .noise import (
    IGNORE_INDEX,
    InverseTransition,
    Matrix,
    check_labels,
    invert_transition,
    load_transition,
    read_transition,
)

Correction = Literal["forward", "backward", "nonnegative_backward", "posterior", "gce"]
CORRECTIONS = get_args(Correction)


class CorrectedLoss:
    """Cross entropy corrected by T, or generalized cross entropy, on whatever a model returns.

    Args:
        correction: ``"forward"``, ``"backward"``, ``"nonnegative_backward"``, ``"posterior"`` or ``"gce"``; see
            :mod:`hf_robust_ft.losses`. The non-negative risks are those of one micro-batch of one process.
            ``"posterior"`` takes posteriors [B, K] as labels. For labels [B], whose examples have none, it is
            ``"forward"``, the likelihood that both climb.
        noise_transition: a symmetric rate, a path or a matrix; see
            :func:`~hf_robust_ft.noise.load_transition`. ``"gce"`` needs none.
        num_classes: K of the model. None where the model does not say: then the first logits do.
        shift: whether position t predicts label t + 1 (causal language models).

    Raises:
        ValueError: a T that is no transition matrix, singular, or of the wrong size.
    """

    def __init__(
        self,
        correction: Correction,
        noise_transition: Any = None,
        *,
        num_classes: int | None = None,
        shift: bool = False,
    ) -> None:
        if correction not in CORRECTIONS:
            raise ValueError(f"loss_correction is {correction!r}; choose one of {', '.join(map(repr, CORRECTIONS))}")
        self.correction = correction
        self.shift = shift
        self.num_classes = num_classes
        """K, as far as it is known."""
        self.matrices: tuple[Matrix, InverseTransition | None] | None = None
        """T and its inverse; None until the number of classes is known. Posteriors need no inverse."""
        self._source = read_transition(noise_transition)
        self._tensors: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        # A rate without a number of classes has to wait for the first logits; all else is checked now.
        if correction != "gce" and (num_classes is not None or not isinstance(self._source, float)):
            self._build(num_classes)

    def _build(self, num_classes: int | None) -> tuple[Matrix, InverseTransition | None]:
        transition = load_transition(self._source, num_classes)
        self.num_classes = len(transition)
        inverse = None if self.correction == "posterior" else invert_transition(transition)
        self.matrices = transition, inverse
        return self.matrices

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Sum of the corrected losses over ``num_items_in_batch``, a scalar.

        Raises:
            ValueError: labels that are no class indices or outside 0..K-1; outputs without logits, or logits
                whose classes or shape do not fit.
        """
        if self.correction == "posterior" and labels.is_floating_point():
            logits = find_logits(outputs)
            if logits.shape != labels.shape:
                raise ValueError(
                    f"logits have shape {tuple(logits.shape)} and posteriors {tuple(labels.shape)}; "
                    "loss_correction='posterior' is for one class an example"
                )
            labels = labels.to(logits.device)
            return reduce_loss(posterior_cross_entropy(logits, labels), labels[..., 0], num_items_in_batch)
        logits, labels = self._logits_and_labels(outputs, labels)
        if self.correction == "nonnegative_backward":
            losses = nonnegative_backward(logits, labels, self._matrix(logits))
        else:
            losses = self._losses(logits, labels)
        return reduce_loss(losses, labels, num_items_in_batch)

    def plain(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """The uncorrected loss of the same outputs, for evaluation."""
        logits, labels = self._logits_and_labels(outputs, labels)
        return reduce_loss(cross_entropy(logits, labels), labels, num_items_in_batch)

    def per_example(self, outputs: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
        """For each example of a batch the sum of its corrected losses and its number of targets, [B] each.

        One example has no non-negative risk: ``"nonnegative_backward"`` gives what ``"backward"`` gives.
        """
        logits, labels = self._logits_and_labels(outputs, labels)
        losses = self._losses(logits, labels)
        kept = labels != IGNORE_INDEX
        return losses.reshape(len(labels), -1).sum(1), kept.reshape(len(labels), -1).sum(1)

    def fisher(self, logits: Tensor, labels: Tensor, tangents: Tensor) -> tuple[Tensor, Tensor]:
        """What stands in for the Hessian in the logits where that is indefinite, along tangents of the logits.

        For forward correction the Fisher information of the noisy class probabilities ``q = Tᵀ softmax(z)``,
        ``Σ_y q_y (∂ log q_y)² = Σ_y (∂q_y)² / q_y``, whatever the labels are. For generalized cross entropy, a concave
        function of the cross entropy, that function's slope times the Hessian of the cross entropy: ``p_ỹ^q`` times
        ``Var_p(∂z)``.

        Returns:
            For each example the sum over its targets, and their number, [B] each.
        """
        logits, labels = self._logits_and_labels(logits, labels)
        if self.shift:
            tangents = tangents[..., :-1, :]
        kept = labels != IGNORE_INDEX
        p = torch.softmax(logits, dim=-1)
        centred = tangents - (p * tangents).sum(-1, keepdim=True)
        if self.correction == "gce":
            slope = 1 - GCE_Q * generalized_cross_entropy(logits, labels)
            information = slope * (p * centred.square()).sum(-1) * kept
        else:
            transition = torch.as_tensor((self.matrices or self._build(logits.shape[-1]))[0]).to(logits)
            q, change = p @ transition, (p * centred) @ transition
            information = torch.where(q > 0, change.square() / q, 0).sum(-1) * kept
        return information.reshape(len(labels), -1).sum(1), kept.reshape(len(labels), -1).sum(1)

    def _losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.correction == "gce":
            return generalized_cross_entropy(logits, labels)
        corrected = forward_corrected if self._forward else backward_corrected
        return corrected(logits, labels, self._matrix(logits))

    @property
    def _forward(self) -> bool:
        return self.correction in ("forward", "posterior")

    def _logits_and_labels(self, outputs: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
        if labels.is_floating_point() or labels.is_complex():
            raise ValueError(
                f"labels have dtype {labels.dtype}; a corrected loss is for class indices, not for "
                "regression, soft or multi-label targets"
            )
        logits = find_logits(outputs)
        if self.shift:
            logits, labels = logits[..., :-1, :], labels[..., 1:]
        if logits.shape[:-1] != labels.shape:
            raise ValueError(
                f"logits have shape {tuple(logits.shape)} and labels {tuple(labels.shape)}; a corrected "
                "loss needs one row of logits, classes last, for each label"
            )
        labels = labels.to(logits.device)
        outside = (labels != IGNORE_INDEX) & ((labels < 0) | (labels >= logits.shape[-1]))
        # One wait for the device; the Trainer's own filter for NaN losses waits at every step, too.
        if outside.any():
            check_labels(labels[outside].cpu().numpy(), logits.shape[-1])
        return logits, labels

    def _matrix(self, logits: Tensor) -> Tensor:
        """The matrix that the correction multiplies by, T or its inverse, where and as the logits need it."""
        classes = logits.shape[-1]
        transition, inverse = self.matrices or self._build(classes)
        if len(transition) != classes:
            raise ValueError(
                f"noise_transition is for {len(transition)} classes, but the logits have {classes}; "
                f"give a [{classes}, {classes}] matrix"
            )
        dtype = torch.promote_types(logits.dtype, torch.float32)
        key = (logits.device, dtype)
        if key not in self._tensors:
            matrix = transition if self._forward or inverse is None else inverse.matrix
            self._tensors[key] = torch.tensor(matrix, dtype=dtype, device=logits.device)
        return self._tensors[key]


def find_logits(outputs: Any) -> Tensor:
    """The logits among a model's outputs: ``outputs.logits``, a tensor, or the first tensor that is no scalar.

    Raises:
        ValueError: there is no such thing; the message names what there is.
    """
    if isinstance(outputs, Tensor):
        return outputs
    named = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    if isinstance(named, Tensor):
        return named
    if isinstance(outputs, Mapping):
        tensors = [v for k, v in outputs.items() if isinstance(v, Tensor) and v.dim() > 0 and k != "loss"]
        if len(tensors) == 1:
            return tensors[0]
        raise ValueError(
            f"the model returns a dict with the keys {list(outputs)}; a corrected loss needs the key 'logits'"
        )
    if isinstance(outputs, (tuple, list)):
        for value in outputs:
            if isinstance(value, Tensor) and value.dim() > 0:
                return value
    raise ValueError(
        f"the model returns a {type(outputs).__name__} without logits; "
        "return a tensor, a tuple that holds it, or a dict with the key 'logits'"
    )


def with_loss_first(outputs: Any, loss: Tensor) -> Any:
    """Outputs whose first member is a loss, which evaluation drops, as it does for transformers' models."""
    if isinstance(outputs, dict):
        return outputs
    rest = list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
    if rest and (rest[0] is None or (isinstance(rest[0], Tensor) and rest[0].dim() == 0)):
        rest = rest[1:]
    return (loss, *rest)


def loss_type(model: nn.Module) -> str | None:
    """transformers' name for the loss of a model; None for models from elsewhere."""
    model = innermost(model)
    names = [kind.__name__ for kind in type(model).__mro__]
    # A model names its loss after its class, and then a user's subclass, or GPT2LMHeadModel, has no name for it.
    found = getattr(model, "loss_type", None)
    if found is None:
        found = next((known for name in names for known in LOSS_MAPPING if known in name), None)
    causal = LOSS_MAPPING.get(found or "") is ForCausalLMLoss or any(
        name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() for name in names
    )
    if causal:
        # The targets of an encoder-decoder are not shifted against its logits.
        return None if getattr(model.config, "is_encoder_decoder", False) else "ForCausalLM"
    return found
