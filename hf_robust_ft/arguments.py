"""``TrainingArguments`` with the few settings of robust fine-tuning."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from transformers import TrainingArguments

from .stored import checked, parse_json

LOSS_CORRECTIONS = ("none", "forward", "backward", "nonnegative_backward", "posterior", "gce")
RADIUS_NORMS = ("frobenius", "inf_op")
RADIUS_MODES = ("absolute", "relative")
EVAL_LABELS = ("noisy", "clean")
AUTO = "auto"
MOST = 2**63 - 1
ESTIMATE = "estimate"


# HfArgumentParser takes the second member of these unions, str, as the type on the command line;
# __post_init__ turns what it reads into the others.
@dataclass
class RobustTrainingArguments(TrainingArguments):
    """Arguments of :class:`~hf_robust_ft.HessianRegularizedTrainer`, beside those of ``TrainingArguments``.

    ``hessian_penalty`` is the standard deviation σ of noise-stability optimization (Zhang, Li & Ju 2024, arXiv
    2306.08553, algorithm 1 with one pair of points), as in the authors' scripts, where it is 0.008 to 0.012. The loss
    trained is

        E_u[½ (ℓ(W + u) + ℓ(W - u))] = ℓ(W) + σ²/2 · tr H(W) + O(σ⁴),    u ~ N(0, σ² I),

    so the factor of the penalty is σ²/2, and twice the number is four times the penalty. As in the authors' code, W is
    every trained parameter (biases and norms, too), in absolute units, whatever the size of a layer's weights.

    ``l2sp_penalty`` is λ in ``λ/2 Σ_i ‖W_i - W_i^ref‖_F²`` (L2-SP: Li, Grandvalet & Davoine 2018, arXiv 1802.01483),
    over the layers that ``layer_radius`` as one number would constrain: the pretrained weight matrices. A new head is
    free, where the paper has a weight decay on it; ``weight_decay`` pulls every matrix to zero, against this penalty.
    It is a term of the loss: the gradient that is clipped, and that an adaptive optimizer divides by its size, has it.

    Raises:
        ValueError: a value out of range or of the wrong type, when the object is made.
    """

    noise_transition: float | str | list[list[float]] | None = field(
        default=None,
        metadata={
            "help": "Label noise T with T[i, j] = P(noisy label = j | true label = i): a symmetric rate (0.4), a "
            "path to .npy or .json, the matrix as JSON, or 'estimate': before training, from the training labels and "
            "features of the frozen backbone. None: no noise model."
        },
    )
    loss_correction: str | None = field(
        default=None,
        metadata={
            "help": "How T corrects the cross entropy: 'forward' (stable), 'backward' (unbiased for the clean loss, "
            "but unbounded below), 'nonnegative_backward' (the risk of each class in a micro-batch, which should hold "
            "several examples a class, cut off at 0), 'posterior' (cross entropy with the probabilities of the true "
            "class given the noisy label and features of the frozen backbone), or 'none'. 'gce' is generalized cross "
            "entropy, which needs no T. Default: 'posterior' with noise_transition='estimate', 'forward' with a T that "
            "is given, 'none' without.",
            "choices": LOSS_CORRECTIONS,
        },
    )
    layer_radius: float | str | dict[str, float | str | None] | None = field(
        default=None,
        metadata={
            "help": "Radius of the ball around each layer's pretrained weights: a number for all layers (a freshly "
            "initialised head stays free), or JSON {name pattern: radius}, the first match decides, null frees, "
            "layers without a match are free. 'auto': before training, one training with each of a few relative "
            "radii (radius_mode is then 'relative'), and then the one that did best on the noisy eval_dataset; "
            "in JSON 'auto' stands for one radius. None: no constraint."
        },
    )
    radius_norm: str = field(
        default="frobenius",
        metadata={
            "help": "Norm of the distance: 'frobenius' (the paper's) or 'inf_op' (largest row sum; rows are outputs).",
            "choices": RADIUS_NORMS,
        },
    )
    radius_mode: str = field(
        default="absolute",
        metadata={
            "help": "'absolute' radii, or 'relative' to the norm of the layer's pretrained weights.",
            "choices": RADIUS_MODES,
        },
    )
    radius_growth: float = field(
        default=1.0,
        metadata={
            "help": "Factor of the radius from one block to the next, counted from the input: "
            "radius * radius_growth ** depth. 1: the same radius at every depth."
        },
    )
    hessian_penalty: float = field(
        default=0.0,
        metadata={
            "help": "Noise-stability optimization: standard deviation s of Gaussian noise u on every trained weight. "
            "Trains on the mean of the losses at W + u and W - u: over u, the loss plus s^2/2 times the trace of its "
            "Hessian. A step takes twice the time. Its authors use 0.008 to 0.012. 0: off."
        },
    )
    l2sp_penalty: float = field(
        default=0.0,
        metadata={
            "help": "L2-SP: the factor p of a penalty, p/2 times the sum over layers of the squared Frobenius distance "
            "from the pretrained weights, beside layer_radius or in its place. A freshly initialised head, biases and "
            "norms stay free. 0: off."
        },
    )
    # Not "noisy" by default: T would be applied to the clean test sets that many evaluate on, and the number would be
    # wrong without a sign of it. Who selects on clean accuracy has said that these labels are noisy.
    eval_labels: str | None = field(
        default=None,
        metadata={
            "help": "Labels of evaluation data: 'noisy' (corrupted by noise_transition; every evaluation then adds "
            "clean_accuracy with its 95 %% interval) or 'clean' (none does). Default: 'noisy' for the evaluation that "
            "metric_for_best_model names, as in eval_clean_accuracy; of all others nothing is known, T is not applied, "
            "and the card calls them as given.",
            "choices": EVAL_LABELS,
        },
    )

    hessian_examples: int = field(
        default=0,
        metadata={
            "help": "Measure the Hessian distance measure on so many training examples, drawn by seed, when training "
            "ends (500 say much already). Keeps a copy of the pretrained weights. 0: don't."
        },
    )
    # What is left of the cost is that of the sound bounds, which always run.
    hessian_time_budget: float = field(
        default=120.0,
        metadata={"help": "Seconds for the Lanczos part of that measurement; 0 leaves it out."},
    )
    hessian_every: int = field(
        default=0,
        metadata={"help": "Measure after every so many evaluations during training, too. 0: at the end alone."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.noise_transition = _plain_transition(self.noise_transition)
        self.layer_radius = _plain_radius(self.layer_radius)
        if is_auto(self.layer_radius):
            self.radius_mode = "relative"  # said here, so that logs and cards say it, too
        for argument in ("hessian_penalty", "l2sp_penalty"):
            setattr(self, argument, _penalty(argument, _number(getattr(self, argument))))
        growth = self.radius_growth = _number(self.radius_growth)
        if isinstance(growth, bool) or not isinstance(growth, int | float) or not 0 < growth < math.inf:
            raise ValueError(f"radius_growth is {growth!r}; it is a positive factor from one depth to the next")
        _check_choice("loss_correction", self.loss_correction, (None, *LOSS_CORRECTIONS))
        _check_choice("radius_norm", self.radius_norm, RADIUS_NORMS)
        _check_choice("radius_mode", self.radius_mode, RADIUS_MODES)
        _check_choice("eval_labels", self.eval_labels, (None, *EVAL_LABELS))
        for name, unit in (
            ("hessian_examples", "a number"),
            ("hessian_time_budget", "seconds"),
            ("hessian_every", "a number"),
        ):
            value = _number(getattr(self, name))
            if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
                raise ValueError(f"{name} is {value!r:.60}; give {unit} >= 0, where 0 turns it off")
            if name != "hessian_time_budget" and not (value <= MOST and value == int(value)):
                raise ValueError(f"{name} is {value!r:.60}; give a whole number >= 0, where 0 turns it off")
            setattr(self, name, value if name == "hessian_time_budget" else int(value))
        if self.hessian_every and not self.hessian_examples:
            raise ValueError(
                f"hessian_every is {self.hessian_every}, but hessian_examples is 0: say on how many examples"
            )


def is_auto(layer_radius: Any) -> bool:
    """Whether the radius, or one of those by name pattern, is to be chosen."""
    given = layer_radius.values() if isinstance(layer_radius, Mapping) else [layer_radius]
    return any(isinstance(value, str) and value == AUTO for value in given)


def with_chosen(layer_radius: Any, chosen: float | None) -> Any:
    """The same with the chosen radius, which is one for all, in the place of ``"auto"``; None frees."""
    if isinstance(layer_radius, Mapping):
        return {pattern: with_chosen(value, chosen) for pattern, value in layer_radius.items()}
    return chosen if is_auto(layer_radius) else layer_radius


def _check_choice(argument: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{argument} is {value!r}; choose one of {', '.join(map(repr, choices))}")


def _penalty(argument: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError(f"{argument} is {value!r}; give a finite number >= 0, where 0 turns it off")
    return float(value)


def _plain_transition(value: Any) -> float | str | list[list[float]] | None:
    """A form that JSON can hold: arguments are written to logs, trackers and cards."""
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    if isinstance(value, np.ndarray):
        return value.tolist()  # type: ignore[no-any-return]
    return str(value) if isinstance(value, Path) else _number(value)


def _plain_radius(given: Any) -> float | str | dict[str, float | str | None] | None:
    value = _number(given)
    try:
        if isinstance(value, str) and value != AUTO:
            value = parse_json(value)
        if not isinstance(value, Mapping):
            return _radius(value, "it")
        return {checked(str, name, "a name pattern"): _radius(each, f"that of {name}") for name, each in value.items()}
    except ValueError as error:
        raise ValueError(
            f"layer_radius is {given!r:.200}; give a number, '{AUTO}' or JSON such as "
            f'\'{{"*encoder.layer.*": 0.3, "*": null}}\' ({error!s:.200})'
        ) from None


def _radius(value: Any, what: str) -> float | str | None:
    value = value.item() if isinstance(value, np.generic) else value
    if value is None or (isinstance(value, str) and value == AUTO):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0 or MOST < value < math.inf:
        raise ValueError(f"{what} is no radius: a number >= 0, '{AUTO}', or null or infinity for free")
    return value


def _number(value: Any) -> Any:
    """A string that spells a number, such as ``0.4`` or ``inf`` from a command line, or numpy's, as Python's."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            pass
    return value
