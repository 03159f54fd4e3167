"""The rivals: values and gradients in the parameters, alone, against formulas written out sample by sample."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from reference import Product, gradients, nothing
from torch import Tensor, nn

import densreg
from benchmarks.second_order import problem, relative_error
from densreg import RegularizedObjective, regularizers
from densreg.regularizers import REGULARIZERS

pytestmark = pytest.mark.compile

Y = torch.tensor([0, 3, 1, 2])
RIVALS = [name for name in REGULARIZERS if name != "density"]
SEED = 7


def smooth() -> tuple[nn.Module, Tensor]:
    """A network of float64 with a second derivative everywhere, whose samples do not see each other; pixels."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(27, 8), nn.Softplus(2)]
    model = nn.Sequential(*layers, nn.Linear(8, 4)).double()
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2)
    for w in model.parameters():
        w.data.mul_(2)
    return model.eval(), torch.rand(4, 2, 5, 5, dtype=torch.float64)


# --------------------------------------------------------------------------------------------------------------------
# the formulas: of one sample x [...] of class y, where v are the random numbers of it


def logit(model: nn.Module, x: Tensor, y: int) -> Tensor:
    return model(x.unsqueeze(0))[0, y]


def cross_entropy(model: nn.Module, x: Tensor, y: int) -> Tensor:
    f = model(x.unsqueeze(0))[0]
    return f.exp().sum().log() - f[y]


def gradient(function, model: nn.Module, x: Tensor, y: int) -> Tensor:
    x = x.detach().requires_grad_()
    (g,) = torch.autograd.grad(function(model, x, y), x, create_graph=True)
    return g.flatten()


def norm(g: Tensor, p: float) -> Tensor:
    return g.abs().max() if math.isinf(p) else g.abs().pow(p).sum().pow(1 / p)


def input_gradient(model, x, y, p):
    return norm(gradient(logit, model, x, y), p)


def loss_gradient(model, x, y, p):
    return norm(gradient(cross_entropy, model, x, y), p)


def score_matching(model, x, y, vs, sigma, mu, antithetic=True):
    h = 0.0
    for v in vs:
        above, below = (logit(model, x + sign * sigma * v, y) - logit(model, x, y) for sign in (1, -1))
        h = h + (above + below if antithetic else 2 * above) / sigma**2
    h = h / len(vs)
    return h + gradient(logit, model, x, y).square().sum() / 2 + mu * h**2


def hessian(model, x, y, vs):
    h = torch.autograd.functional.hessian(lambda x: logit(model, x, y), x, create_graph=True)
    h = h.reshape(x.numel(), x.numel())
    return sum((h @ v.flatten()).square().sum() for v in vs) / len(vs)


def cure(model, x, y, h):
    g = gradient(cross_entropy, model, x, y)
    z = g.detach().sign() / math.sqrt(g.numel())
    return (gradient(cross_entropy, model, x + h * z.view_as(x), y) - g).square().sum()


def attribution_loss(model, x, end, y, beta, segments, create_graph=True):
    """ce(end) + beta || (end - x) . mean of grad ce along the path ||_1."""
    total = torch.zeros_like(x)
    for k in range(segments):
        point = x.detach() + (k + 0.5) / segments * (end - x.detach())
        point = point if point.requires_grad else point.requires_grad_()
        (g,) = torch.autograd.grad(cross_entropy(model, point, y), point, create_graph=True)
        total = total + g / segments
    return cross_entropy(model, end, y) + beta * ((end - x.detach()) * total).abs().sum()


def ig_sum(model, x, y, start, beta, eps, segments, steps, attack_segments):
    end = (x + eps * (2 * start - 1)).clamp(0, 1)
    for _ in range(steps):
        end = end.detach().requires_grad_()
        (g,) = torch.autograd.grad(attribution_loss(model, x, end, y, beta, attack_segments), end)
        end = end.detach() + 2.5 * eps / steps * g.sign()
        end = torch.minimum(torch.maximum(end, x - eps), x + eps).clamp(0, 1)
    return attribution_loss(model, x, end.detach(), y, beta, segments) - cross_entropy(model, x, y)


def expected(regularizer, model: nn.Module, x: Tensor) -> Tensor:
    """[B], from the same random numbers."""
    torch.manual_seed(SEED)
    name, options = regularizer.name, dataclasses.asdict(regularizer)
    count = options.pop("samples", 1)
    values = []
    if name in ("score_matching", "hessian"):
        drawn = [torch.randn_like(x) for _ in range(count)]
        options["vs"] = None
    elif name == "ig_sum":
        drawn = [torch.rand_like(x)]
    for b, y in enumerate(Y.tolist()):
        if "vs" in options:
            options["vs"] = [v[b] for v in drawn]
        if name == "ig_sum":
            options["start"] = drawn[0][b]
        values.append(globals()[name](model, x[b], y, **options))
    return torch.stack(values)


CASES = [
    *(regularizers.InputGradient(p) for p in (1, 2, math.inf)),
    *(regularizers.LossGradient(p) for p in (1.5, 2)),
    regularizers.ScoreMatching(sigma=0.1, samples=2, mu=0.3),
    regularizers.ScoreMatching(sigma=0.1, mu=0.0, antithetic=False),
    regularizers.Hessian(samples=2),
    regularizers.Cure(h=0.7),
    regularizers.IGSum(beta=0.2, eps=0.1, segments=2, steps=2, attack_segments=2),
]


@pytest.mark.parametrize("compiler", [None, "aot_eager"])
@pytest.mark.parametrize("regularizer", CASES, ids=repr)
def test_penalty_alone(regularizer, compiler, fresh_dynamo):
    model, x = smooth()
    twin = copy.deepcopy(model)
    values = expected(regularizer, twin, x)
    value, xs = values.mean(), (x.clone().requires_grad_(),)
    wanted = torch.autograd.grad(value, list(twin.parameters()), allow_unused=True, materialize_grads=True)
    torch.manual_seed(SEED)
    of_each = regularizer(lambda inputs: model(*inputs), model(*xs), xs, Y)
    torch.testing.assert_close(of_each, values, rtol=1e-10, atol=0)
    objective = RegularizedObjective(
        *(model, 1.0),
        criterion=nothing,
        compile=compiler is not None,
        backend=compiler or "inductor",
        regularizer=regularizer,
    )
    torch.manual_seed(SEED)
    out = objective(x, Y)
    out.loss.backward()
    torch.testing.assert_close(out.penalty, value.detach(), rtol=1e-9, atol=0)
    assert relative_error(gradients(model), list(wanted)) < 1e-9
    assert max(g.abs().max() for g in wanted) > 1e-6


def _float32_step(name, context, coeff=1.0, scale=None, compile=False, **options):
    """Penalty and gradients of a step in float32, always of the same model and random numbers."""
    model, x = smooth()
    model, x = model.float(), x.float()
    objective = RegularizedObjective(model, coeff, compile=compile, regularizer=regularizers.make(name), **options)
    torch.manual_seed(SEED)
    with context:  # without the backward
        out = objective(x, Y, scale)
    out.loss.backward()
    return out.penalty, [g.double() for g in gradients(model)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["hessian", *(pytest.param(n, marks=pytest.mark.long) for n in ("input_gradient", "score_matching", "cure"))],
)
def test_penalty_alone_by_inductor(name, fresh_dynamo):
    """float32, with eager's random numbers: inductor draws others by itself."""
    context = torch._inductor.config.patch(fallback_random=True)
    eager, expected = _float32_step(name, context, criterion=nothing)
    compiled, grads = _float32_step(name, context, compile=True, criterion=nothing)
    torch.testing.assert_close(eager, compiled, rtol=1e-2 if name == "score_matching" else 1e-4, atol=1e-6)
    assert relative_error(grads, expected) < (2e-2 if name == "score_matching" else 1e-4)


def test_hessian_is_unbiased():
    model, x = smooth()
    xs = (x.requires_grad_(),)
    regularizer = regularizers.Hessian(samples=1000)
    given = regularizer(lambda inputs: model(*inputs), model(*xs), xs, Y).detach()
    for b in range(4):
        h = torch.autograd.functional.hessian(lambda x, b=b: logit(model, x, Y[b]), x[b].detach())
        assert given[b].item() == pytest.approx(h.square().sum().item(), rel=0.15)


@pytest.mark.parametrize("antithetic", [True, False])
def test_score_matching_estimates_the_trace(antithetic):
    """Of a quadratic form: exactly known, and the noise of the first term gone with v and -v."""
    a = torch.randn(6, 6, dtype=torch.float64)

    def quadratic(inputs):
        (x,) = inputs
        return torch.stack([((x @ a) * x).sum(1) / 2 + 3 * x.sum(1), 0 * x.sum(1)], 1)

    x = torch.randn(3, 6, dtype=torch.float64).requires_grad_()
    regularizer = regularizers.ScoreMatching(sigma=0.1, samples=2000, mu=0.0, antithetic=antithetic)
    y = torch.zeros(3, dtype=torch.int64)
    given = regularizer(quadratic, quadratic((x,)), (x,), y)
    half = (x @ (a + a.t()) / 2 + 3).square().sum(1) / 2
    spread = 2 * (2 * half).sqrt().max() / 0.1 / math.sqrt(2000)
    error = (given - half - a.trace()).abs().max()
    assert error < (0.5 if antithetic else 5 * spread.item())


# --------------------------------------------------------------------------------------------------------------------
# with what the objective has


@pytest.mark.parametrize(
    ("name", "compiler"), [*((name, None) for name in RIVALS), ("input_gradient", "aot_eager"), ("cure", "aot_eager")]
)
def test_a_step_moves_running_statistics_once(name, compiler, fresh_dynamo):
    model, x = problem(torch.float64)
    plain = copy.deepcopy(model)
    plain(x)
    objective = RegularizedObjective(
        model, 0.5, compile=compiler is not None, backend=compiler or "inductor", regularizer=name
    )
    out = objective(x, torch.arange(5))
    out.loss.backward()
    torch.testing.assert_close(out.loss.detach(), out.ce + 0.5 * out.penalty)
    assert int(model[1].num_batches_tracked) == 1
    for a, b in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("compile", [False, True])
def test_hessian_of_a_piecewise_linear_model_is_an_error(compile, fresh_dynamo):
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    objective = RegularizedObjective(model, 1.0, compile=compile, backend="aot_eager", regularizer="hessian")
    x, y = torch.randn(4, 6), torch.arange(4) % 3
    with pytest.raises(RuntimeError, match=r"the Hessian of the model is 0, .* replace its ReLU"):
        objective(x, y)
    model[2] = nn.Softplus()
    objective = RegularizedObjective(model, 1.0, compile=compile, backend="aot_eager", regularizer="hessian")
    assert objective(x, y).penalty > 0


@pytest.mark.parametrize("batch_statistics", [False, True])
def test_fraction_takes_the_targets_of_its_part(batch_statistics):
    model, x = smooth()
    model.train(batch_statistics)
    objective = RegularizedObjective(model, 1.0, fraction=0.5, compile=False, regularizer="input_gradient")
    torch.manual_seed(SEED)
    out = objective(x, Y)
    torch.manual_seed(SEED)
    part = torch.randperm(4)[2:]
    xs = (x[part].requires_grad_(),)
    wanted = regularizers.InputGradient()(model, model(*xs), xs, Y[part]).mean()
    torch.testing.assert_close(out.penalty, wanted.detach())


def test_penalty_value_and_its_fixed_seed():
    model, x = smooth()
    for regularizer in (regularizers.InputGradient(3), regularizers.Hessian()):
        objective = RegularizedObjective(model, 1.0, compile=False, regularizer=regularizer)
        before = torch.get_rng_state()
        value = objective.penalty(x, Y)
        assert torch.equal(before, torch.get_rng_state())
        torch.manual_seed(0)
        xs = (x.clone().requires_grad_(),)
        wanted = regularizer(lambda inputs: model(*inputs), model(*xs), xs, Y).mean()
        torch.testing.assert_close(value, wanted.detach())
        assert not value.requires_grad
    with pytest.raises(TypeError, match="target must be a tensor, got NoneType"):
        objective.penalty(x)


@pytest.mark.parametrize("name", RIVALS)
def test_autocast(name):
    """bfloat16: what takes differences runs in float32, and its penalty is that of float32."""
    wide, expected = _float32_step(name, contextlib.nullcontext(), criterion=nothing)
    penalty, grads = _float32_step(name, torch.autocast("cpu", torch.bfloat16), criterion=nothing)
    tolerance = 1e-5 if regularizers.make(name).precise else 0.05
    torch.testing.assert_close(penalty, wide, rtol=tolerance, atol=0)
    assert relative_error(grads, expected) < tolerance


@pytest.mark.parametrize("name", RIVALS)
def test_float16_with_a_loss_scale(name):
    _, expected = _float32_step(name, contextlib.nullcontext(), 0.1)
    _, grads = _float32_step(name, torch.autocast("cpu", torch.float16), 0.1, 1024.0)
    assert relative_error(grads, expected) < 0.02


def test_samples_without_a_target():
    model, x = smooth()
    xs = (x.requires_grad_(),)
    y = torch.tensor([0, -100, 1, -100])
    for regularizer in (regularizers.InputGradient(), regularizers.LossGradient(), regularizers.Cure()):
        value = regularizer(lambda inputs: model(*inputs), model(*xs), xs, y)
        assert ((value == 0) == (y == -100)).all()
        assert all(
            g.isfinite().all()
            for g in torch.autograd.grad(
                value.sum(), list(model.parameters()), materialize_grads=True, allow_unused=True
            )
        )


@pytest.mark.parametrize("name", ["score_matching", "cure"])
def test_differences_refuse_dropout(name):
    """Two masks differ by more than x and x + h v."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.Dropout(0.1), nn.Linear(8, 5))
    x, y = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
    objective = RegularizedObjective(model, 0.1, regularizer=name, compile=False)
    with pytest.raises(ValueError, match=rf"{name}: 2 \(Dropout\) drops other units"):
        objective(x, y)
    model[2].eval()
    objective(x, y).loss.backward()
    model[2].train().p = 0.0
    objective(x, y).loss.backward()
    RegularizedObjective(model.train(), 0.1, compile=False)(x, y).loss.backward()
    recurrent = RegularizedObjective(nn.LSTM(8, 5, 2, dropout=0.5), 0.1, regularizer=name, compile=False)
    with pytest.raises(ValueError, match=r"\(LSTM\) drops other units"):
        recurrent(x[:, 0], y)


def test_several_inputs():
    model, xs = Product().double(), (torch.rand(4, 4, dtype=torch.float64), torch.rand(4, 3, dtype=torch.float64))
    for name in RIVALS:
        out = RegularizedObjective(model, 1.0, compile=False, regularizer=name)(xs, Y)
        assert out.penalty.isfinite()
    leaves = [x.clone().requires_grad_() for x in xs]
    g = torch.autograd.grad(model(*leaves).gather(1, Y.unsqueeze(1)).sum(), leaves)
    wanted = torch.cat(g, 1).norm(dim=1).mean()
    out = RegularizedObjective(model, 1.0, compile=False, regularizer="input_gradient")(xs, Y)
    torch.testing.assert_close(out.penalty, wanted)


def test_the_densitys_path_is_the_one_read_of_the_logits():
    model, x = smooth()
    assert RegularizedObjective(model, 1.0, compile=False)._spec().one_read
    assert not RegularizedObjective(model, 1.0, compile=False, regularizer="loss_gradient")._spec().one_read
    named = RegularizedObjective(model, 1.0, p=3, compile=False, regularizer=regularizers.Density(3))(x, Y)
    torch.testing.assert_close(
        named.penalty, densreg.RegularizedObjective(model, 1.0, p=3, compile=False)(x, Y).penalty
    )


# --------------------------------------------------------------------------------------------------------------------
# errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nothing",), "regularizer must be one of density, input_gradient, .*; got 'nothing'"),
        (("cure", 3), "p is for density, input_gradient, loss_gradient; regularizer cure has its own norm, got p=3"),
        (("hessian", 2, "taylor"), "path is how the density penalty is computed; .* got 'taylor'"),
        (("input_gradient", 0.5), "p must be at least 1"),
    ],
)
def test_names(arguments, message):
    with pytest.raises(ValueError, match=message):
        regularizers.make(*arguments)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cure", {"eps": 1}, "regularizer cure has no option 'eps': expected h"),
        ("input_gradient", {"h": 1}, "regularizer input_gradient has no option 'h': expected none"),
        ("cure", {"h": 0}, "cure: h must be finite and above 0, got 0"),
        ("ig_sum", {"steps": 1.5}, "ig_sum: steps must be a whole number of at least 1, got 1.5"),
        ("score_matching", {"mu": -1}, "mu must be finite and at least 0, got -1"),
        ("hessian", {"samples": 0}, "hessian: samples must be a whole number of at least 1, got 0"),
    ],
)
def test_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        regularizers.make(name, **options)


def test_objectives_errors():
    model, x = smooth()
    with pytest.raises(ValueError, match="path \"directional\" is for the density penalty, got the regularizer 'cure'"):
        RegularizedObjective(model, 1.0, path="directional", regularizer="cure")
    objective = RegularizedObjective(model, 1.0, compile=False, regularizer="input_gradient", criterion=F.cross_entropy)
    with pytest.raises(TypeError, match=r"target must hold int64 class indices, got torch\.float64"):
        objective(x, torch.rand(4, 4, dtype=torch.float64))


class _Plain(nn.Module):
    """The formula of a norm over some dimensions, of which torch has every derivative."""

    def __init__(self, norm, dims):
        super().__init__()
        self.weight, self.bias, self.dims = norm.weight, norm.bias, dims
        self.shape = (-1,) if isinstance(norm, nn.LayerNorm) else (1, -1, 1)

    def forward(self, x):
        centred = x - x.mean(self.dims, keepdim=True)
        unit = centred / (centred.square().mean(self.dims, keepdim=True) + 1e-5).sqrt()
        return unit * self.weight.view(self.shape) + self.bias.view(self.shape)


@pytest.mark.parametrize(
    ("norm", "dims", "compiler"),
    [
        (lambda: nn.LayerNorm(5), -1, None),
        (lambda: nn.LayerNorm(5), -1, "aot_eager"),
        (lambda: nn.InstanceNorm1d(3, affine=True), -1, None),
        (lambda: nn.BatchNorm1d(3), (0, 2), None),
    ],
    ids=["LayerNorm", "LayerNorm, compiled", "InstanceNorm", "BatchNorm"],
)
def test_hessian_through_norms(norm, dims, compiler, fresh_dynamo):
    """In training mode; of which torch's third derivative is wrong, or missing: against the formula in plain torch."""
    layers = (nn.Linear(6, 15), nn.Unflatten(1, (3, 5)), norm(), nn.Tanh(), nn.Flatten(), nn.Linear(15, 4))
    model = nn.Sequential(*layers).double()
    with torch.no_grad():
        for w in model[2].parameters():
            w.add_(torch.randn_like(w), alpha=0.1)
    x = torch.rand(4, 6, dtype=torch.float64)
    twin = copy.deepcopy(model)
    twin[2] = _Plain(twin[2], dims)
    torch.manual_seed(SEED)
    leaf = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(twin(leaf).gather(1, Y.unsqueeze(1)).sum(), leaf, create_graph=True)
    (product,) = torch.autograd.grad((g * torch.randn_like(x)).sum(), leaf, create_graph=True)
    value = product.square().sum() / 4
    wanted = torch.autograd.grad(value, list(twin.parameters()), allow_unused=True, materialize_grads=True)
    options = {"compile": compiler is not None, "backend": compiler or "inductor"}
    torch.manual_seed(SEED)
    out = RegularizedObjective(model, 1.0, criterion=nothing, regularizer="hessian", **options)(x, Y)
    out.loss.backward()
    torch.testing.assert_close(out.penalty, value.detach())
    assert relative_error(gradients(model), list(wanted)) < 1e-9


# --------------------------------------------------------------------------------------------------------------------
# what a regularizer may say of itself


@dataclasses.dataclass(frozen=True)
class _Bare:
    """What the protocol asks for, and nothing more."""

    name: ClassVar[str] = "bare"
    precise: ClassVar[bool] = False

    def __call__(self, classify, logits, xs, target):
        assert target is None or len(target) == len(logits)
        return densreg.input_score(logits, xs)[0].flatten(1).square().sum(1)


class _Squared(regularizers.Density):
    """As the papers of the rivals have it."""

    name: ClassVar[str] = "squared"

    def __call__(self, classify, logits, xs, target):
        return super().__call__(classify, logits, xs, target).square()


def test_another_penalty_that_is_made_of_the_density_penalty():
    """It is what it computes, not the norm that it is made of."""
    model, x = smooth()
    objective = RegularizedObjective(model, 1.0, compile=False, regularizer=_Squared())
    leaf = x.clone().requires_grad_()
    expected = densreg.density_penalty(model(leaf), leaf, reduction="none").square().mean().detach()
    torch.testing.assert_close(objective(x, Y).penalty.detach(), expected)
    torch.testing.assert_close(objective.penalty(x), expected)
    with pytest.raises(ValueError, match='path "directional" is for the density penalty, got the regularizer _Squared'):
        objective.path = "directional"


@dataclasses.dataclass(frozen=True)
class _Says(_Bare, regularizers.Traits):
    needs_target: ClassVar[bool] = False
    seen: list = dataclasses.field(default_factory=list)

    def check_model(self, model):
        self.seen.append(type(model).__name__)

    def check_value(self, penalty):
        self.seen.append(penalty.item())


@pytest.mark.parametrize("compiler", [None, "aot_eager"])
def test_a_rival_of_ones_own_needs_three_names(compiler, fresh_dynamo):
    model, x = smooth()
    twin = copy.deepcopy(model)
    options = {"compile": compiler is not None, "backend": compiler or "inductor", "criterion": nothing}
    RegularizedObjective(model, 1.0, regularizer=_Bare(), **options)(x, Y).loss.backward()
    leaf = x.clone().requires_grad_()
    (score,) = torch.autograd.grad(torch.logsumexp(twin(leaf), 1).sum(), leaf, create_graph=True)
    score.flatten(1).square().sum(1).mean().backward()
    assert relative_error(gradients(model), gradients(twin)) < 1e-10
    for name in ("needs_target", "first_order", "unrolled"):
        assert regularizers.trait(_Bare(), name) is getattr(regularizers.Traits, name)


def test_what_a_rival_says_is_asked():
    model, x = smooth()
    rival = _Says()
    objective = RegularizedObjective(model.train(), 1.0, regularizer=rival, compile=False, interval=2)
    for _ in range(3):
        objective(x, Y)
    assert [type(each) for each in rival.seen] == [str, float, str], "the model in each penalized step, the value once"
    taken = RegularizedObjective(model.eval(), 1.0, regularizer=rival, compile=False, fraction=0.5)
    assert taken(x, Y).penalty.isfinite()
    with pytest.raises(TypeError, match="target must be a tensor, got tuple"):
        RegularizedObjective(
            model, 1.0, regularizer=_Bare(), compile=False, fraction=0.5, criterion=lambda f, y: f.sum()
        )(x, (Y, Y))


def test_traits_of_the_rivals():
    def those(name, expected):
        return [each for each, cls in REGULARIZERS.items() if regularizers.trait(cls, name) is expected]

    assert those("needs_target", False) == those("first_order", True) == ["density"]
    assert those("unrolled", True) == ["ig_sum"]
    ordered = [name for name, cls in REGULARIZERS.items() if "p" in regularizers.option_names(cls)]
    assert ordered == ["density", "input_gradient", "loss_gradient"]
