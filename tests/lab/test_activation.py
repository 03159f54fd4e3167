"""Activation maximisation of models whose best image is known."""

from __future__ import annotations

import pytest
import torch
from analytic import Quadratic, linear, split

from densreg.lab.evaluation.activation import activation_maximisation, maximise

SHAPE = (1, 4, 3)


def test_linear_by_hand():
    """The best image in [0, 1] is white where the class's weight is positive, black where it is negative."""
    model = linear()
    x = maximise(model, torch.arange(4), SHAPE, "cpu", seed=0, steps=100, lr=0.05, start=0.1, variation=0.0)
    weight, bias = model[1].weight, model[1].bias
    assert torch.equal(x.flatten(1), (weight > 0).float())
    result = activation_maximisation(model, split(), device="cpu", batch_size=3, steps=100, lr=0.05)
    best = weight.clamp(min=0).sum(1) + bias
    assert result["logit"] == pytest.approx(best.mean().item(), rel=1e-5)
    confidence = torch.stack([(weight @ (weight[c] > 0).float() + bias).softmax(0)[c] for c in range(4)])
    assert result["confidence"] == pytest.approx(confidence.mean().item(), rel=1e-5)


def test_quadratic_by_hand():
    centers = torch.rand(3, *SHAPE)
    x = maximise(
        Quadratic(centers), torch.tensor([2, 0]), SHAPE, "cpu", 0, steps=400, lr=0.02, start=0.1, variation=0.0
    )
    assert torch.allclose(x, centers[[2, 0]], atol=1e-2)


def test_variation_makes_smooth():
    """With a large weight the image becomes flat."""
    options = {"shape": SHAPE, "device": "cpu", "seed": 0, "steps": 300, "lr": 0.01, "start": 0.1}
    rough, smooth = (maximise(linear(), torch.tensor([1]), variation=v, **options) for v in (0.0, 1e3))
    assert smooth.std() < 0.05 < rough.std()


def test_a_class_does_not_depend_on_the_others():
    options = {"shape": SHAPE, "device": "cpu", "seed": 4, "steps": 5, "lr": 0.02, "start": 0.1, "variation": 0.5}
    together = maximise(linear(), torch.arange(4), **options)
    alone = maximise(linear(), torch.tensor([2]), **options)
    assert torch.allclose(together[2:3], alone, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": (1, 4)}, "classes must be numbers from 0 to 3, got 4"),
        ({"classes": ()}, "classes must be numbers from 0 to 3, got none"),
        ({"steps": 0}, "steps must be in"),
        ({"lr": 0.0}, "lr must be above 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        activation_maximisation(linear(), split(), device="cpu", batch_size=4, **options)
