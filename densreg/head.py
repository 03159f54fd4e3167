"""The step of a model whose last layer is linear, without its logits: :mod:`densreg.linear` takes the layer's input.

The model runs as it is, in a mode in which that layer returns its input; the model must return that untouched.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from densreg._torch import tree_leaves
from densreg.batch import Batch
from densreg.linear import linear_log_density, linear_loss_and_correct, product_dtype
from densreg.second_order import fast_second_order
from densreg.step import (
    Buffers,
    Outputs,
    StepSpec,
    check_trained,
    classify,
    gradients_of,
    loss_of,
    own_logits,
    restore_buffers,
    save_buffers,
    without_trace,
)

AUTO_CLASSES = 100_000
"""From so many classes on ``head="auto"`` takes the head without logits: it saves time there as well as memory.

A step of the last layer over that with logits (512 features, two threads of an EPYC with AVX-512): at batch 128
compiled 1.37 at 1000 classes, 0.94 at 21,841 and 0.81 at 100,000, in eager 1.50, 1.02 and 0.80; at batch 1024, which is
more rows than features, compiled 1.09 at 21,841. No GPU was measured.
"""


class HeadResult(NamedTuple):
    """:class:`densreg.step.StepResult` of a step without logits.

    Attributes:
        features: [B, D], what the head was given.
        correct: [B] bool, whether the target's logit is larger than every other.
    """

    loss: Tensor
    features: Tensor
    ce: Tensor
    penalty: Tensor
    correct: Tensor
    gradients: Sequence[Tensor | None]


class _Linears(TorchFunctionMode):
    """Context that records calls of F.linear; given a weight, it makes the calls with that weight return their input.

    Attributes:
        calls: (weight, bias, output) of each recorded call: of all, or of those with the given weight.
        changed: the functions that took the latest output, as ``div_`` in ``logits.div_(2)``, and returned a tensor.
        watching: whether they are still recorded.
    """

    def __init__(self, weight: Tensor | None = None) -> None:
        super().__init__()
        self.weight = weight
        self.calls: list[tuple[Tensor, Tensor | None, Tensor]] = []
        self.changed: list[str] = []
        self.watching = True

    def __torch_function__(self, func, _types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.linear:
            given = {**dict(zip(("input", "weight", "bias"), args, strict=False)), **kwargs}
            weight = given["weight"]
            if self.weight is None or weight is self.weight:
                # A copy: the input itself may be used, and changed in place, elsewhere in the model.
                output = func(*args, **kwargs) if self.weight is None else given["input"].clone()
                self.calls.append((weight, given.get("bias"), output))
                self.changed = []
                return output
        result = func(*args, **kwargs)
        seen = self.watching and self.calls and any(t is self.calls[-1][2] for t in tree_leaves((args, kwargs)))
        if seen and any(isinstance(t, Tensor | None) for t in tree_leaves(result)):  # not .shape, .device, .size()
            self.changed.append("a property, as .T or .data" if func.__name__ == "__get__" else func.__name__)
        return result


class Features(NamedTuple):
    """What the head was given, [B, D], the auxiliary classifiers' outputs, and the dtype of the head's products."""

    h: Tensor
    auxiliary: Outputs
    dtype: torch.dtype


def _features(spec: StepSpec, batch: Batch, mode: _Linears, buffers: Buffers | None = None) -> Features:
    """The model's features; to be called in the mode. Raises ValueError where the head is not the last layer."""
    head = spec.head
    assert head is not None
    outputs = classify(spec, batch, buffers)
    output, calls = outputs[0][1], mode.calls
    mode.watching = False  # the step itself may use its features
    expected = f"head: expected the model to call {head} once and to return its output; "
    if len(calls) != 1:
        raise ValueError(f"{expected}its weight was used {len(calls)} times")
    if output is not calls[0][2]:
        raise ValueError(f"{expected}it returns a tensor of another function (head=None takes the logits as they are)")
    if mode.changed:
        raise ValueError(f"{expected}it went through {mode.changed[0]} (head=None takes the logits as they are)")
    if calls[0][1] is not head.bias:
        raise ValueError(f"{expected}it was called with another bias")
    # Autocast is off where gradients are taken, so the products are told what it would make of them.
    return Features(output, outputs[1:], product_dtype(output, head.weight))


def head_step(
    spec: StepSpec, batch: Batch, target: Any, coeff: Tensor, scale: Tensor, penalized: bool = True
) -> HeadResult:
    """:func:`densreg.step.whole_step` with the head ``spec.head`` taken without logits."""
    head, xs = spec.head, batch.xs
    assert head is not None
    mode = _Linears(head.weight)
    with fast_second_order(), mode:  # to the end: a checkpoint runs the model again
        h, auxiliary, dtype = _features(spec, batch, mode)
        saved = []
        if not torch.compiler.is_compiling():
            check_trained(spec, batch, [(1.0, h), *auxiliary])
            saved = save_buffers(spec)
        with torch.autocast(xs[0].device.type, enabled=False):
            _, ce, penalty, correct = linear_loss_and_correct(
                h, head.weight, head.bias, target, xs if penalized else None, coeff, spec.p, dtype=dtype
            )
            ce = ce + loss_of(spec, auxiliary, target)
            loss = ce + coeff.to(penalty.dtype) * penalty if penalized else ce
            gradients = gradients_of(spec, loss * scale.to(loss.dtype))
    restore_buffers(saved)
    return HeadResult(loss.detach(), h.detach(), ce.detach(), penalty.detach(), correct, gradients)


def without_gradients(spec: StepSpec, batch: Batch, target: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Features, cross-entropy, and whether the target is the largest, of the model as it is."""
    head = spec.head
    assert head is not None
    with _Linears(head.weight) as mode:
        h, auxiliary, dtype = _features(spec, batch, mode)
    with torch.autocast(h.device.type, enabled=False):
        _, ce, _, correct = linear_loss_and_correct(h, head.weight, head.bias, target, None, 0.0, spec.p, dtype=dtype)
        return h, ce + loss_of(spec, auxiliary, target), correct


def check_is_last(spec: StepSpec, batch: Batch) -> None:
    """Raises ValueError where the head is not the last layer: the model is run once, in eager mode.

    For a compiled step, as Dynamo shows the mode not all that is done to a tensor (``logits.data``,
    ``torch._foreach_mul_``).
    """
    assert spec.head is not None
    with without_trace(spec, batch), torch.no_grad(), _Linears(spec.head.weight) as mode:
        _features(spec, batch, mode)


def log_density_without_logits(spec: StepSpec, batch: Batch, buffers: Buffers) -> Tensor:
    """The log density [B], differentiable once, with copies of these buffers in place of the model's own."""
    head = spec.head
    assert head is not None
    with _Linears(head.weight) as mode:
        h = _features(spec, batch, mode, buffers).h
    return linear_log_density(h, head.weight, head.bias)


def check_name(model: nn.Module, head: Any) -> str | None:
    """The option ``head`` as it is kept: None, "auto", or the name of a linear layer of the model.

    Raises:
        TypeError, ValueError: it is none of these, or the layer's weight is computed from another tensor.
    """
    if head is None or head == "auto":
        return head
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if isinstance(head, nn.Linear):
        found = next((name for name, module in layers.items() if module is head), None)
        if found is None:
            raise ValueError(f"head: expected an nn.Linear of the model, got {head}, which is not in it")
        head = found
    if not isinstance(head, str):
        raise TypeError(f'head: expected "auto", None, an nn.Linear or its name, got {type(head).__name__}')
    if head not in layers:
        modules = dict(model.named_modules())
        what = f"{head!r}, a {type(modules[head]).__name__}" if head in modules else repr(head)
        raise ValueError(f"head: expected the name of an nn.Linear of the model, got {what}")
    if not isinstance(layers[head].weight, nn.Parameter):
        raise ValueError(
            f"head: expected an nn.Linear whose weight is a parameter, got {head!r}, whose weight is computed "
            "(a parametrization): head=None takes the logits as they are"
        )
    return head


def find_head(spec: StepSpec, batch: Batch) -> str | None:
    """The name of the linear layer whose output is what the model returns, if there is one; the model is run once."""
    with without_trace(spec, batch), torch.no_grad(), _Linears() as mode:
        output = own_logits(spec, batch)
    if not mode.calls or mode.calls[-1][2] is not output or mode.changed or output.ndim != 2:
        return None
    weight, bias, _ = mode.calls[-1]
    if sum(w is weight for w, _, _ in mode.calls) > 1:
        return None
    named = spec.model.named_modules()
    return next((n for n, m in named if isinstance(m, nn.Linear) and m.weight is weight and m.bias is bias), None)
