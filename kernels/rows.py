"""How rows are laid over programs, and what the kernels share: tile configurations, exp, power, and the launch.

A row that fits on chip is read once, by one program; a program takes several rows where they are short. A longer row is
split over several programs: a first kernel reduces each part, a second one reduces the parts, in every program again,
and goes on with its own columns. The rows of the second run backwards: what was read last is still in the L2.
"""

from __future__ import annotations

import contextlib
import functools
import math
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
# `python -m benchmarks.triton_aot` shows registers and spills of every tile.
TILES = {
    2: (*_SHORT, Tile(16384, 1, 32)),
    4: (*_SHORT, Tile(16384, 1, 16)),
    8: _SHORT,
}
"""The configurations for whole rows: the first whose block holds the row is taken."""

SPLIT = {2: Tile(4096, 1, 8), 4: Tile(8192, 1, 8), 8: Tile(2048, 1, 8)}
"""For longer rows: each program's part. Twice of it spills on Triton 3.6, but for float32."""


@functools.cache
def tile_of(length: int, itemsize: int, most: int = 1 << 20) -> Tile | None:
    """The tile that holds a row whole, with a block of at most `most`; None: split it."""
    return next((tile for tile in TILES[itemsize] if length <= tile.block <= most), None)


def alignment(*multiples: int) -> int:
    """The largest power of two up to 16 that divides all: told to the compiler, loads of 16 bytes follow from it.

    Triton itself tells it multiples of 16 only, and 1000 is none.
    """
    return math.gcd(16, *multiples)


@functools.cache
def accumulation(dtype: torch.dtype) -> Any:
    return tl.float64 if dtype == torch.float64 else tl.float32


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


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


# --------------------------------------------------------------------------------------------------------------------


@triton.jit
def finite_or_zero(m):
    """What may be subtracted: inf - inf would be NaN."""
    return tl.where(tl.abs(m) == float("inf"), 0.0, m)


@triton.jit
def part_of_row(ptr, row, part, units, stride, ALIGN: tl.constexpr, BLOCK: tl.constexpr):
    """Pointers to a part of rows, which of its columns are there, and the columns; row in 64 bits."""
    # Local columns in 32 bits; in units, so that the mask is known to change at multiples of ALIGN only.
    there = tl.minimum(units - part * (BLOCK // ALIGN), BLOCK // ALIGN).to(tl.int32) * ALIGN
    columns = tl.arange(0, BLOCK)[None, :]
    return ptr + row * stride * ALIGN + part * BLOCK + columns, columns < there, part * BLOCK + columns


@triton.jit
def store(ptr, value, mask):
    """Rounded to nearest."""
    if _INTERPRETED and ptr.dtype.element_ty == tl.bfloat16:  # where Triton's interpreter truncates
        bits = value.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        value = tl.where(value == value, nearest.to(tl.uint32).to(tl.float32, bitcast=True), value)
    tl.store(ptr, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def exp_difference(f, m, PRECISE: tl.constexpr):
    """exp(f - m), m finite. PRECISE: for float32, within 1e-6 however small it is.

    At f - m = -80 the rounding of f - m alone is 4e-6, and so is that of its product with log2(e) inside of exp.
    """
    d = f - m
    if not PRECISE:
        return tl.exp(d)
    t = d - f
    lost = (f - (d - t)) - (m + t)  # what the difference rounded off (Knuth)
    lost = tl.where(tl.abs(d) < 200, lost, 0.0)  # not of infinities
    # NaN has to pass.
    d = tl.clamp(d, -200.0, 200.0, propagate_nan=tl.PropagateNan.ALL)
    n = tl.floor(d * 1.4426950408889634 + 0.5)
    # ln 2 in two parts (Cody and Waite): the first has 16 bits, so that its product with n is exact.
    r = ((d - n * 0.693145751953125) - n * 1.428606765330187e-06) + lost
    return tl.exp(r) * tl.exp2(n)
