"""The benchmark of offloaded models as users start it, with two blocks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

RECIPE = Path(__file__).parent.parent / "recipes" / "bench_offload.py"

pytestmark = pytest.mark.slow


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_an_offloaded_model_takes_less_memory_and_has_the_same_curvature(tmp_path: Path) -> None:
    command = [sys.executable, str(RECIPE), "--blocks", "2", "--free", "24", "--output", "offload.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]  # it compares what both find
    rows = json.loads((tmp_path / "offload.json").read_text())["rows"]
    assert [row["kind"] for row in rows] == ["hessian", "hessian_upper"]
    # Weights and ways are 121 MB, and have room for 12; of a model this small, all else is much, too.
    assert all(row["offloaded"]["MB"] < row["whole"]["MB"] - 15 for row in rows)
