"""The linear head without logits: against logits in float64, the penalty alone, in every parameter."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
import torch.nn.functional as F
from reference import DTYPES, HALF_ULP, ORDERS, TRANSFORMS, double, error
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import densreg
from benchmarks.second_order import parameter_gradient, problem, reference, relative_error, torch_penalty
from benchmarks.timing import peak_bytes
from densreg import _torch, linear, tiles
from densreg.ops import accumulation_dtype

inf, nan = math.inf, math.nan
f64 = torch.float64


class Trunk(nn.Module):
    """The features of a network; its parameters are those of its head, too."""

    def __init__(self, model: nn.Sequential):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model[:-1](x)


def split(dtype: torch.dtype, **options) -> tuple[Trunk, nn.Linear, Tensor]:
    model, x = problem(dtype, **options)
    return Trunk(model), model[-1], x


TARGET = torch.tensor([0, 3, 6, 3, 1])


def penalty_gradient(dtype: torch.dtype, p: float, backend: str | None = None, tile: int = 3) -> list[Tensor]:
    trunk, head, x = split(dtype)

    def penalty(h, x):
        return densreg.linear_density_loss(h, head.weight, head.bias, TARGET, x, 1.0, p, tile=tile)[2]

    return parameter_gradient(trunk, x, penalty, backend)


@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("compiler", [None, "aot_eager"])
def test_penalty_alone(p, compiler, fresh_dynamo):
    assert relative_error(penalty_gradient(f64, p, compiler), reference(p)) < 1e-12


@pytest.mark.slow
@pytest.mark.long
def test_penalty_alone_by_inductor(fresh_dynamo):
    assert relative_error(penalty_gradient(f64, 2, "inductor"), reference(2)) < 1e-12


@pytest.mark.parametrize("p", [1, 2, 4])
def test_float32_is_no_worse_than_the_logits(p):
    wide, (model, x) = reference(p), problem(torch.float32)
    logits = relative_error(parameter_gradient(model, x, lambda f, x: densreg.density_penalty(f, x, p)), wide)
    assert relative_error(penalty_gradient(torch.float32, p), wide) <= max(logits, 2e-6)


# --------------------------------------------------------------------------------------------------------------------
# the loss: classes, tiles, options


def cosface(s: Tensor) -> Tensor:
    return s - 0.35


def arcface(s: Tensor) -> Tensor:
    return 3 * torch.cos(torch.acos((s / 30).clamp(-1 + 1e-7, 1 - 1e-7)) + 0.5)


def by_logits(h, weight, bias, target, x, coeff, p=2, margin=None, class_weight=None, **options):
    """:func:`densreg.linear_density_loss` by torch alone."""
    logits = F.linear(h, weight, bias)
    (g,) = torch.autograd.grad(torch.logsumexp(logits, 1).sum(), x, create_graph=True)
    if margin is not None:
        counts = target != options.get("ignore_index", -100)
        at = F.one_hot(target * counts, logits.shape[1]).bool() & counts.unsqueeze(1)
        logits = torch.where(at, margin(logits), logits)
    ce = F.cross_entropy(logits, target, class_weight, **options)
    penalty = torch.linalg.vector_norm(g.flatten(1), p, dim=1).mean()
    return ce + coeff * penalty, ce, penalty


def head_problem(classes: int, rows: int = 5, features: int = 7, bias: bool = True, dtype=f64):
    """A trunk, a head of any number of classes, and what goes in."""
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, features), nn.GELU()).to(dtype)
    weight, offset = torch.randn(classes, features, dtype=dtype), torch.randn(classes, dtype=dtype)
    x, y = torch.randn(rows, 6, dtype=dtype), torch.randint(classes, (rows,))
    return trunk, weight.requires_grad_(), offset.requires_grad_() if bias else None, x.requires_grad_(), y


def compare(trunk, weight, bias, x, y, options, tile, tolerance=1e-12):
    """Values, and the gradients of each term alone and of the sum, in trunk and head."""
    inputs = [*trunk.parameters(), weight] + ([] if bias is None else [bias])
    torchs = by_logits(trunk(x), weight, bias, y, x, 0.3, **options)
    grad = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    for term, b in enumerate(torchs):
        a = densreg.linear_density_loss(trunk(x), weight, bias, y, x, 0.3, tile=tile, **options)[term]
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
        expected = torch.autograd.grad(b, inputs, **grad)
        for _ in range(2):  # by the logits that were kept, and by logits that are computed again
            for u, v in zip(torch.autograd.grad(a, inputs, **grad), expected, strict=True):
                assert u.dtype == v.dtype
                assert (u - v).norm() <= tolerance * max(v.norm(), 1e-3)


@pytest.mark.parametrize(
    ("classes", "tile", "bias", "options"),
    [
        (11, 256, True, {}),
        (300, 64, True, {"label_smoothing": 0.1}),
        (300, 64, False, {"margin": cosface}),
        (65, 64, True, {"margin": arcface, "label_smoothing": 0.2}),
        (64, 64, True, {"label_smoothing": 1.0}),
        (65, 16, False, {"ignore_index": 3, "p": 1}),
        (65, 16, True, {"ignore_index": 3, "label_smoothing": 0.1, "p": inf}),
        (20, 7, True, {"class_weight": torch.linspace(0, 2, 20, dtype=f64), "ignore_index": 3, "p": 1.5}),
        (2, 1, True, {"margin": cosface}),
        (1, 4, True, {"label_smoothing": 0.1}),
        (9, None, True, {}),
    ],
)
def test_the_loss_and_its_terms(classes, tile, bias, options):
    trunk, weight, offset, x, y = head_problem(classes, bias=bias)
    if "ignore_index" in options:
        y[1] = 3
    compare(trunk, weight, offset, x, y, options, tile)


@pytest.mark.parametrize("compiler", [None, "aot_eager"])
def test_a_graph_that_is_kept(compiler, fresh_dynamo):
    """The kept logits, whose place the first gradient took, are not read again."""
    trunk, weight, bias, x, y = head_problem(50)

    def loss(x):
        return densreg.linear_density_loss(trunk(x), weight, bias, y, x, 0.3, tile=16)[0]

    with _torch.tracing_autograd():
        ours = (loss if compiler is None else torch.compile(loss, backend=compiler, fullgraph=True))(x)
    (expected,) = torch.autograd.grad(by_logits(trunk(x), weight, bias, y, x, 0.3)[0], weight)
    for _ in range(2):
        (found,) = torch.autograd.grad(ours, weight, retain_graph=True)
        assert (found - expected).norm() <= 1e-12 * expected.norm()
        found.data.zero_()


@pytest.mark.parametrize("rows", [0, 1, 7, 8, 20, 100])
def test_fewer_and_more_rows_than_features(rows):
    """Of 7 features: all logits are kept between the passes, a part of them, or none."""
    trunk, weight, bias, x, y = head_problem(10, rows=rows)
    if rows:
        compare(trunk, weight, bias, x, y, {"label_smoothing": 0.1}, 4)
        return
    _, ce, penalty = densreg.linear_density_loss(trunk(x), weight, bias, y, x, 0.1, tile=4)
    assert ce.isnan()
    assert penalty.isnan()
    grads = torch.autograd.grad(densreg.linear_log_density(trunk(x), weight, bias, tile=4).sum(), [weight, bias])
    assert all(g.eq(0).all() for g in grads)


@pytest.mark.parametrize("frozen", ["trunk", "weight", "bias", "head"])
def test_frozen_parameters(frozen):
    trunk, weight, bias, x, y = head_problem(20)
    parts = {"trunk": list(trunk.parameters()), "weight": [weight], "bias": [bias], "head": [weight, bias]}[frozen]
    for t in parts:
        t.requires_grad_(False)
    inputs = [t for t in (*trunk.parameters(), weight, bias) if t.requires_grad]
    ours, torchs = (
        torch.autograd.grad(f(trunk(x), weight, bias, y, x, 0.3)[0], inputs)
        for f in (densreg.linear_density_loss, by_logits)
    )
    for a, b in zip(ours, torchs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_tied_weight():
    """The trunk uses the head's weight: its gradient is the sum, also where it is differentiated again."""
    weight = torch.randn(12, 6, dtype=f64, requires_grad=True)
    x, y = torch.randn(4, 12, dtype=f64, requires_grad=True), torch.tensor([0, 5, 11, 3])
    results = []
    for f in (densreg.linear_density_loss, by_logits):
        h = torch.tanh(x @ weight)
        (first,) = torch.autograd.grad(f(h, weight, None, y, x, 0.3)[0], weight, create_graph=True)
        results.append((first, *torch.autograd.grad(first.square().sum(), weight)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("compiler", [None, "aot_eager"])
def test_computed_weight(compiler, fresh_dynamo):
    """A head that is computed from parameters is one like any other; from x, part of the score would be missing."""
    trunk, raw, bias, x, y = head_problem(4, rows=3)

    def gradient(f, raw):
        weight, h = torch.nn.functional.normalize(raw), trunk(x)
        return torch.autograd.grad(f(h, weight, 2 * bias, y, x, 0.3)[2], [raw, bias, *trunk.parameters()])

    ours = gradient if compiler is None else torch.compile(gradient, backend=compiler, fullgraph=True)
    with _torch.tracing_autograd():
        for a, b in zip(ours(densreg.linear_density_loss, raw), gradient(by_logits, raw), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    for name, change in (("weight", {"weight": raw * x.mean()}), ("bias", {"bias": bias + x.mean()})):
        arguments = {"weight": raw, "bias": bias} | change
        with pytest.raises(ValueError, match=f"{name}: expected one that does not depend on x"):
            densreg.linear_density_loss(trunk(x), target=y, x=x, coeff=0.1, **arguments)


@pytest.mark.parametrize("below", [300, 1000, math.inf])
def test_second_order_far_from_the_target(below):
    """Of the log density that comes with the cross-entropy, where the target is far below the other classes."""
    trunk, weight, bias, x, _ = head_problem(4, rows=3)
    bias = bias.detach().clone()
    bias[0] -= below
    target = torch.zeros(3, dtype=torch.int64)

    def gradient(log_density):
        (score,) = torch.autograd.grad(log_density.sum(), x, create_graph=True)
        return torch.autograd.grad(score.norm(dim=1).mean(), [weight, *trunk.parameters()])

    ours = gradient(densreg.linear_density_cross_entropy(trunk(x), weight, bias, target)[1])
    logits = torch.nn.functional.linear(trunk(x), weight, bias)
    for a, b in zip(ours, gradient(logits.logsumexp(1)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def test_rows_without_logits():
    trunk, weight, bias, x, y = head_problem(50, rows=20)
    y[3] = -100
    h = trunk(x)
    ce, log_density, correct = densreg.linear_density_cross_entropy(h, weight, bias, y, 0.1, tile=16)
    logits = F.linear(h, weight, bias)
    torch.testing.assert_close(ce, F.cross_entropy(logits, y, reduction="none", label_smoothing=0.1))
    torch.testing.assert_close(log_density, torch.logsumexp(logits, 1))
    torch.testing.assert_close(densreg.linear_log_density(h, weight, bias, tile=16), torch.logsumexp(logits, 1))
    y[:10] = logits.argmax(1)[:10]
    y[3] = -100
    correct = densreg.linear_density_cross_entropy(h, weight, bias, y, tile=16)[2]
    assert torch.equal(correct, logits.argmax(1) == y)
    assert correct.sum() >= 9


def test_an_ignored_target_is_not_correct():
    """Not even where every logit is below 0, which stands for the logit that such a target does not have."""
    h, weight, bias = torch.randn(3, 4), torch.randn(9, 4), torch.full((9,), -100.0)
    y = F.linear(h, weight, bias).argmax(1)
    y[1] = -100
    assert densreg.linear_density_cross_entropy(h, weight, bias, y, tile=4)[2].tolist() == [True, False, True]


# --------------------------------------------------------------------------------------------------------------------
# masked classes, large logits, infinities


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("masked", ["a class", "a tile", "the first tile", "all but one", "a target", "all"])
def test_masked_classes(masked, label_smoothing):
    trunk, weight, bias, x, y = head_problem(40)
    y = y % 8 + 20
    spans = {"a class": [(3, 4)], "a tile": [(8, 16)], "the first tile": [(0, 8)], "all but one": [(0, 20), (21, 40)]}
    with torch.no_grad():
        for begin, end in spans.get(masked, [(0, 40)] if masked == "all" else [(int(y[0]), int(y[0]) + 1)]):
            bias[begin:end] = -inf
    if masked == "all but one":
        y = torch.full_like(y, 20)
    ours, torchs = [], []
    for f, options, results in ((densreg.linear_density_loss, {"tile": 8}, ours), (by_logits, {}, torchs)):
        h = trunk(x)
        terms = f(h, weight, bias, y, x, 0.3, label_smoothing=label_smoothing, **options)
        inputs = [*trunk.parameters(), weight, bias]
        grads = [torch.autograd.grad(t, inputs, retain_graph=True, materialize_grads=True) for t in terms[:0:-1]]
        results.extend([*terms, *sum(grads, ())])
    for a, b in zip(ours, torchs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13, equal_nan=True)


ROWS = {
    "large": [1e4, -1e4, 9999.0, 0.0],
    "equal and large": [1e4, 1e4, 1e4 - 2, -1e4],
    "sure": [60.0, 0.0, -1.0, 2.0],
    "surer": [300.0, 0.0, -1.0, 2.0],
    "wrong": [-60.0, 0.0, 60.0, 2.0],
    "nan": [nan] * 4,
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, f64])
@pytest.mark.parametrize("target", [0, 2])
def test_extreme_rows_keep_their_digits(dtype, target):
    """Logits that are given exactly, each between quiet rows, which it must not poison."""
    quiet = [0.5, 1.0, -1.0, 0.0]
    h = torch.tensor([row for extreme in ROWS.values() for row in (quiet, extreme)] + [quiet]).to(dtype)
    h, weight, y = h.requires_grad_(), torch.eye(4, dtype=dtype), torch.full((2 * len(ROWS) + 1,), target)
    u = torch.linspace(-1, 1, h.numel(), dtype=dtype).view_as(h)
    bound = {"rtol": 2e-6 if dtype != f64 else 1e-12, "atol": 0 if dtype == f64 else 1e-36, "equal_nan": True}
    ce, log_density, _ = densreg.linear_density_cross_entropy(h, weight, None, y, tile=2)
    _, _, _, score, _ = linear._head(h, weight, None, y, need_score=True, tile=2)
    wide = double(h)
    others = torch.cat([wide[:, :target], wide[:, target + 1 :]], 1)
    sure = F.softplus(torch.logsumexp(others, 1) - wide[:, target], threshold=40)  # F.cross_entropy is 0 at 60
    expected = sure, torch.logsumexp(wide, 1), torch.softmax(wide, 1)
    for a, b in zip((ce, log_density, score), expected, strict=True):
        torch.testing.assert_close(a.detach().double(), b.detach(), **bound)
        assert a[::2].isfinite().all(), "a row poisoned another"
    if dtype == torch.float16:
        bound["rtol"], bound["atol"] = 2 * HALF_ULP[dtype], 6e-8
    (grad,) = torch.autograd.grad(ce.sum(), h, retain_graph=True)
    (wanted,) = torch.autograd.grad(expected[0].sum(), wide)
    torch.testing.assert_close(grad.double(), wanted, **bound)
    (grad,) = torch.autograd.grad(score, h, u.to(score.dtype))
    (wanted,) = torch.autograd.grad(expected[2], wide, u.double())
    # P (T - d) cancels where a sample is sure: what is left bears the rounding of T
    torch.testing.assert_close(grad.double(), wanted, rtol=bound["rtol"], atol=max(bound["atol"], 1e-6), equal_nan=True)


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize(("dtype", "low"), [(torch.float32, -100), (f64, -800)])
def test_no_other_class_beside_a_target_that_is_far_below_zero(dtype, low, classes):
    """exp(0 - L) would overflow, and the score of no class is 0."""
    torch.manual_seed(0)
    x = torch.randn(2, 5, dtype=dtype, requires_grad=True)
    trunk, weight = torch.randn(4, 5, dtype=dtype), torch.randn(classes, 4, dtype=dtype)
    bias = torch.full((classes,), -math.inf, dtype=dtype)
    bias[0] = low
    loss, _, penalty = densreg.linear_density_loss((x @ trunk.T).tanh(), weight, bias, torch.zeros(2).long(), x, 0.5)
    (score,) = torch.autograd.grad(torch.logsumexp((x @ trunk.T).tanh() @ weight.T + bias, 1).sum(), x)
    torch.testing.assert_close(penalty.double(), score.norm(dim=1).mean().double())
    torch.testing.assert_close(loss.double(), 0.5 * score.norm(dim=1).mean().double())


def test_autocast_does_not_reach_a_gradient_with_a_graph():
    h, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)

    def gradient():
        (g,) = torch.autograd.grad(densreg.linear_log_density(h, weight).sum(), h, create_graph=True)
        return g

    expected = gradient()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(gradient(), expected)


def test_infinite_class():
    """A bias of +inf gives what torch gives."""
    h, weight, bias = torch.randn(3, 4), torch.randn(9, 4), torch.randn(9)
    bias[5] = inf
    ce, log_density, _ = densreg.linear_density_cross_entropy(h, weight, bias, torch.tensor([0, 5, -100]), tile=4)
    assert log_density.tolist() == torch.logsumexp(F.linear(h, weight, bias), 1).tolist() == [inf] * 3
    assert ce.isfinite().tolist() == [False, False, True]


# --------------------------------------------------------------------------------------------------------------------
# precision


def test_million_classes():
    h, weight = torch.randn(2, 4), torch.randn(1_000_000, 4)
    log_density = densreg.linear_log_density(h, weight)
    assert error(log_density, torch.logsumexp(h.double() @ weight.double().t(), 1)) < 2e-7
    score = linear._head(h, weight, need_score=True)[3]
    assert error(score, torch.softmax(h.double() @ weight.double().t(), 1) @ weight.double()) < 5e-6


def half_problem(dtype, seed, classes=50):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, classes))
    return model.to(dtype), torch.randn(6, 12).to(dtype).requires_grad_()


def penalty_of(model, x, head, **options):
    if not head:
        return densreg.density_penalty(model(x), x, **options)
    target = torch.zeros(len(x), dtype=torch.int64)
    last = model[-1]
    return densreg.linear_density_loss(model[:-1](x), last.weight, last.bias, target, x, 1.0, tile=16, **options)[2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("narrow", [False, True])
def test_half_precision_by_medians(dtype, amp, narrow, monkeypatch):
    """Against the path with logits. ``narrow``: products of half operands, as on a GPU."""
    if narrow:
        monkeypatch.setattr(linear, "product_dtype", lambda h, weight: dtype)
    errors: dict[bool, list[float]] = {True: [], False: []}
    for seed in range(8):
        model, x = half_problem(f64, seed)
        expected = parameter_gradient(model, x, torch_penalty(2))
        for head in errors:
            model, x = half_problem(torch.float32 if amp else dtype, seed)
            with torch.autocast("cpu", dtype, enabled=amp):
                value = penalty_of(model, x, head)
            assert value.dtype == torch.float32
            grads = torch.autograd.grad(value, list(model.parameters()), materialize_grads=True, allow_unused=True)
            errors[head].append(relative_error(grads, expected))
    assert statistics.median(errors[True]) <= 1.25 * statistics.median(errors[False])
    assert statistics.median(errors[True]) < (0.05 if dtype == torch.bfloat16 else 0.01)


@pytest.mark.parametrize("size", [1e-6, 1.0, 65536.0])
def test_fp16_products_neither_underflow_nor_overflow(size):
    """20,000 classes of which none is likely, and a loss scale."""
    h, weight = (torch.randn(4, 16) / 4).half().float(), (torch.randn(20_000, 16) / 100).half().float()
    y, u = torch.tensor([0, 7, 19_999, -100]), (size * torch.randn(4, 16))
    results = []
    for dtype in (torch.float16, f64):
        wide = torch.float64 if dtype == f64 else torch.float32
        a, w = h.to(wide).requires_grad_(), weight.to(wide).requires_grad_()
        rest, own, _, score, *_ = linear._LinearDensity.call(a, w, None, y, -100, dtype, 4096, True, False, True)
        total = size * F.softplus(rest - own)[:3].sum() + (score * u).sum()
        dh, dw = torch.autograd.grad(total, (a, w))
        results.append((score, dh / size, dw / size))
    for name, a, b in zip(("score", "dh", "dw"), *results, strict=True):
        off = (a.double() - b).abs()
        assert a.isfinite().all(), name
        if name != "dw":
            assert off.max() < 2e-3 * b.abs().max(), name
        else:  # and the many small rows, but for what fp16 cannot hold
            assert (off <= 2e-3 * b.abs() + 2e-3 * b[100:].abs().max()).all()


def test_fp16_products_of_very_many_classes_keep_their_digits():
    """P and c are far below fp16's smallest normal number, 6e-5."""
    classes = 200_000
    h, weight = (torch.randn(4, 8) / 4).half(), (torch.randn(classes, 8) / 100).half()
    y, u = torch.tensor([0, 7, 9, 3]), torch.randn(4, 8) / 10
    found = []
    for dtype in (torch.float16, f64):
        a, w = (t.to(torch.float32 if dtype == torch.float16 else f64).requires_grad_() for t in (h, weight))
        rest, own, _, score, *_ = linear._LinearDensity.call(a, w, None, y, -100, dtype, 8192, True, False, True)
        found.append(torch.autograd.grad(F.softplus(rest - own).sum() + (score * u).sum(), w)[0][10:])
    assert error(found[0], found[1]) < 2 * HALF_ULP[torch.float16]


# --------------------------------------------------------------------------------------------------------------------
# derivatives of every kind


def outputs(h, weight, bias, y, tile=2):
    return linear._head(h, weight, bias, y, need_score=True, need_mean=True, tile=tile)[:4]


@pytest.mark.parametrize(("classes", "bias"), [(4, True), (4, False), (1, True)])
def test_gradcheck_to_third_order(classes, bias):
    h, weight = (torch.randn(n, 2, dtype=f64, requires_grad=True) for n in (3, classes))
    offset = torch.randn(classes, dtype=f64, requires_grad=True) if bias else None
    y = torch.tensor([0, -100, classes - 1])
    inputs = (h, weight, offset) if bias else (h, weight)

    # With one class rest is -inf; its place is taken by what a cross-entropy makes of it.
    def of(h, weight, bias=None):
        rest, own, mean, score = outputs(h, weight, bias, y)
        return F.softplus(rest - own), own, mean, score

    assert gradcheck(of, inputs)
    assert gradgradcheck(of, inputs)

    def gradient(*inputs):
        return torch.autograd.grad(of(*inputs)[3].square().sum(), inputs[:2], create_graph=True)

    assert gradgradcheck(gradient, inputs)


@pytest.mark.parametrize("route", ["Jacobian", "grad(vmap)", "grad", "jacrev", "hessian", "jvp", "jvp(jvp)"])
def test_transforms(route):
    """Their values, and the gradient of their square in the weight."""
    h, start, y = torch.randn(3, 4, dtype=f64), torch.randn(9, 4, dtype=f64), torch.tensor([0, 8, -100])

    def ours(t, weight):
        ce, log_density, _ = densreg.linear_density_cross_entropy(torch.tanh(t), weight, None, y, 0.1, tile=4)
        return ce + log_density.square()

    def torchs(t, weight):
        f = F.linear(torch.tanh(t), weight)
        ce = F.cross_entropy(f, y, reduction="none", label_smoothing=0.1)
        return ce + torch.logsumexp(f, 1).square()

    results = []
    for function in (ours, torchs):
        weight = start.clone().requires_grad_()
        value = TRANSFORMS[route](lambda t, f=function, w=weight: f(t, w), h)
        results.append((value, *torch.autograd.grad(value.square().sum(), weight)))
    for a, b in zip(*results, strict=True):
        assert b.abs().max() > 1e-3
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("everything", [True, False])
def test_opcheck(dtype, everything):
    h, weight, bias, y = torch.randn(3, 4).to(dtype), torch.randn(5, 4).to(dtype), torch.randn(5).to(dtype), None
    acc = accumulation_dtype(dtype)
    if everything:
        y = torch.tensor([0, -100, 4])
    else:
        bias = None
    arguments = (h, weight, bias, y, -100, acc, 2, everything, everything, False)
    torch.library.opcheck(torch.ops.densreg.linear_density, arguments)
    arguments = (*arguments[:-1], True)  # what is kept holds no numbers yet where there are no logits
    torch.library.opcheck(torch.ops.densreg.linear_density, arguments, test_utils=("test_schema", "test_faketensor"))
    rest, own, _, _, _, kept = torch.ops.densreg.linear_density(*arguments)
    row = torch.randn(3, dtype=f64)
    more = (row, torch.randn(3, 4, dtype=acc), row, kept) if everything else (None,) * 4
    arguments = (h, weight, bias, y, -100, rest, own, row, row, *more, acc, 2, [everything, True, everything])
    torch.library.opcheck(torch.ops.densreg.linear_density_backward, arguments)


# --------------------------------------------------------------------------------------------------------------------
# cost, repeatability, errors


def _step(h, weight, y, score_gradient, tile, keep):
    rest, own, _, score, _ = linear._head(h, weight, None, y, need_score=True, tile=tile, keep=keep)
    return torch.autograd.grad(F.softplus(rest - own).sum() + (score * score_gradient).sum(), (h, weight))


@pytest.mark.parametrize(("rows", "keep", "count"), [(64, False, 7), (64, True, 6), (256, True, 6.75)])
def test_products_and_memory(rows, keep, count):
    """Two products of 2 B C D forward and five backward, less the logits that the weight's gradient has room for.

    Beyond the gradients, nothing that grows with the classes.
    """
    features, classes = 64, 20 * 1024
    h, weight = torch.randn(rows, features, requires_grad=True), torch.randn(classes, features, requires_grad=True)
    y, u = torch.randint(classes, (rows,)), torch.randn(rows, features)
    with torch.profiler.profile(record_shapes=True) as profile:
        _step(h, weight, y, u, 1024, keep)
    calls = [e.input_shapes[:2] for e in profile.events() if e.name == "aten::mm"]
    assert not any("addmm" in e.name for e in profile.events())
    products = sum(2 * a[0] * a[1] * b[1] for a, b in calls)
    assert products == pytest.approx(count * 2 * rows * features * classes, rel=1e-3)
    logits, gradient = 4 * rows * classes, 4 * features * classes
    assert peak_bytes(lambda: _step(h, weight, y, u, 1024, keep)) < gradient + logits / 6


def test_two_runs_are_equal_bit_by_bit():
    first, second = (penalty_gradient(torch.float32, 2, tile=t) for t in (3, 3))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_tiles_follow_from_shape_and_device():
    assert tiles.tile_size(torch.empty(128, 8)) == 6144
    assert tiles.tile_size(torch.empty(0, 8)) == tiles.tile_size(torch.empty(1, 8))
    assert tiles.tile_size(torch.empty(1 << 20, 1, dtype=f64)) == 256


def test_errors():
    trunk, weight, bias, x, y = head_problem(4, rows=3)
    h = trunk(x)
    for change, kind, message in [
        ({"h": "h"}, TypeError, "h: expected a tensor, got str"),
        ({"h": h[0]}, ValueError, r"h: expected features of shape \[batch, features\], got \[7\]"),
        ({"weight": weight[:, :6]}, ValueError, r"weight: expected shape \[classes, 7\] with .*, got \[4, 6\]"),
        ({"weight": weight[:0]}, ValueError, r"at least one class, got \[0, 7\]"),
        ({"weight": weight.float()}, TypeError, r"weight: expected the dtype of h, torch.float64, got torch.float32"),
        ({"weight": weight.to("meta")}, ValueError, "weight: expected the device of h, cpu, got meta"),
        ({"bias": bias[:3]}, ValueError, r"bias: expected shape \[4\], one number a class, got \[3\]"),
        ({"bias": 1.0}, TypeError, "bias: expected a tensor, got float"),
        ({"tile": 0}, ValueError, "tile: expected a positive number of classes or None, got 0"),
        ({"target": y + 4}, ValueError, r"target holds class \d; expected classes in \[0, 4\) or ignore_index=-100"),
        ({"target": -1 - y}, ValueError, r"target holds class -\d"),
        ({"target": y.float()}, TypeError, "target must hold int64"),
        ({"coeff": -1}, ValueError, "coeff must be at least 0"),
        ({"p": 0.5}, ValueError, "p must be at least 1"),
        ({"x": x.detach()}, ValueError, "x does not require grad"),
        ({"x": x.clone()}, ValueError, "do not depend on x"),
        ({"h": h.detach()}, ValueError, "carry no graph"),
        ({"class_weight": torch.ones(3)}, ValueError, r"class_weight: expected shape \[4\], got \[3\]"),
        ({"class_weight": torch.ones(4), "label_smoothing": 0.1}, ValueError, "expected one of them, got both"),
    ]:
        arguments = {"h": h, "weight": weight, "bias": bias, "target": y, "x": x, "coeff": 0.1} | change
        with pytest.raises(kind, match=message) as raised:
            densreg.linear_density_loss(**arguments)
        assert "\n" not in str(raised.value)


def test_the_score_is_not_rounded_under_autocast():
    """On a CPU the operator's products are float32 whatever autocast says: it decides outside of operators only."""
    torch.manual_seed(0)
    h, weight, bias = torch.randn(16, 32), torch.randn(500, 32), torch.randn(500)
    with torch.autocast("cpu", torch.bfloat16):
        score = torch.ops.densreg.linear_density(h, weight, bias, None, -100, torch.float32, 128, True, False, False)[3]
    expected = (h.double() @ weight.double().T + bias.double()).softmax(1) @ weight.double()
    assert (score.double() - expected).abs().max() < 1e-5 * expected.abs().max()
