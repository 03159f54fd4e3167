"""Clean accuracy, and that of the worst group."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from densreg import data
from densreg.evaluation.samples import batches


def correct(model: nn.Module, split: data.Split, device: torch.device | str, batch_size: int, what: str) -> Tensor:
    """[N] bool on the CPU: whether each image's largest logit is that of its label."""
    with torch.no_grad():
        return torch.cat([(model(x).argmax(1) == y).cpu() for _, x, y in batches(split, batch_size, device, what)])


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
    model: nn.Module, split: data.Split, *, device: torch.device | str, batch_size: int, seed: int = 0
) -> dict[str, float]:
    """Accuracy of each group and of the worst one: the paper's tables for CelebA-Hair and Waterbirds.

    Args:
        model: takes pixels in [0, 1]; in eval mode.
        split: of a data set with groups.
        seed: not used, nothing is random.

    Returns:
        group_0, group_1, ...; worst_group, the least of them; group_mean, their mean with equal weights; clean, the
        mean over the images.

    Raises:
        ValueError: the data set has no groups, or a group has no images.
    """
    groups = getattr(split, "groups", None)
    if groups is None:
        raise ValueError("worst_group needs a data set with groups, and this one has none")
    return group_accuracy(correct(model, split, device, batch_size, "worst_group"), groups)


def group_accuracy(correct: Tensor, groups: Tensor, count: int | None = None) -> dict[str, float]:
    """What :func:`worst_group` gives, of [N] bool and [N] int64.

    Args:
        count: number of groups; by default the largest group's number and one.

    Raises:
        ValueError: the shapes differ, or a group has no images.
    """
    if correct.shape != groups.shape or correct.ndim != 1:
        raise ValueError(f"wanted one group for each image: {list(correct.shape)} images, {list(groups.shape)} groups")
    if len(groups) == 0:
        raise ValueError("there are no images for worst_group; wanted at least one in each group")
    sizes = torch.bincount(groups, minlength=count or 0)
    empty: Sequence[int] = (sizes == 0).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"group {empty[0]} of {len(sizes)} has no images among these {len(groups)}: take more of them")
    right = torch.bincount(groups, weights=correct.double(), minlength=len(sizes))
    of_group = right / sizes
    result = {f"group_{i}": value for i, value in enumerate(of_group.tolist())}
    clean = correct.double().mean().item()
    return {**result, "worst_group": of_group.min().item(), "group_mean": of_group.mean().item(), "clean": clean}
