"""Starts a worker script in one process or several real ones, and reads what each left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from started import LIMIT, start

WORKERS = Path(__file__).parent / "workers"
# torchrun, as `accelerate launch --cpu --num_processes 2` starts one process only.
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]


def run(worker: str, out: Path, processes: int, *names: str) -> None:
    """Start the worker in this many processes; it leaves one JSON file for each name and process."""
    start(WORKERS / worker, str(out), str(processes), *names, processes=processes)


def launch(script: Path, processes: int, *arguments: str) -> None:
    """Run a script in this many processes, by torchrun itself."""
    # Trainers of other tests in this process leave settings for accelerate in the environment.
    environment = {n: v for n, v in os.environ.items() if not n.startswith(("ACCELERATE_", "FSDP_"))}
    with subprocess.Popen(
        [sys.executable, *TORCHRUN, str(processes), str(script), *arguments],
        env=environment | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=LIMIT)
        finally:
            # Not kill: torchrun must get the time to end its workers.
            process.terminate()
    assert process.returncode == 0, output[-8000:]


def results(out: Path, name: str, processes: int) -> list[Any]:
    """What each process returned, by rank."""
    return [json.loads((out / f"{name}-{processes}-{rank}.json").read_text()) for rank in range(processes)]


def close(got: Any, expected: Any, where: str) -> None:
    """Assert that two results are the same but for the order of float64 sums."""
    if isinstance(expected, dict):
        assert got.keys() == expected.keys(), where
        for key, value in expected.items():
            close(got[key], value, f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(got) == len(expected), where
        for i, value in enumerate(expected):
            close(got[i], value, f"{where}[{i}]")
    elif isinstance(expected, float):
        assert got == pytest.approx(expected, rel=1e-6, abs=1e-12), where
    else:
        assert got == expected, where
