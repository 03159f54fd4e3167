"""Layers whose second derivatives are fast, or exist at all, in place of torch's while a model runs.

A gradient penalty differentiates a gradient, and there torch's own layers fall short in two ways. The double backward
of its convolutions forms the weight gradient as a convolution with an image-sized filter, several times slower than
the weight-gradient kernel; and some layers cannot be differentiated twice at all. :class:`fast_second_order` swaps
both, function by function, without touching the model: its modules, parameters and state_dict stay what they are.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from densreg import _torch
from densreg._torch import tree_flatten, tree_leaves, tree_map, tree_unflatten
from densreg.functional import _Function, _transformed, _undifferentiated
from densreg.paths import _NOT_TWICE, graph_nodes, may_leave_autograd

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
            raise RuntimeError(_NOT_TWICE.format("a tensor with a hook (Tensor.register_hook)"))
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


# --------------------------------------------------------------------------------------------------------------------
# which layers stand in the way


class Finding(NamedTuple):
    """A layer through which the penalty's gradient is missing or wrong.

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
KEPT_ADVICE = "Empty it before each step, or train in the mode in which nothing is kept (often model.train())"
_FORMULA = "Write the layer as its formula, in torch's elementary operations"


def check_model(model: nn.Module, *example: Any, order: int = 2) -> list[Finding]:
    """The layers of a model that :class:`densreg.RegularizedObjective` cannot differentiate twice, or only to NaN.

    Runs the model once, and then each of its modules by itself on the inputs that it had in that run: gradients, and
    gradients of gradients. Of nested modules the innermost is named. Nothing in the model changes.

    It finds a missing second derivative, one that is NaN at the example's values, a backward that loses its dependence
    on the incoming gradient, and a module that keeps a tensor of an earlier forward's graph. Where an
    ``autograd.Function`` or a custom operator is called, which may be wrong in other ways (as one that saves an
    intermediate result in its forward), second derivatives are also compared with finite differences, in float64; of
    torch's own functions only with ``order=3``.

    Args:
        model: in the mode in which it is trained.
        example: its inputs, as few as two samples, of which the floating-point tensors are differentiated; or one
            mapping of names to inputs, for a model that is called by keyword.
        order: 2; or 3 for the regularizer "hessian", which differentiates once more. The model then runs in float64,
            under :class:`third_order`, and second and third derivatives are compared with finite differences.

    Returns:
        One :class:`Finding` for each such layer; an empty list if there is none.

    Raises:
        ValueError: another order.
        Exception: whatever the model itself raises on the example.
    """
    if order not in (2, 3):
        raise ValueError(f"order must be 2 or 3, got {order}")
    model = _copy(_torch.uncompiled(model))
    if order == 3:
        model = model.double()
        example = tree_map(lambda t: t.double() if _is_floating(t) else t, example)
    calls: dict[nn.Module, tuple[tuple, dict]] = {}

    def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
        if module not in calls:
            calls[module] = tree_map(lambda v: v, (args, kwargs))  # DenseNet appends to the list that it passes on

    def run() -> Any:
        # Clones, as a model may change its inputs in place, and a leaf does not allow it.
        inputs = tree_map(lambda t: t.detach().requires_grad_().clone() if _is_floating(t) else t, example)
        if len(inputs) == 1 and isinstance(inputs[0], Mapping):
            return model(**inputs[0])
        return model(*inputs)

    hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in model.modules()]
    devices = [t.device for t in tree_leaves(example) if isinstance(t, Tensor) and t.device.type == "cuda"][:1]
    findings: list[Finding] = []
    with (
        torch.random.fork_rng(devices),
        fast_second_order(),
        third_order() if order == 3 else contextlib.nullcontext(),
        torch.enable_grad(),
    ):
        run()
        for hook in hooks:
            hook.remove()
        kept = dict(kept_from_earlier(model, run))
        for name, module in reversed(list(model.named_modules())):  # children before their parents
            inside = f"{name}." if name else ""
            if name in kept:
                problem = f"it keeps a tensor of an earlier graph, {kept[name]}, which no second step can go through"
                findings.append(Finding(name, type(module).__name__, problem, KEPT_ADVICE))
            elif module in calls and not any(f.module.startswith(inside) for f in findings):
                # A Sequential has nothing of its own; and the weights are not what is differentiated twice and more.
                own = type(module) is not nn.Sequential and ".parametrizations." not in f".{name}."
                found = _problem(module, *calls[module], order if own else 2)
                if found is not None:
                    findings.append(Finding(name, type(module).__name__, *found))
    return findings[::-1]


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _copy(model: nn.Module) -> nn.Module:
    """A copy of a model that may hold tensors of a graph, as weight_norm's weight after a forward: detached."""
    return copy.deepcopy(model, {id(t): t.detach().clone() for _, _, t in of_a_graph(model)})


def of_a_graph(model: nn.Module) -> list[tuple[str, str, Tensor]]:
    """(module, attribute, tensor) of what modules hold that was computed from parameters or inputs."""
    return [
        (name, attribute, t)
        for name, module in model.named_modules()
        for attribute, value in _torch.attributes_of(module).items()
        for t in tree_leaves(value)
        if isinstance(t, Tensor) and t.grad_fn is not None
    ]


def kept_from_earlier(model: nn.Module, run: Callable[[], Any]) -> list[tuple[str, str]]:
    """(module, attribute) of each tensor of an earlier forward's graph that is in the graph of a new one too.

    Args:
        run: a forward of the model, after at least one.
    """
    held = of_a_graph(model)
    if not held:
        return []
    outputs = [t for t in tree_leaves(run()) if isinstance(t, Tensor)]
    nodes = set(graph_nodes(outputs))
    return list({(module, attribute): None for module, attribute, t in held if t.grad_fn in nodes})


def _problem(module: nn.Module, args: tuple, kwargs: dict, order: int) -> tuple[str, str] | None:
    """(problem, advice) of a module on these inputs, or None."""
    if isinstance(module, nn.SyncBatchNorm):
        return "torch does not differentiate it twice across processes", "Use BatchNorm. " + _ADVICE
    _, inputs, run = _apart(module, args, kwargs)
    outputs = run()
    if not outputs or not inputs:
        return None
    cotangents = [torch.randn_like(t).requires_grad_() for t in outputs]
    try:
        grads = torch.autograd.grad(outputs, inputs, cotangents, create_graph=True, allow_unused=True)
        present = [_real(g) for g in grads if g is not None]
        if not present:
            return None
        if not all(g.requires_grad for g in present):
            return "its backward runs outside of autograd, so its gradient is a constant", _ADVICE
        sizes = [g.detach().double().abs().sum().clamp_min(1e-30) for g in present]
        largest = torch.stack(sizes).max()
        # What is smaller by far is nothing but rounding, as a bias before BatchNorm.
        weights = [(largest / size).clamp_max(1e3).to(g.dtype) for g, size in zip(present, sizes, strict=True)]
        seconds = []
        for _ in range(3):  # as what is lost of one gradient may cancel what is lost of another
            shares = [w * (g * _along(g)).sum() for w, g in zip(weights, present, strict=True)]
            along = torch.stack(shares).sum()
            seconds.append((along, torch.autograd.grad(along, [*cotangents, *inputs], None, True, allow_unused=True)))
    except RuntimeError as error:
        if "compile" in str(error):
            return "it is compiled by itself, and torch differentiates that once only", "Leave compiling to densreg"
        return f"it cannot be differentiated twice: {str(error).splitlines()[0]}", _ADVICE
    finite = all(g.isfinite().all() for g in present)
    if finite and not all(t is None or t.isfinite().all() for _, of_all in seconds for t in of_all):
        return "its second derivative is not finite at these inputs, and its first is", _ADVICE
    # The gradient is linear in the cotangents: by Euler's theorem their own derivative gives it back. Each input has a
    # share of one size in the sum, or the gradients of large weights would hide that of the module's input.
    for along, of_all in seconds:
        again = sum(
            (_real(s).double() * _real(u).double()).sum()
            for s, u in zip(of_all, cotangents, strict=False)
            if s is not None
        )
        if not (along.double() - again).abs() <= 1e-2 * len(present) ** 0.5 * largest:
            return "its second derivative is wrong: it loses the incoming gradient", _ADVICE
    if order == 3 or any(map(may_leave_autograd, graph_nodes(outputs))):  # of a Function nothing is known
        return _wrong_derivative(module, args, kwargs, order)
    return None


def _apart(module: nn.Module, args: tuple, kwargs: dict) -> tuple[list[Tensor], list[Tensor], Callable]:
    """What a module was given, as leaves; these and its weights; and its forward, to the outputs that have a graph."""
    values, spec = tree_flatten((args, kwargs))
    values = [v.detach() if isinstance(v, Tensor) else v for v in values]
    given = [v.requires_grad_() for v in values if _is_floating(v)]
    args, kwargs = tree_unflatten(values, spec)

    def run() -> list[Tensor]:
        # A clone, as the module may change it in place.
        mine, named = tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, (args, kwargs))
        return [t for t in tree_leaves(module(*mine, **named)) if isinstance(t, Tensor) and t.requires_grad]

    return given, [*given, *(w for w in module.parameters() if w.requires_grad)], run


def _real(t: Tensor) -> Tensor:
    """A complex tensor as its real and imaginary parts."""
    return torch.view_as_real(t.resolve_conj()) if t.is_complex() else t


def _along(g: Tensor) -> Tensor:
    """A random direction along or against a gradient, in which nothing of it cancels."""
    return g.detach().sign() * torch.rand_like(g) * (1 - 2 * torch.randint(2, (), device=g.device))


def _wrong_derivative(module: nn.Module, args: tuple, kwargs: dict, order: int) -> tuple[str, str] | None:
    """(problem, advice) where a second or third derivative is not that of finite differences in float64, or None.

    All but the last derivative are taken in what is given to the module, the last in all inputs, the weights too.
    """
    module = _copy(module).double()
    args, kwargs = tree_map(lambda v: v.double() if _is_floating(v) else v, (args, kwargs))
    given, inputs, run = _apart(module, args, kwargs)
    try:
        run()
    except Exception:  # a Function that is not for float64
        return None
    if not given:
        return None
    buffers = [(b, b.clone()) for b in module.buffers()]
    drawn: list[list[Tensor]] = []

    def dot(tensors: Sequence[Tensor], number: int) -> Tensor:
        """With fixed random tensors."""
        if len(drawn) == number:
            drawn.append([torch.randn_like(t) for t in tensors])
        return torch.stack([(t * r).sum() for t, r in zip(tensors, drawn[number], strict=True)]).sum()

    def value(order: int) -> Tensor:
        """A derivative of that order less one, along fixed directions."""
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        state = torch.get_rng_state()
        torch.manual_seed(0)  # the same masks in all
        result = dot(run(), 0)
        torch.set_rng_state(state)
        for number in range(1, order):
            result = dot(_gradients(result, given, create_graph=True), number)
        return result

    if not _agrees(value, 1, inputs):
        return None  # a part of it is detached: its derivatives are not those of its values
    for each, ordinal, times in ((2, "second", "twice"), (3, "third", "three times"))[: order - 1]:
        try:
            right = _agrees(value, each, inputs)
        except RuntimeError as error:
            return f"it cannot be differentiated {times}: {str(error).splitlines()[0]}", _FORMULA
        if not right:
            return f"its {ordinal} derivative is wrong: finite differences give another", _FORMULA
    return None


def _gradients(of: Tensor, inputs: Sequence[Tensor], create_graph: bool = False) -> Sequence[Tensor]:
    if not of.requires_grad:
        return [torch.zeros_like(t) for t in inputs]
    return torch.autograd.grad(of, inputs, create_graph=create_graph, allow_unused=True, materialize_grads=True)


def _agrees(value: Callable[[int], Tensor], order: int, inputs: list[Tensor]) -> bool:
    """Whether the gradient of a float64 value is its central difference.

    Tried with ever smaller steps, as a kink may lie inside of one.
    """
    at = value(order)
    gradients = _gradients(at, inputs)
    for step in (1e-6, 1e-7, 1e-8):
        direction = [torch.randn_like(t) for t in inputs]
        along = sum(float((g * d).sum()) for g, d in zip(gradients, direction, strict=True))
        values = []
        for side in (step, -step):
            with torch.no_grad():
                for t, d in zip(inputs, direction, strict=True):
                    t.add_(d, alpha=side)
            values.append(value(order).item())
            with torch.no_grad():
                for t, d in zip(inputs, direction, strict=True):
                    t.sub_(d, alpha=side)
        difference = (values[0] - values[1]) / (2 * step)
        if abs(along - difference) <= 1e-3 * max(abs(along), abs(difference)) + 1e-6 * (1 + abs(at.item())):
            return True
    return False
