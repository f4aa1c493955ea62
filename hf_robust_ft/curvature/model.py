"""A model as the measurement needs it: eval mode, float32 or better, attention that can be differentiated twice."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from ..adapters import LowRank, merged_in
from ..corrected_loss import find_logits
from .directions import Group
from .paging import derived
from .placement import HALF, measured_type, whole_weights

Inputs = Mapping[str, Any] | tuple[Any, ...]


@contextlib.contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """Put a model into the state that it is measured in, and back, also after an error.

    Eval mode; attention by ``sdpa`` (or ``eager``, where the model has no sdpa) with the kernels that autograd can
    differentiate twice; no autocast; no TF32; gradients enabled; every weight whole.
    """
    training = {module: module.training for module in model.modules()}
    configs: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            _collect(module.config, configs)
    attention = {key: config._attn_implementation_internal for key, config in configs.items()}
    tf32 = torch.backends.cuda.matmul.allow_tf32
    if torch.is_inference_mode_enabled():
        raise RuntimeError("curvature needs gradients; leave torch.inference_mode() for the measurement")
    try:
        torch.backends.cuda.matmul.allow_tf32 = False
        model.eval()
        if any(name not in ("sdpa", "eager", None) for name in attention.values()):
            _decompose_attention(model)
        with (
            whole_weights(model),
            sdpa_kernel(SDPBackend.MATH),
            torch.autocast(_device_type(model), enabled=False),
            torch.enable_grad(),
            torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False),
        ):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32
        for module, mode in training.items():
            module.training = mode
        for key, config in configs.items():
            config._attn_implementation_internal = attention[key]


def _device_type(model: nn.Module) -> str:
    """For autocast, which doesn't know the meta device; a model without weights is refused later."""
    found = next((parameter.device.type for parameter in model.parameters()), "cpu")
    return "cpu" if found == "meta" else found


def _collect(config: Any, configs: dict[int, Any]) -> None:
    """A configuration and those inside it, some of which belong to no module."""
    configs[id(config)] = config
    for name in config.sub_configs:
        if (inner := getattr(config, name, None)) is not None and id(inner) not in configs:
            _collect(inner, configs)


def _decompose_attention(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            try:
                module.set_attn_implementation("sdpa")
            except ValueError:
                module.set_attn_implementation("eager")


class _PaddingIsARow(TorchFunctionMode):
    """Embeddings as functions of all their rows: training has no gradient for padding, but the loss depends on it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.embedding:
            args, kwargs = args[:2] + (None,) * (len(args) > 2) + args[3:], {**(kwargs or {})}
            kwargs.pop("padding_idx", None)
        return func(*args, **(kwargs or {}))


class Weights:
    """The weights of some groups as leaves of their own: the model's parameters are never touched.

    Half-precision models are measured in float32, on copies; all else shares its memory with the model, but for layers
    with an adapter, whose merged weight, ``W + Δ``, is what may move.
    """

    def __init__(self, model: nn.Module, groups: Sequence[Group]) -> None:
        self._model = model
        tensors = [*model.parameters(), *model.buffers()]
        self.dtype = measured_type(model)
        # By identity, so that tied tensors stay tied.
        self._stand_ins = {tensor: self.raised(tensor.detach()) for tensor in tensors}
        self.copied = sum(new.numel() for tensor, new in self._stand_ins.items() if new.dtype != tensor.dtype)
        """Elements of the tensors that were raised."""
        self.leaves: list[Tensor] = []
        """With a gradient; the groups' members in order."""
        self._merged: dict[LowRank, tuple[Tensor, Tensor | None]] = {}
        self.members: list[list[int]] = []
        """For each group, which leaves are its own."""
        self.names: list[str] = []
        for group in groups:
            self.members.append([])
            for layer in group.members:
                leaf = self._stand_ins[layer.parameter]
                if layer.adapter is not None:
                    leaf = derived(layer.parameter, partial(_merged_weight, leaf, layer.adapter))
                    self._merged[layer.adapter] = leaf, layer.adapter.bias(leaf.dtype)
                leaf.requires_grad_()
                self.members[-1].append(len(self.leaves))
                self.leaves.append(leaf)
                self.names.append(layer.name)
        # A cache of keys and values is of no use here, and its bookkeeping only costs.
        accepted = inspect.signature(model.forward).parameters
        self._extra: dict[str, Any] = {"use_cache": False} if "use_cache" in accepted else {}

    @property
    def all(self) -> list[Tensor]:
        """Every parameter and buffer of the model, as it is measured."""
        return [*self._stand_ins.values(), *(weight for weight, _ in self._merged.values())]

    def directions(self, ways: Mapping[str, Tensor]) -> list[dict[int, Tensor]]:
        """For each group the index of its leaves → V."""
        return [{i: ways[self.names[i]].to(self.leaves[i]) for i in members} for members in self.members]

    def raised(self, value: Any) -> Any:
        """A tensor in the precision of the measurement, if it has less."""
        if isinstance(value, Tensor) and value.dtype in HALF:
            return value.to(self.dtype)
        return value

    def logits(self, inputs: Inputs) -> Tensor:
        """The model's logits, as a function of the leaves."""
        args = () if isinstance(inputs, Mapping) else tuple(self.raised(value) for value in inputs)
        named = {key: self.raised(value) for key, value in inputs.items()} if isinstance(inputs, Mapping) else {}
        with self._swapped(), merged_in(self._model, self._merged), _PaddingIsARow():
            return find_logits(self._model(*args, **{**self._extra, **named}))

    @contextlib.contextmanager
    def _swapped(self) -> Iterator[None]:
        """The stand-ins in place of the model's own tensors.

        Not ``functional_call``, which doesn't put a module back that stands in two places.
        """
        members: list[dict[str, Any]] = [
            member for module in self._model.modules() for member in (module._parameters, module._buffers)
        ]
        saved = [dict(member) for member in members]
        try:
            for member in members:
                for name, tensor in member.items():
                    if tensor is not None:
                        member[name] = self._stand_ins[tensor]
            yield
        finally:
            for member, own in zip(members, saved, strict=True):
                member.update(own)


def _merged_weight(weight: Tensor, adapter: LowRank) -> Tensor:
    return weight + adapter.change(weight.dtype)


def split_batch(batch: Any, model: nn.Module) -> tuple[Inputs, Tensor]:
    """Inputs and labels of a batch, on the model's device.

    Raises:
        ValueError: no labels, or a batch that is neither a mapping nor a pair of inputs and labels.
    """
    device = next(model.parameters()).device
    if isinstance(batch, Mapping):
        name = next((n for n in ("labels", "label") if n in batch), None)
        if name is None:
            raise ValueError(f"batch has the keys {sorted(batch)}; it needs 'labels', one for each example")
        inputs: Inputs = {key: _to(value, device) for key, value in batch.items() if key != name}
        return inputs, _labels(batch[name], device)
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        inputs, labels = batch
        if isinstance(inputs, Mapping):
            return {key: _to(value, device) for key, value in inputs.items()}, _labels(labels, device)
        return (_to(inputs, device),), _labels(labels, device)
    raise ValueError(f"batch is a {type(batch).__name__}; give a mapping with 'labels', or a pair (inputs, labels)")


def some_examples(inputs: Inputs, examples: int, first: int, end: int) -> Inputs:
    """A part of a batch: of every tensor that has one row for each example."""

    def cut(value: Any) -> Any:
        whole = isinstance(value, Tensor) and value.dim() > 0 and len(value) == examples
        return value[first:end] if whole else value

    if isinstance(inputs, Mapping):
        return {key: cut(value) for key, value in inputs.items()}
    return tuple(cut(value) for value in inputs)


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def _labels(labels: Any, device: torch.device) -> Tensor:
    found = torch.as_tensor(labels, device=device)
    if found.dim() == 0:
        raise ValueError("labels is a single number; give a tensor with one label, or row of labels, for each example")
    return found
