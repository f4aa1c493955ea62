"""Several processes measure what one does. They are real; what they run is in workers/measuring.py."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from torchrun import close, results, run

from hf_robust_ft.curvature.candidates import CANDIDATES, Candidate, Candidates
from hf_robust_ft.curvature.division import GRAPH_PRODUCTS, divided
from hf_robust_ft.curvature.sums import Sums
from hf_robust_ft.processes import Processes

pytestmark = pytest.mark.timeout(800)

SAME = ("report", "few", "means")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs")
    run("measuring.py", out, 1, *SAME, "trainer")
    run("measuring.py", out, 2, *SAME, "trainer", "random_numbers", "wrapped", "failures")
    run("measuring.py", out, 3, *SAME)
    return out


@pytest.mark.multiprocess
@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("name", SAME)
def test_several_processes_measure_what_one_does(runs: Path, name: str, processes: int) -> None:
    (alone,) = results(runs, name, 1)
    first, *others = results(runs, name, processes)
    assert all(other == first for other in others)  # to the last bit: they go on together
    for case, expected in alone.items():
        if case != "shuffled":
            close(first[case], expected, case)


@pytest.mark.multiprocess
def test_every_example_is_measured_once(runs: Path) -> None:
    for processes in (1, 2, 3):
        for rank in results(runs, "report", processes):
            for report in rank.values():
                assert report["examples"] == 11
                assert report["complete"] is True
                assert {layer["upper"]["example"] for layer in report["layers"]} <= set(range(11))
        assert [results(runs, "few", processes)[0][case]["examples"] for case in ("one", "single", "empty")] == [
            1,
            5,
            3,
        ]
        assert results(runs, "means", processes)[0]["counts"] == [11] * 5


@pytest.mark.multiprocess
def test_shuffling_makes_no_difference(runs: Path) -> None:
    """Torch's own generator is that of the first process while they measure."""
    (alone,) = results(runs, "report", 1)
    for processes in (2, 3):
        for rank in results(runs, "report", processes):
            for got, expected in zip(rank["shuffled"]["layers"], alone["in order"]["layers"], strict=True):
                # The sound bound depends on padding, and so on which examples share a batch.
                for what in ("mean", "maximum"):
                    assert got["hessian"][what] == pytest.approx(expected["hessian"][what], rel=1e-9)


@pytest.mark.multiprocess
def test_wrappers_are_taken_off(runs: Path) -> None:
    (alone,) = results(runs, "report", 1)
    for rank in results(runs, "wrapped", 2):
        close(rank["DDP"], alone["in order"], "DDP")
        close(rank["compiled"], alone["in order"], "compiled")


@pytest.mark.multiprocess
def test_each_process_keeps_its_own_random_numbers(runs: Path) -> None:
    for rank, got in enumerate(results(runs, "random_numbers", 2)):
        torch.manual_seed(100 + rank)
        assert got == torch.rand(3).tolist()


@pytest.mark.multiprocess
def test_a_training_on_two_processes_is_measured_as_on_one(runs: Path) -> None:
    (alone,) = results(runs, "trainer", 1)
    first, second = results(runs, "trainer", 2)
    assert first == second
    for processes in (1, 2):
        assert (runs / f"trainer-{processes}" / "hessian_report.json").is_file()
    assert alone["report"]["examples"] == 11
    assert set(alone["risks"]) == {"training", "eval"}
    close(first, alone, "report")


@pytest.mark.multiprocess
def test_a_failure_of_one_ends_the_others_with_its_message(runs: Path) -> None:
    first, second = results(runs, "failures", 2)
    for case in ("mean", "swept"):
        assert first[case] == "OtherProcessFailed: process 1 failed: OSError: no such image", case
        assert second[case] == "OSError: no such image", case
    assert first["setup"].startswith("OtherProcessFailed: process 1 failed: ValueError: layers: the patterns of all")
    assert second["setup"].startswith("ValueError: layers: the patterns of all")
    for rank in (first, second):
        assert rank["shuffled apart"].startswith("ValueError: dataloader gave the processes different batches")
        assert rank["shuffled apart, mean"].startswith("RuntimeError: the processes are not at the same point")
        assert rank["prepared"].startswith("ValueError: dataloader is a DataLoaderShard")
        assert rank["other weights"].startswith("ValueError: model or reference has other weights")


@pytest.mark.multiprocess
def test_what_was_measured_before_a_failure_is_kept(runs: Path) -> None:
    first, second = results(runs, "failures", 2)
    # The first process goes on: 2 + 2 + 1 examples of its own. The last one has 2 + 2.
    assert first["report"]["examples"] == second["report"]["examples"] == 9
    assert first["report"] == second["report"]
    assert not first["report"]["complete"]
    assert first["stopped"].startswith("process 1: no such image (after 9 examples")
    assert second["stopped"].startswith("no such image (after 9 examples")
    # The error at the first batch, too: the others have measured some by then.
    assert first["first batch"].startswith("MeasurementStopped: process 1: no such image (after 5 examples")
    for rank in (first, second):
        assert rank["interrupted"] == [False, 9]
    (alone,) = results(runs, "report", 1)
    close(first["afterwards"], alone["in order"], "report")


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_candidates_are_divided_evenly(processes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    layers, steps = 26, 4
    for examples in (1, 3, 12, 60):  # from one that is the worst for all layers, to another one for each
        pairs = [(i, int(torch.randint(examples, (), generator=generator))) for i in range(layers)]
        shares = divided(pairs, layers, steps, processes)
        assert sorted(itertools.chain.from_iterable(shares)) == sorted(pairs)
        loads = []
        for share in shares:
            assert [key for key, _ in itertools.groupby(share, lambda pair: pair[1])] == sorted({n for _, n in share})
            products = sum((steps + 1) * (layers - i) / layers for i, _ in share)
            loads.append(products + GRAPH_PRODUCTS * len({n for _, n in share}))
        assert max(loads) - min(loads) < GRAPH_PRODUCTS + steps + 1
    assert divided([], layers, steps, processes) == [[] for _ in range(processes)]
    # An example for each process, and the same work: no graph is made twice.
    even = [(0, n) for n in range(processes)]
    assert sorted(divided(even, layers, steps, processes)) == [[pair] for pair in even]


# What is put together


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_shares_are_disjoint_even_and_whole(count: int) -> None:
    taken = [0] * count
    for turn, items in enumerate([0, 1, 1, 1, 5, 7, 8, 16]):
        found: list[int] = []
        for rank in range(count):
            processes = Processes(together=False)
            processes.count, processes.rank = count, rank
            share = processes.share(items, turn)
            found += range(share.start, share.stop)
            assert items // count <= share.stop - share.start <= math.ceil(items / count)
            taken[rank] += share.stop - share.start
        assert sorted(found) == list(range(items))
    assert sum(taken) == 39


def test_sums_of_parts_are_those_of_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(20, 3, generator=generator, dtype=torch.float64)
    values[3], values[17] = values.max(), values.max()  # the first of equals counts
    whole, empty = Sums(3), Sums(3)
    whole.add(values, 0)
    parts = [Sums(3) for _ in range(3)]
    for part, rows in zip(parts, ((12, 20), (0, 5), (5, 12)), strict=True):
        part.add(values[slice(*rows)], rows[0])
    for i, got in enumerate(Sums.merged([*parts, empty]).statistic(i) for i in range(3)):
        assert got.example == 3
        assert got.maximum == values[:, i].max()
        assert got.mean == pytest.approx(values[:, i].mean().item(), rel=1e-12)
        assert got.standard_error == pytest.approx((values[:, i].std() / 20**0.5).item(), rel=1e-12)
        assert whole.statistic(i).example == 3


def test_candidates_of_parts_are_those_of_the_whole() -> None:
    bounds = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def of(rows: range) -> Candidates:
        found = Candidates()
        for batch in (rows[: len(rows) // 2], rows[len(rows) // 2 :]):
            for bound, n in found.promising(bounds[batch.start : batch.stop]):
                found.add(Candidate(bound, batch.start + n, None, None))
        return found

    order = bounds.argsort(descending=True).tolist()
    for found in (of(range(50)), Candidates.merged([of(range(30)), of(range(30, 33)), of(range(33, 50))])):
        assert sorted(c.example for c in found) == sorted(order[:CANDIDATES])
        assert found.largest_other() == bounds.max()
        for round_ in (order[:1], order[1:2], order[2:4], order[4:CANDIDATES]):
            assert [c.example for c in found.next(-math.inf)] == round_
            assert found.next(bounds[round_[0]].item()) == []  # none of them can hold more
            for n in round_:
                found.looked_at(n)
        assert found.next(-math.inf) == []
        assert found.largest_other() == bounds[order[CANDIDATES]]
