"""The public functions of the logits: values, dtypes, errors."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from reference import DTYPES, TRANSFORMS, along, double, each_unit, error
from torch import Tensor, nn

import densreg
from densreg import functional


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


def test_when_the_softmax_is_written(monkeypatch):
    """By log_density and density_cross_entropy, only unrounded and only for a gradient: else they write [B] numbers."""
    asked = []
    original = densreg.ops.softmax
    monkeypatch.setattr(densreg.ops, "softmax", lambda *a: asked.append(a[4]) or original(*a))
    for dtype in (torch.float32, torch.bfloat16):
        logits = torch.randn(3, 4, dtype=dtype, requires_grad=True)
        densreg.log_density(logits).sum().backward()
        densreg.density_cross_entropy(logits, torch.tensor([0, 1, 2]))[0].sum().backward()
    densreg.log_density(logits.detach().float())
    with torch.no_grad():
        densreg.log_density(torch.randn(3, 4, requires_grad=True))
    assert asked == [True, True, False, False, False, False]


@pytest.mark.parametrize("dtype", DTYPES)
def test_log_softmax_difference_is_the_log_density_for_every_class(dtype):
    logits = torch.randn(6, 11).mul(5).to(dtype)
    wide = double(logits)
    for k in range(11):
        difference = densreg.log_softmax_difference(logits, k)
        assert torch.equal(difference, densreg.log_density(logits))
        assert error(difference, wide[:, k] - wide.log_softmax(1)[:, k]) < (1e-14 if dtype == torch.float64 else 2e-6)
    # f_k cancels: a class far below the maximum costs no digits.
    masked = torch.tensor([[3.0, -1e4, -math.inf]])
    assert all(densreg.log_softmax_difference(masked, k).item() == 3 for k in range(3))


def test_log_softmax_difference_to_second_order():
    """Against the expression itself."""
    f, v = torch.randn(4, 5, dtype=torch.float64, requires_grad=True), torch.randn(4, 5, dtype=torch.float64)
    k = torch.tensor([0, 4, 2, 2])

    def derivatives(function) -> tuple[Tensor, Tensor]:
        (first,) = torch.autograd.grad(function(f).square().sum(), f, create_graph=True)
        return first.detach(), torch.autograd.grad(first, f, v)[0]

    ours = derivatives(lambda f: densreg.log_softmax_difference(f, k))
    rows = torch.arange(4)
    for a, b in zip(ours, derivatives(lambda f: f[rows, k] - f.log_softmax(1)[rows, k]), strict=True):
        assert error(a, b) < 1e-14


def test_class_of_log_softmax_difference():
    logits = torch.randn(3, 4)
    for k, kind, message in [
        (4, ValueError, r"class in \[0, 4\), got 4"),
        (-1, ValueError, r"class in \[0, 4\), got -1"),
        (True, TypeError, "got bool"),
        (torch.tensor([0, 1]), ValueError, r"shape \[3\], one class a row, got \[2\]"),
        (torch.tensor([0.0, 1, 2]), TypeError, "int64 class indices, got torch.float32"),
        (torch.tensor([0, 1, 4]), ValueError, r"expected classes in \[0, 4\) in k, got class 4"),
        ("1", TypeError, "must be a tensor, got str"),
    ]:
        with pytest.raises(kind, match=message):
            densreg.log_softmax_difference(logits, k)


@pytest.mark.parametrize(
    "function", [densreg.log_density, lambda f: densreg.density_cross_entropy(f, torch.tensor([0, -100, 2]), 0.1)[0]]
)
def test_each_order_is_one_pass(function, monkeypatch):
    """Differentiated twice the ordinary way: the operators, with no softmax of torch's beside them."""
    monkeypatch.delattr(functional, "_probabilities")
    f = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    before = densreg.ops.calls()
    (first,) = torch.autograd.grad(function(f).sum(), f, create_graph=True)
    torch.autograd.grad(first, f, torch.randn_like(f))
    served = {key.split("/")[0]: n - before.get(key, 0) for key, n in densreg.ops.calls().items()}
    assert {name: n for name, n in served.items() if n} == {
        "softmax": 1,
        "softmax_backward": 1,
        "softmax_double_backward": 1,
    }


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
        (target + 2, ValueError, r"expected classes in \[0, 4\) or ignore_index=-100 in target, got class 4"),
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


def test_gradient_at_and_beside_a_zero_score():
    body = nn.Sequential(nn.Linear(4, 8), nn.Tanh()).double()
    x, direction = torch.randn(5, 4, dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64)

    def penalty_and_gradient(size: float) -> tuple[Tensor, Tensor]:
        leaf, head = x.clone().requires_grad_(), (size * direction).requires_grad_()
        penalty = densreg.density_penalty(F.linear(body(leaf), head), leaf)
        return penalty.detach(), torch.autograd.grad(penalty, head)[0]

    penalty, gradient = penalty_and_gradient(0)
    assert penalty == 0
    assert gradient.eq(0).all()
    small, smaller = penalty_and_gradient(1e-6)[1], penalty_and_gradient(1e-9)[1]
    assert small.norm() > 0.1, "it does not become small with the score"
    torch.testing.assert_close(small, smaller, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("size", [1e-2, 1e-4, 1e-6])
def test_error_beside_a_zero_score(size):
    """Two classes whose gradients cancel: what is left bears their rounding, and no more."""
    w, a, x = torch.randn(6, 4), torch.randn(6) / 6, size * torch.randn(16, 4)

    def evaluate(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        leaf, weight = x.to(dtype).requires_grad_(), w.to(dtype).requires_grad_()
        f = torch.tanh(F.linear(leaf, weight)) @ a.to(dtype)
        penalty = densreg.density_penalty(torch.stack([f, -f], 1), leaf, reduction="none")
        (of_class,) = torch.autograd.grad(f.sum(), leaf, retain_graph=True)
        return penalty.detach(), torch.autograd.grad(penalty.sum(), weight)[0], of_class.norm(dim=1)

    penalty, gradient, of_class = evaluate(torch.float64)
    single = evaluate(torch.float32)
    assert ((single[0] - penalty).abs() <= 3 * 6e-8 * of_class).all()
    assert (single[1] - gradient).norm() <= 3 * 6e-8 * (of_class / penalty).max() * gradient.norm()


# --------------------------------------------------------------------------------------------------------------------
# batched and nested differentiation: every derivative that torch's own functions have

_TARGET = torch.tensor([0, 3, -100])


def _both(f: Tensor) -> Tensor:
    ce, log_density = densreg.density_cross_entropy(f, _TARGET, 0.1)
    return ce + log_density.square()


def _both_by_torch(f: Tensor) -> Tensor:
    return F.cross_entropy(f, _TARGET, reduction="none", label_smoothing=0.1) + torch.logsumexp(f, 1).square()


FUNCTIONS = {  # of [3, 5]: densreg's and torch's
    "log_density": (densreg.log_density, lambda f: torch.logsumexp(f, 1)),
    "density_cross_entropy": (_both, _both_by_torch),
    "softmax": (
        lambda f: functional.softmax(f, scale=2.0)[2].square().sum(1),
        lambda f: (2 * torch.softmax(f, 1)).square().sum(1),
    ),
    "pnorm 3": (lambda f: densreg.pnorm(f, 3), lambda f: f.abs().pow(3).sum(1).pow(1 / 3)),
    "pnorm 2": (densreg.pnorm, lambda f: f.square().sum(1).sqrt()),
    "pnorm inf": (lambda f: densreg.pnorm(f, math.inf), lambda f: f.abs().amax(1)),
}


@pytest.mark.parametrize("route", TRANSFORMS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_batched_and_nested_derivatives(name, route):
    """Their values, and the gradient of their square in a weight: what is lost of the graph shows there only."""
    weight, x = torch.randn(4, 5, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)

    def value_and_gradient(function) -> tuple[Tensor, Tensor]:
        w = weight.clone().requires_grad_()
        value = TRANSFORMS[route](lambda t: function(2 * torch.tanh(t @ w)), x)
        return value.detach(), torch.autograd.grad(value.square().sum(), w)[0]

    ours, torchs = (value_and_gradient(function) for function in FUNCTIONS[name])
    assert torchs[0].abs().max() > 1e-2
    for a, b in zip(ours, torchs, strict=True):
        assert (a - b).norm() <= 1e-10 * b.norm()


def test_vmap_over_another_dimension():
    f = torch.randn(3, 2, 5, dtype=torch.float64)
    ours, torchs = (torch.func.vmap(function, in_dims=1)(f) for function in FUNCTIONS["density_cross_entropy"])
    torch.testing.assert_close(ours, torchs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_batched_in_lower_precision(dtype):
    """As one by one, in what the sums are taken in."""
    f = torch.randn(3, 5).to(dtype).requires_grad_()
    outputs = torch.cat([functional.softmax(f, _TARGET, 0.1, scale=8.0)[i].float().flatten() for i in range(3)])
    outputs = torch.cat([outputs, densreg.pnorm(f, 3)])
    units = each_unit(outputs)
    for create_graph in (False, True):
        options = {"retain_graph": True, "create_graph": create_graph}
        (batched,) = torch.autograd.grad(outputs, f, units, is_grads_batched=True, **options)
        expected = torch.stack([torch.autograd.grad(outputs, f, v, **options)[0] for v in units])
        assert batched.dtype == dtype
        torch.testing.assert_close(batched, expected)


@pytest.mark.parametrize("path", ["fused", "taylor"])
def test_forward_mode_through_the_score(path):
    """Of a score, which is a gradient already; one level of forward mode is what torch allows there."""
    w, x, v = (torch.randn(*shape, dtype=torch.float64) for shape in ((4, 5), (3, 4), (3, 4)))

    def tangent(score) -> Tensor:
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x.clone().requires_grad_(), v)
            return torch.autograd.forward_ad.unpack_dual(score(torch.tanh(dual @ w), dual)).tangent

    ours = tangent(lambda f, t: densreg.input_score(f, t, path, 1))
    expected = tangent(lambda f, t: torch.autograd.grad(f.exp().sum(1).log().sum(), t, create_graph=True)[0])
    torch.testing.assert_close(ours, expected)


def test_nested_forward_mode_compiled(fresh_dynamo):
    w, x = torch.randn(4, 5, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)

    def second(function):
        def h(t):
            return function(torch.tanh(t @ w))

        return along(along(h, x), x)

    compiled = torch.compile(second(densreg.log_density), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), second(lambda f: torch.logsumexp(f, 1))(x))


def test_fp16_second_order_where_the_product_overflows():
    """P l v is a number of fp16 where l v is none."""
    torch.manual_seed(0)
    f = torch.randn(4, 1000, dtype=torch.float16)
    v = 3000 * torch.randn(4, 1000).half()

    def second(f):
        f = f.requires_grad_()
        (first,) = torch.autograd.grad(functional.log_density(f), f, torch.full((4,), 64.0).to(f), create_graph=True)
        return torch.autograd.grad(first, f, v.to(f))[0]

    expected = second(f.double())
    assert v.double().abs().max() * 64 > torch.finfo(torch.float16).max
    assert (second(f).double() - expected).abs().max() < 2e-3 * expected.abs().max()
