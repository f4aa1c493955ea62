"""A model whose weights are sharded over processes (FSDP2) or offloaded (``device_map``), whole for a while."""

from __future__ import annotations

import contextlib
import logging
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from accelerate.utils import extract_model_from_parallel
from accelerate.utils.modeling import get_state_dict_offloaded_model
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from ..processes import Processes
from ..sharding import computing_device, has_shards, reshard, whole
from .free_memory import memory_given_back
from .offload_folder import OffloadFolder
from .paging import Pages, is_small, room

logger = logging.getLogger(__name__)

HALF = (torch.float16, torch.bfloat16)
"""Measured in float32, or in float64 where the model has that, too."""


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
    """Every weight as if it were whole, on the device that its module computes on; and back, also after an error.

    Shards are gathered one weight after the other; all processes must do this together. Where not all of them fit into
    the memory of each process, and where Accelerate has offloaded weights to the CPU or the disk, a weight is there
    while it is used: see :mod:`.paging`. Such weights are not of half precision.

    Raises:
        ValueError: tensor parallelism, in which modules compute with shards, or offloaded weights that are quantized.
        NotWritten: weights have to go to the disk, and can't.
    """
    offloading = [(module, hook) for module in model.modules() for hook in _offloading(module)]
    with contextlib.ExitStack() as stack:
        if offloading:
            _page_offloaded(model, offloading, stack)
        if has_shards(model):
            _check_meshes(model)
            reshard(model)
            with Processes(True).together():
                gathered = _gathered(model, stack)
            _put_in_place(model, gathered, stack)
        yield


def measured_type(model: nn.Module) -> torch.dtype:
    """What weights of half precision are measured in."""
    tensors = [*model.parameters(), *model.buffers()]
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def stored_weights(model: nn.Module) -> Mapping[str, Tensor]:
    """A model's weights by name, where they lie: sharded, on its device, or on the CPU if some are offloaded."""
    if any(_offloading(module) for module in model.modules()):
        return get_state_dict_offloaded_model(model)  # type: ignore[no-any-return]
    reshard(model)
    return model.state_dict()


def _offloading(module: nn.Module) -> list[AlignDevicesHook]:
    hook = getattr(module, "_hf_hook", None)
    hooks = hook.hooks if isinstance(hook, SequentialHook) else (hook,)
    return [hook for hook in hooks if isinstance(hook, AlignDevicesHook) and hook.offload]


def _page_offloaded(
    model: nn.Module, offloading: Iterable[tuple[nn.Module, AlignDevicesHook]], stack: contextlib.ExitStack
) -> None:
    """Until the stack is left: what Accelerate loads when a module runs is loaded when an operation reads it."""
    pages, dtype = Pages(), measured_type(model)
    tied: dict[tuple[int, torch.Size], nn.Parameter] = {}
    for module, hook in offloading:
        stack.callback(setattr, hook, "offload", True)
        hook.offload = False
        device = torch.device(hook.execution_device)
        for name, parameter in list(module.named_parameters(recurse=hook.place_submodules)):
            if not parameter.is_meta:
                continue  # tied to one of a module that stays
            if type(parameter) is not nn.Parameter:
                raise ValueError(
                    f"model has {name} offloaded as {type(parameter).__name__}: quantized weights are measured where "
                    "they fit into memory; load the model without offloading"
                )
            stored = hook.weights_map[name]
            raised = dtype if stored.dtype in HALF else stored.dtype
            load = partial(hook.weights_map.__getitem__, name)
            paged = pages.parameter(load, stored.shape, raised, device, parameter.requires_grad)
            if stored is hook.weights_map[name]:  # not one that is read from the disk each time
                paged = tied.setdefault((stored.data_ptr(), stored.shape), paged)
            _exchange(module, "_parameters", name, paged, stack)
        for name, buffer in list(module.named_buffers(recurse=hook.place_submodules)):
            if buffer.is_meta:
                _exchange(module, "_buffers", name, hook.weights_map[name].to(device), stack)
    _tie(model, pages, stack)
    _enter(pages, stack)


def _tie(model: nn.Module, pages: Pages, stack: contextlib.ExitStack) -> None:
    """By name and value: offloading has made two of a weight that has two names."""
    for module in model.modules():
        members = dict(module.named_parameters(remove_duplicate=False))
        for target, source in getattr(module, "all_tied_weights_keys", {}).items():
            first, second = members.get(target), members.get(source)
            if first is not None and second is not None and first is not second and first.shape == second.shape:
                with pages:  # a checkpoint may have had two weights all the same
                    same = torch.equal(first.detach().to(second.device), second.detach())
                if same:
                    _exchange(module, "_parameters", target, second, stack)


def _exchange(module: nn.Module, kind: str, name: str, tensor: Tensor, stack: contextlib.ExitStack) -> None:
    path, _, name = name.rpartition(".")
    members = getattr(module.get_submodule(path), kind)
    stack.callback(members.__setitem__, name, members[name])
    members[name] = tensor


def _gathered(model: nn.Module, stack: contextlib.ExitStack) -> dict[nn.Parameter, nn.Parameter]:
    """What stands for each parameter until the stack is left: whole, or paged where that doesn't fit."""
    processes, parameters, dtype = Processes(True), list(model.parameters()), measured_type(model)
    # As much again for the way from the reference.
    needed = 2 * sum(p.numel() * (dtype if p.dtype in HALF else p.dtype).itemsize for p in parameters)
    if all(processes.gather(needed <= room(computing_device(parameters[0])))):
        return {p: nn.Parameter(whole(p.detach()), p.requires_grad) for p in parameters}
    folder = OffloadFolder(processes)
    stack.callback(folder.close)
    logger.info("the whole weights go to files in %s, and into memory while they are used", folder.path)
    pages = Pages(folder)
    gathered = {}
    for parameter in parameters:
        tensor = whole(parameter.detach())
        if is_small(tensor):
            gathered[parameter] = nn.Parameter(tensor, parameter.requires_grad)
        else:
            raised = dtype if tensor.dtype in HALF else tensor.dtype
            gathered[parameter] = pages.parameter(
                folder.put(tensor), tensor.shape, raised, tensor.device, parameter.requires_grad
            )
    folder.share()
    _enter(pages, stack)
    return gathered


def _enter(pages: Pages, stack: contextlib.ExitStack) -> None:
    stack.callback(pages.close)
    stack.enter_context(memory_given_back())
    stack.enter_context(pages)


def _put_in_place(model: nn.Module, gathered: Mapping[nn.Parameter, nn.Parameter], stack: contextlib.ExitStack) -> None:
    """Until the stack is left, other parameters, and no hooks of FSDP2."""
    for module in model.modules():
        hooks = {name: _without_fsdp(getattr(module, name)) for name in ("_forward_pre_hooks", "_forward_hooks")}
        new = {name: gathered[p] for name, p in module._parameters.items() if p is not None}
        pairs: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = (vars(module), hooks), (module._parameters, new)
        for members, values in pairs:
            stack.callback(members.update, {name: members[name] for name in values})
            members.update(values)


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
