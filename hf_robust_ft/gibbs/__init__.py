"""Randomised classifiers: a Gaussian over a model's weights, and the PAC-Bayes certificate of it. Floor 2."""

from .certificate import pac_bayes_certificate, pac_bayes_head
from .injection import NoNoiseRule
from .posterior import Posterior, WeightPosterior
from .training import fit_posterior

__all__ = [
    "NoNoiseRule",
    "Posterior",
    "WeightPosterior",
    "fit_posterior",
    "pac_bayes_certificate",
    "pac_bayes_head",
]
