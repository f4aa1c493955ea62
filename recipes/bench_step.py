"""What loss correction and projection cost: the time of a training step with and without them.

    python recipes/bench_step.py --model_name_or_path .assets/models/dinov2-small
    python recipes/bench_step.py --size base --image_size 224 --batch_size 256 --bf16       # on a GPU

Two Trainers of one model take turns, step by step, on the same batch: transformers' own, and ours with
forward correction and a radius so small that every layer is projected at every step. The third figure of each
round projects again in the usual way, ``reference + scale * (weight - reference)`` with new tensors.
Without ``--model_name_or_path`` the model is a ViT of ``--size`` with random weights: the same work. The floating-point
operations of a step are three times those of a forward pass, as torch counts them: matrix products, on a CPU without
those of attention.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from bench_curvature import CLASSES, SIZES, machine, make_model, peak_memory, wait
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import Trainer, TrainingArguments

from hf_robust_ft import HessianRegularizedTrainer, RobustTrainingArguments, symmetric_transition

# Below what one step of AdamW moves the smallest layer, so that every layer leaves its ball at every step.
RADIUS = 0.003


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", default=None)
    parser.add_argument("--size", choices=list(SIZES), default="small", help="of the ViT without a name")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--tf32", action="store_true", help="let a GPU take float32 products from fewer digits")
    parser.add_argument("--image_size", type=int, default=56)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--output", type=Path, default=Path("outputs/bench_step.json"))
    options = parser.parse_args()

    torch.manual_seed(0)
    pixels = torch.randn(options.batch_size, 3, options.image_size, options.image_size)
    batch = {"pixel_values": pixels, "labels": torch.arange(options.batch_size) % CLASSES}
    plain = make_trainer(Trainer, TrainingArguments, options)
    robust = make_trainer(
        HessianRegularizedTrainer,
        RobustTrainingArguments,
        options,
        noise_transition=symmetric_transition(CLASSES, 0.4),
        layer_radius=RADIUS,
    )
    assert isinstance(robust, HessianRegularizedTrainer)
    batch = plain._prepare_inputs(batch)
    naive = {name: weight.detach().clone() for name, weight in robust.model.named_parameters()}

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        plain.model(**batch)

    times: dict[str, list[float]] = {"plain": [], "robust": [], "naive projection": []}
    memory = {"plain": 0, "robust": 0}
    active = []
    for round_number in tqdm(range(options.rounds + 3), desc="rounds"):
        found = {}
        for name, trainer in (("plain", plain), ("robust", robust)):
            held = peak_memory(reset=True)
            found[name] = step(trainer, batch)
            memory[name] = peak_memory() - held  # of the last step: the first one makes the optimizer's states
        active.append(sum(row.active for row in robust.constraint_table()))
        found["naive projection"] = project_naively(robust.model, naive, list(robust.constraints.radii))
        if round_number >= 3:  # the first ones warm caches up
            for name, seconds in found.items():
                times[name].append(seconds)

    ratios = [r / p for r, p in zip(times["robust"], times["plain"], strict=True)]
    constrained = sum(robust.model.get_parameter(name).nbytes for name in robust.constraints.radii)
    kept = sum(tensor.nbytes for tensor in robust.constraints.reference.values())
    result: dict[str, Any] = {
        "median seconds": {name: statistics.median(values) for name, values in times.items()},
        "median ratio robust / plain, step by step": statistics.median(ratios),
        "ratio of medians robust / plain": statistics.median(times["robust"]) / statistics.median(times["plain"]),
        "images a second": {name: options.batch_size / statistics.median(times[name]) for name in memory},
        "TFLOP/s": {name: 3e-12 * counter.get_total_flops() / statistics.median(times[name]) for name in memory},
        "GB beyond both models and their optimizers": {name: value / 1e9 for name, value in memory.items()},
        "layers projected at every step": f"{min(active)} of {len(robust.constraints)}",
        "bytes kept / bytes of constrained weights": kept / constrained,
        "rounds": options.rounds,
        "batch": options.batch_size,
        "pixels": options.image_size,
        "precision": "bfloat16" if options.bf16 else "tf32" if options.tf32 else "float32",
        "machine": machine(plain.args.device),
        "torch": torch.__version__,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1), encoding="utf-8")
    print(json.dumps(result, indent=1))


def make_trainer(
    kind: type[Trainer], arguments_kind: type[TrainingArguments], options: argparse.Namespace, **settings: Any
) -> Trainer:
    arguments = arguments_kind(
        output_dir="outputs/bench_step",
        learning_rate=1e-4,
        per_device_train_batch_size=options.batch_size,
        report_to="none",
        bf16=options.bf16,
        tf32=options.tf32 or None,
        **settings,
    )
    trainer = kind(model=make_model(options), args=arguments)
    trainer.create_optimizer()
    trainer.model_wrapped = trainer.accelerator.prepare(trainer.model)  # which casts what it computes
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def step(trainer: Trainer, batch: dict[str, Any]) -> float:
    """One optimizer step as the training loop takes it, in seconds."""
    wait()
    started = time.perf_counter()
    items = trainer._get_num_items_in_batch([batch], trainer.args.device)
    trainer.training_step(trainer.model_wrapped, dict(batch), items)
    torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), trainer.args.max_grad_norm)
    trainer.optimizer.step()
    trainer.callback_handler.on_optimizer_step(trainer.args, trainer.state, trainer.control)
    trainer.model.zero_grad()
    wait()
    return time.perf_counter() - started


@torch.no_grad()
def project_naively(model: torch.nn.Module, reference: dict[str, Any], names: list[str]) -> float:
    """The same projection with a new tensor for every intermediate result, in seconds."""
    started = time.perf_counter()
    for name in names:
        weight = model.get_parameter(name)
        difference = weight - reference[name]
        norm = difference.norm()
        if norm > 0.9 * RADIUS:
            weight.copy_(reference[name] + difference * (0.9 * RADIUS / norm))
    wait()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
