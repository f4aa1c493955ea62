"""What more processes make of a measurement: ``measure_hessian`` by one process and by several, one thread each.

    python recipes/bench_processes.py --model_name_or_path .assets/models/dinov2-small
    python recipes/bench_processes.py --processes 1 2 8

Each round measures the same examples with each number of processes, by ``torchrun`` on this machine; the time is
that of the measurement itself, without the start of Python: sound bounds of all examples, then Lanczos until every
layer is settled or has had its 8 candidates. Two cores are not twice as fast as one where they share caches and memory,
so as many processes also measure side by side, each everything by itself: ``at_most`` is how many times as fast as one
they are on this machine with nothing to say to each other. Reports are compared, too: the largest difference of any
layer's maximum, relative to it. The model is a pretrained one with a new head of ten classes; by default the small ViT
of these recipes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

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
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("outputs/bench_processes.json"))
    parser.add_argument("--apart", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--worker", type=Path, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        measure(options)
        return

    seconds: dict[int, list[float]] = {count: [] for count in options.processes}
    apart: dict[int, list[float]] = {count: [] for count in options.processes if count > 1}
    reports: dict[int, HessianReport] = {}
    with tqdm(total=options.rounds * (len(seconds) + len(apart)), unit="measurement") as bar:
        for _ in range(options.rounds):
            for count in seconds:
                reports[count] = run(count)
                seconds[count].append(reports[count].seconds)
                bar.update()
                if count in apart:
                    apart[count].append(run(count, "--apart").seconds)
                    bar.update()
    found = summary(options, seconds, apart, reports)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(found, indent=1))
    print(json.dumps(found, indent=1))


def run(processes: int, *how: str) -> HessianReport:
    """The report of one measurement, in processes of its own; of the first of several side by side."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        subprocess.run(
            [*command, __file__, *sys.argv[1:], *how, "--worker", str(path)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            check=True,
            stderr=subprocess.DEVNULL,
        )
        return HessianReport.load(path)


def measure(options: argparse.Namespace) -> None:
    """What each process does."""
    state = PartialState(cpu=not torch.cuda.is_available())
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
    state.wait_for_everyone()  # a process that starts Python later is no part of the measurement
    report = measure_hessian(
        model, reference, batches, lanczos_steps=options.lanczos_steps, distributed=not options.apart
    )
    if state.is_main_process:
        report.save(options.worker)
    if state.num_processes > 1:
        dist.barrier()
        dist.destroy_process_group()


def summary(
    options: argparse.Namespace,
    seconds: dict[int, list[float]],
    apart: dict[int, list[float]],
    reports: dict[int, HessianReport],
) -> dict[str, Any]:
    """Medians, ratios and the largest differences from the first number of processes."""
    first = options.processes[0]
    medians = {count: statistics.median(times) for count, times in seconds.items()}
    differences = {}
    for count in options.processes[1:]:
        pairs = zip(maxima(reports[count]), maxima(reports[first]), strict=True)
        differences[count] = max(abs(got - expected) / abs(expected) for got, expected in pairs if expected)
    return {
        "model": options.model_name_or_path,
        "examples": options.examples,
        "layers": len(reports[first].layers),
        "seconds": seconds,
        "medians": medians,
        "times_as_fast": {count: medians[first] / medians[count] for count in options.processes},
        "seconds_side_by_side": apart,
        "at_most": {count: count / first * medians[first] / statistics.median(apart[count]) for count in apart},
        "largest_relative_difference": differences,
        "settled": {count: report.settled for count, report in reports.items()},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
    }


def maxima(report: HessianReport) -> list[float]:
    """Of all layers: the forms, the sound bounds and, where it was looked for, the positive part."""
    found = [value for layer in report.layers for value in (layer.hessian.maximum, layer.upper.maximum)]
    return found + [layer.positive.maximum for layer in report.layers if layer.positive is not None]


if __name__ == "__main__":
    main()
