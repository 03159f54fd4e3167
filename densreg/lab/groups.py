"""Groups of images: group DRO, the cross-entropy of the worst group in training, and the accuracy of each group."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from densreg import functional


class GroupDRO(nn.Module):
    """Criterion ``sum_g q_g mean_{b in g} ce_b``, whose group weights q go up where the loss is high.

    The online algorithm of Sagawa, Koh, Hashimoto and Liang, *Distributionally Robust Neural Networks for Group Shifts*
    (ICLR 2020, Algorithm 1): in each step q_g is multiplied with exp(eta * loss_g) and normalized, and then weights the
    groups' mean losses; a group that the batch lacks has loss 0 in it. The authors' adjustments (by group size, of the
    losses' sum) are left out.

    In eval mode it is the mean cross-entropy, and q stays as it is. q [groups] is a buffer, and in the state_dict.

    Args:
        groups: number of groups.
        eta: step size of the exponentiated gradient ascent, above 0.
    """

    q: Tensor

    def __init__(self, groups: int, eta: float) -> None:
        super().__init__()
        if groups < 1:
            raise ValueError(f"group DRO needs at least one group, got {groups}")
        if not 0 < eta < math.inf:
            raise ValueError(f"eta of group DRO must be finite and above 0, got {eta}")
        self.groups, self.eta = groups, float(eta)
        self.register_buffer("q", torch.full((groups,), 1 / groups))

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Scalar loss of logits [B, C] and target [B, 2] int64, (class, group); in eval mode [B] classes will do."""
        ce, _ = functional.density_cross_entropy(logits, classes(target))
        if not self.training:
            return ce.mean()
        member = (target[:, 1:] == torch.arange(self.groups, device=target.device)).to(ce.dtype)  # [B, groups]
        losses = (ce @ member) / member.sum(0).clamp_min(1)
        with torch.no_grad():
            self.q.copy_((self.q.log() + self.eta * losses).softmax(0))
        return losses @ self.q.to(losses.dtype).clone()  # which the next output's call changes


def classes(target: Tensor) -> Tensor:
    """[B] classes of a target that is them, or [B, 2] with their groups."""
    return target if target.ndim == 1 else target[:, 0]


def group_accuracy(correct: Tensor, groups: Tensor, names: Sequence[str] = ()) -> dict[str, float]:
    """The accuracy of each group, by its name, and of the worst one.

    Args:
        correct: [N], 1 or True where an image is classified right; groups: [N] int64, the images' groups.
        names: of all groups; without them group_0, group_1, ...

    Returns:
        The groups' accuracies; worst_group, the least of them; group_mean, their mean with equal weights; clean, the
        mean over the images.

    Raises:
        ValueError: the shapes differ, a group has no name, or no images.
    """
    if correct.shape != groups.shape or correct.ndim != 1:
        raise ValueError(
            f"expected one group for each image, got {list(correct.shape)} images and {list(groups.shape)} groups"
        )
    if len(groups) == 0:
        raise ValueError("expected at least one image in each group, got no images")
    sizes = torch.bincount(groups, minlength=len(names))
    names = [*names] or [f"group_{i}" for i in range(len(sizes))]
    if len(sizes) > len(names):
        raise ValueError(f"expected a name for each of the {len(sizes)} groups, got {len(names)}")
    for name, size in zip(names, sizes.tolist(), strict=True):
        if size == 0:
            raise ValueError(f"the group {name!r} has no images among these {len(groups)}: take more of them")
    of_group = torch.bincount(groups, weights=correct.double(), minlength=len(sizes)) / sizes
    summary = {"worst_group": of_group.min(), "group_mean": of_group.mean(), "clean": correct.double().mean()}
    return {**dict(zip(names, of_group.tolist(), strict=True)), **{key: value.item() for key, value in summary.items()}}
