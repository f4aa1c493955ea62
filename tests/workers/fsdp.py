"""What one process does with a model that Accelerate shards by FSDP2 when training begins; see tests/test_fsdp.py.

python fsdp.py OUT 1 NAME...
torchrun --nproc_per_node 2 fsdp.py OUT 2 NAME...

NAME is a function below. What it returns goes to OUT/NAME-PROCESSES-RANK.json. One process trains the same model whole.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import DistributedType
from launched import PROCESSES, answer, said
from sharded import arguments as plain_arguments
from sharded import examples, flat, trained, whole_model
from torch.distributed.tensor import DTensor

from hf_robust_ft import HessianRegularizedTrainer, RobustTrainingArguments


def arguments(folder: Path, *, fsdp: dict[str, Any] | None = None, **settings: Any) -> RobustTrainingArguments:
    if PROCESSES == 1:
        return plain_arguments(folder, **settings)
    config = {"version": 2, "transformer_layer_cls_to_wrap": ["BertLayer"], **(fsdp or {})}
    os.environ["FSDP_STATE_DICT_TYPE"] = config.get("state_dict_type", "FULL_STATE_DICT")  # older releases read it here
    made = plain_arguments(folder, fsdp=True, fsdp_config=config, **settings)
    # Accelerate shards on several GPUs only. Told that these are some, it does all that it does there, over gloo.
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return made


def trainer(out: Path) -> dict[str, Any]:
    """All features."""
    return trained(out / f"trainer-{PROCESSES}", whole_model, arguments)


if __name__ == "__main__":
    assert PartialState(cpu=True).num_processes == PROCESSES
    answer(trainer)
