"""pnorm and pnorm_backward in Triton. The mathematics is in densreg/ops/pnorm.py.

A row is one dense block of memory, in whatever order of dimensions. Lengths and strides come divided by ALIGN.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from densreg.ops.rows import accumulation_dtype

from .rows import (
    SPLIT,
    Tile,
    accumulation,
    as_row,
    blocks_of,
    column,
    cut_of,
    edges,
    entries,
    exp_difference,
    first_entry,
    launch,
    launch_parts,
    publish,
    published,
    store,
    tile_of,
    turn,
)

GENERAL, ONE, TWO, INF = range(4)
_GENERAL, _ONE, _TWO, _INF = (tl.constexpr(order) for order in range(4))
_INTEGERS = ["rows", "units", "stride", "parts", "lag"]  # not specialized: one kernel for all


@triton.jit
def _power(r, p):
    """r^p for r in [0, 1] or NaN, and p > 0; or r from 1 on and p in (-1, 1].

    Not by log2: that of a GPU is approximate near 1.
    """
    return exp_difference(tl.log(r) * p, tl.zeros(r.shape, r.dtype), r.dtype == tl.float32)


@triton.jit
def _peak(magnitude):
    """Largest magnitude along the last dimension; NaN where there is one: as integers they have that order."""
    bits: tl.constexpr = tl.int64 if magnitude.dtype == tl.float64 else tl.int32
    return tl.max(magnitude.to(bits, bitcast=True), len(magnitude.shape) - 1).to(magnitude.dtype, bitcast=True)


@triton.jit
def _scales(peak):
    """(a, b): x a b = x / peak, within the rounding of b and of the product; x itself for a peak of zero.

    a is the power of two that brings the peak near one: the reciprocal of a subnormal peak would be infinite.
    """
    divisor = tl.where(peak == 0, 1.0, peak)
    if peak.dtype == tl.float64:
        exponent = tl.minimum(tl.maximum(divisor.to(tl.int64, bitcast=True) >> 52, 1), 2045)
        a = ((2046 - exponent) << 52).to(tl.float64, bitcast=True)
    else:
        exponent = tl.minimum(tl.maximum(divisor.to(tl.int32, bitcast=True) >> 23, 1), 253)
        a = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    return a, 1 / (divisor * a)


@triton.jit
def _ratio(magnitude, peak, a, b):
    """magnitude / peak, one exactly for the peak itself; 0 in a row of zeros, NaN for an infinite entry."""
    one = tl.where(peak == 0, 0.0, tl.where(peak == float("inf"), float("nan"), 1.0))
    return tl.where(magnitude == peak, one, magnitude * a * b)


@triton.jit
def _total(magnitude, mask, peak, p, ORDER: tl.constexpr):
    """sum (magnitude / peak)^p; for p = inf the number of peaks. Magnitudes outside of the mask are 0."""
    axis: tl.constexpr = len(magnitude.shape) - 1
    if ORDER == _INF:
        total = tl.sum((mask & (magnitude == column(peak))).to(peak.dtype), axis)
    else:
        a, b = _scales(peak)
        if ORDER == _GENERAL:
            r = _power(_ratio(magnitude, column(peak), column(a), column(b)), p)
            total = tl.sum(tl.where(mask, r, 0.0), axis)
        else:
            y = magnitude * column(a)
            total = tl.sum(y * y, axis) * b * b if ORDER == _TWO else tl.sum(y, axis) * b
        # 0 / 0 and inf / inf: such a row has the norm 0 or inf, and its gradient divides by one.
        total = tl.where((peak == 0) | (peak == float("inf")), 1.0, total)
    return total


@triton.jit
def _norm(peak, total, inverse_p, ORDER: tl.constexpr):
    if ORDER == _INF:
        return peak
    elif ORDER == _ONE:
        return peak * total
    elif ORDER == _TWO:
        return peak * tl.sqrt(total)
    return peak * _power(total, inverse_p)


@triton.jit
def _dual(g, peak, total, less_one, inverse_p, grad, ORDER: tl.constexpr):
    """grad sign(g) (|g| / norm)^(p-1); sign(0) and the sign of a NaN are 0, as in torch."""
    if ORDER == _TWO:
        share = 1 / tl.sqrt(total)
    elif ORDER == _ONE:
        share = tl.full(total.shape, 1.0, total.dtype)
    elif ORDER == _INF:
        share = 1 / total
    else:
        share = _power(total, -less_one * inverse_p)
    factor = column(share * grad)
    a, b = _scales(peak)
    if ORDER == _TWO:
        return g * column(a) * column(b) * factor
    sign = tl.where(g > 0, 1.0, tl.where(g < 0, -1.0, 0.0)).to(g.dtype)
    if ORDER == _ONE:
        return sign * factor
    magnitude = tl.abs(g)
    if ORDER == _INF:
        return tl.where(magnitude == column(peak), sign, 0.0) * factor
    y = _power(_ratio(magnitude, column(peak), column(a), column(b)), less_one)
    return tl.where(g < 0, -y, y) * factor  # here a NaN stays


@triton.jit
def _store_rows(row, live, peak, total, norm_ptr, peak_ptr, total_ptr, inverse_p, ORDER: tl.constexpr):
    if ORDER == _INF:
        total = tl.maximum(total, 1.0)  # a NaN has no ties, not even itself
    tl.store(norm_ptr + row, _norm(peak, total, inverse_p, ORDER), mask=live)
    tl.store(peak_ptr + row, peak, mask=live)
    tl.store(total_ptr + row, total, mask=live)


@triton.jit(do_not_specialize=_INTEGERS)
def pnorm_rows(
    g_ptr, norm_ptr, peak_ptr, total_ptr, rows, units, stride, p: tl.float64, inverse_p: tl.float64,
    ALIGN: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, ORDER: tl.constexpr,
):  # fmt: skip
    """ROWS rows whole."""
    ACC: tl.constexpr = accumulation(g_ptr.dtype.element_ty)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    columns = tl.arange(0, BLOCK)[None, :]
    mask = live[:, None] & (columns < units * ALIGN)
    magnitude = tl.abs(tl.load(g_ptr + (row * stride * ALIGN)[:, None] + columns, mask=mask, other=0.0).to(ACC))
    peak = _peak(magnitude)
    total = _total(magnitude, mask, peak, tl.full((1, 1), p, ACC), ORDER)
    inverse_p = tl.full((1,), inverse_p, ACC)
    _store_rows(row, live, peak, total, norm_ptr, peak_ptr, total_ptr, inverse_p, ORDER)


@triton.jit(do_not_specialize=_INTEGERS)
def pnorm_parts(
    g_ptr, norm_ptr, peak_ptr, total_ptr, words_ptr, rows, units, stride, parts, lag, p: tl.float64,
    inverse_p: tl.float64,
    ALIGN: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, ORDER: tl.constexpr,
):  # fmt: skip
    """Peak and total of one part of a row; or a row's, and its norm, from those of all its parts."""
    ACC: tl.constexpr = accumulation(g_ptr.dtype.element_ty)
    row, part, writes = turn(words_ptr, rows, parts, lag, True)
    if not writes:
        columns = tl.arange(0, BLOCK)
        loads, own, _, _ = entries(row, part, units, columns, ALIGN, LANES, BLOCK)
        at = first_entry(row, part, units, stride, ALIGN, LANES, BLOCK) + columns
        magnitude = tl.abs(tl.load(g_ptr + at, mask=loads, other=0.0).to(ACC))
        if LANES > 1:
            magnitude = tl.where(own, magnitude, 0.0)
        peak = _peak(magnitude)
        publish(words_ptr, rows, row, part, parts, 0, peak)
        publish(words_ptr, rows, row, part, parts, 1, _total(magnitude, own, peak, tl.full((1,), p, ACC), ORDER))
    else:
        peaks = published(words_ptr, rows, row, parts, 0, PARTS, 0.0)
        totals = published(words_ptr, rows, row, parts, 1, PARTS, 0.0)
        peak = _peak(peaks)
        if ORDER == _INF:
            total = tl.sum(tl.where(peaks == peak, totals, 0.0), 0)
        else:
            a, b = _scales(peak)
            weight = _ratio(peaks, peak, a, b)
            if ORDER == _TWO:
                weight = weight * weight
            elif ORDER == _GENERAL:
                weight = _power(weight, tl.full((1,), p, ACC))
            # A part past the row's end has the total 1 of zeros, or 0.
            total = tl.sum(totals * weight, 0)
            total = tl.where((peak == 0) | (peak == float("inf")), 1.0, total)
        _store_rows(row, row >= 0, peak, total, norm_ptr, peak_ptr, total_ptr, tl.full((), inverse_p, ACC), ORDER)


@triton.jit(do_not_specialize=_INTEGERS)
def pnorm_backward_tiles(
    grad_ptr, g_ptr, peak_ptr, total_ptr, out_ptr, rows, units, stride, parts,
    inverse_p: tl.float64, less_one: tl.float64,
    ALIGN: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, ORDER: tl.constexpr,
):  # fmt: skip
    """ROWS rows whole, or one part of one row. With LANES > 1, where ROWS is 1, a row's numbers are scalars."""
    ACC: tl.constexpr = accumulation(g_ptr.dtype.element_ty)
    pid = tl.program_id(0).to(tl.int64)
    row = pid // parts * ROWS
    part = pid % parts
    columns = tl.arange(0, BLOCK)
    ONE: tl.constexpr = (1,) if LANES == 1 else ()
    if LANES == 1:
        row += tl.arange(0, ROWS)
        columns = columns[None, :]
    live = row < rows
    loads, _, stores, _ = entries(column(row), part, units, columns, ALIGN, LANES, BLOCK)
    at = first_entry(column(row), part, units, stride, ALIGN, LANES, BLOCK) + columns
    g = tl.load(g_ptr + at, mask=loads & column(live), other=0.0).to(ACC)
    grad = tl.load(grad_ptr + row, mask=live, other=0.0)
    peak = tl.load(peak_ptr + row, mask=live, other=1.0)
    total = tl.load(total_ptr + row, mask=live, other=1.0)
    less_one, inverse_p = tl.full(ONE, less_one, ACC), tl.full(ONE, inverse_p, ACC)
    out = first_entry(column(row), part, units, units, ALIGN, LANES, BLOCK) + columns
    store(out_ptr + out, _dual(g, peak, total, less_one, inverse_p, grad, ORDER), stores & column(live), "")
    if LANES > 1 and part == 0:
        edge, shared, _edge_columns = edges(row, units, LANES)
        edge_g = tl.load(g_ptr + edge, mask=shared, other=0.0).to(ACC)
        store(out_ptr + edge, _dual(edge_g, peak, total, less_one, inverse_p, grad, ORDER), shared, "")


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


def _tile_of(g: Tensor, p: float) -> tuple[Tile, bool]:
    """What a program works on, and whether that is part of a row."""
    length, itemsize, general = g.numel() // g.shape[0], g.element_size(), order_of(p) == GENERAL
    # exp and log take registers: with 32 entries a thread ptxas spills.
    if tile := tile_of(length, itemsize, *((8192,) if general else ())):
        return tile, False
    tile = SPLIT[itemsize]
    return (tile._replace(warps=2 * tile.warps) if general else tile), True


def pnorm(g: Tensor, p: float) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`densreg.ops.pnorm`."""
    rows, dtype = g.shape[0], accumulation_dtype(g.dtype)
    if g.numel() == 0:  # no rows, or rows without entries
        zero = g.new_zeros(rows, dtype=dtype)
        return zero, zero.clone(), torch.ones_like(zero)
    length = g.numel() // rows
    stride = row_stride(g)
    if stride is None:
        g, stride = g.contiguous(), length
    norm, peak, total = (g.new_empty(rows, dtype=dtype) for _ in range(3))
    tile, split = _tile_of(g, p)
    cut = cut_of(length, tile, False, (g, stride))
    tensors = (g, norm, peak, total)
    sizes = (rows, length // cut.align, stride // cut.align)
    if split:
        launch_parts(pnorm_parts, length, tile, cut, 2, True, tensors, sizes, _powers(p)[:2], ORDER=order_of(p))
    else:
        launch(
            pnorm_rows, blocks_of(rows, tile.rows), tensors, (*sizes, *_powers(p)[:2]), tile.warps,
            ALIGN=cut.align, BLOCK=tile.block, ROWS=tile.rows, ORDER=order_of(p),
        )  # fmt: skip
    return norm, peak, total


def pnorm_backward(grad: Tensor, g: Tensor, peak: Tensor, total: Tensor, p: float) -> Tensor:
    """See :func:`densreg.ops.pnorm_backward`."""
    out = torch.empty_like(g)  # g's memory format
    if g.numel() == 0:
        return out
    rows, length = g.shape[0], g.numel() // g.shape[0]
    # Where the kernel writes: dense rows one after the other, in the order of g's; another tensor where g has none.
    dense, stride = out, row_stride(g)
    if stride is None or out.stride()[1:] != g.stride()[1:] or row_stride(out) != length:
        g, stride = g.contiguous(), length
        dense = torch.empty_like(g)
    grad, peak, total = (as_row(t, accumulation_dtype(g.dtype)) for t in (grad, peak, total))
    tile, _ = _tile_of(g, p)
    block, group, warps = tile
    align, lanes = cut_of(length, tile, True, (g, stride))
    parts = blocks_of(length + lanes - 1, block)
    launch(
        pnorm_backward_tiles, blocks_of(rows, group) * parts, (grad, g, peak, total, dense),
        (rows, length // align, stride // align, parts, *_powers(p)[1:]), warps,
        ALIGN=align, LANES=lanes, BLOCK=block, ROWS=group, ORDER=order_of(p),
    )  # fmt: skip
    return out if dense is out else out.copy_(dense)
