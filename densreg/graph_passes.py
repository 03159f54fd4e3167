"""What densreg changes in inductor's graphs of a training step: products are merged, images laid out, sums split.

**Products.** In a penalized step the gradient of a linear layer's weight is a sum, of the classification's product and
the double backward's: gy1^T x1 + gy2^T x2. Over a batch smaller than the layer the two results, not their operands, are
what the products move. [gy1; gy2]^T [x1; x2] writes the sum alone.

**Images.** On a CPU inductor lays out the images of convolutions as channels_last, but what goes into the backward of
one as the model had it. In a penalized step, with two backwards, contiguous images are copied back and forth: a
ResNet-20 takes 1.7 times as long.

**Sums.** BatchNorm and its two backwards sum over all pixels of a batch. inductor adds up the first pixels of all
images, then the second ones, and so on, which jumps through memory: a kernel takes up to 2.5 times as long.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from densreg import _torch
from densreg._torch import CustomGraphPass, get_hash_for_files

aten = torch.ops.aten


class GraphPasses(CustomGraphPass):
    """For ``post_grad_custom_pre_pass`` of ``torch._inductor.config``: changes a graph of aten nodes in place.

    What was changed is counted in ``torch._dynamo.utils.counters["densreg"]``.
    """

    def __call__(self, graph: Graph) -> None:
        merge_products(graph)
        if _torch.lays_out_convolutions():
            lay_out_images(graph)
        split_sums(graph)

    def uuid(self) -> object:
        return get_hash_for_files((__file__,))


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


_STRIDED = {"as_strided", "as_strided_copy", "as_strided_scatter", "resize", "resize_as", "set"}


def _reads_strides(user: Node) -> bool:
    """Whether an operation's result may depend on how its operands lie in memory."""
    target: Any = user.target
    if getattr(target, "namespace", "") not in ("aten", "prims", "densreg"):
        return True
    return str(target.overloadpacket).split(".")[-1] in _STRIDED or torch.Tag.needs_fixed_stride_order in target.tags


def _is_image(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim == 4 and value.device.type == "cpu"


_WIDE = (torch.float32, torch.float64)  # in half precision an image's sum would be rounded
MOST_PIXELS = 1024
"""So many float32 values are summed up in a row: of more the sum would lose digits."""


def split_sums(graph: Graph) -> None:
    """Sums over a batch of channels_last images, for each channel, are taken of each image first."""
    for node in graph.find_nodes(op="call_function", target=aten.sum.dim_IntList):
        image, dims = node.args[:2]
        value = image.meta["val"]
        if (
            not _is_image(value)
            or value.dtype not in _WIDE
            or sorted(dim % 4 for dim in dims or ()) != [0, 2, 3]
            or node.kwargs
        ):
            continue
        (_, channels, *pixels), strides = value.shape, value.stride()
        if strides[1] != 1 or strides[3] != channels or math.prod(pixels) == 1:
            continue
        with graph.inserting_before(node):
            for inner in ([2, 3],) if math.prod(pixels) <= MOST_PIXELS else ([3], [2]):
                image = _call(graph, aten.sum.dim_IntList, image, inner, True)
            node.args = (image, *node.args[1:])
        _torch.count("sums split")


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
    if turned != other_turned or not _worth_it(one, other):
        return
    (a, b), (c, d) = one.args, other.args
    with graph.inserting_before(node):
        # The left factors are transposed gradients: side by side as they are, without a copy of the transpose.
        left = _turned(graph, _cat(graph, a.args[0], c.args[0], 0)) if _is_turned(a, c) else _cat(graph, a, c, 1)
        total = _call(graph, aten.mm.default, left, _cat(graph, b, d, 0))
        total = _turned(graph, total) if turned else total
    node.replace_all_uses_with(total)
    for old in dict.fromkeys((node, *node.args, one, other)):
        graph.erase_node(old)
    _torch.count("products merged")


def _product(node: Any) -> tuple[Any, bool] | None:
    """The product that a node is, and whether it is transposed; None if it is none or is used elsewhere too."""
    turned = isinstance(node, Node) and _is_turned(node)
    product = node.args[0] if turned else node
    alone = all(isinstance(n, Node) and len(n.users) == 1 for n in (node, product))
    return (product, turned) if alone and product.target == aten.mm.default else None


def _is_turned(*nodes: Any) -> bool:
    return all(n.target == aten.permute.default and list(n.args[1]) == [1, 0] for n in nodes)


def _worth_it(one: Node, other: Node) -> bool:
    """Copying the factors together (a read and a write) moves less than two results and their sum instead of one."""
    result, same, *factors = (n.meta["val"] for n in (one, other, *one.args, *other.args))  # type: ignore[union-attr]
    if not all(v.dtype == result.dtype and v.device == result.device for v in (same, *factors)):
        return False
    if result.shape != same.shape or not all(isinstance(n, int) for v in (result, *factors) for n in v.shape):
        return False
    return 2 * sum(v.numel() for v in factors) <= 3 * result.numel()


def _call(graph: Graph, target: Any, *args: Any) -> Node:
    node = graph.call_function(target, args)
    node.meta["val"] = target(*map_arg(args, lambda n: n.meta["val"]))
    return node


def _cat(graph: Graph, one: Node, other: Node, dim: int) -> Node:
    return _call(graph, aten.cat.default, [one, other], dim)


def _turned(graph: Graph, node: Node) -> Node:
    return _call(graph, aten.permute.default, node, [1, 0])
