"""The operators of densreg: a file for each operation, the registry of backends, and the C++ extension.

The operators are raw: they have no derivative of their own. :mod:`densreg.functional` gives them one, to every order,
with :class:`torch.autograd.Function` (an operator with ``register_autograd`` answers ``torch.func.jvp`` with silent
zeros, and cannot be called under ``torch.func.grad``). The functions here refuse a tensor that would need a gradient.

Notation: logits ``f [B, C]``, row maximum ``m``, ``s = sum_i exp(f_i - m)``; ``L = m + log s`` is the log density,
``P = exp(f - m) / s`` the softmax, ``q`` the target distribution (one-hot, smoothed), ``ce = sum_i q_i (L - f_i)``.
"""

from densreg.ops.extension import build_info, instruction_set
from densreg.ops.pnorm import pnorm, pnorm_backward
from densreg.ops.registry import BACKENDS, OPERATORS, backend, calls, describe, preferred, routes, unavailable_reason
from densreg.ops.rows import accumulation_dtype, per_row
from densreg.ops.softmax import softmax, softmax_backward, softmax_double_backward

__all__ = [
    "BACKENDS",
    "OPERATORS",
    "accumulation_dtype",
    "backend",
    "build_info",
    "calls",
    "describe",
    "instruction_set",
    "per_row",
    "pnorm",
    "pnorm_backward",
    "preferred",
    "routes",
    "softmax",
    "softmax_backward",
    "softmax_double_backward",
    "unavailable_reason",
]
