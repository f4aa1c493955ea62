"""Quadratic forms of one batch: the front door for a few examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from torch import Tensor, nn

from ..corrected_loss import CorrectedLoss
from ..layers import NotALayer
from .directions import Layers, group_layers, lengths_of, travelled
from .engine import Engine, Forms, Kind
from .loss import ExampleLoss, LossFunction
from .model import measuring, split_batch
from .placement import processes_of, unwrapped

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
    """How sharply each example's loss bends along the way that each layer travelled: all layers and examples at once.

    For layer i with ``v_i = vec(W_i - W_i^ref)``, and ``H_i(x, y)`` the Hessian of the loss of one example in this
    layer's weights alone (Ju, Li & Zhang, ICML 2022, section 3), one value for each example and layer:

    ================  ==================================================  ==================================
    kind              value                                               cost in forward passes of the batch
    ================  ==================================================  ==================================
    "hessian"         ``vᵀ H v``, exact                                   0.8 to 1.0 a layer
    "gauss_newton"    ``z1ᵀ ∇²ℓ(z) z1``, z1 the logits' tangent           the same sweep
    "hessian_upper"   ``½ (vᵀ H v + ‖v‖ ‖H v‖)``, at least ``vᵀ H⁺ v``    2.2 to 2.6 a layer
    "hessian_psd"     ``vᵀ H⁺ v``, H⁺ the positive part, by Lanczos       about 2 a layer and step
    ================  ==================================================  ==================================

    ``vᵀ H v`` comes from a tangent sweep over the operations of one forward pass: see ``curvature/sweep.py`` for the
    equation. It is compared with autograd on one example of every call. Memory is that of one chunk.

    Args:
        model: any transformers model, or a module that takes the batch's inputs. Measured in eval mode and at least
            float32; weights, modes and attention are as before afterwards, also after an error. A layer with a LoRA
            adapter is measured as the merged layer that it stands for, under that one's name.
        batch: a mapping with ``labels``, or a pair (inputs, labels); the examples in the leading dimension.
        reference: the weights that it started from: a state dict by parameter name, or the model itself. Layers with
            a LoRA adapter need none: v is then what the adapter adds to the base weight.
        kind: see above.
        loss: None for cross entropy (of an example with several targets, their mean; -100 does not count), a
            :class:`CorrectedLoss`, or a function of logits [B, …, K] and labels [B, …] that returns [B].
        layers: ``"weights"``, each alone; ``"blocks"``, each block of the model as one layer; or a mapping from the
            name of a layer to the pattern(s) of the weights that form it, of which the first match decides. Tied
            weights count once.
        lanczos_steps: products for each value of ``hessian_psd``.
        examples_at_once, directions_at_once: what travels together; None fits them to the cache or the GPU's memory.
            Results don't depend on them beyond rounding.

    Raises:
        ValueError: an argument or labels that don't fit, or adapters other than plain LoRA.
        ReferenceMismatch: the reference lacks layers, or has them in another shape; the message names them.
        NonFiniteLoss: names the example.
        NotTwiceDifferentiable: ``hessian_upper`` or ``hessian_psd`` of an operation that torch can't.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"kind is {kind!r}; choose one of {', '.join(get_args(Kind))}")
    check_counts(lanczos_steps=lanczos_steps, examples_at_once=examples_at_once, directions_at_once=directions_at_once)
    model = unwrapped(model)
    with processes_of(model, distributed=False).together(), measuring(model):
        groups, left_out = group_layers(model, layers)
        ways = travelled(groups, reference)
        inputs, labels = split_batch(batch, model)
        if not len(labels):
            raise ValueError("batch is empty; give at least one example")
        engine = Engine(
            model, groups, ExampleLoss(loss, model),
            examples_at_once=examples_at_once, directions_at_once=directions_at_once,
        )  # fmt: skip
        directions = engine.weights.directions(ways)
        if kind in ("hessian", "gauss_newton"):
            forms = engine.sweep(inputs, labels, directions)
        else:
            forms = engine.products(inputs, labels, directions, steps=lanczos_steps if kind == "hessian_psd" else None)
        values = value_of(forms, kind, directions)
    return QuadraticForms(
        values, tuple(g.name for g in groups), kind, forms.losses, forms.gap, tuple(left_out), tuple(engine.notes)
    )


def value_of(forms: Forms, kind: Kind, directions: Sequence[Mapping[int, Tensor]]) -> Tensor:
    """[examples, layers], of one kind."""
    if kind == "hessian":
        return forms.hessian
    if kind == "gauss_newton":
        assert forms.gauss_newton is not None
        return forms.gauss_newton
    if kind == "hessian_upper":
        assert forms.length is not None
        return (forms.hessian + lengths_of(directions) * forms.length) / 2
    assert forms.positive is not None
    return forms.positive


def check_counts(**counts: int | None) -> None:
    """Refuse what is no positive number of things.

    Raises:
        ValueError: names the argument.
    """
    for name, count in counts.items():
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
            raise ValueError(f"{name} is {count!r}; give a whole number >= 1")
