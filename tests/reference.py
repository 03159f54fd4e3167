"""What the tests compare with, and the inputs they share."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
ORDERS = (1, 1.5, 2, 3, 4, math.inf)

HALF_ULP = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float32: 2**-24, torch.float64: 2**-53}
"""Half the distance from 1 to the next number: what rounding a result may cost."""


def double(tensor: Tensor) -> Tensor:
    """A float64 copy that requires grad."""
    return tensor.detach().double().requires_grad_()


def softmax_reference(
    logits: Tensor, target: Tensor | None, label_smoothing: float = 0.0, ignore_index: int = -100
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Log density, cross-entropy and softmax by torch's own functions, in the dtype of the logits."""
    ce = None
    if target is not None:
        ce = F.cross_entropy(
            logits, target, reduction="none", label_smoothing=label_smoothing, ignore_index=ignore_index
        )
    return torch.logsumexp(logits, 1), ce, torch.softmax(logits, 1)


def error(actual: Tensor, expected: Tensor) -> float:
    """Largest error relative to the largest expected magnitude; raises where one is not finite and the other is."""
    actual, expected = actual.detach().double(), expected.detach().double()
    assert torch.equal(actual.isfinite(), expected.isfinite())
    finite = expected.isfinite()
    if not finite.any():
        return 0.0
    return float((actual[finite] - expected[finite]).abs().max() / expected[finite].abs().max().clamp(min=1e-300))
