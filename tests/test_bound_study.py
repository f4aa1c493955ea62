"""The study of measures of generalization: its figures against oracles, and its commands as users start them."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from started import start
from tiny import CLASSES, vit
from torch.nn.functional import cross_entropy

from hf_robust_ft import HessianReport, measure_hessian
from hf_robust_ft.curvature.report import LayerCurvature, PositivePart, Statistic

RECIPES = Path(__file__).parent.parent / "recipes"


@pytest.fixture(scope="module")
def study(recipe: Any) -> Any:
    return recipe("bound_study")


@pytest.fixture(scope="module")
def tables(recipe: Any) -> Any:
    return recipe("bound_study_report")


def run(way: str, n: int, seed: int, **values: float) -> dict[str, Any]:
    return {"way": way, "n": n, "seed": seed, **values}


# Which runs there are


def test_finished_runs_are_not_repeated(study: Any) -> None:
    keys = [(0, 250, "plain"), (0, 250, "slow"), (1, 250, "plain")]
    done = [run("slow", 250, 0, epochs=10)]
    assert study.unfinished(keys, done, {"epochs": 10}) == [keys[0], keys[2]]
    with pytest.raises(SystemExit, match=r"the output has runs with epochs=10; name another --output for these"):
        study.unfinished(keys, done, {"epochs": 5})


# What a run learns from


def test_labels_of_test_examples_are_as_noisy_as_those_of_training(study: Any) -> None:
    labels = torch.arange(1000) % study.CLASSES
    train = study.Examples(torch.arange(1000.0), labels)
    few, held_out = study.drawn(100, 0, 0.0, train, train)
    assert len(few.labels) == 100
    assert torch.equal(few.labels, labels[few.pixels.long()])
    assert held_out is train
    more, _ = study.drawn(200, 0, 0.0, train, train)
    assert torch.equal(more.pixels[:100], few.pixels)
    other, _ = study.drawn(100, 1, 0.0, train, train)
    assert not torch.equal(other.pixels, few.pixels)

    noisy, noisy_test = study.drawn(1000, 0, 0.4, train, train)
    wrong = noisy.labels != labels[noisy.pixels.long()]
    wrong_test = noisy_test.labels != labels
    for share in (wrong.double().mean(), wrong_test.double().mean()):
        assert share.item() == pytest.approx(0.4, abs=0.05)
    assert not torch.equal(wrong, wrong_test)


# What is measured


def test_losses_errors_and_margins(study: Any) -> None:
    torch.manual_seed(0)
    model = vit().train()
    pixels, labels = torch.randn(5, 1, 8, 8), torch.arange(5) % CLASSES
    losses, errors, margins = study.risks(model, study.Examples(pixels, labels).batches(torch.device("cpu")))
    assert not model.training
    with torch.no_grad():
        logits = model(pixel_values=pixels).logits.double()
    for i, (row, label) in enumerate(zip(logits, labels, strict=True)):
        assert losses[i].item() == pytest.approx(cross_entropy(row, label).item())
        others = max(row[j].item() for j in range(CLASSES) if j != label)
        assert margins[i].item() == pytest.approx(row[label].item() - others)
        assert errors[i].item() == (row.argmax() != label)


def test_batches_are_in_order_and_cut_short(study: Any) -> None:
    examples = study.Examples(torch.arange(150.0), torch.arange(150))
    batches = examples.batches(torch.device("cpu"), 100)
    assert [len(batch["labels"]) for batch in batches] == [study.BATCH_SIZE, 100 - study.BATCH_SIZE]
    assert torch.equal(torch.cat([batch["pixel_values"] for batch in batches]), examples.pixels[:100])


def layer(name: str, hessian: tuple[float, float], upper: tuple[float, float], positive: float | None) -> Any:
    found = None if positive is None else PositivePart(positive, 0, 0.0, 1, True)
    statistics = [Statistic(maximum, 0, mean, 0.1) for maximum, mean in (hessian, upper)]
    return LayerCurvature(name, (name,), 1.0, *statistics, found)


def test_five_variants_of_the_hessian_measure(study: Any) -> None:
    layers = (layer("a", (4.0, 1.0), (9.0, 4.0), 6.25), layer("b", (-1.0, -2.0), (1.0, 0.25), None))
    report = HessianReport(layers, (), 2, Statistic(2.0, 0, 1.0, 0.1), 0.5, 10, True, 1.0, 1.0, ())
    found = study.hessian_measures(report, n=50)
    factor = math.sqrt(2 / 50)
    assert found["largest_loss"] == pytest.approx(factor)
    # A layer that Lanczos did not look at counts by its sound bound.
    roots = {"sound": 3 + 1, "exact": 2 + 0, "lanczos": 2.5 + 1, "sound_mean": 2 + 0.5, "exact_mean": 1 + 0}
    for name, root in roots.items():
        assert found[f"roots_{name}"] == pytest.approx(root)
        assert found[f"hessian_{name}"] == pytest.approx(root * factor)


def moved() -> tuple[Any, dict[str, torch.Tensor]]:
    """A model some way from its reference."""
    torch.manual_seed(0)
    model = vit()
    reference = {name: weight.clone() for name, weight in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model, reference


def test_measures_of_distance_alone(study: Any) -> None:
    model, reference = moved()
    batch = {"pixel_values": torch.randn(2, 1, 8, 8), "labels": torch.tensor([0, 1])}
    report = measure_hessian(model, reference, [batch], time_budget=0)
    found = study.distance_only(report, 25, model, reference)
    weights = dict(model.named_parameters())
    ways = [(weights[name] - reference[name]).norm().item() for each in report.layers for name in each.members]
    assert found["distance"] == pytest.approx(math.hypot(*ways) / 5, rel=1e-5)
    assert found["distance_sum"] == pytest.approx(sum(ways) / 5, rel=1e-5)
    matrices = [weights[each.name].detach().flatten(1).double() for each in report.layers]
    spectral = [torch.linalg.matrix_norm(matrix, 2).item() for matrix in matrices]
    factor = math.hypot(*(way / norm for way, norm in zip(ways, spectral, strict=True)))
    assert 10 ** found["spectral"] == pytest.approx(math.prod(spectral) * factor / 5, rel=1e-4)


def test_the_scale_of_the_pac_bayes_measure_is_the_largest_that_is_tolerated(study: Any) -> None:
    model, reference = moved()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    # Labels as predicted: any noise can but harm.
    pixels = torch.randn(20, 1, 8, 8)
    with torch.no_grad():
        batches = [{"pixel_values": pixels, "labels": model.eval()(pixel_values=pixels).logits.argmax(1)}]
    found = study.pac_bayes_measure(model, reference, batches, n=100, seed=3)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())

    scales = study.SCALES
    assert found["sigma"] in scales[1:-1]
    generator = torch.Generator().manual_seed(3)
    parameters = dict(model.named_parameters())
    draws = [
        {name: torch.randn(p.shape, generator=generator) for name, p in parameters.items()} for _ in range(study.DRAWS)
    ]
    base = study.risks(model, batches)[0].mean().item()
    risen = {}
    for scale in (found["sigma"], scales[scales.index(found["sigma"]) + 1]):
        losses = []
        for draw in draws:
            noisy = vit()
            noisy.load_state_dict({name: before[name] + scale * noise for name, noise in draw.items()})
            losses.append(study.risks(noisy, batches)[0].mean().item())
        risen[scale] = np.mean(losses) - base
    low, high = risen.values()
    assert low <= study.TOLERATED < high

    squares = sum((before[name] - reference[name]).double().square().sum().item() for name in parameters)
    choice = math.log(2 * math.sqrt(100) * len(scales) / study.DELTA)
    assert found["pac_bayes"] == pytest.approx(math.sqrt((squares / (2 * found["sigma"] ** 2) + choice) / 200))


def test_numbers_are_kept_to_six_digits(study: Any) -> None:
    assert study.shortened({"a": 1.23456789, "n": 1234567, "way": "plain"}) == {
        "a": 1.23457,
        "n": 1234567,
        "way": "plain",
    }


# What the report says


def kendall(xs: Any, ys: Any) -> float:
    """tau-b, pair by pair."""
    signs = [(np.sign(a - b), np.sign(c - d)) for (a, c), (b, d) in itertools.combinations(zip(xs, ys, strict=True), 2)]
    untied = [sum(sign[i] != 0 for sign in signs) for i in (0, 1)]
    return float(sum(a * b for a, b in signs) / math.sqrt(untied[0] * untied[1]))


def test_taus_over_all_runs_and_within_sizes(tables: Any) -> None:
    generator = np.random.default_rng(0)
    sizes = np.repeat([250, 500, 1000], 6)
    values = generator.integers(0, 5, size=(18, 3)).astype(float)
    values[sizes == 250, 1] = 1.0  # within one size it does not vary
    values[:, 2] = 7.0
    gaps = generator.integers(0, 9, size=18).astype(float)
    everything, within = tables.taus(values, gaps, sizes)
    for column in (0, 1):
        assert everything[column] == pytest.approx(kendall(values[:, column], gaps))
        counted = [n for n in (250, 500, 1000) if np.ptp(values[sizes == n, column])]
        expected = np.mean([kendall(values[sizes == n, column], gaps[sizes == n]) for n in counted])
        assert within[column] == pytest.approx(expected)
    assert np.isnan([everything[2], within[2]]).all()


def test_two_runs_of_a_size_are_enough_and_one_is_not(tables: Any) -> None:
    values, gaps, sizes = np.array([[1.0], [2.0], [9.0]]), np.array([2.0, 1.0, 5.0]), np.array([250, 250, 500])
    assert tables.taus(values, gaps, sizes)[1].tolist() == [-1.0]


def test_size_alone_orders_all_runs_and_none_within_a_size(tables: Any) -> None:
    sizes = np.repeat([1, 2, 3], 40)
    generator = np.random.default_rng(0)
    gaps = 10.0 / sizes + generator.random(120)
    values = (10.0 / sizes + generator.random(120))[:, None]
    everything, within = tables.taus(values, gaps, sizes)
    assert everything[0] > 0.6
    assert abs(within[0]) < 0.2


def test_a_bootstrap_draws_keys_with_all_of_their_runs(tables: Any) -> None:
    keys = ["plain", "slow", "nso"] * 8
    repeated = 0
    for rows in tables.resamples(keys, 20):
        assert len(rows) == len(keys)
        counts = [int((rows == i).sum()) for i in range(len(keys))]
        for first in range(3):
            assert len(set(counts[first::3])) == 1
        repeated += max(counts) > 1
    assert repeated
    lengths = {len(rows) for rows in tables.resamples(["a", "a", "a", "b"], 20)}
    assert lengths == {2, 4, 6}


def test_an_interval_leaves_samples_without_a_value_out(tables: Any) -> None:
    samples = np.append(np.arange(0, 101.0), [np.nan] * 50)
    assert tables.interval(samples) == pytest.approx((2.5, 97.5))
    assert np.isnan(tables.interval(np.full(3, np.nan))).all()


def test_ratios_are_of_runs_on_the_same_examples(tables: Any) -> None:
    runs = [
        run("plain", 250, 0, gap=8.0), run("plain", 500, 0, gap=9.0), run("nso", 250, 0, gap=4.0),
        run("nso", 500, 0, gap=1.125), run("plain", 250, 1, gap=3.0), run("nso", 250, 1, gap=1.0),
        run("nso", 500, 1, gap=1.0), run("plain", 250, 2, gap=-1.0), run("nso", 250, 2, gap=1.0),
    ]  # fmt: skip
    assert tables.ratios(runs, "gap", "nso") == pytest.approx([4.0, 3.0])


def test_the_scale_of_the_measure_is_that_of_runs_with_a_gap(tables: Any) -> None:
    runs = [run("plain", 250, seed, hessian_lanczos=2.0, gap=gap) for seed, gap in enumerate((1.0, 4.0, 0.5, -1.0))]
    said = tables.scale(runs, "gap")
    assert said.endswith("over the gap: 2 (median of 3 runs with a gap above 0), from 0.5 to 4")
    assert tables.scale(runs[3:], "gap") == "No run has a gap above 0"


def test_means_and_errors_in_words(tables: Any) -> None:
    assert tables.mean_and_error([1.0, 2.0, 3.0]) == "2.00 ± 0.58"
    assert tables.mean_and_error([0.01234]) == "0.0123"
    assert tables.mean_and_error([1234.5, 1234.5]) == "1234 ± 0"
    assert tables.mean_and_error([0.0]) == "0.000"
    assert tables.mean_and_error([]) == "none"


def test_the_table_tells_a_measure_that_orders_from_one_that_does_not(tables: Any) -> None:
    generator = np.random.default_rng(0)
    runs = []
    for seed, n, (number, way) in itertools.product(range(3), (250, 500), enumerate(("plain", "slow", "nso"))):
        gap = 1 + number + 0.01 * seed
        values = dict.fromkeys(tables.MEASURES, 0.0) | {name: generator.random() for name in ("spectral", "row_sums")}
        runs.append(run(way, n, seed, **(values | {"hessian_lanczos": gap, "distance": -gap, "gap": gap})))
    rows = {
        line.split(" | ")[0].strip("| "): line.split(" | ")
        for line in tables.correlation_table(runs, "gap", 20).splitlines()
    }
    assert rows["Hessian distance, max vᵀH⁺v"][1:4] == ["1.00", "1.00", "[1.00, 1.00]"]
    assert rows["distance"][2] == "-1.00"
    assert rows["distance"][5:7] == ["2.00", "[2.00, 2.00]"]
    assert rows["√C alone"][2] == "nan"


@pytest.mark.slow
def test_the_study_and_its_report(tmp_path: Path) -> None:
    words = ["--sizes", "20", "--epochs", "1", "--measured", "1", "--ways", "plain", "radius", "--seeds"]
    said = start(RECIPES / "bound_study.py", *words, "0", cwd=tmp_path)
    assert said.count("Hessian") == 2
    said = start(RECIPES / "bound_study.py", *words, "0", "1", cwd=tmp_path, processes=2)
    assert said.count("Hessian") == 2
    path = tmp_path / "outputs" / "bound_study.jsonl"
    runs = [json.loads(line) for line in path.read_text().splitlines()]
    by_key = {(each["way"], each["seed"]): each for each in runs}
    assert by_key.keys() == set(itertools.product(("plain", "radius"), (0, 1)))
    assert len(runs) == 4
    for each in runs:
        assert each["gap"] == pytest.approx(each["test_loss"] - each["train_loss"], abs=1e-5)
        assert each["hessian_sound"] >= each["hessian_lanczos"] > 0
    assert by_key["radius", 1]["distance"] < by_key["plain", 1]["distance"]

    said = start(RECIPES / "bound_study_report.py", "--draws", "10", cwd=tmp_path)
    assert said.startswith("4 runs\n")
    assert said.count("\n| ") == (1 + 14) + (1 + 2) + (1 + 1)
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


# Certificates


def test_certificates_are_of_the_models_of_the_study(study: Any, recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    certificates = recipe("bound_study_certificates")
    monkeypatch.setattr(certificates, "EPOCHS", 1)
    start = str(RECIPES / "glyph_vit")
    examples, _ = study.drawn(64, 0, 0.0, *study.data(start))
    model, _ = study.fresh_model(start, 0)
    study.fine_tune(model, examples, "plain", 0, 1)
    loss = study.risks(model, examples.batches(model.device))[0].mean().item()
    line = run("plain", 64, 0, noise_rate=0.0, epochs=1, gap=0.1, error_gap=0.1, test_error=0.5, train_loss=loss)
    found = certificates.certified(line, examples, start)
    assert found["train_loss"] == pytest.approx(loss, rel=1e-5)
    assert 0 <= found["empirical"] <= found["certificate"] <= 1
    assert found["kl"] > 0
    rows = certificates.table([found, {**found, "way": "slow", "kl": 2 * found["kl"], "gap": 0.2}])
    assert f"| plain | 64 | 0 | {found['certificate']:.3f} |" in rows
    assert rows.endswith("n = 64, seed 0: 1.00")
    with pytest.raises(SystemExit, match="these are not its models"):
        certificates.certified({**line, "train_loss": 2 * loss}, examples, start)
