"""What is compiled, and how: a step as one graph, with errors that say which layer does not compile, and why."""

from __future__ import annotations

import contextlib
import functools
import logging
import re
import sys
import threading
import time
import traceback
import types
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from densreg import _torch, ops
from densreg.batch import Batch
from densreg.check import of_a_graph
from densreg.functional import _Function
from densreg.graph_passes import GraphPasses
from densreg.head import check_is_last
from densreg.paths import HIGHER_ORDER, NO_FORMULA
from densreg.second_order import replaced_under_compile
from densreg.step import StepResult, StepSpec, raise_kept_tensor, try_score, try_trained, without_trace

OFTEN = 5
"""So many versions of a compiled step are normal (a smaller last batch, steps without the penalty); more are not."""

# What Dynamo has to know for the call: to trace autograd.grad; that DDP(objective) is one graph too, which its
# splitting into buckets would cut; that new shapes, not an oversight, are what a step is compiled again for; and that
# a hook which comes after the first step counts.
DYNAMO_OPTIONS = {
    "trace_autograd_ops": True,
    "optimize_ddp": False,
    "recompile_limit": 64,
    "skip_nnmodule_hook_guards": False,
}

_LOCK = threading.RLock()
"""Held during compiled calls: on some versions of torch Dynamo's configuration is one for all threads."""


_LOGGER = logging.getLogger("densreg")


def _inform(line: str) -> None:
    """Logs a line at level INFO. If logging is not set up to show or to hide it, it goes to a terminal as well."""
    _LOGGER.info(line)
    undecided = _LOGGER.level == logging.NOTSET and not _LOGGER.isEnabledFor(logging.INFO)
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    first = not distributed or torch.distributed.get_rank() == 0
    if undecided and first and sys.stderr is not None and sys.stderr.isatty():
        print(f"densreg: {line}", file=sys.stderr, flush=True)


class CompiledStep:
    """A step as one graph, with versions and a recompilation limit of its own.

    Args:
        step: called as ``step(spec, batch, target, coeff, scale, ...)``.
        mode, backend: of :func:`torch.compile`.
        penalized: whether any of its calls is, and so has a second order to lose.
    """

    def __init__(
        self, step: Callable[..., StepResult], mode: str | None, backend: str | Callable, penalized: bool
    ) -> None:
        self.step = step
        # Dynamo keeps what it compiled by code object, with one limit for all: each objective gets its own.
        self._code = step.__code__.replace()
        function = types.FunctionType(self._code, step.__globals__, argdefs=step.__defaults__)
        checked = CheckedBackend(mode, backend, penalized)
        self._compiled = torch.compile(function, fullgraph=True, dynamic=False, backend=checked)
        self._configure = _torch.dynamo_config(**DYNAMO_OPTIONS)
        self._backend = checked
        self._warned = self._started = False

    def __call__(self, spec: StepSpec, batch: Batch, *args: Any, **kwargs: Any) -> StepResult:
        """The step's result. The first call logs that it compiles, and then how long it took.

        Raises:
            RuntimeError: it cannot be compiled as one graph, or was compiled too often. An error of the step itself,
                which it has in eager too, is raised in its place.
        """
        failure: Exception
        first, self._started = not self._started, True
        if first:
            _inform("the first training step compiles, which can take minutes; compile=False starts at once")
            start = time.perf_counter()
        with _LOCK, replaced_under_compile():
            self._backend.given = spec, batch
            restore = self._configure()
            try:
                result = self._compiled(spec, batch, *args, **kwargs)
            except _torch.recompile_limit_error() as error:
                raise RuntimeError(self._recompilations()) from error
            except _torch.compile_error() as error:
                failure = error
            else:
                if first:
                    _inform(f"the first training step took {time.perf_counter() - start:.1f} s with its compilation")
                # Dynamo's own count takes longer than the rest of this function: only where there can be so many.
                often = not self._warned and self._backend.graphs > OFTEN
                if often and _torch.compiled_versions(self._code) > OFTEN:
                    self._warned = True
                    warnings.warn(self._recompilations(), RuntimeWarning, stacklevel=2)
                return result
            finally:
                restore()
                self._backend.given = None
        with without_trace(spec, batch):  # an error of the step itself, if it has one, says more than Dynamo's
            self.step(spec, batch, *args, **kwargs)
        raise_kept_tensor(spec, batch, failure)
        raise RuntimeError(
            f"the training step could not be compiled as one graph: {explanation(failure, spec.model, batch.xs)}; or "
            "compile=False, which runs it in eager, where there is no error (torch's own words are above in full)"
        ) from failure

    def _recompilations(self) -> str:
        """That the step is compiled again and again, and why."""
        versions = _torch.compiled_versions(self._code)
        reasons = _torch.recompile_reasons(self._code) or ["?: unknown"]
        latest = reasons[-min(max(1, versions - 1), len(reasons))]  # one for each version, the latest first
        reason = latest.splitlines()[0].partition(": ")[2].partition("  #")[0].strip()
        return (
            f"the training step was compiled {versions} times, the last time because of: {reason}. Each new shape of a "
            "batch and each new Python number in the target, the criterion or the model is compiled anew: use batches "
            "of one size (drop_last=True) and tensors for numbers that change, or compile=False"
        )


class CheckedBackend:
    """A backend of torch.compile that raises where second order would be lost without a word: see functional.py."""

    def __init__(self, mode: str | None, backend: str | Callable, penalized: bool) -> None:
        self.penalized = penalized
        self.graphs = 0
        """How many were compiled."""
        self.given: tuple[StepSpec, Batch] | None = None
        """What the running call was given."""
        self.stores = _torch.scoped_reductions if backend == "inductor" else contextlib.nullcontext
        self.inner = _torch.compiler_backend(backend, mode)

    def __call__(self, graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
        self.graphs += 1
        if self.given is not None:  # what raises here is compiled anew, and so checked again, in the next call
            spec, batch = self.given
            if spec.head is not None:
                check_is_last(spec, batch)
            known = {id(t) for t in (*spec.trained, *batch.xs)}
            if any(t.requires_grad and id(t) not in known for t in inputs if isinstance(t, Tensor)):
                try_trained(spec, batch)  # perhaps the criterion's alone: the graph does not say
        if any(_overrides_functions(t) for t in inputs):
            raise RuntimeError("a tensor of the model is of a subclass of Tensor")  # which one explanation() finds out
        if any(t.is_neg() for t in inputs if isinstance(t, Tensor)):  # of which inductor reads the memory as it is
            raise RuntimeError(
                "expected tensors in their own memory, got one that is negated lazily, as z.conj().imag is: use "
                "z.conj().imag.resolve_neg()"
            )
        graphs = [module for module in graph.modules() if isinstance(module, torch.fx.GraphModule)]
        # A plain step has no second order to lose.
        refused = {**_LOSES_GRADIENTS, **(_LOSES_SECOND_ORDER if self.penalized else {})}
        for node in (node for each in graphs for node in each.graph.nodes if node.op == "call_function"):
            if str(node.target) in refused:
                raise RuntimeError(f"the model calls {refused[str(node.target)]}")
        foreign = [node for each in graphs for node in each.graph.nodes if _torch.is_foreign(node)]
        for node in foreign:
            if _torch.without_formula(node):
                raise RuntimeError(f"the model calls {NO_FORMULA.format(node.target)}")
        hooked = any(str(node.target) == "register_hook" for each in graphs for node in each.graph.nodes)
        if (foreign or hooked) and self.penalized and self.given is not None:
            try_score(*self.given)  # Dynamo's graph does not show what their backward does
        with self.stores(), _torch.inductor_pass(GraphPasses()), _cacheable(graphs, inputs):
            return self.inner(graph, inputs)

    def __getattr__(self, name: str) -> Any:  # name, configuration, reset
        if name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)


_LOSES_GRADIENTS = {
    "invoke_subgraph": "a region of torch.compiler.nested_compile_region again, whose gradient torch.compile loses "
    "there without an error: leave it out",
}
_LOSES_SECOND_ORDER = {
    "autograd_function_apply": "an autograd.Function, whose second order torch.compile loses without an error: mark "
    "its class with torch.compiler.allow_in_graph",
    **dict.fromkeys(("cond", "map_impl", "scan", "switch", "while_loop"), HIGHER_ORDER),
}
"""Names in Dynamo's graph, and what to say of them."""


def _cacheable(graphs: Sequence[torch.fx.GraphModule], inputs: Sequence[Any]) -> AbstractContextManager:
    """Context in which torch's caches take graphs that call densreg's Functions, which they do not look into.

    Part of the key is therefore all else that decides what those calls become: densreg's code, and the backend.
    """
    called = set()
    for graph in graphs:
        for node in graph.graph.nodes:
            function = _torch.function_of(node)
            if function is not None and issubclass(function, _Function):
                node.target = function.in_graph
                called.add(function.in_graph)
            elif node.target in _torch.SDPA_KERNEL:
                called.add(node.target)
        graph.recompile()
    devices = sorted({t.device.type for t in inputs if isinstance(t, Tensor)})
    return _torch.cacheable(called, f"{_sources()} {[ops.routes(device) for device in devices]}")


@functools.cache
def _sources() -> str:
    """A hash of densreg's code, without that of its subpackages of which no graph is made."""
    package = Path(__file__).parent
    files = sorted(map(str, (*package.glob("*.py"), *package.glob("ops/*.py"))))
    return _torch.get_hash_for_files(tuple(files)).hex()


def _overrides_functions(t: Any) -> bool:
    """Whether a tensor is of a subclass that overrides torch's functions, and not by ``__torch_dispatch__``."""
    if not isinstance(t, Tensor) or type(t) in (Tensor, nn.Parameter):
        return False
    kind = type(t)
    by_dispatch = kind.__torch_dispatch__ is not Tensor.__torch_dispatch__
    return not by_dispatch and kind.__torch_function__ is not nn.Parameter.__torch_function__


_REMEDIES = (
    ("consumed returned tensor's grad_fn", "a tensor of the step's graph is kept", "keep it detached, or not at all"),
    (
        "FloatTrueDiv(1.0, ToFloat(",
        "momentum=None averages by a count, which is read from a tensor",
        "give it a momentum",
    ),
    (  # they do in eager, which has been tried by then
        "the logits do not depend on x",
        "compiled, the logits do not depend on x, as after a region of torch.compiler.nested_compile_region or an "
        "operator for which nothing is registered with autograd",
        "leave it out",
    ),
    (  # no trained layer is in front of the Function; otherwise it is in the graph, see _LOSES_SECOND_ORDER
        "the score cannot be differentiated again",
        "the score comes through an autograd.Function, whose second order torch.compile loses without an error",
        "mark its class with torch.compiler.allow_in_graph",
    ),
    ("data-dependent", "a tensor's value decides what is computed", "use torch.where"),
    (
        "RNG ops in recompute",
        "a checkpoint has dropout inside, which this torch does not compile",
        "leave one of them out",
    ),
    ("marked as skipped", "it calls a function that torch.compile does not trace", "call what that one calls"),
    (
        "trace builtin operator",
        "it calls a builtin of Python that torch.compile does not trace, as print",
        "leave it out",
    ),
    ("torch._dynamo.graph_break()", "it asks for a graph break", "leave that out"),
)
"""What torch says, what that means, and what to do."""

_HOOKS = {
    "WeightNorm": "use torch.nn.utils.parametrizations.weight_norm",
    "SpectralNorm": "use torch.nn.utils.parametrizations.spectral_norm",
    "BasePruningMethod": "make the pruning permanent, torch.nn.utils.prune.remove",
}
"""Hooks of torch that keep a weight they computed, and what to do."""


def explanation(failure: BaseException, model: nn.Module, xs: tuple[Tensor, ...]) -> str:
    """Why a step could not be compiled, in one line: layer, reason, remedy."""
    if torch.is_anomaly_enabled():
        return "torch.autograd.detect_anomaly looks at every gradient's values: leave it out"
    for x in xs:
        if type(x) is not Tensor:
            return f"x is of {type(x).__name__}, a subclass of Tensor: give x.as_subclass(torch.Tensor)"
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        if type(t) not in (Tensor, nn.Parameter, nn.Buffer):
            return f"{name} is a {type(t).__name__}, a subclass of Tensor, expected a plain one"
    chain: list[BaseException] = []
    error: BaseException | None = failure
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    said = "\n".join(str(error) for error in chain).lower()
    lines = (str(failure).strip() or type(failure).__name__).splitlines()
    reason = next((line for line in lines if not line.endswith("raised:")), lines[0])
    if reason == "Observed exception":  # in what Dynamo runs to trace it, which it says further down
        reason = next(iter(re.findall(r"got (\w+\([^\n]{,200})", str(failure))), reason).rstrip("\"')")
    words, meaning, remedy = next((row for row in _REMEDIES if row[0].lower() in said), ("", "", ""))
    layer = next((layer for error in chain if (layer := _layer_of(error, model))), "")
    if words.startswith("consumed"):
        layer, meaning, remedy = _keeping_a_graph(model) or (layer, meaning, remedy)
    if reason != "Observed exception" or not meaning:
        meaning = f"{meaning} ({reason})" if meaning else reason
    return "".join((f"{layer}: " if layer else "", meaning, f"; {remedy}" if remedy else ""))


def _layer_of(error: BaseException, model: nn.Module) -> str:
    """The innermost module in whose forward the error came up."""
    for frame in reversed(getattr(error, "real_stack", None) or traceback.StackSummary()):
        for name, module in model.named_modules():
            code = getattr(getattr(type(module), "forward", None), "__code__", None)  # a scripted module's has none
            lines = {(code.co_filename, line) for *_, line in code.co_lines()} if code is not None else ()
            if (frame.filename, frame.lineno) in lines:
                return f"{name or 'the model itself'} ({type(module).__name__})"
    return ""


def _keeping_a_graph(model: nn.Module) -> tuple[str, str, str] | None:
    """(layer, reason, remedy) of the first module that keeps a tensor with a graph."""
    for name, attribute, _ in of_a_graph(model):
        module = model.get_submodule(name)
        kinds = {kind.__name__ for hook in _torch.forward_pre_hooks(module) for kind in type(hook).__mro__}
        remedy = next((_HOOKS[kind] for kind in _HOOKS if kind in kinds), "keep it detached, or not at all")
        layer = f"{name or 'the model itself'} ({type(module).__name__})"
        return layer, f"it keeps a tensor of the step's graph as its attribute {attribute!r}", remedy
    return None
