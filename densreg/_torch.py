"""What densreg uses of torch under private names, each in one place; a test keeps such names out of every other module.

The test holds benchmarks, examples and tests to it too, with a short list of names that each may use.
A private name has a part that begins with one underscore (``torch._dynamo``, ``torch._C``, ``module._buffers``), or is
what torch calls a node of its graphs. All of these are there on torch 2.11 to 2.15; a comment says otherwise where one
differs, and why no public name does. docs/contributing.md, "A new torch version", says how to check them on the next.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor.custom_graph_pass import CustomGraphPass as CustomGraphPass
from torch._inductor.custom_graph_pass import get_hash_for_files as get_hash_for_files

# What sees each kernel, and tensors without memory: the benchmarks count a step's products with them.
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode

# Trees of lists, tuples and dicts. torch has them under no public name, and optree is one more dependency.
from torch.utils._pytree import tree_flatten as tree_flatten
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_map as tree_map
from torch.utils._pytree import tree_unflatten as tree_unflatten

# --------------------------------------------------------------------------------------------------------------------
# transforms: torch.func, forward mode, and the vmap of torch.autograd. No public name says which are active.

_VMAP_OF_AUTOGRAD = torch._C._dispatch_key_parse("VmapMode")  # torch.func's is another


def inside_func_transform() -> bool:
    """Whether torch.func's transforms are active."""
    return torch._C._are_functorch_transforms_active()


def inside_autograd_vmap() -> bool:
    """Whether this runs under ``is_grads_batched`` or ``vectorize=True``."""
    return torch._C._dispatch_tls_is_dispatch_key_included(_VMAP_OF_AUTOGRAD)


def inside_forward_mode() -> bool:
    """Whether a level of ``torch.autograd.forward_ad`` is entered."""
    return torch.autograd.forward_ad._current_level >= 0


# --------------------------------------------------------------------------------------------------------------------
# autograd


def engine_needs(tensor: Tensor) -> bool:
    """Whether the running backward is to compute the gradient of a tensor that requires grad.

    ``needs_input_grad`` also says so of weights under ``grad(loss, [x])`` (pytorch #56500), for lack of a public name.
    """
    with plain_tensors():  # a subclass would be given the edge of a view of it
        return engine_runs(torch.autograd.graph.get_gradient_edge(tensor).node)


def engine_runs(node: Any) -> bool:
    """Whether a node is a part of the running backward."""
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # of a leaf whose gradient autograd.grad was asked for
        return True


def keeps_graph() -> bool:
    """Whether the running backward leaves its graph for another one (``retain_graph``)."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def version(tensor: Tensor) -> int:
    """How often a tensor was changed in place; documented, under this name only."""
    return tensor._version


def scaled(tensors: list[Tensor], factor: Tensor) -> Sequence[Tensor]:
    """All times a scalar, in one kernel; documented, under this name only."""
    return torch._foreach_mul(tensors, factor) if tensors else ()


def has_post_accumulate_grad_hooks(leaf: Tensor) -> bool:
    """torch registers such hooks and has no public way to ask for them."""
    return bool(getattr(leaf, "_post_accumulate_grad_hooks", None))


@contextlib.contextmanager
def without_gradient_hooks(leaves: Sequence[Tensor]) -> Iterator[None]:
    """The leaves without the hooks of ``register_hook``, whose handles only those have who registered them."""
    hooks = [leaf._backward_hooks for leaf in leaves]
    for leaf in leaves:
        leaf._backward_hooks = None
    try:
        yield
    finally:
        for leaf, kept in zip(leaves, hooks, strict=True):
            leaf._backward_hooks = kept


# The nodes of a graph have their class by name only: those of torch's own C++ have no class in Python, and those of
# Functions one that is private. Where one is renamed, the tests of the errors and remedies that need it fail.

_OBSTACLES = {
    "torch::autograd::Error": "once",  # where a backward ran outside of autograd
    "torch::autograd::WarnNotImplemented": "no formula",  # its backward only warns
    "CompiledFunctionBackwardBackward": "compiled",
    "RegisterPostBackwardFunctionBackward": "FSDP2",
}


def obstacle(node: Any) -> str | None:
    """Why gradients of gradients cannot go through a node, or are lost at it; None where nothing is known."""
    name = node.name()
    if name == "torch::autograd::AccumulateGrad":
        leaf = node.variable
        if getattr(leaf, "_is_flat_param", False):
            return "FSDP1"
        sharded = any(not placement.is_replicate() for placement in getattr(leaf, "placements", ()))
        return "DTensor" if sharded else None
    if name == "_DDPSinkBackward":
        return "static_graph" if node.ddp_weakref().static_graph else None
    function = getattr(node, "_forward_cls", None)  # of a node of a Function
    if function is not None and function.__module__.startswith("torch._higher_order_ops"):
        return "higher order"
    return _OBSTACLES.get(name)


def has_no_formula(node: Any) -> bool:
    """Whether torch put this node where an operator has nothing registered for autograd: its backward only warns."""
    return obstacle(node) == "no formula"


def may_leave_autograd(node: Any) -> bool:
    """Whether this is a node whose backward can compute what it returns outside of autograd, and leave no trace of it.

    Nothing is known of a Function's backward, in Python or C++, nor of that of an operator registered from Python; and
    torch's own gradient of sparse_coo_tensor in the values has no graph.
    """
    name = node.name()
    if isinstance(node, torch.autograd.function.BackwardCFunction):
        return name != "CompiledFunctionBackward"  # of torch.compile's, whose own node says so in the next backward
    return name == "SparseCooTensorWithDimsAndTensorsBackward0" or "CppNode<" in name


CHUNKED = "torch_nn__linear_cross_entropy_batch_chunked"
"""What :func:`forward_of` calls F.linear_cross_entropy with ``options``, whose forward computes gradients, detached."""


def forward_of(node: Any) -> tuple[type | None, str]:
    """The Function in Python whose node this is, if it is one, and what to call the forward."""
    function = getattr(node, "_forward_cls", None)
    if function is not None:
        return function, function.__name__.removeprefix("GeneratedBackwardFor_").removesuffix("_default")
    name = node.name()
    return None, "torch.sparse_coo_tensor" if name.startswith("Sparse") else name


def is_reentrant_checkpoint(node: Any) -> bool:
    return node.name() == "CheckpointFunctionBackward"


def leaf_of(node: Any) -> Tensor | None:
    """The leaf whose gradient a node accumulates; None for any other node."""
    return node.variable if node.name() == "torch::autograd::AccumulateGrad" else None


def active_ddp() -> nn.parallel.DistributedDataParallel | None:
    """The DistributedDataParallel from whose forward this is called."""
    return nn.parallel.DistributedDataParallel._get_active_ddp_module()


def delays_all_reduce(ddp: nn.parallel.DistributedDataParallel) -> bool:
    """Whether it has ``delay_all_reduce_named_params``."""
    return bool(ddp._delay_all_reduce_params)


def group_named(name: str) -> Any:
    """The process group of a name."""
    resolve: Any = torch.distributed.distributed_c10d._resolve_process_group
    return resolve(name)


# --------------------------------------------------------------------------------------------------------------------
# tensors and functions

# Makes of a subclass of Tensor one whose operations give plain tensors: ``__torch_function__ = ordinary_results``.
# "Extending PyTorch" names it so.
ordinary_results = torch._C._disabled_torch_function_impl

# What nn.utils.weight_norm and its parametrization call, for a mode that replaces it.
weight_norm = torch._weight_norm


def plain_tensors() -> AbstractContextManager:
    """Context in which subclasses of Tensor do not override torch's functions, and modes still do."""
    return torch._C.DisableTorchFunctionSubclass()


def has_kernel(operator: str, key: str) -> bool:
    """Whether an operator, ``"namespace::name.overload"``, has a kernel of its own for a dispatch key, as "CUDA"."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(operator, key)


def occupy(cycles: int) -> None:
    """Keep the current CUDA stream busy for so many cycles, while the kernels to come are queued behind."""
    torch.cuda._sleep(cycles)


# --------------------------------------------------------------------------------------------------------------------
# modules


def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """A module's own buffers, to be replaced in place; setattr would call what the module does on assignment."""
    return module._buffers


def trained_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Those of ``module.parameters()`` that require grad, in that order, found in 0.4 times the time."""
    found: dict[int, nn.Parameter] = {}
    seen = set()
    pending: list[nn.Module | None] = [module]
    while pending:
        current = pending.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        for w in current._parameters.values():
            if w is not None and w.requires_grad:
                found[id(w)] = w
        if current._modules:
            pending.extend([*current._modules.values()][::-1])
    return list(found.values())


def attributes_of(module: nn.Module) -> dict[str, Any]:
    """A module's own attributes and buffers, without its parameters and children."""
    containers = ("_parameters", "_buffers", "_modules")
    return {name: v for name, v in {**module._buffers, **vars(module)}.items() if name not in containers}


def traits_of(module: nn.Module) -> tuple[Any, ...]:
    """By what to see that a module's forward may do something else: its class, number of hooks, and bool attributes."""
    flags = (v for v in vars(module).values() if v is True or v is False)
    return type(module), len(module._forward_hooks), len(module._forward_pre_hooks), *flags


def forward_pre_hooks(module: nn.Module) -> list[Callable]:
    return list(module._forward_pre_hooks.values())


def call_uncompiled(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """A module's call with its hooks, past what ``module.compile()`` has put there."""
    return module(*args, **kwargs) if module._compiled_call_impl is None else module._call_impl(*args, **kwargs)


def uncompiled(model: nn.Module) -> nn.Module:
    """The module that torch.compile wrapped, or the model itself."""
    return getattr(model, "_orig_mod", model)


def is_dropout(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.dropout._DropoutNd)


# --------------------------------------------------------------------------------------------------------------------
# torch.compile. torch.compiler has no public name for any of these; what it has (allow_in_graph,
# assume_constant_result, reset) is used from there.


def traces_autograd() -> bool:
    """Whether Dynamo traces ``torch.autograd.grad``; since torch 2.11."""
    return torch._dynamo.config.trace_autograd_ops


def tracing_autograd() -> AbstractContextManager:
    """Context in which it does, as a compiled step of one's own needs."""
    return torch._dynamo.config.patch(trace_autograd_ops=True)


def dynamo_config(**values: Any) -> Callable[[], Callable[[], None]]:
    """A function that sets options of Dynamo and returns one that undoes it, in less time than ``config.patch``."""
    return torch._dynamo.config._make_closure_patcher(**values)


def inductor_pass(own: CustomGraphPass) -> AbstractContextManager:
    """Context in which inductor runs a pass over its graphs, unless the user has one: there is room for one."""
    if torch._inductor.config.post_grad_custom_pre_pass is not None:
        return contextlib.nullcontext()
    return torch._inductor.config.patch(post_grad_custom_pre_pass=own)


def indices_of_maxima() -> torch._ops.OpOverload:
    """By which inductor writes the flat indices of max pooling's maxima, from their places in the windows."""
    import torch._inductor.inductor_prims  # which defines it

    return torch.ops.prims._low_memory_max_pool_offsets_to_indices.default


def inductor_decompositions() -> dict:
    """By which inductor rewrites operators before densreg's passes see them."""
    import torch._inductor.lowering  # which they need

    return torch._inductor.decomposition.select_decomp_table()


def lays_out_convolutions() -> bool:
    """Whether inductor makes channels_last of images around convolutions on a CPU, as it does by default."""
    return bool(torch._inductor.config.layout_optimization and torch.backends.mkldnn.enabled)


def function_of(node: torch.fx.Node) -> type | None:
    """The Function marked ``allow_in_graph`` that a node of Dynamo's graph calls, through a local function."""
    if getattr(node.target, "__name__", None) != "trampoline_autograd_apply":
        return None
    return node.target.__closure__[0].cell_contents  # type: ignore[index, union-attr]


def is_foreign(node: torch.fx.Node) -> bool:
    """Whether a node of Dynamo's graph calls what is not torch's or densreg's: a Function, an operator, a function.

    ``flat_apply`` is torch's, and calls the function of a ``nonstrict_trace``.
    """
    if node.op != "call_function":
        return False
    target: Any = function_of(node) or node.target
    if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return str(target).partition(".")[0] not in ("aten", "prims", "densreg")
    module = getattr(target, "__module__", None) or "torch"
    known = module.partition(".")[0] in ("torch", "densreg", "math", "builtins", "_operator")
    return not known or str(target) == "flat_apply"


def without_formula(node: torch.fx.Node) -> bool:
    """Whether a node of Dynamo's graph calls an operator for which nothing is registered with autograd."""
    results = tree_leaves(node.meta.get("example_value"))
    return any(isinstance(t, Tensor) and t.grad_fn is not None and has_no_formula(t.grad_fn) for t in results)


def cacheable(functions: Iterable[Callable], key: str) -> AbstractContextManager:
    """Context in which AOTAutograd's cache takes graphs that call these functions.

    The key has to change whenever they do something else without a change in the graph.
    """
    # Sorted: torch's key depends on the order, and that of a set of functions is another in each process.
    names = sorted(f"{function.__module__}.{function.__name__}" for function in functions)
    marked = torch._inductor.config.unsafe_marked_cacheable_functions | dict.fromkeys(names, key)
    return torch._inductor.config.patch(unsafe_marked_cacheable_functions=marked)


SDPA_KERNEL = (torch.nn.attention._backend_from_string, torch.nn.attention._sdpa_kernel)
"""What ``sdpa_kernel`` is in a graph of Dynamo's: functions of names that are in the graph too."""


def count(event: str) -> None:
    """Counts what a pass did where torch counts what its own did: ``torch._dynamo.utils.counters["densreg"]``."""
    torch._dynamo.utils.counters["densreg"][event] += 1


def compiled_graphs() -> int:
    """How many graphs torch.compile has compiled, since the count was cleared."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def compile_error() -> type[Exception]:
    """The class of Dynamo's errors."""
    return torch._dynamo.exc.TorchDynamoException


def recompile_limit_error() -> type[Exception]:
    """The class of the error that a function was compiled too often."""
    return torch._dynamo.exc.FailOnRecompileLimitHit


def compiled_versions(code: CodeType) -> int:
    """How many versions of a function Dynamo keeps."""
    return len(torch._dynamo.eval_frame._debug_get_cache_entry_list(code))


def recompile_reasons(code: CodeType) -> list[str]:
    """Why Dynamo compiled a function again, the latest last; torch.compile says so in its log only."""
    return [str(reason) for reason in torch._dynamo.utils.guard_failures.get(code, ())]


def compiler_backend(backend: str | Callable, mode: str | None) -> Any:
    """What torch.compile calls with a graph, for a backend of one's own that looks at the graph before.

    torch.compile takes such a backend as it is and would give it no ``mode``.
    """
    if backend == "inductor":
        return torch._TorchCompileInductorWrapper(mode, None, False)
    return torch._TorchCompileWrapper(backend, mode, None, False)


@contextlib.contextmanager
def scoped_reductions() -> Iterator[None]:
    """inductor's C++ with each stored reduction in a scope of its own.

    Two half-precision results of one vectorized reduction, ``(x.sum(0), x.sum(0).view(4, 4))`` of a [64, 16] bfloat16
    x, are otherwise one name declared twice, which no C++ compiler takes. A penalized step under autocast has many.
    """
    from torch._inductor.codegen.common import IndentedBuffer
    from torch._inductor.codegen.cpp import CppVecKernel

    store_reduction = CppVecKernel.store_reduction

    def scoped(kernel: Any, name: str, index: Any, value: Any) -> None:
        before, kernel.reduction_suffix = kernel.reduction_suffix, IndentedBuffer()
        store_reduction(kernel, name, index, value)
        before.writeline("{")
        before.splice(kernel.reduction_suffix)
        before.writeline("}")
        kernel.reduction_suffix = before

    with replaced(CppVecKernel, "store_reduction", scoped):
        yield


def without_caches() -> AbstractContextManager:
    """Context in which inductor takes nothing from its caches."""
    return torch._inductor.config.patch(force_disable_caches=True)


def replaced_weight_norm(value: Callable) -> AbstractContextManager:
    """Context in which what ``weight_norm`` calls is another, for all threads; :data:`weight_norm` stays."""
    return replaced(torch, "_weight_norm", value)


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Context in which an attribute of a module or class is another, for all threads."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
