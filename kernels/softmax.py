"""softmax and its two derivatives in Triton. The mathematics is in densreg/ops/softmax.py.

In the names of the kernels' arguments: f the logits, p the softmax, u its upstream gradient; a_ptr, l_ptr those of the
cross-entropy and of the log density. Lengths and strides come divided by ALIGN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rows import (
    SPLIT,
    accumulation,
    accumulation_dtype,
    alignment,
    as_row,
    exp_difference,
    finite_or_zero,
    on,
    part_of_row,
    store,
    tile_of,
)

_INTEGERS = ["rows", "units", "stride", "u_stride", "ignore_index", "parts"]  # not specialized: one kernel for all


@triton.jit
def _store_rows(
    row, live, m, s, shortfall, f_ptr, target_ptr, density_ptr, ce_ptr, statistics_ptr, rows, units, stride,
    ignore_index, smoothing, ALIGN: tl.constexpr, SMOOTH: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """What is one number a row, from its maximum [R], its sum [R] and sum_i (m - f_i) [R]."""
    # In a row with an infinite maximum s was taken from 0: log s is that infinity, or NaN beside a NaN.
    tl.store(density_ptr + row, finite_or_zero(m) + tl.log(s), mask=live)
    divisor = tl.where(tl.abs(m) == float("inf"), float("nan"), s)
    tl.store(statistics_ptr + row, tl.where(s != s, float("nan"), m), mask=live)
    tl.store(statistics_ptr + rows + row, divisor, mask=live)
    if target_ptr is not None:
        y = tl.load(target_ptr + row, mask=live, other=ignore_index)
        counts = y != ignore_index
        known = (y >= 0) & (y < units * ALIGN)
        tl.device_assert(known | (y == ignore_index), "densreg::softmax: target out of range")
        f_y = tl.load(f_ptr + row * stride * ALIGN + y, mask=live & counts & known, other=0.0).to(ACC)
        log_s = tl.log(divisor)
        # Not L - f_y: at logits of 1e4 the rounding of L would be all that is left.
        ce = (m - f_y) + log_s
        if SMOOTH:
            smooth = tl.full(ce.shape, smoothing, ACC)
            ce = (1 - smooth) * ce + smooth * (shortfall / (units * ALIGN).to(ACC) + log_s)
        tl.store(ce_ptr + row, tl.where(counts, ce, 0.0), mask=live)


@triton.jit(do_not_specialize=_INTEGERS, debug=True)
def softmax_rows(
    f_ptr, target_ptr, density_ptr, ce_ptr, p_ptr, statistics_ptr, rows, units, stride, ignore_index: tl.int64,
    smoothing: tl.float64, scale: tl.float64,
    ALIGN: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, SMOOTH: tl.constexpr, ACC: tl.constexpr,
    PRECISE: tl.constexpr,
):  # fmt: skip
    """ROWS rows whole."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    columns = tl.arange(0, BLOCK)[None, :]
    mask = live[:, None] & (columns < units * ALIGN)
    f = tl.load(f_ptr + (row * stride * ALIGN)[:, None] + columns, mask=mask, other=-float("inf")).to(ACC)
    m = tl.max(f, 1)
    finite = finite_or_zero(m)
    e = exp_difference(f, finite[:, None], PRECISE)
    s = tl.sum(e, 1)
    if p_ptr is not None:
        factor = tl.full(s.shape, scale, ACC) / tl.where(tl.abs(m) == float("inf"), float("nan"), s)
        p = e * factor[:, None]
        store(p_ptr + (row * units * ALIGN)[:, None] + columns, p, mask)
    shortfall = tl.sum(tl.where(mask, finite[:, None] - f, 0.0), 1) if SMOOTH else s
    _store_rows(
        row, live, m, s, shortfall, f_ptr, target_ptr, density_ptr, ce_ptr, statistics_ptr, rows, units, stride,
        ignore_index, smoothing, ALIGN, SMOOTH, ACC,
    )  # fmt: skip


@triton.jit(do_not_specialize=_INTEGERS)
def softmax_parts(
    f_ptr, partial_ptr, rows, units, stride, parts,
    ALIGN: tl.constexpr, BLOCK: tl.constexpr, SMOOTH: tl.constexpr, ACC: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    """Of one part of a row: its maximum m, sum exp(f - m) and sum (m - f); where m is infinite with 0 in its place."""
    pid = tl.program_id(0).to(tl.int64)
    pointers, mask, _ = part_of_row(f_ptr, pid // parts, pid % parts, units, stride, ALIGN, BLOCK)
    f = tl.load(pointers, mask=mask, other=-float("inf")).to(ACC)
    m = tl.max(f, 1)
    finite = finite_or_zero(m)[:, None]
    own = pid + tl.arange(0, 1)
    total = rows.to(tl.int64) * parts
    tl.store(partial_ptr + own, m)
    tl.store(partial_ptr + total + own, tl.sum(exp_difference(f, finite, PRECISE), 1))
    if SMOOTH:
        tl.store(partial_ptr + 2 * total + own, tl.sum(tl.where(mask, finite - f, 0.0), 1))


@triton.jit(do_not_specialize=_INTEGERS, debug=True)
def softmax_columns(
    f_ptr, target_ptr, density_ptr, ce_ptr, p_ptr, statistics_ptr, partial_ptr, rows, units, stride, parts,
    ignore_index: tl.int64, smoothing: tl.float64, scale: tl.float64,
    ALIGN: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, SMOOTH: tl.constexpr, ACC: tl.constexpr,
    PRECISE: tl.constexpr,
):  # fmt: skip
    """The softmax of one part of a row, from the partial results of all; the first part writes the row's numbers."""
    pid = tl.program_id(0).to(tl.int64)
    columns = parts if p_ptr is not None else 1
    row = rows - 1 - pid // columns
    part = pid % columns
    total = rows.to(tl.int64) * parts
    # Of the parts scalars, not tensors [1]: the compiler broadcasts those over the columns in the parts' layout, and
    # then takes all of it to the columns' through shared memory: on an H200 9 to 16 times the time.
    each = tl.arange(0, PARTS)
    there = each < parts
    at = partial_ptr + row * parts + each
    maxima = tl.load(at, mask=there, other=-float("inf"))
    sums = tl.load(at + total, mask=there, other=0.0)
    m = tl.max(maxima, 0)
    finite = finite_or_zero(m)
    s = tl.sum(sums * exp_difference(maxima, finite, PRECISE), 0)
    if p_ptr is not None:
        pointers, mask, column = part_of_row(f_ptr, row, part, units, stride, ALIGN, BLOCK)
        f = tl.load(pointers, mask=mask, other=-float("inf")).to(ACC)
        factor = tl.full((), scale, ACC) / tl.where(tl.abs(m) == float("inf"), float("nan"), s)
        store(p_ptr + row * units * ALIGN + column, exp_difference(f, finite, PRECISE) * factor, mask)
    if part == 0:
        shortfall = s
        if SMOOTH:
            shortfalls = tl.load(at + 2 * total, mask=there, other=0.0)
            counts = tl.minimum(units - each * (BLOCK // ALIGN), BLOCK // ALIGN) * ALIGN
            shift = counts.to(ACC) * (finite - finite_or_zero(maxima))
            shortfall = tl.sum(tl.where(there, shortfalls + shift, 0.0), 0)
        one = tl.zeros((1,), ACC)
        own = row + tl.arange(0, 1)
        _store_rows(
            own, own >= 0, one + m, one + s, one + shortfall, f_ptr, target_ptr, density_ptr, ce_ptr, statistics_ptr,
            rows, units, stride, ignore_index, smoothing, ALIGN, SMOOTH, ACC,
        )  # fmt: skip


@triton.jit
def _row_numbers(
    row, live, statistics_ptr, target_ptr, l_ptr, a_ptr, rows, units, ignore_index,
    ALIGN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Maximum, 1 / s, l + a, a and target of each row [R]."""
    zero = tl.zeros(row.shape, ACC)
    m, inverse = zero, zero
    if statistics_ptr is not None:
        m = finite_or_zero(tl.load(statistics_ptr + row, mask=live, other=0.0))
        inverse = 1 / tl.load(statistics_ptr + rows + row, mask=live, other=1.0)
    weight, a = zero, zero
    y = tl.full(row.shape, -1, tl.int64)
    if l_ptr is not None:
        weight = tl.load(l_ptr + row, mask=live, other=0.0)
    if a_ptr is not None:
        y = tl.load(target_ptr + row, mask=live, other=ignore_index)
        counts = y != ignore_index
        tl.device_assert(
            ((y >= 0) & (y < units * ALIGN)) | (y == ignore_index), "densreg::softmax_backward: target out of range"
        )
        a = tl.where(counts, tl.load(a_ptr + row, mask=live, other=0.0), 0.0)
        weight += a
    return m, inverse, weight, a, y


@triton.jit
def _q(source, m, inverse, statistics_ptr, PRECISE: tl.constexpr):
    """P from the logits, or the softmax scale * P as it is."""
    if statistics_ptr is None:
        return source
    return exp_difference(source, m[:, None], PRECISE) * inverse[:, None]


@triton.jit
def _gradient(
    q, u, column, dot, weight, a, y, units, smoothing, scale, statistics_ptr, u_ptr, a_ptr, dots_ptr,
    ALIGN: tl.constexpr, SMOOTH: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """q (c u + k) less a times the target's distribution; of the double backward q (weight u - weight dot)."""
    if dots_ptr is not None:
        k = -weight * dot
        return q * (u * weight[:, None] + k[:, None])
    factor = tl.full(weight.shape, scale, ACC)
    # P (weight + scale U - <P, scale U>); with Q = scale P it is Q (U + (weight - <Q, U>) / scale).
    if statistics_ptr is None:
        k = (weight - dot) / factor
        g = q * (u + k[:, None]) if u_ptr is not None else q * k[:, None]
    else:
        k = weight - factor * dot
        g = q * (u * factor[:, None] + k[:, None]) if u_ptr is not None else q * k[:, None]
    if a_ptr is not None:
        hit = a
        if SMOOTH:
            smooth = tl.full(a.shape, smoothing, ACC)
            g -= (a * smooth / (units * ALIGN).to(ACC))[:, None]
            hit = a * (1 - smooth)
        g -= tl.where(column == y[:, None], hit[:, None], 0.0)
    return g


@triton.jit(do_not_specialize=_INTEGERS, debug=True)
def softmax_backward_rows(
    source_ptr, statistics_ptr, target_ptr, l_ptr, a_ptr, u_ptr, out_ptr, dots_ptr, rows, units, stride, u_stride,
    ignore_index: tl.int64, smoothing: tl.float64, scale: tl.float64,
    ALIGN: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, SMOOTH: tl.constexpr, ACC: tl.constexpr,
    PRECISE: tl.constexpr,
):  # fmt: skip
    """ROWS rows whole."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    columns = tl.arange(0, BLOCK)[None, :]
    mask = live[:, None] & (columns < units * ALIGN)
    source = tl.load(source_ptr + (row * stride * ALIGN)[:, None] + columns, mask=mask, other=0.0).to(ACC)
    u = source
    if u_ptr is not None:
        u = tl.load(u_ptr + (row * u_stride * ALIGN)[:, None] + columns, mask=mask, other=0.0).to(ACC)
    m, inverse, weight, a, y = _row_numbers(
        row, live, statistics_ptr, target_ptr, l_ptr, a_ptr, rows, units, ignore_index, ALIGN, ACC
    )
    q = _q(source, m, inverse, statistics_ptr, PRECISE)
    dot = tl.zeros(row.shape, ACC)
    if u_ptr is not None:
        dot = tl.sum(tl.where(mask, q * u, 0.0), 1)
    if dots_ptr is not None:
        tl.store(dots_ptr + row, dot, mask=live)
    g = _gradient(
        q, u, columns, dot, weight, a, y, units, smoothing, scale, statistics_ptr, u_ptr, a_ptr, dots_ptr,
        ALIGN, SMOOTH, ACC,
    )  # fmt: skip
    store(out_ptr + (row * units * ALIGN)[:, None] + columns, g, mask)


@triton.jit(do_not_specialize=_INTEGERS)
def softmax_backward_parts(
    source_ptr, statistics_ptr, u_ptr, partial_ptr, rows, units, stride, u_stride, parts,
    ALIGN: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    """<Q, U> of one part of a row."""
    pid = tl.program_id(0).to(tl.int64)
    row = pid // parts + tl.arange(0, 1)
    pointers, mask, _ = part_of_row(source_ptr, pid // parts, pid % parts, units, stride, ALIGN, BLOCK)
    u_pointers, _, _ = part_of_row(u_ptr, pid // parts, pid % parts, units, u_stride, ALIGN, BLOCK)
    source = tl.load(pointers, mask=mask, other=0.0).to(ACC)
    u = tl.load(u_pointers, mask=mask, other=0.0).to(ACC)
    m, inverse, _, _, _ = _row_numbers(
        row, row >= 0, statistics_ptr, None, None, None, rows, units, -100, ALIGN, ACC
    )  # fmt: skip
    q = _q(source, m, inverse, statistics_ptr, PRECISE)
    tl.store(partial_ptr + pid + tl.arange(0, 1), tl.sum(tl.where(mask, q * u, 0.0), 1))


@triton.jit(do_not_specialize=_INTEGERS, debug=True)
def softmax_backward_columns(
    source_ptr, statistics_ptr, target_ptr, l_ptr, a_ptr, u_ptr, out_ptr, dots_ptr, partial_ptr, rows, units, stride,
    u_stride, parts, ignore_index: tl.int64, smoothing: tl.float64, scale: tl.float64,
    ALIGN: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, SMOOTH: tl.constexpr, ACC: tl.constexpr,
    PRECISE: tl.constexpr,
):  # fmt: skip
    """The gradient of one part of a row, from the partial <Q, U> of all."""
    pid = tl.program_id(0).to(tl.int64)
    row = rows - 1 - pid // parts
    own = row + tl.arange(0, 1)
    pointers, mask, column = part_of_row(source_ptr, row, pid % parts, units, stride, ALIGN, BLOCK)
    source = tl.load(pointers, mask=mask, other=0.0).to(ACC)
    u = source
    dot = tl.zeros(own.shape, ACC)
    if u_ptr is not None:
        u_pointers, _, _ = part_of_row(u_ptr, row, pid % parts, units, u_stride, ALIGN, BLOCK)
        u = tl.load(u_pointers, mask=mask, other=0.0).to(ACC)
        each = tl.arange(0, PARTS)[None, :]
        dot = tl.sum(tl.load(partial_ptr + row * parts + each, mask=each < parts, other=0.0), 1)
    m, inverse, weight, a, y = _row_numbers(
        own, own >= 0, statistics_ptr, target_ptr, l_ptr, a_ptr, rows, units, ignore_index, ALIGN, ACC
    )
    q = _q(source, m, inverse, statistics_ptr, PRECISE)
    if dots_ptr is not None:
        # Summed once more: a dot that is stored has a layout that is broadcast through shared memory.
        part = tl.arange(0, PARTS)
        whole = tl.sum(tl.load(partial_ptr + row * parts + part, mask=part < parts, other=0.0))
        tl.store(dots_ptr + row, whole, mask=pid % parts == 0)
    g = _gradient(
        q, u, column, dot, weight, a, y, units, smoothing, scale, statistics_ptr, u_ptr, a_ptr, dots_ptr,
        ALIGN, SMOOTH, ACC,
    )  # fmt: skip
    store(out_ptr + row * units * ALIGN + column, g, mask)


# --------------------------------------------------------------------------------------------------------------------


def _dense(t: Tensor) -> Tensor:
    """Each row dense; rows may repeat or be apart."""
    return t if t.shape[1] <= 1 or t.stride(1) == 1 else t.contiguous()


def _checked_target(y: Tensor, classes: int, ignore_index: int) -> Tensor:
    """Contiguous class indices, checked here on the CPU. On a GPU that would synchronise: the kernels assert."""
    if y.device.type == "cpu":
        wrong = ((y < 0) | (y >= classes)) & (y != ignore_index)
        if wrong.any():
            raise ValueError(
                f"expected classes in [0, {classes}) or ignore_index={ignore_index} in target, "
                f"got class {y[wrong][0].item()}"
            )
    return y.contiguous()


def softmax(
    logits: Tensor,
    target: Tensor | None,
    label_smoothing: float,
    ignore_index: int,
    need_softmax: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`densreg.ops.softmax`."""
    f = _dense(logits)
    rows, classes = f.shape
    dtype = accumulation_dtype(f.dtype)
    if target is not None:
        target = _checked_target(target, classes, ignore_index)
    density = f.new_empty(rows, dtype=dtype)
    ce = f.new_empty(0 if target is None else rows, dtype=dtype)
    p = f.new_empty(f.shape if need_softmax else 0)
    statistics = f.new_empty((2, rows), dtype=dtype)
    if rows == 0:
        return density, ce, p, statistics
    stride = f.stride(0) if rows > 1 else classes
    align = alignment(classes, stride)
    out = p if need_softmax else None
    options = {
        "ALIGN": align,
        "SMOOTH": target is not None and label_smoothing > 0,
        "ACC": accumulation(f.dtype),
        "PRECISE": f.dtype == torch.float32,
    }
    sizes = (rows, classes // align, stride // align)
    numbers = (ignore_index, label_smoothing, scale)
    with on(f.device):
        if tile := tile_of(classes, f.element_size()):
            softmax_rows[(triton.cdiv(rows, tile.rows),)](
                f, target, density, ce, out, statistics, *sizes, *numbers,
                BLOCK=tile.block, ROWS=tile.rows, num_warps=tile.warps, sanitize_overflow=False, **options,
            )  # fmt: skip
        else:
            tile = SPLIT[f.element_size()]
            parts = triton.cdiv(classes, tile.block)
            partial = f.new_empty((3, rows, parts), dtype=dtype)
            softmax_parts[(rows * parts,)](
                f, partial, *sizes, parts, BLOCK=tile.block, num_warps=tile.warps, **options
            )  # fmt: skip
            softmax_columns[(rows * (parts if need_softmax else 1),)](
                f, target, density, ce, out, statistics, partial, *sizes, parts, *numbers,
                BLOCK=tile.block, PARTS=triton.next_power_of_2(parts), num_warps=tile.warps, sanitize_overflow=False,
                **options,
            )  # fmt: skip
    return density, ce, p, statistics


def softmax_backward(
    source: Tensor,
    statistics: Tensor | None,
    target: Tensor | None,
    grad_log_density: Tensor | None,
    grad_cross_entropy: Tensor | None,
    grad_softmax: Tensor | None,
    label_smoothing: float,
    ignore_index: int,
    scale: float,
    dots: Tensor | None = None,
) -> Tensor:
    """See :func:`densreg.ops.softmax_backward`; with ``dots``, which is written, what makes the double backward."""
    source = _dense(source)
    rows, classes = source.shape
    dtype = accumulation_dtype(source.dtype)
    out = source.new_empty(source.shape)
    if target is not None:
        target = _checked_target(target, classes, ignore_index)
    if rows == 0:
        return out
    statistics, l = as_row(statistics, dtype), as_row(grad_log_density, dtype)
    a = None if target is None else as_row(grad_cross_entropy, dtype)
    u = None if grad_softmax is None else _dense(grad_softmax)
    stride = source.stride(0) if rows > 1 else classes
    u_stride = u.stride(0) if u is not None and rows > 1 else classes
    align = alignment(classes, stride, u_stride)
    options = {"ALIGN": align, "ACC": accumulation(source.dtype), "PRECISE": source.dtype == torch.float32}
    smooth = a is not None and label_smoothing > 0
    sizes = (rows, classes // align, stride // align, u_stride // align)
    numbers = (ignore_index, label_smoothing, scale)
    tensors = (source, statistics, target, l, a, u, out, dots)
    with on(source.device):
        if tile := tile_of(classes, source.element_size()):
            softmax_backward_rows[(triton.cdiv(rows, tile.rows),)](
                *tensors, *sizes, *numbers,
                BLOCK=tile.block, ROWS=tile.rows, SMOOTH=smooth, num_warps=tile.warps, sanitize_overflow=False,
                **options,
            )  # fmt: skip
        else:
            tile = SPLIT[source.element_size()]
            parts = triton.cdiv(classes, tile.block)
            partial = None
            if u is not None:
                partial = source.new_empty((rows, parts), dtype=dtype)
                softmax_backward_parts[(rows * parts,)](
                    source, statistics, u, partial, *sizes, parts,
                    BLOCK=tile.block, num_warps=tile.warps, **options,
                )  # fmt: skip
            softmax_backward_columns[(rows * parts,)](
                *tensors, partial, *sizes, parts, *numbers,
                BLOCK=tile.block, PARTS=triton.next_power_of_2(parts), SMOOTH=smooth, num_warps=tile.warps,
                sanitize_overflow=False, **options,
            )  # fmt: skip
    return out


def softmax_double_backward(
    source: Tensor,
    statistics: Tensor | None,
    target: Tensor | None,
    grad_log_density: Tensor | None,
    grad_cross_entropy: Tensor | None,
    v: Tensor,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """See :func:`densreg.ops.softmax_double_backward`."""
    dot = source.new_empty(source.shape[0], dtype=accumulation_dtype(source.dtype))
    upstream = (grad_log_density, grad_cross_entropy, v)
    return softmax_backward(source, statistics, target, *upstream, 0.0, ignore_index, 1.0, dot), dot
