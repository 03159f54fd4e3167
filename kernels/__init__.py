"""Triton kernels of densreg's operators, one file per operation. Importing this needs Triton.

Each function takes what the operator of that name in :mod:`densreg.ops` takes, and gives what it gives.
"""

from __future__ import annotations

from . import rows
from .pnorm import pnorm, pnorm_backward, pnorm_dual
from .rows import INTERPRETED
from .softmax import log_softmax_difference, softmax, softmax_backward

__all__ = [
    "INTERPRETED",
    "log_softmax_difference",
    "pnorm",
    "pnorm_backward",
    "pnorm_dual",
    "rows",
    "softmax",
    "softmax_backward",
]
