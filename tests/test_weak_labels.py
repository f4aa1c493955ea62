"""Majority votes and their summary: closed forms, a naive twin, ties, refusals."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest

from hf_robust_ft import majority_vote, vote_summary

# Four examples, three functions.
VOTES = [[0, 0, 1], [-1, 2, -1], [-1, -1, -1], [1, -1, 1]]


def random_votes(count: int, functions: int, num_classes: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1, num_classes, (count, functions))


def test_the_majority_wins_and_abstentions_do_not_count() -> None:
    labels = majority_vote(VOTES, 3)
    assert labels.dtype == np.int64
    np.testing.assert_array_equal(labels, [0, 2, -100, 1])


def test_every_label_is_among_the_leaders_of_a_naive_count() -> None:
    votes = random_votes(500, 5, 4)
    labels, strict = majority_vote(votes, 4), majority_vote(votes, 4, tie="abstain")
    for row, label, without_ties in zip(votes, labels, strict, strict=True):
        counts = Counter(vote for vote in row if vote != -1)
        most = max(counts.values(), default=0)
        leaders = [k for k, count in counts.items() if count == most]
        assert label in leaders or (label == -100 and not leaders)
        assert without_ties == (leaders[0] if len(leaders) == 1 else -100)


def test_ties_are_drawn_evenly_from_the_leaders() -> None:
    votes = np.tile([0, 3, 1, 3, 0], (30_000, 1))
    labels = majority_vote(np.hstack([votes, np.full((30_000, 2), 4)]), 6)
    shares = np.bincount(labels, minlength=6) / 30_000
    # Five standard deviations.
    np.testing.assert_allclose(shares, [1 / 3, 0, 0, 1 / 3, 1 / 3, 0], atol=5 * (2 / 9 / 30_000) ** 0.5)


def test_ties_are_the_seeds_and_no_other_examples() -> None:
    votes = random_votes(200, 2, 3)
    labels = majority_vote(votes, 3, seed=1)
    np.testing.assert_array_equal(labels, majority_vote(votes, 3, seed=1))
    assert (labels != majority_vote(votes, 3, seed=2)).any()
    changed = votes.copy()
    changed[:100] = 0
    np.testing.assert_array_equal(labels[100:], majority_vote(changed, 3, seed=1)[100:])


def test_no_examples_give_no_labels() -> None:
    assert majority_vote(np.empty((0, 2), dtype=int), 3).shape == (0,)


@pytest.mark.parametrize(
    ("votes", "message"),
    [
        ([0, 1], r"votes has shape \(2,\); give \[n, m\]"),
        (np.empty((2, 0), dtype=int), r"votes has shape \(2, 0\)"),
        ([[0.5, 1.0]], "votes have dtype float64; a vote is the number of a class, or -1"),
        ([[0, -100]], "a vote is -100; .* or -1 to abstain"),
        ([[0, 3]], r"label 3 lies outside 0\.\.2"),
    ],
)
def test_what_is_no_vote_is_refused(votes: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        majority_vote(votes, 3)  # type: ignore[arg-type]


def test_an_unknown_tie_is_refused() -> None:
    with pytest.raises(ValueError, match="tie is 'first'; choose 'random' or 'abstain'"):
        majority_vote(VOTES, 3, tie="first")  # type: ignore[arg-type]


def test_the_summary_counts_what_is_on_paper() -> None:
    found = vote_summary(VOTES, clean_labels=[0, 1, 1, 1], names=["a", "b", "c"])
    assert (found.coverage, found.overlaps, found.conflicts) == (0.75, 0.5, 0.25)
    rows = [(r.name, r.classes, r.coverage, r.overlaps, r.conflicts, r.accuracy) for r in found.functions]
    assert rows == [
        ("a", (0, 1), 0.5, 0.5, 0.25, 1.0),
        ("b", (0, 2), 0.5, 0.25, 0.25, 0.5),
        ("c", (1,), 0.5, 0.5, 0.25, 0.5),
    ]
    lines = str(found).splitlines()
    assert re.fullmatch(r"a +0, 1 +50\.0% +50\.0% +25\.0% +100\.0%", lines[1])
    assert re.fullmatch(r"any +75\.0% +50\.0% +25\.0%", lines[-1])


def test_the_summary_agrees_with_a_naive_twin() -> None:
    votes = random_votes(300, 4, 3)
    for j, row in enumerate(vote_summary(votes).functions):
        others = np.delete(votes, j, axis=1)
        mine = votes[:, j]
        assert row.coverage == np.mean([v != -1 for v in mine])
        assert row.overlaps == np.mean([v != -1 and (o != -1).any() for v, o in zip(mine, others, strict=True)])
        assert row.conflicts == np.mean(
            [v != -1 and ((o != -1) & (o != v)).any() for v, o in zip(mine, others, strict=True)]
        )
        assert row.accuracy is None


def test_accuracy_needs_votes_on_examples_with_a_label() -> None:
    rows = vote_summary([[-1, 0, 0], [-1, 1, -1]], clean_labels=[-100, 1]).functions
    assert [row.accuracy for row in rows] == [None, 1.0, None]


@pytest.mark.parametrize(
    ("votes", "options", "message"),
    [
        (np.empty((0, 2), dtype=int), {}, "no examples to summarise"),
        (VOTES, {"names": ["a"]}, "names has 1 entries, but votes has 3 columns"),
        (VOTES, {"clean_labels": [0, 1]}, r"clean_labels has shape \(2,\), but there are 4 examples"),
        ([[0, -2]], {}, "a vote is -2"),
    ],
)
def test_a_summary_of_something_else_is_refused(votes: object, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vote_summary(votes, **options)  # type: ignore[arg-type]
