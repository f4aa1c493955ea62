"""``layer_radius="auto"``: a training with each candidate, and the choice."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import DefaultFlowCallback, EarlyStoppingCallback, TrainerControl
from transformers.trainer_callback import CallbackHandler
from transformers.trainer_utils import SaveStrategy

from ..arguments import AUTO, is_auto, with_chosen
from ..callbacks import ProjectionCallback
from ..constraints import LayerConstraints
from ..corrected_loss import loss_type
from ..data import check_dataset_labels
from ..features import make_constraints, num_classes, setting
from ..radius_search import CANDIDATES, RadiusChoice, Scores, example_scores, search_radius, validation_set
from ..radius_search import FILE as CHOICE_FILE
from ..snapshot import snapshot
from .constraints import ConstrainedTrainer

logger = logging.getLogger(__name__)


class RadiusTrainer(ConstrainedTrainer):
    """Chooses the radius; see :class:`~hf_robust_ft.HessianRegularizedTrainer`."""

    def _set_up(self) -> None:
        self.radius_choice: RadiusChoice | None = None
        """With ``layer_radius="auto"``: the radius and the scores of all candidates, once training has begun."""
        super()._set_up()
        if self._chooses_radius:
            self._validation_set()

    def _before_training(self, resumed: str | None, trial: Any) -> None:
        super()._before_training(resumed, trial)
        if not self._chooses_radius:
            return
        if trial is not None:
            raise ValueError(
                f"layer_radius='{AUTO}' is a search by itself; in hyperparameter_search let hp_space choose "
                "layer_radius, with radius_mode='relative' in the arguments"
            )
        self._choose_radius(resumed)

    def _make_constraints(self, **settings: Any) -> LayerConstraints:
        chosen = None if self.radius_choice is None else self.radius_choice.radius
        return super()._make_constraints(chosen=chosen, **settings)

    @property
    def _chooses_radius(self) -> bool:
        return is_auto(setting(self.args, "layer_radius"))

    @property
    def _is_candidate(self) -> bool:
        return self._scored_prefix is not None

    @property
    def _selected_on(self) -> str | None:
        """The prefix of the evaluation that something was chosen by: the epoch, when to stop, or the radius."""
        stops = any(isinstance(callback, EarlyStoppingCallback) for callback in self.callback_handler.callbacks)
        if not (self.args.load_best_model_at_end or stops or self.radius_choice is not None):
            return None
        named = [f"eval_{name}" for name in self.eval_dataset] if isinstance(self.eval_dataset, dict) else []
        if len(named) == 1:
            return named[0]
        metric = f"eval_{(self.args.metric_for_best_model or 'loss').removeprefix('eval_')}"
        return max((prefix for prefix in named if metric.startswith(f"{prefix}_")), key=len, default="eval")

    @property
    def _validation_noise(self) -> Any:
        """T of the labels that radii are scored on; None where they count as they are.

        An estimated T that may be singular, which will do for posteriors, has no inverse to score by; what is left is
        noisy accuracy, which ranks models as clean accuracy does under symmetric noise.
        """
        if setting(self.args, "eval_labels") == "clean":
            return None
        estimate = self._estimate
        return self._transition if estimate is None or estimate.identifiable else None

    def _validation_set(self) -> tuple[Any, str]:
        if self.model_init is None and (self.optimizer is not None or self.lr_scheduler is not None):
            raise ValueError(
                f"layer_radius='{AUTO}' trains several times, but optimizers holds an optimizer or a scheduler of one "
                "training; give optimizer_cls_and_kwargs, or choose them in the arguments (optim, lr_scheduler_type)"
            )
        dataset, prefix = validation_set(
            self.args,
            self._model,
            self.label_names,
            self.eval_dataset,
            self._validation_noise,
            self._sharded_by,
            self._awaits_shards,
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
        sibling._clean_accuracies = {}  # not this one's
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
