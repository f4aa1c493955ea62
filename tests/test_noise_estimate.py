"""``noise_transition="estimate"``: T from the training set, before the first step, on all processes the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset
from torch import nn

from hf_robust_ft import (
    HessianRegularizedTrainer,
    TransitionEstimate,
    clean_accuracy,
    corrupt_dataset,
    frozen_features,
    noise_estimate,
    pair_flip_transition,
    symmetric_transition,
)
from hf_robust_ft.noise_estimate import FILE, check_estimate

T = pair_flip_transition(3, 0.3)


def noisy(examples: int = 300, transition: Any = T, seed: int = 0) -> Dataset:
    """Of which a frozen random encoder tells the classes, as each has its own tokens."""
    data = tiny.texts(examples, seed)

    def own_tokens(row: dict[str, Any]) -> dict[str, Any]:
        return {"input_ids": [3 + token % 15 + 15 * row["label"] for token in row["input_ids"]]}

    return corrupt_dataset(data.map(own_tokens), transition, seed).remove_columns("clean_label")


def estimating(folder: Path, **changes: Any) -> HessianRegularizedTrainer:
    return tiny.trainer(folder, **{"noise_transition": "estimate", "train_dataset": noisy(), **changes})


def test_training_is_that_with_the_estimated_matrix(tmp_path: Path) -> None:
    trainer = estimating(tmp_path / "a")
    assert trainer.noise_estimate is None
    trainer.train()
    estimate = trainer.noise_estimate
    assert estimate is not None
    assert np.abs(estimate.transition - T).sum(1).max() / 2 < 0.15
    given = tiny.trainer(
        tmp_path / "b",
        noise_transition=estimate.transition,
        loss_correction="posterior",
        train_dataset=noisy(),
    )
    given.train()
    tiny.assert_equal_weights(tiny.weights(trainer.model), tiny.weights(given.model))
    saved = TransitionEstimate.load(tmp_path / "a" / FILE)
    assert (saved.transition == estimate.transition).all()
    assert trainer.args.noise_transition == "estimate"


def test_labels_that_look_clean_are_trained_on_as_they_are(tmp_path: Path) -> None:
    data = noisy(transition=np.eye(3))
    trainer = estimating(tmp_path / "a", train_dataset=data)
    trainer.train()
    assert trainer.noise_estimate is not None
    assert trainer.label_targets is not None
    assert trainer.noise_estimate.noise_level == "none"
    assert trainer.label_targets.posteriors.tolist() == torch.eye(3)[data["label"]].tolist()
    plain = tiny.trainer(tmp_path / "b", train_dataset=data)
    plain.train()
    for name, weight in tiny.weights(plain.model).items():
        assert torch.allclose(weight, tiny.weights(trainer.model)[name], atol=1e-5), name


def test_it_is_estimated_once_and_from_the_weights_before_training(tmp_path: Path) -> None:
    trainer = estimating(tmp_path, eval_dataset=noisy(60, seed=1), eval_labels="noisy")
    before = tiny.weights(trainer.model)
    metrics = trainer.evaluate()
    estimate = trainer.noise_estimate
    assert estimate is not None
    tiny.assert_equal_weights(tiny.weights(trainer.model), before)
    trainer.train()
    assert trainer.noise_estimate is estimate
    assert metrics["eval_clean_accuracy"] != trainer.evaluate()["eval_clean_accuracy"]


@pytest.mark.parametrize("noise", [0.03, 0.3])
def test_an_evaluation_before_training_does_not_change_it(tmp_path: Path, noise: float) -> None:
    data = noisy(transition=symmetric_transition(3, noise))
    trained = []
    for first in (False, True):
        trainer = estimating(tmp_path / str(first), train_dataset=data, eval_dataset=noisy(30, seed=1))
        if first:
            trainer.evaluate()
        trainer.train()
        assert trainer.noise_estimate is not None
        assert (trainer.noise_estimate.noise_level == "none") == (noise < 0.1)
        assert trainer.label_targets is not None
        trained.append((trainer.label_targets._asdict(), tiny.weights(trainer.model)))
    for first, second in zip(*trained, strict=True):
        for name, tensor in first.items():
            torch.testing.assert_close(second[name], tensor, rtol=0, atol=1e-5)


def test_an_evaluation_refuses_no_estimate_that_training_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rare classes T may be singular; posteriors need no inverse."""
    estimate = noise_estimate.estimate_transition
    monkeypatch.setattr(
        noise_estimate, "estimate_transition",
        lambda *a, **k: replace(estimate(*a, **k), singular_value_interval=(0.0, 0.3)),
    )  # fmt: skip
    trainer = estimating(tmp_path / "a", eval_dataset=noisy(30, seed=1))
    trainer.evaluate()
    trainer.train()
    assert trainer.noise_estimate is not None
    assert trainer.noise_estimate.informative
    assert not trainer.noise_estimate.identifiable
    with pytest.raises(ValueError, match="Train on posteriors of the labels"):
        estimating(tmp_path / "b", eval_dataset=noisy(30, seed=1), loss_correction="forward").evaluate()


def test_an_evaluation_alone_needs_no_training_set(tmp_path: Path) -> None:
    first = estimating(tmp_path, eval_dataset=noisy(30, seed=1), eval_labels="noisy")
    first.train()
    expected = first.evaluate()
    settings = {"train_dataset": None, "eval_dataset": noisy(30, seed=1), "eval_labels": "noisy"}
    found = estimating(tmp_path, model=first.model, **settings).evaluate()
    for name in ("eval_loss", "eval_corrected_loss", "eval_clean_accuracy", "eval_clean_accuracy_low"):
        assert found[name] == pytest.approx(expected[name], abs=1e-4)
    for act in ("evaluate", "train"):
        trainer = estimating(tmp_path / "elsewhere", **settings)
        with pytest.raises(ValueError, match="needs a train_dataset with a length, but train_dataset is None"):
            getattr(trainer, act)()


def test_clean_accuracy_carries_the_uncertainty_of_the_estimate(tmp_path: Path) -> None:
    data = noisy(60, seed=1)
    trainer = estimating(tmp_path, eval_dataset=data, eval_labels="noisy")
    metrics = trainer.evaluate()
    estimate = trainer.noise_estimate
    assert estimate is not None
    with torch.no_grad():
        chosen = trainer.model.eval()(input_ids=torch.tensor(data["input_ids"][:])).logits.argmax(-1)
    draws = estimate.draws
    found = clean_accuracy(chosen, data["label"][:], estimate.transition, transition_samples=draws)
    parts = [metrics[f"eval_clean_accuracy{end}"] for end in ("", "_low", "_high")]
    assert parts == pytest.approx([found.accuracy, *found.interval])


def test_a_saved_estimate_carries_its_uncertainty_too(tmp_path: Path) -> None:
    data = noisy(60, seed=1)
    first = estimating(tmp_path / "a", eval_dataset=data, eval_labels="noisy")
    expected = first.evaluate()
    again = tiny.trainer(
        tmp_path / "b", noise_transition=str(tmp_path / "a" / FILE), train_dataset=noisy(), eval_dataset=data,
        eval_labels="noisy",
    )  # fmt: skip
    found = again.evaluate()
    for end in ("", "_low", "_high"):
        assert found[f"eval_clean_accuracy{end}"] == pytest.approx(expected[f"eval_clean_accuracy{end}"], abs=1e-4)
    again.args.noise_transition = 0.3  # a certificate, with no draws of another T
    assert first.noise_estimate is not None
    again._set_up_noisy_evaluation()
    assert again._transition == 0.3
    with torch.no_grad():
        chosen = again.model.eval()(input_ids=torch.tensor(data["input_ids"][:])).logits.argmax(-1)
    certified = clean_accuracy(chosen, data["label"][:], symmetric_transition(3, 0.3))
    assert again.evaluate()["eval_clean_accuracy_low"] == pytest.approx(certified.interval[0])


def test_an_evaluation_after_training_reads_the_estimate_of_before(tmp_path: Path) -> None:
    first = estimating(tmp_path, max_steps=30)
    first.train()
    written = (tmp_path / FILE).read_text()
    later = estimating(tmp_path, model=first.model, eval_dataset=noisy(30, seed=1), eval_labels="noisy")
    later.evaluate()
    assert first.noise_estimate is not None
    assert later.noise_estimate is not None
    np.testing.assert_array_equal(later.noise_estimate.transition, first.noise_estimate.transition)
    assert (tmp_path / FILE).read_text() == written


def test_a_training_does_not_take_the_estimate_that_an_earlier_run_left(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It may be of other data; an evaluation, which has nothing better, says that it does."""
    estimating(tmp_path / "a").train()
    other = noisy(transition=np.array([[0.6, 0.4, 0], [0.05, 0.95, 0], [0, 0, 1]]), seed=3)
    later = estimating(tmp_path / "a", train_dataset=other, eval_dataset=noisy(30, seed=1), loss_correction="forward")
    later.evaluate()
    assert "T is read from transition_estimate.json in output_dir: remove it if it is of other data" in caplog.text
    later.train()
    alone = estimating(tmp_path / "b", train_dataset=other, loss_correction="forward")
    alone.train()
    assert later.noise_estimate is not None
    assert alone.noise_estimate is not None
    np.testing.assert_array_equal(later.noise_estimate.transition, alone.noise_estimate.transition)


def test_an_evaluation_that_has_to_estimate_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    estimating(tmp_path, eval_dataset=noisy(30, seed=1)).evaluate()
    assert "if it was trained on these labels, they look clean to it" in caplog.text


def test_random_transforms_leave_the_training_alone(tmp_path: Path) -> None:
    def shuffled(batch: dict[str, Any]) -> dict[str, Any]:
        ids = [np.array(row)[torch.randperm(len(row)).numpy()].tolist() for row in batch["input_ids"]]
        return {"input_ids": ids, "label": batch["label"]}

    data = noisy().with_transform(shuffled)
    settings = {"train_dataset": data, "remove_unused_columns": False, "loss_correction": "forward"}
    first = estimating(tmp_path / "a", **settings)
    torch.manual_seed(7)
    first.train()
    assert first.noise_estimate is not None
    second = tiny.trainer(tmp_path / "b", noise_transition=first.noise_estimate.transition, **settings)
    torch.manual_seed(7)
    second.train()
    tiny.assert_equal_weights(tiny.weights(first.model), tiny.weights(second.model))


def test_what_has_no_target_is_left_out(tmp_path: Path) -> None:
    data = noisy()
    labels = np.array(data["label"][:])
    kept = np.arange(len(labels)) % 3 > 0
    masked = data.remove_columns("label").add_column("labels", np.where(kept, labels, -100).tolist())
    trainer = estimating(tmp_path, train_dataset=masked)
    trainer.train()
    assert trainer.noise_estimate is not None
    assert trainer.noise_estimate.n == kept.sum()


def test_a_large_data_set_is_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise_estimate, "MOST_EXAMPLES", 120)
    trainer = estimating(tmp_path)
    trainer.train()
    assert trainer.noise_estimate is not None
    assert trainer.noise_estimate.n == 120


@pytest.mark.parametrize("correction", ["posterior", "forward"])
@pytest.mark.parametrize("kind", ["dataset", "rows"])
def test_the_sample_is_of_examples_with_a_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, correction: str, kind: str
) -> None:
    monkeypatch.setattr(noise_estimate, "MOST_EXAMPLES", 100)
    data = noisy()
    labels = np.where(np.arange(300) % 5 < 2, data["label"][:], -100)
    data = data.remove_columns("label").add_column("labels", labels.tolist())
    trainer = estimating(
        tmp_path, train_dataset=data if kind == "dataset" else [dict(row) for row in data], loss_correction=correction
    )
    trainer.train()
    assert trainer.noise_estimate is not None
    if (kind, correction) == ("rows", "forward"):  # no column says which they are
        assert trainer.noise_estimate.n < 60
    else:
        assert trainer.noise_estimate.n == 100


def test_a_resumed_run_reads_the_estimate_again(tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 2}
    first = estimating(tmp_path, **settings)
    first.train()
    assert first.noise_estimate is not None
    marked = replace(first.noise_estimate, verdict="read again")
    marked.save(tmp_path / FILE)
    again = estimating(tmp_path, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.noise_estimate is not None
    assert again.noise_estimate.verdict == "read again"
    tiny.assert_equal_weights(tiny.weights(again.model), tiny.weights(first.model))


@pytest.mark.parametrize("correction", ["none", "gce", "nonnegative_backward"])
def test_any_loss_goes_with_it(tmp_path: Path, correction: str) -> None:
    trainer = estimating(tmp_path, loss_correction=correction, eval_dataset=noisy(30, seed=1), eval_labels="noisy")
    trainer.train()
    assert (tmp_path / FILE).is_file()
    assert "eval_clean_accuracy" in trainer.evaluate()


@pytest.mark.parametrize("correction", ["posterior", "forward"])
def test_labels_that_say_nothing_are_refused_before_training(tmp_path: Path, correction: str) -> None:
    useless = noisy(transition=symmetric_transition(3, 0.66))
    trainer = estimating(tmp_path, train_dataset=useless, loss_correction=correction)
    before = tiny.weights(trainer.model)
    with pytest.raises(ValueError, match=r"not identifiable.*loss_correction='gce'"):
        trainer.train()
    tiny.assert_equal_weights(tiny.weights(trainer.model), before)
    assert not TransitionEstimate.load(tmp_path / FILE).identifiable


def test_posteriors_need_no_inverse(tmp_path: Path) -> None:
    """Rare classes leave T open to be singular; what most labels are is known all the same."""
    trainer = estimating(tmp_path)
    trainer.train()
    assert trainer.noise_estimate is not None
    few = replace(trainer.noise_estimate, singular_value_interval=(0.0, 0.3), verdict="It is rough.")
    assert not few.identifiable
    assert few.informative
    check_estimate(few, posteriors=True)
    with pytest.raises(
        ValueError, match=r"It is rough.*Train on posteriors of the labels \(loss_correction='posterior'\)"
    ):
        check_estimate(few, posteriors=False)
    check_estimate(replace(trainer.noise_estimate, clean_prior=np.array([0.9, 0.05, 0.05])), posteriors=True)
    none = replace(few, noise_rate_interval=(0.6, 0.7))
    with pytest.raises(ValueError, match=r"Train without T"):
        check_estimate(none, posteriors=True)


class Stream(torch.utils.data.IterableDataset[dict[str, Any]]):
    def __iter__(self) -> Any:
        return iter(noisy(8))


class CountedStream(Stream):
    def __len__(self) -> int:
        return 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_dataset": Stream()}, "needs a train_dataset with a length, but Stream has no length"),
        ({"train_dataset": CountedStream()}, "but CountedStream is an IterableDataset, which gives no example by its"),
        ({"model": tiny.token_classifier()}, "noise_transition='estimate' is for one class an example.*ForToken"),
        ({"model": tiny.Mlp(), "train_dataset": tiny.vectors()}, "Mlp has no backbone"),
        ({"model": tiny.bert(problem_type="regression", num_labels=1)}, "problem_type is 'regression'"),
    ],
)
def test_what_has_no_estimate_is_refused_when_the_trainer_is_made(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        estimating(tmp_path, label_names=["labels"], loss_correction="none", **changes)


def test_a_class_without_examples_is_named(tmp_path: Path) -> None:
    data = noisy().filter(lambda row: row["label"] != 1)
    with pytest.raises(ValueError, match="noise_transition='estimate': labels hold no example of class 1"):
        estimating(tmp_path, train_dataset=data).train()


def test_a_list_of_examples_serves_as_well(tmp_path: Path) -> None:
    rows = [{"input_ids": row["input_ids"], "label": row["label"]} for row in noisy()]
    from_rows, from_dataset = estimating(tmp_path / "a", train_dataset=rows), estimating(tmp_path / "b")
    from_rows.train()
    from_dataset.train()
    assert from_rows.noise_estimate is not None
    assert from_dataset.noise_estimate is not None
    np.testing.assert_array_equal(from_rows.noise_estimate.transition, from_dataset.noise_estimate.transition)


def test_a_batch_without_the_labels_is_named(tmp_path: Path) -> None:
    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = {name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "label")}
        return {"input_ids": batch["input_ids"], "target": batch["label"]}

    trainer = estimating(tmp_path)
    trainer.data_collator = collate
    with pytest.raises(ValueError, match="needs 'labels', but the batch has input_ids, target; name the column"):
        trainer.train()


@pytest.mark.parametrize("correction", ["forward", "posterior"])
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.eye(3).tolist(), r"a batch has torch\.float32 \[8, 3\] as 'labels'; give integers \[B\]"),
        ([[0], [1], [2]], r"a batch has torch\.int64 \[8, 1\] as 'labels'"),
        ([0.0, 1.0, 2.0], r"a batch has torch\.float32 \[8\] as 'labels'"),
    ],
)
def test_targets_that_are_no_class_indices_are_named(
    tmp_path: Path, labels: list[Any], message: str, correction: str
) -> None:
    rows = [{"input_ids": row["input_ids"], "labels": labels[row["label"]]} for row in noisy(30)]
    with pytest.raises(ValueError, match=message):
        estimating(tmp_path, train_dataset=rows, loss_correction=correction).train()


def collated(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {
        "input_ids": torch.tensor([r["input_ids"] for r in rows]),
        "labels": torch.tensor([r["label"] for r in rows]),
    }


@pytest.mark.parametrize("copies", [0, 2])
def test_a_collator_that_drops_or_repeats_examples_is_named(tmp_path: Path, copies: int) -> None:
    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return collated(rows[:5] + rows[5:] * copies)

    trainer = estimating(tmp_path, remove_unused_columns=False)
    trainer.data_collator = collate
    with pytest.raises(
        ValueError, match=r"collator made \d+ inputs and \d+ labels of 300 examples; it must keep every"
    ):
        trainer.train()


def test_boolean_labels_are_two_classes(tmp_path: Path) -> None:
    data = noisy(60)
    trainer = estimating(tmp_path, model=tiny.bert(num_labels=2), train_dataset=data, remove_unused_columns=False)
    trainer.data_collator = lambda rows: {**collated(rows), "labels": torch.tensor([r["label"] > 0 for r in rows])}
    trainer.train()
    assert trainer.label_targets is not None
    assert trainer.label_targets.labels.tolist() == [int(label > 0) for label in data["label"]]


@pytest.mark.parametrize("labelled", [True, False])
def test_an_example_whose_features_are_not_finite_is_named_by_its_place(tmp_path: Path, labelled: bool) -> None:
    data = noisy()
    rows = [{"input_ids": row["input_ids"], "labels": row["label"]} for row in data]
    rows[123] = {"input_ids": [49] * 7, "labels": 0 if labelled else -100}
    model = tiny.bert()
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[49] = float("nan")
    trainer = estimating(
        tmp_path, model=model, train_dataset=[r for r in rows if r is rows[123] or 49 not in r["input_ids"]]
    )
    place = next(i for i, row in enumerate(trainer.train_dataset) if 49 in row["input_ids"])
    if not labelled:
        trainer.train()
        return
    with pytest.raises(ValueError, match=rf"the features of train_dataset\[{place}\] are not finite \(of 1 examples"):
        trainer.train()


def test_a_resumed_run_in_another_folder_takes_the_estimate_along(tmp_path: Path) -> None:
    estimating(tmp_path / "a", save_strategy="steps", save_steps=2).train()
    again = estimating(tmp_path / "b", save_strategy="steps", save_steps=2)
    again.train(resume_from_checkpoint=tmp_path / "a" / "checkpoint-2")
    assert (tmp_path / "b" / FILE).read_text() == (tmp_path / "a" / FILE).read_text()


def test_half_precision_models_have_features_too(tmp_path: Path) -> None:
    model = tiny.resnet().to(torch.bfloat16)
    pixels = torch.randn(4, 1, 8, 8)
    assert frozen_features(model, [{"pixel_values": pixels}]).dtype == torch.float32


def test_the_head_and_the_mode_of_the_model_do_not_matter(tmp_path: Path) -> None:
    model = tiny.bert()
    other = tiny.bert()
    other.load_state_dict(model.state_dict())
    nn.init.normal_(other.classifier.weight)
    found = []
    for number, each in enumerate((model.train(), other.eval())):
        trainer = estimating(tmp_path / str(number), model=each, max_steps=1)
        trainer.train()
        assert trainer.noise_estimate is not None
        found.append(trainer.noise_estimate.transition)
    np.testing.assert_array_equal(found[0], found[1])
