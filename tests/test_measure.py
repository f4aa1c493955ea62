"""The measure over a data set, against quadratic forms of the same examples."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from measured import EXACT, Snapshot
from oracle import find_case, perturbed_reference
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import AutoTokenizer, BatchEncoding

from hf_robust_ft import NotALayer, ReferenceMismatch
from hf_robust_ft.corrected_loss import CorrectedLoss
from hf_robust_ft.curvature import (
    HessianReport,
    MeasurementStopped,
    NonFiniteLoss,
    Statistic,
    layer_quadratic_forms,
    measure_hessian,
)
from hf_robust_ft.curvature.engine import Kind

N = 20
GENERATOR = torch.Generator().manual_seed(7)
X = torch.randn(N, 4, dtype=torch.float64, generator=GENERATOR) * torch.linspace(0.2, 2, N).double().unsqueeze(1)
Y = torch.randint(3, (N,), generator=GENERATOR)
LAYERS = ["0.weight", "2.weight", "4.weight"]


def mlp() -> nn.Module:
    return find_case("gelu").model()


REFERENCE = perturbed_reference(mlp())


def batches(size: int, rows: Iterable[int] = range(N), stop: int = N) -> list[tuple[Tensor, Tensor]]:
    chosen = list(rows)[:stop]
    return list(zip(X[chosen].split(size), Y[chosen].split(size), strict=True))


def truth(kind: Kind, count: int = N, **settings: Any) -> Tensor:
    """[layers, examples]."""
    return layer_quadratic_forms(
        mlp(), (X[:count], Y[:count]), REFERENCE, kind=kind, lanczos_steps=EXACT, **settings
    ).values.T


def measure(dataloader: Iterable[Any] | None = None, **settings: Any) -> HessianReport:
    dataloader = batches(6) if dataloader is None else dataloader
    return measure_hessian(mlp(), REFERENCE, dataloader, **{"lanczos_steps": EXACT, **settings})


def assert_is(found: Statistic, values: Tensor, rel: float = 1e-10) -> None:
    """That a statistic is the one of these values, [examples]."""
    error = (values.std() / math.sqrt(len(values))).item()
    assert found.maximum == pytest.approx(values.max().item(), rel=rel)
    assert found.example == values.argmax().item()
    assert found.mean == pytest.approx(values.mean().item(), rel=rel)
    assert found.standard_error == pytest.approx(error, rel=rel, nan_ok=True)


# -------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("size", [1, 2, 7, N])
def test_statistics_are_those_of_the_quadratic_forms(size: int) -> None:
    found = measure(batches(size))
    losses = F.cross_entropy(mlp()(X), Y, reduction="none").detach()
    assert [layer.name for layer in found.layers] == LAYERS
    for layer, values in zip(found.layers, truth("hessian"), strict=True):
        assert_is(layer.hessian, values)
        way = mlp().get_parameter(layer.name) - REFERENCE[layer.name]
        assert layer.distance == pytest.approx(way.norm().item(), rel=1e-12)
        assert layer.members == (layer.name,)
    assert_is(found.losses, losses)
    assert found.smallest_loss == pytest.approx(losses.min().item(), rel=1e-12)
    assert (found.examples, found.complete, found.lanczos_steps) == (N, True, EXACT)
    assert found.seconds > 0
    assert found.notes == ()


def test_the_sound_bound_sees_only_what_the_layer_sees() -> None:
    model, inputs = mlp(), {}
    for name in ("0", "2", "4"):
        module = model.get_submodule(name)
        module.register_forward_hook(lambda module, args, out, name=name: inputs.update({name: args[0].detach()}))
    model(X)
    form, upper = truth("hessian"), truth("hessian_upper")
    for i, layer in enumerate(measure().layers):
        v = (model.get_parameter(layer.name) - REFERENCE[layer.name]).detach()
        x = inputs[layer.name.partition(".")[0]]
        length = (2 * upper[i] - form[i]) / v.norm()  # ‖H v‖
        reach = (x @ v.T).norm(dim=1) / x.norm(dim=1)  # ‖P v‖ with P = x xᵀ / ‖x‖²
        assert_is(layer.upper, (form[i] + reach * length) / 2, rel=1e-8)


@pytest.mark.parametrize("layers", ["weights", "blocks", {"all": "*"}, {"ends": ["0", "4"]}])
def test_settled_maxima_are_the_true_ones(layers: Any) -> None:
    found = measure(layers=layers)
    for layer, values, upper in zip(
        found.layers, truth("hessian_psd", layers=layers), truth("hessian_upper", layers=layers), strict=True
    ):
        assert layer.positive is not None
        assert layer.positive.settled
        assert layer.positive.maximum == pytest.approx(values.max().item(), rel=1e-9)
        assert layer.positive.example == values.argmax().item()
        assert layer.positive.examples <= 8
        assert values.max() <= layer.upper.maximum * (1 + 1e-12) <= upper.max() * (1 + 1e-9)
        assert layer.upper.mean >= values.mean()
    assert found.settled == 1


def test_examples_with_low_bounds_are_not_looked_at() -> None:
    looked_at = [layer.positive.examples for layer in measure().layers if layer.positive is not None]
    assert len(looked_at) == 3
    assert sum(looked_at) < N


@pytest.mark.parametrize("name", ["conv2d", "bert_tokens", "gpt2_causal", "tied_linear", "products_of_weights", "vit"])
def test_any_model_settles_on_its_true_maxima(name: str) -> None:
    case = find_case(name)
    model, batch = case.model(), {**case.inputs, "labels": case.labels}
    measures = case.measure()
    found = measure_hessian(model, perturbed_reference(model), [batch], lanczos_steps=EXACT)
    for i, layer in enumerate(found.layers):
        assert_is(layer.hessian, measures.hessian[i], rel=1e-6)
        assert layer.positive is not None
        assert layer.positive.settled
        assert layer.positive.maximum == pytest.approx(measures.hessian_psd[i].max().item(), rel=1e-8)
        assert layer.upper.maximum >= layer.positive.maximum * (1 - 1e-12)
        assert layer.upper.maximum <= measures.hessian_upper[i].max() * (1 + 1e-9)


class Hidden(nn.Module):
    """The loss of every example bends downwards more than upwards, so that sound bounds are loose."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, input: Tensor) -> Tensor:
        return self.second(torch.sin(3 * self.first(input)))


@pytest.mark.parametrize("descending", [False, True])
def test_eight_examples_a_layer_are_enough_work(descending: bool) -> None:
    torch.manual_seed(0)
    model = Hidden().double()
    reference = perturbed_reference(model, scale=0.5)
    same = X[:1] + 1e-3 * X  # all bounds near each other
    bounds = layer_quadratic_forms(model, (same, Y), reference, kind="hessian_upper").values[:, 0]
    same, labels = same[bounds.argsort(descending=descending)], Y[bounds.argsort(descending=descending)]
    values = layer_quadratic_forms(model, (same, labels), reference, kind="hessian_psd", lanczos_steps=EXACT).values
    found = measure_hessian(model, reference, zip(same.split(3), labels.split(3), strict=True), lanczos_steps=EXACT)
    open_ends = [layer.positive for layer in found.layers if layer.positive and not layer.positive.settled]
    assert open_ends
    assert found.settled == 1 - len(open_ends) / len(found.layers)
    assert all(part.examples == 8 for part in open_ends)
    for i, layer in enumerate(found.layers):
        assert layer.positive is not None
        assert layer.positive.maximum == pytest.approx(values[layer.positive.example, i].item(), rel=1e-8)
        assert layer.upper.maximum >= values[:, i].max()


def without_times(report: HessianReport) -> list[float | int | None]:
    """The numbers of a report in one row, apart from the example numbers and the times."""
    rows: list[float | int | None] = [report.examples, report.smallest_loss]
    for layer in report.layers:
        for statistic in (layer.hessian, layer.upper, report.losses):
            rows += [statistic.maximum, statistic.mean, statistic.standard_error]
        assert layer.positive is not None
        rows += [layer.distance, layer.positive.maximum, layer.positive.examples, layer.positive.settled]
    return rows


def test_batch_size_and_order_do_not_matter() -> None:
    whole = measure(batches(N))
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0)).tolist()
    for size, rows in ((1, range(N)), (7, range(N)), (3, order), (N, order)):
        found = measure(batches(size, rows))
        assert without_times(found) == pytest.approx(without_times(whole), rel=1e-9)
        for layer, other in zip(found.layers, whole.layers, strict=True):
            assert layer.positive is not None
            assert other.positive is not None
            assert list(rows)[layer.hessian.example] == other.hessian.example
            assert list(rows)[layer.upper.example] == other.upper.example
            assert list(rows)[layer.positive.example] == other.positive.example


@pytest.mark.parametrize("settings", [{"examples_at_once": 1}, {"examples_at_once": 5, "directions_at_once": 1}])
def test_chunks_do_not_matter(settings: dict[str, Any]) -> None:
    assert without_times(measure(**settings)) == pytest.approx(without_times(measure()), rel=1e-9)


@pytest.mark.parametrize("correction", ["forward", "backward"])
def test_corrected_losses_are_measured(correction: Any) -> None:
    loss = CorrectedLoss(correction, 0.3, num_classes=3)
    found = measure(loss=loss)
    for layer, values in zip(found.layers, truth("hessian", loss=loss), strict=True):
        assert_is(layer.hessian, values)
    losses, _ = loss.per_example(mlp()(X), Y)
    assert_is(found.losses, losses.detach())
    assert found.smallest_loss == pytest.approx(losses.min().item())
    assert (found.smallest_loss < 0) == (correction == "backward")


# ---------------------------------------------------------------------------------------------------- time and steps


def test_no_time_leaves_lanczos_out() -> None:
    found = measure(time_budget=0)
    assert [layer.positive for layer in found.layers] == [None] * 3
    assert found.settled == 0
    assert found.complete
    for layer, other in zip(found.layers, measure().layers, strict=True):
        assert layer.upper == other.upper
        assert layer.hessian == other.hessian


def test_much_time_is_like_no_limit() -> None:
    assert without_times(measure(time_budget=1e6)) == without_times(measure())


def test_few_steps_give_less_and_say_so() -> None:
    few, all_steps = measure(lanczos_steps=2), measure()
    assert few.lanczos_steps == 2
    gaps = [layer.positive.gap for layer in few.layers if layer.positive is not None]
    assert max(gaps) > 0
    for layer, other in zip(few.layers, all_steps.layers, strict=True):
        assert layer.positive is not None
        assert other.positive is not None
        assert layer.positive.maximum <= layer.upper.maximum * (1 + 1e-12)
        assert layer.hessian == other.hessian


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"time_budget": -1}, "time_budget is -1; give seconds >= 0, or None"),
        ({"time_budget": math.nan}, "time_budget is nan"),
        ({"lanczos_steps": 0}, "lanczos_steps is 0"),
        ({"examples_at_once": 0}, "examples_at_once is 0"),
        ({"layers": "all"}, "layers is 'all'"),
        ({"layers": {"a": "b"}}, "patterns of a match no layer"),
    ],
    ids=str,
)
def test_arguments_that_do_not_fit_are_refused_before_any_data(settings: dict[str, Any], message: str) -> None:
    def untouched() -> Iterator[Any]:
        pytest.fail("asked for data")
        yield

    with pytest.raises(ValueError, match=message):
        measure(untouched(), **settings)
    with pytest.raises(ReferenceMismatch, match=r"no weights for 0\.weight"):
        measure_hessian(mlp(), {}, untouched())


def test_the_cost_is_told_before(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "hf_robust_ft")
    told = []

    def loader() -> Iterator[tuple[Tensor, Tensor]]:
        for i, batch in enumerate(batches(10)):
            if i == 1:
                told.extend(record.getMessage() for record in caplog.records)
            yield batch

    class Sized:
        def __len__(self) -> int:
            return 2

        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            return loader()

    for dataloader, extent in ((Sized(), "2 batches"), (loader(), "a batch")):
        told.clear()
        caplog.clear()
        found = measure(dataloader)
        lanczos = (
            r"about \S+ s a value, \d+ s for one value a layer, at most 8 times that. Memory: \S+ GB more than the "
            "model, its reference and a batch"
        )
        assert re.fullmatch(rf"sound bounds of 3 layers: about \d+ s for {extent}; then Lanczos .*: {lanczos}", told[0])
        assert 0 < found.estimated_seconds < 60


# -------------------------------------------------------------------------------------------------------------- data


class Examples(Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input": X[i], "labels": Y[i]}


class Stream(IterableDataset[dict[str, Tensor]]):
    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return ({"input": x, "labels": y} for x, y in zip(X, Y, strict=True))


def test_loaders_of_all_kinds_give_the_same() -> None:
    expected = without_times(measure())
    shuffled = DataLoader(Examples(), batch_size=3, shuffle=True, generator=torch.Generator().manual_seed(0))
    for loader in (
        (batch for batch in batches(5)),
        DataLoader(Examples(), batch_size=7),
        shuffled,
        [BatchEncoding({"input": x, "labels": y}) for x, y in batches(4)],
        [{"input": x, "label": y} for x, y in batches(4)],
        [({"input": x}, y) for x, y in batches(4)],
    ):
        assert without_times(measure(loader)) == pytest.approx(expected, rel=1e-9)


def test_a_stream_has_no_length() -> None:
    found = measure(DataLoader(Stream(), batch_size=6))
    assert without_times(found) == pytest.approx(without_times(measure()), rel=1e-9)


def test_a_loader_may_use_its_memory_again() -> None:
    def loader() -> Iterator[tuple[Tensor, Tensor]]:
        x, y = torch.empty(5, 4, dtype=torch.float64), torch.empty(5, dtype=torch.long)
        for i in range(0, N, 5):
            x.copy_(X[i : i + 5])
            y.copy_(Y[i : i + 5])
            yield x, y
        x.fill_(torch.nan)

    assert without_times(measure(loader())) == pytest.approx(without_times(measure()), rel=1e-9)


def test_a_transformers_model_takes_batch_encodings() -> None:
    torch.manual_seed(0)
    model = tiny.bert()
    reference = perturbed_reference(model, scale=0.02)
    ids = torch.randint(1, 50, (10, 6), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(6) < torch.arange(1, 11).unsqueeze(1)).long()
    encodings = {"input_ids": ids, "attention_mask": mask, "labels": torch.arange(10) % 3}
    loader = [BatchEncoding({key: value[at : at + 4] for key, value in encodings.items()}) for at in range(0, 10, 4)]
    found = measure_hessian(model, reference, loader)
    values = layer_quadratic_forms(model, encodings, reference).values.T
    for layer, expected in zip(found.layers, values, strict=True):
        assert layer.hessian.maximum == pytest.approx(expected.max().item(), rel=1e-3, abs=1e-9)
        assert layer.hessian.mean == pytest.approx(expected.mean().item(), rel=1e-3, abs=1e-6)


MINILM = Path(__file__).parent.parent / ".assets" / "models" / "minilm-l6"


@pytest.mark.real
@pytest.mark.skipif(
    not MINILM.is_dir(), reason="needs in .assets/models what ../shared/assets/fetch_models.py lays out"
)
def test_a_tokenizer_and_a_collator_make_the_batches() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MINILM)
    texts = ["a dog", "the smallest prime number is even", "rain", "a kind of tree with needles", "to run fast"]
    torch.manual_seed(0)
    model = tiny.bert(vocab_size=len(tokenizer))
    reference = perturbed_reference(model, scale=0.02)

    def collate(rows: Sequence[int]) -> BatchEncoding:
        batch: BatchEncoding = tokenizer([texts[i] for i in rows], padding=True, return_tensors="pt")
        batch["labels"] = torch.tensor(rows) % 3
        return batch

    found = measure_hessian(model, reference, DataLoader(range(5), batch_size=2, collate_fn=collate), time_budget=0)  # type: ignore[arg-type]
    alone = [layer_quadratic_forms(model, collate([i]), reference).values for i in range(5)]
    for layer, values in zip(found.layers, torch.cat(alone).T, strict=True):
        assert layer.hessian.maximum == pytest.approx(values.max().item(), rel=1e-3, abs=1e-9)
        assert layer.hessian.example == values.argmax()


@pytest.mark.parametrize("loader", [[], iter([]), DataLoader([])])
def test_a_loader_without_data_is_refused(loader: Any) -> None:
    with pytest.raises(ValueError, match="dataloader gave no batch: there is nothing to measure"):
        measure(loader)


def test_an_empty_batch_among_others_is_passed_over() -> None:
    whole, empty = measure(), (X[:0], Y[:0])
    assert without_times(measure([empty, *batches(6)[:2], empty, *batches(6)[2:]])) == without_times(whole)


# ------------------------------------------------------------------------------------------------ stopped on the way


def assert_holds(report: HessianReport, count: int) -> None:
    """That a report is of the first examples, without the second pass."""
    assert not report.complete
    assert report.examples == count
    for layer, values in zip(report.layers, truth("hessian", count), strict=True):
        assert_is(layer.hessian, values)
        assert layer.positive is None
    assert report.settled == 0
    assert_is(report.losses, F.cross_entropy(mlp()(X[:count]), Y[:count], reduction="none").detach())


class Broken(RuntimeError):
    pass


def interrupted(after: int, error: BaseException) -> Iterator[tuple[Tensor, Tensor]]:
    yield from batches(4)[:after]
    raise error


def test_an_error_of_the_loader_leaves_a_report() -> None:
    with pytest.raises(MeasurementStopped, match=r"disk on fire \(after 8 examples; \.report of this error") as caught:
        measure(interrupted(2, Broken("disk on fire")))
    assert isinstance(caught.value.__cause__, Broken)
    assert_holds(caught.value.report, 8)


def test_a_bad_label_leaves_a_report_and_names_the_example() -> None:
    y = Y.clone()
    y[13] = -1

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return torch.where(labels < 0, torch.nan, F.cross_entropy(logits, labels.clamp(min=0), reduction="none"))

    loader = list(zip(X.split(4), y.split(4), strict=True))
    with pytest.raises(MeasurementStopped, match="loss of example 13 is nan") as caught:
        measure(loader, loss=loss)
    assert isinstance(caught.value.__cause__, NonFiniteLoss)
    assert_holds(caught.value.report, 12)
    with pytest.raises(NonFiniteLoss, match="loss of example 1 is nan"):  # nothing to report yet
        measure(loader[3:], loss=loss)


def test_missing_labels_leave_a_report() -> None:
    with pytest.raises(MeasurementStopped, match="needs 'labels'") as caught:
        measure([*batches(4)[:3], {"input": X[:2]}])
    assert_holds(caught.value.report, 12)


def test_an_error_of_the_first_batch_is_raised_as_it_is() -> None:
    with pytest.raises(Broken, match="disk on fire"):
        measure(interrupted(0, Broken("disk on fire")))
    with pytest.raises(ValueError, match="needs 'labels'"):
        measure([{"input": X}])


def test_an_interrupt_leaves_a_report() -> None:
    assert_holds(measure(interrupted(2, KeyboardInterrupt())), 8)


def test_an_interrupt_before_the_first_batch_is_passed_on() -> None:
    with pytest.raises(KeyboardInterrupt):
        measure(interrupted(0, KeyboardInterrupt()))


def test_an_interrupt_of_the_second_pass_keeps_the_first() -> None:
    values = []

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        if len(labels) == 1:  # the second pass goes by single examples
            values.append(1)
            if len(values) == 2:
                raise KeyboardInterrupt
        return F.cross_entropy(logits, labels, reduction="none")

    found, whole = measure(batches(5), loss=loss), measure(batches(5))
    assert not found.complete
    assert found.examples == N
    assert [layer.upper for layer in found.layers] == [layer.upper for layer in whole.layers]
    assert 0 < sum(layer.positive is not None for layer in found.layers) < 3


def test_the_model_stays_as_it_was_however_it_ends() -> None:
    model = mlp().train()
    before = Snapshot(model)
    measure_hessian(model, REFERENCE, batches(6))
    before.check()
    measure_hessian(model, REFERENCE, interrupted(2, KeyboardInterrupt()))
    before.check()
    with pytest.raises(MeasurementStopped):
        measure_hessian(model, REFERENCE, interrupted(2, Broken()))
    before.check()


def test_curvature_that_is_not_finite_is_no_silent_maximum() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Linear(4, 4, bias=False), nn.Linear(4, 3)

        def forward(self, input: Tensor) -> Tensor:
            return self.head(self.first(input).abs().sqrt())

    model = Root().double()
    x = X.clone()
    x[7] = 0  # a finite loss, and no second derivative
    with pytest.raises(MeasurementStopped, match="example 7") as caught:
        measure_hessian(model, perturbed_reference(model), zip(x.split(5), Y.split(5), strict=True))
    assert caught.value.report.examples == 5


# ------------------------------------------------------------------------------------------------- places and files


@pytest.mark.parametrize("layers", ["weights", "blocks", {"some": ["*.dense.*", "*.mlp.*", "*conv*"]}])
@pytest.mark.parametrize("build", [tiny.bert, tiny.vit, tiny.resnet, tiny.gpt2, tiny.token_classifier])
def test_every_trained_parameter_has_one_place(build: Any, layers: Any) -> None:
    torch.manual_seed(0)
    model = build()
    next(model.parameters()).requires_grad_(False)
    name = "pixel_values" if build in (tiny.vit, tiny.resnet) else "input_ids"
    x = torch.randn(2, 1, 8, 8) if name == "pixel_values" else torch.randint(3, 50, (2, 5))
    labels = torch.tensor([0, 1]) if build is not tiny.token_classifier else torch.randint(3, (2, 5))
    found = measure_hessian(
        model, perturbed_reference(model), [{name: x, "labels": labels}], layers=layers, time_budget=0
    )
    members = [name for layer in found.layers for name in layer.members]
    left_out = [other.name for other in found.left_out]
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    statistics = {name for name, _ in model.named_buffers() if "running" in name}
    assert len({*members, *left_out}) == len(members) + len(left_out)
    assert {*members, *left_out} == trained | statistics
    assert all(other.reason for other in found.left_out)
    if isinstance(layers, dict):
        assert any("no pattern" in other.reason for other in found.left_out)


def as_text(report: HessianReport) -> str:
    return repr(dataclasses.asdict(report))  # NaN is NaN there


@pytest.mark.parametrize("count", [1, 2, N])
@pytest.mark.parametrize("budget", [None, 0])
def test_a_report_goes_to_a_file_and_back(tmp_path: Path, count: int, budget: float | None) -> None:
    found = measure(batches(6, stop=count), time_budget=budget, layers={"ends": ["0", "4"]})
    assert math.isnan(found.losses.standard_error) == (count == 1)
    path = tmp_path / "folder" / "report.json"
    found.save(path)
    loaded = HessianReport.load(path)
    assert as_text(loaded) == as_text(found)
    assert loaded.settled == found.settled
    assert isinstance(loaded.left_out[0], NotALayer)
    assert loaded == found or count == 1
    # Plain JSON, without NaN and Infinity.
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert [p.name for p in path.parent.iterdir()] == ["report.json"]


def test_a_report_that_stopped_goes_to_a_file_and_back(tmp_path: Path) -> None:
    found = measure(interrupted(1, KeyboardInterrupt()))
    found.save(tmp_path / "report.json")
    assert HessianReport.load(tmp_path / "report.json") == found


@pytest.mark.parametrize("content", ["", "[1]", "{}", "nothing", '{"layers": 3}', '{"layers": [], "losses": {}}'])
def test_a_file_that_is_no_report_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"other\.json is no report of measure_hessian .*measure again"):
        HessianReport.load(path)


def test_what_the_sweep_cannot_do_is_said() -> None:
    case = find_case("custom_function")
    model = case.model()
    found = measure_hessian(model, perturbed_reference(model), [{**case.inputs, "labels": case.labels}])
    for layer, values in zip(found.layers, case.measure().hessian, strict=True):
        assert_is(layer.hessian, values, rel=1e-8)
    assert isinstance(found.notes, tuple)
