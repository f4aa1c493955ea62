"""Estimate the noise transition matrix from noisy labels and features of a frozen model."""

from .confident_joint import confident_joint_transition
from .crossfit import CrossFit, crossfit
from .dual_t import dual_t_transition
from .estimate import estimate_transition
from .result import TransitionEstimate
from .trusted import trusted_transition

__all__ = [
    "CrossFit",
    "TransitionEstimate",
    "confident_joint_transition",
    "crossfit",
    "dual_t_transition",
    "estimate_transition",
    "trusted_transition",
]
