"""What would lose gradients without an error is refused, in eager mode and compiled, or replaced."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference import (
    Layer,
    Net,
    Once,
    Sine,
    by_autograd,
    gradients,
    nothing,
    objective_of,
)
from torch import Tensor, nn
from torch._higher_order_ops.map import map as torch_map
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop

from benchmarks.second_order import relative_error
from densreg import RegularizedObjective, input_score
from densreg.paths import PATHS

pytestmark = pytest.mark.compile

Y = torch.tensor([0, 1, 2, 3, 4])


class _Elsewhere(nn.Module):
    """Uses a weight that requires grad and is no parameter of it."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.own, layer = kind, nn.Linear(4, 7).double(), nn.Linear(4, 4).double()
        self.hidden = [layer]
        self.weight = layer.weight * 2 if kind == "computed" else layer.weight.detach().requires_grad_()
        if kind == "adapter":
            self.own.register_forward_pre_hook(lambda module, given: given[0] + layer(given[0]))

    def forward(self, x):
        if self.kind == "hidden":
            x = self.hidden[0](x)
        if self.kind in ("leaf", "computed"):
            x = x @ self.weight
        if self.kind == "constant":
            with torch.no_grad():
                constant = self.hidden[0](x)
            x = x + constant + self.hidden[0](x).detach()
        return self.own(x).tanh()


@pytest.mark.parametrize("options", [{"compile": False}, {"backend": "aot_eager"}], ids=["eager", "compiled"])
def test_what_would_silently_get_no_gradient_is_refused(options, fresh_dynamo):
    x, teacher = torch.randn(5, 4, dtype=torch.float64), nn.Linear(4, 7).double()
    distilled = {"criterion": lambda f, y: F.mse_loss(f, teacher(x)), **options}
    for kind in ("hidden", "leaf", "computed", "adapter"):
        objective = RegularizedObjective(_Elsewhere(kind), 1.0, **options)
        for _ in range(2):
            with pytest.raises(ValueError, match=r"got one of shape \[4(, 4)?\], which would get no gradient"):
                objective(x, Y)
    for kind in ("constant", "none"):  # what a criterion calls is not trained, as its documentation says
        model = _Elsewhere(kind)
        RegularizedObjective(model, 1.0, **distilled)(x, Y).loss.backward()
        assert all(w.grad is not None for w in model.parameters())
    if not options.get("compile", True):
        with pytest.raises(ValueError, match="which would get no gradient"):
            RegularizedObjective(_Elsewhere("leaf"), 1.0, path="directional")(x, Y)
    else:
        net = nn.Sequential(_Elsewhere("leaf"), nn.Linear(7, 7).double())
        with pytest.raises(ValueError, match="which would get no gradient"):
            RegularizedObjective(net, 1.0, head="1", **options)(x, Y)


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_a_function_that_would_lose_second_order_is_refused(compiler, fresh_dynamo):
    def net():
        torch.manual_seed(0)
        return Net(Layer(lambda x: Sine.apply(x))).double()

    x = torch.randn(5, 4, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"autograd\.Function.*allow_in_graph.*compile=False"):
        RegularizedObjective(net(), 1.0, backend=compiler)(x, Y)
    first = nn.Sequential(Layer(lambda x: Sine.apply(x)), nn.Linear(4, 7)).double()
    with pytest.raises(RuntimeError, match=r"comes through an autograd\.Function.*error; mark .*allow_in_graph"):
        RegularizedObjective(first, 1.0, backend=compiler)(x, Y)
    _, expected = by_autograd(net(), x, Y, 1.0, criterion=nothing)
    eager = RegularizedObjective(net(), 1.0, compile=False, criterion=nothing)
    eager(x, Y).loss.backward()
    assert relative_error(gradients(eager.model), expected) < 1e-10
    plain = RegularizedObjective(net(), 1.0, backend=compiler, interval=None)  # there is no second order to lose
    plain(x, Y).loss.backward()
    assert relative_error(gradients(plain.model), by_autograd(net(), x, Y, 0.0)[1]) < 1e-10


def _product(t: Tensor) -> Tensor:
    return t.sin() * t.exp()


def _scanned(t: Tensor) -> Tensor:
    return scan(lambda c, u: ((c + u).sin(), (c * u).exp()), torch.zeros_like(t[0]), t)[1]


def _in_a_loop(t: Tensor) -> Tensor:
    c, rows = torch.zeros_like(t[0]), []
    for u in t:
        rows.append((c * u).exp())
        c = (c + u).sin()
    return torch.stack(rows)


def _while(t: Tensor) -> Tensor:
    return while_loop(lambda i, u: i < 3, lambda i, u: (i + 1, u.sin()), (torch.tensor(0), t))[1]


HIGHER_ORDER = {
    "cond": (lambda t: torch.cond(t.sum() > -1e9, _product, lambda u: u.cos() * u, (t,)), _product),
    "map": (lambda t: torch_map(_product, t), _product),
    "scan": (_scanned, _in_a_loop),
    "while_loop": (_while, lambda t: t.sin().sin().sin()),
}


@pytest.mark.parametrize("name", HIGHER_ORDER)
def test_higher_order_operators_that_lose_second_order_are_refused(name, fresh_dynamo):
    """In eager mode too; a plain step is right, but for scan's on torch 2.11, whose first order is wrong as well."""
    nets, x = [Net(Layer(f)).double() for f in HIGHER_ORDER[name]], torch.randn(5, 4, dtype=torch.float64)
    model, plain = nets
    plain.load_state_dict(model.state_dict())
    for compiler in (None, "aot_eager"):
        with pytest.raises(RuntimeError, match=r"the model calls a higher-order operator .*loses without an error"):
            objective_of(model, compiler)(x, Y)
    if name != "scan":
        objective_of(model, "aot_eager", interval=None)(x, Y).loss.backward()
        assert relative_error(gradients(model), by_autograd(plain, x, Y, 0.0)[1]) < 1e-10


class _NoGrad(Sine):
    @staticmethod
    def backward(ctx, grad):
        with torch.no_grad():
            return Sine.backward(ctx, grad)


class _Numpy(Sine):
    @staticmethod
    def backward(ctx, grad):
        return torch.from_numpy(grad.detach().numpy() * np.cos(ctx.saved_tensors[0].detach().numpy()))


class _OfOperator(Sine):
    """With an operator for a backward that has none of its own."""

    @staticmethod
    def backward(ctx, grad):
        return torch.ops.densreg_tests.times_cosine(grad, ctx.saved_tensors[0])


class _AddsLoss(torch.autograd.Function):
    """With the gradient of an auxiliary loss, as mixtures of experts do, which would be a part of the score."""

    @staticmethod
    def forward(ctx, x, loss):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad, grad.new_ones(())


class _MoreThanNeeded(torch.autograd.Function):
    """Whose backward is right in what is asked for, and has a gradient that nobody asks for outside of autograd."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x.sin() * weight

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad * weight * x.cos(), (grad * x.sin()).detach()


@pytest.fixture(scope="module")
def operators():
    """Kernels that autograd does not see, of operators for which nothing is registered with autograd."""
    library = torch.library.Library("densreg_tests", "FRAGMENT")
    library.define("sine(Tensor x) -> Tensor")
    library.define("times_cosine(Tensor v, Tensor x) -> Tensor")
    library.define("own(Tensor x) -> Tensor")
    library.impl("sine", lambda x: torch.from_numpy(np.sin(x.detach().numpy())), "CPU")
    library.impl("times_cosine", lambda v, x: torch.from_numpy(v.detach().numpy() * np.cos(x.detach().numpy())), "CPU")
    library.impl("own", lambda x: x.sin(), "CPU")  # which autograd does see, but not torch.compile
    for name in ("sine", "times_cosine", "own"):
        library.impl(name, lambda v, x=None: torch.empty_like(v), "Meta")
    return library


def _sparse(t: Tensor) -> Tensor:
    i = torch.arange(t.shape[1]).expand(2, -1)
    rows = [torch.sparse_coo_tensor(i, row.sin(), check_invariants=False).to_dense().sum(0) for row in t]
    return torch.stack(rows)


def _hooked(t: Tensor, hook) -> Tensor:
    t = t.sin()
    t.register_hook(hook)
    return t


@torch.no_grad()
def _clipped(grad: Tensor) -> Tensor:
    return grad.clamp(-1, 1)


LEAVE_AUTOGRAD = {
    "detached in a hook": lambda t: _hooked(t, lambda grad: 2 * grad.detach()),
    "no_grad in a hook": lambda t: _hooked(t, _clipped),
    "no_grad": _NoGrad,
    "numpy": _Numpy,
    "once_differentiable": Once,
    "operator in a backward": _OfOperator,
    "operator": lambda t: torch.ops.densreg_tests.sine(t),
    "auxiliary loss": lambda t: torch.compiler.allow_in_graph(_AddsLoss).apply(t, t.square().mean()),
    "sparse": _sparse,
    "chunked": lambda t: F.linear_cross_entropy(t, t.T @ t, Y, reduction="sum", options=CHUNKED) * t,
}


CHUNKED = getattr(nn, "LinearCrossEntropyOptions", lambda **_: None)(batch_chunk_size=2)


@pytest.mark.filterwarnings(
    "ignore:.*an autograd kernel was not registered:UserWarning", "ignore:Sparse invariant checks"
)
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside"])
@pytest.mark.parametrize("compiler", [None, "aot_eager"])
@pytest.mark.parametrize("name", LEAVE_AUTOGRAD)
def test_a_backward_outside_of_autograd_is_refused(name, compiler, beside, operators, fresh_dynamo):
    """Behind other layers and beside them, where the score has a graph all the same; marked, where it is compiled."""
    if name == "chunked" and CHUNKED is None:
        pytest.skip("this torch has no such option")
    if name in ("numpy", "sparse") and compiler:
        pytest.skip("an error of torch's")
    function = LEAVE_AUTOGRAD[name]
    if isinstance(function, type):
        function = torch.compiler.allow_in_graph(type("Marked", (function,), {})).apply
    model = Net(Layer(lambda t: function(t) + t.tanh() if beside else function(t)))
    words = r"cannot be differentiated again, .*directional|nothing is registered with autograd, .*register_autograd"
    with pytest.raises(RuntimeError, match=words):
        objective_of(model.double(), compiler)(torch.randn(5, 4, dtype=torch.float64), Y)


@pytest.mark.parametrize("error", ["in the graph", "in the backward"])
def test_an_error_leaves_no_hooks_in_the_graph(error):
    x, w = (torch.randn(5, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    logits = _NoGrad.apply(x)
    if error == "in the graph":
        (once,) = torch.autograd.grad(Once.apply(w).square().sum(), w, create_graph=True)
        logits = once + logits
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        input_score(logits, x)
    torch.autograd.grad(logits.square().sum(), x, create_graph=True)


@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered:UserWarning")
@pytest.mark.parametrize("interval", [1, None], ids=["penalized", "plain"])
def test_an_operator_that_is_differentiated_in_eager_mode_alone(interval, operators, fresh_dynamo):
    """torch.compile takes its result for a constant, without an error."""
    model, x = Net(Layer(lambda t: torch.ops.densreg_tests.own(t) + t)), torch.randn(5, 4)
    objective_of(model, None)(x, Y)
    with pytest.raises(RuntimeError, match=r"densreg_tests.own, for which nothing is registered with autograd"):
        objective_of(model, "aot_eager", interval=interval)(x, Y)


@pytest.mark.parametrize("compiler", [None, "aot_eager"])
def test_functions_and_operators_that_are_right_are_not_refused(compiler, operators, fresh_dynamo):
    marked, more = (torch.compiler.allow_in_graph(type("Marked", (f,), {})).apply for f in (Sine, _MoreThanNeeded))
    scale = torch.full((6,), 2.0, dtype=torch.float64)

    def layer(t):
        constant = torch.ops.densreg_tests.sine(t.detach())
        with torch.no_grad():
            constant = constant + torch.ops.densreg_tests.own(t)
        return marked(t) + more(t, scale * t.new_ones(6)) + constant.detach()

    x = torch.randn(5, 4, dtype=torch.float64)
    torch.manual_seed(0)
    model = Net(Layer(layer)).double()
    plain = Net(Layer(lambda t: 3 * t.sin() + 2 * t.detach().sin())).double()
    plain.load_state_dict(model.state_dict())
    objective_of(model, compiler, 1.0, criterion=nothing)(x, Y).loss.backward()
    assert relative_error(gradients(model), by_autograd(plain, x, Y, 1.0, criterion=nothing)[1]) < 1e-10


@pytest.mark.parametrize("compiler", [None, "aot_eager"])
def test_hooks_in_a_forward(compiler, fresh_dynamo):
    """Right where autograd sees what they do; what it does not see is refused in steps with a penalty alone."""
    x, seen = torch.randn(5, 4, dtype=torch.float64), []

    def layer(t):
        looked = _hooked(t, lambda grad: seen.append(1)) if compiler is None else t.sin()
        return _hooked(t, lambda grad: grad * grad.tanh()) + looked + _hooked(t, lambda grad: torch.zeros_like(grad))

    model = Net(Layer(layer)).double()
    expected = by_autograd(copy.deepcopy(model), x, Y, 1.0, criterion=nothing)[1]
    if compiler is not None and torch.__version__.startswith("2.11."):  # where Dynamo makes a Function of a hook
        with pytest.raises(RuntimeError, match=r"autograd\.Function"):
            objective_of(model, compiler)(x, Y)
        return
    objective_of(model, compiler, 1.0, criterion=nothing)(x, Y).loss.backward()
    assert relative_error(gradients(model), expected) < 1e-10
    assert bool(seen) == (compiler is None)
    detached = Net(Layer(lambda t: _hooked(t, _clipped))).double()
    objective_of(detached, compiler, interval=None)(x, Y).loss.backward()


class _TwoWays(torch.autograd.Function):
    """Whose second gradient is constant where its second incoming one is."""

    @staticmethod
    def forward(ctx, x, y):
        return 2 * x, 3 * y

    @staticmethod
    def backward(ctx, a, b):
        return 2 * a, 3 * b


@pytest.mark.parametrize("path", PATHS)
def test_a_gradient_that_is_constant_as_the_incoming_one_is(path):
    """That of a logit, through a frozen head."""
    nets, x = [], torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    for function in (_TwoWays.apply, lambda t, u: (2 * t, 3 * u)):
        torch.manual_seed(0)
        body, head = nn.Linear(4, 6).double(), nn.Linear(6, 7).double().requires_grad_(False)
        t, u = function(*body(x).chunk(2, 1))
        logits = head(torch.cat([t.sin(), u], 1))
        input_score(logits, x, path, k=1).square().sum().backward(inputs=[body.weight])
        nets.append(body)
    assert relative_error([nets[0].weight.grad], [nets[1].weight.grad]) < 1e-10


class _OwnWeights(nn.Module):
    """A layer whose weight is computed from the batch, and normed, by weight_norm or its formula."""

    def __init__(self, formula: bool) -> None:
        super().__init__()
        self.formula, self.v, self.g = formula, nn.Linear(6, 36), nn.Linear(6, 6)
        self.layer = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6, bias=False))

    def forward(self, x):
        v, g = self.v(x).sin().mean(0).view(6, 6), self.g(x).exp().mean(0).view(6, 1)
        if self.formula:
            return F.linear(x, v * g / v.norm(dim=1, keepdim=True))
        given = {"parametrizations.weight.original0": g, "parametrizations.weight.original1": v}
        return torch.func.functional_call(self.layer, given, x)


@pytest.mark.parametrize("compiler", [None, "aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_weight_norm_of_a_weight_that_depends_on_x(compiler, fresh_dynamo):
    model, plain = (Net(_OwnWeights(formula)).double() for formula in (False, True))
    plain.load_state_dict(model.state_dict())
    x = torch.randn(5, 4, dtype=torch.float64)
    objective_of(model, compiler, 1.0, criterion=nothing)(x, Y).loss.backward()
    assert relative_error(gradients(model), by_autograd(plain, x, Y, 1.0, criterion=nothing)[1]) < 1e-10


@pytest.mark.parametrize("compiler", [None, "aot_eager"])
def test_torch_func_inside_a_model(compiler, fresh_dynamo):
    nets, x = [], torch.randn(5, 4, dtype=torch.float64)
    for f in (torch.func.vmap(torch.func.grad(lambda u: u.sin().exp().sum())), lambda t: t.sin().exp() * t.cos()):
        torch.manual_seed(0)
        nets.append(Net(Layer(f)).double())
    objective_of(nets[0], compiler, 1.0, criterion=nothing)(x, Y).loss.backward()
    assert relative_error(gradients(nets[0]), by_autograd(nets[1], x, Y, 1.0, criterion=nothing)[1]) < 1e-10


@pytest.mark.parametrize("interval", [1, None], ids=["penalized", "plain"])
@pytest.mark.parametrize("kind", ["layers", "residual", "weights"])
def test_a_nested_region_is_refused(kind, interval, fresh_dynamo):
    """torch 2.14 and 2.15 lose the second call's gradient: without an error in a plain step, and that of weights."""

    @torch.compiler.nested_compile_region
    def region(t, layer=None):
        return 2 * t.tanh() if layer is None else 2 * layer(t).tanh()

    def twice(x):
        for layer in layers:
            if kind == "weights":
                x = F.linear(x, region(layer.weight), layer.bias)
            else:
                x = region(x, layer) + (x if kind == "residual" else 0)
        return x

    layers = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
    model = Net(Layer(twice))
    model.layers = layers
    with pytest.raises(RuntimeError, match=r"one graph: .*nested_compile_region.*leave it out"):
        RegularizedObjective(model, 0.5, backend="aot_eager", interval=interval)(torch.randn(5, 4), Y)
