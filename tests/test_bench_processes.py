"""The benchmark of several processes, on little work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from started import start

RECIPE = Path(__file__).parent.parent / "recipes" / "bench_processes.py"
WORDS = ["--examples", "4", "--batch_size", "4", "--lanczos_steps", "2", "--rounds", "1", "--output", "processes.json"]

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]


def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    start(RECIPE, *WORDS, cwd=tmp_path, processes=2)
    found = json.loads((tmp_path / "processes.json").read_text())
    assert found["largest_relative_difference"] < 1e-6
    assert (found["layers"], found["processes"]) == (26, 2)
    assert found["seconds"].keys() == {"alone", "together", "side by side"}
    assert found["times_as_fast"] > 0
    assert found["at_most"] > 0


def test_one_process_has_nothing_to_compare(tmp_path: Path) -> None:
    assert "start several: torchrun --nproc_per_node 2" in start(RECIPE, *WORDS, cwd=tmp_path, fails=True)
