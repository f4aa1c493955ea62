"""When the constraints act: after every optimizer step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

if TYPE_CHECKING:
    from .constraints import LayerConstraints


class ProjectionCallback(TrainerCallback):
    """Projects every constrained layer right after each optimizer step.

    The Trainer calls this before the scheduler, logging, evaluation and saving, and only on micro-batches
    that end an accumulation; so no weight outside its ball is ever evaluated or saved. After a step that
    a gradient scaler skipped it does nothing, as projecting twice is projecting once.
    """

    def __init__(self, constraints: LayerConstraints) -> None:
        self.constraints = constraints

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.constraints.project_()
