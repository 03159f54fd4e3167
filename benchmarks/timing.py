"""Timing that stands on a shared machine: the candidates in turn, many rounds, medians and ratios within a round."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from densreg import ops
from densreg.version import __version__


def interleave(candidates: Mapping[str, Callable[[], Any]], seconds: float = 3.0) -> dict[str, list[float]]:
    """Seconds per call of each candidate, one number a round; the rounds go through the candidates in turn.

    A candidate is called often enough in a round for 2 ms, so that the clock and the loop do not count; rounds are
    made until ``seconds`` have gone, at least five.
    """
    repeats = {}
    for name, call in candidates.items():
        call()  # first calls allocate and compile
        call()
        start = time.perf_counter()
        call()
        repeats[name] = max(1, int(2e-3 / max(time.perf_counter() - start, 1e-7)))
    times: dict[str, list[float]] = {name: [] for name in candidates}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < 5:
        for name, call in candidates.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            times[name].append((time.perf_counter() - start) / repeats[name])
    return times


def ratio(times: Mapping[str, list[float]], slow: str, fast: str) -> float:
    """How many times faster ``fast`` is: the median over the rounds of slow / fast."""
    return statistics.median(a / b for a, b in zip(times[slow], times[fast], strict=True))


def environment() -> dict[str, Any]:
    """What a result must name: processor, versions, commit, instruction set."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    return {
        "densreg": __version__,
        "commit": commit or None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "instruction_set": ops.instruction_set(),
        "date": time.strftime("%Y-%m-%d"),
    }
