"""Timing that stands on a shared machine: the candidates in turn, many rounds, medians and ratios within a round.

And what goes with it: peak memory, inputs that rotate past the caches, fitted exponents, and what a result must name.
"""

from __future__ import annotations

import contextlib
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from densreg import _torch, ops
from densreg.version import __version__


class WrongResult(RuntimeError):
    """What was to be timed computes something else, or is served by something else, than its name says; in one line."""


def interleave(
    candidates: Mapping[str, Callable[[], Any]],
    seconds: float = 3.0,
    inside: Callable[[str], contextlib.AbstractContextManager] = lambda name: contextlib.nullcontext(),
    ahead: bool = False,
) -> dict[str, list[float]]:
    """Seconds per call of each candidate, one number a round; the rounds go through the candidates in turn.

    A candidate is called often enough in a round for 2 ms, so that the clock and the loop do not count, after one call
    more that is not timed: what the candidate before left in the caches and in the allocator is not this one's. Rounds
    are made until ``seconds`` have gone, at least five. Where a GPU is in use, two CUDA events are the clock.

    Args:
        inside: the context in which a candidate is called; entering it is not timed.
        ahead: keep the GPU busy until a call is launched, so that launching is not timed. For CUDA graphs.
    """
    repeats = {}
    for name, call in candidates.items():
        with inside(name):
            call()  # first calls allocate and compile
            call()
            repeats[name] = max(1, int(2e-3 / max(elapsed(call, 1, ahead), 1e-7)))
    times: dict[str, list[float]] = {name: [] for name in candidates}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < 5:
        for name, call in candidates.items():
            with inside(name):
                if repeats[name] > 1:
                    call()
                times[name].append(elapsed(call, repeats[name], ahead) / repeats[name])
    return times


def elapsed(call: Callable[[], Any], repeats: int = 1, ahead: bool = False) -> float:
    """Seconds of some calls together, by the clock of the device in use; for ``ahead`` see :func:`interleave`."""
    if not torch.cuda.is_initialized():
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    if ahead:
        _torch.occupy(200_000)  # cycles, 0.1 ms
    begin.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def synchronize() -> None:
    """Wait for the GPU, where one has been used."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def ratios(times: Mapping[str, list[float]], slow: str, fast: str) -> list[float]:
    """How many times longer ``slow`` takes than ``fast``, in each round."""
    return [a / b for a, b in zip(times[slow], times[fast], strict=True)]


def summarize(times: Mapping[str, list[float]], base: str | Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Of each candidate: median seconds, the median ratio to its base, and the quartiles of both.

    Args:
        base: what each is divided by, one name for all or one for each.
    """
    columns = {}
    for name, values in times.items():
        to = base if isinstance(base, str) else base[name]
        columns[name] = {**_quartiles("seconds", values), **_quartiles("ratio", ratios(times, name, to)), "base": to}
    return columns


def _quartiles(name: str, values: Sequence[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4)
    return {name: middle, f"{name}_low": low, f"{name}_high": high}


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The a of ``value = c * size^a``, fitted by least squares in the logarithms.

    Raises:
        ValueError: fewer than two different sizes, or something that has no logarithm.
    """
    if len(set(sizes)) < 2 or min(*sizes, *values) <= 0:
        raise ValueError(f"expected two different sizes and positive values, got {sizes} and {values}")
    return statistics.linear_regression([math.log(n) for n in sizes], [math.log(v) for v in values]).slope


def peak_bytes(call: Callable[[], Any]) -> int:
    """What a call allocates at its peak, in bytes: by torch's allocator, its result included.

    Of a whole training step it is the growth of the resident size within 1 to 4%, and needs no process of its own.
    """
    if torch.cuda.is_initialized():
        synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        synchronize()
        del result
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        result = call()
    del result
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def last_level_cache() -> int:
    """Bytes of the largest cache of the processor; 32 MiB where the system does not say."""
    files = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((int(f.read_text().strip().removesuffix("K")) * 1024 for f in files), default=32 << 20)


def copies_past_cache(size: int) -> int:
    """How many inputs of ``size`` bytes to take in turn, so that each was last touched two cache sizes ago.

    One, below 1 MiB: what a layer has just written is in the cache in use, too.
    """
    cache = torch.cuda.get_device_properties(0).L2_cache_size if torch.cuda.is_initialized() else last_level_cache()
    return 1 if size < 1 << 20 else math.ceil(2 * cache / size) + 1


def environment() -> dict[str, Any]:
    """What a result must name: processor, GPU, versions, commit, instruction set."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    here, commit = Path(__file__).parent, ""
    if (here.parent / "pyproject.toml").exists():  # else installed, maybe inside of somebody's repository
        git = ["git", "-C", str(here), "describe", "--always", "--dirty"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    about = {
        "densreg": __version__,
        "commit": commit or None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "instruction_set": ops.instruction_set(),
        "date": time.strftime("%Y-%m-%d"),
    }
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        about |= {"capability": f"{gpu.major}.{gpu.minor}", "L2_bytes": gpu.L2_cache_size, "cuda": torch.version.cuda}
        with contextlib.suppress(ImportError):
            import triton

            about["triton"] = triton.__version__
    return about
