"""Trace and largest eigenvalue of the Hessian: ours beside other libraries, in time and in memory.

    python recipes/bench_spectrum.py --model_name_or_path recipes/glyph_vit
    python recipes/bench_spectrum.py --feed_forward

Of the mean cross entropy of one batch, over all weight matrices together, and the trace of each layer's block. The
methods take turns in rounds; each round has its own seed. Traces are Hutchinson's estimates with as many probes for
all, so they are the same but for the probes: each is compared with ours, and eigenvalues with ours at a tolerance that
the rounds don't have. ``--feed_forward`` is a chain of linear layers and tanh of 2,216 weights in float64, whose trace
and eigenvalue are known exactly, and that BackPACK has rules for.

Traces of single layers take other libraries one run a layer: some layers a round (``--sample``), scaled up to all.
On a CPU, time is that of the process, one thread, as other programs may run. Peak memory is measured after the rounds,
beyond what the process holds before a method starts. A library that is not installed is left out;
``curvature_baselines.py`` says how to install them.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_curvature import CLASSES, SIZES, machine, make_inputs, make_model, peak_memory, spread, title, wait
from curvature_baselines import Inputs
from spectrum_baselines import EIGENVALUES, TRACES, backpack_trace
from torch import Tensor, nn
from tqdm import tqdm
from transformers.utils import logging

from hf_robust_ft import find_layers, hessian_trace, top_eigenpairs

WHOLE = {"model": "*"}
OURS = "hf_robust_ft"
TRACE, LAYER_TRACES, EIGENVALUE = "trace", "trace of each layer", "largest eigenvalue"
TASKS = (TRACE, LAYER_TRACES, EIGENVALUE)
PACKAGES = {
    "PyHessian": "pyhessian",
    "curvlinops": "curvlinops-for-pytorch",
    "hessian-eigenthings": "hessian-eigenthings",
    "BackPACK": "backpack-for-pytorch",
}
# Student's t of so many degrees of freedom is beyond it once in some 10,000 comparisons.
STANDARD_ERRORS = 5
REFERENCE_TOLERANCE = 1e-4  # about what float32 can resolve
# PyHessian stops where two estimates in a row differ by less: that is no error, and 1e-3 is too large for it.
TOLERANCES = {"PyHessian": 1e-5}


@dataclass
class Method:
    """One way to the numbers of one task, and what it has shown so far."""

    task: str
    name: str
    measure: Callable[[int, list[int]], Tensor]
    """Seed and layers → values: one, or one for each of these layers."""
    layers: int
    """How many layers are run each round; 0 for a task of all together."""
    scale: float
    times: list[float] = field(default_factory=list)
    found: list[dict[int, float]] = field(default_factory=list)
    """For each round, by layer."""
    samples: list[Tensor] = field(default_factory=list)
    """Of our traces, what each probe gave, [probes, layers] a round: how far estimates scatter."""
    megabytes: float = math.nan


@dataclass
class Work:
    """One model and one batch."""

    title: str
    model: nn.Module
    inputs: Inputs
    labels: Tensor
    names: list[str]
    options: argparse.Namespace

    @property
    def batch(self) -> Any:
        if isinstance(self.inputs, Tensor):
            return self.inputs, self.labels
        return {**self.inputs, "labels": self.labels}

    def forward(self) -> None:
        with torch.no_grad():
            self.model(self.inputs) if isinstance(self.inputs, Tensor) else self.model(**self.inputs)


def main() -> None:
    options = parse()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    torch.backends.cudnn.allow_tf32 = False
    # Libraries and kernels load with the chain, whatever is measured.
    chain = make_work(options, feed_forward=True)
    for method in make_methods(chain)[0]:
        method.measure(0, layers_of(chain, method, 0)[:1])
    work = make_work(options, options.feed_forward)
    methods, left_out = make_methods(work)
    # With a chain all is known exactly; with others an eigenvalue to a residual that the rounds don't ask for.
    references = dense(work) if options.feed_forward else {EIGENVALUE: eigenvalue(work, REFERENCE_TOLERANCE)}
    forwards = run(work, methods)
    if options.memory:
        measure_memory(work, methods)
    result = summary(work, methods, left_out, forwards, references)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1), encoding="utf-8")
    print(table(result))
    wrong = [f"{row['task']} of {row['library']}" for row in result["methods"] if not row["agrees"]]
    if wrong:
        raise SystemExit(f"these differ from ours by more than they may: {wrong}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", default=None)
    parser.add_argument("--size", choices=list(SIZES), default="small", help="of the ViT without a name")
    parser.add_argument("--feed_forward", action="store_true", help="a small chain in place of a transformer")
    parser.add_argument("--image_size", type=int, default=56, help="pixels, for a model of images")
    parser.add_argument("--sequence_length", type=int, default=32, help="tokens, for a model of text")
    parser.add_argument("--examples", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--probes", type=int, default=10)
    parser.add_argument("--tolerance", type=float, default=1e-3, help="relative residual of an eigenvalue")
    parser.add_argument("--tasks", nargs="*", choices=TASKS, default=list(TASKS))
    parser.add_argument("--libraries", nargs="*", choices=list(PACKAGES), default=list(PACKAGES))
    parser.add_argument("--sample", type=int, default=6, help="layers that the others run each round; 0 for all")
    parser.add_argument("--no_memory", dest="memory", action="store_false")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("outputs/bench_spectrum.json"))
    return parser.parse_args()


def make_work(options: argparse.Namespace, feed_forward: bool) -> Work:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    labels = torch.arange(options.examples, device=device) % CLASSES
    if feed_forward:
        sizes, parts = (64, 24, 20, CLASSES), []
        for into, out in itertools.pairwise(sizes):
            parts += [nn.Linear(into, out), nn.Tanh()]
        chain = nn.Sequential(*parts[:-1]).to(device, torch.float64).eval()
        inputs = torch.randn(options.examples, sizes[0], dtype=torch.float64, device=device)
        return Work("feed-forward network", chain, inputs, labels, [f"{i}.weight" for i in (0, 2, 4)], options)
    model = make_model(options).to(device).eval()
    named, tokens = make_inputs(model.config, options, options.examples)
    names = [layer.name for layer in find_layers(model)[0]]
    moved = {key: value.to(device) for key, value in named.items()}
    return Work(f"{title(options)}, {tokens} tokens", model, moved, labels, names, options)


def make_methods(work: Work) -> tuple[list[Method], dict[str, str]]:
    """The methods, and why others are left out."""
    options, left_out, methods = work.options, {}, []
    for name, package in PACKAGES.items():
        if name not in options.libraries:
            left_out[name] = "not asked for"
            continue
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            left_out[name] = "not installed"
    common = (work.model, work.inputs, work.labels)
    for task in options.tasks:
        everything = len(work.names) if task == LAYER_TRACES else 0
        methods.append(ours(work, task, everything))
        for name, function in (EIGENVALUES if task == EIGENVALUE else TRACES).items():
            if name in left_out:
                continue
            if task == EIGENVALUE:
                function = partial(function, tolerance=TOLERANCES.get(name, options.tolerance))
            else:
                function = partial(function, probes=options.probes)
            some = min(options.sample or everything, everything)

            def peer(seed: int, layers: list[int], *, function: Any = function) -> Tensor:
                blocks = [[work.names[i]] for i in layers] or [work.names]
                return torch.tensor([function(*common, names, seed=seed) for names in blocks], dtype=torch.float64)

            methods.append(Method(task, name, peer, some, everything / some if some else 1.0))
    if "BackPACK" not in left_out and TRACE in options.tasks:
        try:
            backpack_trace(*common, work.names)
            exact = partial(backpack_trace, *common, work.names)
            methods.append(Method(TRACE, "BackPACK", lambda *_: torch.tensor([exact()], dtype=torch.float64), 0, 1.0))
        except NotImplementedError as error:
            left_out["BackPACK"] = f"cannot: {error}"
    return methods, left_out


def ours(work: Work, task: str, layers: int) -> Method:
    samples: list[Tensor] = []

    def measure(seed: int, _: list[int]) -> Tensor:
        if task == EIGENVALUE:
            return eigenvalue(work, work.options.tolerance, seed)
        joint = task == TRACE
        found = hessian_trace(
            work.model, [work.batch], layers=WHOLE if joint else "weights", probes=work.options.probes, joint=joint,
            seed=seed,
        )  # fmt: skip
        samples.append(found.samples)
        return found.values

    return Method(task, OURS, measure, layers, 1.0, samples=samples)


def eigenvalue(work: Work, tolerance: float, seed: int = 0) -> Tensor:
    return top_eigenpairs(work.model, [work.batch], layers=WHOLE, tolerance=tolerance, seed=seed).values[0]


def dense(work: Work) -> dict[str, Tensor]:
    """Exact values, from the whole matrix."""
    weights = {name: work.model.get_parameter(name).detach() for name in work.names}
    start = torch.cat([w.flatten() for w in weights.values()])

    def loss(flat: Tensor) -> Tensor:
        parts = flat.split([w.numel() for w in weights.values()])
        moved = {name: part.view_as(w) for (name, w), part in zip(weights.items(), parts, strict=True)}
        logits = torch.func.functional_call(work.model, moved, (work.inputs,))
        return nn.functional.cross_entropy(logits, work.labels)

    hessian = torch.func.jacrev(torch.func.grad(loss), chunk_size=64)(start)
    diagonal = hessian.diagonal().split([w.numel() for w in weights.values()])
    return {
        TRACE: hessian.trace().view(1).cpu(),
        LAYER_TRACES: torch.stack([part.sum() for part in diagonal]).cpu(),
        EIGENVALUE: torch.linalg.eigvalsh(hessian)[-1:].cpu(),
    }


def run(work: Work, methods: list[Method]) -> list[float]:
    """Fill in the methods' times and values; returns the times of forward passes."""
    forwards: list[float] = []
    with tqdm(total=work.options.rounds * len(methods), desc="rounds") as bar:
        for number in range(work.options.rounds):
            for method in methods:
                bar.set_postfix_str(f"{method.task}, {method.name}")
                forwards += [timed(work.forward) for _ in range(3)]
                layers = layers_of(work, method, number)
                found: list[float] = []
                method.times.append(timed(lambda: found.extend(method.measure(number + 1, layers).tolist())))  # noqa: B023
                method.found.append(dict(zip(layers or [0], found, strict=True)))
                bar.update()
    return forwards


def timed(function: Callable[[], Any]) -> float:
    """Seconds; on a CPU those of this process, so that what else the machine does counts little."""
    wait()
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    started = clock()
    function()
    wait()
    return clock() - started


def layers_of(work: Work, method: Method, number: int) -> list[int]:
    return sorted(spread(method.layers, len(work.names), number * method.layers))


def measure_memory(work: Work, methods: list[Method]) -> None:
    """Peak memory of each, in this process, once everything is loaded."""
    libc = ctypes.CDLL("libc.so.6") if sys.platform == "linux" else None
    if libc is not None:
        # Every large block goes back when it is freed: what was freed before can't hide what comes.
        libc.mallopt(-3, 65536)
        libc.mallopt(-1, 65536)
    for method in tqdm(methods, desc="memory"):
        if libc is not None:
            libc.malloc_trim(0)
        before = peak_memory(reset=True)
        method.measure(0, layers_of(work, method, 0)[: None if method.name == OURS else 1])
        method.megabytes = (peak_memory() - before) / 1e6


def summary(
    work: Work,
    methods: list[Method],
    left_out: dict[str, str],
    forwards: list[float],
    references: dict[str, Tensor],
) -> dict[str, Any]:
    forward, options = statistics.median(forwards), work.options
    used = {method.name for method in methods}
    own = {method.task: method for method in methods if method.name == OURS}
    rows = []
    for method in methods:
        seconds = method.scale * statistics.median(method.times)
        mine = own[method.task]
        rows.append(
            {
                "task": method.task,
                "library": method.name,
                "median seconds": seconds,
                "forward passes": seconds / forward,
                "time / ours": seconds / statistics.median(mine.times),
                "seconds of each run": method.times,
                "layers run": method.layers,
                "scaled up by": method.scale,
                "peak MB": method.megabytes,
                "mean value": statistics.fmean(v for found in method.found for v in found.values()),
                **compared(method, mine, references.get(method.task)),
            }
        )
    return {
        "model": work.title,
        "layers": len(work.names),
        "weights": sum(work.model.get_parameter(name).numel() for name in work.names),
        "examples": options.examples,
        "probes": options.probes,
        "tolerance": options.tolerance,
        "tolerance of PyHessian": TOLERANCES["PyHessian"],
        "rounds": options.rounds,
        "machine": machine(work.labels.device),
        "torch": torch.__version__,
        "versions": {name: importlib.metadata.version(PACKAGES[name]) for name in PACKAGES if name in used},
        "forward pass": forward,
        "exact": {task: value.tolist() for task, value in references.items()},
        "methods": rows,
        "left out": left_out,
    }


def compared(method: Method, ours: Method, exact: Tensor | None) -> dict[str, Any]:
    """How far the values are off: traces in standard errors of the difference, all else relatively."""
    if method.task == EIGENVALUE or method.name == "BackPACK":
        assert exact is not None
        off = max(abs(found[0] / exact.item() - 1) for found in method.found)
        return {"largest relative difference": off, "agrees": off < (1e-10 if method.name == "BackPACK" else 1e-3)}
    samples = torch.cat(ours.samples)
    worst = 0.0
    for layer, deviation in enumerate(samples.std(0).tolist()):
        values = [found[layer] for found in method.found if layer in found]
        if not values or (exact is None and method is ours):
            continue
        probes = len(values) * len(ours.samples[0])
        right = samples[:, layer].mean() if exact is None else exact[layer]
        error = deviation * math.sqrt(1 / probes + (1 / len(samples) if exact is None else 0))
        worst = max(worst, abs(statistics.fmean(values) - right.item()) / error)
    return {"largest difference in standard errors": worst, "agrees": worst < STANDARD_ERRORS}


def table(result: dict[str, Any]) -> str:
    lines = [
        f"{result['model']}: {result['weights']:,} weights in {result['layers']} layers, "
        f"{result['examples']} examples, {result['probes']} probes, {result['machine']}; "
        f"medians of {result['rounds']} rounds",
        f"forward pass: {result['forward pass']:.4f} s",
        f"{'':40} {'seconds':>9} {'passes':>8} {'/ ours':>7} {'peak MB':>8}  off by",
    ]
    for row in result["methods"]:
        off = row.get("largest relative difference")
        errors = row.get("largest difference in standard errors")
        lines.append(
            f"{row['task'] + ', ' + row['library']:40} {row['median seconds']:9.3f} {row['forward passes']:8.1f} "
            f"{row['time / ours']:7.2f} {row['peak MB']:8.1f}  "
            + (f"{errors:.1f} standard errors" if off is None else f"{off:.0e}")
        )
    return "\n".join([*lines, *(f"{name}: {why}" for name, why in result["left out"].items())])


if __name__ == "__main__":
    main()
