"""The operators softmax, softmax_backward and softmax_double_backward, and the Functions on them."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import DTYPES, HALF_ULP, double, error, full_rows, softmax_reference
from torch.autograd import gradcheck, gradgradcheck

from densreg import functional, ops

pytestmark = [
    pytest.mark.usefixtures("backend"),
    pytest.mark.operators("softmax", "softmax_backward", "softmax_double_backward"),
]

inf, nan = math.inf, math.nan


def _backward(logits, target, l, a, u, label_smoothing=0.0, ignore_index=-100, scale=1.0):
    """softmax_backward as a function of the logits."""
    y = ops.softmax(logits, scale=scale)[2]
    return ops.softmax_backward(y, None, target, l, a, u, label_smoothing, ignore_index, scale)


def _backward_from_logits(logits, target, l, a, u, label_smoothing=0.0, ignore_index=-100, scale=1.0):
    statistics = ops.softmax(logits, need_softmax=False)[3]
    return ops.softmax_backward(logits, statistics, target, l, a, u, label_smoothing, ignore_index, scale)


BACKWARDS = pytest.mark.parametrize("backward", [_backward, _backward_from_logits])


def _reference_gradient(logits, target, l, a, u, label_smoothing=0.0, ignore_index=-100):
    f = double(logits)
    log_density, ce, p = softmax_reference(f, target, label_smoothing, ignore_index)
    total = (p * u.double()).sum() + (log_density * l.double()).sum()
    if ce is not None:
        total = total + (ce * a.double()).sum()
    return torch.autograd.grad(total, f)[0]


@pytest.mark.core
@pytest.mark.parametrize(
    ("dtype", "classes", "label_smoothing"),
    [
        (torch.float32, 1, 0.1),  # a softmax of 1 everywhere
        (torch.float64, 2, 0.0),
        (torch.float16, 10, 0.1),  # narrower than a vector register: across rows
        (torch.float32, 10, 0.0),
        (torch.bfloat16, 1000, 0.0),  # one part of a row
        (torch.float32, 1000, 0.1),
        (torch.float16, 50_000, 0.0),  # several parts
        (torch.bfloat16, 50_000, 0.1),
        (torch.float32, 50_000, 0.0),
        (torch.float64, 50_000, 0.1),
    ],
)
def test_values(backend, dtype, classes, label_smoothing):
    logits = torch.randn(5, classes, dtype=torch.float64).mul(4).to(dtype)
    target = torch.randint(classes, (5,))
    target[1] = -100
    log_density, ce, p, (m, s) = ops.softmax(logits, target, label_smoothing)
    assert torch.equal(m, logits.amax(1).to(m.dtype))
    assert error(m + s.log(), log_density) < 2e-7
    expected = softmax_reference(logits.double(), target, label_smoothing)
    row = torch.float64 if dtype == torch.float64 else torch.float32
    assert (log_density.dtype, ce.dtype, p.dtype) == (row, row, dtype)
    bound = 2e-6 if dtype != torch.float64 else 1e-14
    assert error(log_density, expected[0]) < bound
    assert error(ce, expected[1]) < bound
    assert ce[1] == 0
    if dtype in (torch.float32, torch.float64):
        big = expected[2] > torch.finfo(dtype).tiny
        off = [((q.double() - expected[2])[big] / expected[2][big]).abs().max() for q in (p, torch.softmax(logits, 1))]
        # Plain torch rounds f - m, which costs up to 1.9e-6 from 32 on: on an H200 it was off by 2.1e-6.
        assert off[0] < bound or (backend == "torch" and off[0] <= off[1])
    else:
        assert ((p.double() - expected[2]).abs() <= 1.01 * HALF_ULP[dtype] * expected[2] + 6e-8).all()


@pytest.mark.core
@pytest.mark.parametrize(
    ("dtype", "scale", "label_smoothing"),
    [
        (torch.float16, 1024.0, 0.1),
        (torch.bfloat16, 1.0, 0.1),
        (torch.float32, 1.0, 0.0),
        (torch.float32, 1024.0, 0.1),
        (torch.float64, 1024.0, 0.0),
    ],
)
@BACKWARDS
def test_backward_values(backward, dtype, scale, label_smoothing):
    logits = torch.randn(6, 33).to(dtype)
    target = torch.randint(33, (6,))
    target[2] = 7
    l, a, u = torch.randn(6), torch.randn(6), torch.randn(6, 33).to(dtype)
    # u is the gradient of scale * softmax: fold the scale into the reference's.
    grad = backward(logits, target, l, a, u / scale, label_smoothing, 7, scale)
    assert grad.dtype == dtype
    expected = _reference_gradient(logits, target, l, a, (u / scale).double() * scale, label_smoothing, 7)
    bound = 1e-14 if dtype == torch.float64 else 8 * HALF_ULP[dtype]
    assert error(grad, expected) < bound


@pytest.mark.core
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@BACKWARDS
def test_backward_of_long_rows(backward, dtype):
    logits, u = torch.randn(2, 40_003, dtype=dtype), torch.randn(2, 40_003, dtype=dtype)
    l, a, target = torch.randn(2), torch.randn(2), torch.tensor([40_002, 17])
    bound = 1e-13 if dtype == torch.float64 else 2e-6
    for upstream, v in ((u, u), (None, torch.zeros_like(u))):
        expected = _reference_gradient(logits, target, l, a, v, 0.1)
        assert error(backward(logits, target, l, a, upstream, 0.1), expected) < bound


@pytest.mark.core
@pytest.mark.parametrize(("classes", "dtype", "offset"), full_rows())
def test_rows_that_fill_a_tile(dtype, classes, offset):
    """Rows of a power of two, which fill what a thread group holds; with offset 1 they begin beside its vectors."""
    logits, u = (torch.randn(3, classes + 8).to(dtype)[:, offset : offset + classes] for _ in range(2))
    target = torch.tensor([classes - 1, 0, classes // 2])
    log_density, ce, p, statistics = ops.softmax(logits, target, 0.1)
    expected = softmax_reference(logits.double(), target, 0.1)
    bound = {torch.bfloat16: 2**-8, torch.float32: 2e-6, torch.float64: 1e-13}[dtype]
    assert error(log_density, expected[0]) < min(bound, 2e-6)
    assert error(ce, expected[1]) < min(bound, 2e-6)
    assert error(p, expected[2]) < bound
    l, a = torch.randn(3), torch.randn(3)
    grad = ops.softmax_backward(logits, statistics, target, l, a, u, 0.1)
    assert error(grad, _reference_gradient(logits, target, l, a, u, 0.1)) < 2 * bound
    if dtype != torch.bfloat16:
        assert error(ops.softmax_backward(p, None, target, l, a, u, 0.1), grad) < 2 * bound


@pytest.mark.parametrize("classes", [10, 1000, 40_003])
def test_scale_is_exact_in_float64(classes):
    logits = torch.randn(2, classes, dtype=torch.float64)
    y = ops.softmax(logits, scale=0.1)[2]
    assert error(y, 0.1 * torch.softmax(logits, 1)) < 1e-14
    u = torch.randn_like(logits)
    grad = ops.softmax_backward(y, None, None, None, None, u, scale=0.1)
    assert error(grad, _reference_gradient(logits, None, torch.zeros(2), None, 0.1 * u)) < 1e-13


@pytest.mark.core
@pytest.mark.parametrize("given_gradients", range(8))
@BACKWARDS
def test_backward_takes_any_of_the_gradients(backward, given_gradients):
    logits, target = torch.randn(4, 9, dtype=torch.float64), torch.randint(9, (4,))
    full = (torch.randn(4).double(), torch.randn(4).double(), torch.randn(4, 9).double())
    some = [g if given_gradients >> i & 1 else None for i, g in enumerate(full)]
    zeros = [g if given_gradients >> i & 1 else torch.zeros_like(g) for i, g in enumerate(full)]
    assert error(backward(logits, target, *some), _reference_gradient(logits, target, *zeros)) < 1e-14


def _double_backward(logits, target, l, a, v, ignore_index=-100, from_logits=False):
    _, _, y, statistics = ops.softmax(logits)
    source = (logits, statistics) if from_logits else (y, None)
    return ops.softmax_double_backward(*source, target, l, a, v, ignore_index)


@pytest.mark.core
@pytest.mark.parametrize("from_logits", [False, True])
@pytest.mark.parametrize(
    ("dtype", "classes", "given"),
    [
        (torch.float32, 1, "l"),
        (torch.float64, 5, "la"),
        (torch.float16, 10, "a"),
        (torch.float32, 33, "la"),
        (torch.bfloat16, 1000, "l"),
        (torch.float32, 40_003, "a"),
        (torch.float64, 40_003, "l"),
    ],
)
def test_double_backward_values(dtype, classes, given, from_logits):
    """A quarter of the classes at -inf, an ignored target, and numbers of the rows that are expanded."""
    logits = torch.randn(4, classes, dtype=torch.float64).mul(3).to(dtype)
    logits[:, : classes // 4] = -inf
    v, target = torch.randn(4, classes).to(dtype), torch.tensor([classes - 1] * 4)
    target[2] = -1
    row = ops.accumulation_dtype(dtype)
    l = torch.tensor(1.5, dtype=row).expand(4) if "l" in given else None
    a = torch.randn(4, dtype=row) if "a" in given else None
    grad, dot = _double_backward(logits, target if a is not None else None, l, a, v, -1, from_logits)
    assert (grad.dtype, dot.dtype) == (dtype, row)
    p, weight = torch.softmax(logits.double(), 1), torch.zeros(4, dtype=torch.float64)
    expected_dot = (p * v.double()).sum(1)
    if l is not None:
        weight += l
    if a is not None:
        weight += a.masked_fill(target == -1, 0)
    expected = weight[:, None] * p * (v.double() - expected_dot[:, None])
    bound = {torch.float64: 1e-14, torch.float32: 2e-6}.get(dtype, 32 * HALF_ULP[dtype])
    size = (weight.abs().max() * v.abs().max()).item()  # what cancels in v - <P, v>
    assert (dot.double() - expected_dot).abs().max() < (2e-6 if from_logits else bound) * v.abs().max()
    assert (grad.double() - expected).abs().max() < bound * size
    if dtype in (torch.float32, torch.float64) and classes > 1:
        assert expected.abs().max() > 2 * bound * size, "the bound shows nothing"


@pytest.mark.core
@pytest.mark.parametrize("from_logits", [False, True])
def test_double_backward_of_extreme_rows(from_logits):
    quiet = [0.5, 1.0, -1.0, 0.0]
    logits = torch.tensor([row for extreme in ROWS.values() for row in (quiet, extreme)] + [quiet])
    v = torch.tensor([[1.0, -2.0, 3.0, 0.5]]).expand(len(logits), 4)
    grad, dot = _double_backward(logits, None, torch.ones(len(logits)), None, v, from_logits=from_logits)
    p = torch.softmax(logits.double(), 1)
    expected = (p * v).sum(1)
    torch.testing.assert_close(dot.double(), expected, rtol=2e-6, atol=1e-6, equal_nan=True)
    expected = p * (v - expected.unsqueeze(1))
    torch.testing.assert_close(grad.double(), expected, rtol=2e-6, atol=1e-6, equal_nan=True)
    assert grad[::2].isfinite().all(), "a row poisoned another"
    for strided in (v.t().contiguous().t(), torch.stack([v, v], 2)[..., 0]):
        same, _ = _double_backward(logits[:, :4], None, torch.ones(len(logits)), None, strided, from_logits=from_logits)
        torch.testing.assert_close(same, grad, equal_nan=True)
    empty, none = _double_backward(logits[:0], None, torch.ones(0), None, v[:0], from_logits=from_logits)
    assert (empty.shape, none.shape) == ((0, 4), (0,))


ROWS = {
    "large": [1e4, -1e4, 9999.0, 0.0],
    "all -inf": [-inf] * 4,
    "masked class": [1.0, -inf, 2.0, -inf],
    "only one class left": [-inf, -inf, 3.0, -inf],
    "+inf": [1.0, inf, 2.0, 3.0],
    "+inf beside what overflows": [800.0, inf, 90.0, 95.0],
    "nan": [1.0, nan, 2.0, 3.0],
    "both infinities": [inf, -inf, 0.0, 1.0],
}


@pytest.mark.core
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_rows_give_what_torch_gives(dtype, label_smoothing):
    """Each between quiet rows, which it must not poison; with either target."""
    quiet = [0.5, 1.0, -1.0, 0.0]
    logits = torch.tensor([row for extreme in ROWS.values() for row in (quiet, extreme)] * 2 + [quiet]).to(dtype)
    targets = torch.tensor([1] * 2 * len(ROWS) + [2] * (2 * len(ROWS) + 1))
    outputs = ops.softmax(logits, targets, label_smoothing)
    for actual, expected in zip(outputs[:3], softmax_reference(logits.double(), targets, label_smoothing), strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=2 * HALF_ULP[dtype], atol=1e-6, equal_nan=True)
        assert actual[::2].isfinite().all(), "a row poisoned another"


LONG_ROWS = {  # (from, to, value): what a row of 20,000 classes holds there
    "masked blocks": [(0, 9000, -inf), (17_000, 20_000, -inf)],
    "one class left": [(0, 19_999, -inf)],
    "all -inf": [(0, 20_000, -inf)],
    "a nan": [(12_345, 12_346, nan)],
    "a nan among -inf": [(0, 20_000, -inf), (12_345, 12_346, nan)],
    "a +inf": [(12_345, 12_346, inf)],
    "a +inf, a nan, and masked blocks": [(0, 9000, -inf), (17_000, 17_001, inf), (19_999, 20_000, nan)],
    "large": [(0, 5, 1e4), (12_345, 12_346, -1e4), (19_990, 20_000, 1e4)],
}


@pytest.mark.core
@pytest.mark.parametrize(("dtype", "label_smoothing"), list(zip(DTYPES, (0.0, 0.1, 0.1, 0.0), strict=True)))
def test_extreme_long_rows_give_what_torch_gives(dtype, label_smoothing):
    """Whole blocks of a row: what is found in one part of it must not spoil, or be missed by, another."""
    logits = torch.randn(2 * len(LONG_ROWS) + 1, 20_000, dtype=torch.float64).to(dtype)
    for row, spans in zip(logits[1::2], LONG_ROWS.values(), strict=True):
        for begin, end, value in spans:
            row[begin:end] = value
    targets = torch.full((len(logits),), 19_999)
    actual = ops.softmax(logits, targets, label_smoothing)
    for a, b in zip(actual[:3], softmax_reference(logits.double(), targets, label_smoothing), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=max(2e-6, 2 * HALF_ULP[dtype]), atol=6e-8, equal_nan=True)


@pytest.mark.core
def test_extreme_long_rows_that_are_read_twice():
    """More than an L2 holds, where the first pass is online: it begins with nothing but -inf."""
    logits = torch.randn(7, 140_000)
    logits[1, :9000] = logits[3] = logits[5] = -inf
    logits[5, 12_345] = nan
    targets = torch.full((7,), 139_999)
    expected = softmax_reference(logits.double(), targets, 0.1)
    for a, b in zip(ops.softmax(logits, targets, 0.1)[:3], expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-6, atol=6e-8, equal_nan=True)


@pytest.mark.core
def test_largest_fp16_logits():
    logits = torch.tensor([[65504.0, -65504.0, 65472.0]], dtype=torch.float16)
    log_density, ce, p, _ = ops.softmax(logits, torch.tensor([1]))
    assert log_density.item() == 65504
    assert ce.item() == 131008
    assert p.tolist() == [[1, 0, pytest.approx(math.exp(-32), abs=6e-8)]]


@pytest.mark.core
def test_large_logits_keep_their_digits():
    # L = 1e4 + log 2 rounds by 5e-4 in float32: neither P nor ce may be computed from it.
    logits = torch.tensor([[1e4, 1e4, 1e4 - 2]])
    _, ce, p, _ = ops.softmax(logits, torch.tensor([2]))
    expected = softmax_reference(logits.double(), torch.tensor([2]))
    assert error(p, expected[2]) < 2e-7  # a division on a GPU may be off by 2 ulp
    assert error(ce, expected[1]) < 1e-7


@pytest.mark.core
def test_small_probabilities_keep_their_digits(backend):
    """Down to the smallest normal number: there the rounding of f - m alone would cost 4e-6."""
    logits = torch.rand(4, 300).mul(-87) + torch.tensor([[0.0], [0.123], [-3.7], [900.0]])
    logits[:, 7] = torch.tensor([0.0, 0.123, -3.7, 900.0])
    p, expected = ops.softmax(logits)[2], torch.softmax(logits.double(), 1)
    normal = expected > torch.finfo(torch.float32).tiny
    off = [((q.double() - expected)[normal] / expected[normal]).abs().max() for q in (p, torch.softmax(logits, 1))]
    assert off[0] < 2e-6 or (backend == "torch" and off[0] < 1.1 * off[1])
    assert off[1] > 2e-6, "the bound shows nothing"


@pytest.mark.core
def test_million_classes():
    logits = torch.randn(2, 1_000_000)
    log_density, _, p, _ = ops.softmax(logits)
    expected = softmax_reference(logits.double(), None)
    assert ((p.double() - expected[2]) / expected[2]).abs().max() < 2e-6
    assert error(log_density, expected[0]) < 2e-7


@pytest.mark.core
def test_scale_keeps_what_fp16_would_lose():
    logits = torch.zeros(1, 30_000, dtype=torch.float16)
    plain = ops.softmax(logits)[2].double()
    scaled = ops.softmax(logits, scale=1024.0)[2].double() / 1024
    assert (plain * 30_000 - 1).abs().max() > 1e-4  # subnormal
    assert (scaled * 30_000 - 1).abs().max() < HALF_ULP[torch.float16]


@pytest.mark.core
@pytest.mark.parametrize(
    "logits",
    [
        torch.randn(9, 4).t(),
        torch.randn(4, 18)[:, ::2],
        torch.randn(1, 9).expand(4, 9),
        torch.randn(4, 1).expand(4, 9),
        torch.randn(4, 40_000)[:, 3:],
        torch.randn(5, 39)[1:, 1:],
        torch.randn(0, 9),
        torch.randn(4, 1),
    ],
    ids=["transposed", "strided", "expanded rows", "expanded classes", "long_part", "part", "no rows", "one class"],
)
def test_strides_and_empty(logits):
    outputs = ops.softmax(logits)
    same = ops.softmax(logits.contiguous())
    for a, b in zip(outputs, same, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)  # a sum's order follows the strides
    assert outputs[2].is_contiguous()


@pytest.mark.core
@pytest.mark.parametrize("classes", [9, 40])
def test_rows_further_apart_than_32_bits_count(classes):
    """In memory that is hardly touched."""
    step = 2**31 + 5
    logits = torch.empty(step + classes, dtype=torch.float16).as_strided((2, classes), (step, 1))
    logits.copy_(torch.randn(2, classes))
    near = logits.contiguous()
    outputs = ops.softmax(logits)
    for a, b in zip(outputs, ops.softmax(near), strict=True):
        torch.testing.assert_close(a, b)  # a sum's order follows the alignment
    backward = [ops.softmax_backward(f, outputs[3], None, torch.ones(2), None, f) for f in (logits, near)]
    torch.testing.assert_close(*backward)


@pytest.mark.core
def test_only_what_is_asked_for():
    outputs = ops.softmax(torch.randn(3, 4), need_softmax=False)
    assert [list(t.shape) for t in outputs] == [[3], [0], [0], [2, 3]]


@pytest.mark.no_call
@pytest.mark.host_checks
def test_target_out_of_range():
    for bad in (4, -1, -101):
        with pytest.raises(ValueError, match=rf"expected classes in \[0, 4\) .*, got class {bad}"):
            ops.softmax(torch.randn(3, 4), torch.tensor([0, bad, 1]))


@pytest.mark.no_call
def test_raw_operators_refuse_to_lose_a_gradient():
    logits = torch.randn(3, 4, requires_grad=True)
    with pytest.raises(NotImplementedError, match="densreg::softmax is a raw operator"):
        ops.softmax(logits)
    with pytest.raises(NotImplementedError, match="densreg::softmax_backward is a raw operator"):
        ops.softmax_backward(logits, None, None, torch.ones(3), None, None)
    with pytest.raises(NotImplementedError, match="densreg::softmax_double_backward is a raw operator"):
        ops.softmax_double_backward(torch.ones(3, 4), None, None, torch.ones(3), None, logits)


@pytest.mark.dispatcher
@pytest.mark.parametrize(
    ("dtype", "need_softmax", "with_target"),
    [
        (torch.float16, True, False),
        (torch.bfloat16, False, True),
        (torch.float32, True, True),
        (torch.float64, False, False),
    ],
)
def test_opcheck(operator, dtype, need_softmax, with_target):
    logits, target = torch.randn(3, 5).to(dtype), torch.tensor([0, -100, 4]) if with_target else None
    torch.library.opcheck(operator("softmax"), (logits, target, 0.1, -100, need_softmax, 2.0))
    l, u = torch.randn(3), torch.randn(3, 5).to(dtype)
    statistics = ops.softmax(logits)[3]
    for source in ((torch.softmax(logits, 1), None), (logits, statistics)):
        arguments = (*source, target, l, l if with_target else None, u, 0.1, -100, 2.0)
        torch.library.opcheck(operator("softmax_backward"), arguments)
        arguments = (*source, target, l, l if with_target else None, u, -100)
        torch.library.opcheck(operator("softmax_double_backward"), arguments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("confidence", [6.0, 9.0, 11.0])
def test_confident_half_samples_keep_their_gradient(dtype, confidence):
    """P_y rounds to 1 in half precision: from it, P_y - 1 and the Hessian's (U - <P, U>)_y would be 0, or noise."""
    logits = torch.tensor([[confidence, 0.0, -1.0]]).to(dtype).requires_grad_()
    wide = double(logits)
    y = torch.tensor([0])
    (grad,) = torch.autograd.grad(functional.density_cross_entropy(logits, y)[0].sum(), logits)
    (expected,) = torch.autograd.grad(F.cross_entropy(wide, y), wide)
    torch.testing.assert_close(grad.double(), expected, rtol=4 * HALF_ULP[dtype], atol=6e-8)

    u = torch.tensor([[1.0, -2.0, 0.5]], dtype=dtype)
    p = functional.softmax(logits)[2]
    (grad,) = torch.autograd.grad(p, logits, u)
    (expected,) = torch.autograd.grad(torch.softmax(wide, 1), wide, u.double())
    torch.testing.assert_close(grad.double(), expected, rtol=4 * HALF_ULP[dtype], atol=6e-8)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(0, 6),
    classes=st.integers(1, 70),
    magnitude=st.sampled_from([1e-3, 1.0, 30.0, 1e4]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    label_smoothing=st.sampled_from([0.0, 0.3, 1.0]),
    masked=st.floats(0, 0.9),
    seed=st.integers(0, 2**31),
)
def test_any_shape(rows, classes, magnitude, dtype, label_smoothing, masked, seed):
    torch.manual_seed(seed)
    logits = (torch.randn(rows, classes, dtype=torch.float64) * magnitude).to(dtype)
    target = torch.randint(classes, (rows,))
    mask = torch.rand(rows, classes) < masked
    mask[torch.arange(rows), target] = False
    logits = logits.masked_fill(mask, -inf)
    actual = ops.softmax(logits, target, label_smoothing)
    for a, b in zip(actual[:3], softmax_reference(logits.double(), target, label_smoothing), strict=True):
        # Logits of 1e4 are 1e4 apart: the difference itself rounds.
        torch.testing.assert_close(a.double(), b, rtol=4e-6, atol=2e-6 + 1e-7 * magnitude * (dtype == torch.float32))


# --------------------------------------------------------------------------------------------------------------------
# the Functions


def _outputs(f, **options):
    target = torch.tensor([0, 3, -100, 4])
    options = {"label_smoothing": 0.1, "need_softmax": True, "scale": 2.0} | options
    outputs = functional.softmax(f, target, **options)
    return outputs if options["need_softmax"] else outputs[:2]


@pytest.mark.parametrize("need_softmax", [True, False])
def test_gradcheck(need_softmax):
    f = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)

    def outputs(f):
        return _outputs(f, need_softmax=need_softmax)

    options = {"check_forward_ad": True, "check_batched_grad": True, "check_batched_forward_grad": True}
    assert gradcheck(outputs, f, **options)
    assert gradgradcheck(outputs, f, check_fwd_over_rev=True)


def test_backward_gradcheck_to_third_order():
    f = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    l, a = (torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    u = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)

    def gradient(f, l, a, u):
        outputs = _outputs(f)
        total = (outputs[0] * l).sum() + (outputs[1] * a).sum() + (outputs[2] * u).sum()
        return torch.autograd.grad(total, f, create_graph=True)[0]

    assert gradcheck(gradient, (f, l, a, u))
    assert gradgradcheck(gradient, (f, l, a, u))
