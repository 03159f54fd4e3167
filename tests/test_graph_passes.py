"""The passes over graphs, and what they do to the objective's compiled step."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import by_autograd, gradients, nothing
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import densreg
from benchmarks.second_order import relative_error
from densreg import _torch
from densreg.graph_passes import GraphPasses, lay_out_images, mask_pools, merge_convolutions, split_sums

aten = torch.ops.aten


def _merged(function, *inputs):
    """The function's graph, merged; and how many matrix products it has then."""
    module = make_fx(function, tracing_mode="fake")(*inputs)
    GraphPasses()(module.graph)
    module.graph.lint()
    module.recompile()
    return module, sum(node.target == aten.mm.default for node in module.graph.nodes)


def _t(matrix):  # as inductor has it
    return matrix.permute(1, 0)


def _linear(gy1, x1, gy2, x2):  # as autograd has it
    return _t(_t(_t(gy1) @ x1) + _t(_t(gy2) @ x2))


def _plain(a, b, c, d):
    return a @ b + c @ d


def _double(function, inputs):
    return function(*(t.double() for t in inputs))


@settings(max_examples=60, deadline=None)
@given(
    batches=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    inside=st.integers(1, 40),
    outside=st.integers(1, 40),
    linear=st.booleans(),
)
def test_the_sum_is_the_same(batches, inside, outside, linear):
    (one, other), function = batches, _linear if linear else _plain
    shapes = [(one, outside), (one, inside), (other, outside), (other, inside)]
    if not linear:
        shapes = [(outside, one), (one, inside), (outside, other), (other, inside)]
    inputs = [torch.randn(shape) for shape in shapes]
    module, products = _merged(function, *inputs)
    copied, written = 2 * (one + other) * (inside + outside), 3 * inside * outside
    assert products == (1 if copied <= written else 2)
    torch.testing.assert_close(module(*inputs).double(), _double(function, inputs), rtol=0, atol=1e-5)


def test_three_products():
    inputs = [torch.randn(3, n, dtype=torch.float64) for n in (50, 60, 50, 60, 50, 60)]

    def three(a, b, c, d, e, f):
        return _t(a) @ b + _t(c) @ d + _t(e) @ f

    module, products = _merged(three, *inputs)
    assert products == 1
    torch.testing.assert_close(module(*inputs), three(*inputs))


def _used_twice(a, b, c, d):
    product = _t(a) @ b
    return product + _t(c) @ d, product.sum()


LEFT_ALONE = {
    "a result that is used elsewhere too": _used_twice,
    "weighted": lambda a, b, c, d: torch.add(_t(a) @ b, _t(c) @ d, alpha=2),
    "one of them transposed": lambda a, b, c, d: _t(_t(b) @ a) + _t(c) @ d,
    "one product": lambda a, b, c, d: (product := _t(a) @ b) + product,
    "no product": lambda a, b, c, d: _t(a) @ b + (c.sum() + d.sum()),
    "broadcast": lambda a, b, c, d: _t(a) @ b + _t(c[:, :1]) @ d,
}


@pytest.mark.parametrize("function", LEFT_ALONE.values(), ids=LEFT_ALONE)
def test_left_alone(function):
    inputs = [torch.randn(2, n) for n in (50, 60, 50, 60)]
    before = sum(node.target == aten.mm.default for node in make_fx(function)(*inputs).graph.nodes)
    module, products = _merged(function, *inputs)
    assert products == before
    torch.testing.assert_close(module(*inputs), function(*inputs))


def _weights_gradient(gy, x, weight, stride=1, padding=0, groups=1, mask=(False, True, False)):
    how = None, [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], groups, list(mask)
    return aten.convolution_backward(gy, x, weight, *how)[1]


def _convolutions(function, *inputs):
    """The function's graph, merged; and how many gradients of a convolution it has then."""
    module = make_fx(function, tracing_mode="fake")(*inputs)
    module.graph.eliminate_dead_code()  # the gradients that were not asked for
    merge_convolutions(module.graph)
    module.graph.lint()
    module.recompile()
    return module, len(module.graph.find_nodes(op="call_function", target=aten.convolution_backward.default))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("how", [{}, {"stride": 2, "padding": 1}, {"groups": 4}], ids=["plain", "strided", "in groups"])
def test_two_gradients_of_a_convolutions_weight_are_one(how, memory_format):
    def both(gy, x, other_gy, other_x, weight):
        return _weights_gradient(gy, x, weight, **how) + _weights_gradient(other_gy, other_x, weight, **how)

    weight = torch.randn(16, 16 // how.get("groups", 1), 3, 3, dtype=torch.float64)
    images = []
    for batch in (2, 3):
        x = torch.randn(batch, 16, 4, 4, dtype=torch.float64)
        gy = torch.randn_like(F.conv2d(x, weight, **how))
        images += [image.to(memory_format=memory_format) for image in (gy, x)]
    module, gradients_left = _convolutions(both, *images, weight)
    assert gradients_left == (2 if "groups" in how else 1)  # there the weight is smaller than the images
    torch.testing.assert_close(module(*images, weight), both(*images, weight))


_BOTH = (True, True, False)
GRADIENTS_LEFT_ALONE = {
    "a result that is used elsewhere too": lambda a, b, w: (
        (g := _weights_gradient(*a, w)) + _weights_gradient(*b, w),
        g,
    ),
    "weighted": lambda a, b, w: torch.add(_weights_gradient(*a, w), _weights_gradient(*b, w), alpha=2),
    "one convolution": lambda a, b, w: (g := _weights_gradient(*a, w)) + g,
    "no convolution": lambda a, b, w: _weights_gradient(*a, w) + (b[0].sum() + b[1].sum()),
    "another padding": lambda a, b, w: (
        _weights_gradient(*a, w) + _weights_gradient(b[0][..., 1:-1, 1:-1], b[1][..., :2, :2], w, padding=1)
    ),
    "of the images too": lambda a, b, w: _weights_gradient(*a, w, mask=_BOTH) + _weights_gradient(*b, w, mask=_BOTH),
    "of images of two sizes": lambda a, b, w: (
        _weights_gradient(*a, w) + _weights_gradient(b[0][..., 1:, 1:], b[1][..., 1:, 1:], w)
    ),
    "of images of two sizes, with a step": lambda a, b, w: (
        _weights_gradient(a[0][..., :2, :2], a[1], w, stride=2)
        + _weights_gradient(b[0][..., :2, :2], b[1][..., 1:, 1:], w, stride=2)
    ),
    "large images": lambda a, b, w: (
        _weights_gradient(*a, w) + _weights_gradient(*(image.repeat(40, 1, 1, 1) for image in b), w)
    ),
}


@pytest.mark.parametrize("function", GRADIENTS_LEFT_ALONE.values(), ids=GRADIENTS_LEFT_ALONE)
def test_convolutions_left_alone(function):
    def flat(gy, x, other_gy, other_x, weight):
        return function((gy, x), (other_gy, other_x), weight)

    inputs = [torch.randn(2, 16, side, side, dtype=torch.float64) for side in (4, 6, 4, 6)]
    inputs.append(torch.randn(16, 16, 3, 3, dtype=torch.float64))
    before = make_fx(flat, tracing_mode="fake")(*inputs)
    before.graph.eliminate_dead_code()
    before.recompile()
    module, _ = _convolutions(flat, *inputs)
    assert module.code == before.code


def _mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(60, 50), nn.Softplus(), nn.Linear(50, 40), nn.Softplus(), nn.Linear(40, 7)).double()


def _merges() -> int:
    return torch._dynamo.utils.counters["densreg"]["products merged"]


@pytest.mark.slow
@pytest.mark.compile
@pytest.mark.parametrize(
    ("criterion", "dtype"),
    [
        (nothing, torch.float32),
        *(pytest.param(*case, marks=pytest.mark.long) for case in ((None, torch.float32), (nothing, torch.float64))),
    ],
    ids=["the penalty alone", "with cross-entropy", "in float64"],
)
def test_the_objective(criterion, dtype, fresh_dynamo):
    """The layers' gradients are merged, and are what autograd gives in float64."""
    wide, x, y = _mlp(), torch.rand(3, 60, dtype=torch.float64), torch.randint(7, (3,))
    model = copy.deepcopy(wide).to(dtype)
    with torch._inductor.config.patch(force_disable_caches=True):
        densreg.RegularizedObjective(model, 1.0, criterion=criterion)(x.to(dtype), y).loss.backward()
    options = {} if criterion is None else {"criterion": criterion}
    expected = by_autograd(wide, x, y, 1.0, **options)[1]
    assert relative_error(gradients(model), expected) < (1e-12 if dtype == torch.float64 else 2e-6)
    assert _merges() == 3


class _Users(_torch.CustomGraphPass):
    calls = 0

    def __call__(self, graph):
        self.calls += 1

    def uuid(self):
        return "a user's"


@pytest.mark.slow
@pytest.mark.compile
def test_a_pass_of_the_users_stays(fresh_dynamo):
    users, objective = _Users(), densreg.RegularizedObjective(nn.Linear(60, 7).double(), 1.0)
    with torch._inductor.config.patch(post_grad_custom_pre_pass=users, force_disable_caches=True):
        objective(torch.rand(3, 60, dtype=torch.float64), torch.zeros(3).long())
    assert (users.calls, _merges()) == (1, 0)


def _laid_out(function, *inputs):
    """The function's graph after the pass, and the names of its images that are channels_last."""
    module = make_fx(function, tracing_mode="fake")(*inputs)
    lay_out_images(module.graph)
    values = {node.name: node.meta.get("val") for node in module.graph.nodes}
    images = {name: v for name, v in values.items() if isinstance(v, torch.Tensor) and v.ndim == 4}
    return images, {name for name, v in images.items() if v.is_contiguous(memory_format=torch.channels_last)}


def test_images_between_convolutions_are_channels_last():
    def attend_and_convolve(x, weight, gy):
        h = F.conv2d(F.conv2d((x - 0.5) / 2, weight).relu(), weight)
        pixels = h.flatten(2)
        attention = (pixels.unflatten(2, (4, 9)).transpose(1, 2) * 2).softmax(-1) + 1  # [B, 4, 5, 9]
        gx, gw, _ = aten.convolution_backward(
            gy * h, x.exp(), weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [True, True, False]
        )
        return attention, gx.sum(0), gw * 2, h.exp()

    images, laid_out = _laid_out(
        attend_and_convolve, torch.rand(2, 5, 10, 10), torch.rand(5, 5, 3, 3), torch.rand(2, 5, 6, 6)
    )
    assert laid_out == {"sub", "div", "convolution", "relu", "convolution_1", "mul_1", "exp", "getitem"}
    assert {"mul", "add", "getitem_1", "mul_2", "exp_1"} <= set(images)  # attention, the weight, a result


@torch.library.custom_op("densreg_test::first_in_memory", mutates_args=(), tags=(torch.Tag.needs_fixed_stride_order,))
def _first_in_memory(images: torch.Tensor) -> torch.Tensor:
    return images.clone(memory_format=torch.preserve_format)


@_first_in_memory.register_fake
def _(images):
    return images.clone(memory_format=torch.preserve_format)


@pytest.mark.parametrize(
    "use",
    [
        lambda images: images.as_strided((2, 4, 3), (180, 36, 1)),
        lambda images: torch.as_strided_scatter(images, images[:, 0], (2, 6, 6), (180, 6, 1)),
        lambda images: _first_in_memory(images),
    ],
    ids=["as_strided", "as_strided_scatter", "an operator that needs its strides"],
)
def test_an_image_stays_whose_memory_is_looked_at(use):
    def convolve(x, weight):
        h = F.conv2d(F.conv2d(x - 1, weight).relu(), weight)
        return use(h.cos()), h.sin().sum()

    _, laid_out = _laid_out(convolve, torch.rand(2, 5, 10, 10), torch.rand(5, 5, 3, 3))
    assert laid_out == {"sub", "convolution", "relu", "convolution_1", "sin"}


def test_what_is_a_view_of_an_image_stays_one():
    """inductor asks the memory of two values whether one may be overwritten while the other is in use."""

    def convolve(x, weight):
        h = F.conv2d(x, weight)
        return h.permute(0, 2, 3, 1) + 1, h.relu().sum()

    module = make_fx(convolve, tracing_mode="fake")(torch.rand(2, 5, 10, 10), torch.rand(5, 5, 3, 3))
    lay_out_images(module.graph)
    (image,) = module.graph.find_nodes(op="call_function", target=aten.convolution.default)
    (view,) = module.graph.find_nodes(op="call_function", target=aten.permute.default)
    assert image.meta["val"].is_contiguous(memory_format=torch.channels_last)
    assert image.meta["val"].untyped_storage() is view.meta["val"].untyped_storage()


def _split(function, images):
    """The function's graph after the pass, and over which dimensions it sums, in turn."""
    module = make_fx(function, tracing_mode="fake")(images)
    split_sums(module.graph)
    module.graph.lint()
    module.recompile()
    return module, [node.args[1] for node in module.graph.nodes if node.target == aten.sum.dim_IntList]


@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize(
    ("side", "steps"), [(4, [[2, 3], [0, 2, 3]]), (33, [[3], [2], [0, 2, 3]])], ids=["small", "large"]
)
def test_sums_over_a_batch_of_images_take_each_image_first(keepdim, side, steps):
    def total(images):
        return (images * 2).sum((0, 2, -1), keepdim=keepdim)

    images = torch.randn(3, 5, side, side, dtype=torch.float64).to(memory_format=torch.channels_last)
    module, dims = _split(total, images)
    assert [sorted(d % 4 for d in each) for each in dims] == steps
    torch.testing.assert_close(module(images), total(images))


@pytest.mark.parametrize(
    "total",
    [
        lambda images: images.sum(0, keepdim=True).sum(3, keepdim=True).sum(2, keepdim=True),
        lambda images: images.sum(0).sum(2).sum(1),
        lambda images: images.sum((0, -1)).sum(-1),
    ],
    ids=["as in BatchNorm's double backward", "without dimensions of one", "two at once"],
)
def test_a_sum_over_one_dimension_after_the_other_takes_each_image_first(total):
    images = torch.randn(3, 5, 4, 6, dtype=torch.float64).to(memory_format=torch.channels_last)
    module, dims = _split(total, images)
    assert dims == [[2, 3], [0, 2, 3]]
    assert module(images).shape == total(images).shape
    torch.testing.assert_close(module(images), total(images))


def test_sums_of_images_in_half_precision_are_not_rounded():
    images = torch.randn(3, 5, 4, 4, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    module, _ = _split(lambda images: images.sum((0, 2, 3)), images)
    inner, outer = module.graph.find_nodes(op="call_function", target=aten.sum.dim_IntList)
    assert inner.meta["val"].dtype == outer.meta["val"].dtype == torch.float32
    torch.testing.assert_close(module(images), images.double().sum((0, 2, 3)).bfloat16(), rtol=2**-8, atol=0)


@pytest.mark.parametrize(
    "total",
    [
        lambda images: images.contiguous().sum((0, 2, 3)),
        lambda images: images.sum((0, 2)),
        lambda images: images.sum((0, 2, 3), dtype=torch.float64),
        lambda images: images[:, :, 0, 0].sum(0),
        lambda images: images[:, ::2].sum((0, 2, 3)),
        lambda images: images.sum((2, 3)).sum(0),
        lambda images: (rows := images.sum(0), rows.sum(2).sum(1)),
        lambda images: images.sum().sum([]),
        lambda images: images.sum((0, 1, 2, 3)).sum(-1),
        lambda images: images[0, 0, 0, 0].sum(0, keepdim=True),
    ],
    ids=[
        "contiguous",
        "other dimensions",
        "dtype",
        "no image",
        "strided",
        "split already",
        "of use before",
        "a number",
        "a number's last dimension",
        "a number's first dimension",
    ],
)
def test_other_sums_stay(total):
    images = torch.randn(3, 5, 4, 4).to(memory_format=torch.channels_last)
    module, before = _split(total, images)[0], make_fx(total)(images)
    assert module.code == before.code


def test_sums_over_sizes_that_depend_on_data_stay():
    def total(pixels, mask):
        return (pixels[mask].permute(1, 0)[None, :, :, None] * 2).sum((0, 2, 3))

    inputs = torch.randn(6, 3), torch.tensor([True, False] * 3)
    module = make_fx(total, tracing_mode="symbolic")(*inputs)
    before = module.code
    split_sums(module.graph)
    module.recompile()
    assert module.code == before


def _pooled_twice(pool):
    """Max pooling, its backward, and that one's own: all three of images, gradients of the maxima, and of these."""

    def both(x, gy, v):
        y = pool(x)
        (gx,) = torch.autograd.grad(y, x, gy, create_graph=True)
        (ggy,) = torch.autograd.grad(gx, gy, v)
        return y, gx + 0, ggy + 0

    return both


def _after_masking(function, *inputs):
    """The function's graph after the pass, and how many backwards it changed."""
    counted = torch._dynamo.utils.counters["densreg"]
    before = counted["pools masked"]
    module = make_fx(function, tracing_mode="fake", decomposition_table=_torch.inductor_decompositions())(*inputs)
    mask_pools(module.graph)
    module.graph.lint()
    module.recompile()
    return module, counted["pools masked"] - before


def _masked(pool, x, memory_format=torch.contiguous_format):
    """What the two backwards are, what they are after the pass, and how many of them it changed."""
    inputs = x, torch.randn_like(pool(x)), torch.randn_like(x)
    inputs = [t.to(memory_format=memory_format).requires_grad_() for t in inputs]
    function = _pooled_twice(pool)
    module, masked = _after_masking(function, *inputs)
    return function(*inputs), module(*inputs), masked


@pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [(2, 2), (3, 2), (1, 4), (1, 1)])
def test_the_backwards_of_max_pooling_are_comparisons(window, dtype, memory_format):
    x = torch.randint(3, (3, 5, 6, 8)).to(dtype)  # with ties: the same pixel must be the maximum
    x[0, 0, 1, 1], x[1, 0, :2] = math.nan, -math.inf
    expected, got, masked = _masked(lambda x: F.max_pool2d(x, window), x, memory_format)
    assert masked == 2
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "pool",
    [
        lambda x: F.max_pool2d(x, 3, 2),
        lambda x: F.max_pool2d(x, 3, padding=1),
        lambda x: F.max_pool2d(x, 2, dilation=2, ceil_mode=True),
        lambda x: F.max_pool2d(x, 4),
        lambda x: F.max_pool2d(x, 4, ceil_mode=True),
        lambda x: F.max_pool3d(x[None], 2)[0],
    ],
    ids=["overlapping", "padded", "dilated", "pixels in no window", "beyond the image", "volumes"],
)
def test_other_max_pooling_stays(pool):
    expected, got, masked = _masked(pool, torch.randn(2, 4, 6, 6))  # of which the first three have as many windows
    assert masked == 0
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_a_gradient_stays_whose_memory_is_looked_at():
    def first_row(x, gy):
        (gx,) = torch.autograd.grad(F.max_pool2d(x, 2), x, gy)
        return gx.as_strided((2, 6), (144, 1)) + 0

    inputs = torch.randn(2, 4, 6, 6, requires_grad=True), torch.randn(2, 4, 3, 3)
    module, masked = _after_masking(first_row, *inputs)
    assert masked == 0
    assert torch.equal(module(*inputs), first_row(*inputs))


def test_adding_at_the_maxima_of_other_images_stays():
    def add(x, base, gy):
        _, indices = F.max_pool2d(x, 2, return_indices=True)
        return base.flatten(2).scatter_add(2, indices.flatten(2), gy.flatten(2)) + 0

    inputs = torch.randn(2, 4, 6, 6), torch.randn(2, 4, 6, 6), torch.randn(2, 4, 3, 3)
    module, masked = _after_masking(add, *inputs)
    assert masked == 0
    assert torch.equal(module(*inputs), add(*inputs))


def test_adding_fewer_values_than_there_are_stays():
    def add(x, gy):
        _, indices = F.max_pool2d(x, 2, return_indices=True)
        return torch.zeros(2, 4, 36).scatter_add(2, indices.flatten(2), gy.flatten(2)) + 0

    inputs = torch.randn(2, 4, 6, 6), torch.randn(3, 4, 4, 4)  # of the last the corner
    module, masked = _after_masking(add, *inputs)
    assert masked == 0
    assert torch.equal(module(*inputs), add(*inputs))


def test_places_may_come_from_another_graph():
    """As in the backward of what torch.compile splits in two."""

    def backward(places, gy):
        indices = _torch.indices_of_maxima()(places, [2, 2], [6, 6], [2, 2], [0, 0], [1, 1])
        return torch.zeros(2, 4, 36).scatter_add(2, indices.flatten(2), gy.flatten(2)) + 0

    inputs = torch.randint(4, (2, 4, 3, 3), dtype=torch.int8), torch.randn(2, 4, 3, 3)
    module, masked = _after_masking(backward, *inputs)
    assert masked == 1
    assert torch.equal(module(*inputs), backward(*inputs))


class _Tutorial(nn.Module):
    """As people write them: contiguous images, a view of them; one by its strides, one that is changed in place."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 6, 3, bias=False)
        self.third = nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.deep, self.last = nn.BatchNorm2d(6), nn.Conv2d(6, 96, 3), nn.Linear(96, 7)
        self.register_buffer("masked", torch.tensor([0, 2]))

    def forward(self, x):
        h = F.softplus(self.first(x)).contiguous()
        patch = h.as_strided((len(x), 4, 3, 3), (256, 64, 8, 1))
        rows = h.permute(0, 2, 3, 1).clone()
        rows[:, self.masked] = 0.5
        gate = self.third(rows.permute(0, 3, 1, 2)).mean((2, 3)) + self.third(patch).mean((2, 3))
        h = self.third(F.softplus(h) * gate.sigmoid()[:, :, None, None])
        h = F.max_pool2d(F.softplus(self.norm(self.second(h))), 2)
        return self.last(F.softplus(self.deep(h)).view(len(x), -1))


@pytest.mark.slow
@pytest.mark.compile
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.long)])
def test_contiguous_images_in_the_objective(dtype, fresh_dynamo):
    """Alone, the penalty's gradients in a convolutional network are what autograd gives in float64."""
    torch.manual_seed(0)
    wide, x, y = _Tutorial().double(), torch.rand(5, 3, 8, 8, dtype=torch.float64), torch.randint(7, (5,))
    model = copy.deepcopy(wide).to(dtype)
    with torch._inductor.config.patch(force_disable_caches=True):
        densreg.RegularizedObjective(model, 1.0, criterion=nothing)(x.to(dtype), y).loss.backward()
    expected = by_autograd(wide, x, y, 1.0, criterion=nothing)[1]
    assert relative_error(gradients(model), expected) < (1e-12 if dtype == torch.float64 else 2e-5)
    counted = torch._dynamo.utils.counters["densreg"]
    assert counted["images laid out"] > 10
    assert counted["sums split"] >= 4
    assert counted["convolutions merged"] == 1
    assert counted["pools masked"] == 3  # the score's backward, the classification's, and the double backward
