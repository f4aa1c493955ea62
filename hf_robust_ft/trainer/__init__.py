"""The Trainer, one class a concern, each upon the last: labels, loss, constraints, radius, curvature, card, Hub,
saving."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from transformers import Trainer
from transformers.trainer_utils import TrainOutput

from ..checkpoint import last_complete_checkpoint
from ..sharding import has_shards
from .saving import SavingTrainer


class HessianRegularizedTrainer(SavingTrainer):
    """``transformers.Trainer`` for few or badly labelled examples: same signature, same methods.

    With :class:`~hf_robust_ft.RobustTrainingArguments` it corrects the loss by the noise transition
    matrix (``noise_transition``, ``loss_correction``) and keeps each layer in a ball around its
    pretrained weights (``layer_radius`` and its kin). With plain ``TrainingArguments``, or with all
    features off, it trains exactly as ``Trainer`` does.

    ``hessian_penalty`` and ``l2sp_penalty`` add to the loss what their equations in
    :class:`~hf_robust_ft.RobustTrainingArguments` say; the logged loss is without the second. With the first, every
    micro-batch passes forward and backward twice, at ``W + u`` and ``W - u``, and the weights are back at W, bit for
    bit, before anything else sees them. u is the same for all micro-batches and processes of an optimizer step; dropout
    differs between the two passes; batch norm updates its running statistics in both. Weights at W ± u may lie outside
    their balls; W does not.

    ``noise_transition="estimate"`` estimates T before the first step, from the training labels and the features
    of the frozen backbone (:func:`~hf_robust_ft.estimate_transition`): see :attr:`noise_estimate`, and
    ``transition_estimate.json`` in the output folder, which a resumed run reads again.

    ``layer_radius="auto"`` first trains once with each of a few radii, relative to the norms of the pretrained weights
    and up to no constraint, and goes on with the one that scores best on ``eval_dataset``: by clean accuracy estimated
    with T where there is a T (unless ``eval_labels="clean"``), else by accuracy on the labels as they are. Candidates
    are scored at the epoch that the run would keep: the best with ``load_best_model_at_end``, else the last. They write
    and report nothing, and of the callbacks only ``EarlyStoppingCallback`` takes part. The training that follows is the
    one that the radius gives by itself. See :attr:`radius_choice`, and ``radius_choice.json`` in the output folder,
    which a resumed run reads. It is chosen once for a Trainer; the score of the best is flattered by the choice. One
    radius has to suit all layers: free those that it does not, as in ``{"*pooler*": None, "*encoder*": "auto"}``.

    The balls are centred on the weights of the model given here (or returned by ``model_init``). The
    centres stay in memory, and lie beside the checkpoints for resuming. In a PEFT model with LoRA adapters, balls,
    penalty and curvature are those of what the adapters change in each layer, ``s B A``, around the base weights, and
    layers have the names of the merged model. Other adapters are refused where one of these is asked for.

    ``evaluate`` reports the uncorrected loss as ``eval_loss`` and, when the loss is corrected, also
    ``eval_corrected_loss``, the mean over all targets. What a mixture of experts adds for its router
    (``output_router_logits``) is part of the loss in training and of ``eval_loss``, as without a correction.

    ``metric_for_best_model="eval_clean_accuracy"`` selects on the accuracy on clean labels, estimated from noisy
    evaluation labels and ``noise_transition``: that evaluation then adds ``eval_clean_accuracy`` and the ends of its
    95 % interval, ``eval_clean_accuracy_low`` and ``_high`` (``eval_NAME_clean_accuracy`` where ``eval_dataset`` is a
    dict). With ``eval_labels="noisy"`` every evaluation does, ``evaluate(reserved, metric_key_prefix="test")``, too.
    A metric that the best epoch was chosen by is flattered by the choice: report the interval of examples that were
    used neither to train nor to select. See :func:`~hf_robust_ft.clean_accuracy` for what it assumes.

    Source: algorithm 1 of Ju, Li & Zhang, *Robust Fine-Tuning of Deep Neural Networks with Hessian-based
    Generalization Guarantees*, ICML 2022.

    Raises:
        ValueError: settings that can't work, when the Trainer is made or before the first step: see
            :class:`~hf_robust_ft.corrected_loss.CorrectedLoss` and :class:`~hf_robust_ft.LayerConstraints`.
        ReferenceMismatch: a resumed run whose reference is missing or is another one.
    """

    # Type checkers see the signature of Trainer, and so does inspect.signature, through functools.wraps.
    if not TYPE_CHECKING:

        @functools.wraps(Trainer.__init__)
        def __init__(self, *args, **kwargs):
            with self._output_explained():
                super().__init__(*args, **kwargs)
            self._set_up()

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """As ``Trainer.train``; ``resume_from_checkpoint=True`` passes over checkpoints that were cut off.

        Ctrl-C (SIGINT) lets the step finish, saves a checkpoint that the run can be resumed from, whatever
        ``save_strategy`` says, and then raises KeyboardInterrupt; a second one raises it at once. Several processes
        stop after the same step. Scripts that handle SIGINT themselves, and hyperparameter search, keep their own ways.

        Raises:
            NotWritten: ``output_dir`` can't be written to, before the first step; or a checkpoint can't be.
            KeyboardInterrupt: after Ctrl-C.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(str(self.args.output_dir))
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"No valid checkpoint found in output directory ({self.args.output_dir}): there is none, or each "
                    "was cut off while being written. Start anew with resume_from_checkpoint=None"
                )
        self._check_output()
        self._before_training(resume_from_checkpoint or None, trial)
        with self._interruptible(trial):
            output = super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        if has_shards(self._model):
            self._trained_table = self.constraint_table()
        if trial is None:
            self._measure_at_the_end()
            if self.args.push_to_hub:
                self._push_trained()
        return output
