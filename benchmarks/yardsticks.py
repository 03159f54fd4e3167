"""Triton kernels that only move memory: the operators' kernels can be no faster. Importing this needs Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 8192, 8


@triton.jit(do_not_specialize=["vectors"])
def _move(a_ptr, b_ptr, out_ptr, vectors, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < vectors.to(tl.int64) * 4  # changes every 16 bytes only, so that accesses are 16 bytes
    x = tl.load(a_ptr + at, mask=there)
    if b_ptr is not None:
        x += tl.load(b_ptr + at, mask=there)
    tl.store(out_ptr + at, x, mask=there, cache_modifier=".cs")


def _words(t: Tensor) -> Tensor:
    """A tensor's memory as words of 32 bits, without what is no multiple of 16 bytes at its end."""
    flat, lanes = t.flatten(), 16 // t.element_size()
    return flat[: flat.numel() // lanes * lanes].view(torch.int32)


def move(out: Tensor, a: Tensor, b: Tensor | None = None) -> Tensor:
    """Read one contiguous tensor or two, write a third; what is written means nothing where there are two."""
    words = _words(out)
    _move[(triton.cdiv(words.numel(), BLOCK),)](
        _words(a), None if b is None else _words(b), words, words.numel() // 4, BLOCK=BLOCK, num_warps=WARPS
    )
    return out
