"""The curvature, measured when asked, during training or at its end, from the weights that training started from."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..curvature import HessianReport, MeasurementStopped
from ..features import setting
from ..files import NotWritten
from ..hessian_measurement import (
    EXAMPLES,
    ExampleSet,
    Measurement,
    base_weights,
    correctable,
    hessian_metrics,
    load_start,
    measure,
    record_start,
    save_start,
    start_weights,
    trained_weights,
)
from ..hessian_measurement import FILE as REPORT_FILE
from ..interruption import Interruption
from ..noisy_evaluation import estimates_clean_accuracy
from ..processes import Processes
from ..reference import ReferenceMismatch, gathered
from ..risks import Labels
from ..sharding import is_sharded, sharded_like
from ..snapshot import snapshot
from .radius import RadiusTrainer

logger = logging.getLogger(__name__)


class MeasuringTrainer(RadiusTrainer):
    """Measures the Hessian distance; see :class:`~hf_robust_ft.HessianRegularizedTrainer`."""

    def _set_up(self) -> None:
        super()._set_up()
        self._start: dict[str, Tensor] | None = None
        self._start_of = self._model
        self._saved_start: tuple[Path, str] | None = None
        self._evaluations = 0
        self._interruption = Interruption()
        self._measured: tuple[Measurement, int] | None = None

    @property
    def hessian_report(self) -> HessianReport | None:
        """What :meth:`measure_hessian` last found on training examples; None before."""
        return None if self._measured is None else self._measured[0].report

    @property
    def _measurement_now(self) -> Measurement | None:
        """Of the weights as they are."""
        measured = self._measured
        return measured[0] if measured is not None and measured[1] == self.state.global_step else None

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
        noise model, the loss is the backward-corrected one, whatever was trained; else, or where T has no inverse,
        plain cross entropy. Examples are as ``train_dataset`` gives them: the theorem wants no augmentation. All
        processes measure, a share each.

        Args:
            dataset: None: the training set, which the bounds are for. ``hessian_report.json`` in the output folder
                and the model card then hold what was found. Of other data the report is only returned.
            examples: how many, at least 1, drawn by ``args.seed``; default: ``hessian_examples``, or 500.
            time_budget: seconds for Lanczos; default: ``hessian_time_budget``.
            reference: the weights that training started from; default: those that ``hessian_examples`` kept, else
                those that the model was loaded from, read again (a new head then counts from zero).
            metric_key_prefix: of the metrics: see :func:`~hf_robust_ft.hessian_measurement.hessian_metrics`.

        Raises:
            ValueError: no examples, a model sharded by DeepSpeed or FSDP version 1, or what
                :func:`~hf_robust_ft.measure_hessian` refuses.
            ReferenceMismatch: no reference, or one of other layers or shapes.
            MeasurementStopped: an error after some examples; what was found until then is saved all the same.
            NotWritten: the report can't be saved; :attr:`hessian_report` has it.
        """
        if examples is not None and examples < 1:
            raise ValueError(
                f"examples is {examples}; give a number >= 1, or None for hessian_examples={self._hessian_examples}"
            )
        if self._sharded_by is not None:
            raise ValueError(
                f"measure_hessian does not work with {self._sharded_by}; save the model, load it in each process, and "
                "call hf_robust_ft.measure_hessian there"
            )
        _, restore = snapshot(None)
        try:
            with Processes(self.args.world_size > 1).together():
                found = self._measure(dataset, examples, time_budget, reference)
        except MeasurementStopped as error:
            if dataset is None and self.args.should_save:
                error.report.save(Path(str(self.args.output_dir)) / REPORT_FILE)
            raise
        finally:
            restore()
        if dataset is None:
            self._measured = found, self.state.global_step
        self.log(hessian_metrics(found.report, metric_key_prefix))
        if dataset is None and self.args.should_save:
            found.report.save(Path(str(self.args.output_dir)) / REPORT_FILE)
        return found.report

    def _measure(self, dataset: Any, examples: int | None, time_budget: float | None, reference: Any) -> Measurement:
        def example_set(name: str, data: Any, labels: Any) -> ExampleSet:
            columns = self._without_unused_columns("measurement", data)
            return ExampleSet(name, *columns, labels, selected_on=name == self._selected_on)

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
        # Only here: elsewhere other processes would wait for ever for one that was cut short.
        with self._interruption.at_once():
            return measure(
                model,
                weights,
                example_set("training" if dataset is None else "given", dataset, "noisy" if known else "as given"),
                [example_set(prefix, data, self._evaluation_labels(prefix)) for prefix, data in held_out.items()],
                self.label_names[0] if self.label_names else "labels",
                self.args,
                transition=correctable(model, self._transition),
                examples=self._hessian_examples if examples is None else examples,
                time_budget=setting(self.args, "hessian_time_budget") if time_budget is None else time_budget,
            )

    @property
    def _hessian_examples(self) -> int:
        return setting(self.args, "hessian_examples") or EXAMPLES

    def _evaluation_labels(self, prefix: str) -> Labels:
        """What the labels of the evaluation of this prefix are, by what the user said or the radius was chosen by."""
        if setting(self.args, "eval_labels") == "clean":
            return "clean"
        choice = self.radius_choice
        scored = choice is not None and choice.score == "clean_accuracy" and prefix == self._selected_on
        return "noisy" if scored or estimates_clean_accuracy(self.args, prefix) else "as given"

    def _keep_weights(self, untrained: bool) -> None:
        super()._keep_weights(untrained)
        self._keep_start(untrained)

    def _before_training(self, resumed: str | None, trial: Any) -> None:
        super()._before_training(resumed, trial)
        self._measured = None  # of weights that will move

    def _measure_at_the_end(self) -> None:
        if not setting(self.args, "hessian_examples") or self._is_candidate:
            return
        # Saved first: whatever becomes of the measurement, the model is there.
        self._try_to_save()
        if self._measurement_now is None or self.args.load_best_model_at_end:
            self._try_to_measure()

    def _try_to_save(self) -> None:
        """At the end: a full disk does not take the result of the training away."""
        try:
            self.save_model(_internal_call=True)
        except NotWritten as error:
            logger.error(
                "The trained model was not saved: %s. It is in memory: call trainer.save_model(), or "
                "trainer.save_model(another folder)",
                error,
            )

    def _keep_start(self, untrained: bool) -> None:
        if not setting(self.args, "hessian_examples") or self._is_candidate:
            return
        moved = self._model is self._start_of and (self._start is not None or not untrained)
        if not moved:
            self._start, self._start_of, self._saved_start = None, self._model, None  # the old ones go first
            self._start = start_weights(self._model, self.constraints.reference)

    def _try_to_measure(self) -> None:
        """At the end, or during training, which a failure must not end.

        Raises:
            KeyboardInterrupt: once what was measured is saved, unless the training itself stops for it.
        """
        interrupted = False
        try:
            # Cut short by Ctrl-C it returns what it has.
            interrupted = not self.measure_hessian().complete
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - any at all: the training is worth more
            interrupted = isinstance(error, KeyboardInterrupt)
            if isinstance(error, NotWritten) and self._measurement_now is not None:  # else it was the weights
                logger.error("%s. trainer.hessian_report has the report: trainer.hessian_report.save(path)", error)
                return
            logger.error(
                "The curvature was not measured: %s: %s. The training is unharmed. Go on with "
                "trainer.measure_hessian(), or load the model and call hf_robust_ft.measure_hessian",
                type(error).__name__,
                error,
            )
        if interrupted and not self._interruption.handles:
            raise KeyboardInterrupt("the measurement was cut short; trainer.measure_hessian() measures anew")

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics: dict[str, float] = super()._evaluate(*args, **kwargs)
        every = setting(self.args, "hessian_every")
        if every and not self._is_candidate and self.state.global_step > 0:
            self._evaluations += 1
            if self._evaluations % every == 0:
                self._try_to_measure()
        return metrics

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self._start is not None and Path(resume_from_checkpoint).is_dir():
            try:
                start = load_start(Path(resume_from_checkpoint).absolute())
                sharded = {n: p for n, p in trained_weights(self._model).items() if is_sharded(p) and n in start}
                self._start = start | {name: sharded_like(start[name], p) for name, p in sharded.items()}
            except ReferenceMismatch as error:
                self._start = None
                logger.warning("%s; the curvature will be measured from the weights of the base model", error)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self._start is not None:
            run = Path(self._get_output_dir(trial))
            if self._saved_start is None or self._saved_start[0] != run:
                start = gathered(self._start, keep=self.args.should_save)
                self._saved_start = run, save_start(start, run) if self.args.should_save else ""
            if self.args.should_save:
                record_start(self._saved_start[1], run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        super()._save_checkpoint(model, trial)
