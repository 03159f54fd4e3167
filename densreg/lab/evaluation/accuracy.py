"""Clean accuracy, and that of the worst group."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from densreg.lab import data
from densreg.lab.evaluation.samples import Unmeasurable, batches
from densreg.lab.groups import group_accuracy


def correct(model: nn.Module, split: data.Split, device: torch.device | str, batch_size: int, what: str) -> Tensor:
    """[N] bool on the CPU: whether each image's largest logit is that of its label."""
    return torch.cat([is_right(model, x, y).cpu() for _, x, y in batches(split, batch_size, device, what)])


def is_right(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """[B] bool; raises ValueError where a logit is NaN."""
    with torch.no_grad():
        return logits_of(model, x).argmax(1) == y


def logits_of(model: nn.Module, x: Tensor) -> Tensor:
    """The logits [B, C] of images x [B, ...]; raises ValueError where one has a NaN, which argmax would prefer."""
    logits = model(x)
    lost = logits.isnan()
    # An attack may itself have made an image of NaN, as a trial that it drops.
    if lost.any() and (lost.any(1) & x.isfinite().flatten(1).all(1)).any():
        raise Unmeasurable("the model's logits are NaN: it has no accuracy")
    return logits


def accuracy(
    model: nn.Module, split: data.Split, *, device: torch.device | str, batch_size: int, seed: int = 0
) -> dict[str, float]:
    """Clean accuracy: the last column of the paper's Tables 1 and 3.

    Args:
        model: takes pixels in [0, 1]; in eval mode.
        seed: not used, nothing is random.

    Returns:
        clean, the part of the images that are classified right.
    """
    return {"clean": correct(model, split, device, batch_size, "accuracy").double().mean().item()}


def worst_group(
    model: nn.Module,
    split: data.Split,
    *,
    device: torch.device | str,
    batch_size: int,
    seed: int = 0,
    groups: tuple[str, ...] = (),
) -> dict[str, float]:
    """Accuracy of each group and of the worst one: the paper's tables for CelebA-Hair and Waterbirds.

    Args:
        model: takes pixels in [0, 1]; in eval mode.
        split: of a data set with groups.
        seed: not used, nothing is random.
        groups: names of all groups; :func:`densreg.lab.evaluation.evaluate` takes the data set's. Without them a group
            that has no image and a number above all others is not missed.

    Returns:
        For each group its name, or group_0, group_1, ...; worst_group, the least of them; group_mean, their mean with
        equal weights; clean, the mean over the images.

    Raises:
        ValueError: the data set has no groups, or a group has no images.
    """
    if split.groups is None:
        raise ValueError("worst_group needs a data set with groups, and this one has none")
    return group_accuracy(correct(model, split, device, batch_size, "worst_group"), split.groups, groups)
