"""Files that are whole or not there, and that lie where they should."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A name to write a file under, which becomes ``path`` once it is written: no reader sees half of it.

    A link in the place of either is replaced, never followed: the folder may be somebody else's repository.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    yield temporary
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


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
