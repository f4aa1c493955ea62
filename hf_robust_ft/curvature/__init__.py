"""How sharply the loss bends along the way that each layer travelled from its reference.

:func:`measure_hessian` measures a data set, :func:`layer_quadratic_forms` one batch; both example by example. The mean
Hessian of a data set has :func:`hessian_trace`, :func:`top_eigenpairs`, :func:`spectral_density` and
:func:`noise_stability`. What each of them costs says :func:`measurement_costs`, before it is made.
"""

from .cost import Cost
from .estimate import measurement_costs
from .forms import QuadraticForms, layer_quadratic_forms
from .loss import NonFiniteLoss
from .measure import MeasurementStopped, measure_hessian
from .products import NotTwiceDifferentiable
from .report import HessianReport, LayerCurvature, PositivePart, Statistic
from .spectrum import Eigenpairs, NotConverged, SpectralDensity, spectral_density, top_eigenpairs
from .stability import NoiseStability, noise_stability
from .trace import TraceEstimate, hessian_trace

__all__ = [
    "Cost",
    "Eigenpairs",
    "HessianReport",
    "LayerCurvature",
    "MeasurementStopped",
    "NoiseStability",
    "NonFiniteLoss",
    "NotConverged",
    "NotTwiceDifferentiable",
    "PositivePart",
    "QuadraticForms",
    "SpectralDensity",
    "Statistic",
    "TraceEstimate",
    "hessian_trace",
    "layer_quadratic_forms",
    "measure_hessian",
    "measurement_costs",
    "noise_stability",
    "spectral_density",
    "top_eigenpairs",
]
