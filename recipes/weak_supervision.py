"""Fine-tune a text classifier on labels that keyword rules voted for, plainly and robustly.

    accelerate launch recipes/weak_supervision.py

runs offline where text_noisy.py does: the rules of supersense_rules.py vote on what kind of thing a definition of
WordNet defines, the majority is its label, and definitions on which every rule abstains are left out of training. The
clean labels of the training data are used to print how good rules and labels are, and for nothing else. T is estimated
from the weak labels; with

    accelerate launch recipes/weak_supervision.py --noise_transition T.json

it is your own. Either way it is that of the examples that get a label, and only an approximation: the errors of rules
depend on the text, not on the class alone. Methods, models and settings are those of text_noisy.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from datasets import Dataset
from noisy_runs import RunArguments, compare, load, name_of_data, parse
from supersense_rules import NAMES, vote
from text_noisy import DEFAULTS, SUPERSENSES_NAME, TextArguments, supersenses, text_columns, text_task

from hf_robust_ft import VoteSummary, majority_vote, vote_summary

Integers = npt.NDArray[np.int64]


@dataclass
class RecipeArguments(TextArguments, RunArguments):
    """What to train on, and which methods to compare."""


def main() -> None:
    recipe, arguments = parse(RecipeArguments, __doc__, output_dir="outputs/weak_supervision", **DEFAULTS)
    data = load(recipe, supersenses)
    names = data["train"].features[recipe.label_column].names
    # Ties are broken once, for all seeds: the rules are what they are.
    votes = vote(texts(recipe, data["train"]), names)
    weak = majority_vote(votes, len(names), seed=0)
    clean = np.asarray(data["train"][recipe.label_column])
    kept = np.flatnonzero(weak >= 0)
    oracle = empirical_transition(clean[kept], weak[kept], len(names))
    if arguments.process_index == 0:
        describe(vote_summary(votes, clean_labels=clean, names=NAMES), clean, weak, oracle, names)
    if arguments.noise_transition is None:
        arguments.noise_transition = "estimate"
    data["train"] = relabel(data["train"].select(kept), weak[kept], recipe.label_column)
    found = {"coverage": len(kept) / len(weak), "accuracy": float((weak == clean)[kept].mean())}
    task = text_task(recipe, data, recipe.label_column, name_of_data(recipe, SUPERSENSES_NAME))
    about = f" Training labels are majority votes of {votes.shape[1]} keyword rules, right on {found['accuracy']:.1%}."
    compare(replace(task, about_labels=about), recipe, arguments, weak_labels=found)


def texts(recipe: RecipeArguments, data: Dataset) -> list[str]:
    """What the rules read: the text, or both texts of a pair."""
    columns = text_columns(recipe, data, recipe.label_column)
    return [" ".join(parts) for parts in zip(*(data[column] for column in columns), strict=True)]


def relabel(data: Dataset, labels: Integers, label_column: str) -> Dataset:
    """The weak labels in the place of the clean ones, which go to a column of their own."""
    kind = data.features[label_column]
    return data.rename_column(label_column, "clean_label").add_column(label_column, labels, feature=kind)


def empirical_transition(clean: Integers, noisy: Integers, num_classes: int) -> npt.NDArray[np.float64]:
    """``T[i, j]``, the share of the examples of true class i that carry label j.

    Raises:
        ValueError: a class without examples, whose row can't be counted.
    """
    counts = np.zeros((num_classes, num_classes))
    np.add.at(counts, (clean, noisy), 1)
    if (counts.sum(axis=1) == 0).any():
        missing = np.flatnonzero(counts.sum(axis=1) == 0).tolist()
        raise ValueError(f"no example of the true classes {missing} has a weak label; give T with --noise_transition")
    return counts / counts.sum(axis=1, keepdims=True)


def describe(
    summary: VoteSummary, clean: Integers, weak: Integers, transition: npt.NDArray[np.float64], names: list[str]
) -> None:
    """Print what the rules cover and how often they are right."""
    kept = weak >= 0
    print(f"\n{summary}\n")
    print(
        f"Majority vote: labels for {kept.mean():.1%} of {len(weak)}, {(weak == clean)[kept].mean():.1%} of them right"
    )
    print("\nT of these labels, in percent; rows are the true class:\n")
    print(" " * 14 + "".join(f"{name[:7]:>8}" for name in names) + "  covered")
    for i, name in enumerate(names):
        row = "".join(f"{100 * share:8.1f}" for share in transition[i])
        print(f"{name:14}{row}  {kept[clean == i].mean():.0%}")
    print(f"condition number {np.linalg.cond(transition):.1f}")


if __name__ == "__main__":
    main()
