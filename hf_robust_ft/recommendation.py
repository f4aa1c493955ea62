"""From what a diagnosis measured to arguments for training."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any, NamedTuple

from .estimation import TransitionEstimate

RECOMMENDED = ("noise_transition", "loss_correction", "layer_radius", "radius_mode")
"""The arguments that a recommendation may set."""


class Recommendation(NamedTuple):
    """What to train with."""

    arguments: dict[str, Any]
    """Of :class:`RobustTrainingArguments`, beside the user's own; empty: plain fine-tuning is enough."""
    reason: str


def recommend(estimate: TransitionEstimate, depends_on_example: bool, radius: Any) -> Recommendation:
    """Settings for these labels. The figures are those of recipes/RESULTS.md.

    Args:
        estimate: T.
        depends_on_example: whether the noise depends on more than the class.
        radius: the relative ``layer_radius`` for this model.
    """
    low, high = estimate.noise_rate_interval
    level = estimate.noise_level
    constrained = {"layer_radius": radius, "radius_mode": "relative"}
    if level == "none":
        # A ball that holds a model back from wrong labels holds it back from right ones, too.
        return Recommendation({}, "Little or no noise: plain fine-tuning is enough.")
    if level == "perhaps":
        # Posteriors by so uncertain a T cost 0.6 points on clean texts. Balls cost nothing there, and gain little at a
        # tuned learning rate, much where it is too high.
        return Recommendation(
            constrained,
            f"Perhaps noise (between {low:.0%} and {high:.0%}), too few examples to correct for it: a ball around each "
            "layer needs no matrix.",
        )
    if not estimate.informative:
        # Posteriors of labels that say next to nothing are next to the prior.
        return Recommendation(
            {"loss_correction": "gce", **constrained},
            "The noise leaves the labels hardly better than chance, so T is not to be relied on: generalized cross "
            "entropy and a ball around each layer do without.",
        )
    # The most helpful of what was measured, also where classes are so rare that T may be singular. Where noise depends
    # on the example, generalized cross entropy does as well; but a false alarm under pair flips would cost 20 points.
    reason = "Train on the posteriors of the labels, with a ball around each layer."
    if not estimate.identifiable:
        reason += " They need no inverse of T, which may be singular."
    if depends_on_example:
        reason += " The noise depends on more than the class, so they are those of an average T."
    return Recommendation(
        {"noise_transition": "estimate", "loss_correction": "posterior", **constrained},
        reason,
    )


def radius_for(layer_names: list[str], text: bool) -> Any:
    """The relative ``layer_radius`` that suits a model with these layers.

    1 % of each layer's norm was the best of those tried on images (recipes/RESULTS.md). On texts, balls around the
    blocks alone: a pooler that was not trained with the model has a long way to go, and 1 % of its norm cost ten
    points there, while 2 % around the blocks was best or nearly so.
    """
    if not text:
        return 0.01
    return {"*layer*": 0.02} if any("layer" in name for name in layer_names) else 0.02


def as_flags(arguments: Mapping[str, Any]) -> str:
    """The same for a command line that :class:`HfArgumentParser` reads."""
    words = []
    for name, value in arguments.items():
        words += [f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return shlex.join(words)


def as_code(arguments: Mapping[str, Any]) -> str:
    """The same as arguments of a call."""
    return ", ".join(f"{name}={value!r}" for name, value in arguments.items())
