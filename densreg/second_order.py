"""Functions whose second derivatives are fast, or exist at all, in place of torch's while a model runs.

A gradient penalty differentiates a gradient, and there torch's own functions fall short in two ways. The double
backward of a convolution forms the weight gradient as a convolution with an image-sized filter, several times slower
than the weight-gradient kernel; and some functions cannot be differentiated twice at all. :class:`fast_second_order`
replaces both kinds without touching the model: its modules, parameters and state_dict stay what they are.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from densreg import _torch
from densreg.functional import _Function, _transformed, _undifferentiated
from densreg.paths import NOT_TWICE

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
# aten::convolution takes after the bias. Under transforms the operators serve themselves: aten's have every derivative.


def _wanted(tensor: Tensor | None) -> bool:
    """Whether the running backward is to compute this input's gradient: more would double the first one's cost."""
    return tensor is not None and tensor.requires_grad and _torch.engine_needs(tensor)


@torch.compiler.allow_in_graph
class _Conv(_Function):
    """[N, C_in, ...], weight, bias -> [N, C_out, ...]."""

    @staticmethod
    def plain(x, weight, bias, *spec):
        return torch.ops.aten.convolution(x, weight, bias, *spec)

    @staticmethod
    def forward(ctx, x, weight, bias, *spec):
        ctx.bias, ctx.spec = bias, spec  # the bias, whose value no derivative needs, may change
        ctx.bias_version = None if bias is None else _torch.version(bias)
        ctx.save_for_backward(x, weight)
        return _Conv.plain(x, weight, bias, *spec)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad_x = _ConvGradInput.call(grad, weight, x, *ctx.spec) if _wanted(x) else None
        grad_weight = _ConvGradWeight.call(grad, x, weight, *ctx.spec) if _wanted(weight) else None
        # Changed in place it is another tensor of the graph, about which there is nothing to ask any more.
        changed = ctx.needs_input_grad[2] and _torch.version(ctx.bias) != ctx.bias_version
        grad_bias = grad.sum([0, *range(2, grad.ndim)]) if changed or _wanted(ctx.bias) else None
        return grad_x, grad_weight, grad_bias, *[None] * len(ctx.spec)


@torch.compiler.allow_in_graph
class _ConvGradInput(_Function):
    """The gradient in x; of x itself only the shape and the memory format matter."""

    @staticmethod
    def plain(grad, weight, x, *spec):
        return torch.ops.aten.convolution_backward(grad, x, weight, None, *spec, [True, False, False])[0]

    @staticmethod
    def forward(ctx, grad, weight, x, *spec):
        ctx.spec = spec
        ctx.save_for_backward(grad, weight)
        return _ConvGradInput.plain(grad, weight, x, *spec)

    @staticmethod
    def backward(ctx, v):
        grad, weight = ctx.saved_tensors
        grad_grad = _Conv.call(v, weight, None, *ctx.spec) if _wanted(grad) else None
        grad_weight = _ConvGradWeight.call(grad, v, weight, *ctx.spec) if _wanted(weight) else None
        return grad_grad, grad_weight, None, *[None] * len(ctx.spec)


@torch.compiler.allow_in_graph
class _ConvGradWeight(_Function):
    """The gradient in the weight; of the weight itself only the shape and the memory format matter."""

    @staticmethod
    def plain(grad, x, weight, *spec):
        return torch.ops.aten.convolution_backward(grad, x, weight, None, *spec, [False, True, False])[1]

    @staticmethod
    def forward(ctx, grad, x, weight, *spec):
        ctx.spec = spec
        ctx.save_for_backward(grad, x)
        return _ConvGradWeight.plain(grad, x, weight, *spec)

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


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))  # torch's second derivative, in a v that depends on x, is wrong


def _attention(function: Callable) -> Callable:
    """Attention by torch's plain formula: its fused kernels have no second derivative."""

    def attend(*args, **kwargs):
        with sdpa_kernel(SDPBackend.MATH):
            return function(*args, **kwargs)

    return attend


def _register_hook(tensor: Tensor, hook: Callable) -> Any:
    """A hook that makes a constant of a gradient is an error, as it is of a Function's backward."""
    if torch.compiler.is_dynamo_compiling():
        return tensor.register_hook(hook)

    @functools.wraps(hook)
    def checked(grad: Tensor) -> Tensor | None:
        found = hook(grad)
        constant = found is not None and not found.requires_grad and grad.requires_grad and torch.is_grad_enabled()
        if constant and bool(found.any()):  # zeros may well be constant
            raise RuntimeError(NOT_TWICE.format("a tensor with a hook (Tensor.register_hook)"))
        return found

    return tensor.register_hook(checked)


_REPLACEMENTS: dict[Callable, Callable] = {
    torch.conv1d: _conv,
    torch.conv2d: _conv,
    torch.conv3d: _conv,
    torch.conv_transpose1d: _conv_transpose,
    torch.conv_transpose2d: _conv_transpose,
    torch.conv_transpose3d: _conv_transpose,
    F.hardsigmoid: _hardsigmoid,
    F.normalize: _normalize,
    _torch.weight_norm: _weight_norm,
    F.scaled_dot_product_attention: _attention(F.scaled_dot_product_attention),
    F.multi_head_attention_forward: _attention(F.multi_head_attention_forward),
    Tensor.register_hook: _register_hook,
}


_INCOMING = {torch.autograd.grad: "grad_outputs", torch.autograd.backward: "grad_tensors"}


class _Mode(TorchFunctionMode):
    """A mode that is on in a backward too, where checkpoints run their forward again, which has to be the same.

    A mode is off while it handles a call. torch's functions ask at their beginning whether one is on, and would come
    back to it; the incoming gradients they read after that, and that is when the mode is entered. Were they read
    earlier, the calls would not end (RecursionError).
    """

    def _backward(self, function: Callable, outputs: Any, *args: Any, **kwargs: Any) -> Any:
        given = kwargs.pop(_INCOMING[function])
        if given is None:
            given = [None] * (len(outputs) if isinstance(outputs, Sequence) else 1)
        with contextlib.ExitStack() as stack:

            def incoming() -> Iterator[Tensor | None]:
                stack.enter_context(self)
                yield from [given] if isinstance(given, Tensor) else given

            return function(outputs, *args, **{_INCOMING[function]: incoming()}, **kwargs)

    def __torch_function__(self, func, _types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _INCOMING and not torch.compiler.is_compiling():
            return self._backward(func, *args, **kwargs)
        if func is Tensor.backward and not torch.compiler.is_compiling():  # calls autograd.backward
            with self:
                return torch.autograd.backward(args[0], kwargs.pop("gradient"), **kwargs)
        if func is Tensor.unflatten:  # written in Python, which torch 2.11's Dynamo cannot trace under a mode
            func = torch.unflatten
        return self._call(func, args, kwargs)

    def _call(self, func: Callable, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """The call of any other function."""
        raise NotImplementedError


def _inside(function: Callable) -> Callable:
    """The function run under a mode of its own."""

    def run(*args, **kwargs):
        with fast_second_order():
            return function(*args, **kwargs)

    return run


class fast_second_order(_Mode):
    """Context manager under which a model's gradients can be differentiated again, fast.

        with densreg.fast_second_order():
            logits = model(x)
            penalty = densreg.density_penalty(logits, x)  # or any other gradient penalty

    Values and first derivatives stay torch's, and the model and its state_dict are not changed. What it replaces:

    - convolutions (1d, 2d, 3d, transposed): every derivative of theirs is an ordinary forward, grad-input or
      grad-weight kernel, and ``torch.autograd.grad(..., inputs=[x])`` computes no weight gradient;
    - ``hardsigmoid`` (MobileNetV3), ``scaled_dot_product_attention`` and ``MultiheadAttention`` (ViT), whose backward
      torch cannot differentiate;
    - ``normalize`` (Swin V2), whose second derivative is NaN at 0 in torch, and ``weight_norm``, whose second
      derivative is wrong in torch where the weight depends on the input.

    The forward must be inside. The backward may be inside, and must be with (non-reentrant) activation checkpoints,
    because it runs the forward again. Works inside torch.compile, in eager mode, and under autocast. Under torch.func,
    forward mode and vmap the convolutions are torch's own, with all of its derivatives and at its speed.
    """

    def _call(self, func, args, kwargs):
        if func is torch.utils.checkpoint.checkpoint:  # only Dynamo asks a mode about it, and the mode is off meanwhile
            return func(_inside(args[0]), *args[1:], **kwargs)
        replacement = _REPLACEMENTS.get(func)
        convolves = replacement in (_conv, _conv_transpose)
        if convolves and (_transformed() or (args[0] if args else kwargs["input"]).is_complex()):
            replacement = None
        if replacement is None or _undifferentiated():
            return func(*args, **kwargs)
        return replacement(*args, **kwargs)


@contextlib.contextmanager
def replaced_under_compile() -> Iterator[None]:
    """Context around a call of a compiled function that enters :class:`fast_second_order`.

    torch lists hardsigmoid and weight_norm among the functions that no mode may override, by which Dynamo goes, though
    eager does not.
    """
    with _torch.replaced(F, "hardsigmoid", _hardsigmoid), _torch.replaced_weight_norm(_weight_norm):
        yield


# --------------------------------------------------------------------------------------------------------------------
# what torch cannot differentiate three times, or only wrongly, as its formula


def _normalized(
    input: Tensor, dims: Sequence[int], shape: Sequence[int], statistics: tuple | None, weight, bias, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(input - mean) / sqrt(var + eps) * weight + bias, in at least float32, with mean and var.

    Both are taken over dims unless given; all four are viewed in shape.
    """
    wide = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
    if statistics is None:
        var, mean = torch.var_mean(wide, list(dims), correction=0, keepdim=True)
    else:
        mean, var = (t.view(shape) for t in statistics)
    y = (wide - mean) * (var + eps).rsqrt()
    y = y if weight is None else y * weight.view(shape)
    return (y if bias is None else y + bias.view(shape)).to(input.dtype), mean, var


def _layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5, cudnn_enable=True):
    shape = [normalized_shape] if isinstance(normalized_shape, int) else list(normalized_shape)
    if not shape or list(input.shape[-len(shape) :]) != shape:
        return F.layer_norm(input, normalized_shape, weight, bias, eps)  # raises
    return _normalized(input, list(range(-len(shape), 0)), shape, None, weight, bias, eps)[0]


@torch.no_grad()
def _track(running_mean, running_var, mean, var, count: int, momentum: float) -> None:
    if running_mean is not None:
        running_mean.lerp_(mean.view(running_mean.shape).to(running_mean.dtype), momentum)
        unbiased = var.view(running_var.shape) * (count / max(count - 1, 1))
        running_var.lerp_(unbiased.to(running_var.dtype), momentum)


def _batch_norm(input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    shape, dims = [1, -1, *[1] * (input.ndim - 2)], [0, *range(2, input.ndim)]
    given = None if training or running_mean is None else (running_mean, running_var)
    y, mean, var = _normalized(input, dims, shape, given, weight, bias, eps)
    if training:
        _track(running_mean, running_var, mean, var, input.numel() // input.shape[1], momentum)
    return y


def _instance_norm(
    input, running_mean=None, running_var=None, weight=None, bias=None, use_input_stats=True, momentum=0.1, eps=1e-5
):
    shape, dims = [1, -1, *[1] * (input.ndim - 2)], list(range(2, input.ndim))
    given = None if use_input_stats else (running_mean, running_var)
    y, mean, var = _normalized(input, dims, shape, given, weight, bias, eps)
    if use_input_stats:
        _track(running_mean, running_var, mean.mean(0), var.mean(0), input[0, 0].numel(), momentum)
    return y


def _weight_first(norm: Callable) -> Callable:
    """With the arguments of torch.batch_norm in place of F.batch_norm's."""

    def normalize(input, weight, bias, running_mean, running_var, of_input, momentum, eps, cudnn_enabled):
        return norm(input, running_mean, running_var, weight, bias, of_input, momentum, eps)

    return normalize


_FORMULAS: dict[Callable, Callable] = {
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    F.batch_norm: _batch_norm,
    torch.batch_norm: _weight_first(_batch_norm),
    F.instance_norm: _instance_norm,
    torch.instance_norm: _weight_first(_instance_norm),
}


class third_order(_Mode):
    """Context in which a model is run so that its gradients can be differentiated twice again, as a Hessian's norm is.

        with densreg.fast_second_order(), densreg.second_order.third_order():
            ...  # the model, and a penalty made of second derivatives

    LayerNorm, BatchNorm and InstanceNorm are their formulas in it: torch's third derivative of LayerNorm is wrong,
    without an error, and of the others it has none.
    """

    def _call(self, func, args, kwargs):
        return _FORMULAS.get(func, func)(*args, **kwargs)
