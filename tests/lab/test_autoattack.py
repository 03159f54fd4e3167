"""AutoAttack on linear models, whose robust accuracy is known."""

from __future__ import annotations

import sys

import pytest
import torch
from analytic import linear, pixels, split

from densreg.lab.data import Split
from densreg.lab.evaluation.autoattack import autoattack
from densreg.lab.evaluation.samples import Unmeasurable


@pytest.fixture
def images():
    """Grey enough that the budgets do not reach the ends of [0, 1]."""
    grey = torch.randint(77, 178, (12, 1, 4, 3), dtype=torch.uint8)
    return Split(grey, linear()(grey.float() / 255).argmax(1))


@pytest.mark.parametrize(("norm", "dual"), [("inf", 1), ("2", 2)])
def test_linear_by_hand(images, norm, dual):
    """An image falls where a margin is less than the budget times the dual norm of the difference of the weights."""
    pytest.importorskip("pyautoattack")
    model = linear()
    f, w, y = model(pixels(images)).double(), model[1].weight.double(), images.labels
    reach = []
    for i in range(12):
        others = [j for j in range(4) if j != y[i]]
        reach.append(min(((f[i, y[i]] - f[i, j]) / (w[y[i]] - w[j]).norm(dual)).item() for j in others))
    reach = sorted(reach)
    # Between two reaches that lie well apart, of the lower half and of the upper one.
    gaps = [max(part, key=lambda k: reach[k + 1] - reach[k]) for part in (range(5), range(5, 11))]
    low, high = ((reach[k] + reach[k + 1]) / 2 for k in gaps)
    options = {"norm": norm, "version": "custom", "attacks": ("apgd-ce", "apgd-t")}
    result = autoattack(model, images, device="cpu", batch_size=5, eps=(high, low), **options)
    assert result == {
        "clean": 1.0,
        f"l{norm}_{low:g}": pytest.approx((11 - gaps[0]) / 12),
        f"l{norm}_{high:g}": pytest.approx((11 - gaps[1]) / 12),
    }


def test_standard_version(images):
    """All four attacks run, with fewer target classes than AutoAttack wants by itself; nothing else is disturbed."""
    pytest.importorskip("pyautoattack")
    model, few = linear(), images.first(2)
    wrong = Split(few.images, (few.labels + torch.tensor([0, 1])) % 4)
    state, trace = torch.get_rng_state(), sys.gettrace()
    result = autoattack(model, wrong, device="cpu", batch_size=2, eps=(1e-4,))
    assert result == {"clean": 0.5, "linf_0.0001": 0.5}
    assert torch.equal(torch.get_rng_state(), state)
    assert sys.gettrace() is trace


class _NaN(torch.nn.Module):
    """Sure of class 0, but for images of which ``lost`` holds."""

    def __init__(self, lost):
        super().__init__()
        self.body, self.lost = linear(), lost
        self.body[1].bias.data[0] += 20

    def forward(self, x):
        return self.body(x).masked_fill(self.lost(x).unsqueeze(1), float("nan"))


def _dark(x):
    return x.flatten(1)[:, 0] < 127 / 255


def _attacked(x):
    return ((255 * x).round() - 255 * x).flatten(1).abs().amax(1) > 1e-3


@pytest.mark.parametrize("lost", [_dark, _attacked])
def test_nan_is_not_robust(images, lost):
    """The largest of NaN logits is the first, here the label: also of an image that an attack only tried."""
    pytest.importorskip("pyautoattack")
    labels = torch.zeros_like(images.labels)
    options = {"version": "custom", "attacks": ("apgd-ce",), "eps": (0.1,)}
    with pytest.raises(Unmeasurable, match="the model's logits are NaN"):
        autoattack(_NaN(lost), Split(images.images, labels), device="cpu", batch_size=12, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "1"}, "norm must be 2 or inf, got '1'"),
        ({"eps": (0.1, 0.0)}, "eps must be above 0"),
        ({"eps": ()}, "eps is empty; expected at least one budget"),
        ({"version": "fast"}, "version must be standard, plus, rand or custom, got 'fast'"),
        ({"version": "custom"}, "attacks are for version=custom, which needs some"),
        ({"attacks": ("square",)}, "attacks are for version=custom, which needs some"),
        ({"version": "custom", "attacks": ("pgd",)}, "attacks must be apgd-ce, .* or square, got 'pgd'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        autoattack(linear(), split(), device="cpu", batch_size=4, **options)


def test_too_few_classes():
    pytest.importorskip("pyautoattack")
    with pytest.raises(ValueError, match="AutoAttack's DLR loss needs at least 4 classes, and the model has 3"):
        autoattack(linear(3), split(classes=3), device="cpu", batch_size=4)
