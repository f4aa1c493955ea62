"""How sharply the loss bends along the way that each layer travelled from its reference."""

from .forms import QuadraticForms, layer_quadratic_forms

__all__ = ["QuadraticForms", "layer_quadratic_forms"]
