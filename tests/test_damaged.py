"""Files of a run that were damaged are refused by name, or hold what they should: nothing else comes of them."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pytest
import tiny
import torch
from typing_extensions import TypeAliasType

from hf_robust_ft import (
    HessianReport,
    TransitionEstimate,
    corrupt_labels,
    estimate_transition,
    symmetric_transition,
)
from hf_robust_ft.card import read_card
from hf_robust_ft.card.data import FILE as CARD_FILE
from hf_robust_ft.checkpoint import RECORD_FILE, ConstraintRecord
from hf_robust_ft.hessian_measurement import FILE as REPORT_FILE
from hf_robust_ft.hessian_measurement import START_FILE, START_RECORD, load_start
from hf_robust_ft.label_targets import FILE as TARGETS_FILE
from hf_robust_ft.label_targets import LabelTargets
from hf_robust_ft.noise_estimate import FILE as ESTIMATE_FILE
from hf_robust_ft.radius_search import FILE as CHOICE_FILE
from hf_robust_ft.radius_search import RadiusCandidate, RadiusChoice
from hf_robust_ft.reference import REFERENCE_FILE, load_reference
from hf_robust_ft.stored import checked

CHECKPOINT = "checkpoint-2"


class Kept(NamedTuple):
    """A file in the folder of a run, and what reads it."""

    file: str
    load: Callable[[Path], Any]


def _reference(folder: Path) -> Any:
    return load_reference(folder, ConstraintRecord.load(folder / CHECKPOINT).reference_sha256)


KEPT = [
    Kept(REPORT_FILE, lambda folder: HessianReport.load(folder / REPORT_FILE)),
    Kept(CARD_FILE, read_card),
    Kept(ESTIMATE_FILE, lambda folder: TransitionEstimate.load(folder / ESTIMATE_FILE)),
    Kept(CHOICE_FILE, lambda folder: RadiusChoice.load(folder / CHOICE_FILE)),
    Kept(TARGETS_FILE, LabelTargets.load),
    Kept(REFERENCE_FILE, _reference),
    Kept(START_FILE, lambda folder: load_start(folder / CHECKPOINT)),
    Kept(f"{CHECKPOINT}/{RECORD_FILE}", lambda folder: ConstraintRecord.load(folder / CHECKPOINT)),
    Kept(f"{CHECKPOINT}/{START_RECORD}", lambda folder: load_start(folder / CHECKPOINT)),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    measured = {"hessian_examples": 3, "hessian_time_budget": 0.2, "noise_transition": 0.2, "layer_radius": 0.1}
    saved = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    torch.manual_seed(0)
    model = tiny.bert(num_hidden_layers=1)
    trainer = tiny.trainer(folder, model, eval_dataset=tiny.texts(8, 1), eval_strategy="epoch", **measured, **saved)
    trainer.train()
    trainer.create_model_card()
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 300)
    features = rng.normal(size=(300, 3)) + 3 * np.eye(3)[labels]
    noisy = corrupt_labels(labels, symmetric_transition(3, 0.2), 0)
    estimate_transition(features, noisy, bootstrap=20).save(folder / ESTIMATE_FILE)
    candidates = RadiusCandidate(0.01, 0.5, 0.1, 0.0, 0.0), RadiusCandidate(float("inf"), 0.4, 0.1, 0.1, 0.05)
    RadiusChoice(0.01, candidates, "accuracy", 10, 0).save(folder / CHOICE_FILE)
    LabelTargets(torch.rand(5, 3).softmax(1), torch.arange(5) % 3, torch.eye(3).double()).save(folder)
    return folder


def _ways(value: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """To each value in a JSON file, of lists to the first two."""
    if way:
        yield way
    below = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, each in below:
        yield from _ways(each, (*way, key))


def _wrong_types(content: bytes, rng: random.Random) -> Iterator[bytes]:
    whole = json.loads(content)
    ways = list(_ways(whole))
    for way in rng.sample(ways, min(len(ways), 40)):
        for wrong in (None, "x", [1], {"a": 1}, True):
            damaged = copy.deepcopy(whole)
            inner = damaged
            for key in way[:-1]:
                inner = inner[key]
            inner[way[-1]] = wrong
            yield json.dumps(damaged).encode()


def _flipped(content: bytes, at: int, bit: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :]


@pytest.mark.parametrize("kept", KEPT, ids=lambda kept: kept.file)
def test_a_damaged_file_is_refused_by_name(run: Path, kept: Kept) -> None:
    path, rng = run / kept.file, random.Random(0)
    content = path.read_bytes()
    others = [
        b"",
        b"null",
        b"[]",
        b"3",
        b'"x"',
        b"{}",
        b"\xff\xfe",
        *(content[: len(content) * k // 8] for k in range(8)),
    ]
    flips = [_flipped(content, rng.randrange(len(content)), rng.randrange(8)) for _ in range(40)]
    types = list(_wrong_types(content, rng)) if path.suffix == ".json" else []
    said: list[str] = []
    try:
        for damaged in (*others, *flips, *types):
            path.write_bytes(damaged)
            try:
                found = kept.load(run)
            except ValueError as error:
                said.append(str(error))
            except FileNotFoundError as error:
                # The card names the report: by another name there is none.
                said.append(f"{path.name}: {error}" if kept.file == CARD_FILE else str(error))
            else:
                assert damaged not in others
                str(found)
    finally:
        path.write_bytes(content)
    kept.load(run)
    # Of the starting weights the hash is in another file than the weights, and either may be the damaged one.
    name = path.name.partition(".")[0] if path.name == START_RECORD else path.name
    assert [message for message in said if name not in message] == []
    assert len(said) >= len(others)
    # What a hash is kept of differs in no bit unnoticed.
    if kept.file in (REFERENCE_FILE, START_FILE):
        assert len(said) == len(others) + len(flips)


def test_arrays_are_read_through_an_alias() -> None:
    """From Python 3.12 on numpy 2.5's NDArray is one."""
    kind = TypeVar("kind", bound=np.generic)
    alias = TypeAliasType("alias", np.ndarray[Any, np.dtype[kind]], type_params=(kind,))
    assert checked(alias[np.float64], [[1, 0.5]], "T").tolist() == [[1.0, 0.5]]
    with pytest.raises(ValueError, match=r"^T "):
        checked(alias[np.float64], "one", "T")
