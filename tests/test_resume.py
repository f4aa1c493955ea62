"""A resumed run goes on exactly where it stopped, around the centres that it started with, or not at all."""

from __future__ import annotations

import json
import logging
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import killed
import pytest
import safetensors.torch
import torch
from torch import Tensor
from transformers import BertForSequenceClassification, Trainer, TrainerCallback, TrainerControl, TrainerState
from workers import resumable

from hf_robust_ft import (
    HessianRegularizedTrainer,
    ReferenceMismatch,
    RobustTrainingArguments,
    layer_distances,
)
from hf_robust_ft.checkpoint import RECORD_FILE, STATE_FILE, last_complete_checkpoint
from hf_robust_ft.reference import REFERENCE_FILE

Weights = dict[str, Tensor]


def _weights(model: torch.nn.Module) -> Weights:
    return {name: weight.detach().clone() for name, weight in model.state_dict().items()}


def _different(got: Weights, expected: Weights) -> list[str]:
    """Names of the weights that are not the same bit for bit."""
    assert got.keys() <= expected.keys()
    return [name for name in got if not torch.equal(got[name], expected[name])]


def _distances(trainer: HessianRegularizedTrainer, reference: Weights) -> dict[str, float]:
    """Of the constrained layers from some weights, measured without the Trainer."""
    found = layer_distances(trainer.model, reference)
    return {name: found[name] for name in trainer.constraints.radii}


# A run that is killed

KILLS = 5


@pytest.fixture(scope="module", params=[1, 2], ids=lambda accumulation: f"accumulation {accumulation}")
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Weights]:
    """Gradient accumulation, and the weights after a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    return request.param, killed.finish(killed.start(folder, request.param), folder)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0])
def test_a_killed_run_ends_with_the_same_weights(whole: tuple[int, Weights], tmp_path: Path, seed: int) -> None:
    accumulation, expected = whole
    moment = random.Random(seed)
    kills = 0
    while kills < KILLS and killed.killed(killed.start(tmp_path, accumulation), tmp_path, moment):
        kills += 1
    assert kills > 0
    checkpoint, steps = last_complete_checkpoint(tmp_path), killed.marks(tmp_path)
    assert _different(killed.finish(killed.start(tmp_path, accumulation), tmp_path), expected) == []
    # It did go on from the checkpoint: a run from the start would end with the same weights, too.
    saved = 0 if checkpoint is None else int(checkpoint.rpartition("-")[2])
    assert killed.marks(tmp_path) - steps == resumable.STEPS[accumulation] - saved


# A run that is stopped after step 4 of 6


class StepsBegun(TrainerCallback):
    """The steps that a Trainer begins, counted from 0."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_step_begin(
        self, args: RobustTrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.steps.append(state.global_step)


def _trainer(
    folder: Path, model: torch.nn.Module | None = None, **settings: Any
) -> tuple[HessianRegularizedTrainer, list[int]]:
    """A Trainer of the model that all runs here start from, and the steps that it will have begun."""
    callback = StepsBegun()
    trainer = HessianRegularizedTrainer(
        resumable.build() if model is None else model,
        resumable.arguments(folder, **({"max_steps": 6} | settings)),
        train_dataset=resumable.examples(),
        callbacks=[callback],
    )
    return trainer, callback.steps


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Weights]:
    """The folder of a run with checkpoints after steps 2, 4 and 6, and its final weights."""
    folder = tmp_path_factory.mktemp("finished")
    trainer, steps = _trainer(folder)
    trainer.train()
    assert steps == [0, 1, 2, 3, 4, 5]
    assert any(row.active for row in trainer.constraint_table())
    return folder, _weights(trainer.model)


@pytest.fixture
def stopped(finished: tuple[Path, Weights], tmp_path: Path) -> Path:
    """A copy of that folder as it was after step 4."""
    folder = shutil.copytree(finished[0], tmp_path / "stopped")
    shutil.rmtree(folder / "checkpoint-6")
    return folder


@pytest.fixture
def pretrained() -> Weights:
    return _weights(resumable.build())


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _run_another(folder: Path) -> None:
    trainer, _ = _trainer(folder, resumable.build(seed=1), max_steps=2)
    trainer.train()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(
            lambda folder: (folder / REFERENCE_FILE).unlink(),
            r"_reference\.safetensors are missing, and the distance of a layer can't be measured",
            id="no reference",
        ),
        pytest.param(
            _run_another,
            "has SHA-256 .* around the reference .* another run has overwritten it",
            id="reference of another run",
        ),
        pytest.param(
            lambda folder: _cut(folder / REFERENCE_FILE),
            r"_reference\.safetensors can't be read .*: restore it, or start a new run",
            id="half a reference",
        ),
        pytest.param(
            lambda folder: (folder / REFERENCE_FILE).write_bytes(b""),
            r"_reference\.safetensors can't be read .*: restore it, or start a new run",
            id="an empty reference",
        ),
        pytest.param(
            lambda folder: (folder / "checkpoint-4" / RECORD_FILE).unlink(),
            r"checkpoint-4/_constraints\.json is missing: .* Resume with layer_radius=None",
            id="no record",
        ),
        pytest.param(
            lambda folder: _cut(folder / "checkpoint-4" / RECORD_FILE),
            r"checkpoint-4/_constraints\.json is damaged .*: resume from another checkpoint",
            id="half a record",
        ),
        pytest.param(
            lambda folder: (folder / "checkpoint-4" / RECORD_FILE).write_text("{}"),
            r"checkpoint-4/_constraints\.json is damaged .*: resume from another checkpoint",
            id="an empty record",
        ),
        pytest.param(
            lambda folder: (folder / "checkpoint-4" / RECORD_FILE).write_text(
                '{"reference_sha256": 5, "radius_norm": "frobenius", "radii": {}}'
            ),
            r"checkpoint-4/_constraints\.json is damaged .*: resume from another checkpoint",
            id="a record with a number for a digest",
        ),
        pytest.param(
            lambda folder: (folder / "checkpoint-4" / RECORD_FILE).write_bytes(b"\xff"),
            r"checkpoint-4/_constraints\.json is damaged .*: resume from another checkpoint",
            id="a record that is no text",
        ),
    ],
)
def test_without_its_reference_a_run_is_not_resumed(
    stopped: Path, pretrained: Weights, damage: Callable[[Path], object], message: str
) -> None:
    damage(stopped)
    trainer, steps = _trainer(stopped)
    with pytest.raises(ReferenceMismatch, match=message):
        trainer.train(resume_from_checkpoint=True)
    assert steps == []
    # A training that starts anew has its centres at the pretrained weights.
    assert _different(_weights(trainer.model), pretrained) == []
    trainer.train()
    assert _different(trainer.constraints.reference, pretrained) == []


@pytest.mark.parametrize("built_from", ["base", "checkpoint"])
@pytest.mark.parametrize(
    "settings",
    [
        {"hessian_penalty": 0.05},
        {"l2sp_penalty": 0.5},
        {"hessian_penalty": 0.05, "l2sp_penalty": 0.5, "layer_radius": {"*query*": 0.02}},
    ],
    ids=["noise", "pull", "both, and balls"],
)
def test_a_penalized_run_is_resumed_bit_for_bit(
    tmp_path: Path, pretrained: Weights, settings: dict[str, Any], built_from: str
) -> None:
    settings = {"layer_radius": None, "gradient_accumulation_steps": 2} | settings
    whole, _ = _trainer(tmp_path, **settings)
    whole.train()
    shutil.rmtree(tmp_path / "checkpoint-6")
    model = None
    if built_from == "checkpoint":
        model = BertForSequenceClassification.from_pretrained(tmp_path / "checkpoint-4")
    trainer, steps = _trainer(tmp_path, model, **settings)
    trainer.train(resume_from_checkpoint=True)
    assert steps == [4, 5]
    assert _different(_weights(trainer.model), _weights(whole.model)) == []
    if "l2sp_penalty" in settings:
        assert trainer.constraints.reference.keys() == whole.constraints.reference.keys()
        assert _different(trainer.constraints.reference, pretrained) == []
        assert len(trainer.constraints) > len(trainer.constraints.radii)


def test_a_run_without_a_pull_is_not_resumed_with_one(tmp_path: Path) -> None:
    """Where its layers have to be pulled to was not kept, or not for all of them."""
    for radius, message in (
        (None, "Resume with layer_radius=None and l2sp_penalty=0"),
        ({"*query*": 0.02}, "no weights"),
    ):
        folder = tmp_path / str(radius is None)
        _trainer(folder, layer_radius=radius, max_steps=2)[0].train()
        trainer, steps = _trainer(folder, layer_radius=radius, l2sp_penalty=0.5)
        with pytest.raises(ReferenceMismatch, match=message):
            trainer.train(resume_from_checkpoint=True)
        assert steps == []


@pytest.mark.parametrize("trainer_class", [Trainer, HessianRegularizedTrainer], ids=["of Trainer", "without a radius"])
def test_an_unconstrained_run_is_not_resumed_with_a_radius(tmp_path: Path, trainer_class: type[Trainer]) -> None:
    """Where it started from, and so where the balls would have to be, was not kept."""
    plain = resumable.arguments(tmp_path, layer_radius=None, max_steps=2)
    trainer_class(resumable.build(), plain, train_dataset=resumable.examples()).train()
    trainer, steps = _trainer(tmp_path)
    with pytest.raises(ReferenceMismatch, match="trained without layer_radius, so its centres are not known"):
        trainer.train(resume_from_checkpoint=True)
    assert steps == []


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda state: state.unlink(), id="no state"),
        pytest.param(_cut, id="half a state"),
        pytest.param(lambda state: state.write_bytes(b""), id="an empty state"),
    ],
)
def test_a_checkpoint_that_was_cut_off_is_passed_over(
    finished: tuple[Path, Weights], stopped: Path, damage: Callable[[Path], object]
) -> None:
    damage(stopped / "checkpoint-4" / STATE_FILE)
    trainer, steps = _trainer(stopped)
    trainer.train(resume_from_checkpoint=True)
    assert steps == [2, 3, 4, 5]
    assert _different(_weights(trainer.model), finished[1]) == []


@pytest.mark.parametrize(
    ("settings", "warns"),
    [
        ({}, False),
        ({"layer_radius": 2 * resumable.RADIUS}, True),
        ({"layer_radius": {"*encoder*": resumable.RADIUS}}, True),
        ({"radius_norm": "inf_op"}, True),
    ],
    ids=["the same", "wider", "fewer", "another norm"],
)
def test_other_radii_take_effect_with_a_warning(
    stopped: Path,
    pretrained: Weights,
    caplog: pytest.LogCaptureFixture,
    settings: dict[str, Any],
    warns: bool,
) -> None:
    trainer, steps = _trainer(stopped, **settings)
    radii = trainer.constraints.radii
    with caplog.at_level(logging.WARNING, logger="hf_robust_ft"):
        trainer.train(resume_from_checkpoint=True)
    assert steps == [4, 5]
    assert ("the radii differ from those of the checkpoint" in caplog.text) == warns
    assert trainer.constraints.radii == radii
    assert _different(trainer.constraints.reference, pretrained) == []
    assert all(distance <= radii[name] for name, distance in trainer.constraints.distances().items())


@pytest.mark.parametrize("built_from", ["base", "checkpoint"])
def test_a_resumed_run_measures_from_the_pretrained_weights(
    finished: tuple[Path, Weights], stopped: Path, pretrained: Weights, built_from: str
) -> None:
    """Also where the model was built from the checkpoint, so that the Trainer first sees other weights."""
    model = None
    if built_from == "checkpoint":
        model = BertForSequenceClassification.from_pretrained(stopped / "checkpoint-4")
    trainer, steps = _trainer(stopped, model)
    trainer.train(resume_from_checkpoint=True)
    assert steps == [4, 5]
    assert _different(trainer.constraints.reference, pretrained) == []
    assert _different(_weights(trainer.model), finished[1]) == []

    table = {row.name: row.distance for row in trainer.constraint_table() if row.free is None}
    assert table == pytest.approx(_distances(trainer, pretrained))
    saved = safetensors.torch.load_file(stopped / "checkpoint-4" / "model.safetensors")
    assert table != pytest.approx(_distances(trainer, saved), rel=0.1)


def test_a_head_that_was_fresh_stays_free_where_the_model_is_built_from_the_checkpoint(tmp_path: Path) -> None:
    resumable.build().bert.save_pretrained(tmp_path / "base")
    fresh = BertForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    trainer, _ = _trainer(tmp_path / "run", fresh)
    trainer.train()
    radii = trainer.constraints.radii
    assert "classifier.weight" not in radii

    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    filled = BertForSequenceClassification.from_pretrained(tmp_path / "run" / "checkpoint-4")
    resumed, steps = _trainer(tmp_path / "run", filled)
    resumed.train(resume_from_checkpoint=True)
    assert steps == [4, 5]
    assert resumed.constraints.radii == radii
    assert _different(_weights(resumed.model), _weights(trainer.model)) == []
    resumed.train()
    assert resumed.constraints.radii == radii
    (row,) = (row for row in resumed.constraint_table() if row.name == "classifier.weight")
    assert row.free is not None
    assert row.free.startswith("freshly initialised")


def test_a_resumed_run_constrains_no_layer_whose_centre_is_lost(tmp_path: Path) -> None:
    trainer, _ = _trainer(tmp_path, layer_radius={"*.query": resumable.RADIUS}, max_steps=2)
    trainer.train()
    resumed, steps = _trainer(tmp_path)
    with pytest.raises(ReferenceMismatch, match=r"no weights for .* constrain the layers of that training"):
        resumed.train(resume_from_checkpoint=True)
    assert steps == []


@pytest.mark.parametrize("lost", ["file", "layers"])
def test_a_refused_resume_leaves_a_trainer_its_centres(tmp_path: Path, pretrained: Weights, lost: str) -> None:
    trainer, steps = _trainer(tmp_path, max_steps=2)
    trainer.train()
    radii = trainer.constraints.radii
    if lost == "file":
        (tmp_path / REFERENCE_FILE).unlink()
    else:
        shutil.rmtree(tmp_path)
        _trainer(tmp_path, layer_radius={"*.query": resumable.RADIUS}, max_steps=2)[0].train()
    with pytest.raises(ReferenceMismatch):
        trainer.train(resume_from_checkpoint=True)
    assert trainer.constraints.radii == radii
    trainer.train()
    assert steps == [0, 1, 0, 1]
    assert trainer.constraints.radii == radii
    assert _different(trainer.constraints.reference, pretrained) == []


def test_a_finished_run_is_resumed_with_no_step_more(finished: tuple[Path, Weights], stopped: Path) -> None:
    # Four steps end within an epoch of eleven.
    trainer, steps = _trainer(stopped, max_steps=4)
    trainer.train(resume_from_checkpoint=True)
    assert steps == []
    assert trainer.state.global_step == 4
    saved = safetensors.torch.load_file(stopped / "checkpoint-4" / "model.safetensors")
    assert _different(saved, _weights(trainer.model)) == []


@pytest.mark.parametrize("cut_off", [False, True])
def test_without_a_complete_checkpoint_there_is_nothing_to_resume(tmp_path: Path, cut_off: bool) -> None:
    if cut_off:
        (tmp_path / "checkpoint-2").mkdir()
    trainer, steps = _trainer(tmp_path)
    with pytest.raises(ValueError, match=r"No valid checkpoint found .* Start anew with resume_from_checkpoint=None"):
        trainer.train(resume_from_checkpoint=True)
    assert steps == []


def test_a_resumed_run_names_the_same_reference(stopped: Path) -> None:
    """So its own checkpoints can be resumed in turn."""
    records = []
    trainer, _ = _trainer(stopped)
    trainer.train(resume_from_checkpoint=True)
    for step in (4, 6):
        records.append(json.loads((stopped / f"checkpoint-{step}" / RECORD_FILE).read_text()))
    assert records[0] == records[1]


# A Trainer that trains twice


def test_a_second_training_keeps_the_first_centres(tmp_path: Path, pretrained: Weights) -> None:
    trainer, steps = _trainer(tmp_path, max_steps=3)
    trainer.train()
    after_first = _weights(trainer.model)
    trainer.train()
    assert steps == [0, 1, 2, 0, 1, 2]
    assert set(trainer.constraints.reference) <= set(_different(_weights(trainer.model), after_first))
    assert _different(trainer.constraints.reference, pretrained) == []


def test_training_on_after_resuming_keeps_the_stored_centres(stopped: Path, pretrained: Weights) -> None:
    trainer, _ = _trainer(stopped)
    trainer.train(resume_from_checkpoint=True)
    trainer.train()
    assert _different(trainer.constraints.reference, pretrained) == []


def test_model_init_gives_each_training_its_own_centres(tmp_path: Path) -> None:
    started: list[Weights] = []

    def model_init() -> BertForSequenceClassification:
        model = resumable.build(seed=len(started))
        started.append(_weights(model))
        return model

    trainer = HessianRegularizedTrainer(
        args=resumable.arguments(tmp_path, max_steps=3),
        model_init=model_init,
        train_dataset=resumable.examples(),
    )
    for _ in range(2):
        trainer.train()
        centres = trainer.constraints.reference
        assert _different(centres, started[-1]) == []
        # Every weight matrix was drawn anew.
        assert set(_different(centres, started[-2])) == set(centres)
        table = {row.name: row.distance for row in trainer.constraint_table() if row.free is None}
        assert table == pytest.approx(_distances(trainer, started[-1]))
