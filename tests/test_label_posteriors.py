"""What the true labels probably are, and training on it."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset
from mixture import mixture
from test_noise_estimate import noisy
from torch.nn import functional as F

from hf_robust_ft import (
    HessianRegularizedTrainer,
    corrupt_labels,
    forward_corrected,
    label_posteriors,
    pair_flip_transition,
    posterior_cross_entropy,
    symmetric_transition,
)
from hf_robust_ft.corrected_loss import CorrectedLoss
from hf_robust_ft.label_targets import FILE, LabelTargets, Numbered, TargetCollator

T = pair_flip_transition(3, 0.3)


@pytest.mark.parametrize("transition", [symmetric_transition(3, 0.4), T], ids=["symmetric", "pair"])
def test_it_is_the_exact_posterior_of_a_mixture(transition: np.ndarray) -> None:
    errors = []
    for n in (300, 6000):
        features, labels, clean = mixture(n, dimensions=20)
        found_labels = corrupt_labels(labels, transition, 1)
        exact = clean * transition.T[found_labels]
        exact /= exact.sum(axis=1, keepdims=True)
        found = label_posteriors(features, found_labels, transition)
        np.testing.assert_allclose(found.sum(axis=1), 1)
        errors.append(np.abs(found - exact).mean())
    assert errors[1] < 0.025 < 1.5 * errors[0]


def test_later_rounds_have_less_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels, _ = mixture(400, dimensions=60, distance=2.0)
    found_labels = corrupt_labels(labels, T, 1)
    likelihood = []
    for rounds in (1, 3):
        monkeypatch.setattr(importlib.import_module("hf_robust_ft.label_posteriors"), "ROUNDS", rounds)
        found = label_posteriors(features, found_labels, T)
        likelihood.append(np.log(found[np.arange(len(labels)), labels]).mean())
    assert likelihood[1] > likelihood[0] + 0.02


def test_without_noise_labels_stand() -> None:
    features, labels, _ = mixture(100)
    np.testing.assert_array_equal(label_posteriors(features, labels, np.eye(3)), np.eye(3)[labels])


def test_what_does_not_fit_is_refused() -> None:
    features, labels, _ = mixture(30)
    with pytest.raises(ValueError, match="noise_transition has shape"):
        label_posteriors(features, labels, np.ones((2, 3)))
    with pytest.raises(ValueError, match="folds is 1"):
        label_posteriors(features, labels, T, folds=1)


def test_the_loss_is_cross_entropy_with_probabilities() -> None:
    z = torch.randn(5, 3, dtype=torch.float64)
    posteriors = torch.softmax(torch.randn(5, 3, dtype=torch.float64), -1)
    expected = F.cross_entropy(z, posteriors, reduction="none")
    torch.testing.assert_close(posterior_cross_entropy(z, posteriors), expected, rtol=0, atol=1e-12)
    posteriors[2] = -100
    assert posterior_cross_entropy(z, posteriors)[2] == 0
    loss = CorrectedLoss("posterior", T.tolist(), num_classes=3)
    mean = expected[[0, 1, 3, 4]].mean()
    torch.testing.assert_close(loss(z, posteriors), mean, rtol=0, atol=1e-12)
    torch.testing.assert_close(loss(z, posteriors, 8), mean / 2, rtol=0, atol=1e-12)


def test_its_gradient_is_that_of_forward_correction_at_the_posterior_of_the_model() -> None:
    """One step of expectation maximisation climbs the likelihood itself."""
    z = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    labels, matrix = torch.tensor([0, 2, 1, 1]), torch.tensor(T)
    own = torch.softmax(z.detach(), -1) * matrix.t()[labels]
    own /= own.sum(-1, keepdim=True)
    (expected,) = torch.autograd.grad(forward_corrected(z, labels, matrix).sum(), z)
    (found,) = torch.autograd.grad(posterior_cross_entropy(z, own).sum(), z)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_labels_without_a_posterior_are_forward_corrected() -> None:
    z, labels = torch.randn(4, 3), torch.tensor([0, 2, -100, 1])
    found = CorrectedLoss("posterior", T.tolist())(z, labels)
    torch.testing.assert_close(found, CorrectedLoss("forward", T.tolist())(z, labels))
    with pytest.raises(ValueError, match=r"logits have shape \(4, 3\) and posteriors \(4, 2\)"):
        CorrectedLoss("posterior", T.tolist())(z, torch.ones(4, 2))


# In the Trainer


def on_posteriors(folder: Path, **changes: Any) -> HessianRegularizedTrainer:
    settings = {"noise_transition": T, "loss_correction": "posterior", "train_dataset": noisy()}
    return tiny.trainer(folder, **{**settings, **changes})


def found_by(trainer: HessianRegularizedTrainer) -> LabelTargets:
    assert trainer.label_targets is not None
    return trainer.label_targets


def test_each_example_meets_its_own_posterior(tmp_path: Path) -> None:
    trainer = on_posteriors(tmp_path)
    trainer.train()
    targets, data = found_by(trainer), noisy()
    assert targets.labels.tolist() == data["label"][:]
    assert (targets.posteriors.sum(1) - 1).abs().max() < 1e-6
    clean = tiny.texts(300)["label"][:]
    right = (targets.posteriors.argmax(1) == torch.tensor(clean)).float().mean()
    assert right > 0.9 > 0.75 > (targets.labels == torch.tensor(clean)).float().mean()
    place = {tuple(ids): i for i, ids in enumerate(data["input_ids"])}
    seen = 0
    for batch in trainer.get_train_dataloader():
        for ids, row in zip(batch["input_ids"].tolist(), batch["labels"], strict=True):
            assert torch.equal(row, targets.posteriors[place[tuple(ids)]])
            seen += 1
    assert seen == len(data)


def test_a_step_is_that_of_the_cross_entropy_with_them(tmp_path: Path) -> None:
    changes = {"optim": "sgd", "max_steps": 1, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
    trainer = on_posteriors(tmp_path, per_device_train_batch_size=300, **changes)
    before = tiny.weights(trainer.model)
    trainer.train()
    targets = found_by(trainer)
    torch.manual_seed(0)
    model = tiny.bert()
    model.load_state_dict(before)
    logits = model(input_ids=torch.tensor(noisy()["input_ids"][:])).logits
    F.cross_entropy(logits, targets.posteriors).backward()
    for (name, weight), moved in zip(model.named_parameters(), trainer.model.parameters(), strict=True):
        step = torch.zeros_like(weight) if weight.grad is None else weight.grad
        torch.testing.assert_close(moved, before[name] - 1e-2 * step, rtol=0, atol=1e-6)


def test_batches_and_accumulation_give_one_trajectory(tmp_path: Path) -> None:
    whole = on_posteriors(tmp_path / "a", per_device_train_batch_size=8, optim="sgd")
    parts = on_posteriors(tmp_path / "b", per_device_train_batch_size=2, gradient_accumulation_steps=4, optim="sgd")
    for trainer in (whole, parts):
        trainer.train()
    for name, weight in tiny.weights(whole.model).items():
        torch.testing.assert_close(tiny.weights(parts.model)[name], weight, rtol=0, atol=1e-6)


def test_an_estimated_matrix_trains_on_them_by_default(tmp_path: Path) -> None:
    first = tiny.trainer(tmp_path / "a", noise_transition="estimate", train_dataset=noisy())
    first.train()
    assert found_by(first)
    assert (tmp_path / "a" / FILE).is_file()
    forward = tiny.trainer(
        tmp_path / "b", noise_transition="estimate", loss_correction="forward", train_dataset=noisy()
    )
    forward.train()
    assert forward.label_targets is None
    assert not (tmp_path / "b" / FILE).exists()


def test_evaluation_has_labels_and_the_forward_corrected_loss(tmp_path: Path) -> None:
    data = noisy(30, seed=1)
    trainer = on_posteriors(tmp_path, eval_dataset=data)
    trainer.train()
    metrics = trainer.evaluate()
    with torch.no_grad():
        logits = trainer.model.eval()(input_ids=torch.tensor(data["input_ids"][:])).logits
    labels = torch.tensor(data["label"][:])
    assert metrics["eval_loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), abs=1e-5)
    expected = forward_corrected(logits, labels, torch.tensor(T).float()).mean().item()
    assert metrics["eval_corrected_loss"] == pytest.approx(expected, abs=1e-5)


def test_a_resumed_run_reads_them_again(tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 2}
    first = on_posteriors(tmp_path, **settings)
    first.train()
    again = on_posteriors(tmp_path, **settings)
    # As if the checkpoint's weights had been loaded: other features would give other posteriors.
    torch.nn.init.zeros_(next(again.model.bert.encoder.parameters()))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    tiny.assert_equal_weights(found_by(again)._asdict(), found_by(first)._asdict())
    tiny.assert_equal_weights(tiny.weights(again.model), tiny.weights(first.model))


def test_a_resumed_run_that_lacks_them_takes_labels_that_look_clean_as_they_are(tmp_path: Path) -> None:
    settings = {"noise_transition": "estimate", "save_strategy": "steps", "save_steps": 2}
    data = noisy(transition=symmetric_transition(3, 0.03))
    first = on_posteriors(tmp_path, train_dataset=data, **settings)
    first.train()
    (tmp_path / FILE).unlink()
    again = on_posteriors(tmp_path, train_dataset=data, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert found_by(again).posteriors.tolist() == torch.eye(3)[data["label"]].tolist()
    tiny.assert_equal_weights(tiny.weights(again.model), tiny.weights(first.model))


def test_an_evaluation_needs_neither_posteriors_nor_a_training_set(tmp_path: Path) -> None:
    data = noisy(30)
    trainer = on_posteriors(tmp_path, train_dataset=None, eval_dataset=data)
    labels = torch.tensor(data["label"][:])
    with torch.no_grad():
        logits = trainer.model.eval()(input_ids=torch.tensor(data["input_ids"][:])).logits
    expected = forward_corrected(logits, labels, torch.tensor(T).float()).mean().item()
    assert trainer.evaluate()["eval_corrected_loss"] == pytest.approx(expected, abs=1e-4)
    with pytest.raises(ValueError, match="loss_correction='posterior' needs a train_dataset with a length"):
        trainer.train()


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    on_posteriors(tmp_path, save_strategy="steps", save_steps=2).train()
    (tmp_path / FILE).write_bytes(b"{}")
    with pytest.raises(ValueError, match=r"_label_posteriors.safetensors can't be read"):
        on_posteriors(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize(
    "changes",
    [
        {"train_sampling_strategy": "group_by_length"},
        {"dataloader_num_workers": 1},
        {"train_dataset": [dict(row) for row in noisy()]},
        {"model": tiny.distilbert()},
        {"layer_radius": 0.01, "label_smoothing_factor": 0.0},
    ],
)
def test_it_goes_with(tmp_path: Path, changes: dict[str, Any]) -> None:
    trainer = on_posteriors(tmp_path, **changes)
    trainer.train()
    assert found_by(trainer).posteriors.shape == (300, 3)


def test_examples_without_a_target_stay_without(tmp_path: Path) -> None:
    data = noisy(60)
    labels = np.where(np.arange(60) % 4 == 0, -100, data["label"][:])
    data = data.remove_columns("label").add_column("labels", labels.tolist())
    trainer = on_posteriors(tmp_path, train_dataset=data, max_steps=2)
    trainer.train()
    missing = torch.arange(60) % 4 == 0
    assert (found_by(trainer).posteriors[missing] == -100).all()
    assert (found_by(trainer).posteriors[~missing] >= 0).all()
    assert np.isfinite([entry["loss"] for entry in trainer.state.log_history if "loss" in entry]).all()


def test_other_data_than_they_were_computed_for_is_refused(tmp_path: Path) -> None:
    trainer = on_posteriors(tmp_path)
    trainer.train()
    trainer.train_dataset = noisy(30)
    with pytest.raises(ValueError, match="computed for 300 examples, but train_dataset has 30"):
        trainer.train()
    trainer.train_dataset = noisy(seed=5)
    with pytest.raises(ValueError, match="the training set or its collator has changed since"):
        trainer.train()


def test_posteriors_of_another_matrix_are_refused(tmp_path: Path) -> None:
    trainer = on_posteriors(tmp_path, noise_transition=0.1, save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.args.noise_transition = symmetric_transition(3, 0.1).tolist()  # the same
    trainer.train()
    trainer.args.noise_transition = 0.4
    with pytest.raises(ValueError, match=r"computed with another noise_transition than that of now; .*a new Trainer"):
        trainer.train()
    before = found_by(trainer).posteriors
    trainer.args.noise_transition = "estimate"
    trainer.train()
    assert not torch.equal(found_by(trainer).posteriors, before)
    on_posteriors(tmp_path, noise_transition=0.1).train()
    later = on_posteriors(tmp_path, noise_transition=0.4)
    with pytest.raises(ValueError, match="computed with another noise_transition"):
        later.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_each_trial_of_a_search_has_posteriors_of_its_own_matrix(tmp_path: Path) -> None:
    def init() -> torch.nn.Module:
        torch.manual_seed(0)
        return tiny.bert()

    trainer = on_posteriors(tmp_path / "a", noise_transition=0.1, model_init=init)
    trainer.train()
    trainer.args.noise_transition = 0.4
    trainer.train()
    alone = on_posteriors(tmp_path / "b", noise_transition=0.4, model_init=init)
    alone.train()
    tiny.assert_equal_weights(found_by(trainer)._asdict(), found_by(alone)._asdict())
    tiny.assert_equal_weights(tiny.weights(trainer.model), tiny.weights(alone.model))


def test_a_loader_that_gives_labels_is_refused(tmp_path: Path) -> None:
    class Own(HessianRegularizedTrainer):
        def get_train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(self.train_dataset, batch_size=8, collate_fn=self.data_collator)

    args = tiny.arguments(tmp_path, noise_transition=T, loss_correction="posterior")
    trainer = Own(tiny.bert(), args, train_dataset=noisy())
    with pytest.raises(ValueError, match=r"a batch has labels of torch\.int64: is get_train_dataloader overridden"):
        trainer.train()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noise_transition": None}, "loss_correction='posterior' needs noise_transition"),
        ({"model": tiny.Mlp(), "train_dataset": tiny.vectors(), "label_names": ["labels"]}, "Mlp has no backbone"),
        ({"model": tiny.token_classifier()}, "loss_correction='posterior' is for one class an example"),
    ],
)
def test_what_has_no_posterior_is_refused_when_the_trainer_is_made(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        on_posteriors(tmp_path, **changes)


def test_they_are_not_uploaded() -> None:
    assert FILE.startswith("_")


def test_a_collator_keeps_what_else_is_in_a_batch() -> None:
    data = Dataset.from_dict({"x": [1, 2, 3], "label": [0, 1, 2]})
    targets = LabelTargets(torch.eye(3), torch.arange(3), torch.eye(3))

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        return {"x": torch.tensor([r["x"] for r in rows]), "labels": torch.tensor([r["label"] for r in rows])}

    numbered = Numbered(data)
    assert numbered[1] == (1, {"x": 2, "label": 1})
    batch = TargetCollator(collate, targets, "labels")(numbered.__getitems__([2, 0]))
    assert json.loads(json.dumps({k: v.tolist() for k, v in batch.items()})) == {
        "x": [3, 1],
        "labels": [[0, 0, 1], [1, 0, 0]],
    }


def test_training_on_posteriors_needs_no_inverse() -> None:
    singular = [[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]
    logits = torch.tensor([[2.0, 1.0, 0.0]], dtype=torch.float64)
    loss = CorrectedLoss("posterior", singular, num_classes=3)
    posteriors = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64)
    naive = -(posteriors * logits.log_softmax(-1)).sum()
    assert float(loss(logits, posteriors)) == pytest.approx(float(naive))
    # Evaluation labels are corrected forward.
    noisy_log_p = (logits.softmax(-1) @ torch.tensor(singular, dtype=torch.float64)).log()
    assert float(loss(logits, torch.tensor([1]))) == pytest.approx(-float(noisy_log_p[0, 1]))
    with pytest.raises(ValueError, match=r"singular"):
        CorrectedLoss("backward", singular, num_classes=3)
