"""A run that may be killed at any moment and started again; tests/test_resume.py does both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from transformers import BertConfig, BertForSequenceClassification, TrainerCallback

from hf_robust_ft import HessianRegularizedTrainer, RobustTrainingArguments
from hf_robust_ft.checkpoint import last_complete_checkpoint

RADIUS = 0.02
# Three and six epochs, by gradient accumulation. Whole ones: the Trainer resumes a finished run with one step
# more where max_steps ends within an epoch.
STEPS = {1: 3 * 11, 2: 6 * 6}
# Over the end of an epoch of 11 steps.
MEASURED: dict[str, Any] = {
    "max_steps": 14,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_total_limit": 2,
    "load_best_model_at_end": True,
    "hessian_every": 3,
    "hessian_examples": 3,
    "hessian_time_budget": 0.0,
}
PROGRESS_FILE, FINAL_FILE = "progress", "final.safetensors"


def build(seed: int = 0) -> BertForSequenceClassification:
    """A tiny model, with dropout, so that a resumed run needs the states of the random generators, too."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=8,
        hidden_dropout_prob=0.2,
        num_labels=3,
    )
    return BertForSequenceClassification(config)


def examples(count: int = 42) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "input_ids": torch.randint(40, (8,), generator=generator),
            "labels": torch.randint(3, (), generator=generator),
        }
        for _ in range(count)
    ]


def arguments(folder: Path, **settings: Any) -> RobustTrainingArguments:
    """Shuffled batches of 4, of which the 42 examples give 11, the last one smaller."""
    defaults = {
        "noise_transition": 0.3,
        "layer_radius": RADIUS,
        "save_steps": 2,
        "learning_rate": 0.01,
        "per_device_train_batch_size": 4,
    }
    return RobustTrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to=[], disable_tqdm=True, **(defaults | settings)
    )


class Progress(TrainerCallback):
    """Makes a file one byte longer after each step."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def mark(self, *args: Any, **kwargs: Any) -> None:
        with open(self.path, "ab") as file:
            file.write(b".")

    on_step_end = mark


class Marks(Progress):
    """Also when a checkpoint was saved, and when an evaluation or the training ends, which measurements follow."""

    on_save = on_evaluate = on_train_end = Progress.mark


def run(folder: Path, accumulation: int, measured: bool = False) -> None:
    """Train to the end, from the newest complete checkpoint if there is one, and save the weights.

    Args:
        measured: evaluate and save after every second step, measure the curvature with each third evaluation and at
            the end, keep two checkpoints, and end with the best one.
    """
    # More threads than cores would only slow it down.
    torch.set_num_threads(1)
    settings = MEASURED if measured else {"max_steps": STEPS[accumulation]}
    trainer = HessianRegularizedTrainer(
        build(),
        arguments(folder, gradient_accumulation_steps=accumulation, **settings),
        train_dataset=examples(),
        eval_dataset=examples(5) if measured else None,
        callbacks=[(Marks if measured else Progress)(folder / PROGRESS_FILE)],
    )
    started = last_complete_checkpoint(folder) is not None
    trainer.train(resume_from_checkpoint=True if started else None)
    safetensors.torch.save_file(trainer.model.state_dict(), folder / FINAL_FILE)
