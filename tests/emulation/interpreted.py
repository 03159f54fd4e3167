"""The Triton kernels themselves, in Triton's interpreter. Run by tests/test_backends.py, in a process of its own."""

from __future__ import annotations

import math
import random

import pytest
import torch
import triton
import triton.language as tl
from densreg.kernels import rows as layout
from densreg.kernels.rows import turn
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import DTYPES, HALF_ULP, ORDERS, error, softmax_reference

from densreg import kernels
from densreg.ops import accumulation_dtype

pytestmark = pytest.mark.core


def _full_of_nan(allocate, poisoned):
    def empty(*args, **options):
        poisoned.append(allocate)
        fresh = allocate(*args, **options)
        return fresh.fill_(math.nan) if fresh.is_floating_point() else fresh

    return empty


def _check_every_element_is_written(classes, dtype, p):
    """Each operator again, in memory full of NaN: to the last bit the same, and no NaN."""

    def twice(operator, *arguments):
        first = operator(*arguments)
        poisoned = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "new_empty", _full_of_nan(torch.Tensor.new_empty, poisoned))
            patch.setattr(torch, "empty_like", _full_of_nan(torch.empty_like, poisoned))
            again = operator(*arguments)
        assert poisoned, operator
        single = isinstance(first, torch.Tensor)
        for a, b in zip((first,) if single else first, (again,) if single else again, strict=True):
            assert not b.isnan().any(), operator
            assert torch.equal(a, b), operator
        return first

    f = torch.rand(3, classes).to(dtype)
    y, a = torch.zeros(3, dtype=torch.int64), torch.ones(3)
    outputs = twice(kernels.softmax, f, y, 0.1, -100, True, 1.0)
    for source, statistics in ((outputs[2], None), (f, outputs[3])):
        twice(kernels.softmax_backward, source, statistics, y, a, a, f, 0.1, -100, 1.0)
        twice(kernels.softmax_backward, source, statistics, y, a, a, None, 0.1, -100, 1.0)
        twice(kernels.softmax_double_backward, source, statistics, y, a, a, f, -100)
    norm, peak, total = twice(kernels.pnorm, f, p)
    transposed = f.t().contiguous().t()
    twice(kernels.pnorm, transposed, p)
    for g in (f, transposed):
        twice(kernels.pnorm_backward, norm, g, peak, total, p)


@pytest.mark.parametrize(
    ("classes", "dtype", "p"),
    [(n, DTYPES[i % 4], float(ORDERS[(i + i // 4) % 4])) for i, n in enumerate((1, 7, 16, 31, 33, 47, 64, 100))],
)
def test_every_element_is_written(classes, dtype, p):
    _check_every_element_is_written(classes, dtype, p)


@pytest.mark.parametrize(
    ("classes", "dtype", "p"),
    [(n, DTYPES[i], float(ORDERS[(i + 2) % 4])) for i, n in enumerate((1025, 1027, 2041, 1999))],
)
def test_every_element_of_odd_rows_that_fit(classes, dtype, p):
    _check_every_element_is_written(classes, dtype, p)


@pytest.fixture
def parts_of(monkeypatch):
    """Rows of more than 64 entries are split into parts of so many."""

    def cut(block):
        for itemsize in layout.TILES:
            monkeypatch.setitem(layout.TILES, itemsize, (layout.Tile(64, 1, 1),))
            for split in (layout.SPLIT, layout.SPLIT_PAIRS):
                monkeypatch.setitem(split, itemsize, layout.Tile(block, 1, 1))
        layout.tile_of.cache_clear()

    yield cut
    layout.tile_of.cache_clear()


LAGS = (lambda parts: parts, lambda parts: 2 * parts + 1, lambda parts: 10**6)


def _check_rows(monkeypatch, dtype, classes, p):
    """The same bits whatever the lag, and no neighbour's entries in any of them."""
    f, u = (torch.randn(5, classes).mul(3).to(dtype) for _ in range(2))
    f[1], f[3, 1000:], u[1], u[3, 7] = math.nan, -math.inf, math.inf, math.nan
    f[2, :-2] -= 40  # parts with other maxima than the row's
    quiet = [0, 2, 4]
    y, l, a = torch.tensor([classes - 1, 0, 5, 17, 1]), torch.randn(5), torch.randn(5)
    found = []
    for lag in LAGS:
        monkeypatch.setattr(layout, "lag_of", lambda device, parts, lag=lag: lag(parts))
        density, ce, softmax, statistics = kernels.softmax(f, y, 0.1, -100, True, 1.0)
        only = kernels.softmax(f, y, 0.1, -100, False, 1.0)
        backward = [
            kernels.softmax_backward(source, given, y, l, a, upstream, 0.1, -100, 1.0)
            for source, given in ((f, statistics), (softmax, None))
            for upstream in (u, None)
        ]
        double = kernels.softmax_double_backward(f, statistics, y, l, a, u, -100)
        norm, peak, total = kernels.pnorm(u, p)
        dual = kernels.pnorm_backward(torch.ones_like(norm), u, peak, total, p)
        found.append((density, ce, softmax, statistics, *only, *backward, *double, norm, peak, total, dual))
    for others in zip(*found, strict=True):
        assert all(torch.equal(other.nan_to_num(7), others[0].nan_to_num(7)) for other in others)
    bound = max(2e-6 if dtype != torch.float64 else 1e-13, 2 * HALF_ULP[dtype])
    wide = f.double().requires_grad_()
    expected = softmax_reference(wide, y, 0.1)
    for actual, right in zip((density, ce, softmax), expected, strict=True):
        torch.testing.assert_close(actual.double(), right.detach(), rtol=bound, atol=6e-8, equal_nan=True)
    value = (expected[0] * l + expected[1] * a)[quiet].sum()
    for upstream, actual in zip((u, None), backward[:2], strict=True):
        inner = 0 if upstream is None else (expected[2] * upstream.double())[quiet].sum()
        (right,) = torch.autograd.grad(value + inner, wide, retain_graph=True)
        assert error(actual[quiet], right[quiet]) < 4 * bound
    for of_softmax, of_logits in zip(backward[2:], backward[:2], strict=True):
        assert error(of_softmax[quiet], of_logits[quiet].double()) < 8 * bound
    q, v = expected[2].detach()[quiet], u.double()[quiet]
    dot, weight = (q * v).sum(1, keepdim=True), (l.double() + a.double())[quiet, None]
    assert error(double[1][quiet], dot[:, 0]) < max(bound, 2e-6)
    assert error(double[0][quiet], weight * q * (v - dot)) < 4 * bound
    v = v.requires_grad_()
    right = torch.linalg.vector_norm(v, p, dim=1)
    assert error(norm[quiet], right.detach()) < 2e-6
    assert error(dual[quiet], torch.autograd.grad(right.sum(), v)[0]) < 2 * bound
    assert norm[1] == math.inf
    assert norm[3].isnan()


@pytest.mark.parametrize(
    ("dtype", "classes", "p"),
    [(torch.float32, 1025, 2.0), (torch.float64, 2047, 1.5)],  # of odd widths: cut at 16 bytes
)
def test_rows_over_parts(monkeypatch, parts_of, dtype, classes, p):
    parts_of(1024)
    _check_rows(monkeypatch, dtype, classes, p)


@pytest.mark.parametrize(
    ("dtype", "classes", "p"),
    [
        (torch.float32, 5000, 1.5),
        (torch.bfloat16, 4099, math.inf),
        (torch.bfloat16, 2048, 1.5),
        (torch.float16, 5121, 1.0),
    ],
)
def test_long_rows(monkeypatch, parts_of, dtype, classes, p):
    parts_of(1024)
    _check_rows(monkeypatch, dtype, classes, p)


@pytest.mark.long
@pytest.mark.parametrize(("dtype", "p"), [(torch.float32, 2.0), (torch.bfloat16, 1.5)])
def test_long_rows_over_nine_parts(monkeypatch, parts_of, dtype, p):
    parts_of(8192)
    _check_rows(monkeypatch, dtype, 70_001, p)


@pytest.mark.parametrize(
    ("dtype", "classes", "p"),
    [(torch.float32, 1025, 2.0), (torch.bfloat16, 2039, 1.5), (torch.float64, 1237, math.inf)],
)
def test_odd_rows_that_fit(monkeypatch, dtype, classes, p):
    """Cut at 16 bytes without parts."""
    f = torch.empty(5, classes, dtype=dtype)
    assert layout.cut_of(classes, layout.tile_of(classes, f.element_size()), True, (f, classes)).lanes > 1
    _check_rows(monkeypatch, dtype, classes, p)


def test_which_rows_that_fit_are_cut_at_16_bytes():
    tile, x = layout.Tile(2048, 1, 4), torch.empty(4, 2050)
    for length, whole, lanes in ((1025, True, 4), (2045, True, 4), (2046, True, 1), (1028, True, 1), (1025, False, 1)):
        assert layout.cut_of(length, tile, whole, (x, length)).lanes == lanes
    for others in ((x, 1028), (x.view(-1)[1:], 1025)):
        assert layout.cut_of(1025, tile, True, (x, 1025), others) == (1, 1)
    assert layout.cut_of(1001, layout.Tile(1024, 1, 4), True, (x, 1001)).lanes == 1  # 8 entries a thread


@pytest.mark.parametrize(("dtype", "classes"), [(torch.float32, 1025), (torch.bfloat16, 1027), (torch.float64, 1025)])
def test_odd_rows_that_fit_leave_what_is_beside_them(monkeypatch, dtype, classes):
    """What the last row's program writes beyond its row stays; of 1 to 4 rows it ends anywhere within 16 bytes."""
    kept = []

    def between(like, shape=None, **_options):
        shape = like.shape if shape is None else torch.Size(shape if isinstance(shape, tuple) else (shape,))
        kept.append(torch.full((shape.numel() + 32,), math.nan, dtype=like.dtype))
        return kept[-1][16:-16].view(shape)

    monkeypatch.setattr(torch.Tensor, "new_empty", between)
    monkeypatch.setattr(torch, "empty_like", between)
    for rows in range(1, 5):
        f, ones = torch.rand(rows, classes).to(dtype), torch.ones(rows, dtype=accumulation_dtype(dtype))
        for make in (
            lambda f=f, ones=ones: kernels.softmax_backward(f, None, None, ones, None, f, 0.0, -100, 1.0),
            lambda f=f, ones=ones: kernels.pnorm_backward(ones, f, ones, ones, 2.0),
        ):
            kept.clear()
            make()
            memory = kept[0]  # the others are the interpreter's
            assert memory[:16].isnan().all()
            assert memory[-16:].isnan().all()
            assert not memory[16:-16].isnan().any()


def test_zeros_over_parts_of_which_one_has_no_entry(parts_of):
    """Rows of 2047 that begin where 16 bytes do need a part less than the others."""
    parts_of(1024)
    assert kernels.pnorm(torch.zeros(4, 2047), math.inf)[2].tolist() == [2047] * 4


@triton.jit
def _turns(words_ptr, out_ptr, rows, parts, lag, ONE: tl.constexpr):
    row, part, writes = turn(words_ptr, rows, parts, lag, ONE)
    at = out_ptr + 3 * tl.program_id(0)
    tl.store(at, row)
    tl.store(at + 1, part)
    tl.store(at + 2, writes.to(tl.int64))


def _unfinished(turns, parts, order, slots, ticketed, pick):
    """How many programs never end, when ``slots`` of them run at a time, started in ``order`` and advanced by ``pick``.

    A program that writes waits until all parts of its row are reduced, in its slot.
    """
    waiting, running, reduced = list(order), [], {}
    while waiting or running:
        while waiting and len(running) < slots:
            program = waiting.pop(0)
            running.append(turns[len(order) - len(waiting) - 1] if ticketed else turns[program])
        able = [item for item in running if not item[2] or reduced.get(item[0], 0) == parts]
        if not able:
            return len(waiting) + len(running)
        row, _, writes = item = pick(able)
        running.remove(item)
        if not writes:
            reduced[row] = reduced.get(row, 0) + 1
    return 0


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 4),
    parts=st.integers(2, 5),
    beyond=st.integers(0, 12),
    one=st.booleans(),
    slots=st.integers(1, 6),
    seed=st.integers(0, 2**31),
)
def test_no_order_of_programs_hangs(rows, parts, beyond, one, slots, seed):
    """Each part is reduced once and written once; and all programs end, in whatever order they start."""
    programs = rows * (parts + 1 if one else 2 * parts)
    words, out = torch.zeros(layout.TICKET, dtype=torch.int32), torch.zeros(programs, 3, dtype=torch.int64)
    _turns[(programs,)](words, out, rows, parts, parts + beyond, one)
    turns = [tuple(item) for item in out.tolist()]
    every = [(row, part) for row in range(rows) for part in range(parts)]
    assert sorted(item[:2] for item in turns if not item[2]) == every
    assert sorted(item[:2] for item in turns if item[2]) == [item for item in every if not one or item[1] == 0]
    writers_first = sorted(range(programs), key=lambda i: -turns[i][2])
    generator = random.Random(seed)
    for order in (range(programs), writers_first, generator.sample(range(programs), programs)):
        for pick in (generator.choice, lambda able: max(able, key=lambda item: item[2])):  # those that reduce: late
            assert _unfinished(turns, parts, order, slots, True, pick) == 0
    if slots <= sum(item[2] for item in turns):  # what the ticket is for
        assert _unfinished(turns, parts, writers_first, slots, False, generator.choice) > 0
