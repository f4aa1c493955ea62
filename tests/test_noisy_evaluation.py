"""The Trainer estimates clean accuracy on noisy evaluation labels, selects on it, and refuses where it can't."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset, DatasetDict, Features, Value
from torch import nn
from transformers import EarlyStoppingCallback, EvalPrediction, Trainer

from hf_robust_ft import (
    HessianRegularizedTrainer,
    clean_accuracy,
    corrupt_dataset,
    invert_transition,
    pair_flip_transition,
    symmetric_transition,
)

T = pair_flip_transition(3, 0.3)
SELECT = {"metric_for_best_model": "eval_clean_accuracy"}
PARTS = ("clean_accuracy", "clean_accuracy_low", "clean_accuracy_high")


def noisy(examples: int = 48, seed: int = 1, transition: Any = T) -> Dataset:
    return corrupt_dataset(tiny.texts(examples, seed), transition, seed)


def expected(trainer: Trainer, data: Dataset, transition: Any = T) -> list[float]:
    with torch.no_grad():
        logits = trainer.model.eval()(input_ids=torch.tensor(data["input_ids"][:])).logits
    found = clean_accuracy(logits.argmax(-1).numpy(), data["label"][:], transition)
    return [found.accuracy, *found.interval]


def parts(metrics: dict[str, float], prefix: str = "eval") -> list[float]:
    return [metrics[f"{prefix}_{name}"] for name in PARTS]


def has_parts(metrics: dict[str, float]) -> bool:
    return any("clean_accuracy" in name for name in metrics)


@pytest.mark.parametrize("correction", ["none", "forward", "backward"])
@pytest.mark.parametrize("asked", [SELECT, {"metric_for_best_model": "clean_accuracy"}, {"eval_labels": "noisy"}])
def test_evaluation_adds_the_estimate(tmp_path: Path, asked: dict[str, str], correction: str) -> None:
    data = noisy()
    trainer = tiny.trainer(tmp_path, noise_transition=T, loss_correction=correction, eval_dataset=data, **asked)
    before = trainer.evaluate()
    assert parts(before) == pytest.approx(expected(trainer, data))
    trainer.train()
    after = trainer.evaluate()
    assert parts(after) == pytest.approx(expected(trainer, data))
    assert parts(after) != parts(before)
    # The mean of T^-1[label, prediction], by hand.
    predictions = trainer.predict(data)
    assert after["eval_clean_accuracy"] == pytest.approx(
        invert_transition(T).matrix[predictions.label_ids, predictions.predictions.argmax(-1)].mean()
    )


def test_only_the_evaluation_that_was_named_takes_its_labels_to_be_noisy(tmp_path: Path) -> None:
    data = noisy()
    trainer = tiny.trainer(tmp_path, noise_transition=T, eval_dataset=data, **SELECT)
    assert has_parts(trainer.evaluate())
    assert not has_parts(trainer.evaluate(tiny.texts(), metric_key_prefix="test"))
    assert not has_parts(trainer.predict(tiny.texts()).metrics)
    assert not has_parts(tiny.trainer(tmp_path, noise_transition=T, eval_dataset=data).evaluate())


def test_every_evaluation_does_if_all_labels_are_noisy(tmp_path: Path) -> None:
    data = noisy()
    trainer = tiny.trainer(tmp_path, noise_transition=T, eval_dataset=data, eval_labels="noisy")
    assert parts(trainer.evaluate(data, metric_key_prefix="test"), "test") == pytest.approx(expected(trainer, data))
    assert parts(trainer.predict(data).metrics, "test") == pytest.approx(expected(trainer, data))
    assert not has_parts(trainer.predict(data.remove_columns("label")).metrics)


def test_a_dict_of_data_sets(tmp_path: Path) -> None:
    data = {"first": noisy(), "second": noisy(30, seed=5), "clean": tiny.texts()}
    trainer = tiny.trainer(
        tmp_path, noise_transition=T, eval_dataset=data, metric_for_best_model="eval_second_clean_accuracy"
    )
    metrics = trainer.evaluate()
    assert parts(metrics, "eval_second") == pytest.approx(expected(trainer, data["second"]))
    assert "eval_first_clean_accuracy" not in metrics
    assert "eval_clean_clean_accuracy" not in metrics
    trainer = tiny.trainer(tmp_path, noise_transition=T, eval_dataset=DatasetDict(data), eval_labels="noisy")
    metrics = trainer.evaluate()
    assert parts(metrics, "eval_first") == pytest.approx(expected(trainer, data["first"]))
    assert parts(metrics, "eval_second") == pytest.approx(expected(trainer, data["second"]))


@pytest.mark.parametrize("metric", ["eval_clean_accuracy", "clean_accuracy_low"])
@pytest.mark.parametrize("correction", ["none", "forward"])
def test_the_best_epoch_is_found_by_clean_accuracy(tmp_path: Path, metric: str, correction: str) -> None:
    data = noisy(96)
    trainer = tiny.trainer(
        tmp_path, noise_transition=T, loss_correction=correction, train_dataset=noisy(32, seed=2), eval_dataset=data,
        metric_for_best_model=metric, eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True,
        max_steps=-1, num_train_epochs=12,
    )  # fmt: skip
    trainer.train()
    key = f"eval_{metric.removeprefix('eval_')}"
    values = [entry[key] for entry in trainer.state.log_history if key in entry]
    assert len(values) == 12
    assert len(set(values)) > 2
    assert trainer.args.greater_is_better
    assert trainer.state.best_metric == max(values)
    # The weights of that epoch are back: they give the same estimate again.
    assert expected(trainer, data)[metric.endswith("low")] == pytest.approx(max(values))


def test_early_stopping_on_clean_accuracy(tmp_path: Path) -> None:
    trainer = tiny.trainer(
        tmp_path, noise_transition=T, train_dataset=noisy(24, seed=2), eval_dataset=noisy(96), **SELECT,
        eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True, learning_rate=0.0, max_steps=-1,
        num_train_epochs=9, callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
    )  # fmt: skip
    trainer.train()
    assert trainer.state.epoch == 3


def test_the_interval_of_examples_that_were_not_selected_on(tmp_path: Path) -> None:
    halves = noisy(96).train_test_split(0.5, stratify_by_column="label", seed=0)
    trainer = tiny.trainer(tmp_path, noise_transition=T, eval_dataset=halves["train"], **SELECT, eval_strategy="epoch")
    trainer.train()
    reserved = trainer.predict(halves["test"])
    report = clean_accuracy(reserved.predictions.argmax(-1), reserved.label_ids, T)
    assert [report.accuracy, *report.interval] == pytest.approx(expected(trainer, halves["test"]))


def only_the_best(logits: Any, labels: Any) -> Any:
    return logits.argmax(-1)


@pytest.mark.parametrize("case", ["nothing", "prediction_loss_only", "preprocessed", "batchwise", "accumulated"])
def test_however_the_user_s_metrics_are_computed(tmp_path: Path, case: str) -> None:
    data = noisy()
    settings: dict[str, Any] = {"prediction_loss_only": case == "prediction_loss_only"}
    if case == "accumulated":
        settings |= {"eval_accumulation_steps": 1, "eval_do_concat_batches": False}

    def metrics(prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        if case == "preprocessed":
            assert prediction.predictions.shape == (48,)
        return {"mine": 1.0}

    trainer = tiny.trainer(
        tmp_path, noise_transition=T, eval_dataset=data, compute_metrics=None if case == "nothing" else metrics,
        batch_eval_metrics=case == "batchwise", per_device_eval_batch_size=10, eval_labels="noisy", **settings,
    )  # fmt: skip
    if case == "preprocessed":
        trainer.preprocess_logits_for_metrics = only_the_best
    found = trainer.evaluate()
    assert parts(found) == pytest.approx(expected(trainer, data))
    assert ("eval_mine" in found) == (case in ("preprocessed", "batchwise", "accumulated"))


def test_metrics_that_predict_themselves_do_not_mix(tmp_path: Path) -> None:
    data, other = noisy(), noisy(30, seed=5)
    inner: list[dict[str, float]] = []

    def metrics(prediction: EvalPrediction) -> dict[str, float]:
        if not inner:
            inner.append({})
            inner.append(trainer.predict(other).metrics)
        return {}

    trainer = tiny.trainer(
        tmp_path, noise_transition=T, eval_dataset=data, compute_metrics=metrics, eval_labels="noisy"
    )
    assert parts(trainer.evaluate()) == pytest.approx(expected(trainer, data))
    assert parts(inner[1], "test") == pytest.approx(expected(trainer, other))


@pytest.mark.parametrize("noise", [0.2, symmetric_transition(3, 0.2)], ids=["rate", "matrix"])
@pytest.mark.parametrize("returns", ["tuple", "named tuple", "dict", "tensor"])
def test_models_from_elsewhere(tmp_path: Path, returns: str, noise: Any) -> None:
    data = tiny.vectors()
    trainer = tiny.trainer(
        tmp_path, tiny.Mlp(returns), noise_transition=noise, train_dataset=data, eval_dataset=data, eval_labels="noisy"
    )
    trainer.train()
    with torch.no_grad():
        predictions = trainer.model.eval().logits(torch.tensor(data["x"][:])).argmax(-1)
    found = clean_accuracy(predictions.numpy(), data["label"][:], symmetric_transition(3, 0.2))
    assert parts(trainer.evaluate()) == pytest.approx([found.accuracy, *found.interval])


def test_labels_with_a_name_of_their_own(tmp_path: Path) -> None:
    data = tiny.vectors(label="target")
    for correction in ("none", "forward"):
        trainer = tiny.trainer(
            tmp_path, tiny.MlpWithLoss("dict"), noise_transition=0.2, loss_correction=correction,
            label_names=["target"], train_dataset=data, eval_dataset=data, eval_labels="noisy",
        )  # fmt: skip
        assert 0 <= trainer.evaluate()["eval_clean_accuracy_low"] <= 1


def test_label_smoothing_leaves_the_labels_to_the_estimate(tmp_path: Path) -> None:
    data = noisy()
    trainer = tiny.trainer(
        tmp_path, noise_transition=T, loss_correction="none", label_smoothing_factor=0.1, eval_dataset=data, **SELECT
    )
    trainer.train()
    assert parts(trainer.evaluate()) == pytest.approx(expected(trainer, data))


def test_ignored_labels_do_not_count(tmp_path: Path) -> None:
    data = noisy().cast_column("label", Value("int64"))
    masked = data.map(lambda row, i: {"label": -100 if i % 4 == 0 else row["label"]}, with_indices=True)
    trainer = tiny.trainer(tmp_path, noise_transition=T, eval_dataset=masked, **SELECT)
    assert parts(trainer.evaluate()) == pytest.approx(expected(trainer, masked))


def test_the_loss_of_an_evaluation_does_not_change(tmp_path: Path) -> None:
    for correction in ("none", "forward"):
        both = [
            tiny.trainer(
                tmp_path, noise_transition=T, loss_correction=correction, eval_dataset=noisy(), eval_labels=labels
            ).evaluate()
            for labels in ("noisy", "clean")
        ]
        for name in both[1]:
            if name.endswith("loss"):
                assert both[0][name] == both[1][name]


def test_clean_labels_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = tiny.texts(300)
    trainer = tiny.trainer(tmp_path, noise_transition=0.4, loss_correction="none", eval_dataset=data, **SELECT,
                           train_dataset=data, max_steps=150)  # fmt: skip
    trainer.train()
    assert "contradict noise_transition" not in caplog.text
    trainer.evaluate()
    assert "eval labels contradict noise_transition (accuracy on them is 1.000)" in caplog.text


def test_a_metric_of_the_user_s_own_of_this_name(tmp_path: Path) -> None:
    def metrics(prediction: EvalPrediction) -> dict[str, float]:
        return {"clean_accuracy": 0.5}

    given: dict[str, Any] = {"eval_dataset": noisy(), "compute_metrics": metrics, **SELECT}
    assert tiny.trainer(tmp_path, **given).evaluate()["eval_clean_accuracy"] == 0.5
    trainer = tiny.trainer(tmp_path, noise_transition=T, eval_labels="clean", **given)
    assert trainer.evaluate()["eval_clean_accuracy"] == 0.5
    with pytest.raises(ValueError, match="compute_metrics returns eval_clean_accuracy already; rename it"):
        tiny.trainer(tmp_path, noise_transition=T, **given).evaluate()


def test_a_longer_name_is_the_user_s_own(tmp_path: Path) -> None:
    """Also for a model whose clean accuracy is not estimated."""
    tokens = {"input_ids": tiny.texts()["input_ids"][:], "labels": [[0, 1, 2, 0, 1, 2, -100]] * 24}
    trainer = tiny.trainer(
        tmp_path, tiny.token_classifier(), noise_transition=T, train_dataset=Dataset.from_dict(tokens),
        eval_dataset=Dataset.from_dict(tokens), compute_metrics=lambda _: {"my_clean_accuracy": 0.5},
        metric_for_best_model="my_clean_accuracy", eval_strategy="steps", eval_steps=2,
    )  # fmt: skip
    trainer.train()
    assert trainer.evaluate()["eval_my_clean_accuracy"] == 0.5
    assert "eval_clean_accuracy" not in trainer.evaluate()


def test_data_that_comes_with_the_call(tmp_path: Path) -> None:
    data = noisy()
    trainer = tiny.trainer(tmp_path, noise_transition=T, metric_for_best_model="eval_mine_clean_accuracy")
    assert parts(trainer.evaluate({"mine": data}), "eval_mine") == pytest.approx(expected(trainer, data))


REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    (None, {"eval_labels": "noisy"}, "eval_labels='noisy' needs noise_transition"),
    (None, SELECT, "metric_for_best_model='eval_clean_accuracy' needs noise_transition"),
    (
        None,
        {**SELECT, "noise_transition": T, "eval_labels": "clean"},
        "metric_for_best_model='eval_clean_accuracy' needs eval_labels='noisy'",
    ),
    (None, {"eval_labels": "dirty"}, "eval_labels is 'dirty'; choose one of None, 'noisy', 'clean'"),
    (
        lambda: tiny.bert(problem_type="regression"),
        {**SELECT, "noise_transition": T, "loss_correction": "none"},
        "metric_for_best_model='eval_clean_accuracy' is for one class .* problem_type is 'regression'",
    ),
    (
        lambda: tiny.gpt2(causal=True),
        {"eval_labels": "noisy", "noise_transition": 0.1},
        "eval_labels='noisy' is for one class an example, but the model's task is ForCausalLM",
    ),
    (
        tiny.token_classifier,
        {"eval_labels": "noisy", "noise_transition": T},
        "the model's task is ForTokenClassification, whose targets of one sequence or image are not",
    ),
    (
        None,
        {"eval_labels": "noisy", "noise_transition": T, "loss_correction": "none", "label_names": ["a", "b"]},
        r"needs one column of labels, but label_names is \['a', 'b'\]",
    ),
    (
        None,
        {"eval_labels": "noisy", "noise_transition": 2 / 3, "loss_correction": "none"},
        "noise_transition is singular",
    ),
    (
        None,
        {"eval_labels": "noisy", "noise_transition": np.eye(4), "loss_correction": "none"},
        "is for 4 classes, but the model has 3",
    ),
    (
        None,
        {**SELECT, "noise_transition": T, "eval_dataset": {"a": tiny.texts(8), "b": tiny.texts(8)}},
        "names no evaluation of eval_dataset; choose one of eval_a_clean_accuracy, ",
    ),
    (
        None,
        {"noise_transition": T, "eval_dataset": tiny.texts(8), "metric_for_best_model": "eval_a_clean_accuracy"},
        "names no evaluation of eval_dataset; choose one of eval_clean_accuracy, ",
    ),
    (
        None,
        {**SELECT, "noise_transition": T, "use_liger_kernel": True},
        "needs logits, which use_liger_kernel may leave out",
    ),
]


@pytest.mark.parametrize(("build", "settings", "message"), REFUSED, ids=[message for _, _, message in REFUSED])
def test_what_cannot_work_is_refused_at_once(
    tmp_path: Path, build: Any, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        tiny.trainer(tmp_path, build and build(), **settings)


@pytest.mark.parametrize(
    ("data", "metric", "message"),
    [
        (
            tiny.texts(8).cast(Features({**tiny.texts(8).features, "label": Value("float32")})),
            "eval_clean_accuracy",
            "column 'label' of eval_dataset holds float; noise_transition is for class indices",
        ),
        (
            tiny.texts(8).cast_column("label", Value("int64")).map(lambda row: {"label": row["label"] + 1}),
            "clean_accuracy",
            r"label 3 lies outside 0\.\.2",
        ),
    ],
)
def test_evaluation_data_that_cannot_work_is_refused_before_the_first_step(
    tmp_path: Path, data: Any, metric: str, message: str
) -> None:
    trainer = tiny.trainer(
        tmp_path, noise_transition=T, eval_dataset=data, metric_for_best_model=metric, eval_strategy="epoch"
    )
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0


class PerToken(nn.Module):
    """No transformers model, so that only its outputs tell what it predicts."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(1, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x[..., None])  # type: ignore[no-any-return]


def test_targets_that_only_show_at_the_first_batch(tmp_path: Path) -> None:
    tokens = Dataset.from_dict({"x": [[0.0, 1.0]] * 8, "labels": [[0, 1]] * 8})
    trainer = tiny.trainer(
        tmp_path, PerToken(), noise_transition=T, train_dataset=tokens, eval_dataset=tokens, eval_labels="noisy"
    )
    with pytest.raises(ValueError, match=r"clean accuracy needs \[B, K\] and \[B\], one label an example"):
        trainer.evaluate()


def test_an_overridden_setting_is_read_again(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, eval_dataset=noisy())
    trainer.args.noise_transition, trainer.args.eval_labels = T.tolist(), "noisy"
    trainer.train()
    assert math.isfinite(trainer.evaluate()["eval_clean_accuracy"])


def test_subclasses_that_compute_the_loss_and_call_on(tmp_path: Path) -> None:
    class Mine(HessianRegularizedTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(*args, **kwargs)

    data = noisy()
    arguments = tiny.arguments(tmp_path, noise_transition=T, **SELECT)
    trainer = Mine(tiny.bert(), arguments, train_dataset=tiny.texts(), eval_dataset=data)
    assert parts(trainer.evaluate()) == pytest.approx(expected(trainer, data))
