"""softmax and its two derivatives in Triton. The mathematics is in densreg/ops/softmax.py.

In the names of the kernels' arguments: f the logits, p the softmax, u its upstream gradient; a_ptr, l_ptr those of the
cross-entropy and of the log density. Lengths and strides come divided by ALIGN.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from densreg.ops.rows import accumulation_dtype
from densreg.ops.softmax import check_classes

from .rows import (
    SPLIT,
    SPLIT_PAIRS,
    accumulation,
    as_row,
    blocks_of,
    column,
    cut_of,
    edges,
    entries,
    exp_difference,
    exp_in_sum,
    finite_or_zero,
    first_entry,
    launch,
    launch_parts,
    length_of_part,
    publish,
    published,
    store,
    tile_of,
    turn,
)

_INTEGERS = [
    "rows",
    "units",
    "stride",
    "u_stride",
    "ignore_index",
    "parts",
    "lag",
]  # not specialized: one kernel for all


@triton.jit
def _store_rows(
    row, live, m, s, shortfall, f_ptr, target_ptr, density_ptr, ce_ptr, statistics_ptr, rows, units, stride,
    ignore_index, smoothing, ALIGN: tl.constexpr, SMOOTH: tl.constexpr,
):  # fmt: skip
    """What is one number a row, from its maximum, its sum and sum_i (m - f_i); [R], or scalars of one row."""
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
        f_y = tl.load(f_ptr + row * stride * ALIGN + y, mask=live & counts & known, other=0.0).to(m.dtype)
        log_s = tl.log(divisor)
        # Not L - f_y: at logits of 1e4 the rounding of L would be all that is left.
        ce = (m - f_y) + log_s
        if SMOOTH:
            smooth = tl.full(ce.shape, smoothing, ce.dtype)
            ce = (1 - smooth) * ce + smooth * (shortfall / (units * ALIGN).to(ce.dtype) + log_s)
        tl.store(ce_ptr + row, tl.where(counts, ce, 0.0), mask=live)


@triton.jit(do_not_specialize=_INTEGERS, debug=True)
def softmax_rows(
    f_ptr, target_ptr, density_ptr, ce_ptr, p_ptr, statistics_ptr, rows, units, stride, ignore_index: tl.int64,
    smoothing: tl.float64, scale: tl.float64,
    ALIGN: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, SMOOTH: tl.constexpr,
):  # fmt: skip
    """ROWS rows whole."""
    ACC: tl.constexpr = accumulation(f_ptr.dtype.element_ty)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    columns = tl.arange(0, BLOCK)[None, :]
    mask = live[:, None] & (columns < units * ALIGN)
    f = tl.load(f_ptr + (row * stride * ALIGN)[:, None] + columns, mask=mask, other=-float("inf")).to(ACC)
    m = tl.max(f, 1)
    finite = finite_or_zero(m)
    e = exp_difference(f, finite[:, None], f_ptr.dtype.element_ty == tl.float32)
    s = tl.sum(e, 1)
    if p_ptr is not None:
        factor = tl.full(s.shape, scale, ACC) / tl.where(tl.abs(m) == float("inf"), float("nan"), s)
        p = e * factor[:, None]
        store(p_ptr + (row * units * ALIGN)[:, None] + columns, p, mask, "")
    shortfall = tl.sum(tl.where(mask, finite[:, None] - f, 0.0), 1) if SMOOTH else s
    _store_rows(
        row, live, m, s, shortfall, f_ptr, target_ptr, density_ptr, ce_ptr, statistics_ptr, rows, units, stride,
        ignore_index, smoothing, ALIGN, SMOOTH,
    )  # fmt: skip


@triton.jit(do_not_specialize=_INTEGERS, debug=True)
def softmax_parts(
    f_ptr, target_ptr, density_ptr, ce_ptr, p_ptr, statistics_ptr, words_ptr, rows, units, stride, parts, lag,
    ignore_index: tl.int64, smoothing: tl.float64, scale: tl.float64,
    ALIGN: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, SMOOTH: tl.constexpr,
):  # fmt: skip
    """Part of a row: its maximum m, sum exp(f - m) and sum (m - f); or, from those of all parts, its softmax.

    Where m is infinite the sums are taken with 0 in its place. The first part's program writes the row's numbers.
    """
    ACC: tl.constexpr = accumulation(f_ptr.dtype.element_ty)
    PRECISE: tl.constexpr = f_ptr.dtype.element_ty == tl.float32
    row, part, writes = turn(words_ptr, rows, parts, lag, p_ptr is None)
    columns = tl.arange(0, BLOCK)
    loads, own, stores, _ = entries(row, part, units, columns, ALIGN, LANES, BLOCK)
    at = first_entry(row, part, units, stride, ALIGN, LANES, BLOCK) + columns
    if not writes:
        f = tl.load(f_ptr + at, mask=loads, other=-float("inf"), eviction_policy="evict_last").to(ACC)
        if LANES > 1:
            f = tl.where(own, f, -float("inf"))
        m = tl.max(f, 0)
        finite = finite_or_zero(m)
        publish(words_ptr, rows, row, part, parts, 0, m)
        publish(words_ptr, rows, row, part, parts, 1, tl.sum(exp_in_sum(f, finite), 0))
        if SMOOTH:
            publish(words_ptr, rows, row, part, parts, 2, tl.sum(tl.where(own, finite - f, 0.0), 0))
    else:
        f = tl.zeros((BLOCK,), ACC)
        if p_ptr is not None:  # loaded before the parts' numbers are waited for
            f = tl.load(f_ptr + at, mask=loads, other=-float("inf"), eviction_policy="evict_first").to(ACC)
        # Of the parts scalars, not tensors [1]: the compiler broadcasts those over the columns in the parts' layout,
        # and then takes all of it to the columns' through shared memory: on an H200 9 to 16 times the time.
        maxima = published(words_ptr, rows, row, parts, 0, PARTS, -float("inf"))
        sums = published(words_ptr, rows, row, parts, 1, PARTS, 0.0)
        m = tl.max(maxima, 0)
        finite = finite_or_zero(m)
        s = tl.sum(sums * exp_difference(maxima, finite, m.dtype == tl.float32), 0)
        if p_ptr is not None:
            factor = tl.full((), scale, ACC) / tl.where(tl.abs(m) == float("inf"), float("nan"), s)
            out = first_entry(row, part, units, units, ALIGN, LANES, BLOCK) + columns
            store(p_ptr + out, exp_difference(f, finite, PRECISE) * factor, stores, ".cs")
            if LANES > 1 and part == 0:
                edge, shared, _edge_columns = edges(row, units, LANES)
                edge_f = tl.load(f_ptr + edge, mask=shared, other=-float("inf")).to(ACC)
                store(p_ptr + edge, exp_difference(edge_f, finite, PRECISE) * factor, shared, "")
        if part == 0:
            shortfall = s
            if SMOOTH:
                shortfalls = published(words_ptr, rows, row, parts, 2, PARTS, 0.0)
                lengths = length_of_part(row, tl.arange(0, PARTS).to(tl.int64), units, ALIGN, LANES, BLOCK)
                shift = lengths.to(ACC) * (finite - finite_or_zero(maxima))
                shortfall = tl.sum(shortfalls + shift, 0)
            _store_rows(
                row, row >= 0, m, s, shortfall, f_ptr, target_ptr, density_ptr, ce_ptr, statistics_ptr, rows, units,
                stride, ignore_index, smoothing, ALIGN, SMOOTH,
            )  # fmt: skip


@triton.jit
def _row_numbers(
    row, live, statistics_ptr, target_ptr, l_ptr, a_ptr, rows, units, ignore_index,
    ALIGN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Maximum, 1 / s, l + a, a and target of each row; [R], or scalars of one row."""
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
def _q(source, m, inverse, source_ptr, statistics_ptr):
    """P from the logits, or the softmax scale * P as it is."""
    if statistics_ptr is not None:
        source = exp_difference(source, column(m), source_ptr.dtype.element_ty == tl.float32) * column(inverse)
    return source


@triton.jit
def _gradient(
    q, u, columns, dot, weight, a, y, units, smoothing, scale, statistics_ptr, u_ptr, a_ptr, dots_ptr,
    ALIGN: tl.constexpr, SMOOTH: tl.constexpr,
):  # fmt: skip
    """q (c u + k) less a times the target's distribution; of the double backward q (weight u - weight dot)."""
    if dots_ptr is not None:
        return q * (u * column(weight) + column(-weight * dot))
    factor = tl.full(weight.shape, scale, q.dtype)
    # P (weight + scale U - <P, scale U>); with Q = scale P it is Q (U + (weight - <Q, U>) / scale).
    if statistics_ptr is None:
        k = (weight - dot) / factor
        g = q * (u + column(k)) if u_ptr is not None else q * column(k)
    else:
        k = weight - factor * dot
        g = q * (u * column(factor) + column(k)) if u_ptr is not None else q * column(k)
    if a_ptr is not None:
        hit = a
        if SMOOTH:
            smooth = tl.full(a.shape, smoothing, q.dtype)
            g -= column(a * smooth / (units * ALIGN).to(q.dtype))
            hit = a * (1 - smooth)
        g -= tl.where(columns == column(y), column(hit), 0.0)
    return g


@triton.jit(do_not_specialize=_INTEGERS, debug=True)
def softmax_backward_rows(
    source_ptr, statistics_ptr, target_ptr, l_ptr, a_ptr, u_ptr, out_ptr, dots_ptr, rows, units, stride, u_stride,
    ignore_index: tl.int64, smoothing: tl.float64, scale: tl.float64,
    ALIGN: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, SMOOTH: tl.constexpr,
):  # fmt: skip
    """ROWS rows whole."""
    ACC: tl.constexpr = accumulation(source_ptr.dtype.element_ty)
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
    q = _q(source, m, inverse, source_ptr, statistics_ptr)
    dot = tl.zeros(row.shape, ACC)
    if u_ptr is not None:
        dot = tl.sum(tl.where(mask, q * u, 0.0), 1)
    if dots_ptr is not None:
        tl.store(dots_ptr + row, dot, mask=live)
    g = _gradient(
        q, u, columns, dot, weight, a, y, units, smoothing, scale, statistics_ptr, u_ptr, a_ptr, dots_ptr, ALIGN, SMOOTH
    )
    store(out_ptr + (row * units * ALIGN)[:, None] + columns, g, mask, "")


@triton.jit(do_not_specialize=_INTEGERS, debug=True)
def softmax_backward_parts(
    source_ptr, statistics_ptr, target_ptr, l_ptr, a_ptr, u_ptr, out_ptr, dots_ptr, words_ptr, rows, units, stride,
    u_stride, parts, lag, ignore_index: tl.int64, smoothing: tl.float64, scale: tl.float64,
    ALIGN: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, SMOOTH: tl.constexpr,
):  # fmt: skip
    """Part of a row: <Q, U>; or, from those of all parts, its gradient. Without U there is nothing to wait for.

    With PARTS = 1 a row whole.
    """
    ACC: tl.constexpr = accumulation(source_ptr.dtype.element_ty)
    WAITS: tl.constexpr = u_ptr is not None and PARTS > 1
    if WAITS:
        row, part, writes = turn(words_ptr, rows, parts, lag, False)
    elif PARTS == 1:
        row, part, writes = tl.program_id(0).to(tl.int64), 0, True
    else:
        item = tl.program_id(0).to(tl.int64)
        row, part, writes = item // parts, item % parts, True
    columns = tl.arange(0, BLOCK)
    loads, own, stores, begin = entries(row, part, units, columns, ALIGN, LANES, BLOCK)
    at = first_entry(row, part, units, stride, ALIGN, LANES, BLOCK) + columns
    u_at = first_entry(row, part, units, u_stride, ALIGN, LANES, BLOCK) + columns
    if WAITS and not writes:  # without U this must not even be compiled
        source = tl.load(source_ptr + at, mask=loads, other=0.0, eviction_policy="evict_last").to(ACC)
        u = tl.load(u_ptr + u_at, mask=loads, other=0.0, eviction_policy="evict_last").to(ACC)
        m, inverse, _, _, _ = _row_numbers(
            row, row >= 0, statistics_ptr, None, None, None, rows, units, ignore_index, ALIGN, ACC
        )
        q = _q(source, m, inverse, source_ptr, statistics_ptr)
        publish(words_ptr, rows, row, part, parts, 0, tl.sum(tl.where(own, q * u, 0.0), 0))
    else:
        source = tl.load(source_ptr + at, mask=loads, other=0.0, eviction_policy="evict_first").to(ACC)
        u = source
        if u_ptr is not None:
            u = tl.load(u_ptr + u_at, mask=loads, other=0.0, eviction_policy="evict_first").to(ACC)
        m, inverse, weight, a, y = _row_numbers(
            row, row >= 0, statistics_ptr, target_ptr, l_ptr, a_ptr, rows, units, ignore_index, ALIGN, ACC
        )
        dot = tl.zeros((), ACC)
        if WAITS:
            dot = tl.sum(published(words_ptr, rows, row, parts, 0, PARTS, 0.0), 0)
        elif u_ptr is not None:
            dot = tl.sum(tl.where(own, _q(source, m, inverse, source_ptr, statistics_ptr) * u, 0.0), 0)
        if dots_ptr is not None:
            tl.store(dots_ptr + row, dot, mask=part == 0)
        # The target among this part's columns, in 32 bits.
        near = tl.where((y >= begin) & (y < begin + BLOCK), y - begin, -1).to(tl.int32)
        g = _gradient(
            _q(source, m, inverse, source_ptr, statistics_ptr), u, columns, dot, weight, a, near, units, smoothing,
            scale, statistics_ptr, u_ptr, a_ptr, dots_ptr, ALIGN, SMOOTH,
        )  # fmt: skip
        out = first_entry(row, part, units, units, ALIGN, LANES, BLOCK) + columns
        store(out_ptr + out, g, stores, "" if PARTS == 1 else ".cs")
        if LANES > 1 and part == 0:
            edge, shared, edge_columns = edges(row, units, LANES)
            edge_source = tl.load(source_ptr + edge, mask=shared, other=0.0).to(ACC)
            edge_u = edge_source
            if u_ptr is not None:
                edge_u = tl.load(u_ptr + edge, mask=shared, other=0.0).to(ACC)
            edge_q = _q(edge_source, m, inverse, source_ptr, statistics_ptr)
            edge_g = _gradient(
                edge_q, edge_u, edge_columns, dot, weight, a, y, units, smoothing, scale, statistics_ptr, u_ptr, a_ptr,
                dots_ptr, ALIGN, SMOOTH,
            )  # fmt: skip
            store(out_ptr + edge, edge_g, shared, "")


# --------------------------------------------------------------------------------------------------------------------


def _dense(t: Tensor) -> Tensor:
    """Each row dense; rows may repeat or be apart."""
    return t if t.shape[1] <= 1 or t.stride(1) == 1 else t.contiguous()


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
        check_classes(target, classes, ignore_index)
        target = target.contiguous()
    density = f.new_empty(rows, dtype=dtype)
    ce = f.new_empty(0 if target is None else rows, dtype=dtype)
    p = f.new_empty(f.shape if need_softmax else 0)
    statistics = f.new_empty((2, rows), dtype=dtype)
    if rows == 0:
        return density, ce, p, statistics
    stride = f.stride(0) if rows > 1 else classes
    whole = tile_of(classes, f.element_size())
    tile = whole or SPLIT[f.element_size()]
    cut = cut_of(classes, tile, False, (f, stride))
    smooth = target is not None and label_smoothing > 0
    tensors = (f, target, density, ce, p if need_softmax else None, statistics)
    sizes = (rows, classes // cut.align, stride // cut.align)
    numbers = (ignore_index, label_smoothing, scale)
    if whole:
        launch(
            softmax_rows, blocks_of(rows, tile.rows), tensors, (*sizes, *numbers), tile.warps,
            ALIGN=cut.align, BLOCK=tile.block, ROWS=tile.rows, SMOOTH=smooth,
        )  # fmt: skip
    else:
        launch_parts(
            softmax_parts, classes, tile, cut, 3 if smooth else 2, not need_softmax, tensors, sizes, numbers,
            SMOOTH=smooth,
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
        check_classes(target, classes, ignore_index)
        target = target.contiguous()
    if rows == 0:
        return out
    statistics, l = as_row(statistics, dtype), as_row(grad_log_density, dtype)
    a = None if target is None else as_row(grad_cross_entropy, dtype)
    u = None if grad_softmax is None else _dense(grad_softmax)
    rows_of = [(source, source.stride(0) if rows > 1 else classes)]
    if u is not None:
        rows_of.append((u, u.stride(0) if rows > 1 else classes))
    smooth = a is not None and label_smoothing > 0
    tensors = (source, statistics, target, l, a, u, out, dots)
    numbers = (ignore_index, label_smoothing, scale)
    whole = tile_of(classes, source.element_size())
    tile = whole or SPLIT_PAIRS[source.element_size()]
    cut = cut_of(classes, tile, True, *rows_of)
    sizes = (rows, classes // cut.align, rows_of[0][1] // cut.align, rows_of[-1][1] // cut.align)
    if whole and cut.lanes == 1:
        launch(
            softmax_backward_rows, blocks_of(rows, tile.rows), tensors, (*sizes, *numbers), tile.warps,
            ALIGN=cut.align, BLOCK=tile.block, ROWS=tile.rows, SMOOTH=smooth,
        )  # fmt: skip
    else:
        launch_parts(
            softmax_backward_parts, classes, tile, cut, 0 if u is None else 1, False, tensors, sizes, numbers,
            SMOOTH=smooth,
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
