"""The Triton kernels, compiled ahead of time without a GPU: registers, spills, vector loads, instructions an entry.

    python -m benchmarks triton-aot [--targets 80 90 100] [--dtypes float32 ...] [--all-tiles] [--json FILE]

The launchers of kernels/ run on meta tensors; what they would launch is recorded, compiled for each target as it is
(block, warps, alignment, arguments), and what ptxas says of it is read. By default each dtype's smallest, middle and
largest tile (float16: the largest), an odd width in the largest, and the split rows; with --all-tiles all of them.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, mangle_type

from densreg.lab.report import markdown_table

from .records import write_json
from .timing import environment

kernels: Any = importlib.import_module("densreg.kernels")  # whose folder is another

TARGETS = (80, 90, 100)
DTYPES = ("float16", "bfloat16", "float32", "float64")


class Launch(NamedTuple):
    """A kernel as it would be launched: all that its compilation depends on."""

    module: str
    kernel: str
    dtype: str
    case: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]
    options: tuple[tuple[str, Any], ...]

    def constant(self, name: str, default: Any = None) -> Any:
        return dict(self.constants).get(name, default)


@contextlib.contextmanager
def recorded(dtype: str, case: str) -> Iterator[dict[tuple[Any, ...], Launch]]:
    """Collects the launches inside, which do not run."""
    launches: dict[tuple[Any, ...], Launch] = {}
    real = JITFunction.run

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        signature, constants, aligned = [], [], []
        values = dict(zip(self.arg_names, args, strict=False))
        values |= {name: options.pop(name) for name in self.arg_names if name in options}
        for index, param in enumerate(self.params):
            value = values[param.name]
            if param.is_constexpr or value is None:
                signature.append((param.name, "constexpr"))
                constants.append((param.name, value))
            elif isinstance(value, Tensor):
                signature.append((param.name, mangle_type(value)))
                aligned.append(index)  # as whatever the allocator hands out
            else:
                signature.append((param.name, param.annotation_type or mangle_type(value)))
        options["debug"] = bool(self.debug)
        launch = Launch(
            self.fn.__module__,
            self.fn.__name__,
            dtype,
            case,
            tuple(signature),
            tuple(constants),
            tuple(aligned),
            tuple(sorted(options.items())),
        )
        launches.setdefault((launch.kernel, *launch[4:]), launch)

    JITFunction.run = record
    try:
        yield launches
    finally:
        JITFunction.run = real


def launches(dtype: str, all_tiles: bool = False) -> list[Launch]:
    """What the launchers launch for one dtype: every kernel, on the tiles asked for and split."""
    kind: torch.dtype = getattr(torch, dtype)
    blocks = [tile.block for tile in kernels.rows.TILES[kind.itemsize]]
    # Half precision differs from bfloat16 in conversions only.
    sizes = blocks if all_tiles else [blocks[-1]] if dtype == "float16" else [blocks[0], 1000, blocks[-1]]
    found: dict[tuple[Any, ...], Launch] = {}

    def logits(rows: int, classes: int, source_is_softmax: bool = False) -> None:
        f = torch.empty(rows, classes, dtype=kind, device="meta")
        y = torch.empty(rows, dtype=torch.int64, device="meta")
        with recorded(dtype, f"C={classes}" + (", from P" if source_is_softmax else "")) as new:
            density, ce, p, statistics = kernels.softmax(f, y, 0.1, -100, True, 1.0)
            if source_is_softmax:
                new.clear()
                statistics = None
            kernels.softmax_backward(f, statistics, y, density, ce, p, 0.1, -100, 1.0)
            kernels.softmax_double_backward(f, statistics, y, density, ce, p, -100)
        found.update({key: launch for key, launch in new.items() if key not in found})

    def rows_of(rows: int, length: int, p: float) -> None:
        g = torch.empty(rows, length, dtype=kind, device="meta")
        with recorded(dtype, f"n={length}, p={p:g}") as new:
            norm, peak, total = kernels.pnorm(g, p)
            kernels.pnorm_backward(norm, g, peak, total, p)
        found.update({key: launch for key, launch in new.items() if key not in found})

    def bare(rows: int, classes: int) -> None:
        """What is compiled where labels, P or U are not there."""
        f, statistics, l = (torch.empty(n, dtype=kind, device="meta") for n in ((rows, classes), (2, rows), rows))
        with recorded(dtype, f"C={classes}, bare") as new:
            kernels.softmax(f, None, 0.0, -100, False, 1.0)
            kernels.softmax_backward(f, statistics, None, l, None, None, 0.0, -100, 1.0)
        found.update({key: launch for key, launch in new.items() if key not in found})

    for size in sizes:
        logits(128, size)
        rows_of(128, size, 2.0)
    logits(128, sizes[-1], source_is_softmax=True)
    bare(128, sizes[-1])
    bare(8, 50_257)
    odd = sizes[-1] - 383  # whole rows cut at 16 bytes, in the kernels that do so
    logits(128, odd, source_is_softmax=True)
    rows_of(128, odd, 2.0)
    for long in (1_000_000, 50_257):  # of an odd width, cut at 16 bytes
        logits(8, long)
        rows_of(8, long, 1.5)
        rows_of(8, long, 2.0)
    rows_of(128, 8192, 1.5)
    if dtype == "float32" or all_tiles:
        for p in (1.0, float("inf")):
            rows_of(128, sizes[-1], p)
    return list(found.values())


class Row(NamedTuple):
    """What ptxas says of one launch on one target."""

    kernel: str
    dtype: str
    case: str
    block: int
    rows: int
    warps: int
    target: int
    registers: int
    stack: int  # bytes a thread
    spills: int  # bytes stored and loaded
    shared: int  # bytes a program
    shared_stores: int  # of a thread, as written: a change of layout costs many, a reduction a few
    vectors: bool  # loads of 16 bytes
    vectors_expected: bool
    instructions: float  # of SASS for each entry: all of the kernel's, by the entries of a thread


def compile_for(job: tuple[Launch, int]) -> Row:
    launch, target = job
    # Not the package's attribute: kernels.softmax is the function.
    kernel = getattr(__import__(launch.module, fromlist=[launch.kernel]), launch.kernel)
    options = dict(launch.options)
    source = ASTSource(
        kernel,
        dict(launch.signature),
        constexprs={(kernel.arg_names.index(name),): value for name, value in launch.constants},
        attrs={(index,): [["tt.divisibility", 16]] for index in launch.aligned},
    )
    said = io.StringIO()
    with (
        tempfile.TemporaryDirectory() as folder,
        knobs.cache.scope(),
        knobs.nvidia.scope(),
        contextlib.redirect_stdout(said),
    ):
        knobs.cache.dir = folder
        knobs.nvidia.dump_ptxas_log = True  # Triton runs ptxas -v
        compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    report, ptx = said.getvalue(), compiled.asm["ptx"]
    if re.search(r"ld\.volatile\S*\.v[24]", ptx):
        raise RuntimeError(f"{launch.kernel}: expected a thread to wait for one number, got a vector of them")

    def number(pattern: str) -> int:
        found = re.findall(pattern, report)
        if not found:
            raise RuntimeError(f"expected {pattern!r} in the report of ptxas, got:\n{report}")
        return max(map(int, found))

    block, rows, warps = launch.constant("BLOCK"), launch.constant("ROWS", 1), options["num_warps"]
    itemsize, entries = getattr(torch, launch.dtype).itemsize, block * rows / (32 * warps)
    return Row(
        launch.kernel,
        launch.dtype,
        launch.case,
        block,
        rows,
        warps,
        target,
        number(r"Used (\d+) registers"),
        number(r"(\d+) bytes stack frame"),
        number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
        compiled.metadata.shared,
        len(re.findall(r"\bst(?:\.shared|matrix)", ptx)),
        bool(re.search(r"ld\.global\S*\.(v4\.[buf]32|v2\.[buf]64)", ptx)),
        max(launch.constant("ALIGN"), launch.constant("LANES", 1)) * itemsize >= 16 and entries * itemsize >= 16,
        round(_instructions(compiled.asm["cubin"]) / entries, 1),
    )


def _instructions(cubin: bytes) -> int:
    """How many instructions a GPU gets, by the disassembler that Triton brings."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = subprocess.run([knobs.nvidia.nvdisasm.path, "-c", file.name], capture_output=True, text=True)
    listing.check_returncode()
    return len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", listing.stdout, re.MULTILINE))


def report(dtypes: tuple[str, ...] = DTYPES, targets: tuple[int, ...] = TARGETS, all_tiles: bool = False) -> list[Row]:
    """Compiles on all cores."""
    if kernels.INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET is set: interpreted kernels cannot be compiled")
    jobs = [(launch, target) for dtype in dtypes for launch in launches(dtype, all_tiles) for target in targets]
    processes = len(os.sched_getaffinity(0))
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        return pool.map(compile_for, jobs, chunksize=4)


SHARED = {"json": None}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--targets", type=int, nargs="+", default=TARGETS, metavar="SM")
    parser.add_argument("--dtypes", nargs="+", default=DTYPES, choices=DTYPES)
    parser.add_argument("--all-tiles", action="store_true")


def run(options: argparse.Namespace) -> int:
    rows = report(tuple(options.dtypes), tuple(options.targets), options.all_tiles)
    print(f"Triton {triton.__version__}\n")
    print(markdown_table([Row._fields, *rows]))
    write_json(options.json, [row._asdict() for row in rows], environment())
    return 0
