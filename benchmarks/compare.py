"""A guard against regressions: ratios measured now against committed ones of the same kind of machine.

    python -m benchmarks compare [--data FILE] [--repeats 3]     compare; exit status 1 where one worsened
    python -m benchmarks compare --write [--repeats 5]           measure the ratios that are compared with

Times do not carry over from one day to the next on a shared machine; ratios within a round do. Each is how many times
longer something else takes than densreg does, so that a smaller one is worse: the paper's taylor against the fused
path, the closed formula under torch.compile against the raw operators, and the plain step against the objective's.
Each repeat is a process of its own: memory lies elsewhere, code is compiled anew. A ratio has worsened when its median
over this run's repeats lies below the committed median by more than twice the distance from there to the smallest of
the committed repeats, and by more than 5%: that is its own spread, and not a number that somebody thought right.

The committed ratios are in results/<machine>/ratios.json, found by processor, cores, threads and instruction set.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from densreg.lab.report import markdown_table
from densreg.lab.runs import write_json

from .report import HERE, machine_name
from .timing import environment

SHAPES = ((128, 100), (128, 1000), (128, 21_841))
LEAST, NOISY = 0.05, 0.6
"""Smallest spread, and the part of the median below which a limit guards nothing."""
SAME = ("cpu", "cores", "threads", "instruction_set", "gpu")
"""What two machines must have in common."""


class CompareError(ValueError):
    """There is nothing to compare with; in one line."""


def measure(seconds: float) -> dict[str, float]:
    """The ratios, once, in this process; larger is better."""
    from . import class_counts, steps

    ratios = {}
    for rows, classes in SHAPES:
        columns = class_counts.measure(rows, classes, seconds)["columns"]
        for name, base in (("taylor", "api"), ("compiled", "raw")):
            ratios[f"{name}/{base}, {rows} x {classes}"] = columns[name]["ratio"]
    torch.compiler.reset()
    columns = steps.measure("mlp", ["plain", "taylor", "objective"], 3 * seconds, False, base="objective")["columns"]
    for name in ("plain", "taylor"):
        ratios[f"{name}/objective, mlp"] = columns[name]["ratio"]
    return ratios


def measure_repeatedly(repeats: int, seconds: float, threads: int) -> dict[str, list[float]]:
    """The ratios of each repeat, in fresh processes."""
    found: dict[str, list[float]] = {}
    for _ in range(repeats):
        command = [sys.executable, "-m", __package__, "compare", "--once"]
        command += [f"--seconds={seconds}", f"--threads={threads}"]
        said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        for name, value in json.loads(said.splitlines()[-1]).items():
            found.setdefault(name, []).append(value)
    return found


def allowed(repeats: list[float]) -> float:
    """The smallest median that is not a regression."""
    middle = statistics.median(repeats)
    return middle - max(2 * (middle - min(repeats)), LEAST * middle)


def compare(before: dict[str, list[float]], now: dict[str, list[float]]) -> tuple[list[list[str]], list[str]]:
    """A table, and the names of the ratios that worsened beyond their own spread.

    Raises:
        CompareError: a committed ratio was not measured now.
    """
    absent = before.keys() - now.keys()
    if absent:
        raise CompareError(f"not measured now: {', '.join(sorted(absent))}")
    lines, worse = [], []
    for name, repeats in before.items():
        median, least = statistics.median(now[name]), allowed(repeats)
        if not median >= least:
            worse.append(name)
        cells = [f"{v:.3f}" for v in (statistics.median(repeats), min(repeats), max(repeats), least, median)]
        lines.append([name, *cells, "worse" if name in worse else "ok"])
    return lines, worse


def committed(about: dict[str, Any], folder: Path = HERE / "results") -> Path:
    """The committed ratios of this kind of machine.

    Raises:
        CompareError: there are none.
    """
    for path in sorted(folder.glob("*/ratios.json")):
        theirs = json.loads(path.read_text())["environment"]
        if all(theirs.get(name) == about[name] for name in SAME):
            return path
    mine = ", ".join(f"{name} {about[name]}" for name in SAME)
    raise CompareError(f"no committed ratios of a machine like this ({mine}); --write makes them")


SHARED = {"threads": None, "seconds": 1.0}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--write", action="store_true", help="write what is measured, and compare nothing")
    parser.add_argument("--data", type=Path, help="the committed ratios, in place of those of this kind of machine")
    parser.add_argument("--repeats", type=int, help="processes; by default 3, and 5 with --write")
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)


def run(options: argparse.Namespace) -> int:
    if options.once:
        print(json.dumps(measure(options.seconds)))
        return 0
    about = environment() | {"gpu": None}  # all of it is of the CPU
    try:
        path = None if options.write else options.data or committed(about)
        repeats = options.repeats or (5 if options.write else 3)
        now = measure_repeatedly(repeats, options.seconds, torch.get_num_threads())
        if path is None:
            path = options.data or Path("benchmarks", "results", machine_name(about), "ratios.json")
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, {"environment": about, "seconds": options.seconds, "ratios": now})
            for name, values in now.items():
                print(f"{name}: {statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})")
            print(f"written to {path}")
            noisy = [name for name, values in now.items() if allowed(values) < NOISY * statistics.median(values)]
            if noisy:
                print(f"too far spread to guard anything, measure on a quiet machine: {', '.join(noisy)}")
            return 1 if noisy else 0
        lines, worse = compare(json.loads(path.read_text())["ratios"], now)
    except (CompareError, OSError, subprocess.CalledProcessError) as error:
        print(f"bench-compare: error: {error}", file=sys.stderr)
        return 2
    print(f"times longer than densreg; committed: {path}\n")
    print(markdown_table([["ratio", "committed", "smallest", "largest", "at least", "now", ""], *lines]))
    print(f"worsened: {', '.join(worse)}" if worse else "none worsened beyond its spread")
    return 1 if worse else 0
