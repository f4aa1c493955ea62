"""The Trainer: wires the corrected loss, the constraints and the checkpoints into ``transformers.Trainer``."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import torch
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import DefaultFlowCallback, EarlyStoppingCallback, Trainer, TrainerControl
from transformers.trainer_callback import CallbackHandler
from transformers.trainer_utils import (
    PREFIX_CHECKPOINT_DIR,
    EvalLoopOutput,
    SaveStrategy,
    TrainOutput,
)

from .arguments import AUTO, ESTIMATE, is_auto, with_chosen
from .callbacks import ProjectionCallback
from .card import CardData, write_card
from .card.facts import (
    data_facts,
    evaluation_prefixes,
    listed,
    merged,
    metric_facts,
    model_facts,
    noise_facts,
    run_facts,
)
from .checkpoint import ConstraintRecord, last_complete_checkpoint
from .clean_accuracy import CleanAccuracy, clean_accuracy
from .constraints import ConstraintTable, LayerConstraints
from .corrected_loss import CorrectedLoss, loss_type, with_loss_first
from .curvature import HessianReport, MeasurementStopped
from .data import check_dataset_labels
from .estimation import TransitionEstimate
from .features import correction_of, make_constraints, make_corrected_loss, num_classes, requires_argument, setting
from .hessian_measurement import (
    EXAMPLES,
    ExampleSet,
    Measurement,
    base_weights,
    by_first_process,
    hessian_metrics,
    load_start,
    measure,
    record_start,
    save_start,
    start_weights,
)
from .hessian_measurement import FILE as REPORT_FILE
from .label_targets import FILE as TARGETS_FILE
from .label_targets import LabelTargets, Numbered, TargetCollator, check_posteriors
from .noise import load_transition
from .noise_estimate import FILE as ESTIMATE_FILE
from .noise_estimate import check_estimable, saved_estimate, study_labels
from .noisy_evaluation import (
    clean_accuracy_metrics,
    estimates_clean_accuracy,
    labels_and_predictions,
    make_noisy_evaluation,
    noisy_datasets,
)
from .penalized_step import penalized_step
from .radius_search import CANDIDATES, RadiusChoice, Scores, example_scores, search_radius, validation_set
from .radius_search import FILE as CHOICE_FILE
from .reference import ReferenceMismatch, load_reference, reference_digest, save_reference
from .snapshot import snapshot

logger = logging.getLogger(__name__)


class HessianRegularizedTrainer(Trainer):
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
    centres stay in memory, and lie beside the checkpoints for resuming.

    ``evaluate`` reports the uncorrected loss as ``eval_loss`` and, when the loss is corrected, also
    ``eval_corrected_loss``, the mean over all targets.

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
            super().__init__(*args, **kwargs)
            self._set_up()

    def _set_up(self) -> None:
        self._corrected: CorrectedLoss | None = None
        self._own_label_names = self.label_names
        self._evaluated: list[Tensor] | None = None
        self._predicted: list[tuple[Tensor, int]] | None = None
        self._saved_reference: tuple[Path, LayerConstraints] | None = None
        # Of a candidate of the radius search: what it is scored on, and its predictions, last and at its best epoch.
        self._scored_prefix: str | None = None
        self._scored: tuple[Any, int] | None = None
        self._best_scored: tuple[Any, int] | None = None
        self.radius_choice: RadiusChoice | None = None
        """With ``layer_radius="auto"``: the radius and the scores of all candidates, once training has begun."""
        self.noise_estimate: TransitionEstimate | None = None
        """With ``noise_transition="estimate"``: T and its uncertainty, once training or evaluation has begun."""
        self._estimate_was_read = False
        self.label_targets: LabelTargets | None = None
        """With ``loss_correction="posterior"``: what is trained on, once training has begun."""
        self._start: dict[str, Tensor] | None = None
        self._start_of = self._model
        self._saved_start: tuple[Path, str] | None = None
        self._evaluations = 0
        self.card_data = CardData()
        """What the model card says that training does not know: set what you like before the card is written."""
        self._measured: tuple[Measurement, int] | None = None
        self._set_up_correction()
        self._set_up_noisy_evaluation()
        self._check_estimable()
        if self._chooses_radius:
            self._validation_set()
        self._constrained_model = self._model
        self._projection = ProjectionCallback(self._make_constraints(sharded_by=self._sharded_by))
        # First of all callbacks, so that others see projected weights after a step.
        self.callback_handler.callbacks.insert(0, self._projection)

    @property
    def _model(self) -> nn.Module:
        assert self.model is not None  # Trainer's own annotation leaves it open until __init__ ends
        return self.model

    @property
    def constraints(self) -> LayerConstraints:
        """The balls around the layers; none of them if ``layer_radius`` is None."""
        return self._projection.constraints

    def constraint_table(self) -> ConstraintTable:
        """Every trained parameter: its centre, radius, norm and distance now, or why it is free."""
        return self.constraints.table()

    # Before training

    def _hp_search_setup(self, trial: Any) -> None:
        """Settings are read here: train() calls this after model_init and before it loads a checkpoint."""
        super()._hp_search_setup(trial)
        self._study_labels(posteriors=self._uses_posteriors)
        self._set_up_correction()
        self._set_up_noisy_evaluation()
        self._set_up_constraints()
        self._keep_start()
        if self._corrected is not None and (classes := self._corrected.num_classes) is not None:
            check_dataset_labels(self.train_dataset, self.data_collator, self.label_names[0], classes)
        self._check_noisy_labels()

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
    def _uses_posteriors(self) -> bool:
        return bool(correction_of(self.args) == "posterior")

    def _check_estimable(self) -> None:
        asked = f"noise_transition='{ESTIMATE}'" if self._estimates_noise else "loss_correction='posterior'"
        if self._estimates_noise or self._uses_posteriors:
            check_estimable(self._model, self.train_dataset, self.label_names, asked, self.args.world_size)

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
        found = study_labels(
            self._model,
            dataset,
            collate,
            self.label_names[0],
            num_classes(self._model, loss_type(self._model)),
            self.args,
            transition=None if estimate else self._transition,
            posteriors=posteriors,
        )
        self.noise_estimate = found.estimate or self.noise_estimate
        self.label_targets = found.targets or self.label_targets

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

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        # It looks into examples for their length.
        return super()._get_train_sampler(
            train_dataset.dataset if isinstance(train_dataset, Numbered) else train_dataset
        )

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

    def _set_up_constraints(self) -> None:
        build = functools.partial(self._make_constraints, sharded_by=self._sharded_by)
        if self._model is self._constrained_model:
            # Weights that have moved are no centre: a second train() of one model keeps the first one's.
            untrained = self.state.global_step == 0
            before = self.constraints
            constraints = build(reference=before.reference, capture_missing=untrained, fresh=before.fresh)
        else:
            self._drop_constraints()
            self._constrained_model = self._model
            constraints = build()
        if constraints and self.args.world_size > 1:
            # A head that each process initialised by itself; DDP, too, starts from that of process 0.
            same = {name: broadcast(centre) for name, centre in constraints.reference.items()}
            constraints = build(reference=same, fresh=constraints.fresh)
        self._projection.constraints = constraints

    def _make_constraints(self, **settings: Any) -> LayerConstraints:
        chosen = None if self.radius_choice is None else self.radius_choice.radius
        return make_constraints(self.args, self._model, chosen=chosen, **settings)

    def _drop_constraints(self) -> None:
        """The old centres go before new ones come: memory for one copy is enough."""
        self._projection.constraints = LayerConstraints(self._model, None)

    @property
    def _sharded_by(self) -> str | None:
        if self.is_deepspeed_enabled:
            return "DeepSpeed"
        # Asked for but ignored (as on a CPU) counts, too: the run would not be the one that was meant.
        return "FSDP" if self.is_fsdp_enabled or self.args.fsdp else None

    # The radius

    @property
    def _chooses_radius(self) -> bool:
        return is_auto(setting(self.args, "layer_radius"))

    @property
    def _validation_noise(self) -> Any:
        """T of the labels that radii are scored on; None where they count as they are."""
        return None if setting(self.args, "eval_labels") == "clean" else self._transition

    def _validation_set(self) -> tuple[Any, str]:
        if self.model_init is None and (self.optimizer is not None or self.lr_scheduler is not None):
            raise ValueError(
                f"layer_radius='{AUTO}' trains several times, but optimizers holds an optimizer or a scheduler of one "
                "training; give optimizer_cls_and_kwargs, or choose them in the arguments (optim, lr_scheduler_type)"
            )
        dataset, prefix = validation_set(
            self.args, self._model, self.label_names, self.eval_dataset, self._validation_noise, self._sharded_by
        )
        if (classes := num_classes(self._model, loss_type(self._model))) is not None:
            name = self.label_names[0]
            check_dataset_labels(dataset, self.data_collator, name, classes, argument="eval_dataset")
        return dataset, prefix

    def _choose_radius(self, resumed: str | None) -> None:
        """Once: by training with each candidate from the weights and the random numbers that training starts from."""
        if self.radius_choice is not None:
            return
        if resumed is not None:
            self.radius_choice = RadiusChoice.load(Path(resumed).absolute().parent / CHOICE_FILE)
            return
        dataset, prefix = self._validation_set()
        self._study_labels(posteriors=self._uses_posteriors)
        self._set_up_correction()
        self._set_up_noisy_evaluation()
        # With model_init each candidate makes its own model.
        weights, restore = snapshot(self._model if self.model_init is None else None)

        def train_and_score(radius: float) -> Scores:
            try:
                return self._train_candidate(radius, weights, dataset, prefix)
            finally:
                restore()

        logger.warning(
            "layer_radius='%s' trains with %d radii before the training itself, which makes it %d times as long; "
            "give a radius to do without",
            AUTO,
            len(CANDIDATES),
            len(CANDIDATES) + 1,
        )
        self.radius_choice = search_radius(
            train_and_score,
            score="accuracy" if self._validation_noise is None else "clean_accuracy",
            seed=self.args.seed,
            candidates=CANDIDATES,
            show_progress=not self.args.disable_tqdm and self.is_world_process_zero(),
        )
        if self.args.should_save:
            self.radius_choice.save(Path(str(self.args.output_dir)) / CHOICE_FILE)

    def _train_candidate(self, radius: float, weights: dict[str, Tensor], dataset: Any, prefix: str) -> Scores:
        """Train this model with a radius, which leaves no trace but in its weights, and score it.

        A sibling trains, that shares all but what a training changes. Where the run keeps its best epoch
        (``load_best_model_at_end``), the sibling is scored at its own, by the same metric, else at the last.
        """
        sibling = copy.copy(self)
        sibling.args = copy.copy(self.args)
        # It evaluates when the run will: early stopping and some schedules hang on that, and it draws random numbers.
        changes: dict[str, Any] = {
            "layer_radius": with_chosen(setting(self.args, "layer_radius"), radius),
            "radius_mode": "relative",
            "save_strategy": SaveStrategy.NO,
            "load_best_model_at_end": False,
            "push_to_hub": False,
            "report_to": [],
        }
        vars(sibling.args).update(changes)
        # Of the user's callbacks only those that stop early: the others may write, count or report.
        stopping = [c for c in self.callback_handler.callbacks if isinstance(c, EarlyStoppingCallback)]
        constraints = self.constraints
        if self.model_init is None:  # else its own model will have its own
            # The copy that the weights are restored from serves as the centres: no second one is made.
            centres = weights if self.state.global_step == 0 else constraints.reference
            constraints = make_constraints(
                sibling.args, self._model, sharded_by=self._sharded_by, reference=centres, fresh=constraints.fresh
            )
        sibling._projection = ProjectionCallback(constraints)
        sibling.callback_handler = CallbackHandler(  # type: ignore[no-untyped-call]
            [sibling._projection, DefaultFlowCallback(), *copy.deepcopy(stopping)],
            self.model,
            self.processing_class,
            None,
            None,
        )
        sibling.control = TrainerControl()
        sibling._scored_prefix = prefix
        sibling.train()
        scored = sibling._best_scored if self.args.load_best_model_at_end else None
        if scored is None:
            sibling.compute_metrics = None
            sibling.evaluate(dataset, metric_key_prefix=prefix)
            scored = sibling._scored
        if scored is None:
            raise ValueError(
                f"layer_radius='{AUTO}' needs labels, but a batch of eval_dataset has no '{self.label_names[0]}'; name "
                "their column with label_names"
            )
        pairs, classes = scored
        labels, predictions = pairs.numpy().T
        return example_scores(labels, predictions, self._validation_noise, classes)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        is_best = super()._determine_best_metric(metrics, trial)
        if is_best:
            self._best_scored = self._scored
        return is_best

    # The loss

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """As ``Trainer.training_step``, with the penalties: see :func:`~hf_robust_ft.penalized_step.penalized_step`."""
        if self._uses_posteriors:
            check_posteriors(inputs.get(self.label_names[0]))
        step = functools.partial(super().training_step, model, inputs, num_items_in_batch)
        return penalized_step(self, model, self.constraints, step)

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
        if self._evaluated is not None:
            self.compute_loss_func = corrected.plain
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
                metrics.update(clean_accuracy_metrics(self._clean_accuracy(), metric_key_prefix, metrics))
        finally:
            self._evaluated, self._predicted = outer
        return output

    def _clean_accuracy(self) -> CleanAccuracy:
        assert self._predicted  # what is called only then
        labels, predictions = torch.cat([pairs for pairs, _ in self._predicted]).numpy().T
        source = setting(self.args, "noise_transition")
        estimate = self.noise_estimate if self._estimates_noise else saved_estimate(source)
        draws = None if estimate is None else estimate.draws
        transition = load_transition(self._noise, self._predicted[0][1])
        return clean_accuracy(predictions, labels, transition, transition_samples=draws)

    # The curvature

    @property
    def hessian_report(self) -> HessianReport | None:
        """What :meth:`measure_hessian` last found on training examples; None before."""
        return None if self._measured is None else self._measured[0].report

    def measure_hessian(
        self,
        dataset: Any = None,
        *,
        examples: int | None = None,
        time_budget: float | None = None,
        reference: dict[str, Tensor] | nn.Module | None = None,
        metric_key_prefix: str = "train",
    ) -> HessianReport:
        """Measure the Hessian distance measure of the weights as they are now, and log it.

        ``hessian_examples`` makes training end with this. Labels are taken as training took them: where there is a
        noise model, the loss is the backward-corrected one, whatever was trained; else plain cross entropy. Examples
        are as ``train_dataset`` gives them: the theorem wants no augmentation. One process measures, the others wait.

        Args:
            dataset: None: the training set, which the bounds are for. ``hessian_report.json`` in the output folder
                and the model card then hold what was found. Of other data the report is only returned.
            examples: how many, drawn by ``args.seed``; default: ``hessian_examples``, or 500.
            time_budget: seconds for Lanczos; default: ``hessian_time_budget``.
            reference: the weights that training started from; default: those that ``hessian_examples`` kept, else
                those that the model was loaded from, read again (a new head then counts from zero).
            metric_key_prefix: of the metrics: see :func:`~hf_robust_ft.hessian_measurement.hessian_metrics`.

        Raises:
            ValueError: a sharded model, or what :func:`~hf_robust_ft.measure_hessian` refuses.
            ReferenceMismatch: no reference, or one of other layers or shapes.
            MeasurementStopped: an error after some examples; what was found until then is saved all the same.
        """
        if self._sharded_by is not None:
            raise ValueError(
                f"measure_hessian does not work with {self._sharded_by}, as no process holds a whole layer; save the "
                "model, load it in one process, and call hf_robust_ft.measure_hessian there"
            )
        try:
            found = by_first_process(lambda: self._measure(dataset, examples, time_budget, reference), self.args)
        except MeasurementStopped as error:
            if dataset is None and self.args.should_save:
                error.report.save(Path(str(self.args.output_dir)) / REPORT_FILE)
            raise
        if dataset is None:
            self._measured = found, self.state.global_step
            if self.args.should_save:
                found.report.save(Path(str(self.args.output_dir)) / REPORT_FILE)
        self.log(hessian_metrics(found.report, metric_key_prefix))
        return found.report

    def _measure(self, dataset: Any, examples: int | None, time_budget: float | None, reference: Any) -> Measurement:
        def example_set(name: str, data: Any, labels: Any) -> ExampleSet:
            return ExampleSet(name, *self._without_unused_columns("measurement", data), labels)

        model, known = self._model, self._transition is not None
        if reference is not None:
            weights = (
                reference.state_dict() if isinstance(reference, nn.Module) else reference,
                "weights that were given",
            )
        elif self._start is not None and self._start_of is model:
            weights = self._start, "the weights that training started from"
        else:
            weights = base_weights(model)
        held_out: dict[str, Any] = {}
        evaluated: Any = self.eval_dataset if dataset is None else None
        if isinstance(evaluated, dict):
            held_out = {f"eval_{name}": data for name, data in evaluated.items()}
        elif evaluated is not None:
            held_out = {"eval": evaluated}
        noisy = {prefix: estimates_clean_accuracy(self.args, prefix) for prefix in held_out}
        return measure(
            model,
            weights,
            example_set("training" if dataset is None else "given", dataset, "noisy" if known else "as given"),
            [
                example_set(prefix, data, ("noisy" if noisy[prefix] else "clean") if known else "as given")
                for prefix, data in held_out.items()
            ],
            self.label_names[0] if self.label_names else "labels",
            self.args,
            transition=self._transition,
            examples=examples or setting(self.args, "hessian_examples") or EXAMPLES,
            time_budget=setting(self.args, "hessian_time_budget") if time_budget is None else time_budget,
        )

    def _keep_start(self) -> None:
        if not setting(self.args, "hessian_examples") or self._scored_prefix is not None:
            return
        moved = self._model is self._start_of and (self._start is not None or self.state.global_step > 0)
        if not moved:
            self._start, self._start_of, self._saved_start = None, self._model, None  # the old ones go first
            self._start = start_weights(self._model, self.constraints.reference)

    def _try_to_measure(self) -> None:
        """At the end, or during training, which a failure must not end."""
        try:
            self.measure_hessian()
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - any at all: the training is worth more
            logger.error(
                "The curvature was not measured: %s: %s. The training is unharmed. Go on with "
                "trainer.measure_hessian(), or load the model and call hf_robust_ft.measure_hessian",
                type(error).__name__,
                error,
            )

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics: dict[str, float] = super()._evaluate(*args, **kwargs)
        every = setting(self.args, "hessian_every")
        if every and self._scored_prefix is None and self.state.global_step > 0:
            self._evaluations += 1
            if self._evaluations % every == 0:
                self._try_to_measure()
        return metrics

    # The card

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """Write ``README.md`` with what was measured, its pictures, and the JSON that it is made from.

        The signature is ``Trainer``'s; what it has no argument for is set in :attr:`card_data` before. Nothing is
        measured here: that is :meth:`measure_hessian`'s. One process writes, and no other is waited for.
        """
        if not self.is_world_process_zero():
            return
        given = {
            "language": listed(language),
            "license": license,
            "tags": listed(tags),
            "model_name": model_name,
            "base_model": finetuned_from,
            "tasks": listed(tasks),
            "datasets": listed(dataset) or listed(dataset_tags),
            "dataset_ids": listed(dataset_tags),
            "dataset_args": listed(dataset_args),
        }
        args, folder = self.args, Path(str(self.args.output_dir))
        best = bool(args.load_best_model_at_end)
        metrics = metric_facts(self.state, best=best)
        known = self._transition is not None
        found: dict[str, Any] = {
            **model_facts(self._model),
            **data_facts(self.train_dataset),
            **noise_facts(self._transition, num_classes(self._model, loss_type(self._model)), self._noise_source()),
            **run_facts(args, self.state),
            "model_name": folder.absolute().name,
            "metrics": metrics,
            "metric_labels": {
                prefix: "noisy" if estimates_clean_accuracy(args, prefix) else "clean"
                for prefix in evaluation_prefixes(self.eval_dataset, metrics)
                if known
            },
            "selected_by": args.metric_for_best_model if best else None,
            "correction": correction_of(args),
            "constraints": list(self.constraint_table()) if self.constraints else [],
            "radius_choice": None if self.radius_choice is None else str(self.radius_choice),
        }
        if self._measured is not None and self._measured[1] == self.state.global_step:
            measured = self._measured[0]
            found |= {"bounds": list(measured.bounds), "risks": list(measured.risks), "reference": measured.reference}
            report: HessianReport | None = measured.report
        else:
            report = None
        source = setting(args, "noise_transition")
        estimate = self.noise_estimate if self._estimates_noise else saved_estimate(source)
        write_card(folder, merged(given, vars(self.card_data), found), report, estimate)

    def _noise_source(self) -> str:
        source = setting(self.args, "noise_transition")
        if self._estimates_noise:
            return "estimated from the training labels and frozen features before training"
        if isinstance(source, float):
            return f"symmetric noise of rate {source:g}, as given"
        return f"read from {Path(source).name}" if isinstance(source, str) else "a matrix that was given"

    # Checkpoints

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """As ``Trainer.train``; ``resume_from_checkpoint=True`` passes over checkpoints that were cut off."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(str(self.args.output_dir))
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"No valid checkpoint found in output directory ({self.args.output_dir}): there is none, or each "
                    "was cut off while being written. Start anew with resume_from_checkpoint=None"
                )
        if self._estimate_was_read:
            # An evaluation took it from the output folder, where a run on other data may have left it.
            self.noise_estimate, self._estimate_was_read = None, False
        if resume_from_checkpoint:
            # The model may be that of a checkpoint: then its features are no longer those that these came from.
            self._read_study(Path(resume_from_checkpoint).absolute().parent, posteriors=self._uses_posteriors)
        if self._chooses_radius:
            if trial is not None:
                raise ValueError(
                    f"layer_radius='{AUTO}' is a search by itself; in hyperparameter_search let hp_space choose "
                    "layer_radius, with radius_mode='relative' in the arguments"
                )
            self._choose_radius(resume_from_checkpoint or None)
        self._measured = None  # of weights that will move
        output = super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        if setting(self.args, "hessian_examples") and trial is None and self._scored_prefix is None:
            # Saved first: whatever becomes of the measurement, the model is there.
            self.save_model(_internal_call=True)
            measured_now = self._measured is not None and self._measured[1] == self.state.global_step
            if not measured_now or self.args.load_best_model_at_end:
                self._try_to_measure()
        return output

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """None beyond ``max_steps``: Trainer resumes a run that is finished within an epoch with one step more."""
        finished = 0 < self.state.max_steps <= self.state.global_step
        if finished and (self.constraints or self._corrected is not None or setting(self.args, "hessian_penalty")):
            return [], None
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        # Before the weights are read: a resume that is refused leaves the model, and so the next centres, as they were.
        if self.constraints and Path(resume_from_checkpoint).is_dir():
            self._restore_constraints(Path(resume_from_checkpoint).absolute())
        if self._start is not None and Path(resume_from_checkpoint).is_dir():
            try:
                self._start = load_start(Path(resume_from_checkpoint).absolute())
            except ReferenceMismatch as error:
                self._start = None
                logger.warning("%s; the curvature will be measured from the weights of the base model", error)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _restore_constraints(self, checkpoint: Path) -> None:
        record = ConstraintRecord.load(checkpoint)
        self._drop_constraints()
        reference = load_reference(checkpoint.parent, record.reference_sha256)
        self._projection.constraints = self._make_constraints(reference=reference, fresh=record.fresh)
        if record.radius_norm != self.constraints.norm or record.radii != self.constraints.radii:
            logger.warning("the radii differ from those of the checkpoint; training goes on with the new ones")

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.constraints and self.args.should_save:
            # First the reference, then the record that names it, then the checkpoint, whose
            # trainer_state.json comes last: whatever is complete can be resumed.
            run, constraints = Path(self._get_output_dir(trial)), self.constraints
            if self._saved_reference != (run, constraints):
                save_reference(constraints.reference, run)
                self._saved_reference = (run, constraints)
                self._reference_digest = reference_digest(constraints.reference)
            record = ConstraintRecord(self._reference_digest, constraints.norm, constraints.radii, constraints.fresh)
            record.save(run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self._start is not None and self.args.should_save:
            run = Path(self._get_output_dir(trial))
            if self._saved_start is None or self._saved_start[0] != run:
                self._saved_start = run, save_start(self._start, run)
            record_start(self._saved_start[1], run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        super()._save_checkpoint(model, trial)
