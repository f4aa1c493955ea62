"""``layer_radius="auto"``: which radius is chosen, and that the search leaves no other trace."""

from __future__ import annotations

import json
import logging
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset
from torch import nn
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments

from hf_robust_ft import (
    HessianRegularizedTrainer,
    RadiusChoice,
    clean_accuracy,
    corrupt_dataset,
    pair_flip_transition,
    symmetric_transition,
)
from hf_robust_ft.radius_search import CANDIDATES, FILE, example_scores, search_radius
from hf_robust_ft.snapshot import snapshot

T = pair_flip_transition(3, 0.3)


def noisy(examples: int = 48, seed: int = 1, rate: float = 0.3) -> Dataset:
    data = corrupt_dataset(tiny.texts(examples, seed), symmetric_transition(3, rate), seed)
    return data.remove_columns("clean_label")


def auto(folder: Path, model: nn.Module | None = None, **changes: Any) -> HessianRegularizedTrainer:
    return tiny.trainer(folder, model, **{"layer_radius": "auto", "eval_dataset": noisy(), **changes})


def chosen(trainer: HessianRegularizedTrainer) -> RadiusChoice:
    assert trainer.radius_choice is not None
    return trainer.radius_choice


# The rule


def scores(*hits: int, n: int = 10) -> dict[float, np.ndarray]:
    return {r: (np.arange(n) < hit).astype(float) for r, hit in zip((0.1, 0.2, math.inf), hits, strict=True)}


@pytest.mark.parametrize(
    ("hits", "radius"),
    [((3, 5, 4), 0.2), ((3, 4, 5), math.inf), ((5, 4, 3), 0.1), ((4, 5, 5), 0.2), ((5, 5, 5), 0.1)],
)
def test_the_best_score_wins_and_of_equal_ones_the_smallest_radius(hits: Any, radius: float) -> None:
    table = scores(*hits)
    choice = search_radius(table.__getitem__, score="accuracy", seed=7, candidates=list(table))
    assert (choice.radius, choice.n, choice.seed, choice.score) == (radius, 10, 7, "accuracy")
    assert [c.radius for c in choice.candidates] == list(table)
    best = table[radius]
    for c, values in zip(choice.candidates, table.values(), strict=True):
        assert c.score == pytest.approx(values.mean())
        assert c.standard_error == pytest.approx(values.std(ddof=1) / math.sqrt(10))
        assert c.behind == pytest.approx(best.mean() - values.mean())
        assert c.behind_error == pytest.approx((best - values).std(ddof=1) / math.sqrt(10))


def test_the_errors_are_those_of_simulated_validation_sets() -> None:
    """Of a score and of a difference between two models that agree on most examples."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(400):
        labels = rng.integers(3, size=200)
        right = rng.random(200) < 0.8
        first = np.where(right, labels, (labels + 1) % 3)
        second = np.where(rng.random(200) < 0.1, rng.integers(3, size=200), first)
        given = np.array([rng.choice(3, p=T[label]) for label in labels])
        table = {r: example_scores(given, p, T, 3) for r, p in ((0.1, first), (math.inf, second))}
        choice = search_radius(table.__getitem__, score="clean_accuracy", seed=0, candidates=list(table))
        (a, b) = choice.candidates
        found.append((a.score, a.score - b.score, a.standard_error, max(a.behind_error, b.behind_error)))
    accuracy, difference, error, difference_error = np.array(found).T
    assert accuracy.mean() == pytest.approx(0.8, abs=3 * accuracy.std() / 20)
    assert error.mean() == pytest.approx(accuracy.std(), rel=0.1)
    assert difference_error.mean() == pytest.approx(difference.std(), rel=0.1)


def test_scores_are_those_of_clean_accuracy() -> None:
    rng = np.random.default_rng(0)
    labels, predictions = rng.integers(3, size=(2, 50))
    assert example_scores(labels, predictions, T, 3).mean() == pytest.approx(
        clean_accuracy(predictions, labels, T).accuracy
    )
    masked = np.where(np.arange(50) < 10, -100, labels)
    plain = example_scores(masked, predictions, None, 3)
    np.testing.assert_array_equal(plain, (labels == predictions)[10:])


def test_a_choice_survives_json(tmp_path: Path) -> None:
    table = scores(3, 5, 4)
    choice = search_radius(table.__getitem__, score="accuracy", seed=0, candidates=list(table))
    choice.save(tmp_path / FILE)
    assert RadiusChoice.load(tmp_path / FILE) == choice
    assert json.loads((tmp_path / FILE).read_text())["candidates"][2]["radius"] is None
    assert "0.2 of each layer's norm, by accuracy on 10 examples" in str(choice)
    assert "inf: 0.4000 ± 0.1633, 0.1000 ± 0.1000 behind" in str(choice)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    for content in ("", "[]", '{"candidates": [{}]}', '{"candidates": [], "radius": "a"}', '{"candidates": []}'):
        (tmp_path / FILE).write_text(content)
        with pytest.raises(ValueError, match=r"radius_choice.json is damaged .*; restore it, or give the radius"):
            RadiusChoice.load(tmp_path / FILE)


def test_a_snapshot_restores_all_that_training_changes() -> None:
    model = tiny.Mlp().eval()
    model.fc1.bias.requires_grad_(False)
    before, numbers = tiny.weights(model), lambda: (random.random(), np.random.rand(), torch.rand(1).item())
    saved, restore = snapshot(model)
    assert saved.keys() == {name for name, _ in model.named_parameters()} - {"fc1.bias"}
    drawn = numbers()
    model.train()
    model.forward = model.forward
    model(torch.randn(4, 6))[0].sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    restore()
    assert numbers() == drawn
    tiny.assert_equal_weights(tiny.weights(model), before)
    assert not model.training
    assert not model.norm.training
    assert "forward" not in vars(model)
    assert model.fc2.weight.grad is None


# The Trainer


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "warmup_steps": 2},
        {"noise_transition": T.tolist(), "radius_growth": 1.2},
        {"loss_correction": "gce", "radius_norm": "inf_op"},
        {"bf16": True},
        {"eval_strategy": "steps", "eval_steps": 2, "num_train_epochs": 3, "max_steps": -1},
        {"dataloader_num_workers": 1, "max_steps": 2},
        {"neftune_noise_alpha": 5.0},
        {"layer_radius": {"*.attention.*": "auto", "*.pooler.*": 0.5, "*.encoder.*": "auto"}},
    ],
    ids=str,
)
def test_the_training_is_that_of_the_chosen_radius(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    """Bit for bit, with dropout: the random numbers, too, are where they were."""
    monkeypatch.setattr("hf_robust_ft.trainer.radius.CANDIDATES", (0.003, 0.02))

    def model() -> nn.Module:
        torch.manual_seed(0)
        return tiny.bert(hidden_dropout_prob=0.1).eval()

    searched = auto(tmp_path, model(), **settings)
    searched.train()
    radius = chosen(searched).radius
    by_hand: Any = radius
    if "layer_radius" in settings:
        by_hand = {"*.pooler.*": 0.5, "*.encoder.*": radius}
    given = auto(tmp_path, model(), **settings | {"layer_radius": by_hand, "radius_mode": "relative"})
    given.train()
    tiny.assert_equal_weights(tiny.weights(searched.model), tiny.weights(given.model))
    timed = ("runtime", "per_second")
    histories = [
        [{k: v for k, v in entry.items() if not k.endswith(timed)} for entry in t.state.log_history]
        for t in (searched, given)
    ]
    assert histories[0] == histories[1]
    assert searched.constraints.radii == given.constraints.radii
    assert len(searched.constraints) > 10
    assert searched.args.layer_radius == settings.get("layer_radius", "auto")
    assert searched.args.radius_mode == "relative"


def test_the_score_is_that_of_the_model_that_results(tmp_path: Path) -> None:
    trainer = auto(tmp_path, noise_transition=T.tolist(), eval_labels="noisy")
    trainer.train()
    choice = chosen(trainer)
    (best,) = [c for c in choice.candidates if c.radius == choice.radius]
    assert (choice.score, choice.n) == ("clean_accuracy", 48)
    assert trainer.evaluate()["eval_clean_accuracy"] == pytest.approx(best.score)
    assert [c.radius for c in choice.candidates] == list(CANDIDATES)


@pytest.mark.parametrize("labels", [None, "clean", "noisy"])
def test_labels_said_to_be_clean_are_taken_as_they_are(tmp_path: Path, labels: str | None) -> None:
    trainer = auto(tmp_path, noise_transition=T.tolist(), eval_labels=labels, max_steps=1)
    trainer.train()
    assert chosen(trainer).score == ("accuracy" if labels == "clean" else "clean_accuracy")


class Watch(TrainerCallback):
    """What a user's callback sees."""

    def __init__(self) -> None:
        self.begun, self.steps = 0, 0

    def on_train_begin(self, args: TrainingArguments, *others: Any, **kwargs: Any) -> None:
        self.begun += 1

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.steps += 1


def test_candidates_write_nothing_and_call_no_callback(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    watch = Watch()
    trainer = auto(tmp_path, callbacks=[watch], save_strategy="steps", save_steps=4)
    with caplog.at_level(logging.INFO, "hf_robust_ft"):
        trainer.train()
    assert (watch.begun, watch.steps) == (1, 4)
    assert {path.name for path in tmp_path.iterdir()} <= {FILE, "checkpoint-4", "_reference.safetensors"}
    assert RadiusChoice.load(tmp_path / FILE) == chosen(trainer)
    assert "trains with 4 radii before the training itself, which makes it 5 times as long" in caplog.text
    assert str(chosen(trainer)) in caplog.text


def test_it_is_chosen_once(tmp_path: Path) -> None:
    trainer = auto(tmp_path)
    assert trainer.radius_choice is None
    assert len(trainer.constraints) == 0
    trainer.train()
    choice = chosen(trainer)
    trainer.train()
    assert trainer.radius_choice is choice


def test_it_works_with_model_init(tmp_path: Path) -> None:
    def model_init() -> nn.Module:
        return tiny.bert()

    searched = auto(tmp_path, model_init=model_init)
    searched.train()
    radius = chosen(searched).radius
    given = auto(tmp_path, model_init=model_init, layer_radius=radius, radius_mode="relative")
    given.train()
    tiny.assert_equal_weights(tiny.weights(searched.model), tiny.weights(given.model))


def separable(examples: int, seed: int, rate: float) -> Dataset:
    """Of which a frozen random encoder tells the classes, as each has its own tokens."""
    data = tiny.texts(examples, seed)

    def own_tokens(row: dict[str, Any]) -> dict[str, Any]:
        return {"input_ids": [3 + token % 15 + 15 * row["label"] for token in row["input_ids"]]}

    return corrupt_dataset(data.map(own_tokens), symmetric_transition(3, rate), seed)


def test_it_works_with_an_estimated_matrix_which_is_estimated_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hf_robust_ft.trainer import labels as module

    calls = []
    study = module.study_labels
    monkeypatch.setattr(module, "study_labels", lambda *a, **k: calls.append(1) or study(*a, **k))
    settings = {"noise_transition": "estimate", "train_dataset": separable(300, 0, 0.2)}
    searched = auto(tmp_path / "a", eval_dataset=separable(60, 1, 0.2), **settings)
    searched.train()
    assert len(calls) == 1
    assert chosen(searched).score == "clean_accuracy"
    radius = {"layer_radius": chosen(searched).radius, "radius_mode": "relative"}
    given = auto(tmp_path / "b", **settings, **radius)
    given.train()
    tiny.assert_equal_weights(tiny.weights(searched.model), tiny.weights(given.model))


def test_an_estimate_that_may_be_singular_scores_by_noisy_accuracy(tmp_path: Path) -> None:
    trainer = auto(
        tmp_path, noise_transition="estimate", train_dataset=separable(300, 0, 0.2), eval_dataset=separable(60, 1, 0.2)
    )
    trainer._study_labels(posteriors=True)
    assert trainer.noise_estimate is not None
    # Rare classes leave that open; the labels say enough for posteriors all the same.
    trainer.noise_estimate = replace(trainer.noise_estimate, singular_value_interval=(0.0, 0.3))
    trainer.train()
    assert chosen(trainer).score == "accuracy"
    assert all(60 * each.score == pytest.approx(round(60 * each.score)) for each in chosen(trainer).candidates)


def pretrained(folder: Path) -> nn.Module:
    """Loaded from a file but for a new head, so that the head counts as freshly initialised."""
    torch.manual_seed(0)
    tiny.bert().bert.save_pretrained(folder / "base")
    torch.manual_seed(0)
    model = type(tiny.bert()).from_pretrained(folder / "base", num_labels=3)
    assert isinstance(model, nn.Module)
    return model


def test_a_new_head_stays_free(tmp_path: Path) -> None:
    trainer = auto(tmp_path, pretrained(tmp_path))
    before = tiny.weights(trainer.model)
    trainer.train()
    (head,) = (row for row in trainer.constraint_table() if row.name == "classifier.weight")
    assert head.free is not None
    assert not torch.equal(trainer.model.classifier.weight, before["classifier.weight"])


def test_heavy_noise_on_few_examples_wants_a_small_radius(tmp_path: Path) -> None:
    """The encoder tells the classes as it is, and the head is free; unconstrained it learns wrong labels by heart."""
    trainer = auto(
        tmp_path, pretrained(tmp_path), train_dataset=separable(48, 0, 0.4), eval_dataset=separable(500, 1, 0.4),
        noise_transition=0.4, loss_correction="none", max_steps=100, learning_rate=1e-2,
        per_device_eval_batch_size=250,
    )  # fmt: skip
    trainer.train()
    by_radius = {c.radius: c for c in chosen(trainer).candidates}
    assert chosen(trainer).radius < math.inf
    assert by_radius[math.inf].behind > 1.5 * by_radius[math.inf].behind_error


def test_a_task_that_the_pretrained_weights_do_not_solve_wants_none(tmp_path: Path) -> None:
    """Clean labels, and random weights of which nothing is fresh: the head, too, has to leave them."""
    data = tiny.vectors(200)
    train, test = data.select(range(100)), data.select(range(100, 200))
    trainer = auto(tmp_path, tiny.Mlp(), train_dataset=train, eval_dataset=test, max_steps=60, label_names=["labels"],
                   loss_correction="gce")  # fmt: skip
    trainer.train()
    (best,) = [c for c in chosen(trainer).candidates if c.radius == math.inf]
    assert chosen(trainer).radius == math.inf
    assert best.score > 0.45
    assert len(trainer.constraints) == 0


def best_epoch_settings(**changes: Any) -> dict[str, Any]:
    return {
        "load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2,
        "save_steps": 2, "max_steps": 8, "learning_rate": 3e-2, "noise_transition": T.tolist(),
        "metric_for_best_model": "eval_clean_accuracy", **changes,
    }  # fmt: skip


def test_a_run_that_keeps_its_best_epoch_has_candidates_scored_at_theirs(tmp_path: Path) -> None:
    trainer = auto(tmp_path, **best_epoch_settings())
    trainer.train()
    choice = chosen(trainer)
    (best,) = [c for c in choice.candidates if c.radius == choice.radius]
    assert trainer.state.best_metric == pytest.approx(best.score)
    last = [entry for entry in trainer.state.log_history if "eval_loss" in entry][-1]
    assert last["eval_clean_accuracy"] < best.score  # so the test can tell the two


def test_early_stopping_takes_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopping = EarlyStoppingCallback(early_stopping_patience=1)
    settings = best_epoch_settings(max_steps=20, metric_for_best_model="eval_loss")
    trainer = auto(tmp_path, callbacks=[stopping], **settings)
    steps = []
    train = HessianRegularizedTrainer.train

    def counted(self: HessianRegularizedTrainer, *args: Any, **kwargs: Any) -> Any:
        output = train(self, *args, **kwargs)
        steps.append(self.state.global_step)
        return output

    monkeypatch.setattr(HessianRegularizedTrainer, "train", counted)
    trainer.train()
    assert len(steps) == 5
    assert min(steps[:4]) < 20
    assert steps[4] in steps[:4]


def test_a_run_that_stops_early_and_keeps_its_last_epoch_has_candidates_scored_at_theirs(tmp_path: Path) -> None:
    stopping = EarlyStoppingCallback(early_stopping_patience=1)
    settings = best_epoch_settings(load_best_model_at_end=False, save_strategy="no")
    trainer = auto(tmp_path, callbacks=[stopping], **settings)
    trainer.train()
    (best,) = [c for c in chosen(trainer).candidates if c.radius == chosen(trainer).radius]
    last = [entry for entry in trainer.state.log_history if "eval_loss" in entry][-1]
    assert last["eval_clean_accuracy"] == pytest.approx(best.score)


def test_a_schedule_that_hangs_on_evaluations_is_that_of_the_run(tmp_path: Path) -> None:
    settings = best_epoch_settings(
        load_best_model_at_end=False, save_strategy="no", lr_scheduler_type="reduce_lr_on_plateau", max_steps=6,
        lr_scheduler_kwargs={"patience": 0}, metric_for_best_model="eval_loss", eval_labels="noisy",
    )  # fmt: skip
    trainer = auto(tmp_path, **settings)
    trainer.train()
    (best,) = [c for c in chosen(trainer).candidates if c.radius == chosen(trainer).radius]
    assert trainer.evaluate()["eval_clean_accuracy"] == pytest.approx(best.score)


def test_of_several_validation_sets_the_one_that_selects_scores(tmp_path: Path) -> None:
    sets = {"a": noisy(30), "a_b": noisy(42), "c": noisy(36)}
    trainer = auto(tmp_path, eval_dataset=sets, metric_for_best_model="eval_a_b_loss", max_steps=1)
    trainer.train()
    assert chosen(trainer).n == 42
    one = auto(tmp_path, eval_dataset={"a": noisy(30)}, max_steps=1)
    one.train()
    assert chosen(one).n == 30


def test_a_resumed_run_reads_the_radius_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"save_strategy": "steps", "save_steps": 2}
    monkeypatch.setattr("hf_robust_ft.trainer.radius.CANDIDATES", (0.003, 0.02))
    first = auto(tmp_path, **settings)
    first.train()
    replace(chosen(first), seed=99).save(tmp_path / FILE)
    for point in (str(tmp_path / "checkpoint-2"), True):
        again = auto(tmp_path, **settings)
        again.train(resume_from_checkpoint=point)
        assert chosen(again).seed == 99
        tiny.assert_equal_weights(tiny.weights(again.model), tiny.weights(first.model))
    (tmp_path / FILE).unlink()
    again = auto(tmp_path, **settings)
    before = tiny.weights(again.model)
    with pytest.raises(ValueError, match=r"layer_radius='auto', but .*radius_choice.json is missing.*=0.01"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    tiny.assert_equal_weights(tiny.weights(again.model), before)


class Breaks(nn.Module):
    """Stops the third training, in its second step."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error, self.calls = error, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += self.training
        if self.calls == 10:
            raise self.error
        return x


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), KeyboardInterrupt()], ids=repr)
def test_a_training_that_stops_leaves_the_weights_and_says_what_was_found(tmp_path: Path, error: BaseException) -> None:
    trainer = auto(tmp_path)
    trainer.model.dropout = Breaks(error)
    before = tiny.weights(trainer.model)
    state = torch.get_rng_state()
    with pytest.raises(type(error)) as caught:
        trainer.train()
    (note,) = caught.value.__notes__
    assert "was stopped in training 3 of 4, with a radius of 0.03. The model has its weights from before." in note
    assert " at 0.003, " in note
    assert "give a radius with radius_mode='relative'" in note
    tiny.assert_equal_weights(tiny.weights(trainer.model), before)
    assert torch.equal(torch.get_rng_state(), state)
    assert trainer.radius_choice is None
    trainer.train()
    assert trainer.radius_choice is not None


class Stream(torch.utils.data.IterableDataset[dict[str, Any]]):
    def __iter__(self) -> Any:
        return iter(tiny.texts())


def test_data_without_a_length_will_do(tmp_path: Path) -> None:
    trainer = auto(tmp_path, train_dataset=Stream(), eval_dataset=list(noisy()))
    trainer.train()
    assert chosen(trainer).n == 48


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_dataset": None}, "layer_radius='auto' chooses on validation examples.*but eval_dataset is None"),
        (
            {"eval_dataset": {"a": noisy(), "b": noisy()}},
            "eval_dataset has 'a', 'b' and metric_for_best_model is None; name one in it, as in 'eval_a_loss'",
        ),
        ({"model": tiny.token_classifier()}, "layer_radius='auto' is for one class an example.*ForTokenClassif"),
        ({"model": tiny.bert(problem_type="regression", num_labels=1)}, "problem_type is 'regression'"),
        ({"label_names": ["label", "other"]}, "layer_radius='auto' needs one column of labels"),
        ({"noise_transition": np.full((3, 3), 1 / 3), "loss_correction": "none"}, "noise_transition is singular"),
        ({"eval_dataset": tiny.texts().map(lambda row: {"label": -1})}, "label -1 lies outside"),
        ({"radius_growth": 0.0}, "radius_growth is 0.0"),
    ],
)
def test_what_can_not_be_searched_is_refused_when_the_trainer_is_made(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        auto(tmp_path, **changes)


def test_a_model_without_a_layer_to_constrain_is_refused(tmp_path: Path) -> None:
    model = pretrained(tmp_path)
    model.bert.requires_grad_(False)
    with pytest.raises(ValueError, match=r"layer_radius='auto' has no layer to constrain.*set layer_radius=None"):
        auto(tmp_path, model)


def test_an_optimizer_of_one_training_is_refused(tmp_path: Path) -> None:
    model = tiny.bert()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    arguments = tiny.arguments(tmp_path, layer_radius="auto")
    with pytest.raises(ValueError, match=r"layer_radius='auto' trains several times.*give optimizer_cls_and_kwargs"):
        HessianRegularizedTrainer(
            model, arguments, train_dataset=tiny.texts(), eval_dataset=noisy(), optimizers=(optimizer, None)
        )


def test_hyperparameter_search_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="layer_radius='auto' is a search by itself; in hyperparameter_search let"):
        auto(tmp_path).train(trial={"learning_rate": 1e-3})


def test_labels_that_are_missing_are_named(tmp_path: Path) -> None:
    trainer = auto(tmp_path, eval_dataset=tiny.texts().remove_columns("label"))
    with pytest.raises(ValueError, match="needs labels, but a batch of eval_dataset has no 'labels'"):
        trainer.train()
    masked = tiny.texts().remove_columns("label").add_column("labels", [-100] * 24)
    with pytest.raises(ValueError, match="eval_dataset holds -100 only"):
        auto(tmp_path, eval_dataset=masked).train()


def test_clean_labels_that_pass_for_noisy_are_pointed_out(caplog: pytest.LogCaptureFixture) -> None:
    labels = np.arange(90) % 3
    right = example_scores(labels, labels, symmetric_transition(3, 0.4), 3)
    search_radius(lambda _: right, score="clean_accuracy", seed=0)
    assert "contradict noise_transition" in caplog.text
