"""What one process does with a model that FSDP2 shards; tests/test_sharded.py starts one or two of these.

python sharded.py OUT 1 NAME...
torchrun --nproc_per_node 2 sharded.py OUT 2 NAME...

NAME is a function below. What it returns goes to OUT/NAME-PROCESSES-RANK.json. One process has the same model whole.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import PartialState
from launched import PROCESSES, RANK, answer, said
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import BertConfig, BertForSequenceClassification
from transformers.distributed import DistributedConfig

from hf_robust_ft import (
    HessianRegularizedTrainer,
    LayerConstraints,
    RobustTrainingArguments,
    hessian_trace,
    layer_quadratic_forms,
    measure_hessian,
    top_eigenpairs,
)
from hf_robust_ft.base_model import read_reference
from hf_robust_ft.checkpoint import RECORD_FILE
from hf_robust_ft.curvature import directions, offload_folder, paging, placement
from hf_robust_ft.sharding import whole

CONFIG = {
    "vocab_size": 41, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12,
    "max_position_embeddings": 8, "num_labels": 3, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip


def whole_model() -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**CONFIG)).double()


def build() -> nn.Module:
    """The same weights on all processes, then sharded: blocks first, then what is left, as users do."""
    model = whole_model()
    if PROCESSES > 1:
        for block in model.bert.encoder.layer:
            fully_shard(block)
        fully_shard(model)
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    return model


def examples(count: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [
        {
            "input_ids": torch.randint(1, 40, (8,), generator=generator),
            "labels": torch.randint(3, (), generator=generator),
        }
        for _ in range(count)
    ]


def batch(count: int, part: slice = slice(None)) -> dict[str, Tensor]:
    rows = examples(count)
    return {key: torch.stack([row[key] for row in rows])[part] for key in rows[0]}


def flat(model: nn.Module) -> dict[str, list[float]]:
    return {name: whole(p.detach()).flatten().tolist() for name, p in model.named_parameters()}


def projection(out: Path) -> dict[str, Any]:
    """SGD around shards, in both norms and with the pull; sums over tokens, so that one process gets the same steps."""
    results: dict[str, Any] = {}
    settings: dict[str, dict[str, Any]] = {
        "frobenius": {"radius": 0.02},
        "relative": {"radius": {"*encoder*": 0.01, "*word*": 0.02}, "mode": "relative", "growth": 0.9},
        "inf_op": {"radius": 0.05, "norm": "inf_op"},
        "zero": {"radius": 0.0},
        "pull": {"radius": 0.03, "penalty": 0.5},
    }
    mine = slice(RANK * 8 // PROCESSES, (RANK + 1) * 8 // PROCESSES)
    for name, setting in settings.items():
        model = build()
        constraints = LayerConstraints(model, **setting)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        for _ in range(3):
            (model(**batch(8, mine)).loss).backward()  # FSDP2 takes the mean over processes, of equal shares
            constraints.add_pull()
            optimizer.step()
            optimizer.zero_grad()
            constraints.project_()
        before = flat(model)
        constraints.project_()
        results[name] = {
            "weights": before,
            "again": flat(model) == before,
            "distances": constraints.distances(),
            "radii": constraints.radii,
            "active": [row.name for row in constraints.table() if row.active],
        }
    return results


def half(out: Path) -> dict[str, Any]:
    """Half-precision shards never leave their balls."""
    model = whole_model().bfloat16()
    if PROCESSES > 1:
        fully_shard(model)
    constraints = LayerConstraints(model, 0.05)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            step = torch.randn(parameter.shape, generator=generator).to(torch.bfloat16)
            own = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            own += step[: len(own)]
    constraints.project_()
    return {"inside": [d <= 0.05 for d in constraints.distances().values()]}


def measurement(out: Path) -> dict[str, Any]:
    """The curvature of a sharded model; its own weights, hooks and classes are as before."""
    model, reference = build(), {name: 0.9 * w for name, w in whole_model().state_dict().items()}
    data = [batch(7, slice(0, 4)), batch(7, slice(4, 7))]
    kept = flat(model)
    parameters, hooks = list(model.parameters()), [len(module._forward_hooks) for module in model.modules()]
    report = measure_hessian(model, reference, data, lanczos_steps=5, distributed=PROCESSES > 1)
    sharded_reference = {name: p.detach() * 0.9 for name, p in model.named_parameters()}
    forms = layer_quadratic_forms(model, data[0], sharded_reference)
    trace = hessian_trace(model, data, probes=2)
    pairs = top_eigenpairs(model, data, layers={"block": "bert.encoder.layer.1.*"}, tolerance=1e-8)
    error = said(lambda: layer_quadratic_forms(model, {**data[0], "labels": torch.full((4,), 9)}, reference))
    unchanged = all(a is b for a, b in zip(parameters, model.parameters(), strict=True)) and flat(model) == kept
    hooked = [len(module._forward_hooks) for module in model.modules()] == hooks
    with torch.no_grad():
        logits = model(input_ids=data[0]["input_ids"]).logits
    return {
        "upper": [layer.upper.maximum for layer in report.layers],
        "hessian": [layer.hessian.mean for layer in report.layers],
        "positive": [layer.positive.maximum for layer in report.layers if layer.positive is not None],
        "distance": [layer.distance for layer in report.layers],
        "names": [layer.name for layer in report.layers],
        "forms": forms.values.tolist(),
        "trace": trace.samples.tolist(),
        "eigenvalue": pairs.values.tolist(),
        "error": error,
        "unchanged": [unchanged, hooked],
        "logits": logits.tolist(),
    }


class WatchedPages(paging.Pages):
    """Remembers all that there were."""

    made: ClassVar[list[WatchedPages]] = []

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.made.append(self)


def short_of_memory(room: int) -> None:
    """From now on weights of any size are paged, into that many bytes."""
    paging.SMALL = 0
    for module in (paging, placement):
        vars(module)["room"] = lambda device: room
    placement.Pages = WatchedPages


def paged(out: Path) -> dict[str, Any]:
    """The measurement in a process that has room for the three largest weights, not for all."""
    sizes = sorted(p.numel() * p.element_size() for p in whole_model().parameters())
    room = sum(sizes[-3:])
    assert 4 * room < 2 * sum(sizes)
    if PROCESSES > 1:
        short_of_memory(room)
    found = measurement(out)
    assert len(WatchedPages.made) == (5 if PROCESSES > 1 else 0)
    assert all(0 < pages.most <= room for pages in WatchedPages.made)
    return found


def partly(out: Path) -> dict[str, Any]:
    """The same where small weights stay in memory: those of the head, for one."""
    if PROCESSES > 1:
        short_of_memory(2 * 41 * 8 * 8)
        paging.SMALL = 41 * 8 * 8
    return measurement(out)


def failing(out: Path) -> dict[str, str]:
    """The second process fails between two weights that all gather together."""
    way, calls = directions._way, 0

    def fail(*args: Any) -> Tensor:
        nonlocal calls
        calls += 1
        found = way(*args)
        if RANK == 1 and calls == 3:
            raise MemoryError("no more")
        return found

    model = build()
    reference = {name: p.detach() * 0.9 for name, p in model.named_parameters()}
    directions._way = fail
    found = {"forms": said(lambda: layer_quadratic_forms(model, batch(4), reference))}
    calls = 0
    found["measure"] = said(lambda: measure_hessian(model, reference, [batch(4)]))
    directions._way = way
    return found


def full_disk(out: Path) -> str:
    """The first process can't write the weights: all say so, none waits."""
    save_file = offload_folder.save_file

    def full(tensors: Any, path: Path) -> None:
        if path.name == "3.safetensors":
            raise OSError(28, "No space left on device")
        save_file(tensors, path)

    short_of_memory(10_000)
    offload_folder.save_file = full
    try:
        return said(lambda: layer_quadratic_forms(build(), batch(4), whole_model().state_dict()))
    finally:
        offload_folder.save_file = save_file


def base(out: Path) -> None:
    """A pretrained model, for `trainer`. By one process: of several, only the first saves."""
    whole_model().save_pretrained(out / "base")


def load(out: Path) -> Any:
    settings: dict[str, Any] = {}
    if PROCESSES > 1:
        settings["distributed_config"] = DistributedConfig(fsdp_size=PROCESSES)
    return BertForSequenceClassification.from_pretrained(out / "base", dtype=torch.float64, **settings)


def arguments(folder: Path, **settings: Any) -> RobustTrainingArguments:
    common = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "per_device_train_batch_size": 8 // PROCESSES}
    common |= {"per_device_eval_batch_size": 2, "train_sampling_strategy": "sequential", "learning_rate": 0.01}
    common |= {"lr_scheduler_type": "constant", "max_grad_norm": 1e9, "logging_steps": 1}
    made = RobustTrainingArguments(str(folder), **(common | settings))
    assert made.world_size == PROCESSES
    return made


def trainer(out: Path) -> dict[str, Any]:
    """The Trainer on a model that transformers has sharded."""
    # Trainer can't resume a model that was sharded when it was loaded.
    return trained(out / f"trainer-{PROCESSES}", lambda: load(out), arguments, save_only_model=True)


def trained(
    folder: Path, model: Callable[[], Any], make: Callable[..., RobustTrainingArguments], **settings: Any
) -> dict[str, Any]:
    """Radius, pull, correction, noise, measurement, and what is stored."""
    settings |= {"layer_radius": {"*encoder*": 0.005}, "l2sp_penalty": 0.1, "noise_transition": 0.2, "max_steps": 4}
    settings |= {"hessian_examples": 9, "save_steps": 2}
    training = HessianRegularizedTrainer(
        model(), make(folder, **settings), train_dataset=examples(32), eval_dataset=examples(6)
    )
    training.train()
    report = training.hessian_report
    assert report is not None
    found = {
        "weights": flat(training.model),
        "active": [row.name for row in training.constraint_table() if row.active],
        "grad_norm": [x["grad_norm"] for x in training.state.log_history if "grad_norm" in x],
        "upper": [layer.upper.maximum for layer in report.layers],
        "bounds": {bound.name: bound.value for bound in training._measured[0].bounds},  # type: ignore[index]
        "sharded": isinstance(next(training.model.parameters()), DTensor),
        "record": json.loads((folder / "checkpoint-2" / RECORD_FILE).read_text())["reference_sha256"],
    }
    # A corrected loss: of a sharded model's own, stock Trainer (5.24) takes the sum over processes for the mean.
    plain = make(folder, hessian_penalty=0.05, noise_transition=0.2, max_steps=3, save_strategy="no", optim="sgd")
    noisy = HessianRegularizedTrainer(model(), plain, train_dataset=examples(32))
    noisy.train()
    found["noisy"] = flat(noisy.model)
    return found


def refusals(out: Path) -> dict[str, Any]:
    """What does not work with a sharded model is refused before training."""
    found = {}
    data = {"train_dataset": examples(32), "eval_dataset": examples(6)}
    for name, setting in {
        "estimate": {"noise_transition": "estimate"},
        "posterior": {"noise_transition": 0.2, "loss_correction": "posterior"},
        "auto": {"layer_radius": "auto"},
    }.items():
        made = arguments(out / "refused", max_steps=1, save_strategy="no", **setting)
        found[name] = said(lambda made=made: HessianRegularizedTrainer(load(out), made, **data).train())
    adapted = get_peft_model(whole_model(), LoraConfig(target_modules=["query"]))
    fully_shard(adapted)
    found["LoRA"] = said(lambda: LayerConstraints(adapted, 0.1))
    return found


def reading(out: Path) -> dict[str, Any]:
    """The base model of a sharded model, read again."""
    weights, described = read_reference(load(out), str(out / "base"))
    return {"names": sorted(weights), "described": described.partition(" of ")[0]}


if __name__ == "__main__":
    # Some launchers start one process whatever they are asked for, and then nothing would be tested.
    assert PartialState(cpu=True).num_processes == PROCESSES
    answer(projection, half, measurement, paged, partly, failing, full_disk, base, trainer, refusals, reading)
