"""The model card: what the run and the Trainer know, gathered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..bounds import Bound, held_out_bound
from ..card import CardData, write_card
from ..card.facts import (
    data_facts,
    listed,
    merged,
    metric_facts,
    model_facts,
    noise_facts,
    run_facts,
)
from ..card.metadata import evaluation_prefixes
from ..corrected_loss import loss_type
from ..features import correction_of, num_classes, setting
from ..sharding import has_shards
from .curvature import MeasuringTrainer


class CardTrainer(MeasuringTrainer):
    """Writes the model card; see :class:`~hf_robust_ft.HessianRegularizedTrainer`."""

    def _set_up(self) -> None:
        super()._set_up()
        self.card_data = CardData()
        """What the model card says that training does not know: set what you like before the card is written."""

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
        measured here: that is :meth:`measure_hessian`'s. One process writes, and no other is waited for: of a sharded
        model, distances are those at the end of training, and none if that was not reached.
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
        if has_shards(self._model):
            table = self._trained_table or self.constraints.table(distances=False)
        else:
            table = self.constraints.table()
        found: dict[str, Any] = {
            **model_facts(self._model),
            **data_facts(self.train_dataset),
            **noise_facts(self._transition, num_classes(self._model, loss_type(self._model)), self._noise_source()),
            **run_facts(args, self.state),
            "model_name": folder.absolute().name,
            "metrics": metrics,
            "metric_labels": {prefix: self._evaluation_labels(prefix) for prefix in evaluation_prefixes(metrics)},
            "selected_by": args.metric_for_best_model if best else None,
            "correction": correction_of(args),
            "constraints": list(table) if self.constraints else [],
            "radius_choice": None if self.radius_choice is None else str(self.radius_choice),
        }
        measured, report, bounds = self._measurement_now, None, []
        if measured is not None:
            report, bounds = measured.report, list(measured.bounds)
            found |= {"risks": list(measured.risks), "reference": measured.reference}
        found["bounds"] = bounds + self._held_out_estimates()
        write_card(folder, merged(given, vars(self.card_data), found), report, self._estimate)

    def _held_out_estimates(self) -> list[Bound]:
        """By noisy labels that nothing was chosen by; of these weights."""
        return [
            held_out_bound(accuracy, f"held-out, {prefix}")
            for prefix, (accuracy, step) in self._clean_accuracies.items()
            # The best weights may be those of another step.
            if step == self.state.global_step and prefix != self._selected_on and not self.args.load_best_model_at_end
        ]

    def _noise_source(self) -> str:
        source = setting(self.args, "noise_transition")
        if self._estimates_noise:
            return "estimated from the training labels and frozen features before training"
        if isinstance(source, float):
            return f"symmetric noise of rate {source:g}, as given"
        if isinstance(source, str) and not source.lstrip().startswith("["):
            return f"read from {Path(source).name}"
        return "a matrix that was given"
