"""Telling images of the training distribution from others by what the classifier says of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from densreg.attacks import log_odds
from densreg.functional import log_density
from densreg.lab import data as datasets
from densreg.lab.evaluation.samples import Unmeasurable, batches, check_range, require

SCORES = ("log_density", "maximum_logit", "maximum_softmax")


def out_of_distribution(
    model: nn.Module,
    split: datasets.Split,
    *,
    device: torch.device | str,
    batch_size: int,
    seed: int = 0,
    data: str | None = None,
    data_dir: str | None = None,
    images: int | None = None,
    fit: bool = False,
) -> dict[str, float]:
    """Area under the ROC curve of three scores, Table 7 of the paper, with in-distribution as the positive class.

    0.5 is chance, 1 is a higher score for every in-distribution image. Some of the paper's figures lie below 0.5; which
    class is positive there is not known, so 1 - AUROC may be what compares with them.

    Args:
        model: takes pixels in [0, 1]; in eval mode.
        split: in-distribution images.
        seed: not used, nothing is random.
        data, data_dir: name and folder of the other data set, see :func:`densreg.lab.data.load`; its test images
            are taken.
        images: how many of them, the first ones; None: all (assumed).
        fit: whether images of another shape are made to fit: scaled (bilinear, antialiased), channels averaged or
            repeated. Otherwise such a data set is an error.

    Returns:
        log_density (logsumexp of the logits), maximum_logit and maximum_softmax.

    Raises:
        ValueError: there is no other data set, its images are of another shape, or a score is not finite.
    """
    others = outside(data, data_dir, images)
    shape, given = split.image_shape, others.image_shape
    if given != shape and not fit:
        there, here = ("x".join(map(str, size)) for size in (given, shape))
        raise ValueError(f"the images of {data} are {there}, those of the run {here}; fit=true makes them fit")
    positive, negative = (scores(model, part, device, batch_size, shape) for part in (split, others))
    return {name: auroc(positive[name], negative[name]) for name in SCORES}


def outside(data: str | None, data_dir: str | None, images: int | None, download: bool = False) -> datasets.Split:
    """The first test images of the other data set; see :func:`out_of_distribution`."""
    if data is None:
        raise ValueError("out_of_distribution needs another data set, and its folder: data=NAME data_dir=DIR")
    if images is not None:
        check_range("images", images, 1, 2**31)
    return datasets.load(data, data_dir, download, augment=False).test.first(images)


def _fit(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Images [n, channels, H, W] made to fit (channels, H, W)."""
    if x.shape[1] != shape[0]:
        x = x.mean(1, keepdim=True).expand(-1, shape[0], -1, -1)
    if x.shape[2:] != tuple(shape[1:]):
        x = F.interpolate(x, tuple(shape[1:]), mode="bilinear", antialias=True).clamp(0, 1)
    return x


def scores(
    model: nn.Module, split: datasets.Split, device: torch.device | str, batch_size: int, shape: Sequence[int]
) -> dict[str, Tensor]:
    """Each image's score [N], on the CPU, by the name of the score."""
    rows = []
    with torch.no_grad():
        for _, x, _ in batches(split, batch_size, device, "out_of_distribution"):
            logits = model(_fit(x, shape))
            # The softmax in order, where in float32 many would be 1.
            sure = -log_odds(logits, logits.argmax(1))
            rows.append(torch.stack([log_density(logits), logits.amax(1), sure]).double().cpu())
    return dict(zip(SCORES, torch.cat(rows, 1), strict=True))


def auroc(positive: Tensor, negative: Tensor) -> float:
    """Area under the ROC curve of the scores of two classes, [N] and [M]; ties count one half.

    Raises:
        ValueError: a class has no samples, or a score is not finite.
    """
    for name, values in (("positive", positive), ("negative", negative)):
        if len(values) == 0:
            raise ValueError(f"the AUROC needs both classes; the {name} one has no samples")
        if not values.isfinite().all():
            raise Unmeasurable(f"the AUROC needs finite scores; the {name} class has one that is not")
    metrics = require("sklearn.metrics", "evaluate")
    labels = torch.cat([torch.ones(len(positive)), torch.zeros(len(negative))])
    return float(metrics.roc_auc_score(labels.numpy(), torch.cat([positive, negative]).numpy()))
