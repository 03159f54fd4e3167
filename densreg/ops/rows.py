"""What the operators share: the dtype of their sums, and a number for each row."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype in which sums are taken: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def per_row(row: Tensor, like: Tensor) -> Tensor:
    """[B] -> [B, 1, ..., 1], to broadcast against a tensor of shape [B, ...]."""
    return row.reshape(-1, *[1] * (like.ndim - 1))
