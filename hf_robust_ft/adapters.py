"""Adapters of PEFT: which layers they change, by what, and what these layers are called in the merged model.

Plain LoRA changes a weight by a product, ``W + s B A``, and that is all that this package needs to know of an adapter:
the base weight does not move, so it is the reference, and the product is the way from it. peft itself is not imported;
its classes are known by their names.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .low_rank import product_gradients, product_norm, project_product_
from .projection import Norm

# Subclasses of these do otherwise: they quantize the base weight, or split it.
LORA_LAYERS = {f"peft.tuners.lora.layer.{name}" for name in ("Linear", "Embedding", "Conv1d", "Conv2d", "Conv3d")}
# Beginnings of `init_lora_weights` that take the adapter's first change off the base weight.
MOVES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# A base weight of another type is quantized, and not what its layer multiplies by.
PLAIN_TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


NOT_ACTIVE = "of an adapter that is not active"


@dataclass(frozen=True, eq=False)
class LowRank:
    """What plain LoRA adds to the weight of one layer: ``Δ = s L R``, L with one row for each row of the layer.

    Linear and convolution: L is B, R is A. Embedding, whose rows are tokens: L is Aᵀ, R is Bᵀ.
    """

    name: str
    """Of the weight, in the merged model."""
    wrapper: nn.Module
    """What stands in the place of the layer."""
    adapter: str
    """The active one."""
    path: str
    """Name of the wrapper in the model."""

    @property
    def base(self) -> nn.Module:
        """The layer itself."""
        return self.wrapper.get_submodule("base_layer")

    @property
    def weight(self) -> nn.Parameter:
        """Of the layer, without Δ. It does not move."""
        return self.base.weight  # type: ignore[return-value]

    @property
    def factors(self) -> dict[str, nn.Parameter]:
        """B and A by their names in the model."""
        if self._is_embedding:
            names = (f"lora_embedding_B.{self.adapter}", f"lora_embedding_A.{self.adapter}")
        else:
            names = (f"lora_B.{self.adapter}.weight", f"lora_A.{self.adapter}.weight")
        # Not get_parameter: a measurement has plain tensors in their place.
        return {f"{self.path}.{name}".lstrip("."): operator.attrgetter(name)(self.wrapper) for name in names}

    @property
    def scale(self) -> float:
        """s, which rsLoRA sets otherwise than LoRA."""
        return float(self._member("scaling")[self.adapter])

    def norm(self, norm: Norm) -> float:
        """``‖Δ‖`` now, in float64."""
        return product_norm(*self._sides(*self.factors.values()), self.scale, norm)

    def project_(self, radius: float, norm: Norm) -> None:
        """Move Δ into a ball around zero, by L alone, in place."""
        project_product_(*self._sides(*self.factors.values()), self.scale, radius, norm)

    def add_l2sp_gradient(self, penalty: float) -> None:
        """Add the gradient of ``λ/2 ‖Δ‖_F²`` to those of A and B."""
        up, down = self.factors.values()
        left, right = product_gradients(*self._sides(up, down), self.scale)
        pulls = (right.t(), left.t()) if self._is_embedding else (left.view_as(up), right.view_as(down))
        for factor, pull in zip((up, down), pulls, strict=True):
            if not factor.requires_grad:
                continue
            if factor.grad is None:
                factor.grad = torch.zeros_like(factor)
            factor.grad.add_(pull, alpha=penalty)

    def change(self, dtype: torch.dtype, state: Mapping[str, Tensor] | None = None) -> Tensor:
        """Δ, of the shape of the weight: now, or of the factors in a state dict, where it has them (else zero).

        Multiplied in float64: a GPU that may use TF32 would be off by a thousandth.
        """
        found = [factor if state is None else state.get(name) for name, factor in self.factors.items()]
        up, down = (None if factor is None else factor.to(self.weight.device, torch.float64) for factor in found)
        if up is None or down is None:
            return torch.zeros_like(self.weight, dtype=dtype, requires_grad=False)
        left, right = self._sides(up, down)
        product = (left @ right).mul_(self.scale).to(dtype)
        # An embedding's L and R are transposed already.
        turned = not self._is_embedding and getattr(self.wrapper, "fan_in_fan_out", False)
        return (product.t() if turned else product).reshape(self.weight.shape)

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """Of the layer with what the adapter adds to it (``lora_bias``); None if it adds nothing."""
        added: Tensor | None = None if self._is_embedding else self._member("lora_B")[self.adapter].bias
        if added is None:
            return None
        own: Any = self.base.bias
        return added.detach().to(dtype) * self.scale + (0 if own is None else own.detach().to(dtype))

    @property
    def left(self) -> tuple[str, nn.Parameter]:
        """The name of the factor that is L, which projection scales, and the factor."""
        up, down = self.factors.items()
        return down if self._is_embedding else up

    @property
    def _is_embedding(self) -> bool:
        return self.adapter in self._member("lora_embedding_A")

    def _sides(self, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
        """L and R, of which L is a view: the kernel of B is 1 × 1."""
        up, down = up.detach(), down.detach()
        return (down.t(), up.t()) if self._is_embedding else (up.flatten(1), down.flatten(1))

    def _member(self, name: str) -> Any:
        return getattr(self.wrapper, name)


@dataclass
class Adapters:
    """What :func:`find_adapters` found."""

    products: list[LowRank] = field(default_factory=list)
    """Layers that are changed by plain LoRA, of which at least one factor is trained."""
    strays: dict[nn.Parameter, str] = field(default_factory=dict)
    """Other trained parameters of adapters, and what they are."""
    problems: list[str] = field(default_factory=list)
    """What is trained and no plain product."""
    originals: dict[nn.Parameter, nn.Parameter] = field(default_factory=dict)
    """Of the modules that PEFT trains whole (``modules_to_save``): trained copy → what it is a copy of."""

    def refuse(self, asked: str, remedy: str) -> None:
        """Refuse what needs the change of each layer, where that is no plain product.

        Raises:
            ValueError: names the first such layer.
        """
        if self.problems:
            more = f" (and {len(self.problems) - 1} more)" if len(self.problems) > 1 else ""
            raise ValueError(
                f"{asked} needs adapters whose change of a layer is a product of two factors, which is plain LoRA with "
                f"one active adapter; here {self.problems[0]}{more}. {remedy}"
            )


def find_adapters(model: nn.Module) -> Adapters:
    """The adapters of a model: of a ``PeftModel``, or of a model that they were injected into. None in any other."""
    found = Adapters()
    configs: Mapping[str, Any] = getattr(model, "peft_config", None) or {}
    for kind in sorted({_kind(config) for config in configs.values()} - {"LORA"}):
        found.problems.append(f"the model has {kind} adapters")
    prompts = model._modules.get("prompt_encoder") if _is_peft(model) else None
    for parameter in () if prompts is None else prompts.parameters():
        found.strays[parameter] = "prompt of an adapter, not a matrix of the model"
    for path, module in model.named_modules():
        if {"modules_to_save", "original_module"} <= module._modules.keys() and _is_peft(module):
            original = module.get_submodule("original_module")
            for adapter, copy in module.get_submodule("modules_to_save").named_children():
                if adapter in _active(module):
                    found.originals.update(zip(copy.parameters(), original.parameters(), strict=False))
                else:
                    found.strays.update(dict.fromkeys(copy.parameters(), NOT_ACTIVE))
        elif "base_layer" in module._modules and hasattr(module, "adapter_layer_names"):
            _sort(module, path, merged_name(f"{path}.base_layer.weight".lstrip("."), model), configs, found)
    _refuse_shared(found)
    return found


def _sort(module: nn.Module, path: str, name: str, configs: Mapping[str, Any], found: Adapters) -> None:
    """Sort the trained parameters of one adapted layer."""
    own = {
        parameter: short
        for short, parameter in module.named_parameters()
        if parameter.requires_grad and not short.startswith("base_layer.")
    }
    if not own:
        return
    wrapper: Any = module
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    if kind not in LORA_LAYERS:
        reason = f"{name} has an adapter of the kind {kind}"
    else:
        active = [adapter for adapter in _active(module) if adapter in wrapper.scaling]
        factors: set[nn.Parameter] = set()
        reason = None
        if len(active) > 1:
            reason = f"{name} has several active adapters ({', '.join(active)})"
        elif active:
            layer = LowRank(name, module, active[0], path)
            reason = _why_no_product(layer, configs.get(active[0]))
            if reason is None and not own.keys().isdisjoint(layer.factors.values()):
                found.products.append(layer)
                factors.update(layer.factors.values())
        for parameter, short in own.items():
            if reason is None and parameter not in factors and not short.endswith("bias"):
                found.strays[parameter] = NOT_ACTIVE
    if reason is not None:
        found.problems.append(reason)
        found.strays.update(dict.fromkeys(own, "part of an adapter whose change is no plain product"))


def _active(module: Any) -> list[str]:
    """Names of the adapters that a wrapper of PEFT applies."""
    return [] if module.disable_adapters else list(module.active_adapters)


def _why_no_product(layer: LowRank, config: Any) -> str | None:
    wrapper: Any = layer.wrapper
    base: Any = layer.base
    if wrapper.merged:
        return f"the adapter of {layer.name} is merged into its base weight (unmerge_adapter() takes it out again)"
    variant = getattr(wrapper, "lora_variant", {}).get(layer.adapter)
    if variant is not None:
        return f"{layer.name} has a variant of LoRA ({type(variant).__name__.removesuffix('Variant')})"
    if hasattr(base, "base_layer"):
        return f"{layer.name} has an adapter on an adapter"
    if base.weight.requires_grad:
        return f"the base weight {layer.name} is trained beside its adapter"
    if base.weight.dtype not in PLAIN_TYPES:
        return f"the base weight {layer.name} is quantized ({base.weight.dtype})"
    start = getattr(config, "init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(MOVES_THE_BASE):
        return f"init_lora_weights='{start}' has moved the base weight {layer.name}, which is no reference any more"
    if isinstance(base, nn.modules.conv._ConvNd):
        down = wrapper.lora_A[layer.adapter]
        same = ("kernel_size", "stride", "padding", "dilation", "padding_mode", "groups")
        different = [name for name in same if getattr(base, name) != getattr(down, name)]
        if different:
            return f"the adapter of the convolution {layer.name} does not share its {', '.join(different)}"
    return None


def _refuse_shared(found: Adapters) -> None:
    """Layers that share a factor can't each be moved alone."""
    owners: dict[tuple[int, int | torch.SymInt], str] = {}
    for layer in found.products:
        for factor in layer.factors.values():
            # Shards of a distributed tensor have no address.
            owner = owners.setdefault(_memory(factor), layer.name) if type(factor.data) is Tensor else layer.name
            if owner != layer.name:
                found.problems.append(f"the adapters of {owner} and {layer.name} share a factor")


def _memory(tensor: Tensor) -> tuple[int, int | torch.SymInt]:
    """The same for tensors that share memory, also while that is given back (:mod:`~.curvature.paging`)."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset()


def _kind(config: Any) -> str:
    return str(getattr(config.peft_type, "value", config.peft_type))


def _is_peft(module: nn.Module) -> bool:
    return any(kind.__module__.partition(".")[0] == "peft" for kind in type(module).__mro__)


def without_adapters(model: nn.Module) -> nn.Module:
    """The transformers model inside a ``PeftModel``; any other model as it is."""
    while _is_peft(model) and (inner := model._modules.get("base_model", model._modules.get("model"))) is not None:
        model = inner
    return model


def merged_name(name: str, model: nn.Module) -> str:
    """What a parameter or module is called in the merged model: without the names of the wrappers of PEFT, and of
    those that torch.compile and activation checkpointing put around blocks."""
    module: nn.Module | None = model
    parts, kept = name.split("."), []
    while parts:
        part = parts.pop(0)
        if part in ("_orig_mod", "_checkpoint_wrapped_module"):
            pass
        elif module is None or not _is_peft(module):
            kept.append(part)
        elif part == "modules_to_save" and (not parts or parts[0] in _active(module)):  # and the name of the adapter
            module, part = module._modules.get(part), parts.pop(0) if parts else ""
        elif part not in ("base_model", "model", "base_layer", "original_module", "token_adapter"):
            kept.append(part)
        module = None if module is None else module._modules.get(part)
    return ".".join(kept)


@contextlib.contextmanager
def merged_in(model: nn.Module, weights: Mapping[LowRank, tuple[Tensor, Tensor | None]]) -> Iterator[None]:
    """Layers in the place of their adapters, with the merged weight, and bias if one is given. Put back afterwards.

    Modules are exchanged, no tensor is written to: no bit of the model can change.
    """
    bases = {id(layer.wrapper): layer.base for layer in weights}
    members: list[dict[str, Any]] = [module._modules for module in model.modules()] if weights else []
    members += [layer.base._parameters for layer in weights]
    saved = [dict(member) for member in members]
    try:
        for layer, (weight, bias) in weights.items():
            layer.base._parameters["weight"] = weight  # type: ignore[assignment]
            if bias is not None:
                layer.base._parameters["bias"] = bias  # type: ignore[assignment]
        for member in members:
            for name, child in member.items():
                member[name] = bases.get(id(child), child)
        yield
    finally:
        for member, own in zip(members, saved, strict=True):
            member.update(own)
