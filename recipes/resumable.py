"""Runs that several processes share, kept as lines of JSON: the command that broke off is also the one that goes on.

Not run by itself. Each process takes its share of *all* runs, and of these does what has no line yet: what the others
have written in the meantime then moves no run from one process to another.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

Line = dict[str, Any]


def own_share() -> tuple[int, int]:
    """Number of this process among those of a launcher, and of all; from then on it is alone, on one GPU.

    Call it before anything reads the launcher's variables: Trainer would train one model with all processes.
    """
    found = [
        int(os.environ.pop(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    ]
    for name in ("LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    rank, world, local = found
    # Trainer would spread each batch over all GPUs that it sees. torch reads this when CUDA is first used.
    if (gpus := torch.cuda.device_count()) > 1:
        seen = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
        os.environ["CUDA_VISIBLE_DEVICES"] = seen[local % gpus]
    if world > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    return rank, world


def read_lines(path: Path) -> list[Line]:
    """Every line that was written whole; none without the file."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            print(f"{path}: passed over a line that was cut off")
    return lines


def append_line(line: Line, path: Path) -> None:
    """Add a line. One write, so that lines of several processes don't mix; not to the end of one that was cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cut_off = path.exists() and not path.read_bytes().endswith(b"\n")
    with path.open("ab", buffering=0) as file:
        file.write(("\n" * cut_off + json.dumps(line) + "\n").encode())
