"""What one process of a measurement does; tests/test_measure_processes.py starts one to three of these.

python measuring.py OUT 1 NAME...
torchrun --nproc_per_node 2 measuring.py OUT 2 NAME...

NAME is a function below. What it returns goes to OUT/NAME-PROCESSES-RANK.json. Models are float64, so that the order
in which examples are added up does not show.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from launched import PROCESSES, RANK, answer, said
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification

from hf_robust_ft import (
    HessianRegularizedTrainer,
    MeasurementStopped,
    RobustTrainingArguments,
    hessian_trace,
    measure_hessian,
    noise_stability,
    spectral_density,
    top_eigenpairs,
)
from hf_robust_ft.curvature import HessianReport

LAST = PROCESSES - 1
Example = dict[str, Tensor]


def build() -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12,
        max_position_embeddings=8, num_labels=3,
    )  # fmt: skip
    return BertForSequenceClassification(config).double().eval()


def moved(model: nn.Module) -> dict[str, Tensor]:
    """A reference some way off."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: weight - 0.1 * torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
        for name, weight in model.state_dict().items()
    }


def examples(count: int) -> list[Example]:
    generator = torch.Generator().manual_seed(2)
    return [
        {
            "input_ids": torch.randint(1, 40, (length,), generator=generator),
            "labels": torch.randint(3, (), generator=generator),
        }
        for length in torch.randint(2, 9, (count,), generator=generator).tolist()
    ]


def padded(rows: list[Example]) -> Example:
    ids = nn.utils.rnn.pad_sequence([row["input_ids"] for row in rows], batch_first=True)
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": torch.stack([r["labels"] for r in rows])}


def loader(count: int, batch: int = 4, **settings: Any) -> DataLoader[Any]:
    return DataLoader(examples(count), batch_size=batch, collate_fn=padded, **settings)  # type: ignore[arg-type]


def measured(batches: Any, model: nn.Module | None = None, **settings: Any) -> HessianReport:
    model = build() if model is None else model
    return measure_hessian(model, moved(build()), batches, distributed=True, lanczos_steps=6, **settings)


def content(report: HessianReport, out: Path, name: str) -> dict[str, Any]:
    """Without what is a matter of time."""
    path = out / f"{name}-{PROCESSES}-{RANK}.report"
    report.save(path)
    found: dict[str, Any] = json.loads(path.read_text())
    for key in ("seconds", "estimated_seconds"):
        found[key] = None
    return found


def report(out: Path) -> dict[str, Any]:
    """11 examples in batches of 4, which no number of processes shares evenly; without and with shuffling."""
    return {
        "in order": content(measured(loader(11)), out, "report"),
        "shuffled": content(measured(loader(11, shuffle=True)), out, "shuffled"),
        "blocks": content(measured(loader(11), layers="blocks"), out, "blocks"),
    }


def few(out: Path) -> dict[str, Any]:
    """Fewer examples than processes, single ones, and an empty batch."""
    none = {key: value[:0] for key, value in padded(examples(2)).items()}
    return {
        "one": content(measured(loader(1)), out, "one"),
        "single": content(measured(loader(5, batch=1)), out, "single"),
        "empty": content(measured([none, *loader(3)]), out, "empty"),
    }


def wrapped(out: Path) -> dict[str, Any]:
    """Under DDP, and compiled."""
    model = build()
    parallel = nn.parallel.DistributedDataParallel(model) if PROCESSES > 1 else model
    return {
        "DDP": content(measured(loader(11), parallel), out, "ddp"),
        "compiled": content(measured(loader(11), torch.compile(build())), out, "compiled"),  # type: ignore[arg-type]
    }


def means(out: Path) -> dict[str, Any]:
    """What is of the mean loss."""
    model, batches, whole = build(), loader(11), {"block": "bert.encoder.layer.1.*"}
    separate = hessian_trace(model, batches, probes=3, distributed=True)
    joint = hessian_trace(model, batches, probes=3, joint=True, distributed=True)
    pairs = top_eigenpairs(model, batches, count=2, layers=whole, tolerance=1e-8, distributed=True)
    density = spectral_density(model, batches, layers=whole, probes=2, steps=5, points=7, distributed=True)
    noise = noise_stability(model, batches, sigma=0.05, draws=2, probes=2, distributed=True)
    return {
        "trace": separate.samples.tolist(),
        "joint": joint.samples.tolist(),
        "eigenvalues": pairs.values.tolist(),
        "eigenvectors": {name: vector.flatten().tolist() for name, vector in pairs.vectors.items()},
        "ritz": density.ritz_values.tolist(),
        "noise": [noise.loss, noise.increase, noise.second_order],
        "counts": [separate.examples, joint.examples, pairs.examples, density.examples, noise.examples],
    }


class Broken(list[Any]):
    """Batches of which the third can't be read, by the last process."""

    def __init__(self, error: BaseException, count: int = 3) -> None:
        super().__init__(loader(11))
        self.error, self.count = error, count

    def __iter__(self) -> Iterator[Any]:
        for number, batch in enumerate(super().__iter__()):
            if number == self.count - 1 and RANK == LAST:
                raise self.error
            yield batch


def failures(out: Path) -> dict[str, Any]:
    """What each process says when the last one fails: none may wait for it."""
    found: dict[str, Any] = {
        "first batch": said(lambda: measured(Broken(OSError("no such image"), 1))),
        "mean": said(lambda: hessian_trace(build(), Broken(OSError("no such image")), joint=True, distributed=True)),
        "swept": said(lambda: hessian_trace(build(), Broken(OSError("no such image")), distributed=True)),
        "setup": said(lambda: measured(loader(11), layers={"all": "*" if RANK < LAST else "nothing"})),
        "shuffled apart": said(
            lambda: measured(loader(11, shuffle=True, generator=torch.Generator().manual_seed(RANK)))
        ),
        "shuffled apart, mean": said(
            lambda: hessian_trace(
                build(), loader(11, shuffle=True, generator=torch.Generator().manual_seed(RANK)), distributed=True
            )
        ),
        "prepared": said(lambda: measured(Accelerator(cpu=True).prepare(loader(11)))),
    }
    other = build()
    if RANK == LAST:
        with torch.no_grad():
            other.bert.pooler.dense.weight[0, 0] += 1
    found["other weights"] = said(lambda: measured(loader(11), other))
    try:
        measured(Broken(OSError("no such image")))
    except MeasurementStopped as error:
        found["stopped"] = str(error)
        found["report"] = content(error.report, out, "stopped")
    interrupted = measured(Broken(KeyboardInterrupt()))
    found["interrupted"] = [interrupted.complete, interrupted.examples]
    # All are still in step.
    found["afterwards"] = content(measured(loader(11)), out, "afterwards")
    return found


def random_numbers(out: Path) -> list[float]:
    """Each process has its own, before and after."""
    model, reference = build(), moved(build())
    torch.manual_seed(100 + RANK)
    measure_hessian(model, reference, loader(3), distributed=True)
    return torch.rand(3).tolist()


def trainer(out: Path) -> dict[str, Any]:
    """A training that ends with its measurement, on held-out examples, too."""
    folder = out / f"trainer-{PROCESSES}"
    arguments = RobustTrainingArguments(
        str(folder), use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no", max_steps=3,
        per_device_train_batch_size=6 // PROCESSES, per_device_eval_batch_size=6 // PROCESSES,
        train_sampling_strategy="sequential", lr_scheduler_type="constant", learning_rate=0.01,
        noise_transition=0.2, hessian_examples=11,
    )  # fmt: skip
    assert arguments.world_size == PROCESSES
    model = build()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    training = HessianRegularizedTrainer(
        model, arguments, train_dataset=examples(18), eval_dataset=examples(7), data_collator=padded
    )
    training.train()
    found = training.hessian_report
    assert found is not None
    (metrics,) = (entry for entry in training.state.log_history if "train_hessian_total" in entry)
    bounds = {bound.name: bound.value for bound in training._measured[0].bounds}  # type: ignore[index]
    risks = {risk.data: [risk.loss, risk.error, risk.n] for risk in training._measured[0].risks}  # type: ignore[index]
    return {
        "report": content(found, out, "trained"),
        "metrics": {name: value for name, value in metrics.items() if not name.endswith("runtime")},
        "bounds": bounds,
        "risks": risks,
    }


if __name__ == "__main__":
    accelerator = Accelerator(cpu=True)
    # Some launchers start one process whatever they are asked for, and then nothing would be tested.
    assert accelerator.num_processes == PROCESSES
    answer(report, few, wrapped, means, failures, random_numbers, trainer)
