"""The corrected loss in training, and in evaluation the clean accuracy that noisy labels tell of."""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput

from ..clean_accuracy import CleanAccuracy, clean_accuracy
from ..corrected_loss import CorrectedLoss, with_loss_first
from ..data import check_dataset_labels
from ..features import make_corrected_loss, requires_argument
from ..noise import load_transition
from ..noise_estimate import FILE as ESTIMATE_FILE
from ..noisy_evaluation import (
    clean_accuracy_metrics,
    estimates_clean_accuracy,
    labels_and_predictions,
    make_noisy_evaluation,
    noisy_datasets,
)
from ..withheld_labels import router_loss, with_decoder_inputs
from .labels import LabelTrainer

logger = logging.getLogger(__name__)


class CorrectedTrainer(LabelTrainer):
    """Corrects the loss by T; see :class:`~hf_robust_ft.HessianRegularizedTrainer`."""

    def _set_up(self) -> None:
        super()._set_up()
        self._corrected: CorrectedLoss | None = None
        self._evaluated: list[Tensor] | None = None
        self._predicted: list[tuple[Tensor, int]] | None = None
        # Of a candidate of the radius search: what it is scored on, and its predictions, last and at its best epoch.
        self._scored_prefix: str | None = None
        self._scored: tuple[Any, int] | None = None
        self._best_scored: tuple[Any, int] | None = None
        # Of the last evaluation under each prefix, and the step that it was made at.
        self._clean_accuracies: dict[str, tuple[CleanAccuracy, int]] = {}
        self._set_up_correction()
        self._set_up_noisy_evaluation()
        if self.train_dataset is not None:  # else it is for evaluation, or train() will refuse it
            self._check_estimable()

    def _before_training(self, resumed: str | None, trial: Any) -> None:
        super()._before_training(resumed, trial)
        self._clean_accuracies.clear()  # of weights that will move

    def _hp_search_setup(self, trial: Any) -> None:
        super()._hp_search_setup(trial)
        self._set_up_correction()
        self._set_up_noisy_evaluation()
        if self._corrected is not None and (classes := self._corrected.num_classes) is not None:
            check_dataset_labels(self.train_dataset, self.data_collator, self.label_names[0], classes)
        self._check_noisy_labels()

    def _set_up_correction(self) -> None:
        if self._corrected is None or self.compute_loss_func is not self._corrected:
            self._user_loss = self.compute_loss_func
        self.label_names = self._own_label_names
        self._corrected = make_corrected_loss(
            self.args, self._transition, self._model, self.label_names, self._user_loss
        )
        self.compute_loss_func = self._user_loss if self._corrected is None else self._corrected
        if self._corrected is not None:
            # A model without a label argument: default_data_collator calls the column this.
            self.label_names = self.label_names or ["labels"]
            self._model_requires_labels = requires_argument(self._model, self.label_names[0])

    def _set_up_noisy_evaluation(self) -> None:
        self._noise = make_noisy_evaluation(
            self.args, self._transition, self._model, self.label_names, self.compute_metrics, self.eval_dataset
        )

    def _check_noisy_labels(self) -> None:
        if self._noise is None:
            return
        for argument, dataset in noisy_datasets(self.args, self.eval_dataset).items():
            if not isinstance(self._noise, float):  # else only the logits will tell the number of classes
                name, classes = self.label_names[0], len(self._noise)
                check_dataset_labels(dataset, self.data_collator, name, classes, argument=argument)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """As ``Trainer.compute_loss``, which calls the corrected loss; here its surroundings are fitted to it.

        Models that name their labels otherwise, that can't do without labels, or that return a tensor or a
        tuple without a loss, then train and evaluate as transformers' own do. A subclass that overrides this
        method has the correction only if it calls it.
        """
        corrected = self._corrected
        if corrected is None:
            if self._predicted is None:
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            labels = inputs[self.label_names[0]]  # label smoothing takes them out
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            self._keep_predictions(outputs, labels)
            return (loss, outputs) if return_outputs else loss
        labels = inputs.get(self.label_names[0])
        if labels is None:
            raise ValueError(
                f"a corrected loss needs '{self.label_names[0]}', but the batch has {', '.join(inputs)}; name the "
                "column of the labels with label_names"
            )
        inputs = {**inputs, "labels": labels}
        if self.label_names[0] != "labels":
            del inputs[self.label_names[0]]
        if self._model_requires_labels:
            classes = labels.argmax(-1) if labels.is_floating_point() else labels  # posteriors
            model = functools.partial(model, **{self.label_names[0]: classes})  # type: ignore[assignment]
        else:
            inputs = with_decoder_inputs(self._model, inputs)
        self.compute_loss_func = self._loss_of_batch
        try:
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        finally:
            self.compute_loss_func = corrected
        if self.args.n_gpu > 1 and num_items_in_batch is not None:
            # DataParallel: Trainer makes up for replicas that each see a part, but these logits are gathered.
            loss = loss / self.args.n_gpu
        if self._evaluated is not None:
            pair = torch.stack(corrected.per_example(outputs, labels), dim=1)
            self._evaluated.append(self.accelerator.gather_for_metrics(pair).cpu())
        if self._predicted is not None:
            self._keep_predictions(outputs, labels)
        return (loss, with_loss_first(outputs, loss)) if return_outputs else loss

    def _loss_of_batch(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """The corrected loss, or the plain one in evaluation, and what the model adds to either."""
        assert self._corrected is not None  # what is called only then
        function = self._corrected if self._evaluated is None else self._corrected.plain
        loss, added = function(outputs, labels, num_items_in_batch), router_loss(self._model, outputs)
        return loss if added is None else loss + added.to(loss.device)

    def _keep_predictions(self, outputs: Any, labels: Tensor) -> None:
        assert self._predicted is not None  # what is called only then
        pairs, classes = labels_and_predictions(outputs, labels)
        self._predicted.append((self.accelerator.gather_for_metrics(pairs).cpu(), classes))

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """Counts what the corrected loss sums over: renamed labels, too, and no first token of a language model."""
        if self._corrected is not None:
            # Some releases shift by themselves, for some of the language models.
            first = int(self._corrected.shift and not getattr(self, "_loss_shifts_labels", False))
            name = self.label_names[0]
            labels = [batch[name] for batch in batch_samples if name in batch]
            # Of posteriors, one number an example.
            labels = [x[..., 0] if x.is_floating_point() else x[..., first:] for x in labels]
            batch_samples = [{"labels": x} for x in labels]
        return super()._get_num_items_in_batch(batch_samples, device)

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As ``Trainer.evaluation_loop``, with ``{prefix}_corrected_loss`` beside the plain ``{prefix}_loss``, and
        ``{prefix}_clean_accuracy`` with its interval where that is asked for.

        Both come from the outputs as the loss sees them: neither ``compute_metrics`` nor gathered logits are needed,
        and ``preprocess_logits_for_metrics``, ``batch_eval_metrics`` and ``prediction_loss_only`` make no difference.
        """
        if self._estimates_noise and self.noise_estimate is None:
            self._read_study(Path(str(self.args.output_dir)), posteriors=False)
            if self.noise_estimate is not None:
                self._estimate_was_read = True
                logger.warning("T is read from %s in output_dir: remove it if it is of other data", ESTIMATE_FILE)
            else:
                logger.warning(
                    "T is estimated from the features of the model as it is now: if it was trained on these labels, "
                    "they look clean to it. Give noise_transition the path of the estimate made before training"
                )
            self._study_labels(posteriors=False)
            self._set_up_correction()
            self._set_up_noisy_evaluation()
        outer = self._evaluated, self._predicted  # compute_metrics may itself predict
        self._evaluated = [] if self._corrected is not None else None
        asked = self._noise is not None and estimates_clean_accuracy(self.args, metric_key_prefix)
        scored = self._scored_prefix == metric_key_prefix
        self._predicted = [] if asked or scored else None
        try:
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
            metrics = output.metrics
            assert metrics is not None  # Trainer always fills them
            if self._evaluated:
                losses, targets = torch.cat(self._evaluated).double().sum(0).tolist()
                metrics[f"{metric_key_prefix}_corrected_loss"] = losses / max(targets, 1)
            if self._predicted and scored:
                self._scored = torch.cat([pairs for pairs, _ in self._predicted]), self._predicted[0][1]
            if self._predicted and asked:
                found = self._clean_accuracy()
                metrics.update(clean_accuracy_metrics(found, metric_key_prefix, metrics))
                self._clean_accuracies[metric_key_prefix] = found, self.state.global_step
        finally:
            self._evaluated, self._predicted = outer
        return output

    def _clean_accuracy(self) -> CleanAccuracy:
        assert self._predicted  # what is called only then
        labels, predictions = torch.cat([pairs for pairs, _ in self._predicted]).numpy().T
        estimate = self._estimate
        draws = None if estimate is None else estimate.draws
        transition = load_transition(self._noise, self._predicted[0][1])
        return clean_accuracy(predictions, labels, transition, transition_samples=draws)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        is_best = super()._determine_best_metric(metrics, trial)
        if is_best:
            self._best_scored = self._scored
        return is_best
