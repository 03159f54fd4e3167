"""What only the CUDA kernels compiled for the CPU can show. Run by tests/test_cuda.py, in a process of its own."""

from __future__ import annotations

import ctypes
import math
import os

import pytest
import torch

import densreg
from densreg import ops

pytestmark = pytest.mark.core


@pytest.fixture(autouse=True)
def _by_cuda():
    with densreg.backend("cuda"):
        yield


@pytest.fixture
def library():
    """The emulation, for its options; afterwards they are as they were."""
    library = ctypes.CDLL(os.environ["DENSREG_TEST_EMULATION"])
    library.densreg_lead.argtypes = [ctypes.c_int64]
    yield library
    library.densreg_lead(0)
    library.densreg_side_by_side(1)


def test_threads_in_any_order(library):
    """What a missing barrier lets through in one order shows in the other; the results are the same to the last bit."""
    for dtype in (torch.float32, torch.bfloat16):
        for classes in (3, 10, 100, 1000, 9000, 33_000):
            logits, u = (torch.randn(2, classes).to(dtype) for _ in range(2))
            results = []
            for reverse in (0, 1):
                library.densreg_reverse(reverse)
                outputs = ops.softmax(logits, torch.arange(2) % classes, 0.1)
                backward = ops.softmax_backward(logits, outputs[3], None, torch.ones(2), None, u)
                double = ops.softmax_double_backward(logits, outputs[3], None, torch.ones(2), None, u)
                norm, peak, total = ops.pnorm(u, 3.0)
                results.append(
                    (*outputs, backward, *double, norm, peak, total, ops.pnorm_backward(norm, u, peak, total, 3.0))
                )
            library.densreg_reverse(0)
            for one, other in zip(*results, strict=True):
                assert torch.equal(one, other)


def _everything_of_long_rows(dtype):
    f, u = (torch.randn(4, 33_000, dtype=torch.float64).to(dtype) for _ in range(2))
    f[1, :20_000] = -math.inf
    f[2, 17] = u[2, 17] = math.nan
    f[3, 20_000] = math.inf
    results = []
    for label_smoothing, need_softmax in ((0.0, True), (0.1, True), (0.1, False)):
        results += ops.softmax(f, torch.tensor([0, 20_000, -100, 3]), label_smoothing, need_softmax=need_softmax)
    statistics, l = results[3], torch.ones(4)
    results.append(ops.softmax_backward(f, statistics, None, l, None, u))
    results.append(ops.softmax_backward(f, statistics, None, l, None, None))
    results += ops.softmax_double_backward(f, statistics, None, l, None, u)
    for p in (1.5, 2.0):
        results += ops.pnorm(u, p)
    return results


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_blocks_in_any_order(library, dtype):
    """Late reducers beside early writers, with whatever lag: the same to the last bit."""
    state = torch.get_rng_state()
    expected = _everything_of_long_rows(dtype)
    library.densreg_side_by_side(3)
    for lead in (0, 4, 7, 10**6):
        library.densreg_lead(lead)
        torch.set_rng_state(state)
        before = library.densreg_waits()
        for a, b in zip(expected, _everything_of_long_rows(dtype), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        assert library.densreg_waits() > before, "no block waited"


def test_blocks_that_go_by_their_index_may_wait_for_ever(library, capfd):
    """What the ticket is for: without it, blocks that are started last to first all wait for others."""
    child = os.fork()
    if child == 0:
        try:
            library.densreg_tickets(0)
            ops.softmax(torch.randn(4, 33_000))  # by index, first to last, nothing waits
            library.densreg_side_by_side(3)
            os.write(2, b"side by side\n")
            ops.softmax(torch.randn(4, 33_000))
        finally:
            os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert "side by side\nCUDA emulation: every block that runs waits for one that has not" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("dtype", "integer", "bits"),
    [(torch.float32, torch.int32, 0x7FA5A5A5), (torch.float64, torch.int64, 0x7FF4A5A5A5A5A5A5)],
)
def test_the_nan_whose_bits_say_not_there_yet(dtype, integer, bits):
    """As an input, which reaches the peak of the norm as it is: it arrives as another NaN, and nothing waits for it."""
    g = torch.ones(2, 33_000, dtype=dtype)
    g.view(integer)[0, 17] = bits
    for each in (*ops.pnorm(g, 2.0), ops.softmax(g)[0]):
        assert each.isnan().tolist() == [True, False]


def test_small_probabilities_keep_their_digits():
    """Down to the smallest normal number, in rows that are read once and in rows that are read twice."""
    for classes in (300, 33_000):
        logits = -(torch.rand(2, classes) * 90)
        logits[:, 100] = torch.rand(2) * 3
        _, _, p, statistics = ops.softmax(logits)
        expected = torch.softmax(logits.double(), 1)
        normal = expected > torch.finfo(torch.float32).tiny
        for q in (p, ops.softmax_backward(logits, statistics, None, torch.ones(2), None, None)):
            assert ((q.double() - expected)[normal] / expected[normal]).abs().max() < 4e-7


@pytest.mark.parametrize(
    "call",
    [
        lambda: ops.softmax(torch.randn(3, 4), torch.tensor([0, 4, 3])),
        lambda: ops.softmax_backward(torch.ones(3, 4), None, torch.tensor([0, -1, 3]), None, torch.ones(3), None),
    ],
    ids=["softmax", "softmax_backward"],
)
def test_class_out_of_range_is_a_device_assert(call, capfd):
    ops.softmax(torch.randn(3, 4), torch.tensor([0, -100, 3]))  # in range
    child = os.fork()
    if child == 0:
        try:
            call()
        finally:
            os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert "a target is out of range" in capfd.readouterr().err
