"""Group DRO: the cross-entropy of the worst group of training images."""

from __future__ import annotations

import math

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
