"""densreg.second_order: functions with the derivatives of torch's."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import TRANSFORMS, Subclass, direction, input_gradient, nothing
from torch import Tensor, nn

import densreg
from densreg import _torch
from densreg.second_order import fast_second_order, third_order

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def derivatives(function, tensors, inside: bool) -> list[Tensor]:
    """The value, a gradient, and the gradient of a gradient, in every tensor; the same random cotangents each time."""
    tensors = [t.detach().requires_grad_() for t in tensors]
    generator = torch.Generator().manual_seed(1)

    def cotangent(t: Tensor) -> Tensor:
        return torch.randn(t.shape, generator=generator, dtype=t.dtype)

    with fast_second_order() if inside else torch.enable_grad():
        y = function(*tensors)
        first = torch.autograd.grad(y, tensors, cotangent(y).requires_grad_(), create_graph=True)
        total = sum((g * cotangent(g)).sum() for g in first)
        second = torch.autograd.grad(total, tensors, allow_unused=True, materialize_grads=True)
    return [y, *first, *second]


def assert_equal_derivatives(function, *tensors: Tensor) -> None:
    ours, torchs = derivatives(function, tensors, True), derivatives(function, tensors, False)
    for a, b in zip(ours, torchs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@st.composite
def convolutions(draw):
    dims = draw(st.integers(1, 3))
    groups = draw(st.integers(1, 2))
    transposed = draw(st.booleans())
    c_in, c_out = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))
    kernel = [draw(st.integers(1, 3)) for _ in range(dims)]
    options = {
        "stride": [draw(st.integers(1, 3)) for _ in range(dims)],
        "padding": [draw(st.integers(0, 2)) for _ in range(dims)],
        "dilation": [draw(st.integers(1, 2)) for _ in range(dims)],
        "groups": groups,
    }
    if transposed:
        bound = [max(s, d) - 1 for s, d in zip(options["stride"], options["dilation"], strict=True)]
        options["output_padding"] = [draw(st.integers(0, b)) for b in bound]
    image = [draw(st.integers(5, 7)) for _ in range(dims)]
    batch = draw(st.sampled_from([None, 1, 3]))
    weight = (c_in, c_out // groups, *kernel) if transposed else (c_out, c_in // groups, *kernel)
    shape = (c_in, *image) if batch is None else (batch, c_in, *image)
    return dims, transposed, shape, weight, c_out if draw(st.booleans()) else None, options


@settings(max_examples=60, deadline=None)
@given(convolutions())
def test_convolutions(case):
    dims, transposed, shape, weight, bias, options = case
    tensors = [torch.randn(s, dtype=torch.float64) for s in (shape, weight)]
    if bias is not None:
        tensors.append(torch.randn(bias, dtype=torch.float64))
    native = (TRANSPOSED if transposed else CONV)[dims]
    assert_equal_derivatives(lambda x, w, b=None: native(x, w, b, **options), *tensors)


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("kernel", [(3, 3), (2, 5), (4, 2)])
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_padding_by_name(padding, kernel):
    x, w = torch.randn(2, 3, 9, 10, dtype=torch.float64), torch.randn(4, 3, *kernel, dtype=torch.float64)
    assert_equal_derivatives(lambda x, w: F.conv2d(x, w, padding=padding, dilation=(1, 2)), x, w)


@pytest.mark.parametrize(("padding", "stride"), [("same", 2), ("smae", 1)])
def test_padding_that_torch_refuses(padding, stride):
    x, w = torch.randn(1, 3, 9, 9), torch.randn(4, 3, 3, 3)
    with pytest.raises(RuntimeError):
        F.conv2d(x, w, padding=padding, stride=stride)
    with fast_second_order(), pytest.raises(RuntimeError, match="padding must be"):
        F.conv2d(x, w, padding=padding, stride=stride)


@pytest.mark.parametrize("transposed", [False, True])
def test_gradgradcheck_and_third_order(transposed):
    native = F.conv_transpose2d if transposed else F.conv2d
    x, w, b = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((1, 2, 4, 4), (2, 2, 2, 2), (2,)))

    def convolve(x, w, b):
        with fast_second_order():
            return native(x, w, b, stride=2, padding=1)

    assert torch.autograd.gradcheck(convolve, (x, w, b))
    assert torch.autograd.gradgradcheck(convolve, (x, w, b))

    def gradient(x, w, b):
        return torch.autograd.grad(convolve(x, w, b).tanh().sum(), x, create_graph=True)[0]

    assert torch.autograd.gradgradcheck(gradient, (x, w, b))


def test_channels_last_stays():
    x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last).requires_grad_()
    w = torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last).requires_grad_()
    with fast_second_order():
        y = F.conv2d(x, w)
        (g,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    for t in (y, g):
        assert t.is_contiguous(memory_format=torch.channels_last)


class _Count(_torch.TorchDispatchMode):
    """The kernels of convolutions that run: "forward", "input", "weight", or several."""

    def __init__(self):
        super().__init__()
        self.kernels: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution_backward.default:
            self.kernels.append("+".join(n for n, here in zip(("input", "weight"), args[-1], strict=False) if here))
        elif func is torch.ops.aten.convolution.default:
            # An image-sized filter is the weight gradient of torch's own double backward.
            self.kernels.append("forward" if args[1].shape[-1] <= 3 else "image-sized")
        return func(*args, **(kwargs or {}))


def _kernels(inside: bool) -> tuple[list[str], list[str]]:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 3))
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    with fast_second_order() if inside else torch.enable_grad():
        logits = model(x)
        with _Count() as score:
            (g,) = torch.autograd.grad(logits, x, torch.softmax(logits, 1), create_graph=True)
        with _Count() as double:
            g.square().sum().backward(inputs=list(model.parameters()))
    return score.kernels, double.kernels


def test_only_ordinary_kernels_and_none_for_nothing():
    score, double = _kernels(inside=True)
    assert score == ["input", "input"], "the score's backward wants no weight gradient"
    # In 2 layers: weight gradients of the score's backward and of the forward; 2 forwards; 1 way back to layer 1.
    assert sorted(double) == ["forward"] * 2 + ["input"] + ["weight"] * 4
    assert "image-sized" in _kernels(inside=False)[1], "this measure would see what torch does"


@pytest.mark.parametrize("inplace", [False, True])
def test_hardsigmoid(inplace):
    x = torch.linspace(-5, 5, 41, dtype=torch.float64)
    value, first, _ = derivatives(lambda t: F.hardsigmoid(t + 0, inplace), [x], True)
    expected = torch.autograd.functional.vjp(F.hardsigmoid, x, torch.ones_like(x))[0]
    torch.testing.assert_close(value, expected)
    y = x.clone().requires_grad_()
    F.hardsigmoid(y).backward(torch.randn(41, generator=torch.Generator().manual_seed(1), dtype=x.dtype))
    torch.testing.assert_close(first, y.grad)


def test_attention():
    q, k, v = torch.randn(3, 2, 2, 5, 4, dtype=torch.float64, requires_grad=True).unbind()

    def attend(q, k, v):
        with fast_second_order():
            return F.scaled_dot_product_attention(q, k, v)

    torch.testing.assert_close(attend(q, k, v), F.scaled_dot_product_attention(q, k, v))
    assert torch.autograd.gradgradcheck(attend, (q, k, v))
    layer = nn.MultiheadAttention(4, 2, batch_first=True).double()

    def self_attend(x):
        with fast_second_order():
            return layer(x, x, x, need_weights=False)[0]

    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(self_attend(x), layer(x, x, x, need_weights=False)[0])
    assert torch.autograd.gradgradcheck(self_attend, (x,))


def test_normalize():
    assert_equal_derivatives(lambda x: F.normalize(x, dim=-1), torch.randn(3, 4, dtype=torch.float64))
    assert_equal_derivatives(lambda x: F.normalize(x, p=3.0), torch.randn(3, 4, dtype=torch.float64))
    rows = torch.zeros(2, 3, dtype=torch.float64)
    rows[1] = 1
    ours, torchs = (derivatives(lambda x: F.normalize(x, dim=1, eps=0.1), [rows], inside) for inside in (True, False))
    assert all(t.isfinite().all() for t in ours)
    assert not all(t.isfinite().all() for t in torchs), "torch has mended it: the replacement can go"
    with fast_second_order():
        assert (F.normalize(torch.zeros(1, 3, requires_grad=True), eps=1e-24) == 0).all()
    half = torch.full((1, 4), 300.0, dtype=torch.float16)  # whose square overflows
    with fast_second_order():
        torch.testing.assert_close(F.normalize(half), torch.full_like(half, 0.5))


def test_complex_numbers_are_torchs_own():
    x, w = torch.randn(1, 2, 5, 5, dtype=torch.complex128), torch.randn(3, 2, 3, 3, dtype=torch.complex128)
    with fast_second_order():
        torch.testing.assert_close(F.conv2d(x.requires_grad_(), w), F.conv2d(input=x, weight=w))
        F.normalize(x)


def test_the_bias_may_change_before_the_backward():
    conv = nn.Conv2d(2, 3, 3)
    conv.weight.requires_grad_(False)
    with fast_second_order():
        loss = conv(torch.randn(1, 2, 5, 5)).sum()
    with torch.no_grad():
        conv.bias.add_(1)
    loss.backward()
    torch.testing.assert_close(conv.bias.grad, torch.full((3,), 9.0))


def test_a_bias_of_the_graph_may_change_in_place():
    x, w = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 4, 6, 6), (3, 4, 3, 3)))
    p = torch.randn(3, dtype=torch.float64, requires_grad=True)

    def first_and_second_order():
        bias = p * 2
        y = F.conv2d(x, w, bias)
        bias += 1
        g, first = torch.autograd.grad(y.sin().sum(), (x, p), create_graph=True)
        return first, torch.autograd.grad(g.square().sum(), p)[0]

    expected = first_and_second_order()
    assert all(g.abs().max() > 0 for g in expected)
    with fast_second_order():
        torch.testing.assert_close(first_and_second_order(), expected)


def test_model_and_no_grad_are_left_alone():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 3))
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(2, 3, 8, 8)
    with fast_second_order():
        assert model(x).grad_fn is not None
        with torch.no_grad():
            assert torch.equal(model(x), model(x))
    assert list(model.state_dict()) == list(before)
    assert type(model[0]) is nn.Conv2d
    assert not torch.overrides._get_current_function_mode_stack()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    conv = nn.Conv2d(3, 4, 3)
    x = torch.randn(2, 3, 8, 8)

    def run(inside):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype), fast_second_order() if inside else torch.enable_grad():
            y = conv(leaf)
        (g,) = torch.autograd.grad(y.float().square().sum(), leaf, create_graph=True)
        return y, g, *torch.autograd.grad(g.square().sum(), list(conv.parameters()))

    for a, b in zip(run(True), run(False), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.05 * float(b.abs().max()))
    assert run(True)[0].dtype == dtype


BACKWARDS = {
    "autograd.grad": lambda loss, weights: torch.autograd.grad(loss, weights, allow_unused=True),
    "with a cotangent": lambda loss, weights: torch.autograd.grad(
        [loss], weights, loss.new_tensor(1), allow_unused=True
    ),
    "autograd.backward": lambda loss, weights: torch.autograd.backward(loss),
    "Tensor.backward": lambda loss, weights: loss.backward(),
    "with a gradient": lambda loss, weights: loss.backward(loss.new_tensor(1), inputs=weights),
}


def _attend(x: Tensor) -> Tensor:
    q = x.flatten(2)
    return F.scaled_dot_product_attention(q, q, q)


@pytest.mark.parametrize("backward", BACKWARDS.values(), ids=BACKWARDS)
@pytest.mark.parametrize(
    ("layer", "order"),
    [(F.hardsigmoid, 2), (_attend, 2), (lambda x: F.layer_norm(x, (6,)), 3)],
    ids=["hardsigmoid", "attention", "layer_norm"],
)
def test_checkpoints_are_computed_again_inside(layer, order, backward):
    torch.manual_seed(0)
    before, after = (nn.Linear(6, 6, dtype=torch.float64) for _ in range(2))
    weights = [*before.parameters(), *after.parameters()]
    x = torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True)

    def body(x: Tensor) -> Tensor:
        return after(layer(before(x))).pow(3)

    found = []
    for checkpointed in (False, True):
        with fast_second_order(), third_order():
            y = torch.utils.checkpoint.checkpoint(body, x, use_reentrant=False) if checkpointed else body(x)
            for _ in range(order - 1):
                (g,) = torch.autograd.grad(y.sum(), x, create_graph=True)
                y = g.square() if order == 2 else g.sin()
            gradients = backward(y.sum(), weights) or [w.grad for w in weights]
        found.append([torch.zeros_like(w) if g is None else g for g, w in zip(gradients, weights, strict=True)])
        for w in weights:
            w.grad = None
    assert found[0][0].abs().max() > 1e-3
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("which", ["input", "weight", "bias"])
def test_tensor_subclasses(which):
    """A residual net, whose gradient in x is wrong, not missing, where the convolution's part of it is lost."""
    conv = nn.Conv2d(2, 2, 3, padding=1).double()
    x = torch.randn(3, 2, 5, 5, dtype=torch.float64)
    tensors = {"input": x, "weight": conv.weight.detach(), "bias": conv.bias.detach()}

    def gradients(kind, context):
        input, weight, bias = (
            (t.clone().as_subclass(kind) if name == which else t.clone()).detach().requires_grad_()
            for name, t in tensors.items()
        )
        with context:
            y = input + F.conv2d(input, weight, bias, padding=1).tanh()
            (g,) = torch.autograd.grad(y.square().sum(), input, create_graph=True)
            return [t.as_subclass(Tensor) for t in torch.autograd.grad(g.square().sum(), (input, weight, bias))]

    for ours, torchs in zip(
        gradients(Subclass, fast_second_order()), gradients(Tensor, torch.enable_grad()), strict=True
    ):
        torch.testing.assert_close(ours, torchs, rtol=1e-12, atol=1e-12)


TRANSFORMED = {  # [B, 2, 3, 3] and a weight -> anything, and the same by what torch differentiates itself
    "conv": (F.conv2d, F.conv2d),
    "transposed": (lambda x, w: F.conv_transpose2d(x, w, stride=2), lambda x, w: F.conv_transpose2d(x, w, stride=2)),
    "hardsigmoid": (lambda x, w: F.hardsigmoid(F.conv2d(x, w)), lambda x, w: F.relu6(F.conv2d(x, w) + 3) / 6),
    "attention": (
        lambda x, w: _attend(F.conv2d(x, w)),
        lambda x, w: (lambda q: torch.softmax(q @ q.mT / q.shape[-1] ** 0.5, -1) @ q)(F.conv2d(x, w).flatten(2)),
    ),
}


def _tangent(h, x):
    with torch.autograd.forward_ad.dual_level():
        return torch.autograd.forward_ad.unpack_dual(h(torch.autograd.forward_ad.make_dual(x, direction(x)))).tangent


def _tangent_of_cotangent(h, x):
    """Forward mode over the backward alone: of the forward's graph, built before."""
    x = x.clone().requires_grad_()
    y = h(x)
    return _tangent(lambda u: torch.autograd.grad(y, x, u, create_graph=True)[0], torch.ones_like(y))


WAYS = {
    name: TRANSFORMS[name]
    for name in (
        *("Jacobian", "Hessian", "vmap", "vmap, Hessian", "chunked", "functional.jacobian", "hessian", "grad"),
        *("functional.jacobian, forward", "jvp", "jvp(jvp)"),
    )
} | {
    "forward_ad": _tangent,
    "forward_ad, no_grad": torch.no_grad()(_tangent),
    "forward_ad of the gradient": lambda h, x: _tangent(lambda t: input_gradient(h, t), x.clone().requires_grad_()),
    "forward_ad of the cotangent": _tangent_of_cotangent,
}


@pytest.mark.parametrize("transform", WAYS)
@pytest.mark.parametrize("name", TRANSFORMED)
def test_transforms(name, transform):
    """vmap, torch.func and forward mode, each way they come: values, and the gradient of their square in the weight."""
    x, weight = torch.randn(1, 2, 3, 3, dtype=torch.float64), torch.randn(2, 2, 2, 2, dtype=torch.float64)

    # Of torch's own softmax under forward mode there is no gradient: it changes what the backward needs.
    trains = name != "attention" or "forward_ad" not in transform

    def value_and_gradient(function, inside: bool) -> list[Tensor]:
        w = weight.clone().requires_grad_(trains)
        with fast_second_order() if inside else torch.enable_grad():
            value = WAYS[transform](lambda t: torch.tanh(function(t, w)), x)
        if not (trains and value.requires_grad):
            return [value.detach()]
        return [value.detach(), *torch.autograd.grad(value.square().sum(), w)]

    ours, torchs = value_and_gradient(TRANSFORMED[name][0], True), value_and_gradient(TRANSFORMED[name][1], False)
    assert len(ours) == len(torchs)
    assert torchs[0].abs().max() > 1e-3
    for a, b in zip(ours, torchs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


class _Batched:
    """The squared product of the log density's Hessian in x with a batch of vectors."""

    name, precise = "batched", False

    def __init__(self, log_density):
        self.log_density = log_density

    def __call__(self, classify, logits, xs, target):
        log_density = self.log_density(logits)
        (g,) = torch.autograd.grad(log_density.sum(), xs[0], create_graph=True)
        units = torch.eye(g.numel(), dtype=g.dtype).view(-1, *g.shape)
        (rows,) = torch.autograd.grad(g, xs[0], units[:2], is_grads_batched=True, create_graph=True)
        return rows.square().sum() + 0 * log_density


@pytest.mark.parametrize("compiled", [False, True])
def test_batched_in_the_objective(compiled, fresh_dynamo):
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)).double()
    x, y = torch.randn(2, 1, 3, 3, dtype=torch.float64), torch.tensor([0, 2])
    leaf = x.clone().requires_grad_()
    by_torch = _Batched(lambda f: torch.logsumexp(f, 1))(None, model(leaf), (leaf,), y).mean()
    expected = torch.autograd.grad(by_torch, list(model.parameters())[:3])
    options = {"regularizer": _Batched(densreg.log_density), "criterion": nothing}
    objective = densreg.RegularizedObjective(model, 1.0, compile=compiled, backend="aot_eager", **options)
    objective(x, y).loss.backward()
    for w, g in zip(model.parameters(), expected, strict=False):
        torch.testing.assert_close(w.grad, g, rtol=1e-10, atol=1e-12)
