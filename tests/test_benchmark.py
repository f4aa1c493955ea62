"""The benchmark: its draws, the methods that the package does not offer, its tables, and its commands."""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from started import start
from torch.nn import functional

RECIPES = Path(__file__).parent.parent / "recipes"


@pytest.fixture(scope="module")
def recipes(recipe: Any) -> dict[str, ModuleType]:
    parts = ("baselines", "data", "methods", "report", "tuning")
    return {"benchmark": recipe("benchmark")} | {part: recipe(f"benchmark_{part}") for part in parts}


@pytest.fixture(scope="module")
def data(recipes: dict[str, ModuleType]) -> ModuleType:
    return recipes["data"]


@pytest.fixture(scope="module")
def report(recipes: dict[str, ModuleType]) -> ModuleType:
    return recipes["report"]


def test_development_and_report_share_no_example(data: ModuleType) -> None:
    verbs = data.SOURCES["wordnet-verbs"]
    labels = np.asarray(verbs._loaded[0]["label"][:])
    seen: dict[bool, set[int]] = {False: set(), True: set()}
    for seed in (0, 1, 100, 101):
        parts = verbs.parts(seed)
        rows = [row for file, drawn in parts.values() if file == 0 for row in drawn.tolist()]
        assert len(set(rows)) == len(rows)  # nothing is trained on and evaluated
        seen[seed >= 100] |= set(rows)
        assert np.bincount(labels[parts["train"][1]], minlength=10).min() > 60  # of 1,000
    assert not seen[False] & seen[True]
    assert verbs.parts(0)["test"][0] == 0
    file, rows = verbs.parts(100)["test"]
    assert (file, len(rows)) == (1, 1000)


def test_training_and_validation_labels_are_noisy_and_test_labels_clean(data: ModuleType) -> None:
    parts = data.draw(data.SOURCES["digits"], "pair_flip-0.4", 100)
    for name in ("train", "validation"):
        wrong = parts[name].labels != parts[name].clean
        assert abs(wrong.mean() - 0.4) < 0.1
        assert (parts[name].labels[wrong] == (parts[name].clean[wrong] + 1) % 10).all()
    assert (parts["test"].labels == parts["test"].clean).all()
    one = parts["train"].inputs[3]
    assert (one["labels"], one["index"]) == (parts["train"].labels[3], 3)
    assert parts["train"].raw["label"][3] == one["labels"]
    again = data.draw(data.SOURCES["digits"], "pair_flip-0.4", 100)
    assert (again["train"].labels == parts["train"].labels).all()


@pytest.mark.parametrize("noise", ["size-0.4", "component-0.4"])
def test_noise_of_half_of_each_class_is_that_of_its_examples(data: ModuleType, noise: str) -> None:
    digits = data.SOURCES["digits"]
    parts = data.draw(digits, noise, 100)
    train = parts["train"]
    if noise == "size-0.4":
        values = np.array([np.asarray(image).mean() for image in train.raw["image"][:]])
    else:
        features = digits.features(digits.make_model(), train.inputs)
        within = features - np.stack([features[train.clean == k].mean(axis=0) for k in range(10)])[train.clean]
        _, vectors = np.linalg.eigh(within.T @ within)
        values = within @ vectors[:, -1]
    upper = values > np.array([np.median(values[train.clean == k]) for k in range(10)])[train.clean]
    wrong = train.labels != train.clean
    rates = sorted([wrong[upper].mean(), wrong[~upper].mean()])  # of which half: a component has no sign
    assert np.allclose(rates, [0.16, 0.64], atol=0.06)
    assert abs((parts["validation"].labels != parts["validation"].clean).mean() - 0.4) < 0.1
    assert (parts["test"].labels == parts["test"].clean).all()


def test_every_method_is_tried_four_times(recipes: dict[str, ModuleType]) -> None:
    for method in recipes["methods"].METHODS.values():
        assert len(method.settings) == 4
        assert len({json.dumps(setting) for setting in method.settings}) == 4


class Batches:
    """A trainer of one of the baselines, in float64, and one batch."""

    def __init__(self, kind: Any, folder: Path, **options: float) -> None:
        torch.manual_seed(0)
        self.model = tiny.vit().double()
        pixels = torch.randn(6, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        self.examples = [{"pixel_values": x, "labels": i % 3, "index": i} for i, x in enumerate(pixels)]
        arguments = tiny.arguments(folder, remove_unused_columns=False, label_names=["labels"], learning_rate=0.1)
        self.trainer = kind(self.model, arguments, train_dataset=self.examples)
        self.trainer.options = options
        self.trainer.current_gradient_accumulation_steps = 1  # train() says so
        self.pixels, self.labels = pixels, torch.arange(6) % 3
        self.batch = {"pixel_values": pixels, "labels": self.labels}

    def loss(self) -> torch.Tensor:
        return functional.cross_entropy(self.model(pixel_values=self.pixels).logits, self.labels)

    def gradient(self) -> list[torch.Tensor]:
        return [g.clone() for g in torch.autograd.grad(self.loss(), list(self.model.parameters()))]


def test_sam_steps_along_the_gradient_of_the_climbed_point(recipes: dict[str, ModuleType], tmp_path: Path) -> None:
    one = Batches(recipes["baselines"].SAMTrainer, tmp_path, rho=0.3)
    before = tiny.weights(one.model)
    first = one.gradient()
    length = math.sqrt(sum(float((g**2).sum()) for g in first))
    with torch.no_grad():
        for weight, g in zip(one.model.parameters(), first, strict=True):
            weight += 0.3 * g / length
    expected = one.gradient()
    one.model.load_state_dict(before)
    loss = one.trainer.training_step(one.model, dict(one.batch))
    assert float(loss) == pytest.approx(float(one.loss()))
    for weight, g in zip(one.model.parameters(), expected, strict=True):
        torch.testing.assert_close(weight.grad, g, rtol=1e-9, atol=1e-12)
    for name, weight in tiny.weights(one.model).items():
        torch.testing.assert_close(weight, before[name], rtol=0, atol=1e-14)


def test_mixup_is_the_mixed_loss_of_mixed_pictures(
    recipes: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Batches(recipes["baselines"].MixupTrainer, tmp_path, alpha=0.4)
    order = torch.tensor([2, 0, 1, 5, 4, 3])
    monkeypatch.setattr(torch, "randperm", lambda n, device=None: order)
    monkeypatch.setattr(torch.distributions.Beta, "sample", lambda self: torch.tensor(0.3))
    loss = one.trainer.training_step(one.model, dict(one.batch))
    share = float(torch.tensor(0.3))
    mixed = share * one.pixels + (1 - share) * one.pixels[order]
    log_p = one.model(pixel_values=mixed).logits.log_softmax(-1)
    rows = range(6)
    naive = -sum(share * log_p[i, one.labels[i]] + (1 - share) * log_p[i, one.labels[order[i]]] for i in rows) / 6
    assert float(loss) == pytest.approx(float(naive.detach()), rel=1e-9)


def test_elr_keeps_a_running_mean_of_each_example(recipes: dict[str, ModuleType], tmp_path: Path) -> None:
    one = Batches(recipes["baselines"].ELRTrainer, tmp_path, weight=3.0)
    index = torch.tensor([5, 0, 2])
    batch = {"pixel_values": one.pixels[index], "labels": one.labels[index], "index": index}
    mean = np.zeros((6, 3))
    one.model.train()
    for _ in range(3):
        loss = one.trainer.compute_loss(one.model, dict(batch))
        p = one.model(pixel_values=one.pixels[index]).logits.softmax(-1).detach().numpy()
        naive = 0.0
        for row, i in enumerate(index.tolist()):
            mean[i] = 0.7 * mean[i] + 0.3 * p[row]
            naive += (-math.log(p[row, one.labels[i]]) + 3 * math.log(1 - mean[i] @ p[row])) / 3
        assert float(loss) == pytest.approx(naive, rel=1e-9)
    assert (one.trainer._targets[[1, 3, 4]] == 0).all()


def test_the_mean_of_the_weights_is_evaluated(recipes: dict[str, ModuleType], tmp_path: Path) -> None:
    one = Batches(recipes["baselines"].EMATrainer, tmp_path, decay=0.5)
    mean: list[torch.Tensor] = []
    for step in range(3):
        with torch.no_grad():
            for weight in one.model.parameters():
                weight.add_(0.1 * step)
        now = [weight.detach().clone() for weight in one.model.parameters()]
        mean = now if not mean else [0.5 * m + 0.5 * w for m, w in zip(mean, now, strict=True)]
        one.trainer.training_step(one.model, dict(one.batch))
    own = tiny.weights(one.model)
    metrics = one.trainer.evaluate(one.examples)
    tiny.assert_equal_weights(tiny.weights(one.trainer.model), own)
    with torch.no_grad():
        for weight, value in zip(one.model.parameters(), mean, strict=True):
            weight.copy_(value)
    one.model.eval()
    assert metrics["eval_loss"] == pytest.approx(float(one.loss()), rel=1e-6)


def line(method: str, source: str, noise: str, seed: int, *accuracy: float, clean: float = 0.5) -> dict[str, Any]:
    return {
        "source": source, "noise": noise, "seed": seed, "method": method, "setting": {"learning_rate": 1.0},
        "accuracy": list(accuracy), "validation_clean": [clean] * len(accuracy),
    }  # fmt: skip


def test_the_setting_of_the_best_mean_is_chosen(report: ModuleType) -> None:
    runs = []
    for rate, scores in ((0.1, (0.5, 0.5)), (1.0, (0.9, 0.2)), (3.0, (0.4, 0.3))):
        for noise, score in zip("ab", scores, strict=True):
            runs.append(line("plain", "x", noise, 0, 0.0, clean=score) | {"setting": {"learning_rate": rate}})
    assert report.chosen_settings(runs) == {"x": {"plain": {"learning_rate": 1.0}}}


def tried(scores: dict[float, float], **others: float) -> dict[str, float]:
    return {json.dumps({"learning_rate": rate, **others}): score for rate, score in scores.items()}


def test_a_rate_at_the_end_of_its_list_asks_for_the_next(recipes: dict[str, ModuleType]) -> None:
    outward = recipes["tuning"].outward
    assert outward(tried({0.1: 0.8, 0.3: 0.7, 1.0: 0.6})) == [{"learning_rate": 0.03}]
    assert outward(tried({0.1: 0.5, 0.3: 0.7, 1.0: 0.9})) == [{"learning_rate": 3.0}]
    assert outward(tried({0.1: 0.5, 0.3: 0.7, 1.0: 0.6})) == []
    # Among those with the same other number: the best of rho = 2 has one rate only, and both sides are open.
    both = tried({0.3: 0.5, 1.0: 0.6}, rho=1.0) | tried({1.0: 0.9}, rho=2.0)
    assert outward(both) == [{"learning_rate": 0.3, "rho": 2.0}, {"learning_rate": 3.0, "rho": 2.0}]
    assert outward(tried({0.003: 0.9, 0.01: 0.8})) == []  # the ladder ends there
    assert outward({'{"C": 0.1}': 0.5}) == []


def test_tuning_goes_on_until_no_rate_lies_at_the_end(recipes: dict[str, ModuleType]) -> None:
    further, key = recipes["benchmark"].further, recipes["benchmark"].key
    listed = [("x", noise, 0, "plain", {"learning_rate": rate}) for rate in (0.1, 0.3) for noise in "ab"]
    lines: list[dict[str, Any]] = []

    def run(jobs: list[Any]) -> None:
        for source, noise, seed, method, setting in jobs:
            score = 1 - abs(math.log10(setting["learning_rate"]) - 0.5)  # the best lies at 3
            lines.append(line(method, source, noise, seed, 0.0, clean=score) | {"setting": setting})

    run(listed[:3])
    assert further(lines, listed) == []  # the list comes first
    run(listed[3:])
    rounds = []
    while jobs := further(lines, listed):
        rounds.append({job[4]["learning_rate"] for job in jobs})
        # One that broke off in between is finished before anything is compared.
        run(jobs[:1])
        assert further(lines, listed) == jobs[1:]
        run(jobs[1:])
    assert rounds == [{1.0}, {3.0}, {10.0}]
    assert len({key(each) for each in lines}) == len(lines) == 10


def test_a_draw_counts_once_whatever_its_kinds_of_noise(report: ModuleType) -> None:
    runs = [
        line(method, "x", noise, seed, accuracy)
        for seed, values in ((1, (0.8, 0.6, 0.7, 0.4)), (2, (0.9, 0.9, 0.5, 0.5)))
        for (method, noise), accuracy in zip(
            (("recommended", "a"), ("recommended", "b"), ("plain", "a"), ("plain", "b")), values, strict=True
        )
    ]
    scores = report.accuracies([*runs, line("plain", "x", "none", 1, 0.9), line("recommended", "x", "none", 1, 0.8)])
    ahead = report.differences(scores, "plain", clean=False)
    assert ahead == pytest.approx({("x", 1): 0.15, ("x", 2): 0.4})
    assert report.differences(scores, "plain", clean=True) == pytest.approx({("x", 1): -0.1})
    mean, half = report.mean_and_interval([0.1, 0.3, 0.5])
    # 4.303: the 97.5 % quantile of Student's distribution with two degrees of freedom.
    assert (mean, half) == pytest.approx((0.3, 4.303 * 0.2 / math.sqrt(3)), rel=1e-3)
    assert math.isnan(report.mean_and_interval([0.1])[1])
    assert "\n| plain | +27.5 ± 158.8 | 2 | +27.5 | -10.0 ± nan |\n" in report.overall_table(scores)
    # A draw that lacks a noise does not count.
    del scores["x", "a", 2]["plain"]
    assert list(report.differences(scores, "plain", clean=False)) == [("x", 1)]


def test_plain_fine_tuning_has_its_epochs(report: ModuleType) -> None:
    run = line("plain", "x", "a", 1, 0.5, 0.9, 0.7, 0.6) | {"validation_clean": [0.1, 0.2, 0.4, 0.3]}
    (row,) = report.accuracies([run]).values()
    assert row == {"plain": 0.6, report.SELECTED: 0.7, report.BEST: 0.9}


def test_the_reported_runs_are_those_of_the_frozen_settings(recipes: dict[str, ModuleType]) -> None:
    read, report = recipes["benchmark"].read_lines, recipes["report"]
    settings = json.loads(recipes["benchmark"].SETTINGS.read_text())
    development = read(RECIPES / "results" / "benchmark_development.jsonl")
    assert all(run["seed"] < 100 for run in development)
    assert report.chosen_settings(development).items() <= settings.items()
    for run in read(RECIPES / "results" / "benchmark.jsonl"):
        assert run["seed"] >= 100
        source = {"wordnet-verbs": "wordnet-nouns"}.get(run["source"], run["source"])
        assert run["setting"] == settings[source][run["method"]]


def test_settings_that_were_not_chosen_are_asked_for(recipes: dict[str, ModuleType], tmp_path: Path) -> None:
    options = argparse.Namespace(tune=False, settings=tmp_path / "none.json")
    with pytest.raises(FileNotFoundError, match=r"none.json does not exist; choose them with .*--freeze"):
        recipes["benchmark"].settings_of("plain", "digits", options)
    options.settings.write_text('{"digits": {}}')
    with pytest.raises(ValueError, match=r"has none for 'plain' on 'digits'; choose them with --tune"):
        recipes["benchmark"].settings_of("plain", "digits", options)


@pytest.mark.parametrize("method", ["backward", "posterior"])
def test_a_matrix_that_may_be_singular_is_for_posteriors_alone(recipes: dict[str, ModuleType], method: str) -> None:
    methods, transition = recipes["methods"], [[0.6, 0.4], [0.4, 0.6]]
    estimate = argparse.Namespace(identifiable=False, informative=True, transition=transition)
    found = argparse.Namespace(estimate=estimate, arguments={})
    source = argparse.Namespace(learning_rate=1e-3, radius=0.01)
    arguments, _ = methods.arguments_of(methods.METHODS[method], method, {"learning_rate": 3.0}, source, found)
    assert arguments["learning_rate"] == pytest.approx(3e-3)
    assert arguments["loss_correction"] == ("posterior" if method == "posterior" else "none")
    assert arguments.get("noise_transition") == (transition if method == "posterior" else None)


@pytest.mark.slow
def test_it_goes_on_where_it_broke_off(
    recipes: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = recipes["data"].SOURCES
    monkeypatch.setitem(sources, "digits", replace(sources["digits"], epochs=3))
    monkeypatch.chdir(tmp_path)
    settings = {"digits": {"linear probe": {"C": 0.01}, "plain": {"learning_rate": 1.0}}}
    (tmp_path / "settings.json").write_text(json.dumps(settings))

    def run(*words: str) -> None:
        common = ["--sources", "digits", "--noises", "symmetric-0.4", "--settings", "settings.json"]
        monkeypatch.setattr(sys, "argv", ["benchmark.py", *common, "--output", "runs.jsonl", *words])
        assert recipes["benchmark"].main() == 0

    run("--methods", "linear probe")
    first = (tmp_path / "runs.jsonl").read_text()
    run("--methods", "linear probe", "plain")
    text = (tmp_path / "runs.jsonl").read_text()
    assert text.startswith(first)
    probe, plain = map(json.loads, text.splitlines())
    assert (probe["method"], plain["method"]) == ("linear probe", "plain")
    assert (len(probe["accuracy"]), len(plain["accuracy"])) == (1, 3)
    assert 0.2 < plain["accuracy"][-1] < 1
    assert 0.3 < probe["wrong"] < 0.5
    assert probe["estimated"] == plain["estimated"]
    assert "### digits" in start(RECIPES / "benchmark_report.py", "runs.jsonl", cwd=tmp_path)
    assert (tmp_path / "runs.png").stat().st_size > 1000
