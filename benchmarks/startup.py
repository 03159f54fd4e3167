"""How long the first step takes in a new process: with torch's caches on disk empty (cold), and filled (warm).

    python -m benchmarks startup [--models mlp resnet18 ...] [--threads 2] [--json FILE]

The plain step and the objective's, as in `steps`, each in processes of its own with a folder of its own for the caches.
What is timed is the first call: compilation, and one step. Imports are not. The gradients are compared with float64
after each call, as a cache must not give another step's.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time

import torch

from . import steps
from .records import Row, tables, write_json
from .timing import WrongResult, environment

COLUMNS = ("plain", "objective")


def first_call(name: str, column: str, threads: int | None = None) -> float:
    """Seconds of the first step in this process.

    Raises:
        WrongResult: its gradients are off.
    """
    if threads:
        torch.set_num_threads(threads)
    model, x, y = steps.problem(steps.CASES[name])
    step = steps.step_of(column, model, x, y)
    start = time.perf_counter()
    grads = step()
    seconds = time.perf_counter() - start
    model, x, y = steps.problem(steps.CASES[name])  # as it was: the step has updated running statistics
    steps.require(column, grads, steps.references(model, x, y))
    return seconds


def measure(name: str, threads: int | None = None) -> Row:
    """One model: the first call of each column, cold and warm."""
    found: dict[str, dict] = {}
    code = f"import sys; from {__name__} import first_call; print(first_call({name!r}, sys.argv[1], {threads}))"
    for column in COLUMNS:
        with tempfile.TemporaryDirectory() as caches:
            variables = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": caches}
            for state in ("cold", "warm"):
                child = subprocess.run(
                    [sys.executable, "-c", code, column], env=variables, stdout=subprocess.PIPE, text=True
                )
                if child.returncode:
                    raise WrongResult(f"{name}, {column}, {state}: expected exit status 0, got {child.returncode}")
                found[f"{column}, {state}"] = {"first_call": float(child.stdout.split()[-1])}
        cold, warm = (found[f"{column}, {state}"] for state in ("cold", "warm"))
        warm |= {"ratio": warm["first_call"] / cold["first_call"], "base": f"{column}, cold"}
    return {"suite": "startup", "case": {"model": name, "batch": steps.CASES[name].batch}, "columns": found}


SHARED = {"threads": None, "json": None}


def arguments(parser: argparse.ArgumentParser) -> None:
    models = ("mlp", "resnet18", "wrn28-10", "vit_b_16")
    parser.add_argument("--models", nargs="+", default=models, choices=steps.CASES)


def run(options: argparse.Namespace) -> int:
    rows: list[Row] = []
    for name in options.models:
        rows.append(measure(name, options.threads))
        write_json(options.json, rows, environment())
    print("\n".join(tables(rows)))
    return 0
