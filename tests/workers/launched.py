"""What every worker that tests/torchrun.py starts has in common: its place, and what it leaves for the test."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

PROCESSES, RANK = int(sys.argv[2]), int(os.environ.get("RANK", "0"))


def answer(*functions: Callable[[Path], Any]) -> None:
    """Call those that the command names; what each returns goes to OUT/NAME-PROCESSES-RANK.json."""
    out, by_name = Path(sys.argv[1]), {function.__name__: function for function in functions}
    for name in sys.argv[3:]:
        result = by_name[name](out)
        (out / f"{name}-{PROCESSES}-{RANK}.json").write_text(json.dumps(result))
    if PROCESSES > 1:
        # A process that leaves while another still talks to it can bring that one down at exit.
        dist.barrier()
        dist.destroy_process_group()


def said(call: Callable[[], Any]) -> str:
    """The error of a call."""
    try:
        call()
    except Exception as error:  # noqa: BLE001 - what it is, is what the test asks
        return f"{type(error).__name__}: {error}"
    return "no error"
