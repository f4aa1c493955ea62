"""What a push takes of a folder, what the Hub then holds, and what a push that fails says and leaves."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shlex
import socket
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import huggingface_hub.utils._http
import numpy as np
import pytest
import safetensors.numpy
from hub_client import contents, hub, point_at
from hub_server import BREAK, READ_TOKEN, TOKEN, Hub, Repo

from hf_robust_ft import CardData, PushFailed, push_folder
from hf_robust_ft.cli import main
from hf_robust_ft.hub import check_repo_id, public_files
from hf_robust_ft.redaction import redacted

__all__ = ["hub"]

ID = "me/model"
PUBLIC = [
    "LICENSE",
    "README.md",
    "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
    "additional_chat_templates/tool.jinja",
    "config.json",
    "eval_results.json",
    "hessian_report.json",
    "merges.txt",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
    "modeling_mine.py",
    "plots/bounds.png",
    "robust_card.json",
    "spiece.model",
    "tokenizer.json",
    "transition_estimate.json",
]
PRIVATE = [
    ".env",
    ".git/config",
    "README.md.tmp",
    "_label_posteriors.safetensors",
    "_reference.safetensors",
    "_start.safetensors",
    "adapter/_reference.safetensors",
    "checkpoint-3/_constraints.json",
    "checkpoint-3/config.json",
    "checkpoint-3/model.safetensors",
    "data/config.csv",
    "data/train.json",
    "diagnosis.json",
    "optimizer.bin",
    "optimizer.pt",
    "plots/photo.png",
    "predictions.csv",
    "rng_state.pth",
    "run-0/checkpoint-3/model.safetensors",
    "run-0/config.json",
    "runs/host/events.out.tfevents.1",
    "scheduler.pt",
    "suspects.csv",
    "train.log",
    "train.parquet",
    "trainer_state.json",
    "training_args.bin",
]


def lay(folder: Path, names: list[str]) -> Path:
    """Files whose content is their name; a card that names its reports, where a card is among them."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"--- {name} ---" if name != "README.md" else "---\nlicense: mit\n---\n# A model\n")
    if "robust_card.json" in names:
        CardData(
            report="hessian_report.json" if "hessian_report.json" in names else None,
            estimate="transition_estimate.json" if "transition_estimate.json" in names else None,
        ).save(folder / "robust_card.json")
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with two files for LFS, and a name that a shell would take apart."""
    folder = lay(tmp_path / "my model", ["README.md", "config.json", "robust_card.json", "_reference.safetensors"])
    for i in (1, 2):
        weights = {f"w{i}": np.full((40, 40), i, dtype=np.float32)}
        safetensors.numpy.save_file(weights, folder / f"model-{i}.safetensors")
    return folder


def run(command: str) -> int:
    """A command of a message, through argparse."""
    words = shlex.split(command)
    assert words[:2] == ["hf-robust-ft", "push"]
    return main(words[1:])


def last_line(error: Any) -> str:
    return str(error.value if hasattr(error, "value") else error).splitlines()[-1].strip()


# What leaves the machine


def test_a_push_takes_the_model_and_its_card_and_nothing_else(tmp_path: Path) -> None:
    lay(tmp_path, PUBLIC + PRIVATE)
    assert sorted(public_files(tmp_path)) == PUBLIC
    of_the_card = {
        "README.md",
        "hessian_report.json",
        "plots/bounds.png",
        "robust_card.json",
        "transition_estimate.json",
    }
    assert set(public_files(tmp_path)) - set(public_files(tmp_path, card=False)) == of_the_card


def test_reports_that_the_card_does_not_speak_of_stay(tmp_path: Path) -> None:
    lay(tmp_path, ["robust_card.json", "model.safetensors"])
    lay(tmp_path, ["hessian_report.json", "transition_estimate.json"])
    assert sorted(public_files(tmp_path)) == ["model.safetensors", "robust_card.json"]
    (tmp_path / "robust_card.json").unlink()  # a report without a card speaks for itself
    assert sorted(public_files(tmp_path)) == ["hessian_report.json", "model.safetensors", "transition_estimate.json"]


@pytest.mark.parametrize("content", ["{", "[1]", '"text"'])
def test_a_damaged_card_is_refused(tmp_path: Path, content: str) -> None:
    lay(tmp_path, ["model.safetensors"])
    (tmp_path / "robust_card.json").write_text(content)
    with pytest.raises(ValueError, match=r"robust_card\.json is damaged .* make the card again, or remove"):
        public_files(tmp_path)


def test_a_folder_that_is_none_or_holds_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"folder '.*/nothing' does not exist; give the output folder"):
        push_folder(tmp_path / "nothing", ID)
    lay(tmp_path, ["config.json", "train.txt", "training_args.bin", "_reference.safetensors"])
    with pytest.raises(
        ValueError, match=r"holds no weights \(\*\.safetensors or \*\.bin\); give that of a saved model"
    ):
        push_folder(tmp_path, ID)


def test_a_file_with_the_token_in_it_is_refused(model: Path, hub: Hub) -> None:
    (model / "config.json").write_text(json.dumps({"auth": TOKEN}))
    with pytest.raises(ValueError, match=r"'config\.json' in folder .* holds your access token: take it out") as error:
        push_folder(model, ID)
    assert TOKEN not in str(error.value)
    assert hub.requests == []
    (model / "config.json").write_text('{"auth": "given-token-of-mine"}')
    with pytest.raises(ValueError, match="holds your access token"):
        push_folder(model, ID, token="given-token-of-mine")


@pytest.mark.parametrize(
    "repo_id",
    ["", "a b", "me/", "/model", "datasets/me/model", "me/a--b", "me/..", "-a", "a" * 97, "model.git", "https://e.org/a",
     "https://me:hf_abcdefghijkl@e.org/me/model", f"me/{TOKEN}/x"],
)  # fmt: skip
def test_names_of_no_repository_are_refused(
    repo_id: str, model: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        ValueError, match=r"(?s)^repo_id is .* no name of a repository on the Hub; give NAME or OWNER/N"
    ) as e:
        push_folder(model, repo_id)
    assert hub.requests == []
    assert "hf_abc" not in str(e.value)
    assert TOKEN not in str(e.value)


@pytest.mark.parametrize("repo_id", ["model", "me/model", "Me-1/a.b_c", "a" * 96])
def test_names_of_repositories_are_not(repo_id: str) -> None:
    check_repo_id(repo_id, "repo_id")


# One commit


@pytest.mark.parametrize("part_size", [2**30, 1000], ids=["whole", "in parts"])
def test_a_folder_is_pushed_in_one_commit(model: Path, hub: Hub, part_size: int) -> None:
    hub.part_size = part_size
    commit = push_folder(model, "model", message="First")
    (only,) = hub.repos[ID].commits
    assert (only.oid, only.message) == (commit.oid, "First")
    local = contents(model)
    assert only.files == {name: local[name] for name in public_files(model)}
    assert sorted(only.pointers) == ["model-1.safetensors", "model-2.safetensors"]
    assert "_reference.safetensors" in local
    assert (hub.count("PUT /lfs/") > 2) == (part_size == 1000)
    assert hub.tokens == {TOKEN, None}  # the storage is given none


def test_what_the_hub_has_is_not_sent_again(model: Path, hub: Hub) -> None:
    push_folder(model, ID)
    uploads = hub.count("PUT")
    again = push_folder(model, ID)
    assert len(hub.repos[ID].commits) == 1
    assert again.oid == hub.repos[ID].commits[0].oid
    (model / "config.json").write_text("{}")
    push_folder(model, ID)
    assert len(hub.repos[ID].commits) == 2
    assert hub.count("PUT") == uploads


def test_what_an_earlier_card_spoke_of_goes_in_the_same_commit(model: Path, hub: Hub) -> None:
    lay(model, ["hessian_report.json", "plots/bounds.png", "notes.txt"])
    CardData(report="hessian_report.json").save(model / "robust_card.json")
    push_folder(model, ID)
    CardData().save(model / "robust_card.json")
    for name in ("plots/bounds.png", "notes.txt"):
        (model / name).unlink()
    push_folder(model, ID)
    first, second = hub.repos[ID].commits
    assert set(first.files) - set(second.files) == {"hessian_report.json", "plots/bounds.png"}  # notes are the user's


def test_privacy_and_branch(model: Path, hub: Hub) -> None:
    with pytest.raises(PushFailed, match="no such repository or branch") as error:
        push_folder(model, ID, private=True, revision="next")
    assert hub.repos[ID].private
    hub.repos[ID].branches["next"] = []
    assert last_line(error) == f"hf-robust-ft push '{model}' --repo-id me/model --revision next --private"
    assert run(last_line(error)) == 0
    assert (len(hub.repos[ID].commits), len(hub.repos[ID].branches["next"])) == (0, 1)


# Failures

FAILURES: list[Any] = [
    pytest.param(("POST", "repos/create", 401), r"token is missing, wrong or expired; `hf auth login`", id="401"),
    pytest.param(("POST", "repos/create", 403), r"not yours, or the token can only read", id="403 at creation"),
    pytest.param(("POST", "preupload", 403), r"may not write there: the repository is not yours", id="403 at upload"),
    pytest.param(("POST", "preupload", 404), r"no such repository or branch", id="404"),
    pytest.param(("POST", "/commit/", 409), r"changes the repository at the same time; .*status 409", id="409"),
    pytest.param(("POST", "/commit/", 412), r"changes the repository at the same time; .*status 412", id="412"),
    pytest.param(
        ("PUT", "/lfs/", 413), r"model-\d.safetensors.*larger than the server takes; .*max_shard", id="413, LFS"
    ),
    pytest.param(("POST", "/commit/", 413), r"larger than the server takes", id="413, commit"),
    pytest.param(("POST", "preupload", 429), r"too many requests", id="429"),
    pytest.param(("POST", "/commit/", 500), r"error of its own; try again later \(status 500", id="500, commit"),
    pytest.param(("PUT", "SECOND", 503), r"model-2.safetensors.*error of its own.*status 503", id="503, half way"),
    pytest.param(("POST", "/batch", 502), r"error of its own.*status 502", id="502"),
    pytest.param(("POST", "verify", 500), r"error of its own", id="500, verify"),
    pytest.param(
        ("PUT", "SECOND", BREAK), r"model-2.*127.0.0.1:\d+ can't be reached, or the conn", id="broken half way"
    ),
    pytest.param(("POST", "/commit/", BREAK), r"can't be reached, or the connection broke off", id="broken at the end"),
    pytest.param(("POST", "/commit/", 400), r"refuses what was sent", id="400"),
    pytest.param(("POST", "/commit/", 402), r"payment", id="402"),
    pytest.param(("POST", "/commit/", 418), r"refuses it \(status 418", id="another"),
]


@pytest.mark.parametrize(("failure", "cause"), FAILURES)
def test_a_push_that_fails_loses_nothing_and_says_why_and_what_to_do(
    failure: tuple[str, str, int], cause: str, model: Path, hub: Hub, caplog: pytest.LogCaptureFixture
) -> None:
    method, part, status = failure
    second = hashlib.sha256((model / "model-2.safetensors").read_bytes()).hexdigest()
    # The server repeats what it was sent, token and all.
    hub.fail(method, second if part == "SECOND" else part, status, message=f"no: Bearer {TOKEN}\nfor you")
    before = contents(model)
    with caplog.at_level(logging.DEBUG), pytest.raises(PushFailed, match=cause) as error:
        push_folder(model, "model")
    said = str(error.value)
    assert said.startswith("model was not pushed to: ")
    assert f"Nothing is lost: all that is to be pushed lies in {model}. Try again with\n" in said
    assert (status == BREAK) or "(status" in said
    assert (status == BREAK) or 'the server says: "no: Bearer *** for you"' in said
    assert TOKEN not in said + caplog.text
    assert error.value.__context__ is None  # whose message has the token
    assert contents(model) == before
    assert not any(repo.commits for repo in hub.repos.values())
    if part == "SECOND":
        assert len(hub.objects) == 1  # the other half

    hub.failures.clear()
    uploaded = len(hub.objects)
    assert run(last_line(error)) == 0
    (only,) = hub.repos[ID].commits
    assert only.files == {name: before[name] for name in public_files(model)}
    assert len(hub.objects) == 2 >= uploaded


def test_a_commit_whose_answer_was_lost_is_not_made_twice(
    model: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    push_folder(model, ID)
    hub.fail("POST", "/commit/", BREAK)  # would be asked if there were anything to commit
    push_folder(model, ID)
    assert len(hub.repos[ID].commits) == 1


def test_errors_that_pass_are_waited_for(model: Path, hub: Hub) -> None:
    hub.fail("PUT", "/lfs/", 503, times=3)
    hub.fail("PUT", "/lfs/", BREAK, times=2)
    push_folder(model, ID)
    assert len(hub.repos[ID].commits) == 1


@pytest.mark.parametrize("exists", [False, True], ids=["new", "there"])
@pytest.mark.parametrize("token", [TOKEN, READ_TOKEN], ids=["another's", "a token that reads"])
def test_a_repository_that_is_not_yours(
    exists: bool, token: str, model: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo_id = "somebody/model" if token == TOKEN else ID
    if exists:
        hub.repos[repo_id] = Repo()
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(
        PushFailed, match=f"^{repo_id} was not pushed to: the access token may not write there: the rep"
    ):
        push_folder(model, repo_id)
    assert not any(repo.commits for repo in hub.repos.values())
    assert hub.objects == {}


@pytest.mark.parametrize("token", [None, "a-wrong-token-of-somebody"])
def test_without_a_token_that_the_hub_knows(
    token: str | None, model: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_STORED_TOKENS_PATH", str(tmp_path / "none"))
    with pytest.raises(PushFailed, match="access token is missing, wrong or expired; `hf auth login` makes") as error:
        push_folder(model, ID, token=token)
    assert "a-wrong-token" not in str(error.value)
    push_folder(model, ID, token=TOKEN)


def test_no_network(model: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    point_at(monkeypatch, f"http://127.0.0.1:{port}")
    with pytest.raises(PushFailed, match=rf"http://127.0.0.1:{port} can't be reached, .*: ConnectError") as error:
        push_folder(model, ID)
    point_at(monkeypatch, hub.url)
    assert run(last_line(error)) == 0


def test_offline(model: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PushFailed, match="huggingface_hub is offline, by the variable HF_HUB_OFFLINE"):
        push_folder(model, ID)


def test_the_storage_of_the_hub_fails(model: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("hf_xet")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", False)
    hub.fail("GET", "xet-write-token", 403)
    with pytest.raises(PushFailed, match=r"was not pushed to: .*403 Forbidden.*Nothing is lost") as error:
        push_folder(model, ID)
    assert TOKEN not in str(error.value)
    assert hub.repos[ID].commits == []


def test_a_card_with_a_damaged_head(model: Path, hub: Hub) -> None:
    (model / "README.md").write_text("---\nlicense: [\n---\n")
    with pytest.raises(PushFailed, match=r"Invalid metadata in README\.md.*the head is no YAML"):
        push_folder(model, ID)
    assert hub.repos[ID].commits == []


def test_an_answer_of_something_that_is_no_hub(model: Path, hub: Hub) -> None:
    hub.fail("POST", "validate-yaml", 200, message="")
    hub.fail("POST", "preupload", 200, message="")
    with pytest.raises(PushFailed, match="ValueError: preupload_info is improperly formatted"):
        push_folder(model, ID)


# Secrets


def test_a_token_in_the_address_of_the_hub(
    model: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    point_at(monkeypatch, hub.url.replace("://", f"://me:{READ_TOKEN}@"))
    monkeypatch.setenv("HF_TOKEN", "x" * 20)
    hub.fail("POST", "preupload", 503)
    hub.repos[ID] = Repo()
    with (
        caplog.at_level(logging.DEBUG),
        pytest.raises(PushFailed, match=r"may not write there|error of its own") as error,
    ):
        push_folder(model, ID)
    assert READ_TOKEN in hub.tokens
    assert READ_TOKEN not in str(error.value)
    assert READ_TOKEN not in "".join(record.getMessage() for record in caplog.records if record.name != "asyncio")
    assert "***@127.0.0.1" in caplog.text


def test_signatures_of_the_storage_stay_out_of_the_log(model: Path, hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    hub.fail("PUT", "/lfs/", 500)
    with caplog.at_level(logging.DEBUG), pytest.raises(PushFailed):
        push_folder(model, ID)
    assert "X-Signature=***" in caplog.text
    assert "signed" not in caplog.text


def test_loggers_are_left_as_they_were(model: Path, hub: Hub) -> None:
    logger = logging.getLogger("huggingface_hub.utils._http")
    before = list(logger.filters)
    push_folder(model, ID)
    assert logger.filters == before


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hf_abcdefghijklm.", "***."),
        ("https://hf_abcdefghijklm@e.org/x", "https://***@e.org/x"),
        ("https://me:pass@e.org/x and http://key@e.org", "https://***@e.org/x and http://***@e.org"),
        ("https://e.org/x?a=1&X-Amz-Signature=abc&b=2", "https://e.org/x?a=1&X-Amz-Signature=***&b=2"),
        ("https://e.org/x?access_token=abc#d", "https://e.org/x?access_token=***#d"),
        ("known-one and hf_token", "*** and hf_token"),
        ("nothing@home, a=b, http://e.org/@x", "nothing@home, a=b, http://e.org/@x"),
    ],
)
def test_redaction(text: str, expected: str) -> None:
    assert redacted(text, "known-one", "", "a") == expected


# The command


def test_the_command_says_what_it_pushed(model: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(f"hf-robust-ft push '{model}' --repo-id me/model --json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said == {
        "url": f"{hub.url}/me/model",
        "commit": hub.repos[ID].commits[0].oid,
        "files": list(public_files(model)),
    }
    assert run(f"hf-robust-ft push '{model}' --repo-id me/model") == 0
    assert re.match(rf"{hub.url}/me/model at [0-9a-f]{{40}}: README.md, config.json, ", capsys.readouterr().out)
    assert not hub.repos[ID].private


def test_the_command_fails_with_one(model: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.fail("POST", "/commit/", 500, message=TOKEN)
    assert run(f"hf-robust-ft push '{model}' --repo-id me/model --private --json") == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "hf-robust-ft: error: me/model was not pushed to: the Hub, or a server before it, has an error" in err
    assert TOKEN not in err


def test_wrong_input_to_the_command_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(f"hf-robust-ft push {tmp_path}/none --repo-id me/model") == 2
    assert "does not exist; give the output folder of a training" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(f"hf-robust-ft push {tmp_path}")
