"""From the figures of an estimate to a few plain sentences."""

from __future__ import annotations

import numpy as np

from ..noise import Matrix

# On clean labels the joint likelihood of 5,000 real examples finds about 1 % noise, and of 1,000 about 4 %
# (recipes/RESULTS.md): ambiguous examples that a linear head takes for wrong. Below this it is not told from none.
LITTLE_NOISE = 0.05

# Fewer sure examples of a class than this leave its row with a standard error of about 0.1 at 40 % noise.
FEW_EXAMPLES = 25

# Level of the test of the class-conditional assumption.
LEVEL = 0.05

# Effect size (Cohen's w) from which a dependence is called one: a linear head is never quite right, and with enough
# examples every misfit is significant. On both shared data sets, class-conditional noise gave at most 0.093 and a noise
# rate that differs fourfold between the halves of each class 0.10 to 0.19, at 5,000 examples.
NOTABLE_EFFECT = 0.1


def write_verdict(
    noise_rate: float,
    rate_interval: tuple[float, float],
    singular_interval: tuple[float, float],
    effective_counts: Matrix,
    p_value: float,
    effect: float,
) -> str:
    """Is there noise, can T be inverted, are the counts enough, and does noise depend on the class alone?"""
    low, high = rate_interval
    between = f"{noise_rate:.0%} of the labels are wrong (95 % interval {low:.0%} to {high:.0%})"
    if noise_rate < LITTLE_NOISE and low < LITTLE_NOISE:
        sentences = [f"Little or no noise: an estimated {between}. Plain fine-tuning is probably enough."]
    elif low <= LITTLE_NOISE / 2:
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
    if p_value < LEVEL and effect >= NOTABLE_EFFECT:
        sentences.append(
            f"The noise depends on more than the class (p = {p_value:.2g}, effect size {effect:.2f}): "
            "read T as an average."
        )
    elif p_value < LEVEL:
        sentences.append(
            f"The fit is not exact (p = {p_value:.2g}), but by no more than a linear head's usual misfit "
            f"(effect size {effect:.2f}): no sign that the noise depends on more than the class."
        )
    return " ".join(sentences)
