"""What a measurement costs, predicted and measured: peak memory and time of each, at a few sizes.

    python recipes/bench_cost.py
    python recipes/bench_cost.py --extrapolate

Each case has a fresh process. There, ``measurement_costs`` predicts, and each measurement runs for a batch; the peak of
resident memory (on a GPU: of allocated tensors) is read beyond what the process held before. What takes longer than
``--seconds`` is stopped, and may not have come to its peak. Seconds are those that the process computes, as other
programs may run: give it one thread, ``OMP_NUM_THREADS=1``. On a GPU they are those that pass. They are predicted for
as many products as the eigenvalues took; those of ``measure_hessian`` depend on its time budget. Ratios are predicted /
measured. ``--extrapolate`` counts a ViT-H/14 and a language model of 7B parameters on the meta device: nothing of them
is run.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    LlamaConfig,
    PreTrainedConfig,
    ResNetConfig,
    ViTConfig,
)
from transformers.utils import logging

from hf_robust_ft import (
    hessian_trace,
    layer_quadratic_forms,
    measure_hessian,
    measurement_costs,
    noise_stability,
    spectral_density,
    top_eigenpairs,
)

HERE = Path(__file__).parent
CLASSES = 10
WHOLE = {"model": "*"}
PROBES, EIGENVALUES, STEPS = 2, 1, 20
# A ResNet-18, with random weights.
RESNET = ResNetConfig(
    hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic", num_labels=CLASSES
)  # fmt: skip
# Model, pixels or tokens, examples of the batch.
CASES: dict[str, tuple[Path | PreTrainedConfig, int, int]] = {
    "glyph ViT, 17 tokens": (HERE / "glyph_vit", 32, 16),
    "MiniLM, 32 tokens": (HERE.parent / ".assets/models/minilm-l6", 32, 4),
    "DINOv2-small, 17 tokens": (HERE.parent / ".assets/models/dinov2-small", 56, 4),
    "DINOv2-small, 257 tokens": (HERE.parent / ".assets/models/dinov2-small", 224, 1),
    "ResNet-18, 64 pixels": (RESNET, 64, 4),
}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cuda":
    CASES["ViT-B, 197 tokens"] = (ViTConfig(num_labels=CLASSES), 224, 16)
Measurement = Callable[[Any, Any, Any], Any]
MEASUREMENTS: dict[str, tuple[Any, Measurement]] = {
    "layer_quadratic_forms": ("weights", lambda m, b, r: layer_quadratic_forms(m, b, r)),
    "sound bounds": ("weights", lambda m, b, r: measure_hessian(m, r, [b], time_budget=0)),
    "sound bounds, blocks": ("blocks", lambda m, b, r: measure_hessian(m, r, [b], layers="blocks", time_budget=0)),
    "measure_hessian": ("weights", lambda m, b, r: measure_hessian(m, r, [b], time_budget=5)),
    "measure_hessian, blocks": ("blocks", lambda m, b, r: measure_hessian(m, r, [b], layers="blocks", time_budget=5)),
    "hessian_trace": ("weights", lambda m, b, r: hessian_trace(m, [b], probes=PROBES)),
    "joint hessian_trace": ("weights", lambda m, b, r: hessian_trace(m, [b], probes=PROBES, joint=True)),
    "top_eigenpairs": (WHOLE, lambda m, b, r: top_eigenpairs(m, [b], count=EIGENVALUES, tolerance=0.01)),
    "spectral_density": (WHOLE, lambda m, b, r: spectral_density(m, [b], probes=PROBES, steps=STEPS)),
    "noise_stability": ("weights", lambda m, b, r: noise_stability(m, [b], sigma=1e-3, draws=PROBES, probes=PROBES)),
}


def main() -> None:
    options = parse()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if options.one:
        one(options.one, options.measurements, options.seconds)
        return
    result = extrapolated() if options.extrapolate else checked(options)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1), encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", choices=list(CASES), default=list(CASES))
    parser.add_argument("--measurements", nargs="*", choices=list(MEASUREMENTS), default=[*MEASUREMENTS])
    parser.add_argument("--seconds", type=int, default=60, help="when to stop a measurement")
    parser.add_argument("--extrapolate", action="store_true", help="count models that are too large to run here")
    parser.add_argument("--output", type=Path, default=Path("outputs/bench_cost.json"))
    parser.add_argument("--one", default=None, help=argparse.SUPPRESS)
    return parser.parse_args()


def checked(options: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {}
    # With glibc, every large block goes back when it is freed: what was freed before can't hide what comes.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    for case in options.cases:
        print(
            f"{case:26} {'MB predicted':>13} {'measured':>9} {'ratio':>6} "
            f"{'s predicted':>12} {'measured':>9} {'ratio':>6}"
        )
        command = [sys.executable, __file__, "--one", case, *sys.argv[1:]]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                row = json.loads(line)
                found[f"{case}: {row['name']}"] = row
                budget = row["name"].startswith("measure_hessian")
                time_ratio = "stopped" if row["stopped"] else "budget" if budget else ratio(row, "seconds")
                print(
                    f"  {row['name']:24} {row['predicted MB']:13.1f} {row['MB']:9.1f} {ratio(row, 'MB')} "
                    f"{row['predicted seconds']:12.1f} {row['seconds']:9.1f} {time_ratio:>6}",
                    flush=True,
                )
        if process.returncode:
            raise SystemExit(f"{case} ended with {process.returncode}")
    return found


def ratio(row: dict[str, Any], what: str) -> str:
    return f"{row[f'predicted {what}'] / row[what]:6.2f}"


def one(case: str, names: Sequence[str], seconds: int) -> None:
    """Prints what was predicted and measured in this process, a line of JSON for each measurement."""
    model_of, size, examples = CASES[case]
    torch.manual_seed(0)
    model, batch = load(model_of, size, examples)
    model, batch = model.to(DEVICE), {key: value.to(DEVICE) for key, value in batch.items()}
    reference = {n: p.detach() + 0.01 * p.detach().std(correction=0) for n, p in model.named_parameters()}
    signal.signal(signal.SIGALRM, _time_is_up)
    for name in names:
        layers, measure = MEASUREMENTS[name]
        costs = partial(
            measurement_costs, model, batch, examples=examples, layers=layers, probes=PROBES, eigenvalues=EIGENVALUES,
            density_probes=PROBES, density_steps=STEPS,
        )  # fmt: skip
        predicted = costs()[name.partition(",")[0]]
        before = held()
        started = clock()
        found = run(lambda: measure(model, batch, reference), seconds)  # noqa: B023
        taken = clock() - started
        row = {
            "name": name,
            "predicted MB": predicted.bytes / 1e6,
            "MB": (peak() - before) / 1e6,
            "predicted seconds": predicted.seconds,
            "seconds": taken,
            "stopped": found is None or not getattr(found, "complete", True),
        }
        if (passes := getattr(found, "passes", None)) is not None:
            row["predicted seconds"] = costs(eigenvalue_passes=passes)[name].seconds
        print(json.dumps(row), flush=True)


def run(action: Callable[[], Any], seconds: int) -> Any:
    """What it found; None if it had to be stopped."""
    signal.alarm(seconds)
    try:
        return action()
    except KeyboardInterrupt:
        return None
    finally:
        signal.alarm(0)


def load(given: Path | PreTrainedConfig, size: int, examples: int) -> tuple[Any, dict[str, Tensor]]:
    batch = {"labels": torch.arange(examples) % CLASSES}
    if isinstance(given, PreTrainedConfig):
        model = AutoModelForImageClassification.from_config(given)
        return model, {"pixel_values": torch.randn(examples, 3, size, size), **batch}
    text = json.loads((given / "config.json").read_text()).get("vocab_size")
    kind = AutoModelForSequenceClassification if text else AutoModelForImageClassification
    model = kind.from_pretrained(given, num_labels=CLASSES, ignore_mismatched_sizes=True, dtype=torch.float32)
    for parameter in model.parameters():  # a mapped file must be in memory, too
        parameter.data = parameter.data.clone()
    if text:
        ids = torch.randint(text // 10, text, (examples, size))
        return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), **batch}
    return model, {"pixel_values": torch.randn(examples, 3, size, size), **batch}


def held() -> int:
    """Bytes that are in use; the peak is counted from now."""
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # small blocks, too, go back
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def peak() -> int:
    return torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else resident("VmHWM")


def clock() -> float:
    """Seconds: of the process, as other programs may run; of a GPU, those that pass."""
    if DEVICE.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def resident(name: str) -> int:
    """VmRSS, or VmHWM, the most since it was reset, in bytes (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(name))
    return 1024 * int(line.split()[1])


def _time_is_up(*_: Any) -> None:
    raise KeyboardInterrupt


def extrapolated() -> dict[str, Any]:
    """Memory of models of which only the shapes are known, in GB, one example at a time."""
    vit = ViTConfig(
        hidden_size=1280, num_hidden_layers=32, num_attention_heads=16, intermediate_size=5120, patch_size=14,
        image_size=224, num_labels=1000,
    )  # fmt: skip
    llama = LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
    )
    found: dict[str, Any] = {}
    for title, config, kind in (
        ("ViT-H/14, 257 tokens", vit, AutoModelForImageClassification),
        ("7B language model, 512 tokens", llama, AutoModelForCausalLM),
    ):
        with torch.device("meta"):
            model = kind.from_config(config, dtype=torch.float32).eval()
            ids = torch.zeros(1, 512, dtype=torch.long)
            mask = torch.zeros(1, 1, 512, 512)  # whole, as transformers would look at the values of another one
            batch: dict[str, Tensor] = {"input_ids": ids, "attention_mask": mask, "labels": ids}
            if config is vit:
                batch = {"pixel_values": torch.zeros(1, 3, 224, 224), "labels": torch.zeros(1, dtype=torch.long)}
        parameters = sum(p.numel() for p in model.parameters())
        print(f"{title}: {parameters / 1e6:.0f}M parameters, {4 * parameters / 1e9:.1f} GB")
        for layers in ("weights", "blocks", WHOLE):
            costs = measurement_costs(
                model, batch, examples=1, layers=layers, loss=cross_entropy, probes=10, directions_at_once=8
            )  # fmt: skip
            found[f"{title}, {layers}"] = {name: cost.bytes / 1e9 for name, cost in costs.items()}
            told = (f"{name} {cost.bytes / 1e9:.1f}" for name, cost in costs.items())
            print(f"  GB with layers={layers!r}: {', '.join(told)}", flush=True)
    return found


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Without a look at the labels, which a meta tensor doesn't allow."""
    if labels.dim() > 1:
        logits, labels = logits[:, :-1], labels[:, 1:]
    losses = -logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1))
    return losses.reshape(len(labels), -1).mean(1)


if __name__ == "__main__":
    main()
