"""First order only: cross-entropy and its gradient, beside Liger-Kernel, QuACK and cut-cross-entropy, on a GPU.

    pip install 'densreg[bench,rivals]'
    python -m pytest benchmarks/test_rivals.py --device cuda -rs

None of the three has the second order that the penalty needs: their backward kernels are no Functions that could be
differentiated. So what is timed is what they have: forward and backward of the mean cross-entropy, at the logits, and
with the linear layer before it in cut-cross-entropy's case. densreg's column also gives the log density. Shapes are
large enough that launches do not count. Liger-Kernel writes its gradient over the logits, which saves a buffer.
Rivals that are not installed are left out, with a note in their column.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import densreg

from .timing import WrongResult, interleave, peak_bytes, summarize

CASES = {
    "tiny": ((256, 1000),),
    "quick": ((4096, 1000), (4096, 32_768)),
    "full": ((4096, 1000), (4096, 32_768), (4096, 131_072)),
}
FEATURES = 1024


def ours(f: Tensor, y: Tensor) -> Tensor:
    return densreg.density_cross_entropy(f, y)[0].mean()


def _found(rivals: dict[str, tuple[str, str]]) -> dict[str, Callable[..., Tensor]]:
    found = {}
    for name, (module, function) in rivals.items():
        try:
            found[name] = getattr(importlib.import_module(module), function)
        except ImportError:
            continue
    return found


def _measure(losses: dict[str, Callable[..., Tensor]], leaves: tuple[Tensor, ...], y: Tensor, seconds: float) -> Any:
    """Forward and backward of each; every loss is first compared with torch's in float32."""

    def call(loss: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss(*leaves, y), leaves)

    kept = [leaf.detach().clone() for leaf in leaves]
    expected = losses["torch"](*(leaf.float() for leaf in leaves), y).item()
    for name, loss in losses.items():
        value = loss(*leaves, y).item()
        if not abs(value - expected) < 0.01 * abs(expected):
            raise WrongResult(f"{name}: expected a cross-entropy of {expected:.4f}, got {value:.4f}")
        for leaf, copy in zip(leaves, kept, strict=True):  # Liger-Kernel's gradient
            leaf.data.copy_(copy)
    calls = {name: lambda loss=loss: call(loss) for name, loss in losses.items()}
    found = summarize(interleave(calls, seconds), "densreg")
    for name, call_of in calls.items():
        found[name]["peak_bytes"] = peak_bytes(call_of)
    return found


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the rivals' kernels need a GPU")
@pytest.mark.parametrize("kind", ["first order, logits", "first order, linear head"])
def test_first_order(kind, case, seconds, headline):
    rows, classes = case
    torch.manual_seed(0)
    y = torch.randint(classes, (rows,), device="cuda")
    if kind.endswith("logits"):
        rivals = {"liger-kernel": ("liger_kernel.transformers.functional", "liger_cross_entropy")}
        rivals["quack"] = ("quack.cross_entropy", "cross_entropy")
        leaves: tuple[Tensor, ...] = (torch.randn(rows, classes, device="cuda", dtype=torch.bfloat16),)
        losses: dict[str, Any] = {"densreg": ours, "torch": F.cross_entropy, **_found(rivals)}
    else:
        rivals = {"cut-cross-entropy": ("cut_cross_entropy", "linear_cross_entropy")}
        e = torch.randn(rows, FEATURES, device="cuda", dtype=torch.bfloat16)
        leaves = (e, torch.randn(classes, FEATURES, device="cuda", dtype=torch.bfloat16) / FEATURES**0.5)
        losses = {"densreg": lambda e, c, y: ours(F.linear(e, c), y)}
        losses |= {"torch": lambda e, c, y: F.cross_entropy(F.linear(e, c), y), **_found(rivals)}
    for leaf in leaves:
        leaf.requires_grad_()
    found = _measure(losses, leaves, y, seconds)
    found |= {name: {"note": "not installed"} for name in rivals if name not in found}
    row = {"suite": kind, "case": {"B": rows, "C": classes}, "columns": found}
    headline(kind, [row], lambda: torch.autograd.grad(losses["densreg"](*leaves, y), leaves))
