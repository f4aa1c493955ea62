"""What one of two processes does that are interrupted, killed and started again; tests/test_fault_processes.py.

torchrun --nproc_per_node 2 faults.py OUT PART...

PART is a function below. What it returns goes to OUT/PART-RANK.json.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist
from resumable import arguments, build, examples
from transformers import TrainerCallback

from hf_robust_ft import HessianRegularizedTrainer
from hf_robust_ft.checkpoint import last_complete_checkpoint

RANK = int(os.environ["RANK"])
STEPS, SAVES, DIES = 12, 3, 9


class Steps(TrainerCallback):
    """The steps that were begun, in memory and, by the first process, in a file that is seen from outside."""

    def __init__(self, progress: Path | None) -> None:
        self.begun: list[int] = []
        self.progress = progress

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begun.append(state.global_step)
        if self.progress is not None:
            if RANK == 0:
                self.progress.write_text(str(state.global_step))
            time.sleep(0.3)  # so that a signal comes before the end


class Dying(HessianRegularizedTrainer):
    """The second process dies after all else of its third checkpoint is written."""

    def _save_rng_state(self, output_dir: str) -> None:
        if RANK == 1 and self.state.global_step == DIES:
            time.sleep(1)
            os.kill(os.getpid(), signal.SIGKILL)
        super()._save_rng_state(output_dir)


def _train(folder: Path, kind: type[HessianRegularizedTrainer], progress: Path | None = None) -> dict[str, Any]:
    settings = arguments(folder, max_steps=STEPS, save_steps=SAVES, per_device_train_batch_size=2)
    assert settings.world_size == 2
    # Each process has its own numbers for dropout, and only its own file in a checkpoint knows them.
    steps, stopped = Steps(progress), None
    trainer = kind(build(), settings, train_dataset=examples(), callbacks=[steps])
    resumed = last_complete_checkpoint(folder)
    dist.barrier()  # before anyone writes another
    try:
        trainer.train(resume_from_checkpoint=True if resumed else None)
    except KeyboardInterrupt as error:
        stopped = str(error)
    weights = {name: weight.tolist() for name, weight in trainer.model.state_dict().items()}
    return {"begun": steps.begun, "stopped": stopped, "resumed": resumed, "weights": weights}


def whole(out: Path) -> dict[str, Any]:
    return _train(out / "whole", HessianRegularizedTrainer)


def interrupted(out: Path) -> dict[str, Any]:
    return _train(out / "run", HessianRegularizedTrainer, out / "progress")


def died(out: Path) -> dict[str, Any]:
    return _train(out / "run", Dying)


def finished(out: Path) -> dict[str, Any]:
    return _train(out / "run", HessianRegularizedTrainer)


def main() -> None:
    # What starts in the background, as tests may, ignores it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    out = Path(sys.argv[1])
    parts = {function.__name__: function for function in (whole, interrupted, died, finished)}
    for name in sys.argv[2:]:
        result = parts[name](out)
        (out / f"{name}-{RANK}.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
