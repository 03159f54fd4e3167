"""A penalized step through a linear head of many classes: with logits, and without (densreg.linear_density_loss).

    python -m benchmarks linear-head [--batches 128] [--classes 1000 ...] [--threads 1] [--json FILE] [--picture FILE]

A column is cross-entropy + coeff * penalty and all gradients, in float32; no optimizer. Trunk "none" is the head alone,
of which the features are the inputs; trunk "mlp" is two layers of 1024 below it.

    naive, taylor  the paper's paths from the logits, in eager
    fused          densreg.density_loss of the logits, in eager
    compiled       that, F.linear and the trunk in one graph with its gradients, by torch.compile (inductor)
    head           densreg.linear_density_loss, in eager
    head compiled  that in one graph, as above
    products       the head's matrix products alone, tile by tile: 6 of 2 B C D, of more rows than features up to 7;
                   every ratio is to it

Before anything is timed the gradients are compared with float64, in plain torch and tile by tile. Memory is what a step
allocates at its peak, the gradients included; "weight's gradient" is that of the weight alone. A column that would take
more than half of the memory that is free is left out.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import densreg
from densreg import _torch, tiles
from densreg.lab.report import draw_lines, panels, png
from densreg.lab.runs import write_atomically
from densreg.ops import accumulation_dtype

from .records import Row, tables, write_json
from .timing import WrongResult, environment, interleave, peak_bytes, summarize

FEATURES = 512
BATCHES = (128, 1024)
CLASSES = (1000, 21_841, 100_000, 1_000_000)
TRUNKS = ("none", "mlp")
COLUMNS = ("naive", "taylor", "fused", "compiled", "head", "head compiled")
COEFF = 1.0
OFTEN_LOGITS = 10
"""Arrays of the logits' size that a path with logits has at its peak, at most."""

Step = Callable[[], list[Tensor]]


def problem(
    trunk: str, rows: int, classes: int, features: int = FEATURES, device: str = "cpu", dtype: torch.dtype | None = None
) -> tuple[nn.Module, nn.Linear, Tensor, Tensor]:
    """(trunk, head, inputs, labels)."""
    torch.manual_seed(0)
    layers = [nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, features)] if trunk == "mlp" else []
    x = torch.randn(rows, 256 if layers else features, device=device, dtype=dtype)
    head = nn.Linear(features, classes, device=device, dtype=dtype)
    return nn.Sequential(*layers).to(device, dtype), head, x, torch.randint(classes, (rows,), device=device)


def steps_of(trunk: nn.Module, head: nn.Linear, x: Tensor, y: Tensor) -> dict[str, Step]:
    """Each column's step: the gradients of the trunk's parameters, and of the head's weight and bias."""
    parameters = [*trunk.parameters(), *head.parameters()]

    def by_logits(path: str) -> Callable[[Tensor], Tensor]:
        def loss(leaf: Tensor) -> Tensor:
            logits = F.linear(trunk(leaf), head.weight, head.bias)
            if path == "fused":
                return densreg.density_loss(logits, y, leaf, COEFF)[0]
            return F.cross_entropy(logits, y) + COEFF * densreg.density_penalty(logits, leaf, path=path)

        return loss

    def by_head(leaf: Tensor) -> Tensor:
        return densreg.linear_density_loss(trunk(leaf), head.weight, head.bias, y, leaf, COEFF)[0]

    def step(loss_of: Callable[[Tensor], Tensor], compiled: bool = False) -> Step:
        def graph(leaf: Tensor) -> tuple[Tensor, ...]:
            return torch.autograd.grad(loss_of(leaf), parameters)

        call = torch.compile(graph, fullgraph=True, dynamic=False) if compiled else graph

        def run() -> list[Tensor]:
            with _torch.tracing_autograd():
                return list(call(x.detach().requires_grad_()))

        return run

    return {
        "naive": step(by_logits("naive")),
        "taylor": step(by_logits("taylor")),
        "fused": step(by_logits("fused")),
        "compiled": step(by_logits("fused"), compiled=True),
        "head": step(by_head),
        "head compiled": step(by_head, compiled=True),
    }


def products(rows: int, head: nn.Linear) -> Callable[[], Any]:
    """The matrix products of the linear head, in its tiles and nothing between them."""
    weight = head.weight.detach()
    both = torch.randn(2 * rows, weight.shape[1], device=weight.device, dtype=weight.dtype)
    h = both[:rows]
    tile = tiles.tile_size(h)

    def run() -> Tensor:
        dw = torch.empty_like(weight)
        kept = tiles.kept_tiles(dw, rows, accumulation_dtype(dw.dtype), tile)
        for k in range(0, len(weight), tile):
            w = weight[k : k + tile]
            _ = (h @ w.t()) @ w
        for k in range(0, len(weight), tile):
            w = weight[k : k + tile]
            st = both.new_empty(len(both), len(w))
            if next(kept, None) is None:
                torch.mm(both, w.t(), out=st)
            else:
                torch.mm(both[rows:], w.t(), out=st[rows:])
            _ = st[:rows] @ w
            torch.mm(st.t(), both, out=dw[k : k + tile])
        return dw

    return run


def error_of(grads: list[Tensor], trunk: nn.Module, head: nn.Linear, x: Tensor, y: Tensor, tile: int = 4096) -> float:
    """The relative error of a column's gradients against the formulas in float64, a tile of classes at a time."""
    trunk, leaf = copy.deepcopy(trunk).double(), x.detach().double().requires_grad_()
    parameters = list(trunk.parameters())
    h = trunk(leaf)
    hd, rows = h.detach(), torch.arange(len(x), device=x.device)

    def tiles() -> Iterable[tuple[slice, Tensor, Tensor]]:
        for k in range(0, len(head.weight), tile):
            part = slice(k, k + tile)
            w = head.weight[part].detach().double()
            yield part, w, F.linear(hd, w, head.bias[part].detach().double())

    density = torch.stack([s.logsumexp(1) for _, _, s in tiles()]).logsumexp(0, keepdim=True).t()
    g = torch.zeros_like(hd)
    for _, w, s in tiles():
        g += (s - density).exp() @ w
    g.requires_grad_()
    (score,) = torch.autograd.grad(h, leaf, g, create_graph=True)
    penalty = COEFF * score.norm(dim=1).mean()
    u, *direct = torch.autograd.grad(
        penalty, [g, *parameters], retain_graph=True, materialize_grads=True, allow_unused=True
    )
    *of_trunk, dw, db = grads
    dh, off, size = torch.zeros_like(hd), 0.0, 0.0

    def compare(ours: Tensor, right: Tensor) -> None:
        nonlocal off, size
        off += float((ours.double() - right).square().sum())
        size += float(right.square().sum())

    for part, w, s in tiles():
        p = (s - density).exp()
        c = p / len(x) + p * (u @ w.t() - (u * g).sum(1, keepdim=True)).detach()
        here = (y >= part.start) & (y < part.start + len(w))
        c[rows[here], y[here] - part.start] -= 1 / len(x)
        dh += c @ w
        compare(dw[part], c.t() @ hd + p.t() @ u)
        compare(db[part], c.sum(0))
    if parameters:
        through = torch.autograd.grad(h, parameters, dh)
        for ours, a, b in zip(of_trunk, direct, through, strict=True):
            compare(ours, a + b)
    return (off / size) ** 0.5


def free_bytes(device: str) -> float:
    """Of memory; without an answer from the system, any number."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    file = Path("/proc/meminfo")
    lines = dict(line.split(":") for line in file.read_text().splitlines()) if file.exists() else {}
    return float(lines["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in lines else float("inf")


def measure(
    trunk: str,
    rows: int,
    classes: int,
    seconds: float | None,
    columns: Iterable[str] = COLUMNS,
    device: str = "cpu",
    features: int = FEATURES,
    dtype: torch.dtype | None = None,
    bound: float = 1e-4,
) -> Row:
    """One size: time, memory, and the gradients' error of each column.

    Args:
        seconds: of interleaved rounds; None to take the memory alone.
        columns: only these, and products.
        dtype: of everything; None for float32.
        bound: of the relative error.

    Raises:
        WrongResult: a column's gradients are off; nothing was timed.
    """
    item = (dtype or torch.float32).itemsize
    gradient = item * classes * features
    room = free_bytes(device) / 2
    found: dict[str, dict[str, Any]] = {}
    steps: dict[str, Callable[[], Any]] = {}
    torch.compiler.reset()
    about = {"trunk": trunk, "B": rows, "C": classes, "D": features}
    if dtype is not None:
        about["dtype"] = str(dtype).removeprefix("torch.")
    the_trunk, head, x, y = problem(trunk, rows, classes, features, device, dtype)
    for name, step in steps_of(the_trunk, head, x, y).items():
        if name not in columns:
            continue
        needed = 2 * gradient + (0 if name.startswith("head") else OFTEN_LOGITS * item * rows * classes)
        found[name] = {}
        if needed > room:
            found[name]["note"] = f"B = {rows}, C = {classes}: left out, needs about {needed / 2**30:.0f} GiB"
            continue
        found[name]["error"] = error_of(step(), the_trunk, head, x, y)
        if not found[name]["error"] < bound:
            raise WrongResult(f"{name}: expected an error below {bound:.0e}, got {found[name]['error']:.1e} at {about}")
        found[name]["peak_bytes"] = peak_bytes(step)
        steps[name] = step
    if seconds is not None:
        steps["products"] = products(rows, head)
        for name, of in summarize(interleave(steps, seconds), "products").items():
            found.setdefault(name, {}).update(of)
    found["weight's gradient"] = {"peak_bytes": gradient}
    return {"suite": "linear-head", "case": about, "columns": found}


def picture(rows: list[Row]) -> bytes:
    """Peak memory of a step against the number of classes, of the first trunk and batch, as PNG."""
    trunk, batch = rows[0]["case"]["trunk"], rows[0]["case"]["B"]
    names = {"fused": "with logits", "head": "without logits", "weight's gradient": "the weight's gradient alone"}
    lines = {}
    for name, label in names.items():
        points = {
            row["case"]["C"]: row["columns"][name]["peak_bytes"] / 2**20
            for row in rows
            if (row["case"]["trunk"], row["case"]["B"]) == (trunk, batch)
            and row["columns"].get(name, {}).get("peak_bytes")
        }
        if points:
            lines[label] = (list(points), list(points.values()))
    figure, axes = panels(1, 1, 5.5, 3.6)
    labels = {
        "xscale": "log",
        "yscale": "log",
        "xlabel": "classes",
        "ylabel": "MiB that a step adds, gradients included",
    }
    draw_lines(axes[0, 0], lines, title=f"Batch {batch}, {rows[0]['case']['D']} features, float32", **labels)
    return png(figure)


SHARED = {"threads": None, "seconds": 10.0, "json": None, "device": "cpu"}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--classes", type=int, nargs="+", default=list(CLASSES))
    parser.add_argument("--trunks", nargs="+", default=list(TRUNKS), choices=TRUNKS)
    parser.add_argument("--columns", nargs="+", default=list(COLUMNS), choices=COLUMNS, help="and products")
    parser.add_argument("--memory-only", action="store_true", help="take no times")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw memory against classes there (PNG)")


def run(options: argparse.Namespace) -> int:
    rows: list[Row] = []
    seconds = None if options.memory_only else options.seconds
    for batch in options.batches:
        for classes in options.classes:
            for trunk in options.trunks:
                rows.append(measure(trunk, batch, classes, seconds, options.columns, options.device))
                write_json(options.json, rows, environment())
    if options.picture:
        content = picture(rows)
        write_atomically(options.picture, lambda file: file.write(content))
    print("\n".join(tables(rows)))
    return 0
