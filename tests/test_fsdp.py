"""A model that Accelerate shards by FSDP2 when training begins trains as the whole one does in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate
import pytest
from packaging.version import Version
from torchrun import close, results, run

from hf_robust_ft.checkpoint import last_complete_checkpoint

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(800)]

# Accelerate 1.14 unties the weights that it shards.
KEEPS_TIES = Version(accelerate.__version__) >= Version("1.15.0")
SAME = ["trainer", "resuming", "loading", "again", "wrapped", "posteriors", *(["tied"] if KEEPS_TIES else [])]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs")
    run("fsdp.py", out, 1, "base", *SAME, "card")
    run("fsdp.py", out, 2, *SAME, "card", "precision", "freed", "unloaded", "refusals")
    return out


@pytest.mark.parametrize("name", SAME)
def test_two_processes_train_shards_as_one_trains_the_whole(runs: Path, name: str) -> None:
    """`tests/workers/fsdp.py` says what each is; its workers see to it that the model was sharded."""
    (whole,) = results(runs, name, 1)
    first, second = results(runs, name, 2)
    assert first == second
    if name == "trainer":
        assert [whole.pop("sharded"), first.pop("sharded")] == [False, True]
    close(first, whole, name)


def test_what_was_compared_is_not_empty(runs: Path) -> None:
    found: dict[str, Any] = {name: results(runs, name, 2)[0] for name in SAME}
    for name in ("trainer", "loading", "again", "posteriors"):
        assert found[name]["active"], name
    for name in {"wrapped", "tied", "resuming"} & found.keys():
        assert all(case["active"] for case in found[name].values()), name
    assert len(found["trainer"]["upper"]) == 17
    # Of the new head, which only the first process has made, no other one would know.
    assert found["loading"]["centres"]["classifier.weight"] is None
    assert found["loading"]["centres"]["bert.pooler.dense.weight"] == "pretrained"


def test_a_resumed_run_is_the_uninterrupted_one(runs: Path) -> None:
    found = results(runs, "resuming", 2)[0]
    for kind in ("FULL_STATE_DICT", "SHARDED_STATE_DICT"):
        assert found[f"{kind} resumed"] == found[f"{kind} whole"]
        assert found[f"{kind} whole"]["best"] == "checkpoint-2"
    # With the first kind the best weights were loaded in the end; else it would show no more than steps before it.
    assert found["FULL_STATE_DICT whole"]["weights"] != found["SHARDED_STATE_DICT whole"]["weights"]
    if KEEPS_TIES:
        tied = results(runs, "tied", 2)[0]
        assert tied["resumed"] == tied["straight"]


def test_a_checkpoint_that_lacks_a_shard_is_passed_over(runs: Path) -> None:
    folder = runs / "resuming-SHARDED_STATE_DICT-2"
    assert last_complete_checkpoint(folder) == str(folder / "checkpoint-4")
    next((folder / "checkpoint-4" / "pytorch_model_fsdp_0").glob("*.distcp")).unlink()
    assert last_complete_checkpoint(folder) == str(folder / "checkpoint-2")


def test_names_are_those_without_wrappers(runs: Path) -> None:
    wrapped = results(runs, "wrapped", 2)[0]
    close(wrapped["checkpointed"], wrapped["compiled"], "wrapped")


def test_balls_hold_in_mixed_precision(runs: Path) -> None:
    for rank in results(runs, "precision", 2):
        assert rank == {"types": ["torch.float32"], "centres": ["torch.float32"], "inside": True, "active": 12}


def test_no_whole_weight_is_kept(runs: Path) -> None:
    assert results(runs, "freed", 2) == [{"left": 0, "trained": 4}] * 2


def test_one_process_writes_the_card(runs: Path) -> None:
    (whole,) = results(runs, "card", 1)
    close(results(runs, "card", 2)[0], whole, "card")
    assert any(row["distance"] for row in whole["rows"])


def test_an_optimizer_that_lacks_a_weight_is_refused(runs: Path) -> None:
    for said in results(runs, "unloaded", 2):
        assert said.startswith("ValueError: with cpu_ram_efficient_loading the optimizer of a process got one weight")


def test_what_cannot_work_is_refused_at_once(runs: Path) -> None:
    for rank in results(runs, "refusals", 2):
        assert rank["auto"].startswith("ValueError: layer_radius='auto' trains several times from the same weights")
        assert rank["LoRA"].startswith("ValueError: layer_radius and l2sp_penalty of LoRA layers need whole factors")
        for name in ("estimate", "posterior"):
            assert "but with cpu_ram_efficient_loading only the first one has the model (False works)" in rank[name]
        for name in ("layer_radius", "l2sp_penalty=0.1", "hessian_penalty=0.1"):
            said = rank[f"{name.partition('=')[0]} 1"]
            assert said.startswith(f"ValueError: {name} does not work with FSDP version 1; use FSDP version 2"), said
