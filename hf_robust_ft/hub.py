"""A model, its card and its reports to the Hub: in one commit, nothing private, and errors that say what to do."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, but not in an __all__

from .card.data import FILE as CARD_FILE
from .card.plots import BOUNDS_FILE, LAYERS_FILE, TRANSITION_FILE
from .files import leads_out
from .hessian_measurement import FILE as REPORT_FILE
from .noise_estimate import FILE as ESTIMATE_FILE
from .redaction import redacted
from .stored import checked, read_json

MESSAGE = "End of training"
README = "README.md"

# What models, processors and cards are made of. Whatever else lies in the folder (data, predictions, logs) stays.
PUBLIC = (
    *("*.safetensors", "*.bin", "*.json", "*.txt", "*.model", "*.jinja", "*.py"),
    *("*.vocab", "*.bpe", "*.codes", "*.spm", "*.tiktoken"),
    *(README, "LICENSE*", "NOTICE*"),
)
# Folders and files. The names with an underscore are the package's own: centres, starting weights, labels. The
# arguments hold the token; diagnosis.json lists examples; states and checkpoints are for resuming, with local paths.
PRIVATE = (
    *("_*", ".*", "checkpoint-*", "run-*"),
    *("training_args.bin", "optimizer.bin", "scheduler.bin", "trainer_state.json", "diagnosis.json"),
)
WEIGHTS = ("*.safetensors", "*.bin")
# Of an earlier card these would contradict the new one.
OF_THE_CARD = (REPORT_FILE, ESTIMATE_FILE, LAYERS_FILE, BOUNDS_FILE, TRANSITION_FILE)

# httpx's or httpx2's, by the version of huggingface_hub: the base of its own errors, and of those of the network.
HTTPError: type[Exception] = HfHubHTTPError.__mro__[1]
# An upload of a file fails with a RuntimeError, an answer that can't be read or a card with a wrong head with a
# ValueError.
FAILURES = (HTTPError, OSError, RuntimeError, ValueError)

CAUSES = {
    400: "the Hub refuses what was sent",
    401: "the access token is missing, wrong or expired; `hf auth login` makes one known, or the variable HF_TOKEN",
    402: "the Hub wants a payment, or the storage of the account is full",
    403: "the access token may not write there: the repository is not yours, or the token can only read. Take a "
    "repository of your own, or a token that can write",
    404: "there is no such repository or branch, or the access token may not see it",
    409: "something else changes the repository at the same time; try again in a moment",
    412: "something else changes the repository at the same time; try again in a moment",
    413: "a file is larger than the server takes; save the model in smaller pieces "
    "(model.save_pretrained(folder, max_shard_size='1GB')), or move what need not be pushed out of the folder",
    429: "too many requests; try again in some minutes",
}
# They write addresses to the log, which may hold a password or a signature.
LOGGERS = ("huggingface_hub.utils._http", "httpx", "httpx2")

Found = TypeVar("Found")


class PushFailed(OSError):
    """The Hub did not take a push. It takes a commit whole or not at all, and what was to be pushed is on the disk."""


def check_repo_id(repo_id: str, argument: str) -> None:
    """Refuse what can't be the name of a repository, before anything asks the Hub.

    Args:
        repo_id: ``NAME`` or ``OWNER/NAME``.
        argument: what the error calls it.

    Raises:
        ValueError: it is no such name.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        problem = redacted(f"{argument} is {str(repo_id)!r}, which is no name of a repository on the Hub", *_secrets())
    else:
        return
    raise ValueError(
        f"{problem}; give NAME or OWNER/NAME: at most 96 letters, digits, '-', '_' and '.', without '--' and '..', not "
        "beginning or ending in '-' or '.'"
    )


def public_files(folder: str | Path, *, card: bool = True, token: str | None = None) -> dict[str, Path]:
    """What a push takes of a folder: weights, configuration, processor, card, reports and pictures.

    Left behind are checkpoints, names that begin with ``_`` or ``.``, ``training_args.bin`` (it holds the access
    token), states for resuming, tables and logs, subfolders without a ``*config.json``, and reports that the card in
    the folder does not speak of.

    Args:
        folder: of a model.
        card: False leaves out the card, its reports and its pictures, too.
        token: beside that of ``hf auth login`` or ``HF_TOKEN``, to look for in the files.

    Returns:
        Path relative to the folder → file, sorted.

    Raises:
        ValueError: there is no such folder, no weights in it, a damaged card, a link out of the folder, or a token in a
            file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"folder '{folder}' does not exist; give the output folder of a training")
    stale = _not_in_card(folder)
    found = {}
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        name = relative.as_posix()
        if not path.is_file() or _matches(relative.parts, PRIVATE) or name in stale:
            continue
        if name in (README, CARD_FILE, *OF_THE_CARD):
            taken = card
        else:
            taken = _matches([path.name], PUBLIC) and (path.parent == folder or _belongs(path.parent))
        if taken and leads_out(path, folder):
            raise ValueError(
                f"'{name}' in folder '{folder}' is a link that leads out of it: put the file itself there, or remove "
                "the link"
            )
        if taken:
            found[name] = path
    if not any(_matches([name], WEIGHTS) for name in found):
        raise ValueError(f"folder '{folder}' holds no weights (*.safetensors or *.bin); give that of a saved model")
    secrets = [secret.encode() for secret in _secrets(token)]
    for name, path in found.items():
        if not _matches([name], WEIGHTS) and any(secret in path.read_bytes() for secret in secrets):
            raise ValueError(f"'{name}' in folder '{folder}' holds your access token: take it out before a push")
    return found


def _matches(parts: Iterable[str], patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(part, pattern) for part in parts for pattern in patterns)


def _belongs(subfolder: Path) -> bool:
    """An adapter, a part of a processor, or its chat templates."""
    return subfolder.name == "additional_chat_templates" or any(subfolder.glob("*config.json"))


def _not_in_card(folder: Path) -> set[str]:
    """Reports that the card does not speak of: of other weights, or of an earlier training in this folder."""
    path = folder / CARD_FILE
    if not path.is_file():
        return set()
    try:
        card = checked(dict[str, Any], read_json(path), "the whole")
        named = {REPORT_FILE: card.get("report"), ESTIMATE_FILE: card.get("estimate")}
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): make the card again, or remove the file") from None
    return {name for name, said in named.items() if said is None}


def open_repository(
    repo_id: str, *, token: str | None = None, private: bool | None = None, revision: str | None = None
) -> str:
    """Make the repository if there is none, and ask whether this token may write to it. Nothing is changed there.

    Returns:
        Its full name, ``OWNER/NAME``.

    Raises:
        Exception: whatever huggingface_hub raises: call it through :func:`explained`.
    """
    api = _api(token)
    name: str = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    # A small text is never uploaded by this; the Hub says how it would take it, to those who may write.
    api.preupload_lfs_files(name, [CommitOperationAdd(README, b"# A model\n")], revision=revision)
    return name


def commit_files(
    repo_id: str,
    files: Mapping[str, Path],
    *,
    token: str | None = None,
    revision: str | None = None,
    message: str = MESSAGE,
) -> CommitInfo:
    """Upload files in one commit, or none at all. With a card, remove what only an earlier card spoke of.

    Not ``upload_folder``, which makes several commits of a large folder.

    Args:
        repo_id: of a repository that exists.
        files: path in the repository → file.

    Raises:
        Exception: whatever huggingface_hub raises: call it through :func:`explained`.
    """
    api = _api(token)
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(name, str(path)) for name, path in files.items()
    ]
    if CARD_FILE in files:
        there = api.list_repo_files(repo_id, revision=revision)
        operations += [CommitOperationDelete(name) for name in OF_THE_CARD if name in there and name not in files]
    return api.create_commit(repo_id, operations, commit_message=message, revision=revision)


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    token: str | None = None,
    revision: str | None = None,
    private: bool | None = None,
    message: str = MESSAGE,
) -> CommitInfo:
    """Push the folder of a model to the Hub as it is, in one commit: what ``hf-robust-ft push`` does.

    Makes the repository if there is none. Files that the Hub has already are not sent again.

    Args:
        folder: of a model, such as the output folder of a training.
        repo_id: ``NAME`` or ``OWNER/NAME``.
        token: of access; default: that of ``hf auth login`` or ``HF_TOKEN``.
        revision: a branch that exists; default: the main one.
        private: of a repository that has to be made.
        message: of the commit.

    Raises:
        ValueError: no folder of a model, a token in it (see :func:`public_files`), or no name of a repository.
        PushFailed: the Hub did not take it. The message says why, and how to try again.
    """
    check_repo_id(repo_id, "repo_id")
    files = public_files(folder, token=token)

    def push() -> CommitInfo:
        name = open_repository(repo_id, token=token, private=private, revision=revision)
        return commit_files(name, files, token=token, revision=revision, message=message)

    command = retry_command(folder, repo_id, revision=revision, private=private)
    return explained(push, repo_id, saved_in(folder, command), token=token)


def retry_command(folder: str | Path, repo_id: str, *, revision: str | None = None, private: bool | None = None) -> str:
    """The command that pushes a folder, for a shell."""
    options = [*(["--revision", revision] if revision else []), *(["--private"] if private else [])]
    return shlex.join(["hf-robust-ft", "push", str(folder), "--repo-id", repo_id, *options])


def saved_in(folder: str | Path, command: str) -> str:
    """What a failed push did not harm, and how to try again."""
    return f"Nothing is lost: all that is to be pushed lies in {folder}. Try again with\n    {command}"


def explained(action: Callable[[], Found], repo_id: str, remedy: str, *, token: str | None = None) -> Found:
    """What talks to the Hub returns, with its failures in plain words and without the token.

    Raises:
        PushFailed: with the cause and the remedy.
    """
    secrets = _secrets(token)
    try:
        with _redacted_logs(secrets):
            return action()
    except FAILURES as error:
        cause = _cause(error)
    # Outside of the except clause, so that no traceback shows the error that it came from, and an address in it.
    raise PushFailed(redacted(f"{repo_id} was not pushed to: {cause}. {remedy}", *secrets))


def _cause(error: BaseException) -> str:
    """Of a failure, in plain words."""
    if isinstance(error, OfflineModeIsEnabled):
        return "huggingface_hub is offline, by the variable HF_HUB_OFFLINE"
    doing = ""
    if isinstance(error, RuntimeError) and error.__cause__ is not None:  # raised by the upload of one file
        doing, error = f"{str(error).rstrip('.')}: ", error.__cause__
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        cause = CAUSES.get(status, "the Hub refuses it")
        if status >= 500:
            cause = "the Hub, or a server before it, has an error of its own; try again later"
        said = " ".join((error.server_message or "").split())
        return f"{doing}{cause} (status {status}" + (f'; the server says: "{said[:300]}")' if said else ")")
    if isinstance(error, HTTPError):
        return f"{doing}{constants.ENDPOINT} can't be reached, or the connection broke off: {_line(error)}"
    return f"{doing}{_line(error)}"


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(" .")


def _secrets(token: str | None = None) -> tuple[str, ...]:
    return tuple(secret for secret in (token, get_token()) if secret)


@contextmanager
def _redacted_logs(secrets: tuple[str, ...]) -> Iterator[None]:
    def redact(record: logging.LogRecord) -> bool:
        record.msg, record.args = redacted(record.getMessage(), *secrets), ()
        return True

    for name in LOGGERS:
        logging.getLogger(name).addFilter(redact)
    try:
        yield
    finally:
        for name in LOGGERS:
            logging.getLogger(name).removeFilter(redact)


def _api(token: str | None) -> HfApi:
    return HfApi(token=token, library_name="hf-robust-ft")
