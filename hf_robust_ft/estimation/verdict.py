"""From the figures of an estimate to a few plain sentences."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from ..noise import Matrix
from .inputs import Labels

# Of clean labels a linear head takes some for wrong, the more the fewer examples a class has to learn from. Measured on
# both shared data sets: 1 % at 500 a class, 2 to 5 % at 100, 5 to 11 % at 30. Less than 0.65 / √(examples a class), and
# less than 5 % at any size, is no noise that could be told from none.
LITTLE_NOISE = 0.05
LITTLE_NOISE_OF_ONE = 0.65

# Fewer sure examples of a class than this leave its row with a standard error of about 0.1 at 40 % noise.
FEW_EXAMPLES = 25

# Level of the test of the class-conditional assumption.
LEVEL = 0.05

# Correlation from which a dependence is called one: a linear head is never quite right, and with enough examples every
# misfit is significant. recipes/RESULTS.md has what class-conditional noise and other noise came to on real data.
NOTABLE_EFFECT = 0.07


# Standard deviations by which trusted examples may hold more wrong labels than T says.
FAR = 2.5

NoiseLevel = Literal["none", "perhaps", "noise"]


def noise_level(noise_rate: float, rate_interval: tuple[float, float], examples: int, num_classes: int) -> NoiseLevel:
    """Whether there is noise, given that clean labels don't look quite clean."""
    least = max(LITTLE_NOISE, LITTLE_NOISE_OF_ONE / math.sqrt(examples / num_classes))
    if noise_rate < least:
        return "none"
    return "perhaps" if rate_interval[0] < least / 2 else "noise"


def trusted_verdict(transition: Matrix, draws: Matrix, clean: Labels, noisy: Labels) -> str:
    """A sentence where examples of which both labels are known hold far more wrong ones than T says; else nothing.

    That is how labels look whose errors follow from the features (rules, another model): to a head on these features
    they look right, and T, which has most of its evidence from the other examples, misses them.

    Args:
        transition: T, [K, K].
        draws: [B, K, K], of T.
        clean, noisy: [m], of the trusted examples.
    """
    wrong = int((clean != noisy).sum())
    rates = 1 - np.diag(transition)[clean]
    uncertain = (1 - np.diagonal(draws, axis1=1, axis2=2)[:, clean]).sum(axis=1)
    deviation = math.sqrt((rates * (1 - rates)).sum() + ((uncertain - rates.sum()) ** 2).mean())
    if wrong - rates.sum() <= FAR * max(deviation, 1.0):
        return ""
    return (
        f" But of {len(clean)} trusted examples {wrong} carry a wrong label, where T says {rates.sum():.0f}: errors "
        "that follow from the features look right to it. Count T from trusted examples instead: of those of each true "
        "class, the share that carries each label."
    )


def write_verdict(
    noise_rate: float,
    rate_interval: tuple[float, float],
    singular_interval: tuple[float, float],
    effective_counts: Matrix,
    examples: int,
    p_value: float,
    effect: float,
) -> str:
    """Is there noise, can T be inverted, are the counts enough, and does noise depend on the class alone?"""
    low, high = rate_interval
    between = f"{noise_rate:.0%} of the labels are wrong (95 % interval {low:.0%} to {high:.0%})"
    level = noise_level(noise_rate, rate_interval, examples, len(effective_counts))
    if level == "none":
        sentences = [f"Little or no noise: an estimated {between}. Plain fine-tuning is probably enough."]
    elif level == "perhaps":
        sentences = [f"Perhaps noise: an estimated {between}. More examples would tell."]
    else:
        sentences = [f"There is noise: an estimated {between}."]
    if singular_interval[0] <= 0:
        sentences.append(
            "T is not identifiable: within its interval it can be singular, so the labels may not tell some classes "
            "apart, and backward correction is not safe. Give more or trusted examples, or merge classes."
        )
    else:
        sentences.append("T can be inverted throughout its interval.")
    few = np.flatnonzero(effective_counts < FEW_EXAMPLES)
    if few.size:
        named = ", ".join(str(c) for c in few[:10]) + (", …" if few.size > 10 else "")
        sentences.append(f"Few sure examples of class {named}: their rows are rough.")
    significant = level != "none" and p_value < LEVEL  # of no noise nothing depends on anything
    if significant and effect >= NOTABLE_EFFECT:
        sentences.append(
            f"The noise depends on more than the class (p = {p_value:.2g}, effect size {effect:.2f}): "
            "read T as an average."
        )
    elif significant:
        sentences.append(
            f"The fit is not exact (p = {p_value:.2g}), but by no more than a linear head's usual misfit "
            f"(effect size {effect:.2f}): no sign that the noise depends on more than the class."
        )
    return " ".join(sentences)
