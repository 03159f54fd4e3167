"""The operators of densreg: schema, fake implementation, plain-torch fallback, and which backend runs them.

The operators are raw: they have no derivative of their own. :mod:`densreg.functional` gives them one, to every order,
with :class:`torch.autograd.Function` (an operator with ``register_autograd`` answers ``torch.func.jvp`` with silent
zeros, and cannot be called under ``torch.func.grad``). The wrappers below refuse a tensor that would need a gradient.

Notation: logits ``f [B, C]``, row maximum ``m``, ``s = sum_i exp(f_i - m)``; ``L = m + log s`` is the log density,
``P = exp(f - m) / s`` the softmax, ``q`` the target distribution (one-hot, smoothed), ``ce = sum_i q_i (L - f_i)``.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import functools
import importlib
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_library = torch.library.Library("densreg", "DEF")

# In the order of enum Op in csrc/calls.h, by which the calls are counted.
OPERATORS = ("softmax", "softmax_backward", "pnorm", "pnorm_backward")

BACKENDS = ("cpu", "cuda", "triton", "torch")
"""The C++ kernels for CPU tensors (csrc/cpu), the CUDA kernels (csrc/cuda), the Triton kernels (kernels/), and the
plain-torch fallback, which serves every device."""

ORDER = {"cpu": ("cpu", "torch"), "cuda": ("cuda", "triton", "torch")}
"""By type of device, the backends in order of preference; a device that is not listed has plain torch.

On GPUs CUDA comes before Triton for every operator, dtype and shape: its launch is C++ where Triton's is Python, and
took half the time in small calls on an H200. Large ones Triton served faster there at most sizes, before the CUDA
kernels took its ladder; they were not measured again. ``python -m benchmarks.gpu`` times both."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype in which sums are taken: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _require_no_grad(name: str, *tensors: Tensor | None) -> None:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise NotImplementedError(
            f"densreg::{name} is a raw operator without a derivative; "
            "use the functions of densreg.functional, which have one to every order"
        )


# --------------------------------------------------------------------------------------------------------------------
# backends: which one serves a call, and the proof of which one did

_forced: str | None = None
_python_calls: collections.Counter[str] = collections.Counter()
_warned: set[str] = set()


def missing(name: str) -> str | None:
    """Why a backend cannot be used; None where it can."""
    if name == "cpu":
        return MISSING
    if name == "cuda":
        if any(_has_kernel("softmax.cuda", key) for key in ("CUDA", "CPU")):  # on the CPU the tests' emulation
            return None if torch.cuda.is_available() or _has_kernel("softmax.cuda", "CPU") else "there is no GPU"
        return MISSING or build_info().get("cuda_reason", "the extension was built without CUDA")
    if name == "triton":
        return _triton()[1]
    return None


def _has_kernel(operator: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"densreg::{operator}", key)


@functools.cache
def _triton() -> tuple[Any, str | None]:
    """The Triton kernels, or why there are none. Imported at first use: Triton takes a while."""
    try:
        kernels = importlib.import_module("densreg.kernels")
    except ImportError as error:
        return None, f"Triton is not installed: {error}"
    if kernels.INTERPRETED or torch.cuda.is_available():
        return kernels, None
    return None, "there is no GPU (TRITON_INTERPRET=1 runs the Triton kernels on the CPU, slowly)"


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Force a backend for the calls inside: ``with densreg.backend("torch"): ...``.

    What is compiled inside keeps it; what was compiled before keeps its own.

    Args:
        name: "cpu" (the C++ kernels, for CPU tensors), "cuda" or "triton" (for CUDA tensors), or "torch" (plain torch,
            for tensors of any device).

    Raises:
        ValueError: unknown name.
        RuntimeError: the backend is missing (why is said); or, later, it does not serve the device of a tensor.
    """
    global _forced
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {name!r}")
    reason = missing(name)
    if reason is not None:
        raise RuntimeError(f"the backend {name!r} is missing: {reason}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def calls() -> dict[str, int]:
    """How often each operator was served by what, since the start: {"softmax/cpu-avx512": 3, "pnorm/torch": 1}."""
    counts = collections.Counter(_python_calls)
    for extension in _extensions:
        for index, op in enumerate(OPERATORS):
            for kernel, name in enumerate(_KERNELS):
                counts[f"{op}/{name}"] += extension.densreg_calls(index, kernel)
    return {key: n for key, n in counts.items() if n}


def _serves(name: str, device: str) -> bool:
    """Whether a backend that is there serves tensors on a type of device."""
    if name == "cuda":
        return _has_kernel("softmax.cuda", device.upper())
    if name == "triton":
        return device == "cuda" or (device == "cpu" and _triton()[0].INTERPRETED)
    return name == "torch" or name == device


@functools.cache
def _preferred(device: str) -> str:
    """The first backend of ORDER that is there."""
    return next(name for name in ORDER.get(device, ("torch",)) if missing(name) is None and _serves(name, device))


@functools.cache
def _route(name: str, device: str, forced: str | None) -> Callable[..., Any]:
    """What runs an operator for tensors on a type of device."""
    if forced is not None and not _serves(forced, device):
        raise RuntimeError(f"the backend {forced!r} is forced, and does not serve a tensor on {device}")
    if forced == "torch":
        return _FALLBACKS[name]
    served = forced or _preferred(device)
    operator = getattr(torch.ops.densreg, name)
    return getattr(operator, served) if served in ("cuda", "triton") else operator.default


def _call(name: str, *args: Any) -> Any:
    try:
        return _route(name, args[0].device.type, _forced)(*args)
    except RuntimeError as error:
        # The stable ABI knows no other error: what the kernels find wrong in a target or in k is a bad value.
        _, found, message = str(error).partition(f"densreg::{name}: ")
        if found:
            raise ValueError(message.splitlines()[0]) from None
        raise


_FALLBACKS: dict[str, Callable[..., Any]] = {}


def _define(schema: str) -> None:
    """Define an operator: ``softmax`` by whatever serves its device, ``softmax.cuda`` and ``softmax.triton`` by those.

    A compiled graph holds the overload that was chosen when it was traced, so that no Python runs before the kernel.
    """
    name, arguments = schema.split("(", 1)
    for overload in ("", ".cuda", ".triton"):
        _library.define(f"{name}{overload}({arguments}")

    def by_triton(*args: Any) -> Any:
        kernels, reason = _triton()
        if kernels is None:
            raise RuntimeError(f"the backend 'triton' is missing: {reason}")
        _python_calls[f"{name}/triton"] += 1
        return getattr(kernels, name)(*args)

    def on_gpu(*args: Any) -> Any:  # a caller that names the operator itself
        served = _preferred("cuda")
        if served == "torch":
            return _FALLBACKS[name](*args)
        return getattr(getattr(torch.ops.densreg, name), served)(*args)

    _library.impl(f"{name}.triton", torch.no_grad()(by_triton), "CompositeExplicitAutograd")
    _library.impl(name, on_gpu, "CUDA")


def _fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as the fake implementation of an operator, whatever serves it."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        for overload in ("", ".cuda", ".triton"):
            torch.library.register_fake(f"densreg::{name}{overload}", function, lib=_library)
        return function

    return register


def _fallback(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as the plain-torch implementation of an operator, on every device; its calls are counted."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        @torch.no_grad()
        def counted(*args: Any) -> Any:
            device = args[0].device.type
            if _forced is None and device in ORDER and device not in _warned:
                _warned.add(device)
                reasons = "; ".join(f"{b}: {missing(b)}" for b in ORDER[device] if b != "torch")
                warnings.warn(f"densreg runs in plain torch, several times slower ({reasons})", stacklevel=2)
            _python_calls[f"{name}/torch"] += 1
            return function(*args)

        _library.impl(name, counted, "CompositeExplicitAutograd")
        _FALLBACKS[name] = counted
        return function

    return register


def per_row(row: Tensor, like: Tensor) -> Tensor:
    """[B] -> [B, 1, ..., 1], to broadcast against a tensor of shape [B, ...]."""
    return row.reshape(-1, *[1] * (like.ndim - 1))


# --------------------------------------------------------------------------------------------------------------------
# softmax: log density, cross-entropy and softmax, in one pass over the logits

_define(
    "softmax(Tensor logits, Tensor? target, float label_smoothing, int ignore_index, bool need_softmax, float scale)"
    " -> (Tensor log_density, Tensor cross_entropy, Tensor softmax, Tensor statistics)"
)


def softmax(
    logits: Tensor,
    target: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    need_softmax: bool = True,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log density, cross-entropy and softmax of each row, from one read of the logits.

    Args:
        logits: [B, C], any floating dtype and strides.
        target: [B] int64 class indices in [0, C) or equal to ``ignore_index``; ``None`` for no cross-entropy.
        label_smoothing: weight in [0, 1] of the uniform distribution in the target.
        ignore_index: the target that gives a cross-entropy and a gradient of zero.
        need_softmax: whether to write the softmax.
        scale: factor on the softmax, applied before it is rounded to the dtype of the logits.

    Returns:
        ``(log_density [B], cross_entropy [B], softmax [B, C], statistics [2, B])``: the softmax in the dtype of the
        logits, the others in float32 (float64 for float64 logits). The statistics are m and s, for
        :func:`softmax_backward`. What was not asked for has shape [0].
    """
    _require_no_grad("softmax", logits)
    return _call("softmax", logits, target, label_smoothing, ignore_index, need_softmax, scale)


def _check_target(target: Tensor, classes: int, ignore_index: int) -> None:
    # On CUDA this would synchronise: there the gather that follows asserts on the device, as in torch.
    if target.device.type != "cpu":
        return
    wrong = (target != ignore_index) & ((target < 0) | (target >= classes))
    if wrong.any():
        raise ValueError(
            f"expected classes in [0, {classes}) or ignore_index={ignore_index} in target, "
            f"got class {target[wrong][0].item()}"
        )


def _row_sums(logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row maximum m [B, 1], exp(f - m) [B, C], s [B, 1] and the log density [B], in the accumulation dtype."""
    f = logits.to(accumulation_dtype(logits.dtype))
    m = f.amax(1, keepdim=True)
    e = (f - m).exp()
    # torch.sum is blocked, torch.softmax keeps one running sum per lane: that costs digits from 100,000 classes up.
    s = e.sum(1, keepdim=True)
    # Rows whose maximum is infinite: f - m is NaN, and the log density is that maximum, as in torch.logsumexp.
    log_density = torch.where(m.isinf(), m, m + s.log()).squeeze(1)
    return m, e, s, log_density


@_fallback("softmax")
def _softmax_torch(
    logits: Tensor,
    target: Tensor | None,
    label_smoothing: float,
    ignore_index: int,
    need_softmax: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    m, e, s, log_density = _row_sums(logits)
    cross_entropy = log_density.new_empty(0)
    if target is not None:
        _check_target(target, logits.shape[1], ignore_index)
        ignored = target == ignore_index
        log_s = s.log().squeeze(1)
        m_row = m.squeeze(1)
        f_y = logits.gather(1, target.masked_fill(ignored, 0).unsqueeze(1)).squeeze(1).to(m.dtype)
        # Not L - f_y: at logits of 1e4 the rounding of L would be all that is left.
        cross_entropy = (m_row - f_y) + log_s
        if label_smoothing > 0:
            uniform = (m - logits.to(m.dtype)).mean(1) + log_s
            cross_entropy = (1 - label_smoothing) * cross_entropy + label_smoothing * uniform
        cross_entropy = cross_entropy.masked_fill(ignored, 0)
    y = logits.new_empty(0)
    if need_softmax:
        y = torch.empty_like(logits, memory_format=torch.contiguous_format)
        y.copy_(e.div_(s).mul_(scale))
    return log_density, cross_entropy, y, torch.stack([m.squeeze(1), s.squeeze(1)])


@_fake("softmax")
def _softmax_fake(logits, target, label_smoothing, ignore_index, need_softmax, scale):
    row_dtype = accumulation_dtype(logits.dtype)
    return (
        logits.new_empty(logits.shape[0], dtype=row_dtype),
        logits.new_empty(0 if target is None else logits.shape[0], dtype=row_dtype),
        logits.new_empty(logits.shape if need_softmax else 0),
        logits.new_empty(2, logits.shape[0], dtype=row_dtype),
    )


# --------------------------------------------------------------------------------------------------------------------
# softmax_backward: everything that comes back goes into the logits in one pass

_define(
    "softmax_backward(Tensor source, Tensor? statistics, Tensor? target, Tensor? grad_log_density,"
    " Tensor? grad_cross_entropy, Tensor? grad_softmax, float label_smoothing, int ignore_index, float scale) -> Tensor"
)


def softmax_backward(
    source: Tensor,
    statistics: Tensor | None,
    target: Tensor | None,
    grad_log_density: Tensor | None,
    grad_cross_entropy: Tensor | None,
    grad_softmax: Tensor | None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    scale: float = 1.0,
) -> Tensor:
    """Gradient of the outputs of :func:`softmax` in the logits, [B, C], in the dtype of the logits.

    With upstream gradients ``l [B]`` of the log density, ``a [B]`` of the cross-entropy and ``U [B, C]`` of the
    softmax (which is what the double backward of the input score brings):
    ``a (P - q) + l P + scale P (U - <P, U>)``. A gradient that is ``None`` counts as zero.

    Args:
        source: where P comes from. With ``statistics`` the logits [B, C]: the only way in half precision, where a
            rounded P would cost a confident sample's P - q all its digits. Without, the forward's softmax
            (``scale * P``), which saves the exponentials.
        statistics: the forward's [2, B], or None.
        grad_softmax: [B, C], in the dtype of the logits.
    """
    _require_no_grad("softmax_backward", source, grad_log_density, grad_cross_entropy, grad_softmax)
    return _call(
        "softmax_backward",
        source,
        statistics,
        target,
        grad_log_density,
        grad_cross_entropy,
        grad_softmax,
        label_smoothing,
        ignore_index,
        scale,
    )


@_fallback("softmax_backward")
def _softmax_backward_torch(
    source: Tensor,
    statistics: Tensor | None,
    target: Tensor | None,
    grad_log_density: Tensor | None,
    grad_cross_entropy: Tensor | None,
    grad_softmax: Tensor | None,
    label_smoothing: float,
    ignore_index: int,
    scale: float,
) -> Tensor:
    dtype = accumulation_dtype(source.dtype)
    if statistics is None:
        p = source.to(dtype) / scale
    else:
        m, s = statistics.unsqueeze(2)
        p = (source.to(dtype) - m).exp_() / s
    weight = torch.zeros_like(p[:, :1])
    if grad_log_density is not None:
        weight = weight + grad_log_density.to(dtype).unsqueeze(1)
    if grad_softmax is not None:
        u = grad_softmax.to(dtype) * scale
        weight = weight + u - (p * u).sum(1, keepdim=True)
    out = torch.empty_like(source, memory_format=torch.contiguous_format)
    if grad_cross_entropy is None or target is None:
        return out.copy_(p * weight)
    ignored = target == ignore_index
    a = grad_cross_entropy.to(dtype).masked_fill(ignored, 0).unsqueeze(1)
    grad = p * (weight + a)
    if label_smoothing > 0:
        grad -= a * (label_smoothing / p.shape[1])
    grad.scatter_add_(1, target.masked_fill(ignored, 0).unsqueeze(1), a * (label_smoothing - 1))
    return out.copy_(grad)


@_fake("softmax_backward")
def _softmax_backward_fake(source, *_):
    return torch.empty_like(source, memory_format=torch.contiguous_format)


# --------------------------------------------------------------------------------------------------------------------
# pnorm: the p-norm of each row of the score

_define("pnorm(Tensor g, float p) -> (Tensor norm, Tensor peak, Tensor total)")


def pnorm(g: Tensor, p: float) -> tuple[Tensor, Tensor, Tensor]:
    """p-norm of each row, scaled by the row's largest magnitude so that no power over- or underflows.

    Args:
        g: [B, ...], any floating dtype and memory format.
        p: the order, 1 <= p <= inf.

    Returns:
        ``(norm [B], peak [B], total [B])`` in float32 (float64 for float64): ``peak = max_i |g_i|``,
        ``total = sum_i (|g_i| / peak)^p`` and ``norm = peak * total^(1/p)``. For p = inf ``norm = peak``, and
        ``total`` is the number of entries of that magnitude. ``peak`` and ``total`` are for :func:`pnorm_backward`.
    """
    _require_no_grad("pnorm", g)
    return _call("pnorm", g, p)


@_fallback("pnorm")
def _pnorm_torch(g: Tensor, p: float) -> tuple[Tensor, Tensor, Tensor]:
    magnitude = g.to(accumulation_dtype(g.dtype)).abs()
    if magnitude[:1].numel() == 0:  # no rows, or rows without entries
        zero = magnitude.new_zeros(g.shape[0])
        return zero, zero.clone(), torch.ones_like(zero)
    dims = tuple(range(1, g.ndim))
    peak = magnitude.amax(dims)
    if p == float("inf"):
        ties = (magnitude == per_row(peak, g)).sum(dims).to(peak.dtype)
        return peak.clone(), peak, ties.clamp_(min=1)  # a NaN equals nothing: torch's gradient there is 0
    # Divided by the peak, not multiplied by its reciprocal: that is infinite for a subnormal peak.
    ratio = magnitude / per_row(peak, g)
    total = (ratio if p == 1 else ratio.square_() if p == 2 else ratio.pow_(p)).sum(dims)
    # 0 / 0 and inf / inf: such a row has the norm 0 or inf, and its gradient divides by one.
    total = total.masked_fill((peak == 0) | peak.isinf(), 1)
    return peak * (total if p == 1 else total.sqrt() if p == 2 else total.pow(1 / p)), peak, total


@_fake("pnorm")
def _pnorm_fake(g, p):
    row = g.new_empty(g.shape[0], dtype=accumulation_dtype(g.dtype))
    return row, torch.empty_like(row), torch.empty_like(row)


_define("pnorm_backward(Tensor grad, Tensor g, Tensor peak, Tensor total, float p) -> Tensor")


def pnorm_backward(grad: Tensor, g: Tensor, peak: Tensor, total: Tensor, p: float) -> Tensor:
    """Gradient of :func:`pnorm` in g: ``grad sign(g) (|g| / norm)^(p-1)``, [B, ...], in the dtype of g.

    Computed as ``(|g| / peak)^(p-1) total^(-(p-1)/p)``: a power of the norm's rounding would be off for large p.
    A zero row has gradient 0; for p = inf the gradient is shared between the entries of largest magnitude.
    """
    _require_no_grad("pnorm_backward", grad, g, peak, total)
    return _call("pnorm_backward", grad, g, peak, total, p)


@_fallback("pnorm_backward")
def _pnorm_backward_torch(grad: Tensor, g: Tensor, peak: Tensor, total: Tensor, p: float) -> Tensor:
    value = g.to(accumulation_dtype(g.dtype))
    grad, peak, total = (per_row(t, g) for t in (grad.to(value.dtype), peak, total))
    if p == float("inf"):
        dual = value.sgn() * (value.abs() == peak) / total
    elif p == 1:
        dual = value.sgn()
    else:
        ratio = value / peak.masked_fill(peak == 0, 1)
        dual = ratio if p == 2 else ratio.sgn() * ratio.abs().pow_(p - 1)
        dual = dual * total.pow(1 / p - 1)
    return torch.empty_like(g).copy_(dual * grad)


@_fake("pnorm_backward")
def _pnorm_backward_fake(grad, g, peak, total, p):
    return torch.empty_like(g)


# --------------------------------------------------------------------------------------------------------------------
# the C++ extension: its kernels take the place of the fallback for CPU tensors when it is loaded

_ISAS = ("scalar", "avx2", "avx512")
_KERNELS = (*(f"cpu-{isa}" for isa in _ISAS), "cuda")
_FOLDER = Path(__file__).parent


def build_info() -> dict[str, Any]:
    """What the build wrote of itself; empty where there was none."""
    try:
        return json.loads((_FOLDER / "_build_info.json").read_text())
    except (OSError, ValueError):
        return {}


def _load_extension() -> tuple[ctypes.CDLL | None, str | None]:
    """The extension, or why there is none."""
    path = _FOLDER / "_C.so"
    if not path.exists():
        _refuse_to_hide_an_installation()
        return None, build_info().get("reason", f"{path.name} was not built")
    try:
        torch.ops.load_library(str(path))
        extension = ctypes.CDLL(str(path))
    except OSError as error:
        return None, f"{path.name} does not load: {error}"
    extension.densreg_calls.restype = ctypes.c_int64
    return extension, None


def _refuse_to_hide_an_installation() -> None:
    """Raise where this is a source tree that was never built, found before the densreg that is installed."""
    if (_FOLDER / "_build_info.json").exists():
        return
    for other in (Path(place, "densreg").resolve() for place in sys.path):
        if other != _FOLDER.resolve() and (other / "_build_info.json").exists():
            raise ImportError(
                f"densreg is imported from its source tree, {_FOLDER}, which was not built and hides the densreg "
                f"installed in {other}: start Python in another folder, or install with pip install -e"
            )


_extension, MISSING = _load_extension()
"""The C++ extension, and why it is missing: None where it is not."""

_extensions = [] if _extension is None else [_extension]
"""Libraries that count calls: this one, and what the tests build."""

if MISSING is not None and os.environ.get("DENSREG_REQUIRE_EXTENSION") == "1":
    raise ImportError(f"DENSREG_REQUIRE_EXTENSION=1, and densreg's C++ extension is missing: {MISSING}")


def instruction_set() -> str | None:
    """What the C++ kernels use: "avx512", "avx2" or "scalar"; None without the extension.

    The environment variable DENSREG_CPU_CAPABILITY names a lesser one than the processor has.
    """
    return None if _extension is None else _ISAS[_extension.densreg_isa()]
