"""Everything worth doing on a GPU, in one command: build, tests, kernels, whole steps, epochs.

    python -m benchmarks.gpu [--stage NAME ...] [--minutes 9] [--json FILE] [--again] [--dry-run]

Stages, in order of value; each is a process of its own, so that a crash or an illegal access costs one stage:

    build      the extension with its CUDA sources, in place; a failure is said and what needs it left out
    tests      the operators' tests and tests/test_gpu.py on CUDA tensors, every backend that is there
    kernels    the operators at sizes past the L2: GB/s by the fewest bytes, as a share of a copy in the same run
    small      few rows and classes, where launches are the cost: in eager, and inside a compiled step
    steps      whole training steps: plain, the paper's paths in eager, compiled, the objective; peak memory
    epochs     epochs of `densreg train`: plain, taylor in eager, the objective
    sanitizer  compute-sanitizer over the operators' tests at their smallest, where the tool is there

The JSON file is written after every row. Rows that are there, of the same sources, GPU and versions, are not measured
again without --again, those that failed neither; what does not fit into --minutes is left for the next call. A stage
gets little more than it is expected to take until all have had their turn. Every kernel's result is checked against
float64 before it is timed, and the call counter must say that the row's backend served it. float32 is float32: TF32 is
off. The steps are compiled by processes beside the tests, so that their first call may find all in a cache. What
pytest and other programs say when they fail is in .log files beside the JSON.

How it is timed. Large calls: a CUDA graph of as many calls as it takes to go through four times the L2, each on
tensors of its own, all outputs kept; the candidates' graphs are replayed in turn, and the median over the rounds
counts. The device is kept busy until a graph is launched, so that the launch is not in it. Small calls: a loop of them
and one synchronisation, Python included, which is what a user waits for.
--dry-run goes through every stage at tiny sizes on CPU tensors, Triton's kernels in its interpreter: no figure in it
means anything.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import importlib.util
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

ROOT = Path(__file__).parent.parent
GPU_TESTS = [f"tests/test_{name}.py" for name in ("gpu", "softmax", "pnorm", "second_order")]

CLASSES = (1000, 21841, 131072, 1_000_000, 32768, 4096, 262144, 65536)
"""The most telling first: what does not fit into the time is left out."""
LOGITS_BYTES = 64 << 20
"""At least so many bytes of logits: past the L2 of any GPU there is."""
DTYPES = (torch.float32, torch.bfloat16)
SMALL = tuple((rows, classes) for rows in (128, 256) for classes in (10, 100, 200, 1000))
SMALL_STEPS = ((128, 10), (256, 1000))
"""Rows and classes of small calls in eager, and inside of a compiled step, where compiling takes most of the time."""
STEPS = {"resnet18": 256, "mlp": 1024, "vgg11_bn": 256, "wrn28-10": 64}
"""Models of benchmarks.steps and the batch on a GPU."""

Row = dict[str, Any]
Work = Iterator[tuple[str, Callable[[], Row]]]
"""The rows of a stage: the key of each, and what measures it. Where its "code" is not 0 the row has failed."""


# --------------------------------------------------------------------------------------------------------------------
# timing


def _cuda() -> bool:
    return torch.cuda.is_available()


def _device() -> torch.device:
    return torch.device("cuda" if _cuda() else "cpu")


def _synchronize() -> None:
    if _cuda():
        torch.cuda.synchronize()


def _copies(bytes_of_a_call: int) -> int:
    """How many calls on tensors of their own go through four times the L2."""
    if not _cuda():
        return 2
    return max(2, math.ceil(4 * torch.cuda.get_device_properties(0).L2_cache_size / bytes_of_a_call))


def _graph(calls: Sequence[Callable[[], Any]]) -> Callable[[], None]:
    """The calls as one CUDA graph; on the CPU one after the other."""
    if not _cuda():

        def one_after_the_other() -> None:
            for call in calls:
                call()

        return one_after_the_other
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

    def replay(graph: Any = graph, kept: list = kept) -> None:
        graph.replay()

    return replay


def _time_graphs(graphs: Mapping[str, Callable[[], None]], calls: int, rounds: int) -> dict[str, float]:
    """Median seconds of a call of each candidate, the rounds going through them in turn."""
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for round_number in range(rounds + 1):
        for name, replay in graphs.items():
            if _cuda():
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.cuda._sleep(200_000)  # 0.1 ms, by when the graph is there
                start.record()
                replay()
                end.record()
                end.synchronize()
                seconds = start.elapsed_time(end) / 1e3
            else:
                began = time.perf_counter()
                replay()
                seconds = time.perf_counter() - began
            if round_number:  # the first warms up
                times[name].append(seconds / calls)
    return {name: statistics.median(values) for name, values in times.items()}


def _time_loops(
    candidates: Mapping[str, Callable[[], Any]],
    repeats: int,
    rounds: int,
    inside: Callable[[str], contextlib.AbstractContextManager] = lambda name: contextlib.nullcontext(),
) -> dict[str, float]:
    """Median seconds of a call of each candidate, launches and Python included; entering ``inside(name)`` is not."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for name, call in candidates.items():
        with inside(name):
            for _ in range(3):
                call()
    for _ in range(rounds):
        for name, call in candidates.items():
            with inside(name):
                _synchronize()
                start = time.perf_counter()
                for _ in range(repeats):
                    call()
                _synchronize()
                times[name].append((time.perf_counter() - start) / repeats)
    return {name: statistics.median(values) for name, values in times.items()}


@contextlib.contextmanager
def _kept_apart(row: Row, name: str) -> Iterator[None]:
    """A failure is noted, and costs no other column; but after an illegal access nothing works, and that is raised."""
    try:
        yield
    except Exception as error:
        _synchronize()
        traceback.print_exc()
        row["code"] = 1
        row.setdefault("failed", {})[name] = f"{type(error).__name__}: {error}"[:500]


# --------------------------------------------------------------------------------------------------------------------
# kernels


@contextlib.contextmanager
def _served_by(backend: str, operator: str) -> Iterator[None]:
    """Force a backend, and fail where another one served the operator, or none."""
    import densreg
    from densreg import ops

    before = ops.calls()
    with densreg.backend(backend):
        yield
    served = {key for key, n in ops.calls().items() if n > before.get(key, 0)}
    if served != {f"{operator}/{backend}"}:
        raise RuntimeError(f"{operator} was to be served by {backend}; it was by {', '.join(served) or 'nothing'}")


def _backends() -> tuple[list[str], dict[str, str]]:
    """The GPU backends that are there, and why the others are not."""
    from densreg import ops

    reasons = {name: ops.unavailable_reason(name) for name in ("cuda", "triton")}
    there = [name for name, reason in reasons.items() if reason is None]
    return there, {name: reason for name, reason in reasons.items() if reason is not None}


def _check(name: str, actual: Tensor, expected: Callable[[slice], Tensor], bound: float) -> None:
    """A [B, C] or [B] result against float64, some rows at a time."""
    step = max(1, (1 << 24) // max(1, actual[0].numel()))
    for first in range(0, len(actual), step):
        part = slice(first, first + step)
        wanted = expected(part)
        error = float((actual[part].double() - wanted).abs().max() / wanted.abs().max())
        if not error <= bound:
            raise RuntimeError(f"{name}: relative error {error:.1e}, wanted at most {bound:.1e}")


def _first_order_rivals(operator: str) -> dict[str, Callable[[Tensor], Any]]:
    """What other libraries have for the first-order part of an operator; none of them has a second order."""
    rivals: dict[str, Callable[[Tensor], Any]] = {}
    if operator == "softmax" and _cuda():
        if importlib.util.find_spec("quack"):
            from quack.softmax import softmax as quack_softmax

            rivals["QuACK softmax (first order)"] = quack_softmax
        if importlib.util.find_spec("liger_kernel"):
            from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

            def liger(f: Tensor) -> Any:  # overwrites the logits with the gradient: what is read and written is alike
                return LigerCrossEntropyFunction.apply(f, torch.zeros(len(f), dtype=torch.int64, device=f.device))

            rivals["Liger cross-entropy and gradient (first order)"] = liger
    return rivals


class Inputs(NamedTuple):
    """What the operators take, on tensors of one set: logits f, softmax P, a cotangent U, and U's norms."""

    f: Tensor
    p: Tensor
    u: Tensor
    ones: Tensor
    norm: Tensor
    peak: Tensor
    total: Tensor


def _inputs(rows: int, classes: int, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    from densreg import ops

    f, u = (torch.randn(rows, classes, device=generator.device, generator=generator).to(dtype) for _ in range(2))
    with ops.backend("torch"):
        norm, peak, total = ops.pnorm(u, 2.0)
    return Inputs(f, torch.softmax(f, 1), u, torch.ones_like(norm), norm, peak, total)


class Operator(NamedTuple):
    """One of densreg's operators at p = 2, and what stands beside it.

    Attributes:
        moved: tensors of [B, C] that must be read or written.
        ours: densreg's call.
        formula: the same in torch, which torch.compile gets too.
        expected: some rows of the result in float64.
        others: further calls of torch that give the same.
    """

    moved: int
    ours: Callable[[Inputs], Tensor]
    formula: Callable[[Inputs], Any]
    expected: Callable[[Inputs, slice], Tensor]
    others: Mapping[str, Callable[[Inputs], Any]] = MappingProxyType({})


def _ours(name: str) -> Any:
    from densreg import ops

    return getattr(ops, name)


def _hessian(i: Inputs, part: slice) -> Tensor:
    p, u = i.p[part].double(), i.u[part].double()
    return p * (u - (p * u).sum(1, keepdim=True))


def _dual(i: Inputs, part: slice) -> Tensor:
    u = i.u[part].double()
    return u / u.norm(dim=1, keepdim=True)


OPERATORS = {
    "softmax": Operator(
        2,
        lambda i: _ours("softmax")(i.f)[2],
        lambda i: (torch.logsumexp(i.f, 1), torch.softmax(i.f, 1)),
        lambda i, part: torch.softmax(i.f[part].double(), 1),
    ),
    "softmax_backward": Operator(
        3,
        lambda i: _ours("softmax_backward")(i.p, None, None, None, None, i.u),
        lambda i: i.p * (i.u - (i.p * i.u).sum(1, keepdim=True)),
        _hessian,
        {"torch's own backward": lambda i: torch._softmax_backward_data(i.u, i.p, 1, i.p.dtype)},
    ),
    "pnorm": Operator(
        1,
        lambda i: _ours("pnorm")(i.u, 2.0)[0],
        lambda i: torch.linalg.vector_norm(i.u, 2, dim=1),
        lambda i, part: i.u[part].double().norm(dim=1),
    ),
    "pnorm_backward": Operator(
        2,
        lambda i: _ours("pnorm_backward")(i.ones, i.u, i.peak, i.total, 2.0),
        lambda i: i.u / i.norm.unsqueeze(1).to(i.u.dtype),
        _dual,
    ),
}


def kernel_row(name: str, rows: int, classes: int, dtype: torch.dtype, rounds: int) -> Row:
    """One operator at one size by every backend, torch, torch.compile and the rivals that are installed."""
    operator = OPERATORS[name]
    size = rows * classes * dtype.itemsize
    there, reasons = _backends()
    copies = _copies(size)
    generator = torch.Generator(_device()).manual_seed(0)
    inputs = [_inputs(rows, classes, dtype, generator) for _ in range(copies)]
    row: Row = {"operator": name, "B": rows, "C": classes, "dtype": str(dtype).split(".")[1], "missing": reasons}
    graphs: dict[str, Callable[[], None]] = {}
    for backend in there:
        with _kept_apart(row, backend), _served_by(backend, name):
            bound = {torch.float32: 2e-6, torch.bfloat16: 2**-7}[dtype]
            expected = functools.partial(operator.expected, inputs[0])
            _check(f"{name} by {backend}", operator.ours(inputs[0]), expected, bound)
            if _cuda():  # what a call takes beyond its inputs and its output
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                output = operator.ours(inputs[0])
                beyond = torch.cuda.max_memory_allocated() - before - output.numel() * output.element_size()
                row.setdefault("extra_bytes", {})[backend] = beyond
                del output
            graphs[backend] = _graph([functools.partial(operator.ours, i) for i in inputs])
    torch._dynamo.reset()
    compiled = torch.compile(operator.formula, fullgraph=True, dynamic=False)
    for column, call in {"torch": operator.formula, "torch.compile": compiled, **operator.others}.items():
        graphs[column] = _graph([functools.partial(call, i) for i in inputs])
    for rival, first_order in _first_order_rivals(name).items():
        try:
            graphs[rival] = _graph([functools.partial(first_order, i.f.clone()) for i in inputs])
        except Exception as error:  # other people's code: it may not like the shape, or the graph
            row["missing"][rival] = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
    graphs["copy"] = _graph([functools.partial(torch.empty_like(i.f).copy_, i.f) for i in inputs])
    seconds = _time_graphs(graphs, copies, rounds)
    rates = {column: operator.moved * size / t for column, t in seconds.items()}
    rates["copy"] = 2 * size / seconds["copy"]
    return {
        **row,
        "calls_in_a_graph": copies,
        "seconds": seconds,
        "bytes_per_second": rates,
        "share_of_copy": {column: rate / rates["copy"] for column, rate in rates.items()},
    }


def kernels(options: argparse.Namespace) -> Work:
    for classes in (40,) if options.dry_run else CLASSES:
        for dtype in DTYPES:
            for name in OPERATORS:
                rows = 3 if options.dry_run else math.ceil(LOGITS_BYTES / (classes * dtype.itemsize))
                rounds = 2 if options.dry_run else 20
                measure = functools.partial(kernel_row, name, rows, classes, dtype, rounds)
                yield f"{name} {rows}x{classes} {dtype}", measure


# --------------------------------------------------------------------------------------------------------------------
# small calls


def small_row(rows: int, classes: int, repeats: int, rounds: int) -> Row:
    """Forward and double backward at the logits through the public API, in eager, where launches are the cost."""
    import densreg
    from benchmarks import class_counts

    torch.manual_seed(0)
    device = _device()
    there, reasons = _backends()
    f = torch.randn(rows, classes, device=device, requires_grad=True)
    u, k = torch.randn_like(f), torch.randint(classes, (rows, 1), device=device)

    candidates: dict[str, Callable[[], Any]] = {backend: lambda: class_counts.api(f, u) for backend in there}
    candidates["taylor"] = lambda: class_counts.taylor(f, k, u)

    def eager() -> Any:
        (p,) = torch.autograd.grad(torch.logsumexp(f, 1).sum(), f, create_graph=True)
        return torch.autograd.grad(p, f, u)

    candidates["torch"] = eager
    candidates["floor"] = lambda: class_counts.floor(f, u)
    row: Row = {"kind": "eager", "B": rows, "C": classes, "missing": reasons}

    def inside(name: str) -> contextlib.AbstractContextManager:
        return densreg.backend(name) if name in there else contextlib.nullcontext()

    return {**row, "seconds": _time_loops(candidates, repeats, rounds, inside)}


def small_step_row(rows: int, classes: int, repeats: int, rounds: int) -> Row:
    """The penalized step of an MLP, compiled: with taylor, with the objective, and that in CUDA graphs."""
    import densreg
    from benchmarks import steps
    from densreg.lab import models

    torch.manual_seed(0)
    torch._dynamo.reset()
    device = _device()
    x = torch.rand(rows, 1, 28, 28, device=device)
    y = torch.randint(classes, (rows,), device=device)
    model = models.build("mlp", classes, (1, 28, 28)).to(device)
    graphs = densreg.RegularizedObjective(model, steps.COEFF, mode="reduce-overhead")

    def in_graphs() -> None:
        graphs(x, y).loss.backward()
        for w in model.parameters():
            w.grad = None

    candidates = {name: steps.step_of(name, model, x, y) for name in ("plain", "taylor compiled", "objective")}
    candidates["objective, reduce-overhead"] = in_graphs  # type: ignore[assignment]
    return {"kind": "step", "B": rows, "C": classes, "seconds": _time_loops(candidates, repeats, rounds)}


def small(options: argparse.Namespace) -> Work:
    repeats, rounds = (1, 1) if options.dry_run else (100, 15)
    for kind, measure, sizes in (("eager", small_row, SMALL), ("step", small_step_row, SMALL_STEPS)):
        for rows, classes in ((4, 10),) if options.dry_run else sizes:
            yield f"{kind} {rows}x{classes}", functools.partial(measure, rows, classes, repeats, rounds)


# --------------------------------------------------------------------------------------------------------------------
# whole steps, epochs


COMPILED = ("objective", "taylor compiled", "plain")
"""Columns of the steps that are compiled, those that take longest first."""


def _problem(name: str, batch: int) -> tuple[torch.nn.Module, Tensor, Tensor]:
    """Model, images and labels of one of benchmarks.steps' cases, on the device."""
    from benchmarks import steps

    model, x, y = steps._problem(steps.CASES[name]._replace(batch=batch))
    return model.to(_device()), x.to(_device()), y.to(_device())


def warm(name: str, column: str, dry_run: bool = False) -> None:
    """The first call of a compiled step: what it takes to compile is then in inductor's cache on disk."""
    from benchmarks import steps

    torch.backends.cudnn.allow_tf32 = False  # as in the stage
    model, x, y = _problem(name, 8 if dry_run else STEPS[name])
    with torch.autocast(_device().type, torch.bfloat16, enabled=not dry_run):
        steps.step_of(column, model, x, y)()


def _kill(process: subprocess.Popen) -> None:
    """End a process that leads a session, and all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


@contextlib.contextmanager
def _warmers(patience: float) -> Iterator[None]:
    """Processes that compile the steps in bfloat16 meanwhile, for up to ``patience`` seconds.

    One after the other, as the stage itself would have it, that takes minutes.
    """
    until = time.monotonic() + patience
    environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "2"}
    pairs = [(name, column) for name in STEPS for column in COMPILED][: max(1, (os.cpu_count() or 1) // 2)]
    processes = []
    try:
        for pair in pairs:
            command = [sys.executable, "-m", "benchmarks.gpu", "--warm", *pair]
            quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **quiet))
        yield
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, until - time.monotonic()))
    finally:
        for process in processes:
            if process.poll() is None:
                _kill(process)
                process.wait()


def step_row(name: str, batch: int, amp: torch.dtype | None, columns: Sequence[str], rounds: int) -> Row:
    """Steps of one model: seconds, over plain, gradients' error (float32), peak memory beyond what was there."""
    import copy

    from benchmarks import steps

    model, x, y = _problem(name, batch)
    row: Row = {"model": name, "batch": batch, "amp": None if amp is None else str(amp).split(".")[1]}
    apart = steps.references(model, x, y) if amp is None and batch <= 256 else None
    candidates, errors, memory, first = {}, {}, {}, {}
    for column in columns:
        step = steps.step_of(column, copy.deepcopy(model), x, y)

        def under_amp(step: Callable[[], Any] = step) -> Any:
            with torch.autocast(_device().type, amp, enabled=amp is not None):
                return step()

        with _kept_apart(row, column):  # a wrong step is not timed
            start = time.perf_counter()
            grads = under_amp()
            _synchronize()
            first[column] = time.perf_counter() - start
            if apart is not None:
                errors[column] = steps.require(column, grads, apart)
            del grads
            if _cuda():
                under_amp()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                under_amp()
                memory[column] = torch.cuda.max_memory_allocated() - before
            candidates[column] = under_amp
    seconds = _time_loops(candidates, 1, rounds)
    over = {column: t / seconds["plain"] for column, t in seconds.items()}
    row |= {"seconds": seconds, "over_plain": over, "memory": memory, "gradient_error": errors, "first_call": first}
    return {**row, "floors": steps.floors(steps.CASES[name]._replace(batch=batch))}


def steps(options: argparse.Namespace) -> Work:
    from benchmarks import steps as module

    # Compiling takes most of the time: what differs from the objective by an option is left to benchmarks.steps.
    columns = [c for c in module.COLUMNS if c not in ("directional", "fraction 0.25")]
    models, rounds = (STEPS, 15)
    if options.dry_run:
        columns, models, rounds = ["plain", "taylor", "objective"], {"mlp": 8}, 1
    for amp in (torch.bfloat16, None):
        for name, batch in models.items():
            yield f"{name} {batch} {amp}", functools.partial(step_row, name, batch, amp, columns, rounds)


def epoch_row(name: str, changes: Row, options: argparse.Namespace) -> Row:
    """The second of two epochs of `densreg train`, whose first one compiles; data loading by two workers included."""
    from densreg.lab import training

    data: dict[str, Any] = {"data": "synthetic", "classes": 100, "image_size": 32}
    if options.data_dir:
        data = {"data": "cifar100", "data_dir": options.data_dir}
    amp, model = ("none", "mlp") if options.dry_run else ("bf16", "resnet18")
    size = 64 if options.dry_run else 25_600
    batch = 32 if options.dry_run else 256
    settings = {"compile": not options.dry_run, "amp": amp, "workers": 0 if options.dry_run else 2, **changes}
    with tempfile.TemporaryDirectory() as out:
        config = training.Config(
            out=out,
            model=model,
            epochs=2,
            train_size=size,
            test_size=batch,
            batch_size=batch,
            channels_last=True,
            device=_device().type,
            **{**data, **settings},
        )
        rows = training.fit(config, progress=False)
    return {"name": name, "data": data["data"], "model": model, "images": size, "seconds": rows[-1]["seconds"]}


def epochs(options: argparse.Namespace) -> Work:
    runs: dict[str, Row] = {
        "plain": {"coeff": 0.0},
        "taylor in eager": {"path": "taylor", "compile": False},
        "objective": {},
        "objective, interval 4": {"interval": 4},
    }
    for name, changes in runs.items():
        yield name, functools.partial(epoch_row, name, changes, options)


# --------------------------------------------------------------------------------------------------------------------
# build, tests, sanitizer


def _run(command: Sequence[str], log: Path, **environment: str) -> tuple[int, list[str]]:
    """Exit code and lines of standard output; where it fails, all that was said is in the log."""
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        log.write_text(f"{' '.join(command)}\n{done.stdout}\n--- standard error\n{done.stderr}")
    return done.returncode, done.stdout.strip().splitlines()


def _log(options: argparse.Namespace, name: str) -> Path:
    return options.json.with_name(f"{options.json.stem}-{name}.log")


def install(options: argparse.Namespace) -> Row:
    start = time.perf_counter()
    row: Row = {"what": "install"}
    if options.dry_run:
        row["code"], _ = _run([sys.executable, "-m", "densreg", "info"], _log(options, "info"))
    else:
        command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "-e", "."]
        for cuda in ("require", "skip"):  # without the CUDA sources Triton can still be measured
            log = _log(options, f"install-{cuda}")
            row[f"CUDA {cuda}"], _ = _run(command, log, DENSREG_EXTENSION="require", DENSREG_CUDA=cuda)
            if not row[f"CUDA {cuda}"]:
                break
        row["code"] = row["CUDA require"]
    return {**row, "seconds": time.perf_counter() - start}


def build(options: argparse.Namespace) -> Work:
    yield "install", functools.partial(install, options)


def test_row(path: str, options: argparse.Namespace) -> Row:
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", path]
    if options.dry_run:
        command += ["-k", "test_strides_and_empty or test_empty"]
    elif importlib.util.find_spec("xdist"):  # most of the time is Triton's compiler's
        command += ["-n", str(min(12, os.cpu_count() or 1)), "--dist", "worksteal"]
    start = time.perf_counter()
    code, said = _run(command, _log(options, Path(path).stem), DENSREG_TEST_DEVICE=_device().type)
    return {
        "file": path,
        "code": 0 if options.dry_run and code == 5 else code,  # none chosen
        "seconds": time.perf_counter() - start,
        "summary": said[-1] if said else "",
        "failing": [line for line in said if line.startswith(("FAILED", "ERROR"))],
    }


def tests(options: argparse.Namespace) -> Work:
    for path in GPU_TESTS:
        yield path, functools.partial(test_row, path, options)


def sanitizer_row(tool: str, check: str, options: argparse.Namespace) -> Row:
    chosen = "test_strides_and_empty or test_extreme_rows or test_memory_formats or test_every_small_size"
    command = [tool, "--tool", check, "--error-exitcode", "9", sys.executable, "-m", "pytest", "-q", "-x"]
    command += ["-k", f"({chosen}) and not compile", *GPU_TESTS[1:4]]
    start = time.perf_counter()
    log = _log(options, check)
    code, said = _run(command, log, DENSREG_TEST_DEVICE="cuda", PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    return {"what": check, "code": code, "seconds": time.perf_counter() - start, "said": said[-3:]}


def sanitizer(options: argparse.Namespace) -> Work:
    tool = shutil.which("compute-sanitizer")
    if tool is None or not _cuda():
        yield "none", lambda: {"what": "compute-sanitizer", "missing": "no GPU" if tool else "not on the PATH"}
        return
    for check in ("memcheck", "racecheck"):
        yield check, functools.partial(sanitizer_row, tool, check, options)


STAGES: dict[str, tuple[Callable[[argparse.Namespace], Work], int]] = {
    "build": (build, 120),
    "tests": (tests, 180),
    "kernels": (kernels, 150),
    "small": (small, 120),
    "steps": (steps, 300),
    "epochs": (epochs, 150),
    "sanitizer": (sanitizer, 150),
}
"""Each stage and the seconds it is expected to take, an estimate."""


# --------------------------------------------------------------------------------------------------------------------
# the command


def _sources() -> str:
    """A digest of what is measured: a commit would change with the committed results."""
    digest = hashlib.sha256()
    for pattern in ("csrc/**/*", "kernels/*.py", "densreg/**/*.py", "benchmarks/*.py", "tests/*.py", "setup.py"):
        for path in sorted(ROOT.glob(pattern)):
            if path.is_file():
                digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _about() -> Row:
    from benchmarks.timing import environment

    about = {**environment(), "sources": _sources()}
    if _cuda():
        properties = torch.cuda.get_device_properties(0)
        about |= {"gpu": properties.name, "capability": f"{properties.major}.{properties.minor}"}
        about |= {"multiprocessors": properties.multi_processor_count, "L2_bytes": properties.L2_cache_size}
        about["cuda"] = torch.version.cuda
    with contextlib.suppress(ImportError):
        import triton

        about["triton"] = triton.__version__
    return about


def _built(options: argparse.Namespace) -> bool:
    """Whether what an earlier call has built is on this machine."""
    from densreg import ops

    there = importlib.util.find_spec("densreg.kernels") is not None and ops.unavailable_reason("cuda") is None
    return options.dry_run or there


def _write(path: Path, result: Row) -> None:
    from densreg.lab.runs import write_atomically

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write(json.dumps(result, indent=1).encode() + b"\n"))


def _work(stage: str, options: argparse.Namespace) -> None:
    """The rows of a stage that are not in the file yet, one after the other."""
    torch.backends.cudnn.allow_tf32 = False
    have = {row["key"] for row in json.loads(options.json.read_text())["stages"][stage]["rows"]}
    for key, measure in STAGES[stage][0](options):
        if key in have:
            continue
        print(json.dumps({"begun": key}), flush=True)
        row: Row = {"key": key, "code": 0}
        with _kept_apart(row, key):
            row |= measure()
        print(json.dumps({"row": row}), flush=True)


def _run_stage(name: str, options: argparse.Namespace, seconds: float, keep: Callable[[Row], None]) -> str:
    """Run a stage in a process of its own, keeping each row as it comes; how it ended."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--worker", name, "--json", str(options.json)]
    command += ["--dry-run"] if options.dry_run else []
    command += ["--data-dir", options.data_dir] if options.data_dir else []
    environment = {**os.environ, **({"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""} if options.dry_run else {})}
    # A session of its own, so that what the stage has started ends with it.
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment, start_new_session=True
    )
    assert process.stdout is not None
    late = threading.Event()

    def out_of_time() -> None:
        late.set()
        _kill(process)

    watchdog = threading.Timer(seconds, out_of_time)
    watchdog.start()
    begun, rows = None, 0
    try:
        for line in process.stdout:
            if line.startswith('{"row": '):
                keep(json.loads(line)["row"])
                begun, rows = None, rows + 1
            elif line.startswith('{"begun": '):
                begun = json.loads(line)["begun"]
            else:
                print(line, end="", flush=True)
        code = process.wait()
    finally:
        watchdog.cancel()
        _kill(process)
    if code == 0:
        return "whole"
    ended = "out of time" if late.is_set() else f"exit code {code}"
    if begun is not None and (not late.is_set() or (not rows and seconds >= STAGES[name][1])):
        # What kills the stage, or hangs, is not tried again, so that the rows after it have their turn.
        keep({"key": begun, "code": 1, "failed": {begun: ended}})
    return ended


def _table(result: Row) -> Iterator[str]:
    """What was measured, as Markdown."""

    def rows_of(stage: str, column: str = "seconds") -> list[Row]:
        return [row for row in result["stages"].get(stage, {}).get("rows", []) if column in row]

    for row in rows_of("tests", "summary"):
        yield f"{row['file']}: {row['summary']}"
    kernel_rows = rows_of("kernels")
    if kernel_rows:
        names = list(dict.fromkeys(name for row in kernel_rows for name in row["seconds"]))
        yield "\nGB/s by the fewest bytes (share of the copy)\n"
        yield "| operator | dtype | B | C | " + " | ".join(names) + " |"
        yield "| --- " * (4 + len(names)) + "|"
        order = list(OPERATORS)
        for row in sorted(kernel_rows, key=lambda row: (order.index(row["operator"]), row["dtype"], row["C"])):
            cells = [
                f"{row['bytes_per_second'][n] / 1e9:.0f} ({row['share_of_copy'][n]:.2f})"
                if n in row["seconds"]
                else "-"
                for n in names
            ]
            yield f"| {row['operator']} | {row['dtype']} | {row['B']} | {row['C']} | " + " | ".join(cells) + " |"
    for kind in ("eager", "step"):
        rows = [row for row in rows_of("small") if row["kind"] == kind]
        if rows:
            names = list(rows[0]["seconds"])
            yield f"\nmicroseconds, small, {kind}\n"
            yield "| B | C | " + " | ".join(names) + " |"
            yield "| --- " * (2 + len(names)) + "|"
            for row in rows:
                times = [f"{row['seconds'][n] * 1e6:.1f}" for n in names]
                yield f"| {row['B']} | {row['C']} | " + " | ".join(times) + " |"
    for row in rows_of("steps"):
        floor = f"matrix products alone: {row['floors']['operations']:.2f}, by their bytes {row['floors']['bytes']:.2f}"
        yield f"\n{row['model']}, batch {row['batch']}, {row['amp'] or 'float32'}; over plain, {floor}\n"
        yield "| step | ms | over plain | MiB | gradient's error |"
        yield "| --- | --- | --- | --- | --- |"
        for column, seconds in row["seconds"].items():
            memory = f"{row['memory'][column] / 2**20:.0f}" if column in row["memory"] else "-"
            error = row["gradient_error"].get(column)
            error = "-" if error is None else f"{error:.1e}"
            yield f"| {column} | {seconds * 1e3:.2f} | {row['over_plain'][column]:.2f} | {memory} | {error} |"
    for row in rows_of("epochs"):
        yield f"epoch, {row['model']}, {row['data']}, {row['images']} images, {row['name']}: {row['seconds']:.2f} s"
    for name, stage in result["stages"].items():
        for row in stage["rows"]:
            for column, why in row.get("failed", {}).items():
                yield f"{name}, {row['key']}, {column}: {why}"
        yield f"{name}: {stage['ended']}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", nargs="+", choices=STAGES, help="only these, in this order; by default all")
    parser.add_argument("--minutes", type=float, default=9.0, help="for this call")
    parser.add_argument("--json", type=Path, help="by default benchmarks/results/GPU/gpu.json")
    parser.add_argument("--again", action="store_true", help="measure rows that are in the file again")
    parser.add_argument("--data-dir", help="folder of CIFAR-100 for the epochs; by default noise of its shape")
    parser.add_argument("--dry-run", action="store_true", help="every code path at tiny sizes, on the CPU")
    parser.add_argument("--worker", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--warm", nargs=2, metavar=("MODEL", "COLUMN"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        _work(options.worker, options)
        return 0
    if options.warm:
        name, column = options.warm
        warm(name, column, options.dry_run)
        return 0
    if not options.dry_run and not _cuda():
        raise SystemExit("there is no GPU: --dry-run goes through the code on the CPU")
    end = time.monotonic() + 60 * options.minutes
    about = _about()
    name = "dry-run" if options.dry_run else "-".join(about["gpu"].lower().split())
    path = options.json = (options.json or ROOT / "benchmarks" / "results" / name / "gpu.json").absolute()
    result: Row = {"environment": about, "stages": {}}
    if path.exists():
        old = json.loads(path.read_text())
        if all(old["environment"].get(key) == about.get(key) for key in ("sources", "gpu", "torch", "triton")):
            result["stages"] = old["stages"]
    wanted = options.stage or list(STAGES)
    for stage in wanted:
        if options.again or stage not in result["stages"] or (stage == "build" and not _built(options)):
            result["stages"][stage] = {"ended": "not begun", "rows": []}
    _write(path, result)
    for capped in (True, False):  # every stage has its turn before one takes what is left
        for stage in wanted:
            kept = result["stages"][stage]
            if kept["ended"] in ("whole", "failed"):
                continue
            left, expected = end - time.monotonic(), STAGES[stage][1]
            if left < (1 if options.dry_run else 30):
                continue
            print(f"{stage} ...", flush=True)

            def keep(row: Row, rows: list[Row] = kept["rows"]) -> None:
                rows.append(row)
                _write(path, result)

            # Beside the tests, which are not timed, the steps are compiled.
            to_come = stage == "tests" and "steps" in wanted and result["stages"]["steps"]["ended"] == "not begun"
            with _warmers(left / 2) if to_come and not options.dry_run else contextlib.nullcontext():
                kept["ended"] = _run_stage(stage, options, min(left, 1.5 * expected) if capped else left, keep)
            if kept["ended"] == "whole" and any(row["code"] for row in kept["rows"]):
                kept["ended"] = "failed"
            _write(path, result)
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    for line in _table(result):
        print(line)
    bad = [s for s, stage in result["stages"].items() if stage["ended"] not in ("whole", "out of time", "not begun")]
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
