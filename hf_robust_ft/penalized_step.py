"""When the penalties act: the noise around each micro-batch, the pull once before each optimizer step."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from transformers import Trainer

from .constraints import LayerConstraints
from .features import setting
from .penalties import antithetic_noise
from .sharding import reshard


def penalized_step(
    trainer: Trainer, model: nn.Module, constraints: LayerConstraints, step: Callable[[], Tensor]
) -> Tensor:
    """The forward and backward pass of one micro-batch, with ``hessian_penalty`` and ``l2sp_penalty``.

    Gradients are complete when the last micro-batch of an optimizer step is done: summed over micro-batches, averaged
    over processes, neither unscaled nor clipped. The pull is added then, once. So it is clipped along with the rest, as
    the gradient of a term of the loss is, and it needs the factor of a gradient scaler.

    The noise hangs on the seed and the number of the optimizer step: it is the same for all micro-batches and on all
    processes, so that the layout of a batch makes no difference, and a resumed run needs no state of it.

    Args:
        model: as Trainer trains it, wrapped or not.
        step: ``Trainer.training_step`` of the micro-batch; adds to the gradients and returns the loss.

    Returns:
        The loss to log: the mean of both points, without the pull.
    """
    accelerator = trainer.accelerator
    sigma, pulls = setting(trainer.args, "hessian_penalty"), setting(trainer.args, "l2sp_penalty") > 0
    trained: list[nn.Parameter] = []
    if sigma:
        reshard(model)  # an evaluation may have left whole weights in the place of those that are trained
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # Schedule-free optimizers move the weights from where they were evaluated; Trainer asks them to only in step().
        if callable(move := getattr(trainer.optimizer, "train", None)):
            move()
        with antithetic_noise(trained, sigma, (trainer.args.seed, trainer.state.global_step)) as reflect:
            with accelerator.no_sync(model):  # what is averaged over processes with the second backward pass
                loss = step()
            reflect()
            loss = (loss + step()) / 2
    else:
        loss = step()
    if accelerator.sync_gradients:
        for parameter in trained:
            if parameter.grad is not None:
                parameter.grad.mul_(0.5)  # the mean of both points; exact in floating point
    if accelerator.sync_gradients and pulls:
        constraints.add_pull(1.0 if accelerator.scaler is None else accelerator.scaler.get_scale())
    return loss
