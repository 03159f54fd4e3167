"""What the model is called with: the inputs of a step, those among them that are penalized, and the target."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from densreg import _torch, paths
from densreg._torch import tree_leaves


class Batch(NamedTuple):
    """What the model is called with.

    Attributes:
        xs: the inputs that are penalized, [B, ...].
        keys: where each of them stands, a position or a name.
        others: the rest by position or name. Of the tensors those of length B have a row for each sample.
    """

    xs: tuple[Tensor, ...]
    keys: tuple[int | str, ...]
    others: dict[int | str, Any]


def batch_of(x: Any, penalized: tuple[int | str, ...] | None) -> Batch:
    """What the model is called with; raises TypeError or ValueError where the penalized inputs have no score."""
    if type(x) is Tensor and penalized is None and x.ndim > 1 and x.is_floating_point():
        return Batch((x,), (0,), {})
    given: dict[int | str, Any]
    if isinstance(x, Mapping):
        given = dict(x)
    elif isinstance(x, Tensor) or (isinstance(x, Sequence) and not isinstance(x, str)):
        given = dict(enumerate([x] if isinstance(x, Tensor) else x))
    else:
        raise TypeError(f"x must be a tensor, a sequence of inputs or a mapping to them, got {type(x).__name__}")
    given = {key: _plain(v) if isinstance(v, Tensor) else v for key, v in given.items()}
    tensors = {key: v for key, v in given.items() if isinstance(v, Tensor)}
    if penalized is None:  # nothing is left out silently that has a derivative
        for key, value in given.items():
            if not isinstance(value, Tensor) and any(map(_is_differentiable, tree_leaves(value))):
                raise TypeError(
                    f"x[{key!r}] is a {type(value).__name__} with floating-point tensors in it, which would not be "
                    "penalized: name the inputs that are, penalized=..., or pass each tensor by itself"
                )
        penalized = tuple(key for key, v in tensors.items() if _is_differentiable(v))
    if not penalized:
        kinds = ", ".join(str(v.dtype if isinstance(v, Tensor) else type(v).__name__) for v in given.values())
        raise TypeError(f"x must be floating point to have a score, got {kinds or 'nothing'}")
    for key in penalized:
        if key not in tensors:
            raise ValueError(f"penalized names {key!r}, which is none of x's tensors: {[*tensors]}")
    xs = tuple(tensors[key] for key in penalized)
    if xs[0].ndim == 0:
        raise ValueError("x must have shape [B, ...], got []")
    for key, t in zip(penalized, xs, strict=True):
        paths.check_input("x" if isinstance(x, Tensor) else f"x[{key!r}]", t, len(xs[0]), "the first input")
    return Batch(xs, tuple(penalized), {key: v for key, v in given.items() if key not in penalized})


def _is_differentiable(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _plain(t: Tensor) -> Tensor:
    """The same memory as no subclass, which torch.compile may not take; one that is more than its memory stays."""
    if type(t) is Tensor or type(t).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return t
    with _torch.plain_tensors():
        return t.as_subclass(Tensor)


def for_graph(value: Any, device: torch.device) -> Any:
    """A part of the target as the compiled step takes it: no subclass of Tensor, and no number that is compiled in."""
    if isinstance(value, Tensor):
        return _plain(value).resolve_neg()
    real = isinstance(value, numbers.Real) and not isinstance(value, numbers.Integral)
    return torch.full((), float(value), dtype=torch.float64, device=device) if real else value


def _has_rows(value: Any, size: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == size


def with_inputs(batch: Batch, xs: tuple[Tensor, ...]) -> Batch:
    """The batch with these penalized inputs, which may be several batches one after the other."""
    size = len(batch.xs[0])
    others = batch.others
    if len(xs[0]) != size:
        times = len(xs[0]) // size
        others = {k: v.repeat(times, *[1] * (v.ndim - 1)) if _has_rows(v, size) else v for k, v in others.items()}
    return Batch(xs, batch.keys, others)


def rows(batch: Batch, index: Tensor) -> Batch:
    """The batch of the samples ``index``."""
    size = len(batch.xs[0])
    others = {k: v[index] if _has_rows(v, size) else v for k, v in batch.others.items()}
    return Batch(tuple(x[index] for x in batch.xs), batch.keys, others)


def detached(value: Any) -> Any:
    """A tensor without graph, which is no inference tensor and not lazily negated; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    return value.clone() if value.is_inference() else value.detach().resolve_neg()


def detached_batch(batch: Batch) -> Batch:
    others = {key: detached(v) for key, v in batch.others.items()}
    return Batch(tuple([detached(x) for x in batch.xs]), batch.keys, others)


def leaves(batch: Batch) -> Batch:
    """A batch without graph, which is nobody else's: its penalized inputs are made to require grad."""
    for x in batch.xs:
        x.requires_grad_()
    return batch
