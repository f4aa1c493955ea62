"""A model whose weights are sharded over processes (FSDP2) or offloaded (``device_map``), whole for a while."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

from accelerate.hooks import AlignDevicesHook, SequentialHook
from accelerate.utils import extract_model_from_parallel
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from ..processes import Processes
from ..sharding import has_shards, reshard, whole


def unwrapped(model: nn.Module) -> nn.Module:
    """Without DDP or torch.compile around it.

    Raises:
        ValueError: FSDP1 or DeepSpeed, which leave no whole weights to measure.
    """
    sharded = None
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        sharded = "FSDP1 (FullyShardedDataParallel)"
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        sharded = "DeepSpeed ZeRO-3"
    if sharded is not None:
        raise ValueError(
            f"model is sharded by {sharded}, which can't be measured; save it and load it in each process, or shard it "
            "by FSDP2 (fully_shard)"
        )
    return extract_model_from_parallel(model, keep_torch_compile=False)  # type: ignore[no-any-return]


def processes_of(model: nn.Module, distributed: bool) -> Processes:
    """Those that measure a model together: of a sharded one, all that hold a part."""
    return Processes(distributed or has_shards(model))


@contextlib.contextmanager
def whole_weights(model: nn.Module) -> Iterator[None]:
    """Every weight whole, on the device that its module computes on, and back, also after an error.

    Shards are gathered one weight after the other; all processes must do this together. Each then holds the whole
    model. Offloaded weights (by Accelerate, to the CPU or the disk) are loaded.

    Raises:
        ValueError: tensor parallelism, in which modules compute with shards.
    """
    with contextlib.ExitStack() as stack:
        for module in model.modules():
            for hook in _offloading(module):
                stack.callback(_offload, module, hook)
                hook.pre_forward(module)
                hook.offload = False
        if has_shards(model):
            stack.enter_context(_gathered(model))
        yield


def _offloading(module: nn.Module) -> list[AlignDevicesHook]:
    hook = getattr(module, "_hf_hook", None)
    hooks = hook.hooks if isinstance(hook, SequentialHook) else (hook,)
    return [hook for hook in hooks if isinstance(hook, AlignDevicesHook) and hook.offload]


def _offload(module: nn.Module, hook: AlignDevicesHook) -> None:
    hook.offload = True
    hook.post_forward(module, None)


@contextlib.contextmanager
def _gathered(model: nn.Module) -> Iterator[None]:
    _check_meshes(model)
    reshard(model)
    gathered: dict[nn.Parameter, nn.Parameter] = {}
    for parameter in model.parameters():
        gathered[parameter] = nn.Parameter(whole(parameter.detach()), parameter.requires_grad)
    saved: list[tuple[dict[str, Any], dict[str, Any]]] = []
    try:
        for module in model.modules():
            hooks = {name: _without_fsdp(getattr(module, name)) for name in ("_forward_pre_hooks", "_forward_hooks")}
            saved.append((module._parameters, dict(module._parameters)))
            saved.append((vars(module), {name: vars(module)[name] for name in hooks}))
            vars(module).update(hooks)
            module._parameters.update({name: gathered[p] for name, p in module._parameters.items() if p is not None})
        yield
    finally:
        for values, own in saved:
            values.update(own)


def _without_fsdp(hooks: dict[int, Any]) -> dict[int, Any]:
    """Hooks but those of FSDP2, which would put shards in the place of whole weights."""
    return OrderedDict(
        (number, hook)
        for number, hook in hooks.items()
        if not str(getattr(hook, "__module__", "")).startswith("torch.distributed.fsdp")
    )


def _check_meshes(model: nn.Module) -> None:
    managed = any(isinstance(module, FSDPModule) for module in model.modules())
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor) and (not managed or "tp" in (parameter.device_mesh.mesh_dim_names or ())):
            raise ValueError(
                f"model has {name} sharded by tensor parallelism, and its modules compute with shards; to measure it, "
                "save it and load it without tp_plan"
            )
