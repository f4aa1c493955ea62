"""Two processes train and evaluate as one does. They are real; what they run is in workers/processes.py."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.multiprocess

WORKER = Path(__file__).parent / "workers" / "processes.py"
# torchrun, as `accelerate launch --cpu --num_processes 2` starts one process only.
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
# In seconds, for one start; the tests' own limit allows two.
LIMIT = 120


def _run(out: Path, processes: int, *names: str) -> None:
    """Start the worker in this many processes; it leaves one JSON file for each name and process."""
    launcher = [] if processes == 1 else [*TORCHRUN, str(processes)]
    # Trainers of other tests in this process leave settings for accelerate in the environment.
    environment = {n: v for n, v in os.environ.items() if not n.startswith(("ACCELERATE_", "FSDP_"))}
    with subprocess.Popen(
        [sys.executable, *launcher, str(WORKER), str(out), str(processes), *names],
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


def _results(out: Path, name: str, processes: int) -> list[Any]:
    """What each process returned, by rank."""
    return [json.loads((out / f"{name}-{processes}-{rank}.json").read_text()) for rank in range(processes)]


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
    (one,) = _results(runs, "gradients", 1)
    expected = one[f"{case} batch 8 accumulation 1"]
    assert len(expected["grad_norm"]) == 4
    assert (expected["active"] > 0) == (optimizer == "adamw_torch")
    for rank in _results(runs, "gradients", processes):
        got = rank[f"{case} batch {batch} accumulation {accumulation}"]
        assert got["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
        assert got["active"] == expected["active"]
        _same_weights(got["weights"], expected["weights"])


def test_both_processes_hold_the_same_weights(runs: Path) -> None:
    first, second = _results(runs, "gradients", 2)
    assert first == second


@pytest.mark.parametrize("layout", [(1, 2, 4), (2, 4, 1), (2, 2, 2)], ids=str)
def test_the_layout_does_not_matter_to_the_penalties(runs: Path, layout: tuple[int, int, int]) -> None:
    processes, batch, accumulation = layout
    (one,) = _results(runs, "penalties", 1)
    expected = one["batch 8 accumulation 1"]
    for rank in _results(runs, "penalties", processes):
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
    for rank in _results(runs, "evaluation", processes):
        got = rank[f"{task} {correction} {count}"]
        assert got["corrected_loss"] == pytest.approx(got["direct_corrected_loss"], rel=1e-6)
        # Its interval shows the number of examples, too.
        if task == "sequence":
            assert got["clean_accuracy"] == pytest.approx(got["direct_clean_accuracy"])
        # The Trainer's own mean is over batches: as good only with one target an example, and evenly shared.
        if task == "sequence" and (processes == 1 or count == 12):
            assert got["loss"] == pytest.approx(got["direct_loss"], rel=1e-6)


def test_a_new_head_is_centred_on_that_of_the_first_process(runs: Path) -> None:
    first, second = _results(runs, "head", 2)
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
    (alone,) = _results(runs, "estimate", 1)
    first, second = _results(runs, "estimate", 2)
    assert first == second
    assert alone["n"] == first["n"] == 151
    for row, expected in zip(first["transition"], alone["transition"], strict=True):
        assert row == pytest.approx(expected, abs=1e-4)
    assert [alone["transition"][i][i] for i in range(3)] == pytest.approx([0.8] * 3, abs=0.2)
    assert (runs / "estimate-2" / "transition_estimate.json").is_file()


def test_when_one_process_fails_the_other_does_not_wait(runs: Path) -> None:
    first, second = _results(runs, "failures", 2)
    assert first["read"] == "RuntimeError: process 1 could not compute the features of its examples: KeyError: " + (
        "'no such file'"
    )
    assert second["read"] == "KeyError: 'no such file'"
    assert re.match(r"NotWritten: .*_label_posteriors\.safetensors was not written \(Is a directory\)", first["write"])
    assert second["write"] == first["write"]


def test_two_processes_choose_the_radius_that_one_does(runs: Path) -> None:
    (alone,) = _results(runs, "radius", 1)
    first, second = _results(runs, "radius", 2)
    assert first == second
    assert first["choice"] == alone["choice"]
    assert first["auto"] == first["given"]
    _same_weights(first["auto"], alone["auto"])
    assert (runs / "radius-2" / "radius_choice.json").is_file()


def test_fsdp_beside_a_radius_is_refused(tmp_path: Path) -> None:
    _run(tmp_path, 2, "sharded")
    for rank in _results(tmp_path, "sharded", 2):
        assert rank["steps"] == 0
        assert re.search("layer_radius does not work with FSDP yet.*use DDP", rank["message"])
