"""What kills a run, fills its disk or damages its files costs at most the steps since the last checkpoint."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import killed
import pytest
import safetensors.torch
import torch
from torch import Tensor
from workers import resumable

from hf_robust_ft import HessianReport
from hf_robust_ft.card import read_card
from hf_robust_ft.checkpoint import ConstraintRecord, is_complete, last_complete_checkpoint
from hf_robust_ft.hessian_measurement import FILE as REPORT_FILE
from hf_robust_ft.hessian_measurement import load_start
from hf_robust_ft.reference import load_reference

Weights = dict[str, Tensor]

# SIGKILL in training, in measuring, and in saving

ROUNDS = 20


def _check_whole(folder: Path, start: Weights) -> None:
    """Every file under its final name is whole, and what a run began with is what it was."""
    checkpoints = [path for path in folder.glob("checkpoint-*") if is_complete(path)]
    newest = last_complete_checkpoint(folder)
    assert (newest is None) == (not checkpoints)
    incomplete = {path for path in folder.glob("checkpoint-*") if path not in checkpoints}
    for path in folder.rglob("*"):
        below = path.relative_to(folder).parts
        if path.is_dir() or below[0].startswith(".") or incomplete.intersection(path.parents) or below[-1][0] == ".":
            continue
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".safetensors" and path.name != resumable.FINAL_FILE:
            safetensors.torch.load_file(path)
        elif path.suffix in (".pt", ".pth"):
            torch.load(path, weights_only=False)
    if (folder / REPORT_FILE).exists():
        assert HessianReport.load(folder / REPORT_FILE).complete
    if (folder / "robust_card.json").exists():
        read_card(folder)
    for checkpoint in checkpoints:
        record = ConstraintRecord.load(checkpoint)
        reference = load_reference(folder, record.reference_sha256)
        assert not tiny_difference(reference, start)
        assert not tiny_difference(load_start(checkpoint), start)


def tiny_difference(got: Weights, expected: Weights) -> list[str]:
    return [name for name, weight in got.items() if not torch.equal(weight, expected[name])]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Weights, Weights]:
    """The weights before and after a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    began = time.monotonic()
    final = killed.finish(killed.start(folder, 1, measured=True), folder)
    print("undisturbed", time.monotonic() - began)
    return resumable.build().state_dict(), final


@pytest.mark.slow
def test_after_twenty_kills_every_file_is_whole_and_the_run_ends_as_it_would_have(
    whole: tuple[Weights, Weights], tmp_path: Path
) -> None:
    start, expected = whole
    moment = random.Random(0)
    rounds, runs = 0, 0
    while rounds < ROUNDS:
        folder = tmp_path / str(runs)
        for _ in range(min(4, ROUNDS - rounds)):
            stopped = killed.killed(killed.start(folder, 1, measured=True), folder, moment, most=14, seconds=0.3)
            _check_whole(folder, start)
            if not stopped:
                break
            rounds += 1
        assert not tiny_difference(killed.finish(killed.start(folder, 1, measured=True), folder), expected)
        _check_whole(folder, start)
        assert (folder / REPORT_FILE).is_file()
        runs += 1
