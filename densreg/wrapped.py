"""Modules that the objective refuses: wrapped in what is not differentiated twice, sharded, or averaged elsewhere."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from densreg import _torch, paths


def bare(model: nn.Module) -> nn.Module:
    """The model itself; raises TypeError where it is wrapped in what cannot be differentiated twice."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    model = _torch.uncompiled(model)
    check_bare("model", model.modules())
    return model


def is_trained(module: nn.Module) -> bool:
    return any(w.requires_grad for w in module.parameters())


def check_bare(name: str, modules: Iterable[nn.Module]) -> None:
    for module in modules:
        if isinstance(module, (DistributedDataParallel, nn.DataParallel)):
            raise TypeError(
                f"the {name} is wrapped in {type(module).__name__}, through which torch cannot take the input's "
                "gradient: wrap the objective, DistributedDataParallel(RegularizedObjective(model, ...))"
            )
        check_unsharded(module)


def check_unsharded(module: Any) -> None:
    if type(module).__name__.startswith(("FSDP", "FullyShardedDataParallel")):
        raise TypeError(
            "the model is sharded (FSDP), and gradients of gradients do not go through its resharding: "
            "wrap the objective in DistributedDataParallel instead"
        )


_AVERAGED: WeakKeyDictionary[nn.Module, set[int]] = WeakKeyDictionary()
"""The ids of the parameters that a DistributedDataParallel averages: those that required grad when it was made."""
_made = 0


def wrappers_made() -> int:
    """How many DistributedDataParallel were made since densreg was imported."""
    return _made


def _see_wrapper(module: nn.Module, _name: str, child: nn.Module) -> None:
    """Called wherever a module gets a child."""
    global _made
    if isinstance(module, DistributedDataParallel):
        _made += 1
        _AVERAGED[module] = {id(w) for w in child.parameters() if w.requires_grad}


nn.modules.module.register_module_module_registration_hook(_see_wrapper)


def check_averaged(objective: nn.Module, trained: Sequence[Tensor]) -> None:
    """Raises RuntimeError where the DistributedDataParallel around it would not average a gradient."""
    active = _torch.active_ddp()
    averaged = None if active is None else _AVERAGED.get(active)
    if averaged is None:  # or it was made before densreg was imported
        return
    late = next((w for w in trained if id(w) not in averaged), None)
    if late is not None:
        name = next(name for name, w in objective.named_parameters() if w is late)
        raise RuntimeError(
            f"{name} is trained only since DistributedDataParallel was made, which averages the gradients of those "
            "parameters alone that required grad then: make it anew, DistributedDataParallel(objective)"
        )


def check_parallel(objective: Any) -> None:
    """Raises TypeError where the modules were parallelized out of the objective's sight.

    No module knows what it is wrapped in, so all objects of the process are looked through: once, and again after each
    new wrapper.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    if any(map(paths.is_dtensor, objective.model.parameters())):  # a teacher's may be
        raise TypeError(
            "the model's weights are DTensors (as of tensor parallelism), which lose gradients of gradients: wrap "
            "the objective in DistributedDataParallel instead"
        )
    active = _torch.active_ddp()
    if active is not None:  # of the objective; another of the model may train it in other steps
        if _torch.delays_all_reduce(active):
            raise TypeError(
                "expected DistributedDataParallel without delay_all_reduce_named_params: it averages these gradients "
                "once that of another parameter is there, which in the objective's backward may be before they are"
            )
        return
    parts = set(filter(is_trained, objective.modules())) - {objective}
    for wrapper in gc.get_objects():
        ours = issubclass(type(wrapper), DistributedDataParallel)
        if ours and getattr(wrapper, "module", None) in parts:
            raise TypeError(
                f"the objective's {type(wrapper.module).__name__} is wrapped in DistributedDataParallel, which does "
                "not average gradients that the objective computes: wrap the objective, "
                "DistributedDataParallel(RegularizedObjective(model, ...))"
            )
