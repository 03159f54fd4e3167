"""Feature leakage against what a linear classifier's must be, and where the null tile is found."""

from __future__ import annotations

import math

import pytest
import torch
from analytic import linear
from torch import nn

from densreg.lab import data
from densreg.lab.data import DataError, Split, null_tile, null_tiles, stack_null
from densreg.lab.evaluation.leakage import leakage

OPTIONS = {"device": "cpu", "batch_size": 4}


def blockmnist(images=7, seed=0):
    """Noise in the place of digits; the null tile above and below."""
    generator = torch.Generator().manual_seed(seed)
    digits = torch.rand(images, 1, 28, 28, generator=generator)
    below = torch.arange(images) % 2 == 0
    pixels = (stack_null(digits, below) * 255).round().to(torch.uint8)
    return Split(pixels, torch.arange(images) % 4), below


def test_null_tiles():
    split, below = blockmnist()
    x, _ = split.batch(torch.arange(7), torch.Generator())
    tiles = null_tiles(x)
    assert tiles.shape == x.shape
    assert torch.equal(tiles[:, 0, 28:].all((1, 2)), below)
    assert torch.equal(tiles.flatten(1).sum(1), torch.full((7,), 784))
    assert torch.equal(x[tiles].view(7, 28, 28), null_tile().expand(7, 28, 28))
    assert (x * tiles).sum() == 7 * 57


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 56, 28), (1, 28, 56)])
def test_other_images_have_no_null_tile(shape):
    with pytest.raises(DataError, match="expected BlockMNIST's images of 1x56x28"):
        null_tiles(torch.rand(2, *shape))
    with pytest.raises(DataError, match="has no null tile"):
        null_tiles(torch.rand(2, 1, 56, 28))
    with pytest.raises(DataError, match="or two"):
        null_tiles(torch.cat([null_tile(), null_tile()]).view(1, 1, 56, 28))


def test_linear_classifier():
    """Its integrated gradients from a black image are w_label * x."""
    split, below = blockmnist()
    model = linear(4, (1, 56, 28))
    x, y = split.batch(torch.arange(7), torch.Generator())
    attributions = (model[1].weight[y].view(x.shape) * x).double()
    halves = [attributions[i, 0, 28:] if low else attributions[i, 0, :28] for i, low in enumerate(below)]
    got = leakage(model, split, steps=3, **OPTIONS)
    for name, order in (("l1", 1), ("l2", 2)):
        tile = [half.flatten().norm(order).item() for half in halves]
        whole = [image.flatten().norm(order).item() for image in attributions]
        assert got[name] == pytest.approx(sum(tile) / 7, rel=1e-5)
        assert got[f"{name}_sum"] == pytest.approx(sum(tile), rel=1e-5)
        assert got[f"whole_{name}"] == pytest.approx(sum(whole) / 7, rel=1e-5)
        shares = [t / w for t, w in zip(tile, whole, strict=True)]
        assert got[f"share_{name}"] == pytest.approx(sum(shares) / 7, rel=1e-5)
    assert got["net"] == pytest.approx(sum(abs(half.sum().item()) for half in halves) / 7, rel=1e-5)


def test_classifier_that_sees_no_null_tile():
    split, below = blockmnist(8)
    model = linear(4, (1, 56, 28))
    with torch.no_grad():
        model[1].weight.view(4, 56, 28)[:, 28:] = 0
    both = leakage(model, split, **OPTIONS)
    above = leakage(model, Split(split.images[~below], split.labels[~below]), **OPTIONS)
    under = leakage(model, Split(split.images[below], split.labels[below]), **OPTIONS)
    assert under["l2"] == under["l1"] == under["share_l2"] == under["net"] == 0
    assert above["share_l1"] == above["share_l2"] == 1
    assert both["l2"] == pytest.approx(above["l2"] / 2)


def test_output():
    """The integrated gradients of log_softmax add up to its change from a black image."""
    split, _ = blockmnist()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(1568, 32), nn.Tanh(), nn.Linear(32, 4)).eval()
    results = {name: leakage(model, split, steps=64, output=name, **OPTIONS) for name in ("logit", "log_softmax")}
    assert results["logit"]["l2"] != pytest.approx(results["log_softmax"]["l2"], rel=0.01)
    logits = nn.Sequential(model, nn.LogSoftmax(1))
    explained = leakage(logits, split, steps=64, **OPTIONS)
    assert explained == pytest.approx(results["log_softmax"])
    assert all(math.isfinite(value) for value in results["logit"].values())


def test_errors():
    split, _ = blockmnist()
    model = linear(4, (1, 56, 28))
    with pytest.raises(ValueError, match="output must be logit, log_softmax or softmax, got 'loss'"):
        leakage(model, split, output="loss", **OPTIONS)
    with pytest.raises(DataError, match="expected BlockMNIST's images of 1x56x28"):
        leakage(linear(10, (1, 8, 8)), data.load("digits").test, **OPTIONS)
    with torch.no_grad():
        model[1].weight.zero_()
    with pytest.raises(ValueError, match="attributions are all zero"):
        leakage(model, split, **OPTIONS)
