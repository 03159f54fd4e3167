"""The input score grad_x log p(x) by every path of the paper, and by ours.

All paths are the same function up to rounding: f_k - log_softmax_k(f) = logsumexp(f) for every class k, so what the
paper derives as an approximation is an identity. They differ in cost and in overflow. F is one forward of the network;
a plain training step costs 3F, the step with the penalty

    path        log density that is differentiated           cost       overflow in float32
    naive       log(sum(exp f))                              6F         from f ~ 88, its second order from ~ 46
    inverse     -log(1 / sum(exp f))                         6F         from f ~ 88, its second order from ~ 44
    max_shift   m + log(sum(exp(f - m))), m = max f          6F         never
    per_class   sum_i w_i grad f_i, w = softmax(f)           (3C + 3)F  never
    stable      grad f_k - grad log_softmax_k(f), random k   9F         never
    taylor      f_k - log_softmax_k(f), random k             6F         never
    fused       vector-Jacobian product with softmax(f)      6F         never

The second derivatives of log s and of 1 / s contain the square of s, which overflows already at logits half as large.
From there on the gradient in the parameters is wrong though finite for naive (by 30% in a test at 60), and NaN for
inverse. The paper names "inverse" but does not define it: this is our reading. Half-precision logits are converted to
float32 first; "fused" reads them as they are, and its operator sums in float32.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from densreg import _torch, functional, ops

Inputs = Tensor | Sequence[Tensor]
Score = Tensor | tuple[Tensor, ...]

_COMPILED_MODEL = (
    "the logits come from a torch.compile'd model, whose backward cannot be differentiated again. Give densreg the "
    "uncompiled model (compiled._orig_mod), or compile the whole training step, penalty included: "
    "with torch._dynamo.config.patch(trace_autograd_ops=True): torch.compile(step, fullgraph=True)(x, y)"
)
NOT_TWICE = (
    "the score cannot be differentiated again, so the penalty would train nothing, or not all of the model: the "
    "backward of {} runs outside autograd, is once_differentiable or adds the gradient of another loss. Write it in "
    "torch's elementary operations (such a loss: in the criterion), or train with RegularizedObjective(..., "
    'path="directional")'
)
_SOME_LAYER = "some layer (a custom autograd.Function?)"
HIGHER_ORDER = (
    "a higher-order operator of torch (cond, map, scan, while_loop), whose second order torch loses without an error: "
    "write torch.where, torch.vmap or a loop"
)
NO_FORMULA = (
    "{}, for which nothing is registered with autograd, so that its gradient is lost: register a formula that is made "
    "of torch's operations (torch.library.register_autograd), or detach() what it is called with"
)
_SHARDED = (
    "the logits come from {}, which loses gradients of gradients without an error: give densreg the bare model, or "
    "train with DistributedDataParallel(RegularizedObjective(model, ...))"
)
_OBSTACLES = {
    "once": NOT_TWICE.format(_SOME_LAYER),
    "no formula": f"the model calls {NO_FORMULA.format('an operator')}",
    "higher order": f"the model calls {HIGHER_ORDER}",
    "compiled": _COMPILED_MODEL,
    "FSDP1": _SHARDED.format("a model that is sharded (FSDP1)"),
    "FSDP2": _SHARDED.format("a model that is sharded (FSDP2, fully_shard)"),
    "DTensor": _SHARDED.format("a model whose weights are sharded DTensors"),
    "static_graph": _SHARDED.format("DistributedDataParallel(static_graph=True)"),
}
_COMPILED_STEP = (
    "densreg inside torch.compile needs Dynamo to trace torch.autograd.grad. Call the compiled step under "
    "`with torch._dynamo.config.patch(trace_autograd_ops=True):`"
)


def cotangent_scale(logits: Tensor) -> float:
    """Power of two by which the cotangent of the score is scaled; :func:`vjp` divides it out again in float32.

    In fp16 the softmax of 20,000 equally likely classes is subnormal. What a scale S gives to the score it takes from
    the double backward, which runs on v / S: so it is about the square root of the number of classes. That v itself
    does not underflow is the loss scale's part, as in any fp16 training.
    """
    return 2.0 ** max(1, math.ceil(math.log2(logits.shape[1]) / 2)) if logits.dtype == torch.float16 else 1.0


def _compiling() -> bool:
    """Whether torch.compile is tracing this call, which takes Dynamo's flag: raises RuntimeError without it."""
    if not torch.compiler.is_dynamo_compiling():
        return False
    # Where a full graph is not asked for, Dynamo then leaves this frame to the interpreter, which makes the checks.
    if not _torch.traces_autograd():
        raise RuntimeError(_COMPILED_STEP)
    return True


def is_dtensor(t: Tensor) -> bool:
    return type(t).__name__ == "DTensor"  # torch.distributed is not in every build


def check_input(name: str, x: Tensor, size: int, whose: str) -> None:
    """Raises TypeError or ValueError unless x is floating point and [size, ...], the batch of ``whose``."""
    if not x.is_floating_point():
        raise TypeError(f"{name} must be floating point to have a score, got {x.dtype}")
    if x.ndim < 2 or len(x) != size:
        raise ValueError(f"{name} must have shape [{size}, ...], the batch of {whose} first, got {list(x.shape)}")


def check_inputs(logits: Tensor, x: Inputs) -> tuple[Tensor, ...]:
    """The inputs as a tuple; raises where the score of logits in x cannot be taken and differentiated again."""
    functional.check_logits(logits)
    xs = (x,) if isinstance(x, Tensor) else tuple(x) if isinstance(x, Sequence) else ()
    if not xs or not all(isinstance(xi, Tensor) for xi in xs):
        raise TypeError(f"x must be a tensor or a non-empty sequence of tensors, got {x!r:.80}")
    for i, xi in enumerate(xs):
        name = "x" if isinstance(x, Tensor) else f"x[{i}]"
        if is_dtensor(xi) or is_dtensor(logits):
            given = name if is_dtensor(xi) else "logits"
            raise TypeError(f"{given} must be a plain tensor, got a DTensor: pass logits.full_tensor() and a plain x")
        check_input(name, xi, len(logits), "the logits")
        if torch.is_grad_enabled() and not xi.requires_grad:
            raise ValueError(f"{name} does not require grad: call x.requires_grad_() before logits = model(x)")
    if not torch.is_grad_enabled():
        raise RuntimeError(
            "the score is a gradient and gradients are disabled (torch.no_grad or inference_mode): compute the logits "
            "and the penalty under torch.enable_grad()"
        )
    if not _compiling() and not logits.requires_grad:
        raise ValueError("the logits carry no graph: compute them from x with gradients enabled, and do not detach")
    return xs


def vjp(outputs: Tensor, x: tuple[Tensor, ...], cotangent: Tensor, scale: float = 1.0) -> tuple[Tensor, ...]:
    """``(d outputs / d x)^T cotangent / scale``, differentiable; in float32 where it was scaled.

    Looks through the graphs: torch itself says nothing when a gradient in chosen inputs (``torch.autograd.grad``,
    ``backward(inputs=...)``) stops at a node that cannot be differentiated. What the cotangent was computed from is not
    looked at: no gradient of a gradient goes through. A Function's own backward that detaches leaves no node: hooks
    find it where a whole gradient is detached, :func:`densreg.check_model` where a part is.

    Raises:
        ValueError: outputs do not depend on one of the inputs.
        RuntimeError: the result cannot be differentiated again, or only in part.
    """
    forward = _checked_nodes([outputs], x)
    hooks = _look_at_backwards(forward)
    try:
        grads = torch.autograd.grad(outputs, x, grad_outputs=cotangent, create_graph=True, allow_unused=True)
    finally:
        for hook in hooks:
            hook.remove()
    for i, grad in enumerate(grads):
        if grad is None:
            name = "x" if len(x) == 1 else f"x[{i}]"
            raise ValueError(
                f"the logits do not depend on {name}: pass the very tensor that went into the model, "
                "not a copy, a slice or a later version of it"
            )
    _checked_nodes(grads, [*x, cotangent], forward)
    # Unscaled in float32: scores of 1e-5 would be subnormal in fp16.
    return tuple(grad.to(ops.accumulation_dtype(grad.dtype)) / scale if scale != 1 else grad for grad in grads)


def graph_nodes(outputs: Sequence[Tensor], inputs: Sequence[Tensor] = (), known: Iterable[Any] = ()) -> Iterator[Any]:
    """The nodes in the autograd graph of tensors that require grad, each once, from the outputs back to the inputs.

    Args:
        known: nodes to leave out, with all that is only behind them.
    """
    seen = {*known, *(t.grad_fn for t in inputs), None}
    nodes: list[Any] = [node for node in dict.fromkeys(t.grad_fn for t in outputs) if node not in seen]
    seen.update(nodes)
    while nodes:
        node = nodes.pop()
        yield node
        for child, _ in node.next_functions:
            if child not in seen:
                seen.add(child)
                nodes.append(child)


def _checked_nodes(outputs: Sequence[Tensor], inputs: Sequence[Tensor], known: Iterable[Any] = ()) -> list[Any]:
    """:func:`graph_nodes`; raises RuntimeError of one that torch cannot differentiate twice, or loses gradients at.

    Empty under torch.compile, whose graph is looked at in :mod:`densreg.compiling`.
    """
    if _compiling():
        return []
    nodes = list(graph_nodes(outputs, inputs, known))
    for node in nodes:
        obstacle = _torch.obstacle(node)
        if obstacle is not None:
            raise RuntimeError(_OBSTACLES[obstacle])
    return nodes


def _look_at_backwards(nodes: Sequence[Any]) -> list[Any]:
    """Hooks, to be removed, that raise RuntimeError where a part of the backward to come runs outside of autograd.

    NumPy, a kernel of one's own or no_grad in a Function's backward leave nothing in the graph of the result.
    """
    unknown = [node for node in nodes if may_leave_autograd(node)]
    if not unknown or functional._transformed():
        return []
    return [node.register_hook(functools.partial(_check_backward, node)) for node in unknown]


def may_leave_autograd(node: Any) -> bool:
    """Whether a node's backward may compute outside of autograd what it returns; densreg's own do not."""
    if not _torch.may_leave_autograd(node):
        return False
    function, _ = _torch.forward_of(node)
    return function is None or not issubclass(function, functional._Function)


def _check_backward(node: Any, gradients: Sequence[Tensor | None], incoming: Sequence[Tensor | None]) -> None:
    """Raises RuntimeError where a node has made constants of gradients that depend on the incoming ones."""
    given = [g for g in incoming if g is not None]
    if not (given and all(g.requires_grad for g in given)):  # one that is constant may be what a constant comes from
        return
    _, name = _torch.forward_of(node)
    if name == _torch.CHUNKED:
        raise RuntimeError(NOT_TWICE.format("F.linear_cross_entropy with options"))
    for g, (child, _) in zip(gradients, node.next_functions, strict=True):
        if g is None or g.requires_grad or child is None or not (g.is_floating_point() or g.is_complex()):
            continue
        if _torch.engine_runs(child) and (g.layout != torch.strided or bool(g.any())):  # zeros may well be constant
            raise RuntimeError(NOT_TWICE.format(name))


def check_score(score: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The score, made by :func:`vjp`; raises RuntimeError where it is a constant."""
    if not all(g.requires_grad for g in score):
        raise RuntimeError(NOT_TWICE.format(_SOME_LAYER))
    return score


# --------------------------------------------------------------------------------------------------------------------
# the paths: (logits [B, C], x, k [B]) -> score, a tuple shaped like x


def _score_of(log_density: Tensor, x: tuple[Tensor, ...], scale: float) -> tuple[Tensor, ...]:
    return vjp(log_density, x, torch.full_like(log_density, scale), scale)


def _wide(logits: Tensor) -> Tensor:
    return logits.to(ops.accumulation_dtype(logits.dtype))


def _class(f: Tensor, k: Tensor) -> Tensor:
    return f.gather(1, k.unsqueeze(1)).squeeze(1)


def naive(logits: Tensor, x: tuple[Tensor, ...], k: Tensor | None = None) -> tuple[Tensor, ...]:
    return _score_of(_wide(logits).exp().sum(1).log(), x, cotangent_scale(logits))


def inverse(logits: Tensor, x: tuple[Tensor, ...], k: Tensor | None = None) -> tuple[Tensor, ...]:
    return _score_of(-(1 / _wide(logits).exp().sum(1)).log(), x, cotangent_scale(logits))


def max_shift(logits: Tensor, x: tuple[Tensor, ...], k: Tensor | None = None) -> tuple[Tensor, ...]:
    f = _wide(logits)
    m = f.detach().amax(1, keepdim=True)
    return _score_of((f - m).exp().sum(1).log() + m.squeeze(1), x, cotangent_scale(logits))


def per_class(logits: Tensor, x: tuple[Tensor, ...], k: Tensor | None = None) -> tuple[Tensor, ...]:
    # The weights are the cotangents: combined afterwards, the samples that BatchNorm couples would get each other's.
    f = _wide(logits)
    scale = cotangent_scale(logits)
    e = (f - f.detach().amax(1, keepdim=True)).exp()
    w = e / e.sum(1, keepdim=True)
    total: tuple[Tensor, ...] | None = None
    for i in range(f.shape[1]):
        g = vjp(f[:, i], x, w[:, i] * scale, scale)
        total = g if total is None else tuple(a + b for a, b in zip(total, g, strict=True))
    assert total is not None  # there is at least one class
    return total


def stable(logits: Tensor, x: tuple[Tensor, ...], k: Tensor) -> tuple[Tensor, ...]:
    f = _wide(logits)
    scale = cotangent_scale(logits)
    of_logit = _score_of(_class(f, k), x, scale)
    of_log_softmax = _score_of(_class(f.log_softmax(1), k), x, scale)
    return tuple(a - b for a, b in zip(of_logit, of_log_softmax, strict=True))


def taylor(logits: Tensor, x: tuple[Tensor, ...], k: Tensor) -> tuple[Tensor, ...]:
    f = _wide(logits)
    return _score_of(_class(f, k) - _class(f.log_softmax(1), k), x, cotangent_scale(logits))


def fused(logits: Tensor, x: tuple[Tensor, ...], k: Tensor | None = None) -> tuple[Tensor, ...]:
    scale = cotangent_scale(logits)
    cotangent = functional.softmax(logits, scale=scale)[2]
    return vjp(logits, x, cotangent, scale)


PATHS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    path.__name__: path for path in (naive, inverse, max_shift, per_class, stable, taylor, fused)
}


def check_path(path: str) -> str:
    """The name of a path; raises ValueError where there is none of that name."""
    if path == "directional":
        raise ValueError('path "directional" runs the model again: it is one of densreg.RegularizedObjective')
    if path not in PATHS:
        raise ValueError(f"path must be one of {', '.join(PATHS)}; got {path!r}")
    return path


@overload
def input_score(logits: Tensor, x: Tensor, path: str = ..., k: int | Tensor | None = ...) -> Tensor: ...
@overload
def input_score(
    logits: Tensor, x: Sequence[Tensor], path: str = ..., k: int | Tensor | None = ...
) -> tuple[Tensor, ...]: ...
def input_score(logits: Tensor, x: Inputs, path: str = "fused", k: int | Tensor | None = None) -> Score:
    """The input score ``grad_x log p(x) = J(x)^T softmax(f)``, differentiable once more.

    Where samples depend on each other (BatchNorm in training mode) the row of sample b is the gradient of the batch's
    summed log density with respect to x_b.

    Args:
        logits: [B, C], computed from x; fp16, bf16, fp32 or fp64.
        x: the model's input [B, ...], with ``requires_grad``, or a sequence of such inputs.
        path: how to compute it, a name in the table of :mod:`densreg.paths`.
        k: the class of ``stable`` and ``taylor``: an int, [B] int64 classes, or None for one drawn at random for each
            sample from torch's global generator. The other paths ignore it.

    Returns:
        The score, of the shape, dtype and device of x; a tuple for a sequence. It is float32 for fp16 logits, whose
        backward runs on a scaled cotangent.

    Raises:
        TypeError, ValueError: what was given and what was expected; also for an x that does not require grad, and for
            logits that do not depend on x.
        RuntimeError: gradients are disabled, or something between x and the logits cannot be differentiated twice.
    """
    xs = check_inputs(logits, x)
    check_path(path)
    classes = _random_class(logits, k) if path in ("stable", "taylor") else None
    score = check_score(PATHS[path](logits, xs, classes))
    return score[0] if isinstance(x, Tensor) else score


def _random_class(logits: Tensor, k: int | Tensor | None) -> Tensor:
    if k is None:
        return torch.randint(logits.shape[1], logits.shape[:1], device=logits.device)
    return functional.class_index(logits, k)
