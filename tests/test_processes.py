"""Two processes train and evaluate as one does. They are real; what they run is in workers/processes.py."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import safetensors.torch
from started import start
from torchrun import launch, results, run

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(800)]

RECIPES = Path(__file__).parent.parent / "recipes"


def _run(out: Path, processes: int, *names: str) -> None:
    run("processes.py", out, processes, *names)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs")
    _run(out, 1, "gradients", "penalties", "evaluation", "base", "estimate", "radius")
    _run(out, 2, "gradients", "penalties", "evaluation", "head", "estimate", "failures", "radius")
    return out


def _same_weights(got: dict[str, list[float]], expected: dict[str, list[float]]) -> None:
    assert got.keys() == expected.keys()
    for name, weight in expected.items():
        assert got[name] == pytest.approx(weight, rel=1e-5, abs=1e-10), name


@pytest.mark.parametrize("layout", [(1, 2, 4), (2, 4, 1), (2, 2, 2)], ids=str)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw_torch"])
@pytest.mark.parametrize("correction", ["forward", "backward"])
@pytest.mark.parametrize("task", ["sequence", "token"])
def test_the_layout_of_a_batch_does_not_matter(
    runs: Path, task: str, correction: str, optimizer: str, layout: tuple[int, int, int]
) -> None:
    """(processes, batch, accumulation) against (1, 8, 1); the AdamW runs are constrained."""
    processes, batch, accumulation = layout
    case = f"{task} {correction} {optimizer}"
    (one,) = results(runs, "gradients", 1)
    expected = one[f"{case} batch 8 accumulation 1"]
    assert len(expected["grad_norm"]) == 4
    assert (expected["active"] > 0) == (optimizer == "adamw_torch")
    for rank in results(runs, "gradients", processes):
        got = rank[f"{case} batch {batch} accumulation {accumulation}"]
        assert got["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
        assert got["active"] == expected["active"]
        _same_weights(got["weights"], expected["weights"])


def test_both_processes_hold_the_same_weights(runs: Path) -> None:
    first, second = results(runs, "gradients", 2)
    assert first == second


@pytest.mark.parametrize("layout", [(1, 2, 4), (2, 4, 1), (2, 2, 2)], ids=str)
def test_the_layout_does_not_matter_to_the_penalties(runs: Path, layout: tuple[int, int, int]) -> None:
    processes, batch, accumulation = layout
    (one,) = results(runs, "penalties", 1)
    expected = one["batch 8 accumulation 1"]
    for rank in results(runs, "penalties", processes):
        got = rank[f"batch {batch} accumulation {accumulation}"]
        assert got["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-9)
        assert got["loss"] == pytest.approx(expected["loss"], rel=1e-5)  # logged in float32
        for name, weight in expected["weights"].items():
            assert got["weights"][name] == pytest.approx(weight, rel=0, abs=1e-10), name


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("count", [11, 12])
@pytest.mark.parametrize("correction", ["forward", "backward"])
@pytest.mark.parametrize("task", ["sequence", "token"])
def test_every_example_is_evaluated_once(runs: Path, task: str, correction: str, count: int, processes: int) -> None:
    """The corrected loss is a mean over all targets, also where an example is dealt out twice to fill up."""
    for rank in results(runs, "evaluation", processes):
        got = rank[f"{task} {correction} {count}"]
        assert got["corrected_loss"] == pytest.approx(got["direct_corrected_loss"], rel=1e-6)
        # Its interval shows the number of examples, too.
        if task == "sequence":
            assert got["clean_accuracy"] == pytest.approx(got["direct_clean_accuracy"])
        # The Trainer's own mean is over batches: as good only with one target an example, and evenly shared.
        if task == "sequence" and (processes == 1 or count == 12):
            assert got["loss"] == pytest.approx(got["direct_loss"], rel=1e-6)


def test_a_new_head_is_centred_on_that_of_the_first_process(runs: Path) -> None:
    first, second = results(runs, "head", 2)
    assert first["initial"] != second["initial"]
    assert first["weights"] == second["weights"]

    initial = [value for row in first["initial"] for value in row]
    radius = 0.1 * math.hypot(*initial)
    distance = math.dist(first["weights"]["classifier.weight"], initial)
    assert 0.99 * radius < distance <= radius * (1 + 1e-9)
    for rank in (first, second):
        assert rank["centre"] == "initial"
        assert rank["radius"] == pytest.approx(radius)
        assert rank["distance"] == pytest.approx(distance)


def test_two_processes_estimate_what_one_does(runs: Path) -> None:
    (alone,) = results(runs, "estimate", 1)
    first, second = results(runs, "estimate", 2)
    assert first == second
    assert alone["n"] == first["n"] == 151
    for row, expected in zip(first["transition"], alone["transition"], strict=True):
        assert row == pytest.approx(expected, abs=1e-4)
    assert [alone["transition"][i][i] for i in range(3)] == pytest.approx([0.8] * 3, abs=0.2)
    assert (runs / "estimate-2" / "transition_estimate.json").is_file()


def test_when_one_process_fails_the_other_does_not_wait(runs: Path) -> None:
    first, second = results(runs, "failures", 2)
    assert first["read"] == "RuntimeError: process 1 could not compute the features of its examples: KeyError: " + (
        "'no such file'"
    )
    assert second["read"] == "KeyError: 'no such file'"
    assert re.match(r"NotWritten: .*_label_posteriors\.safetensors was not written \(Is a directory\)", first["write"])
    assert second["write"] == first["write"]


def test_two_processes_choose_the_radius_that_one_does(runs: Path) -> None:
    (alone,) = results(runs, "radius", 1)
    first, second = results(runs, "radius", 2)
    assert first == second
    assert first["choice"] == alone["choice"]
    assert first["auto"] == first["given"]
    _same_weights(first["auto"], alone["auto"])
    assert (runs / "radius-2" / "radius_choice.json").is_file()


def test_two_processes_hold_and_measure_adapters_as_one_does(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    for processes in (1, 2):
        _run(tmp_path, processes, "adapters")
    ((expected, *_),) = [list(rank.values()) for rank in results(tmp_path, "adapters", 1)]
    held = {name: distance for name, distance in expected["distances"].items() if "query" in name}
    assert held
    assert max(held.values()) <= 0.01
    assert max(held.values()) > 0.0099
    for processes in (1, 2):
        for rank in results(tmp_path, "adapters", processes):
            for got in rank.values():
                _same_weights(got["weights"], expected["weights"])
                assert got["distances"] == pytest.approx(expected["distances"])
                assert got["curvature"] == pytest.approx(expected["curvature"], rel=1e-4)


def test_fsdp_that_is_ignored_is_refused_beside_a_radius(tmp_path: Path) -> None:
    _run(tmp_path, 2, "sharded")
    for rank in results(tmp_path, "sharded", 2):
        assert rank["steps"] == 0
        assert re.search("does not work with FSDP that is not Accelerate's, or not in effect.*or DDP", rank["message"])


@pytest.mark.slow
def test_the_recipe_goes_the_same_way_on_two_processes(tmp_path: Path) -> None:
    """Correction, projection and noise on the small ViT, at one global batch; float32, so up to rounding."""
    found = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        words = [
            "--output_dir", str(folder), "--methods", "robust", "--use_cpu", "--max_steps", "8",
            "--save_strategy", "steps", "--save_steps", "8", "--logging_strategy", "steps", "--logging_steps", "1",
            "--dataloader_drop_last", "--per_device_train_batch_size", str(32 // processes),
        ]  # fmt: skip
        if processes == 1:
            start(RECIPES / "vit_noisy.py", *words)
        else:
            launch(RECIPES / "vit_noisy.py", processes, *words)
        checkpoint = folder / "robust-0" / "checkpoint-8"
        # One file of random numbers a process: there were as many as asked for.
        assert len(list(checkpoint.glob("rng_state*.pth"))) == processes
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
        found.append((losses, safetensors.torch.load_file(checkpoint / "model.safetensors")))
    (losses, weights), (shared_losses, shared_weights) = found
    assert len(losses) == 8
    assert shared_losses == pytest.approx(losses, rel=1e-4)
    for name, weight in weights.items():
        # The loss does not depend on biases of keys; AdamW makes steps of the rounding errors in their gradients.
        if not name.endswith("key.bias"):
            assert (shared_weights[name] - weight).norm() <= 1e-2 * weight.norm(), name
