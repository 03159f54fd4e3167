"""The penalty's own gradient in the parameters, alone, against float64: eager, and inside torch.compile.

Everything here runs on the oldest and the newest torch: it has been seen to be lost there without a word.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from reference import gradients, paths_and_orders
from torch import nn

import densreg
from benchmarks import second_order
from benchmarks.__main__ import main as benchmarks
from benchmarks.second_order import (
    CLASSES,
    LOG_DENSITIES,
    ORDERS,
    densreg_penalty,
    measure,
    parameter_gradient,
    problem,
    reference,
    relative_error,
    torch_penalty,
)
from densreg import _torch
from densreg.paths import PATHS

pytestmark = pytest.mark.compile

BACKENDS = ("aot_eager", pytest.param("inductor", marks=pytest.mark.long))


def test_the_reference_is_the_derivative():
    """Central differences along a random direction of the parameters."""
    model, x = problem(torch.float64)
    direction = [torch.randn_like(w) for w in model.parameters()]
    analytic = sum(float((g * d).sum()) for g, d in zip(reference(2), direction, strict=True))
    h = 1e-6
    values = []
    for shift in (h, -2 * h):
        with torch.no_grad():
            for w, d in zip(model.parameters(), direction, strict=True):
                w.add_(d, alpha=shift)
        values.append(torch_penalty(2)(model(x), x).item())
    assert analytic == pytest.approx((values[0] - values[1]) / (2 * h), rel=1e-6)
    assert abs(analytic) > 1e-3


def test_a_missing_penalty_would_be_seen():
    """The measure itself: a gradient of zero has error 1, one without the softmax Hessian is far off too."""

    def without_hessian(logits, x):
        (g,) = torch.autograd.grad(logits, x, torch.softmax(logits, 1).detach(), create_graph=True)
        return g.flatten(1).norm(dim=1).mean()

    assert relative_error([torch.zeros_like(r) for r in reference(2)], reference(2)) == 1
    assert relative_error(parameter_gradient(*problem(torch.float64), without_hessian), reference(2)) > 0.1


@pytest.mark.parametrize("compiler", [None, "aot_eager"])
@pytest.mark.parametrize(("path", "p"), paths_and_orders(ORDERS))
def test_eager_and_as_one_graph(path, p, compiler, fresh_dynamo):
    assert measure(path, p, torch.float64, compiler) < 1e-10


@pytest.mark.slow
@pytest.mark.long  # in float32 below
@pytest.mark.parametrize("path", PATHS)
def test_compiled_by_inductor(path, fresh_dynamo):
    classes = 3 if path == "per_class" else CLASSES  # unrolled over the classes, 7 take a minute to compile
    assert measure(path, 2, torch.float64, "inductor", classes) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("p", [p if p == 2 else pytest.param(p, marks=pytest.mark.long) for p in ORDERS])
def test_compiled_by_inductor_in_float32(p, fresh_dynamo):
    torchs = relative_error(parameter_gradient(*problem(torch.float32), torch_penalty(p)), reference(p))
    assert measure("fused", p, torch.float32, "inductor") <= max(torchs, 2e-6)


@pytest.mark.parametrize("compiler", BACKENDS)
@pytest.mark.parametrize("path", ["fused", "taylor", "stable"])
def test_compiled_loss_with_backward_outside(compiler, path, fresh_dynamo):
    """The other shape of a step: loss = compiled(x), then loss.backward()."""
    model, x = problem(torch.float64)
    with _torch.tracing_autograd():
        loss = torch.compile(lambda x: densreg_penalty(2, path)(model(x), x), backend=compiler, fullgraph=True)(x)
    loss.backward()
    assert relative_error(gradients(model), reference(2)) < 1e-10


@pytest.mark.parametrize("compiler", BACKENDS)
def test_compiled_log_density(compiler, fresh_dynamo, monkeypatch):
    """log_density under the user's own torch.autograd.grad: the construction in which torch loses second order."""
    monkeypatch.setitem(LOG_DENSITIES, "one class", lambda f: densreg.log_softmax_difference(f, 3))
    for route in LOG_DENSITIES:
        assert measure(route, 2, torch.float64, compiler) < 1e-10


@pytest.mark.parametrize("compiler", [None, *BACKENDS])
def test_gradient_of_the_cross_entropy_penalty(compiler, fresh_dynamo):
    """Second order through the cross-entropy output (InputGrad's penalty), label smoothing and ignored targets too."""
    y = torch.tensor([0, -100, 2, 3, 4])

    def penalty(cross_entropy):
        def value(logits, x):
            (g,) = torch.autograd.grad(cross_entropy(logits).sum(), x, create_graph=True)
            return g.flatten(1).square().sum()

        return value

    ours = penalty(lambda f: densreg.density_cross_entropy(f, y, 0.1)[0])
    torchs = penalty(lambda f: nn.functional.cross_entropy(f, y, label_smoothing=0.1, reduction="none"))
    grads = parameter_gradient(*problem(torch.float64), ours, compiler)
    assert relative_error(grads, parameter_gradient(*problem(torch.float64), torchs)) < 1e-10


@pytest.mark.parametrize("compiler", BACKENDS)
def test_compiled_density_loss(compiler, fresh_dynamo):
    """The whole step; the penalty's part of its gradient is what is left without the cross-entropy's."""
    model, x = problem(torch.float64)
    y = torch.tensor([0, 1, 2, 3, 4])
    parameters = list(model.parameters())

    def step(x, y, coeff):
        loss, ce, penalty = densreg.density_loss(model(x), y, x, coeff)
        return loss.detach(), ce.detach(), penalty.detach(), torch.autograd.grad(loss, parameters)

    with _torch.tracing_autograd():
        loss, ce, penalty, grads = torch.compile(step, backend=compiler, fullgraph=True)(x, y, torch.tensor(0.5))
    plain = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), parameters)
    penalty_grads = [2 * (g - c) for g, c in zip(grads, plain, strict=True)]
    assert relative_error(penalty_grads, reference(2)) < 1e-10
    torch.testing.assert_close(loss, ce + 0.5 * penalty)
    assert x.grad is None


def test_compiled_torch_func(fresh_dynamo):
    model, x = problem(torch.float64)
    parameters = {k: v.detach() for k, v in model.named_parameters()}
    model.eval()
    x = x.detach()

    def penalty(log_density):
        def value(parameters):
            def total(x):
                return log_density(torch.func.functional_call(model, parameters, (x,))).sum()

            return torch.func.grad(total)(x).flatten(1).square().sum()

        return torch.func.grad(value)

    ours = torch.compile(penalty(densreg.log_density), backend="aot_eager", fullgraph=True)(parameters)
    torchs = penalty(lambda f: torch.logsumexp(f, 1))(parameters)
    assert relative_error(list(ours.values()), list(torchs.values())) < 1e-10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_compiled_autocast(dtype, fresh_dynamo):
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 7))
    x = torch.randn(5, 12, requires_grad=True)
    parameters = list(model.parameters())

    def gradient(x):
        with torch.autocast("cpu", dtype):
            penalty = densreg.density_penalty(model(x), x)
        return torch.autograd.grad(penalty, parameters, allow_unused=True, materialize_grads=True)

    with _torch.tracing_autograd():
        compiled = torch.compile(gradient, backend="aot_eager", fullgraph=True)(x)
    assert relative_error(compiled, gradient(x)) < 1e-6
    wide = parameter_gradient(model.double(), x.detach().double().requires_grad_(), torch_penalty(2))
    assert relative_error(compiled, wide) < (0.03 if dtype == torch.bfloat16 else 0.005)


def test_compiled_steps_recompile_once_per_shape(fresh_dynamo):
    model, x = problem(torch.float64)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    step = torch.compile(lambda x: densreg.density_penalty(model(x), x), backend=counter, fullgraph=True, dynamic=False)
    with _torch.tracing_autograd():
        for batch in (x, x + 1, x[:3], x):
            step(batch.detach().requires_grad_())
    assert counter.frame_count == 2


# --------------------------------------------------------------------------------------------------------------------
# the two common mistakes, and their neighbours: an error that says what to do, never a wrong number


class _Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.b(self.a(x).tanh())


def test_compiled_model_in_an_eager_step(fresh_dynamo):
    model = _Model()
    compiled = torch.compile(model, backend="aot_eager")
    x = torch.randn(2, 4, requires_grad=True)
    for path in PATHS:
        with pytest.raises(RuntimeError, match=r"torch\.compile'd model.*_orig_mod.*trace_autograd_ops=True"):
            densreg.density_penalty(compiled(x), x, path=path)
    with pytest.raises(RuntimeError, match=r"torch\.compile'd model"):
        densreg.density_loss(compiled(x), torch.tensor([0, 1]), x, 0.1)
    with pytest.raises(RuntimeError, match=r"torch\.compile'd model"):  # compiled in part
        densreg.input_score(torch.compile(model.a, backend="aot_eager")(x).tanh(), x)


@pytest.mark.parametrize("fullgraph", [True, False])
def test_own_compiled_step_without_the_flag(fullgraph, fresh_dynamo):
    model, x = _Model(), torch.randn(2, 4, requires_grad=True)

    def step(x):
        return densreg.density_penalty(model(x), x)

    assert not _torch.traces_autograd(), "importing densreg must not set the flag"
    # Unsupported (fullgraph) and RuntimeError have the instruction in common.
    with pytest.raises(RuntimeError, match="trace_autograd_ops=True"):
        torch.compile(step, backend="aot_eager", fullgraph=fullgraph)(x)


def test_graph_break_between_model_and_penalty(fresh_dynamo):
    model, x = _Model(), torch.randn(2, 4, requires_grad=True)

    def step(x):
        logits = model(x)
        torch._dynamo.graph_break()
        return densreg.density_penalty(logits, x)

    with _torch.tracing_autograd(), pytest.raises(RuntimeError, match="double backward"):
        torch.compile(step, backend="aot_eager")(x).backward()


def test_import_is_silent_and_sets_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        densreg.log_density(torch.randn(2, 3))
    assert not _torch.traces_autograd()


def test_the_table(monkeypatch, capsys, fresh_dynamo):
    monkeypatch.setattr(second_order, "PATHS", ("fused",))
    assert benchmarks([*["second-order", "--orders", "2", "--backend", "aot_eager"]]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| 2.0 | ")]
    # fused, three functions that differentiate the log density, and torch in eager
    errors = [float(cell) for line in lines for cell in line.split("|")[4:-1] if cell != " - "]
    assert len(errors) == 18
    assert max(errors[:9]) < 1e-10
    assert 0 < max(errors[9:]) < 2e-6
