"""Traces by Hutchinson against dense Hessians: each probe's sample, their mean, their errors, their intervals."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Iterator
from typing import Any

import oracle
import pytest
import scipy.stats
import tiny
import torch
from dense import CASES, LAYERS, PLAIN, X, Y, batches, case_batches, case_hessian, mean_hessian, smooth, squares
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from hf_robust_ft import find_layers
from hf_robust_ft.corrected_loss import CorrectedLoss
from hf_robust_ft.curvature import NonFiniteLoss, NotTwiceDifferentiable, mean, probes, trace
from hf_robust_ft.curvature.interval import student_interval
from hf_robust_ft.curvature.probes import Probes
from hf_robust_ft.curvature.trace import hessian_trace

each_kind = pytest.mark.parametrize("joint", [False, True], ids=["separate", "joint"])


def rademacher(weights: list[Tensor], count: int, seed: int = 0) -> list[list[Tensor]]:
    drawn = Probes("rademacher", count, weights, seed)
    return [[part.flatten() for part in drawn[p]] for p in range(count)]


# ------------------------------------------------------------------------------------------------- against dense


@each_kind
@pytest.mark.parametrize("name", CASES)
def test_each_probe_gives_its_quadratic_form(name: str, joint: bool) -> None:
    case = oracle.find_case(name)
    model = case.model()
    names = [layer.name for layer in find_layers(model)[0]]
    found = hessian_trace(model, case_batches(case), loss=case.loss(), probes=2, joint=joint)
    assert found.layers == tuple(names)
    (whole,) = case_hessian(case, [names])
    sizes = [model.get_parameter(name).numel() for name in names]
    for sample, z in zip(found.samples, rademacher([model.get_parameter(n) for n in names], 2), strict=True):
        for i, value in enumerate(sample):
            # Separate probes see the block alone, joint ones also H_ij z_j.
            seen = torch.cat([part if joint or j == i else torch.zeros_like(part) for j, part in enumerate(z)])
            expected = z[i] @ (whole @ seen).split(sizes)[i]
            assert value.item() == pytest.approx(expected.item(), rel=1e-9, abs=1e-9 * whole.abs().sum().item())


@each_kind
@pytest.mark.parametrize("kind", ["forward", "backward"])
def test_a_corrected_loss(kind: Any, joint: bool) -> None:
    model, transition = smooth(), oracle.some_transition(3)
    loss = CorrectedLoss(kind, transition.tolist())
    found = hessian_trace(model, batches(3), loss=loss, probes=2, joint=joint, layers={"both": "*"})
    (hessians,) = oracle.dense_hessians(model, {"input": X}, Y, oracle.Loss(kind, transition), [LAYERS])
    for sample, z in zip(found.samples, rademacher([model.get_parameter(n) for n in LAYERS], 2), strict=True):
        flat = torch.cat(z)
        assert sample.item() == pytest.approx((flat @ hessians.mean(0) @ flat).item(), rel=1e-9)


@each_kind
def test_standard_errors_are_those_of_the_theory_and_fall_with_the_root(joint: bool) -> None:
    model = smooth()
    (whole,) = mean_hessian(model, [LAYERS])
    few, many = (hessian_trace(model, batches(7), probes=n, joint=joint) for n in (100, 1600))
    sizes = [model.get_parameter(name).numel() for name in LAYERS]
    blocks = [row.split(sizes, dim=1) for row in whole.split(sizes)]
    for i, row in enumerate(blocks):
        block = row[i]
        variance = 2 * (block.square().sum() - block.diagonal().square().sum())
        if joint:
            variance += sum(other.square().sum() for j, other in enumerate(row) if j != i)
        for found, allowed in ((few, 0.3), (many, 0.1)):
            expected = math.sqrt(variance.item() / found.probes)
            assert found.standard_errors[i].item() == pytest.approx(expected, rel=allowed)
            assert abs(found.values[i].item() - block.trace().item()) < 4 * expected


@each_kind
def test_a_diagonal_hessian_comes_out_exactly(joint: bool) -> None:
    model = nn.Linear(4, 3, bias=False).double()
    # With one-hot inputs, ½ ‖W x‖² has the Hessian diag(x) ⊗ 1.
    found = hessian_trace(model, [(torch.eye(4).double(), Y[:4])], loss=squares, probes=2, joint=joint)
    torch.testing.assert_close(found.samples, torch.full((2, 1), 3.0).double())
    assert found.standard_errors.item() < 1e-14
    low, high = found.interval()
    assert low.item() == pytest.approx(3.0)
    assert high.item() == pytest.approx(3.0)


@each_kind
def test_the_intervals_hold_the_truth_as_often_as_they_say(joint: bool) -> None:
    model = smooth()
    truth = torch.stack([hessian.trace() for hessian in mean_hessian(model, [[name] for name in LAYERS])])
    held = torch.zeros(2)
    for seed in range(200):
        low, high = hessian_trace(model, batches(7), seed=seed, joint=joint).interval(0.95)
        held += (low <= truth) & (truth <= high)
    shares = held / 200
    print(f"joint={joint}: 95 % intervals hold the truth in {shares.tolist()} of 200 trials")
    assert ((shares >= 0.90) & (shares <= 0.99)).all()


# ---------------------------------------------------------------------------------------------------- invariants


@each_kind
@pytest.mark.parametrize("size", [1, 2])
def test_batches_make_no_difference(size: int, joint: bool) -> None:
    one = hessian_trace(smooth(), batches(7), joint=joint)
    other = hessian_trace(smooth(), [(X[:0], Y[:0]), *batches(size)], joint=joint)
    torch.testing.assert_close(other.samples, one.samples, rtol=1e-10, atol=1e-12)
    assert other.examples == one.examples == 7


@each_kind
def test_an_iterator_is_enough(joint: bool) -> None:
    expected = hessian_trace(smooth(), batches(3), probes=3, joint=joint)
    torch.testing.assert_close(
        hessian_trace(smooth(), iter(batches(3)), probes=3, joint=joint).samples, expected.samples
    )


@each_kind
def test_the_seed_decides(joint: bool) -> None:
    first, again, other = (hessian_trace(smooth(), batches(7), joint=joint, seed=s) for s in (1, 1, 2))
    assert torch.equal(first.samples, again.samples)
    assert not (first.samples[1:] == other.samples[:-1]).any()
    assert first.seed == 1


@each_kind
def test_probes_that_do_not_fit_are_drawn_again(joint: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = hessian_trace(smooth(), batches(2), joint=joint, probes=5)
    monkeypatch.setattr(probes, "KEPT_ELEMENTS", 0)
    monkeypatch.setattr(trace, "SWEPT_ELEMENTS", 2 * 35)
    found = hessian_trace(smooth(), batches(2), joint=joint, probes=5)
    torch.testing.assert_close(found.samples, expected.samples, rtol=1e-10, atol=1e-12)


def test_probes_are_independent_signs_or_normal_numbers() -> None:
    like = [torch.zeros(100, 50), torch.zeros(3000)]
    signs, normals = (Probes(kind, 2, like, seed=4) for kind in ("rademacher", "gaussian"))
    drawn = [torch.cat([part.flatten() for part in found[p]]) for found in (signs, normals) for p in range(2)]
    assert set(drawn[0].tolist()) == {-1.0, 1.0}
    correlations = torch.stack(drawn) @ torch.stack(drawn).t() / 8000
    torch.testing.assert_close(correlations, torch.eye(4), rtol=0, atol=0.06)
    assert len(signs) == 2
    with pytest.raises(IndexError):
        signs[2]


@each_kind
def test_groups_of_weights(joint: bool) -> None:
    model = smooth()
    (whole,) = mean_hessian(model, [LAYERS])
    found = hessian_trace(model, batches(7), layers={"both": "*"}, joint=joint, probes=400)
    assert abs(found.values - whole.trace()) < 4 * found.standard_errors
    last = hessian_trace(model, batches(7), layers={"last": "2"}, joint=joint, probes=2)
    assert last.layers == ("last",)
    assert [other.name for other in last.left_out] == ["0.bias", "2.bias", "0.weight"]


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precisions(joint: bool, dtype: torch.dtype) -> None:
    model = smooth().to(dtype)
    expected = hessian_trace(model.double(), batches(7), joint=joint)
    found = hessian_trace(model.to(dtype), batches(7, X.to(dtype).float()), joint=joint)
    allowed = 1e-4 if dtype is torch.float32 else 0.1
    torch.testing.assert_close(found.values, expected.values, rtol=allowed, atol=allowed)


@each_kind
def test_the_model_is_left_as_it_was(joint: bool) -> None:
    torch.manual_seed(0)
    model = tiny.bert(hidden_dropout_prob=0.5).train()
    before = tiny.weights(model)
    data = [{"input_ids": torch.arange(3, 13).view(2, 5), "labels": torch.tensor([0, 2])}]
    first, again = (hessian_trace(model, data, probes=2, joint=joint) for _ in range(2))
    assert torch.equal(first.samples, again.samples)  # no dropout
    assert model.training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    tiny.assert_equal_weights(before, tiny.weights(model))


@each_kind
def test_one_graph_is_alive_at_a_time(joint: bool) -> None:
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    made = 0

    class Mark(torch.autograd.Function):
        """A node that can be counted as long as its graph is alive."""

        @staticmethod
        def forward(ctx: Any, logits: Tensor) -> Tensor:
            nonlocal made
            made += 1
            alive.add(ctx)
            return logits.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
            return gradient

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return PLAIN(Mark.apply(logits), labels)

    def watched() -> Iterator[Any]:
        for batch in batches(2):
            gc.collect()
            assert not alive, "the graph of the batch before is still alive"
            yield batch

    hessian_trace(smooth(), watched(), loss=loss, probes=2, joint=joint)
    assert made >= 4


def test_a_dataloader_with_workers_is_started_once_a_pass() -> None:
    started = 0

    class Counting(list[Any]):
        def __iter__(self) -> Iterator[Any]:
            nonlocal started
            started += 1
            return super().__iter__()

    hessian_trace(smooth(), Counting(batches(7)), probes=2)
    assert started == 1


def test_a_dataloader_that_cannot_tell_its_length() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            yield from zip(X, Y, strict=True)

    found = hessian_trace(smooth(), DataLoader(Stream(), batch_size=3), probes=2)
    assert torch.equal(found.samples, hessian_trace(smooth(), batches(3), probes=2).samples)


def test_a_layer_without_influence_has_trace_zero() -> None:
    case = oracle.find_case("unused_and_frozen")
    for joint in (False, True):
        found = hessian_trace(case.model(), case_batches(case), probes=2, joint=joint)
        assert found.values[found.layers.index("spare.weight")] == 0


def test_a_loss_that_is_linear_in_the_weights() -> None:
    for joint in (False, True):
        found = hessian_trace(nn.Linear(4, 3).double(), batches(4), loss=lambda z, y: z.sum(1), probes=2, joint=joint)
        assert found.values.item() == 0


# ------------------------------------------------------------------------------------------------------ interval


def test_the_interval_is_students() -> None:
    found = hessian_trace(smooth(), batches(7), probes=5)
    low, high = found.interval(0.9)
    ends = scipy.stats.t.interval(0.9, 4, found.samples.mean(0), scipy.stats.sem(found.samples))
    for end, expected in zip((low, high), ends, strict=True):
        torch.testing.assert_close(end, torch.from_numpy(expected))


@pytest.mark.parametrize("level", [0.0, 1.0, 95, -0.5])
def test_a_level_that_is_none(level: float) -> None:
    with pytest.raises(ValueError, match=f"level is {level}; a confidence level lies between 0 and 1"):
        student_interval(torch.zeros(1), torch.ones(1), 5, level)


# ----------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("count", [1, 0, -3])
def test_too_few_probes(count: int) -> None:
    with pytest.raises(ValueError, match=f"probes is {count}; a standard error needs at least 2"):
        hessian_trace(smooth(), batches(7), probes=count)


@each_kind
def test_a_negative_seed(joint: bool) -> None:
    with pytest.raises(ValueError, match="seed is -1; give 0 or a positive number"):
        hessian_trace(smooth(), batches(7), seed=-1, joint=joint)


@each_kind
def test_no_data(joint: bool) -> None:
    with pytest.raises(ValueError, match=r"dataloader gave no batch: there is nothing to measure. Give it data"):
        hessian_trace(smooth(), [(X[:0], Y[:0])], joint=joint)
    with pytest.raises(ValueError, match=r"Give it a list or a DataLoader, as an iterator is used up"):
        hessian_trace(smooth(), iter([]), joint=joint)


@each_kind
def test_a_loss_that_is_not_finite_is_named_by_its_number_in_the_pass(joint: bool) -> None:
    x = X.clone()
    x[5] = math.inf
    with pytest.raises(NonFiniteLoss, match="the loss of example 5 is nan: look at its inputs and label"):
        hessian_trace(smooth(), batches(2, x), joint=joint)


@each_kind
def test_unknown_layers(joint: bool) -> None:
    with pytest.raises(ValueError, match="match no layer"):
        hessian_trace(smooth(), batches(2), layers={"head": "classifier*"}, joint=joint)


def test_a_model_that_autograd_cannot_differentiate_twice() -> None:
    case = oracle.find_case("embedding_bag")
    with pytest.raises(NotTwiceDifferentiable, match=r"can't differentiate this model twice.*joint=False"):
        hessian_trace(case.model(), case_batches(case), joint=True)


def test_other_examples_in_another_pass() -> None:
    model = smooth()
    groups = trace.group_layers(model, "weights")[0]
    passes = iter([batches(7), batches(7), batches(2)[:2], batches(7, X + 1)])

    class Changing:
        def __iter__(self) -> Iterator[Any]:
            return iter(next(passes))

    loss = trace.ExampleLoss(None, model)
    with trace.measuring(model):
        changing = mean.MeanLoss(model, groups, Changing(), loss, "test")
        zeros = torch.zeros(1, 35).double()
        changing.products(zeros)
        changing.products(zeros)
        for _ in range(2):
            with pytest.raises(
                ValueError, match=r"dataloader gave 7 examples of mean loss .* it must give the same ones"
            ):
                changing.products(zeros)


class Counted(list[Any]):
    """Batches, how often they were read, and a length that may be wrong."""

    read = 0
    length = 1

    def __iter__(self) -> Iterator[Any]:
        self.read += 1
        return super().__iter__()

    def __len__(self) -> int:
        return self.length


@pytest.mark.parametrize(("size", "length", "read"), [(7, 1, 1), (4, 2, 3), (4, 1, 3)])
def test_an_only_batch_is_read_once(size: int, length: int, read: int) -> None:
    model, loader = smooth(), Counted(batches(size))
    loader.length = length
    (hessian,) = mean_hessian(model, [LAYERS])
    vectors = torch.randn(3, len(hessian), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with trace.measuring(model):
        groups = trace.group_layers(model, {"model": "*"})[0]
        loss = mean.MeanLoss(model, groups, loader, trace.ExampleLoss(None, model), "test")
        found = torch.cat([loss.products(v.unsqueeze(0)) for v in vectors])
    torch.testing.assert_close(found, vectors @ hessian, rtol=1e-10, atol=1e-12)
    assert (loss.passes, loader.read) == (3, read)


def test_the_mean_loss_comes_along() -> None:
    model = smooth()
    with trace.measuring(model):
        loss = mean.MeanLoss(
            model, trace.group_layers(model, "weights")[0], batches(2), trace.ExampleLoss(None, model), "test"
        )
        value = loss.each_bend(lambda bend: None, torch.zeros(1, dtype=torch.float64))
    assert value == pytest.approx(PLAIN(model(X), Y).mean().item(), rel=1e-12)
