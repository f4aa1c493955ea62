"""The benchmark of curvature as users start it, in processes of its own, on a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import vit

RECIPE = Path(__file__).parent.parent / "recipes" / "bench_curvature.py"

pytestmark = pytest.mark.slow


def test_the_benchmark_of_curvature(tmp_path: Path) -> None:
    vit().save_pretrained(tmp_path / "vit")
    words = (
        "--model_name_or_path vit --image_size 8 --examples 2 --rounds 1 --sample 1 0 --psd_sample 1 3 "
        "--lanczos_steps 3 --kinds hessian hessian_psd --memory hessian --training_batch 2 --threads 1 "
        "--output bench.json"
    )
    command = [sys.executable, str(RECIPE), *words.split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "bench.json").read_text())

    assert {"model", "layers", "tokens", "examples", "rounds", "machine", "torch", "forward pass"} <= found.keys()
    assert (found["layers"], found["tokens"]) == (14, 5)
    runs = {"hessian": (2, 14), "hessian_psd": (1, 3), "example_loop": (1, 14)}
    assert found["methods"].keys() == runs.keys()
    for name, (examples, layers) in runs.items():
        one = found["methods"][name]
        assert one["run"] == f"{examples} of 2 examples, {layers} of 14 layers"
        assert one["scaled up by"] == pytest.approx(2 * 14 / (examples * layers))
        assert one["median seconds"] == pytest.approx(one["scaled up by"] * one["seconds of each run"][0])
        passes = one["median seconds"] / found["forward pass"]["median seconds"]
        assert one["forward passes"] == pytest.approx(passes)
        assert one["forward passes / layers"] == pytest.approx(passes / 14)
    assert found["time / ours"]["example_loop"]["hessian"] > 0
    assert 0 <= found["agreement"]["example_loop"] < 1e-4
    assert found["peak memory"].keys() == {"training step", "hessian"}
    assert "example_loop" in done.stdout
