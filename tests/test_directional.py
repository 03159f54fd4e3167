"""The directional path: a finite difference in place of second order, by first-order kernels."""

from __future__ import annotations

import copy
import itertools
import math
import random
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference import Checkpointed, Layer, Once, by_autograd, gradients, nothing
from torch import nn

import densreg
from benchmarks.second_order import problem, reference, relative_error
from densreg import RegularizedObjective, directional

Y = torch.tensor([0, 1, 2, 3, 4])
F32, F64 = torch.float32, torch.float64


def directional_error(dtype: torch.dtype, p: float, central: bool) -> float:
    model, x = problem(dtype)
    objective = RegularizedObjective(model, 1.0, p, path="directional", central=central, criterion=nothing)
    objective(x, Y).loss.backward()
    return relative_error(gradients(model), reference(p))


@pytest.mark.parametrize("p", [1, 1.5, 2, 4, math.inf])
@pytest.mark.parametrize(
    ("dtype", "central", "bound"),
    [
        (torch.float32, False, 0.02),
        (torch.float32, True, 2e-3),
        (torch.float64, False, 1e-5),
        (torch.float64, True, 1e-7),
    ],
)
def test_error_against_exact(dtype, central, bound, p):
    """The documented errors, on a network with BatchNorm in training mode, a smooth and a piecewise linear layer."""
    assert directional_error(dtype, p, central) < bound


def test_penalty_and_loss_are_exact():
    model, x = problem(torch.float64)
    twin = copy.deepcopy(model)
    loss, _ = by_autograd(twin, x, Y, 0.5)
    out = RegularizedObjective(model, 0.5, path="directional")(x, Y)
    torch.testing.assert_close(out.loss.detach(), loss)
    for a, b in zip(model.buffers(), twin.buffers(), strict=True):  # the perturbed forwards leave them alone
        torch.testing.assert_close(a, b)
    assert x.grad is None


def test_orders_of_the_error():
    """Halving h halves the one-sided error and quarters the central one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 5)).double()
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    score = densreg.input_score(model(x), x)
    norm, direction = directional.dual_direction([score], 2)

    def error(h: float, central: bool) -> float:
        step = directional.step_size
        directional.step_size = lambda *_: torch.tensor(h, dtype=torch.float64)
        try:
            at_x = torch.logsumexp(model(x), 1)
            along = directional.difference(lambda xs: torch.logsumexp(model(*xs), 1), [x], direction, central, at_x)
        finally:
            directional.step_size = step
        return abs((along - norm.sum()).item())

    assert error(1e-2, False) / error(5e-3, False) == pytest.approx(2, rel=0.1)
    assert error(1e-2, True) / error(5e-3, True) == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize("p", [1, 1.5, 2, 4, math.inf])
def test_dual_direction(p):
    score = [torch.randn(3, 4, 2, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)]
    score[0][1], score[1][1] = 0, 0
    norm, direction = directional.dual_direction(score, p)
    rows = torch.cat([g.flatten(1) for g in score], 1)
    along = sum((g * v).flatten(1).sum(1) for g, v in zip(score, direction, strict=True))
    torch.testing.assert_close(norm, torch.linalg.vector_norm(rows, p, dim=1))
    torch.testing.assert_close(along, norm)


def test_step_of_zeros():
    zeros = [torch.zeros(2, 3)]
    assert directional.step_size(zeros, [torch.ones(2, 3)], False) > 0
    along = directional.difference(lambda xs: xs[0].sum(1), zeros, zeros, False, torch.zeros(2))
    assert float(along) == 0, "a zero score has no direction"


@pytest.mark.parametrize("central", [False, True])
def test_scores_that_are_all_zero(central):
    """A head that is zero when it is made: the penalty adds nothing, and no gradient is NaN."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 4), nn.Tanh(), nn.Linear(4, 3))
    nn.init.zeros_(model[-1].weight)
    x, y = 255 * torch.rand(8, 3, 32, 32), torch.randint(3, (8,))
    RegularizedObjective(model, 1.0, path="directional", central=central)(x, y).loss.backward()
    found = [w.grad.clone() for w in model.parameters()]
    expected = torch.autograd.grad(torch.nn.functional.cross_entropy(model(x), y), list(model.parameters()))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_large_inputs_in_half_precision():
    """Whose squares overflow."""
    torch.manual_seed(0)
    direction = [torch.randn(64, 3, 32, 32).half() / 100]
    x = [torch.randn(64, 3, 32, 32).half() * 4]
    h = directional.step_size(x, direction, False)
    wide = directional.step_size([x[0].float()], [direction[0].float()], False)
    ratio = (torch.finfo(torch.float16).eps / torch.finfo(torch.float32).eps) ** 0.5
    assert float(h) == pytest.approx(float(wide) * ratio, rel=1e-3)


@pytest.mark.parametrize("p", [1, 2, math.inf])
@pytest.mark.parametrize(("central", "bound"), [(False, 0.08), (True, 0.04)])
def test_a_penalty_in_half_precision(central, bound, p):
    """A model and inputs in float16, whose squares overflow, against float64: the value to 1e-3 and the gradient.

    Measured: 3e-4; 0.045 and 0.021. No ReLU of this seed is on another piece in float16, which would cost 0.1.
    """
    model, x = problem(torch.float16)
    x = 10 * x.detach()
    assert x.square().sum() == math.inf
    value, expected = by_autograd(copy.deepcopy(model).double(), x.double(), Y, 1.0, p, nothing)
    objective = RegularizedObjective(model, 1.0, p, path="directional", central=central, criterion=nothing)
    out = objective(x, Y, loss_scale=256.0)
    out.loss.backward()
    assert out.penalty.item() == pytest.approx(value.item(), rel=1e-3)
    assert relative_error(gradients(model), expected) < bound


def test_a_difference_that_is_not_a_number_is_an_error():
    nan, one = torch.tensor(math.nan), torch.tensor(1.0)
    with pytest.raises(RuntimeError, match="the difference of the log density is nan"):
        directional.check_difference(nan, one, one)


def test_dropout_is_replayed():
    """With the same masks in all forwards the error is a difference's; with others it would be of order 1."""
    model = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Dropout(0.5), nn.Linear(64, 5)).double()
    x, y = torch.randn(6, 8, dtype=torch.float64), torch.randint(5, (6,))
    torch.manual_seed(1)
    _, expected = by_autograd(model, x, y, 1.0, criterion=nothing)
    after = torch.get_rng_state()
    torch.manual_seed(1)
    RegularizedObjective(model, 1.0, path="directional", criterion=nothing)(x, y).loss.backward()
    assert relative_error(gradients(model), expected) < 1e-5
    assert torch.equal(torch.get_rng_state(), after), "the generator goes on as after one forward"


@pytest.mark.parametrize("case", ["once differentiable", "reentrant checkpoint"])
def test_models_that_cannot_be_differentiated_twice(case):
    body = nn.Sequential(nn.Linear(8, 16), Layer(torch.sin), nn.Linear(16, 5)).double()
    x, y = torch.randn(6, 8, dtype=torch.float64), torch.randint(5, (6,))
    _, expected = by_autograd(copy.deepcopy(body), x, y, 1.0)
    model: nn.Module = Checkpointed(body, reentrant=True)
    if case == "once differentiable":
        model = nn.Sequential(body[0], Layer(Once.apply), body[2])
    (finding,) = densreg.check_model(model, x)
    assert "directional" in finding.advice
    kept = torch.randn_like(body[0].weight)
    body[0].weight.grad = kept.clone()
    out = RegularizedObjective(model, 1.0, path="directional")(x, y)
    torch.testing.assert_close(body[0].weight.grad, kept)
    body[0].weight.grad = None
    out.loss.backward()
    assert relative_error(gradients(model), expected) < 1e-5


def test_complex_weights():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.filter, self.head = nn.Parameter(torch.randn(5, dtype=torch.complex128)), nn.Linear(8, 5).double()

        def forward(self, x):
            return self.head(torch.fft.irfft(torch.fft.rfft(x) * self.filter, n=8).tanh())

    model, x, y = Net(), torch.randn(6, 8, dtype=torch.float64), torch.randint(5, (6,))
    RegularizedObjective(model, 1.0, path="directional", criterion=nothing)(x, y).loss.backward()
    expected = by_autograd(model, x, y, 1.0, criterion=nothing)[1]
    for found, right in zip(gradients(model), expected, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-7)


def test_lstm():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = nn.LSTM(4, 8, batch_first=True), nn.Linear(8, 5)

        def forward(self, x):
            return self.head(self.rnn(x)[0][:, -1])

    model = Net()
    x, y = torch.randn(6, 3, 4), torch.randint(5, (6,))
    RegularizedObjective(model, 1.0, path="directional", central=True, criterion=nothing)(x, y).loss.backward()
    _, expected = by_autograd(copy.deepcopy(model).double(), x.double(), y, 1.0, criterion=nothing)
    assert relative_error(gradients(model), expected) < 2e-3


def test_autocast_keeps_the_difference_in_float32():
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 5))
    x, y = torch.randn(6, 8), torch.randint(5, (6,))
    _, expected = by_autograd(copy.deepcopy(model).double(), x.double(), y, 1.0, criterion=nothing)
    with torch.autocast("cpu", torch.bfloat16):
        out = RegularizedObjective(model, 1.0, path="directional", criterion=nothing)(x, y)
    out.loss.backward()
    assert relative_error(gradients(model), expected) < 0.02


def test_interval_and_fraction():
    model, x = problem(torch.float64)
    x = x.detach()
    objective = RegularizedObjective(model, 0.5, path="directional", interval=2, fraction=0.4)
    twin = copy.deepcopy(model)
    torch.manual_seed(3)
    part = x[torch.randperm(5)[3:]].requires_grad_()
    torch.manual_seed(3)
    out = objective(x, Y)
    torch.testing.assert_close(out.penalty, densreg.density_penalty(copy.deepcopy(twin)(part), part).detach())
    assert objective(x, Y).penalty.isnan()


def test_buffers_that_the_forward_changes():
    """All forwards start from the same buffers: another power iteration would give another weight."""
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 5)).double()
    nn.utils.parametrizations.spectral_norm(model[0])
    x, y = torch.randn(6, 8, dtype=torch.float64), torch.randint(5, (6,))
    _, expected = by_autograd(copy.deepcopy(model), x, y, 1.0, criterion=nothing)
    RegularizedObjective(model, 1.0, path="directional", criterion=nothing)(x, y).loss.backward()
    assert relative_error(gradients(model), expected) < 1e-6


class _Gate(nn.Module):
    """A detached part that depends on x: a gate, or a running mean that is used in the forward that changes it."""

    def __init__(self, sharpness):
        super().__init__()
        self.sharpness = sharpness
        self.register_buffer("mean", torch.zeros(16))

    def forward(self, y):
        if self.sharpness is not None:
            return y * torch.sigmoid(self.sharpness * y.detach())
        with torch.no_grad():
            self.mean.lerp_(y.mean(0), 0.1)
        return torch.tanh(y - self.mean)


@pytest.mark.parametrize(
    ("dtype", "sharpness", "central"),
    [*itertools.product([F32, F64], [0.1, 0.6, None], [False, True]), (F64, 1e-3, False)],
)
def test_detached_parts_that_depend_on_x_are_noticed(dtype, sharpness, central):
    """Gradients that are wrong by 2% to 9%, though the difference may be right to 0.3%; a weak part in float64 too."""
    model = nn.Sequential(nn.Linear(8, 16), _Gate(sharpness), nn.Linear(16, 5)).to(dtype)
    x, y = torch.randn(6, 8, dtype=dtype), torch.randint(5, (6,))
    with pytest.raises(RuntimeError, match=r"a detached part that depends on x .*path=.fused"):
        RegularizedObjective(model, 1.0, path="directional", central=central)(x, y)


@pytest.mark.parametrize("central", [False, True])
@pytest.mark.parametrize("name", ["resnet18", "faint"])
def test_no_false_alarm(name, central):
    """The most curved of the usual networks, and inputs so small that the difference is of a few digits."""
    if name == "resnet18":
        torchvision = pytest.importorskip("torchvision")
        model, x = torchvision.models.resnet18(num_classes=5), torch.randn(8, 3, 32, 32)
    else:
        model, x = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 5)), 0.01 * torch.randn(6, 8)
    objective = RegularizedObjective(model, 1.0, path="directional", central=central)
    for _ in range(2):
        objective(x, torch.randint(5, (len(x),)))


class _Skips(nn.Module):
    """A layer that is left out at random."""

    def __init__(self, draw):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 5)
        self.draw = draw

    def forward(self, x):
        h = self.a(x).tanh()
        return self.c(h + self.b(h).tanh() * (self.draw() < 0.5))


def test_random_numbers_of_python_and_numpy_are_replayed_and_others_noticed():
    x, y = torch.randn(6, 8, dtype=torch.float64), torch.randint(5, (6,))
    for draw in (random.random, np.random.random):
        for _ in range(4):
            RegularizedObjective(_Skips(draw).double(), 1.0, path="directional")(x, y)
    own = torch.Generator().manual_seed(0)

    def until_they_differ():
        for _ in range(20):
            model = _Skips(lambda: float(torch.rand((), generator=own))).double()
            RegularizedObjective(model, 1.0, path="directional")(x, y)

    with pytest.raises(RuntimeError, match="perturbed forwards differ from the first"):
        until_they_differ()


KINKS = [
    nn.ReLU(),
    nn.ReLU(inplace=True),
    nn.LeakyReLU(0.2),
    nn.PReLU(16),
    nn.ReLU6(),
    nn.Hardtanh(-0.1, 0.1, inplace=True),
    nn.MaxPool2d(2),
    nn.MaxPool2d(3, 2, 1),
    Layer(torch.relu),
    Layer(lambda x: x.relu()),
    Layer(lambda x: F.relu_(x + 0)),
    Layer(lambda x: F.max_pool2d(x, 2, return_indices=True)[0]),
    nn.Threshold(0.0, 0.0, inplace=True),
    Layer(lambda x: F.hardsigmoid(8 * x)),
    nn.Softshrink(0.1),
    nn.Hardshrink(0.1),
    nn.AdaptiveMaxPool2d(5),
    Layer(lambda x: F.adaptive_max_pool2d(x, 5, return_indices=True)[0]),
    Layer(torch.abs),
    Layer(abs),
    Layer(lambda x: x.clamp(min=0.0)),
    Layer(lambda x: torch.clamp(x, -0.1, 0.1)),
    Layer(lambda x: (x + 0).clamp_min_(0.0)),
    Layer(lambda x: torch.clamp_max(x, 0.1)),
    Layer(lambda x: x.clip(-0.1, 0.1)),
    Layer(lambda x: torch.relu(input=x)),
    Layer(lambda x: x.relu()[:, torch.arange(16).clamp(max=12)]),
    nn.ELU(2.0, inplace=True),
    nn.SELU(),
    nn.SELU(inplace=True),
    Layer(lambda x: F.hardswish(8 * x)),
    Layer(lambda x: F.hardswish(8 * x, inplace=True)),
    Layer(lambda x: torch.maximum(x, x.flip(1))),
    Layer(lambda x: torch.max(x, other=x.flip(1))),
    Layer(lambda x: x.minimum(torch.zeros(()))),
    Layer(lambda x: x.amax((2, 3), keepdim=True) + 0.1 * x),
    Layer(lambda x: x.max(-1, keepdim=True)[0] + 0.1 * x),
    Layer(lambda x: torch.min(x, dim=1).values[:, None] + 0.1 * x),
    Layer(torch.absolute),
    Layer(lambda x: x.prelu(x.new_full((16,), 0.25))),
    Layer(lambda x: x.hardshrink(0.1)),
    Layer(lambda x: F.hardtanh_(x + 0, -0.1, 0.1)),
    Layer(lambda x: F.leaky_relu_(x + 0, 0.2)),
    Layer(lambda x: torch.where(x > 0, x, 0.1 * x)),
    Layer(lambda x: x.masked_fill(torch.less(x, 0), 0)),
    Layer(lambda x: x * (x >= 0)),
    Layer(lambda x: x * x.sign()),
    Layer(lambda x: torch.clamp(x, -torch.ones(16, 1, 1) / 10, max=torch.ones(()) / 10)),
    Layer(lambda x: x.clamp_max(torch.zeros(()))),
    Layer(lambda x: x.max() + 0.1 * x),
]


@pytest.mark.parametrize(
    ("layer", "central"), [*((layer, True) for layer in KINKS), *((layer, False) for layer in KINKS[::7])], ids=str
)
def test_kinks_do_not_count(layer, central):
    """In float32, with thousands of units, some of which cross a kink between x and x + h v: errors of order 1.

    What is left is units that are on another piece in the float64 of the reference.
    """
    model = nn.Sequential(nn.Conv2d(3, 16, 3), layer, nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5))
    x, y = torch.randn(16, 3, 16, 16), torch.randint(5, (16,))
    model(x)
    hardsigmoid = mock.patch.object(F, "hardsigmoid", lambda t, inplace=False: (t + 3).clamp(0, 6) / 6)
    with hardsigmoid:  # of which torch has no second order
        _, expected = by_autograd(copy.deepcopy(model).double(), x.double(), y, 1.0, criterion=nothing)
    objective = RegularizedObjective(model, 1.0, path="directional", central=central, criterion=nothing)
    objective(x, y).loss.backward()
    assert relative_error(gradients(model), expected) < 0.05


def test_kinks_of_other_functions_are_noticed():
    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 3), Layer(lambda x: x.sort(1)[0]), nn.Conv2d(16, 16, 3), nn.ReLU()),
        *(nn.Flatten(), nn.LazyLinear(5)),
    )
    x, y = torch.randn(16, 3, 16, 16), torch.randint(5, (16,))
    model(x)
    objective = RegularizedObjective(model, 1.0, path="directional", central=True)
    with pytest.warns(RuntimeWarning, match="twice the step"):
        objective(x, y)
    objective(x, y)  # once is enough: pytest makes a warning here an error


def test_kinks_of_other_functions_are_noticed_later(monkeypatch):
    """A small batch may have none within the first step."""
    seen = []
    monkeypatch.setattr(directional, "check_smooth", lambda checks, *_: seen.append(checks.steps))
    objective = RegularizedObjective(
        nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)), 1.0, path="directional"
    )
    for _ in range(9):
        objective(torch.randn(6, 3), torch.tensor([0, 1, 2, 3, 0, 1]))
    assert seen == [1, 2, 4, 8]


class Ties(nn.Module):
    """Two convolutions that are equal over a black background, and a function of them."""

    def __init__(self, function):
        super().__init__()
        self.a, self.b = (nn.Conv2d(1, 6, 3, bias=False) for _ in range(2))
        self.head, self.function = nn.LazyLinear(4), function

    def forward(self, x):
        return self.head(torch.tanh(self.function(self.a(x), self.b(x))).flatten(1))


@pytest.mark.parametrize(
    "function",
    [
        torch.maximum,
        torch.min,
        lambda a, b: torch.maximum(a, a.roll(1, 3)) + b,
        lambda a, b: (a.square() + b).amin((2, 3)),
        lambda a, b: torch.amax(a * b, axis=(2, 3), keepdims=True),
        lambda a, b: (a * b).max(axis=-1).values,
        lambda a, b: a * (b.square().sum(dim=(1, 2, 3))[0].max() + b.min()),
    ],
)
@pytest.mark.parametrize("central", [False, True])
def test_ties(function, central):
    """Autograd halves the gradient, or spreads it over all places, and so does the difference."""
    model, y = Ties(function).double(), torch.tensor([0, 1, 2])
    x = torch.zeros(3, 1, 10, 10, dtype=torch.float64)
    x[:, :, 3:6, 3:6] = torch.rand(3, 1, 3, 3, dtype=torch.float64)
    model(x)
    _, expected = by_autograd(copy.deepcopy(model), x, y, 1.0, criterion=nothing)
    RegularizedObjective(model, 1.0, path="directional", central=central, criterion=nothing)(x, y).loss.backward()
    assert relative_error(gradients(model), expected) < (1e-7 if central else 1e-5)


def test_bounds_that_are_trained_keep_their_gradient():
    class Clamped(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.low, self.head = nn.Linear(4, 6), nn.Parameter(torch.zeros(6)), nn.Linear(6, 3)

        def forward(self, x):
            return self.head(torch.clamp(self.body(x), min=self.low))

    model, x, y = Clamped().double(), torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    _, expected = by_autograd(copy.deepcopy(model), x, y, 1.0, criterion=nothing)
    RegularizedObjective(model, 1.0, path="directional", central=True, criterion=nothing)(x, y).loss.backward()
    assert model.low.grad.abs().max() > 0
    assert relative_error(gradients(model), expected) < 1e-4


def test_checkpoints_it_cannot_go_through():
    def net(reentrant):
        inner = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        return nn.Sequential(nn.Linear(8, 8), Checkpointed(inner, reentrant), nn.Linear(8, 5))

    x, y = torch.randn(6, 8), torch.randint(5, (6,))
    with pytest.raises(RuntimeError, match="use_reentrant=True"):
        RegularizedObjective(net(False), 1.0, path="directional")(x, y)
    hooked = net(True)
    hooked[0].weight.register_post_accumulate_grad_hook(lambda w: None)
    with pytest.raises(ValueError, match="post-accumulate-grad hooks too early"):
        RegularizedObjective(hooked, 1.0, path="directional")(x, y)


def test_activations_that_do_not_come_again():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.c, self.n = nn.Linear(8, 8), nn.Linear(8, 5), 0

        def forward(self, x):
            self.n += 1
            h = self.a(x).relu()
            return self.c(h.relu() if self.n > 1 else h)

    with pytest.raises(RuntimeError, match="calls other activations"):
        RegularizedObjective(Net(), 1.0, path="directional")(torch.randn(6, 8), torch.randint(5, (6,)))


def test_empty_batch():
    model = nn.Linear(8, 5)
    RegularizedObjective(model, 1.0, path="directional")(torch.randn(0, 8), torch.empty(0, dtype=torch.int64))


def test_without_a_model_it_is_refused():
    x = torch.randn(2, 3, requires_grad=True)
    with pytest.raises(ValueError, match="RegularizedObjective"):
        densreg.density_penalty(x * 2, x, path="directional")
