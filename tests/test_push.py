"""The Trainer and the Hub: what is there after training, and that no push takes a training away."""

from __future__ import annotations

import json
import logging
import os
import shlex
import socket
import subprocess
import sys
from concurrent.futures import Future
from importlib import metadata
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import tiny
from hub_client import contents, hub, point_at
from hub_server import BREAK, READ_TOKEN, TOKEN, Hub, Repo
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from hf_robust_ft import HessianRegularizedTrainer, HessianReport, PushFailed, TransitionEstimate
from hf_robust_ft.cli import main
from hf_robust_ft.hub import public_files

__all__ = ["hub"]

ID = "me/model"


def tokenizer() -> PreTrainedTokenizerFast:
    words = {"[PAD]": 0, "[UNK]": 1, "a": 2}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="[UNK]")), pad_token="[PAD]", unk_token="[UNK]"
    )


def pushing(folder: Path, **changes: Any) -> HessianRegularizedTrainer:
    return tiny.trainer(folder / "out", **{"push_to_hub": True, "hub_model_id": ID, "max_steps": 2, **changes})


def retry(said: str) -> None:
    """Run the command that a message ends with."""
    words = shlex.split(said.splitlines()[-1])
    assert words[:2] == ["hf-robust-ft", "push"]
    assert main(words[1:]) == 0


# What is pushed


@pytest.mark.slow
def test_training_ends_with_one_commit_of_all_that_belongs_to_the_model(tmp_path: Path, hub: Hub) -> None:
    trainer = pushing(
        tmp_path, hessian_examples=4, hessian_time_budget=0, noise_transition=0.2, layer_radius=0.3, save_steps=1,
        save_strategy="steps", hub_strategy="end",
    )  # fmt: skip
    trainer.processing_class = tokenizer()
    trainer.train()
    out = tmp_path / "out"
    (commit,) = hub.repos[ID].commits
    assert commit.message == "End of training"
    expected = {
        *("README.md", "robust_card.json", "hessian_report.json"),
        *("plots/hessian_by_layer.png", "plots/bounds.png", "plots/transition.png"),
        *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    }
    assert set(commit.files) == expected
    local = contents(out)
    assert commit.files == {name: local[name] for name in expected}
    # Those that must not leave are there.
    assert {"training_args.bin", "_start.safetensors", "checkpoint-2/_constraints.json"} <= set(local)
    assert trainer.hessian_report is not None
    assert HessianReport.load(out / "hessian_report.json") == trainer.hessian_report
    assert "plots/hessian_by_layer.png" in commit.files["README.md"].decode()


def test_pushing_again_is_a_commit_only_if_there_is_something_new(tmp_path: Path, hub: Hub) -> None:
    trainer = pushing(tmp_path, eval_dataset=tiny.texts(6, seed=1))
    trainer.train()
    assert trainer.push_to_hub().oid == hub.repos[ID].commits[0].oid  # scripts do it
    trainer.evaluate()
    trainer.push_to_hub(commit_message="Evaluated", tags="mine")
    assert [each.message for each in hub.repos[ID].commits] == ["End of training", "Evaluated"]
    card = huggingface_hub.ModelCard(hub.repos[ID].commits[-1].files["README.md"].decode())
    assert "mine" in card.data.tags
    assert card.data.model_name == "model"


@pytest.mark.slow
def test_an_estimate_goes_along_and_the_labels_stay(tmp_path: Path, hub: Hub) -> None:
    dataset = tiny.texts(240)
    trainer = pushing(tmp_path, noise_transition="estimate", train_dataset=dataset)
    trainer.train()
    (commit,) = hub.repos[ID].commits
    assert (tmp_path / "out" / "_label_posteriors.safetensors").is_file()
    assert not [name for name in commit.files if "posterior" in name or name.startswith("_")]
    (tmp_path / "copy.json").write_bytes(commit.files["transition_estimate.json"])
    assert trainer.noise_estimate is not None
    found = TransitionEstimate.load(tmp_path / "copy.json").transition
    assert np.array_equal(found, trainer.noise_estimate.transition)


def test_a_report_of_other_weights_is_not_pushed(tmp_path: Path, hub: Hub) -> None:
    trainer = pushing(tmp_path, push_to_hub=False)
    trainer.measure_hessian(examples=4, time_budget=0, reference=trainer.model)
    trainer.train()  # these weights were not measured
    trainer.push_to_hub()
    assert (tmp_path / "out" / "hessian_report.json").is_file()
    (commit,) = hub.repos[ID].commits
    assert "hessian_report.json" not in commit.files
    assert "not measured" in commit.files["README.md"].decode()


def test_the_name_of_the_folder_is_that_of_the_repository(tmp_path: Path, hub: Hub) -> None:
    trainer = pushing(tmp_path, hub_model_id=None, hub_private_repo=True)
    assert trainer.hub_model_id == "me/out"
    assert hub.repos["me/out"].private
    trainer.push_to_hub()
    assert len(hub.repos["me/out"].commits) == 1


def test_without_waiting(tmp_path: Path, hub: Hub) -> None:
    trainer = pushing(tmp_path, push_to_hub=False)
    future = trainer.push_to_hub(blocking=False)
    assert isinstance(future, Future)
    assert future.result(60).oid == hub.repos[ID].commits[0].oid
    hub.fail("POST", "/commit/", 409)
    trainer.args.learning_rate = 0.5  # the card tells it
    future = trainer.push_to_hub(blocking=False)
    with pytest.raises(PushFailed, match="changes the repository at the same time"):
        future.result(60)


def test_a_branch_of_ones_own(tmp_path: Path, hub: Hub) -> None:
    hub.repos[ID] = Repo()
    hub.repos[ID].branches["next"] = []
    pushing(tmp_path, hub_revision="next").train()
    assert [len(history) for history in hub.repos[ID].branches.values()] == [0, 1]


@pytest.mark.slow
def test_candidates_of_a_search_push_nothing(tmp_path: Path, hub: Hub) -> None:
    trainer = pushing(tmp_path, layer_radius="auto", eval_dataset=tiny.texts(9, seed=1))
    trainer.train()
    assert trainer.radius_choice is not None
    assert len(hub.repos[ID].commits) == 1


def test_saving_by_hand_pushes_as_in_trainer(tmp_path: Path, hub: Hub) -> None:
    trainer = pushing(tmp_path)
    trainer.save_model()
    assert [commit.message for commit in hub.repos[ID].commits] == ["Model save"]


# Failures


@pytest.mark.parametrize(
    ("failure", "cause"),
    [
        (("POST", "preupload", 401), "the access token is missing, wrong or expired"),
        (("POST", "preupload", 403), "the repository is not yours"),
        (("POST", "/commit/", 409), "something else changes the repository at the same time"),
        (("PUT", "/lfs/", 413), "a file is larger than the server takes"),
        (("PUT", "/lfs/", 500), "an error of its own"),
        (("POST", "/commit/", BREAK), "can't be reached, or the connection broke off"),
    ],
)
def test_a_push_that_fails_at_the_end_takes_nothing_away(
    failure: tuple[str, str, int], cause: str, tmp_path: Path, hub: Hub, caplog: pytest.LogCaptureFixture
) -> None:
    measured = failure[2] == 500
    trainer = pushing(
        tmp_path, hub_token=TOKEN, **({"hessian_examples": 4, "hessian_time_budget": 0} if measured else {})
    )
    hub.fail(*failure, message=f"no {TOKEN}")
    output = trainer.train()
    assert output.global_step == 2
    (said,) = [each.getMessage() for each in caplog.records if each.levelno == logging.ERROR]
    assert cause in said
    assert "Nothing is lost" in said
    assert TOKEN not in caplog.text
    assert hub.repos[ID].commits == []
    out = tmp_path / "out"
    loaded = AutoModelForSequenceClassification.from_pretrained(out)
    tiny.assert_equal_weights(loaded.state_dict(), trainer.model.state_dict())
    assert {"README.md", "robust_card.json"} <= set(contents(out))
    assert ("hessian_report.json" in contents(out)) == measured

    hub.failures.clear()
    retry(said)
    (commit,) = hub.repos[ID].commits
    assert commit.files == {name: path.read_bytes() for name, path in public_files(out).items()}


def test_pushing_by_hand_raises_once_all_is_saved(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = pushing(tmp_path, push_to_hub=False, hub_private_repo=True, hub_model_id="model")
    with socket.create_server(("127.0.0.1", 0)) as closed:
        point_at(monkeypatch, f"http://127.0.0.1:{closed.getsockname()[1]}")
    with pytest.raises(PushFailed, match=r"can't be reached, .*\. Nothing is lost: .*/out\. Try again with") as error:
        trainer.push_to_hub()
    assert {"README.md", "model.safetensors"} <= set(contents(tmp_path / "out"))
    point_at(monkeypatch, hub.url)
    retry(str(error.value))
    assert hub.repos[ID].private  # as it was asked for
    assert len(hub.repos[ID].commits) == 1
    trainer.push_to_hub()
    assert len(hub.repos[ID].commits) == 1


def test_a_card_that_fails_does_not_take_the_training_away(
    tmp_path: Path, hub: Hub, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = pushing(tmp_path)
    (tmp_path / "out" / "README.md").mkdir(parents=True)
    assert trainer.train().global_step == 2
    assert "The model was not pushed: NotWritten" in caplog.text
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert hub.repos[ID].commits == []


# Before training


@pytest.mark.parametrize("name", ["a b/c", "me/a--b", "me/model/x", "https://me:hf_abcdefghijkl@e.org/me/x"])
def test_a_name_of_no_repository_is_refused_before_training(name: str, tmp_path: Path, hub: Hub) -> None:
    with pytest.raises(
        ValueError, match=r"^hub_model_id is .*no name of a repository on the Hub; give NAME or"
    ) as error:
        pushing(tmp_path, hub_model_id=name)
    assert "hf_abc" not in str(error.value)
    assert hub.requests == []


def test_a_folder_whose_name_is_none_is_refused_before_training(tmp_path: Path, hub: Hub) -> None:
    with pytest.raises(ValueError, match=r"^output_dir, in place of hub_model_id, is 'my model', which is no name of"):
        tiny.trainer(tmp_path / "my model", push_to_hub=True)


@pytest.mark.parametrize(
    ("repo_id", "token", "exists"),
    [("somebody/model", TOKEN, False), ("somebody/model", TOKEN, True), (ID, READ_TOKEN, True)],
    ids=["new", "another's", "a token that reads"],
)
def test_a_repository_that_is_not_yours_is_refused_before_training(
    repo_id: str, token: str, exists: bool, tmp_path: Path, hub: Hub
) -> None:
    if exists:
        hub.repos[repo_id] = Repo()
    with pytest.raises(PushFailed, match=f"^{repo_id} was not pushed to: .*not yours.* Nothing has been trained yet"):
        pushing(tmp_path, hub_model_id=repo_id, hub_token=token)


def test_no_network_before_training(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        PushFailed, match=r"is offline.*or train with push_to_hub=False, and push later with trainer.push"
    ):
        pushing(tmp_path)


# During training


def in_training(folder: Path, **changes: Any) -> HessianRegularizedTrainer:
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "hub_always_push": True, "layer_radius": 0.3}
    return pushing(folder, **{**settings, **changes})


def test_checkpoints_are_pushed_without_a_card(tmp_path: Path, hub: Hub) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "README.md").write_text("# Of another training")
    in_training(tmp_path, save_total_limit=1).train()
    *during, last = hub.repos[ID].commits
    assert [commit.message for commit in during] == [f"Training in progress, step {n}" for n in (1, 2, 3)]
    assert all(set(commit.files) == {"config.json", "model.safetensors"} for commit in during)
    assert last.message == "End of training"
    assert {"README.md", "robust_card.json"} <= set(last.files)


@pytest.mark.parametrize(
    ("strategy", "under"), [("checkpoint", "last-checkpoint"), ("all_checkpoints", "checkpoint-3")]
)
def test_states_are_pushed_where_they_were_asked_for_without_the_token(
    strategy: str, under: str, tmp_path: Path, hub: Hub
) -> None:
    in_training(tmp_path, hub_strategy=strategy, hub_token=TOKEN).train()
    *during, last = hub.repos[ID].commits
    assert len(during) == 3
    assert {f"{under}/optimizer.pt", f"{under}/trainer_state.json", f"{under}/_constraints.json"} <= set(
        during[-1].files
    )
    assert not [name for name in last.files if name.endswith("training_args.bin")]
    stored = [content for commit in hub.repos[ID].commits for content in commit.files.values()]
    assert not any(TOKEN.encode() in content for content in [*stored, *hub.objects.values()])
    assert TOKEN.encode() in (tmp_path / "out" / "training_args.bin").read_bytes()  # so it had to be left out


def test_a_push_that_fails_in_training_is_told_and_harms_nothing(
    tmp_path: Path, hub: Hub, caplog: pytest.LogCaptureFixture
) -> None:
    hub.fail("POST", "/commit/", 500, times=2)
    trainer = in_training(tmp_path)
    assert trainer.train().global_step == 3
    said = [each.getMessage() for each in caplog.records if each.levelno == logging.ERROR]
    assert len(said) == 2
    assert all("error of its own" in each and "The training goes on; the next checkpoint" in each for each in said)
    assert [each.message for each in hub.repos[ID].commits] == ["Training in progress, step 3", "End of training"]


def test_a_checkpoint_that_cannot_be_pushed_harms_nothing(
    tmp_path: Path, hub: Hub, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = in_training(tmp_path)
    trainer.model.config.note = TOKEN  # type: ignore[union-attr]
    assert trainer.train().global_step == 3
    said = [each.getMessage() for each in caplog.records if each.levelno == logging.ERROR]
    assert all("'config.json' in folder" in each and "holds your access token" in each for each in said)
    assert len(said) == 4
    assert hub.repos[ID].commits == []


# All of it, in a process that knows nothing of these tests


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("given", ["HF_TOKEN", "hub_token"])
def test_train_push_and_read_back(given: str, tmp_path: Path) -> None:
    with Hub(part_size=4096) as server:
        server.fail("POST", "/commit/", 500, times=1, message=f"no {TOKEN}")
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
            **{"HF_ENDPOINT": server.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")},
            **({"HF_TOKEN": TOKEN} if given == "HF_TOKEN" else {}),
        }
        worker = Path(__file__).parent / "workers" / "pushing.py"
        command = [sys.executable, str(worker), str(tmp_path), *([TOKEN] if given == "hub_token" else [])]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stderr
        found = json.loads((tmp_path / "found.json").read_text())
        (commit,) = server.repos[ID].commits

    assert found["weights_equal"]
    assert found["words"] == 3
    assert found["card_name"] == "model"
    assert {"accuracy", "hessian_total"} <= set(found["metrics"])
    assert found["report_layers"] > 0
    assert found["commit"] == commit.oid
    assert "has an error of its own" in ended.stderr  # the first try
    files = {
        **commit.files,
        **{f"local/{k}": v for k, v in contents(tmp_path / "out").items() if k != "training_args.bin"},
    }
    assert not [name for name, content in files.items() if TOKEN.encode() in content]
    assert TOKEN not in ended.stdout + ended.stderr
    assert metadata.version("torch") in commit.files["README.md"].decode()
