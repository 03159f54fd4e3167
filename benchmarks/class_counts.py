"""Forward and double backward at the logits, across class counts: the C++ kernels against torch.

    python -m benchmarks.class_counts [--threads 1 2] [--seconds 3] [--json FILE]

The leaf is the logits f [B, C] in float32; what comes out is P = softmax(f), which is the score's cotangent, and
h = (dP/df)^T U = P (U - <P, U>) for a given U, which is what the double backward adds. Two comparisons, never mixed:

API  `densreg.input_score(f, f)` and torch.autograd.grad of it, in eager mode, against the paper's "taylor" expression
     under autograd: f_k - log_softmax_k(f), torch.autograd.grad of that, and torch.autograd.grad of that. "floor" is
     the same pair of autograd Functions with nothing in them: what any kernel in eager mode has to pay.
raw  the operators softmax and softmax_backward against the same closed formula (log density, P, h) in ATen calls, and
     under torch.compile (inductor; the time holds the check of its guards, as a user's call does).

Bandwidth: the fewest bytes that the raw operators must move (read f, write P; read P and U, write h) over their time,
beside a copy between two tensors of that size that exist already (read and write). Outputs are allocated anew in every
column, as in use; "clone" is a copy with that allocation: from 8 MiB up what it takes is page faults, and the C++
kernels ask for huge pages there. Inputs of 1 MiB and more are taken in turn from so many that none is in a cache.
Every result is checked against float64 before it is timed, and the call counter must say that the C++ kernels served
densreg's columns.

test_class_counts.py times the paper's other paths beside these, and the whole penalty through a linear head.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

import densreg
from densreg import ops, paths

from .timing import WrongResult, copies_past_cache, environment, interleave, peak_bytes, ratio, spread

SHAPES = (
    *((128, 10), (128, 100), (128, 200), (128, 1000), (128, 10_000), (128, 21_841)),
    *((64, 100_000), (32, 1_000_000)),
)
WIDTH = 64
"""Of the linear head: small, so that it is the classes that count."""

PAPERS = ("naive", "max_shift", "stable", "per_class")
MOST_CLASSES = {"per_class": 200}
"""A backward for each class: beyond it would take minutes and all of the memory."""


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


def floor(f: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    (p,) = torch.autograd.grad(f, f, _Empty.apply(f), create_graph=True)
    return p, torch.autograd.grad(p, f, u)[0]


def raw(f: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    log_density, _, p, _ = torch.ops.densreg.softmax.default(f, None, 0.0, -100, True, 1.0)
    return log_density, p, torch.ops.densreg.softmax_backward.default(p, None, None, None, None, u, 0.0, -100, 1.0)


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
        for actual, wanted in ((p[part], expected), (h[part], second)):
            errors.append(float((actual.double() - wanted).abs().max() / wanted.abs().max().clamp_min(least)))
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def _require(name: str, error: float, bound: float, shape: Any, before: dict[str, int], kernels: set[str]) -> None:
    """Raise WrongResult unless a column's result is right, and came from where its name says."""
    if not error < bound:
        raise WrongResult(f"{name}: relative error {error:.1e} at {list(shape)}; wanted less than {bound:.0e}")
    served = {key for key, n in ops.calls().items() if n > before.get(key, 0)}
    if served != kernels:
        raise WrongResult(f"{name} was served by {sorted(served) or 'torch alone'}; wanted {sorted(kernels)}")


def _kernels(*operators: str) -> set[str]:
    return {f"{op}/cpu-{ops.instruction_set()}" for op in operators}


def _timed(columns: dict[str, Callable[[], Any]], seconds: float, memory: bool) -> dict[str, Any]:
    times = interleave(columns, seconds)
    reference = "api" if "api" in times else "fused"
    result = {
        "threads": torch.get_num_threads(),
        "rounds": len(times[reference]),
        "seconds": {name: statistics.median(values) for name, values in times.items()},
        "quartiles": {name: spread(values) for name, values in times.items()},
        "over_fused": {name: ratio(times, name, reference) for name in times},
        "times": times,
    }
    if memory:
        result["peak_bytes"] = {name: peak_bytes(call) for name, call in columns.items()}
    return result


def measure(rows: int, classes: int, seconds: float, papers: bool = False, memory: bool = False) -> dict[str, Any]:
    """Medians in seconds, ratios, bandwidth of one shape, with the current number of threads.

    Args:
        papers: the paper's other paths too, and the fused one in plain torch.
        memory: count what each column allocates at its peak.

    Raises:
        WrongResult: nothing was timed.
    """
    torch.manual_seed(0)
    f, u, k = torch.randn(rows, classes), torch.randn(rows, classes), torch.randint(classes, (rows, 1))
    shape = f.shape
    torch._dynamo.reset()
    compiled = torch.compile(aten, dynamic=False)
    columns: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, ...]]] = {
        "api": api,
        "taylor": lambda f, u: taylor(f, k, u),
        "raw": lambda f, u: raw(f.detach(), u),
        "aten": lambda f, u: aten(f.detach(), u),
        "compiled": lambda f, u: compiled(f.detach(), u),
    }
    if papers:

        def fallback(f: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
            with densreg.backend("torch"):
                return api(f, u)

        columns["fallback"] = fallback
        for path in PAPERS:
            if classes <= MOST_CLASSES.get(path, classes):
                columns[path] = lambda f, u, path=path: by_path(path, f, k[:, 0], u)  # type: ignore[misc]
    ours = _kernels("softmax", "softmax_backward")
    kernels = {"api": ours, "raw": ours, "fallback": {"softmax/torch", "softmax_backward/torch"}}
    leaf, errors, overflow = f.clone().requires_grad_(), {}, []
    for name, call in columns.items():
        before = ops.calls()
        errors[name] = _error(call(leaf, u), f, u)
        # Torch's running sums lose digits at many classes; ours may not.
        _require(name, errors[name], 2e-6 if name in kernels else 1e-3, shape, before, kernels.get(name, set()))
        if papers:
            large = (100 * f).requires_grad_()
            error = _error(call(large, u), large, u, least=1.0)  # h is what is left of a difference of u
            if name == "naive" and error != error:
                overflow.append(name)  # which is what the paper says of it
            elif not error < 1e-3:
                raise WrongResult(f"{name}: relative error {error:.1e} at {list(shape)} with logits times 100")
    size = f.nbytes
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

    others = {"floor": in_turn(floor), "copy": copy, "clone": in_turn(lambda f, u: f.detach().clone())}
    row = _timed({**{name: in_turn(call) for name, call in columns.items()}, **others}, seconds, memory)
    times, median = row.pop("times"), row["seconds"]
    return {
        "B": rows,
        "C": classes,
        **row,
        "taylor/api": ratio(times, "taylor", "api"),
        "aten/raw": ratio(times, "aten", "raw"),
        "compiled/raw": ratio(times, "compiled", "raw"),
        "raw_bytes_per_second": 5 * size / median["raw"],
        "compiled_bytes_per_second": 5 * size / median["compiled"],
        "copy_bytes_per_second": 2 * size / median["copy"],
        "clone_bytes_per_second": 2 * size / median["clone"],
        "error": errors,
        "overflow": overflow,
    }


def measure_head(rows: int, classes: int, seconds: float, memory: bool = False) -> dict[str, Any]:
    """The whole penalty through a linear head of :data:`WIDTH` features: logits, score, norm, and the gradient in w.

    Raises:
        WrongResult: nothing was timed.
    """
    torch.manual_seed(0)
    x, w = torch.randn(rows, WIDTH), torch.randn(classes, WIDTH) / 8
    k = torch.randint(classes, (rows,))
    torch._dynamo.reset()
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
    ours = _kernels("softmax", "softmax_backward", "pnorm", "pnorm_backward")
    errors = {}
    for name, call in columns.items():
        before = ops.calls()
        errors[name] = float((call() - expected).abs().max() / expected.abs().max())
        _require(name, errors[name], 1e-3, (rows, classes), before, ours if name == "fused" else set())
    del expected
    row = _timed(columns, seconds, memory)
    times = row.pop("times")
    ratios = {f"{name}/fused": ratio(times, name, "fused") for name in columns if name != "fused"}
    return {"B": rows, "C": classes, "width": WIDTH, **row, **ratios, "error": errors}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=3.0, help="for each shape and number of threads")
    parser.add_argument("--classes", type=int, nargs="+", help="only these class counts")
    parser.add_argument("--touch", type=int, default=8, metavar="GIB", help="memory to touch before anything is timed")
    parser.add_argument("--json", type=Path, help="write the rows there too")
    options = parser.parse_args()
    if (reason := ops.unavailable_reason("cpu")) is not None:
        raise SystemExit(f"nothing to measure: {reason}")
    about = environment()
    # A virtual machine's memory is backed by its host when it is first touched: not to be timed.
    torch.ones(options.touch << 28)
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print("microseconds, medians; ratios are medians over the rounds; GB/s by the fewest bytes\n")
    heads = ["threads", "B", "C", "floor", "api", "taylor", "taylor/api", "raw", "aten", "compiled"]
    heads += ["aten/raw", "compiled/raw", "GB/s", "copy", "clone"]
    print("| " + " | ".join(heads) + " |")
    print("| " + " | ".join("---" for _ in heads) + " |")
    rows = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        for b, c in SHAPES:
            if options.classes and c not in options.classes:
                continue
            try:
                row = measure(b, c, options.seconds)
            except WrongResult as error:
                raise SystemExit(str(error)) from error
            rows.append(row)
            t = {name: f"{value * 1e6:.1f}" for name, value in row["seconds"].items()}
            rates = [row[f"{name}_bytes_per_second"] / 1e9 for name in ("raw", "copy", "clone")]
            cells = [threads, b, c, t["floor"], t["api"], t["taylor"], f"{row['taylor/api']:.2f}", t["raw"], t["aten"]]
            cells += [t["compiled"], f"{row['aten/raw']:.2f}", f"{row['compiled/raw']:.2f}"]
            print("| " + " | ".join(map(str, [*cells, *(f"{rate:.1f}" for rate in rates)])) + " |", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"environment": about, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
