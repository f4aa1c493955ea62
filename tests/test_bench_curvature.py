"""The benchmarks of curvature as users start them, in processes of their own, on tiny models."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from started import start
from tiny import vit

RECIPES = Path(__file__).parent.parent / "recipes"

PEERS = {
    "PyHessian": "pyhessian",
    "curvlinops": "curvlinops",
    "hessian-eigenthings": "hessian_eigenthings",
    "BackPACK": "backpack",
}

pytestmark = pytest.mark.slow


def run(recipe: str, folder: Path, words: str) -> tuple[dict[str, Any], str]:
    """What a recipe writes and prints."""
    printed = start(RECIPES / recipe, *words.split(), "--output", "bench.json", cwd=folder)
    return json.loads((folder / "bench.json").read_text()), printed


def test_the_benchmark_of_curvature(tmp_path: Path) -> None:
    vit().save_pretrained(tmp_path / "vit")
    words = (
        "--model_name_or_path vit --image_size 8 --examples 2 --rounds 1 --sample 1 0 --psd_sample 1 3 "
        "--lanczos_steps 3 --kinds hessian hessian_psd --memory hessian --training_batch 2 --threads 1"
    )
    found, printed = run("bench_curvature.py", tmp_path, words)

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
    assert "example_loop" in printed


def test_the_benchmark_of_the_spectrum(tmp_path: Path) -> None:
    words = "--feed_forward --examples 8 --rounds 2 --probes 20 --sample 1"
    found, printed = run("bench_spectrum.py", tmp_path, words)
    assert (found["layers"], found["weights"]) == (3, 64 * 24 + 24 * 20 + 20 * 10)
    here = {library for library, module in PEERS.items() if importlib.util.find_spec(module)}
    assert found["versions"].keys() == here
    assert found["left out"] == dict.fromkeys(PEERS.keys() - here, "not installed")
    tasks = {"trace", "trace of each layer", "largest eigenvalue"}
    rows = {(row["task"], row["library"]): row for row in found["methods"]}
    everywhere = {(task, library) for task in tasks for library in {"hf_robust_ft", *here} - {"BackPACK"}}
    assert rows.keys() == everywhere | ({("trace", "BackPACK")} & {("trace", name) for name in here})
    for (task, library), row in rows.items():
        assert row["agrees"], (task, library)
        layers = {True: 0, False: 3 if library == "hf_robust_ft" else 1}[task != "trace of each layer"]
        assert (row["layers run"], row["scaled up by"]) == (layers, 3 if layers == 1 else 1)
        assert len(row["seconds of each run"]) == 2
    assert sum(found["exact"]["trace of each layer"]) == pytest.approx(found["exact"]["trace"][0], rel=1e-10)
    assert rows["largest eigenvalue", "hf_robust_ft"]["mean value"] == pytest.approx(
        found["exact"]["largest eigenvalue"][0], rel=1e-5
    )
    assert "largest eigenvalue, hf_robust_ft" in printed


def test_the_benchmark_of_the_measure(tmp_path: Path) -> None:
    words = "--train_examples 40 --epochs 1 --examples 5 --batch_size 3 --rounds 1 --time_budget 20"
    found, printed = run("bench_distance.py", tmp_path, words)
    assert (found["layers"], found["examples"]) == (26, 5)
    authors, blocks, examples, positive, bound = found["values"].values()
    for layer in range(26):
        assert blocks[layer] <= examples[layer] * (1 + 1e-5)  # a mean is at most the maximum
        assert examples[layer] <= positive[layer] * (1 + 1e-5)
        assert positive[layer] <= bound[layer] * (1 + 1e-5)
    assert authors != blocks
    assert found["steps"].keys() == found["values"].keys()
    assert len(found["median seconds"]) == 4
    assert "authors' script" in printed
