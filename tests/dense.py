"""Mean Hessians of small models, dense and in float64, for estimators of the mean loss' curvature."""

from __future__ import annotations

from collections.abc import Sequence

import oracle
import torch
from torch import Tensor, nn

EXAMPLES = 7
X = torch.randn(EXAMPLES, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
Y = torch.arange(EXAMPLES) % oracle.CLASSES
LAYERS = ["0.weight", "2.weight"]
PLAIN = oracle.Loss("plain", oracle.some_transition(oracle.CLASSES))

# Cases of the oracle that treat weights, labels or losses each in their own way. Two have more than one block.
CASES = ["tied_linear", "tied_embedding", "embedding_padding", "token_labels", "attention", "bert", "gpt2_causal"]


def smooth() -> nn.Module:
    """Two layers of 20 and 15 weights, in float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, oracle.CLASSES)).double()


def batches(size: int, inputs: Tensor = X, labels: Tensor = Y) -> list[tuple[Tensor, Tensor]]:
    """The examples in batches; the last one may be smaller."""
    return list(zip(inputs.split(size), labels.split(size), strict=True))


def mean_hessian(model: nn.Module, groups: Sequence[oracle.Group]) -> list[Tensor]:
    """Of plain cross entropy on X and Y, for each group [P, P]."""
    return [hessian.mean(0) for hessian in oracle.dense_hessians(model, {"input": X}, Y, PLAIN, groups)]


def case_batches(case: oracle.Case) -> list[dict[str, Tensor]]:
    """The three examples of a case, two and one."""
    return [
        {"labels": case.labels[at], **{name: value[at] for name, value in case.inputs.items()}}
        for at in (slice(0, 2), slice(2, 3))
    ]


def case_hessian(case: oracle.Case, groups: Sequence[oracle.Group]) -> list[Tensor]:
    """The mean Hessian of plain cross entropy, for each group [P, P]."""
    hessians = oracle.dense_hessians(case.model(), case.inputs, case.labels, case.loss(), groups, path=case.path)
    return [hessian.mean(0) for hessian in hessians]


def squares(logits: Tensor, labels: Tensor) -> Tensor:
    """A loss that is quadratic in the logits: ``½ ‖z‖²``, [B]."""
    return logits.square().flatten(1).sum(1) / 2
