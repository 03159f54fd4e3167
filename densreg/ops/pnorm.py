"""pnorm (the p-norm of each row of the score) and pnorm_backward."""

from __future__ import annotations

import torch
from torch import Tensor

from densreg.ops.registry import call, define, fake, fallback, require_no_grad
from densreg.ops.rows import accumulation_dtype, per_row

define("pnorm(Tensor g, float p) -> (Tensor norm, Tensor peak, Tensor total)")


def pnorm(g: Tensor, p: float) -> tuple[Tensor, Tensor, Tensor]:
    """p-norm of each row, scaled by the row's largest magnitude so that no power over- or underflows.

    Args:
        g: [B, ...], any floating dtype and memory format.
        p: the order, 1 <= p <= inf.

    Returns:
        ``(norm [B], peak [B], total [B])`` in float32 (float64 for float64): ``peak = max_i |g_i|``,
        ``total = sum_i (|g_i| / peak)^p`` and ``norm = peak * total^(1/p)``. For p = inf ``norm = peak``, and
        ``total`` is the number of entries of that magnitude. ``peak`` and ``total`` are for :func:`pnorm_backward`.
    """
    require_no_grad("pnorm", g)
    return call("pnorm", g, p)


@fallback("pnorm")
def _pnorm_torch(g: Tensor, p: float) -> tuple[Tensor, Tensor, Tensor]:
    magnitude = g.to(accumulation_dtype(g.dtype)).abs()
    if magnitude[:1].numel() == 0:  # no rows, or rows without entries
        zero = magnitude.new_zeros(g.shape[0])
        return zero, zero.clone(), torch.ones_like(zero)
    dims = tuple(range(1, g.ndim))
    peak = magnitude.amax(dims)
    if p == float("inf"):
        ties = (magnitude == per_row(peak, g)).sum(dims).to(peak.dtype)
        return peak.clone(), peak, ties.clamp_(min=1)  # a NaN equals nothing: torch's gradient there is 0
    # Divided by the peak, not multiplied by its reciprocal: that is infinite for a subnormal peak.
    ratio = magnitude / per_row(peak, g)
    total = (ratio if p == 1 else ratio.square_() if p == 2 else ratio.pow_(p)).sum(dims)
    # 0 / 0 and inf / inf: such a row has the norm 0 or inf, and its gradient divides by one.
    total = total.masked_fill((peak == 0) | peak.isinf(), 1)
    return peak * (total if p == 1 else total.sqrt() if p == 2 else total.pow(1 / p)), peak, total


@fake("pnorm")
def _pnorm_fake(g, p):
    row = g.new_empty(g.shape[0], dtype=accumulation_dtype(g.dtype))
    return row, torch.empty_like(row), torch.empty_like(row)


define("pnorm_backward(Tensor grad, Tensor g, Tensor peak, Tensor total, float p) -> Tensor")


def pnorm_backward(grad: Tensor, g: Tensor, peak: Tensor, total: Tensor, p: float) -> Tensor:
    """Gradient of :func:`pnorm` in g: ``grad sign(g) (|g| / norm)^(p-1)``, [B, ...], in the dtype of g.

    Computed as ``(|g| / peak)^(p-1) total^(-(p-1)/p)``: a power of the norm's rounding would be off for large p.
    A zero row has gradient 0; for p = inf the gradient is shared between the entries of largest magnitude.
    """
    require_no_grad("pnorm_backward", grad, g, peak, total)
    return call("pnorm_backward", grad, g, peak, total, p)


@fallback("pnorm_backward")
def _pnorm_backward_torch(grad: Tensor, g: Tensor, peak: Tensor, total: Tensor, p: float) -> Tensor:
    value = g.to(accumulation_dtype(g.dtype))
    grad, peak, total = (per_row(t, g) for t in (grad.to(value.dtype), peak, total))
    if p == float("inf"):
        dual = value.sgn() * (value.abs() == peak) / total
    elif p == 1:
        dual = value.sgn()
    else:
        ratio = value / peak.masked_fill(peak == 0, 1)
        dual = ratio if p == 2 else ratio.sgn() * ratio.abs().pow_(p - 1)
        dual = dual * total.pow(1 / p - 1)
    return torch.empty_like(g).copy_(dual * grad)


@fake("pnorm_backward")
def _pnorm_backward_fake(grad, g, peak, total, p):
    return torch.empty_like(g)
