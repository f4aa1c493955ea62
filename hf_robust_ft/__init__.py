"""Robust fine-tuning of pretrained models on few or badly labelled examples.

``HessianRegularizedTrainer`` takes the place of ``transformers.Trainer``.
"""

from .arguments import RobustTrainingArguments
from .constraints import ConstraintRow, ConstraintTable, LayerConstraints
from .curvature import QuadraticForms, layer_quadratic_forms
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

__all__ = [
    "ConstraintRow",
    "ConstraintTable",
    "HessianRegularizedTrainer",
    "InverseTransition",
    "Layer",
    "LayerConstraints",
    "NotALayer",
    "QuadraticForms",
    "ReferenceMismatch",
    "RobustTrainingArguments",
    "backward_corrected",
    "corrupt_dataset",
    "corrupt_labels",
    "cross_entropy",
    "find_layers",
    "forward_corrected",
    "invert_transition",
    "layer_distances",
    "layer_quadratic_forms",
    "load_transition",
    "pair_flip_transition",
    "symmetric_transition",
    "validate_transition",
]
