"""The area under the ROC curve against a count of all pairs, and the data set that is not the run's."""

from __future__ import annotations

import pytest
import torch
from analytic import linear, pixels, split

from densreg.lab import data
from densreg.lab.evaluation import ood
from densreg.lab.evaluation.ood import auroc, out_of_distribution


def _pairs(positive, negative):
    """The part of all pairs in which the positive one is higher; ties count one half."""
    difference = positive.unsqueeze(1) - negative.unsqueeze(0)
    return ((difference > 0).double() + 0.5 * (difference == 0)).mean().item()


def test_auroc_by_hand():
    positive, negative = torch.tensor([0.1, 0.4, 0.4, 0.9]), torch.tensor([0.0, 0.4, 0.5])
    assert auroc(positive, negative) == pytest.approx(7 / 12)
    assert auroc(positive, negative) == pytest.approx(_pairs(positive, negative))
    assert auroc(torch.ones(3), torch.ones(5)) == 0.5
    assert auroc(torch.ones(3), torch.zeros(5)) == 1


def test_single_class_and_nan_are_errors():
    with pytest.raises(ValueError, match="the AUROC needs both classes; the negative one has no samples"):
        auroc(torch.ones(3), torch.ones(0))
    with pytest.raises(ValueError, match="the AUROC needs both classes; the positive one has no samples"):
        auroc(torch.ones(0), torch.ones(3))
    with pytest.raises(ValueError, match="the AUROC needs finite scores; the positive class has one that is not"):
        auroc(torch.tensor([1.0, float("nan")]), torch.ones(3))


def test_scores_by_hand(monkeypatch):
    """Log density, largest logit, largest softmax, with in-distribution as the positive class."""
    model, inside, outside = linear(), split(9), split(11, seed=1)
    monkeypatch.setattr(data, "load", lambda *args, **options: data.DataSet("other", outside, outside, 4))
    result = out_of_distribution(model, inside, device="cpu", batch_size=4, data="other")
    f, g = model(pixels(inside)).double(), model(pixels(outside)).double()
    assert result == {
        "log_density": pytest.approx(_pairs(f.exp().sum(1).log(), g.exp().sum(1).log())),
        "maximum_logit": pytest.approx(_pairs(f.max(1)[0], g.max(1)[0])),
        "maximum_softmax": pytest.approx(
            _pairs(f.exp().max(1)[0] / f.exp().sum(1), g.exp().max(1)[0] / g.exp().sum(1))
        ),
    }
    assert all(0 < value < 1 for value in result.values())
    few = out_of_distribution(model, inside, device="cpu", batch_size=4, data="other", images=3)
    assert few["maximum_logit"] == pytest.approx(_pairs(f.max(1)[0], g[:3].max(1)[0]))


def test_sure_classifier(monkeypatch):
    """In float32 the largest softmax of most images is 1; the order of them is that of float64."""
    model, inside, outside = linear(), split(9), split(11, seed=1)
    model[1].weight.data.mul_(300)
    monkeypatch.setattr(data, "load", lambda *args, **options: data.DataSet("other", outside, outside, 4))
    result = out_of_distribution(model, inside, device="cpu", batch_size=4, data="other")
    f, g = model(pixels(inside)), model(pixels(outside))
    assert (f.softmax(1).amax(1) == 1).sum() > 4
    odds = [t.double().topk(2, 1)[0].diff(dim=1).squeeze(1).neg() for t in (f, g)]  # all that counts here
    assert result["maximum_softmax"] == pytest.approx(_pairs(*odds))


def test_other_shape():
    images = split(4, (1, 8, 8))
    model = linear(shape=(1, 8, 8))
    with pytest.raises(ValueError, match="the images of synthetic are 3x32x32, those of the run 1x8x8; fit=true makes"):
        out_of_distribution(model, images, device="cpu", batch_size=4, data="synthetic")
    assert out_of_distribution(model, images, device="cpu", batch_size=64, data="synthetic", fit=True, images=64)
    x = torch.rand(2, 1, 4, 4)
    assert torch.equal(ood._fit(x, (3, 4, 4)), x.repeat(1, 3, 1, 1))
    halves = ood._fit(torch.tensor([0.0, 1.0]).view(1, 2, 1, 1).expand(1, 2, 4, 4), (1, 2, 2))
    assert torch.allclose(halves, torch.full((1, 1, 2, 2), 0.5))


def test_no_other_data_set():
    with pytest.raises(ValueError, match="out_of_distribution needs another data set, and its folder: data=NAME"):
        out_of_distribution(linear(), split(), device="cpu", batch_size=4)
