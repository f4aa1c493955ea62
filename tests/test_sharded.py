"""A model that FSDP2 shards over two real processes trains and is measured as the whole one is in one process."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn
from torchrun import close, results, run
from transformers.distributed import DistributedConfig

from hf_robust_ft import layer_quadratic_forms
from hf_robust_ft.curvature.placement import unwrapped

pytestmark = pytest.mark.timeout(800)

SHARDS_BY_ITSELF = "fsdp_size" in {field.name for field in dataclasses.fields(DistributedConfig)}
needs_sharding = pytest.mark.skipif(not SHARDS_BY_ITSELF, reason="needs a transformers that shards models by FSDP2")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs")
    names = ["projection", "half", "measurement"]
    run("sharded.py", out, 1, *names, "base", "trainer", "reading")
    run("sharded.py", out, 2, *names, *(["trainer", "refusals", "reading"] if SHARDS_BY_ITSELF else []))
    run("sharded.py", out, 2, "failing", "paged", "partly", "full_disk")
    return out


@pytest.mark.multiprocess
def test_shards_are_projected_as_whole_weights_are(runs: Path) -> None:
    (whole,) = results(runs, "projection", 1)
    first, second = results(runs, "projection", 2)
    assert first == second
    close(first, whole, "projection")
    for name, case in first.items():
        assert case["again"], name  # projecting twice is projecting once, bit for bit
        assert case["active"] or name == "zero", name
        for layer, distance in case["distances"].items():
            assert distance <= case["radii"].get(layer, float("inf")) * (1 + 1e-9), (name, layer)


@pytest.mark.multiprocess
def test_half_precision_shards_stay_inside(runs: Path) -> None:
    for rank in results(runs, "half", 2):
        assert len(rank["inside"]) == 16
        assert all(rank["inside"])


@pytest.mark.multiprocess
def test_a_sharded_model_is_measured_as_the_whole_one(runs: Path) -> None:
    (whole,) = results(runs, "measurement", 1)
    first, second = results(runs, "measurement", 2)
    assert first == second
    close(first, whole, "measurement")
    assert len(first["positive"]) == len(first["upper"]) == 17
    assert first["unchanged"] == [True, True]
    assert first["error"].startswith("ValueError: label 9 lies outside 0..2")


@pytest.mark.multiprocess
def test_it_is_measured_by_processes_that_never_hold_it_whole(runs: Path) -> None:
    (whole,) = results(runs, "measurement", 1)
    for name in ("paged", "partly"):
        first, second = results(runs, name, 2)
        assert first == second
        close(first, whole, name)


@pytest.mark.multiprocess
def test_an_error_between_two_gathered_weights_ends_all_processes(runs: Path) -> None:
    first, second = results(runs, "failing", 2)
    for name in ("forms", "measure"):
        assert second[name] == "MemoryError: no more"
        assert first[name] == "OtherProcessFailed: process 1 failed: MemoryError: no more"


@pytest.mark.multiprocess
def test_a_disk_too_full_for_the_weights_ends_all_processes(runs: Path) -> None:
    for rank in results(runs, "full_disk", 2):
        assert rank.startswith("NotWritten: the weights of a model that is not whole in memory can't be written to ")
        assert "No space left on device" in rank
        assert "set TMPDIR" in rank


@needs_sharding
@pytest.mark.multiprocess
def test_the_trainer_trains_shards_as_the_whole(runs: Path) -> None:
    """Radius, pull, corrected loss, noise, measurement and bounds; the stored reference is that of the whole model."""
    (whole,) = results(runs, "trainer", 1)
    first, second = results(runs, "trainer", 2)
    assert first == second
    assert [whole.pop("sharded"), first.pop("sharded")] == [False, True]
    assert len(first["grad_norm"]) == 4
    assert first["active"]
    close(first, whole, "trainer")


@needs_sharding
@pytest.mark.multiprocess
def test_the_base_model_of_a_sharded_model_is_read_again(runs: Path) -> None:
    (whole,) = results(runs, "reading", 1)
    assert all(rank == whole for rank in results(runs, "reading", 2))
    assert "bert.pooler.dense.weight" in whole["names"]


@needs_sharding
@pytest.mark.multiprocess
def test_what_shards_do_not_allow_is_refused_before_training(runs: Path) -> None:
    for rank in results(runs, "refusals", 2):
        for name in ("estimate", "posterior"):
            assert "needs features that each process computes by itself" in rank[name]
            assert "give its file as noise_transition" in rank[name]
        assert rank["LoRA"].startswith("ValueError: layer_radius and l2sp_penalty of LoRA layers need whole factors")
        assert rank["auto"].startswith("ValueError: layer_radius='auto' trains several times from the same weights")


def test_deepspeed_is_refused() -> None:
    model = nn.Linear(3, 2)
    model.weight.ds_id = 0  # the mark that ZeRO-3 leaves on weights that it takes apart
    with pytest.raises(ValueError, match=r"model is sharded by DeepSpeed ZeRO-3.*shard it by FSDP2"):
        unwrapped(model)
    with pytest.raises(ValueError, match=r"model is sharded by DeepSpeed ZeRO-3"):
        layer_quadratic_forms(model, (torch.ones(1, 3), torch.zeros(1, dtype=torch.long)), model.state_dict())
