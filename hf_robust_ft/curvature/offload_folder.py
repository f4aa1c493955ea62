"""Whole tensors on the disk, for the processes of one machine: none of them holds them all in memory."""

from __future__ import annotations

import platform
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..files import NotWritten
from ..processes import Processes

NAME = "weight"


class OffloadFolder:
    """Files that one process writes and all on its machine read. All processes make every call together.

    What was put there can be read after :meth:`share`, and the files have no names from then on: whatever ends the
    processes, only an empty folder is left. (One that is killed before leaves what it has written.)

    Raises:
        NotWritten: there is no place for temporary files.
    """

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        try:
            own = Path(tempfile.mkdtemp(prefix="hf-robust-ft-"))
        except OSError as error:
            raise NotWritten(f"no folder for the weights can be made ({error}); set TMPDIR to one") from error
        try:
            # Those of one machine take that of the first of them, if they see it (they may be in containers).
            host = platform.node()
            folders = [Path(path) for path, on in processes.gather((str(own), host)) if on == host]
            self.path = next(path for path in folders if path.is_dir())
            processes.gather(None)
        except BaseException:
            own.rmdir()
            raise
        self._writes = self.path == own
        if not self._writes:
            own.rmdir()
        self._put = 0
        self._open: dict[int, Any] = {}
        self._problem: str | None = None

    def put(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Write a tensor, the same on all processes; the function reads it, a view of the file on the CPU."""
        number = self._put
        self._put += 1
        if self._writes and self._problem is None:
            try:
                save_file({NAME: tensor.detach().cpu().contiguous()}, self._file(number))
            except (OSError, SafetensorError, RuntimeError, MemoryError) as error:
                # Others wait for this process at the next tensor.
                self._problem = f"{type(error).__name__}: {error}"
        return lambda: self._open[number].get_tensor(NAME)

    def share(self) -> None:
        """Let all read what was put until now.

        Raises:
            NotWritten: a file can't be written, perhaps by another process.
        """
        problem = next((said for said in self._processes.gather(self._problem) if said is not None), None)
        if problem is not None:
            raise NotWritten(
                f"the weights of a model that is not whole in memory can't be written to {self.path} ({problem}); make "
                "room there, or set TMPDIR to a folder of a disk (no tmpfs) that has it for the model and its reference"
            )
        new = range(len(self._open), self._put)
        self._open |= {n: safe_open(self._file(n), framework="pt") for n in new}
        self._processes.gather(None)
        if self._writes:
            for n in new:
                self._file(n).unlink(missing_ok=True)

    def close(self) -> None:
        """Nothing can be read any more. By each process for itself."""
        self._open.clear()
        if self._writes:
            shutil.rmtree(self.path, ignore_errors=True)

    def _file(self, number: int) -> Path:
        return self.path / f"{number}.safetensors"
