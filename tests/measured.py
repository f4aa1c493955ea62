"""The engine and the oracle on the same cases."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import oracle
import pytest
import torch
from oracle import Case, Loss, layer_groups, perturbed_reference
from torch import Tensor, nn

from hf_robust_ft.curvature import QuadraticForms, layer_quadratic_forms
from hf_robust_ft.curvature.engine import Kind

KINDS: list[Kind] = ["hessian", "gauss_newton", "hessian_upper", "hessian_psd"]
EXACT = 1000
"""More Lanczos steps than any layer here has weights."""
# Operations without a second derivative in torch: only the sweep, which has rules for them, measures these.
NOT_TWICE = {"hardsigmoid", "embedding_bag"}

each_kind = pytest.mark.parametrize("kind", KINDS)


def batch_of(case: Case, rows: Sequence[int] = range(oracle.EXAMPLES)) -> dict[str, Tensor]:
    return {name: x[list(rows)] for name, x in {**case.inputs, "labels": case.labels}.items()}


def forms(case: Case, kind: Kind = "hessian", *, rows: Sequence[int] = range(3), **settings: Any) -> QuadraticForms:
    """Of a case around its perturbed reference, Lanczos to the end."""
    model = case.model()
    if case.name == "tied_embedding":  # a language model that the engine can't recognize
        settings.setdefault("loss", case.loss())
    settings.setdefault("lanczos_steps", EXACT)
    return layer_quadratic_forms(model, batch_of(case, rows), perturbed_reference(model), kind=kind, **settings)


GROUPINGS: dict[str, Callable[[nn.Module], list[list[str]]]] = {
    "weights": layer_groups,
    "blocks": oracle.block_groups,
    "all": lambda model: [[name for (name,) in layer_groups(model)]],
}


@functools.cache
def expected(case: Case, loss: oracle.LossKind | Loss = "plain", layers: str = "weights") -> oracle.Measures:
    """The oracle, once for all kinds."""
    model = case.model()
    function = case.loss(loss) if isinstance(loss, str) else loss
    return oracle.measure(
        model, case.inputs, case.labels, function, GROUPINGS[layers](model), perturbed_reference(model), path=case.path
    )


def tolerance(case: Case) -> float:
    return 1e-8 if case.tolerance < 1e-8 else max(1e-7, case.tolerance)


def single(case: Case) -> tuple[nn.Module, dict[str, Tensor], dict[str, Tensor]]:
    """Model, batch and reference of a case in float32."""
    model = case.model().float()
    batch = {name: x.float() if x.is_floating_point() else x for name, x in batch_of(case).items()}
    return model, batch, perturbed_reference(model)


def as_double(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.double() if x.is_floating_point() else x for name, x in tensors.items()}


class Snapshot:
    """All that a measurement could spoil."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.tensors = {name: tensor.detach().clone() for name, tensor in self._tensors().items()}
        self.objects = {name: (id(tensor), tensor.data_ptr()) for name, tensor in self._tensors().items()}
        self.gradients = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
        self.flags = self._flags()
        self.generator = torch.get_rng_state()

    def _tensors(self) -> dict[str, Tensor]:
        return {
            **dict(self.model.named_parameters(remove_duplicate=False)),
            **dict(self.model.named_buffers(remove_duplicate=False)),
        }

    def _flags(self) -> dict[str, Any]:
        modules = dict(self.model.named_modules())
        return {
            "training": {name: module.training for name, module in modules.items()},
            "attributes": {name: sorted(module.__dict__) for name, module in modules.items()},
            "padding": {name: getattr(module, "padding_idx", None) for name, module in modules.items()},
            "attention": {n: m.config._attn_implementation for n, m in modules.items() if hasattr(m, "config")},
            "requires_grad": {name: p.requires_grad for name, p in self.model.named_parameters()},
            "is leaf": {name: p.is_leaf for name, p in self.model.named_parameters()},
            "grad mode": torch.is_grad_enabled(),
            "autocast": torch.is_autocast_enabled("cpu"),
            "default type": torch.get_default_dtype(),
            "attention kernels": (
                torch.backends.cuda.math_sdp_enabled(),
                torch.backends.cuda.flash_sdp_enabled(),
                torch.backends.cuda.mem_efficient_sdp_enabled(),
                torch.backends.cuda.cudnn_sdp_enabled(),
            ),
            "tf32": (torch.backends.cudnn.enabled, torch.backends.cudnn.allow_tf32),
        }

    def check(self) -> None:
        tensors = self._tensors()
        assert self.objects == {name: (id(tensor), tensor.data_ptr()) for name, tensor in tensors.items()}
        assert all(torch.equal(self.tensors[name], tensor) for name, tensor in tensors.items())
        for name, parameter in self.model.named_parameters():
            before = self.gradients[name]
            assert parameter.grad is before is None or torch.equal(parameter.grad, before)
        assert self._flags() == self.flags
        assert torch.equal(torch.get_rng_state(), self.generator)
