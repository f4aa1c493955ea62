"""Files that are whole or not there, whatever stops the process that writes them, and that lie where they should."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path, PureWindowsPath

from safetensors import SafetensorError

# Hidden, and so never pushed to the Hub; unique, so that two processes that write one file don't meet.
FOLDER_PREFIX = ".writing-"
SUFFIX = ".tmp"
# Seconds. A name that nothing was written to for so long was left by a process that was killed.
ABANDONED = 3600
# torch.save says no more of a full disk than that one of these failed.
TORCH_WRITERS = ("PytorchStreamWriter", "inline_container")


class NotWritten(OSError):
    """A file or folder can't be written: the disk is full, it may only be read, or there is something in its place."""


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A name to write a file under, which becomes ``path`` once it is on the disk: no reader sees half of it.

    What stood there before stays if the writing fails. A link there is replaced, never followed: the folder may be
    somebody else's repository.

    Raises:
        NotWritten: the disk, or safetensors on its behalf, refuses it.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{SUFFIX}")
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            sync(temporary)
            os.replace(temporary, path)
        except BaseException:
            # A disk that is full needs the room; of a name that can't be removed nothing more can be said.
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        sync(path.parent)


@contextlib.contextmanager
def written_together(folder: Path) -> Iterator[Path]:
    """A folder to write files to, each of which then takes its place below ``folder``: no reader sees half of one.

    Raises:
        NotWritten: the disk, or safetensors on its behalf, refuses it. What stood there before is as it was.
    """
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir=folder))
        try:
            yield temporary
            files = sorted(path for path in temporary.rglob("*") if path.is_file())
            for path in files:
                sync(path)
            changed = {folder}
            for path in files:
                there = folder / path.relative_to(temporary)
                there.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, there)
                changed.add(there.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        for parent in changed:
            sync(parent)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk: a power cut, too, leaves them whole."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        if path.is_dir():
            return  # Windows opens no folders
        raise
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # some network file systems don't know it of folders
            raise
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """:func:`sync` of a folder and all below it."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def remove_abandoned(folder: Path) -> None:
    """Remove what killed processes had begun to write in a folder; nobody reads it, but it takes room."""
    before = time.time() - ABANDONED
    for path in (*folder.glob(f"{FOLDER_PREFIX}*"), *folder.glob(f".*{SUFFIX}")):
        with contextlib.suppress(OSError):  # someone else removes it
            if path.stat().st_mtime < before:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def check_writable(folder: Path, argument: str) -> None:
    """Make a folder if it is not there, and try whether a file can be written to it.

    Args:
        argument: what the error calls the folder.

    Raises:
        NotWritten: it can't.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(prefix=".", suffix=SUFFIX, dir=folder) as file:
            file.write(b"\0" * 4096)
            file.flush()
    except OSError as error:
        raise not_a_folder(folder, argument, error) from error


def not_a_folder(folder: Path, argument: str, error: OSError) -> NotWritten:
    """The error of a folder that can't be made or written to, before anything was."""
    return _not_written(
        f"{argument} is '{folder}', where nothing can be written ({_reason(error)}); give a folder that you may write "
        "to, on a disk that has room",
        error,
    )


def _try_again() -> str:
    return "What stood there before is unharmed. Make room, or choose another folder, and try again"


@contextlib.contextmanager
def explained(path: Path, remedy: Callable[[], str] = _try_again) -> Iterator[None]:
    """Errors of the disk say what was to be written, which the system's own often don't.

    Raises:
        NotWritten: in the place of what the system, safetensors or torch.save say of a disk.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(sign in str(error) for sign in TORCH_WRITERS):
            raise
        cause = error.__cause__ if isinstance(error, NotWritten) and isinstance(error.__cause__, Exception) else error
        raise _not_written(f"{path} was not written ({_reason(cause)}{_room(path)}). {remedy()}", cause) from cause


def _not_written(message: str, error: Exception) -> NotWritten:
    made = NotWritten(message)
    made.errno = getattr(error, "errno", None)
    return made


def _reason(error: Exception) -> str:
    said = getattr(error, "strerror", None) or str(error).partition("\n")[0] or type(error).__name__
    return str(said).strip(" .")


def _room(path: Path) -> str:
    """How much is free, where that is what is missing."""
    there = next((parent for parent in path.absolute().parents if parent.is_dir()), Path())
    try:
        free = shutil.disk_usage(there).free
    except OSError:
        return ""
    return f"; {free / 1e6:.1f} MB are free there" if free < 1e8 else ""


def inside(folder: str | Path, name: str) -> Path:
    """The path of a file in a folder, by a name that may come from anybody.

    Args:
        name: relative to the folder, with ``/``.

    Raises:
        ValueError: the name, or a link in its place, leads out of the folder.
    """
    parts = name.split("/")
    odd = any(part in ("", ".", "..") for part in parts) or "\\" in name or not name.isprintable()
    if odd or PureWindowsPath(name).drive:
        raise ValueError(f"{name!a:.100} is no name of a file in {folder}; put the file there, and name it alone")
    path = Path(folder) / name
    if leads_out(path, folder):
        raise ValueError(f"{path} is a link that leads out of {folder}; put the file itself there, or remove the link")
    return path


def leads_out(path: Path, folder: str | Path) -> bool:
    """Whether a path in a folder is, by links, one outside of it."""
    root = Path(os.path.realpath(folder))
    # The cache of the Hub has links, to ../../blobs.
    if root.parent.name == "snapshots" and (root.parent.parent / "blobs").is_dir():
        root = root.parent.parent
    return not Path(os.path.realpath(path)).is_relative_to(root)
