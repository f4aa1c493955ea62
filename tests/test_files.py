"""Files are whole or not there."""

from __future__ import annotations

import os
import resource
import signal
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch

from hf_robust_ft import HessianReport, NotWritten
from hf_robust_ft.figures import new_figure, save_small
from hf_robust_ft.files import ABANDONED, check_writable, remove_abandoned, written_together, written_whole
from hf_robust_ft.hub import public_files


@pytest.fixture
def small_files() -> Iterator[int]:
    """No file of this process can grow beyond so many bytes, as on a disk that is full; needs no privilege."""
    size, before = 8192, resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    yield size
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_file_appears_when_it_is_written_with_the_rights_of_any_other(tmp_path: Path) -> None:
    path, plain = tmp_path / "new" / "x.json", tmp_path / "plain"
    plain.touch()
    with written_whole(path) as temporary:
        temporary.write_text("half")
        assert not path.exists()
        temporary.write_text("whole")
    assert path.read_text() == "whole"
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)
    assert list(path.parent.iterdir()) == [path]


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with written_whole(path) as first:
        first.write_text("fi")
        with written_whole(path) as second:
            second.write_text("second")
        assert path.read_text() == "second"
        first.write_text("first")
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()], ids=repr)
def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "x"
    path.write_text("old")

    def fail() -> None:
        with written_whole(path) as temporary:
            temporary.write_text("ne")
            raise error

    def fail_together() -> None:
        with written_together(tmp_path) as temporary:
            (temporary / "x").write_text("ne")
            raise error

    for function in (fail, fail_together):
        with pytest.raises(type(error)):
            function()
        assert path.read_text() == "old"
        assert list(tmp_path.iterdir()) == [path]


def test_files_take_their_places_together(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "x").write_text("old")
    (tmp_path / "stays").write_text("stays")
    with written_together(tmp_path) as temporary:
        (temporary / "sub").mkdir()
        for name in ("y", "sub/x", "sub/.z"):
            (temporary / name).write_text(name)
        assert (tmp_path / "sub" / "x").read_text() == "old"
        assert not (tmp_path / "y").exists()
    found = {path.relative_to(tmp_path).as_posix(): path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {"y": "y", "sub/x": "sub/x", "sub/.z": "sub/.z", "stays": "stays"}


def test_a_full_disk_is_named_with_the_file_whoever_writes(tmp_path: Path, small_files: int) -> None:
    def text(path: Path) -> None:
        path.write_text("x" * 2 * small_files)

    def tensors(path: Path) -> None:
        safetensors.torch.save_file({"x": torch.zeros(small_files)}, path)

    def pickled(path: Path) -> None:
        torch.save({"x": torch.zeros(small_files)}, path)

    path = tmp_path / "x"
    path.write_text("old")
    for write in (text, tensors, pickled):
        with pytest.raises(NotWritten, match=f"{path} was not written \\(.*What stood there before is unharmed"):
            _write(path, write)
        assert path.read_text() == "old"
        assert list(tmp_path.iterdir()) == [path]


def _write(path: Path, write: object) -> None:
    with written_whole(path) as temporary:
        write(temporary)  # type: ignore[operator]


def test_an_error_of_another_kind_stays_what_it_is(tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        raise RuntimeError("CUDA out of memory")

    with pytest.raises(RuntimeError, match=r"^CUDA out of memory$"):
        _write(tmp_path / "x", fail)


def test_pictures_are_written_whole(tmp_path: Path, small_files: int) -> None:
    figure = new_figure(8, 8, "noise")
    if figure is None:
        pytest.skip("matplotlib is missing")
    figure.subplots().imshow(torch.rand(500, 500).numpy())
    with pytest.raises(NotWritten, match=r"x\.png was not written"):
        save_small(figure, tmp_path / "plots" / "x.png", 200)
    assert not list((tmp_path / "plots").iterdir())


def test_leftovers_of_killed_processes_are_not_pushed_and_go_after_an_hour(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "config.json").write_text("{}")
    files = tmp_path / ".hessian_report.json.0a1b2c3d.tmp", tmp_path / ".hessian_report.json.ffffffff.tmp"
    folders = tmp_path / ".writing-old", tmp_path / ".writing-new"
    for file, folder in zip(files, folders, strict=True):
        file.write_text("half")
        folder.mkdir()
        (folder / "model.safetensors").write_text("half")
    assert public_files(tmp_path).keys() == {"model.safetensors", "config.json"}
    for path in (files[0], folders[0]):
        os.utime(path, (0, time.time() - ABANDONED - 60))
    remove_abandoned(tmp_path)
    assert {path.name for path in tmp_path.iterdir() if path.name[0] == "."} == {files[1].name, folders[1].name}


def test_a_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "folder", "output_dir")
    assert not list((tmp_path / "new" / "folder").iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(NotWritten, match=r"output_dir is '.*file', where nothing can be written \(File exists\); give"):
        check_writable(tmp_path / "file", "output_dir")


def test_a_report_that_is_a_temporary_file_is_none(tmp_path: Path) -> None:
    """What was cut off has no final name, so that nobody reads it."""
    (tmp_path / ".hessian_report.json.0a1b2c3d.tmp").write_text("{")
    with pytest.raises(FileNotFoundError):
        HessianReport.load(tmp_path / "hessian_report.json")
