"""``HessianRegularizedTrainer`` on tiny models: what it changes, and what it must not change."""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import transformers
from datasets import Dataset, Features, List, Value
from torch import nn
from transformers import EvalPrediction, Trainer, TrainerCallback, TrainingArguments

from hf_robust_ft import (
    HessianRegularizedTrainer,
    backward_corrected,
    cross_entropy,
    forward_corrected,
    generalized_cross_entropy,
    invert_transition,
    layer_distances,
    nonnegative_backward,
    pair_flip_transition,
    symmetric_transition,
)
from hf_robust_ft.features import make_constraints
from hf_robust_ft.noise_estimate import check_estimable

T = (0.7 * np.eye(3) + 0.3 * np.random.default_rng(0).dirichlet(np.ones(3), 3)).tolist()

BOOLEAN = Features({"input_ids": List(Value("int64")), "label": Value("bool")})


def history(trainer: Trainer, key: str = "loss") -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    logits = prediction.predictions
    if isinstance(logits, tuple):
        logits = logits[-1]  # of the model that returns features, too
    assert logits.shape == (len(prediction.label_ids), tiny.CLASSES)
    return {"accuracy": float((logits.argmax(-1) == prediction.label_ids).mean())}


def test_the_signature_is_that_of_trainer() -> None:
    assert inspect.signature(HessianRegularizedTrainer) == inspect.signature(Trainer)
    for name in ("train", "evaluate", "predict", "training_step", "compute_loss", "evaluation_loop"):
        ours, theirs = getattr(HessianRegularizedTrainer, name), getattr(Trainer, name)
        assert list(inspect.signature(ours).parameters) == list(inspect.signature(theirs).parameters)


@pytest.mark.parametrize("plain", [True, False], ids=["TrainingArguments", "RobustTrainingArguments"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_with_every_feature_off_the_trajectory_is_that_of_trainer(
    tmp_path: Path, plain: bool, accumulation: int
) -> None:
    def run(kind: type[Trainer], arguments_kind: type[TrainingArguments]) -> tuple[Any, ...]:
        torch.manual_seed(0)
        given = tiny.arguments(
            tmp_path, gradient_accumulation_steps=accumulation, warmup_steps=1, per_device_train_batch_size=5
        ).to_dict()
        names = {f for f in inspect.signature(arguments_kind).parameters if f in given}
        arguments = arguments_kind(**{name: given[name] for name in names})
        trainer = kind(tiny.bert(hidden_dropout_prob=0.1), arguments, train_dataset=tiny.texts())
        trainer.train()
        return tiny.weights(trainer.model), history(trainer), history(trainer, "grad_norm")

    ours = run(HessianRegularizedTrainer, TrainingArguments if plain else type(tiny.arguments(tmp_path)))
    theirs = run(Trainer, TrainingArguments)
    tiny.assert_equal_weights(ours[0], theirs[0])
    assert ours[1:] == theirs[1:]
    assert len(ours[1]) == 4


def test_the_identity_and_an_infinite_radius_train_as_plain_cross_entropy(tmp_path: Path) -> None:
    plain = tiny.trainer(tmp_path)
    plain.train()
    identity = tiny.trainer(tmp_path, noise_transition=np.eye(3), layer_radius=math.inf)
    identity.train()
    for name, weight in tiny.weights(plain.model).items():
        torch.testing.assert_close(identity.model.state_dict()[name], weight, rtol=0, atol=1e-5)


@pytest.mark.parametrize("correction", ["forward", "backward", "nonnegative_backward", "gce"])
def test_the_first_step_is_the_gradient_of_the_corrected_loss(tmp_path: Path, correction: str) -> None:
    trainer = tiny.trainer(
        tmp_path, noise_transition=None if correction == "gce" else T, loss_correction=correction,
        optim="sgd", max_grad_norm=0, max_steps=1, per_device_train_batch_size=24,
    )  # fmt: skip
    model = trainer.model
    before = tiny.weights(model)
    data = tiny.texts()
    logits = model(input_ids=torch.tensor(data["input_ids"][:])).logits
    labels, matrix = torch.tensor(data["label"][:]), torch.tensor(T)
    inverse = torch.linalg.inv(matrix.double()).float()
    loss = {
        "forward": lambda: forward_corrected(logits, labels, matrix).mean(),
        "backward": lambda: backward_corrected(logits, labels, inverse).mean(),
        "nonnegative_backward": lambda: nonnegative_backward(logits, labels, inverse) / len(labels),
        "gce": lambda: generalized_cross_entropy(logits, labels).mean(),
    }[correction]()
    loss.backward()
    expected = {name: before[name] - 1e-2 * p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    trainer.train()
    assert history(trainer) == pytest.approx([loss.item()], abs=1e-4)
    for name, weight in expected.items():
        torch.testing.assert_close(model.state_dict()[name], weight, rtol=0, atol=1e-6)


def test_a_transition_alone_means_forward_correction(tmp_path: Path) -> None:
    runs = []
    for correction in (None, "forward", "none"):
        trainer = tiny.trainer(tmp_path, noise_transition=T, loss_correction=correction)
        trainer.train()
        runs.append(tiny.weights(trainer.model))
    tiny.assert_equal_weights(runs[0], runs[1])
    assert not torch.equal(runs[0]["classifier.weight"], runs[2]["classifier.weight"])


@pytest.mark.parametrize("correction", ["forward", "backward", "gce"])
@pytest.mark.parametrize("build", [tiny.bert, tiny.token_classifier, lambda: tiny.gpt2(causal=True)])
def test_one_batch_of_eight_equals_eight_batches_of_one(tmp_path: Path, correction: str, build: Any) -> None:
    def run(batch: int, accumulation: int) -> Trainer:
        torch.manual_seed(0)
        model = build()
        data = tiny.texts()
        noise: Any = T
        if not hasattr(model, "classifier"):
            # A language model, whose classes are its vocabulary.
            noise = symmetric_transition(50, 0.2)
        if build is not tiny.bert:
            # Ragged targets: a mean over micro-batches would weigh them wrongly.
            labels = np.array(data["input_ids"][:]) % (3 if hasattr(model, "classifier") else 50)
            for row in range(len(labels)):
                labels[row, : row % 6] = -100
            data = data.remove_columns("label").add_column("labels", labels.tolist())
        trainer = tiny.trainer(
            tmp_path, model, noise_transition=noise, loss_correction=correction, layer_radius=0.5,
            per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, train_dataset=data,
            max_grad_norm=1e9,
        )  # fmt: skip
        trainer.train()
        return trainer

    whole, parts = run(8, 1), run(1, 8)
    assert history(parts, "grad_norm") == pytest.approx(history(whole, "grad_norm"), rel=1e-4)
    for name, weight in tiny.weights(whole.model).items():
        torch.testing.assert_close(parts.model.state_dict()[name], weight, rtol=0, atol=2e-4)


class OwnGpt2(transformers.GPT2LMHeadModel):
    """What users derive has a name that tells nothing."""


@pytest.mark.parametrize("kind", [transformers.GPT2LMHeadModel, OwnGpt2, transformers.LlamaForCausalLM])
def test_a_language_model_is_corrected_at_the_next_token(tmp_path: Path, kind: Any) -> None:
    if kind is transformers.LlamaForCausalLM:
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        model = kind(transformers.LlamaConfig(vocab_size=50, **sizes))
    else:
        model = kind(tiny.gpt2(causal=True).config)
    noise = symmetric_transition(50, 0.2)
    data = tiny.texts().remove_columns("label")
    data = data.add_column("labels", data["input_ids"][:])
    trainer = tiny.trainer(tmp_path, model, noise_transition=noise, train_dataset=data, per_device_train_batch_size=24)
    ids = torch.tensor(data["input_ids"][:])
    logits = model(input_ids=ids).logits
    expected = forward_corrected(logits[:, :-1], ids[:, 1:], torch.tensor(noise)).mean().item()
    trainer.train()
    assert history(trainer)[0] == pytest.approx(expected, abs=1e-4)


BART = {
    "vocab_size": 50,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "dropout": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}


def pairs(targets: int = 7) -> Dataset:
    """Token ids to read, and others to write, of which one has no target."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, 50, (16, targets), generator=generator)
    labels[0, -1] = -100
    ids = torch.randint(3, 50, (16, 7), generator=generator)
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()})


def translator(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "t5":
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
        return transformers.T5ForConditionalGeneration(
            transformers.T5Config(vocab_size=50, decoder_start_token_id=0, **sizes)
        )
    model = transformers.BartForConditionalGeneration(transformers.BartConfig(**BART))
    if kind == "bart":
        return model
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_2_SEQ_LM", target_modules=["q_proj"]))


@pytest.mark.parametrize("kind", ["bart", "t5", "lora"])
@pytest.mark.parametrize("correction", ["forward", "gce"])
def test_an_encoder_decoder_is_corrected_where_it_reads_its_targets(tmp_path: Path, kind: str, correction: str) -> None:
    noise = symmetric_transition(50, 0.2)
    for targets in (7, 5):
        data, model = pairs(targets), translator(kind)
        given = {"noise_transition": noise} if correction == "forward" else {"loss_correction": correction}
        trainer = tiny.trainer(
            tmp_path, model, train_dataset=data, eval_dataset=data, per_device_train_batch_size=16, max_steps=1, **given
        )
        labels = torch.tensor(data["labels"][:])
        with torch.no_grad():
            outputs = model.eval()(input_ids=torch.tensor(data["input_ids"][:]), labels=labels)
        evaluated = trainer.evaluate()
        assert evaluated["eval_loss"] == pytest.approx(outputs.loss.item(), abs=2e-3)  # two batches, one target short
        if correction == "forward":
            losses = forward_corrected(outputs.logits, labels, torch.tensor(noise))
        else:
            losses = generalized_cross_entropy(outputs.logits, labels)
        expected = losses.sum().item() / (labels != -100).sum().item()
        assert evaluated["eval_corrected_loss"] == pytest.approx(expected, abs=1e-4)
        trainer.train()
        assert history(trainer)[0] == pytest.approx(expected, abs=1e-4)


def test_the_identity_trains_an_encoder_decoder_as_plain_cross_entropy(tmp_path: Path) -> None:
    plain, identity = (
        tiny.trainer(tmp_path, translator("bart"), train_dataset=pairs(), optim="sgd", **given)
        for given in ({}, {"noise_transition": 0.0})
    )
    plain.train()
    identity.train()
    for name, weight in tiny.weights(plain.model).items():
        torch.testing.assert_close(identity.model.state_dict()[name], weight, rtol=0, atol=1e-6)


def test_an_encoder_decoder_that_classifies_decodes_its_input(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = transformers.BartForSequenceClassification(transformers.BartConfig(**BART, num_labels=tiny.CLASSES))
    # Classified at the end of the text, of which there is one.
    data = tiny.texts().map(lambda row: {"input_ids": [3 + row["label"], *row["input_ids"][1:-1], 2]})
    trainer = tiny.trainer(
        tmp_path, model, noise_transition=T, train_dataset=data, per_device_train_batch_size=24, max_steps=1
    )
    labels = torch.tensor(data["label"][:])
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.tensor(data["input_ids"][:])).logits
    trainer.train()
    expected = forward_corrected(logits, labels, torch.tensor(T)).mean().item()
    assert history(trainer)[0] == pytest.approx(expected, abs=1e-4)


def test_an_encoder_decoder_that_hides_how_it_reads_its_targets_needs_them_in_the_batch(tmp_path: Path) -> None:
    def run(data: Dataset) -> Trainer:
        torch.manual_seed(0)
        model = transformers.BlenderbotForConditionalGeneration(transformers.BlenderbotConfig(**BART))
        trainer = tiny.trainer(tmp_path, model, noise_transition=0.2, train_dataset=data, max_steps=1)
        trainer.train()
        return trainer

    with pytest.raises(
        ValueError, match=r"BlenderbotForConditionalGeneration makes its decoder_input_ids from them.*let the collator"
    ):
        run(pairs())
    shifted = [[2, *(label if label >= 0 else 0 for label in row[:-1])] for row in pairs()["labels"]]
    assert math.isfinite(history(run(pairs().add_column("decoder_input_ids", shifted)))[0])


EXPERTS = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "output_router_logits": True,
}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_identity_trains_experts_as_plain_cross_entropy(tmp_path: Path, accumulation: int) -> None:
    def run(**given: Any) -> Any:
        torch.manual_seed(0)
        model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**EXPERTS, router_aux_loss_coef=0.5))
        data = pairs()
        trainer = tiny.trainer(
            tmp_path, model, train_dataset=data, eval_dataset=data, gradient_accumulation_steps=accumulation,
            per_device_train_batch_size=8 // accumulation, optim="sgd", max_steps=2, **given,
        )  # fmt: skip
        trainer.train()
        return tiny.weights(model), [*history(trainer), trainer.evaluate()["eval_loss"]]

    (weights, losses), (plain_weights, plain_losses) = run(noise_transition=0.0), run()
    assert losses == pytest.approx(plain_losses, abs=1e-4)
    for name, weight in plain_weights.items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-6)


def test_what_experts_add_is_added_to_any_loss(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**EXPERTS, router_aux_loss_coef=0.5))
    data = pairs()
    trainer = tiny.trainer(
        tmp_path, model, loss_correction="gce", train_dataset=data, per_device_train_batch_size=16, max_steps=1
    )
    labels = torch.tensor(data["labels"][:])[:, 1:]
    with torch.no_grad():
        outputs = model.eval()(input_ids=torch.tensor(data["input_ids"][:]))
    losses = generalized_cross_entropy(outputs.logits[:, :-1], labels)
    expected = losses.sum() / (labels != -100).sum() + 0.5 * outputs.aux_loss
    trainer.train()
    assert history(trainer)[0] == pytest.approx(expected.item(), abs=1e-4)


def test_experts_that_hide_what_they_add_are_refused(tmp_path: Path) -> None:
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_local_experts")
    sizes = {name: EXPERTS[name] for name in kept}
    config = transformers.JetMoeConfig(
        **sizes, num_key_value_heads=2, kv_channels=4, num_experts_per_tok=2, output_router_logits=True
    )
    trainer = tiny.trainer(
        tmp_path, transformers.JetMoeForCausalLM(config), noise_transition=0.2, train_dataset=pairs()
    )
    with pytest.raises(ValueError, match=r"JetMoeForCausalLM adds a router loss.*output_router_logits=False"):
        trainer.train()
    config.output_router_logits = False
    trainer.train()

    experts = {"expert_ffn_size": 16, "num_experts": 4, "encoder_sparse_step": 1, "decoder_sparse_step": 1}
    both = transformers.NllbMoeConfig(**BART, **experts, output_router_logits=True)
    trainer = tiny.trainer(
        tmp_path, transformers.NllbMoeForConditionalGeneration(both), loss_correction="gce",
        train_dataset=pairs().add_column("decoder_input_ids", pairs()["input_ids"][:]),
    )  # fmt: skip
    with pytest.raises(ValueError, match="NllbMoeForConditionalGeneration adds a router loss to its own"):
        trainer.train()


@pytest.mark.parametrize("norm", ["frobenius", "inf_op"])
def test_every_layer_ends_in_its_ball(tmp_path: Path, norm: str) -> None:
    trainer = tiny.trainer(tmp_path, layer_radius=0.02, radius_norm=norm)
    before = tiny.weights(trainer.model)
    trainer.train()
    table = trainer.constraint_table()
    assert len(trainer.constraints) == sum(row.free is None for row in table) > 10
    for row in table:
        if row.free is None:
            assert row.distance is not None
            assert row.distance <= 0.02
    assert any(row.active for row in table)
    if norm == "frobenius":
        assert trainer.constraints.distances().items() <= layer_distances(trainer.model, before).items()


def test_projection_comes_before_anything_looks_at_the_weights(tmp_path: Path) -> None:
    seen: list[float] = []

    class Look(TrainerCallback):
        def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            seen.append(max(trainer.constraints.distances().values()))

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            seen.append(max(trainer.constraints.distances().values()))

        def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
            seen.append(max(trainer.constraints.distances().values()))

    trainer = tiny.trainer(tmp_path, layer_radius=0.01, callbacks=[Look()], gradient_accumulation_steps=2)
    trainer.train()
    assert len(seen) > trainer.state.global_step == 4
    assert 0.009 < max(seen) <= 0.01


def test_evaluation_reports_the_plain_and_the_corrected_loss(tmp_path: Path) -> None:
    data = tiny.texts(13)
    trainer = tiny.trainer(
        tmp_path,
        noise_transition=T,
        eval_dataset=data,
        per_device_eval_batch_size=13,
        compute_metrics=accuracy,
    )
    metrics = trainer.evaluate()
    with torch.no_grad():
        logits = trainer.model(input_ids=torch.tensor(data["input_ids"][:])).logits
    labels = torch.tensor(data["label"][:])
    assert metrics["eval_loss"] == pytest.approx(cross_entropy(logits, labels).mean().item(), abs=1e-6)
    corrected = forward_corrected(logits, labels, torch.tensor(T)).mean().item()
    assert metrics["eval_corrected_loss"] == pytest.approx(corrected, abs=1e-6)
    assert metrics["eval_accuracy"] == (logits.argmax(-1) == labels).double().mean().item()
    # Batches of another size weigh the same.
    trainer.args.per_device_eval_batch_size = 4
    assert trainer.evaluate()["eval_corrected_loss"] == pytest.approx(corrected, abs=1e-6)
    assert "test_corrected_loss" in trainer.predict(data).metrics
    # Training goes on with the corrected loss.
    trainer.train()
    assert trainer.evaluate()["eval_corrected_loss"] != pytest.approx(corrected, abs=1e-3)


def test_evaluation_without_correction_is_that_of_trainer(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, layer_radius=0.1, eval_dataset=tiny.texts(13))
    stock = Trainer(trainer.model, TrainingArguments(str(tmp_path), report_to="none", use_cpu=True))
    assert trainer.evaluate()["eval_loss"] == stock.evaluate(tiny.texts(13))["eval_loss"]
    assert not any("corrected" in key for key in trainer.evaluate())


def test_several_data_sets_and_a_metric_that_predicts_itself(tmp_path: Path) -> None:
    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        assert prediction.inputs is not None
        if len(prediction.label_ids) == 8:
            trainer.predict(tiny.texts(5))
        return accuracy(prediction)

    data = {"eight": tiny.texts(8), "six": tiny.texts(6)}
    trainer = tiny.trainer(
        tmp_path,
        noise_transition=T,
        eval_dataset=data,
        compute_metrics=compute_metrics,
        include_for_metrics=["inputs"],
    )
    metrics = trainer.evaluate()
    for name, part in data.items():
        alone = tiny.trainer(tmp_path, trainer.model, noise_transition=T, eval_dataset=part).evaluate()
        assert metrics[f"eval_{name}_corrected_loss"] == pytest.approx(alone["eval_corrected_loss"])


def test_a_loss_of_ones_own_may_be_set_after_construction(tmp_path: Path) -> None:
    calls = []

    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        calls.append(num_items_in_batch)
        return cross_entropy(outputs.logits, labels).sum() / num_items_in_batch

    trainer = tiny.trainer(tmp_path)
    trainer.compute_loss_func = loss
    trainer.train()
    assert len(calls) == 4
    trainer.args.noise_transition = T
    with pytest.raises(ValueError, match="compute_loss_func and loss_correction both"):
        trainer.train()
    trainer.compute_loss_func = None
    trainer.train()
    assert len(calls) == 4


def test_a_streamed_data_set(tmp_path: Path) -> None:
    trainer = tiny.trainer(
        tmp_path, noise_transition=T, layer_radius=0.05, train_dataset=tiny.texts().to_iterable_dataset()
    )
    trainer.train()
    assert trainer.state.global_step == 4


def test_data_parallel_replicas_do_not_scale_the_loss(tmp_path: Path) -> None:
    runs = []
    for replicas in (1, 2):
        trainer = tiny.trainer(tmp_path, noise_transition=T, eval_dataset=tiny.texts(8), max_grad_norm=1e9)
        # What Trainer reads on a machine with two GPUs; its own factor is what is tested here.
        trainer.args._n_gpu = replicas
        trainer._wrap_model = lambda model, training=True: model  # type: ignore[method-assign]
        inputs = {"input_ids": torch.tensor(tiny.texts(8)["input_ids"][:]), "labels": torch.arange(8) % 3}
        items = trainer._get_num_items_in_batch([inputs], trainer.args.device)
        runs.append(trainer.compute_loss(trainer.model, inputs, num_items_in_batch=items).mean().item())
    assert runs[0] == pytest.approx(runs[1])


def test_prediction_without_labels(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, noise_transition=T)
    output = trainer.predict(tiny.texts().remove_columns("label"))
    assert output.predictions.shape == (24, 3)
    assert output.label_ids is None


@pytest.mark.parametrize("returns", ["tuple", "none and logits", "named tuple", "dict", "tensor"])
@pytest.mark.parametrize("noise", [T, 0.2], ids=["matrix", "rate"])
def test_models_from_elsewhere_that_take_no_labels(tmp_path: Path, returns: str, noise: Any) -> None:
    data = tiny.vectors()
    trainer = tiny.trainer(
        tmp_path, tiny.Mlp(returns), noise_transition=noise, layer_radius=0.1, train_dataset=data, eval_dataset=data,
        compute_metrics=accuracy, max_steps=30,
    )  # fmt: skip
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_corrected_loss"] < before["eval_corrected_loss"]
    assert after["eval_accuracy"] >= before["eval_accuracy"]


@pytest.mark.parametrize("returns", ["tuple", "dict"])
@pytest.mark.parametrize("noise", [T, None], ids=["corrected", "plain"])
def test_models_from_elsewhere_that_need_their_labels(tmp_path: Path, returns: str, noise: Any) -> None:
    data = tiny.vectors(label="target")
    trainer = tiny.trainer(
        tmp_path, tiny.MlpWithLoss(returns), noise_transition=noise, layer_radius=0.1, train_dataset=data,
        eval_dataset=data, compute_metrics=accuracy, label_names=["target"],
    )  # fmt: skip
    before = trainer.evaluate()
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before["eval_loss"]
    assert ("eval_corrected_loss" in before) == (noise is not None)


def test_renamed_labels_keep_accumulation_exact(tmp_path: Path) -> None:
    norms = []
    for batch, accumulation in ((8, 1), (2, 4)):
        torch.manual_seed(0)
        model = tiny.MlpWithLoss()
        model.norm = nn.Identity()
        trainer = tiny.trainer(
            tmp_path, model, noise_transition=T, train_dataset=tiny.vectors(label="target"), label_names=["target"],
            per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, max_grad_norm=1e9,
        )  # fmt: skip
        trainer.train()
        norms.append(history(trainer, "grad_norm"))
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_batch_norm_statistics_move_and_are_listed(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, tiny.Mlp(), noise_transition=T, layer_radius=0.1, train_dataset=tiny.vectors())
    trainer.train()
    assert trainer.model.norm.running_mean.abs().max() > 0
    rows = {row.name: row.free for row in trainer.constraint_table()}
    assert rows["norm.running_mean"] == "batch-norm statistic, updated by the data"


@pytest.mark.parametrize(
    "settings",
    [
        {"bf16": True},
        {"gradient_checkpointing": True},
        {"activation_checkpointing": True},
        {"optim": "adafactor"},
        {"lr_scheduler_type": "cosine", "warmup_steps": 2},
        {"neftune_noise_alpha": 5},
        {"auto_find_batch_size": True},
    ],
    ids=str,
)
def test_features_of_trainer_keep_working(tmp_path: Path, settings: dict[str, Any]) -> None:
    if not settings.keys() <= inspect.signature(TrainingArguments).parameters.keys():
        pytest.skip(f"this release of transformers has no {', '.join(settings)}")
    trainer = tiny.trainer(tmp_path, noise_transition=T, layer_radius=0.05, max_steps=8, **settings)
    trainer.train()
    assert np.isfinite(history(trainer)).all()
    assert 0.0499 < max(trainer.constraints.distances().values()) <= 0.05
    assert trainer.accelerator.mixed_precision == ("bf16" if "bf16" in settings else "no")
    if "checkpointing" in str(settings):
        assert trainer.model.bert.encoder.layer[0].gradient_checkpointing
    assert next(trainer.model.parameters()).dtype == torch.float32


def test_a_model_held_in_bfloat16_stays_in_its_balls(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, tiny.bert().to(torch.bfloat16), noise_transition=T, layer_radius=0.05)
    trainer.train()
    distances = trainer.constraints.distances().values()
    assert 0.02 < max(distances) <= 0.05


@pytest.mark.slow
def test_a_model_that_was_compiled_before_is_resumed(tmp_path: Path) -> None:
    def compiled() -> HessianRegularizedTrainer:
        torch.manual_seed(0)
        model: Any = torch.compile(tiny.bert(), backend="eager")
        settings = {"save_strategy": "steps", "save_steps": 1, "remove_unused_columns": False}
        return tiny.trainer(tmp_path, model, layer_radius=0.01, max_steps=2, **settings)

    straight, resumed = compiled(), compiled()
    straight.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    tiny.assert_equal_weights(tiny.weights(resumed.model), tiny.weights(straight.model))


def test_torch_compile_trains_the_same(tmp_path: Path) -> None:
    runs = []
    for compiled in (False, True):
        trainer = tiny.trainer(
            tmp_path, noise_transition=T, layer_radius=0.05, torch_compile=compiled, torch_compile_backend="aot_eager",
            eval_dataset=tiny.texts(8),
        )  # fmt: skip
        trainer.train()
        assert "eval_corrected_loss" in trainer.evaluate()
        assert max(trainer.constraints.distances().values()) <= 0.05
        runs.append(tiny.weights(trainer.model))
    for name, weight in runs[0].items():
        torch.testing.assert_close(runs[1][name], weight, rtol=0, atol=1e-4)


def test_hyperparameter_search_over_the_radius(tmp_path: Path) -> None:
    pytest.importorskip("optuna", reason="needs optuna")
    reached: list[tuple[float, float]] = []

    class Look(TrainerCallback):
        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            reached.append((trainer.args.layer_radius, max(trainer.constraints.distances().values())))

    trainer = tiny.trainer(
        tmp_path, model_init=lambda: tiny.bert(), noise_transition=T, eval_dataset=tiny.texts(8), eval_strategy="epoch",
        callbacks=[Look()],
    )  # fmt: skip
    assert not trainer.constraints
    best = trainer.hyperparameter_search(
        hp_space=lambda trial: {"layer_radius": trial.suggest_categorical("layer_radius", [0.01, 0.03])},
        compute_objective=lambda metrics: metrics["eval_corrected_loss"],
        direction="minimize",
        backend="optuna",
        n_trials=3,
    )
    assert best.hyperparameters["layer_radius"] in (0.01, 0.03)
    assert len(reached) == 3
    for radius, distance in reached:
        assert 0.9 * radius < distance <= radius


def test_layers_frozen_after_construction_are_free(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, layer_radius=0.02)
    for parameter in trainer.model.bert.embeddings.parameters():
        parameter.requires_grad_(False)
    trainer.train()
    assert not any("embeddings" in row.name for row in trainer.constraint_table())


def test_the_best_model_is_found_by_the_corrected_loss(tmp_path: Path) -> None:
    trainer = tiny.trainer(
        tmp_path, noise_transition=T, layer_radius=0.05, eval_dataset=tiny.texts(8), eval_strategy="steps",
        eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True,
        metric_for_best_model="eval_corrected_loss",
    )  # fmt: skip
    trainer.train()
    losses = history(trainer, "eval_corrected_loss")
    assert trainer.state.best_metric == min(losses)
    assert max(trainer.constraints.distances().values()) <= 0.05


BAD: list[tuple[dict[str, Any], str]] = [
    ({"loss_correction": "forward"}, "loss_correction='forward' needs noise_transition"),
    ({"loss_correction": "backward"}, "loss_correction='backward' needs noise_transition.*'gce' does without"),
    ({"noise_transition": symmetric_transition(3, 2 / 3)}, "noise_transition is singular"),
    ({"noise_transition": 2 / 3}, "noise_transition is singular"),
    ({"noise_transition": [[0.9, 0.2, 0], [0, 1, 0], [0, 0, 1]]}, "sums to 1.1"),
    ({"noise_transition": 1.5}, "noise rate is 1.5"),
    ({"noise_transition": symmetric_transition(4, 0.1)}, "is for 4 classes, but the model has 3"),
    ({"noise_transition": T, "label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 has no meaning"),
    (
        {"noise_transition": T, "compute_loss_func": lambda *a, **k: None},
        "compute_loss_func and loss_correction both",
    ),
    ({"noise_transition": T, "label_names": ["start", "end"]}, r"label_names is \['start', 'end'\]"),
    ({"layer_radius": -1}, "layer_radius is -1"),
    ({"layer_radius": {"nothing": 1}}, "pattern 'nothing' matches no layer"),
    ({"layer_radius": 1, "radius_growth": -1}, "radius_growth is -1"),
]


@pytest.mark.parametrize(("settings", "message"), BAD, ids=[message for _, message in BAD])
def test_settings_that_cannot_work_are_refused_at_once(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny.trainer(tmp_path, **settings)


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
def test_other_problems_than_classification_are_refused(tmp_path: Path, problem: str) -> None:
    with pytest.raises(ValueError, match=f"problem_type is '{problem}'"):
        tiny.trainer(tmp_path, tiny.bert(problem_type=problem), noise_transition=T)


@pytest.mark.parametrize(
    ("labels", "noise", "message"),
    [
        ([0, 1, 7], T, "label 7 lies outside 0..2"),
        ([0, -1, 2], T, "label -1 lies outside 0..2"),
        ([0, 1, 2], [[0.5, 0.5, 0], [0, 1, 0], [0.5, 0, 0.5]], None),
        ([0, 1, 2], [[1, 0, 0], [0, 1, 0], [0.5, 0.5, 0]], "column 2 .* T says that label 2 can't occur"),
        ([0.5, 1, 2], T, r"holds double; noise_transition is for|labels have dtype torch\.float"),
    ],
)
@pytest.mark.parametrize("kind", ["datasets", "torch"])
def test_labels_that_cannot_be_trained_on_are_refused_before_the_first_step(
    tmp_path: Path, labels: list[Any], noise: Any, message: str | None, kind: str
) -> None:
    rows = [{"x": [0.0] * 6, "labels": label} for label in labels * 8]
    data: Any = Dataset.from_list(rows) if kind == "datasets" else rows
    model = tiny.Mlp()
    before = tiny.weights(model)

    def train() -> None:
        tiny.trainer(tmp_path, model, noise_transition=noise, train_dataset=data).train()

    if message is None:
        train()
        return
    with pytest.raises(ValueError, match=message):
        train()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])


def test_labels_that_a_transform_or_a_collator_still_changes_are_left_to_the_loss(tmp_path: Path) -> None:
    # Raw labels 10, 11, 12: out of range until they are shifted.
    raw = tiny.vectors().map(lambda row: {"label": row["label"] + 10})

    def shift(batch: dict[str, Any]) -> dict[str, Any]:
        return {"x": torch.tensor(batch["x"]), "labels": [label - 10 for label in batch["label"]]}

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        return {"x": torch.tensor([r["x"] for r in rows]), "labels": torch.tensor([r["label"] - 10 for r in rows])}

    transformed = raw.with_transform(shift)
    settings: dict[str, Any] = {"noise_transition": T, "remove_unused_columns": False}
    trainer = tiny.trainer(tmp_path, tiny.Mlp(), train_dataset=transformed, **settings)
    trainer.train()
    trainer = tiny.trainer(tmp_path, tiny.Mlp(), train_dataset=raw, **settings)
    trainer.data_collator = collate
    trainer.train()
    with pytest.raises(ValueError, match=r"label 10 lies outside 0\.\.2 \(3 such labels\)"):
        tiny.trainer(tmp_path, tiny.Mlp(), train_dataset=raw, **settings).train()


def test_ignored_labels_are_no_mistake(tmp_path: Path) -> None:
    data = tiny.texts().map(lambda row, i: {"label": -100 if i % 4 == 0 else row["label"]}, with_indices=True)
    data = data.cast_column("label", Value("int64"))
    trainer = tiny.trainer(tmp_path, noise_transition=T, train_dataset=data)
    trainer.train()
    assert np.isfinite(history(trainer)).all()


@pytest.mark.parametrize("kind", ["fixed-size lists", "bool"])
def test_labels_in_other_columns_are_read(tmp_path: Path, kind: str) -> None:
    if kind == "bool":
        data = tiny.texts().map(lambda row: {"label": row["label"] > 0}, features=BOOLEAN)
        model = None
    else:
        rows = {"input_ids": tiny.texts()["input_ids"][:], "labels": [[0, 1, 2, 0, 1, 2, -100]] * 24}
        lists = Features({"input_ids": List(Value("int64")), "labels": List(Value("int64"), length=7)})
        data, model = Dataset.from_dict(rows, features=lists), tiny.token_classifier()
    trainer = tiny.trainer(tmp_path, model, noise_transition=T, train_dataset=data)
    trainer.train()
    assert np.isfinite(history(trainer)).all()


def test_logits_of_another_size_are_refused(tmp_path: Path) -> None:
    noise = symmetric_transition(4, 0.1)
    trainer = tiny.trainer(tmp_path, tiny.Mlp(), noise_transition=noise, train_dataset=tiny.vectors())
    with pytest.raises(ValueError, match="is for 4 classes, but the logits have 3"):
        trainer.train()


def test_a_data_set_without_labels_is_named(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, noise_transition=T, train_dataset=tiny.texts().remove_columns("label"))
    with pytest.raises(ValueError, match=r"a corrected loss needs 'labels', but the batch has input_ids"):
        trainer.train()


def test_deepspeed_is_refused(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path)
    # The flag that Trainer sets; DeepSpeed itself is no dependency and needs a GPU to build.
    trainer.is_deepspeed_enabled = True
    trainer.args.layer_radius = 0.1
    with pytest.raises(ValueError, match=r"layer_radius does not work with DeepSpeed; use FSDP version 2.*or DDP"):
        trainer._hp_search_setup(None)


def test_sharded_weights_are_constrained(tmp_path: Path) -> None:
    """By one process, which holds all shards; by two: test_sharded.py."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = tiny.Mlp()
        mesh = init_device_mesh("cpu", (1,))
        model.fc1.weight = nn.Parameter(distribute_tensor(model.fc1.weight.detach(), mesh))
        constraints = make_constraints(tiny.arguments(tmp_path, layer_radius=0.1, hessian_penalty=0.1), model)
        with torch.no_grad():
            model.fc1.weight.add_(1.0)
        constraints.project_()
        assert constraints.distances()["fc1.weight"] == pytest.approx(0.1, rel=1e-4)
        with pytest.raises(ValueError, match=r"noise_transition='estimate' needs features that each process computes"):
            check_estimable(model, [1, 2], ["labels"], "noise_transition='estimate'")
    finally:
        dist.destroy_process_group()


def test_an_ill_conditioned_backward_correction_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    noise = pair_flip_transition(3, 0.48)
    condition = invert_transition(noise).condition_number
    tiny.trainer(tmp_path, noise_transition=symmetric_transition(3, 0.63), loss_correction="backward")
    assert "amplifies a loss up to" in caplog.text
    caplog.clear()
    assert condition < 10
    tiny.trainer(tmp_path, noise_transition=noise, loss_correction="backward")
    assert caplog.text == ""
