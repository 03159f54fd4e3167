"""Robustness of gradients and of the log density against Gaussian noise."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from densreg.attacks import log_odds
from densreg.functional import log_density
from densreg.lab import data, report
from densreg.lab.evaluation.samples import (
    Comparison,
    Noise,
    Unmeasurable,
    batches,
    check_one_of,
    check_range,
    input_gradient,
    of_class,
)

FUNCTIONS = ("logit", "loss", "density")


def noise_robustness(
    model: nn.Module,
    split: data.Split,
    *,
    device: torch.device | str,
    batch_size: int,
    seed: int = 0,
    sigmas: tuple[float, ...] = (0.05, 0.1, 0.2),
    samples: int = 4,
    of: str = "logit",
    relative: str = "mean",
) -> dict[str, float]:
    """How much noise changes the input gradient and the log density, Figures 6b and 9 of the paper; lower is steadier.

    With d ~ N(0, sigma^2) in every pixel, means over images and samples:

        gradient_SIGMA      ||g(x + d) - g(x)||_2 / ||g(x)||_2
        density_SIGMA       |log p(x + d) - log p(x)|, in parts of |log p(x)|
        density_nats_SIGMA  |log p(x + d) - log p(x)|

    where log p = logsumexp of the logits. That is known up to a constant only, on which the second depends and the
    third does not: compare the third between models.

    Args:
        model: takes pixels in [0, 1]; in eval mode.
        sigmas: in pixels of [0, 1]. Assumed: the paper's are not known. Noisy pixels are not clipped (assumed).
        samples: draws for each image, the same for every sigma but for the factor (assumed).
        of: what g is the gradient of: the label's "logit" (assumed), the cross-entropy "loss" or the log "density".
        relative: the change of log p is divided by |log p(x)| of each "image", or by its "mean" over the images
            (assumed): where log p is near zero, single images are all that the mean over the ratios shows.

    Raises:
        ValueError: what a change would be relative to is zero.
    """
    check_one_of("relative", relative, ["mean", "image"])
    check_one_of("of", of, FUNCTIONS)
    check_range("samples", samples, 1, 2**31)
    for sigma in sigmas:
        check_range("sigmas", sigma, 0, 1e3, above=True)
    sums, size = torch.zeros(len(sigmas), 3, dtype=torch.float64), 0.0
    for index, x, y in batches(split, batch_size, device, "noise_robustness"):

        def differentiated(logits: torch.Tensor, y: torch.Tensor = y) -> torch.Tensor:
            if of == "loss":
                return F.softplus(log_odds(logits, y))  # the cross-entropy, whose own gradient is rounding here
            return of_class(logits, y) if of == "logit" else log_density(logits)

        logits, gradient = input_gradient(model, x, differentiated)
        clean, length = log_density(logits), gradient.flatten(1).norm(dim=1)
        unit = clean.abs() if relative == "image" else torch.ones_like(clean)
        for name, value in (("gradient", length), ("log density", unit)):
            if (value == 0).any():
                number = index[(value == 0).cpu()][0].item()
                raise Unmeasurable(f"the {name} of image {number} is zero: there is nothing relative to it")
        size += (clean.abs() / unit).double().sum().item()
        noise = Noise(seed, index)
        for _ in range(samples):
            direction = noise.like(x)
            for i, sigma in enumerate(sigmas):
                logits, noisy = input_gradient(model, x + sigma * direction, differentiated)
                change = (log_density(logits) - clean).abs()
                moved = (noisy - gradient).flatten(1).norm(dim=1) / length
                sums[i] += torch.stack([moved, change / unit, change]).double().sum(1).cpu()
    if size == 0:
        raise Unmeasurable("the log density of all images is zero: there is nothing relative to it")
    means = sums / samples / torch.tensor([len(split), size, len(split)])
    names = ("gradient", "density", "density_nats")
    return {f"{name}_{s:g}": means[i, j].item() for j, name in enumerate(names) for i, s in enumerate(sigmas)}


def draw(of: Comparison) -> Any:
    """A matplotlib figure: the three means over sigma, a line for each run."""
    sigmas = of.options["sigmas"]
    figure, (row,) = report.panels(1, 3, 12, 3.6)
    labels = {
        "gradient": f"relative change of the gradient ({of.options['of']})",
        "density": "relative change of the log density",
        "density_nats": "change of the log density, nats",
    }
    xlabel = "standard deviation of the noise, pixels in [0, 1]"
    for axes, (name, label) in zip(row, labels.items(), strict=True):
        lines = {run: (sigmas, [values[f"{name}_{sigma:g}"] for sigma in sigmas]) for run, values in of.results.items()}
        report.draw_lines(axes, lines, "o", xlabel=xlabel, ylabel=label)
        axes.set_ylim(bottom=0)
    return figure
