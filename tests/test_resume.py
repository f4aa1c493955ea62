"""A resumed run goes on exactly where it stopped, around the centres that it started with, or not at all."""

from __future__ import annotations

import multiprocessing
import random
import signal
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from workers import resumable

# Each start of a process costs what it trains, not the import of all libraries.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["hf_robust_ft", "transformers.models.bert.modeling_bert"])
KILLS = 5


def _start(folder: Path, accumulation: int) -> multiprocessing.process.BaseProcess:
    folder.mkdir(exist_ok=True)
    process = PROCESSES.Process(target=resumable.run, args=(folder, accumulation), daemon=True)
    process.start()
    return process


def _steps(folder: Path) -> int:
    """Steps done in all starts together."""
    path = folder / resumable.PROGRESS_FILE
    return path.stat().st_size if path.exists() else 0


def _kill(process: multiprocessing.process.BaseProcess, folder: Path, moment: random.Random) -> None:
    """SIGKILL after some more steps: in the next one, or while it is saving, which takes most of the time."""
    last = _steps(folder) + moment.randint(1, 5)
    while process.is_alive() and _steps(folder) < last:
        time.sleep(0.001)
    time.sleep(moment.uniform(0, 0.06))
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_killed_run_ends_with_the_same_weights(tmp_path: Path, accumulation: int, seed: int) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = _start(whole, accumulation)
    process.join()
    assert process.exitcode == 0

    moment = random.Random(seed)
    for _ in range(KILLS):
        _kill(_start(killed, accumulation), killed, moment)
    process = _start(killed, accumulation)
    process.join()
    assert process.exitcode == 0
    # Steps since the last checkpoint were done again.
    assert _steps(killed) > _steps(whole) == resumable.STEPS

    expected = safetensors.torch.load_file(whole / resumable.FINAL_FILE)
    got = safetensors.torch.load_file(killed / resumable.FINAL_FILE)
    assert got.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(got[name], expected[name])] == []
