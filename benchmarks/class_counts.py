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
kernels ask for huge pages there. Every result is checked against float64 before it is timed,
and the call counter must say that the C++ kernels served densreg's columns.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

import densreg
from benchmarks.timing import environment, interleave, ratio
from densreg import ops

SHAPES = ((128, 10), (128, 100), (128, 200), (128, 1000), (128, 21841), (64, 100_000), (32, 1_000_000))


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


def _check(name: str, outputs: tuple[Tensor, ...], f: Tensor, u: Tensor, bound: float) -> None:
    """p and h against float64, a slice of rows at a time; of a million classes the doubles would not fit."""
    *_, p, h = (t.detach() for t in outputs)
    for rows in range(0, len(f), 8):
        part = slice(rows, min(rows + 8, len(f)))
        wide, up = f[part].detach().double(), u[part].double()
        expected = torch.softmax(wide, 1)
        second = expected * (up - (expected * up).sum(1, keepdim=True))
        for actual, wanted in ((p[part], expected), (h[part], second)):
            error = float((actual.double() - wanted).abs().max() / wanted.abs().max())
            if not error < bound:
                raise SystemExit(f"{name}: relative error {error:.1e} at [{f.shape[0]}, {f.shape[1]}]")


def measure(rows: int, classes: int, seconds: float) -> dict[str, Any]:
    """Medians in seconds, ratios, bandwidth of one shape, with the current number of threads."""
    torch.manual_seed(0)
    f, u = torch.randn(rows, classes), torch.randn(rows, classes)
    leaf = f.clone().requires_grad_()
    k = torch.randint(classes, (rows, 1))
    torch._dynamo.reset()
    compiled = torch.compile(aten, dynamic=False)
    columns = {
        "api": lambda: api(leaf, u),
        "taylor": lambda: taylor(leaf, k, u),
        "raw": lambda: raw(f, u),
        "aten": lambda: aten(f, u),
        "compiled": lambda: compiled(f, u),
    }
    for name, call in columns.items():
        before = ops.calls()
        # Torch's running sums lose digits at many classes; ours may not.
        _check(name, call(), f, u, 2e-6 if name in ("api", "raw") else 1e-3)
        served = {key for key, n in ops.calls().items() if n > before.get(key, 0)}
        kernels = {f"{op}/cpu-{ops.instruction_set()}" for op in ("softmax", "softmax_backward")}
        if served != (kernels if name in ("api", "raw") else set()):
            raise SystemExit(f"{name} was served by {served}")
    target = torch.empty_like(f)
    others = {"floor": lambda: floor(leaf, u), "copy": lambda: target.copy_(f), "clone": f.clone}
    times = interleave({**columns, **others}, seconds)
    median = {name: statistics.median(values) for name, values in times.items()}
    size = f.numel() * f.element_size()
    return {
        "B": rows,
        "C": classes,
        "threads": torch.get_num_threads(),
        "rounds": len(times["api"]),
        "seconds": median,
        "taylor/api": ratio(times, "taylor", "api"),
        "aten/raw": ratio(times, "aten", "raw"),
        "compiled/raw": ratio(times, "compiled", "raw"),
        "raw_bytes_per_second": 5 * size / median["raw"],
        "copy_bytes_per_second": 2 * size / median["copy"],
        "clone_bytes_per_second": 2 * size / median["clone"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=3.0, help="for each shape and number of threads")
    parser.add_argument("--classes", type=int, nargs="+", help="only these class counts")
    parser.add_argument("--touch", type=int, default=8, metavar="GIB", help="memory to touch before anything is timed")
    parser.add_argument("--json", type=Path, help="write the rows there too")
    options = parser.parse_args()
    if ops.MISSING is not None:
        raise SystemExit(f"nothing to measure: {ops.MISSING}")
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
            row = measure(b, c, options.seconds)
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
