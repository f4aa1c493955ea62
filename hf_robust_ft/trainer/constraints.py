"""Balls around the pretrained weights and penalties: in each step, and in the checkpoints that a run resumes from."""

from __future__ import annotations

import functools
import logging
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast, broadcast_object_list, gather_object
from torch import Tensor, nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..callbacks import ProjectionCallback
from ..checkpoint import ConstraintRecord, check_fits
from ..constraints import ConstraintTable, LayerConstraints
from ..features import make_constraints, setting
from ..penalized_step import penalized_step
from ..reference import gathered, load_reference, reference_digest, save_reference
from ..sharding import is_sharded
from .loss import CorrectedTrainer

logger = logging.getLogger(__name__)


class ConstrainedTrainer(CorrectedTrainer):
    """Keeps each layer in its ball; see :class:`~hf_robust_ft.HessianRegularizedTrainer`."""

    def _set_up(self) -> None:
        super()._set_up()
        self._saved_reference: tuple[Path, LayerConstraints] | None = None
        self._constrained_model = self._model
        self._projection = ProjectionCallback(LayerConstraints(self._model, None))
        self._shards_are_due = False
        # Distances of shards take all processes, and a card is written by one.
        self._trained_table: ConstraintTable | None = None
        self._constrain(self._make_constraints())

    @property
    def constraints(self) -> LayerConstraints:
        """The balls around the layers; none of them if ``layer_radius`` is None."""
        return self._projection.constraints

    def _constrain(self, constraints: LayerConstraints) -> None:
        """By a callback that is first of all, so that others see projected weights after a step."""
        callbacks = self.callback_handler.callbacks
        if self._projection in callbacks:
            callbacks.remove(self._projection)
        self._projection.constraints = constraints
        if constraints:
            callbacks.insert(0, self._projection)

    def constraint_table(self) -> ConstraintTable:
        """Every trained parameter: its centre, radius, norm and distance now, or why it is free."""
        return self.constraints.table()

    def _hp_search_setup(self, trial: Any) -> None:
        super()._hp_search_setup(trial)
        self._trained_table = None
        if self._awaits_shards:
            self._constrained_model = self._model
            self._constrain(self._make_constraints())  # the settings may be others than before
        else:
            self._keep_weights(untrained=self.state.global_step == 0)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """As ``Trainer._prepare_for_training``; FSDP2 shards the model here, and what hangs on its weights follows."""
        sharded_now = self._shards_are_due = self._awaits_shards
        if sharded_now:
            # The first process knows which layers are fresh: others may have no weights yet, and say nothing of them.
            fresh = broadcast_object_list([self.constraints.fresh])[0]
            # A weight that is held here would stay whole beside its shards.
            self._drop_constraints(fresh)
        prepared = super()._prepare_for_training(  # type: ignore[no-untyped-call]
            max_steps, train_dataloader, resume_from_checkpoint
        )
        self._follow_shards()
        if sharded_now:
            self._check_optimizer()
        return prepared

    def _check_optimizer(self) -> None:
        """Refuse to train what Accelerate (1.15) mixes up: it tells weights apart by their memory, of which those that
        a process did not load, such as a new head's, have none."""
        assert self.optimizer is not None
        weights = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        trained = {id(weight) for weight in weights if weight.requires_grad}
        if any(gather_object([len(trained) < len(weights)])):
            raise ValueError(
                "with cpu_ram_efficient_loading the optimizer of a process got one weight for another, which would not "
                "be trained, as for a new head; set fsdp_config={'cpu_ram_efficient_loading': False}, or accelerate "
                "launch --fsdp_cpu_ram_efficient_loading false"
            )

    def _follow_shards(self) -> None:
        """Once the model is sharded, and before a checkpoint is loaded into it."""
        if self._shards_are_due:
            self._shards_are_due = False
            self._keep_weights(untrained=True)

    def _keep_weights(self, untrained: bool) -> None:
        """Keep what has to be known of the weights that training starts from.

        Args:
            untrained: whether they are those. Weights that have moved are no centre: a second train() of one model
                keeps the first one's.
        """
        build = self._make_constraints
        if self._model is self._constrained_model:
            before = self.constraints
            constraints = build(reference=before.reference, capture_missing=untrained, fresh=before.fresh)
        else:
            self._drop_constraints()
            self._constrained_model = self._model
            constraints = build()
        if constraints and self.args.world_size > 1:
            # A head that each process initialised by itself; DDP, too, starts from that of process 0.
            # Shards are no copies of each other.
            same = {
                name: centre if is_sharded(centre) else broadcast(centre)
                for name, centre in constraints.reference.items()
            }
            constraints = build(reference=same, fresh=constraints.fresh)
        self._constrain(constraints)

    def _make_constraints(self, **settings: Any) -> LayerConstraints:
        if self._only_first_loads and not self.is_world_process_zero():
            return LayerConstraints(self._model, None)  # the first process checks the settings
        return make_constraints(
            self.args, self._model, sharded_by=self._sharded_by, before_sharding=self._awaits_shards, **settings
        )

    def _drop_constraints(self, fresh: Collection[str] | None = None) -> None:
        """The old centres go before new ones come: memory for one copy is enough."""
        self._constrain(LayerConstraints(self._model, None, fresh=fresh))

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """As ``Trainer.training_step``, with the penalties: see :func:`~hf_robust_ft.penalized_step.penalized_step`."""
        step = functools.partial(super().training_step, model, inputs, num_items_in_batch)
        return penalized_step(self, model, self.constraints, step)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """None beyond ``max_steps``: Trainer resumes a run that is finished within an epoch with one step more."""
        finished = 0 < self.state.max_steps <= self.state.global_step
        if finished and (self.constraints or self._corrected is not None or setting(self.args, "hessian_penalty")):
            return [], None
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._follow_shards()
        # Before the weights are read: a resume that is refused leaves the model, and so the next centres, as they were.
        if self._sharded_by is None and Path(resume_from_checkpoint).is_dir():
            check_fits(Path(resume_from_checkpoint), self._model)
        if self.constraints and Path(resume_from_checkpoint).is_dir():
            self._restore_constraints(Path(resume_from_checkpoint).absolute())
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _restore_constraints(self, checkpoint: Path) -> None:
        record = ConstraintRecord.load(checkpoint)
        reference = load_reference(checkpoint.parent, record.reference_sha256)
        # The old centres stay until nothing is refused any more: nothing else has them. Both together take no more
        # memory than the gradients will.
        self._constrain(self._make_constraints(reference=reference, fresh=record.fresh))
        if record.radius_norm != self.constraints.norm or record.radii != self.constraints.radii:
            logger.warning("the radii differ from those of the checkpoint; training goes on with the new ones")

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.constraints:
            # First the reference, then the record that names it, then the checkpoint, whose
            # trainer_state.json comes last: whatever is complete can be resumed.
            run, constraints = Path(self._get_output_dir(trial)), self.constraints
            if self._saved_reference != (run, constraints):
                reference = gathered(constraints.reference, keep=self.args.should_save)
                if self.args.should_save:
                    save_reference(reference, run)
                    self._reference_digest = reference_digest(reference)
                self._saved_reference = (run, constraints)
            if self.args.should_save:
                record = ConstraintRecord(
                    self._reference_digest, constraints.norm, constraints.radii, constraints.fresh
                )
                record.save(run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        super()._save_checkpoint(model, trial)
