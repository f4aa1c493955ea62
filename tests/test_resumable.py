"""Runs kept line by line and shared by processes, as the recipes do."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture(scope="module")
def resumable(recipe: Any) -> Any:
    return recipe("resumable")


def test_a_line_that_was_cut_off_harms_no_other(
    resumable: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "new" / "runs.jsonl"
    assert resumable.read_lines(path) == []
    resumable.append_line({"n": 1}, path)
    with path.open("a") as file:
        file.write('{"n": 2, "ga')
    resumable.append_line({"n": 3}, path)
    assert resumable.read_lines(path) == [{"n": 1}, {"n": 3}]
    assert capsys.readouterr().out == f"{path}: passed over a line that was cut off\n"


def test_a_process_of_a_launcher_is_alone_from_then_on(resumable: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "here"}
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,6")
    threads = torch.get_num_threads()
    try:
        assert resumable.own_share() == (3, 4)
        assert torch.get_num_threads() == max(1, (os.cpu_count() or 1) // 4)
    finally:
        torch.set_num_threads(threads)
    assert not launcher.keys() & os.environ.keys()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "6"
    assert resumable.own_share() == (0, 1)
