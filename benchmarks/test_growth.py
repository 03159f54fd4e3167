"""How time and memory grow with the classes, the batch, the side of the images and the depth; fitted exponents.

    python -m pytest benchmarks/test_growth.py --profile full -s

A small convolutional network with BatchNorm, one of the four varied at a time. All points of an axis and all columns
are timed in turn, in the same rounds; in eager, because each size would be compiled anew. The exponent a of
``c * size^a`` is a least squares fit in the logarithms over the whole axis: where a constant part shows it is below the
growth in the limit. per_class is the one that grows with the classes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from . import steps
from .records import Row, exponents
from .timing import interleave, peak_bytes, summarize

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


def measure(axis: str, sizes: tuple[int, ...], seconds: float, device: str = "cpu") -> list[Row]:
    """Medians and peak memory along one axis, a row for each size, with the rest at :data:`BASE`.

    Raises:
        WrongResult: at the first point a column's gradients are not those of float64; nothing was timed.
    """
    _check({**BASE, axis: sizes[0]}, device)
    calls = {}
    for size in sizes:
        for column in COLUMNS:
            if column == "per_class" and (axis != "classes" or size > MOST_CLASSES):
                continue
            calls[f"{column} {size}"] = step_at(column, device, **{**BASE, axis: size})
    times = interleave(calls, seconds)
    rows = []
    for size in sizes:
        mine = {column: times[f"{column} {size}"] for column in COLUMNS if f"{column} {size}" in times}
        found = summarize(mine, COLUMNS[0])
        for column, of in found.items():
            of["peak_bytes"] = peak_bytes(calls[f"{column} {size}"])
        rows.append({"suite": "growth", "case": {"axis": axis, "size": size, "device": device}, "columns": found})
    return rows


def test_growth(case, request, seconds, headline):
    axis, sizes = case
    device = request.config.getoption("--device")
    rows = measure(axis, sizes, seconds, device)
    for what, field in (("time", "seconds"), ("memory", "peak_bytes")):
        fitted = ", ".join(f"{column} {a:.2f}" for column, a in exponents(rows, field).items())
        print(f"\n{what} grows with {axis} to the power of: {fitted}")
    headline("growth", rows, step_at("objective eager", device, **{**BASE, axis: sizes[0]}))
