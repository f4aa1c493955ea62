"""Starts scripts in processes of their own, forked from one that has imported torch and the like.

Importing takes ten seconds and more on a slow machine, and the tests start some fifty processes.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
import time
import warnings
from multiprocessing.connection import wait
from pathlib import Path

import torch

# Only a process with one thread may be forked, and pyarrow's usual allocator has one of its own.
os.environ["JE_ARROW_MALLOC_CONF"] = "background_thread:false"
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch.distributed", "transformers.trainer", "hf_robust_ft"])
# In seconds, on a machine that has other work as well.
LIMIT = 240
# What the others get to say something, too, after one has failed.
GRACE = 20
KILLED = -signal.SIGKILL
CRASHES = {-signal.SIGABRT, -signal.SIGSEGV, -signal.SIGBUS}


def start(script: Path, *words: str, cwd: Path | None = None, processes: int = 1, fails: bool = False) -> str:
    """Run a script, in several processes as torchrun does, and give what all of them print.

    With ``fails`` it must fail, and what it complains about is given.
    """
    codes, printed, errors = _run(script, words, cwd or Path.cwd(), processes)
    if CRASHES.intersection(codes):
        # Nothing in Python does that. Seen once: gloo's process freed memory twice, and no other launch did it again.
        warnings.warn(f"{script.name}: exit statuses {codes}, so once more\n{errors}", stacklevel=2)
        codes, printed, errors = _run(script, words, cwd or Path.cwd(), processes)
    assert KILLED not in codes, f"exit statuses {codes}\n{errors}"
    assert any(codes) == fails, f"exit statuses {codes}\n{errors}"
    return errors if fails else printed


def _run(script: Path, words: tuple[str, ...], cwd: Path, processes: int) -> tuple[list[int | None], str, str]:
    """Exit statuses, and what all processes printed and complained about."""
    # Trainers of other tests in this process leave settings for accelerate in the environment.
    environment = {n: v for n, v in os.environ.items() if not n.startswith(("ACCELERATE_", "FSDP_"))}
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        count = str(processes)
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        environment |= {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / str(rank) for rank in range(processes)]
        started = []
        for rank, log in enumerate(logs):
            own = environment | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {})
            started.append(FORKS.Process(target=_become, args=(script, words, cwd, own, log)))
            started[-1].start()
        pending = {process.sentinel: process for process in started}
        end = time.monotonic() + LIMIT
        while pending and (left := end - time.monotonic()) > 0:
            for sentinel in wait(list(pending), left):
                process = pending.pop(sentinel)  # type: ignore[index]
                process.join()
                if process.exitcode != 0:
                    end = min(end, time.monotonic() + GRACE)
        for process in pending.values():
            process.kill()
            process.join()
        codes = [process.exitcode for process in started]
        printed = "".join(log.with_suffix(".out").read_text() for log in logs)
        errors = "\n".join(log.with_suffix(".err").read_text()[-8000:] for log in logs)
    if pending:
        errors = f"{len(pending)} of {processes} killed after at most {LIMIT} s\n{errors}"
    return codes, printed, errors


def _become(script: Path, words: tuple[str, ...], cwd: Path, environment: dict[str, str], log: Path) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for name, stream in ((".out", sys.stdout), (".err", sys.stderr)):
        stream.flush()
        with log.with_suffix(name).open("w") as file:
            os.dup2(file.fileno(), stream.fileno())
    faulthandler.enable()
    torch.set_num_threads(1)
    sys.argv = [str(script), *words]
    sys.path.insert(0, str(script.parent))
    runpy.run_path(str(script), run_name="__main__")
