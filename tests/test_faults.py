"""What kills a run, fills its disk or damages its files costs at most the steps since the last checkpoint."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import killed
import pytest
import safetensors.torch
import tiny
import torch
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import BertForSequenceClassification, Trainer, TrainerCallback, TrainerControl, TrainerState
from workers import resumable

from hf_robust_ft import HessianRegularizedTrainer, HessianReport, NotWritten, RobustTrainingArguments
from hf_robust_ft.checkpoint import (
    STATE_FILE,
    UNFINISHED_FILE,
    ConstraintRecord,
    check_fits,
    is_complete,
    last_complete_checkpoint,
)
from hf_robust_ft.hessian_measurement import FILE as REPORT_FILE
from hf_robust_ft.hessian_measurement import load_start
from hf_robust_ft.interruption import ECHO
from hf_robust_ft.reference import load_reference

Weights = dict[str, Tensor]

# SIGKILL in training, in measuring, and in saving

ROUNDS = 20


def _check_whole(folder: Path, start: Weights) -> None:
    """Every file under its final name is whole, and what a run began with is what it was."""
    checkpoints = [path for path in folder.glob("checkpoint-*") if is_complete(path)]
    newest = last_complete_checkpoint(folder)
    assert (newest is None) == (not checkpoints)
    incomplete = {path for path in folder.glob("checkpoint-*") if path not in checkpoints}
    for path in folder.rglob("*"):
        below = path.relative_to(folder).parts
        if path.is_dir() or below[0].startswith(".") or incomplete.intersection(path.parents) or below[-1][0] == ".":
            continue
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".safetensors" and path.name != resumable.FINAL_FILE:
            safetensors.torch.load_file(path)
        elif path.suffix in (".pt", ".pth"):
            torch.load(path, weights_only=False)
    if (folder / REPORT_FILE).exists():
        assert HessianReport.load(folder / REPORT_FILE).complete
    for checkpoint in checkpoints:
        record = ConstraintRecord.load(checkpoint)
        reference = load_reference(folder, record.reference_sha256)
        assert not _different(reference, start)
        assert not _different(load_start(checkpoint), start)


def _different(got: Weights, expected: Weights) -> list[str]:
    return [name for name, weight in got.items() if not torch.equal(weight, expected[name])]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Weights, Weights]:
    """The weights before and after a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    final = killed.finish(killed.start(folder, 1, measured=True), folder)
    return resumable.build().state_dict(), final


@pytest.mark.slow
def test_after_twenty_kills_every_file_is_whole_and_the_run_ends_as_it_would_have(
    whole: tuple[Weights, Weights], tmp_path: Path
) -> None:
    start, expected = whole
    moment = random.Random(0)
    rounds, runs = 0, 0
    while rounds < ROUNDS:
        folder = tmp_path / str(runs)
        for _ in range(min(4, ROUNDS - rounds)):
            stopped = killed.killed(killed.start(folder, 1, measured=True), folder, moment, most=14, seconds=0.3)
            _check_whole(folder, start)
            if not stopped:
                break
            rounds += 1
        assert not _different(killed.finish(killed.start(folder, 1, measured=True), folder), expected)
        _check_whole(folder, start)
        assert (folder / REPORT_FILE).is_file()
        runs += 1


# Ctrl-C


class At(TrainerCallback):
    """Sends this process SIGINT, at an event of a step; once, or twice with time between."""

    def __init__(self, event: str, step: int, times: int = 1) -> None:
        self.begun: list[int] = []
        self.step, self.times = step, times
        setattr(self, event, self.interrupt)

    def on_step_begin(
        self, args: RobustTrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.begun.append(state.global_step)

    def interrupt(
        self, args: RobustTrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == self.step:
            for _ in range(self.times):
                signal.raise_signal(signal.SIGINT)
                time.sleep(1.2 * ECHO if self.times > 1 else 0)


def _trainer(folder: Path, *callbacks: TrainerCallback, **settings: Any) -> HessianRegularizedTrainer:
    """Of the model that all runs start from, with dropout; 11 batches an epoch."""
    return HessianRegularizedTrainer(
        resumable.build(),
        resumable.arguments(folder, **({"max_steps": 6, "save_strategy": "no"} | settings)),
        train_dataset=resumable.examples(),
        eval_dataset=resumable.examples(5),
        callbacks=list(callbacks),
    )


def _trained(folder: Path, **settings: Any) -> Weights:
    trainer = _trainer(folder, **settings)
    trainer.train()
    return tiny.weights(trainer.model)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("again", ["anew", "by the same Trainer"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2},
        {"save_strategy": "steps", "save_steps": 4, "noise_transition": None, "layer_radius": None},
    ],
    ids=["nothing saved", "saved at that step", "all features off"],
)
def test_ctrl_c_saves_and_a_resumed_run_goes_on_exactly(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], settings: dict[str, Any], again: str
) -> None:
    expected = _trained(tmp_path / "whole", **settings)
    run = tmp_path / "run"
    stopping = At("on_pre_optimizer_step", 2)
    trainer = _trainer(run, stopping, hessian_examples=2, **settings)
    with pytest.raises(
        KeyboardInterrupt, match=r"after step 3 of 6, and saved in .*run/checkpoint-3\. Go on with trainer\.train\(resu"
    ):
        trainer.train()
    assert stopping.begun == [0, 1, 2]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert "Ctrl-C: training stops after this step and saves a checkpoint" in capfd.readouterr().err
    assert trainer.hessian_report is None
    assert last_complete_checkpoint(run) == str(run / "checkpoint-3")
    if again == "anew":
        stopping = At("on_train_end", -1)
        trainer = _trainer(run, stopping, hessian_examples=2, **settings)
    trainer.train(resume_from_checkpoint=True)
    assert stopping.begun[-3:] == [3, 4, 5]
    assert not _different(tiny.weights(trainer.model), expected)
    assert trainer.hessian_report is not None


@pytest.mark.usefixtures("interruptible")
def test_a_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, At("on_pre_optimizer_step", 2, times=2), save_strategy="steps", save_steps=2)
    with pytest.raises(KeyboardInterrupt) as error:
        trainer.train()
    assert "saved" not in str(error.value)
    assert trainer.state.global_step == 2
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


@pytest.mark.usefixtures("interruptible")
def test_one_ctrl_c_that_arrives_twice_counts_once(tmp_path: Path) -> None:
    """From the terminal, and from a launcher that passes it on."""
    first, second = At("on_pre_optimizer_step", 2), At("on_pre_optimizer_step", 2)
    with pytest.raises(KeyboardInterrupt, match="after step 3 of 6"):
        _trainer(tmp_path, first, second).train()


@pytest.mark.usefixtures("interruptible")
def test_an_epoch_that_is_over_is_evaluated_before_the_run_stops(tmp_path: Path) -> None:
    """A resumed run begins with the next epoch, and would not know which was best."""
    settings: dict[str, Any] = {
        "max_steps": 22,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "load_best_model_at_end": True,
    }
    expected = _trained(tmp_path / "whole", **settings)
    run = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt, match="after step 11 of 22"):
        _trainer(run, At("on_step_begin", 10), **settings).train()
    state = TrainerState.load_from_json(str(run / "checkpoint-11" / STATE_FILE))
    assert state.best_global_step == 11
    trainer = _trainer(run, **settings)
    trainer.train(resume_from_checkpoint=True)
    assert not _different(tiny.weights(trainer.model), expected)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_once_all_steps_are_done_leaves_the_model(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, At("on_train_end", 6), hessian_examples=2)
    with pytest.raises(KeyboardInterrupt, match=r"all steps were done; the model is in .*, neither measured"):
        trainer.train()
    assert not _different(safetensors.torch.load_file(tmp_path / "model.safetensors"), tiny.weights(trainer.model))
    assert trainer.hessian_report is None


@pytest.mark.usefixtures("interruptible")
def test_a_handler_of_the_script_stays_in_charge(tmp_path: Path) -> None:
    seen: list[int] = []

    def handler(number: int, frame: Any) -> None:
        seen.append(number)

    signal.signal(signal.SIGINT, handler)
    trainer = _trainer(tmp_path, At("on_step_begin", 2))
    trainer.train()
    assert seen == [signal.SIGINT]
    assert trainer.state.global_step == 6
    assert signal.getsignal(signal.SIGINT) is handler


def test_training_in_another_thread_leaves_signals_alone(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    trainer = _trainer(tmp_path)
    thread = threading.Thread(target=trainer.train)
    thread.start()
    thread.join()
    assert trainer.state.global_step == 6
    assert signal.getsignal(signal.SIGINT) is before


class Interrupting(list[dict[str, Tensor]]):
    """Examples of which some sends SIGINT when it is read, by a measurement."""

    def __init__(self) -> None:
        super().__init__(resumable.examples())
        self.read = 0
        self.at = -1

    def __getitem__(self, index: Any) -> Any:
        self.read += 1
        if self.read == self.at:
            signal.raise_signal(signal.SIGINT)
        return super().__getitem__(index)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("example", [1, 6], ids=["before any", "after some"])
def test_ctrl_c_in_the_last_measurement_ends_the_script_once_all_is_saved(tmp_path: Path, example: int) -> None:
    trainer = _trainer(tmp_path, hessian_examples=8, per_device_eval_batch_size=2, hessian_time_budget=0)
    trainer.train_dataset = data = Interrupting()

    class Armed(TrainerCallback):
        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            data.at = data.read + example

    trainer.add_callback(Armed())
    with pytest.raises(KeyboardInterrupt, match=r"cut short; trainer\.measure_hessian\(\) measures anew"):
        trainer.train()
    assert not _different(safetensors.torch.load_file(tmp_path / "model.safetensors"), tiny.weights(trainer.model))
    if example == 1:
        assert not (tmp_path / REPORT_FILE).exists()
    else:
        report = HessianReport.load(tmp_path / REPORT_FILE)
        assert (report.complete, report.examples) == (False, 4)
        assert trainer.hessian_report == report


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_in_a_measurement_during_training_cuts_it_short_and_saves_the_training(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "hessian_every": 1,
        "hessian_examples": 8,
        "hessian_time_budget": 0,
        "per_device_eval_batch_size": 2,
    }
    expected = _trained(tmp_path / "whole", **settings)
    run = tmp_path / "run"
    trainer = _trainer(run, **settings)
    trainer.train_dataset = data = Interrupting()

    class Armed(TrainerCallback):
        def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
            data.at = data.read + 6

    trainer.add_callback(Armed())
    with pytest.raises(KeyboardInterrupt, match="after step 2 of 6"):
        trainer.train()
    assert not HessianReport.load(run / REPORT_FILE).complete
    trainer = _trainer(run, **settings)
    trainer.train(resume_from_checkpoint=True)
    assert not _different(tiny.weights(trainer.model), expected)
    assert HessianReport.load(run / REPORT_FILE).complete


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_in_a_candidate_of_a_radius_stops_at_once(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, layer_radius="auto", noise_transition=None)
    start = tiny.weights(trainer.model)
    trainer.train_dataset = data = Interrupting()
    data.at = 6
    with pytest.raises(KeyboardInterrupt) as error:
        trainer.train()
    assert "saved" not in str(error.value)
    assert not list(tmp_path.iterdir())
    assert not _different(tiny.weights(trainer.model), start)


# A disk that is full, or may only be read


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """A function that mounts a small disk in memory, or mounts it anew with other options."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = False

    def mount(options: str) -> Path:
        nonlocal mounted
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True
        )
        if done.returncode != 0:
            pytest.skip(f"mounting is not permitted: {done.stderr.strip()}")
        mounted = True
        return folder

    yield mount
    if mounted:
        # Later, where the traceback of a failed torch.save still holds its file.
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _fill(folder: Path, leave: int) -> Path:
    """A file that leaves so many bytes of a disk."""
    filler = folder / "filler"
    with open(filler, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"\0" * 4096) == 4096:
            pass
    os.truncate(filler, max(filler.stat().st_size - leave, 0))
    return filler


def test_a_checkpoint_that_does_not_fit_says_so_and_leaves_the_ones_before(disk: Callable[..., Path]) -> None:
    folder = disk("size=4m")
    run = folder / "run"

    class Fill(TrainerCallback):
        def on_save(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
            _fill(folder, 50_000)

    trainer = _trainer(run, Fill(), save_strategy="steps", save_steps=2)
    with pytest.raises(
        NotWritten,
        match=r"run/checkpoint-4 was not written \(.*; 0\.0 MB are free there\)\. Make room, and go on from "
        r".*run/checkpoint-2 with trainer\.train\(resume_from_checkpoint=True\)",
    ):
        trainer.train()
    assert not (run / "checkpoint-4").exists()
    assert last_complete_checkpoint(run) == str(run / "checkpoint-2")
    (folder / "filler").unlink()
    trainer = _trainer(run, save_strategy="steps", save_steps=2)
    trainer.train(resume_from_checkpoint=True)
    assert not _different(tiny.weights(trainer.model), _trained(folder / "whole"))


def test_a_first_checkpoint_that_does_not_fit_says_how_to_keep_the_model(disk: Callable[..., Path]) -> None:
    folder = disk("size=24k")
    with pytest.raises(NotWritten, match=r"There is no earlier checkpoint\. trainer\.save_model\(another folder\)"):
        _trainer(folder, save_strategy="steps", save_steps=2, layer_radius=None).train()
    assert not list(folder.glob("checkpoint-*"))


def test_a_disk_that_fills_at_the_end_costs_no_result(
    disk: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = disk("size=4m")
    run = folder / "run"
    trainer = _trainer(run, hessian_examples=2, hessian_time_budget=0)
    trainer.train()
    before = {path.name: path.read_bytes() for path in run.iterdir()}

    class Fill(TrainerCallback):
        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            _fill(folder, 4096)

    trainer = _trainer(run, Fill(), hessian_examples=2, hessian_time_budget=0, max_steps=4)
    trainer.train()
    assert "The trained model was not saved:" in caplog.text
    assert "It is in memory: call trainer.save_model()" in caplog.text
    assert "hessian_report.json was not written" in caplog.text
    assert "trainer.hessian_report has the report: trainer.hessian_report.save(path)" in caplog.text
    assert trainer.state.global_step == 4
    assert trainer.hessian_report is not None
    # What an earlier training had left there is as it was, and nothing half-written beside it.
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    with pytest.raises(NotWritten, match=r"README\.md was not written|robust_card\.json was not written|hessian_rep"):
        trainer.create_model_card()
    trainer.hessian_report.save(tmp_path / "elsewhere.json")
    (folder / "filler").unlink()
    trainer.save_model()
    assert not _different(safetensors.torch.load_file(run / "model.safetensors"), tiny.weights(trainer.model))


def _read_only(disk: Callable[..., Path], tmp_path: Path) -> Path:
    folder = disk("size=1m")
    disk("remount,ro")
    return folder / "run"


def _read_only_but_there(disk: Callable[..., Path], tmp_path: Path) -> Path:
    folder = disk("size=1m")
    (folder / "run").mkdir()
    disk("remount,ro")
    return folder / "run"


def _a_file(disk: Callable[..., Path], tmp_path: Path) -> Path:
    (tmp_path / "run").touch()
    return tmp_path / "run"


def _below_a_file(disk: Callable[..., Path], tmp_path: Path) -> Path:
    return _a_file(disk, tmp_path) / "run"


@pytest.mark.parametrize("place", [_read_only, _read_only_but_there, _a_file, _below_a_file])
def test_an_output_folder_that_cannot_be_is_refused_before_the_first_step(
    disk: Callable[..., Path], tmp_path: Path, place: Callable[..., Path]
) -> None:
    folder, begun = place(disk, tmp_path), At("on_train_end", -1)
    with pytest.raises(NotWritten, match=f"output_dir is '{folder}', where nothing can be written .*; give a folder"):
        _trainer(folder, begun, save_strategy="epoch").train()
    assert begun.begun == []


def test_what_saves_nothing_needs_no_folder_that_can_be_written_to(disk: Callable[..., Path], tmp_path: Path) -> None:
    trainer = _trainer(_read_only_but_there(disk, tmp_path))
    trainer.train()
    assert trainer.state.global_step == 6


# Damaged files, and those of another model


def test_a_checkpoint_that_lacks_a_file_or_half_of_one_is_passed_over(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    _trainer(tmp_path / "ours", **settings).train()
    arguments = resumable.arguments(tmp_path / "trainer", noise_transition=None, layer_radius=None, **settings)
    Trainer(resumable.build(), arguments, train_dataset=resumable.examples()).train()
    for kind, names in {
        "ours": ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", STATE_FILE),
        "trainer": ("model.safetensors", STATE_FILE),  # it keeps no record of the others
    }.items():
        run = tmp_path / kind
        assert last_complete_checkpoint(run) == str(run / "checkpoint-4")
        for name in names:
            path = run / "checkpoint-4" / name
            content = path.read_bytes()
            path.unlink()
            assert last_complete_checkpoint(run) == str(run / "checkpoint-2"), name
            path.write_bytes(content[: len(content) // 2])
            assert last_complete_checkpoint(run) == str(run / "checkpoint-2"), name
            path.write_bytes(content)
    # A file of torch.save that is cut off shows it, too.
    (tmp_path / "trainer" / "checkpoint-4" / "optimizer.pt").write_bytes(b"\x80")
    assert last_complete_checkpoint(tmp_path / "trainer") == str(tmp_path / "trainer" / "checkpoint-2")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"hidden_size": 32},
            r"another model than this BertFor.*: .* has shape \(40, 16\) there, \(40, 32\) here, and",
        ),
        ({"num_hidden_layers": 2}, r"another model .*: it lacks bert\.encoder\.layer\.1\..*, and 15 more\. Give the"),
        ({"num_hidden_layers": 0}, r"another model .*: the model has no bert\.encoder\.layer\.0\..* Give the checkpoi"),
    ],
    ids=["wider", "deeper", "less deep"],
)
@pytest.mark.parametrize("radius", [None, resumable.RADIUS])
def test_a_checkpoint_of_another_model_is_refused_and_nothing_is_overwritten(
    tmp_path: Path, changes: dict[str, int], message: str, radius: float | None
) -> None:
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2, "layer_radius": radius}
    _trainer(tmp_path, **settings).train()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    config = resumable.build().config
    vars(config).update(changes)
    model = BertForSequenceClassification(config)
    start, begun = tiny.weights(model), At("on_train_end", -1)
    arguments = resumable.arguments(tmp_path, **settings | {"max_steps": 4})
    trainer = HessianRegularizedTrainer(model, arguments, train_dataset=resumable.examples(), callbacks=[begun])
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=True)
    assert begun.begun == []
    assert not _different(tiny.weights(model), start)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_what_a_killed_run_left_goes_before_it_counts_as_a_checkpoint(tmp_path: Path) -> None:
    """Of checkpoints of the same second ``Trainer`` keeps that of the highest step, whole or not."""
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
    _trainer(tmp_path, **settings, max_steps=2).train()
    half = tmp_path / "checkpoint-8"
    half.mkdir()
    (half / UNFINISHED_FILE).touch()
    (half / "model.safetensors").write_bytes(b"half")
    other = tmp_path / "old-checkpoint-8"  # not ours
    other.mkdir()
    (other / UNFINISHED_FILE).touch()
    _trainer(tmp_path, **settings, max_steps=4).train(resume_from_checkpoint=True)
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    assert not half.exists()
    assert other.exists()


def test_a_buffer_that_grows_is_no_other_model(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 3)
    model.register_buffer("seen", torch.zeros(12))
    safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")
    model.seen = torch.zeros(0)
    check_fits(tmp_path, model)
    with pytest.raises(ValueError, match=r"another model than this Linear: weight has shape \(3, 2\) there"):
        check_fits(tmp_path, torch.nn.Linear(4, 3))


def test_a_missing_weight_shows_through_activation_checkpointing(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), checkpoint_wrapper(torch.nn.Linear(4, 2)))
    assert "1._checkpoint_wrapped_module.weight" in dict(model.named_parameters())
    safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")
    check_fits(tmp_path, model)
    rest = {name: weight for name, weight in model.state_dict().items() if name != "1.weight"}
    safetensors.torch.save_file(rest, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"it lacks 1\.weight"):
        check_fits(tmp_path, model)
