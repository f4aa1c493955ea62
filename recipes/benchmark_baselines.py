"""Ways to train on noisy labels that the package does not offer, as trainers and as fits on frozen features.

The trainers are subclasses of ``HessianRegularizedTrainer``, so that each can be combined with what that offers. Their
options are attributes: ``trainer.options = {"alpha": 0.2}``. Written for one process and no gradient accumulation.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from cleanlab.filter import find_label_issues
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from hf_robust_ft import HessianRegularizedTrainer

Features = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]


class BaselineTrainer(HessianRegularizedTrainer):
    """With options of its own."""

    options: dict[str, float]


class MixupTrainer(BaselineTrainer):
    """Zhang et al. 2018 (arXiv 1710.09412): ``λ x + (1 - λ) x'``, λ ~ Beta(alpha, alpha), and the same of the losses.

    Texts are mixed after their token embeddings (Guo, Mao & Zhang 2019, arXiv 1905.08941).
    """

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *rest: Any) -> Tensor:
        inputs = dict(inputs)
        name = "pixel_values"
        if name not in inputs:
            ids = inputs.pop("input_ids").to(self.args.device)
            name, inputs["inputs_embeds"] = "inputs_embeds", self._embed(ids)
        x = inputs[name].to(self.args.device)
        alpha = self.options["alpha"]
        share = float(torch.distributions.Beta(alpha, alpha).sample())
        order = torch.randperm(len(x), device=x.device)
        inputs[name] = share * x + (1 - share) * x[order]
        if "attention_mask" in inputs:
            mask = inputs["attention_mask"].to(x.device)
            inputs["attention_mask"] = torch.maximum(mask, mask[order])
        inputs["mix"] = (share, order)
        return super().training_step(model, inputs, *rest)

    def _embed(self, ids: Tensor) -> Tensor:
        embedding: nn.Module = self.model.get_input_embeddings()  # type: ignore[union-attr,operator,assignment]
        found: Tensor = embedding(ids)
        return found

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **rest: Any) -> Any:
        if "mix" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, **rest)
        inputs = dict(inputs)
        (share, order), labels = inputs.pop("mix"), inputs.pop("labels")
        logits = model(**inputs).logits
        first = functional.cross_entropy(logits, labels)
        return share * first + (1 - share) * functional.cross_entropy(logits, labels[order])


class ELRTrainer(BaselineTrainer):
    """Early-learning regularization, Liu et al. 2020 (arXiv 2007.00151), equations 6 and 9.

    ``CE + weight · mean log(1 - ⟨p, t⟩)``, with t the running mean (factor 0.7) of the normalised predictions for that
    example. Examples carry their number as ``index``; ``remove_unused_columns`` must be off.
    """

    _targets: Tensor | None = None

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **rest: Any) -> Any:
        inputs = dict(inputs)
        index = inputs.pop("index")
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, **rest)
        labels = inputs.pop("labels")
        logits = model(**inputs).logits
        p = logits.softmax(-1).clamp(1e-4, 1 - 1e-4)
        if self._targets is None:
            self._targets = torch.zeros(len(self.train_dataset), p.shape[1]).to(p)  # type: ignore[arg-type]
        with torch.no_grad():
            normalised = p / p.sum(1, keepdim=True)
            self._targets[index] = 0.7 * self._targets[index] + 0.3 * normalised
        early = torch.log(1 - (self._targets[index] * p).sum(1)).mean()
        return functional.cross_entropy(logits, labels) + self.options["weight"] * early


class SAMTrainer(BaselineTrainer):
    """Sharpness-aware minimization, Foret et al. 2021 (arXiv 2010.01412): the gradient at ``w + rho g / ‖g‖``."""

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *rest: Any) -> Tensor:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        loss = super().training_step(model, inputs, *rest)
        with torch.no_grad():
            moved = [parameter for parameter in trained if parameter.grad is not None]
            gradients = [parameter.grad for parameter in moved]
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
            steps = torch._foreach_mul(gradients, self.options["rho"] / (norm + 1e-12))
            torch._foreach_add_(moved, steps)
            model.zero_grad()
        super().training_step(model, inputs, *rest)
        with torch.no_grad():
            torch._foreach_sub_(moved, steps)
        return loss


class EMATrainer(BaselineTrainer):
    """Exponential moving average of the weights, which is evaluated in their place."""

    average: AveragedModel | None = None

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *rest: Any) -> Tensor:
        # Of the weights before this step: the mean lags behind by one step.
        self._update(model)
        return super().training_step(model, inputs, *rest)

    def _update(self, model: nn.Module) -> None:
        if self.average is None:
            kind = get_ema_multi_avg_fn(self.options["decay"])
            self.average = AveragedModel(model, multi_avg_fn=kind, use_buffers=False)
        self.average.update_parameters(model)

    def evaluate(self, *arguments: Any, **named: Any) -> dict[str, float]:
        if self.average is None:
            return super().evaluate(*arguments, **named)
        own = self.model
        self.model = self.average.module.eval()
        wrapped, self.model_wrapped = self.model_wrapped, self.model
        try:
            return super().evaluate(*arguments, **named)
        finally:
            self.model, self.model_wrapped = own, wrapped


def linear_head(strength: float) -> Pipeline:
    """Logistic regression on standardised features; ``strength`` is scikit-learn's C."""
    return make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=2000))


def kept_by_cleanlab(features: Features, labels: Labels, seed: int) -> Labels:
    """Examples that confident learning (Northcutt, Jiang & Chuang 2021) keeps: cleanlab's default filter, out-of-fold
    probabilities of a linear head on frozen features."""
    folds = StratifiedKFold(5, shuffle=True, random_state=seed)
    probabilities = cross_val_predict(linear_head(0.01), features, labels, cv=folds, method="predict_proba")
    return np.flatnonzero(~find_label_issues(labels, probabilities, n_jobs=1))
