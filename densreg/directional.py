"""The penalty's gradient by first-order kernels alone, for models that cannot be differentiated twice.

Let v be the dual direction of the norm at the score g, held fixed: <v, g> = ||g||_p, and the gradient of <v, g> in the
weights is that of ||g||_p. And <v, g> is a directional derivative of the log density L, so it can be differenced:

    one-sided   (L(x + h v) - L(x)) / h            error O(h)
    central     (L(x + h v) - L(x - h v)) / 2h     error O(h^2)

Automatic differentiation takes ReLU for linear on either side of its kink; a difference sees the kinks that lie between
x and x + h v, each of which adds 1/h to some weight's gradient. So the perturbed forwards use the pieces on which the
units were at x (:class:`Record`, :class:`Reuse`); without that a ResNet-18's gradient was a hundred times too long.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from densreg import _torch, functional, ops, paths


class _Affine(NamedTuple):
    """Units that are slope * x + offset on each piece; bounds that are tensors have gradients of their own."""

    function: Callable
    """out of place"""
    options: int
    """how many arguments stand between the input and "inplace" """

    def note(self, func: Callable, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, tuple]:
        leaf = args[0].detach().clone().requires_grad_()
        named = {name: value for name, value in kwargs.items() if name != "inplace"}
        with torch.enable_grad():
            out = self.function(leaf, *args[1 : 1 + self.options], **named)
            (slope,) = torch.autograd.grad(out.sum(), leaf)
        return func(*args, **kwargs), (slope, (out - slope * leaf).detach())

    def again(self, piece: tuple, x: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        slope, offset = piece
        return torch.addcmul(offset, slope, x)


class _Branches(NamedTuple):
    """Units that are one of several smooth functions; ``which`` notes tensors that tell ``value`` which one."""

    which: Callable
    value: Callable

    def note(self, func: Callable, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        which = self.which(*args, **kwargs)
        return func(*args, **kwargs), which

    def again(self, which: Any, *args: Any, **kwargs: Any) -> Tensor:
        return self.value(which, *args, **kwargs)


class _MaxPool(NamedTuple):
    with_indices: Callable
    dims: int
    both: bool
    """whether the maxima's places are returned too"""

    def note(self, _func: Callable, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, Tensor]:
        y, indices = self.with_indices(*args, **kwargs)
        return (y, indices) if self.both else y, indices

    def again(self, indices: Tensor, x: Tensor, *_args: Any, **_kwargs: Any) -> Any:
        y = x.flatten(-self.dims).gather(-1, indices.flatten(-self.dims)).view(indices.shape)
        return (y, indices) if self.both else y


class _Extremum(NamedTuple):
    """max, min, amax or amin of a tensor, along dimensions or all."""

    places: Callable
    both: type | None
    """what "values" and "indices" are returned in, where a dimension is given; the gradient is then that of one place,
    else it is spread over all that tie"""

    def _flat(self, x: Tensor, dim: Any = None, keepdim: bool = False, **as_numpy: Any) -> tuple[Tensor, list[int]]:
        """The reduced dimensions as the last one, and the shape of the result."""
        dim, keepdim = as_numpy.get("axis", dim), as_numpy.get("keepdims", keepdim)
        dims = [] if dim is None else [dim] if isinstance(dim, int) else list(dim)
        dims = [d % x.ndim for d in dims] or list(range(x.ndim))
        kept = [d for d in range(x.ndim) if d not in dims]
        flat = x.permute((*kept, *dims)).flatten(len(kept))
        return flat, [1 if d in dims else x.shape[d] for d in range(x.ndim) if keepdim or d in kept]

    def note(self, func: Callable, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, Tensor]:
        flat = self._flat(*args, **kwargs)[0].detach()
        places = self.places(flat, -1, keepdim=True)
        return func(*args, **kwargs), flat == flat.gather(-1, places) if self.both is None else places

    def again(self, noted: Tensor, *args: Any, **kwargs: Any) -> Any:
        flat, shape = self._flat(*args, **kwargs)
        if self.both is None:
            return (torch.where(noted, flat, 0).sum(-1) / noted.sum(-1)).view(shape)
        return self.both((flat.gather(-1, noted).view(shape), noted.view(shape)))


class _Constant(NamedTuple):
    """A comparison or a sign, which tells others (where, masked_fill, an index) the piece they are on."""

    def note(self, func: Callable, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        y = func(*args, **kwargs)
        return y, y.clone()

    def again(self, noted: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        return noted.clone()


_Rule = _Affine | _Branches | _MaxPool | _Extremum | _Constant


def _elu(positive: Tensor, x: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    return torch.where(positive, x, alpha * torch.where(positive, 0, x).expm1())


def _selu(positive: Tensor, x: Tensor, inplace: bool = False) -> Tensor:
    return 1.0507009873554805 * _elu(positive, x, 1.6732632423543772)


def _hardswish(piece: Tensor, x: Tensor, inplace: bool = False) -> Tensor:
    return torch.where(piece == 0, 0, torch.where(piece == 1, x * (x + 3) / 6, x))


def _greater(piece: tuple[Tensor, Tensor], a: Tensor, other: Tensor) -> Tensor:
    """maximum and minimum, whose gradient is halved where both are equal."""
    first, equal = piece
    return torch.where(equal, (a + other) / 2, torch.where(first, a, other))


def _prelu(positive: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    return torch.where(positive, x, x * weight.view(-1, *[1] * (x.ndim - 2)))


def _clamp(piece: tuple[Tensor | None, Tensor | None], x: Tensor, min: Any = None, max: Any = None) -> Tensor:
    low, high = piece
    x = x if low is None else torch.where(low, min, x)
    return x if high is None else torch.where(high, max, x)


def _outside(x: Tensor, min: Any = None, max: Any = None) -> tuple[Tensor | None, Tensor | None]:
    """Where x is below min, and where what is left is above max."""
    low = None if min is None else x < min
    x = x if low is None else torch.where(low, min, x)
    return low, None if max is None else x > max


_between = _Branches(_outside, _clamp)
_below = _Branches(lambda x, max: _outside(x, max=max), lambda piece, x, max: _clamp(piece, x, max=max))
_positive = _Branches(lambda x, *_args, **_kwargs: x > 0, _elu)
_RULES: dict[Callable, _Rule] = {
    **{
        getattr(owner, f"{name}{inplace}"): _Affine(getattr(torch, name), options)
        for name, options in (("relu", 0), ("abs", 0), ("clamp", 2), ("clip", 2), ("clamp_min", 1), ("clamp_max", 1))
        for owner in (torch, Tensor)
        for inplace in ("", "_")
    },
    **dict.fromkeys((torch.absolute, Tensor.absolute, Tensor.absolute_), _Affine(torch.abs, 0)),
    **dict.fromkeys((F.threshold, torch.threshold, torch.threshold_), _Affine(torch.threshold, 2)),
    F.relu: _Affine(torch.relu, 0),
    F.relu6: _Affine(F.relu6, 0),
    F.hardsigmoid: _Affine(F.hardsigmoid, 0),
    **dict.fromkeys((F.hardtanh, F.hardtanh_), _Affine(F.hardtanh, 2)),
    **dict.fromkeys((F.leaky_relu, F.leaky_relu_), _Affine(F.leaky_relu, 1)),
    F.softshrink: _Affine(F.softshrink, 1),
    **dict.fromkeys((F.hardshrink, Tensor.hardshrink), _Affine(F.hardshrink, 1)),
    **dict.fromkeys((F.elu, F.elu_), _positive),
    **dict.fromkeys((F.selu, torch.selu, torch.selu_), _positive._replace(value=_selu)),
    **dict.fromkeys((torch.prelu, Tensor.prelu), _positive._replace(value=_prelu)),
    F.hardswish: _Branches(lambda x, **_kwargs: (x > -3).char() + (x >= 3).char(), _hardswish),
    **{
        getattr(owner, name): rule
        for name, rule in (
            ("maximum", _Branches(lambda a, other: (a >= other, a == other), _greater)),
            ("minimum", _Branches(lambda a, other: (a <= other, a == other), _greater)),
        )
        for owner in (torch, Tensor)
    },
    **{
        getattr(owner, name): _Extremum(places, both)
        for name, places, both in (
            ("amax", torch.argmax, None),
            ("amin", torch.argmin, None),
            ("max", torch.argmax, torch.return_types.max),
            ("min", torch.argmin, torch.return_types.min),
        )
        for owner in (torch, Tensor)
    },
    **{
        getattr(owner, name): _Constant()
        for name in (
            *("gt", "ge", "lt", "le", "eq", "ne", "greater", "greater_equal", "less", "less_equal", "not_equal"),
            *("sign", "sgn"),
        )
        for owner in (torch, Tensor)
    },
    **{
        getattr(F, f"{kind}{dims}d{both}"): _MaxPool(getattr(F, f"{kind}{dims}d_with_indices"), dims, bool(both))
        for kind in ("max_pool", "adaptive_max_pool")
        for dims in (1, 2, 3)
        for both in ("", "_with_indices")
    },
}
"""How the functions that have kinks are computed again on the pieces that were noted."""


def _rule(func: Callable, args: Sequence[Any], kwargs: dict[str, Any]) -> _Rule | None:
    rule = _RULES.get(func)
    if rule is None or not args[0].is_floating_point():
        return None
    others = [*args[1:], *kwargs.values()]
    if isinstance(rule, _Affine) and any(isinstance(bound, Tensor) for bound in others):
        named = func.__name__.startswith(("clamp", "clip")) and "out" not in kwargs
        return (_below if "max" in func.__name__ else _between) if named else None
    if isinstance(rule, _Extremum) and args[0].ndim == 0:
        return None
    if isinstance(rule, _Extremum) and rule.both is not None:
        if any(isinstance(other, Tensor) for other in others):  # max(a, b) is maximum
            return _RULES[torch.maximum if rule.places is torch.argmax else torch.minimum]
        return rule if others else rule._replace(both=None)
    return rule


def _input_first(args: Sequence[Any], kwargs: dict[str, Any] | None) -> tuple[Sequence[Any], dict[str, Any]]:
    """The arguments, the input by position."""
    kwargs = dict(kwargs or {})
    return ((kwargs.pop("input"),), kwargs) if not args and "input" in kwargs else (args, kwargs)


class _Pieces(TorchFunctionMode):
    """A mode for the functions that have kinks."""

    def __torch_function__(self, func, _types, args=(), kwargs=None):
        args, kwargs = _input_first(args, kwargs)
        rule = _rule(func, args, kwargs)
        return func(*args, **kwargs) if rule is None else self._call(rule, func, args, kwargs)

    def _call(self, rule: _Rule, func: Callable, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        raise NotImplementedError


class Record(_Pieces):
    """Context in which a forward notes the piece on which each unit is, in a list.

    Units are those of ReLU, leaky ReLU, PReLU, ReLU6, ELU, SELU, hardswish, hardtanh, hardsigmoid, threshold, clamp,
    abs, softshrink, hardshrink, max pooling, maximum, max, amax and the like, called as functions of torch or
    torch.nn.functional, as torch's modules do. What follows a comparison (where, masked_fill) stays on its piece too.
    Kinks in anything else (sort, RReLU) are not known. A checkpoint that is computed again in the backward is on the
    pieces of its own input.
    """

    def __init__(self, pieces: list[tuple]) -> None:
        super().__init__()
        self.pieces = pieces

    def _call(self, rule, func, args, kwargs):
        y, piece = rule.note(func, args, kwargs)
        self.pieces.append((rule, args[0].shape, piece, y is args[0]))
        return y


class Reuse(_Pieces):
    """Context in which another forward of the same model has each unit on the piece that was noted."""

    def __init__(self, pieces: list[tuple]) -> None:
        super().__init__()
        self.pieces = iter(pieces)

    def _call(self, rule, func, args, kwargs):
        noted, shape, piece, inplace = next(self.pieces, (None, None, None, False))
        if (noted, shape) != (rule, args[0].shape):
            raise RuntimeError(
                'path "directional": the perturbed forward calls other activations than the first, so that their '
                "linear pieces do not fit"
            )
        if not inplace:
            return rule.again(piece, *args, **kwargs)
        x, *others = args
        return x.copy_(rule.again(piece, x.clone(), *others, **kwargs))  # the backward may need what x was


SMALLEST_INPUT = 1e-2
"""For the step size, a root mean square of the inputs below this counts as this: h of an all-zero batch is not 0."""


def dual_direction(score: Sequence[Tensor], p: float) -> tuple[Tensor, tuple[Tensor, ...]]:
    """``||g_b||_p`` [B] of the joint score, and the direction of unit dual norm along which it is attained."""
    sizes = [g.shape[1:].numel() for g in score]
    joint, p = torch.cat([g.detach().flatten(1) for g in score], 1), functional.check_order(p)
    norm, peak, total = ops.pnorm(joint, p)
    dual = ops.pnorm_backward(torch.ones_like(norm), joint, peak, total, p)
    return norm, tuple(v.view_as(g) for v, g in zip(dual.split(sizes, 1), score, strict=True))


def step_size(xs: Sequence[Tensor], direction: Sequence[Tensor], central: bool) -> Tensor:
    """h, from the dtype: ``||h v|| / ||x||`` over the batch is 0.3 sqrt(eps), or for central differences 0.2 cbrt(eps).

    The powers balance rounding with truncation; the factors are those with which a ResNet-18, the most curved of what
    was tried, and an MLP both did well. One h for the whole batch, as BatchNorm couples its samples.
    """
    eps = torch.finfo(xs[0].dtype).eps
    elements = max(1, sum(x.numel() for x in xs))
    # In half precision squares overflow. Where all scores are 0 there is no direction, and h is as good as any.
    wide = ops.accumulation_dtype(xs[0].dtype)
    size = torch.stack([x.detach().to(wide).square().sum() for x in xs]).sum().sqrt()
    size = size.clamp_min(SMALLEST_INPUT * elements**0.5)
    length = torch.stack([v.to(wide).square().sum() for v in direction]).sum().sqrt()
    length = length.masked_fill(length == 0, 1)
    return (0.2 * eps ** (1 / 3) if central else 0.3 * eps**0.5) * size / length


def difference(
    log_density: Callable[[tuple[Tensor, ...]], Tensor],
    xs: Sequence[Tensor],
    direction: Sequence[Tensor],
    central: bool,
    at_x: Tensor,
    steps: int = 1,
) -> Tensor:
    """The sum over the batch of ``<v_b, g_b>`` as a finite difference, with its graph to the weights.

    Args:
        log_density: inputs -> [B], on the same pieces and by the same random numbers at every call.
        at_x: ``log_density(xs)``.
        steps: how many times :func:`step_size` is taken.
    """
    h = steps * step_size(xs, direction, central)

    def at(sign: int) -> Tensor:
        # Inputs that require grad, as reentrant checkpoints need one; their gradient is not asked for.
        moved = (x.detach() + sign * h * v for x, v in zip(xs, direction, strict=True))
        return log_density(tuple(x.requires_grad_() for x in moved))

    return ((at(1) - at(-1)) / (2 * h)).sum() if central else ((at(1) - at_x) / h).sum()


@contextmanager
def replayed(states: Sequence[Any], device: torch.device) -> Iterator[None]:
    """The generators set to :func:`random_states`, and afterwards to where they were."""
    before = random_states(device)
    _set_random_states(states, device)
    try:
        yield
    finally:
        _set_random_states(before, device)


def random_states(device: torch.device) -> list[Any]:
    """The states of the generators that a forward on this device draws from: torch's, Python's and NumPy's own."""
    states = [torch.get_rng_state(), random.getstate(), np.random.get_state()]  # noqa: NPY002
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def _set_random_states(states: Sequence[Any], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    np.random.set_state(states[2])  # noqa: NPY002
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[3], device)


def first_order_gradients(
    output: Tensor, inputs: Sequence[Tensor], leaves: Sequence[Tensor], retain_graph: bool = False
) -> list[Tensor | None]:
    """``torch.autograd.grad(output, inputs)``, also through reentrant checkpoints, which allow only backward().

    Args:
        leaves: every tensor whose ``.grad`` a backward() fills; it is left as it was.

    Raises:
        RuntimeError: a non-reentrant checkpoint cannot be computed again on other pieces.
        ValueError: reentrant checkpoints, and a leaf with a post-accumulate-grad hook.
    """
    # autograd.grad would not say so: weights inside of such a checkpoint simply look unused.
    if not any(_torch.is_reentrant_checkpoint(node) for node in paths.graph_nodes([output])):
        try:
            return list(torch.autograd.grad(output, inputs, retain_graph=retain_graph, allow_unused=True))
        except torch.utils.checkpoint.CheckpointError as error:
            raise RuntimeError(
                'path "directional" goes through checkpoints that are reentrant only, or have no ReLU or max pooling '
                f"inside: use_reentrant=True ({str(error).splitlines()[0]})"
            ) from error
    if any(_torch.has_post_accumulate_grad_hooks(leaf) for leaf in leaves):
        raise ValueError(
            "through reentrant checkpoints gradients come by backward() only, which would call the parameters' "
            "post-accumulate-grad hooks too early: take those off, or checkpoint with use_reentrant=False"
        )
    kept = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    output.backward(retain_graph=retain_graph)
    gradients = [t.grad for t in inputs]
    for leaf, grad in zip(leaves, kept, strict=True):
        leaf.grad = grad
    return gradients


def score_without_graph(
    log_density: Tensor, xs: tuple[Tensor, ...], all_leaves: Sequence[Tensor], retain_graph: bool = False
) -> list[Tensor]:
    """The input score without a graph of its own, by first-order kernels; ValueError where there is none."""
    score = first_order_gradients(log_density.sum(), xs, all_leaves, retain_graph)
    present = [g for g in score if g is not None]
    if len(present) < len(score):
        raise ValueError("the logits do not depend on x")
    return present


# --------------------------------------------------------------------------------------------------------------------
# checks of the difference and of its gradient


@dataclass
class Checks:
    """How many directional steps have run, which decides when one is checked, and whether one has warned."""

    steps: int = 0
    warned: bool = False


def check_difference(found: Tensor, expected: Tensor, within: Tensor) -> None:
    """Raises RuntimeError unless the difference is the sum of the norms, which is known, within a tolerance.

    All three are scalars. Reading them synchronises with the device, so this is done seldom.
    """
    along, norm, tolerance = torch.stack([found, expected, within]).tolist()
    if not abs(along - norm) <= tolerance:  # NaN too
        raise RuntimeError(
            f'path "directional": the difference of the log density is {along:.6g}, and {norm:.6g} by the score, '
            f"with a tolerance of {tolerance:.2g}. The perturbed forwards differ from the first by more than their "
            "input: a detached part that depends on x (detach(), no_grad(), a running mean used in the same forward), "
            "random numbers that are not of torch's, Python's or NumPy's own generators, or too curved a network (try "
            'central=True). Where the model can be differentiated twice, path="fused" has none of these limits'
        )


def check_smooth(checks: Checks, once: list[Tensor | None], twice: list[Tensor | None]) -> None:
    """Warns where the gradient depends on the step size, as it does where an unknown kink lies within the step.

    Args:
        once, twice: the gradients with one and with two times the step.
    """
    pairs = [(a, b) for a, b in zip(once, twice, strict=True) if a is not None and b is not None]
    difference = sum((a - b).abs().square().sum().item() for a, b in pairs) ** 0.5  # of complex weights too
    length = sum(a.abs().square().sum().item() for a, _ in pairs) ** 0.5
    if difference > 0.2 * length:
        checks.warned = True
        warnings.warn(
            f'path "directional": with twice the step the gradient differs by {difference / max(length, 1e-30):.2g} of '
            "itself, so it is not to be relied on: there are kinks that are not of torch's own activations "
            "(sort, RReLU), too curved a network (try central), or too coarse a dtype",
            RuntimeWarning,
            stacklevel=2,
        )
