"""The benchmark of offloaded models with four blocks."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from started import start

RECIPE = Path(__file__).parent.parent / "recipes" / "bench_offload.py"

pytestmark = pytest.mark.slow


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_an_offloaded_model_takes_less_memory_and_has_the_same_curvature(tmp_path: Path) -> None:
    start(RECIPE, "--blocks", "4", "--free", "24", "--output", "offload.json", cwd=tmp_path)  # compares what both find
    rows = json.loads((tmp_path / "offload.json").read_text())["rows"]
    assert [row["kind"] for row in rows] == ["hessian", "hessian_upper"]
    # Weights and ways are 234 MB, and have room for 12; of a model this small, all else is much, too.
    assert all(row["offloaded"]["MB"] < row["whole"]["MB"] - 50 for row in rows), rows
