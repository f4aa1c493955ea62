"""Scripts that tests start: one whose process crashes in native code is started once more, any other failure tells."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from started import start


def script(folder: Path, *lines: str) -> Path:
    """Counts how often it is started, then does this."""
    path = folder / "script.py"
    path.write_text("\n".join(["import os, sys", "print('x', file=open('starts', 'a'))", *lines]))
    return path


def starts(folder: Path) -> int:
    return len((folder / "starts").read_text().split())


@pytest.mark.parametrize("processes", [1, 2])
def test_a_crash_is_tried_once_more(tmp_path: Path, processes: int) -> None:
    path = script(
        tmp_path, "if not os.path.exists('crashed'):", "    open('crashed', 'w')", "    os.abort()", "print('well')"
    )
    with pytest.warns(UserWarning, match=r"(?s)script\.py: exit statuses .*Fatal Python error: Aborted"):
        assert "well" in start(path, cwd=tmp_path, processes=processes)
    assert starts(tmp_path) == 2 * processes


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_is_forked_has_one_thread(tmp_path: Path) -> None:
    path = script(tmp_path, "print(len(os.listdir(f'/proc/{os.getppid()}/task')))")
    assert start(path, cwd=tmp_path) == "1\n"


def test_a_crash_that_comes_again_tells(tmp_path: Path) -> None:
    path = script(tmp_path, "os.abort()")
    with pytest.warns(UserWarning, match="so once more"), pytest.raises(AssertionError, match="exit statuses"):
        start(path, cwd=tmp_path)
    assert starts(tmp_path) == 2


def test_other_failures_tell_at_once(tmp_path: Path) -> None:
    path = script(tmp_path, "sys.exit('no')")
    with pytest.raises(AssertionError, match=r"(?s)exit statuses \[1\].*no"):
        start(path, cwd=tmp_path)
    assert start(path, cwd=tmp_path, fails=True) == "no\n"
    assert starts(tmp_path) == 2
