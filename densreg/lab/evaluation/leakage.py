"""Feature leakage: how much of an attribution lies where nothing is to be seen, on BlockMNIST's null tile."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from densreg.lab import data, report
from densreg.lab.evaluation.attribution import attribute
from densreg.lab.evaluation.samples import Comparison, Unmeasurable, batches, check_one_of

PICTURES = 8
"""Images in a picture of attribution maps."""

OUTPUTS: dict[str, nn.Module] = {
    "logit": nn.Identity(),
    "log_softmax": nn.LogSoftmax(1),
    "softmax": nn.Softmax(1),
}


def leakage(
    model: nn.Module,
    split: data.Split,
    *,
    device: torch.device | str,
    batch_size: int,
    seed: int = 0,
    steps: int = 32,
    output: str = "logit",
) -> dict[str, float]:
    """Norm of the integrated gradients over the null tile: Eq. 9 and Tables 1 and 3 of the paper.

    The integrated gradients are those of the label's output from a black image, by captum. Which norm, how many steps
    and whether images are summed is not known of the paper (assumed: L2, 32, the mean), so that ratios between models
    are what can be compared with it. Attributions shrink with the gradient: a share is free of that.

    Args:
        model: takes pixels in [0, 1]; in eval mode.
        split: images of BlockMNIST; the null tile may be above or below.
        seed: not used, nothing is random.
        steps: of the integral, Gauss-Legendre.
        output: the label's "logit", "log_softmax" or "softmax".

    Returns:
        l1 and l2, the mean over the images of the norm over the null tile; l1_sum and l2_sum, the sum over them; net,
        the mean of the absolute value of the attributions' sum over the tile, where their signs cancel; whole_l1 and
        whole_l2, the mean norm over the whole image; share_l1 and share_l2, the mean over the images of the tile's norm
        as a share of the whole image's.

    Raises:
        DataError: an image has no null tile.
        ValueError: an image's attributions are all zero, so that there is no share.
        ModuleNotFoundError: captum is not installed.
    """
    check_one_of("output", output, [*OUTPUTS])
    attributed, rows = _attributed(model, output), []
    for index, x, y in batches(split, batch_size, device, "leakage"):
        tiles = data.null_tiles(x)
        rows.append(norms(attribute(attributed, x, y, index, "integrated_gradients", steps=steps), tiles))
    by_image = torch.cat(rows)
    if not (by_image[:, 3:] > 0).all():
        raise Unmeasurable("leakage has no share in an image whose attributions are all zero: the model ignores it")
    l1, l2, net, whole_l1, whole_l2 = by_image.mean(0).tolist()
    share_l1, share_l2 = (by_image[:, :2] / by_image[:, 3:]).mean(0).tolist()
    result = {"l1": l1, "l2": l2, "l1_sum": l1 * len(split), "l2_sum": l2 * len(split), "net": net}
    return {**result, "whole_l1": whole_l1, "whole_l2": whole_l2, "share_l1": share_l1, "share_l2": share_l2}


def _attributed(model: nn.Module, output: str) -> nn.Module:
    return model if output == "logit" else nn.Sequential(model, OUTPUTS[output])


def norms(attributions: Tensor, tiles: Tensor) -> Tensor:
    """L1, L2 and the absolute sum over the tiles, L1 and L2 over the images: [n, 5] float64, on the CPU.

    Args:
        attributions: [n, ...]; tiles: of the same shape, bool.
    """
    whole = attributions.double().flatten(1)
    tile = whole * tiles.flatten(1)
    columns = [tile.norm(1, dim=1), tile.norm(2, dim=1), tile.sum(1).abs(), whole.norm(1, dim=1), whole.norm(2, dim=1)]
    return torch.stack(columns, 1).cpu()


def draw(of: Comparison) -> Any:
    """A matplotlib figure: the first images, and integrated gradients by each run, each on a scale of its own."""
    index = torch.arange(min(PICTURES, len(of.split)))
    x, y = of.split.batch(index, torch.Generator())
    figure, rows = report.panels(1 + len(of.models), len(x), 1.1 * len(x), 2.2 * (1 + len(of.models)))
    for axes, image in zip(rows[0], x, strict=True):
        report.draw_image(axes, image)
    for row, (run, model) in zip(rows[1:], of.models.items(), strict=True):
        attributed = _attributed(model, of.options["output"])
        steps, inputs = of.options["steps"], (x.to(of.device), y.to(of.device))
        maps = attribute(attributed, *inputs, index, "integrated_gradients", steps=steps).sum(1)
        for axes, values in zip(row, maps, strict=True):
            largest = values.abs().max().item() or 1.0
            report.draw_image(axes, values, "", "seismic", -largest, largest)
        row[0].set_ylabel(run)
    return figure
