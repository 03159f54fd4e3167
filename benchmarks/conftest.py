"""Options of the benchmarks: which profile, which data, how long."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from densreg import ops

PROFILES = ("tiny", "quick", "full")


def pytest_addoption(parser):
    group = parser.getgroup("densreg")
    group.addoption("--profile", choices=PROFILES, default="quick", help="how much is measured; tiny: that it runs")
    group.addoption("--data-dir", type=Path, help="folder of the data sets as densreg train takes it; none: noise")
    group.addoption("--images", default=None, help="images of an epoch that are timed: a number, or whole")
    group.addoption("--seconds", type=float, default=None, help="of interleaved rounds for each benchmark")
    group.addoption("--threads", type=int, default=None, help="of torch on the CPU")
    group.addoption("--device", default="cpu", help="of epochs and growth: cpu or cuda")


def pytest_configure(config):
    if importlib.util.find_spec("pytest_benchmark") is None:
        raise pytest.UsageError("the benchmarks need pytest-benchmark: pip install 'densreg[bench]'")
    if (reason := ops.unavailable_reason("cpu")) is not None:
        raise pytest.UsageError(f"nothing to measure: {reason}")
    if config.getoption("--threads"):
        torch.set_num_threads(config.getoption("--threads"))


def pytest_generate_tests(metafunc):
    """``case`` goes through what the module's CASES has for the profile."""
    if "case" in metafunc.fixturenames:
        cases = metafunc.module.CASES[metafunc.config.getoption("--profile")]
        metafunc.parametrize("case", cases, ids=lambda case: "x".join(map(str, case)))


@pytest.fixture
def seconds(request):
    return (
        request.config.getoption("--seconds")
        or {"tiny": 0.05, "quick": 0.5, "full": 3.0}[request.config.getoption("--profile")]
    )


@pytest.fixture
def headline(benchmark):
    """Gives a result to pytest-benchmark: the columns as extra_info, and densreg's own as what it times.

    The columns were timed in interleaved rounds, which pytest-benchmark does not know: it times one test after the
    other, minutes apart, and on a shared machine a ratio of two of those is mostly drift. So there is one test for each
    set of things to compare, and its extra_info is the result. What pytest-benchmark times once more is densreg's
    column alone, for its own tables and histories.
    """

    def report(kind, result, call, rounds=5):
        benchmark.group = kind
        benchmark.extra_info.update(result, kind=kind)
        benchmark.pedantic(call, rounds=rounds, warmup_rounds=1)

    return report
