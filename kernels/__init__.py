"""Triton kernels of densreg's operators, one file per operation. Importing this needs Triton.

Each function takes what the operator of that name in :mod:`densreg.ops` takes, and gives what it gives.
"""

from __future__ import annotations

from . import rows
from .pnorm import pnorm, pnorm_backward
from .rows import INTERPRETED
from .softmax import softmax, softmax_backward

__all__ = [
    "INTERPRETED",
    "pnorm",
    "pnorm_backward",
    "rows",
    "softmax",
    "softmax_backward",
]
