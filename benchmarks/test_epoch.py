"""Epochs of real images: plain, the paper's paths, the compiled objective, lazy intervals, and the paper's rivals.

    python -m pytest benchmarks/test_epoch.py --profile full --data-dir DIR [--images whole]

This is Fig. 2b, 2c and 8 of the paper. Every column has a model and an optimizer of its own. A batch is loaded and
augmented first, then each column takes its step on it (gradients and SGD), and only that is timed: loading is not, and
the columns are interleaved step by step. An epoch is cut into blocks of 4 steps; times and ratios are medians over the
blocks, scaled to the images of the whole data set. The eager columns are as the paper ran them, with torch's own
layers; "objective" and "interval k" are densreg.RegularizedObjective. Before anything is timed each column's gradients
on the first batch are compared with float64. Without --data-dir the images are noise of the same shape, and the row
says so.

per_class costs a backward for each class: on CIFAR-100 it takes its steps on a few images of the first batches only,
and on Tiny ImageNet (200 classes, 64x64) the graphs of its backwards do not fit.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from densreg.lab import data, models

from . import steps
from .timing import peak_bytes, spread, synchronize

BLOCK = 4
"""Steps; "interval 4" takes the penalty once in each."""


class Task(NamedTuple):
    """A data set, its model and its batch; ``few``: the images and the steps of per_class, None for all."""

    model: str
    batch: int
    shape: tuple[int, int, int]
    classes: int
    whole: int
    few: tuple[int, int] | None = None


TASKS = {
    "blockmnist": Task("mlp", 128, (1, 56, 28), 10, 60_000),
    "cifar100": Task("resnet18", 32, (3, 32, 32), 100, 50_000, (2, 1)),
    "tiny-imagenet": Task("resnet18", 16, (3, 64, 64), 200, 100_000, (0, 0)),
}
EAGER = ("plain eager", "naive", "max_shift", "per_class", "stable", "taylor")
COLUMNS = ("plain", *EAGER, "objective", f"interval {BLOCK}", *steps.RIVALS)

CASES = {
    "tiny": (("blockmnist", 512),),
    "quick": (("blockmnist", 2048),),
    "full": (("blockmnist", 60_000), ("cifar100", 128), ("tiny-imagenet", 64)),
}


def load(name: str, data_dir: Any) -> data.DataSet:
    """The data set, or noise of its shape where there is no folder."""
    if data_dir is not None:
        return data.load(name, data_dir)
    task, generator = TASKS[name], torch.Generator().manual_seed(0)
    images = torch.randint(256, (1024, *task.shape), dtype=torch.uint8, generator=generator)
    split = data.Split(images, torch.randint(task.classes, (1024,), generator=generator))
    return data.DataSet(name, split, split, task.classes, note="noise of its shape, not its images")


def measure(
    name: str,
    images: int | None,
    data_dir: Any = None,
    columns: Sequence[str] = COLUMNS,
    device: str = "cpu",
) -> tuple[dict[str, Any], Callable[[], Any]]:
    """Seconds for an image, ratios and peak memory of each column; and the objective's step, for pytest-benchmark.

    Args:
        images: how many are timed, rounded up to whole blocks; None for the whole training set.

    Raises:
        WrongResult: a column's gradients are not those of float64; nothing was timed.
    """
    task, loaded = TASKS[name], load(name, data_dir)
    block = BLOCK * task.batch
    available = len(loaded.train) // block * block
    total = available if images is None else -(-images // block) * block
    memory_format = torch.channels_last
    torch.manual_seed(0)
    model = models.build(task.model, loaded.classes, loaded.image_shape, loaded.mean, loaded.std)
    model.to(device, memory_format=memory_format)  # type: ignore[call-overload]

    def batches() -> Any:
        done = epoch = 0
        while done < total:
            for x, y in data.batches(loaded.train, task.batch, seed=0, epoch=epoch):
                if len(y) < task.batch or done == total:
                    break
                done += task.batch
                yield x.to(device, memory_format=memory_format), y.to(device)
            epoch += 1

    few = {"per_class": task.few or (task.batch, total)}
    columns = [c for c in columns if few.get(c, (1, 1))[0]]
    x, y = next(batches())
    references = steps.references(model, x, y)
    errors, peaks, runs = {}, {}, {}
    for column in columns:
        mine = copy.deepcopy(model)
        step = steps.steps_of(column, mine)
        part = slice(0, few.get(column, (task.batch, 0))[0])
        wanted = references if len(x[part]) == len(x) else steps.references(model, x[part], y[part])
        errors[column] = steps.require(column, step(x[part], y[part]), wanted)
        for _ in range(BLOCK - 1 if steps.interval_of(column) > 1 else 1):  # the skipped steps are another graph
            step(x[part], y[part])
        peaks[column] = peak_bytes(lambda step=step, part=part: step(x[part], y[part]))  # type: ignore[misc]
        runs[column] = (step, list(mine.parameters()), torch.optim.SGD(mine.parameters(), 0.01, 0.9, weight_decay=5e-4))
    times: dict[str, list[float]] = {column: [] for column in columns}
    for number, (x, y) in enumerate(batches()):
        for column, (step, parameters, optimizer) in runs.items():
            size, most = few.get(column, (task.batch, total))
            if number < most:
                times[column].append(_timed(step, parameters, optimizer, x[:size], y[:size]))
    result = {
        "data": name,
        "source": loaded.note or "the published images",
        "model": task.model,
        "batch": task.batch,
        "classes": loaded.classes,
        "images": total,
        "epoch_images": len(loaded.train) if data_dir is not None else task.whole,
        "threads": torch.get_num_threads(),
        "device": device,
        "images_of": {column: few.get(column, (task.batch, 0))[0] * len(times[column]) for column in columns},
        **_summary(times, {column: few.get(column, (task.batch, 0))[0] for column in columns}, task.batch),
        "peak_bytes": peaks,
        "error": errors,
    }
    return result, lambda: (runs.get("objective") or runs["plain"])[0](x, y)


def _timed(
    step: steps.Step, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor
) -> float:
    synchronize()
    start = time.perf_counter()
    for w, grad in zip(parameters, step(x, y), strict=True):
        w.grad = grad
    optimizer.step()
    optimizer.zero_grad()
    synchronize()
    return time.perf_counter() - start


def _summary(times: dict[str, list[float]], sizes: dict[str, int], batch: int) -> dict[str, Any]:
    """Seconds for an image and ratios, medians over blocks of steps; by the step where a column has no whole block."""
    rates: dict[str, list[float]] = {}
    ratios: dict[str, list[float]] = {}
    for column, values in times.items():
        n = BLOCK if len(values) >= BLOCK else 1
        mine = [sum(values[i : i + n]) / (n * sizes[column]) for i in range(0, len(values), n)]
        plain = [sum(times["plain"][i : i + n]) / (n * batch) for i in range(0, len(values), n)]
        rates[column] = mine
        ratios[column] = [a / b for a, b in zip(mine, plain, strict=True)]
    return {
        "seconds_per_image": {column: statistics.median(values) for column, values in rates.items()},
        "over_plain": {column: statistics.median(values) for column, values in ratios.items()},
        "quartiles": {column: spread(values) for column, values in ratios.items() if len(values) > 1},
    }


def test_epoch(case, request, headline):
    name, images = case
    option = request.config.getoption
    if option("--images"):
        images = None if option("--images") == "whole" else int(option("--images"))
    result, step = measure(name, images, option("--data-dir"), device=option("--device"))
    headline("epoch", result, step, rounds=3)
