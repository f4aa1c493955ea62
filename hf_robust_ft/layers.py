"""Which parameters of a model count as layers, and what becomes of all the others.

A layer is a weight that multiplies: the matrix or kernel of a linear map. What is added (biases, class
tokens, position tables held as parameters) or scales one feature (norms, layer scale) is not, and is
listed with that reason, so that every trained parameter has a declared place.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .adapters import LowRank, find_adapters, merged_name, without_adapters


@dataclass(frozen=True)
class Layer:
    """A trained weight matrix or kernel."""

    name: str
    """Name of the parameter; of the first one where several names share it (tied weights). In a model with adapters,
    the name in the merged model."""
    parameter: nn.Parameter
    """The weight itself; of a layer with an adapter the base weight, which is frozen."""
    kind: str
    """Class of the module that holds it, such as ``Linear``."""
    row_dims: tuple[int, ...] | None
    """Dimensions that number the outputs; None where that is not known (a row-sum norm has no meaning)."""
    block: str
    """Name of the block that it belongs to: a transformer block is one."""
    depth: int
    """0 for the first block of the model, 1 for the next, …"""
    fresh: bool
    """Whether it is a new head: ``from_pretrained`` found no weights for it, or, for a model that does not
    tell (a deep copy), it lies outside the base model. Models from elsewhere have no fresh layers."""
    tied: tuple[str, ...] = ()
    """Other names of the same parameter."""
    stored: str = ""
    """Its name in the model's own state dict, which adapters change."""
    adapter: LowRank | None = None
    """What is trained in place of the parameter, and added to it (LoRA)."""

    def matches(self, pattern: str) -> bool:
        """Whether a pattern (``*`` and ``?``) is the whole name of the parameter or of its module, also a tied one."""
        names = (self.name, *self.tied)
        return any(fnmatchcase(name, pattern) for name in (*names, *(name.rpartition(".")[0] for name in names)))


@dataclass(frozen=True)
class NotALayer:
    """A trained parameter (or batch-norm statistic) that is never constrained, and why."""

    name: str
    shape: tuple[int, ...]
    reason: str


def find_layers(model: nn.Module) -> tuple[list[Layer], list[NotALayer]]:
    """Sort every trained parameter of a model into layers and the rest.

    Works on any ``nn.Module``. Knows ``Linear``, ``Conv1D`` (GPT-2), convolutions of all dimensions,
    embeddings, ``Bilinear`` and, by shape, matrices held by other modules (``MultiheadAttention``,
    recurrent layers, stacked experts). Frozen parameters are left out; tied ones count once.

    With PEFT adapters, names are those of the merged model. A weight that plain LoRA changes is one layer, whose two
    factors are no parameters of their own; a module that is trained whole (``modules_to_save``) is like any other.
    What other adapters train is among the others.

    Args:
        model: unwrapped (no DDP, no compiled wrapper).

    Returns:
        Layers and the others, each in the order of ``model.named_parameters()``. Running statistics of
        batch norm are among the others.
    """
    adapters = find_adapters(model)
    products = {factor: layer for layer in adapters.products for factor in layer.factors.values()}
    # Of a wrapper and what it wraps, the latter comes later and stays.
    modules = {merged_name(name, model): module for name, module in model.named_modules()}
    names: dict[nn.Parameter | LowRank, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:
            continue
        if (adapter := products.get(parameter)) is not None:
            names[adapter] = [f"{adapter.path}.base_layer.weight".lstrip(".")]
        else:
            names.setdefault(parameter, []).append(name)
    pretrained = _pretrained(without_adapters(model))
    blocks: dict[str, int] = {}
    layers: list[Layer] = []
    others: list[NotALayer] = []
    for trained, (stored, *tied) in names.items():
        adapter, parameter = (trained, trained.weight) if isinstance(trained, LowRank) else (None, trained)
        name = merged_name(stored, model)
        module = modules[name.rpartition(".")[0]]
        reason = adapters.strays.get(parameter) or _why_no_layer(name, parameter, module)
        if reason is not None:
            others.append(NotALayer(name, tuple(parameter.shape), reason))
            continue
        block = _block(name, modules)
        layers.append(
            Layer(
                name=name,
                parameter=parameter,
                kind=type(module).__name__,
                row_dims=_row_dims(parameter, module),
                block=block,
                depth=blocks.setdefault(block, len(blocks)),
                fresh=adapters.originals.get(parameter, parameter) not in pretrained,
                tied=tuple(merged_name(other, model) for other in tied),
                stored=stored,
                adapter=adapter,
            )
        )
    others.extend(_batch_norm_statistics(modules))
    return layers, others


def _pretrained(model: nn.Module) -> set[nn.Parameter]:
    parameters = set(model.parameters())
    if not isinstance(model, PreTrainedModel):
        return parameters
    # transformers marks each parameter that a checkpoint filled. copy.deepcopy and torch.load lose the marks:
    # then a head is better left free than held at random weights.
    marked = {parameter for parameter in parameters if getattr(parameter, "_is_hf_initialized", False)}
    return marked or set(model.base_model.parameters())


def _why_no_layer(name: str, parameter: nn.Parameter, module: nn.Module) -> str | None:
    short = name.rpartition(".")[2]
    if ".parametrizations." in f".{name}":
        return "part of a re-parametrized weight (such as weight norm)"
    if "bias" in short:
        return "bias"
    if "norm" in type(module).__name__.lower():
        return "norm"
    if parameter.dim() < 2:
        return "scale or vector, not a matrix"
    if isinstance(module, (nn.Linear, Conv1D, _ConvNd, nn.Embedding, nn.EmbeddingBag, nn.Bilinear)):
        return None
    # A leading 1 is the batch dimension of something that is the same for every example.
    if parameter.shape[0] == 1:
        return "token, position table or scale, not a matrix"
    return None


def _row_dims(parameter: nn.Parameter, module: nn.Module) -> tuple[int, ...] | None:
    if isinstance(module, _ConvTransposeNd):
        # [in, out / groups, …]: with groups, no dimension numbers the outputs.
        return (1,) if module.groups == 1 else None
    if isinstance(module, Conv1D):
        return (1,)
    if isinstance(module, (nn.Linear, _ConvNd, nn.Bilinear)):
        return (0,)
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        # A lookup: each token's vector is a row of its own, as it is in the head that it may be tied to.
        return (0,)
    return (0,) if parameter.dim() == 2 else None


def _block(name: str, modules: dict[str, nn.Module]) -> str:
    """The unit of depth: the innermost item of a module list, or else the parent module.

    Modules at the top of a model (a classifier, the ``fc1`` and ``fc2`` of a small network) are each
    their own unit.
    """
    owner = name.rpartition(".")[0]
    for prefix in _prefixes(owner):
        parent = modules[prefix.rpartition(".")[0]]
        if isinstance(parent, (nn.ModuleList, nn.Sequential)):
            return prefix
    return owner.rpartition(".")[0] or owner


def _prefixes(name: str) -> Iterator[str]:
    while name:
        yield name
        name = name.rpartition(".")[0]


def _batch_norm_statistics(modules: dict[str, nn.Module]) -> Iterator[NotALayer]:
    for prefix, module in modules.items():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
            for short in ("running_mean", "running_var"):
                statistic = getattr(module, short)
                if statistic is not None:
                    name = f"{prefix}.{short}" if prefix else short
                    yield NotALayer(name, tuple(statistic.shape), "batch-norm statistic, updated by the data")
