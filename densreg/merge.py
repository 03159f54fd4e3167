"""A pass over inductor's graphs: the sum of two matrix products as one product, where that moves less memory.

In a penalized step the gradient of a linear layer's weight is a sum, of the classification's product and the double
backward's: gy1^T x1 + gy2^T x2. Over a batch smaller than the layer the two results, not their operands, are what the
products move. [gy1; gy2]^T [x1; x2] writes the sum alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from densreg import _torch
from densreg._torch import CustomGraphPass, get_hash_for_files

aten = torch.ops.aten


class MergeProducts(CustomGraphPass):
    """For ``post_grad_custom_pre_pass`` of ``torch._inductor.config``: changes a graph of aten nodes in place.

    Sums of two-dimensional products of one shape, dtype and device with sizes known at compile time; others stay as
    they are. What was merged is counted: ``torch._dynamo.utils.counters["densreg"]["products merged"]``.
    """

    def __call__(self, graph: Graph) -> None:
        for node in list(graph.nodes):
            if node.target == aten.add.Tensor and not node.kwargs:  # without a weight
                _merge(graph, node)

    def uuid(self) -> object:
        return get_hash_for_files((__file__,))


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
