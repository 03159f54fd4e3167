"""The operator log_softmax_difference, its Function, and the identity it stands for."""

from __future__ import annotations

import math

import pytest
import torch
from reference import DTYPES, double, error
from torch.autograd import gradcheck, gradgradcheck

import densreg
from densreg import ops

pytestmark = pytest.mark.usefixtures("backend")


@pytest.mark.core
@pytest.mark.parametrize("dtype", DTYPES)
def test_is_the_log_density_for_every_class(dtype):
    logits = torch.randn(6, 11).mul(5).to(dtype)
    wide = double(logits)
    for k in range(11):
        difference = densreg.log_softmax_difference(logits, k)
        assert torch.equal(difference, densreg.log_density(logits))
        expected = wide[:, k] - wide.log_softmax(1)[:, k]
        assert error(difference, expected) < (1e-14 if dtype == torch.float64 else 2e-6)


@pytest.mark.core
def test_loses_no_digits_far_below_the_maximum():
    logits = torch.tensor([[3.0, -1e4, -math.inf]])
    for k in range(3):
        assert densreg.log_softmax_difference(logits, k).item() == 3.0


def test_gradient_to_second_order():
    f = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    k = torch.tensor([0, 4, 2, 2])

    def ours(f):
        return densreg.log_softmax_difference(f, k)

    assert gradcheck(ours, f, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(ours, f, check_fwd_over_rev=True)
    stacked = torch.stack([f, 2 * f])
    torch.testing.assert_close(torch.func.vmap(ours)(stacked), torch.logsumexp(stacked, 2))


@pytest.mark.dispatcher
@pytest.mark.parametrize(("dtype", "need_softmax"), list(zip(DTYPES, (True, False, True, False), strict=True)))
def test_opcheck(operator, dtype, need_softmax):
    arguments = (torch.randn(3, 5).to(dtype), torch.tensor([0, 1, 4]), need_softmax)
    torch.library.opcheck(operator("log_softmax_difference"), arguments)


@pytest.mark.no_call
@pytest.mark.host_checks
def test_class_out_of_range():
    with pytest.raises(ValueError, match=r"k holds class.*4.*; wanted classes in \[0, 4\)"):
        densreg.log_softmax_difference(torch.randn(3, 4), torch.tensor([0, 1, 4]))


@pytest.mark.no_call
def test_errors():
    logits = torch.randn(3, 4)
    for k, kind, message in [
        (4, ValueError, r"class in \[0, 4\), got 4"),
        (-1, ValueError, r"class in \[0, 4\), got -1"),
        (True, TypeError, "got bool"),
        (torch.tensor([0, 1]), ValueError, r"shape \[3\], one class a row, got \[2\]"),
        (torch.tensor([0.0, 1, 2]), TypeError, "int64 class indices, got torch.float32"),
        ("1", TypeError, "must be a tensor, got str"),
    ]:
        with pytest.raises(kind, match=message):
            densreg.log_softmax_difference(logits, k)
    with pytest.raises(NotImplementedError, match="densreg::log_softmax_difference is a raw operator"):
        ops.log_softmax_difference(logits.requires_grad_(), torch.tensor([0, 1, 2]))
