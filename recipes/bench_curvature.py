"""What curvature costs: ``layer_quadratic_forms`` beside other ways to the same numbers, in time and in memory.

    python recipes/bench_curvature.py --model_name_or_path .assets/models/dinov2-small
    python recipes/bench_curvature.py --model_name_or_path .assets/models/minilm-l6 \\
        --baselines example_loop pyhessian_blocks pyhessian_shared curvlinops_blocks

The model is a pretrained one with a new head of ten classes; without ``--model_name_or_path`` a ViT of ``--size`` with
random weights: the same work. Every layer is measured along a small random way from its reference. The methods take
turns in rounds, and each turn begins with forward passes of the whole batch (no_grad, the model's own attention
kernel), the unit of the costs. Measuring itself needs the attention kernel that can be differentiated twice.

What is slow runs on a sample of examples and layers, another one each round, and its time is scaled up to all of
them: see "run" in the output. Peak memory is that of fresh processes beyond the model and its reference,
next to that of a training step (forward, backward, AdamW) of the same model. PyHessian and curvlinops are needed
for their own baselines only; ``curvature_baselines.py`` says how to install them.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import resource
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from curvature_baselines import curvlinops_blocks, example_loop, pyhessian_blocks
from torch import Tensor
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.utils import logging

from hf_robust_ft import find_layers, layer_quadratic_forms

CLASSES = 10
# Each layer lies this share of its norm away from its reference.
DISTANCE = 0.01
TOLERANCE = 1e-4  # of a layer's largest value, in float32
FORWARDS = 3  # forward passes before each method of a round
KINDS = ("hessian", "hessian_upper", "hessian_psd")
BASELINES = {
    "example_loop": example_loop,
    "pyhessian_blocks": pyhessian_blocks,
    "pyhessian_shared": partial(pyhessian_blocks, share_graph=True),
    "curvlinops_blocks": curvlinops_blocks,
}
# These differentiate layer by layer, so some of the layers are a fair sample; the others share a graph.
LAYER_BY_LAYER = ("pyhessian_blocks", "curvlinops_blocks")
TRAINING = "training step"
# ViTs with random weights: the same work.
SIZES: dict[str, dict[str, int]] = {
    "small": {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536, "patch_size": 14},
    "base": {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072, "patch_size": 16},
}


@dataclass
class Method:
    """One way to the numbers, and what it has shown so far."""

    name: str
    measure: Callable[[Sequence[int], Sequence[str]], Tensor]
    """Examples and layers → values, [examples, layers]."""
    examples: int
    layers: int
    """How many of them are run each round."""
    exact: bool
    """Whether the values are vᵀHv."""
    times: list[float] = field(default_factory=list)
    differences: list[float] = field(default_factory=list)
    """From the exact forms: the largest of each round, relative to the layer's largest value."""


class Work:
    """One model, one batch, one way for every layer."""

    def __init__(self, options: argparse.Namespace, examples: int) -> None:
        self.options = options
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(0)
        self.model = make_model(options).to(self.device).eval()
        self.names = [layer.name for layer in find_layers(self.model)[0]]
        self.inputs, self.tokens = make_inputs(self.model.config, options, examples)
        self.inputs = {key: value.to(self.device) for key, value in self.inputs.items()}
        self.labels = torch.arange(examples, device=self.device) % CLASSES
        weights = {name: self.model.get_parameter(name).detach() for name in self.names}
        self.reference = {}
        for name, weight in weights.items():
            offset = torch.randn(weight.shape).to(weight)
            self.reference[name] = weight + offset * (DISTANCE * weight.norm() / offset.norm())

    def directions(self) -> dict[str, Tensor]:
        return {name: self.model.get_parameter(name).detach() - base for name, base in self.reference.items()}

    @torch.no_grad()
    def forward(self, examples: int | None = None) -> None:
        self.model(**{key: value[:examples] for key, value in self.inputs.items()})

    def forms(self, kind: Any, examples: Sequence[int], layers: Sequence[str]) -> Tensor:
        batch = {key: value[list(examples)] for key, value in self.inputs.items()}
        batch["labels"] = self.labels[list(examples)]
        chosen: Any = "weights" if len(layers) == len(self.names) else {name: name for name in layers}
        found = layer_quadratic_forms(
            self.model, batch, self.reference, kind=kind, layers=chosen, lanczos_steps=self.options.lanczos_steps
        )
        return found.values[:, [found.layers.index(name) for name in layers]]

    def train(self, steps: int) -> list[int]:
        """Peak memory of training steps on the batch, in bytes, step by step."""
        self.model.train()
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5)
        before = peak_memory(reset=True)
        peaks = []
        for _ in range(steps):
            self.model(**self.inputs, labels=self.labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            peaks.append(peak_memory() - before)
        return peaks


def main() -> None:
    options = parse()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if options.threads:
        torch.set_num_threads(options.threads)
    # The baselines too compute in float32.
    torch.backends.cudnn.allow_tf32 = False
    if options.memory_of:
        print(json.dumps(memory_of(options.memory_of, options)))
        return
    # First, while this process is small and idle.
    memory = all_memory(options) if options.memory else {}
    work = Work(options, options.examples)
    methods = make_methods(work)
    forwards = run(work, methods)
    result = summary(work, methods, forwards, memory)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1), encoding="utf-8")
    print(table(result))
    wrong = [m.name for m in methods if not all(difference < TOLERANCE for difference in m.differences)]
    if wrong:
        raise SystemExit(f"by more than {TOLERANCE} of a layer's largest value the exact forms differ from {wrong}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", default=None)
    parser.add_argument("--size", choices=list(SIZES), default="small", help="of the ViT without a name")
    parser.add_argument("--image_size", type=int, default=56, help="pixels, for a model of images")
    parser.add_argument("--sequence_length", type=int, default=32, help="tokens, for a model of text")
    parser.add_argument("--examples", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--baselines", nargs="*", choices=list(BASELINES), default=["example_loop"])
    parser.add_argument("--lanczos_steps", type=int, default=20, help="of hessian_psd")
    parser.add_argument(
        "--sample", type=int, nargs=2, default=[2, 0], metavar=("EXAMPLES", "LAYERS"),
        help=f"how many the baselines run each round, 0 for all; LAYERS is for {' and '.join(LAYER_BY_LAYER)}",
    )  # fmt: skip
    parser.add_argument(
        "--psd_sample", type=int, nargs=2, default=[0, 0], metavar=("EXAMPLES", "LAYERS"),
        help="the same for hessian_psd; EXAMPLES should be a multiple of the 8 that it takes together",
    )  # fmt: skip
    parser.add_argument("--training_batch", type=int, default=32, help="examples of the training step")
    parser.add_argument("--memory", nargs="*", choices=KINDS, default=["hessian", "hessian_psd"], help="kinds, or none")
    parser.add_argument("--memory_seconds", type=int, default=240, help="how long to watch the memory of one kind")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--output", type=Path, default=Path("outputs/bench_curvature.json"))
    parser.add_argument("--memory_of", choices=[TRAINING, *KINDS], default=None, help=argparse.SUPPRESS)
    return parser.parse_args()


def make_model(options: argparse.Namespace) -> Any:
    if options.model_name_or_path is None:
        config = ViTConfig(**SIZES[options.size], image_size=options.image_size, num_labels=CLASSES)
        return ViTForImageClassification(config)
    images = hasattr(AutoConfig.from_pretrained(options.model_name_or_path), "image_size")
    kind = AutoModelForImageClassification if images else AutoModelForSequenceClassification
    return kind.from_pretrained(
        options.model_name_or_path, num_labels=CLASSES, ignore_mismatched_sizes=True, dtype=torch.float32
    )


def title(options: argparse.Namespace) -> str:
    if options.model_name_or_path is None:
        return f"ViT, {options.size}, random weights"
    return Path(options.model_name_or_path).name


def make_inputs(config: Any, options: argparse.Namespace, examples: int) -> tuple[dict[str, Tensor], int]:
    """The model's arguments, and the tokens of an example."""
    if hasattr(config, "image_size"):
        size = options.image_size
        pixels = torch.randn(examples, config.num_channels, size, size)
        return {"pixel_values": pixels}, (size // config.patch_size) ** 2 + 1
    # The first entries of a vocabulary are padding and the like.
    ids = torch.randint(config.vocab_size // 10, config.vocab_size, (examples, options.sequence_length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, options.sequence_length


def make_methods(work: Work) -> list[Method]:
    options, methods = work.options, []
    everything = (len(work.labels), len(work.names))
    for kind in options.kinds:
        sample = options.psd_sample if kind == "hessian_psd" else (0, 0)
        methods.append(Method(kind, partial(work.forms, kind), *_sizes(sample, everything), exact=kind == "hessian"))
    directions = work.directions()
    for name in options.baselines:
        examples, layers = options.sample
        sizes = _sizes((examples, layers if name in LAYER_BY_LAYER else 0), everything)

        def measure(examples: Sequence[int], layers: Sequence[str], *, baseline: Any = BASELINES[name]) -> Tensor:
            found: Tensor = baseline(work.model, work.inputs, work.labels, directions, examples=examples, layers=layers)
            return found.cpu()

        methods.append(Method(name, measure, *sizes, exact=True))
    return methods


def run(work: Work, methods: Sequence[Method]) -> list[float]:
    """Fill in the methods' times and differences; returns the times of the forward passes."""
    exact: Tensor | None = None
    largest = torch.ones(len(work.names), dtype=torch.float64)
    forwards: list[float] = []
    for method in tqdm(methods, desc="warming up", leave=False):
        work.forward()
        method.measure([0], work.names[-1:])
    with tqdm(total=work.options.rounds * len(methods), desc="rounds") as bar:
        for number in range(work.options.rounds):
            for method in methods:
                bar.set_postfix_str(method.name)
                forwards += [timed(work.forward)[0] for _ in range(FORWARDS)]
                examples = sorted(spread(method.examples, len(work.labels), number * method.examples))
                layers = sorted(spread(method.layers, len(work.names), number * method.layers))
                seconds, values = timed(partial(method.measure, examples, [work.names[i] for i in layers]))
                method.times.append(seconds)
                if method.name == "hessian":
                    exact, largest = values, values.abs().amax(0).clamp(min=torch.finfo(torch.float32).tiny)
                elif method.exact and exact is not None:
                    difference = (values - exact[examples][:, layers]).abs() / largest[layers]
                    method.differences.append(difference.max().item())
                bar.update()
    return forwards


def summary(work: Work, methods: Sequence[Method], forwards: Sequence[float], memory: dict[str, Any]) -> dict[str, Any]:
    options, forward = work.options, statistics.median(forwards)
    examples, layers = len(work.labels), len(work.names)
    rows: dict[str, dict[str, Any]] = {}
    for method in methods:
        scale = examples * layers / (method.examples * method.layers)
        seconds = scale * statistics.median(method.times)
        rows[method.name] = {
            "median seconds": seconds,
            "forward passes": seconds / forward,
            "forward passes / layers": seconds / forward / layers,
            "run": f"{method.examples} of {examples} examples, {method.layers} of {layers} layers",
            "scaled up by": scale,
            "seconds of each run": method.times,
        }
    ours = [kind for kind in options.kinds if kind in rows]
    return {
        "model": title(options),
        "layers": layers,
        "tokens": work.tokens,
        "examples": examples,
        "rounds": options.rounds,
        "lanczos steps": options.lanczos_steps,
        "machine": machine(work.device),
        "torch": torch.__version__,
        "forward pass": {"median seconds": forward, "seconds of each run": list(forwards)},
        "methods": rows,
        "time / ours": {
            name: {kind: rows[name]["median seconds"] / rows[kind]["median seconds"] for kind in ours}
            for name in options.baselines
        },
        "agreement": {m.name: max(m.differences) for m in methods if m.differences},
        "peak memory": memory,
    }


def table(result: dict[str, Any]) -> str:
    lines = [
        f"{result['model']}: {result['layers']} layers, {result['examples']} examples of {result['tokens']} tokens, "
        f"{result['machine']}; medians of {result['rounds']} rounds",
        f"forward pass: {result['forward pass']['median seconds']:.4f} s",
        f"{'':18} {'seconds':>9} {'passes':>8} {'/ layer':>8} {'/ hessian':>9} {'agrees to':>9}  run",
    ]
    for name, row in result["methods"].items():
        ratio = result["time / ours"].get(name, {}).get("hessian")
        difference = result["agreement"].get(name)
        lines.append(
            f"{name:18} {row['median seconds']:9.2f} {row['forward passes']:8.1f} "
            f"{row['forward passes / layers']:8.2f} "
            f"{'' if ratio is None else format(ratio, '.1f'):>9} "
            f"{'' if difference is None else format(difference, '.0e'):>9}  {row['run']}"
        )
    for name, found in result["peak memory"].items():
        share = found.get("share of a training step")
        lines.append(
            f"peak memory of {name}: {found['MB']:.0f} MB"
            + (f", {share:.2f} of a training step" if share is not None else "")
            + f" ({found['run']})"
        )
    return "\n".join(lines)


def all_memory(options: argparse.Namespace) -> dict[str, Any]:
    """Peak memory of a training step and of each kind, each in a fresh process."""
    found: dict[str, Any] = {}
    for name in tqdm([TRAINING, *options.memory], desc="memory"):
        # With glibc, every large block goes back when it is freed: what was freed before can't hide what comes.
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        command = [sys.executable, __file__, *sys.argv[1:], "--memory_of", name]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        found[name] = json.loads(done.stdout.splitlines()[-1])
    for kind in options.memory:
        found[kind]["share of a training step"] = found[kind]["MB"] / found[TRAINING]["MB"]
    return found


def memory_of(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """What one thing needs at its peak beyond model, batch and reference, measured in this process."""
    if name == TRAINING:
        work = Work(options, options.training_batch)
        work.reference.clear()
    else:
        work = Work(options, options.examples)
    work.forward(examples=1)
    # Weights that a file was mapped to must be in memory too.
    for parameter in work.model.parameters():
        parameter.detach().sum()
    if name == TRAINING:
        first, second = work.train(steps=2)
        run = f"the first step of {options.training_batch} examples"
        return {"MB": first / 1e6, "MB of the second step": second / 1e6, "run": run}
    run = f"{options.examples} examples"
    before = peak_memory(reset=True)
    # The peak comes with the first layers: others of the same shapes follow, and other examples.
    signal.signal(signal.SIGALRM, _time_is_up)
    signal.alarm(options.memory_seconds)
    try:
        work.forms(name, range(options.examples), work.names)
    except TimeoutError:
        run += f", in the first {options.memory_seconds} seconds"
    signal.alarm(0)
    return {"MB": (peak_memory() - before) / 1e6, "run": run}


def peak_memory(reset: bool = False) -> int:
    """Bytes at the highest so far, or, on a GPU and on Linux, since the last reset."""
    if reset:
        gc.collect()
    if torch.cuda.is_available():
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if not status.exists():
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak
    # ru_maxrss starts from what the parent had, and never falls.
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    return 1024 * int(line.split()[1])


def _time_is_up(*_: Any) -> None:
    raise TimeoutError


def spread(count: int, total: int, start: int) -> list[int]:
    """Some of ``range(total)``, far apart and not in step with any pattern; the next start gives the next ones."""
    stride = next(s for s in range(math.ceil(0.618 * total), 2 * total + 2) if math.gcd(s, total) == 1)
    return [(start + i) * stride % total for i in range(count)]


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    wait()
    started = time.perf_counter()
    result = function()
    wait()
    return time.perf_counter() - started, result


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def machine(device: torch.device) -> str:
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    return f"{where}, {platform.machine()}, {torch.get_num_threads()} threads of {os.cpu_count()} cores"


def _sizes(sample: Sequence[int], everything: Sequence[int]) -> tuple[int, int]:
    """Examples and layers, with 0 for all of them."""
    examples, layers = (min(some, most) or most for some, most in zip(sample, everything, strict=True))
    return examples, layers


if __name__ == "__main__":
    main()
