"""Images that maximise a class's logit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from densreg.lab import data, report
from densreg.lab.evaluation.samples import Comparison, Noise, check_range, of_class

MOST = 10
"""So many classes, the first ones, if nothing is said."""


def maximise(
    model: nn.Module,
    classes: Tensor,
    shape: tuple[int, ...],
    device: torch.device | str,
    seed: int,
    steps: int,
    lr: float,
    start: float,
    variation: float,
) -> Tensor:
    """An image for each class, [n, channels, H, W] in [0, 1], with the class's logit as large as ascent makes it.

    Adam on the pixels, which are put back into [0, 1] after each step; see :func:`activation_maximisation`.
    """
    grey = torch.full((len(classes), *shape), 0.5, device=device)
    x = (grey + start * Noise(seed, classes).like(grey)).clamp(0, 1).requires_grad_()
    optimizer = torch.optim.Adam([x], lr)
    classes = classes.to(device)
    for _ in range(steps):
        with torch.enable_grad():
            rough = (x.diff(dim=2).abs().sum() + x.diff(dim=3).abs().sum()) / x[0].numel()
            (x.grad,) = torch.autograd.grad(variation * rough - of_class(model(x), classes).sum(), x)
        optimizer.step()
        with torch.no_grad():
            x.clamp_(0, 1)
    return x.detach()


def activation_maximisation(
    model: nn.Module,
    split: data.Split,
    *,
    device: torch.device | str,
    batch_size: int,
    seed: int = 0,
    classes: tuple[int, ...] | None = None,
    steps: int = 200,
    lr: float = 0.02,
    start: float = 0.1,
    variation: float = 0.0,
) -> dict[str, float]:
    """Activation maximisation, Figures 11 and 12 of the paper: the picture is the result, the figures go along.

    Args:
        model: takes pixels in [0, 1]; in eval mode.
        split: only the shape of its images is looked at.
        classes: numbers of classes; None: the first 10.
        steps, lr: of Adam on the pixels, which stay in [0, 1] (assumed: the paper's way is not known).
        start: standard deviation of the noise around grey that the ascent starts from (assumed).
        variation: weight of the total variation per pixel, which is taken off the logit (assumed: 0).

    Returns:
        logit, the mean over the classes of what was reached; confidence, that of its softmax.
    """
    shape, numbers = _shape_and_classes(model, split, device, classes)
    _check(steps, lr, start, variation)
    logits, confidences = [], []
    for part in numbers.split(batch_size):
        x = maximise(model, part, shape, device, seed, steps, lr, start, variation)
        with torch.no_grad():
            reached = model(x).double()
        logits.append(of_class(reached, part.to(device)))
        confidences.append(of_class(reached.softmax(1), part.to(device)))
    return {"logit": torch.cat(logits).mean().item(), "confidence": torch.cat(confidences).mean().item()}


def _check(steps: int, lr: float, start: float, variation: float) -> None:
    check_range("steps", steps, 1, 2**31)
    check_range("lr", lr, 0, 1e3, above=True)
    check_range("start", start, 0, 1e3)
    check_range("variation", variation, 0, 1e38)


def _shape_and_classes(
    model: nn.Module, split: data.Split, device: torch.device | str, classes: tuple[int, ...] | None
) -> tuple[tuple[int, ...], Tensor]:
    if len(split) == 0:
        raise ValueError("there are no images for activation_maximisation; expected at least one, for the shape")
    x, _ = split.batch(torch.arange(1), torch.Generator())
    with torch.no_grad():
        count = model(x.to(device)).shape[1]
    numbers = range(min(count, MOST)) if classes is None else classes
    wrong = [number for number in numbers if not 0 <= number < count]
    if wrong or not numbers:
        raise ValueError(f"classes must be numbers from 0 to {count - 1}, got {', '.join(map(str, wrong)) or 'none'}")
    return tuple(x.shape[1:]), torch.tensor(numbers)


def draw_activation_maximisation(of: Comparison) -> Any:
    """A matplotlib figure: the images, a row for each run and a column for each class."""
    options = {name: of.options[name] for name in ("steps", "lr", "start", "variation")}
    first = next(iter(of.models.values()))
    shape, numbers = _shape_and_classes(first, of.split, of.device, of.options["classes"])
    numbers = numbers[:MOST]
    figure, rows = report.panels(len(of.models), len(numbers), 1.5 * len(numbers) + 0.3, 1.8 * len(of.models) + 0.3)
    for row, (run, model) in zip(rows, of.models.items(), strict=True):
        parts = [maximise(model, part, shape, of.device, of.seed, **options) for part in numbers.split(of.batch_size)]
        for axes, image, number in zip(row, torch.cat(parts), numbers.tolist(), strict=True):
            report.draw_image(axes, image, f"class {number}")
        row[0].set_ylabel(run, fontsize="small")
    return figure
