"""From arguments and a model to the two features, the corrected loss and the constraints, or to a clear refusal."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor, nn
from transformers import TrainingArguments

from .arguments import ESTIMATE, RobustTrainingArguments, is_auto, with_chosen
from .constraints import LayerConstraints
from .corrected_loss import CorrectedLoss, loss_type

logger = logging.getLogger(__name__)

# In the place of what leaves no weight a tensor of its own.
WHAT_WORKS = (
    "use FSDP version 2 on GPUs (fsdp=True, fsdp_config={'version': 2}, or accelerate launch --use_fsdp "
    "--fsdp_version 2), or DDP (accelerate launch or torchrun without it)"
)

# The variance of a backward-corrected loss grows with the square of this: at 10, a hundred noisy examples
# say as much as one clean one.
WARN_CONDITION_NUMBER = 10.0


def make_corrected_loss(
    args: TrainingArguments,
    transition: Any,
    model: nn.Module,
    label_names: list[str],
    user_loss: Callable[..., Any] | None,
) -> CorrectedLoss | None:
    """The loss that the arguments ask for; None if it is the model's own (or the user's).

    Args:
        transition: T, or what :func:`~hf_robust_ft.noise.load_transition` reads; None without a noise model.

    Raises:
        ValueError: a correction without T, with another loss or label smoothing beside it, for several labels
            or for a model that is no classifier; a T that :class:`CorrectedLoss` refuses.
    """
    correction = correction_of(args)
    if correction == "none":
        return None
    if transition is None and correction != "gce":
        raise ValueError(
            f"loss_correction='{correction}' needs noise_transition: give a rate, a path or a matrix, or set "
            "loss_correction='none'. 'gce' does without"
        )
    if user_loss is not None:
        raise ValueError(
            "compute_loss_func and loss_correction both define the loss; drop one of them "
            "(forward_corrected and backward_corrected can be called from your own function)"
        )
    if args.label_smoothing_factor:
        raise ValueError(
            f"label_smoothing_factor={args.label_smoothing_factor} has no meaning beside loss_correction: "
            "smoothing is itself a noise model. Set it to 0, or set loss_correction='none'"
        )
    if other_problem(model) is not None:
        raise ValueError(
            f"loss_correction is for one class a target, but the model's problem_type is '{other_problem(model)}'; "
            "set loss_correction='none'"
        )
    if len(label_names) > 1:
        raise ValueError(f"loss_correction needs one label, but label_names is {label_names}; name the one to correct")
    kind = loss_type(model)
    loss = CorrectedLoss(correction, transition, num_classes=num_classes(model, kind), shift=kind == "ForCausalLM")
    if correction == "nonnegative_backward" and args.per_device_train_batch_size < (loss.num_classes or 2):
        logger.warning(
            "nonnegative_backward cuts off the risk of each class in a micro-batch: of %d examples, that of most "
            "classes. Give per_device_train_batch_size several examples a class, or use loss_correction='forward'",
            args.per_device_train_batch_size,
        )
    if correction == "backward" and loss.matrices is not None:
        inverse = loss.matrices[1]
        if inverse is not None and inverse.condition_number > WARN_CONDITION_NUMBER:
            logger.warning(
                "backward correction amplifies a loss up to %.3g times (condition number of noise_transition %.3g): "
                "expect noisy gradients; loss_correction='forward' is stable",
                inverse.amplification,
                inverse.condition_number,
            )
    return loss


def correction_of(args: TrainingArguments) -> Any:
    """``loss_correction``, or what stands for it where it is not given."""
    correction, source = setting(args, "loss_correction"), setting(args, "noise_transition")
    if correction is not None:
        return correction
    if source is None:
        return "none"
    # With T estimated from features, these are at hand; RESULTS.md has what they are worth.
    return "posterior" if isinstance(source, str) and source == ESTIMATE else "forward"


def make_constraints(
    args: TrainingArguments,
    model: nn.Module,
    *,
    sharded_by: str | None = None,
    chosen: float | None = None,
    reference: Mapping[str, Tensor] | None = None,
    capture_missing: bool = False,
    fresh: Collection[str] | None = None,
    before_sharding: bool = False,
) -> LayerConstraints:
    """The balls and the pull that the arguments ask for; none if ``layer_radius`` is None and ``l2sp_penalty`` 0.

    Args:
        sharded_by: what will split the weights over processes in a way that can't be followed, if something does.
        chosen: the relative radius for ``layer_radius="auto"``; None while it is not chosen, and nothing constrained.
        reference, capture_missing, fresh, before_sharding: see :class:`LayerConstraints`.

    Raises:
        ValueError: such sharding, an optimizer that steps within the backward pass beside a penalty, or what
            :class:`LayerConstraints` refuses.
    """
    radius, mode = setting(args, "layer_radius"), setting(args, "radius_mode")
    if is_auto(radius):
        radius, mode = with_chosen(radius, chosen), "relative"
    if radius is not None and sharded_by is not None:
        raise ValueError(f"layer_radius does not work with {sharded_by}; {WHAT_WORKS}, or set layer_radius=None")
    for argument in ("hessian_penalty", "l2sp_penalty"):
        if setting(args, argument):
            _check_gradients(args, argument, sharded_by)
    return LayerConstraints(
        model,
        radius,
        norm=setting(args, "radius_norm"),
        mode=mode,
        growth=setting(args, "radius_growth"),
        reference=reference,
        capture_missing=capture_missing,
        fresh=fresh,
        penalty=setting(args, "l2sp_penalty"),
        before_sharding=before_sharding,
    )


def _check_gradients(args: TrainingArguments, argument: str, sharded_by: str | None) -> None:
    """Refuse what leaves no whole gradient to a penalty between the backward pass and the optimizer step."""
    asked = f"{argument}={setting(args, argument)}"
    if sharded_by is not None:
        raise ValueError(f"{asked} does not work with {sharded_by}; {WHAT_WORKS}, or set {argument}=0")
    optimizer = str(getattr(args.optim, "value", args.optim))
    if "lomo" in optimizer or optimizer.endswith("layerwise"):
        raise ValueError(
            f"{asked} does not work with optim='{optimizer}', which steps within the backward pass; choose one "
            f"that steps after it, such as 'adamw_torch', or set {argument}=0"
        )


def requires_argument(model: nn.Module, argument: str) -> bool:
    """Whether ``model.forward`` can't be called without this argument."""
    parameter = inspect.signature(model.forward).parameters.get(argument)
    return parameter is not None and parameter.default is inspect.Parameter.empty


def one_class_an_example(model: nn.Module, label_names: list[str], asked: str) -> None:
    """Refuse a model that does not predict one class an example.

    Args:
        asked: the setting that needs it, for the message.

    Raises:
        ValueError: regression, several labels an example or several examples a row.
    """
    if other_problem(model) is not None:
        raise ValueError(
            f"{asked} is for one class an example, but the model's problem_type is '{other_problem(model)}'"
        )
    kind = loss_type(model)
    if kind is not None and (not kind.endswith("Classification") or kind == "ForTokenClassification"):
        raise ValueError(
            f"{asked} is for one class an example, but the model's task is {kind}, whose targets of one sequence or "
            "image are not independent"
        )
    if len(label_names) != 1:
        raise ValueError(
            f"{asked} needs one column of labels, but label_names is {label_names}; name the one that is noisy"
        )


def other_problem(model: nn.Module) -> str | None:
    """The model's ``problem_type`` if its targets are no class indices."""
    problem = getattr(getattr(model, "config", None), "problem_type", None)
    return problem if problem in ("regression", "multi_label_classification") else None


def setting(args: TrainingArguments, name: str) -> Any:
    """A robust setting; plain ``TrainingArguments`` have the defaults, with every feature off."""
    return getattr(args, name, getattr(RobustTrainingArguments, name))


def num_classes(model: nn.Module, kind: str | None) -> int | None:
    """K, for the transformers models whose config says it; the logits of others tell it at the first step."""
    config: Any = getattr(model, "config", None)
    if config is None or kind is None:
        return None
    if kind in ("ForCausalLM", "ForMaskedLM"):
        return int(config.get_text_config().vocab_size)
    return int(config.num_labels) if kind.endswith("Classification") else None
