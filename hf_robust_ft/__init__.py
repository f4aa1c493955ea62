"""Robust fine-tuning of pretrained models on few or badly labelled examples.

``HessianRegularizedTrainer`` takes the place of ``transformers.Trainer``.
"""

from .arguments import RobustTrainingArguments
from .constraints import ConstraintRow, ConstraintTable, LayerConstraints
from .corrected_loss import CorrectedLoss
from .curvature import (
    HessianReport,
    MeasurementStopped,
    QuadraticForms,
    hessian_trace,
    layer_quadratic_forms,
    measure_hessian,
    noise_stability,
    spectral_density,
    top_eigenpairs,
)
from .layers import Layer, NotALayer, find_layers
from .losses import backward_corrected, cross_entropy, forward_corrected
from .noise import (
    InverseTransition,
    corrupt_dataset,
    corrupt_labels,
    invert_transition,
    load_transition,
    pair_flip_transition,
    symmetric_transition,
    validate_transition,
)
from .reference import ReferenceMismatch, layer_distances
from .trainer import HessianRegularizedTrainer
from .weak_labels import ABSTAIN, FunctionSummary, VoteSummary, majority_vote, vote_summary

__all__ = [
    "ABSTAIN",
    "ConstraintRow",
    "ConstraintTable",
    "CorrectedLoss",
    "FunctionSummary",
    "HessianRegularizedTrainer",
    "HessianReport",
    "InverseTransition",
    "Layer",
    "LayerConstraints",
    "MeasurementStopped",
    "NotALayer",
    "QuadraticForms",
    "ReferenceMismatch",
    "RobustTrainingArguments",
    "VoteSummary",
    "backward_corrected",
    "corrupt_dataset",
    "corrupt_labels",
    "cross_entropy",
    "find_layers",
    "forward_corrected",
    "hessian_trace",
    "invert_transition",
    "layer_distances",
    "layer_quadratic_forms",
    "load_transition",
    "majority_vote",
    "measure_hessian",
    "noise_stability",
    "pair_flip_transition",
    "spectral_density",
    "symmetric_transition",
    "top_eigenpairs",
    "validate_transition",
    "vote_summary",
]
