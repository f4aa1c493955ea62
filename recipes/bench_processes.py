"""What more processes make of a measurement: ``measure_hessian`` by one process and by all, one thread each.

    torchrun --nproc_per_node 2 recipes/bench_processes.py --model_name_or_path .assets/models/dinov2-small

Each round measures the same examples three times: the first process alone, all together, and all side by side, each
everything by itself. Times are those of the measurement: sound bounds of all examples, then Lanczos until every layer
is settled or has had its 8 candidates. Two cores are not twice as fast as one where they share caches and memory; how
many times as fast as one they are on this machine with nothing to say to each other is ``at_most``, from the times side
by side. Reports are compared, too: the largest difference of any layer's maximum, relative to it. The model is a
pretrained one with a new head of ten classes; by default the small ViT of these recipes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import PartialState
from tqdm import tqdm
from transformers import AutoModelForImageClassification
from transformers.utils import logging

from hf_robust_ft import HessianReport, measure_hessian

HERE = Path(__file__).parent
CLASSES = 10
# Each layer lies this share of its norm away from its reference.
DISTANCE = 0.01


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", default=str(HERE / "glyph_vit"))
    parser.add_argument("--image_size", type=int, default=None, help="default: the model's own")
    parser.add_argument("--examples", type=int, default=32)
    parser.add_argument("--batch_size", type=int, default=16, help="of all processes together")
    parser.add_argument("--lanczos_steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("outputs/bench_processes.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    state = PartialState(cpu=not torch.cuda.is_available())
    if state.num_processes == 1:
        parser.error("there is one process; start several: torchrun --nproc_per_node 2 recipes/bench_processes.py")

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    model = AutoModelForImageClassification.from_pretrained(
        options.model_name_or_path, num_labels=CLASSES, ignore_mismatched_sizes=True
    )
    model.to(state.device).eval()
    reference = {}
    for name, weight in model.state_dict().items():
        offset = torch.randn(weight.shape).to(weight.device)
        reference[name] = weight + offset * (DISTANCE * weight.norm() / offset.norm())
    size = options.image_size or model.config.image_size
    pixels = torch.randn(options.examples, 3, size, size)
    labels = torch.arange(options.examples) % CLASSES
    batches = list(zip(pixels.split(options.batch_size), labels.split(options.batch_size), strict=True))

    def measured(distributed: bool) -> HessianReport:
        return measure_hessian(model, reference, batches, lanczos_steps=options.lanczos_steps, distributed=distributed)

    ways = ("alone", "together", "side by side")
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    found: dict[str, HessianReport] = {}
    bar = tqdm(total=options.rounds * len(ways), unit="measurement", disable=not state.is_main_process)
    for _ in range(options.rounds):
        for way in ways:
            state.wait_for_everyone()
            if way != "alone" or state.is_main_process:
                found[way] = measured(way == "together")
                seconds[way].append(found[way].seconds)
            bar.update()
    state.wait_for_everyone()
    bar.close()

    if state.is_main_process:
        median = {way: statistics.median(times) for way, times in seconds.items()}
        pairs = zip(maxima(found["together"]), maxima(found["alone"]), strict=True)
        result = {
            "model": options.model_name_or_path,
            "examples": options.examples,
            "layers": len(found["alone"].layers),
            "processes": state.num_processes,
            "seconds": seconds,
            "medians": median,
            "times_as_fast": median["alone"] / median["together"],
            "at_most": state.num_processes * median["alone"] / median["side by side"],
            "largest_relative_difference": max(abs(got - it) / abs(it) for got, it in pairs if it),
            "settled": found["alone"].settled,
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
        }
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=1))
        print(json.dumps(result, indent=1))
    dist.destroy_process_group()


def maxima(report: HessianReport) -> list[float]:
    """Of all layers: the forms, the sound bounds and, where it was looked for, the positive part."""
    found = [value for layer in report.layers for value in (layer.hessian.maximum, layer.upper.maximum)]
    return found + [layer.positive.maximum for layer in report.layers if layer.positive is not None]


if __name__ == "__main__":
    main()
