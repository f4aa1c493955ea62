"""Robust fine-tuning of pretrained models on few or badly labelled examples.

``HessianRegularizedTrainer`` takes the place of ``transformers.Trainer``.
"""

from .arguments import RobustTrainingArguments
from .bounds import Bound, certified_error, distance_measures, held_out_bound, hessian_bound, pac_bayes_bound
from .card import CardData, read_card, render_card, write_card
from .clean_accuracy import CLEAN_ACCURACY_METRIC, CleanAccuracy, clean_accuracy
from .constraints import ConstraintRow, ConstraintTable, LayerConstraints
from .corrected_loss import CorrectedLoss
from .curvature import (
    HessianReport,
    MeasurementStopped,
    QuadraticForms,
    hessian_trace,
    layer_quadratic_forms,
    measure_hessian,
    measurement_costs,
    noise_stability,
    spectral_density,
    top_eigenpairs,
)
from .diagnosis import Diagnosis, diagnose
from .estimation import (
    CrossFit,
    TransitionEstimate,
    confident_joint_transition,
    crossfit,
    dual_t_transition,
    estimate_transition,
    trusted_transition,
)
from .files import NotWritten
from .fold_probabilities import out_of_fold_probabilities
from .frozen_features import frozen_features
from .gibbs import NoNoiseRule, Posterior, fit_posterior, pac_bayes_certificate, pac_bayes_head
from .hub import PushFailed, push_folder
from .label_posteriors import label_posteriors
from .layers import Layer, NotALayer, find_layers
from .losses import (
    backward_corrected,
    cross_entropy,
    forward_corrected,
    generalized_cross_entropy,
    nonnegative_backward,
    posterior_cross_entropy,
)
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
from .noise_shape import noise_shape
from .processes import OtherProcessFailed
from .radius_search import RadiusCandidate, RadiusChoice
from .reference import ReferenceMismatch, layer_distances
from .report_bounds import report_bounds
from .suspects import Suspects, rank_suspects
from .trainer import HessianRegularizedTrainer
from .weak_labels import ABSTAIN, FunctionSummary, VoteSummary, majority_vote, vote_summary

__all__ = [
    "ABSTAIN",
    "CLEAN_ACCURACY_METRIC",
    "Bound",
    "CardData",
    "CleanAccuracy",
    "ConstraintRow",
    "ConstraintTable",
    "CorrectedLoss",
    "CrossFit",
    "Diagnosis",
    "FunctionSummary",
    "HessianRegularizedTrainer",
    "HessianReport",
    "InverseTransition",
    "Layer",
    "LayerConstraints",
    "MeasurementStopped",
    "NoNoiseRule",
    "NotALayer",
    "NotWritten",
    "OtherProcessFailed",
    "Posterior",
    "PushFailed",
    "QuadraticForms",
    "RadiusCandidate",
    "RadiusChoice",
    "ReferenceMismatch",
    "RobustTrainingArguments",
    "Suspects",
    "TransitionEstimate",
    "VoteSummary",
    "backward_corrected",
    "certified_error",
    "clean_accuracy",
    "confident_joint_transition",
    "corrupt_dataset",
    "corrupt_labels",
    "cross_entropy",
    "crossfit",
    "diagnose",
    "distance_measures",
    "dual_t_transition",
    "estimate_transition",
    "find_layers",
    "fit_posterior",
    "forward_corrected",
    "frozen_features",
    "generalized_cross_entropy",
    "held_out_bound",
    "hessian_bound",
    "hessian_trace",
    "invert_transition",
    "label_posteriors",
    "layer_distances",
    "layer_quadratic_forms",
    "load_transition",
    "majority_vote",
    "measure_hessian",
    "measurement_costs",
    "noise_shape",
    "noise_stability",
    "nonnegative_backward",
    "out_of_fold_probabilities",
    "pac_bayes_bound",
    "pac_bayes_certificate",
    "pac_bayes_head",
    "pair_flip_transition",
    "posterior_cross_entropy",
    "push_folder",
    "rank_suspects",
    "read_card",
    "render_card",
    "report_bounds",
    "spectral_density",
    "symmetric_transition",
    "top_eigenpairs",
    "trusted_transition",
    "validate_transition",
    "vote_summary",
    "write_card",
]
