"""Triton kernels of densreg's operators, one file per operation. Importing this needs Triton.

Each function takes what the operator of that name in :mod:`densreg.ops` takes, and gives what it gives.
"""

from __future__ import annotations

from triton import knobs

INTERPRETED = bool(knobs.runtime.interpret)
"""Whether the kernels run in Triton's interpreter, on CPU tensors: TRITON_INTERPRET=1 when Triton was imported."""
