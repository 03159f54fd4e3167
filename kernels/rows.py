"""How rows are laid over programs, and what the kernels share: tile configurations, exp, and the launch.

A row that fits on chip is read once, by one program; a program takes several rows where they are short.

A longer row is split into parts, and one launch both reduces and writes them. Each program takes a ticket: the first
`lag` of them reduce a part, then one that reduces and one that writes come in turn, the last `lag` write. Those that
write wait for the numbers of their row's parts, which with that lag are normally there, and read the part again, from
the L2. Those that reduce wait for nothing, and one that writes only for tickets before its own, which are drawn by
programs that run already: whatever the order in which programs start, all of them end. The sums of a row do not depend
on the order, nor on the GPU.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, overload

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

INTERPRETED = bool(knobs.runtime.interpret)
"""Whether the kernels run in Triton's interpreter, on CPU tensors: TRITON_INTERPRET=1 when Triton was imported."""

_INTERPRETED = tl.constexpr(INTERPRETED)
# The bits of NaNs that no operation gives.
_NAN32, _NAN64 = tl.constexpr(0x7FA5A5A5), tl.constexpr(0x7FF4A5A5A5A5A5A5)


class Tile(NamedTuple):
    """A tile configuration: what one program works on, and with how many threads."""

    block: int  # entries of a row in one program, a power of two
    rows: int
    warps: int


_SHORT = (
    *(Tile(16, 16, 1), Tile(32, 8, 1), Tile(64, 4, 1), Tile(128, 4, 2), Tile(256, 4, 4), Tile(512, 2, 4)),
    *(Tile(1024, 1, 4), Tile(2048, 1, 4), Tile(4096, 1, 8), Tile(8192, 1, 16)),
)

# By bytes of an entry. Reasoned, not measured: 8 to 32 entries a thread, so that its loads are 16 bytes and several of
# them are in flight, and two operands of a row stay in registers; at least about 100 programs for 128 short rows.
# `python -m benchmarks triton-aot` shows registers and spills of every tile.
TILES = {
    2: (*_SHORT, Tile(16384, 1, 32)),
    4: (*_SHORT, Tile(16384, 1, 16)),
    8: _SHORT,
}
"""The configurations for whole rows: the first whose block holds the row is taken."""

SPLIT = {2: Tile(8192, 1, 4), 4: Tile(8192, 1, 8), 8: Tile(2048, 1, 8)}
"""For longer rows: each program's part. Not measured; it may not depend on the GPU, or the sums would.

A program that writes reads the numbers of all the row's parts: from ten million entries on that counts.
"""

SPLIT_PAIRS = {2: Tile(4096, 1, 4), 4: Tile(4096, 1, 4), 8: Tile(2048, 1, 8)}
"""The same for two tensors, which are in registers at once."""

TICKET = 32
"""Words before the parts' numbers, for the ticket alone: programs that wait should not poll its cache line."""

_TICKET = tl.constexpr(TICKET)


@functools.cache
def tile_of(length: int, itemsize: int, most: int = 1 << 20) -> Tile | None:
    """The tile that holds a row whole, with a block of at most `most`; None: split it."""
    return next((tile for tile in TILES[itemsize] if length <= tile.block <= most), None)


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a device the current one: Triton launches there, on torch's current stream."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


@overload
def as_row(t: Tensor, dtype: torch.dtype) -> Tensor: ...
@overload
def as_row(t: None, dtype: torch.dtype) -> None: ...
@overload
def as_row(t: Tensor | None, dtype: torch.dtype) -> Tensor | None: ...
def as_row(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Contiguous, in a dtype."""
    return None if t is None else t.to(dtype).contiguous()


class Cut(NamedTuple):
    """How rows begin in memory."""

    align: int  # that row lengths and strides are multiples of: what is told to the compiler, for loads of 16 bytes
    lanes: int  # entries of 16 bytes where rows are cut at those instead, wherever they begin; else 1


def cut_of(length: int, tile: Tile, whole: bool, *rows: tuple[Tensor, int]) -> Cut:
    """How to load rows of some length by tiles, given tensors and the strides of their rows.

    Rows to split whose length is no multiple of 16 bytes, and which follow each other, are cut where 16 bytes of memory
    begin; where the kernel can (`whole`) rows that fit into a tile, too, if it has 16 entries for a thread: with fewer
    that takes more instructions than it saves. The first and last entries of a part may then be those of other rows,
    which are loaded but not used. Nothing is loaded but 16 bytes of which some are the row's, as the tensor must begin
    where 16 bytes do.
    """
    # Triton itself tells its compiler multiples of 16 only, and 1000 is none.
    align = math.gcd(16, tile.block, length, *(stride for _, stride in rows))
    lanes = 16 // rows[0][0].element_size()
    cuts = length > tile.block or (whole and tile.block >= 512 * tile.warps and length + lanes - 1 <= tile.block)
    ragged = cuts and align < lanes and tile.block % lanes == 0
    if ragged and all(stride == length and t.data_ptr() % 16 == 0 for t, stride in rows):
        return Cut(1, lanes)
    return Cut(align, 1)


def blocks_of(length: int, block: int) -> int:
    """How many blocks hold so much. triton.cdiv takes 8 microseconds: it may be called in kernels, too."""
    return -(-length // block)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 0


def lag_of(device: torch.device, parts: int) -> int:
    """How many programs that reduce come before the first that writes, so that it seldom waits for its row's parts.

    From a model in which a multiprocessor has three of them at work. Not measured.
    """
    count = _multiprocessors(device)
    return parts + 3 * count + 64 if count else parts


_compiled: dict[Any, Any] = {}


def launch(
    kernel: Any, programs: int, tensors: Sequence[Tensor | None], numbers: Sequence[float], warps: int, **constants: Any
) -> None:
    """``kernel[(programs,)](*tensors, *numbers, **constants, num_warps=warps)``, sooner.

    Triton looks at every argument of every call to find what it has compiled. Here dtypes, alignments and constants are
    enough, and whether the integers among the numbers fit into 32 bits: they are not specialized beyond that.
    """
    device = next(t for t in tensors if t is not None).device
    key = (
        kernel.__name__, device, warps, max(numbers) >= 1 << 31, *constants.values(),
        *[t if t is None else (t.dtype, t.data_ptr() % 16) for t in tensors],
    )  # fmt: skip
    with on(device):
        if compiled := _compiled.get(key):
            compiled[programs, 1, 1](*tensors, *numbers, *constants.values())
        else:
            # The assertions on target classes are compiled in; integers need none.
            # Of kernels with two branches ptxas, told no bound, spills a few registers to fit one program more.
            bound = {"maxnreg": min(255, 1024 // warps)} if constants.get("PARTS", 1) > 1 else {}
            compiled = kernel[(programs,)](
                *tensors, *numbers, **constants, num_warps=warps, sanitize_overflow=False, **bound
            )
            if compiled is not None:  # as it is in the interpreter
                _compiled[key] = compiled


def launch_parts(
    kernel: Any, length: int, tile: Tile, cut: Cut, leaves: int, one: bool, tensors: Sequence[Tensor | None],
    sizes: Sequence[int], numbers: Sequence[float], **constants: Any,
) -> None:  # fmt: skip
    """:func:`launch` over the parts of ``sizes[0]`` rows that do not fit on chip, or over rows of one part.

    Args:
        kernel: takes tensors, words, sizes, parts, lag, numbers, and ALIGN, LANES, BLOCK, PARTS beside the constants.
        length: entries of a row.
        leaves: how many numbers a part leaves for the programs that write; 0: nothing is reduced, nobody waits.
        one: whether one program writes for each row, not one for each part.
    """
    like, rows = next(t for t in tensors if t is not None), sizes[0]
    parts = blocks_of(length + cut.lanes - 1, tile.block)
    words = None
    if leaves and parts > 1:
        # The ticket, and numbers that are zero until they are there; of this call alone, as graphs need.
        dtype = torch.int64 if like.dtype == torch.float64 else torch.int32
        words = like.new_zeros(TICKET + leaves * rows * parts, dtype=dtype)
    # A program that waits loads at least as many numbers as it has threads. Of fewer each would be loaded by several
    # threads, and those that loaded it before it was there would go on, on the word of one that loaded it later.
    loaded = 1 if parts == 1 else max(32 * tile.warps, 1 << (parts - 1).bit_length())
    launch(
        kernel, rows * ((parts if words is not None else 0) + (1 if one else parts)), (*tensors, words),
        (*sizes, parts, lag_of(like.device, parts), *numbers), tile.warps,
        ALIGN=cut.align, LANES=cut.lanes, BLOCK=tile.block, PARTS=loaded, **constants,
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------


@triton.constexpr_function
def accumulation(element):
    return tl.float64 if element == tl.float64 else tl.float32


@triton.jit
def finite_or_zero(m):
    """What may be subtracted: inf - inf would be NaN."""
    return tl.where(tl.abs(m) == float("inf"), 0.0, m)


@triton.jit
def column(x):
    """A row's number beside the row's entries: [R, 1] of [R], a scalar as it is."""
    return x[:, None] if len(x.shape) else x


@triton.jit
def _past_vector(row, units, LANES: tl.constexpr):
    """How far past a multiple of 16 bytes a row begins. Of the product the low bits are enough."""
    return (row.to(tl.int32) * units.to(tl.int32)) & (LANES - 1)


@triton.jit
def first_entry(row, part, units, stride, ALIGN: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr):
    """Where in a tensor a part of a row begins; row in 64 bits."""
    # Rounded down as an unsigned integer, that is one instruction.
    first = ((row * units).to(tl.uint64) // LANES * LANES).to(tl.int64) if LANES > 1 else row * stride * ALIGN
    return first + part * BLOCK


@triton.jit
def entries(row, part, units, columns, ALIGN: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr):
    """Of the entries of a part of a row: which to load, which are the row's, which to store; and the first's column.

    The masks of loads and stores change at multiples of 16 bytes, or of ALIGN, only: they can be those of vectors. With
    LANES > 1 the row's first and last entries are not among those to store: :func:`edges`.
    """
    if LANES > 1:
        past = _past_vector(row, units, LANES)
        start = part * BLOCK - past
        # Local columns in 32 bits.
        begin = tl.where(part == 0, past, 0)
        end = tl.minimum(units - start, BLOCK).to(tl.int32)
        vector = columns // LANES * LANES
        loads = vector < end
        own = (columns >= begin) & (columns < end)
        stores = (vector >= begin) & (vector <= end - LANES)
    else:
        start = part * BLOCK
        loads = columns < tl.minimum(units - part * (BLOCK // ALIGN), BLOCK // ALIGN).to(tl.int32) * ALIGN
        own = loads
        stores = loads
    return loads, own, stores, start


@triton.jit
def length_of_part(row, part, units, ALIGN: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr):
    """How many of a part's entries are the row's; part in 64 bits."""
    if LANES > 1:
        start = first_entry(row, part, units, units, ALIGN, LANES, BLOCK) - row * units
        length = tl.minimum(units - start, BLOCK) - tl.maximum(-start, 0)
    else:
        length = tl.minimum(units - part * (BLOCK // ALIGN), BLOCK // ALIGN) * ALIGN
    return tl.maximum(length, 0)


@triton.jit
def edges(row, units, LANES: tl.constexpr):
    """The entries of a row that share 16 bytes with other rows: where in the tensor, which are there, and columns.

    Of a row that is longer than 16 bytes.
    """
    past = _past_vector(row, units, LANES)
    i = tl.arange(0, 2 * LANES)
    j = i % LANES
    there = j < (tl.where(i < LANES, -past, past + units.to(tl.int32)) & (LANES - 1))
    columns = tl.where(i < LANES, j, units - 1 - j)
    return row * units + columns, there, columns


@triton.jit
def turn(words_ptr, rows, parts, lag, ONE: tl.constexpr):
    """What this program does: row, part, and whether it writes. ONE: of each row one program writes, not one a part."""
    ticket = tl.atomic_add(words_ptr, 1, sem="relaxed").to(tl.int64)
    total = rows.to(tl.int64) * parts
    if ONE:
        writes = ticket >= total
        item = tl.where(writes, (ticket - total) * parts, ticket)
    else:
        ahead = tl.minimum(lag.to(tl.int64), total)
        turns = 2 * (total - ahead)  # of tickets that reduce and tickets that write
        t = ticket - ahead
        writes = (t >= turns) | ((t >= 0) & (t % 2 == 1))
        item = tl.where(t < turns, tl.where(writes, t // 2, ahead + t // 2), ticket - total)
        item = tl.where(t < 0, ticket, item)
    return item // parts, item % parts, writes


@triton.jit
def publish(words_ptr, rows, row, part, parts, PLANE: tl.constexpr, x):
    """Leaves a number of a part, a scalar, for the programs that write."""
    x = tl.where(x == x, x, float("nan"))
    bits: tl.constexpr = words_ptr.dtype.element_ty
    word = x.to(bits, bitcast=True) ^ (_NAN64 if bits == tl.int64 else _NAN32)
    # A plain store would be a race with the loads of those that wait.
    tl.atomic_xchg(words_ptr + _TICKET + (PLANE * rows.to(tl.int64) + row) * parts + part, word, sem="relaxed")


@triton.jit
def published(words_ptr, rows, row, parts, PLANE: tl.constexpr, PARTS: tl.constexpr, other):
    """That number [PARTS] of every part of a row, as soon as all are there; `other` past the last."""
    each = tl.arange(0, PARTS)
    there = each < parts
    at = words_ptr + _TICKET + (PLANE * rows.to(tl.int64) + row) * parts + each
    words = tl.load(at, mask=there, other=1, volatile=True)
    if not _INTERPRETED:  # one program after the other: all are there
        while tl.min(tl.where(words == 0, 0, 1), 0) == 0:
            words = tl.load(at, mask=there, other=1, volatile=True)
    if words_ptr.dtype.element_ty == tl.int64:
        x = (words ^ _NAN64).to(tl.float64, bitcast=True)
    else:
        x = (words ^ _NAN32).to(tl.float32, bitcast=True)
    return tl.where(there, x, other)


@triton.jit
def store(ptr, value, mask, CACHE: tl.constexpr):
    """Rounded to nearest."""
    if _INTERPRETED and ptr.dtype.element_ty == tl.bfloat16:  # where Triton's interpreter truncates
        bits = value.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        value = tl.where(value == value, nearest.to(tl.uint32).to(tl.float32, bitcast=True), value)
    tl.store(ptr, value.to(ptr.dtype.element_ty), mask=mask, cache_modifier=CACHE)


@triton.jit
def _exp2(x):
    """Within 2^-22 of 2^x; 0 where that is below 2^-126."""
    if _INTERPRETED:
        y = tl.exp2(x)
    else:
        y = tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return y


@triton.jit
def exp_in_sum(f, m):
    """exp(f - m), within (|f - m| + 2) 2^-23 of it: little in a sum whose largest term is 1."""
    return tl.exp(f - m) if f.dtype == tl.float64 else _exp2((f - m) * 1.4426950408889634)


@triton.jit
def _exp_difference(f, m):
    d = f - m
    t = d - f
    lost = (f - (d - t)) - (m + t)  # what the difference rounded off (Knuth)
    h = d * 1.4426950408889634
    # And what the product did, with log2(e) in two numbers.
    if _INTERPRETED:  # where fma rounds twice
        rest = (d.to(tl.float64) * 1.4426950408889634 - h.to(tl.float64)).to(tl.float32)
    else:
        rest = tl.fma(d, 1.925963033500e-08, tl.fma(d, 1.4426950216293335, -h))
    y = _exp2(h)
    c = rest * 0.6931471805599453 + lost
    return tl.where((tl.abs(c) < 1) & (y < float("inf")), y + y * c, y)  # of infinities c is NaN


@triton.jit
def exp_difference(f, m, PRECISE: tl.constexpr):
    """exp(f - m), m finite. PRECISE: for float32, within 1e-6 however small it is, and 0 where it is below 1e-38.

    At f - m = -80 the rounding of f - m alone is 4e-6, and so is that of its product with log2(e).
    """
    return _exp_difference(f, m) if PRECISE else exp_in_sum(f, m)
