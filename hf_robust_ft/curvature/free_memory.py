"""How much memory is free on a device, and how the CPU's goes back to the system."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate.utils import get_int_from_env

# Limit and use of a container's memory, of both versions (Linux).
CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
# How launchers say how many processes share the machine: torchrun and accelerate, MPIs, srun.
LAUNCHED = (
    "LOCAL_WORLD_SIZE",
    "MPI_LOCALNRANKS",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
    "MV2_COMM_WORLD_LOCAL_SIZE",
    "SLURM_NTASKS_PER_NODE",
)
# Parameters of glibc's mallopt, and bytes from which on a block is given back when it is freed.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
LARGE = 2**20


def free_memory(device: torch.device) -> int:
    """Bytes that one process may take on a device: of a GPU, or its share of the machine's or container's memory."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What torch keeps for tensors to come is as good.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    found: int = psutil.virtual_memory().available
    for limit, used in CGROUPS:
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            found = min(found, int(Path(limit).read_text()) - int(Path(used).read_text()))
    sharing: int = get_int_from_env(LAUNCHED, 1)
    return max(found, 0) // max(sharing, 1)


@contextlib.contextmanager
def memory_given_back() -> Iterator[None]:
    """Give what is freed on the CPU back to the system at once. By itself glibc keeps blocks of up to 32 MB, and where
    weights come and go among other tensors it soon keeps many times as much as is used."""
    mallopt = _of_glibc("mallopt") if "MALLOC_MMAP_THRESHOLD_" not in os.environ else None
    if mallopt is not None:
        mallopt(MMAP_THRESHOLD, LARGE)
    try:
        yield
    finally:
        if mallopt is not None:  # where it ends up by itself
            mallopt(MMAP_THRESHOLD, 2**25)
            mallopt(TRIM_THRESHOLD, 2**26)


def give_back() -> None:
    """Give back what is free on the CPU now: blocks from before :func:`memory_given_back` are used again inside it."""
    trim = _of_glibc("malloc_trim")
    if trim is not None:
        trim(0)


@functools.cache
def _of_glibc(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
