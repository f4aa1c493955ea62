"""What is saved is whole, and a training that is interrupted is saved."""

from __future__ import annotations

import contextlib
import functools
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy

from ..checkpoint import discard, discard_unfinished, is_complete, last_complete_checkpoint, saved_last
from ..features import setting
from ..files import check_writable, explained, not_a_folder, remove_abandoned, written_together
from .hub import PushingTrainer

logger = logging.getLogger(__name__)

README = "README.md"
SHARDS = "*-?????-of-?????.*"


class SavingTrainer(PushingTrainer):
    """Saves as a whole, and on Ctrl-C; see :class:`~hf_robust_ft.HessianRegularizedTrainer`."""

    _seen_step = _saved_step = -1

    @contextlib.contextmanager
    def _output_explained(self) -> Iterator[None]:
        """While ``Trainer`` makes the output folder."""
        try:
            yield
        except OSError as error:
            folder = Path(str(self.args.output_dir)) if hasattr(self, "args") else None
            if folder is None or error.filename is None or Path(error.filename) not in (folder, *folder.parents):
                raise
            raise not_a_folder(folder, "output_dir", error) from error

    def _check_output(self) -> None:
        """Before the first step: it can be written to, if something will be saved, and holds nothing half-written."""
        args = self.args
        if self._is_candidate or not args.should_save:
            return
        saves = (
            args.save_strategy != SaveStrategy.NO
            or args.push_to_hub
            or setting(args, "hessian_examples")
            or self._estimates_noise
            or self._uses_posteriors
            or self._chooses_radius
        )
        if saves:
            check_writable(self._folder, "output_dir")
        remove_abandoned(self._folder)
        discard_unfinished(self._folder)

    # Whole

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """As ``Trainer._save``, but each file takes the place of an earlier one once all are on the disk."""
        folder = Path(output_dir or str(self.args.output_dir))
        if not self.args.should_save:
            super()._save(str(folder), state_dict)
            return
        with written_together(folder) as temporary:
            if (folder / README).is_file():
                shutil.copy(folder / README, temporary)  # adapters add to it
            super()._save(str(temporary), state_dict)
            shards = {path.name for path in temporary.glob(SHARDS)}
        for path in folder.glob(SHARDS):
            if path.name not in shards:
                path.unlink()  # of an earlier model, as save_pretrained does

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As ``Trainer._save_checkpoint``; ``trainer_state.json`` comes last, after all processes."""
        run = Path(self._get_output_dir(trial))
        checkpoint = run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with explained(checkpoint, functools.partial(_remedy, run)):
            if self.args.should_save:
                discard(checkpoint)  # what a killed run left under this name must not mix with what comes
            self.accelerator.wait_for_everyone()
            try:
                with saved_last(self.state, checkpoint, self.args.should_save):
                    super()._save_checkpoint(model, trial)
            except Exception:
                if self.args.should_save and not is_complete(checkpoint):
                    discard(checkpoint)  # a full disk needs the room
                raise
        self._saved_step = self.state.global_step

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # The state that follows says that the checkpoint is complete.
        self.accelerator.wait_for_everyone()

    # Interrupted

    @contextlib.contextmanager
    def _interruptible(self, trial: Any) -> Iterator[None]:
        """Training, but neither a trial nor a candidate: those can't be resumed."""
        if trial is not None or self._is_candidate:
            yield
            return
        self._seen_step = self._saved_step = -1
        announces = self.is_local_process_zero()
        with self._interruption.handled(world_size=self.args.world_size, announces=announces):
            yield
            late = self._interruption.agreed_at_the_end()
        if late:
            self._try_to_save()
            raise KeyboardInterrupt(f"all steps were done; the model is in {self._folder}, neither measured nor pushed")

    def _maybe_log_save_evaluate(
        self, tr_loss: Tensor, grad_norm: Any, model: nn.Module, trial: Any, *args: Any, **kwargs: Any
    ) -> None:
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
        step, stops = self.state.global_step, self._interruption.agreed()
        # After the last step of an epoch Trainer comes here twice, and what belongs to its end comes with the second.
        epoch_goes_on = step == self._seen_step or not float(self.state.epoch or 0).is_integer()
        self._seen_step = step
        if not stops or not epoch_goes_on:
            return
        if self._saved_step != step:
            self._save_checkpoint(model, trial)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        self.is_in_train = False
        message = (
            f"Training was interrupted after step {step} of {self.state.max_steps}, and saved in "
            f"{self._folder / f'{PREFIX_CHECKPOINT_DIR}-{step}'}. Go on with "
            "trainer.train(resume_from_checkpoint=True)"
        )
        if self.is_world_process_zero():
            logger.warning("%s", message)
        raise KeyboardInterrupt(message)


def _remedy(run: Path) -> str:
    """Of a checkpoint that was not written."""
    before = last_complete_checkpoint(run)
    if before is None:
        return "There is no earlier checkpoint. trainer.save_model(another folder) saves the model as it is now"
    return f"Make room, and go on from {before} with trainer.train(resume_from_checkpoint=True)"
