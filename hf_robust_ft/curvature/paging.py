"""Tensors that are in memory only while they are used, so that a model may be larger than what measures it.

A paged tensor has a shape, and a function that loads its values. An operation that reads it, or a view of it, finds it
filled, whoever calls the operation: the model's forward pass, autograd, or a rule of the sweep. When memory is short,
the tensors that were not used for longest give theirs back, and are loaded again the next time. What reads memory
otherwise than by an operation of torch (``.numpy()``, a kernel that takes an address) finds none.
"""

from __future__ import annotations

import contextlib
import gc
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from .free_memory import free_memory, give_back
from .offload_folder import OffloadFolder

# Bytes. Smaller tensors, such as biases and norms, are not worth the trouble.
SMALL = 2**20
# Of what is free; the rest is for activations.
SHARE = 0.5

_MARK = "_paged_by"


@dataclass(eq=False)
class Page:
    """One paged tensor."""

    tensor: Tensor
    """Of the whole shape; its memory comes and goes."""
    load: Callable[[], Tensor]
    written: bool = False
    """An operation has changed it: loading it would undo that."""

    @property
    def bytes(self) -> int:
        return self.tensor.numel() * self.tensor.element_size()

    def resize(self, size: int) -> None:
        self.tensor.untyped_storage().resize_(size)

    def values(self) -> Tensor:
        """Another view of the memory, so that writing to it is no change that autograd would notice."""
        tensor = self.tensor
        return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(
            tensor.untyped_storage(), 0, tensor.shape, tensor.stride()
        )


class Pages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps the memory of paged tensors within what is free. They can be read inside ``with pages:``."""

    def __init__(self, folder: OffloadFolder | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most = 0
        """Bytes that were filled at once on one device."""
        self._folder = folder
        self._in_use: list[Page] = []
        self._lock = threading.RLock()
        self._pages: dict[int, Page] = {}
        self._filled: dict[torch.device, OrderedDict[int, Page]] = defaultdict(OrderedDict)
        self._room: dict[torch.device, int] = {}

    def add(self, load: Callable[[], Tensor], shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A paged tensor.

        Args:
            load: returns its values, on any device and in any type, the same each time. May read paged tensors.
        """
        page = Page(torch.empty(shape, dtype=dtype, device=device), load)
        page.resize(0)
        self._pages[_memory(page.tensor)] = page
        return page.tensor

    def parameter(
        self,
        load: Callable[[], Tensor],
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        requires_grad: bool,
    ) -> nn.Parameter:
        """A paged parameter, from which :func:`derived` makes other paged tensors."""
        found = nn.Parameter(self.add(load, shape, dtype, device), requires_grad)
        setattr(found, _MARK, self)
        return found

    def stored(self, tensor: Tensor) -> Tensor:
        """A paged tensor of these values; by all processes together, and not to be read before :meth:`share`.

        From the folder, or the CPU's memory where there is none.
        """
        load = self._folder.put(tensor) if self._folder is not None else tensor.cpu
        return self.add(load, tensor.shape, tensor.dtype, tensor.device)

    def share(self) -> None:
        """Let all processes read what was stored.

        Raises:
            NotWritten: see :meth:`OffloadFolder.share`.
        """
        if self._folder is not None:
            self._folder.share()

    def close(self) -> None:
        """Leave no tensor that would be read where there is no memory: a traceback that shows its variables would.

        Nothing can be read any more.
        """
        for page in self._pages.values():
            page.tensor.data = page.tensor.new_empty(0)
        # Of views and of what autograd makes of tensors there is no list.
        for tensor in [found for found in gc.get_objects() if issubclass(type(found), Tensor)]:
            # Tensors of all kinds, that have nothing to do with this one, may have no memory to tell of.
            with contextlib.suppress(RuntimeError, NotImplementedError, ValueError):
                if any(_memory(plain) in self._pages for plain in self._plain([tensor])):
                    tensor.data = tensor.new_empty(0)
        self._pages.clear()
        self._filled.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        pages = self._read_by(tree_leaves((args, kwargs)))
        if not pages:
            return func(*args, **kwargs)
        # Autograd has a thread for each GPU. What one of them reads must not go before it has.
        with self._lock:
            # Where autograd is left out, an operation that may copy comes whole, under a schema that says view.
            if func.is_view and not func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd):
                return self._viewed(pages, func, args, kwargs)
            depth = len(self._in_use)
            self._in_use += pages
            try:
                self._fill(pages)
                for page in self._read_by(tree_leaves(_written(func, args, kwargs))):
                    page.written = True
                return func(*args, **kwargs)
            finally:
                del self._in_use[depth:]

    def _read_by(self, leaves: Iterable[Any]) -> list[Page]:
        tensors = (leaf for leaf in leaves if isinstance(leaf, Tensor))
        keys = dict.fromkeys(_memory(tensor) for tensor in self._plain(tensors))
        return [self._pages[key] for key in keys if key in self._pages]

    @staticmethod
    def _plain(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
        """Those that have memory of their own."""
        return (x for x in tensors if not is_traceable_wrapper_subclass(x) and x.layout is torch.strided)

    def _viewed(self, pages: Sequence[Page], func: Any, args: Any, kwargs: Any) -> Any:
        """A view reads nothing, but torch wants to see memory of the right size."""
        empty = [page for page in pages if not page.tensor.untyped_storage().nbytes()]
        for page in empty:
            page.resize(page.bytes)
        try:
            return func(*args, **kwargs)
        finally:
            for page in empty:
                page.resize(0)

    def _fill(self, pages: Sequence[Page]) -> None:
        for page in pages:
            filled, key = self._filled[page.tensor.device], _memory(page.tensor)
            if key in filled:
                filled.move_to_end(key)
                continue
            # It may be computed from other paged tensors.
            with self, torch.no_grad():
                values = page.load()
                if _memory(values) in self._pages:  # whose memory may go now
                    values = values.clone()
            self._make_room(page)
            page.resize(page.bytes)
            page.values().copy_(values)
            filled[key] = page
            self.most = max(self.most, sum(each.bytes for each in filled.values()))

    def _make_room(self, wanted: Page) -> None:
        device = wanted.tensor.device
        if device not in self._room:
            self._room[device] = room(device)
        filled = self._filled[device]
        taken = wanted.bytes + sum(page.bytes for page in filled.values())
        before = taken
        for key, page in list(filled.items()):
            if taken <= self._room[device]:
                break
            if not page.written and page not in self._in_use:
                del filled[key]
                page.resize(0)
                taken -= page.bytes
        if taken < before and device.type == "cpu":
            give_back()


def paged_by(parameters: Iterable[Tensor]) -> Pages | None:
    """What pages some of these parameters."""
    return next((getattr(p, _MARK) for p in parameters if hasattr(p, _MARK)), None)


def kept(parameter: Tensor, tensor: Tensor) -> Tensor:
    """A tensor as it is; of a paged parameter stored (:meth:`Pages.stored`)."""
    pages = paged_by([parameter])
    return tensor if pages is None else pages.stored(tensor)


def derived(parameter: Tensor, compute: Callable[[], Tensor]) -> Tensor:
    """What is computed, of shape and type of a parameter; of a paged one a paged tensor, computed when it is used."""
    pages = paged_by([parameter])
    if pages is None:
        return compute()
    return pages.add(compute, parameter.shape, parameter.dtype, parameter.device)


def room(device: torch.device) -> int:
    """Bytes for the paged tensors of one process on a device."""
    return int(free_memory(device) * SHARE)


def _written(func: Any, args: Any, kwargs: Any) -> list[Any]:
    """The arguments that an operation changes."""
    changed = [a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments]
    by_place = [value for value, is_changed in zip(args, changed, strict=False) if is_changed]
    names = [a.name for a, is_changed in zip(func._schema.arguments, changed, strict=True) if is_changed]
    return by_place + [kwargs[name] for name in names if name in kwargs]


def is_small(tensor: Tensor) -> bool:
    """Whether a tensor may stay in memory."""
    return tensor.numel() * tensor.element_size() < SMALL


def _memory(tensor: Tensor) -> int:
    address: int = tensor.untyped_storage()._cdata
    return address
