"""A dataloader's batches, of which each process measures its share of the examples."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from operator import length_hint
from typing import Any

import torch
from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..processes import Processes
from .model import Inputs, some_examples, split_batch

# Seconds until a progress bar shows: a tiny model needs none.
BAR_DELAY = 5.0


class Batches:
    """One pass over a dataloader: number of the first example, inputs and labels of each batch, with a progress bar.

    Every process reads every batch, which costs little beside its curvature, and takes its rows of it: each example
    is measured once, padded as by one process, and numbered as one process numbers it. Empty shares are left out.

    Args:
        dataloader: any iterable of batches, see :func:`~.model.split_batch`; the same ones on all processes.
        model: unwrapped.
        task: what is being measured, for the progress bar.
        processes: that measure together; by default this one alone.

    Raises:
        ValueError: a dataloader that Accelerate has shared out already, with some examples twice.
    """

    def __init__(
        self, dataloader: Iterable[Any], model: nn.Module, task: str, processes: Processes | None = None
    ) -> None:
        self._dataloader = dataloader
        self._model = model
        self._task = task
        self._processes = processes or Processes(together=False)
        self.read = 0
        """Examples of all batches so far, whoever measures them."""
        self.token = 0
        """A number that hangs on all labels so far: the same on all processes that read the same batches."""
        if self._processes.count > 1 and isinstance(dataloader, (DataLoaderShard, DataLoaderDispatcher)):
            raise ValueError(
                f"dataloader is a {type(dataloader).__name__}, which gives each process other batches and some "
                "examples twice; give the DataLoader as it was before accelerator.prepare, the same on all processes"
            )

    def __iter__(self) -> Iterator[tuple[int, Inputs, Tensor]]:
        """
        Raises:
            ValueError: no batch with an example.
        """
        # tqdm(dataloader) would start the workers of a DataLoader twice. A DataLoader may have a length that it can't
        # tell.
        batches = length_hint(self._dataloader) or None
        quiet = True if self._processes.rank else None
        with tqdm(total=batches, desc=self._task, unit="batch", delay=BAR_DELAY, leave=False, disable=quiet) as bar:
            for turn, batch in enumerate(self._dataloader):
                inputs, labels = split_batch(batch, self._model)
                first, count = self.read, len(labels)
                self.read += count
                if self._processes.count > 1:
                    # A byte view, as numpy has no bfloat16.
                    content = labels.contiguous().cpu().flatten().view(torch.uint8).numpy()
                    self.token = zlib.crc32(content.tobytes(), self.token)
                mine = self._processes.share(count, turn)
                if mine.start < mine.stop:
                    yield first + mine.start, some_examples(inputs, count, mine.start, mine.stop), labels[mine]
                bar.update()
        if not self.read:
            once = isinstance(self._dataloader, Iterator)
            remedy = "a list or a DataLoader, as an iterator is used up" if once else "data"
            raise ValueError(f"dataloader gave no batch: there is nothing to measure. Give it {remedy}")
