"""pnorm and pnorm_backward in Triton. The mathematics is in densreg/ops/pnorm.py.

A row is one dense block of memory, in whatever order of dimensions. Lengths and strides come divided by ALIGN.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rows import (
    SPLIT,
    Tile,
    accumulation,
    accumulation_dtype,
    alignment,
    as_row,
    exp_difference,
    on,
    part_of_row,
    store,
    tile_of,
)

GENERAL, ONE, TWO, INF = range(4)
_GENERAL, _ONE, _TWO, _INF = (tl.constexpr(order) for order in range(4))
_INTEGERS = ["rows", "units", "stride", "out_stride", "parts"]  # not specialized: one kernel for all


@triton.jit
def _power(r, p, PRECISE: tl.constexpr):
    """r^p for r in [0, 1] or NaN, and p > 0. Not by log2: that of a GPU is approximate near 1."""
    return exp_difference(tl.log(r) * p, tl.zeros(r.shape, r.dtype), PRECISE)


@triton.jit
def _power_of_total(total, p, PRECISE: tl.constexpr):
    """total^p, total at least 1, p in (-1, 1]."""
    return exp_difference(tl.log(total) * p, tl.zeros(total.shape, total.dtype), PRECISE)


@triton.jit
def _peak(magnitude, ACC: tl.constexpr):
    """Largest magnitude [R] of [R, BLOCK]; NaN where there is one: as integers they have the same order, NaN on top."""
    bits: tl.constexpr = tl.int64 if ACC.primitive_bitwidth == 64 else tl.int32
    return tl.max(magnitude.to(bits, bitcast=True), 1).to(ACC, bitcast=True)


@triton.jit
def _ratio(magnitude, peak):
    """magnitude / peak, one exactly for the peak itself; 0 in a row of zeros, NaN for an infinite entry."""
    # Divided by the peak, not multiplied by its reciprocal: that is infinite for a subnormal peak.
    ratio = magnitude / tl.where(peak == 0, 1.0, peak)
    return tl.where((magnitude == peak) & (peak > 0) & (peak < float("inf")), 1.0, ratio)


@triton.jit
def _total(magnitude, mask, peak, p, ORDER: tl.constexpr, PRECISE: tl.constexpr):
    """sum (magnitude / peak)^p of each row; the number of peaks for p = inf."""
    if ORDER == _INF:
        return tl.maximum(tl.sum((mask & (magnitude == peak[:, None])).to(peak.dtype), 1), 1.0)
    r = _ratio(magnitude, peak[:, None])
    if ORDER == _TWO:
        r = r * r
    elif ORDER == _GENERAL:
        r = _power(r, p, PRECISE)
    # 0 / 0 and inf / inf: such a row has the norm 0 or inf, and its gradient divides by one.
    return tl.where((peak == 0) | (peak == float("inf")), 1.0, tl.sum(tl.where(mask, r, 0.0), 1))


@triton.jit
def _norm(peak, total, inverse_p, ORDER: tl.constexpr, PRECISE: tl.constexpr):
    if ORDER == _INF:
        return peak
    elif ORDER == _ONE:
        return peak * total
    elif ORDER == _TWO:
        return peak * tl.sqrt(total)
    return peak * _power_of_total(total, inverse_p, PRECISE)


@triton.jit
def _dual(g, peak, total, less_one, inverse_p, grad, ORDER: tl.constexpr, PRECISE: tl.constexpr):
    """grad sign(g) (|g| / norm)^(p-1); sign(0) and the sign of a NaN are 0, as in torch."""
    if ORDER == _TWO:
        share = 1 / tl.sqrt(total)
    elif ORDER == _ONE:
        share = tl.full(total.shape, 1.0, total.dtype)
    elif ORDER == _INF:
        share = 1 / total
    else:
        share = _power_of_total(total, -less_one * inverse_p, PRECISE)
    factor = (share * grad)[:, None]
    peak = peak[:, None]
    if ORDER == _TWO:
        return g / tl.where(peak == 0, 1.0, peak) * factor
    sign = tl.where(g > 0, 1.0, tl.where(g < 0, -1.0, 0.0)).to(g.dtype)
    if ORDER == _ONE:
        return sign * factor
    magnitude = tl.abs(g)
    if ORDER == _INF:
        return tl.where(magnitude == peak, sign, 0.0) * factor
    y = _power(_ratio(magnitude, peak), less_one[:, None], PRECISE)
    return tl.where(g < 0, -y, y) * factor  # here a NaN stays


@triton.jit(do_not_specialize=_INTEGERS)
def pnorm_rows(
    g_ptr, norm_ptr, peak_ptr, total_ptr, rows, units, stride, p: tl.float64, inverse_p: tl.float64,
    ALIGN: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, ORDER: tl.constexpr, ACC: tl.constexpr,
    PRECISE: tl.constexpr,
):  # fmt: skip
    """ROWS rows whole."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    columns = tl.arange(0, BLOCK)[None, :]
    mask = live[:, None] & (columns < units * ALIGN)
    magnitude = tl.abs(tl.load(g_ptr + (row * stride * ALIGN)[:, None] + columns, mask=mask, other=0.0).to(ACC))
    p, inverse_p = tl.full((1, 1), p, ACC), tl.full((1,), inverse_p, ACC)
    peak = _peak(magnitude, ACC)
    total = _total(magnitude, mask, peak, p, ORDER, PRECISE)
    tl.store(norm_ptr + row, _norm(peak, total, inverse_p, ORDER, PRECISE), mask=live)
    tl.store(peak_ptr + row, peak, mask=live)
    tl.store(total_ptr + row, total, mask=live)


@triton.jit(do_not_specialize=_INTEGERS)
def pnorm_parts(
    g_ptr, partial_ptr, rows, units, stride, parts, p: tl.float64,
    ALIGN: tl.constexpr, BLOCK: tl.constexpr, ORDER: tl.constexpr, ACC: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    """Peak and total of one part of a row."""
    pid = tl.program_id(0).to(tl.int64)
    pointers, mask, _ = part_of_row(g_ptr, pid // parts, pid % parts, units, stride, ALIGN, BLOCK)
    magnitude = tl.abs(tl.load(pointers, mask=mask, other=0.0).to(ACC))
    peak = _peak(magnitude, ACC)
    own = pid + tl.arange(0, 1)
    tl.store(partial_ptr + own, peak)
    total = _total(magnitude, mask, peak, tl.full((1, 1), p, ACC), ORDER, PRECISE)
    tl.store(partial_ptr + rows.to(tl.int64) * parts + own, total)


@triton.jit(do_not_specialize=_INTEGERS)
def pnorm_whole(
    partial_ptr, norm_ptr, peak_ptr, total_ptr, rows, parts, p: tl.float64, inverse_p: tl.float64,
    PARTS: tl.constexpr, ORDER: tl.constexpr, ACC: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    """One row's norm from its parts."""
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    each = tl.arange(0, PARTS)[None, :]
    there = each < parts
    at = partial_ptr + (row * parts)[:, None] + each
    peaks = tl.load(at, mask=there, other=0.0)
    totals = tl.load(at + rows.to(tl.int64) * parts, mask=there, other=0.0)
    peak = _peak(peaks, ACC)
    p, inverse_p = tl.full((1, 1), p, ACC), tl.full((1,), inverse_p, ACC)
    if ORDER == _INF:
        total = tl.maximum(tl.sum(tl.where(peaks == peak[:, None], totals, 0.0), 1), 1.0)
    else:
        weight = _ratio(peaks, peak[:, None])
        if ORDER == _TWO:
            weight = weight * weight
        elif ORDER == _GENERAL:
            weight = _power(weight, p, PRECISE)
        total = tl.sum(tl.where(there, totals * weight, 0.0), 1)
        total = tl.where((peak == 0) | (peak == float("inf")), 1.0, total)
    tl.store(norm_ptr + row, _norm(peak, total, inverse_p, ORDER, PRECISE))
    tl.store(peak_ptr + row, peak)
    tl.store(total_ptr + row, total)


@triton.jit(do_not_specialize=_INTEGERS)
def pnorm_backward_tiles(
    grad_ptr, g_ptr, peak_ptr, total_ptr, out_ptr, rows, units, stride, parts,
    inverse_p: tl.float64, less_one: tl.float64,
    ALIGN: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, ORDER: tl.constexpr, ACC: tl.constexpr,
    PRECISE: tl.constexpr,
):  # fmt: skip
    """ROWS rows whole, or one part of one row."""
    pid = tl.program_id(0).to(tl.int64)
    row = pid // parts * ROWS + tl.arange(0, ROWS)
    live = row < rows
    pointers, mask, column = part_of_row(g_ptr, row[:, None], pid % parts, units, stride, ALIGN, BLOCK)
    mask = mask & live[:, None]
    g = tl.load(pointers, mask=mask, other=0.0).to(ACC)
    grad = tl.load(grad_ptr + row, mask=live, other=0.0)
    peak = tl.load(peak_ptr + row, mask=live, other=1.0)
    total = tl.load(total_ptr + row, mask=live, other=1.0)
    less_one, inverse_p = tl.full((1,), less_one, ACC), tl.full((1,), inverse_p, ACC)
    dual = _dual(g, peak, total, less_one, inverse_p, grad, ORDER, PRECISE)
    store(out_ptr + (row * units * ALIGN)[:, None] + column, dual, mask)


# --------------------------------------------------------------------------------------------------------------------


def order_of(p: float) -> int:
    return ONE if p == 1 else TWO if p == 2 else INF if p == math.inf else GENERAL


def _powers(p: float) -> tuple[float, float, float]:
    """p, 1 / p and p - 1, which float32 would round to 0. A larger p would be infinite there, and 0 * inf NaN."""
    p = min(p, 1e30)
    return p, 1 / p, p - 1


def row_stride(g: Tensor) -> int | None:
    """Distance of the rows, if each is one dense block of memory in whatever order of dimensions; else None."""
    length = 1
    for stride, size in sorted(zip(g.stride()[1:], g.shape[1:], strict=True)):
        if size != 1:
            if stride != length:
                return None
            length *= size
    return g.stride(0) if g.shape[0] > 1 else length


def _tile_of(g: Tensor, p: float) -> Tile | None:
    # exp and log take registers: with 32 entries a thread ptxas spills.
    return tile_of(g[0].numel(), g.element_size(), *((8192,) if order_of(p) == GENERAL else ()))


def _options(g: Tensor, align: int, p: float) -> dict[str, object]:
    return {
        "ALIGN": align,
        "ORDER": order_of(p),
        "ACC": accumulation(g.dtype),
        "PRECISE": g.dtype != torch.float64,
    }


def pnorm(g: Tensor, p: float) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`densreg.ops.pnorm`."""
    rows, dtype = g.shape[0], accumulation_dtype(g.dtype)
    if g.numel() == 0:  # no rows, or rows without entries
        zero = g.new_zeros(rows, dtype=dtype)
        return zero, zero.clone(), torch.ones_like(zero)
    length = g[0].numel()
    stride = row_stride(g)
    if stride is None:
        g, stride = g.contiguous(), length
    norm, peak, total = (g.new_empty(rows, dtype=dtype) for _ in range(3))
    align = alignment(length, stride)
    options = _options(g, align, p)
    sizes = (rows, length // align, stride // align)
    with on(g.device):
        if tile := _tile_of(g, p):
            pnorm_rows[(triton.cdiv(rows, tile.rows),)](
                g, norm, peak, total, *sizes, *_powers(p)[:2],
                BLOCK=tile.block, ROWS=tile.rows, num_warps=tile.warps, **options,
            )  # fmt: skip
        else:
            tile = SPLIT[g.element_size()]
            parts = triton.cdiv(length, tile.block)
            partial = g.new_empty((2, rows, parts), dtype=dtype)
            pnorm_parts[(rows * parts,)](
                g, partial, *sizes, parts, _powers(p)[0], BLOCK=tile.block, num_warps=tile.warps, **options
            )
            del options["ALIGN"]
            pnorm_whole[(rows,)](
                partial, norm, peak, total, rows, parts, *_powers(p)[:2],
                PARTS=triton.next_power_of_2(parts), num_warps=4, **options,
            )  # fmt: skip
    return norm, peak, total


def pnorm_backward(grad: Tensor, g: Tensor, peak: Tensor, total: Tensor, p: float) -> Tensor:
    """See :func:`densreg.ops.pnorm_backward`."""
    out = torch.empty_like(g)  # g's memory format
    if g.numel() == 0:
        return out
    rows, length = g.shape[0], g[0].numel()
    # Where the kernel writes: dense rows one after the other, in the order of g's; another tensor where g has none.
    dense, stride = out, row_stride(g)
    if stride is None or out.stride()[1:] != g.stride()[1:] or row_stride(out) != length:
        g, stride = g.contiguous(), length
        dense = torch.empty_like(g)
    grad, peak, total = (as_row(t, accumulation_dtype(g.dtype)) for t in (grad, peak, total))
    align = alignment(length, stride)
    tile = _tile_of(g, p) or SPLIT[g.element_size()]
    parts = triton.cdiv(length, tile.block)
    with on(g.device):
        pnorm_backward_tiles[(triton.cdiv(rows, tile.rows) * parts,)](
            grad, g, peak, total, dense, rows, length // align, stride // align, parts, *_powers(p)[1:],
            BLOCK=tile.block, ROWS=tile.rows, num_warps=tile.warps, **_options(g, align, p),
        )  # fmt: skip
    return out if dense is out else out.copy_(dense)
