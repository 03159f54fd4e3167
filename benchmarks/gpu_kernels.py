"""The stages of gpu.py that are about the operators' kernels: long rows, all sizes, small calls in eager."""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import json
import math
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from types import MappingProxyType
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

import densreg
from densreg import ops

from . import class_counts
from .records import Row
from .timing import WrongResult, copies_past_cache, interleave, peak_bytes, summarize, synchronize

CLASSES = (131_072, 1_000_000, 1000, 4096, 21_841, 32_768, 262_144, 65_536)
"""The most telling first: what does not fit into the time is left out."""
LONG = (16_385, 21_841, 1_000_000)
"""Rows that several blocks share: just so, of an odd width, and of many parts."""
WHOLE = 16_384
"""The longest row that one block takes."""
LOGITS_BYTES = 64 << 20
"""At least so many bytes of logits: past the L2 of any GPU there is."""
DTYPES = (torch.float32, torch.bfloat16)
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
TILES = {"softmax": ((8192, 8), (8192, 4), (4096, 4)), "softmax_backward": ((4096, 4), (4096, 8), (8192, 8))}
"""Entries and warps of a part of a long row."""
LAGS: dict[str, Callable[[int, int], int]] = {
    "parts": lambda parts, multiprocessors: parts,
    "parts + 1": lambda parts, multiprocessors: parts + 1,
    "3 a multiprocessor": lambda parts, multiprocessors: max(parts, 3 * multiprocessors),
    "6 a multiprocessor": lambda parts, multiprocessors: max(parts, 6 * multiprocessors),
    "all": lambda parts, multiprocessors: 2**31 - 1,
}
"""How many of Triton's programs reduce a part of a long row before the first writes; with fewer than parts it hangs."""

Work = Iterator[tuple[str, Callable[[], Row]]]
"""The rows of a stage: the key of each, and what measures it."""


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@contextlib.contextmanager
def noted(column: dict[str, Any]) -> Iterator[None]:
    """A failure is noted, and costs no other column; but after an illegal access nothing works, and that is raised."""
    try:
        yield
    except Exception as error:
        synchronize()
        traceback.print_exc()
        column["note"] = f"failed: {type(error).__name__}: {error}".splitlines()[0][:300]


def _backends() -> list[str]:
    return class_counts.backends("cuda")[:-1]


class Inputs(NamedTuple):
    """What the operators take: logits f, softmax P, the logits' maxima and sums, a cotangent U, and U's norms."""

    f: Tensor
    p: Tensor
    statistics: Tensor
    u: Tensor
    ones: Tensor
    norm: Tensor
    peak: Tensor
    total: Tensor


def _inputs(rows: int, classes: int, dtype: torch.dtype, generator: torch.Generator, loud: bool = False) -> Inputs:
    """loud: with NaN and infinities in rows 1 to 3."""
    f, u = (torch.randn(rows, classes, device=generator.device, generator=generator).to(dtype) for _ in range(2))
    if loud:
        f[1], f[2, classes // 2 :], f[3, 5] = math.nan, -math.inf, math.inf
        u[1, 7], u[3, -1] = math.nan, -math.inf
    with densreg.backend("torch"):
        norm, peak, total = ops.pnorm(u, 2.0)
        statistics = ops.softmax(f, need_softmax=False)[3]
    return Inputs(f, torch.softmax(f, 1), statistics, u, torch.ones_like(norm), norm, peak, total)


class Operator(NamedTuple):
    """One of densreg's operators at p = 2, and what stands beside it.

    Attributes:
        moved: tensors of [B, C] that must be read or written.
        ours: densreg's call.
        formula: the same in torch, which torch.compile gets too.
        expected: some rows of the result in float64.
        result: which of several outputs that is.
        compiled: in place of the formula, where torch.compile makes more of another.
        others: further calls of torch that give the same.
    """

    moved: int
    ours: Callable[[Inputs], Any]
    formula: Callable[[Inputs], Any]
    expected: Callable[[Inputs, slice], Tensor]
    result: int = 0
    compiled: Callable[[Inputs], Any] | None = None
    others: Mapping[str, Callable[[Inputs], Any]] = MappingProxyType({})


def _softmax_reduced_once(i: Inputs) -> tuple[Tensor, Tensor]:
    m = i.f.amax(1, True)
    e = torch.exp(i.f - m)
    s = e.sum(1, True)
    return m + s.log(), e / s


def _times_difference(p: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    dot = (p * u).sum(1, keepdim=True)
    return p * (u - dot), dot


def _of_logits(i: Inputs) -> tuple[Tensor, Tensor]:
    m, s = i.statistics.unsqueeze(2)
    h, dot = _times_difference(torch.exp(i.f - m) / s, i.u)
    return h.to(i.f.dtype), dot


def _dual(i: Inputs, part: slice) -> Tensor:
    u = i.u[part].double()
    return u / u.norm(dim=1, keepdim=True)


OPERATORS = {
    "softmax": Operator(
        2,
        lambda i: ops.softmax(i.f),
        lambda i: (torch.logsumexp(i.f, 1), torch.softmax(i.f, 1)),
        lambda i, part: torch.softmax(i.f[part].double(), 1),
        result=2,
        compiled=_softmax_reduced_once,
    ),
    "softmax_backward": Operator(
        3,
        lambda i: (ops.softmax_backward(i.p, None, None, None, None, i.u),),
        lambda i: _times_difference(i.p, i.u)[0],
        lambda i, part: _times_difference(i.p[part].double(), i.u[part].double())[0],
        others={"torch's own backward": lambda i: torch._softmax_backward_data(i.u, i.p, 1, i.p.dtype)},
    ),
    "softmax_backward from logits": Operator(
        3,
        lambda i: (ops.softmax_backward(i.f, i.statistics, None, None, None, i.u),),
        lambda i: _of_logits(i)[0],
        lambda i, part: _times_difference(torch.softmax(i.f[part].double(), 1), i.u[part].double())[0],
    ),
    "softmax_double_backward from logits": Operator(
        3,
        lambda i: ops.softmax_double_backward(i.f, i.statistics, None, i.ones, None, i.u),
        _of_logits,
        lambda i, part: _times_difference(torch.softmax(i.f[part].double(), 1), i.u[part].double())[0],
    ),
    "pnorm": Operator(
        1,
        lambda i: ops.pnorm(i.u, 2.0),
        lambda i: torch.linalg.vector_norm(i.u, 2, dim=1),
        lambda i, part: i.u[part].double().norm(dim=1),
    ),
    "pnorm_backward": Operator(
        2,
        lambda i: (ops.pnorm_backward(i.ones, i.u, i.peak, i.total, 2.0),),
        lambda i: i.u / i.norm.unsqueeze(1).to(i.u.dtype),
        _dual,
    ),
}
TIMED = [name for name in OPERATORS if name != "softmax_backward from logits"]


def _check(name: str, inputs: Inputs, outputs: Any, backend: str, before: dict[str, int], dtype: torch.dtype) -> float:
    """The error of a row, relative to its largest entry, against float64, some rows at a time; and who has served it.

    A row that is not finite in float64 may not be finite here.
    """
    class_counts.require_served(name, before, class_counts.kernels(backend, name.split()[0]))
    operator, bound, worst = OPERATORS[name], BOUNDS[dtype], 0.0
    actual = outputs[operator.result]
    actual = actual.reshape(len(actual), -1)
    step = max(1, (1 << 24) // actual.shape[1])
    for first in range(0, len(actual), step):
        part = slice(first, first + step)
        mine = actual[part].double()
        right = operator.expected(inputs, part).reshape(mine.shape)
        finite = right.isfinite().all(1)
        if not torch.equal(mine.isfinite().all(1), finite):
            raise WrongResult(f"{name} by {backend}: other rows are finite than in float64")
        error = float(((mine - right).abs().amax(1) / right.abs().amax(1))[finite].max())
        if not error <= bound:
            raise WrongResult(f"{name} by {backend}: expected a relative error of at most {bound:.1e}, got {error:.1e}")
        worst = max(worst, error)
    return worst


def _graph(calls: Sequence[Callable[[], Any]]) -> Callable[[], list[Any]]:
    """The calls as one CUDA graph, which gives what they gave; on the CPU one after the other."""
    if device() == "cpu":
        return lambda: [call() for call in calls]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:  # compiles and allocates
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph, kept = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        for call in calls:
            kept.append(call())  # alive: the next call writes somewhere else

    def replay() -> list[Any]:
        graph.replay()
        return kept

    return replay


# --------------------------------------------------------------------------------------------------------------------
# right, and each time the same bits


def _in_company(call: Callable[[], Sequence[Tensor]], repeats: int) -> Iterator[Sequence[Tensor]]:
    """A call again and again while another stream has work, beside which blocks start in another order."""
    if gpu := device() == "cuda":
        side, x = torch.cuda.Stream(), torch.randn(2048, 2048, device="cuda")
        side.wait_stream(torch.cuda.current_stream())
    for _ in range(repeats):
        if gpu:
            with torch.cuda.stream(side):
                x @ x
        yield call()


def _same(name: str, first: Sequence[Tensor], again: Iterator[Sequence[Tensor]]) -> None:
    """Raise WrongResult unless the outputs are always the same, to the last bit; waits for the GPU once."""
    same = torch.ones((), dtype=torch.bool, device=first[0].device)
    for outputs in again:
        for a, b in zip(first, outputs, strict=True):
            same &= (a.flatten().view(torch.uint8) == b.flatten().view(torch.uint8)).all()
    if not same:
        raise WrongResult(f"{name}: other bits")


def right_row(name: str, backend: str, sizes: Sequence[tuple[torch.dtype, int]], entries: int, repeats: int) -> Row:
    """One operator by one backend, with NaN and infinite rows beside others."""
    columns: dict[str, dict[str, Any]] = {}
    for dtype, classes in sizes:
        column = columns[f"{classes} {dtype}".replace("torch.", "")] = {}
        with noted(column), densreg.backend(backend):
            generator = torch.Generator(device()).manual_seed(0)
            inputs = _inputs(max(5, math.ceil(entries / classes)), classes, dtype, generator, loud=True)
            call, before = functools.partial(OPERATORS[name].ours, inputs), ops.calls()
            first = call()
            column["error"] = _check(name, inputs, first, backend, before, dtype)
            _same("called again", first, (call() for _ in range(2)))
            _same("beside another stream", first, _in_company(call, repeats))
            replay = _graph([call])
            for output in replay()[0]:
                output.zero_()
            _same("replayed", first, (replay()[0] for _ in range(2)))
    return {"suite": "right", "case": {"operator": name, "backend": backend}, "columns": columns}


def _wrong(options: argparse.Namespace) -> set[str]:
    """What a :func:`right_row` has failed: keys, "softmax by cuda"."""
    rows = json.loads(options.json.read_text())["stages"].get("long_rows", {"rows": []})["rows"]
    return {row["key"] for row in rows if row["code"]}


# --------------------------------------------------------------------------------------------------------------------
# how long they take

Ours = Mapping[str, tuple[str, AbstractContextManager[Any]]]
"""Columns of densreg's: a backend, and what is to be as it is inside of a context."""


def _mover() -> Callable[..., Tensor] | None:
    """A Triton kernel that moves memory, if there is Triton.

    torch's copy_ is a cudaMemcpyAsync, which on an H200 took half as long again at some sizes.
    """
    return importlib.import_module(".yardsticks", __package__).move if "triton" in _backends() else None


def yardstick_row(size: int, seconds: float) -> Row:
    copies, move = max(2, copies_past_cache(size)), _mover()
    tensors = [[torch.randn(size // 4, device=device()) for _ in range(3)] for _ in range(copies)]
    graphs = {"copy": _graph([functools.partial(out.copy_, a) for a, _, out in tensors])}
    if move:
        a, b, out = tensors[0]
        words = [t.view(torch.int32) for t in (a, b)]
        for given, expected in (((a,), words[0]), ((a, b), words[0] + words[1])):
            if not torch.equal(move(out, *given).view(torch.int32), expected):
                raise WrongResult("what is to move memory moves something else")
        graphs["copy kernel"] = _graph([functools.partial(move, out, a) for a, _, out in tensors])
        graphs["three-tensor kernel"] = _graph([functools.partial(move, out, a, b) for a, b, out in tensors])
    times = {column: [t / copies for t in each] for column, each in interleave(graphs, seconds, ahead=True).items()}
    columns = summarize(times, "copy kernel" if move else "copy")
    for column, of in columns.items():
        of["bytes"] = (3 if column == "three-tensor kernel" else 2) * size
    return {"suite": "yardsticks", "case": {"bytes": size}, "columns": columns}


def _timed(
    suite: str, name: str, rows: int, classes: int, dtype: torch.dtype, options: argparse.Namespace, ours: Ours,
    rivals: Mapping[str, Callable[[Inputs], Any]] = MappingProxyType({}),
) -> Row:  # fmt: skip
    """One operator at one size."""
    operator, size = OPERATORS[name], rows * classes * dtype.itemsize
    copies, wrong = max(2, copies_past_cache(size)), _wrong(options) if classes > WHOLE else ()
    generator = torch.Generator(device()).manual_seed(0)
    inputs = [_inputs(rows, classes, dtype, generator) for _ in range(copies)]
    columns: dict[str, dict[str, Any]] = {}
    graphs: dict[str, Callable[[], Any]] = {}
    for column, (backend, inside) in ours.items():
        columns[column] = {}
        if ops.BACKENDS[backend].implementation(name.split()[0], device()) is None:
            columns[column]["note"] = "not implemented"
            continue
        if f"{name} by {backend}" in wrong:  # it may hang
            columns[column]["note"] = "not timed: long_rows found it wrong"
            continue
        with noted(columns[column]), densreg.backend(backend), inside:
            call, before = functools.partial(operator.ours, inputs[0]), ops.calls()
            columns[column]["error"] = _check(name, inputs[0], call(), backend, before, dtype)
            if rivals:
                columns[column]["peak_bytes"] = peak_bytes(call)
            graphs[column] = _graph([functools.partial(operator.ours, i) for i in inputs])
    for column, rival in rivals.items():
        columns[column] = {}
        with noted(columns[column]):
            graphs[column] = _graph([functools.partial(rival, i) for i in inputs])
    outputs, move, read = [torch.empty_like(i.f) for i in inputs], _mover(), 2 if operator.moved == 3 else 1
    graphs["copy"] = _graph([functools.partial(out.copy_, i.f) for out, i in zip(outputs, inputs, strict=True)])
    if move:
        graphs["yardstick"] = _graph(
            [functools.partial(move, out, *(i.f, i.u)[:read]) for out, i in zip(outputs, inputs, strict=True)]
        )
    seconds = 0.0 if options.dry_run else 0.2
    times = {column: [t / copies for t in each] for column, each in interleave(graphs, seconds, ahead=True).items()}
    moved = {"copy": 2, "yardstick": read + 1}
    for column, of in summarize(times, "yardstick" if move else "copy").items():
        columns.setdefault(column, {}).update(of, bytes=moved.get(column, operator.moved) * size)
    case = {"operator": name, "dtype": str(dtype).removeprefix("torch."), "B": rows, "C": classes}
    return {"suite": suite, "case": case, "columns": columns}


def kernel_row(name: str, rows: int, classes: int, dtype: torch.dtype, options: argparse.Namespace) -> Row:
    """By every backend, torch and torch.compile."""
    operator = OPERATORS[name]
    torch.compiler.reset()
    compiled = torch.compile(operator.compiled or operator.formula, fullgraph=True, dynamic=False)
    ours: Ours = {backend: (backend, contextlib.nullcontext()) for backend in _backends()}
    rivals = {"torch": operator.formula, "torch.compile": compiled, **operator.others}
    return _timed("kernels", name, rows, classes, dtype, options, ours, rivals)


def _with_lags() -> Ours:
    """Triton's kernels for long rows, each with another lag."""
    layout = importlib.import_module("densreg.kernels.rows")
    count = torch.cuda.get_device_properties(0).multi_processor_count if device() == "cuda" else 1
    ours: dict[str, tuple[str, AbstractContextManager[Any]]] = {"as it is": ("triton", contextlib.nullcontext())}
    for column, lag in LAGS.items():
        patch = mock.patch.object(layout, "lag_of", lambda _, parts, lag=lag: lag(parts, count))
        ours[column] = ("triton", patch)
    return ours


def _with_tiles(name: str, dtype: torch.dtype) -> Ours:
    """Triton's kernels for long rows, each with another tile."""
    layout = importlib.import_module("densreg.kernels.rows")
    table = layout.SPLIT if name == "softmax" else layout.SPLIT_PAIRS
    return {
        f"{block}/{warps}": ("triton", mock.patch.dict(table, {dtype.itemsize: layout.Tile(block, 1, warps)}))
        for block, warps in TILES[name]
    }


def eager_row(rows: int, classes: int, seconds: float) -> Row:
    """softmax and its backward called once, launches and Python included."""
    i = _inputs(rows, classes, torch.float32, torch.Generator(device()).manual_seed(0))
    calls: dict[str, Callable[[], Any]] = {"torch": functools.partial(class_counts.aten, i.f, i.u)}
    columns: dict[str, dict[str, Any]] = {"torch": {}}
    expected = _times_difference(torch.softmax(i.f.double(), 1), i.u.double())[0]
    for backend in _backends():
        columns[backend] = {}
        with noted(columns[backend]):
            call = functools.partial(class_counts.raw, i.f, i.u, ops.BACKENDS[backend].overload)
            before = ops.calls()
            error = float((call()[2] - expected).abs().max() / expected.abs().max())
            class_counts.require_served(backend, before, class_counts.kernels(backend, "softmax", "softmax_backward"))
            if not error <= BOUNDS[torch.float32]:
                raise WrongResult(f"softmax_backward by {backend}: relative error {error:.1e}")
            columns[backend]["error"] = error
            calls[backend] = call
    for column, of in summarize(interleave(calls, seconds), "torch").items():
        columns[column].update(of)
    return {"suite": "eager", "case": {"B": rows, "C": classes}, "columns": columns}


# --------------------------------------------------------------------------------------------------------------------
# the stages


def _filling(size: int, classes: int, dtype: torch.dtype) -> int:
    """Rows of at least so many bytes."""
    return math.ceil(size / (classes * dtype.itemsize))


@contextlib.contextmanager
def _short_long_rows() -> Iterator[None]:
    """Rows of more than 64 entries are long, and split into parts of 1024: small enough for Triton's interpreter."""
    layout = importlib.import_module("densreg.kernels.rows")
    part = layout.Tile(1024, 1, 1)
    with contextlib.ExitStack() as stack:
        for table, tile in (
            (layout.TILES, (part._replace(block=64),)),
            (layout.SPLIT, part),
            (layout.SPLIT_PAIRS, part),
        ):
            stack.enter_context(mock.patch.dict(table, dict.fromkeys(table, tile)))
        layout.tile_of.cache_clear()
        yield


def long_rows(options: argparse.Namespace) -> Work:
    """Yardsticks; rows that several blocks share: right before anything is timed; then lags and tiles of Triton's."""
    dry, triton = options.dry_run, "triton" in _backends()
    for size in (4096,) if dry else (LOGITS_BYTES, 67_112_000):
        yield f"yardsticks {size}", functools.partial(yardstick_row, size, 0.0 if dry else 0.5)
    widths = (1025, 1101) if dry else LONG
    sizes = [*((dtype, classes) for classes in widths for dtype in DTYPES), (torch.float16, widths[1])]
    with _short_long_rows() if dry and triton else contextlib.nullcontext():
        for name in OPERATORS:
            for backend in _backends():
                measure = functools.partial(right_row, name, backend, sizes, *((0, 1) if dry else (5_000_000, 200)))
                yield f"{name} by {backend}", measure
        for suite, lengths in (("lags", (131_072,)), ("tiles", (32_768, 1_000_000))) if triton else ():
            for classes in (9001,) if dry else lengths:
                for dtype in DTYPES:
                    for name in TILES:
                        rows = 2 if dry else _filling(LOGITS_BYTES, classes, dtype)
                        ours = _with_lags() if suite == "lags" else _with_tiles(name, dtype)
                        measure = functools.partial(_timed, suite, name, rows, classes, dtype, options, ours)
                        yield f"{suite} {name} {rows}x{classes} {dtype}", measure


def kernels(options: argparse.Namespace) -> Work:
    cases = [
        (name, _filling(LOGITS_BYTES, classes, dtype), classes, dtype)
        for classes in CLASSES
        for dtype in DTYPES
        for name in TIMED
    ]
    softmax, c = list(TILES), CLASSES[0]
    cases += [(name, _filling(4 * LOGITS_BYTES, c, dtype), c, dtype) for dtype in DTYPES for name in softmax]
    cases += [(name, rows, 32_768, torch.float32) for rows in (32, 128, 300, 1024, 4096) for name in softmax]
    if options.dry_run:
        cases = [(name, 3, 40, dtype) for dtype in DTYPES for name in TIMED]
    for name, rows, classes, dtype in cases:
        yield f"{name} {rows}x{classes} {dtype}", functools.partial(kernel_row, name, rows, classes, dtype, options)


def eager(options: argparse.Namespace) -> Work:
    for rows, classes in ((4, 10),) if options.dry_run else ((128, 10), (128, 200), (128, 1000)):
        yield f"eager {rows}x{classes}", functools.partial(eager_row, rows, classes, 0.0 if options.dry_run else 2.0)
