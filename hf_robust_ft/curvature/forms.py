"""Quadratic forms of one batch: the front door for a few examples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from torch import Tensor, nn

from ..corrected_loss import CorrectedLoss
from ..layers import NotALayer
from .directions import Layers, group_layers, lengths_of, travelled
from .engine import Engine, Forms, Kind
from .loss import ExampleLoss, LossFunction
from .model import measuring, split_batch, unwrapped

LANCZOS_STEPS = 20


@dataclass(frozen=True)
class QuadraticForms:
    """What :func:`layer_quadratic_forms` measured."""

    values: Tensor
    """[examples, layers], float64, on the CPU."""
    layers: tuple[str, ...]
    kind: Kind
    losses: Tensor
    """[examples]."""
    gap: Tensor | None
    """For ``hessian_psd``, what half the Lanczos steps would have changed, [examples, layers]: an indicator of
    convergence, not an error."""
    left_out: tuple[NotALayer, ...]
    """Every trained parameter that belongs to no measured layer, and why."""
    notes: tuple[str, ...]
    """What autograd did in place of the sweep, and why."""


def layer_quadratic_forms(
    model: nn.Module,
    batch: Any,
    reference: Mapping[str, Tensor] | nn.Module,
    *,
    kind: Kind = "hessian",
    loss: CorrectedLoss | LossFunction | None = None,
    layers: Layers = "weights",
    lanczos_steps: int = LANCZOS_STEPS,
    examples_at_once: int | None = None,
    directions_at_once: int | None = None,
) -> QuadraticForms:
    """How sharply each example's loss bends along the way that each layer travelled."""
    if kind not in get_args(Kind):
        raise ValueError(f"kind is {kind!r}; choose one of {', '.join(get_args(Kind))}")
    model = unwrapped(model)
    groups, left_out = group_layers(model, layers)
    ways = travelled(groups, reference)
    inputs, labels = split_batch(batch, model)
    with measuring(model):
        engine = Engine(
            model, groups, ExampleLoss(loss, model),
            examples_at_once=examples_at_once, directions_at_once=directions_at_once,
        )  # fmt: skip
        directions = engine.weights.directions(ways)
        if kind in ("hessian", "gauss_newton"):
            forms = engine.sweep(inputs, labels, directions)
        else:
            forms = engine.products(inputs, labels, directions, steps=lanczos_steps if kind == "hessian_psd" else None)
    return QuadraticForms(
        value_of(forms, kind, lengths_of(directions)), tuple(g.name for g in groups), kind, forms.losses, forms.gap,
        tuple(left_out), tuple(engine.notes),
    )  # fmt: skip


def value_of(forms: Forms, kind: Kind, lengths: Tensor) -> Tensor:
    """[examples, layers], of one kind; lengths are ``‖v‖``."""
    if kind == "hessian":
        return forms.hessian
    if kind == "gauss_newton":
        assert forms.gauss_newton is not None
        return forms.gauss_newton
    if kind == "hessian_upper":
        assert forms.length is not None
        return (forms.hessian + lengths * forms.length) / 2
    assert forms.positive is not None
    return forms.positive
