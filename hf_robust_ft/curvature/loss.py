"""The loss of one example, and its curvature in the logits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..corrected_loss import CorrectedLoss, loss_type
from ..losses import cross_entropy
from ..noise import IGNORE_INDEX, check_labels

LossFunction = Callable[[Tensor, Tensor], Tensor]
"""``(logits [B, …, K], labels [B, …]) → [B]``, one loss for each example."""


class NonFiniteLoss(ValueError):
    """The loss of an example is infinite or NaN."""


class ExampleLoss:
    """One loss for each example of a batch: the mean over its targets, where it has several.

    Args:
        loss: None for plain cross entropy, a :class:`CorrectedLoss`, or a function of logits and labels that
            returns one loss for each example, twice differentiable in the logits.
        model: tells whether position t predicts label t + 1 (causal language models). A function gets the
            logits and labels as they are.
    """

    def __init__(self, loss: CorrectedLoss | LossFunction | None, model: nn.Module) -> None:
        self._loss = loss
        self._shift = loss_type(model) == "ForCausalLM"

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """[B].

        Raises:
            ValueError: labels that don't fit, a function that returns something else, a loss that is not finite.
        """
        if self._loss is None:
            return _mean(*self._plain(logits, labels))
        if isinstance(self._loss, CorrectedLoss):
            return _mean(*self._loss.per_example(logits, labels))
        losses = self._loss(logits, labels)
        if not isinstance(losses, Tensor) or losses.shape != (len(logits),):
            found = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(
                f"loss returned {found} for a batch of {len(logits)} examples; it must return one loss for each "
                f"example, of shape ({len(logits)},)"
            )
        return losses

    def curvature(self, logits: Tensor, labels: Tensor, tangents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Derivatives along tangents of the logits.

        Args:
            logits: [B, …, K].
            labels: [B, …].
            tangents: z1, [D, B, …, K].

        Returns:
            ``z1ᵀ ∇²ℓ z1``, its Gauss-Newton counterpart, and the first derivatives, [D, B] each. The first two are
            the same but for forward correction and generalized cross entropy, whose Hessian in the logits is
            indefinite: see :meth:`CorrectedLoss.fisher`.
        """
        count, batch = tangents.shape[:2]
        with torch.enable_grad():
            z = logits.detach().expand_as(tangents).flatten(0, 1).requires_grad_()
            repeated = labels.expand(count, *labels.shape).flatten(0, 1)
            z1 = tangents.flatten(0, 1)
            (slope,) = torch.autograd.grad(self(z, repeated).sum(), z, create_graph=True)
            if slope.requires_grad:
                (bend,) = torch.autograd.grad(slope, z, z1)
            else:  # a loss that is linear in the logits
                bend = torch.zeros_like(z)

        def along(vectors: Tensor) -> Tensor:
            return (vectors * z1).flatten(1).sum(1, dtype=torch.float64).view(count, batch)

        hessian = along(bend)
        if isinstance(self._loss, CorrectedLoss) and self._loss.correction in ("forward", "gce"):
            fisher = _mean(*self._loss.fisher(z.detach(), repeated, z1)).double().view(count, batch)
            return hessian, fisher, along(slope.detach())
        return hessian, hessian, along(slope.detach())

    def _plain(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if labels.is_floating_point():
            raise ValueError(
                f"labels have dtype {labels.dtype}; without a loss, cross entropy with class indices is measured. "
                "For another one give loss=, a function of logits and labels"
            )
        if self._shift:
            logits, labels = logits[..., :-1, :], labels[..., 1:]
        if logits.shape[:-1] != labels.shape:
            raise ValueError(
                f"logits have shape {tuple(logits.shape)} and labels {tuple(labels.shape)}; cross entropy needs one "
                "row of logits, classes last, for each label. For another loss give loss="
            )
        kept = labels != IGNORE_INDEX
        outside = kept & ((labels < 0) | (labels >= logits.shape[-1]))
        if outside.any():
            check_labels(labels[outside].cpu().numpy(), logits.shape[-1])
        losses = cross_entropy(logits, labels)
        return losses.reshape(len(labels), -1).sum(1), kept.reshape(len(labels), -1).sum(1)


def _mean(sums: Tensor, counts: Tensor) -> Tensor:
    return sums / counts.clamp(min=1)


def finite(losses: Tensor, first: int) -> Tensor:
    """The losses of a batch [B], of which the first example has the number ``first``.

    Raises:
        NonFiniteLoss: one that is infinite or NaN.
    """
    bad = (~losses.detach().isfinite()).nonzero()
    if len(bad):
        n = int(bad[0])
        raise NonFiniteLoss(
            f"the loss of example {first + n} is {losses[n].item()}: look at its inputs and label, and at the "
            "model's weights (half-precision training, or noise of a large sigma, may have made them infinite)"
        )
    return losses
