"""Triton kernels of densreg's operators, one file per operation. Importing this needs Triton.

Each function takes what the operator of that name in :mod:`densreg.ops` takes, and gives what it gives.
"""

from __future__ import annotations

import torch

from . import rows
from .pnorm import pnorm, pnorm_backward
from .rows import INTERPRETED
from .softmax import softmax, softmax_backward, softmax_double_backward

DEVICES = ("cpu", "cuda") if INTERPRETED else ("cuda",)
"""The types of device whose tensors the kernels take."""


def unavailable_reason() -> str | None:
    """Why the kernels cannot run here; None where they can."""
    if INTERPRETED or torch.cuda.is_available():
        return None
    return "there is no GPU (TRITON_INTERPRET=1 runs the Triton kernels on the CPU, slowly)"


__all__ = [
    "DEVICES",
    "INTERPRETED",
    "pnorm",
    "pnorm_backward",
    "rows",
    "softmax",
    "softmax_backward",
    "softmax_double_backward",
    "unavailable_reason",
]
