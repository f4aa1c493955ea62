"""Two processes that are interrupted stop after the same step; one that is killed costs the last steps only.

They are real; what they run is in workers/faults.py.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import transformers
from packaging.version import Version
from started import start

from hf_robust_ft.checkpoint import last_complete_checkpoint

pytestmark = pytest.mark.multiprocess

WORKER = Path(__file__).parent / "workers" / "faults.py"
# In seconds, for one start.
LIMIT = 90


def _start(out: Path, *parts: str) -> subprocess.Popen[str]:
    # Trainers of other tests in this process leave settings for accelerate in the environment.
    environment = {n: v for n, v in os.environ.items() if not n.startswith(("ACCELERATE_", "FSDP_"))}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return subprocess.Popen(
        [sys.executable, *launcher, str(WORKER), str(out), *parts],
        env=environment | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _end(process: subprocess.Popen[str]) -> str:
    try:
        output, _ = process.communicate(timeout=LIMIT)
    finally:
        process.terminate()  # not kill: torchrun must get the time to end its workers
    return output


def _results(out: Path, part: str) -> list[Any]:
    return [json.loads((out / f"{part}-{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """After a whole run, and another that torchrun passed a Ctrl-C to."""
    out = tmp_path_factory.mktemp("processes")
    process = _start(out, "whole", "interrupted")
    progress, deadline = out / "progress", time.monotonic() + LIMIT
    while process.poll() is None and not (progress.exists() and progress.read_text() >= "1"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    output = _end(process)
    assert (out / "interrupted-1.json").is_file(), output[-8000:]
    return out


def test_both_stop_after_the_same_step_and_save_it(interrupted: Path) -> None:
    first, second = _results(interrupted, "interrupted")
    assert first["begun"] == second["begun"]
    done = len(first["begun"])
    assert 1 < done < 12
    for rank in (first, second):
        assert f"after step {done} of 12" in rank["stopped"]
    checkpoint = interrupted / "run" / f"checkpoint-{done}"
    assert last_complete_checkpoint(interrupted / "run") == str(checkpoint)
    assert {path.name for path in checkpoint.glob("rng_state*")} == {"rng_state_0.pth", "rng_state_1.pth"}


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.24"),
    reason="needs a transformers that resumes several processes on CPUs: 5.17 looks for a device 'cpu:0'",
)
def test_a_killed_process_ends_the_other_and_its_checkpoint_is_passed_over(interrupted: Path) -> None:
    done = len(_results(interrupted, "interrupted")[0]["begun"])
    killed = _start(interrupted, "died")
    # Which of the two torchrun names first, the one that was killed or the one that lost it, is a matter of chance.
    _end(killed)
    assert killed.returncode != 0
    assert not any((interrupted / f"died-{rank}.json").exists() for rank in (0, 1))
    # All but the random numbers of the second process was written, and Trainer would have called it whole.
    newest = str(interrupted / "run" / f"checkpoint-{max(6, done)}")
    assert last_complete_checkpoint(interrupted / "run") == newest

    start(WORKER, str(interrupted), "finished", processes=2)
    whole, _ = _results(interrupted, "whole")
    for rank in _results(interrupted, "finished"):
        assert rank["resumed"] == newest
        assert rank["begun"] == list(range(max(6, done), 12))
        assert rank["weights"] == whole["weights"]
