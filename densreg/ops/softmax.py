"""softmax (log density, cross-entropy and softmax, in one pass over the logits) and its two derivatives."""

from __future__ import annotations

import torch
from torch import Tensor

from densreg.ops.registry import call, define, fake, fallback, require_no_grad
from densreg.ops.rows import accumulation_dtype

define(
    "softmax(Tensor logits, Tensor? target, float label_smoothing, int ignore_index, bool need_softmax, float scale)"
    " -> (Tensor log_density, Tensor cross_entropy, Tensor softmax, Tensor statistics)"
)


def softmax(
    logits: Tensor,
    target: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    need_softmax: bool = True,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log density, cross-entropy and softmax of each row, from one read of the logits.

    Args:
        logits: [B, C], any floating dtype and strides.
        target: [B] int64 class indices in [0, C) or equal to ``ignore_index``; ``None`` for no cross-entropy.
        label_smoothing: weight in [0, 1] of the uniform distribution in the target.
        ignore_index: the target that gives a cross-entropy and a gradient of zero.
        need_softmax: whether to write the softmax.
        scale: factor on the softmax, applied before it is rounded to the dtype of the logits.

    Returns:
        ``(log_density [B], cross_entropy [B], softmax [B, C], statistics [2, B])``: the softmax in the dtype of the
        logits, the others in float32 (float64 for float64 logits). The statistics are m and s, for
        :func:`softmax_backward`. What was not asked for has shape [0].
    """
    require_no_grad("softmax", logits)
    return call("softmax", logits, target, label_smoothing, ignore_index, need_softmax, scale)


def check_classes(target: Tensor, classes: int, ignore_index: int) -> None:
    """Raise ValueError for a target out of range; on a GPU, where that would synchronise, kernels and gather assert."""
    if target.device.type != "cpu":
        return
    wrong = (target != ignore_index) & ((target < 0) | (target >= classes))
    if wrong.any():
        raise ValueError(
            f"expected classes in [0, {classes}) or ignore_index={ignore_index} in target, "
            f"got class {target[wrong][0].item()}"
        )


def _row_sums(logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row maximum m [B, 1], exp(f - m) [B, C], s [B, 1] and the log density [B], in the accumulation dtype."""
    f = logits.to(accumulation_dtype(logits.dtype))
    m = f.amax(1, keepdim=True)
    e = (f - m).exp()
    # torch.sum is blocked, torch.softmax keeps one running sum per lane: that costs digits from 100,000 classes up.
    s = e.sum(1, keepdim=True)
    # Rows whose maximum is infinite: f - m is NaN, and the log density is that maximum, as in torch.logsumexp.
    log_density = torch.where(m.isinf(), m, m + s.log()).squeeze(1)
    return m, e, s, log_density


@fallback("softmax")
def _softmax_torch(
    logits: Tensor,
    target: Tensor | None,
    label_smoothing: float,
    ignore_index: int,
    need_softmax: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    m, e, s, log_density = _row_sums(logits)
    cross_entropy = log_density.new_empty(0)
    if target is not None:
        check_classes(target, logits.shape[1], ignore_index)
        ignored = target == ignore_index
        log_s = s.log().squeeze(1)
        m_row = m.squeeze(1)
        f_y = logits.gather(1, target.masked_fill(ignored, 0).unsqueeze(1)).squeeze(1).to(m.dtype)
        # Not L - f_y: at logits of 1e4 the rounding of L would be all that is left.
        cross_entropy = (m_row - f_y) + log_s
        if label_smoothing > 0:
            uniform = (m - logits.to(m.dtype)).mean(1) + log_s
            cross_entropy = (1 - label_smoothing) * cross_entropy + label_smoothing * uniform
        cross_entropy = cross_entropy.masked_fill(ignored, 0)
    y = logits.new_empty(0)
    if need_softmax:
        y = torch.empty_like(logits, memory_format=torch.contiguous_format)
        y.copy_(e.div_(s).mul_(scale))
    return log_density, cross_entropy, y, torch.stack([m.squeeze(1), s.squeeze(1)])


@fake("softmax")
def _softmax_fake(logits, target, label_smoothing, ignore_index, need_softmax, scale):
    row_dtype = accumulation_dtype(logits.dtype)
    return (
        logits.new_empty(logits.shape[0], dtype=row_dtype),
        logits.new_empty(0 if target is None else logits.shape[0], dtype=row_dtype),
        logits.new_empty(logits.shape if need_softmax else 0),
        logits.new_empty(2, logits.shape[0], dtype=row_dtype),
    )


# --------------------------------------------------------------------------------------------------------------------

define(
    "softmax_backward(Tensor source, Tensor? statistics, Tensor? target, Tensor? grad_log_density,"
    " Tensor? grad_cross_entropy, Tensor? grad_softmax, float label_smoothing, int ignore_index, float scale) -> Tensor"
)


def softmax_backward(
    source: Tensor,
    statistics: Tensor | None,
    target: Tensor | None,
    grad_log_density: Tensor | None,
    grad_cross_entropy: Tensor | None,
    grad_softmax: Tensor | None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    scale: float = 1.0,
) -> Tensor:
    """Gradient of the outputs of :func:`softmax` in the logits, [B, C], in the dtype of the logits.

    With upstream gradients ``l [B]`` of the log density, ``a [B]`` of the cross-entropy and ``U [B, C]`` of the
    softmax (which is what the double backward of the input score brings):
    ``a (P - q) + l P + scale P (U - <P, U>)``. A gradient that is ``None`` counts as zero.

    Args:
        source: where P comes from. With ``statistics`` the logits [B, C]: the only way in half precision, where a
            rounded P would cost a confident sample's P - q all its digits. Without, the forward's softmax
            (``scale * P``), which saves the exponentials.
        statistics: the forward's [2, B], or None.
        grad_softmax: [B, C], in the dtype of the logits.
    """
    require_no_grad("softmax_backward", source, grad_log_density, grad_cross_entropy, grad_softmax)
    return call(
        "softmax_backward",
        source,
        statistics,
        target,
        grad_log_density,
        grad_cross_entropy,
        grad_softmax,
        label_smoothing,
        ignore_index,
        scale,
    )


def _probabilities(source: Tensor, statistics: Tensor | None, scale: float = 1.0) -> Tensor:
    """P [B, C] in the accumulation dtype."""
    wide = source.to(accumulation_dtype(source.dtype))
    if statistics is None:
        return wide / scale
    m, s = statistics.unsqueeze(2)
    return (wide - m).exp_() / s


@fallback("softmax_backward")
def _softmax_backward_torch(
    source: Tensor,
    statistics: Tensor | None,
    target: Tensor | None,
    grad_log_density: Tensor | None,
    grad_cross_entropy: Tensor | None,
    grad_softmax: Tensor | None,
    label_smoothing: float,
    ignore_index: int,
    scale: float,
) -> Tensor:
    dtype = accumulation_dtype(source.dtype)
    p = _probabilities(source, statistics, scale)
    weight = torch.zeros_like(p[:, :1])
    if grad_log_density is not None:
        weight = weight + grad_log_density.to(dtype).unsqueeze(1)
    if grad_softmax is not None:
        u = grad_softmax.to(dtype) * scale
        weight = weight + u - (p * u).sum(1, keepdim=True)
    out = torch.empty_like(source, memory_format=torch.contiguous_format)
    if grad_cross_entropy is None or target is None:
        return out.copy_(p * weight)
    ignored = target == ignore_index
    a = grad_cross_entropy.to(dtype).masked_fill(ignored, 0).unsqueeze(1)
    grad = p * (weight + a)
    if label_smoothing > 0:
        grad -= a * (label_smoothing / p.shape[1])
    grad.scatter_add_(1, target.masked_fill(ignored, 0).unsqueeze(1), a * (label_smoothing - 1))
    return out.copy_(grad)


@fake("softmax_backward")
def _softmax_backward_fake(source, *_):
    return torch.empty_like(source, memory_format=torch.contiguous_format)


# --------------------------------------------------------------------------------------------------------------------

define(
    "softmax_double_backward(Tensor source, Tensor? statistics, Tensor? target, Tensor? grad_log_density,"
    " Tensor? grad_cross_entropy, Tensor v, int ignore_index) -> (Tensor grad, Tensor dot)"
)


def softmax_double_backward(
    source: Tensor,
    statistics: Tensor | None,
    target: Tensor | None,
    grad_log_density: Tensor | None,
    grad_cross_entropy: Tensor | None,
    v: Tensor,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:
    """Gradient in the logits of ``<v, (l + a) P - a q>``, what :func:`softmax_backward` gives for l and a alone.

    Args:
        source: as of :func:`softmax_backward`, with scale 1.
        v: [B, C], the cotangent of that gradient, in its dtype.

    Returns:
        ``(grad [B, C], dot [B])``: ``grad = (l + a) P (v - <P, v>)`` in the dtype of the logits, a counted as 0 where
        the target is ignored; ``dot = <P, v>``, the gradient in l, in float32 (float64 for float64 logits).
    """
    require_no_grad("softmax_double_backward", source, grad_log_density, grad_cross_entropy, v)
    arguments = (source, statistics, target, grad_log_density, grad_cross_entropy, v, ignore_index)
    return call("softmax_double_backward", *arguments)


@fallback("softmax_double_backward")
def _softmax_double_backward_torch(
    source: Tensor,
    statistics: Tensor | None,
    target: Tensor | None,
    grad_log_density: Tensor | None,
    grad_cross_entropy: Tensor | None,
    v: Tensor,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    p = _probabilities(source, statistics)
    wide = v.to(p.dtype)
    dot = (p * wide).sum(1)
    weight = torch.zeros_like(dot)
    if grad_log_density is not None:
        weight = weight + grad_log_density
    if grad_cross_entropy is not None and target is not None:
        check_classes(target, p.shape[1], ignore_index)
        weight = weight + grad_cross_entropy.masked_fill(target == ignore_index, 0)
    out = torch.empty_like(source, memory_format=torch.contiguous_format)
    return out.copy_(weight.unsqueeze(1) * p * (wide - dot.unsqueeze(1))), dot


@fake("softmax_double_backward")
def _softmax_double_backward_fake(source, *_):
    grad = torch.empty_like(source, memory_format=torch.contiguous_format)
    return grad, source.new_empty(source.shape[0], dtype=accumulation_dtype(source.dtype))
