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
import functools
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from densreg.lab import data, models

from . import steps
from .records import Row
from .timing import elapsed, peak_bytes, summarize

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
    batch: int | None = None,
) -> tuple[Row, Callable[[], Any]]:
    """Seconds of an epoch, ratios and peak memory of each column; and the objective's step, for pytest-benchmark.

    Args:
        images: how many are timed, rounded up to whole blocks; None for the whole training set.
        batch: in place of the task's own.

    Raises:
        WrongResult: a column's gradients are not those of float64; nothing was timed.
    """
    task, loaded = TASKS[name], load(name, data_dir)
    task = task if batch is None else task._replace(batch=batch)
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
        expected = references if len(x[part]) == len(x) else steps.references(model, x[part], y[part])
        errors[column] = steps.require(column, step(x[part], y[part]), expected)
        for _ in range(BLOCK - 1 if steps.interval_of(column) > 1 else 1):  # the skipped steps are another graph
            step(x[part], y[part])
        peaks[column] = peak_bytes(lambda step=step, part=part: step(x[part], y[part]))  # type: ignore[misc]
        runs[column] = (step, list(mine.parameters()), torch.optim.SGD(mine.parameters(), 0.01, 0.9, weight_decay=5e-4))
    times: dict[str, list[float]] = {column: [] for column in columns}
    for number, (x, y) in enumerate(batches()):
        for column, (step, parameters, optimizer) in runs.items():
            size, most = few.get(column, (task.batch, total))
            if number < most:
                taken = functools.partial(_take, step, parameters, optimizer, x[:size], y[:size])
                times[column].append(elapsed(taken) / size)
    whole = len(loaded.train) if data_dir is not None else task.whole
    found = summarize_blocks(times, whole)
    for column, of in found.items():
        of |= {"peak_bytes": peaks[column], "images": few.get(column, (task.batch, 0))[0] * len(times[column])}
        of |= {"error": errors[column]} if errors[column] is not None else {}
    case = {"data": name, "source": loaded.note or "the published images", "model": task.model, "batch": task.batch}
    case |= {"classes": loaded.classes, "images": total, "epoch_images": whole, "device": device}
    row = {"suite": "epoch", "case": case, "columns": found}
    return row, lambda: (runs.get("objective") or runs["plain"])[0](x, y)


def _take(
    step: steps.Step, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor
) -> None:
    for w, grad in zip(parameters, step(x, y), strict=True):
        w.grad = grad
    optimizer.step()
    optimizer.zero_grad()


def summarize_blocks(times: dict[str, list[float]], images: int) -> dict[str, dict[str, Any]]:
    """Seconds for ``images`` and ratios to plain, medians over blocks of steps.

    A column without a whole block is summarized by the step; where there is one only, there are no quartiles.

    Args:
        times: of each step, seconds for an image.
    """
    found = {}
    for column, values in times.items():
        n = BLOCK if len(values) >= BLOCK else 1
        blocks = {
            "plain": [statistics.mean(times["plain"][i : i + n]) * images for i in range(0, len(values), n)],
            column: [statistics.mean(values[i : i + n]) * images for i in range(0, len(values), n)],
        }
        once = len(blocks[column]) == 1
        of = summarize({name: 2 * each if once else each for name, each in blocks.items()}, "plain")[column]
        found[column] = {k: v for k, v in of.items() if not (once and k.endswith(("_low", "_high")))}
    return found


def test_epoch(case, request, headline):
    name, images = case
    option = request.config.getoption
    if option("--images"):
        images = None if option("--images") == "whole" else int(option("--images"))
    result, step = measure(name, images, option("--data-dir"), device=option("--device"))
    headline("epoch", [result], step, rounds=3)
