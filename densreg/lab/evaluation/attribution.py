"""Attribution maps, and the two tests of them that take pixels away or put them in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from densreg.lab import data, report
from densreg.lab.evaluation.samples import (
    Comparison,
    Noise,
    Unmeasurable,
    batches,
    check_one_of,
    check_range,
    choose_target,
    of_class,
    require,
)

METHODS = ("gradient", "smoothgrad", "integrated_gradients")
BASELINES = ("black", "mean", "blur")

PICTURES = 6
"""Images in a picture of attribution maps."""


def attribute(
    model: nn.Module,
    x: Tensor,
    target: Tensor,
    index: Tensor,
    method: str = "smoothgrad",
    seed: int = 0,
    samples: int = 16,
    sigma: float = 0.15,
    steps: int = 32,
) -> Tensor:
    """Attributions of a class's logit to the pixels, by captum, signed, [n, channels, H, W].

    Args:
        x: [n, channels, H, W] in [0, 1]; target: [n] int64, the classes; index: [n], the images' numbers.
        method: "gradient", "smoothgrad" (Smilkov et al., 2017: the mean gradient under Gaussian noise), or
            "integrated_gradients" (Sundararajan et al., ICML 2017) from a black image.
        samples, sigma: of smoothgrad: draws, and the noise's standard deviation in pixels of [0, 1] (assumed).
        steps: of integrated gradients, Gauss-Legendre (assumed).

    Raises:
        ModuleNotFoundError: captum is not installed.
        ValueError: an attribution is not finite, of which there is no order.
    """
    check_one_of("method", method, METHODS)
    for name, value in (("samples", samples), ("steps", steps)):
        check_range(name, value, 1, 2**31)
    check_range("sigma", sigma, 0, 1e3)
    attr = require("captum.attr", "evaluate")
    x = x.detach()
    saliency = attr.Saliency(model)
    if method == "integrated_gradients":
        integrated = attr.IntegratedGradients(model)
        result = integrated.attribute(x, 0.0, target, n_steps=steps, internal_batch_size=len(x))
        result = result.to(x.dtype)  # captum's weights are float64
    elif method == "gradient":
        result = saliency.attribute(x.requires_grad_(), target, abs=False)
    else:
        # captum's NoiseTunnel draws a batch's noise as a whole: an image's would change with its place in the batch.
        noise, result = Noise(seed, index), torch.zeros_like(x)
        for _ in range(samples):
            noisy = (x + sigma * noise.like(x)).requires_grad_()
            result += saliency.attribute(noisy, target, abs=False).detach()
        result /= samples
    lost = ~result.isfinite().flatten(1).all(1)
    if lost.any():
        raise Unmeasurable(f"the attributions of image {index[lost.cpu()][0].item()} are not finite")
    return result.detach()


def ranking(attributions: Tensor) -> Tensor:
    """Pixels [n, H * W] from the most to the least important: by |attribution|, summed over channels; ties in order."""
    return attributions.abs().sum(1).flatten(1).argsort(dim=1, descending=True, stable=True)


def baseline_of(x: Tensor, baseline: str) -> Tensor:
    """What stands where pixels are missing, shaped like x.

    Args:
        baseline: "black", the image's "mean" in each channel, or the image in a "blur" (Gaussian, 11x11, sigma 5: that
            of RISE, Petsiuk et al., BMVC 2018; smaller where the image is).
    """
    check_one_of("baseline", baseline, BASELINES)
    if baseline == "black":
        return torch.zeros_like(x)
    if baseline == "mean":
        return x.mean((2, 3), keepdim=True).expand_as(x)
    from torchvision.transforms.v2 import functional

    sides = [min(11, 2 * side - 1) for side in x.shape[-2:]]  # the reflection that pads must fit
    return functional.gaussian_blur(x, sides[::-1], [5.0, 5.0])


def replace_pixels(x: Tensor, pixels: Tensor, by: Tensor) -> Tensor:
    """x [n, channels, H, W] with some pixels [n, k] of each image replaced, in all channels, by those of another."""
    mask = torch.zeros(len(x), 1, x.shape[2] * x.shape[3], dtype=torch.bool, device=x.device)
    mask.scatter_(2, pixels.unsqueeze(1), True)
    return torch.where(mask.view(len(x), 1, *x.shape[2:]), by, x)


def pixel_perturbation(
    model: nn.Module,
    split: data.Split,
    *,
    device: torch.device | str,
    batch_size: int,
    seed: int = 0,
    fractions: tuple[float, ...] = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5),
    method: str = "smoothgrad",
    target: str = "prediction",
    baseline: str = "black",
    relative: str = "mean",
    samples: int = 16,
    sigma: float = 0.15,
    steps: int = 32,
) -> dict[str, float]:
    """What the top and the bottom pixels of an attribution weigh in the output logit, Figure 6a of the paper.

    With S the fraction K of the pixels with the largest, or with the smallest attribution, it is the mean over the
    images of f_c(x) - f_c(x without S), in parts of |f_c(x)|. A larger difference of the two is a better attribution.

    Args:
        model: takes pixels in [0, 1]; in eval mode.
        fractions: of the pixels (assumed: the paper's are not known); rounded to whole pixels, at least one.
        method, samples, sigma, steps: see :func:`attribute`; smoothgrad is the paper's.
        target: the class c: the "prediction" for the clean image (assumed) or the "label".
        baseline: what stands where pixels are taken away, see :func:`baseline_of` (assumed: black).
        relative: to |f_c(x)| of each "image", or to its "mean" over the images (assumed): where some logits are near
            zero, these few images are all that the mean over the ratios shows.

    Returns:
        top_K, bottom_K and difference_K (top minus bottom) for each fraction K, and difference, their mean.

    Raises:
        ValueError: what the change would be relative to is zero.
    """
    _check_fractions(fractions)
    check_one_of("relative", relative, ["mean", "image"])
    sums, size = torch.zeros(2, len(fractions), dtype=torch.float64), 0.0
    for index, x, y in batches(split, batch_size, device, "pixel_perturbation"):
        with torch.no_grad():
            logits = model(x)
        classes = choose_target(logits, y, target)
        clean, by = of_class(logits, classes), baseline_of(x, baseline)
        unit = clean.abs() if relative == "image" else torch.ones_like(clean)
        if (unit == 0).any():
            number = index[(unit == 0).cpu()][0].item()
            raise Unmeasurable(f"the output logit of image {number} is zero: there is no change relative to it")
        size += (clean.abs() / unit).double().sum().item()
        order = ranking(attribute(model, x, classes, index, method, seed, samples, sigma, steps))
        with torch.no_grad():
            for i, fraction in enumerate(fractions):
                k = max(1, round(fraction * order.shape[1]))
                for j, pixels in enumerate((order[:, :k], order[:, -k:])):
                    without = of_class(model(replace_pixels(x, pixels, by)), classes)
                    sums[j, i] += ((clean - without) / unit).double().sum().item()
    if size == 0:
        raise Unmeasurable("the output logits of all images are zero: there is no change relative to them")
    top, bottom = sums / size
    result: dict[str, float] = {}
    for i, fraction in enumerate(fractions):
        values = (top[i], bottom[i], top[i] - bottom[i])
        result |= {f"{name}_{fraction:g}": value.item() for name, value in zip(_PERTURBED, values, strict=True)}
    return {**result, "difference": (top - bottom).mean().item()}


_PERTURBED = ("top", "bottom", "difference")


def _check_fractions(fractions: tuple[float, ...]) -> None:
    for fraction in fractions:
        check_range("fractions", fraction, 0, 1, above=True)
    if not fractions:
        raise ValueError("fractions is empty; expected at least one, above 0 and at most 1")


def draw_pixel_perturbation(of: Comparison) -> Any:
    """A matplotlib figure: change without the top and the bottom pixels, and the difference, over the fraction."""
    figure, (row,) = report.panels(1, 3, 12, 3.6)
    titles = {
        "difference": "top minus bottom",
        "top": "without the most important pixels",
        "bottom": "without the least important pixels",
    }
    fractions = of.options["fractions"]
    for axes, (name, title) in zip(row, titles.items(), strict=True):
        lines = {run: (fractions, [values[f"{name}_{k:g}"] for k in fractions]) for run, values in of.results.items()}
        report.draw_lines(axes, lines, "o", None, title=title, xlabel="part of the pixels")
    row[0].set_ylabel("fractional change of the output logit")
    row[0].legend(fontsize="small")
    return figure


def insertion_curve(
    model: nn.Module, x: Tensor, target: Tensor, order: Tensor, by: Tensor, points: int
) -> tuple[Tensor, Tensor]:
    """The softmax of a class while pixels come in, from the most important one on.

    Args:
        x: [n, channels, H, W]; target: [n]; order: [n, H * W]; by: the image that is there before, shaped like x.
        points: parts into which the way is divided, at most the number of pixels.

    Returns:
        (the part of the pixels that is in [points + 1], from 0 to 1; the softmax [n, points + 1]).
    """
    pixels = order.shape[1]
    counts = torch.linspace(0, pixels, min(points, pixels) + 1).round().long()
    values = []
    with torch.no_grad():
        for count in counts.tolist():
            values.append(model(replace_pixels(by, order[:, :count], x)).softmax(1).double().gather(1, target[:, None]))
    return counts.double() / pixels, torch.cat(values, 1).cpu()


def insertion(
    model: nn.Module,
    split: data.Split,
    *,
    device: torch.device | str,
    batch_size: int,
    seed: int = 0,
    method: str = "smoothgrad",
    target: str = "prediction",
    baseline: str = "blur",
    points: int = 50,
    samples: int = 16,
    sigma: float = 0.15,
    steps: int = 32,
) -> dict[str, float]:
    """The insertion game, Figures 1 and 13 to 15 of the paper: a good attribution brings the class back early.

    Pixels come into the baseline by their attribution; the area under the softmax of the class over the part of the
    pixels that is in, by trapezoids, from 0 to 1 (RISE, Petsiuk et al., BMVC 2018).

    Args:
        model: takes pixels in [0, 1]; in eval mode.
        method, samples, sigma, steps: see :func:`attribute` (assumed: smoothgrad).
        target: the class: the "prediction" for the clean image (assumed) or the "label".
        baseline: what the pixels come into, see :func:`baseline_of` (assumed: RISE's blur).
        points: parts into which the way is divided (assumed), at most the number of pixels.

    Returns:
        auc, the mean over the images.
    """
    check_range("points", points, 1, 2**31)
    total = 0.0
    for index, x, y in batches(split, batch_size, device, "insertion"):
        with torch.no_grad():
            classes = choose_target(model(x), y, target)
        order = ranking(attribute(model, x, classes, index, method, seed, samples, sigma, steps))
        total += _areas(model, x, classes, order, baseline, points).sum().item()
    return {"auc": total / len(split)}


def _areas(model: nn.Module, x: Tensor, target: Tensor, order: Tensor, baseline: str, points: int) -> Tensor:
    parts, curve = insertion_curve(model, x, target, order, baseline_of(x, baseline), points)
    return torch.trapezoid(curve, parts, dim=1)


def draw_insertion(of: Comparison) -> Any:
    """A matplotlib figure: the first images, and their attribution maps by each run, with the insertion AUC."""
    index = torch.arange(min(PICTURES, len(of.split)))
    x, y = of.split.batch(index, torch.Generator())
    x, y = x.to(of.device), y.to(of.device)
    figure, rows = report.panels(1 + len(of.models), len(index), 1.9 * len(index), 2.1 * (1 + len(of.models)) + 0.3)
    for axes, image, label in zip(rows[0], x, y.tolist(), strict=True):
        report.draw_image(axes, image, f"label {label}")
    for row, (run, model) in zip(rows[1:], of.models.items(), strict=True):
        with torch.no_grad():
            classes = choose_target(model(x), y, of.options["target"])
        options = {name: of.options[name] for name in ("method", "samples", "sigma", "steps")}
        maps = attribute(model, x, classes, index, seed=of.seed, **options)
        areas = _areas(model, x, classes, ranking(maps), of.options["baseline"], of.options["points"])
        for axes, attribution, number, area in zip(row, maps.abs().sum(1), classes.tolist(), areas, strict=True):
            # Each map has its own scale: a smoother model's are smaller, and it is where they lie that is looked at.
            high = attribution.flatten().quantile(0.99).item() or 1
            report.draw_image(axes, attribution, f"class {number}, AUC {area:.2f}", "inferno", high=high)
        row[0].set_ylabel(run, fontsize="small")
    figure.suptitle(f"attribution to the {of.options['target']}: {of.options['method']}", fontsize="medium")
    return figure
