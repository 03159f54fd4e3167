"""The operators pnorm and pnorm_backward, and the Functions on them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import DTYPES, HALF_ULP, ORDERS, double, error, full_rows
from torch.autograd import gradcheck, gradgradcheck

import densreg
from densreg import functional, ops

pytestmark = [pytest.mark.usefixtures("backend"), pytest.mark.operators("pnorm", "pnorm_backward")]

inf, nan = math.inf, math.nan


def _norm_and_gradient(g, p, grad=None):
    norm, peak, total = ops.pnorm(g, p)
    return norm, ops.pnorm_backward(torch.ones_like(norm) if grad is None else grad, g, peak, total, p)


def _reference(g, p, grad=None):
    """Norm and gradient by torch."""
    g = g.detach().requires_grad_()
    norm = torch.linalg.vector_norm(g, p, dim=tuple(range(1, g.ndim)))
    return norm.detach(), torch.autograd.grad(norm, g, torch.ones_like(norm) if grad is None else grad)[0]


def _assert_as_torch(g, p, of_norm, rtol, atol):
    """Norm, within a relative tolerance, and gradient are those of torch in float64, NaN included."""
    (norm, gradient), expected = _norm_and_gradient(g, p), _reference(g.double(), p)
    torch.testing.assert_close(norm.double(), expected[0], rtol=of_norm, atol=0, equal_nan=True)
    torch.testing.assert_close(gradient.double(), expected[1], rtol=rtol, atol=atol, equal_nan=True)


SHAPES = ((4, 1), (4, 7), (3, 3, 8, 8), (2, 100_000))


@pytest.mark.core
@pytest.mark.parametrize(
    ("dtype", "p", "shape"),
    [(DTYPES[(i + j) % 4], p, shape) for i, p in enumerate(ORDERS) for j, shape in enumerate(SHAPES)],
    ids=lambda value: f"n{math.prod(value)}" if isinstance(value, tuple) else None,
)
def test_values(dtype, p, shape):
    g = torch.randn(shape).to(dtype)
    grad = torch.randn(shape[0], dtype=ops.accumulation_dtype(dtype))
    norm, gradient = _norm_and_gradient(g, p, grad)
    expected = _reference(g.double(), p, grad.double())
    assert norm.dtype == ops.accumulation_dtype(dtype)
    assert gradient.dtype == dtype
    assert error(norm, expected[0]) < (1e-13 if dtype == torch.float64 else 2e-6)
    assert error(gradient, expected[1]) < (1e-13 if dtype == torch.float64 else max(2e-6, 2 * HALF_ULP[dtype]))


ROWS = {
    "signs and zeros": [1.0, -2.0, 0.0, -0.0],
    "ties": [3.0, -3.0, 3.0, 1.0],
    "zero": [0.0, 0.0, 0.0, 0.0],
    "+inf": [inf, 1.0, -2.0, 0.0],
    "-inf": [-inf, 1.0, -2.0, 0.0],
    "infinities": [inf, -inf, 1.0, 0.0],
    "nan": [nan, 1.0, 0.0, -1.0],
    "nan and inf": [inf, nan, 1.0, 0.0],
}


@pytest.mark.core
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", ORDERS)
def test_extreme_rows_give_what_torch_gives(dtype, p):
    """Each between quiet rows, which it must not poison."""
    quiet = [1.0, 2.0, -1.0, 0.0]
    g = torch.tensor([row for extreme in ROWS.values() for row in (quiet, extreme)] + [quiet]).to(dtype)
    _assert_as_torch(g, p, 1e-6, 2 * HALF_ULP[dtype], 1e-6)


@pytest.mark.core
@pytest.mark.parametrize(
    ("length", "dtype", "offset", "p"),
    [(*row, ORDERS[(i + 3 * n) % 4]) for i, row in enumerate(full_rows()) for n in (0, 1)],
)
def test_rows_that_fill_a_tile(dtype, p, length, offset):
    """Rows of a power of two, which fill what a thread group holds; with offset 1 they begin beside its vectors."""
    g = torch.randn(3 * length + offset).to(dtype)[offset:].view(3, length)
    _assert_as_torch(g, p, 2e-6, max(4e-6, 2 * HALF_ULP[dtype]), 1e-9)


LONG_ROWS = {  # (from, to, value): what a row of 20,000 entries holds there
    "zeros": [(0, 20_000, 0.0)],
    "one entry": [(0, 20_000, 0.0), (12_345, 12_346, -2.0)],
    "growing": [(0, 9000, 1e-6), (9000, 17_000, 1.0), (17_000, 20_000, 1e3)],
    "shrinking": [(0, 9000, 1e3), (9000, 17_000, 1.0), (17_000, 20_000, 1e-6)],
    "ties far apart": [(0, 1, 50.0), (12_345, 12_346, -50.0), (19_999, 20_000, 50.0)],
    "an infinity": [(12_345, 12_346, -inf)],
    "infinities": [(0, 1, inf), (19_999, 20_000, -inf)],
    "a nan": [(12_345, 12_346, nan)],
    "nan and inf": [(0, 1, inf), (19_999, 20_000, nan)],
}


@pytest.mark.core
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", ORDERS)
def test_extreme_long_rows_give_what_torch_gives(dtype, p):
    """What is found in one part of a row is put together with the others."""
    g = torch.randn(2 * len(LONG_ROWS) + 1, 20_000, dtype=torch.float64).to(dtype)
    for row, spans in zip(g[1::2], LONG_ROWS.values(), strict=True):
        for begin, end, value in spans:
            row[begin:end] = value
    _assert_as_torch(g, p, 2e-6, max(4e-6, 2 * HALF_ULP[dtype]), 1e-6)


@pytest.mark.core
@pytest.mark.parametrize("p", [*ORDERS, 1.01, 3, 50])
def test_no_over_or_underflow(p):
    for magnitude in (1e-45, 1e-40, 1e-30, 1e-10, 1e10, 1e30, 1e37):
        g = torch.tensor([[1.0, -3.0, 0.0, 2.0], [3.0, 3.0, 3.0, -3.0]]) * magnitude
        norm, gradient = _norm_and_gradient(g, p)
        unit, direction = _reference(double(g) / magnitude, p)  # powers of the row itself overflow even in float64
        rounding = 1e-45 if magnitude < 1e-37 else 0
        torch.testing.assert_close(norm.double(), unit * magnitude, rtol=2e-6, atol=rounding)
        torch.testing.assert_close(gradient.double(), direction, rtol=1e-5, atol=1e-30)


@pytest.mark.core
def test_small_entries_at_orders_near_one():
    """|g|^(p-1) is near 1 however small g is, subnormal ratios included."""
    g = torch.tensor([[1e20, 1e-20], [1.0, 1e-39]])
    _, gradient = _norm_and_gradient(g, 1.0001)
    torch.testing.assert_close(gradient.double(), _reference(double(g), 1.0001)[1], rtol=1e-4, atol=0)


@pytest.mark.core
@pytest.mark.parametrize("p", [1e3, 1e5, 1e7, 1e30])
def test_ties_at_large_orders(p):
    peaks = torch.tensor([[5.0], [0.7], [41.0], [1 / 3], [1e5]])  # 41 (1 / 41) is not 1
    norm, gradient = _norm_and_gradient(peaks * torch.tensor([1.0, 1.0, -1.0, 0.2]), p)
    torch.testing.assert_close(norm, peaks[:, 0] * 3 ** (1 / p))
    expected = torch.tensor([1.0, 1.0, -1.0, 0.0]) * 3 ** (1 / p - 1)
    torch.testing.assert_close(gradient, expected.expand(5, 4))


@pytest.mark.core
@pytest.mark.parametrize("p", ORDERS)
def test_memory_formats(p):
    g = torch.randn(4, 3, 5, 6)
    norm, gradient = _norm_and_gradient(g, p)
    for same in (
        g.to(memory_format=torch.channels_last),
        g.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3),
        torch.stack([g, g], -1)[..., 0],
    ):
        other_norm, other_gradient = _norm_and_gradient(same, p)
        torch.testing.assert_close(other_norm, norm)
        torch.testing.assert_close(other_gradient, gradient)
        assert other_gradient.stride() == torch.empty_like(same).stride()
    row = torch.randn(4, 1).expand(4, 9)
    torch.testing.assert_close(_norm_and_gradient(row, p), _norm_and_gradient(row.contiguous(), p))


@pytest.mark.core
@pytest.mark.parametrize("p", ORDERS)
def test_empty(p):
    for shape in ((0, 3), (2, 0), (0, 0), (2, 3, 0)):
        norm, gradient = _norm_and_gradient(torch.empty(shape), p)
        assert norm.tolist() == [0.0] * shape[0]
        assert gradient.shape == shape


@settings(deadline=None, max_examples=60)
@given(
    shape=st.lists(st.integers(1, 6), min_size=2, max_size=4),
    p=st.one_of(st.floats(1, 20), st.just(inf)),
    exponent=st.integers(-35, 35),
    zeros=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_any_shape_order_and_size(shape, p, exponent, zeros, seed):
    torch.manual_seed(seed)
    g = torch.randn(shape).masked_fill(torch.rand(shape) < zeros, 0) * 10.0**exponent
    norm, gradient = _norm_and_gradient(g, p)
    # The reference on rows of size one: torch's own powers overflow even in float64.
    unit, direction = _reference(double(g) * 10.0**-exponent, p)
    torch.testing.assert_close(norm.double() * 10.0**-exponent, unit, rtol=2e-6, atol=1e-12)
    torch.testing.assert_close(gradient.double(), direction, rtol=1e-4, atol=2e-6)


@pytest.mark.dispatcher
@pytest.mark.parametrize(("dtype", "p"), list(zip(DTYPES, ORDERS, strict=True)))
def test_opcheck(operator, dtype, p):
    for g in (torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2).to(memory_format=torch.channels_last)):
        g = g.to(dtype)
        torch.library.opcheck(operator("pnorm"), (g, float(p)))
        norm, peak, total = ops.pnorm(g, p)
        torch.library.opcheck(operator("pnorm_backward"), (norm, g, peak, total, float(p)))


@pytest.mark.parametrize("p", ORDERS)
def test_gradcheck(p):
    g = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)

    def norm(g):
        return densreg.pnorm(g, p)

    assert gradcheck(norm, g, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(norm, g, check_fwd_over_rev=True)


@pytest.mark.parametrize("p", [2, 3])
def test_third_order(p):
    g = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    assert gradgradcheck(lambda g: torch.autograd.grad(densreg.pnorm(g, p).sum(), g, create_graph=True)[0], g)


@pytest.mark.parametrize("p", ORDERS)
def test_zero_row_has_no_nan_at_any_order(p):
    g = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(densreg.pnorm(g, p).sum(), g, create_graph=True)
    assert first.eq(0).all()
    (second,) = torch.autograd.grad(first.sum(), g)
    assert second.eq(0).all()

    def total(g):
        return densreg.pnorm(g, p).sum()

    hessian = torch.autograd.functional.hessian(total, g, create_graph=True, vectorize=True)
    assert hessian.eq(0).all()
    if hessian.requires_grad:
        assert torch.autograd.grad(hessian.sum(), g)[0].eq(0).all()
    assert torch.func.jacfwd(torch.func.jacfwd(total))(g.detach()).eq(0).all()


@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("row", ["signs and zeros", "ties", "zero", "+inf", "infinities", "nan"])
def test_plain_form_gives_what_the_operators_give(p, row):
    """What stands for them where torch would lose a Function's derivatives."""
    g = torch.tensor([[1.0, 2.0, -1.0, 0.0], ROWS[row]], dtype=torch.float64)
    for scale in (1e-300, 1, 1e300):
        for tensor in (g * scale, (g * scale).view(2, 2, 2)):
            norm, peak, total = ops.pnorm(tensor, p)
            torch.testing.assert_close(functional._PNorm.plain(tensor, p)[0], norm, equal_nan=True, rtol=1e-12, atol=0)
            expected = ops.pnorm_backward(norm.clamp(max=1), tensor, peak, total, p)
            actual = functional._PNormBackward.plain(norm.clamp(max=1), tensor, None, None, p)
            torch.testing.assert_close(actual, expected, equal_nan=True, rtol=1e-12, atol=0)


@pytest.mark.no_call
def test_errors():
    for bad, kind, message in [
        (torch.ones(3, dtype=torch.int64), TypeError, "float64, got torch.int64"),
        ([1.0], TypeError, "must be a tensor, got list"),
        (torch.ones(3), ValueError, r"\[batch, ...\], got \[3\]"),
    ]:
        with pytest.raises(kind, match=message):
            densreg.pnorm(bad)
    for p, kind, message in [(0.5, ValueError, "at least 1"), (nan, ValueError, "at least 1"), ("2", TypeError, "str")]:
        with pytest.raises(kind, match=message):
            densreg.pnorm(torch.ones(2, 3), p)
    with pytest.raises(NotImplementedError, match="densreg::pnorm is a raw operator"):
        ops.pnorm(torch.ones(2, 3, requires_grad=True), 2)
