"""Runs of workers/resumable.py in processes of their own, which are killed at random moments."""

from __future__ import annotations

import multiprocessing
import random
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import safetensors.torch
from torch import Tensor
from workers import resumable

# Each start of a process costs what it trains, not the import of all libraries.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["hf_robust_ft", "transformers.models.bert.modeling_bert"])


def start(folder: Path, accumulation: int, measured: bool = False) -> BaseProcess:
    folder.mkdir(exist_ok=True)
    process = PROCESSES.Process(target=resumable.run, args=(folder, accumulation, measured), daemon=True)
    process.start()
    return process


def finish(process: BaseProcess, folder: Path) -> dict[str, Tensor]:
    """The weights that a run ends with."""
    process.join()
    assert process.exitcode == 0
    return safetensors.torch.load_file(folder / resumable.FINAL_FILE)


def marks(folder: Path) -> int:
    """Of all starts together: steps done, and measurements begun."""
    path = folder / resumable.PROGRESS_FILE
    return path.stat().st_size if path.exists() else 0


def killed(process: BaseProcess, folder: Path, moment: random.Random, most: int = 5, seconds: float = 0.05) -> bool:
    """SIGKILL after some more marks: in the next step, or while it is saving, which takes most of the time.

    Args:
        most: marks that are waited for.
        seconds: after the last of them, at most.

    Returns:
        False if the process was faster, and has ended.
    """
    last = marks(folder) + moment.randint(1, most)
    while process.is_alive() and marks(folder) < last:
        time.sleep(0.001)
    time.sleep(moment.uniform(0, seconds))
    process.kill()
    process.join()
    assert process.exitcode in (-signal.SIGKILL, 0)
    return process.exitcode != 0
