"""Forward and double backward at the logits, across class counts: the C++ kernels against torch.

    python -m benchmarks class-counts [--threads 1] [--seconds 3] [--json FILE]

The leaf is the logits f [B, C] in float32; what comes out is P = softmax(f), which is the score's cotangent, and
h = (dP/df)^T U = P (U - <P, U>) for a given U, which is what the double backward adds. Two comparisons, never mixed:

API  `densreg.input_score(f, f)` and torch.autograd.grad of it, in eager mode, against the paper's "taylor" expression
     under autograd: f_k - log_softmax_k(f), torch.autograd.grad of that, and torch.autograd.grad of that. "floor" is
     the same pair of autograd Functions with nothing in them: what any kernel in eager mode has to pay. And the log
     density itself differentiated twice, by `densreg.log_density`, by `densreg.density_cross_entropy`, which has the
     cross-entropy as well, and by torch.logsumexp.
raw  the operators softmax and softmax_backward against the same closed formula (log density, P, h) in ATen calls, and
     under torch.compile (inductor; the time holds the check of its guards, as a user's call does).

Bandwidth: the fewest bytes that the raw operators must move (read f, write P; read P and U, write h) over their time,
beside a copy between two tensors of that size that exist already (read and write). Outputs are allocated anew in every
column, as in use; "clone" is a copy with that allocation: from 8 MiB up what it takes is page faults, and the C++
kernels ask for huge pages there. Inputs of 1 MiB and more are taken in turn from so many that none is in a cache.
Every result is checked against float64 before it is timed, and the call counter must say that the preferred kernels of
the device served densreg's columns: C++ on a CPU, CUDA or Triton on a GPU.

test_class_counts.py times the paper's other paths beside these, and the whole penalty through a linear head.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

import densreg
from densreg import ops, paths

from .records import Row, tables, write_json
from .timing import WrongResult, copies_past_cache, environment, interleave, peak_bytes, summarize

SHAPES = (
    *((128, 10), (128, 100), (128, 200), (128, 1000), (128, 10_000), (128, 21_841)),
    *((64, 100_000), (32, 1_000_000)),
)
WIDTH = 64
"""Of the linear head: small, so that it is the classes that count."""

PAPERS = ("naive", "max_shift", "stable", "per_class")
MOST_CLASSES = {"per_class": 200}
"""A backward for each class: beyond it would take minutes and all of the memory."""

MOVED = {"raw": 5, "aten": 5, "compiled": 5, "copy": 2, "clone": 2}
"""Tensors of the logits' size that must at least be read or written."""

ORDINARY = ("log_density", "density_cross_entropy")
"""Functions that their caller differentiates."""

OVERFLOW = "not finite with the logits times 100; all others right"


class _EmptyBackward(Function):
    @staticmethod
    def forward(ctx, source, u):
        ctx.save_for_backward(source, u)
        return torch.empty_like(source)


class _Empty(Function):
    """As lean as autograd allows: what the two of densreg cannot undercut."""

    @staticmethod
    def forward(ctx, logits):
        output = torch.empty_like(logits)
        ctx.save_for_backward(output)
        return output

    @staticmethod
    def backward(ctx, u):
        return _EmptyBackward.apply(*ctx.saved_tensors, u) if torch.is_grad_enabled() else torch.empty_like(u)


def taylor(f: Tensor, k: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    value = f.gather(1, k).squeeze(1) - f.log_softmax(1).gather(1, k).squeeze(1)
    (p,) = torch.autograd.grad(value.sum(), f, create_graph=True)
    return p, torch.autograd.grad(p, f, u)[0]


def api(f: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    p = densreg.input_score(f, f)
    return p, torch.autograd.grad(p, f, u)[0]


def twice(log_density: Callable[[Tensor], Tensor], f: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """The ordinary way: torch.autograd.grad of a function, and of that."""
    (p,) = torch.autograd.grad(log_density(f).sum(), f, create_graph=True)
    return p, torch.autograd.grad(p, f, u)[0]


def floor(f: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    (p,) = torch.autograd.grad(f, f, _Empty.apply(f), create_graph=True)
    return p, torch.autograd.grad(p, f, u)[0]


def raw(f: Tensor, u: Tensor, overload: str = "default") -> tuple[Tensor, Tensor, Tensor]:
    forward, backward = (getattr(getattr(torch.ops.densreg, n), overload) for n in ("softmax", "softmax_backward"))
    log_density, _, p, _ = forward(f, None, 0.0, -100, True, 1.0)
    return log_density, p, backward(p, None, None, None, None, u, 0.0, -100, 1.0)


def aten(f: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    p = torch.softmax(f, 1)
    return torch.logsumexp(f, 1), p, p * (u - (p * u).sum(1, keepdim=True))


def by_path(path: str, f: Tensor, k: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """The paper's other paths, without densreg's checks."""
    (p,) = paths.PATHS[path](f, (f,), k)
    return p, torch.autograd.grad(p, f, u)[0]


def head(path: str, x: Tensor, w: Tensor, k: Tensor | None = None) -> Tensor:
    """Gradient in w [C, width] of the mean 2-norm of the score in x [B, width], the logits being x w^T."""
    f = F.linear(x, w)
    if path == "fused":
        penalty = densreg.density_penalty(f, x)
    else:
        penalty = torch.linalg.vector_norm(paths.PATHS[path](f, (x,), k)[0], dim=1).mean()
    return torch.autograd.grad(penalty, w)[0]


def closed_head(x: Tensor, w: Tensor) -> Tensor:
    """The same as a formula: nothing is left to autograd."""
    p = torch.softmax(F.linear(x, w), 1)
    score = p @ w
    v = score / (torch.linalg.vector_norm(score, dim=1, keepdim=True) * len(x))  # gradient of the mean norm
    u = F.linear(v, w)
    return p.T @ v + (p * (u - (p * u).sum(1, keepdim=True))).T @ x


def _error(outputs: tuple[Tensor, ...], f: Tensor, u: Tensor, least: float = 0.0) -> float:
    """Of p and h against float64, a slice of rows at a time; of a million classes the doubles would not fit.

    Args:
        least: what the error is relative to, where p or h is smaller than that; NaN if anything is not finite.
    """
    *_, p, h = (t.detach() for t in outputs)
    errors = [0.0]
    for rows in range(0, len(f), 8):
        part = slice(rows, min(rows + 8, len(f)))
        wide, up = f[part].detach().double(), u[part].double()
        expected = torch.softmax(wide, 1)
        second = expected * (up - (expected * up).sum(1, keepdim=True))
        for actual, right in ((p[part], expected), (h[part], second)):
            errors.append(float((actual.double() - right).abs().max() / right.abs().max().clamp_min(least)))
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def backends(device: str) -> list[str]:
    """The backends that are available for a type of device, the preferred one first, plain torch last."""
    there = {name: one for name, one in ops.BACKENDS.items() if one.unavailable_reason() is None}
    return [name for name, one in there.items() if device in one.devices or name == "torch"]


def kernels(backend: str, *operators: str) -> set[str]:
    """The keys of ``ops.calls()`` that count the calls of operators by a backend."""
    return {f"{operator}/{ops.BACKENDS[backend].counted_as}" for operator in operators}


def require_served(name: str, before: dict[str, int], expected: set[str]) -> None:
    """Raise WrongResult unless the calls since ``before`` were served by these kernels, and by no others."""
    served = {key for key, n in ops.calls().items() if n > before.get(key, 0)}
    if served != expected:
        raise WrongResult(
            f"{name}: expected {sorted(expected) or 'torch alone'}, got {sorted(served) or 'torch alone'}"
        )


def _require(name: str, error: float, bound: float, shape: Any) -> None:
    if not error < bound:
        raise WrongResult(f"{name}: expected a relative error below {bound:.0e}, got {error:.1e} at {list(shape)}")


def _by(backend: str, call: Callable[..., Any], *args: Any) -> Any:
    with densreg.backend(backend):
        return call(*args)


def _timed(
    columns: dict[str, Callable[[], Any]],
    base: str | dict[str, str],
    seconds: float,
    memory: bool,
    errors: dict[str, float],
) -> dict[str, dict[str, Any]]:
    found = summarize(interleave(columns, seconds), base)
    for name, call in columns.items():
        if memory:
            found[name]["peak_bytes"] = peak_bytes(call)
        if name in errors:
            found[name]["error"] = errors[name]
    return found


def measure(
    rows: int, classes: int, seconds: float, papers: bool = False, memory: bool = False, device: str = "cpu"
) -> Row:
    """One shape, with the current number of threads.

    Args:
        papers: the paper's other paths too, and the fused one by the other backends.
        memory: count what each column allocates at its peak.

    Raises:
        WrongResult: nothing was timed.
    """
    torch.manual_seed(0)
    f, u = torch.randn(rows, classes, device=device), torch.randn(rows, classes, device=device)
    k = torch.randint(classes, (rows, 1), device=device)
    shape, size = f.shape, f.nbytes
    torch.compiler.reset()
    compiled = torch.compile(aten, dynamic=False)
    preferred, *others = backends(device)
    overload = ops.BACKENDS[preferred].overload or "default"
    columns: dict[str, Callable[[Tensor, Tensor], Any]] = {
        "api": api,
        "log_density": functools.partial(twice, densreg.log_density),
        "density_cross_entropy": functools.partial(twice, lambda f: densreg.density_cross_entropy(f, k[:, 0])[1]),
        "logsumexp": functools.partial(twice, lambda f: torch.logsumexp(f, 1)),
        "taylor": lambda f, u: taylor(f, k, u),
        "raw": lambda f, u: raw(f.detach(), u, overload),
        "aten": lambda f, u: aten(f.detach(), u),
        "compiled": lambda f, u: compiled(f.detach(), u),
    }
    served = dict.fromkeys(("api", "raw", *ORDINARY), preferred)
    if papers:
        for name in others:
            column = "fallback" if name == "torch" else name
            columns[column] = functools.partial(_by, name, api)
            served[column] = name
        for path in PAPERS:
            if classes <= MOST_CLASSES.get(path, classes):
                columns[path] = lambda f, u, path=path: by_path(path, f, k[:, 0], u)  # type: ignore[misc]
    leaf, errors, overflow = f.clone().requires_grad_(), {}, []
    for name, call in columns.items():
        before = ops.calls()
        errors[name] = _error(call(leaf, u), f, u)
        # Torch's running sums lose digits at many classes; ours may not.
        _require(name, errors[name], 2e-6 if name in served else 1e-3, shape)
        operators = ("softmax", "softmax_backward", *(["softmax_double_backward"] if name in ORDINARY else []))
        require_served(name, before, kernels(served[name], *operators) if name in served else set())
        if papers:
            large = (100 * f).requires_grad_()
            error = _error(call(large, u), large, u, least=1.0)  # h is what is left of a difference of u
            if name == "naive" and error != error:
                overflow.append(name)  # which is what the paper says of it
            else:
                _require(f"{name}, logits times 100", error, 1e-3, shape)
    inputs = [(f.clone().requires_grad_(), u.clone(), torch.empty_like(f)) for _ in range(copies_past_cache(3 * size))]
    turn = itertools.cycle(inputs)

    def in_turn(call: Callable[[Tensor, Tensor], Any]) -> Callable[[], Any]:
        def timed() -> Any:
            f, u, _ = next(turn)
            return call(f, u)

        return timed

    def copy() -> Tensor:
        f, _, target = next(turn)
        return target.copy_(f.detach())

    calls = {name: in_turn(call) for name, call in columns.items()}
    calls |= {"floor": in_turn(floor), "copy": copy, "clone": in_turn(lambda f, u: f.detach().clone())}
    base = {name: "raw" if name in MOVED else "api" for name in calls}
    found = _timed(calls, base, seconds, memory, errors)
    for name, moved in MOVED.items():
        found[name]["bytes"] = moved * size
    for name in overflow:
        found[name]["note"] = OVERFLOW
    return {"suite": "logits", "case": {"B": rows, "C": classes}, "columns": found}


def measure_head(rows: int, classes: int, seconds: float, memory: bool = False, device: str = "cpu") -> Row:
    """The whole penalty through a linear head of :data:`WIDTH` features: logits, score, norm, and the gradient in w.

    Raises:
        WrongResult: nothing was timed.
    """
    torch.manual_seed(0)
    x, w = torch.randn(rows, WIDTH, device=device), torch.randn(classes, WIDTH, device=device) / 8
    k = torch.randint(classes, (rows,), device=device)
    torch.compiler.reset()
    compiled = torch.compile(closed_head, dynamic=False)
    leaf_x, leaf_w = x.clone().requires_grad_(), w.clone().requires_grad_()
    columns: dict[str, Callable[[], Tensor]] = {
        "fused": lambda: head("fused", leaf_x, leaf_w),
        "compiled": lambda: compiled(x, w),
    }
    for path in ("taylor", *PAPERS):
        if classes <= MOST_CLASSES.get(path, classes):
            columns[path] = lambda path=path: head(path, leaf_x, leaf_w, k)  # type: ignore[misc]
    expected = sum(closed_head(part.double(), w.double()) * (len(part) / rows) for part in x.split(8))
    assert isinstance(expected, Tensor)
    ours = kernels(backends(device)[0], "softmax", "softmax_backward", "pnorm", "pnorm_backward")
    errors = {}
    for name, call in columns.items():
        before = ops.calls()
        errors[name] = float((call() - expected).abs().max() / expected.abs().max())
        _require(name, errors[name], 1e-3, (rows, classes))
        require_served(name, before, ours if name == "fused" else set())
    del expected
    found = _timed(columns, "fused", seconds, memory, errors)
    return {"suite": "head", "case": {"B": rows, "C": classes}, "columns": found}


SHARED = {"threads": None, "seconds": 3.0, "json": None, "device": "cpu"}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--classes", type=int, nargs="+", help="only these class counts")
    parser.add_argument("--touch", type=int, default=8, metavar="GIB", help="memory to touch before anything is timed")


def run(options: argparse.Namespace) -> int:
    if (reason := ops.unavailable_reason("cpu")) is not None:
        raise SystemExit(f"nothing to measure: {reason}")
    # A virtual machine's memory is backed by its host when it is first touched: not to be timed.
    torch.ones(options.touch << 28)
    shapes = [shape for shape in SHAPES if not options.classes or shape[1] in options.classes]
    rows = [measure(*shape, options.seconds, device=options.device) for shape in shapes]
    write_json(options.json, rows, environment())
    print("\n".join(tables(rows)))
    return 0
