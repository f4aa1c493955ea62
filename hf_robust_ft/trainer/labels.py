"""What is learned of the training labels before the first step: T, and posteriors of the true classes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer

from ..arguments import ESTIMATE
from ..corrected_loss import loss_type
from ..estimation import TransitionEstimate
from ..features import correction_of, num_classes, setting
from ..label_targets import FILE as TARGETS_FILE
from ..label_targets import LabelTargets, Numbered, TargetCollator, check_posteriors
from ..noise_estimate import FILE as ESTIMATE_FILE
from ..noise_estimate import check_estimable, check_estimate, saved_estimate, study_labels
from ..sharding import has_shards


class LabelTrainer(Trainer):
    """Knows T and what to train on in the place of labels; see :class:`~hf_robust_ft.HessianRegularizedTrainer`."""

    def _set_up(self) -> None:
        self._own_label_names = self.label_names
        self.noise_estimate: TransitionEstimate | None = None
        """With ``noise_transition="estimate"``: T and its uncertainty, once training or evaluation has begun."""
        self._estimate_was_read = False
        self.label_targets: LabelTargets | None = None
        """With ``loss_correction="posterior"``: what is trained on, once training has begun."""

    @property
    def _model(self) -> nn.Module:
        assert self.model is not None  # Trainer's own annotation leaves it open until __init__ ends
        # FSDP2 puts what torch.compile made of it here. One that was compiled before has its names in checkpoints.
        return getattr(self.model, "_orig_mod", self.model) if self.accelerator.is_fsdp2 else self.model

    @property
    def _sharded_by(self) -> str | None:
        """What shards the model in a way that balls and penalties can't follow."""
        if self.is_deepspeed_enabled:
            return "DeepSpeed"
        if self.is_fsdp_enabled:
            return None if self.accelerator.is_fsdp2 else "FSDP version 1"
        # The run would not be the one that was meant.
        return "FSDP that is not Accelerate's, or not in effect, as on a CPU" if self.args.fsdp else None

    @property
    def _awaits_shards(self) -> bool:
        """Whether Accelerate will shard the model when its training begins (FSDP2)."""
        return bool(self.accelerator.is_fsdp2) and not has_shards(self._model)

    @property
    def _only_first_loads(self) -> bool:
        """Whether the other processes have no weights until then."""
        return self._awaits_shards and bool(self.accelerator.state.fsdp_plugin.cpu_ram_efficient_loading)

    def _before_training(self, resumed: str | None, trial: Any) -> None:
        if self._estimate_was_read:
            # An evaluation took it from the output folder, where a run on other data may have left it.
            self.noise_estimate, self._estimate_was_read = None, False
        if resumed is not None:
            # The model may be that of a checkpoint: then its features are no longer those that these came from.
            self._read_study(Path(resumed).absolute().parent, posteriors=self._uses_posteriors)

    def _hp_search_setup(self, trial: Any) -> None:
        """Settings are read here: train() calls this after model_init and before it loads a checkpoint."""
        super()._hp_search_setup(trial)
        self._study_labels(posteriors=self._uses_posteriors)

    @property
    def _estimates_noise(self) -> bool:
        return isinstance(value := setting(self.args, "noise_transition"), str) and value == ESTIMATE

    @property
    def _transition(self) -> Any:
        """The noise model. Until it is estimated a rate of 0 stands in, with which nothing is computed."""
        if not self._estimates_noise:
            return setting(self.args, "noise_transition")
        return 0.0 if self.noise_estimate is None else self.noise_estimate.transition

    @property
    def _estimate(self) -> TransitionEstimate | None:
        """What is known of the estimated T: by this run, or in a file that ``noise_transition`` names."""
        return self.noise_estimate if self._estimates_noise else saved_estimate(setting(self.args, "noise_transition"))

    @property
    def _uses_posteriors(self) -> bool:
        return bool(correction_of(self.args) == "posterior")

    def _check_estimable(self) -> None:
        asked = f"noise_transition='{ESTIMATE}'" if self._estimates_noise else "loss_correction='posterior'"
        if self._estimates_noise or self._uses_posteriors:
            check_estimable(
                self._model,
                self.train_dataset,
                self.label_names,
                asked,
                self.args.world_size,
                only_first_loads=self._only_first_loads,
            )

    def _study_labels(self, *, posteriors: bool) -> None:
        """Once: T, and the posteriors of the training labels, from the features that the model has before training."""
        estimate = self._estimates_noise and self.noise_estimate is None
        if posteriors and not estimate and self.label_targets is not None:
            self._check_targets(self.label_targets)
        posteriors = posteriors and (estimate or self.label_targets is None)
        if not estimate and not posteriors:
            return
        self._check_estimable()
        dataset, collate = self._without_unused_columns("noise estimation")
        with self._on_device():
            found = study_labels(
                self._model,
                dataset,
                collate,
                self.label_names[0],
                num_classes(self._model, loss_type(self._model)),
                self.args,
                transition=None if self._estimates_noise else self._transition,
                estimate=self.noise_estimate if self._estimates_noise else None,
                posteriors=posteriors,
            )
        if found.estimate is not None:
            check_estimate(found.estimate, self._uses_posteriors)  # of an evaluation, too: training goes on with it
        self.noise_estimate = found.estimate or self.noise_estimate
        self.label_targets = found.targets or self.label_targets

    @contextlib.contextmanager
    def _on_device(self) -> Iterator[None]:
        """The model where it will be trained. FSDP lets it wait for that on the CPU, where features take for ever."""
        waits = self._awaits_shards and next(self._model.parameters()).device.type == "cpu"
        try:
            if waits:
                self._model.to(self.args.device)
            yield
        finally:
            if waits:
                self._model.to("cpu")

    def _check_targets(self, targets: LabelTargets) -> None:
        """Posteriors of another T don't serve; a model that training has moved gives no others."""
        if targets.are_of(self._transition):
            return
        if self.model_init is None:
            raise ValueError(
                "loss_correction='posterior' was computed with another noise_transition than that of now; give the one "
                "of before, or make a new Trainer with the pretrained model"
            )
        self.label_targets = None

    def _without_unused_columns(self, purpose: str, dataset: Any = None) -> tuple[Any, Any]:
        """The training set or another and a collator, of which one leaves out what the model does not take."""
        dataset, collate = self.train_dataset if dataset is None else dataset, self.data_collator
        if isinstance(dataset, datasets.Dataset):
            return self._remove_unused_columns(dataset, description=purpose), collate
        return dataset, self._get_collator_with_removed_columns(collate, description=purpose)

    def _read_study(self, folder: Path, *, posteriors: bool) -> None:
        """Take what a run found and wrote there, if it is there, and write it to this run's folder, too."""
        output = Path(str(self.args.output_dir))
        if self._estimates_noise and self.noise_estimate is None and (folder / ESTIMATE_FILE).is_file():
            self.noise_estimate = TransitionEstimate.load(folder / ESTIMATE_FILE)
            if self.args.should_save:
                self.noise_estimate.save(output / ESTIMATE_FILE)
        if posteriors and self.label_targets is None and (folder / TARGETS_FILE).is_file():
            self.label_targets = LabelTargets.load(folder)
            if self.args.should_save:
                self.label_targets.save(output)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """As ``Trainer.get_train_dataloader``; with ``loss_correction="posterior"`` batches have posteriors [B, K]
        in the place of labels."""
        targets = self.label_targets
        if targets is None or not self._uses_posteriors:
            return super().get_train_dataloader()
        dataset, collate = self.train_dataset, self.data_collator
        if len(dataset) != len(targets.labels):  # type: ignore[arg-type]
            raise ValueError(
                f"loss_correction='posterior' was computed for {len(targets.labels)} examples, but train_dataset has "
                f"{len(dataset)}; make a new Trainer for other data"  # type: ignore[arg-type]
            )
        plain, plain_collate = self._without_unused_columns("training")
        self.train_dataset = Numbered(plain)
        self.data_collator = TargetCollator(plain_collate, targets, self.label_names[0])
        try:
            return super().get_train_dataloader()
        finally:
            self.train_dataset, self.data_collator = dataset, collate

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """As ``Trainer.training_step``; refuses labels where posteriors should be."""
        if self._uses_posteriors:
            check_posteriors(inputs.get(self.label_names[0]))
        return super().training_step(model, inputs, num_items_in_batch)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        # It looks into examples for their length.
        return super()._get_train_sampler(
            train_dataset.dataset if isinstance(train_dataset, Numbered) else train_dataset
        )
