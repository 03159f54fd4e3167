"""The penalized loss of a linear classifier from its features, which allocates no array of logits [B, C].

``s = h W^T + b`` with features ``h [B, D]`` is taken in tiles of classes. Memory is ``O(B D + C D + B tile)``, where
the functions of the logits take three arrays of [B, C].

In a training step the forward leaves the logits where the backward will write the weight's gradient, [C, D]: all of
them for B <= D, else those of D / B of the classes. The others are computed again, tile by tile; so are all of them in
functions whose caller may hold the graph for long, or never differentiate it.

:mod:`densreg.tiles` has the formulas. Here are the operators made of them, the Function that differentiates those, and
the functions for users.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from densreg import functional, paths, penalty, tiles
from densreg.functional import _Function, _undifferentiated
from densreg.ops import accumulation_dtype
from densreg.paths import Inputs

OPERATORS = ("linear_density", "linear_density_backward")

_library = torch.library.Library("densreg", "FRAGMENT")
_library.define(
    "linear_density(Tensor h, Tensor weight, Tensor? bias, Tensor? target, int ignore_index, ScalarType dtype,"
    " int tile, bool need_score, bool need_mean, bool keep)"
    " -> (Tensor rest, Tensor own, Tensor mean, Tensor score, Tensor correct, Tensor kept)"
)
_library.define(
    "linear_density_backward(Tensor h, Tensor weight, Tensor? bias, Tensor? target, int ignore_index, Tensor rest,"
    " Tensor own, Tensor r, Tensor g, Tensor? q, Tensor? u, Tensor? dot, Tensor(a!)? kept, ScalarType dtype, int tile,"
    " bool[] needs) -> (Tensor, Tensor, Tensor)"
)

# --------------------------------------------------------------------------------------------------------------------
# the operators


def _classes(target: Tensor | None, ignore_index: int) -> Tensor | None:
    """The target with -1 for ignored."""
    return None if target is None else target.masked_fill(target == ignore_index, -1)


def check_range(target: Tensor, classes: int, ignore_index: int) -> None:
    """Raise ValueError for a target out of range; on a GPU that is a device assert, as in torch."""
    if target.device.type == "cpu":
        wrong = (target != ignore_index) & ((target < 0) | (target >= classes))
        if wrong.any():
            raise ValueError(
                f"target holds class {target[wrong][0].item()}; expected classes in [0, {classes}) "
                f"or ignore_index={ignore_index}"
            )
    else:
        torch.empty(classes, device=target.device).gather(0, target.masked_fill(target == ignore_index, 0))


def _without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of h and more whose products are in the dtype that it is given, not in autocast's."""

    @functools.wraps(function)
    def call(h: Tensor, *args: Any) -> Any:
        with torch.autocast(h.device.type, enabled=False):
            return function(h, *args)

    return call


def no_grad_no_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """An operator of h and more, which runs without gradients and without autocast."""
    return torch.no_grad()(_without_autocast(function))


@no_grad_no_autocast
def _forward(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor | None,
    ignore_index: int,
    dtype: torch.dtype,
    tile: int,
    need_score: bool,
    need_mean: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The operator ``linear_density``.

    Args:
        h: [B, D].
        weight: [C, D].
        bias: [C] or None.
        target: [B] int64 classes in [0, C) or ``ignore_index``, or None.
        dtype: of the operands of the products.
        tile: classes in a tile.
        need_score: whether to compute G.
        need_mean: whether to compute the mean logit.
        keep: whether to keep logits for the backward, in memory for the weight's gradient.

    Returns:
        ``(rest [B], own [B], mean [B], score [B, D], correct [B], kept [C, D])``. Rows are float64; for an ignored
        target ``rest = L`` and ``own = 0``. The score is float32 (float64 for float64). ``correct`` is bool: the
        target's logit is larger than every other. What was not asked for has shape [0].
    """
    if target is not None:
        check_range(target, len(weight), ignore_index)
    y = _classes(target, ignore_index)
    kept = weight.new_empty(weight.shape if keep else 0)
    m, ref, z, own, score = tiles.forward(h, weight, bias, y, dtype, tile, need_score, kept if keep else None)
    rest = tiles.finite(ref).double() + z.log()
    ignored = None if y is None else y < 0
    correct = torch.zeros_like(m, dtype=torch.bool) if ignored is None else (own > m) & ~ignored
    if need_score:
        score = tiles.whole_score(score, ref, tiles.density_rows(rest, own, ignored), weight, y, own)
    mean = rest.new_empty(0)
    if need_mean:
        mean = tiles.sum_of_logits(h, weight, bias, score.dtype) / len(weight)
    return rest, own, mean, score, correct, kept


@no_grad_no_autocast
def _backward(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor | None,
    ignore_index: int,
    rest: Tensor,
    own: Tensor,
    r: Tensor,
    g: Tensor,
    q: Tensor | None,
    u: Tensor | None,
    dot: Tensor | None,
    kept: Tensor | None,
    dtype: torch.dtype,
    tile: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator ``linear_density_backward``: the gradients in h, weight and bias, those that ``needs`` says.

    Args:
        rest, own: the forward's.
        r, g, q, u: upstream gradients of rest, own, mean and score.
        dot: U . G, [B], with the forward's score.
        kept: the forward's, or None. It becomes the gradient in the weight, and the one returned has shape [0].
    """
    y = _classes(target, ignore_index)
    density = tiles.density_rows(rest, own, None if y is None else y < 0)
    factor = tiles.off_target_factor(r, density, rest, dtype)
    each = None if q is None else q / len(weight)
    dh, dw, db = tiles.backward(h, weight, bias, y, density, factor, g, each, u, dot, dtype, tile, needs, kept)
    dw = dw if kept is None else dw.new_empty(0)
    return dh.to(h.dtype), dw, db if bias is None else db.to(bias.dtype)


def _forward_fake(h, weight, bias, target, ignore_index, dtype, tile, need_score, need_mean, keep):
    row = h.new_empty(len(h), dtype=torch.float64)
    score = h.new_empty(h.shape if need_score else 0, dtype=accumulation_dtype(dtype))
    kept = weight.new_empty(weight.shape if keep else 0)
    return row, torch.empty_like(row), row.new_empty(len(h) if need_mean else 0), score, row.bool(), kept


def gradients_fake(h, rows, weight, bias, dtype, needs, kept):
    """The shapes and dtypes of the gradients in ``rows`` of h, in weight and bias."""
    like = h.new_empty(0, dtype=accumulation_dtype(dtype)) if bias is None else bias
    return (
        h.new_empty(rows, h.shape[1]),
        weight.new_empty(weight.shape if needs[1] and kept is None else 0),
        like.new_empty(len(weight) if needs[2] else 0),
    )


def _backward_fake(h, weight, bias, target, ignore_index, rest, own, r, g, q, u, dot, kept, dtype, tile, needs):
    return gradients_fake(h, len(h), weight, bias, dtype, needs, kept)


def implement(library: torch.library.Library, name: str, function: Callable, fake: Callable) -> None:
    """Give an operator of the library its one implementation, for every device, and its fake one."""
    library.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"densreg::{name}", fake, lib=library)


implement(_library, "linear_density", _forward, _forward_fake)
implement(_library, "linear_density_backward", _backward, _backward_fake)


# --------------------------------------------------------------------------------------------------------------------
# the Function


@torch.compiler.allow_in_graph
class _LinearDensity(_Function):
    """(rest, own, mean, score, correct, kept), and their gradients, by the operators; plain is on whole logits."""

    @staticmethod
    def forward(ctx, h, weight, bias, target, *options):
        output = torch.ops.densreg.linear_density(h, weight, bias, target, *options)
        rest, own, mean, score, correct, kept = output
        ctx.options = options
        *_, need_score, need_mean, keep = options
        ctx.kept = [kept] if keep else []
        ctx.save_for_backward(h, weight, bias, target, rest, own, score)
        ctx.set_materialize_grads(False)
        absent = [t for t, here in ((score, need_score), (mean, need_mean)) if not here]
        ctx.mark_non_differentiable(correct, kept, *absent)
        return output

    @staticmethod
    @_without_autocast
    def plain(h, weight, bias, target, ignore_index, dtype, tile, need_score, need_mean, keep):
        acc = accumulation_dtype(dtype)
        w = weight.to(acc)
        s = F.linear(h.to(acc), w, None if bias is None else bias.to(acc))
        off, own, counts = s, torch.zeros_like(s[:, 0]), None
        if target is not None:
            counts = (target != ignore_index).unsqueeze(1)
            at = target.unsqueeze(1).masked_fill(~counts, 0)
            off = s.masked_fill((torch.arange(s.shape[1], device=s.device) == at) & counts, -math.inf)
            own = s.gather(1, at).masked_fill(~counts, 0).squeeze(1)
        m = off.detach().amax(1)
        # Not torch.logsumexp, whose gradient is NaN where there is no class but the target.
        shift, none = m.masked_fill(m.isinf(), 0), m == -math.inf
        total = (off - shift.unsqueeze(1)).exp().sum(1).double()
        rest = (shift + total.masked_fill(none, 1).log()).masked_fill(none, -math.inf)
        correct = own > m if counts is None else (own > m) & counts.squeeze(1)
        mean, score = s.mean(1).double() if need_mean else None, s.softmax(1) @ w if need_score else None
        return rest, own.double(), mean, score, correct, None

    @staticmethod
    def backward(ctx, r, g, q, u, *_):
        h, weight, bias, target, rest, own, score = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:3])
        if all(v is None for v in (r, g, q, u)):
            return (None,) * 10
        if not _undifferentiated():
            return *_differentiable(h, weight, bias, needs, (r, g, q, u), target, ctx.options), *(None,) * 7
        r, g = (torch.zeros_like(rest) if v is None else v for v in (r, g))
        dot = None if u is None else (u.double() * score).sum(1)
        ignore_index, dtype, tile = ctx.options[:3]
        kept = ctx.kept.pop() if ctx.kept else None  # a second backward computes the logits again
        operator = torch.ops.densreg.linear_density_backward
        dh, dw, db = operator(
            h, weight, bias, target, ignore_index, rest, own, r, g, q, u, dot, kept, dtype, tile, needs
        )
        grads = (dh, dw if kept is None else kept, db)
        return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), *(None,) * 7


@_without_autocast
def _differentiable(h, weight, bias, needs, upstream, target, options):
    """The gradients in h, weight and bias, differentiable to every order: plain torch on whole logits."""
    with torch.enable_grad():
        # Aliases: a trunk that uses the weight too makes h depend on it, which is not this Function's derivative.
        inputs: list[Any] = [None if t is None else t.view_as(t) for t in (h, weight, bias)]
        outputs = _LinearDensity.plain(*(*inputs, target, *options))
        pairs = [(o, v) for o, v in zip(outputs, upstream, strict=False) if v is not None]
        wanted = [t for t, need in zip(inputs, needs, strict=True) if need]
        values, cotangents = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(values, wanted, cotangents, create_graph=True, allow_unused=True))
    return [next(found) if need else None for need in needs]


# --------------------------------------------------------------------------------------------------------------------
# public


def check_head(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tile: int | None = None,
    least_classes: int = 1,
    dtype: torch.dtype | None = None,
) -> None:
    """Raise TypeError or ValueError unless features h [B, D], weight [C, D] and bias [C] fit each other.

    ``dtype`` is that of the products: where it is given, the tensors' dtypes may differ.
    """
    for name, t in (("h", h), ("weight", weight), ("bias", bias)):
        if name == "bias" and t is None:
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(t).__name__}")
        if paths.is_dtensor(t):
            raise TypeError(f"{name}: expected a plain tensor, got a DTensor")
        if t.dtype not in functional.DTYPES:
            raise TypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {t.dtype}")
        if t.device != h.device:
            raise ValueError(f"{name}: expected the device of h, {h.device}, got {t.device}")
        if t.dtype != h.dtype and dtype is None and not torch.is_autocast_enabled(h.device.type):
            raise TypeError(f"{name}: expected the dtype of h, {h.dtype}, got {t.dtype} (outside of autocast)")
    if h.ndim != 2:
        raise ValueError(f"h: expected features of shape [batch, features], got {list(h.shape)}")
    if weight.ndim != 2 or weight.shape[1] != h.shape[1] or len(weight) < least_classes:
        some = " with at least one class" if least_classes else ""
        raise ValueError(f"weight: expected shape [classes, {h.shape[1]}]{some}, got {list(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected shape [{len(weight)}], one number a class, got {list(bias.shape)}")
    if tile is not None and (isinstance(tile, bool) or not isinstance(tile, int) or tile < 1):
        raise ValueError(f"tile: expected a positive number of classes or None, got {tile!r}")


def product_dtype(h: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype of what is multiplied: on a GPU that of the tensors, or autocast's; else what sums are taken in."""
    dtype = torch.promote_types(h.dtype, weight.dtype)
    if not h.is_cuda:
        return accumulation_dtype(dtype)
    narrowed = dtype != torch.float64 and torch.is_autocast_enabled("cuda")
    return torch.get_autocast_dtype("cuda") if narrowed else dtype


def _head(
    h,
    weight,
    bias=None,
    target=None,
    ignore_index=-100,
    need_score=False,
    need_mean=False,
    tile=None,
    dtype=None,
    keep=False,
):
    """(rest, own, mean, score, correct), differentiable.

    ``keep``: whether logits are kept in the memory of the weight's gradient, which is then taken in the forward.
    """
    keep = keep and weight.requires_grad and torch.is_grad_enabled()
    tile = tiles.tile_size(h) if tile is None else tile
    options = (dtype or product_dtype(h, weight), tile, need_score, need_mean, keep)
    return _LinearDensity.call(h, weight, bias, target, ignore_index, *options)[:5]


def linear_log_density(h: Tensor, weight: Tensor, bias: Tensor | None = None, tile: int | None = None) -> Tensor:
    """``logsumexp(h W^T + b, 1)`` without the logits: the log density of a linear classifier's inputs, up to log Z.

    Differentiable to every order. Differentiating a gradient of the head once more (``create_graph=True``), forward
    mode, ``torch.func`` and ``is_grads_batched`` hold whole logits in memory; the penalty needs none of these.

    Args:
        h: [B, D], the features; fp16, bf16, fp32 or fp64.
        weight: [C, D], of the dtype of h (of any under autocast).
        bias: [C], or None. A class at -inf is masked.
        tile: how many classes are processed at a time; None: as many as suit the caches.

    Returns:
        [B], float32 (float64 for float64).

    Raises:
        TypeError, ValueError: what was given and what is expected.
    """
    check_head(h, weight, bias, tile)
    return _head(h, weight, bias, tile=tile)[0].to(row_dtype(h, weight))


def row_dtype(h: Tensor, weight: Tensor) -> torch.dtype:
    return accumulation_dtype(torch.promote_types(h.dtype, weight.dtype))


def cross_entropy_rows(
    rest: Tensor,
    own: Tensor,
    mean: Tensor,
    ignored: Tensor,
    classes: int | Tensor,
    label_smoothing: float,
    margin: Callable[[Tensor], Tensor] | None,
) -> Tensor:
    """Cross-entropy [B] from the logsumexp of the other classes and the target's logit; 0 where ignored."""
    logit = own if margin is None else margin(own)
    logit = logit.masked_fill(logit == math.inf, math.nan)  # as in torch
    # Not logaddexp(rest - logit, 0): its gradient at a target of -inf is NaN.
    ce = F.softplus((rest - logit).masked_fill(ignored, 0), threshold=40)
    if label_smoothing:
        if margin is not None:
            mean = mean + (logit - own) / classes
        uniform = tiles.logsumexp(rest, logit) - mean
        ce = (1 - label_smoothing) * ce + label_smoothing * uniform
    return ce.masked_fill(ignored, 0)


def linear_density_cross_entropy(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    margin: Callable[[Tensor], Tensor] | None = None,
    tile: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy, log density, and whether the target's logit is the largest, of each row, without the logits.

    Args:
        h, weight, bias, tile: as in :func:`linear_log_density`.
        target: [B] int64 classes in [0, C), or ``ignore_index``.
        label_smoothing: in [0, 1], as in :func:`torch.nn.functional.cross_entropy`.
        ignore_index: a target with this value has cross-entropy 0, and is not correct.
        margin: a differentiable function of the targets' logits, [B] float64 to [B], whose value the cross-entropy uses
            in their place (``lambda s: s - 0.35`` is CosFace's). The log density is without margin. With margins above
            80 (700 in float64) gradients are cut off for samples whose target leads by more than 80 (700).

    Returns:
        ``(cross_entropy [B], log_density [B], correct [B])``, float32 (float64 for float64) and bool; correct says
        whether the target's logit, without margin, is larger than every other.

    Raises:
        TypeError, ValueError: what was given and what is expected. On CUDA a target out of range is a device assert.
    """
    check_head(h, weight, bias, tile)
    functional.check_target(h, target, label_smoothing, ignore_index)
    rest, own, mean, _, correct = _head(h, weight, bias, target, ignore_index, need_mean=label_smoothing > 0, tile=tile)
    ignored = target == ignore_index
    ce = cross_entropy_rows(rest, own, mean, ignored, len(weight), label_smoothing, margin)
    dtype = row_dtype(h, weight)
    return ce.to(dtype), tiles.density_rows(rest, own, ignored).to(dtype), correct


def linear_density_loss(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    x: Inputs,
    coeff: float | Tensor,
    p: float = 2,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    class_weight: Tensor | None = None,
    margin: Callable[[Tensor], Tensor] | None = None,
    tile: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`densreg.density_loss` of the logits ``h W^T + b``, for which no array [B, C] is allocated.

    The forward allocates the weight's gradient [C, D], which holds as many logits as fit until the backward.

        h = trunk(x.requires_grad_())  # [B, D]
        loss, ce, penalty = densreg.linear_density_loss(h, head.weight, head.bias, y, x, coeff=0.1)

    Args:
        h: [B, D], computed from x; fp16, bf16, fp32 or fp64.
        weight, bias, tile: as in :func:`linear_log_density`.
        target: [B] int64 classes in [0, C), or ``ignore_index``: such a sample has a penalty and no cross-entropy.
        x: as in :func:`densreg.density_penalty`.
        coeff: weight of the penalty, >= 0.
        p: order of the norm, 1 <= p <= inf.
        label_smoothing: in [0, 1], as in :func:`torch.nn.functional.cross_entropy`.
        ignore_index: as in :func:`torch.nn.functional.cross_entropy`.
        class_weight: [C], or None, as ``weight`` of that function; not together with label smoothing.
        margin: as in :func:`linear_density_cross_entropy`; the penalty is that of the logits without margin.

    Returns:
        ``(loss, cross_entropy, penalty)``, scalars; float32 (float64 for float64).

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`densreg.density_loss`; a weight or bias that does not fit h.
    """
    return linear_loss_and_correct(
        h, weight, bias, target, x, coeff, p, label_smoothing, ignore_index, class_weight, margin, tile
    )[:3]


def check_free_of(xs: tuple[Tensor, ...], **head: Tensor | None) -> None:
    """Raise ValueError where one was computed from an input: the score goes through the features alone."""
    for name, t in head.items():
        if xs and t is not None and t.requires_grad and not t.is_leaf:
            found = torch.autograd.grad(t, xs, torch.zeros_like(t), retain_graph=True, allow_unused=True)
            if any(g is not None for g in found):
                raise ValueError(
                    f"{name}: expected one that does not depend on x, whose score would lose what goes through it: "
                    "take densreg.density_loss of the logits"
                )


def penalty_of_score(h: Tensor, xs: tuple[Tensor, ...], score: Tensor, classes: int, p: float) -> Tensor:
    """The penalty, from G = dL/dh: the mean norm of what the trunk's backward makes of it."""
    scale = paths.cotangent_scale(h.new_empty(0, classes))
    of_x = paths.vjp(h, xs, (score * scale).to(h.dtype), scale)
    return penalty.score_norm(paths.check_score(of_x), p, "mean")


def linear_loss_and_correct(
    h,
    weight,
    bias,
    target,
    x,
    coeff,
    p,
    label_smoothing=0.0,
    ignore_index=-100,
    class_weight=None,
    margin=None,
    tile=None,
    dtype=None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`linear_density_loss`, and whether the target is the largest, [B]; without x the penalty is NaN.

    ``dtype`` of the products, for a caller that has turned autocast off.
    """
    penalty.check_coeff(coeff)
    p = functional.check_order(p)
    check_head(h, weight, bias, tile, dtype=dtype)
    xs = () if x is None else paths.check_inputs(h, x)
    check_free_of(xs, weight=weight, bias=bias)
    functional.check_target(h, target, label_smoothing, ignore_index)
    ignored, classes = target == ignore_index, len(weight)
    counts = ~ignored
    if class_weight is not None:
        if class_weight.shape != weight.shape[:1]:
            raise ValueError(f"class_weight: expected shape [{classes}], got {list(class_weight.shape)}")
        if label_smoothing:
            raise ValueError("class_weight together with label_smoothing: expected one of them, got both")
        counts = class_weight[target.masked_fill(ignored, 0)].masked_fill(ignored, 0)
    options = (ignore_index, x is not None, label_smoothing > 0, tile, dtype, True)
    rest, own, mean, score, correct = _head(h, weight, bias, target, *options)
    ce = cross_entropy_rows(rest, own, mean, ignored, classes, label_smoothing, margin)
    cross_entropy = ((ce * counts).sum() / counts.sum()).to(row_dtype(h, weight))
    if x is None:
        return cross_entropy, cross_entropy, torch.full_like(cross_entropy, math.nan), correct
    of_x = penalty_of_score(h, xs, score, classes, p)
    return cross_entropy + coeff * of_x, cross_entropy, of_x, correct
