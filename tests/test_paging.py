"""Paged tensors: every operation finds them filled, whoever calls it, within the room that there is."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hf_robust_ft.curvature import free_memory, offload_folder, paging
from hf_robust_ft.curvature.offload_folder import OffloadFolder
from hf_robust_ft.curvature.paging import Pages, derived, paged_by
from hf_robust_ft.files import NotWritten
from hf_robust_ft.processes import Processes

SIZE = 5 * 5 * 8
"""Bytes of one weight."""
X = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def room(monkeypatch: pytest.MonkeyPatch) -> None:
    """For two of six weights."""
    monkeypatch.setattr(paging, "room", lambda device: 2 * SIZE)


def weights(count: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(5, 5, dtype=torch.float64, generator=generator) for _ in range(count)]


class Paged:
    """Some weights, and how often each was loaded."""

    def __init__(self) -> None:
        self.pages = Pages()
        self.loads: Counter[int] = Counter()
        self.tensors = [
            self.pages.parameter(self._load(i, weight), weight.shape, weight.dtype, weight.device, True)
            for i, weight in enumerate(weights())
        ]

    def _load(self, i: int, weight: Tensor) -> Callable[[], Tensor]:
        def load() -> Tensor:
            self.loads[i] += 1
            return weight

        return load


def net(some: list[Tensor]) -> Tensor:
    hidden = X
    for weight in some:
        hidden = torch.tanh(nn.functional.linear(hidden, weight))
    return hidden.square().sum()


def test_products_with_the_hessian_are_those_of_whole_weights() -> None:
    def products(some: list[Tensor]) -> list[Tensor]:
        first = torch.autograd.grad(net(some), some, create_graph=True)
        v = torch.arange(25, dtype=torch.float64).view(5, 5)
        return [torch.autograd.grad((g * v).sum(), w, retain_graph=True)[0] for g, w in zip(first, some, strict=True)]

    expected = products([weight.requires_grad_() for weight in weights()])
    paged = Paged()
    with paged.pages:
        found = products(list(paged.tensors))
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert paged.pages.most == 2 * SIZE
    # All but the first, which no backward pass reads, had to go in between.
    assert all(paged.loads[i] > 2 for i in range(1, 6))
    assert sum(tensor.untyped_storage().nbytes() for tensor in paged.tensors) == 2 * SIZE


def test_what_fits_is_loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paging, "room", lambda device: 6 * SIZE)
    paged = Paged()
    with paged.pages:
        torch.autograd.grad(net(list(paged.tensors)), paged.tensors)
    assert set(paged.loads.values()) == {1}


def test_the_one_that_was_not_used_for_longest_goes_first() -> None:
    paged = Paged()
    first, second, third = paged.tensors[:3]
    with paged.pages:
        for tensor in (first, second, first, third, first):  # the second goes for the third
            tensor.sum()
    assert paged.loads == {0: 1, 1: 1, 2: 1}


def test_an_operation_that_reads_more_than_there_is_room_for_has_it_all() -> None:
    paged = Paged()
    with paged.pages:
        found = torch.stack(list(paged.tensors))
    assert torch.equal(found, torch.stack(weights()))
    assert paged.pages.most == 6 * SIZE


def test_views_read_nothing_and_see_what_is_loaded_later() -> None:
    paged = Paged()
    (weight,) = weights(1)
    with paged.pages:
        views = [paged.tensors[0].t(), paged.tensors[0][1:3], paged.tensors[0].unsqueeze(0).expand(2, -1, -1)]
        assert not paged.loads
        assert torch.equal(views[0] + 0, weight.t())
        for other in paged.tensors[1:]:
            other.sum()
        assert not paged.tensors[0].untyped_storage().nbytes()
        assert torch.equal(views[1] * 1, weight[1:3])
        assert torch.equal(views[2].clone(), weight.expand(2, 5, 5))
    assert paged.loads[0] == 2


def test_what_is_derived_is_computed_from_what_is_paged() -> None:
    paged = Paged()
    start = torch.ones(5, 5, dtype=torch.float64)
    ways = [derived(weight, lambda weight=weight: weight.detach() - start) for weight in paged.tensors]
    assert not paged.loads
    with paged.pages:
        # Each needs two pages, itself and the weight, and twice that together with another one.
        found = [(way * other).sum() for way, other in zip(ways, reversed(ways), strict=True)]
    expected = [((a - start) * (b - start)).sum() for a, b in zip(weights(), reversed(weights()), strict=True)]
    assert found == expected
    same = derived(paged.tensors[0], paged.tensors[0].detach)
    with paged.pages:
        assert torch.equal(same + 0, weights()[0])
    assert paged_by([start]) is None
    assert paged_by([start, paged.tensors[0]]) is paged.pages
    assert torch.equal(derived(start, lambda: start + 1), start + 1)


@pytest.mark.parametrize("how", ["in place", "by name"])
def test_what_was_written_to_is_not_loaded_again(how: str) -> None:
    paged = Paged()
    with paged.pages, torch.no_grad():
        if how == "in place":
            paged.tensors[0].add_(1)
        else:
            torch.add(weights()[0], torch.ones(5, 5, dtype=torch.float64), out=paged.tensors[0])
        for other in paged.tensors[1:]:
            other.sum()
        assert torch.equal(paged.tensors[0] + 0, weights()[0] + 1)
    assert paged.loads[0] == 1


def test_operations_that_may_copy_or_not_find_values_where_autograd_is_left_out() -> None:
    """There they come whole, under schemas that say view; as in a load that computes."""
    paged = Paged()
    (weight,) = weights(1)
    tensor = paged.tensors[0].detach()
    with paged.pages, torch.inference_mode():
        assert torch.equal(tensor.t().contiguous(), weight.t())
        assert torch.equal(tensor.t().reshape(-1), weight.t().reshape(-1))
        assert torch.equal(tensor.to(torch.float32), weight.float())
    computed = paged.pages.add(lambda: tensor.t().reshape(-1).float(), (25,), torch.float64, tensor.device)
    with paged.pages:
        assert torch.equal(computed + 0, weight.t().reshape(-1).float().double())


def test_what_one_thread_reads_stays_while_another_one_makes_room() -> None:
    """Autograd has a thread for each GPU."""
    paged = Paged()
    expected = [weight.sum().item() for weight in weights()]
    wrong = []

    def read(first: int) -> None:
        with paged.pages:
            for turn in range(300):
                i, j = (first + turn) % 6, (first + 2 * turn + 1) % 6
                found = (paged.tensors[i].detach() + paged.tensors[j].detach()).sum().item()
                if abs(found - expected[i] - expected[j]) > 1e-12:
                    wrong.append((i, j))

    threads = [threading.Thread(target=read, args=(k,)) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_load_that_fails_leaves_the_others_usable() -> None:
    paged = Paged()

    def fail() -> Tensor:
        raise OSError("gone")

    bad = paged.pages.add(fail, (5, 5), torch.float64, torch.device("cpu"))
    with paged.pages:
        with pytest.raises(OSError, match="gone"):
            bad.sum()
        assert not bad.untyped_storage().nbytes()
        assert torch.equal(torch.stack(list(paged.tensors)), torch.stack(weights()))


def test_nothing_that_is_left_afterwards_reads_where_there_is_no_memory() -> None:
    """As a traceback that shows its variables does; it would end the process."""
    paged = Paged()
    with paged.pages:
        turned, leaf = paged.tensors[1].t(), paged.tensors[2].detach()
        loss = net(list(paged.tensors))
        whole = paged.tensors[3] + 0
    paged.pages.close()
    assert all(repr(tensor).startswith("tensor([]") for tensor in (turned, leaf))
    assert all(repr(tensor).startswith("Parameter containing:\ntensor([]") for tensor in paged.tensors)
    unmade = nn.LazyLinear(2)  # a tensor without memory, that has nothing to do with it
    paged.pages.close()
    assert "uninitialized" in repr(unmade.weight).lower()
    assert loss.isfinite()
    assert torch.equal(whole, weights()[3])


@pytest.mark.parametrize("launched", free_memory.LAUNCHED)
def test_room_is_a_share_of_free_memory(launched: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for name in free_memory.LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    alone = paging.room(torch.device("cpu"))
    monkeypatch.setenv(launched, "8")
    shared = paging.room(torch.device("cpu"))
    assert 2**20 < shared < alone / 6  # what is free changes from one moment to the next
    assert paging.is_small(torch.empty(2**18 - 1))
    assert not paging.is_small(torch.empty(2**18))


OWN_MEMORY = """
import contextlib, re, runpy, sys
from pathlib import Path
import torch

def own():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

large = [torch.ones(2**20)]
large.clear()  # after which glibc keeps blocks up to this size

def fill():
    for _ in range(40):
        large.append(torch.ones(2**19))
        kept.append(torch.ones(2**17))  # which lies behind it

how, kept = sys.argv[1], []
module = runpy.run_path(sys.argv[2])  # without all of the package
if how == "trimmed":
    fill()
    large.clear()
with module["memory_given_back"]() if how != "kept" else contextlib.nullcontext():
    fill()
    full = own()
    large.clear()
    if how == "trimmed":
        module["give_back"]()
    print(full - own())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc and glibc")
def test_what_is_freed_is_given_back_at_once() -> None:
    def given_back(how: str) -> int:
        # A process of its own: glibc first uses what earlier tests have left free, and that stays with the process.
        command = [sys.executable, "-c", OWN_MEMORY, how, str(free_memory.__file__)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert given_back("given_back") > 0.9 * 40 * 2**21
    assert given_back("kept") < 0.5 * 40 * 2**21  # why it is needed
    assert given_back("trimmed") > 0.9 * 40 * 2**21  # blocks from before, of which a quarter goes by itself here


def test_a_container_has_less_than_the_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.undo()
    for name in free_memory.LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    for name, text in {"max": "5000000", "current": "1000000", "none": "max"}.items():
        (tmp_path / name).write_text(text)
    names = (str(tmp_path / "none"), str(tmp_path / "current")), (str(tmp_path / "max"), str(tmp_path / "current"))
    monkeypatch.setattr(free_memory, "CGROUPS", names)
    assert paging.room(torch.device("cpu")) == 2_000_000


def test_without_a_folder_it_is_stored_in_memory() -> None:
    pages = Pages()
    stored = pages.stored(weights()[0])
    pages.share()
    with pages:
        assert torch.equal(stored + 0, weights()[0])


def test_files_are_gone_as_soon_as_they_can_be_read() -> None:
    folder = OffloadFolder(Processes(together=False))
    first = folder.put(torch.arange(3.0))
    folder.share()
    second = folder.put(torch.ones(2, dtype=torch.bfloat16).expand(2, 2))
    folder.share()
    assert not list(folder.path.iterdir())
    assert torch.equal(first(), torch.arange(3.0))
    assert torch.equal(second(), torch.ones(2, 2, dtype=torch.bfloat16))
    folder.close()
    assert not folder.path.exists()


def test_a_disk_that_is_full(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(offload_folder.tempfile, "tempdir", str(tmp_path))
    folder = OffloadFolder(Processes(together=False))
    folder.put(torch.ones(2))
    folder.path.rename(tmp_path / "elsewhere")
    folder.put(torch.ones(2))
    with pytest.raises(NotWritten, match=r"can't be written to .*hf-robust-ft-.*set TMPDIR to a folder of a disk"):
        folder.share()
    folder.close()
    monkeypatch.setattr(offload_folder.tempfile, "tempdir", str(tmp_path / "nothing"))
    with pytest.raises(NotWritten, match=r"no folder for the weights can be made .*; set TMPDIR"):
        OffloadFolder(Processes(together=False))
