"""Weak labels: several labelling functions vote on each example, and the majority names its class.

A labelling function is anything that looks at an example and votes for a class or abstains: a keyword rule, a
heuristic, another model. Votes are integers [n, m], one column a function, with -1 where it abstains, as in Snorkel
(Ratner et al. 2017, arXiv 1711.10160) and WRENCH (Zhang et al. 2021, arXiv 2109.11377). Ju, Li & Zhang 2022 train
on such majority votes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from .noise import IGNORE_INDEX, check_labels

ABSTAIN = -1
"""The vote of a labelling function that has no opinion, as in Snorkel."""

Labels = npt.NDArray[np.int64]


def majority_vote(
    votes: npt.ArrayLike, num_classes: int, *, tie: Literal["random", "abstain"] = "random", seed: int = 0
) -> Labels:
    """The class that most labelling functions vote for.

    Args:
        votes: integers [n, m]: the class in 0..K-1 that function j votes for on example i, -1 where it abstains.
        num_classes: K.
        tie: where several classes lead, ``"random"`` draws one of them, each equally likely, and ``"abstain"``
            gives no label.
        seed: of the draw. It depends on the seed, the example's position and the leading classes only.

    Returns:
        int64 [n]; -100, which every loss of this package leaves out, where all functions abstain (or tie).

    Raises:
        ValueError: votes of another shape or kind, a vote outside -1..K-1, or an unknown ``tie``.
    """
    if tie not in ("random", "abstain"):
        raise ValueError(f"tie is {tie!r}; choose 'random' or 'abstain'")
    array = _check_votes(votes, num_classes)
    counts = (array[:, :, None] == np.arange(num_classes)).sum(axis=1)
    most = counts.max(axis=1)
    leads = counts == most[:, None]
    leaders = leads.sum(axis=1)
    # The how-manieth of the leaders is chosen; one number is drawn for every example, tied or not, so that an
    # example's label does not depend on the others.
    place = np.floor(np.random.default_rng(seed).random(len(array)) * leaders).astype(np.int64)
    chosen: Labels = (leads.cumsum(axis=1) > place[:, None]).argmax(axis=1).astype(np.int64)
    unlabelled = most == 0
    if tie == "abstain":
        unlabelled |= leaders > 1
    chosen[unlabelled] = IGNORE_INDEX
    return chosen


@dataclass(frozen=True)
class FunctionSummary:
    """One labelling function. Shares are of all examples."""

    name: str
    classes: tuple[int, ...]
    """The classes that it voted for (Snorkel's polarity)."""
    coverage: float
    """Share on which it votes."""
    overlaps: float
    """Share on which it votes and another does, too."""
    conflicts: float
    """Share on which it votes and another votes for another class."""
    accuracy: float | None
    """Share of its votes that are right; None without clean labels or without votes."""


@dataclass(frozen=True)
class VoteSummary:
    """What :func:`vote_summary` found. ``print`` shows it as a table."""

    functions: tuple[FunctionSummary, ...]
    num_examples: int
    coverage: float
    """Share of the examples on which some function votes."""
    overlaps: float
    """Share on which two or more vote."""
    conflicts: float
    """Share on which votes differ."""

    def __str__(self) -> str:
        header = ("labelling function", "classes", "coverage", "overlaps", "conflicts", "accuracy")
        lines: list[tuple[str, ...]] = [header]
        for row in self.functions:
            accuracy = "" if row.accuracy is None else f"{row.accuracy:.1%}"
            shares = (f"{share:.1%}" for share in (row.coverage, row.overlaps, row.conflicts))
            lines.append((row.name, ", ".join(map(str, row.classes)), *shares, accuracy))
        lines.append(("any", "", f"{self.coverage:.1%}", f"{self.overlaps:.1%}", f"{self.conflicts:.1%}", ""))
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def vote_summary(
    votes: npt.ArrayLike, *, clean_labels: npt.ArrayLike | None = None, names: Sequence[str] | None = None
) -> VoteSummary:
    """How much the labelling functions cover, and how often they meet and disagree (Snorkel's LFAnalysis).

    Args:
        votes: integers [n, m], -1 where function j abstains on example i.
        clean_labels: [n], for the accuracy of each function; an example labelled -100 counts for none.
        names: of the m functions; by default their numbers.

    Raises:
        ValueError: votes of another shape or kind, no examples, or names or labels of another length.
    """
    array = _check_votes(votes, None)
    count, functions = array.shape
    if count == 0:
        raise ValueError("votes has shape (0, m): there are no examples to summarise")
    if names is None:
        names = [str(number) for number in range(functions)]
    if len(names) != functions:
        raise ValueError(f"names has {len(names)} entries, but votes has {functions} columns; name each function")
    clean = None if clean_labels is None else np.asarray(clean_labels)
    if clean is not None and clean.shape != (count,):
        raise ValueError(f"clean_labels has shape {clean.shape}, but there are {count} examples; give [{count}]")

    voted = array != ABSTAIN
    several = voted.sum(axis=1) > 1
    # Votes differ where the smallest is not the largest, abstentions set aside.
    largest = array.max(axis=1, initial=ABSTAIN)
    smallest = np.where(voted, array, np.iinfo(np.int64).max).min(axis=1, initial=np.iinfo(np.int64).max)
    differ = several & (smallest != largest)

    rows = []
    for j, name in enumerate(names):
        accuracy = None
        if clean is not None:
            judged = voted[:, j] & (clean != IGNORE_INDEX)
            accuracy = float((array[judged, j] == clean[judged]).mean()) if judged.any() else None
        rows.append(
            FunctionSummary(
                name=name,
                classes=tuple(int(k) for k in np.unique(array[voted[:, j], j])),
                coverage=float(voted[:, j].mean()),
                overlaps=float((voted[:, j] & several).mean()),
                # Where votes differ, each one differs from some other.
                conflicts=float((voted[:, j] & differ).mean()),
                accuracy=accuracy,
            )
        )
    return VoteSummary(tuple(rows), count, float(voted.any(axis=1).mean()), float(several.mean()), float(differ.mean()))


def _check_votes(votes: npt.ArrayLike, num_classes: int | None) -> Labels:
    array = np.asarray(votes)
    if array.ndim != 2 or array.shape[1] == 0:
        raise ValueError(f"votes has shape {array.shape}; give [n, m], one column for each labelling function")
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"votes have dtype {array.dtype}; a vote is the number of a class, or {ABSTAIN} to abstain")
    array = array.astype(np.int64)
    if (array < ABSTAIN).any():
        raise ValueError(f"a vote is {array.min()}; a vote is the number of a class, or {ABSTAIN} to abstain")
    if num_classes is not None:
        check_labels(array[array != ABSTAIN], num_classes)
    return array
