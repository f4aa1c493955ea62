"""The Hessian distance measure as the script of its authors takes it, beside ours: what it costs, how far it is off.

    python recipes/bench_distance.py
    python recipes/bench_distance.py --model_name_or_path .assets/models/dinov2-small \\
        --train_file ../shared/data/fashion-mnist/train.parquet --epochs 2 --learning_rate 1e-4

A pretrained model is fine-tuned plainly, and measured on some of its training examples with the pretrained weights for
reference. The authors' script (``curvature_baselines.joint_batch_forms``) differs from the theorem in three ways, which
the table undoes one by one: it adds the terms between layers, takes the mean over a batch before the maximum, and vᵀHv
in place of vᵀH⁺v. ``Σ √𝓗_i`` is what the bound (theorem 2.1) grows with; a negative value counts 0 there.

Ways to measure take turns in rounds. On a CPU, time is that of the process.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from bench_curvature import machine
from bench_spectrum import timed
from curvature_baselines import joint_batch_forms
from torch import Tensor
from tqdm import tqdm
from transformers.utils import logging
from vit_noisy import HERE, RecipeArguments, image_task

from hf_robust_ft import HessianReport, layer_quadratic_forms, measure_hessian

AUTHORS = "authors' script: batch means, all layers together"
BLOCKS = "without the terms between layers"
EXAMPLES = "one example at a time: max vᵀHv"
POSITIVE = "its positive part: max vᵀH⁺v"
BOUND = "sound bound on it"

Batch = dict[str, Tensor]


def main() -> None:
    options = parse()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model, batches, reference, loss = fine_tuned(options)
    values, seconds, settled = measured(model, batches, reference, options)
    result = {
        "model": Path(options.model_name_or_path).name,
        "training loss of the last epoch": loss,
        "layers": len(values[AUTHORS]),
        "examples": options.examples,
        "batch": options.batch_size,
        "rounds": options.rounds,
        "machine": machine(next(model.parameters()).device),
        "torch": torch.__version__,
        "median seconds": {name: statistics.median(times) for name, times in seconds.items()},
        "seconds of each run": seconds,
        "layers of which the largest vᵀH⁺v is known": settled,
        "steps": steps(values),
        "values": {name: found.tolist() for name, found in values.items()},
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1), encoding="utf-8")
    print(table(result))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", default=str(HERE / "glyph_vit"))
    parser.add_argument("--train_file", default=None, help="images and labels; scikit-learn's digits without it")
    parser.add_argument("--train_examples", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--examples", type=int, default=64, help="to measure on")
    parser.add_argument("--batch_size", type=int, default=16, help="of what is measured")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--time_budget", type=float, default=120, help="seconds for vᵀH⁺v")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("outputs/bench_distance.json"))
    return parser.parse_args()


def fine_tuned(options: argparse.Namespace) -> tuple[Any, list[Batch], dict[str, Tensor], float]:
    """The model, batches to measure, the weights that it started from, and the mean loss of its last epoch."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    task = image_task(
        RecipeArguments(
            model_name_or_path=options.model_name_or_path,
            train_file=options.train_file,
            max_train_samples=options.train_examples,
        )
    )
    data = task.data["train"]
    model = task.make_model(data.features[task.label_column].names).to(device)
    reference = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    examples = task.prepare(data)[:]
    pixels = torch.stack(list(examples["pixel_values"])).to(device)
    labels = torch.tensor(examples["labels"], device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate)
    losses: list[float] = []
    model.train()
    for _ in tqdm(range(options.epochs), desc="fine-tuning"):
        losses = []
        for some in torch.randperm(len(labels), device=device).split(32):
            loss = model(pixel_values=pixels[some], labels=labels[some]).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    model.eval()
    numbers = torch.arange(options.examples, device=device).split(options.batch_size)
    batches = [{"pixel_values": pixels[some], "labels": labels[some]} for some in numbers]
    return model, batches, reference, statistics.fmean(losses)


def measured(
    model: Any, batches: Sequence[Batch], reference: dict[str, Tensor], options: argparse.Namespace
) -> tuple[dict[str, Tensor], dict[str, list[float]], float]:
    """For each way the value of each layer, and the seconds of each run over all examples; the share that is settled.

    Where a layer is not settled, its vᵀH⁺v is the largest that was found.
    """
    names = layer_quadratic_forms(model, batches[0], reference).layers
    ways = {name: model.get_parameter(name).detach() - reference[name] for name in names}
    pairs = [({"pixel_values": batch["pixel_values"]}, batch["labels"]) for batch in batches]
    joint: list[Tensor] = []
    forms: list[list[Tensor]] = []
    reports: list[HessianReport] = []
    calls = {
        AUTHORS: lambda: joint.append(joint_batch_forms(model, pairs, ways)),
        EXAMPLES: lambda: forms.append([layer_quadratic_forms(model, b, reference).values.cpu() for b in batches]),
        BOUND: lambda: reports.append(measure_hessian(model, reference, batches, time_budget=0)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in tqdm(range(options.rounds), desc="rounds"):
        for name, call in calls.items():
            seconds[name].append(timed(call))
    budget = options.time_budget
    whole = f"{POSITIVE}, and {BOUND}"
    seconds[whole] = [timed(lambda: reports.append(measure_hessian(model, reference, batches, time_budget=budget)))]
    layers = reports[-1].layers
    # Where Lanczos looked at no example of a layer, vᵀHv is the lower bound that is left.
    positive = [max(p.maximum if (p := one.positive) else 0.0, one.hessian.maximum) for one in layers]
    return (
        {
            AUTHORS: joint[0].amax(0),
            BLOCKS: torch.stack([batch.mean(0) for batch in forms[0]]).amax(0),
            EXAMPLES: torch.cat(forms[0]).amax(0),
            POSITIVE: torch.tensor(positive, dtype=torch.float64),
            BOUND: torch.tensor([one.upper.maximum for one in layers], dtype=torch.float64),
        },
        seconds,
        reports[-1].settled,
    )


def steps(values: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """Each way beside the measure, max vᵀH⁺v, layer by layer, and the sum that the bound grows with."""
    found = {}
    for name, of_layers in values.items():
        ratios = of_layers / values[POSITIVE]
        found[name] = {
            "share of the measure, median layer": ratios.quantile(0.5).item(),
            "least": ratios.min().item(),
            "most": ratios.max().item(),
            "negative layers": int((of_layers < 0).sum()),
            "sum of roots": of_layers.clamp(min=0).sqrt().sum().item(),
        }
    return found


def table(result: dict[str, Any]) -> str:
    lines = [
        f"{result['model']}: {result['layers']} layers, {result['examples']} examples in batches of {result['batch']}, "
        f"training loss {result['training loss of the last epoch']:.3f}, {result['machine']}",
        f"{'share of max vᵀH⁺v':52} {'median':>8} {'least':>8} {'most':>8} {'negative':>8} {'Σ √𝓗_i':>8}",
    ]
    for name, row in result["steps"].items():
        lines.append(f"{name:52} " + " ".join(f"{value:8.3g}" for value in row.values()))
    lines.append(f"largest vᵀH⁺v known of {result['layers of which the largest vᵀH⁺v is known']:.0%} of the layers")
    lines.append(f"{'':70} {'seconds':>8} {'/ theirs':>8}")
    theirs = result["median seconds"][AUTHORS]
    for name, seconds in result["median seconds"].items():
        lines.append(f"{name:70} {seconds:8.2f} {seconds / theirs:8.1f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
