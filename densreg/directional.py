"""The penalty's gradient by first-order kernels alone, for models that cannot be differentiated twice.

Let v be the dual direction of the norm at the score g, held fixed: <v, g> = ||g||_p, and the gradient of <v, g> in the
weights is that of ||g||_p. And <v, g> is a directional derivative of the log density L, so it can be differenced:

    one-sided   (L(x + h v) - L(x)) / h            error O(h)
    central     (L(x + h v) - L(x - h v)) / 2h     error O(h^2)

Automatic differentiation takes ReLU for linear on either side of its kink; a difference sees the kinks that lie between
x and x + h v, each of which adds 1/h to some weight's gradient. So the perturbed forwards use the pieces on which the
units were at x (:class:`Pieces`); without that a ResNet-18's gradient was a hundred times too long.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from densreg import functional

_RELU = (torch.relu, 0)
_PIECEWISE: dict[Callable, tuple[Callable, int]] = {
    **dict.fromkeys((F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_), _RELU),
    F.relu6: (F.relu6, 0),
    F.hardtanh: (F.hardtanh, 2),
    F.leaky_relu: (F.leaky_relu, 1),
}
"""The function out of place, and how many arguments stand between its input and "inplace"."""

_MAX_POOL = {
    F.max_pool1d: (F.max_pool1d_with_indices, 1),
    F.max_pool2d: (F.max_pool2d_with_indices, 2),
    F.max_pool3d: (F.max_pool3d_with_indices, 3),
}
"""The function that gives the maxima's places, and the dimensions of an image."""


class _Record(TorchFunctionMode):
    """Notes the linear piece on which each unit is."""

    def __init__(self, pieces: list[tuple]) -> None:
        super().__init__()
        self.pieces = pieces

    def __torch_function__(self, func, _types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _MAX_POOL:
            y, indices = _MAX_POOL[func][0](*args, **kwargs)
            self.pieces.append((indices,))
            return y
        if func not in _PIECEWISE:
            return func(*args, **kwargs)
        function, options = _PIECEWISE[func]
        leaf = args[0].detach().clone().requires_grad_()
        named = {name: value for name, value in kwargs.items() if name != "inplace"}
        with torch.enable_grad():
            out = function(leaf, *args[1 : 1 + options], **named)
            (slope,) = torch.autograd.grad(out.sum(), leaf)
        y = func(*args, **kwargs)
        self.pieces.append((slope, (out - slope * leaf).detach(), y is args[0]))
        return y


class _Reuse(TorchFunctionMode):
    """Puts each unit on the piece that was noted."""

    def __init__(self, pieces: list[tuple]) -> None:
        super().__init__()
        self.pieces = iter(pieces)

    def __torch_function__(self, func, _types, args=(), kwargs=None):
        if func in _MAX_POOL:
            (indices,) = next(self.pieces)
            dims = _MAX_POOL[func][1]
            return args[0].flatten(-dims).gather(-1, indices.flatten(-dims)).view(indices.shape)
        if func not in _PIECEWISE:
            return func(*args, **(kwargs or {}))
        slope, offset, inplace = next(self.pieces)
        y = torch.addcmul(offset, slope, args[0])
        return args[0].copy_(y) if inplace else y


class Pieces:
    """The linear pieces on which the units of a forward are, for other forwards of the same model.

    Of ReLU, leaky ReLU, ReLU6, hardtanh and max pooling where they are called as functions of torch or
    torch.nn.functional, as torch's modules do. What a checkpoint computes again in the backward is on the pieces of
    where it is.
    """

    def __init__(self) -> None:
        self._pieces: list[tuple] = []

    def recorded(self) -> TorchFunctionMode:
        self._pieces.clear()
        return _Record(self._pieces)

    def reused(self) -> TorchFunctionMode:
        return _Reuse(self._pieces)


SMALLEST_INPUT = 1e-2
"""Inputs whose root mean square is below this are taken to have it, for the step: h of an all-zero batch is not 0."""


def dual_direction(score: Sequence[Tensor], p: float) -> tuple[Tensor, tuple[Tensor, ...]]:
    """``||g_b||_p`` [B] of the joint score, and the direction of unit dual norm along which it is attained."""
    sizes = [g[0].numel() for g in score]
    rows = torch.cat([g.detach().flatten(1) for g in score], 1).requires_grad_()
    with torch.enable_grad():
        norm = functional.pnorm(rows, p)
        (dual,) = torch.autograd.grad(norm.sum(), rows)
    return norm.detach(), tuple(v.view_as(g) for v, g in zip(dual.split(sizes, 1), score, strict=True))


def step_size(xs: Sequence[Tensor], direction: Sequence[Tensor], central: bool) -> Tensor:
    """h, from the dtype: ``||h v|| / ||x||`` over the batch is 0.3 sqrt(eps), or for central differences 0.2 cbrt(eps).

    The powers balance rounding with truncation; the factors are those with which a ResNet-18, the most curved of what
    was tried, and an MLP both did well. One h for the whole batch, as BatchNorm couples its samples.
    """
    eps = torch.finfo(xs[0].dtype).eps
    elements = sum(x.numel() for x in xs)
    size = torch.stack([x.detach().square().sum() for x in xs]).sum().sqrt().clamp_min(SMALLEST_INPUT * elements**0.5)
    length = torch.stack([v.square().sum() for v in direction]).sum().sqrt().clamp_min(torch.finfo(xs[0].dtype).tiny)
    return (0.2 * eps ** (1 / 3) if central else 0.3 * eps**0.5) * size / length


def difference(
    log_density: Callable[[tuple[Tensor, ...]], Tensor],
    xs: Sequence[Tensor],
    direction: Sequence[Tensor],
    central: bool,
    at_x: Tensor,
) -> Tensor:
    """The sum over the batch of ``<v_b, g_b>`` as a finite difference, with its graph to the weights.

    Args:
        log_density: inputs -> [B], on the same pieces and by the same random numbers at every call.
        at_x: ``log_density(xs)``.
    """
    h = step_size(xs, direction, central)

    def at(sign: int) -> Tensor:
        # Inputs that require grad, as reentrant checkpoints need one; their gradient is not asked for.
        moved = (x.detach() + sign * h * v for x, v in zip(xs, direction, strict=True))
        return log_density(tuple(x.requires_grad_() for x in moved))

    return ((at(1) - at(-1)) / (2 * h)).sum() if central else ((at(1) - at_x) / h).sum()


@contextmanager
def replayed(states: Sequence[Tensor], device: torch.device) -> Iterator[None]:
    """Torch's generators set to :func:`random_states`, and afterwards to where they were."""
    with torch.random.fork_rng([device] if device.type == "cuda" else [], device_type="cuda"):
        torch.set_rng_state(states[0])
        if device.type == "cuda":
            torch.cuda.set_rng_state(states[1], device)
        yield


def random_states(device: torch.device) -> list[Tensor]:
    """The states of the generators that a forward on this device draws from."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _checkpointed_reentrantly(output: Tensor) -> bool:
    nodes = [torch.autograd.graph.get_gradient_edge(output).node]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        if node.name() == "CheckpointFunctionBackward":
            return True
        for child, _ in node.next_functions:
            if child is not None and child not in seen:
                seen.add(child)
                nodes.append(child)
    return False


def first_order_gradients(
    output: Tensor, inputs: Sequence[Tensor], leaves: Sequence[Tensor], retain_graph: bool = False
) -> list[Tensor | None]:
    """``torch.autograd.grad(output, inputs)``, also through reentrant checkpoints, which allow only backward().

    Args:
        leaves: every tensor whose ``.grad`` a backward() fills; it is left as it was.
    """
    # autograd.grad would not say so: weights inside of such a checkpoint simply look unused.
    if not _checkpointed_reentrantly(output):
        return list(torch.autograd.grad(output, inputs, retain_graph=retain_graph, allow_unused=True))
    kept = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    output.backward(retain_graph=retain_graph)
    gradients = [t.grad for t in inputs]
    for leaf, grad in zip(leaves, kept, strict=True):
        leaf.grad = grad
    return gradients
