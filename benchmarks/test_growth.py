"""How time and memory grow with the classes, the batch, the side of the images and the depth; fitted exponents.

    python -m pytest benchmarks/test_growth.py --profile full -s

A small convolutional network with BatchNorm, one of the four varied at a time. All points of an axis and all columns
are timed in turn, in the same rounds; in eager, because each size would be compiled anew. The exponent a of
``c * size^a`` is a least squares fit in the logarithms over the whole axis: where a constant part shows it is below the
growth in the limit. per_class is the one that grows with the classes.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import steps
from .timing import exponent, interleave, peak_bytes, spread

BASE = {"classes": 10, "batch": 8, "side": 16, "depth": 4}
WIDTH = 32
COLUMNS = ("plain eager", "taylor", "objective eager", "per_class")

CASES = {
    "tiny": (("batch", (2, 4)), ("classes", (2, 4))),
    "quick": (
        ("classes", (5, 10, 20)),
        ("batch", (4, 8, 16)),
        ("side", (8, 16, 32)),
        ("depth", (2, 4, 8)),
    ),
    "full": (
        ("classes", (10, 30, 100, 300, 1000, 10_000)),
        ("batch", (8, 16, 32, 64)),
        ("side", (8, 16, 32, 64)),
        ("depth", (2, 4, 8, 16)),
    ),
}
MOST_CLASSES = 100
"""Of per_class."""


def network(classes: int, depth: int) -> nn.Module:
    layers: list[nn.Module] = []
    for i in range(depth):
        layers += [nn.Conv2d(WIDTH if i else 3, WIDTH, 3, padding=1, bias=False), nn.BatchNorm2d(WIDTH), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, classes))


def _problem(device: str, classes: int, batch: int, side: int, depth: int) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = network(classes, depth).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.rand(batch, 3, side, side, device=device).to(memory_format=torch.channels_last)
    return model, x, torch.randint(classes, (batch,), device=device)


def step_at(column: str, device: str, **point: int) -> Callable[[], list[Tensor]]:
    """The step of a column at one point."""
    return steps.step_of(column, *_problem(device, **point))


def _check(point: dict[str, int], device: str) -> None:
    references = steps.references(*_problem(device, **point))
    for column in COLUMNS:
        steps.require(column, step_at(column, device, **point)(), references)


def measure(axis: str, sizes: tuple[int, ...], seconds: float, device: str = "cpu") -> dict[str, Any]:
    """Medians, peak memory and exponents along one axis, with the rest at :data:`BASE`.

    Raises:
        WrongResult: at the first point a column's gradients are not those of float64; nothing was timed.
    """
    calls = {}
    _check({**BASE, axis: sizes[0]}, device)
    for size in sizes:
        point = {**BASE, axis: size}
        for column in COLUMNS:
            if column == "per_class" and (axis != "classes" or size > MOST_CLASSES):
                continue
            calls[f"{column} {size}"] = step_at(column, device, **point)
    times = interleave(calls, seconds)
    result: dict[str, Any] = {"axis": axis, "base": BASE, "sizes": {}, "seconds": {}, "quartiles": {}, "peak_bytes": {}}
    result |= {"threads": torch.get_num_threads(), "device": device, "time_exponent": {}, "memory_exponent": {}}
    for column in COLUMNS:
        mine = [size for size in sizes if f"{column} {size}" in calls]
        if len(mine) < 2:
            continue
        result["sizes"][column] = mine
        result["seconds"][column] = [statistics.median(times[f"{column} {size}"]) for size in mine]
        result["quartiles"][column] = [spread(times[f"{column} {size}"]) for size in mine]
        result["peak_bytes"][column] = [peak_bytes(calls[f"{column} {size}"]) for size in mine]
        result["time_exponent"][column] = exponent(mine, result["seconds"][column])
        result["memory_exponent"][column] = exponent(mine, result["peak_bytes"][column])
    return result


def test_growth(case, request, seconds, headline):
    axis, sizes = case
    device = request.config.getoption("--device")
    result = measure(axis, sizes, seconds, device)
    for what in ("time", "memory"):
        fitted = ", ".join(f"{column} {a:.2f}" for column, a in result[f"{what}_exponent"].items())
        print(f"\n{what} grows with {axis} to the power of: {fitted}")
    headline("growth", result, step_at("objective eager", device, **{**BASE, axis: sizes[0]}))
