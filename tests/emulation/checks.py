"""What only the CUDA kernels compiled for the CPU can show. Run by tests/test_cuda.py, in a process of its own."""

from __future__ import annotations

import ctypes
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


def test_threads_in_any_order():
    """What a missing barrier lets through in one order shows in the other; the results are the same to the last bit."""
    library = ctypes.CDLL(os.environ["DENSREG_TEST_EMULATION"])
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


def test_kernels_check_shapes_and_dtypes():
    f, y, three = torch.randn(3, 40), torch.zeros(3, dtype=torch.int64), torch.zeros(3)
    statistics = torch.ones(2, 3)
    options = (0.0, -100, 1.0)
    norm, peak, total = ops.pnorm(f, 2.0)
    k = torch.ops.densreg
    for operator, arguments in [
        (k.softmax, (f[None], None, 0.0, -100, True, 1.0)),
        (k.softmax, (f, y[:2], 0.0, -100, True, 1.0)),
        (k.softmax, (f, y.int(), 0.0, -100, True, 1.0)),
        (k.softmax_backward, (f, statistics[:, :2], None, three, None, None, *options)),
        (k.softmax_backward, (f, statistics, None, three[:2], None, None, *options)),
        (k.softmax_backward, (f, statistics, y, None, three[:2], None, *options)),
        (k.softmax_backward, (f, statistics, None, None, None, f[:2], *options)),
        (k.softmax_backward, (f, statistics, None, None, None, f.double(), *options)),
        (k.softmax_double_backward, (f, statistics, y, three, None, f[:2], -100)),
        (k.pnorm, (three, 2.0)),
        (k.pnorm_backward, (norm[:2], f, peak, total, 2.0)),
    ]:
        with pytest.raises(RuntimeError, match=" must "):
            operator.cuda(*arguments)
