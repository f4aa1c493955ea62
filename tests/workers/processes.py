"""What one process of a distributed run does; tests/test_processes.py starts one or two of these.

python processes.py OUT 1 NAME...
torchrun --nproc_per_node 2 processes.py OUT 2 NAME...

NAME is a function below. What it returns goes to OUT/NAME-PROCESSES-RANK.json. Models are float64, so that
the order in which gradients are added up does not show, and two layouts differ only if one is wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from launched import PROCESSES, RANK, answer
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    PreTrainedModel,
    TrainerCallback,
)

from hf_robust_ft import (
    HessianRegularizedTrainer,
    RobustTrainingArguments,
    backward_corrected,
    clean_accuracy,
    corrupt_labels,
    cross_entropy,
    forward_corrected,
    symmetric_transition,
)

Example = dict[str, Tensor]


TOKENS, CLASSES, LENGTH, NOISE = 40, 3, 7, 0.3
MODELS = {"sequence": BertForSequenceClassification, "token": BertForTokenClassification}
# (per-device batch, accumulation), by the number of processes: 8 examples a step each time.
LAYOUTS = {1: [(8, 1), (2, 4)], 2: [(4, 1), (2, 2)]}
STEPS = 4


def build(task: str, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=TOKENS,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=LENGTH,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=CLASSES,
    )
    return MODELS[task](config).double()


def examples(task: str, count: int) -> list[Example]:
    """Token labels are ragged, so that micro-batches and processes have unequal numbers of targets."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(count):
        length = int(torch.randint(1, LENGTH + 1, (), generator=generator))
        ids = torch.randint(TOKENS, (LENGTH,), generator=generator)
        labels = torch.randint(CLASSES, (LENGTH,), generator=generator)
        labels[length:] = -100
        mask = (torch.arange(LENGTH) < length).long()
        made.append({"input_ids": ids, "attention_mask": mask, "labels": labels if task == "token" else labels[0]})
    return made


def arguments(folder: Path, **settings: Any) -> RobustTrainingArguments:
    made = RobustTrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        # Each step then sees the same set of examples however it is dealt out.
        train_sampling_strategy="sequential",
        lr_scheduler_type="constant",
        logging_steps=1,
        # The gradient's norm is logged, and never clipped.
        max_grad_norm=1e9,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **settings,
    )
    # Some launchers start one process whatever they are asked for, and then nothing would be tested.
    assert made.world_size == PROCESSES
    return made


def flat(model: PreTrainedModel) -> dict[str, list[float]]:
    return {name: weight.flatten().tolist() for name, weight in model.state_dict().items()}


def gradients(out: Path) -> dict[str, Any]:
    """Gradient norms and final weights of every case in every layout of this number of processes.

    SGD shows the gradient's scale in the weights; AdamW is what is used, here with projection.
    """
    results: dict[str, Any] = {}
    for task in MODELS:
        for correction in ("forward", "backward"):
            for optimizer, rate, radius in (("sgd", 0.1, None), ("adamw_torch", 0.01, 0.02)):
                for batch, accumulation in LAYOUTS[PROCESSES]:
                    trainer = HessianRegularizedTrainer(
                        build(task),
                        arguments(
                            out,
                            optim=optimizer,
                            learning_rate=rate,
                            layer_radius=radius,
                            noise_transition=NOISE,
                            loss_correction=correction,
                            per_device_train_batch_size=batch,
                            gradient_accumulation_steps=accumulation,
                            max_steps=STEPS,
                        ),
                        train_dataset=examples(task, 8 * STEPS),
                    )
                    trainer.train()
                    name = f"{task} {correction} {optimizer} batch {batch} accumulation {accumulation}"
                    results[name] = {
                        "grad_norm": [x["grad_norm"] for x in trainer.state.log_history if "grad_norm" in x],
                        "weights": flat(trainer.model),
                        "active": sum(row.active for row in trainer.constraint_table()),
                    }
    return results


def penalties(out: Path) -> dict[str, Any]:
    """Noise and pull, with AdamW and projection; each process has its own random state."""
    torch.manual_seed(100 + RANK)
    results: dict[str, Any] = {}
    for batch, accumulation in LAYOUTS[PROCESSES]:
        settings = arguments(
            out,
            hessian_penalty=0.05,
            l2sp_penalty=0.5,
            layer_radius={"*query*": 0.02},
            noise_transition=NOISE,
            learning_rate=0.01,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_steps=STEPS,
        )
        trainer = HessianRegularizedTrainer(build("token"), settings, train_dataset=examples("token", 8 * STEPS))
        trainer.train()
        results[f"batch {batch} accumulation {accumulation}"] = {
            "grad_norm": [x["grad_norm"] for x in trainer.state.log_history if "grad_norm" in x],
            "loss": [x["loss"] for x in trainer.state.log_history if "loss" in x],
            "weights": flat(trainer.model),
        }
    return results


def adapters(out: Path) -> dict[str, Any]:
    """LoRA with a radius and a pull, then measured; each process draws adapters of its own."""
    import peft

    results: dict[str, Any] = {}
    for batch, accumulation in LAYOUTS[PROCESSES]:
        settings = arguments(
            out,
            l2sp_penalty=0.5,
            layer_radius={"*query*": 0.01, "classifier": 0.02},
            hessian_examples=3,
            hessian_time_budget=0,
            noise_transition=NOISE,
            learning_rate=0.01,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_steps=STEPS,
        )
        model = build("sequence")
        torch.manual_seed(RANK)
        config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"])
        trainer = HessianRegularizedTrainer(
            peft.get_peft_model(model, config), settings, train_dataset=examples("sequence", 8 * STEPS)
        )
        trainer.train()
        report = trainer.hessian_report
        assert report is not None
        results[f"batch {batch} accumulation {accumulation}"] = {
            "weights": flat(trainer.model),
            "distances": trainer.constraints.distances(),
            "curvature": {layer.name: layer.upper.maximum for layer in report.layers},
        }
    return results


def evaluation(out: Path) -> dict[str, Any]:
    """Evaluation of 11 examples, which two processes can't share evenly in batches of 2, and of 12."""
    results: dict[str, Any] = {}
    transition = torch.tensor(symmetric_transition(CLASSES, NOISE))
    corrections: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "forward": lambda logits, labels: forward_corrected(logits, labels, transition),
        "backward": lambda logits, labels: backward_corrected(logits, labels, transition.inverse()),
    }
    for task in MODELS:
        for correction, corrected in corrections.items():
            for count in (11, 12):
                model, data = build(task), examples(task, count)
                settings = arguments(
                    out,
                    noise_transition=NOISE,
                    loss_correction=correction,
                    per_device_eval_batch_size=2,
                    eval_labels="noisy" if task == "sequence" else None,
                )
                metrics = HessianRegularizedTrainer(model, settings, eval_dataset=data).evaluate()
                everything = {key: torch.stack([example[key] for example in data]) for key in data[0]}
                labels = everything.pop("labels")
                with torch.no_grad():
                    logits = model(**everything).logits
                targets = int((labels != -100).sum())
                results[f"{task} {correction} {count}"] = {
                    "loss": metrics["eval_loss"],
                    "direct_loss": float(cross_entropy(logits, labels).sum()) / targets,
                    "corrected_loss": metrics["eval_corrected_loss"],
                    "direct_corrected_loss": float(corrected(logits, labels).sum()) / targets,
                }
                if task == "sequence":
                    direct = clean_accuracy(logits.argmax(-1), labels, transition)
                    results[f"{task} {correction} {count}"] |= {
                        "clean_accuracy": [metrics[f"eval_clean_accuracy{end}"] for end in ("", "_low", "_high")],
                        "direct_clean_accuracy": [direct.accuracy, *direct.interval],
                    }
    return results


def base(out: Path) -> None:
    """A pretrained model without a head, for `head`. By one process: of several, only the first saves."""
    build("sequence").bert.save_pretrained(out / "base")


def head(out: Path) -> dict[str, Any]:
    """Training with a new head under a radius; each process draws its own initial head."""
    torch.manual_seed(RANK)
    model = BertForSequenceClassification.from_pretrained(out / "base", num_labels=CLASSES, dtype=torch.float64)
    initial = model.classifier.weight.detach().clone()
    trainer = HessianRegularizedTrainer(
        model,
        arguments(
            out,
            layer_radius={"classifier": 0.1},
            radius_mode="relative",
            learning_rate=0.05,
            per_device_train_batch_size=4,
            max_steps=STEPS,
        ),
        train_dataset=examples("sequence", 8 * STEPS),
    )
    trainer.train()
    (row,) = (row for row in trainer.constraint_table() if row.name == "classifier.weight")
    return {
        "initial": initial.tolist(),
        "weights": flat(trainer.model),
        "centre": row.centre,
        "radius": row.radius,
        "distance": row.distance,
    }


def estimate(out: Path) -> dict[str, Any]:
    """T estimated from 151 examples, which two processes can't share evenly; each class has its own tokens."""
    generator = torch.Generator().manual_seed(2)
    labels = torch.arange(151) % CLASSES
    noisy = corrupt_labels(labels, symmetric_transition(CLASSES, 0.2), 0)
    data = [
        {"input_ids": torch.randint(10, (LENGTH,), generator=generator) + 10 * label, "labels": torch.tensor(wrong)}
        for label, wrong in zip(labels.tolist(), noisy.tolist(), strict=True)
    ]
    settings = arguments(out / f"estimate-{PROCESSES}", noise_transition="estimate", max_steps=STEPS)
    trainer = HessianRegularizedTrainer(build("sequence"), settings, train_dataset=data)
    trainer.train()
    found = trainer.noise_estimate
    assert found is not None
    return {"transition": found.transition.tolist(), "n": found.n, "weights": flat(trainer.model)}


class Broken(list[Example]):
    """One example of it, that the second of two processes reads, can't be read."""

    def __getitem__(self, index: Any) -> Any:
        if index == 7 and RANK == PROCESSES - 1:
            raise KeyError("no such file")
        return super().__getitem__(index)


def failures(out: Path) -> dict[str, str]:
    """What each process says when one of them fails in the study of the labels."""
    folder = out / "failures"
    # Nothing can be written under this name.
    (folder / "_label_posteriors.safetensors").mkdir(parents=True, exist_ok=True)
    said = {}
    for name, data in {"read": Broken(examples("sequence", 8)), "write": examples("sequence", 30)}.items():
        settings = arguments(folder, noise_transition=NOISE, loss_correction="posterior", max_steps=1)
        try:
            HessianRegularizedTrainer(build("sequence"), settings, train_dataset=data).train()
        except Exception as error:  # noqa: BLE001 - what it is, is what the test asks
            said[name] = f"{type(error).__name__}: {error}"
    return said


def radius(out: Path) -> dict[str, Any]:
    """The radius chosen on 11 examples, which two processes can't share evenly, and the same radius given."""
    results: dict[str, Any] = {}
    for name in ("auto", "given"):
        settings = arguments(
            out / f"radius-{PROCESSES}",
            layer_radius="auto" if name == "auto" else results["radius"],
            radius_mode="relative",
            noise_transition=NOISE,
            per_device_train_batch_size=8 // PROCESSES,
            per_device_eval_batch_size=2,
            learning_rate=0.01,
            max_steps=STEPS,
        )
        trainer = HessianRegularizedTrainer(
            build("sequence"),
            settings,
            train_dataset=examples("sequence", 8 * STEPS),
            eval_dataset=examples("sequence", 11),
        )
        trainer.train()
        if trainer.radius_choice is not None:
            results |= {"radius": trainer.radius_choice.radius, "choice": str(trainer.radius_choice)}
        results[name] = flat(trainer.model)
    return results


class CountSteps(TrainerCallback):
    def __init__(self) -> None:
        self.steps = 0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.steps += 1


def sharded(out: Path) -> dict[str, Any]:
    """FSDP asked for beside a radius, on a CPU, where Accelerate ignores it."""
    counter, message = CountSteps(), None
    try:
        trainer = HessianRegularizedTrainer(
            build("sequence"),
            # Some releases of transformers synchronise by default, and look for a GPU to do it on.
            arguments(out, fsdp=True, fsdp_config={"sync_module_states": False}, layer_radius=0.1, max_steps=STEPS),
            train_dataset=examples("sequence", 8 * STEPS),
            callbacks=[counter],
        )
        trainer.train()
    except ValueError as error:
        message = str(error)
    return {"message": message, "steps": counter.steps}


if __name__ == "__main__":
    answer(gradients, penalties, adapters, evaluation, base, head, estimate, failures, radius, sharded)
