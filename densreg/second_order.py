"""Layers whose second derivatives are fast, or exist at all, in place of torch's while a model runs.

A gradient penalty differentiates a gradient, and there torch's own layers fall short in two ways. The double backward
of its convolutions forms the weight gradient as a convolution with an image-sized filter, several times slower than
the weight-gradient kernel; and some layers cannot be differentiated twice at all. :class:`fast_second_order` swaps
both, function by function, without touching the model: its modules, parameters and state_dict stay what they are.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from densreg.functional import _Function, _transformed, _undifferentiated

# --------------------------------------------------------------------------------------------------------------------
# convolution
#
# y = conv(x, w) is linear in x and in w, and so are its two gradients in everything they depend on:
#
#     grad_input(gy, w)   the transpose of conv in x
#     grad_weight(gy, x)  the transpose of conv in w
#
# Each one's derivatives are the other two, so every order takes the ordinary forward, grad-input and grad-weight
# kernels, for any stride, padding, dilation, groups, and for transposed convolutions. `spec` is what
# aten::convolution takes after the bias.


def _wanted(tensor: Tensor | None) -> bool:
    """Whether the running backward is to compute this input's gradient.

    ``needs_input_grad`` says so of every input that requires grad, also of the weights under ``grad(loss, [x])``
    (pytorch #56500), which would double the cost of the first backward.
    """
    if tensor is None or not tensor.requires_grad:
        return False
    try:
        with torch._C.DisableTorchFunctionSubclass():  # a subclass would be given the edge of a view of it
            edge = torch.autograd.graph.get_gradient_edge(tensor)
        return torch._C._will_engine_execute_node(edge.node)
    except RuntimeError:  # a leaf whose gradient autograd.grad was asked for
        return True


class _Convolution(_Function):
    """A Function on an aten operator that has every derivative itself, and is called as such under transforms."""

    @classmethod
    def call(cls, *args):
        if _transformed():
            return cls.forward(*args)
        return cls.apply(*args) if torch.compiler.is_compiling() else cls.twin.apply(*args)


@torch._dynamo.allow_in_graph
class _Conv(_Convolution):
    """[N, C_in, ...], weight, bias -> [N, C_out, ...]."""

    @staticmethod
    def forward(x, weight, bias, *spec):
        return torch.ops.aten.convolution(x, weight, bias, *spec)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, ctx.bias, *ctx.spec = inputs  # whose value no derivative needs, so it may change
        ctx.bias_version = None if ctx.bias is None else ctx.bias._version
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad_x = _ConvGradInput.call(grad, weight, x, *ctx.spec) if _wanted(x) else None
        grad_weight = _ConvGradWeight.call(grad, x, weight, *ctx.spec) if _wanted(weight) else None
        # Changed in place it is another tensor of the graph, about which there is nothing to ask any more.
        changed = ctx.needs_input_grad[2] and ctx.bias._version != ctx.bias_version
        grad_bias = grad.sum([0, *range(2, grad.ndim)]) if changed or _wanted(ctx.bias) else None
        return grad_x, grad_weight, grad_bias, *[None] * len(ctx.spec)


@torch._dynamo.allow_in_graph
class _ConvGradInput(_Convolution):
    """The gradient in x; of x itself only the shape and the memory format matter."""

    @staticmethod
    def forward(grad, weight, x, *spec):
        return torch.ops.aten.convolution_backward(grad, x, weight, None, *spec, [True, False, False])[0]

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad, weight, _, *ctx.spec = inputs
        ctx.save_for_backward(grad, weight)

    @staticmethod
    def backward(ctx, v):
        grad, weight = ctx.saved_tensors
        grad_grad = _Conv.call(v, weight, None, *ctx.spec) if _wanted(grad) else None
        grad_weight = _ConvGradWeight.call(grad, v, weight, *ctx.spec) if _wanted(weight) else None
        return grad_grad, grad_weight, None, *[None] * len(ctx.spec)


@torch._dynamo.allow_in_graph
class _ConvGradWeight(_Convolution):
    """The gradient in the weight; of the weight itself only the shape and the memory format matter."""

    @staticmethod
    def forward(grad, x, weight, *spec):
        return torch.ops.aten.convolution_backward(grad, x, weight, None, *spec, [False, True, False])[1]

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad, x, _, *ctx.spec = inputs
        ctx.save_for_backward(grad, x)

    @staticmethod
    def backward(ctx, u):
        grad, x = ctx.saved_tensors
        grad_grad = _Conv.call(x, u, None, *ctx.spec) if _wanted(grad) else None
        grad_x = _ConvGradInput.call(grad, u, x, *ctx.spec) if _wanted(x) else None
        return grad_grad, grad_x, None, *[None] * len(ctx.spec)


def _each(value: int | Sequence[int], weight: Tensor) -> list[int]:
    """One number for each dimension of the image."""
    dims = weight.ndim - 2
    values = [value] if isinstance(value, int) else list(value)
    return values * dims if len(values) == 1 else values


def _autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """What autocast would pass on to a convolution: Functions stand below it and would get the float32 tensors."""
    device = next(t for t in tensors if t is not None).device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def _convolve(x, weight, bias, stride, padding, dilation, transposed, output_padding, groups) -> Tensor:
    spec = [_each(v, weight) for v in (stride, padding, dilation)]
    x, weight, bias = _autocast(x, weight, bias)
    unbatched = x.ndim < weight.ndim
    x = x.unsqueeze(0) if unbatched else x
    y = _Conv.call(x, weight, bias, *spec, transposed, _each(output_padding, weight), groups)
    return y.squeeze(0) if unbatched else y


def _conv(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1) -> Tensor:
    if isinstance(padding, str):
        if padding not in ("same", "valid") or (padding == "same" and set(_each(stride, weight)) != {1}):
            raise RuntimeError(f'padding must be numbers, "valid" or, of stride 1, "same"; got {padding!r}, {stride=}')
        total = [d * (k - 1) for d, k in zip(_each(dilation, weight), weight.shape[2:], strict=True)]
        padding = [t // 2 for t in total] if padding == "same" else 0
        if padding and any(t % 2 for t in total):  # one more at the end than at the beginning, as torch does
            input = F.pad(input, [side for t in reversed(total) for side in (0, t % 2)])
    return _convolve(input, weight, bias, stride, padding, dilation, False, 0, groups)


def _conv_transpose(input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1) -> Tensor:
    return _convolve(input, weight, bias, stride, padding, dilation, True, output_padding, groups)


# --------------------------------------------------------------------------------------------------------------------
# what torch cannot differentiate twice, as functions that it can: the same values and first derivatives


def _hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    y = F.relu6(input + 3) / 6
    return input.copy_(y) if inplace else y


def _normalize(input: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: Tensor | None = None) -> Tensor:
    # x / max(||x||, eps). The norm's second derivative at 0 is NaN in torch; that of the clamped square is 0.
    tiny = torch.finfo(torch.float32 if input.is_complex() else torch.promote_types(input.dtype, torch.float32)).tiny
    if p != 2 or out is not None or input.is_complex() or eps**2 < tiny:
        return F.normalize(input, p, dim, eps, out)
    wide = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
    return (wide * wide.square().sum(dim, keepdim=True).clamp_min(eps**2).rsqrt()).to(input.dtype)


def _attention(function: Callable) -> Callable:
    """Attention by torch's plain formula: its fused kernels have no second derivative."""

    def attend(*args, **kwargs):
        with sdpa_kernel(SDPBackend.MATH):
            return function(*args, **kwargs)

    return attend


_REPLACEMENTS: dict[Callable, Callable] = {
    torch.conv1d: _conv,
    torch.conv2d: _conv,
    torch.conv3d: _conv,
    torch.conv_transpose1d: _conv_transpose,
    torch.conv_transpose2d: _conv_transpose,
    torch.conv_transpose3d: _conv_transpose,
    F.hardsigmoid: _hardsigmoid,
    F.normalize: _normalize,
    F.scaled_dot_product_attention: _attention(F.scaled_dot_product_attention),
    F.multi_head_attention_forward: _attention(F.multi_head_attention_forward),
}


def _undispatched(function: Any) -> Callable:
    """A Python function of torch without its own dispatch to modes."""
    scope = function.__globals__ | {"has_torch_function": lambda _: False, "has_torch_function_unary": lambda _: False}
    copied = types.FunctionType(function.__code__, scope, function.__name__, function.__defaults__)
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied


_BACKWARDS = {f: _undispatched(f) for f in (torch.autograd.grad, Tensor.backward)}


def _inside(function: Callable) -> Callable:
    """The function run under a mode of its own."""

    def run(*args, **kwargs):
        with fast_second_order():
            return function(*args, **kwargs)

    return run


class fast_second_order(TorchFunctionMode):
    """Context in which a model is run so that its gradients can be differentiated again, fast.

        with densreg.fast_second_order():
            logits = model(x)
            penalty = densreg.density_penalty(logits, x)  # or any other gradient penalty

    Values and first derivatives are torch's, and so is the model with its state_dict. What it replaces:

    - convolutions (1d, 2d, 3d, transposed): every derivative of theirs is an ordinary forward, grad-input or
      grad-weight kernel, and ``torch.autograd.grad(..., inputs=[x])`` computes no weight gradient;
    - ``hardsigmoid`` (MobileNetV3), ``scaled_dot_product_attention`` and ``MultiheadAttention`` (ViT), whose backward
      torch cannot differentiate, and ``normalize`` (Swin V2), whose second derivative is NaN at 0 in torch.

    The forward must be inside; the backward may be, and must be where activations are checkpointed (not reentrantly),
    as it runs the forward again. Works inside torch.compile, in eager, and under autocast. Under torch.func, forward
    mode and vmap the convolutions are torch's own, with all of its derivatives and at its speed.
    """

    def __torch_function__(self, func, _types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _BACKWARDS and not torch.compiler.is_compiling():
            with self:  # a mode is off while it handles a call, and what is computed again has to be the same
                return _BACKWARDS[func](*args, **kwargs)
        if func is torch.utils.checkpoint.checkpoint:  # only Dynamo asks a mode about it, and the mode is off meanwhile
            return func(_inside(args[0]), *args[1:], **kwargs)
        replacement = _REPLACEMENTS.get(func)
        convolves = replacement in (_conv, _conv_transpose)
        if convolves and (_transformed() or (args[0] if args else kwargs["input"]).is_complex()):
            replacement = None
        if replacement is None or _undifferentiated():
            return func(*args, **kwargs)
        return replacement(*args, **kwargs)


def hardsigmoid_under_compile() -> AbstractContextManager:
    """Context around a call of a compiled function that enters :class:`fast_second_order`.

    torch lists hardsigmoid among the functions that no mode may override, by which Dynamo goes, though eager does not.
    """
    return mock.patch.object(F, "hardsigmoid", _hardsigmoid)


# --------------------------------------------------------------------------------------------------------------------
# which layers stand in the way


class Finding(NamedTuple):
    """A layer through which the penalty does not train, or not rightly.

    Attributes:
        module: its name in the model, "" for the model itself.
        type: its class.
        problem: what happens there.
        advice: what to do.
    """

    module: str
    type: str
    problem: str
    advice: str

    def __str__(self) -> str:
        return f"{self.module or 'the model itself'} ({self.type}): {self.problem}. {self.advice}"


_ADVICE = 'Replace the layer, or train with RegularizedObjective(..., path="directional")'


def check_model(model: nn.Module, *example: Tensor) -> list[Finding]:
    """The layers of a model that :class:`densreg.RegularizedObjective` cannot differentiate twice, or only to NaN.

    Runs the model once, and then each of its modules by itself on what it was given there: gradients, and gradients of
    gradients. Of nested modules the innermost is named. Nothing in the model changes.

    It sees a missing second derivative, one that is NaN at the example's values, and a backward that loses its
    dependence on the incoming gradient. It does not see one that is there and wrong in some other way.

    Args:
        model: in the mode in which it is trained.
        example: its inputs, as few as two samples.

    Returns:
        One :class:`Finding` for each such layer; an empty list if there is none.

    Raises:
        Exception: whatever the model itself raises on the example.
    """
    model = copy.deepcopy(getattr(model, "_orig_mod", model))
    calls: dict[nn.Module, tuple[tuple, dict]] = {}

    def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
        if module not in calls:
            calls[module] = tree_map(lambda v: v, (args, kwargs))  # DenseNet appends to the list that it passes on

    hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in model.modules()]
    devices = [t.device for t in example if t.device.type == "cuda"][:1]
    findings: list[Finding] = []
    with torch.random.fork_rng(devices), fast_second_order(), torch.enable_grad():
        model(*(t.detach().requires_grad_(t.is_floating_point()) for t in example))
        for hook in hooks:
            hook.remove()
        for name, module in reversed(list(model.named_modules())):  # children before their parents
            inside = f"{name}." if name else ""
            if module in calls and not any(f.module.startswith(inside) for f in findings):
                problem = _problem(module, *calls[module])
                if problem is not None:
                    findings.append(Finding(name, type(module).__name__, *problem))
    return findings[::-1]


def _problem(module: nn.Module, args: tuple, kwargs: dict) -> tuple[str, str] | None:
    """(problem, advice) of a module on these inputs, or None."""
    if isinstance(module, nn.SyncBatchNorm):
        return "torch does not differentiate it twice across processes", "Use BatchNorm. " + _ADVICE
    values, spec = tree_flatten((args, kwargs))
    values = [v.detach() if isinstance(v, Tensor) else v for v in values]
    inputs = [v.requires_grad_() for v in values if isinstance(v, Tensor) and v.is_floating_point()]
    inputs += [w for w in module.parameters() if w.requires_grad]
    args, kwargs = tree_unflatten(values, spec)
    # A clone, as the module may change it in place.
    args, kwargs = tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, (args, kwargs))
    outputs = [t for t in tree_leaves(module(*args, **kwargs)) if isinstance(t, Tensor) and t.requires_grad]
    if not outputs or not inputs:
        return None
    cotangents = [torch.randn_like(t).requires_grad_() for t in outputs]
    try:
        grads = torch.autograd.grad(outputs, inputs, cotangents, create_graph=True, allow_unused=True)
        present = [g for g in grads if g is not None]
        if not present:
            return None
        if not all(g.requires_grad for g in present):
            return "its backward runs outside of autograd, so its gradient is a constant", _ADVICE
        along = torch.stack([(g * torch.randn_like(g)).sum() for g in present]).sum()
        seconds = torch.autograd.grad(along, [*cotangents, *inputs], allow_unused=True)
    except RuntimeError as error:
        if "compile" in str(error):
            return "it is compiled by itself, and torch differentiates that once only", "Leave compiling to densreg"
        return f"it cannot be differentiated twice: {str(error).splitlines()[0]}", _ADVICE
    if all(g.isfinite().all() for g in present) and not all(t is None or t.isfinite().all() for t in seconds):
        return "its second derivative is not finite at these inputs, and its first is", _ADVICE
    # The gradient is linear in the cotangents: by Euler's theorem their own derivative gives it back.
    again = sum((s.double() * u.double()).sum() for s, u in zip(seconds, cotangents, strict=False) if s is not None)
    size = sum(g.double().abs().sum() for g in present)
    if not (along.double() - again).abs() <= 1e-2 * size:
        return "its second derivative is wrong: it loses the incoming gradient", _ADVICE
    return None
