"""Cross entropy corrected by the noise transition matrix, and a robust loss that needs none.

``T[i, j] = P(noisy label = j | true label = i)``; rows are the true class and sum to 1.
Source: Patrini et al., *Making Deep Neural Networks Robust to Label Noise*, CVPR 2017.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .noise import IGNORE_INDEX

# The choice of Zhang & Sabuncu 2018 for all their experiments.
GCE_Q = 0.7


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Plain cross entropy of each example.

    Args:
        logits: [..., K].
        labels: int64 [...]; -100 gives 0.

    Returns:
        [...], in nats, at least float32.
    """
    log_p = _log_softmax(logits)
    targets, kept = _targets(labels)
    return _only(kept, -log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1))


def forward_corrected(logits: Tensor, labels: Tensor, transition: Tensor) -> Tensor:
    """Forward correction: the cross entropy of the noisy label under the *noisy* class probabilities.

    ``-log((softmax(z) @ T)[ỹ])`` (Patrini et al. 2017, theorem 2), computed in log space. Its minimiser
    is that of the clean loss, but its value is no estimate of the clean loss.

    Args:
        logits: z, [..., K].
        labels: noisy labels ỹ, int64 [...]; -100 gives 0.
        transition: T, [K, K], ``T[i, j] = P(noisy = j | true = i)``.

    Returns:
        [...], in nats, at least float32; infinite for a label whose column of T is all zero.
    """
    log_p = _log_softmax(logits)
    targets, kept = _targets(labels)
    # log T[:, ỹ] has -inf where T is 0; logsumexp gives those terms no weight and no gradient.
    columns = transition.to(log_p).t()[targets].log()
    return _only(kept, -torch.logsumexp(log_p + columns, dim=-1))


def backward_corrected(logits: Tensor, labels: Tensor, inverse: Tensor) -> Tensor:
    """Backward correction: the paper's consistent loss, ``ℓ̄ = Σ_k (T^-1)[ỹ, k] ℓ(z, k)``.

    Its expectation over the noisy label is the clean loss (Patrini et al. 2017, theorem 1; equation 5 of
    Ju, Li & Zhang 2022), but it has no lower bound: it can be driven to minus infinity.

    Args:
        logits: z, [..., K].
        labels: noisy labels ỹ, int64 [...]; -100 gives 0.
        inverse: T^-1, [K, K], rows are the noisy class.

    Returns:
        [...], in nats, at least float32; may be negative.
    """
    log_p = _log_softmax(logits)
    targets, kept = _targets(labels)
    return _only(kept, -(inverse.to(log_p)[targets] * log_p).sum(-1))


def nonnegative_backward(logits: Tensor, labels: Tensor, inverse: Tensor) -> Tensor:
    """Backward correction of a batch whose estimated risk of no class may be negative.

    The backward-corrected loss estimates the clean risk class by class: ``Σ_n (T^-1)[ỹ_n, k] ℓ(z_n, k)`` has the
    expectation of ``Σ_n [y_n = k] ℓ(z_n, k) ≥ 0``. Here each of these sums is cut off at 0, as Kiryo et al. (NeurIPS
    2017, equation 6) do for positive-unlabelled data and Lu et al. (AISTATS 2020) for several classes: what would
    drive the loss to minus infinity has no gradient. Biased upwards, the less the larger the batch.

    Args:
        logits, labels, inverse: see :func:`backward_corrected`.

    Returns:
        The sum over all targets, a scalar, at least float32; 0 for a batch without any.
    """
    log_p = _log_softmax(logits)
    targets, kept = _targets(labels)
    terms = inverse.to(log_p)[targets] * -log_p
    risks = terms.where(kept.unsqueeze(-1), terms.new_zeros(())).reshape(-1, logits.shape[-1]).sum(0)
    return risks.clamp(min=0).sum()


def generalized_cross_entropy(logits: Tensor, labels: Tensor, q: float = GCE_Q) -> Tensor:
    """``(1 - p_ỹ^q) / q``: between cross entropy (q → 0) and mean absolute error (q = 1); needs no T.

    Zhang & Sabuncu, *Generalized Cross Entropy Loss for Training Deep Neural Networks with Noisy Labels*, NeurIPS
    2018, equation 6. A label that the model finds unlikely has a small gradient, where cross entropy has a large one.

    Args:
        logits: z, [..., K].
        labels: noisy labels ỹ, int64 [...]; -100 gives 0.
        q: in (0, 1].

    Returns:
        [...], in [0, 1/q], at least float32.
    """
    log_p = _log_softmax(logits)
    targets, kept = _targets(labels)
    return _only(kept, -torch.expm1(q * log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1)) / q)


def posterior_cross_entropy(logits: Tensor, posteriors: Tensor) -> Tensor:
    """Cross entropy with what the true label probably is, ``-Σ_k P(y = k | x, ỹ) log softmax(z)_k``.

    The step of expectation maximisation for the likelihood that :func:`forward_corrected` climbs, with posteriors
    from elsewhere (:func:`~hf_robust_ft.label_posteriors`) in the place of the model's own.

    Args:
        logits: z, [..., K].
        posteriors: [..., K], rows sum to 1; a row of -100 gives 0.

    Returns:
        [...], in nats, at least float32.
    """
    log_p = _log_softmax(logits)
    kept = posteriors[..., 0] != IGNORE_INDEX
    return _only(kept, -(posteriors.to(log_p) * log_p).sum(-1))


def reduce_loss(losses: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
    """Sum of the losses over the number of targets in the whole (accumulated, distributed) batch.

    Args:
        losses: one for each target, 0 where the label is -100; or their sum.
        labels: same shape.
        num_items_in_batch: targets over all micro-batches and processes, as the Trainer counts them;
            None means this batch is all there is.

    Returns:
        A scalar. 0 for a batch without any target.
    """
    if num_items_in_batch is None:
        num_items_in_batch = (labels != IGNORE_INDEX).sum().clamp(min=1)
    elif isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(losses.device).clamp(min=1)
    else:
        num_items_in_batch = max(1, num_items_in_batch)
    return losses.sum() / num_items_in_batch


def _log_softmax(logits: Tensor) -> Tensor:
    # Half precision has 3 digits: enough for activations, not for the log of a small probability.
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return F.log_softmax(logits, dim=-1, dtype=dtype)


def _targets(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Labels that can index (0 in place of -100), and where they count."""
    labels = labels.long()  # uint8 and bool would index as a mask
    kept = labels != IGNORE_INDEX
    return labels.where(kept, labels.new_zeros(())), kept


def _only(kept: Tensor, losses: Tensor) -> Tensor:
    """0 where a label does not count; not a product, as the loss there may be infinite."""
    return torch.where(kept, losses, losses.new_zeros(()))
