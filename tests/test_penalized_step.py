"""``hessian_penalty`` and ``l2sp_penalty`` in the Trainer, against steps done by hand."""

from __future__ import annotations

import copy
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from torch import Tensor, nn
from transformers import TrainerCallback

from hf_robust_ft import HessianRegularizedTrainer, LayerConstraints, find_layers
from hf_robust_ft.interruption import ECHO
from hf_robust_ft.penalties import antithetic_noise

SIGMA, PULL, RATE, STEPS = 0.05, 0.5, 0.1, 3
BOTH = {"hessian_penalty": SIGMA, "l2sp_penalty": PULL}
SGD = {
    "optim": "sgd",
    "learning_rate": RATE,
    "lr_scheduler_type": "constant",
    "train_sampling_strategy": "sequential",
    "max_grad_norm": 0,
    "max_steps": STEPS,
}


def bert(**changes: Any) -> Any:
    torch.manual_seed(0)
    return tiny.bert(**changes).double()


def by_hand(
    model: nn.Module, sigma: float = SIGMA, pull: float = PULL, clip: float = 0.0
) -> tuple[dict[str, Tensor], list[float], list[float]]:
    """Steps of gradient descent on the mean loss of eight examples: weights, losses and gradient norms."""
    data = tiny.texts()
    ids, labels = torch.tensor(data["input_ids"][:]), torch.tensor(data["label"][:])
    pulled = {layer.name for layer in find_layers(model)[0] if not layer.fresh}
    start = tiny.weights(model)
    losses, norms = [], []
    for step in range(STEPS):
        batch = slice(8 * step, 8 * step + 8)
        gradients, both = [], []
        for sign in (1, -1):
            noisy = copy.deepcopy(model)
            with antithetic_noise(list(model.parameters()), sigma, (0, step)) as reflect:
                if sign < 0:
                    reflect()
                noisy.load_state_dict(model.state_dict())
            loss = nn.functional.cross_entropy(noisy(input_ids=ids[batch]).logits, labels[batch])
            both.append(loss.item())
            gradients.append(torch.autograd.grad(loss, list(noisy.parameters())))
        losses.append(sum(both) / 2)
        total = [(plus + minus) / 2 for plus, minus in zip(*gradients, strict=True)]
        for i, (name, parameter) in enumerate(model.named_parameters()):
            if name in pulled:
                total[i] = total[i] + pull * (parameter.detach() - start[name])
        norms.append(torch.cat([g.flatten() for g in total]).norm().item())
        factor = min(1.0, clip / (norms[-1] + 1e-6)) if clip else 1.0
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), total, strict=True):
                parameter -= RATE * factor * gradient
    return tiny.weights(model), losses, norms


def logged(trainer: HessianRegularizedTrainer, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def assert_close(got: nn.Module, expected: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    for name, weight in tiny.weights(got).items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("layout", [(8, 1), (2, 4), (1, 8)], ids=str)
@pytest.mark.parametrize("clip", [0, 0.3])
def test_steps_are_those_done_by_hand(tmp_path: Path, layout: tuple[int, int], clip: float) -> None:
    """However eight examples are dealt out; the pull is clipped with the rest. T is the identity."""
    expected, losses, norms = by_hand(bert(), clip=clip)
    trainer = tiny.trainer(
        tmp_path,
        bert(),
        **SGD | BOTH | {"max_grad_norm": clip, "noise_transition": 0.0},
        per_device_train_batch_size=layout[0],
        gradient_accumulation_steps=layout[1],
    )
    trainer.train()
    assert_close(trainer.model, expected)
    assert logged(trainer, "loss") == pytest.approx(losses, rel=1e-6)
    assert logged(trainer, "grad_norm") == pytest.approx(norms, rel=1e-6)
    if clip:
        assert max(norms) > clip


@pytest.mark.parametrize("setting", list(BOTH))
def test_each_penalty_works_alone(tmp_path: Path, setting: str) -> None:
    given = {name: value if name == setting else 0.0 for name, value in BOTH.items()}
    expected, _, _ = by_hand(bert(), given["hessian_penalty"], given["l2sp_penalty"])
    other, _, _ = by_hand(bert(), 0.0, 0.0)
    trainer = tiny.trainer(tmp_path, bert(), **SGD, **given)
    trainer.train()
    assert_close(trainer.model, expected)
    assert max((expected[name] - other[name]).abs().max() for name in other) > 1e-5


class Seen(TrainerCallback):
    """The weights at every forward pass, and between the steps."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.passes: list[dict[str, Tensor]] = []
        self.between: list[dict[str, Tensor]] = []
        model.register_forward_pre_hook(lambda *_: self.passes.append(self.now()))

    def now(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.between.append(self.now())


@pytest.mark.parametrize(
    ("build", "dtype"),
    [(lambda: tiny.gpt2(causal=True), torch.float32), (tiny.bert, torch.bfloat16)],
    ids=["tied weights", "a model held in bfloat16"],
)
def test_the_noise_is_on_every_trained_weight_once(
    tmp_path: Path, build: Callable[[], nn.Module], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    model = build().to(dtype)
    frozen, parameter = next((n, p) for n, p in model.named_parameters() if "attn.c_attn.weight" in n or "query.w" in n)
    parameter.requires_grad_(False)
    data = tiny.texts()
    if dtype == torch.float32:
        data = data.map(lambda ids: {"labels": ids}, input_columns="input_ids").remove_columns("label")
    seen = Seen(model)
    trainer = tiny.trainer(
        tmp_path, model, train_dataset=data, callbacks=[seen], hessian_penalty=SIGMA, gradient_accumulation_steps=2,
        per_device_train_batch_size=4,
    )  # fmt: skip
    trainer.train()
    assert len(seen.passes) == 4 * len(seen.between) == 16
    for i, at in enumerate(seen.between):
        plus, minus, plus_again, minus_again = seen.passes[4 * i : 4 * i + 4]
        for name, weight in at.items():
            assert torch.equal(plus[name], plus_again[name])
            assert torch.equal(minus[name], minus_again[name])
            if name == frozen:
                assert torch.equal(plus[name], weight)
                assert torch.equal(minus[name], weight)
                continue
            rounding = torch.finfo(dtype).eps * plus[name].abs().max()
            assert ((plus[name].double() + minus[name].double()) / 2 - weight.double()).abs().max() <= rounding
            if weight.numel() > 200:
                assert (plus[name].double() - weight.double()).std().item() == pytest.approx(SIGMA, rel=0.2)
    assert torch.equal(seen.between[0][frozen], tiny.weights(model)[frozen])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2},
        {"bf16": True},
        {"gradient_checkpointing": True},
        {"layer_radius": 0.1},
    ],
    ids=str,
)
def test_without_a_learning_rate_no_bit_of_a_weight_changes(tmp_path: Path, settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    trainer = tiny.trainer(tmp_path, learning_rate=0.0, **BOTH, **settings)
    before = tiny.weights(trainer.model)
    trainer.train()
    tiny.assert_equal_weights(tiny.weights(trainer.model), before)
    assert min(logged(trainer, "grad_norm")) > 0


def test_gradient_checkpointing_makes_no_difference(tmp_path: Path) -> None:
    """Its second forward passes happen while the noise is there, and with the dropout of the first."""
    runs = []
    for settings in ({}, {"gradient_checkpointing": True}):
        trainer = tiny.trainer(tmp_path, bert(hidden_dropout_prob=0.2), **SGD, **BOTH, **settings)
        trainer.train()
        assert trainer.model.bert.encoder.layer[0].gradient_checkpointing == bool(settings)
        runs.append(tiny.weights(trainer.model))
    assert_close(trainer.model, runs[0])


def test_mixed_precision_sees_the_noise_in_its_own_copies_of_the_weights(tmp_path: Path) -> None:
    """Autocast keeps bfloat16 copies of weights within a pass: those of the first pass must not serve in the second."""
    runs = []
    for settings in ({}, {"bf16": True}):
        torch.manual_seed(0)
        trainer = tiny.trainer(tmp_path, tiny.bert(), **SGD, **BOTH, **settings)
        start = tiny.weights(trainer.model)
        trainer.train()
        assert trainer.accelerator.mixed_precision == ("bf16" if settings else "no")
        runs.append({name: weight - start[name] for name, weight in tiny.weights(trainer.model).items()})
    full, mixed = (torch.cat([change.flatten().double() for change in run.values()]) for run in runs)
    assert (full - mixed).norm() < 0.02 * full.norm()
    # The noise itself moves the gradient by more than that.
    torch.manual_seed(0)
    plain = tiny.trainer(tmp_path, tiny.bert(), **SGD, l2sp_penalty=PULL)
    plain.train()
    without = torch.cat([(w - start[n]).flatten().double() for n, w in tiny.weights(plain.model).items()])
    assert (full - without).norm() > 0.05 * full.norm()


def test_a_gradient_scaler_scales_the_pull_with_the_rest(tmp_path: Path) -> None:
    """That of float16 training, which has no kernels on a CPU, here under a float32 model."""
    runs = []
    for scale in (None, 2.0**10):
        torch.manual_seed(0)
        trainer = tiny.trainer(tmp_path, tiny.bert(), **SGD, **BOTH, gradient_accumulation_steps=2)
        if scale is not None:
            trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        trainer.train()
        assert scale is None or trainer.optimizer.scaler is trainer.accelerator.scaler
        runs.append(tiny.weights(trainer.model))
    for name, weight in runs[0].items():
        torch.testing.assert_close(runs[1][name], weight, rtol=0, atol=1e-7)


@pytest.mark.parametrize("at", [4, 5], ids=["first point", "second point"])
@pytest.mark.usefixtures("interruptible")
def test_after_ctrl_c_the_weights_are_those_between_two_steps(tmp_path: Path, at: int) -> None:
    torch.manual_seed(0)
    model = tiny.bert()
    seen = Seen(model)

    def interrupt(*_: Any) -> None:
        if len(seen.passes) == at + 1:
            signal.raise_signal(signal.SIGINT)  # which waits for the end of the step
            time.sleep(1.2 * ECHO)
            signal.raise_signal(signal.SIGINT)

    model.register_forward_hook(interrupt)
    trainer = tiny.trainer(tmp_path, model, callbacks=[seen], **BOTH)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert len(seen.passes) == at + 1
    before = seen.between[at // 2]
    assert not torch.equal(seen.passes[-1]["classifier.weight"], before["classifier.weight"])
    tiny.assert_equal_weights(seen.now(), before)


def test_weights_end_in_their_balls(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, **BOTH, layer_radius=0.02)
    trainer.train()
    distances = trainer.constraints.distances()
    assert 0.0199 < max(distances.values()) <= 0.02
    assert distances.keys() == trainer.constraints.radii.keys()


def test_a_stronger_pull_ends_closer(tmp_path: Path) -> None:
    ends = []
    for penalty in (0.0, 1.0, 9.0):
        trainer = tiny.trainer(tmp_path, bert(), **SGD, l2sp_penalty=penalty)
        start = LayerConstraints(trainer.model, 1.0)
        trainer.train()
        ends.append(sum(d**2 for d in start.distances().values()))
    assert ends == sorted(ends, reverse=True)
    assert ends[2] < 0.5 * ends[0]


def test_a_new_head_is_not_pulled(tmp_path: Path) -> None:
    bert().bert.save_pretrained(tmp_path / "base")
    model = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=tiny.CLASSES)
    trainer = tiny.trainer(tmp_path, model, l2sp_penalty=1e9, learning_rate=1e-12, optim="sgd", max_steps=1)
    assert "classifier.weight" not in trainer.constraints.reference
    assert len(trainer.constraints) == len(trainer.constraints.reference) == len(find_layers(model)[0]) - 1


def test_the_table_shows_what_is_pulled(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, **BOTH, layer_radius={"*query.weight": 0.02})
    trainer.train()
    rows = {row.name: row for row in trainer.constraint_table()}
    ball, pulled = (rows[f"bert.encoder.layer.0.attention.self.{name}.weight"] for name in ("query", "key"))
    assert (ball.radius, ball.free) == (0.02, None)
    assert (pulled.radius, pulled.centre, pulled.norm, pulled.active) == (None, "pretrained", "frobenius", False)
    assert pulled.free == "no pattern of layer_radius matches; pulled by l2sp_penalty"
    assert pulled.distance == trainer.constraints.distances()[pulled.name] > 0
    bias = rows["bert.encoder.layer.0.attention.self.key.bias"]
    assert (bias.centre, bias.distance, bias.free) == (None, None, "bias")
    (line,) = (line for line in str(trainer.constraint_table()).splitlines() if line.startswith(pulled.name))
    assert line.split()[1:5] == ["16×16", "pretrained", "frobenius", f"{pulled.distance:.4g}"]


def test_a_searched_radius_is_searched_with_the_penalties(tmp_path: Path) -> None:
    runs: list[tuple[Any, dict[str, Tensor]]] = []
    for _ in range(2):
        torch.manual_seed(0)
        trainer = tiny.trainer(
            tmp_path,
            tiny.bert(),
            **BOTH,
            layer_radius=runs[0][0] if runs else "auto",
            radius_mode="relative",
            eval_dataset=tiny.texts(12, seed=1),
            max_steps=2,
        )
        trainer.train()
        assert len(trainer.constraints) == len(find_layers(trainer.model)[0]) - 1
        choice = trainer.radius_choice
        runs.append((choice and choice.radius, tiny.weights(trainer.model)))
    tiny.assert_equal_weights(runs[0][1], runs[1][1])


def test_batch_norm_sees_both_points(tmp_path: Path) -> None:
    model = tiny.Mlp("dict")
    trainer = tiny.trainer(tmp_path, model, noise_transition=0.1, hessian_penalty=SIGMA, train_dataset=tiny.vectors())
    trainer.train()
    assert model.norm.num_batches_tracked == 2 * 4


class Averaged(torch.optim.SGD):
    """Keeps two sets of weights, as schedule-free optimizers do: one to train at and one to evaluate."""

    training, distance = False, 0.25

    def _move(self, by: float) -> None:
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.add_(by)

    def train(self) -> None:
        if not self.training:
            self._move(self.distance)
        self.training = True

    def eval(self) -> None:
        if self.training:
            self._move(-self.distance)
        self.training = False


def test_optimizers_with_weights_of_their_own_for_evaluation(tmp_path: Path) -> None:
    runs = []
    for strategy in ("no", "steps"):
        model = bert()
        trainer = HessianRegularizedTrainer(
            model,
            tiny.arguments(tmp_path, **{**SGD, **BOTH}, eval_strategy=strategy, eval_steps=1),
            train_dataset=tiny.texts(),
            eval_dataset=tiny.texts(6),
            optimizer_cls_and_kwargs=(Averaged, {"lr": RATE}),
        )
        trainer.train()
        trainer.optimizer.eval()
        assert len(logged(trainer, "eval_loss")) == (STEPS if strategy == "steps" else 0)
        runs.append(tiny.weights(model))
    for name, weight in runs[0].items():
        torch.testing.assert_close(runs[1][name], weight, rtol=0, atol=1e-10)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"hessian_penalty": -0.01}, r"hessian_penalty is -0\.01; give a finite number >= 0"),
    ({"hessian_penalty": float("inf")}, "hessian_penalty is inf; give a finite number >= 0"),
    ({"l2sp_penalty": float("nan")}, "l2sp_penalty is nan; give a finite number >= 0"),
    ({"l2sp_penalty": "much"}, "l2sp_penalty is 'much'; give a finite number >= 0"),
    ({"l2sp_penalty": True}, "l2sp_penalty is True; give a finite number >= 0"),
    (
        {"hessian_penalty": 0.01, "optim": "lomo"},
        r"hessian_penalty=0\.01 does not work with optim='lomo'.*adamw_torch",
    ),
    (
        {"l2sp_penalty": 0.1, "optim": "galore_adamw_layerwise"},
        r"l2sp_penalty=0\.1 does not work with optim='galore_adamw_layerwise', which steps within",
    ),
]


@pytest.mark.parametrize(("settings", "message"), BAD, ids=[message for _, message in BAD])
def test_settings_that_cannot_work_are_refused_at_once(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny.trainer(tmp_path, **settings)


@pytest.mark.parametrize("setting", list(BOTH))
@pytest.mark.parametrize(("flag", "by"), [("deepspeed", "DeepSpeed"), ("fsdp", "FSDP version 1")])
def test_sharded_training_is_refused(tmp_path: Path, setting: str, flag: str, by: str) -> None:
    trainer = tiny.trainer(tmp_path, **{setting: 0.1})
    setattr(trainer, f"is_{flag}_enabled", True)  # the flags that Trainer sets
    with pytest.raises(
        ValueError, match=rf"{setting}=0\.1 does not work with {by}; use FSDP .*or DDP.*set {setting}=0"
    ):
        trainer._hp_search_setup(None)


def test_a_pull_needs_a_layer(tmp_path: Path) -> None:
    model = tiny.bert()
    for layer in find_layers(model)[0]:
        layer.parameter.requires_grad_(False)
    with pytest.raises(ValueError, match=r"l2sp_penalty is 0\.1, but the model has no pretrained weight matrix"):
        tiny.trainer(tmp_path, model, l2sp_penalty=0.1)
