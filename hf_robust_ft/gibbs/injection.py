"""Fresh weight noise for every example of a batch, in one forward pass of an unmodified model.

Modules that have a rule (:mod:`.noise_rules`) get it at their output. Parameters that a module uses by itself (class
tokens, position embeddings, scales) are few, and get a copy for each example, along the dimension that is broadcast
over examples.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .noise_rules import RULES, Noise, has_rule

TRAINING, JUDGING = 0, 1
# Of the size of a parameter, and of what its noise changes: other examples should change by rounding alone.
TENTH = 0.1


class NoNoiseRule(ValueError):
    """A trained parameter that noise can't be drawn for, example by example."""


def noise_owners(model: nn.Module) -> dict[str, nn.Module]:
    """The module of each trained parameter that noise can be drawn for: all of them, or an error.

    Raises:
        NoNoiseRule: a trained parameter that is tied, or neither of ``Linear``, ``Conv1D`` (GPT-2), ``Conv2d``,
            ``Embedding`` or ``LayerNorm`` nor one that may be broadcast over examples: a vector, or of leading size 1.
    """
    modules = dict(model.named_modules())
    owners: dict[str, nn.Module] = {}
    names: dict[nn.Parameter, str] = {}
    wrong = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:
            continue
        owner = modules[name.rpartition(".")[0]]
        if parameter in names:
            wrong.append(f"{name} (tied to {names[parameter]})")
        elif not (has_rule(owner) or parameter.dim() == 1 or len(parameter) == 1):
            wrong.append(f"{name} ({type(owner).__name__})")
        names[parameter] = name
        owners[name] = owner
    if wrong:
        raise NoNoiseRule(
            f"no noise can be drawn, example by example, for {_some(wrong)}; noise has rules for untied weights and "
            "biases of Linear, Conv1D, Conv2d, Embedding and LayerNorm, and for vectors and tokens that are broadcast "
            "over examples. Freeze the others (requires_grad_(False)) before training: frozen parameters cost nothing"
        )
    return owners


@contextlib.contextmanager
def fresh_noise(
    model: nn.Module,
    noises: Mapping[str, Noise],
    examples: int,
    generator: torch.Generator,
    *,
    only_first: bool = False,
) -> Iterator[None]:
    """Within it, each forward pass of a batch uses weights drawn anew for each example.

    Args:
        model: every trained parameter has a rule (:func:`noise_owners`).
        noises: by parameter name; a parameter that is not named has none.
        examples: B. Every module with noise must see B rows, so that they can be told apart.
        generator: on the model's device.
        only_first: all but the first example do without; see :func:`check_apart`.

    Raises:
        NoNoiseRule: a module that sees other than B rows, is called twice, or was not called in the pass: its weight
            may have been used behind the module's back.
    """
    by_module: dict[str, dict[str, Noise]] = {}
    by_itself: dict[str, Noise] = {}
    for name, noise in noises.items():
        owner, _, short = name.rpartition(".")
        if has_rule(model.get_submodule(owner)):
            by_module.setdefault(owner, {})[short] = noise
        else:
            by_itself[name] = noise
    calls = dict.fromkeys(by_module, 0)

    def add(name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        calls[name] += 1
        if not args:
            raise NoNoiseRule(f"{name} is called with keyword arguments, where its input is not found: freeze it")
        x = args[0]
        if calls[name] > 1:
            raise NoNoiseRule(f"{name} is called twice in a forward pass: both calls need the same noise. Freeze it")
        if len(x) == 1 and isinstance(module, nn.Embedding):  # positions, which are broadcast over examples
            x, output = x.expand(examples, -1), output.expand(examples, *output.shape[1:])
        if len(x) != examples:
            raise NoNoiseRule(
                f"the input of {name} has {len(x)} rows for {examples} examples, so they can't be told apart: freeze it"
            )
        drawn = RULES[type(module)](module, x, by_module[name], generator).reshape(output.shape)
        return output + kept(drawn).to(output.dtype)

    def kept(drawn: Tensor) -> Tensor:
        return torch.cat([drawn[:1], torch.zeros_like(drawn[1:])]) if only_first else drawn

    with contextlib.ExitStack() as stack:
        for name in by_module:
            module = model.get_submodule(name)
            stack.callback(module.register_forward_hook(partial(add, name)).remove)
        for name, noise in by_itself.items():
            owner, _, short = name.rpartition(".")
            members: dict[str, Any] = model.get_submodule(owner)._parameters
            stack.callback(members.__setitem__, short, members[short])
            each = members[short].unsqueeze(0).unsqueeze(0) if members[short].dim() == 1 else members[short]
            shape = examples, *each.shape[1:]
            drawn = torch.randn(shape, generator=generator, device=each.device, dtype=each.dtype)
            members[short] = each + kept(drawn * noise.std)
        yield
    silent = [name for name, count in calls.items() if not count]
    if silent:
        raise NoNoiseRule(
            f"{_some(silent)} had no call of its own in the forward pass, so its noise was not added: freeze it"
        )


@torch.no_grad()
def check_apart(model: nn.Module, names: Collection[str], forward: Callable[[], Tensor], examples: int) -> None:
    """Refuse a model in which noise can't be drawn example by example, though each module sees as many rows.

    Args:
        names: of the parameters that will have noise.
        forward: gives the logits of a batch, [examples, K].

    Raises:
        NoNoiseRule: the noise of the first example changes the logits of others, or the model has no use for a
            parameter that is another one for each example.
    """
    alone = [name for name in names if not has_rule(model.get_submodule(name.rpartition(".")[0]))]
    suspects = _some(alone) if alone else "what is used otherwise"
    sizes = {name: model.get_parameter(name).square().mean().sqrt() for name in names}
    noises = {name: Noise(TENTH * torch.where(size > 0, size, 1.0)) for name, size in sizes.items()}
    still = forward()
    if not bool(still.isfinite().all()):
        return  # What comes next says so.
    generator = torch.Generator(still.device).manual_seed(0)
    try:
        with fresh_noise(model, noises, examples, generator, only_first=True):
            moved = forward()
    except NoNoiseRule:
        raise
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise NoNoiseRule(
            f"the model can't have another parameter for each example ({error}): freeze {suspects}"
        ) from error
    if moved.shape == still.shape:
        change = (moved - still).abs()
        rounding = 1e-5 * still.abs().max()
        if examples == 1 or bool(change[1:].max() <= TENTH * change[0].max() + rounding):
            return
    raise NoNoiseRule(
        f"the noise of one example changes the logits of others, so no draw is of one example: freeze {suspects}"
    )


def generator_of(seed: int, purpose: int, device: torch.device) -> torch.Generator:
    """A stream of its own for each purpose: a posterior must know nothing of the draws that it is judged by."""
    mixed = np.random.SeedSequence([seed, purpose]).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(mixed[0] >> np.uint64(1)))


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
