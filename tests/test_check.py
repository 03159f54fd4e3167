"""densreg.check: check_model names the layers that cannot be differentiated twice, and no others."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from reference import Layer, Once, Sine
from torch import nn

import densreg


class _ConstantBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, grad):
        with torch.no_grad():
            return 2 * ctx.saved_tensors[0] * grad


class _Loses(torch.autograd.Function):
    """Its backward depends on the incoming gradient twice, and forgets one of the two."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return grad + grad.detach()


class _OneBranch(nn.Module):
    """Beside a branch that is right, and weights whose gradients are far larger than that of x."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3)
        self.last = nn.Linear(4, 3)

    def forward(self, x):
        h = 10 * self.first(x)
        return self.last(F.softplus(self.second(F.softplus(h) + _Loses.apply(h.sin()))).mean((2, 3)))


class _Spectrum(nn.Module):
    """A layer with complex weights, as of a Fourier neural operator."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 5, dtype=torch.complex64))

    def forward(self, x):
        return torch.fft.irfft(self.weight * torch.fft.rfft(x.tanh()), 8)


def test_check_model_on_complex_weights():
    assert densreg.check_model(nn.Sequential(_Spectrum(), nn.Flatten(), nn.Linear(32, 3)), torch.randn(2, 4, 8)) == []


def test_check_model_sees_what_is_lost_on_one_branch_of_a_forward():
    for seed in range(10):
        torch.manual_seed(seed)
        (finding,) = densreg.check_model(_OneBranch(), torch.randn(3, 2, 8, 8))
        assert "loses the incoming gradient" in finding.problem


class _SavesSlope(torch.autograd.Function):
    """Of what it saves nothing says that it depends on x."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x.cos())
        return x.sin()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0]


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, grad):
        return grad


class _Single(Sine):
    """As of a kernel that takes float32 only."""

    @staticmethod
    def forward(ctx, x):
        if x.dtype != torch.float32:
            raise TypeError(x.dtype)
        return Sine.forward(ctx, x)


def _norm_at_zero(x):
    return (x - x).norm(dim=1, keepdim=True) + x


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        (_ConstantBackward.apply, "outside of autograd"),
        (Once.apply, "loses the incoming gradient"),
        (_Loses.apply, "loses the incoming gradient"),
        (_SavesSlope.apply, "second derivative is wrong: finite differences"),
        (_norm_at_zero, "not finite"),
        (lambda x: torch.utils.checkpoint.checkpoint(torch.tanh, x, use_reentrant=True), "checkpoint"),
        (torch.compile(torch.tanh, backend="aot_eager"), "compiled by itself"),
    ],
)
def test_check_model_names_the_layer(function, problem, fresh_dynamo):
    inner = nn.Sequential(nn.Linear(4, 4), Layer(function))
    model = nn.Sequential(nn.Linear(4, 4), inner, nn.BatchNorm1d(4), nn.Linear(4, 3))
    (finding,) = densreg.check_model(model, torch.randn(5, 4))
    assert finding.module == "1.1"
    assert finding.type == "Layer"
    assert problem.lower() in finding.problem.lower()
    assert "1.1 (Layer): " in str(finding)


def test_check_model_on_functions_that_are_right_or_not_for_float64():
    for function in (Sine.apply, _StraightThrough.apply, _Single.apply):
        model = nn.Sequential(nn.Linear(4, 4), Layer(function), nn.ReLU(), nn.Dropout(), nn.Linear(4, 3))
        assert densreg.check_model(model, torch.randn(5, 4)) == []


def test_check_model_on_sound_models():
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Hardswish(), nn.Hardsigmoid(), nn.Dropout(0.5), nn.ReLU(True)),
        *(nn.MaxPool2d(2), nn.GELU(), nn.Flatten(), nn.LayerNorm(72), nn.Linear(72, 3)),
    )
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(2, 3, 8, 8)
    state = torch.get_rng_state()
    assert densreg.check_model(model, x) == []
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values(), strict=True))
    assert all(w.grad is None for w in model.parameters())
    assert densreg.check_model(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), torch.randn(2, 3, 8)) == []


class _ByName(nn.Module):
    """Called by keyword, beside integers, and begins in place."""

    def __init__(self, act):
        super().__init__()
        self.act, self.head = act, nn.Linear(4, 3)

    def forward(self, *, pixels, index):
        return self.head(self.act(pixels.sub_(0.5)))[index]


@pytest.mark.parametrize("order", [2, 3])
def test_check_model_by_name_and_in_place(order):
    example = {"pixels": torch.rand(2, 4), "index": torch.tensor([1, 0])}
    before = example["pixels"].clone()
    assert densreg.check_model(_ByName(nn.Tanh()), example, order=order) == []
    assert torch.equal(example["pixels"], before)
    (finding,) = densreg.check_model(_ByName(Layer(_Loses.apply)), example)
    assert finding.module == "act"


def test_check_model_raises_what_the_model_raises():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        densreg.check_model(nn.Linear(4, 3), torch.randn(2, 5))


# --------------------------------------------------------------------------------------------------------------------
# third derivatives, and what a model keeps


class _Cached(nn.Module):
    """In eval mode it keeps what was computed from its parameter, as timm's LeViT keeps its attention biases."""

    def __init__(self):
        super().__init__()
        self.bias, self.cache = nn.Parameter(torch.randn(4)), {}

    def forward(self, x):
        if self.training:
            return x * self.bias.exp()
        return x * self.cache.setdefault("bias", self.bias.exp())


def test_check_model_names_what_is_kept_from_an_earlier_graph():
    model = nn.Sequential(nn.Linear(4, 4), _Cached(), nn.Linear(4, 3))
    x, y = torch.randn(3, 4), torch.arange(3)
    assert densreg.check_model(model, x) == []
    (finding,) = densreg.check_model(model.eval(), x)
    assert finding.module == "1"
    assert "keeps a tensor of an earlier graph, cache" in finding.problem
    objective = densreg.RegularizedObjective(model, 0.1, compile=False)
    objective(x, y).loss.backward()
    with pytest.raises(RuntimeError, match=r"1 \(_Cached\) keeps a tensor of an earlier step's graph, cache"):
        objective(x, y)


@pytest.mark.filterwarnings("ignore:.*weight_norm")
def test_check_model_after_a_forward_of_weight_norm():
    model = nn.Sequential(torch.nn.utils.weight_norm(nn.Linear(4, 3)), nn.Tanh())
    model(torch.randn(2, 4))
    assert densreg.check_model(model, torch.randn(2, 4)) == []


def test_check_model_of_third_order():
    x = torch.randn(5, 6)
    sound = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Linear(6, 3))
    assert densreg.check_model(sound, x, order=3) == []
    wrong = "third derivative is wrong"
    for function, problem in (
        (lambda t: torch.native_layer_norm(t, [6], None, None, 1e-5)[0], wrong),
        (
            lambda t: torch.native_batch_norm(t, None, None, None, None, True, 0.1, 1e-5)[0],
            wrong if torch.__version__.startswith("2.11.") else "three times",
        ),
    ):
        model = nn.Sequential(nn.Linear(6, 6), Layer(function), nn.Linear(6, 3))
        assert densreg.check_model(model, x) == []
        (finding,) = densreg.check_model(model, x, order=3)
        assert finding.module == "1"
        assert problem in finding.problem
    with pytest.raises(ValueError, match="order must be 2 or 3, got 4"):
        densreg.check_model(sound, x, order=4)
