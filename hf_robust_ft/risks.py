"""Loss and error of a model on some examples, in the terms that the bounds speak in."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .corrected_loss import CorrectedLoss
from .curvature.batches import Batches
from .curvature.loss import ExampleLoss, finite
from .curvature.model import Weights, measuring
from .curvature.placement import processes_of, unwrapped
from .noise import IGNORE_INDEX
from .stored import Count, Share, Size

Labels = Literal["clean", "noisy", "as given"]
"""``"as given"``: nobody said what the labels are."""

# Of the margins of the examples, the one that stands for all; Jiang et al. 2020 take the same.
MARGIN_QUANTILE = 0.1


@dataclass(frozen=True)
class MeasuredRisk:
    """What one data set gives, in eval mode."""

    data: str
    """Which examples: ``"training"``, or the name of the evaluation data."""
    labels: Labels
    loss: float
    """Mean, in nats: the backward-corrected cross entropy where ``corrected``, else the plain one."""
    loss_error: Size | None
    """Its standard error, over examples; None for a single one."""
    corrected: bool
    error: Share | None
    """Share of examples whose label is not the prediction; None where an example has not one label."""
    margin: float | None
    """10th percentile over examples of the label's logit minus the largest other; None as for ``error``."""
    n: Count
    """Examples looked at."""
    judged: Count | None = None
    """Those of them that ``error`` is a share of."""


@torch.no_grad()
def measure_risk(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    data: str,
    labels: Labels,
    loss: CorrectedLoss | None = None,
    distributed: bool = False,
) -> MeasuredRisk:
    """Mean loss and error, by forward passes in the state in which the curvature is measured.

    Args:
        model: measured in eval mode, and put back afterwards.
        batches: see :func:`~hf_robust_ft.measure_hessian`.
        data, labels: what the examples and their labels are, to be reported.
        loss: the *backward*-corrected loss for noisy labels, whose mean estimates the loss on clean ones; None: plain
            cross entropy.
        distributed: see :func:`~hf_robust_ft.measure_hessian`.

    Raises:
        ValueError: no batch, labels that are no class indices, a loss that is not finite.
    """
    losses: list[Tensor] = []
    margins: list[Tensor] = []
    model = unwrapped(model)
    processes = processes_of(model, distributed)
    with processes.together(), measuring(model):
        example_loss = ExampleLoss(loss, model)
        weights, shares = Weights(model, ()), Batches(batches, model, f"loss of {data} data", processes)
        for first, inputs, targets in shares:
            with torch.no_grad():
                logits = weights.logits(inputs)
                losses.append(finite(example_loss(logits, targets).double(), first).cpu())
                if targets.dim() == 1 and logits.dim() == 2:
                    margins.append(_margins(logits.double(), targets).cpu())
        parts = processes.gather((losses, margins), shares.token)
    values = torch.cat([part for some, _ in parts for part in some])
    margins = [part for _, some in parts for part in some]
    margin = torch.cat(margins) if margins else None
    single = margin is not None and len(margin) > 0
    return MeasuredRisk(
        data=data,
        labels=labels,
        loss=values.mean().item(),
        loss_error=(values.std() / len(values) ** 0.5).item() if len(values) > 1 else None,
        corrected=loss is not None,
        error=(margin <= 0).double().mean().item() if single and margin is not None else None,
        margin=margin.quantile(MARGIN_QUANTILE).item() if single and margin is not None else None,
        n=len(values),
        judged=len(margin) if single and margin is not None else None,
    )


def _margins(logits: Tensor, labels: Tensor) -> Tensor:
    """Of the examples that have a label."""
    kept = labels != IGNORE_INDEX
    logits, labels = logits[kept], labels[kept].unsqueeze(1)
    others = logits.scatter(1, labels, -torch.inf).amax(1)
    return logits.gather(1, labels).squeeze(1) - others
