"""Across class counts, at the logits and through a linear head: time, bandwidth, memory, each result checked first.

    python -m pytest benchmarks/test_class_counts.py --profile full

The columns are those of class_counts.py, with the paper's paths beside them; a column that is wrong, or served by
another backend than it says, fails.
"""

from __future__ import annotations

import torch

from . import class_counts

CASES = {
    "tiny": ((4, 10), (4, 300)),
    "quick": ((128, 10), (128, 100), (128, 1000), (128, 10_000), (64, 100_000)),
    "full": class_counts.SHAPES,
}


def test_logits(case, seconds, headline):
    rows, classes = case
    result = class_counts.measure(rows, classes, seconds, papers=True, memory=True)
    assert [name for name, column in result["columns"].items() if "note" in column] == ["naive"]
    f, u = torch.randn(rows, classes, requires_grad=True), torch.randn(rows, classes)
    headline("logits", [result], lambda: class_counts.api(f, u))


def test_head(case, seconds, headline):
    rows, classes = case
    result = class_counts.measure_head(rows, classes, seconds, memory=True)
    x, w = torch.randn(rows, class_counts.WIDTH, requires_grad=True), torch.randn(classes, class_counts.WIDTH)
    w.requires_grad_()
    headline("head", [result], lambda: class_counts.head("fused", x, w))
