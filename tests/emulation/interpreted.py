"""The Triton kernels themselves, in Triton's interpreter. Run by tests/test_backends.py, in a process of its own."""

from __future__ import annotations

import math

import pytest
import torch
from reference import DTYPES, ORDERS

from densreg import kernels

pytestmark = pytest.mark.core


def _full_of_nan(allocate, poisoned):
    def empty(*args, **options):
        poisoned.append(allocate)
        fresh = allocate(*args, **options)
        return fresh.fill_(math.nan) if fresh.is_floating_point() else fresh

    return empty


@pytest.mark.parametrize(
    ("classes", "dtype", "p"),
    [(n, DTYPES[i % 4], float(ORDERS[(i + i // 4) % 4])) for i, n in enumerate((1, 7, 16, 31, 33, 47, 64, 100))],
)
def test_every_element_is_written(classes, dtype, p):
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
