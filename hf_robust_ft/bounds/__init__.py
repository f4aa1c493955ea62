"""Bounds and measures of generalization from measured numbers. Floor 1."""

from .bound import Bound
from .distance import distance_measures
from .held_out import held_out_bound, held_out_error
from .hessian import hessian_bound
from .kl import binary_kl, kl_inverse
from .pac_bayes import certified_error, gaussian_kl, pac_bayes_bound

__all__ = [
    "Bound",
    "binary_kl",
    "certified_error",
    "distance_measures",
    "gaussian_kl",
    "held_out_bound",
    "held_out_error",
    "hessian_bound",
    "kl_inverse",
    "pac_bayes_bound",
]
