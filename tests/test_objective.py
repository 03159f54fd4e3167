"""RegularizedObjective: the penalty's gradient alone, the whole step, and what a training loop does with it."""

from __future__ import annotations

import collections
import copy
import io
import math
import pickle
import re
import sys
import threading
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference import Checkpointed, Layer, Once, Product, Sine, Subclass, by_autograd, gradients, nothing
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._higher_order_ops.map import map as torch_map
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop
from torch.nn.utils import prune

import densreg
from benchmarks.second_order import CLASSES, problem, reference, relative_error
from densreg import RegularizedObjective, _torch, compiling
from densreg.compiling import CheckedBackend, explanation
from densreg.objective import ObjectiveOutput
from densreg.paths import PATHS
from densreg.step import AUXILIARY

pytestmark = pytest.mark.compile

COMPILERS = (None, "aot_eager", pytest.param("inductor", marks=pytest.mark.long))
Y = torch.tensor([0, 1, 2, 3, 4])


def objective_of(model: nn.Module, compiler: str | None = None, coeff: float = 0.5, **options) -> RegularizedObjective:
    return RegularizedObjective(model, coeff, compile=compiler is not None, backend=compiler or "inductor", **options)


def twins() -> tuple[nn.Module, nn.Module, Tensor]:
    model, x = problem(torch.float64)
    return model, copy.deepcopy(model), x.detach()


# --------------------------------------------------------------------------------------------------------------------
# the penalty alone


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("path", PATHS)
def test_penalty_alone(path, compiler, fresh_dynamo):
    classes = 3 if path == "per_class" else CLASSES  # unrolled over the classes, 7 take a minute to compile
    model, x = problem(torch.float64, classes=classes)
    objective_of(model, compiler, 1.0, path=path, criterion=nothing)(x, Y % classes).loss.backward()
    assert relative_error(gradients(model), reference(2, classes)) < 1e-10


@pytest.mark.parametrize("compiler", [None, "aot_eager"])
@pytest.mark.parametrize("p", [1, 1.5, 4, math.inf])
def test_penalty_alone_in_other_norms(p, compiler, fresh_dynamo):
    model, x = problem(torch.float64)
    objective_of(model, compiler, 1.0, p=p, criterion=nothing)(x, Y).loss.backward()
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


def test_gradients_are_nobody_elses_memory():
    model, x = problem(torch.float64)
    loss = objective_of(model)(x, Y).loss
    loss.backward(retain_graph=True)
    first = [g.clone() for g in gradients(model)]
    for w in model.parameters():
        w.grad.zero_()  # as an optimizer may
    for _ in range(2):
        again = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        assert relative_error(again, first) < 1e-12
        for g in again:
            g.data.zero_()
    loss.backward()
    assert relative_error(gradients(model), first) < 1e-12


@pytest.mark.parametrize("compiler", [None, "aot_eager"])
def test_gradients_do_not_share_memory(compiler, fresh_dynamo):
    """torch.autograd.grad may hand out one tensor and a view of it; accumulating would then count both twice."""

    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.d, self.head = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(36)), nn.Linear(6, 7)

        def forward(self, x):
            return self.head(torch.tanh(F.linear(x, self.w + self.d.view(6, 6))))

    model, x = Sum().double(), torch.randn(5, 6, dtype=torch.float64)
    _, expected = by_autograd(copy.deepcopy(model), x, Y, 0.5, criterion=nothing)
    objective = objective_of(model, compiler, criterion=nothing)
    objective(x, Y).loss.backward()
    assert relative_error(gradients(model), expected) < 1e-10
    once = [g.clone() for g in gradients(model)]
    assert len({g.untyped_storage().data_ptr() for g in gradients(model)}) == len(once)
    objective(x, Y).loss.backward()
    assert relative_error(gradients(model), [2 * g for g in once]) < 1e-12


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


def _smooth() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 10), nn.Tanh(), nn.Linear(10, 7)).double()


def _part() -> Tensor:
    """The samples that the next step takes of five, with a fraction of 0.4."""
    torch.manual_seed(3)
    order = torch.randperm(5)
    torch.manual_seed(3)
    return order[3:]


@pytest.mark.parametrize("compiler", [None, "aot_eager"])
def test_fraction_of_a_model_without_batch_statistics(compiler, fresh_dynamo):
    torch.manual_seed(0)
    model = _smooth()
    x = torch.randn(5, 3, 8, 8, dtype=torch.float64)
    objective = objective_of(model, compiler, fraction=0.4)
    plain, _ = by_autograd(model, x, Y, 0.0)
    seen = []
    for _ in range(40):
        out = objective(x, Y)
        torch.testing.assert_close(out.ce, plain)
        torch.testing.assert_close(out.logits, model(x).detach())
        seen.append(float(out.penalty))
    leaf = x.clone().requires_grad_()
    norms = densreg.density_penalty(model(leaf), leaf, reduction="none").detach()
    pairs = {round(float((norms[i] + norms[j]) / 2), 10) for i in range(5) for j in range(i)}
    assert {round(s, 10) for s in seen} <= pairs, "each is the mean of two samples' norms"
    assert len({round(s, 10) for s in seen}) > 5
    # The gradient is that of the cross-entropy of all and the penalty of these two.
    part = x[_part()].requires_grad_()
    model.zero_grad()
    objective(x, Y).loss.backward()
    loss = F.cross_entropy(model(x), Y) + 0.5 * densreg.density_penalty(model(part), part)
    expected = torch.autograd.grad(loss, list(model.parameters()))
    assert relative_error(gradients(model), expected) < 1e-10


@pytest.mark.parametrize("compiler", [None, "aot_eager"])
def test_fraction_with_batch_statistics(compiler, fresh_dynamo):
    model, twin, x = twins()
    part = x[_part()].requires_grad_()
    out = objective_of(model, compiler, fraction=0.4)(x, Y)
    out.loss.backward()
    ce = F.cross_entropy(twin(x), Y)
    for a, b in zip(model.buffers(), twin.buffers(), strict=True):  # those of one plain step
        torch.testing.assert_close(a, b)
    expected = torch.autograd.grad(ce + 0.5 * densreg.density_penalty(twin(part), part), list(twin.parameters()))
    assert relative_error(gradients(model), expected) < 1e-10
    torch.testing.assert_close(out.ce, ce)


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


def test_several_inputs():
    model = Product().double()
    u, v = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    out = objective_of(model, criterion=nothing)((u, v), Y)
    leaves = (u.clone().requires_grad_(), v.clone().requires_grad_())
    penalty = densreg.density_penalty(model(*leaves), leaves)
    torch.testing.assert_close(out.penalty, penalty.detach())
    out.loss.backward()
    assert relative_error(gradients(model), torch.autograd.grad(0.5 * penalty, list(model.parameters()))) < 1e-10


GoogLeNetOutputs = collections.namedtuple("GoogLeNetOutputs", "logits aux_logits2 aux_logits1")


class _Heads(nn.Module):
    """Several heads on one body; returns what `wrap` makes of them."""

    def __init__(self, heads: int, wrap) -> None:
        super().__init__()
        self.heads = nn.ModuleList(_smooth() for _ in range(heads))
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
    objective = RegularizedObjective(model, 1.0, **options)

    def step():
        objective.zero_grad()
        loss = objective(x, Y).loss
        loss.backward()
        with torch.no_grad():
            ce = objective(x, Y).ce
        return gradients(model), loss.detach(), ce, objective.penalty(x)

    with torch.autocast("cpu", torch.bfloat16):
        step()
        with torch.no_grad():
            for w in model.parameters():
                w.mul_(1.2)
        found = step()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(found, step())


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
    model, x = _Net(attention, 24).double(), torch.randn(5, 4, dtype=torch.float64)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        _, expected = by_autograd(copy.deepcopy(model), x, Y, 0.5, criterion=nothing)
    model.body = Checkpointed(attention)
    objective_of(model, compiler, criterion=nothing)(x, Y).loss.backward()
    assert relative_error(gradients(model), expected) < 1e-10


class _Net(nn.Module):
    """Whatever a test needs of a body, and a linear head."""

    def __init__(self, body, width=6):
        super().__init__()
        self.first, self.body, self.head = nn.Linear(4, 6), body, nn.Linear(width, 7)

    def forward(self, x):
        return self.head(self.body(self.first(x)))


class _Aliased(_Net):
    """One BatchNorm by two names."""

    def __init__(self):
        super().__init__(nn.BatchNorm1d(6))
        self.layers = nn.ModuleList([self.first, self.body, self.head])


@pytest.mark.parametrize(
    "options",
    [
        {"compile": False, "fraction": 0.4},
        {"backend": "aot_eager", "fraction": 0.4},
        {"path": "directional", "central": True},
    ],
)
def test_a_module_by_two_names_keeps_its_statistics(options, fresh_dynamo):
    model = _Aliased()
    mean = model.body.running_mean
    objective = RegularizedObjective(model, 0.1, **options)
    x = torch.randn(5, 4)
    objective.penalty(x)
    objective(x, Y)
    assert model.body.running_mean is mean
    assert int(model.body.num_batches_tracked) == 1


@pytest.mark.parametrize("stance", ["default", "force_eager"])
@pytest.mark.parametrize(
    "options", [{"compile": False}, {"backend": "aot_eager"}, {"path": "directional"}, {"head": "head"}], ids=str
)
def test_hooks_of_parameters_see_the_gradient_once(options, stance, fresh_dynamo):
    options = {"backend": "aot_eager", **options}
    x = torch.randn(5, 4)
    model = _Net(nn.Tanh())
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
    model = _Net(nn.Tanh())
    objective = RegularizedObjective(model, 0.1, compile=False, criterion=nn.CrossEntropyLoss(), **options)
    for _ in range(2):
        model.zero_grad()
        with torch.autocast("cpu", torch.float16):
            out = objective(torch.randn(5, 4), Y, loss_scale=65536.0)
        (65536 * out.loss).backward()
        assert out.ce.dtype == torch.float32
        assert all(g.isfinite().all() for g in gradients(model))


@pytest.mark.parametrize("options", [{"interval": 2}, {"fraction": 0.4}, {"path": "directional", "interval": 2}])
@pytest.mark.parametrize("compiler", [None, "aot_eager"])
def test_x_is_detached(compiler, options, fresh_dynamo):
    leaf = torch.randn(5, 4, requires_grad=True)
    plain = leaf.detach()
    with torch.inference_mode():
        inference = torch.randn(5, 4)
    objective = objective_of(_Net(nn.Tanh()), compiler, **options)
    for x in (leaf, leaf.sin(), leaf.sin(), leaf, plain, plain, inference):  # where an interval is 2, every other plain
        objective(x, Y).loss.backward()
    assert leaf.grad is None
    assert not plain.requires_grad


def test_pickle_and_deepcopy(fresh_dynamo):
    objective = objective_of(_Net(nn.Tanh()), "aot_eager")
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
            objective = objective_of(_Net(nn.Hardsigmoid()), "aot_eager")
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


def test_statistics_of_instance_norm_see_the_whole_batch():
    model = nn.Sequential(nn.InstanceNorm2d(3, track_running_stats=True), nn.Flatten(), nn.Linear(192, 7))
    twin = copy.deepcopy(model)
    x = torch.randn(5, 3, 8, 8)
    objective_of(model, fraction=0.4)(x, Y)
    twin(x)
    torch.testing.assert_close(model[0].running_mean, twin[0].running_mean)


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


def test_weights_that_are_given_for_the_call_are_trained():
    """Computed from others, which are then what gets the gradient."""
    torch.manual_seed(0)
    model, x = _Net(nn.Tanh()).double(), torch.randn(5, 4, dtype=torch.float64)
    objective = objective_of(model)
    leaves = {f"model.{name}": w.detach().clone().requires_grad_() for name, w in model.named_parameters()}
    given = {name: 1.0 * w for name, w in leaves.items()}
    torch.func.functional_call(objective, given, (x, Y)).loss.backward()
    objective(x, Y).loss.backward()
    assert relative_error([w.grad for w in leaves.values()], gradients(model)) < 1e-12


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


def test_no_silent_eager(fresh_dynamo):
    """What cannot be one graph is an error that says so, and leaves the model as it was."""

    def breaks(x):
        torch._dynamo.graph_break()
        return x

    model = nn.Sequential(nn.BatchNorm2d(3), Layer(breaks), nn.Flatten(), nn.Linear(192, 7))
    with pytest.raises(RuntimeError, match=r"could not be compiled as one graph.*compile=False"):
        RegularizedObjective(model, 0.5, backend="aot_eager")(torch.randn(5, 3, 8, 8), Y)
    assert int(model[0].num_batches_tracked) == 0
    assert torch.equal(model[0].running_mean, torch.zeros(3))


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_a_function_that_would_lose_second_order_is_refused(compiler, fresh_dynamo):
    def net():
        torch.manual_seed(0)
        return _Net(Layer(lambda x: Sine.apply(x))).double()

    x = torch.randn(5, 4, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"autograd\.Function.*allow_in_graph.*compile=False"):
        RegularizedObjective(net(), 1.0, backend=compiler)(x, Y)
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
    nets, x = [_Net(Layer(f)).double() for f in HIGHER_ORDER[name]], torch.randn(5, 4, dtype=torch.float64)
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


LEAVE_AUTOGRAD = {
    "no_grad": _NoGrad,
    "numpy": _Numpy,
    "once_differentiable": Once,
    "operator in a backward": _OfOperator,
    "operator": lambda t: torch.ops.densreg_tests.sine(t),
    "sparse": _sparse,
    "chunked": lambda t: F.linear_cross_entropy(t, t.T @ t, Y, reduction="sum", options=CHUNKED) * t,
}
CHUNKED = getattr(nn, "LinearCrossEntropyOptions", lambda **_: None)(batch_chunk_size=2)


@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered:UserWarning")
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
    model = _Net(Layer(lambda t: function(t) + t.tanh() if beside else function(t)))
    words = r"cannot be differentiated again, .*directional|nothing is registered with autograd, .*register_autograd"
    with pytest.raises(RuntimeError, match=words):
        objective_of(model.double(), compiler)(torch.randn(5, 4, dtype=torch.float64), Y)


@pytest.mark.parametrize("interval", [1, None], ids=["penalized", "plain"])
def test_an_operator_that_is_differentiated_in_eager_mode_alone(interval, operators, fresh_dynamo):
    """torch.compile takes its result for a constant, without an error."""
    model, x = _Net(Layer(lambda t: torch.ops.densreg_tests.own(t) + t)), torch.randn(5, 4)
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
    model = _Net(Layer(layer)).double()
    plain = _Net(Layer(lambda t: 3 * t.sin() + 2 * t.detach().sin())).double()
    plain.load_state_dict(model.state_dict())
    objective_of(model, compiler, 1.0, criterion=nothing)(x, Y).loss.backward()
    assert relative_error(gradients(model), by_autograd(plain, x, Y, 1.0, criterion=nothing)[1]) < 1e-10


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


@pytest.mark.parametrize("compiler", COMPILERS)
def test_weight_norm_of_a_weight_that_depends_on_x(compiler, fresh_dynamo):
    model, plain = (_Net(_OwnWeights(formula)).double() for formula in (False, True))
    plain.load_state_dict(model.state_dict())
    x = torch.randn(5, 4, dtype=torch.float64)
    objective_of(model, compiler, 1.0, criterion=nothing)(x, Y).loss.backward()
    assert relative_error(gradients(model), by_autograd(plain, x, Y, 1.0, criterion=nothing)[1]) < 1e-10


@pytest.mark.parametrize("compiler", [None, "aot_eager"])
def test_torch_func_inside_a_model(compiler, fresh_dynamo):
    nets, x = [], torch.randn(5, 4, dtype=torch.float64)
    for f in (torch.func.vmap(torch.func.grad(lambda u: u.sin().exp().sum())), lambda t: t.sin().exp() * t.cos()):
        torch.manual_seed(0)
        nets.append(_Net(Layer(f)).double())
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
    model = _Net(Layer(twice))
    model.layers = layers
    with pytest.raises(RuntimeError, match=r"one graph: .*nested_compile_region.*leave it out"):
        RegularizedObjective(model, 0.5, backend="aot_eager", interval=interval)(torch.randn(5, 4), Y)


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
    model, x = _Net(nn.Tanh()).double(), torch.randn(5, 4, dtype=torch.float64)
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
    model, x = _Net(nn.Tanh()), torch.randn(5, 4)
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
    other = _Net(nn.Tanh())
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
    objective = objective_of(_Net(nn.Tanh()), interval=2)
    objective(torch.randn(5, 4), Y)
    state = objective.state_dict()
    assert all(type(value) is Tensor for value in state.values())
    for calls in (state["_extra_state"], {"calls": 1}):  # as it was once
        other = objective_of(_Net(nn.Tanh()), interval=2)
        other.load_state_dict({**state, "_extra_state": calls})
        assert other.calls == 1


# --------------------------------------------------------------------------------------------------------------------
# tensor subclasses


class _Residual(nn.Module):
    """A part of its score does not go through the convolution, so that the other part would not be missed."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 2, 3, padding=1), nn.Linear(32, 5)

    def forward(self, x):
        return self.head((x + self.conv(x).tanh()).flatten(1))


@pytest.mark.parametrize("compiler", [None, "aot_eager"])
@pytest.mark.parametrize("kind", ["subclass", "tv_tensor"])
def test_a_subclass_as_input_and_target(kind, compiler, fresh_dynamo):
    model = _Residual().double()
    twin, x = copy.deepcopy(model), torch.randn(5, 2, 4, 4, dtype=torch.float64)
    _, expected = by_autograd(twin, x, Y, 1.0, criterion=nothing)
    given = x.as_subclass(Subclass) if kind == "subclass" else pytest.importorskip("torchvision.tv_tensors").Image(x)
    out = objective_of(model, compiler, 1.0, criterion=nothing)(given, Y.as_subclass(Subclass))
    out.loss.backward()
    assert relative_error(gradients(model), expected) < 1e-10
    assert type(out.logits) is Tensor


def test_subclasses_in_the_model(fresh_dynamo):
    model = _Residual().double()
    twin, x = copy.deepcopy(model), torch.randn(5, 2, 4, 4, dtype=torch.float64)
    _, expected = by_autograd(twin, x, Y, 1.0, criterion=nothing)
    model.conv.weight = nn.Parameter(model.conv.weight.detach().as_subclass(Subclass))
    objective_of(model, None, 1.0, criterion=nothing)(x, Y).loss.backward()
    assert relative_error(gradients(model), expected) < 1e-10
    with pytest.raises(RuntimeError, match=r"conv\.weight is a Subclass, a subclass of Tensor.*compile=False"):
        objective_of(model, "aot_eager")(x, Y)


# --------------------------------------------------------------------------------------------------------------------
# what is there to be looked at


@pytest.mark.parametrize("regularizer", ["density", "input_gradient"])
def test_the_penalty_in_inference_mode(regularizer):
    """As Lightning validates."""
    objective, x = objective_of(_Net(nn.BatchNorm1d(6)), regularizer=regularizer), torch.randn(5, 4)
    expected = objective.penalty(x, Y)
    with torch.inference_mode():
        assert torch.equal(objective.penalty(x + 0, Y + 0), expected)
        assert objective(x + 0, Y).penalty.isnan()


@pytest.mark.parametrize("compiler", [None, "eager"])
@pytest.mark.parametrize(
    "term",
    [
        lambda out: F.kl_div(out.logits.log_softmax(1), torch.full((5, 7), 1 / 7), reduction="batchmean"),
        lambda out: out.ce,
        lambda out: 0.5 * out.penalty,
    ],
)
def test_a_loss_term_that_would_train_nothing(term, compiler, fresh_dynamo):
    objective = objective_of(_Net(nn.Tanh()), compiler)
    parameters = list(objective.model.parameters())
    x = torch.randn(5, 4)
    for backward in (
        lambda loss: loss.backward(),
        lambda loss: loss.backward(inputs=parameters[-1:]),
        lambda loss: torch.autograd.grad(loss, parameters[:1]),
    ):
        out = objective(x, Y)
        with pytest.raises(RuntimeError, match=r"out\.logits, out\.ce or out\.penalty .* criterion=f"):
            backward(out.loss + term(out))
        with pytest.raises(RuntimeError, match="criterion=f"):
            backward(term(out))
    out = objective(x, Y)
    (out.loss + term(ObjectiveOutput(*(t.detach() for t in out)))).backward()  # a constant
    expected = gradients(objective.model)
    objective.model.zero_grad()
    objective(x, Y).loss.backward()
    assert relative_error(expected, gradients(objective.model)) < 1e-6


def test_what_is_looked_at_gives_no_warning(recwarn):
    out = objective_of(_Net(nn.Tanh()))(torch.randn(5, 4), Y)
    total = torch.zeros(())
    for scalar in (out.ce, out.penalty):
        assert float(scalar) == scalar.item() == float(scalar.numpy()) == float(copy.deepcopy(scalar))
        assert f"{scalar:.3f}" == f"{scalar.item():.3f}"
        assert math.isfinite(scalar)
        assert float(pickle.loads(pickle.dumps(scalar))) == scalar.item()
        total += scalar.detach()
    assert type(out.ce + 1) is Tensor
    (out.logits.argmax(1) == Y).float().mean().item()
    out.logits.tolist(), out.logits.detach().numpy(), out.logits.max(1), out.penalty.isnan()
    with pytest.raises(RuntimeError, match=r"Use tensor\.detach\(\)\.numpy\(\)"):
        out.logits.numpy()
    out.loss.backward()
    assert len(recwarn) == 0


# --------------------------------------------------------------------------------------------------------------------
# inputs


class _Masked(nn.Module):
    """As Hugging Face's models are called, and with what they return."""

    def __init__(self):
        super().__init__()
        self.first, self.kinds, self.head = nn.Linear(4, 6), nn.Embedding(3, 6), nn.Linear(6, 7)

    def forward(self, pixel_values, kind=None, attention_mask=None, flag=False, scale=None):
        h = (self.first(pixel_values) + self.kinds(kind)).tanh()
        h = h * attention_mask * (2 if flag else 1)
        return {"logits": self.head(h if scale is None else h * scale)}


def _masked() -> tuple[nn.Module, dict[str, Any]]:
    x = {"pixel_values": torch.randn(5, 4).double(), "kind": torch.tensor([0, 1, 2, 1, 0]), "flag": True}
    return _Masked().double(), {**x, "attention_mask": torch.rand(5, 6) > 0.3}


def _expected_of_masked(model, x, penalized=("pixel_values",)) -> tuple[Tensor, list[Tensor]]:
    leaves = [x[name].clone().requires_grad_() for name in penalized]
    logits = model(**{**x, **dict(zip(penalized, leaves, strict=True))})["logits"]
    score = torch.autograd.grad(torch.logsumexp(logits, 1).sum(), leaves, create_graph=True)
    penalty = torch.cat(score, 1).norm(dim=1).mean()
    return penalty.detach(), list(torch.autograd.grad(0.5 * penalty, list(model.parameters()), allow_unused=True))


@pytest.mark.parametrize(
    ("compiler", "options"),
    [(None, {}), ("eager", {}), (None, {"path": "directional", "central": True})],
)
@pytest.mark.parametrize("form", ["mapping", "sequence"])
def test_other_inputs_beside_the_penalized_one(form, compiler, options, fresh_dynamo):
    model, x = _masked()
    penalty, expected = _expected_of_masked(model, x)
    objective = objective_of(model, compiler, criterion=nothing, output=lambda o: o["logits"], **options)
    given = x if form == "mapping" else [x[name] for name in ("pixel_values", "kind", "attention_mask", "flag")]
    before = x["pixel_values"].clone()
    torch.testing.assert_close(objective.penalty(given), penalty)
    out = objective(given, Y)
    torch.testing.assert_close(out.penalty.detach(), penalty)
    out.loss.backward()
    expected = [torch.zeros_like(w) if g is None else g for w, g in zip(model.parameters(), expected, strict=True)]
    assert relative_error(gradients(model), expected) < (1e-5 if options else 1e-10)
    assert torch.equal(before, x["pixel_values"])
    with torch.no_grad():
        torch.testing.assert_close(objective(given, Y).logits, out.logits.detach())


def test_penalized_names_the_inputs():
    model, x = _masked()
    x["scale"] = torch.rand(5, 6).double()
    for penalized, names in ((None, ("pixel_values", "scale")), ("pixel_values",) * 2, (["scale"], ["scale"])):
        names = [names] if isinstance(names, str) else names
        objective = objective_of(model, output=lambda o: o["logits"], penalized=penalized)
        torch.testing.assert_close(objective(x, Y).penalty.detach(), _expected_of_masked(model, x, names)[0])
    with pytest.raises(ValueError, match=r"penalized names 'pixels', which is none of x's tensors: \['pixel_values'"):
        objective_of(model, penalized="pixels")(x, Y)
    with pytest.raises(TypeError, match=r"x\['kind'\] must be floating point to have a score, got torch\.int64"):
        objective_of(model, penalized="kind")(x, Y)
    with pytest.raises(TypeError, match=r"floating point to have a score, got torch\.int64, bool"):
        objective_of(model)({"kind": x["kind"], "flag": True}, Y)
    x["scale"] = x["scale"][:3]
    with pytest.raises(ValueError, match=r"x\['scale'\] must have shape \[5, \.\.\.\], .*got \[3, 6\]"):
        objective_of(model, output=lambda o: o["logits"])(x, Y)
    with pytest.raises(ValueError, match=r"x must have shape \[5, \.\.\.\], .*got \[5\]"):
        objective_of(model)(torch.rand(5), Y)
    with pytest.raises(TypeError, match=r"penalized must be positions or names of inputs, or None for all; got 1\.5"):
        objective_of(model, penalized=1.5)


def test_a_part_of_the_batch_takes_its_rows_of_the_other_inputs():
    model, x = _masked()
    for regularizer in ("density", "ig_sum"):
        part = _part()
        objective = objective_of(model, output=lambda o: o["logits"], fraction=0.4, regularizer=regularizer)
        out = objective(x, Y)
        torch.testing.assert_close(out.logits, model(**x)["logits"])
        if regularizer == "density":
            rows = {name: v[part] if isinstance(v, Tensor) else v for name, v in x.items()}
            torch.testing.assert_close(out.penalty.detach(), _expected_of_masked(model, rows)[0])


@pytest.mark.parametrize(
    "options", [{"compile": False}, {"backend": "eager"}, {"path": "directional", "central": True}]
)
def test_a_model_that_begins_in_place(options, fresh_dynamo):
    net, x = _Net(nn.Tanh()).double(), torch.randn(5, 4, dtype=torch.float64)
    before = x.clone()
    apart = nn.Sequential(Layer(lambda x: F.elu(x - 0.3)), net)
    value, expected = by_autograd(apart, x, Y, 1.0, criterion=nothing)
    model = nn.Sequential(Layer(lambda x: F.elu(x.sub_(0.3), inplace=True)), net)
    objective = RegularizedObjective(model, 1.0, criterion=nothing, **options)
    objective(x, Y).loss.backward()
    assert relative_error(gradients(net), expected) < (1e-5 if "path" in options else 1e-10)
    torch.testing.assert_close(objective.penalty(x), value)
    assert torch.equal(x, before)


# --------------------------------------------------------------------------------------------------------------------
# a part of the batch; buffers


class _OwnNorm(nn.Module):
    """Batch statistics that no module of torch's is there to tell of."""

    def forward(self, x):
        return F.batch_norm(x, None, None, training=self.training)


def _spectral() -> nn.Module:
    """Far from where its power iteration ends, so that each step of it shows."""
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6))
    for vector in layer.parametrizations.weight[0].buffers():
        vector.copy_(F.normalize(torch.randn(6), dim=0))
    return layer


class _Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return x.tanh()


@pytest.mark.parametrize("compiler", [None, "eager"])
@pytest.mark.parametrize(
    "body",
    [_OwnNorm, lambda: Layer(lambda x: x - x.mean(0).detach()), _Counter, lambda: _spectral()],
    ids=["batch_norm", "detached", "buffer", "spectral_norm"],
)
def test_fraction_where_samples_meet_or_buffers_change(body, compiler, fresh_dynamo):
    model, x = _Net(body()).double(), torch.randn(5, 4, dtype=torch.float64)
    twin = copy.deepcopy(model)
    out = objective_of(model, compiler, fraction=0.4)(x, Y)
    logits = twin(x)
    torch.testing.assert_close(out.logits.detach(), logits.detach())
    torch.testing.assert_close(out.ce.detach(), F.cross_entropy(logits, Y).detach())
    for a, b in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_fraction_costs_no_more_where_samples_do_not_meet():
    """Dropout and layer normalization couple nothing: each sample goes through the model once."""
    sizes = []
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Dropout(0.5), nn.Linear(6, 7))
    model[0].register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    objective = objective_of(model, fraction=0.4)
    objective(torch.randn(5, 4), Y)
    assert sizes == [5, 5, 2, 3], "to find out, and the step"
    objective(torch.randn(5, 4), Y)
    assert sizes[4:] == [2, 3]


def test_the_penalty_of_a_part_starts_from_the_same_buffers():
    """As the classification does: with spectral_norm it is the same weight."""
    model = _Net(_spectral()).double()
    twin, x = copy.deepcopy(model), torch.randn(5, 4, dtype=torch.float64)
    part = x[_part()].requires_grad_()
    out = objective_of(model, fraction=0.4)(x, Y)
    torch.testing.assert_close(out.penalty.detach(), densreg.density_penalty(twin(part), part).detach())


@pytest.mark.parametrize("compiler", [None, "eager"])
@pytest.mark.parametrize("options", [{"fraction": 0.4}, {"regularizer": "cure"}], ids=str)
def test_the_buffers_of_an_output_are_of_one_forward(options, compiler, fresh_dynamo):
    """Of a module that is the option ``output``, as of the model."""
    model, norm, x = _Net(nn.Tanh()).double(), nn.BatchNorm1d(7).double(), torch.randn(5, 4, dtype=torch.float64)
    expected = copy.deepcopy(norm)
    expected(model(x))
    objective_of(model, compiler, output=norm, **options)(x, Y)
    for a, b in zip(norm.buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_fraction_of_a_head_that_is_still_zero():
    """Its logits tell nothing of whether samples meet, in the first step; in the next ones they do."""
    model, x = _Net(_OwnNorm()).double(), torch.randn(5, 4, dtype=torch.float64)
    objective, weight = objective_of(model, fraction=0.4), model.head.weight.detach().clone()
    for value in (0 * weight, weight):
        with torch.no_grad():
            model.head.weight.copy_(value)
        torch.testing.assert_close(objective(x, Y).logits.detach(), model(x).detach())


class _Gated(nn.Module):
    """A residual branch in which samples meet, behind a gate."""

    def __init__(self, gate):
        super().__init__()
        self.gate = nn.Linear(6, 6)
        self.gate.weight.data.mul_(gate)

    def forward(self, x):
        return x + self.gate(F.batch_norm(x, None, None, training=True))


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("gate", [0.0, 1e-6], ids=["ReZero", "LayerScale"])
def test_fraction_of_a_gate_that_is_still_closed(gate, half):
    """The trial opens it; of that autocast's cache keeps nothing."""
    model, x = _Net(_Gated(gate)), torch.randn(5, 4)
    objective, before = objective_of(model, fraction=0.4), copy.deepcopy(model.state_dict())
    for value in (None, torch.eye(6)):
        if value is not None:
            model.body.gate.weight.data.copy_(value)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            found = objective(x, Y).logits
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            torch.testing.assert_close(found.detach(), model(x).detach())
        if value is None:
            assert all(torch.equal(before[name], w) for name, w in model.state_dict().items())


every_step = pytest.mark.parametrize(
    "options",
    [
        {},
        {"interval": None},
        {"regularizer": "cure"},
        {"fraction": 0.4},
        {"path": "directional"},
        {"backend": "aot_eager", "compile": True},
    ],
)


@every_step
def test_buffers_are_of_one_forward_through_checkpoints_too(options, fresh_dynamo):
    model = _Net(Checkpointed(nn.Sequential(nn.BatchNorm1d(6), nn.Tanh()))).double()
    twin, x = copy.deepcopy(model), torch.randn(5, 4, dtype=torch.float64)
    objective = RegularizedObjective(model, 0.5, **{"compile": False, **options})
    objective.penalty(x, Y)
    objective(x, Y).loss.backward()
    twin(x)
    for a, b in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b)


class _OddBuffers(nn.Module):
    """One that is expanded, one that only looks so, one that the first forward makes, one to which it gives a shape."""

    def __init__(self, resizes):
        super().__init__()
        self.resizes = resizes
        self.register_buffer("expanded", torch.ones(1, dtype=torch.float64).expand(6))
        self.register_buffer("counted", torch.zeros((), dtype=torch.float64).expand(1))  # of stride 0 as well
        self.register_buffer("made", None)
        self.register_buffer("sized", torch.zeros(0, dtype=torch.float64))

    def forward(self, x):
        self.counted.add_(1)
        self.made = torch.ones(6) if self.made is None else self.made + 1
        if self.resizes:
            self.sized.resize_(6).zero_()
        return (x * self.expanded).tanh()


@every_step
def test_buffers_that_cannot_be_written_or_are_not_there_yet(options, fresh_dynamo):
    odd = _OddBuffers(resizes="compile" not in options)  # Dynamo does not trace that
    model = nn.Sequential(nn.Linear(4, 6).double(), odd, nn.Linear(6, 7).double())
    twin, x = copy.deepcopy(model), torch.randn(5, 4, dtype=torch.float64)
    objective = RegularizedObjective(model, 0.5, **{"compile": False, **options})
    for _ in range(2):
        objective.penalty(x, Y)
        objective(x, Y).loss.backward()
        twin(x)
        torch.testing.assert_close([*model.buffers()], [*twin.buffers()])


class _SharedMemory(nn.Module):
    """Two buffers in one memory, the first of which a forward changes; the other, or the first, is used."""

    def __init__(self, second, used: str) -> None:
        super().__init__()
        self.used = used
        memory = torch.ones(12, dtype=torch.float64)
        self.register_buffer("first", memory[:6])
        self.register_buffer("second", second(memory))

    def forward(self, x):
        self.first.data.mul_(0.5).add_(x.detach().abs().mean())
        return (x * getattr(self, self.used)).tanh()


def _of_shared_memory(second, used="second"):
    shared = _SharedMemory(second, used)
    return nn.Sequential(nn.Linear(4, 6).double(), shared, nn.Linear(6, 7).double()), torch.randn(5, 4).double()


@pytest.mark.parametrize(
    "options",
    [
        *({"regularizer": name} for name in ("cure", "hessian")),
        *({"fraction": 0.4}, {"path": "directional"}, {"fraction": 0.4, "compile": True, "backend": "aot_eager"}),
    ],
)
def test_buffers_that_share_memory_are_refused(options, fresh_dynamo):
    model, x = _of_shared_memory(lambda memory: memory[:6])
    objective = RegularizedObjective(model, 0.5, **{"compile": False, **options})
    for call in (objective, objective.penalty):
        with pytest.raises(ValueError, match=r"share no memory, got 1\.first, which shares it with 1\.second"):
            call(x, Y)
    torch.testing.assert_close([*model.buffers()], [torch.ones(6, dtype=torch.float64)] * 2)


@pytest.mark.parametrize(
    ("second", "used"),
    [(lambda memory: memory[6:], "second"), (lambda memory: memory[:6], "first"), (torch.clone, "first")],
)
def test_memory_that_is_not_shared_or_not_used_twice(second, used):
    """Halves of one memory; and another name for a buffer, of which the forward makes no use."""
    model, x = _of_shared_memory(second, used)
    objective = RegularizedObjective(model, 0.5, compile=False, fraction=0.4)
    objective.penalty(x)
    objective(x, Y).loss.backward()
    once = RegularizedObjective(_of_shared_memory(lambda memory: memory[:6])[0], 0.5, compile=False)
    once(x, Y).loss.backward()  # which runs the model once


class _Counting(nn.Module):
    """A model whose criterion keeps the frequencies of the classes in a buffer of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Checkpointed(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh()))
        self.head = nn.Linear(6, 7)
        self.register_buffer("prior", torch.zeros(7))

    def forward(self, x):
        return self.head(self.body(x))

    def loss(self, logits, target):
        with torch.no_grad():
            self.prior.lerp_(F.one_hot(target, 7).to(self.prior).mean(0), 0.5)
        return F.cross_entropy(logits + self.prior, target)


@every_step
def test_a_criterion_may_update_the_models_buffers(options, fresh_dynamo):
    model, x = _Counting().double(), torch.randn(5, 4, dtype=torch.float64)
    twin = copy.deepcopy(model)
    objective = RegularizedObjective(model, 0.5, criterion=model.loss, **{"compile": False, **options})
    for _ in range(2):
        objective(x, Y).loss.backward()
        twin.loss(twin(x), Y)
    for (name, a), b in zip(model.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


# --------------------------------------------------------------------------------------------------------------------
# compiling again and again


def _mixup(logits: Tensor, target: Any) -> Tensor:
    ya, yb, lam = target
    return lam * F.cross_entropy(logits, ya) + (1 - lam) * F.cross_entropy(logits, yb)


def test_numbers_in_a_target_do_not_compile_anew(fresh_dynamo):
    model, x = _Net(nn.Tanh()).double(), torch.randn(5, 4, dtype=torch.float64)
    twin = copy.deepcopy(model)
    counter = CompileCounterWithBackend("eager")
    objective = RegularizedObjective(model, 0.5, backend=counter, criterion=_mixup)
    for lam in (0.25, 0.75, np.float32(0.1)):
        model.zero_grad()
        objective(x, (Y, Y.flip(0), lam)).loss.backward()
        _, expected = by_autograd(twin, x, (Y, Y.flip(0), float(lam)), 0.5, criterion=_mixup)
        assert relative_error(gradients(model), expected) < 1e-10
    assert counter.frame_count == 1


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_compiling_again_and_again_is_told_once(fresh_dynamo, monkeypatch):
    """A number that is no float may choose what the criterion does, and stays what it is."""
    monkeypatch.setitem(compiling.DYNAMO_OPTIONS, "recompile_limit", 8)
    model = _Net(nn.Tanh())
    objective = RegularizedObjective(model, 0.5, backend="eager", criterion=_mixup)
    x, told = torch.randn(5, 4), r"compiled 6 times, the last time because of: .*target.* == 4.*tensors for numbers"
    for number in range(5):
        objective(x, (Y, Y, number))
    with pytest.warns(RuntimeWarning, match=told):
        objective(x, (Y, Y, 5))
    for number in (6, 7):
        objective(x, (Y, Y, number))
    with pytest.raises(RuntimeError, match=r"compiled 8 times, .*target.*compile=False"):
        objective(x, (Y, Y, 9))


# --------------------------------------------------------------------------------------------------------------------
# what does not compile


class _Keeps(nn.Module):
    def __init__(self, kept=None):
        super().__init__()
        self.kept = kept

    def forward(self, x):
        y = x.tanh()
        self.kept = y if self.kept is None else [y]
        return y


def _pruned(layer):
    prune.l1_unstructured(layer, "weight", 0.3)
    return layer


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (
            lambda: nn.utils.weight_norm(nn.Linear(6, 6)),
            r"\(Linear\).*attribute 'weight'.*parametrizations\.weight_norm",
        ),
        (lambda: nn.utils.spectral_norm(nn.Linear(6, 6)), r"\(Linear\).*'weight'.*parametrizations\.spectral_norm"),
        (lambda: _pruned(nn.Linear(6, 6)), r"\(Linear\).*'weight'.*prune\.remove"),
        (_Keeps, r"\(_Keeps\).*attribute 'kept'.*keep it detached"),
        (lambda: nn.BatchNorm1d(6, momentum=None), r"\(BatchNorm1d\): momentum=None.*give it a momentum"),
        (lambda: _Keeps([]), r"\(_Keeps\).*attribute 'kept'.*keep it detached"),
        (lambda: Layer(lambda x: print(x.sum()) or x), r"\(Layer\): it calls a builtin of Python.*leave it out"),
        (
            lambda: Layer(lambda x: x.tanh() if x.sum() > 0 else x.sin()),
            r"\(Layer\).*a tensor's value decides.*torch\.where",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
def test_what_does_not_compile_is_named(layer, words, fresh_dynamo):
    """Layer, reason and remedy; in eager the step runs."""
    model, x = _Net(nn.Sequential(nn.Tanh(), layer())), torch.randn(5, 4)
    with pytest.raises(RuntimeError, match=rf"one graph: body\.1 {words}.*compile=False"):
        RegularizedObjective(model, 0.5, backend="aot_eager")(x, Y)
    RegularizedObjective(model, 0.5, compile=False)(x, Y)


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (lambda: torch.jit.script(nn.Tanh()), "torch.jit.script/freeze modules unsupported"),
        (lambda: Layer(BY_NAME), "derivative for aten::hardsigmoid_backward is not implemented"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated")
def test_why_something_does_not_compile(layer, words, fresh_dynamo):
    model, x = _Net(layer()), torch.randn(5, 4)
    with pytest.raises(RuntimeError, match=rf"one graph: .*{words}.*compile=False"):
        RegularizedObjective(model, 0.5, backend="aot_eager")(x, Y)
    RegularizedObjective(model, 0.5, compile=False)(x, Y)


BY_NAME = F.hardsigmoid  # as "from torch.nn.functional import hardsigmoid" has it


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled", "ignore:Error detected in")
def test_anomaly_detection_is_named(fresh_dynamo):
    with (
        torch.autograd.detect_anomaly(),
        pytest.raises(RuntimeError, match=r"one graph: .*detect_anomaly.*leave it out"),
    ):
        RegularizedObjective(_Net(nn.Tanh()), 0.5, backend="aot_eager")(torch.randn(5, 4), Y)


def test_a_subclass_of_tensor_is_named():
    class Image(Tensor):
        pass

    x = torch.randn(5, 4).as_subclass(Image)
    assert explanation(RuntimeError("no"), nn.Tanh(), (x,)) == (
        "x is of Image, a subclass of Tensor: give x.as_subclass(torch.Tensor)"
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.long)])
@pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled")
def test_two_results_of_one_reduction_compile(dtype, fresh_dynamo):
    """inductor's own C++ declares one name twice there, and is not compiled."""

    def twice(x):
        return x.sum(0), x.sum(0).view(4, 8)

    x = torch.randint(-4, 4, (64, 32)).to(dtype)
    compiled = torch.compile(twice, backend=CheckedBackend(None, "inductor", penalized=True))
    with torch._inductor.config.patch(force_disable_caches=True):
        for a, b in zip(compiled(x), twice(x), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.slow
def test_bfloat16_compiles_on_the_cpu(fresh_dynamo):
    conv = (nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.SiLU(), nn.AdaptiveAvgPool2d(1))
    model, x = nn.Sequential(*conv, nn.Flatten(), nn.Linear(16, 7)), torch.randn(5, 3, 8, 8)
    _, expected = by_autograd(copy.deepcopy(model).double(), x.double(), Y, 1.0, criterion=nothing)
    with torch.autocast("cpu", torch.bfloat16):
        out = RegularizedObjective(model, 1.0, criterion=nothing)(x, Y)
    out.loss.backward()
    assert relative_error(gradients(model), expected) < 0.05


# --------------------------------------------------------------------------------------------------------------------
# the first step says that it compiles


FIRST = (
    r"the first training step compiles, .*compile=False",
    r"the first training step took \d+\.\d s with its compil",
)


@pytest.mark.parametrize("level", ["NOTSET", "INFO", "WARNING"])
def test_the_first_step_says_that_it_compiles(level, fresh_dynamo, monkeypatch, caplog):
    """On a terminal, unless logging shows it or hides it; and once."""
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    caplog.set_level(level, logger="densreg")
    objective, x = RegularizedObjective(_Net(nn.Tanh()), 0.5, backend="eager"), torch.randn(5, 4)
    for _ in range(2):
        objective(x, Y)
    RegularizedObjective(_Net(nn.Tanh()), 0.5, compile=False)(x, Y)
    logged = [record.getMessage() for record in caplog.records if record.name == "densreg"]
    shown = terminal.getvalue().splitlines()
    assert (len(logged), len(shown)) == {"NOTSET": (0, 2), "INFO": (2, 0), "WARNING": (0, 0)}[level]
    for line, expected in zip(logged or shown, FIRST, strict=False):
        assert re.search(expected, line)


def test_the_first_step_writes_nothing_into_a_file(fresh_dynamo, capsys):
    RegularizedObjective(_Net(nn.Tanh()), 0.5, backend="eager")(torch.randn(5, 4), Y)
    assert capsys.readouterr() == ("", "")
