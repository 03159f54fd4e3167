"""What the metrics share: images with their numbers, noise that follows from them, targets, gradients, checks."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from densreg.lab import data

TARGETS = ("prediction", "label")


@dataclass(frozen=True)
class Comparison:
    """One metric of several models side by side: what its picture is drawn from.

    Attributes:
        models: by name, in eval mode; they take pixels in [0, 1].
        results: what the metric gave, by the models' names.
        split: the images that were measured.
        options: all options of the metric.
    """

    models: Mapping[str, nn.Module]
    results: Mapping[str, Mapping[str, float]]
    split: data.Split
    device: torch.device | str
    batch_size: int
    seed: int
    options: Mapping[str, Any]


class Unmeasurable(ValueError):
    """A metric has no value for a model, as one that ignores its input."""


def batches(
    split: data.Split, batch_size: int, device: torch.device | str, what: str = ""
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Batches of a split in order, with a progress bar on a terminal.

    Args:
        what: what the bar says.

    Returns:
        (index [n] int64 on the CPU: the images' numbers in the split, images [n, channels, H, W] float32 in [0, 1],
        labels [n] int64), the last two on the device.

    Raises:
        ValueError: the split is empty, or the batch size below 1.
    """
    if len(split) == 0:
        raise ValueError(f"there are no images{f' for {what}' if what else ''}; expected at least one")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    done = 0
    with tqdm(total=len(split), desc=what or None, unit="img", disable=None, leave=False) as bar:
        for x, y in data.batches(split, batch_size):
            yield torch.arange(done, done + len(y)), x.to(device), y.to(device)
            done += len(y)
            bar.update(len(y))


class Noise:
    """Standard normal noise of a batch that follows from (seed, number of the image) alone: batches do not matter.

    It is drawn on the CPU, so that devices do not matter either; each call goes on where the last one ended.

    Args:
        index: [n], the images' numbers.
    """

    def __init__(self, seed: int, index: Tensor) -> None:
        self.generators = [data.seeded(seed, number) for number in index.tolist()]

    def like(self, x: Tensor) -> Tensor:
        """[n, ...], shaped like x."""
        return torch.stack([torch.randn(x.shape[1:], generator=g) for g in self.generators]).to(x)


def choose_target(logits: Tensor, labels: Tensor, target: str) -> Tensor:
    """[n] int64: the class that is looked at: the "prediction" for the clean image, or the "label".

    Raises:
        ValueError: neither of the two.
    """
    check_one_of("target", target, TARGETS)
    return logits.argmax(1) if target == "prediction" else labels


def input_gradient(model: nn.Module, x: Tensor, function: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Logits [n, classes] and the gradient [n, ...] of a function of the logits, [n], in the images; without graph."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        logits = model(x)
        (gradient,) = torch.autograd.grad(function(logits).sum(), x)
    return logits.detach(), gradient


def of_class(logits: Tensor, target: Tensor) -> Tensor:
    """[n]: the logit of each image's class."""
    return logits.gather(1, target.unsqueeze(1)).squeeze(1)


def check_one_of(name: str, value: Any, known: Sequence[Any]) -> None:
    """Raise ValueError unless an option has one of the known values."""
    if value not in known:
        raise ValueError(f"{name} must be {', '.join(map(str, known[:-1]))} or {known[-1]}, got {value!r}")


def check_range(name: str, value: float, low: float, high: float, above: bool = False) -> None:
    """Raise ValueError unless low <= value <= high; ``above``: low itself is not allowed."""
    if not low <= value <= high or (above and value == low):
        expected = f"above {low:g} and at most {high:g}" if above else f"in [{low:g}, {high:g}]"
        raise ValueError(f"{name} must be {expected}, got {value}")


def require(module: str, extra: str) -> Any:
    """A module of an extra.

    Raises:
        ModuleNotFoundError: it is not installed; the message names the extra.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        name = module.partition(".")[0]
        raise ModuleNotFoundError(f"{name} is not installed: pip install 'densreg[{extra}]'", name=name) from error
