"""Ctrl-C during training asks for a stop after the step that runs, on all processes after the same one."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

# Seconds. Launchers may pass on a Ctrl-C that the terminal has sent to their processes as well: that is one, not two.
ECHO = 0.5
ANNOUNCEMENT = (
    b"\nCtrl-C: training stops after this step and saves a checkpoint. Again: it stops at once and saves nothing.\n"
)


class Interruption:
    """Counts SIGINT while training, in place of Python's handler; the second one does what that one does."""

    def __init__(self) -> None:
        self.asked = False
        """This process got a SIGINT."""
        self.stopping = False
        """All processes know that one of them did."""
        self.handles = False
        """Whether :meth:`handled` lasts, and processes can agree."""
        self._at_once = False
        self._process = os.getpid()
        self._announces = False
        self._asked_at = 0.0
        self._group: Any = None
        self._vote: tuple[torch.Tensor, Any] | None = None

    @contextlib.contextmanager
    def handled(self, *, world_size: int, announces: bool) -> Iterator[None]:
        """While this lasts a first SIGINT is only counted. A handler that the script has set itself stays in charge.

        Args:
            world_size: all processes come here, and call :meth:`agreed` as often as each other.
            announces: whether this one says to the terminal what will happen.
        """
        self.asked = self.stopping = self._at_once = False
        self._announces, self._vote = announces, None
        if world_size > 1 and self._group is None:
            if not (dist.is_available() and dist.is_initialized() and dist.is_gloo_available()):
                yield  # no way to agree
                return
            # A group of its own: what a step sends stays in its order, and flags need no GPU.
            self._group = dist.new_group(backend="gloo")
        ours = threading.current_thread() is threading.main_thread() and (
            signal.getsignal(signal.SIGINT) is signal.default_int_handler
        )
        if ours:
            signal.signal(signal.SIGINT, self._on_signal)
        self.handles = True
        try:
            yield
        finally:
            self.handles = False
            if ours:
                signal.signal(signal.SIGINT, signal.default_int_handler)

    def agreed(self) -> bool:
        """Whether to stop now. Each process asks once after each step, and all get the same answer.

        Several processes learn of a SIGINT one step later, so that none waits for the answer.
        """
        if self.handles and not self.stopping:
            self.stopping = self._counted() if self._group is not None else self.asked
            if self._group is not None and not self.stopping:
                self._cast()
        return self.handles and self.stopping

    def agreed_at_the_end(self) -> bool:
        """As :meth:`agreed`, with what came since the last step."""
        self.agreed()
        self.stopping = self.stopping or self._counted()
        return self.stopping

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """What runs here is cut short: the first SIGINT counts, and raises KeyboardInterrupt as well."""
        before, self._at_once = self._at_once, True
        try:
            yield
        finally:
            self._at_once = before

    def _cast(self) -> None:
        vote = torch.tensor([int(self.asked)])
        self._vote = vote, dist.all_reduce(vote, dist.ReduceOp.MAX, group=self._group, async_op=True)

    def _counted(self) -> bool:
        if self._vote is None:
            return False
        (vote, work), self._vote = self._vote, None
        work.wait()
        return bool(vote.item())

    def _on_signal(self, number: int, frame: Any) -> None:
        if not self.asked:
            self.asked, self._asked_at = True, time.monotonic()
            if self._at_once:
                raise KeyboardInterrupt
            if self._announces and os.getpid() == self._process:  # not a worker that loads data
                # Not by logging or print: the signal may have come in the midst of one of these.
                with contextlib.suppress(OSError):
                    os.write(2, ANNOUNCEMENT)
        elif time.monotonic() - self._asked_at > ECHO:
            signal.default_int_handler(number, frame)
