"""What densreg changes in inductor's graphs of a training step: products, images, sums and max pooling.

**Products.** In a penalized step the gradient of a linear layer's weight is a sum, of the classification's product and
the double backward's: gy1^T x1 + gy2^T x2. Over a batch smaller than the layer the two results, not their operands, are
what the products move. [gy1; gy2]^T [x1; x2] writes the sum alone. So for a convolution, whose weight's gradient oneDNN
also reorders and copies: the gradient over both batches is the sum.

**Images.** On a CPU inductor lays out the images of convolutions as channels_last, but what goes into the backward of
one as the model had it. In a penalized step, with two backwards, contiguous images are copied back and forth: a
ResNet-20 takes 1.7 times as long.

**Sums.** BatchNorm and its two backwards sum over all pixels of a batch. inductor adds up the first pixels of all
images, then the second ones, and so on, which jumps through memory: a kernel takes up to 2.5 times as long. The double
backward even writes such a sum for each pixel, and reads them column by column.

**Max pooling.** In each kernel of its two backwards inductor looks for the maxima again, and adds and loads their
gradients one at a time, in contiguous images. Where windows do not overlap, comparing a pixel's place in its window
with the maximum's, kept as int8, does the same for many pixels at once.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from densreg import _torch
from densreg._torch import CustomGraphPass, get_hash_for_files

aten, prims = torch.ops.aten, torch.ops.prims


class GraphPasses(CustomGraphPass):
    """For ``post_grad_custom_pre_pass`` of ``torch._inductor.config``: changes a graph of aten nodes in place.

    What was changed is counted in ``torch._dynamo.utils.counters["densreg"]``.
    """

    def __call__(self, graph: Graph) -> None:
        merge_products(graph)
        if _torch.lays_out_convolutions():
            lay_out_images(graph)
        merge_convolutions(graph)
        split_sums(graph)
        mask_pools(graph)

    def uuid(self) -> object:
        return get_hash_for_files((__file__,))


# --------------------------------------------------------------------------------------------------------------------
# products


def merge_products(graph: Graph) -> None:
    """Sums of two matrix products become one product, where that moves less memory.

    Of two-dimensional ones of one shape, dtype and device with sizes known at compile time; others stay as they are.
    """
    for node in list(graph.nodes):
        if node.target == aten.add.Tensor and not node.kwargs:  # without a weight
            _merge(graph, node)


def _merge(graph: Graph, node: Any) -> None:
    first, second = (_product(term) for term in node.args)
    if first is None or second is None or first == second:
        return
    (one, turned), (other, other_turned) = first, second
    if turned != other_turned or not _worth_it((one, other), (*one.args, *other.args)):
        return
    (a, b), (c, d) = one.args, other.args
    with graph.inserting_before(node):
        # The left factors are transposed gradients: side by side as they are, without a copy of the transpose.
        left = _turned(graph, _cat(graph, a.args[0], c.args[0], 0)) if _is_turned(a, c) else _cat(graph, a, c, 1)
        total = _call(graph, aten.mm.default, left, _cat(graph, b, d, 0))
        total = _turned(graph, total) if turned else total
    node.replace_all_uses_with(total)
    _erase_unused(graph, node)
    _torch.count("products merged")


def _product(node: Any) -> tuple[Any, bool] | None:
    """The product that a node is, and whether it is transposed; None if it is none or is used elsewhere too."""
    turned = isinstance(node, Node) and _is_turned(node)
    product = node.args[0] if turned else node
    alone = all(isinstance(n, Node) and len(n.users) == 1 for n in (node, product))
    return (product, turned) if alone and product.target == aten.mm.default else None


def _is_turned(*nodes: Any) -> bool:
    return all(n.target == aten.permute.default and list(n.args[1]) == [1, 0] for n in nodes)


def merge_convolutions(graph: Graph) -> None:
    """Sums of two gradients of a convolution's weight become one, where that moves less memory, on a CPU."""
    node: Any
    for node in graph.find_nodes(op="call_function", target=aten.add.Tensor):
        one, other = (_of_weight(term) for term in node.args)
        if one is None or other is None or one is other or node.kwargs:
            continue
        (gy, x, weight, *how), (other_gy, other_x, _, *other_how) = one.args, other.args
        if how != other_how or not _is_image(weight.meta["val"]):
            continue
        if not _worth_it(node.args, (gy, x, other_gy, other_x)):
            continue
        if any(a.meta["val"].shape[1:] != b.meta["val"].shape[1:] for a, b in ((gy, other_gy), (x, other_x))):
            continue  # one weight of images of two sizes
        with graph.inserting_before(node):
            gy, x = _cat(graph, gy, other_gy, 0), _cat(graph, x, other_x, 0)
            both = _call(graph, aten.convolution_backward.default, gy, x, weight, *how)
            total = _call(graph, operator.getitem, both, 1)
        node.replace_all_uses_with(total)
        _erase_unused(graph, node)
        _torch.count("convolutions merged")


def _of_weight(node: Any) -> Any:
    """What a node is the gradient of a convolution's weight from, if nothing else is and it is used here alone."""
    if not isinstance(node, Node) or node.target is not operator.getitem or node.args[1] != 1 or len(node.users) > 1:
        return None
    source: Any = node.args[0]
    alone = source.target == aten.convolution_backward.default and list(source.args[-1]) == [False, True, False]
    return source if alone else None


def _worth_it(results: Sequence[Any], factors: Sequence[Any]) -> bool:
    """Copying the factors together (a read and a write) moves less than two results and their sum instead of one."""
    result, same, *values = (n.meta["val"] for n in (*results, *factors))
    if not all(v.dtype == result.dtype and v.device == result.device for v in (same, *values)):
        return False
    if result.shape != same.shape or not all(isinstance(n, int) for v in (result, *values) for n in v.shape):
        return False
    return 2 * sum(v.numel() for v in values) <= 3 * result.numel()


# --------------------------------------------------------------------------------------------------------------------
# images

_CONVOLUTIONS = {aten.convolution.default: 1, aten.convolution_backward.default: 2}
"""How many of the first arguments are images; the weight comes after them."""


def lay_out_images(graph: Graph) -> None:
    """Says of all images on a CPU between convolutions that they are channels_last, for inductor to make them so.

    Between convolutions: joined to one by pointwise operations alone. Results of the graph stay as they are.
    """
    results = {node for output in graph.find_nodes(op="output") for node in output.all_input_nodes}
    pending = [node for target in _CONVOLUTIONS for node in graph.find_nodes(op="call_function", target=target)]
    seen = set(pending)
    while pending:
        node = pending.pop()
        images = _CONVOLUTIONS.get(node.target)
        operands = node.all_input_nodes if images is None else node.args[:images]
        for near in (*operands, *node.users):
            if near not in seen and _joined(near):
                seen.add(near)
                pending.append(near)
    for node in seen - results:
        value = node.meta["val"]
        if _is_image(value) and _is_whole(value) and not any(map(_reads_strides, node.users)):
            strides = torch.empty(value.shape, device="meta", memory_format=torch.channels_last).stride()
            with value.fake_mode:  # of the same memory still: from it inductor knows what is a view of what
                node.meta["val"] = value.as_strided(value.shape, strides)
            _torch.count("images laid out")


def _joined(node: Node) -> bool:
    """Whether a node is an image of a convolution or a pointwise operation."""
    if node.target is operator.getitem:  # of a convolution's backward 1 is the weight's gradient
        return node.args[1:] == (0,) and _is_image(node.meta.get("val"))
    known = node.target in _CONVOLUTIONS or torch.Tag.pointwise in getattr(node.target, "tags", ())
    return known and _is_image(node.meta.get("val"))


def _is_whole(value: torch.Tensor) -> bool:
    """Whether it is contiguous, no view of something larger, and not channels_last."""
    whole = value.untyped_storage().nbytes() == value.numel() * value.element_size()
    return whole and value.is_contiguous() and not value.is_contiguous(memory_format=torch.channels_last)


# --------------------------------------------------------------------------------------------------------------------
# sums

MOST_PIXELS = 1024
"""So many float32 values are summed up in a row: of more the sum would lose digits."""


def split_sums(graph: Graph) -> None:
    """Sums over a batch of channels_last images, for each channel, are taken of each image first."""
    for node in graph.find_nodes(op="call_function", target=aten.sum.dim_IntList):
        image, dims, keepdim = _summed(node)
        value = image.meta["val"]
        if not _is_image(value) or sorted(dims) != [0, 2, 3] or dims[0] != 0 or node.kwargs:
            continue
        (_, channels, *pixels), strides = value.shape, value.stride()
        if not all(isinstance(n, int) for n in pixels):
            continue  # a size that depends on data cannot be compared
        if strides[1] != 1 or strides[3] != channels or math.prod(pixels) == 1:
            continue
        # In half precision an image's sum would be rounded.
        wide = {"dtype": torch.float32} if value.dtype in (torch.bfloat16, torch.float16) else {}
        with graph.inserting_before(node):
            for inner in ([2, 3],) if math.prod(pixels) <= MOST_PIXELS else ([3], [2]):
                image = _call(graph, aten.sum.dim_IntList, image, inner, True, **wide)
            total = _call(graph, aten.sum.dim_IntList, image, [0, 2, 3], keepdim)
            if wide:
                total = _call(graph, prims.convert_element_type.default, total, value.dtype)
        node.replace_all_uses_with(total)
        _erase_unused(graph, node)
        _torch.count("sums split")


def _summed(node: Any) -> tuple[Any, list[int], bool]:
    """What is summed, over which of its dimensions, the first first, and whether they stay.

    BatchNorm's double backward has a sum over the batch, of this one over the rows, of that one over the columns.
    """
    keepdim = _keeps(node)
    sums = [node]
    while _is_sum(below := sums[-1].args[0]) and _keeps(below) == keepdim and len(below.users) == 1:
        sums.append(below)
    left, dims = list(range(below.meta["val"].ndim)), []
    for each in reversed(sums):
        over = (each.args[1] or range(len(left))) if left else ()  # a number's sum may be over 0 or -1
        now = sorted(left[dim] for dim in over)
        dims += now
        if not keepdim:
            left = [dim for dim in left if dim not in now]
    return below, dims, keepdim


def _is_sum(node: Any) -> bool:
    return node.target == aten.sum.dim_IntList and not node.kwargs


def _keeps(node: Any) -> bool:
    return len(node.args) > 2 and node.args[2]


# --------------------------------------------------------------------------------------------------------------------
# max pooling


def mask_pools(graph: Graph) -> None:
    """Max pooling's backward and double backward become comparisons, where windows do not overlap.

    Both use flat indices of pixels: the one adds gradients to zeros there, the other takes them from there.
    """
    indices: Any
    for indices in graph.find_nodes(op="call_function", target=_torch.indices_of_maxima()):
        places, window, size, step, padding, dilation = indices.args
        pooled = places.meta["val"].shape
        apart = window == step and not any(padding) and all(d == 1 for d in dilation)
        if not (apart and _is_image(places.meta["val"]) and all(isinstance(n, int) for n in (*pooled, *size))):
            continue
        if [n * k for n, k in zip(pooled[2:], window, strict=True)] != list(size):
            continue  # pixels at the end are in no window
        uses = _indexed(indices, math.prod(pooled[2:]), math.prod(size))
        if not uses:
            continue
        results = places.args[0].users if places.target is operator.getitem else ()  # else of another graph
        maxima = next((user for user in results if user.args[1] == 0 and _is_image(user.meta["val"])), places)
        with graph.inserting_before(indices):  # kept, and laid out as the maxima are
            kept = _call(graph, prims.inductor_force_stride_order.default, places, maxima.meta["val"].stride())
        for node in uses:
            with graph.inserting_before(node), kept.meta["val"].fake_mode:
                if node.target == aten.gather.default:
                    result = _of_maxima(graph, _reshaped(graph, node.args[0], (*pooled[:2], *size)), kept, window)
                else:
                    added = node.args[3 if node.target == aten.scatter_add.default else 0]
                    result = _at_maxima(graph, _reshaped(graph, added, pooled), kept, window)
                flat = _reshaped(graph, result, node.meta["val"].shape)
            for user in list(node.users):
                if user.target in _RESHAPES and user.meta["val"].shape == result.meta["val"].shape:
                    user.replace_all_uses_with(result)
                    graph.erase_node(user)
            node.replace_all_uses_with(flat)
            _erase_unused(graph, node, flat)
            _torch.count("pools masked")


def _indexed(indices: Node, maxima: int, pixels: int) -> list[Any]:
    """What adds to zeros at the indices of each image's pixels, or takes pixels there."""
    found, pending = [], [indices]
    while pending:
        index = pending.pop()
        for user in index.users:
            if user.target in (*_RESHAPES, aten.clone.default):
                pending.append(user)
            elif _pools_backward(user, maxima, pixels) or _gathers_or_adds(user, index, maxima, pixels):
                found.append(user)
    return found


def _pools_backward(node: Any, maxima: int, pixels: int) -> bool:
    """Whether a node is max pooling's backward, which torch 2.11 has as one operation."""
    if node.target != aten.max_pool2d_with_indices_backward.default:
        return False
    added, image = (each.meta["val"].shape for each in node.args[:2])
    fits = (math.prod(added[2:]), math.prod(image[2:])) == (maxima, pixels) and len(image) == 4
    return fits and not any(map(_reads_strides, node.users))


def _gathers_or_adds(node: Any, index: Node, maxima: int, pixels: int) -> bool:
    """Whether a node takes pixels at the indices, or adds to zeros there."""
    if node.target not in (aten.gather.default, aten.scatter_add.default) or node.args[2] is not index:
        return False
    base, dim = node.args[:2]
    image, places = base.meta["val"].shape, index.meta["val"].shape
    if image[:-1] != places[:-1] or (image[-1], places[-1]) != (pixels, maxima) or dim not in (-1, len(image) - 1):
        return False
    if node.target == aten.scatter_add.default:
        zeros = base.target == aten.full.default and base.args[1] == 0
        if not zeros or node.args[3].meta["val"].shape != places:  # there may be more than is added
            return False
    ends = [end for near in node.users for end in (near.users if near.target in _RESHAPES else (near,))]
    return not any(map(_reads_strides, ends))


def _of_maxima(graph: Graph, image: Node, places: Node, window: Sequence[int]) -> Node:
    """[N, C, H, W] -> [N, C, H / h, W / w], the pixels at the maxima's places."""
    (*_, height, width), (h, w) = image.meta["val"].shape, window
    pixels = [
        _call(graph, aten.slice.Tensor, _call(graph, aten.slice.Tensor, image, 2, i, height, h), 3, j, width, w)
        for i, j in itertools.product(range(h), range(w))
    ]
    result = pixels[0]
    for place, pixel in enumerate(pixels[1:], start=1):
        result = _call(graph, aten.where.self, _call(graph, aten.eq.Scalar, places, place), pixel, result)
    return result


def _at_maxima(graph: Graph, image: Node, places: Node, window: Sequence[int]) -> Node:
    """[N, C, H, W] -> [N, C, H h, W w], zero but at the maxima's places."""
    value = image.meta["val"]
    (n, c, height, width), (h, w) = value.shape, window

    def spread(node: Node) -> Node:  # [N, C, H, 1, W, 1]
        return _call(graph, aten.unsqueeze.default, _call(graph, aten.unsqueeze.default, node, 3), 5)

    options = {"start": 0, "step": 1, "dtype": torch.int8, "device": value.device, "requires_grad": False}
    place = _reshaped(graph, _call(graph, prims.iota.default, h * w, **options), (h, 1, w))
    here = _call(graph, aten.eq.Tensor, spread(places), place)
    zero = _call(graph, aten.full.default, [], 0.0, dtype=value.dtype, device=value.device)
    result = _call(graph, aten.where.self, here, spread(image), zero)
    return _reshaped(graph, result, (n, c, height * h, width * w))


# --------------------------------------------------------------------------------------------------------------------
# nodes: what they are, and new ones


def _is_image(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim == 4 and value.device.type == "cpu"


_STRIDED = {"as_strided", "as_strided_copy", "as_strided_scatter", "resize", "resize_as", "set"}


def _reads_strides(user: Node) -> bool:
    """Whether an operation's result may depend on how its operands lie in memory."""
    target: Any = user.target
    if getattr(target, "namespace", "") not in ("aten", "prims", "densreg"):
        return True
    return str(target.overloadpacket).split(".")[-1] in _STRIDED or torch.Tag.needs_fixed_stride_order in target.tags


def _call(graph: Graph, target: Any, *args: Any, **kwargs: Any) -> Node:
    node = graph.call_function(target, args, kwargs)
    node.meta["val"] = target(*map_arg(args, lambda n: n.meta["val"]), **kwargs)
    return node


def _cat(graph: Graph, one: Node, other: Node, dim: int) -> Node:
    return _call(graph, aten.cat.default, [one, other], dim)


def _turned(graph: Graph, node: Node) -> Node:
    return _call(graph, aten.permute.default, node, [1, 0])


_RESHAPES = (aten.reshape.default, aten.view.default)


def _reshaped(graph: Graph, node: Any, shape: Sequence[int]) -> Node:
    """The node in this shape: what it was before it was made flat, if it was."""
    before = node.args[0] if node.target in _RESHAPES else node
    return before if before.meta["val"].shape == shape else _call(graph, aten.reshape.default, node, list(shape))


def _erase_unused(graph: Graph, *nodes: Node) -> None:
    """Erases what nothing uses, and what nothing uses then; inductor would compute it."""
    for node in nodes:
        if node.op == "call_function" and not node.users and node in graph.nodes:
            inputs = node.all_input_nodes
            graph.erase_node(node)
            _erase_unused(graph, *inputs)
