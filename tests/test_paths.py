"""Every path gives the same score; where they overflow; and what input_score refuses."""

from __future__ import annotations

import pytest
import torch
from reference import Once
from torch import nn

import densreg
from benchmarks.second_order import problem
from densreg import _torch
from densreg.paths import PATHS


def _score_reference(model, x):
    return torch.autograd.grad(torch.logsumexp(model(x), 1).sum(), x)[0]


@pytest.mark.parametrize("path", PATHS)
def test_all_paths_agree(path):
    model, x = problem(torch.float64)
    torch.testing.assert_close(
        densreg.input_score(model(x), x, path).detach(), _score_reference(model, x), rtol=1e-12, atol=1e-15
    )


@pytest.mark.parametrize("path", ["stable", "taylor"])
def test_every_class_gives_the_same_score(path):
    model, x = problem(torch.float64)
    expected = _score_reference(model, x)
    classes = torch.tensor([6, 0, 3, 3, 1])
    for k in (0, 6, classes):
        score = densreg.input_score(model(x), x, path, k=k).detach()
        torch.testing.assert_close(score, expected, rtol=1e-11, atol=1e-14)
    with pytest.raises(ValueError, match=r"k must be a class in \[0, 7\), got 7"):
        densreg.input_score(model(x), x, path, k=7)


def test_random_class_follows_the_seed():
    model, x = problem(torch.float32)
    scores = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        scores.append(densreg.input_score(model(x), x, "stable"))
    assert torch.equal(scores[0], scores[1])
    assert not torch.equal(scores[0], scores[2]), "the rounding of another class should differ"


@pytest.mark.parametrize("path", PATHS)
def test_which_paths_overflow(path):
    x = torch.randn(3, 4, requires_grad=True)
    weight = torch.randn(5, 4)
    # exp overflows in float32 at 88.7; exp(-89) of the inverse is subnormal.
    score = densreg.input_score(x @ weight.t() + 100, x, path)
    assert bool(score.isfinite().all()) == (path not in ("naive", "inverse"))
    if path not in ("naive", "inverse"):
        expected = torch.softmax(x @ weight.t(), 1) @ weight
        torch.testing.assert_close(score, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("path", PATHS)
def test_up_to_which_logits_the_second_order_is_right(path):
    """Without a shift the square of the sum of exponentials overflows: from logits of 44 on, not from 88."""
    good = {}
    for top in (40.0, 60.0, 80.0, 100.0):
        norms = []
        for dtype, name in ((torch.float64, "fused"), (torch.float32, path)):
            torch.manual_seed(0)
            w = torch.randn(5, 8, dtype=torch.float64).to(dtype).requires_grad_()
            x = torch.randn(4, 8, dtype=torch.float64).to(dtype).requires_grad_()
            penalty = densreg.density_penalty(torch.tanh(x @ w.t()) + top, x, 2, name)
            norms.append(torch.autograd.grad(penalty, w)[0].double())
        good[top] = bool((norms[1] - norms[0]).norm() < 1e-4 * norms[0].norm())
    assert good == {top: path not in ("naive", "inverse") or top == 40 for top in good}


def test_tuple_of_inputs_gives_a_tuple():
    a, b = torch.randn(3, 4, requires_grad=True), torch.randn(3, 2, 2, requires_grad=True)
    weight = torch.randn(5, 4)
    logits = (a + b.flatten(1)) @ weight.t()
    for path in PATHS:
        for x in ((a, b), [a, b]):
            scores = densreg.input_score(logits, x, path)
            assert isinstance(scores, tuple)
            torch.testing.assert_close(scores[0], scores[1].flatten(1))


def test_input_that_is_no_leaf():
    x = torch.randn(3, 4, requires_grad=True)
    inner = x.tanh()
    weight = torch.randn(5, 4)
    score = densreg.input_score(inner @ weight.t(), inner)
    torch.testing.assert_close(score, torch.softmax(inner @ weight.t(), 1) @ weight)


class _Detached(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad.detach()


@pytest.mark.compile
def test_compiled_part_before_x_or_beside_it(fresh_dynamo):
    """What is differentiated once may be compiled: an encoder whose output is x, a weight computed from others."""
    encoder = torch.compile(nn.Linear(6, 4), backend="aot_eager")
    double = torch.compile(lambda w: 2 * w, backend="aot_eager")
    weight, v = torch.randn(5, 4, requires_grad=True), torch.randn(3, 6)

    def gradient(encoder, double):
        x = encoder(v).tanh()
        penalty = densreg.density_penalty(x @ double(weight).t(), x)
        return torch.autograd.grad(penalty, [weight, *linear.parameters()])

    linear = _torch.uncompiled(encoder)
    for a, b in zip(gradient(encoder, double), gradient(linear, lambda w: 2 * w), strict=True):
        torch.testing.assert_close(a, b)


def test_errors():
    model = nn.Linear(4, 5)
    x = torch.randn(3, 4, requires_grad=True)
    logits = model(x)
    ones = torch.ones(3, 4)
    for bad, kind, message in [
        ((torch.ones(3, 4, dtype=torch.int64),), TypeError, r"x\[0\] must be floating point to have a score"),
        (ones, ValueError, r"x does not require grad: call x.requires_grad_\(\) before"),
        (x[:2], ValueError, r"x must have shape \[3, ...\], the batch of the logits first, got \[2, 4\]"),
        (torch.ones(3, requires_grad=True), ValueError, r"got \[3\]"),
        (x.clone(), ValueError, "do not depend on x: pass the very tensor"),
        ((x, ones.clone().requires_grad_()), ValueError, r"do not depend on x\[1\]"),
        ((), TypeError, "non-empty sequence of tensors"),
        ("x", TypeError, "tensor or a non-empty sequence of tensors, got 'x'"),
    ]:
        with pytest.raises(kind, match=message):
            densreg.input_score(logits, bad)
    with pytest.raises(ValueError, match=r"path must be one of naive, .*fused; got 'fast'"):
        densreg.input_score(logits, x, "fast")
    with pytest.raises(ValueError, match="the logits carry no graph"):
        densreg.input_score(logits.detach(), x)
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"gradients are disabled .* torch.enable_grad\(\)"):
        densreg.input_score(logits, x)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="gradients are disabled"):
        densreg.input_score(torch.ones(3, 5), torch.ones(3, 4))
    for path in PATHS:
        with pytest.raises(RuntimeError, match="cannot be differentiated again, so the penalty would train nothing"):
            densreg.input_score(model(_Detached.apply(x)), x, path)
        # Elsewhere torch only says so if the gradient is not taken in chosen inputs.
        inner = nn.Linear(4, 4)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            densreg.input_score(model(Once.apply(inner(x))), x, path)
