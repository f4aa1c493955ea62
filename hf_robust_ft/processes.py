"""Several processes that measure together: who takes what, and how they put together what they found."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather, gather_object, reduce
from torch import Tensor

from .snapshot import snapshot

T = TypeVar("T")


def merged(parts: Iterable[Iterable[T]]) -> list[T]:
    """What several processes say, in order, once each."""
    return list(dict.fromkeys(itertools.chain.from_iterable(parts)))


class OtherProcessFailed(RuntimeError):
    """Another process met an error, which the message has; this one had nothing to wait for any more."""


class Processes:
    """All processes of a launch, or this one alone.

    Before each exchange all say whether they are well and at the same point. So an error of one ends the others with
    its message, where else they would wait for it, and calls that don't fit together are told from a slow process.

    Args:
        together: False: this process is on its own, whatever others do.
    """

    def __init__(self, together: bool) -> None:
        state = PartialState() if together else None
        self.count = 1 if state is None else state.num_processes
        self.rank = 0 if state is None else state.process_index
        self._device = torch.device("cpu") if state is None else state.device

    def share(self, items: int, turn: int = 0) -> slice:
        """This process's part of some items, in one piece. Parts differ by one at most.

        Args:
            turn: who gets the larger parts goes round with it.
        """
        place = (self.rank + turn) % self.count
        return slice(items * place // self.count, items * (place + 1) // self.count)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What all do together: an error of one in here is an error of all. May be nested.

        A DataLoader that shuffles gives all the same order in here; random numbers are as before afterwards.

        Raises:
            OtherProcessFailed: on those that are well, when another one is not.
        """
        if self.count == 1:
            yield
            return
        _, restore = snapshot(None)
        try:
            self._meet(0)
            torch.set_rng_state(gather_object([torch.get_rng_state()])[0])
            yield
            self._meet(0)
        except BaseException as error:
            if not getattr(error, "is_known_to_all", False):
                self._meet(0, error)
            raise
        finally:
            restore()

    def gather(self, value: T, token: int = 0) -> list[T]:
        """What each process has found, by rank, on all of them. For small things.

        Args:
            value: tensors in it should be on the CPU.
            token: a number that must be the same on all.

        Raises:
            OtherProcessFailed: see :meth:`together`.
            RuntimeError: another token.
        """
        if self.count == 1:
            return [value]
        self._meet(token)
        found: list[T] = gather_object([value])
        return found

    def add_(self, *totals: Tensor, token: int = 0) -> None:
        """Sum tensors of one type over all processes, in place, in one reduction.

        Args, Raises: as :meth:`gather`.
        """
        if self.count == 1:
            return
        self._meet(token)
        summed = reduce(torch.cat([total.flatten() for total in totals]).to(self._device), "sum")
        for total, part in zip(totals, summed.split([total.numel() for total in totals]), strict=True):
            total.copy_(part.view_as(total))

    def _meet(self, token: int, problem: BaseException | None = None) -> None:
        said = gather(torch.tensor([[problem is not None, token]], dtype=torch.long, device=self._device)).tolist()
        if any(failed for failed, _ in said):
            messages = gather_object([None if problem is None else f"{type(problem).__name__}: {problem}"])
            if problem is None:
                rank, message = next((r, m) for r, m in enumerate(messages) if m is not None)
                other = OtherProcessFailed(f"process {rank} failed: {message}")
                vars(other)["is_known_to_all"] = True
                raise other
            vars(problem)["is_known_to_all"] = True
        elif any(other != token for _, other in said):
            raise RuntimeError(
                "the processes are not at the same point: all must make the same call, with a dataloader that gives "
                "each of them the same batches in the same order, whole and unshared"
            )
