"""How sharply the loss bends along the way that each layer travelled from its reference."""

from .engine import NonFiniteLoss, NotTwiceDifferentiable
from .forms import QuadraticForms, layer_quadratic_forms
from .measure import MeasurementStopped, measure_hessian
from .report import HessianReport, LayerCurvature, PositivePart, Statistic

__all__ = [
    "HessianReport",
    "LayerCurvature",
    "MeasurementStopped",
    "NonFiniteLoss",
    "NotTwiceDifferentiable",
    "PositivePart",
    "QuadraticForms",
    "Statistic",
    "layer_quadratic_forms",
    "measure_hessian",
]
