"""What the Trainer measures of the curvature, when, from where, and what becomes of it."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch.utils.data import DataLoader
from transformers import DefaultFlowCallback, EarlyStoppingCallback

from hf_robust_ft import (
    CorrectedLoss,
    HessianReport,
    MeasurementStopped,
    ReferenceMismatch,
    RobustTrainingArguments,
    measure_hessian,
    symmetric_transition,
)
from hf_robust_ft.bounds import Bound
from hf_robust_ft.checkpoint import STATE_FILE
from hf_robust_ft.curvature.loss import ExampleLoss
from hf_robust_ft.hessian_measurement import (
    FILE,
    START_FILE,
    base_weights,
    block_of,
    correctable,
    example_batches,
    hessian_metrics,
    load_start,
)
from hf_robust_ft.layers import find_layers
from hf_robust_ft.risks import measure_risk

EXAMPLES = 9


def trained(folder: Path, **changes: Any) -> Any:
    trainer = tiny.trainer(folder, **{"hessian_examples": EXAMPLES, "hessian_time_budget": 0, **changes})
    trainer.train()
    return trainer


def numbers(report: HessianReport) -> dict[str, Any]:
    """All but times."""
    return {**dataclasses.asdict(report), "seconds": None, "estimated_seconds": None}


def logged(trainer: Any, name: str = "train_hessian_total") -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize("noise", [None, 0.2])
def test_it_is_what_measure_hessian_says(tmp_path: Path, noise: float | None) -> None:
    torch.manual_seed(0)
    model = tiny.bert(num_hidden_layers=1)
    start = tiny.weights(model)
    trainer = trained(tmp_path, model=model, noise_transition=noise, hessian_examples=3, hessian_time_budget=math.inf)
    drawn = sorted(np.random.default_rng(0).permutation(24)[:3].tolist())
    batches = DataLoader(tiny.texts().select(drawn), batch_size=8, collate_fn=trainer.data_collator)
    loss = None if noise is None else CorrectedLoss("backward", noise, num_classes=tiny.CLASSES)
    expected = measure_hessian(model, start, batches, loss=loss)
    report = trainer.hessian_report
    assert numbers(report) == numbers(expected)
    assert HessianReport.load(tmp_path / FILE) == report
    assert report.examples == 3
    assert report.settled > 0
    assert max(layer.distance for layer in report.layers) > 0


def test_metrics_reach_the_state_and_trackers(tmp_path: Path) -> None:
    seen: list[dict[str, float]] = []

    class Tracker(DefaultFlowCallback):  # any callback would do
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> Any:
            seen.append(dict(logs))

    trainer = trained(tmp_path, callbacks=[Tracker()])
    (entry,) = [entry for entry in seen if "train_hessian_total" in entry]
    assert entry.items() <= trainer.state.log_history[-1].items()
    roots = {layer.name: math.sqrt(layer.upper.maximum) for layer in trainer.hessian_report.layers}
    assert entry["train_hessian_total"] == pytest.approx(sum(roots.values()))
    block = [root for name, root in roots.items() if name.startswith("bert.encoder.layer.1.")]
    assert entry["train_hessian_in_bert.encoder.layer.1"] == pytest.approx(sum(block))
    blocks = [value for name, value in entry.items() if "_hessian_in_" in name]
    assert sum(blocks) == pytest.approx(entry["train_hessian_total"])
    assert entry["train_hessian_total_lanczos"] <= entry["train_hessian_total"]
    assert entry["train_hessian_examples"] == EXAMPLES
    assert trainer.hessian_report is not None
    assert "mine_hessian_total" in hessian_metrics(trainer.hessian_report, "mine")


@pytest.mark.parametrize("model", [tiny.bert, tiny.vit, tiny.resnet, tiny.gpt2])
def test_blocks_by_name_are_those_of_the_model(model: Any) -> None:
    for layer in find_layers(model())[0]:
        assert block_of(layer.name) == layer.block


def test_off_it_keeps_and_measures_nothing(tmp_path: Path) -> None:
    trainer = trained(tmp_path, hessian_examples=0)
    assert trainer.hessian_report is None
    assert trainer._start is None
    assert not list(tmp_path.iterdir())


def test_measuring_during_training_changes_no_weight(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": tiny.texts(8, 1)}
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(tiny.bert(hidden_dropout_prob=0.1))  # a mode that is not put back would show
    plain = trained(tmp_path / "a", model=models[0], hessian_examples=0, **settings)
    often = trained(tmp_path / "b", model=models[1], hessian_every=2, **settings)
    assert len(logged(often)) == 2  # at steps 2 and 4, which is the last
    assert len(logged(plain)) == 0
    tiny.assert_equal_weights(tiny.weights(plain.model), tiny.weights(often.model))


def test_the_best_weights_are_measured_again(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer = trained(tmp_path, hessian_every=1, load_best_model_at_end=True, eval_dataset=tiny.texts(8, 1), **settings)
    assert len(logged(trainer)) == 3


def test_a_constrained_run_is_measured_from_the_same_centres(tmp_path: Path) -> None:
    trainer = trained(tmp_path, layer_radius={"*encoder*": 0.05})
    report, radii = trainer.hessian_report, trainer.constraints.radii
    assert {layer.name for layer in report.layers} > radii.keys()
    for layer in report.layers:
        assert layer.distance <= radii.get(layer.name, math.inf) * 1.0001
    shared = trainer.constraints.reference
    assert all(trainer._start[name] is centre for name, centre in shared.items())


def test_model_init_and_a_second_training_keep_the_right_start(tmp_path: Path) -> None:
    trainer = trained(tmp_path, model_init=lambda: tiny.bert())
    first = trainer._start
    trainer.train()  # another model
    assert trainer._start is not first
    again = trained(tmp_path)
    first = again._start
    distance = again.hessian_report.layers[0].distance
    again.train()
    assert again._start is first
    assert again.hessian_report.layers[0].distance > distance


def test_a_resumed_run_is_measured_from_where_it_began(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
    whole = trained(tmp_path, **settings)
    assert (tmp_path / START_FILE).is_file()
    torch.manual_seed(5)
    other = tiny.trainer(
        tmp_path, tiny.bert(), hessian_examples=EXAMPLES, hessian_time_budget=0, **settings
    )  # another head and all
    other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert numbers(other.hessian_report) == numbers(whole.hessian_report)


def test_a_checkpoint_without_its_start_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
    trained(tmp_path, hessian_examples=0, **settings)
    other = tiny.trainer(tmp_path, hessian_examples=EXAMPLES, hessian_time_budget=0, **settings)
    with caplog.at_level(logging.WARNING):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert "the checkpoint was written without hessian_examples" in caplog.text
    assert "not measured" in caplog.text  # nothing says where a random model came from
    assert other.hessian_report is None
    with pytest.raises(ReferenceMismatch, match=r"_start\.json can't be read"):
        load_start(tmp_path / "checkpoint-2")


def test_a_failed_measurement_leaves_the_model_and_says_how_to_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = trained(tmp_path / "other").hessian_report

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise MeasurementStopped("out of paper", report)

    monkeypatch.setattr("hf_robust_ft.trainer.curvature.measure", fail)
    with caplog.at_level(logging.ERROR):
        trainer = trained(tmp_path / "run")
    assert "out of paper" in caplog.text
    assert "Go on with trainer.measure_hessian()" in caplog.text
    loaded = type(trainer.model).from_pretrained(tmp_path / "run")
    tiny.assert_equal_weights(tiny.weights(loaded), tiny.weights(trainer.model))
    assert HessianReport.load(tmp_path / "run" / FILE) == report
    assert trainer.hessian_report is None
    with pytest.raises(MeasurementStopped):
        trainer.measure_hessian()


def test_other_data_is_returned_only(tmp_path: Path) -> None:
    trainer = trained(tmp_path)
    before = trainer.hessian_report
    found = trainer.measure_hessian(tiny.texts(4, 7), time_budget=0, metric_key_prefix="mine")
    assert found.examples == 4
    assert all(layer.positive is None for layer in found.layers)
    assert trainer.hessian_report is before
    assert HessianReport.load(tmp_path / FILE) == before
    assert "mine_hessian_total" in trainer.state.log_history[-1]


def test_a_reference_of_other_shapes_is_refused(tmp_path: Path) -> None:
    trainer = trained(tmp_path)
    with pytest.raises(ReferenceMismatch, match=r"another shape for bert\.embeddings"):
        trainer.measure_hessian(reference=tiny.bert(vocab_size=60))
    with pytest.raises(ReferenceMismatch, match="has no weights for"):
        trainer.measure_hessian(reference={})


def test_without_a_kept_start_the_base_model_is_read_again(tmp_path: Path) -> None:
    base = tiny.bert()
    base.bert.save_pretrained(tmp_path / "base")
    model = type(base).from_pretrained(tmp_path / "base", num_labels=3)
    trainer = trained(tmp_path / "run", model=model, hessian_examples=0)
    numbers_before = torch.get_rng_state()
    weights, described = base_weights(model)
    assert torch.equal(torch.get_rng_state(), numbers_before)
    assert described.endswith("base; classifier.weight, which they lack, from zero")
    assert torch.equal(weights["classifier.weight"], torch.zeros(3, 16))
    assert torch.equal(weights["bert.pooler.dense.weight"], base.bert.pooler.dense.weight)
    report = trainer.measure_hessian(examples=4, time_budget=0)
    found = {layer.name: layer.distance for layer in report.layers}
    assert found["classifier.weight"] == pytest.approx(model.classifier.weight.norm().item())
    assert 0 < found["bert.pooler.dense.weight"] < 1


def test_a_base_that_is_unknown_gone_or_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ReferenceMismatch, match="a Mlp does not say where it was loaded from; give measure_hessian"):
        base_weights(tiny.Mlp())
    with pytest.raises(ReferenceMismatch, match="does not say where it was loaded from"):
        base_weights(tiny.bert())
    tiny.bert().save_pretrained(tmp_path)
    model = type(tiny.bert()).from_pretrained(tmp_path)
    (tmp_path / STATE_FILE).touch()
    with pytest.raises(ReferenceMismatch, match="a checkpoint of a training, not from its pretrained weights"):
        base_weights(model)
    model.config._name_or_path = str(tmp_path / "gone")
    with pytest.raises(ReferenceMismatch, match=r"the pretrained weights can't be read from .*gone"):
        base_weights(model)


def test_a_sharded_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = tiny.trainer(tmp_path)
    monkeypatch.setattr(type(trainer), "_sharded_by", "FSDP")
    with pytest.raises(ValueError, match="measure_hessian does not work with FSDP"):
        trainer.measure_hessian()


@pytest.mark.parametrize("name", ["hessian_examples", "hessian_time_budget", "hessian_every"])
def test_arguments_are_checked(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is -1; give .* >= 0"):
        RobustTrainingArguments(str(tmp_path), **{name: -1})


def test_every_needs_examples(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="hessian_every is 2, but hessian_examples is 0"):
        RobustTrainingArguments(str(tmp_path), hessian_every=2)


def test_examples_of_a_stream_are_its_first(tmp_path: Path) -> None:
    stream = ({"x": torch.full((2,), float(i)), "target": i} for i in range(100))

    def collate(rows: list[Any]) -> dict[str, Any]:
        return {"x": torch.stack([r["x"] for r in rows]), "target": torch.tensor([r["target"] for r in rows])}

    batches = list(example_batches(stream, collate, "target", 5, tiny.arguments(tmp_path)))
    assert [batch["labels"].tolist() for batch in batches] == [[0, 1, 2, 3, 4]]


def bounds_of(trainer: Any) -> dict[str, Bound]:
    return {bound.name: bound for bound in trainer._measured[0].bounds}


def test_bounds_and_risks_are_those_of_the_measured_loss(tmp_path: Path) -> None:
    trainer = trained(tmp_path, noise_transition=0.2, eval_dataset=tiny.texts(8, 1))
    training, evaluation = trainer._measured[0].risks
    report = trainer.hessian_report
    assert (training.labels, training.corrected) == ("noisy", True)
    assert training.loss == pytest.approx(report.losses.mean)
    assert training.loss_error == pytest.approx(report.losses.standard_error)
    # Nobody said what these labels are.
    assert (evaluation.labels, evaluation.corrected, evaluation.n) == ("as given", False, 8)
    assert evaluation.loss == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-5)
    bound = bounds_of(trainer)["Hessian distance, sound bound"]
    assert bound.bounds_what == "expected loss on clean labels"
    assert bound.n == 24
    assert bound.terms["loss"] == report.losses.mean
    noisy = trained(tmp_path, noise_transition=0.2, eval_labels="noisy", eval_dataset=tiny.texts(8, 1))
    assert [(risk.labels, risk.corrected) for risk in noisy._measured[0].risks] == [("noisy", True)] * 2
    clean = trained(tmp_path, noise_transition=0.2, eval_labels="clean", eval_dataset=tiny.texts(8, 1))
    assert [(risk.labels, risk.corrected) for risk in clean._measured[0].risks] == [("noisy", True), ("clean", False)]
    assert clean._measured[0].risks[1].loss == evaluation.loss
    plain = trained(tmp_path)
    assert [(risk.labels, risk.corrected) for risk in plain._measured[0].risks] == [("as given", False)]


@pytest.mark.parametrize(("said", "claim"), [(None, "error on labels as given"), ("clean", "error on clean labels")])
def test_only_labels_that_are_said_to_be_clean_certify_the_clean_error(
    tmp_path: Path, said: str | None, claim: str
) -> None:
    trainer = trained(tmp_path, noise_transition=0.2, eval_labels=said, eval_dataset=tiny.texts(8, 1))
    assert bounds_of(trainer)["held-out, eval"].bounds_what == claim


SINGULAR = [[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]


@pytest.mark.parametrize("correction", ["posterior", "none"])
def test_a_transition_without_an_inverse_leaves_the_plain_loss(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, correction: str
) -> None:
    torch.manual_seed(0)
    model = tiny.bert(num_hidden_layers=1)
    start = tiny.weights(model)
    with caplog.at_level(logging.WARNING):
        trainer = trained(tmp_path, model=model, noise_transition=SINGULAR, loss_correction=correction)
    assert "noise_transition can't be inverted, so the backward-corrected loss is not defined" in caplog.text
    drawn = sorted(np.random.default_rng(0).permutation(24)[:EXAMPLES].tolist())
    batches = DataLoader(tiny.texts().select(drawn), batch_size=8, collate_fn=trainer.data_collator)
    assert numbers(trainer.hessian_report) == numbers(measure_hessian(model, start, batches, time_budget=0))
    (risk,) = trainer._measured[0].risks
    assert (risk.labels, risk.corrected) == ("noisy", False)
    assert bounds_of(trainer)["Hessian distance, sound bound"].bounds_what == "expected loss"


def test_only_a_transition_without_an_inverse_is_left_out() -> None:
    assert correctable(tiny.bert(), None) is None
    assert correctable(tiny.bert(), 0.2) == 0.2
    assert correctable(tiny.bert(), 2 / 3) is None  # of three classes all rows are equal
    assert correctable(tiny.Mlp(), 2 / 3) == 2 / 3  # which it may not be of others
    with pytest.raises(ValueError, match="2 classes"):
        correctable(tiny.bert(), [[0.9, 0.1], [0.1, 0.9]])


@pytest.mark.parametrize("examples", [0, -1])
def test_no_examples_are_refused(tmp_path: Path, examples: int) -> None:
    trainer = tiny.trainer(tmp_path, hessian_examples=EXAMPLES)
    with pytest.raises(ValueError, match=f"examples is {examples}; give a number >= 1, or None for hessian_examples=9"):
        trainer.measure_hessian(examples=examples)


def held_out(trainer: Any) -> set[str]:
    return {name for name in bounds_of(trainer) if name.startswith("held-out")}


def test_data_that_nothing_was_chosen_by_certify_the_error(tmp_path: Path) -> None:
    evaluated = {"dev": tiny.texts(16, 1), "test": tiny.texts(16, 2)}
    settings = {"eval_dataset": evaluated, "eval_strategy": "epoch"}
    trainer = trained(tmp_path / "a", **settings)
    bound = bounds_of(trainer)["held-out, eval_test"]
    predicted = trainer.predict(evaluated["test"])
    wrong = (predicted.predictions.argmax(-1) != predicted.label_ids).mean()
    assert bound.terms == {"error": pytest.approx(wrong)}
    assert bound.bounds_what == "error on labels as given"
    assert held_out(trainer) == {"held-out, eval_dev", "held-out, eval_test"}
    best = {"load_best_model_at_end": True, "save_strategy": "epoch", "metric_for_best_model": "dev_loss"}
    assert held_out(trained(tmp_path / "b", **settings, **best)) == {"held-out, eval_test"}
    stopped = {"callbacks": [EarlyStoppingCallback()], "metric_for_best_model": "eval_test_loss"}
    trainer = trained(tmp_path / "c", **settings, **stopped)
    assert held_out(trainer) == {"held-out, eval_dev"}
    # Of noisy labels there is an estimate by T only, which evaluation makes.
    noisy = {"noise_transition": 0.2, "eval_labels": "noisy"}
    assert not held_out(trained(tmp_path / "d", **settings, **noisy))


def test_risk_against_the_plain_sums() -> None:
    model = tiny.bert().double()
    batch = {"input_ids": torch.randint(3, 50, (6, 5)), "labels": torch.tensor([0, 1, 2, 0, -100, 1])}
    corrected = CorrectedLoss("backward", symmetric_transition(3, 0.2))
    found = measure_risk(model, [batch], data="x", labels="noisy", loss=corrected)
    with torch.no_grad():
        logits = model.eval()(batch["input_ids"]).logits
        losses = ExampleLoss(corrected, model)(logits, batch["labels"])
    margins = []
    for row, label in zip(logits.tolist(), batch["labels"].tolist(), strict=True):
        if label >= 0:
            margins.append(row[label] - max(v for i, v in enumerate(row) if i != label))
    assert found.loss == pytest.approx(losses.mean().item())
    assert found.loss_error == pytest.approx(losses.std().item() / math.sqrt(6))
    assert found.error == pytest.approx(sum(m <= 0 for m in margins) / 5)
    assert found.margin == pytest.approx(float(np.quantile(margins, 0.1)))


def test_a_report_of_another_version_is_refused(tmp_path: Path) -> None:
    report = trained(tmp_path).hessian_report
    content = json.loads((tmp_path / FILE).read_text())
    assert content["format"] == "hf_robust_ft.HessianReport/1"
    (tmp_path / FILE).write_text(json.dumps({**content, "format": "hf_robust_ft.HessianReport/7"}))
    with pytest.raises(ValueError, match=r"is written as hf_robust_ft\.HessianReport/7, and this version .* reads"):
        HessianReport.load(tmp_path / FILE)
    (tmp_path / FILE).write_text(json.dumps([1]))
    with pytest.raises(ValueError, match="is no report of measure_hessian"):
        HessianReport.load(tmp_path / FILE)
    assert report is not None
