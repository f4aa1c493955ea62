"""What one process does with a model that Accelerate shards by FSDP2 when training begins; see tests/test_fsdp.py.

python fsdp.py OUT 1 NAME...
torchrun --nproc_per_node 2 fsdp.py OUT 2 NAME...

NAME is a function below. What it returns goes to OUT/NAME-PROCESSES-RANK.json. One process trains the same model whole.
"""

from __future__ import annotations

import dataclasses
import gc
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from launched import PROCESSES, RANK, answer, said
from peft import LoraConfig, get_peft_model
from sharded import arguments as plain_arguments
from sharded import examples, flat, trained, whole_model
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from hf_robust_ft import HessianRegularizedTrainer, RobustTrainingArguments, read_card
from hf_robust_ft.adapters import merged_name
from hf_robust_ft.sharding import reshard


def arguments(folder: Path, *, fsdp: dict[str, Any] | None = None, **settings: Any) -> RobustTrainingArguments:
    if PROCESSES == 1:
        return plain_arguments(folder, **settings)
    config = {"version": 2, "transformer_layer_cls_to_wrap": ["BertLayer"], **(fsdp or {})}
    # As accelerate launch does; older releases read some of it here only.
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    os.environ["FSDP_STATE_DICT_TYPE"] = config.get("state_dict_type", "FULL_STATE_DICT")
    os.environ["FSDP_AUTO_WRAP_POLICY"] = "TRANSFORMER_BASED_WRAP"
    os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = ",".join(config["transformer_layer_cls_to_wrap"])
    made = plain_arguments(folder, fsdp=True, fsdp_config=config, **settings)
    # Accelerate shards on several GPUs only. Told that these are some, it does all that it does there, over gloo.
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return made


def trainer(out: Path) -> dict[str, Any]:
    """All features."""
    found = trained(out / f"trainer-{PROCESSES}", whole_model, arguments)
    del found["grad_norm"]  # which Accelerate logs, older ones (1.14) of the shards of one process
    return found


def train(
    folder: Path, build: Callable[[], Any] = whole_model, resume: str | None = None, **settings: Any
) -> HessianRegularizedTrainer:
    """Four steps in balls, from a checkpoint or from the start."""
    data = settings.pop("train_dataset", examples(32))
    common = {"layer_radius": {"*encoder*": 0.005}, "noise_transition": 0.2, "max_steps": 4}
    common["save_strategy"] = "steps" if "save_steps" in settings else "no"
    made = arguments(folder, **(common | settings))  # first: it says how models are loaded
    training = HessianRegularizedTrainer(build(), made, train_dataset=data, eval_dataset=examples(6))
    training.train(resume_from_checkpoint=resume and str(folder / resume))
    reshard(training.model)
    assert training.is_fsdp_enabled == (PROCESSES > 1)
    assert all(isinstance(parameter, DTensor) == (PROCESSES > 1) for parameter in training.model.parameters())
    return training


def summary(training: HessianRegularizedTrainer) -> dict[str, Any]:
    report = training.hessian_report
    assert (report is None) == (training.args.hessian_examples == 0)
    return {
        "measured": [] if report is None else [(layer.distance, layer.upper.maximum) for layer in report.layers],
        "weights": {merged_name(name, training.model): w for name, w in flat(training.model).items()},
        "distances": training.constraints.distances(),
        "active": [row.name for row in training.constraint_table() if row.active],
        "centres": {row.name: row.centre for row in training.constraint_table()},
    }


def resuming(out: Path) -> dict[str, Any]:
    """From either kind of checkpoint, with a model that has moved: weights and centres are those of the run."""

    def moved() -> Any:
        model = whole_model()
        for parameter in model.parameters():
            parameter.data.add_(0.1)
        return model

    found: dict[str, Any] = {}
    for kind in ("FULL_STATE_DICT", "SHARDED_STATE_DICT"):
        folder = out / f"resuming-{kind}-{PROCESSES}"
        settings: dict[str, Any] = {"fsdp": {"state_dict_type": kind}, "save_steps": 2, "hessian_examples": 3}
        settings |= {"eval_strategy": "steps", "eval_steps": 2, "l2sp_penalty": 0.1}
        # The best is the one in the middle.
        settings |= {"metric_for_best_model": "eval_loss", "load_best_model_at_end": kind == "FULL_STATE_DICT"}
        for name, start in {"whole": (whole_model, None), "resumed": (moved, "checkpoint-2")}.items():
            training = train(folder, *start, **settings)
            assert training._start
            assert all(isinstance(w, DTensor) == (PROCESSES > 1) for w in training._start.values())
            best = Path(training.state.best_model_checkpoint or "").name
            losses = [x["eval_loss"] for x in training.state.log_history if "eval_loss" in x]
            found[f"{kind} {name}"] = summary(training) | {"best": best, "losses": losses}
    return found


def base(out: Path) -> None:
    """A pretrained model without a head. By one process."""
    whole_model().bert.save_pretrained(out / "base")


def loading(out: Path) -> dict[str, Any]:
    """Only the first process loads the weights, and makes the head; with ``relative`` the radii hang on weights."""

    def load() -> Any:
        torch.manual_seed(5)
        model = BertForSequenceClassification.from_pretrained(out / "base", num_labels=3, dtype=torch.float64)
        if RANK > 0:
            # Releases differ in what is here; Accelerate's optimizer mixes up weights on the meta device.
            for module in model.modules():
                for name, parameter in module.named_parameters(recurse=False):
                    module.register_parameter(name, nn.Parameter(torch.zeros_like(parameter, device="cpu")))
                    module.get_parameter(name)._is_hf_initialized = True
        return model

    settings: dict[str, Any] = {"layer_radius": 0.01, "radius_mode": "relative", "l2sp_penalty": 0.1}
    training = train(out / "loading", load, fsdp={"cpu_ram_efficient_loading": True}, **settings)
    return summary(training) | {"radii": training.constraints.radii}


def unloaded(out: Path) -> str:
    """A new head of two weights, which the second process has not loaded: Accelerate takes one for the other."""

    def load() -> Any:
        model = whole_model()
        if RANK > 0:
            model.classifier.to("meta")
        return model

    return said(lambda: train(out / "unloaded", load, fsdp={"cpu_ram_efficient_loading": True}))


def again(out: Path) -> dict[str, Any]:
    """Evaluations leave some weights whole; noise and balls are those of the shards, and centres the first ones."""
    settings: dict[str, Any] = {"layer_radius": {"*pooler*": 0.01, "*encoder*": 0.005}, "hessian_penalty": 0.05}
    settings |= {"optim": "sgd", "learning_rate": 0.3, "eval_strategy": "steps", "eval_steps": 1, "l2sp_penalty": 0.1}
    settings |= {"per_device_train_batch_size": 4 // PROCESSES, "gradient_accumulation_steps": 2}
    training = train(out / "again", **settings)
    training.train()
    reshard(training.model)
    return summary(training)


def wrapped(out: Path) -> dict[str, Any]:
    """Names and weights are as without what activation checkpointing and torch.compile put around modules."""
    checkpointed = train(out / "wrapped", fsdp={"activation_checkpointing": True}, hessian_examples=3)
    compiled = train(out / "wrapped", torch_compile_backend="eager", hessian_examples=3)
    assert PROCESSES == 1 or "_checkpoint_wrapped_module" in str(checkpointed.model)
    assert compiled._model is not compiled.model_wrapped
    return {"checkpointed": summary(checkpointed), "compiled": summary(compiled)}


def posteriors(out: Path) -> dict[str, Any]:
    """Features come from the whole model, which each process has until training begins."""
    return summary(train(out / f"posteriors-{PROCESSES}", loss_correction="posterior"))


def precision(out: Path) -> dict[str, Any]:
    """Half-precision weights are trained as float32 ones under bf16, and saved around centres in float32."""
    penalties = {"hessian_penalty": 0.01, "l2sp_penalty": 0.1}
    training = train(out / "precision", lambda: whole_model().bfloat16(), bf16=True, **penalties)
    return {
        "types": sorted({str(parameter.dtype) for parameter in training.model.parameters()}),
        "centres": sorted({str(centre.dtype) for centre in training.constraints.reference.values()}),
        "inside": all(row.distance <= row.radius for row in training.constraint_table() if row.radius is not None),
        "active": sum(row.active for row in training.constraint_table()),
    }


def tied(out: Path) -> dict[str, Any]:
    """The head of a language model is its embedding; resuming, too."""
    sizes = {"vocab_size": 41, "n_positions": 8, "n_embd": 8, "n_layer": 2, "n_head": 2}
    config = GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)

    def build() -> GPT2LMHeadModel:
        torch.manual_seed(0)
        return GPT2LMHeadModel(config).double()

    settings: dict[str, Any] = {"layer_radius": {"transformer.wte": 0.01}, "save_steps": 2, "noise_transition": None}
    settings |= {"loss_correction": "gce", "fsdp": {"transformer_layer_cls_to_wrap": ["GPT2Block"]}}
    settings["train_dataset"] = [{**row, "labels": row["input_ids"]} for row in examples(32)]
    straight = train(out / f"tied-{PROCESSES}", build, **settings)
    resumed = train(out / f"tied-{PROCESSES}", build, "checkpoint-2", **settings)
    assert straight.model.lm_head.weight is straight.model.transformer.wte.weight
    return {"straight": summary(straight), "resumed": summary(resumed)}


def freed(out: Path) -> dict[str, Any]:
    """No whole weight is left once all are sharded."""
    weights: list[weakref.ref[nn.Parameter]] = []

    def build() -> Any:
        model = whole_model()
        weights.extend(weakref.ref(parameter) for parameter in model.parameters())
        return model

    training = train(out / "freed", build, hessian_examples=3)
    gc.collect()
    return {"left": sum(weight() is not None for weight in weights), "trained": training.state.global_step}


def card(out: Path) -> dict[str, Any]:
    """Written by the first process alone."""
    folder = out / f"card-{PROCESSES}"
    training = train(folder)
    if RANK > 0:
        return {}
    training.create_model_card()
    return {"rows": [dataclasses.asdict(row) for row in read_card(folder)[0].constraints]}


def refusals(out: Path) -> dict[str, str]:
    """What can't work is refused when the Trainer is made."""
    first = {"version": 1, "sync_module_states": False}  # which would look for a GPU
    unloaded = {"cpu_ram_efficient_loading": True}
    settings: dict[str, dict[str, Any]] = {
        "auto": {"layer_radius": "auto"},
        "LoRA": {"layer_radius": 0.1},
        "estimate": {"noise_transition": "estimate", "fsdp": unloaded},
        "posterior": {"noise_transition": 0.2, "loss_correction": "posterior", "fsdp": unloaded},
        **{f"{name} 1": {name: 0.1, "fsdp": first} for name in ("layer_radius", "l2sp_penalty", "hessian_penalty")},
    }
    found = {}
    for name, setting in settings.items():
        model = get_peft_model(whole_model(), LoraConfig(target_modules=["query"])) if name == "LoRA" else whole_model()
        made = arguments(out / "refused", **setting)
        data = {"train_dataset": examples(32), "eval_dataset": examples(6)}
        found[name] = said(lambda made=made, model=model, data=data: HessianRegularizedTrainer(model, made, **data))
    return found


if __name__ == "__main__":
    assert PartialState(cpu=True).num_processes == PROCESSES
    answer(
        trainer, resuming, base, loading, unloaded, again, wrapped, posteriors, precision, tied, freed, card, refusals
    )
