"""Everything worth doing on a GPU, in one command: build, tests, kernels, whole steps, epochs, trainings.

    python -m benchmarks gpu [--stage NAME ...] [--minutes 9] [--json FILE] [--again] [--dry-run]

Stages, in order of value, and the seconds that each is expected to take; each is a process of its own, so that a crash
or an illegal access costs one row:

    build      120  the extension with its CUDA sources, in place; where that fails, without them
    long_rows  200  how fast memory can be moved; every operator on rows that several blocks share, by every backend:
                    against float64, with NaN and infinities, and the same bits again, beside another stream, and
                    replayed; then Triton's kernels for them with other lags and other tiles
    kernels    210  the operators at sizes past the L2, long rows first, by every backend, torch and torch.compile
    eager       30  small calls of softmax and its backward, launches included
    tests      180  the operators' tests and tests/test_gpu.py on CUDA tensors, every backend that is there
    paths      120  the paths at the logits and through a linear head, for 10 to 1,000,000 classes (class_counts.py)
    heads      120  steps through a linear head of 100,000 and 1,000,000 classes, with logits and without
    steps      300  whole training steps: plain, the paper's paths in eager, compiled, the objective (steps.py)
    epochs     150  an epoch of CIFAR-100 by every path, 12,800 images timed (test_epoch.py)
    training   150  short trainings by `densreg train`: plain and the objective
    small       90  the compiled step of an MLP, where launches are the cost, and in CUDA graphs
    sanitizer  150  compute-sanitizer over the operators' tests at their smallest, where the tool is there

The second to the fourth, of gpu_kernels.py, give a row a minute: a kernel that hangs costs no more. One that long_rows
finds wrong is not timed on such rows.

The JSON file is written after every row. Rows that are there, of the same sources, GPU and versions, are not measured
again without --again, those that failed neither; what does not fit into --minutes is left for the next call. A stage
gets little more than it is expected to take until all have had their turn. What is timed is compared with float64
first, and the call counter must say that the backend in a column's name served it. float32 is float32: TF32 is off. The
steps are compiled by processes beside the tests, so that their first call may find all in a cache. What pytest and
other programs say when they fail is in .log files beside the JSON. `report --from FILE.json` makes a CSV of the JSON.

The kernels are timed in CUDA graphs of a few calls, each on tensors of its own, all outputs kept, so that neither
launches nor the L2 count; ratios are to a Triton kernel that only moves memory. --dry-run goes through every stage at
tiny sizes on CPU tensors, Triton's kernels in its interpreter: no figure in it means anything.
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
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import densreg
from densreg.lab import training
from densreg.lab.runs import write_json

from . import class_counts, gpu_kernels, linear_head, steps, test_epoch
from .gpu_kernels import Work, device, noted
from .records import Row, tables
from .timing import environment

ROOT = Path(__file__).parent.parent
GPU_TESTS = [f"tests/test_{name}.py" for name in ("gpu", "softmax", "pnorm", "second_order")]

STEPS = {"resnet18": 256, "mlp": 1024, "vgg11_bn": 256, "wrn28-10": 64}
"""Models of steps.py and the batch on a GPU."""
COMPILED = ("objective", "taylor compiled", "plain")
"""Columns of the steps that are compiled, those that take longest first."""

FAILED = ("failed", "not timed")
"""How the note of a column begins that makes its row a failed one."""


# --------------------------------------------------------------------------------------------------------------------
# paths, whole steps, epochs, trainings


def paths(options: argparse.Namespace) -> Work:
    seconds = 0.0 if options.dry_run else 1.0
    for rows, classes in ((4, 10),) if options.dry_run else class_counts.SHAPES:
        logits = functools.partial(class_counts.measure, rows, classes, seconds, True, True, device())
        yield f"logits {rows}x{classes}", logits
        yield (
            f"head {rows}x{classes}",
            functools.partial(class_counts.measure_head, rows, classes, seconds, True, device()),
        )


def heads(options: argparse.Namespace) -> Work:
    seconds = 0.0 if options.dry_run else 2.0
    for rows, classes, features in (
        ((4, 40, 8),) if options.dry_run else ((1024, 100_000, 512), (1024, 1_000_000, 2048))
    ):
        for dtype in (torch.bfloat16, torch.float32):
            size: dict[str, Any] = {
                "features": features,
                "dtype": dtype,
                "bound": 0.05 if dtype == torch.bfloat16 else 1e-4,
            }
            measure = functools.partial(linear_head.measure, "none", rows, classes, seconds, device=device(), **size)
            yield f"head {rows}x{classes}x{features} {dtype}", measure


def warm(name: str, column: str, dry_run: bool) -> None:
    """The first call of a compiled step: what it takes to compile is then in inductor's cache on disk."""
    torch.backends.cudnn.allow_tf32 = False  # as in the stage
    model, x, y = steps.problem(steps.CASES[name]._replace(batch=8 if dry_run else STEPS[name]), device())
    with torch.autocast(device(), torch.bfloat16, enabled=not dry_run):
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
    pairs = [(name, column) for name in STEPS for column in COMPILED][: max(1, (os.cpu_count() or 1) // 2)]
    processes = []
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    try:
        for pair in pairs:
            command = [sys.executable, "-m", __package__, "gpu", "--warm", *pair]
            environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "2"}
            processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, **quiet))
        yield
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, until - time.monotonic()))
    finally:
        for process in processes:
            if process.poll() is None:
                _kill(process)
                process.wait()


def steps_stage(options: argparse.Namespace) -> Work:
    # Compiling takes most of the time: what differs from the objective by an option is left to steps.py.
    columns = [c for c in steps.COLUMNS if c not in ("directional", "fraction 0.25")]
    models, seconds = STEPS, 5.0
    if options.dry_run:
        columns, models, seconds = ["plain", "taylor", "objective"], {"mlp": 8}, 0.0
    for amp in (torch.bfloat16, None):
        for name, batch in models.items():
            measure = functools.partial(steps.measure, name, columns, seconds, batch=batch, device=device(), amp=amp)
            yield f"{name} {batch} {amp}", measure


def _in_graphs(model: torch.nn.Module, x: Tensor, y: Tensor) -> Callable[[], list[Tensor]]:
    objective = densreg.RegularizedObjective(model, steps.COEFF, mode="reduce-overhead")

    def step() -> list[Tensor]:
        objective(x, y).loss.backward()
        grads = [w.grad for w in model.parameters()]
        for w in model.parameters():
            w.grad = None
        return grads  # type: ignore[return-value]

    return step


def small(options: argparse.Namespace) -> Work:
    columns, more = ["plain", "taylor compiled", "objective"], {"objective, reduce-overhead": _in_graphs}
    batches, seconds = (128, 256), 3.0
    if options.dry_run:
        columns, batches, seconds = ["plain"], (4,), 0.0  # type: ignore[assignment]
    for batch in batches:
        measure = functools.partial(steps.measure, "mlp", columns, seconds, batch=batch, device=device(), more=more)
        yield f"mlp {batch}", measure


def epochs(options: argparse.Namespace) -> Work:
    columns = [c for c in test_epoch.COLUMNS if c not in steps.RIVALS]
    data, images, batch = "cifar100", 12_800, 256
    if options.dry_run:
        data, images, batch, columns = "blockmnist", 32, 8, ["plain", "taylor", "objective eager"]

    def measure() -> Row:
        return test_epoch.measure(data, images, options.data_dir, columns, device(), batch)[0]

    yield f"{data} {images}", measure


def training_row(name: str, changes: dict[str, Any], options: argparse.Namespace) -> Row:
    """Some epochs of `densreg train`, the first of which compiles; data loading included."""
    settings: dict[str, Any] = {"data": "synthetic", "classes": 100, "image_size": 32, "train_size": 25_600}
    settings |= {"model": "resnet18", "epochs": 5, "test_size": 2048, "batch_size": 256, "amp": "bf16", "workers": 2}
    if options.data_dir:
        settings |= {"data": "cifar100", "data_dir": str(options.data_dir), "classes": None, "image_size": None}
    if options.dry_run:
        settings |= {"model": "mlp", "epochs": 1, "train_size": 64, "test_size": 32, "batch_size": 32, "amp": "none"}
        settings |= {"workers": 0, "compile": False}
    settings |= changes
    with tempfile.TemporaryDirectory() as out:
        rows = training.fit(training.Config(out=out, device=device(), channels_last=True, **settings), progress=False)
    last, accuracy = rows[-1], ", ".join(f"{row['test_accuracy']:.4f}" for row in rows)
    case = {name: settings[name] for name in ("data", "model", "epochs", "train_size", "batch_size", "amp")}
    note = f"test accuracy by epoch {accuracy}; test penalty {last['test_penalty']:.4g}"
    column = {"seconds": last["seconds"], "first_call": rows[0]["seconds"], "note": note}
    return {"suite": "training", "case": case, "columns": {name: column}}


def trainings(options: argparse.Namespace) -> Work:
    runs: dict[str, dict[str, Any]] = {"plain": {"coeff": 0.0}, "objective": {}, "interval 4": {"interval": 4}}
    for name, changes in runs.items():
        yield name, functools.partial(training_row, name, changes, options)


# --------------------------------------------------------------------------------------------------------------------
# build, tests, sanitizer


def _run(
    name: str,
    options: argparse.Namespace,
    command: Sequence[str],
    environment: dict[str, str],
    fine: Sequence[int] = (0,),
) -> tuple[dict[str, Any], int]:
    """A column with what a program said last, and its exit code; where it fails, all that was said is in the log."""
    start = time.perf_counter()
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, cwd=ROOT)
    said = done.stdout.strip().splitlines()
    note = said[-1] if said else ""
    if done.returncode not in fine:
        log = options.json.with_name(f"{options.json.stem}-{name}.log")
        log.write_text(f"{' '.join(command)}\n{done.stdout}\n--- standard error\n{done.stderr}")
        failing = [line for line in said if line.startswith(("FAILED", "ERROR"))]
        note = "; ".join([f"failed with exit code {done.returncode}: {note}", *failing])[:1000]
    return {"seconds": time.perf_counter() - start, "note": note}, done.returncode


def install(options: argparse.Namespace) -> Row:
    columns: dict[str, dict[str, Any]] = {}
    if options.dry_run:
        columns["info"], _ = _run("info", options, [sys.executable, "-m", "densreg", "info"], {})
    else:
        command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "-e", "."]
        for cuda in ("require", "skip"):  # without the CUDA sources Triton can still be measured
            name, flags = f"CUDA {cuda}", {"DENSREG_EXTENSION": "require", "DENSREG_CUDA": cuda}
            columns[name], code = _run(f"install-{cuda}", options, command, flags)
            if not code:
                break
    return {"suite": "tests", "case": {"what": "install"}, "columns": columns}


def build(options: argparse.Namespace) -> Work:
    yield "install", functools.partial(install, options)


def test_row(path: str, options: argparse.Namespace) -> Row:
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", path]
    if options.dry_run:
        command += ["-k", "test_strides_and_empty or test_empty"]
    elif importlib.util.find_spec("xdist"):  # most of the time is Triton's compiler's
        command += ["-n", str(min(12, os.cpu_count() or 1)), "--dist", "worksteal"]
    fine = (0, 5) if options.dry_run else (0,)  # 5: none chosen
    column, _ = _run(Path(path).stem, options, command, {"DENSREG_TEST_DEVICE": device()}, fine)
    return {"suite": "tests", "case": {"what": path}, "columns": {"pytest": column}}


def tests(options: argparse.Namespace) -> Work:
    for path in GPU_TESTS:
        yield path, functools.partial(test_row, path, options)


def sanitizer_row(tool: str, check: str, options: argparse.Namespace) -> Row:
    chosen = "test_strides_and_empty or test_extreme_rows or test_memory_formats or test_every_small_size"
    command = [tool, "--tool", check, "--error-exitcode", "9", sys.executable, "-m", "pytest", "-q", "-x"]
    command += ["-k", f"({chosen}) and not compile", *GPU_TESTS[1:3]]
    flags = {"DENSREG_TEST_DEVICE": "cuda", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    column, _ = _run(check, options, command, flags)
    return {"suite": "tests", "case": {"what": "compute-sanitizer"}, "columns": {check: column}}


def sanitizer(options: argparse.Namespace) -> Work:
    tool = shutil.which("compute-sanitizer")
    if tool is None or not torch.cuda.is_available():
        column = {"note": "not run: no GPU" if tool else "not run: not on the PATH"}
        yield "none", lambda: {"suite": "tests", "case": {"what": "compute-sanitizer"}, "columns": {"none": column}}
        return
    for check in ("memcheck", "racecheck"):
        yield check, functools.partial(sanitizer_row, tool, check, options)


class Stage(NamedTuple):
    """What makes a stage's rows, the seconds that it is expected to take, an estimate, and the most that a row may."""

    work: Callable[[argparse.Namespace], Work]
    seconds: int
    of_row: float = math.inf  # where a kernel may hang


STAGES = {
    "build": Stage(build, 120),
    "long_rows": Stage(gpu_kernels.long_rows, 200, 60),
    "kernels": Stage(gpu_kernels.kernels, 210, 60),
    "eager": Stage(gpu_kernels.eager, 30, 60),
    "tests": Stage(tests, 180),
    "paths": Stage(paths, 120),
    "heads": Stage(heads, 120),
    "steps": Stage(steps_stage, 300),
    "epochs": Stage(epochs, 150),
    "training": Stage(trainings, 150),
    "small": Stage(small, 90),
    "sanitizer": Stage(sanitizer, 150),
}


# --------------------------------------------------------------------------------------------------------------------
# the session


def _sources() -> str:
    """A digest of what is measured: a commit would change with the committed results."""
    digest = hashlib.sha256()
    for pattern in ("csrc/**/*", "kernels/*.py", "densreg/**/*.py", "benchmarks/*.py", "tests/*.py", "setup.py"):
        for path in sorted(ROOT.glob(pattern)):
            if path.is_file():
                digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _built(options: argparse.Namespace) -> bool:
    """Whether what an earlier call has built is on this machine."""
    return options.dry_run or "cuda" in class_counts.backends("cuda")


def _write(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result, indent=1)


def _work(stage: str, options: argparse.Namespace) -> None:
    """The rows of a stage that are not in the file yet, one after the other."""
    torch.backends.cudnn.allow_tf32 = False
    have = {row["key"] for row in json.loads(options.json.read_text())["stages"][stage]["rows"]}
    for key, measure in STAGES[stage].work(options):
        if key in have:
            continue
        print(json.dumps({"begun": key}), flush=True)
        whole: dict[str, Any] = {}
        row = _failed_row(key, whole)
        with noted(whole):
            row = measure()
        failed = any(column.get("note", "").startswith(FAILED) for column in row["columns"].values())
        print(json.dumps({"row": {"key": key, "code": int(failed), **row}}), flush=True)


def _failed_row(key: str, column: dict[str, Any]) -> Row:
    return {"suite": "tests", "case": {"what": key}, "columns": {"whole": column}}


def _run_stage(name: str, options: argparse.Namespace, seconds: float, keep: Callable[[Row], None]) -> str:
    """Run a stage in a process of its own, keeping each row as it comes; how it ended."""
    command = [sys.executable, "-m", __package__, "gpu", "--worker", name, "--json", str(options.json)]
    command += ["--dry-run"] if options.dry_run else []
    command += ["--data-dir", str(options.data_dir)] if options.data_dir else []
    environment = {**os.environ, **({"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""} if options.dry_run else {})}
    # A session of its own, so that what the stage has started ends with it.
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment, start_new_session=True
    )
    assert process.stdout is not None
    end, late = time.monotonic() + seconds, ""

    def watch() -> threading.Timer:
        """Ends the process, unless cancelled, when the time of the row or of the stage is over."""
        left, most = end - time.monotonic(), STAGES[name].of_row

        def out_of_time() -> None:
            nonlocal late
            late = "out of time" if left <= most else f"no end after {most:g} s"
            _kill(process)

        timer = threading.Timer(min(left, most), out_of_time)
        timer.start()
        return timer

    watchdog = watch()
    begun, rows = None, 0
    try:
        for line in process.stdout:
            if line.startswith('{"row": '):
                keep(json.loads(line)["row"])
                begun, rows = None, rows + 1
            elif line.startswith('{"begun": '):
                begun = json.loads(line)["begun"]
                watchdog.cancel()
                watchdog = watch()
            else:
                print(line, end="", flush=True)
        code = process.wait()
    finally:
        watchdog.cancel()
        _kill(process)
    if code == 0:
        return "whole"
    ended = late or f"exit code {code}"
    if begun is not None and (ended != "out of time" or (not rows and seconds >= STAGES[name].seconds)):
        # What kills the stage, or hangs, is not tried again, so that the rows after it have their turn.
        keep({"key": begun, "code": 1, **_failed_row(begun, {"note": f"failed: {ended}"})})
    return ended


def _resumed(options: argparse.Namespace) -> dict[str, Any]:
    """What the file has of the same sources, GPU and versions, without what is to be measured again."""
    about = environment() | {"sources": _sources()}
    result: dict[str, Any] = {"environment": about, "stages": {}}
    if options.json.exists():
        old = json.loads(options.json.read_text())
        if all(old["environment"].get(key) == about.get(key) for key in ("sources", "gpu", "torch", "triton")):
            result["stages"] = old["stages"]
    for stage in options.stage:
        if options.again or stage not in result["stages"] or (stage == "build" and not _built(options)):
            result["stages"][stage] = {"ended": "not begun", "rows": []}
    return result


SHARED = {"json": None, "data-dir": None}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--stage", nargs="+", choices=STAGES, default=list(STAGES), help="only these, in this order")
    parser.add_argument("--minutes", type=float, default=9.0, help="for this call")
    parser.add_argument("--again", action="store_true", help="measure rows that are in the file again")
    parser.add_argument("--dry-run", action="store_true", help="every code path at tiny sizes, on the CPU")
    parser.add_argument("--worker", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--warm", nargs=2, metavar=("MODEL", "COLUMN"), help=argparse.SUPPRESS)


def run(options: argparse.Namespace) -> int:
    if options.worker:
        _work(options.worker, options)
        return 0
    if options.warm:
        name, column = options.warm
        warm(name, column, options.dry_run)
        return 0
    if not options.dry_run and not torch.cuda.is_available():
        raise SystemExit("expected a GPU, got none: --dry-run goes through the code on the CPU")
    end = time.monotonic() + 60 * options.minutes
    name = "dry-run" if options.dry_run else "-".join(torch.cuda.get_device_name().lower().split())
    options.json = (options.json or ROOT / "benchmarks" / "results" / name / "gpu.json").absolute()
    result = _resumed(options)
    stages = result["stages"]
    _write(options.json, result)
    for capped in (True, False):  # every stage has its turn before one takes what is left
        for stage in options.stage:
            kept = stages[stage]
            left = end - time.monotonic()
            if kept["ended"] in ("whole", "failed") or left < (1 if options.dry_run else 30):
                continue
            until = end - (max(0.0, left - 1.5 * STAGES[stage].seconds) if capped else 0)
            print(f"{stage} ...", flush=True)

            def keep(row: Row, rows: list[Row] = kept["rows"]) -> None:
                rows.append(row)
                _write(options.json, result)

            # Beside the tests, which are not timed, the steps are compiled.
            to_come = stage == "tests" and "steps" in options.stage and stages["steps"]["ended"] == "not begun"
            with _warmers(left / 2) if to_come and not options.dry_run else contextlib.nullcontext():
                rows = -1
                # What kills the process has its row: those after it get another process.
                while len(kept["rows"]) > rows and (seconds := until - time.monotonic()) > 0:
                    rows = len(kept["rows"])
                    kept["ended"] = _run_stage(stage, options, seconds, keep)
                    if kept["ended"] in ("whole", "out of time"):
                        break
            if kept["ended"] == "whole" and any(row["code"] for row in kept["rows"]):
                kept["ended"] = "failed"
            _write(options.json, result)
    print("\n".join(tables([row for stage in stages.values() for row in stage["rows"]])))
    print(", ".join(f"{name}: {stage['ended']}" for name, stage in stages.items()))
    bad = [s for s, stage in stages.items() if stage["ended"] not in ("whole", "out of time", "not begun")]
    return 1 if bad else 0
