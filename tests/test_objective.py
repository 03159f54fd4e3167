"""RegularizedObjective: the penalty's gradient alone, the whole step, and what a training loop does with it."""

from __future__ import annotations

import collections
import copy
import math
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from reference import Checkpointed, Net, by_autograd, gradients, nothing, objective_of, smooth_network
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import densreg
from benchmarks.second_order import problem, reference, relative_error
from densreg import RegularizedObjective, _torch
from densreg.step import AUXILIARY

pytestmark = pytest.mark.compile

COMPILERS = (None, "aot_eager", pytest.param("inductor", marks=pytest.mark.long))
Y = torch.tensor([0, 1, 2, 3, 4])


def twins() -> tuple[nn.Module, nn.Module, Tensor]:
    model, x = problem(torch.float64)
    return model, copy.deepcopy(model), x.detach()


# --------------------------------------------------------------------------------------------------------------------
# the penalty alone


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize(("path", "p"), [("fused", 2), ("fused", math.inf), ("taylor", 2), ("stable", 1.5)])
def test_penalty_alone(path, p, compiler, fresh_dynamo):
    """By one backward pass to x and by two; tests/test_second_order.py has every path and every order."""
    model, x = problem(torch.float64)
    objective_of(model, compiler, 1.0, p=p, path=path, criterion=nothing)(x, Y).loss.backward()
    assert relative_error(gradients(model), reference(p)) < 1e-10


@pytest.mark.parametrize("compiler", COMPILERS)
def test_penalty_alone_in_float32(compiler, fresh_dynamo):
    model, x = problem(torch.float32)
    objective_of(model, compiler, 1.0, criterion=nothing)(x, Y).loss.backward()
    assert relative_error(gradients(model), reference(2)) < 2e-6


# --------------------------------------------------------------------------------------------------------------------
# the step


@pytest.mark.parametrize("compiler", COMPILERS)
def test_the_step_is_torchs(compiler, fresh_dynamo):
    model, twin, x = twins()
    loss, expected = by_autograd(twin, x, Y, 0.5)
    out = objective_of(model, compiler)(x, Y)
    torch.testing.assert_close(out.loss, loss, check_dtype=False)
    torch.testing.assert_close(out.loss, out.ce + 0.5 * out.penalty)
    out.loss.backward()
    assert relative_error(gradients(model), expected) < 1e-10
    for a, b in zip(model.buffers(), twin.buffers(), strict=True):  # one plain step's running statistics
        torch.testing.assert_close(a, b)
    assert int(model[1].num_batches_tracked) == 1
    torch.testing.assert_close(out.logits, copy.deepcopy(twin)(x))
    assert out.loss.requires_grad


@pytest.mark.parametrize("compiler", COMPILERS)
def test_accumulation(compiler, fresh_dynamo):
    """Two losses summed before one backward; four backwards; one graph kept for two: equal to autograd's."""
    model, twin, x = twins()
    for m in (model, twin):
        m.eval()  # so that calls do not change one another's statistics
    objective = objective_of(model, compiler)
    batches = [x, x + 1, x - 1, 2 * x]
    expected = [by_autograd(twin, b, Y, 0.5)[1] for b in batches]

    def total(indices) -> list[Tensor]:
        return [sum(parts) for parts in zip(*(expected[i] for i in indices), strict=True)]

    (objective(batches[0], Y).loss + 3 * objective(batches[1], Y).loss).backward()
    assert relative_error(gradients(model), total([0, 1, 1, 1])) < 1e-10
    model.zero_grad()
    for batch in batches:
        objective(batch, Y).loss.backward()
    assert relative_error(gradients(model), total(range(4))) < 1e-10
    model.zero_grad()
    loss = objective(batches[0], Y).loss
    loss.backward(retain_graph=True)
    loss.backward()
    assert relative_error(gradients(model), total([0, 0])) < 1e-10
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["reduce-overhead", pytest.param("max-autotune", marks=pytest.mark.long)])
def test_modes_of_torch_compile(mode, fresh_dynamo):
    model, twin, x = twins()
    model.eval()
    twin.eval()
    objective = RegularizedObjective(model, 0.5, mode=mode)
    (objective(x, Y).loss + objective(x + 1, Y).loss).backward()
    expected = [a + b for a, b in zip(*(by_autograd(twin, b, Y, 0.5)[1] for b in (x, x + 1)), strict=True)]
    assert relative_error(gradients(model), expected) < 1e-10


def test_coefficient_changes_without_recompiling(fresh_dynamo):
    model, twin, x = twins()
    counter = CompileCounterWithBackend("aot_eager")
    objective = RegularizedObjective(model, 0.5, backend=counter)
    objective(x, Y)
    compiled = counter.frame_count
    for coeff in (0.0, 0.25, 3.0):
        objective.coeff.fill_(coeff)
        model.zero_grad()
        objective(x, Y).loss.backward()
        assert relative_error(gradients(model), by_autograd(twin, x, Y, coeff)[1]) < 1e-10
    assert counter.frame_count == compiled
    assert torch._dynamo.utils.counters["graph_break"] == {}


def test_compiles_once_for_each_shape(fresh_dynamo):
    model, x = problem(torch.float32)
    x = x.detach()
    torch._dynamo.utils.counters.clear()
    counter = CompileCounterWithBackend("aot_eager")
    objective = RegularizedObjective(model, 0.5, backend=counter)
    for batch in (x, x + 1, x[:3], x, x[:3]):
        objective(batch, Y[: len(batch)])
        model(x)  # a user's own eager call between two steps
    assert counter.frame_count == 2
    assert _torch.compiled_graphs() == 2
    other = RegularizedObjective(copy.deepcopy(model), 0.5, backend=counter)
    other(x, Y)
    objective(x, Y)
    assert counter.frame_count == 3, "two objectives do not push each other out"
    assert not _torch.traces_autograd()


def test_interval(fresh_dynamo):
    model, twin, x = twins()
    counter = CompileCounterWithBackend("aot_eager")
    objective = RegularizedObjective(model, 0.5, interval=3, backend=counter)
    for call in range(7):
        model.zero_grad()
        out = objective(x, Y)
        out.loss.backward()
        assert relative_error(gradients(model), by_autograd(twin, x, Y, 0.0 if call % 3 else 1.5)[1]) < 1e-10
        assert out.penalty.isnan() == bool(call % 3)
    again = objective_of(copy.deepcopy(model), interval=3)
    again.load_state_dict(objective.state_dict())
    assert again.calls == 7
    assert again(x, Y).penalty.isnan()


def test_plain_steps():
    model, twin, x = twins()
    out = objective_of(model, interval=None)(x, Y)
    out.loss.backward()
    assert out.penalty.isnan()
    assert out.loss == out.ce
    assert relative_error(gradients(model), by_autograd(twin, x, Y, 0.0)[1]) < 1e-10


def test_criterion():
    model, twin, x = twins()
    soft = torch.softmax(torch.randn(5, 7, dtype=torch.float64), 1)
    out = objective_of(model, criterion=F.cross_entropy)(x, soft)
    out.loss.backward()
    assert relative_error(gradients(model), by_autograd(twin, x, soft, 0.5)[1]) < 1e-10

    class Temperature(nn.Module):
        def __init__(self):
            super().__init__()
            self.t = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

        def forward(self, logits, target):
            return F.cross_entropy(logits / self.t, target)

    criterion = Temperature()
    objective_of(model, criterion=criterion)(x, Y).loss.backward()
    assert criterion.t.grad.abs() > 0


def test_no_grad_and_penalty():
    model, x = problem(torch.float64)
    x = x.detach()
    objective = objective_of(model, "aot_eager")
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        out = objective(x, Y)
    assert _torch.compiled_graphs() == 0, "nothing is compiled for it"
    assert out.penalty.isnan()
    assert not out.loss.requires_grad
    assert objective.calls == 0
    for mode in (True, False):
        objective.train(mode)
        buffers = [b.clone() for b in model.buffers()]
        with torch.no_grad():
            value = objective.penalty(x)
        assert not value.requires_grad
        assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))
        leaf = x.clone().requires_grad_()
        torch.testing.assert_close(value, densreg.density_penalty(copy.deepcopy(model)(leaf), leaf).detach())
    assert all(w.grad is None for w in model.parameters())


def test_frozen_unused_and_shared_parameters():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.frozen, self.body, self.unused = nn.Linear(192, 7), nn.Linear(7, 7), nn.Linear(2, 2)
            self.again = nn.Linear(7, 7)
            self.again.weight = self.body.weight
            self.frozen.requires_grad_(False)

        def forward(self, x):
            return self.again(self.body(self.frozen(x.flatten(1)).tanh()).tanh())

    torch.manual_seed(0)
    model = Net().double()
    twin = copy.deepcopy(model)
    x = torch.randn(5, 3, 8, 8, dtype=torch.float64)
    objective_of(model)(x, Y).loss.backward()
    leaf = x.clone().requires_grad_()
    logits = twin(leaf)
    (F.cross_entropy(logits, Y) + 0.5 * densreg.density_penalty(logits, leaf)).backward()
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (a.grad is None) == name.startswith(("frozen", "unused")), name
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad)


GoogLeNetOutputs = collections.namedtuple("GoogLeNetOutputs", "logits aux_logits2 aux_logits1")


class _Heads(nn.Module):
    """Several heads on one body; returns what `wrap` makes of them."""

    def __init__(self, heads: int, wrap) -> None:
        super().__init__()
        self.heads = nn.ModuleList(smooth_network() for _ in range(heads))
        self.wrap = wrap

    def forward(self, x):
        return self.wrap(*(head(x) for head in self.heads))


def test_auxiliary_and_other_outputs():
    assert set(AUXILIARY) == {"GoogLeNetOutputs", "InceptionOutputs"}
    x = torch.randn(5, 3, 8, 8, dtype=torch.float64)
    model = _Heads(3, GoogLeNetOutputs)
    out = objective_of(model)(x, Y)
    losses = [F.cross_entropy(head(x), Y) for head in model.heads]
    torch.testing.assert_close(out.ce, (losses[0] + 0.3 * (losses[1] + losses[2])).detach())
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(out.penalty, densreg.density_penalty(model.heads[0](leaf), leaf).detach())
    dictionary = _Heads(1, lambda logits: {"out": logits})
    with pytest.raises(TypeError, match=r"return a tensor.*got dict.*output="):
        objective_of(dictionary)(x, Y)
    torch.testing.assert_close(
        objective_of(dictionary, output=lambda o: o["out"])(x, Y).logits, dictionary.heads[0](x).detach()
    )


# --------------------------------------------------------------------------------------------------------------------
# half precision


def _conv_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU(), nn.Conv2d(8, 8, 3), nn.GELU(), nn.Flatten(), nn.Linear(128, 7))


def _gradients_under(dtype, compiler, model, x, coeff=1.0, scale=None, criterion=nothing) -> list[Tensor]:
    objective = objective_of(model, compiler, coeff, criterion=criterion)
    model.zero_grad()
    with torch.autocast("cpu", dtype):
        out = objective(x, Y, loss_scale=scale)
    incoming = torch.ones(()) if scale is None else torch.tensor(scale)
    out.loss.backward(incoming)
    return [g / incoming for g in gradients(model)]


@pytest.mark.parametrize("compiler", [None, "aot_eager"])
@pytest.mark.parametrize(
    ("dtype", "scale", "coeff"),
    [(torch.bfloat16, None, 1.0), (torch.float16, 1024.0, 1.0), (torch.float16, 2.0**16, 1e3)],
)
def test_autocast(dtype, scale, coeff, compiler, fresh_dynamo):
    """Large coefficients do not overflow."""
    model = _conv_net()
    x = torch.randn(5, 3, 8, 8)
    _, expected = by_autograd(copy.deepcopy(model).double(), x.double(), Y, coeff, criterion=nothing)
    error = relative_error(_gradients_under(dtype, compiler, model, x, coeff, scale), expected)
    assert error < (0.05 if dtype == torch.bfloat16 else 0.01)


@pytest.mark.parametrize("options", [{"compile": False}, {"backend": "aot_eager"}, {"path": "directional"}])
def test_autocast_over_several_steps(options, fresh_dynamo):
    """It keeps the weights as it has cast them until its end."""
    model, x = _conv_net(), torch.randn(5, 3, 8, 8)
    objective = RegularizedObjective(model, 1.0, criterion=nothing, **options)

    def step():
        objective.zero_grad()
        loss = objective(x, Y).loss
        loss.backward()
        with torch.no_grad():
            logits = objective(x, Y).logits
        return gradients(model), loss.detach(), logits, objective.penalty(x)

    with torch.autocast("cpu", torch.bfloat16):
        step()
        with torch.no_grad():
            for w in model.parameters():
                w.mul_(1.2)
        found = step()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(found, step())
    _, expected = by_autograd(copy.deepcopy(model).double(), x.double(), Y, 1.0, criterion=nothing)
    assert relative_error(found[0], expected) < 0.05


@pytest.mark.parametrize("compiler", [None, "aot_eager"])
def test_tiny_gradients_survive_float16(compiler, fresh_dynamo):
    """A penalty whose gradients lie below float16's range, in the score and in the weights."""
    model = _conv_net()
    with torch.no_grad():
        model[5].weight.mul_(1e-2)
    x = torch.randn(5, 3, 8, 8)
    _, expected = by_autograd(copy.deepcopy(model).double(), x.double(), Y, 1e-4, criterion=nothing)
    assert float(expected[0].abs().max()) < 6e-8, "the smallest number of float16"
    survived = _gradients_under(torch.float16, compiler, model, x, 1e-4, scale=2.0**16)
    assert relative_error(survived, expected) < 0.01
    lost = _gradients_under(torch.float16, compiler, model, x, 1e-4, scale=1.0)
    assert relative_error(lost, expected) > 0.05, "this measure would see what the scale is for"


class _Halves(nn.Module):
    """Computes in float16, whatever it is given."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 7)).half()

    def forward(self, a, b=None):
        return self.net(a.half() if b is None else a.half() + b.half())


def test_float16_without_a_scale_is_refused():
    model, x = _conv_net(), torch.randn(5, 3, 8, 8)
    refused = pytest.raises(ValueError, match=r"loss_scale.*scaler\.scale")
    with torch.autocast("cpu", torch.float16), refused:
        objective_of(model)(x, Y)
    x = torch.randn(5, 4)
    for given in (x.half(), x, (x, x.half())):
        with refused:
            objective_of(_Halves())(given, Y)
    objective_of(_Halves())(x, Y, loss_scale=1.0)


def test_grad_scaler():
    model = _conv_net()
    x = torch.randn(5, 3, 8, 8)
    _, expected = by_autograd(copy.deepcopy(model).double(), x.double(), Y, 0.5)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    with torch.autocast("cpu", torch.float16):
        out = objective_of(model)(x, Y, loss_scale=scaler.scale(torch.ones(())))
    scaler.scale(out.loss).backward()
    scaler.unscale_(optimizer)
    assert relative_error(gradients(model), expected) < 0.01
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**12


def test_casting_the_model_keeps_the_coefficient():
    objective = RegularizedObjective(_conv_net(), 0.1)
    assert float(objective.to(torch.bfloat16).coeff) == pytest.approx(0.1, rel=1e-7)
    assert "coeff" not in objective.state_dict()
    assert {k.removeprefix("model.") for k in objective.state_dict()} == {*objective.model.state_dict(), "_extra_state"}


# --------------------------------------------------------------------------------------------------------------------
# company: checkpointing, compiled models, errors


@pytest.mark.parametrize("compiler", [None, "aot_eager"])
def test_activation_checkpointing(compiler, fresh_dynamo):
    model, twin, x = twins()
    loss, expected = by_autograd(twin, x, Y, 0.5)
    out = objective_of(nn.Sequential(Checkpointed(model[:3]), model[3:]), compiler)(x, Y)
    out.loss.backward()
    torch.testing.assert_close(out.loss.detach(), loss)
    assert relative_error(gradients(model), expected) < 1e-10


class _Attention(nn.Module):
    """Of [B, 6], as 3 tokens of width 2."""

    def __init__(self, layer):
        super().__init__()
        self.in_proj, self.layer = nn.Linear(2, 24), layer

    def forward(self, x):
        q, k, v = self.in_proj(x.unflatten(1, (3, 2))).chunk(3, 2)
        if self.layer is None:
            return F.scaled_dot_product_attention(q, k, v).flatten(1)
        return self.layer(q, k, v, need_weights=False)[0].flatten(1)


@pytest.mark.parametrize("layer", ["function", "MultiheadAttention"])
@pytest.mark.parametrize("compiler", [None, "aot_eager"])
def test_activation_checkpointing_of_attention(compiler, layer, fresh_dynamo):
    """Of which torch has no second derivative: what is computed again has to be the replacement, too."""

    attention = _Attention(None if layer == "function" else nn.MultiheadAttention(8, 2, batch_first=True))
    model, x = Net(attention, 24).double(), torch.randn(5, 4, dtype=torch.float64)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        _, expected = by_autograd(copy.deepcopy(model), x, Y, 0.5, criterion=nothing)
    model.body = Checkpointed(attention)
    objective_of(model, compiler, criterion=nothing)(x, Y).loss.backward()
    assert relative_error(gradients(model), expected) < 1e-10


@pytest.mark.parametrize("stance", ["default", "force_eager"])
@pytest.mark.parametrize(
    "options", [{"compile": False}, {"backend": "aot_eager"}, {"path": "directional"}, {"head": "head"}], ids=str
)
def test_hooks_of_parameters_see_the_gradient_once(options, stance, fresh_dynamo):
    options = {"backend": "aot_eager", **options}
    x = torch.randn(5, 4)
    model = Net(nn.Tanh())
    twin = copy.deepcopy(model)
    calls = []
    for w in model.parameters():
        w.register_hook(lambda g: calls.append(1) or 0.5 * g)
    for m in (model, twin):
        with torch.compiler.set_stance(stance):
            RegularizedObjective(m, 1.0, **options)(x, Y).loss.backward()
    assert len(calls) == len(list(model.parameters()))
    assert relative_error(gradients(model), [0.5 * g for g in gradients(twin)]) < 1e-6


@pytest.mark.parametrize("options", [{}, {"path": "directional"}, {"interval": 2}])
def test_own_criterion_gets_wide_logits(options):
    model = Net(nn.Tanh())
    objective = RegularizedObjective(model, 0.1, compile=False, criterion=nn.CrossEntropyLoss(), **options)
    for _ in range(2):
        model.zero_grad()
        with torch.autocast("cpu", torch.float16):
            out = objective(torch.randn(5, 4), Y, loss_scale=65536.0)
        (65536 * out.loss).backward()
        assert out.ce.dtype == torch.float32
        assert all(g.isfinite().all() for g in gradients(model))


def test_pickle_and_deepcopy(fresh_dynamo):
    objective = objective_of(Net(nn.Tanh()), "aot_eager")
    x = torch.randn(5, 4)
    loss = objective(x, Y).loss
    for other in (pickle.loads(pickle.dumps(objective)), copy.deepcopy(objective)):
        torch.testing.assert_close(other(x, Y).loss, loss)


def test_threads(fresh_dynamo):
    x = torch.randn(5, 4)
    hardsigmoid = F.hardsigmoid
    errors = []

    def train():
        try:
            objective = objective_of(Net(nn.Hardsigmoid()), "aot_eager")
            for _ in range(5):
                objective(x, Y).loss.backward()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=train) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert F.hardsigmoid is hardsigmoid
    assert not _torch.traces_autograd()


@pytest.mark.parametrize("compiler", [None, "aot_eager"])
@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_model_is_taken_as_it_was(in_place, compiler, fresh_dynamo):
    model, twin, x = twins()
    if in_place:
        model.compile(backend="aot_eager")
    objective = objective_of(model if in_place else torch.compile(model, backend="aot_eager"), compiler)
    assert objective.model is model
    objective(x, Y).loss.backward()
    assert relative_error(gradients(model), by_autograd(twin, x, Y, 0.5)[1]) < 1e-10


@pytest.mark.parametrize(
    ("name", "value", "error", "match"),
    [
        ("coeff", -1.0, ValueError, "coeff must be finite and at least 0, got -1"),
        ("coeff", math.nan, ValueError, "coeff must be finite"),
        ("coeff", "1", TypeError, "coeff must be a number, got str"),
        (
            "coeff",
            torch.ones((), requires_grad=True),
            ValueError,
            "coeff must be a constant, got a tensor that requires",
        ),
        ("interval", 0, ValueError, "interval must be at least 1, got 0"),
        ("interval", 1.5, TypeError, "interval must be an int or None, got float"),
        ("fraction", 0, ValueError, r"fraction must lie in \(0, 1\], got 0"),
        ("fraction", 1.5, ValueError, "fraction must lie in"),
        ("p", 0.5, ValueError, "p must be at least 1"),
        ("path", "best", ValueError, "directional; got 'best'"),
        ("central", "no", TypeError, "central must be True or False, got 'no'"),
        ("compile", None, TypeError, "compile must be True or False, got None"),
        ("criterion", 3, TypeError, "criterion must be callable or None, got int"),
        ("regularizer", 3, TypeError, "regularizer must be a name or a Regularizer, got int"),
        ("model", "resnet", TypeError, "model must be an nn.Module, got str"),
        ("model", nn.DataParallel(nn.Linear(2, 2)), TypeError, "wrapped in DataParallel.*wrap the objective"),
    ],
)
def test_options_are_checked_when_given_and_when_assigned(name, value, error, match):
    given = {"model": _conv_net(), "coeff": 0.1, "compile": False}
    objective = RegularizedObjective(**given)
    before = repr(objective)
    with pytest.raises(error, match=match):
        RegularizedObjective(**{**given, name: value})
    with pytest.raises(error, match=match):
        setattr(objective, "compiled" if name == "compile" else name, value)
    assert repr(objective) == before


def test_options_beside_a_regularizer_are_checked():
    hessian = densreg.regularizers.Hessian()
    objective = objective_of(_conv_net(), regularizer=hessian)
    for name, value, match in [
        ("p", 4, "p is 4.0 beside a regularizer with options of its own, Hessian"),
        ("path", "taylor", "path is 'taylor' beside"),
        ("path", "directional", "is for the density penalty"),
    ]:
        before = repr(objective)
        with pytest.raises(ValueError, match=match):
            objective_of(_conv_net(), regularizer=hessian, **{name: value})
        with pytest.raises(ValueError, match=match):
            setattr(objective, name, value)
        assert repr(objective) == before


def test_an_unknown_compiler_is_an_error_when_it_is_assigned():
    compiled = RegularizedObjective(_conv_net(), 0.1)
    with pytest.raises(Exception, match="bogus"):
        compiled.backend = "bogus"
    assert compiled.backend == "inductor"


@pytest.mark.parametrize("compiler", [None, "aot_eager"])
def test_errors_of_the_call(compiler, fresh_dynamo):
    x = torch.randn(5, 3, 8, 8)

    class Closure(nn.Module):
        def __init__(self, function):
            super().__init__()
            self.function = function
            self.w = nn.Parameter(torch.randn(192, 7))

        def forward(self, x):
            return self.function(x, self.w)

    def objective(function):
        return objective_of(Closure(function), compiler)

    def linear(x, w):
        return x.flatten(1) @ w

    with pytest.raises(TypeError, match=r"floating point.*got torch\.uint8"):
        objective(linear)(x.to(torch.uint8), Y)
    with pytest.raises(TypeError, match="x must be a tensor, a sequence of inputs or a mapping to them, got int"):
        objective(linear)(3, Y)
    with pytest.raises(TypeError, match=r"x\[1\] is a list with floating-point tensors in it"):
        objective(linear)((x, [x]), Y)
    soft = torch.rand(5, 7, requires_grad=True)
    for target in (soft, [soft.sum()], {"soft": soft}):
        with pytest.raises(ValueError, match="the target must not require grad"):
            objective(linear)(x, target)
    for coeff in (-1.0, math.nan):
        with pytest.raises(ValueError, match="coeff must be finite and at least 0"):
            objective(linear).coeff = torch.tensor(coeff)
    with pytest.raises(ValueError, match="logits do not depend on x"):
        objective(lambda x, w: linear(x.detach(), w))(x, Y)
    with pytest.raises(TypeError, match=r"expected the model to return a tensor of logits .*, got str"):
        objective(lambda x, w: "logits")(x, Y)
    with pytest.raises(ValueError, match=r"logits must have shape \[batch, classes\]"):
        objective(lambda x, w: linear(x, w).sum(1))(x, Y)
    for criterion, given in ((lambda f, t: 1.0, "float"), (lambda f, t: f.sum(1), r"shape \[5\]")):
        with pytest.raises(TypeError, match=f"criterion must return a tensor of shape .., got {given}"):
            objective_of(Closure(linear), compiler, criterion=criterion)(x, Y)
    with pytest.raises(TypeError, match="target must be a tensor, got tuple"):
        objective_of(Closure(linear), compiler, criterion=nothing, fraction=0.5)(x, (Y, Y))
    with pytest.raises(TypeError, match=r"target must hold int64 class indices, got torch\.float32: .*criterion="):
        objective(linear)(x, Y.float())
    with pytest.raises(TypeError, match=r"got torch\.int32: target\.long\(\)"):
        objective(linear)(x, Y.int())
    with pytest.raises(RuntimeError, match=r"cannot be differentiated twice.*density_loss"):
        objective(linear)(x, Y).loss.backward(create_graph=True)
    frozen = objective(linear)
    frozen.model.w.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of the model requires grad"):
        frozen(x, Y)


def test_weights_that_are_given_for_the_call_are_trained():
    """Computed from others, which are then what gets the gradient."""
    torch.manual_seed(0)
    model, x = Net(nn.Tanh()).double(), torch.randn(5, 4, dtype=torch.float64)
    objective = objective_of(model)
    leaves = {f"model.{name}": w.detach().clone().requires_grad_() for name, w in model.named_parameters()}
    given = {name: 1.0 * w for name, w in leaves.items()}
    torch.func.functional_call(objective, given, (x, Y)).loss.backward()
    objective(x, Y).loss.backward()
    assert relative_error([w.grad for w in leaves.values()], gradients(model)) < 1e-12


@pytest.mark.parametrize(
    ("compiler", "before", "after"),
    [
        ("eager", {}, {"p": math.inf}),
        (None, {}, {"p": 4, "path": "taylor"}),
        (None, {"regularizer": "input_gradient"}, {"p": 1}),
        (None, {"p": 1, "path": "directional"}, {"path": "max_shift", "p": 2}),
        ("eager", {}, {"path": "directional", "p": 4, "central": True}),
        ("eager", {}, {"regularizer": "loss_gradient"}),
        (None, {}, {"regularizer": densreg.regularizers.Density(4)}),
        (None, {}, {"interval": 1, "coeff": 3}),
        ("eager", {"interval": None}, {"interval": 2}),
        (None, {}, {"fraction": 0.4}),
        (None, {}, {"criterion": lambda f, y: f.square().sum()}),
        ("eager", {"criterion": nn.CrossEntropyLoss(label_smoothing=0.5)}, {"criterion": nothing}),
        (None, {"regularizer": "input_gradient"}, {"output": nn.Tanh(), "labels": lambda y: 0 * y}),
    ],
)
def test_options_that_are_assigned_count(compiler, before, after, fresh_dynamo):
    """As if they had been given to the constructor, also where a step was compiled before; the penalty alone."""
    before = {"criterion": nothing, **before}
    model, x = Net(nn.Tanh()).double(), torch.randn(5, 4, dtype=torch.float64)
    twin = copy.deepcopy(model)
    changed = objective_of(model, compiler, **before)
    changed(x, Y)
    for name, value in after.items():
        setattr(changed, name, value)
    changed.calls = 0
    outs = []
    for objective in (changed, objective_of(twin, **{**before, **after})):
        torch.manual_seed(1)
        outs.append(objective(x, Y))
        outs[-1].loss.backward()
    torch.testing.assert_close(outs[0][1:], outs[1][1:], equal_nan=True)
    assert relative_error(gradients(model), gradients(twin)) < 1e-12
    assert sum(g.square().sum() for g in gradients(twin)) > 1e-8
    torch.testing.assert_close(changed.penalty(x, Y), objective.penalty(x, Y))


def test_assigned_options_of_the_compiler(fresh_dynamo):
    model, x = Net(nn.Tanh()), torch.randn(5, 4)
    counter = CompileCounterWithBackend("eager")
    objective = objective_of(model)
    objective.compiled, objective.backend = True, counter
    objective(x, Y)
    assert counter.frame_count == 1
    objective.compiled = False
    objective(x[:3], Y[:3])
    assert counter.frame_count == 1
    with pytest.raises(AttributeError, match=r"assign to objective\.compiled"):
        objective.compile = False
    other = Net(nn.Tanh())
    objective.model = torch.compile(other, backend=counter)
    assert objective.model is other


@pytest.mark.parametrize("compiler", [None, "aot_eager"])
def test_a_criterion_does_not_change_what_is_penalized(compiler, fresh_dynamo):
    """Not even one that changes the logits in place."""
    model, twin, x = twins()
    objective = objective_of(model, compiler, criterion=lambda f, y: F.cross_entropy(f.mul_(0.5), y))
    out = objective(x, Y)
    out.loss.backward()
    loss, expected = by_autograd(twin, x, Y, 0.5, criterion=lambda f, y: F.cross_entropy(f * 0.5, y))
    torch.testing.assert_close(out.loss.detach(), loss)
    assert relative_error(gradients(model), expected) < 1e-10


@pytest.mark.parametrize("compiler", [None, "aot_eager"])
def test_inside_the_users_torch_compile(compiler, fresh_dynamo):
    model, twin, x = twins()
    objective = objective_of(model, compiler, criterion=nothing)
    _, expected = by_autograd(twin, x, Y, 0.5, criterion=nothing)
    step = torch.compile(lambda x, y: objective(x + 0, y).loss, backend="aot_eager")
    for call in (torch.compile(objective, backend="aot_eager"), step):
        model.zero_grad()
        out = call(x, Y)
        getattr(out, "loss", out).backward()
        assert relative_error(gradients(model), expected) < 1e-10
    with pytest.raises(Exception, match=r"compiles its own step: call it outside of torch\.compile"):
        torch.compile(lambda x, y: objective(x, y).loss, backend="aot_eager", fullgraph=True)(x, Y)


class _Contains(nn.Module):
    """As a LightningModule whose objective was given the module itself."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 7)
        self.objective = objective_of(self)

    def forward(self, x):
        return self.net(x)


@pytest.mark.parametrize(
    "use",
    [nn.Module.train, nn.Module.double, nn.Module.state_dict, repr, lambda m: m.load_state_dict({}, strict=False)],
)
def test_a_model_that_contains_its_objective(use):
    with pytest.raises(ValueError, match=r"the model contains this very objective.*RegularizedObjective\(self\.net"):
        use(_Contains())


def test_state_dict_holds_tensors():
    objective = objective_of(Net(nn.Tanh()), interval=2)
    objective(torch.randn(5, 4), Y)
    state = objective.state_dict()
    assert all(type(value) is Tensor for value in state.values())
    for calls in (state["_extra_state"], {"calls": 1}):  # as it was once
        other = objective_of(Net(nn.Tanh()), interval=2)
        other.load_state_dict({**state, "_extra_state": calls})
        assert other.calls == 1


@pytest.mark.parametrize("regularizer", ["density", "input_gradient"])
def test_the_penalty_in_inference_mode(regularizer):
    """As Lightning validates."""
    objective, x = objective_of(Net(nn.BatchNorm1d(6)), regularizer=regularizer), torch.randn(5, 4)
    expected = objective.penalty(x, Y)
    with torch.inference_mode():
        assert torch.equal(objective.penalty(x + 0, Y + 0), expected)
        assert objective(x + 0, Y).penalty.isnan()


def test_what_the_steps_found_out_is_not_pickled():
    """It names the classes of the model's modules, also of those that were replaced, which may be local."""

    class Local(nn.Identity):
        pass

    model, x = Net(Local()).double(), torch.randn(5, 4, dtype=torch.float64)
    objective = objective_of(model, None, fraction=0.4)
    objective(x, Y)
    model.body = nn.Identity()
    model.load_state_dict(pickle.loads(pickle.dumps(objective)).model.state_dict())
