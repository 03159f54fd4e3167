"""The public functions of the logits: values, dtypes, errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from reference import DTYPES, double, error

import densreg


@pytest.mark.parametrize("dtype", DTYPES)
def test_log_density(dtype):
    logits = torch.randn(5, 20).to(dtype).requires_grad_()
    value = densreg.log_density(logits)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = torch.logsumexp(double(logits), 1)
    assert error(value, expected) < (1e-14 if dtype == torch.float64 else 1e-6)
    value.sum().backward()
    assert logits.grad.dtype == dtype
    torch.testing.assert_close(logits.grad, torch.softmax(logits.detach(), 1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"ignore_index": 2}])
def test_density_cross_entropy(dtype, options):
    logits = torch.randn(5, 20).to(dtype)
    target = torch.tensor([0, 19, 2, 3, 2])
    ce, log_density = densreg.density_cross_entropy(logits, target, **options)
    expected = F.cross_entropy(logits.double(), target, reduction="none", **options)
    bound = 1e-14 if dtype == torch.float64 else 1e-6
    assert error(ce, expected) < bound
    assert error(log_density, torch.logsumexp(logits.double(), 1)) < bound


def test_only_the_penalty_writes_the_softmax(monkeypatch):
    """log_density and density_cross_entropy read the logits, and write [B] numbers."""
    asked = []
    original = densreg.ops.softmax
    monkeypatch.setattr(densreg.ops, "softmax", lambda *a: asked.append(a[4]) or original(*a))
    logits = torch.randn(3, 4, requires_grad=True)
    densreg.log_density(logits).sum().backward()
    densreg.density_cross_entropy(logits, torch.tensor([0, 1, 2]))[0].sum().backward()
    assert asked == [False, False]


def test_without_gradient_nothing_is_kept():
    logits = torch.randn(3, 4, requires_grad=True)
    with torch.no_grad():
        assert densreg.log_density(logits).grad_fn is None
    assert densreg.log_density(logits.detach()).grad_fn is None


def test_errors():
    logits, target = torch.randn(3, 4), torch.tensor([0, 1, 2])
    for bad, kind, message in [
        ("x", TypeError, "must be a tensor, got str"),
        (torch.ones(3, 4, dtype=torch.int64), TypeError, "float64, got torch.int64"),
        (torch.ones(3, 4, dtype=torch.complex64), TypeError, "float64, got torch.complex64"),
        (torch.ones(3, 4).to(torch.float8_e4m3fn), TypeError, "float64, got torch.float8_e4m3fn"),
        (torch.ones(3), ValueError, r"shape \[batch, classes\] with at least one class, got \[3\]"),
        (torch.ones(3, 4, 5), ValueError, r"got \[3, 4, 5\]"),
        (torch.ones(3, 0), ValueError, r"got \[3, 0\]"),
    ]:
        with pytest.raises(kind, match=message):
            densreg.log_density(bad)
        with pytest.raises(kind, match=message):
            densreg.density_cross_entropy(bad, target)
    for bad, kind, message in [
        (target.float(), TypeError, "target must hold int64 class indices, got torch.float32"),
        (target[:2], ValueError, r"shape \[3\], one class a row, got \[2\]"),
        (target.unsqueeze(1), ValueError, r"got \[3, 1\]"),
        (target + 2, ValueError, r"class 4; wanted classes in \[0, 4\) or ignore_index=-100"),
        (target.to("meta"), ValueError, "target is on meta, the logits are on cpu"),
    ]:
        with pytest.raises(kind, match=message):
            densreg.density_cross_entropy(logits, bad)
    for smoothing in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"label_smoothing must lie in \[0, 1\]"):
            densreg.density_cross_entropy(logits, target, label_smoothing=smoothing)
    with pytest.raises(TypeError, match="label_smoothing must be a number, got NoneType"):
        densreg.density_cross_entropy(logits, target, label_smoothing=None)
    with pytest.raises(TypeError, match="target must be a tensor, got NoneType"):
        densreg.density_cross_entropy(logits, None)
    with pytest.raises(TypeError, match="ignore_index must be an int"):
        densreg.density_cross_entropy(logits, target, ignore_index=1.5)
