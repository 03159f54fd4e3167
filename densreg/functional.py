"""Differentiable functions on logits and scores, right to every order, eager and under ``torch.compile``.

Each order of differentiation is a Function of its own on a raw operator of :mod:`densreg.ops`. They are marked
``allow_in_graph``. Otherwise Dynamo would trace a Function's forward and backward separately and silently lose the
second derivative, whenever ``torch.autograd.grad`` is called inside the compiled region (seen on torch 2.11 to 2.15).
AOTAutograd then differentiates them as it finds them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from densreg import _torch, ops

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _in_graph(function: type[Function]) -> Any:
    """``function.apply`` under a name of its own, which is part of the key by which torch caches a compiled graph."""

    def in_graph(*args):
        return function.apply(*args)

    in_graph.__module__, in_graph.__name__ = function.__module__, f"{function.__name__}_in_graph"
    in_graph.__qualname__ = f"{function.__qualname__}.in_graph"
    return staticmethod(in_graph)


class _Function(Function):
    """A Function of densreg's, which stands aside under transforms.

    There :meth:`call` takes ``plain``, which does the same in torch's own functions. torch loses a Function's
    derivatives without a word under the vmap of torch.autograd (``is_grads_batched``, ``vectorize=True``) and where
    forward mode is nested, and calls one that torch.func can transform several times slower.
    """

    plain: Callable[..., Any]
    in_graph: Callable[..., Any]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.in_graph = _in_graph(cls)

    @classmethod
    def call(cls, *args):
        return cls.plain(*args) if _transformed() else cls.apply(*args)


@torch.compiler.assume_constant_result  # for code that is compiled, whose guards see to it
def _transformed() -> bool:
    """Whether this is called under forward mode, torch.func or the vmap of torch.autograd."""
    return _torch.inside_forward_mode() or _torch.inside_func_transform() or _torch.inside_autograd_vmap()


def _undifferentiated() -> bool:
    """Whether nothing looks at what is computed now, not even autograd."""
    return not (torch.is_grad_enabled() or _transformed())


# --------------------------------------------------------------------------------------------------------------------
# log density, cross-entropy, softmax


def _target_distribution(like: Tensor, target: Tensor, label_smoothing: float, ignore_index: int) -> Tensor:
    """q [B, C], a zero row where the target is ignored; only derivatives of third order need it whole."""
    ignored = (target == ignore_index).unsqueeze(1)
    q = torch.full_like(like, label_smoothing / like.shape[1])
    index = target.unsqueeze(1).masked_fill(ignored, 0)
    return q.scatter_add(1, index, torch.full_like(q[:, :1], 1 - label_smoothing)).masked_fill(ignored, 0)


def _target_dot(v: Tensor, target: Tensor, label_smoothing: float, ignore_index: int) -> Tensor:
    """<q, v> of each row; anything where the target is ignored."""
    dot = v.gather(1, target.masked_fill(target == ignore_index, 0).unsqueeze(1)).squeeze(1)
    return torch.lerp(dot, v.mean(1), label_smoothing) if label_smoothing > 0 else dot


def _counted(t: Any, target: Tensor, options: tuple[float, int]) -> Any:
    """A number for each row, 0 where its target is ignored."""
    return None if t is None else t.masked_fill(target == options[1], 0)


def _save_source(
    ctx: Any, logits: Tensor, softmax: Tensor, statistics: Tensor, target: Tensor | None, keep: bool
) -> None:
    """Keep what P comes from, for the next order: the softmax if it was written unrounded, else the logits.

    With ``keep`` both: the logits are what is differentiated, the softmax saves the exponentials.
    """
    ctx.set_materialize_grads(False)
    written = ctx.need_softmax and softmax.dtype == statistics.dtype
    tensors = (softmax, None, target, None) if written else (logits, statistics, target, softmax if keep else None)
    ctx.save_for_backward(*tensors)


def _probabilities(source: Tensor, statistics: Tensor | None, scale: float) -> Tensor:
    """P [B, C] in the accumulation dtype, differentiable to every order: for what is not worth an operator."""
    wide = source.to(ops.accumulation_dtype(source.dtype))
    return wide / scale if statistics is None else torch.softmax(wide, 1)


@torch.compiler.allow_in_graph
class _Softmax(_Function):
    """Order 0: (log_density, cross_entropy, scale * softmax) of the logits. See :func:`densreg.ops.softmax`."""

    @staticmethod
    def forward(ctx, logits, target, label_smoothing, ignore_index, need_softmax, scale, keep):
        output = ops.softmax(logits, target, label_smoothing, ignore_index, need_softmax or keep, scale)
        _, cross_entropy, softmax, statistics = output
        ctx.options, ctx.need_softmax, ctx.scale = (label_smoothing, ignore_index), need_softmax, scale
        _save_source(ctx, logits, softmax, statistics, target, keep)
        absent = [t for t, here in ((cross_entropy, target is not None), (softmax, need_softmax)) if not here]
        ctx.mark_non_differentiable(statistics, *absent)
        return output

    @staticmethod
    def plain(logits, target, label_smoothing, ignore_index, need_softmax, scale, keep):
        wide = logits.to(ops.accumulation_dtype(logits.dtype))
        cross_entropy = y = None
        if target is not None:
            options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
            cross_entropy = F.cross_entropy(wide, target, reduction="none", **options)
        if need_softmax:
            y = (torch.softmax(wide, 1) * scale).to(logits.dtype)
        return torch.logsumexp(wide, 1), cross_entropy, y, None

    @staticmethod
    def backward(ctx, l, a, u, _statistics):
        if l is None and a is None and u is None:
            return (None,) * 7
        return _softmax_backward(*ctx.saved_tensors, l, a, u, *ctx.options, ctx.scale), *[None] * 6


def _for_operator(source: Tensor, statistics: Tensor | None, softmax: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """What an operator takes P from: the softmax where there is one, which saves the exponentials."""
    return (source, statistics) if softmax is None else (softmax, None)


def _softmax_backward(source, statistics, target, softmax, *others):
    """:class:`_SoftmaxBackward`; its operator alone where nothing looks at what is computed."""
    if not _undifferentiated():
        return _SoftmaxBackward.call(source, statistics, target, softmax, *others)
    return ops.softmax_backward(*_for_operator(source, statistics, softmax), target, *others)


@torch.compiler.allow_in_graph
class _SoftmaxBackward(_Function):
    """Order 1: the gradient in the logits. See :func:`densreg.ops.softmax_backward`, also for l, a and U."""

    @staticmethod
    def forward(ctx, source, statistics, target, softmax, *others):
        l, a, u, *options, ctx.scale = others
        ctx.options = tuple(options)
        ctx.save_for_backward(source, statistics, target, softmax, l, a, u)
        return ops.softmax_backward(*_for_operator(source, statistics, softmax), target, *others)

    @staticmethod
    def plain(source, statistics, target, _softmax, l, a, u, label_smoothing, ignore_index, scale):
        options = (label_smoothing, ignore_index)
        p, q, l, a, u = _SoftmaxBackward._wide(source, statistics, target, l, a, u, options, scale)
        grad = torch.zeros_like(p)
        if l is not None:
            grad = grad + l.unsqueeze(1) * p
        if a is not None:
            grad = grad + a.unsqueeze(1) * (p - q)
        if u is not None:
            grad = grad + p * (u - (p * u).sum(1, keepdim=True))
        return grad.to(source.dtype)

    @staticmethod
    def _wide(source, statistics, target, l, a, u, options, scale):
        """P, q, l, a, scale U in the accumulation dtype; q, l, a and U may be None. An ignored target has a = 0."""
        p = _probabilities(source, statistics, scale)
        q = None if a is None else _target_distribution(p, target, *options)
        return p, q, l, _counted(a, target, options), None if u is None else u.to(p.dtype) * scale

    @staticmethod
    def backward(ctx, v):
        # out = (l + a) P - a q + P (U - <P, U>).
        source, statistics, target, softmax, l, a, u = ctx.saved_tensors
        grads: list[Tensor | None] = [None] * 10
        needs_source, needs_l, needs_a, needs_u = (ctx.needs_input_grad[i] for i in (0, 4, 5, 6))
        if u is None and statistics is not None and _undifferentiated():
            of_p = _for_operator(source, statistics, softmax)
            grads[0], v_dot_p = ops.softmax_double_backward(*of_p, target, l, a, v, ctx.options[1])
            if needs_l:
                grads[4] = v_dot_p
            if needs_a:
                v_dot_q = _target_dot(v.to(v_dot_p.dtype), target, *ctx.options)
                grads[5] = _counted(v_dot_p - v_dot_q, target, ctx.options)
            return tuple(grads)

        def through_softmax(grad: Tensor) -> Tensor:
            return _softmax_backward(source, statistics, None, softmax, None, None, grad, *ctx.options, ctx.scale)

        if needs_l or needs_a or (needs_source and u is not None):  # else the operator has what is needed of P
            p, q, *_, wide_u = _SoftmaxBackward._wide(source, statistics, target, l, a, u, ctx.options, ctx.scale)
            v_dot_p = (p * v).sum(1)
        if needs_source:
            weight = _counted(a, target, ctx.options) if l is None else l
            if l is not None and a is not None:
                weight = weight + _counted(a, target, ctx.options)
            # With P free. A source that is the softmax takes it from here; for logits, P is a function of them.
            grad = torch.zeros_like(source) if weight is None else weight.unsqueeze(1) * v
            if u is not None:
                grad = grad + v * wide_u - (p * wide_u).sum(1, keepdim=True) * v - v_dot_p.unsqueeze(1) * wide_u
            if ctx.scale != 1:
                grad = grad / ctx.scale
            if statistics is None:
                grads[0] = grad.to(source.dtype)
            elif source.dtype == torch.float16:  # where l v overflows, P l v need not
                peak = grad.detach().abs().amax(1, keepdim=True).float().clamp_min(1)
                grads[0] = (through_softmax((grad / peak).to(source.dtype)) * peak).to(source.dtype)
            else:
                grads[0] = through_softmax(grad.to(source.dtype))
        if needs_l and l is not None:
            grads[4] = v_dot_p
        if needs_a and a is not None:
            grads[5] = _counted(v_dot_p - (q * v).sum(1), target, ctx.options)
        if needs_u and u is not None:
            grads[6] = through_softmax(v)
        return tuple(grads)


# --------------------------------------------------------------------------------------------------------------------
# p-norm


def _row_sum(t: Tensor) -> Tensor:
    """[B, ...] -> [B]; flatten(1) has no rule under the vmap of torch.autograd."""
    return t.sum(tuple(range(1, t.ndim)))


def _row_peak(g: Tensor) -> Tensor:
    """[B, ...] -> [B], the largest magnitude."""
    return g.abs().amax(tuple(range(1, g.ndim))) if g.numel() else _row_sum(g)


@torch.compiler.allow_in_graph
class _PNorm(_Function):
    """Order 0: (norm, peak, total) of the rows. See :func:`densreg.ops.pnorm`."""

    @staticmethod
    def forward(ctx, g, p):
        norm, peak, total = ops.pnorm(g, p)
        ctx.p = p
        ctx.mark_non_differentiable(peak, total)
        ctx.save_for_backward(g, peak, total)
        return norm, peak, total

    @staticmethod
    def plain(g, p):
        g = g.to(ops.accumulation_dtype(g.dtype))
        if p in (1, math.inf):
            return _row_sum(g.abs()) if p == 1 else _row_peak(g), None, None
        peak = _row_peak(g.detach())
        scale = peak.masked_fill((peak == 0) | peak.isinf(), 1)
        # A zero row as ones, and 0 in the end: the powers' derivatives at 0 are infinite, and 0 times that is NaN.
        unit = (g / ops.per_row(scale, g)).masked_fill(ops.per_row(peak == 0, g), 1)
        total = _row_sum(unit.square() if p == 2 else unit.abs().pow(p))
        norm = scale * (total.sqrt() if p == 2 else total.pow(1 / p))
        return norm.masked_fill(peak == 0, 0), None, None

    @staticmethod
    def backward(ctx, grad, _peak, _total):
        backward: Callable[..., Tensor] = ops.pnorm_backward if _undifferentiated() else _PNormBackward.call
        return backward(grad, *ctx.saved_tensors, ctx.p), None


@torch.compiler.allow_in_graph
class _PNormBackward(_Function):
    """Order 1: ``grad * d||g||_p / dg``. See :func:`densreg.ops.pnorm_backward`."""

    @staticmethod
    def forward(ctx, grad, g, peak, total, p):
        ctx.p = p
        ctx.save_for_backward(grad, g, peak, total)
        return ops.pnorm_backward(grad, g, peak, total, p)

    @staticmethod
    def plain(grad, g, _peak, _total, p):
        wide = g.to(ops.accumulation_dtype(g.dtype))
        peak = ops.per_row(_row_peak(wide.detach()), g)
        if p == 1:
            dual = wide.sign()
        elif p == math.inf:
            ties = wide.abs() == peak
            dual = wide.sign() * ties / ops.per_row(_row_sum(ties), g)
        else:
            norm = ops.per_row(_PNorm.plain(g, p)[0], g).masked_fill(peak == 0, 1)
            unit = (wide / norm).masked_fill(peak == 0, 1)
            dual = (unit if p == 2 else unit.sign() * unit.abs().pow(p - 1)).masked_fill(peak == 0, 0)
        return (ops.per_row(grad, g) * dual).to(g.dtype)

    @staticmethod
    def backward(ctx, v):
        # Of grad D it is H v grad with H = (p - 1) / N (diag((|g| / N)^(p-2)) - D D^T), D the dual direction.
        grad, g, peak, total = ctx.saved_tensors
        norm = ops.per_row(_PNorm.call(g, ctx.p)[0], g)
        dual = _PNormBackward.call(torch.ones_like(peak), g, peak, total, ctx.p).to(norm.dtype)
        v = v.to(norm.dtype)
        along = _row_sum(dual * v)
        grad_grad = along if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return grad_grad, None, None, None, None
        if ctx.p in (1, math.inf):  # piecewise linear
            return grad_grad, torch.zeros_like(g), None, None, None
        norm = norm.masked_fill(norm == 0, 1)
        # The norm has no derivative at a zero row, whose subgradient here is 0; nor a second one.
        zero = ops.per_row(peak, g) == 0
        curvature = (g.to(norm.dtype).abs() / norm).masked_fill(zero, 1).pow(ctx.p - 2)
        product = (ctx.p - 1) / norm * (curvature * v - dual * ops.per_row(along, g))
        return grad_grad, (ops.per_row(grad, g) * product.masked_fill(zero, 0)).to(g.dtype), None, None, None


# --------------------------------------------------------------------------------------------------------------------
# public


def check_logits(logits: Tensor) -> None:
    """Raise TypeError or ValueError unless logits is [B, C] with C >= 1, of one of the four floating dtypes."""
    if not isinstance(logits, Tensor):
        raise TypeError(f"logits must be a tensor, got {type(logits).__name__}")
    if logits.dtype not in DTYPES:
        raise TypeError(f"logits must be float16, bfloat16, float32 or float64, got {logits.dtype}")
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits must have shape [batch, classes] with at least one class, got {list(logits.shape)}")


def check_target(logits: Tensor, target: Tensor, label_smoothing: float, ignore_index: int) -> None:
    """Raise unless target and options fit the logits; the range of the classes is checked by the operator."""
    _check_class_index("target", logits, target)
    if not isinstance(label_smoothing, (int, float)):
        raise TypeError(f"label_smoothing must be a number, got {type(label_smoothing).__name__}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must lie in [0, 1], got {label_smoothing}")
    if not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an int, got {type(ignore_index).__name__}")


def _check_class_index(name: str, logits: Tensor, index: Tensor) -> None:
    if not isinstance(index, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(index).__name__}")
    if index.dtype != torch.int64:
        soft = name == "target" and (index.is_floating_point() or index.is_complex())
        advice = (
            "soft or real-valued targets need a loss of their own, RegularizedObjective(..., criterion=...), or "
            "density_penalty beside it"
            if soft
            else f"{name}.long()"
        )
        raise TypeError(f"{name} must hold int64 class indices, got {index.dtype}: {advice}")
    if index.shape != logits.shape[:1]:
        raise ValueError(f"{name} must have shape [{logits.shape[0]}], one class a row, got {list(index.shape)}")
    if index.device != logits.device:
        raise ValueError(f"{name} is on {index.device}, the logits are on {logits.device}: expected the same device")


def class_index(logits: Tensor, k: int | Tensor) -> Tensor:
    """k as [B] int64 classes of the logits; raises where it is neither that nor, on CPU, a class."""
    classes = logits.shape[1]
    if isinstance(k, bool):
        raise TypeError("k must be a class or a tensor of classes, got bool")
    if isinstance(k, int):
        if not 0 <= k < classes:
            raise ValueError(f"k must be a class in [0, {classes}), got {k}")
        return torch.full(logits.shape[:1], k, device=logits.device)
    _check_class_index("k", logits, k)
    if k.device.type == "cpu" and not torch.compiler.is_compiling():
        for extreme in k.aminmax() if k.numel() else ():  # 4 operators otherwise, which take as long as the softmax
            if not 0 <= (found := int(extreme)) < classes:
                raise ValueError(f"expected classes in [0, {classes}) in k, got class {found}")
    return k


def check_order(p: float) -> float:
    """The norm's order as a float, 1 <= p <= inf."""
    if isinstance(p, (bool, str, Tensor)) or not hasattr(p, "__float__"):
        raise TypeError(f"p must be a number, got {type(p).__name__}")
    if not p >= 1:
        raise ValueError(f"p must be at least 1 (inf included), got {p}")
    return float(p)


def softmax(
    logits: Tensor,
    target: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    need_softmax: bool = True,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The differentiable form of :func:`densreg.ops.softmax`, without its checks: log density, cross-entropy, softmax.

    The softmax is the cotangent of the input score's backward. Its own gradient, which the double backward brings,
    and those of the log density and the cross-entropy go into the logits together, in one pass.
    """
    # On a CPU the exponentials take longer than writing P and reading it twice. A GPU, where this was not measured, and
    # half precision, in which P would be rounded, keep the logits.
    keep = not need_softmax and torch.is_grad_enabled() and logits.requires_grad
    keep = keep and logits.device.type == "cpu" and logits.dtype in (torch.float32, torch.float64)
    scale = scale if need_softmax else 1.0
    return _Softmax.call(logits, target, label_smoothing, ignore_index, need_softmax, scale, keep)[:3]


def log_density(logits: Tensor) -> Tensor:
    """Log marginal density of each input up to a constant: ``logsumexp(logits, 1) = log p(x) + log Z``.

    Differentiable to every order, under ``torch.func`` (grad, jvp, vmap, in any nesting) and ``is_grads_batched`` too.

    Args:
        logits: [B, C], fp16, bf16, fp32 or fp64.

    Returns:
        [B], float32 (float64 for float64 logits).

    Raises:
        TypeError, ValueError: logits of another dtype or rank.
    """
    check_logits(logits)
    return softmax(logits, need_softmax=False)[0]


def log_softmax_difference(logits: Tensor, k: int | Tensor) -> Tensor:
    """``f_k - log_softmax_k(f)``, which is the log density for every class k.

    The paper differentiates it, with k drawn at random, in its "stable and efficient" step, as an approximation of
    ``grad f_k - grad log_softmax_k``; both are equal to ``grad logsumexp(f)``.

    Args:
        logits: [B, C], fp16, bf16, fp32 or fp64.
        k: a class, or [B] int64 classes, in [0, C).

    Returns:
        [B], float32 (float64 for float64 logits). Differentiable to every order.

    Raises:
        TypeError, ValueError: logits of another dtype or rank; k of another dtype, shape, device or range (that of a
            tensor is checked on the CPU in eager mode only, as the result does not depend on it).
    """
    check_logits(logits)
    class_index(logits, k)  # raises
    return log_density(logits)


def density_cross_entropy(
    logits: Tensor, target: Tensor, label_smoothing: float = 0.0, ignore_index: int = -100
) -> tuple[Tensor, Tensor]:
    """Cross-entropy and log density of each row, from one read of the logits.

    Args:
        logits: [B, C], fp16, bf16, fp32 or fp64.
        target: [B] int64 classes in [0, C), or ``ignore_index``.
        label_smoothing: in [0, 1], as in :func:`torch.nn.functional.cross_entropy`.
        ignore_index: a target with this value has cross-entropy 0 and no gradient from it.

    Returns:
        ``(cross_entropy [B], log_density [B])``, float32 (float64 for float64 logits). Differentiable to every order.

    Raises:
        TypeError, ValueError: what was expected and what was given. A target out of range is a device assert on CUDA,
            and under torch.func an IndexError of torch's.
    """
    check_logits(logits)
    check_target(logits, target, label_smoothing, ignore_index)
    log_p, cross_entropy, _ = softmax(logits, target, label_smoothing, ignore_index, need_softmax=False)
    return cross_entropy, log_p


def pnorm(g: Tensor, p: float = 2) -> Tensor:
    """p-norm of each row, with no over- or underflow on the way and no NaN gradient at zero rows.

    Args:
        g: [B, ...], fp16, bf16, fp32 or fp64, any memory format; the norm is over all dimensions but the first.
        p: 1 <= p <= inf.

    Returns:
        [B], float32 (float64 for float64 g). Differentiable to every order. At a zero row, where the norm has no
        derivative, all derivatives are 0; near it the gradient has dual norm 1, however small the row is. For p = 1 the
        gradient is 0 at entries of 0, and for p = inf ties share it, as in torch. For 1 < p < 2 the second derivative
        is not finite where an entry is 0 and its row is not.

    Raises:
        TypeError, ValueError: what was expected and what was given.
    """
    if not isinstance(g, Tensor):
        raise TypeError(f"g must be a tensor, got {type(g).__name__}")
    if g.dtype not in DTYPES:
        raise TypeError(f"g must be float16, bfloat16, float32 or float64, got {g.dtype}")
    if g.ndim < 2:
        raise ValueError(f"g must have shape [batch, ...], got {list(g.shape)}")
    return _PNorm.call(g, check_order(p))[0]
