"""Does the Hessian distance measure tell how far a fine-tuned model overfits? One model, trained in seven ways.

    torchrun --nproc_per_node 2 recipes/bound_study.py
    python recipes/bound_study_report.py

runs offline in about half an hour on two CPU cores, after the study of Ju, Li & Zhang (ICML 2022, figure 1): the small
ViT beside this file learns scikit-learn's handwritten digits in seven ways, from 250, 500 and 1,000 examples and with
several seeds. Each run is measured on its own training examples, and adds a line of JSON to ``--output``; a run whose
line is there is not repeated. With a GPU it is trained and measured there.

The gap is the mean cross entropy on test examples minus that on all training examples, both with labels of one kind:
with ``--noise_rate`` those of the test examples are replaced at the same rate as those of the training examples.
``error_gap`` is the same for the share of wrong predictions.

Beside the other measures stands one of the PAC-Bayes kind (:func:`pac_bayes_measure`); *certificates* of some of these
models are made by bound_study_certificates.py.
"""

from __future__ import annotations

import argparse
import itertools
import math
import tempfile
import time
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from bound_study_report import OUTPUT, Record
from datasets import Dataset
from noisy_runs import classification_head
from resumable import append_line, own_share, read_lines
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForImageClassification, PrinterCallback, set_seed
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.utils import logging
from vit_noisy import HERE, digits

from hf_robust_ft import (
    HessianRegularizedTrainer,
    HessianReport,
    RobustTrainingArguments,
    corrupt_labels,
    measure_hessian,
    report_bounds,
    symmetric_transition,
)

CLASSES = 10
BATCH_SIZE, LEARNING_RATE = 64, 1e-3
LANCZOS_STEPS = 10
# What each way changes. Sizes of l2sp, radius and nso are those of noisy_runs.py.
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "slow": {"learning_rate": LEARNING_RATE / 10},
    "early": {"epochs": 0.2},  # of those of the others
    "decay": {"weight_decay": 1.0},  # the usual 0.01 changes nothing in so few steps
    "l2sp": {"l2sp_penalty": 1.0},
    "radius": {"layer_radius": 0.01, "radius_mode": "relative"},
    "nso": {"hessian_penalty": 0.02},
}
# Labels of test examples are drawn by other numbers than those of training examples.
TEST_SEED = 10_000
# Standard deviations of a prior that knows no data, as in hf_robust_ft's certificates: 2.4e-4 to 16, by factors of √2.
SCALES = tuple(2.0 ** (j / 2) for j in range(-24, 9))
TOLERATED, DRAWS, DELTA = 0.1, 3, 0.05


class Examples(NamedTuple):
    """Inputs and labels, in order."""

    pixels: Tensor
    labels: Tensor

    def batches(self, device: torch.device, count: int | None = None) -> list[dict[str, Tensor]]:
        """The first ``count`` or all, on a device."""
        pairs = zip(self.pixels[:count].split(BATCH_SIZE), self.labels[:count].split(BATCH_SIZE), strict=True)
        return [{"pixel_values": pixels.to(device), "labels": labels.to(device)} for pixels, labels in pairs]


def main() -> None:
    args = parse()
    share, shares = own_share()
    settings = {
        "model": Path(args.model_name_or_path).name,
        "noise_rate": args.noise_rate,
        "epochs": args.epochs,
        "measured": args.measured,
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }
    keys = list(itertools.product(args.seeds, args.sizes, args.ways))
    todo = unfinished(keys[share::shares], read_lines(args.output), settings)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    train, test = data(args.model_name_or_path)
    if max(args.sizes) > len(train.labels):
        raise SystemExit(f"--sizes has {max(args.sizes)}; there are {len(train.labels)} training examples")
    for seed, n, way in todo:
        record = shortened(one_run(way, n, seed, train, test, args)) | settings
        append_line(record, args.output)
        print(
            f"{way:7} n {n:5}  seed {seed}  gap {record['gap']:.3f}  Hessian {record['hessian_lanczos']:.3f}  "
            f"{record['seconds']:.0f} s",
            flush=True,
        )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", default=str(HERE / "glyph_vit"), help="a pretrained image model")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--sizes", nargs="+", type=int, default=[250, 500, 1000], help="training examples, up to 1,000")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4], help="of examples, head and batches")
    parser.add_argument("--noise_rate", type=float, default=0.0, help="share of all labels to replace")
    parser.add_argument("--epochs", type=float, default=10)
    parser.add_argument("--measured", type=int, default=100, help="training examples whose curvature is measured")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="JSON lines, to be continued if it exists")
    return parser.parse_args()


def unfinished(
    keys: Sequence[tuple[int, int, str]], runs: Sequence[Record], settings: Mapping[str, Any]
) -> list[tuple[int, int, str]]:
    """The runs (seed, n, way) that have no line yet.

    Raises:
        SystemExit: a line of a run with other settings, which does not compare.
    """
    for run in runs:
        if different := [f"{name}={run[name]!r}" for name, value in settings.items() if run[name] != value]:
            raise SystemExit(f"the output has runs with {', '.join(different)}; name another --output for these")
    done = {(run["seed"], run["n"], run["way"]) for run in runs}
    return [key for key in keys if key not in done]


def shortened(record: Record) -> Record:
    """Numbers to six digits: what is beyond them differs from machine to machine."""
    return {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in record.items()}


def data(model_name_or_path: str) -> tuple[Examples, Examples]:
    """1,000 examples to draw from and 797 to test on, with clean labels."""
    processor = AutoImageProcessor.from_pretrained(model_name_or_path)

    def examples(found: Dataset) -> Examples:
        pictures = [image.convert("RGB") for image in found["image"]]
        return Examples(processor(pictures, return_tensors="pt")["pixel_values"], torch.tensor(found["label"]))

    train, test = map(examples, digits())
    return train, test


def drawn(n: int, seed: int, rate: float, train: Examples, test: Examples) -> tuple[Examples, Examples]:
    """A run's training examples and the test examples, with labels from one distribution.

    Those of a smaller n are among those of a larger one.
    """
    chosen = np.random.default_rng(seed).permutation(len(train.labels))[:n]
    parts = [Examples(train.pixels[chosen], train.labels[chosen]), test]
    if rate:
        noise = symmetric_transition(CLASSES, rate)
        seeds = (seed, TEST_SEED + seed)
        parts = [
            Examples(pixels, torch.as_tensor(corrupt_labels(labels.numpy(), noise, of)))
            for (pixels, labels), of in zip(parts, seeds, strict=True)
        ]
    return parts[0], parts[1]


def one_run(way: str, n: int, seed: int, train: Examples, test: Examples, args: argparse.Namespace) -> Record:
    """Train in one way and measure."""
    started = time.perf_counter()
    examples, held_out = drawn(n, seed, args.noise_rate, train, test)
    model, reference = fresh_model(args.model_name_or_path, seed)
    fine_tune(model, examples, way, seed, args.epochs)
    trained = time.perf_counter()
    device = next(model.parameters()).device
    losses, errors, margins = risks(model, examples.batches(device))
    test_losses, test_errors, _ = risks(model, held_out.batches(device))
    # Any of them: their order is drawn.
    some = examples.batches(device, args.measured)
    report = measure_hessian(model, reference, some, lanczos_steps=LANCZOS_STEPS)
    return {
        "way": way,
        "n": n,
        "seed": seed,
        "train_loss": losses.mean().item(),
        "test_loss": test_losses.mean().item(),
        "gap": (test_losses.mean() - losses.mean()).item(),
        "train_error": errors.mean().item(),
        "test_error": test_errors.mean().item(),
        "error_gap": (test_errors.mean() - errors.mean()).item(),
        "margin": margins.quantile(0.1).item(),
        **hessian_measures(report, n),
        **distance_only(report, n, model, reference),
        **pac_bayes_measure(model, reference, some, n, seed),
        "settled": report.settled,
        "seconds": time.perf_counter() - started,
        "training_seconds": trained - started,
        "measuring_seconds": report.seconds,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
    }


def fresh_model(name_or_path: str, seed: int) -> tuple[Any, dict[str, Tensor]]:
    """With a new head, and its weights."""
    set_seed(seed)
    names = [str(label) for label in range(CLASSES)]
    model = AutoModelForImageClassification.from_pretrained(name_or_path, **classification_head(names))
    return model, {name: weight.clone() for name, weight in model.state_dict().items()}


def fine_tune(model: nn.Module, examples: Examples, way: str, seed: int, epochs: float) -> None:
    """Leaves the model where training ended."""
    settings = {"learning_rate": LEARNING_RATE, **WAYS[way]}
    rows = [{"pixel_values": p, "labels": int(label)} for p, label in zip(*examples, strict=True)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = RobustTrainingArguments(
            folder,
            num_train_epochs=epochs * settings.pop("epochs", 1),
            per_device_train_batch_size=BATCH_SIZE,
            seed=seed,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
            **settings,
        )
        trainer = HessianRegularizedTrainer(model, arguments, train_dataset=rows)
        trainer.remove_callback(PrinterCallback)
        trainer.train()


@torch.no_grad()
def risks(model: nn.Module, batches: Sequence[dict[str, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Cross entropy, whether wrong, and margin (the label's logit minus the largest other) of each example."""
    model.eval()
    logits = torch.cat([model(pixel_values=batch["pixel_values"]).logits for batch in batches]).double()
    labels = torch.cat([batch["labels"] for batch in batches])
    others = logits.scatter(1, labels[:, None], -math.inf).amax(1)
    margins = logits.gather(1, labels[:, None]).squeeze(1) - others
    return cross_entropy(logits, labels, reduction="none"), (margins <= 0).double(), margins


def hessian_measures(report: HessianReport, n: int) -> dict[str, float]:
    """``Σ √𝓗_i √C / √n``, the leading term of theorem 2.1, with 𝓗_i in five variants.

    The maximum over examples of the sound bound, of ``vᵀHv`` (*exact*), and of ``vᵀH⁺v`` as far as Lanczos looked; the
    means of the first two over examples. Below 0 counts as 0. Beside them their parts: ``Σ √𝓗_i`` (``roots_…``), and
    ``√C / √n``, with C the largest loss of the measured examples.
    """
    layers = report.layers
    variants = {
        "sound": [layer.upper.maximum for layer in layers],
        "exact": [layer.hessian.maximum for layer in layers],
        "lanczos": [(layer.positive or layer.upper).maximum for layer in layers],
        "sound_mean": [layer.upper.mean for layer in layers],
        "exact_mean": [layer.hessian.mean for layer in layers],
    }
    roots = {name: math.fsum(math.sqrt(max(each, 0.0)) for each in values) for name, values in variants.items()}
    factor = math.sqrt(report.losses.maximum / n)
    return {
        **{f"hessian_{name}": root * factor for name, root in roots.items()},
        **{f"roots_{name}": root for name, root in roots.items()},
        "largest_loss": factor,
    }


def distance_only(report: HessianReport, n: int, model: nn.Module, reference: Mapping[str, Tensor]) -> dict[str, float]:
    """The five measures of ``hf_robust_ft.distance_measures``, and the sum of the layers' distances over ``√n``.

    Products of norms as log10. Margins are left out: a run that learned wrong labels has none.
    """
    bounds = report_bounds(report, n, model=model, reference=reference, margin=1.0)
    found = {bound.name: bound for bound in bounds if bound.kind == "measure"}
    assert found["distance"].value is not None
    return {
        "distance": found["distance"].value,
        "distance_sum": math.fsum(layer.distance for layer in report.layers) / math.sqrt(n),
        "parameters": found["parameters"].terms["log10"],
        "row_sums": found["row sums"].terms["log10"],
        "spectral": found["spectral"].terms["log10"],
        "spectral_rows": found["spectral, row lengths"].terms["log10"],
    }


@torch.no_grad()
def pac_bayes_measure(
    model: nn.Module, reference: Mapping[str, Tensor], batches: Sequence[dict[str, Tensor]], n: int, seed: int
) -> dict[str, float]:
    """``√((KL + log(2 √n S / δ)) / 2n)`` with ``KL = ‖W - W0‖² / 2σ²``, over all trained parameters.

    σ is the largest of S = 33 scales, fixed in advance, at which Gaussian noise on all parameters adds at most 0.1 to
    the mean loss of the measured examples, as in Jiang et al. 2020. With one σ for all runs it would order those of one
    n as the distance does. Not a certificate: the loss under noise is estimated from a few draws.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    kept = {name: p.clone() for name, p in trained.items()}
    device = next(iter(kept.values())).device
    generator = torch.Generator(device).manual_seed(seed)
    noises = [
        {name: torch.randn(p.shape, generator=generator, device=device) for name, p in kept.items()}
        for _ in range(DRAWS)
    ]
    base = risks(model, batches)[0].mean()

    def increase(scale: float) -> float:
        total = 0.0
        for noise in noises:
            for name, parameter in trained.items():
                parameter.copy_(kept[name] + scale * noise[name])
            total += (risks(model, batches)[0].mean() - base).item() / DRAWS
        return total

    try:
        # Rising in σ, so halving will do. NaN, of weights beyond reason, counts as too much.
        index = bisect_right(SCALES, False, key=lambda scale: not increase(scale) <= TOLERATED)
    finally:
        for name, parameter in trained.items():
            parameter.copy_(kept[name])
    scale = SCALES[max(0, index - 1)]
    squares = [(p - reference[name].to(device)).double().square().sum().item() for name, p in kept.items()]
    kl = math.fsum(squares) / (2 * scale**2)
    return {"pac_bayes": math.sqrt((kl + math.log(2 * math.sqrt(n) * len(SCALES) / DELTA)) / (2 * n)), "sigma": scale}


if __name__ == "__main__":
    main()
