"""The benchmark of several processes as users start it, on little work."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

RECIPE = Path(__file__).parent.parent / "recipes" / "bench_processes.py"

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]


def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    sizes = ["--examples", "4", "--batch_size", "4", "--lanczos_steps", "2", "--rounds", "1"]
    command = [sys.executable, str(RECIPE), *sizes, "--output", "processes.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "processes.json").read_text())
    assert found["largest_relative_difference"]["2"] < 1e-6
    assert found["layers"] == 26
    assert found["times_as_fast"].keys() == {"1", "2"}
    assert found["at_most"]["2"] > 0
