"""huggingface_hub in this process, talking to a Hub of the tests."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.constants
import huggingface_hub.utils._http
import pytest
from hub_server import TOKEN, Hub


def point_at(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Everything but downloads, whose address is made at import: those need a process of their own."""
    for name, value in {"ENDPOINT": url, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A running Hub, an account on it, and a client that does not wait before it tries again."""
    with Hub() as server:
        point_at(monkeypatch, server.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        at_once = SimpleNamespace(sleep=lambda seconds: None, time=time.time)
        monkeypatch.setattr(huggingface_hub.utils._http, "time", at_once)
        yield server


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder, by path."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
