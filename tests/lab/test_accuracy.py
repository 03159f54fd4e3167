"""Accuracy of all, of each group and of the worst, against counts by hand."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from analytic import linear, pixels, split

from densreg.lab.evaluation.accuracy import accuracy, group_accuracy, worst_group


def test_accuracy_by_hand():
    model, images = linear(), split(50)
    right = [
        int(row.tolist().index(max(row))) == int(y) for row, y in zip(model(pixels(images)), images.labels, strict=True)
    ]
    assert 0 < sum(right) < 50
    assert accuracy(model, images, device="cpu", batch_size=7) == {"clean": sum(right) / 50}


def test_nan_is_no_class():
    model = linear()
    model[1].bias.data[0] = float("nan")
    with pytest.raises(ValueError, match="logits are NaN"):
        accuracy(model, split(5), device="cpu", batch_size=7)


def test_groups_by_hand():
    correct = torch.tensor([True, True, False, True, False, False])
    groups = torch.tensor([0, 0, 0, 2, 1, 2])
    result = group_accuracy(correct, groups)
    assert result == {
        "group_0": pytest.approx(2 / 3),
        "group_1": 0.0,
        "group_2": 0.5,
        "worst_group": 0.0,
        "group_mean": pytest.approx((2 / 3 + 0.5) / 3),
        "clean": 0.5,
    }


def test_named_groups():
    result = group_accuracy(torch.tensor([True, False, True]), torch.tensor([1, 1, 0]), ("on land", "on water"))
    assert result == {
        "on land": 1,
        "on water": 0.5,
        "worst_group": 0.5,
        "group_mean": 0.75,
        "clean": pytest.approx(2 / 3),
    }


def test_empty_group_is_named():
    correct = torch.tensor([True, False])
    with pytest.raises(ValueError, match=r"^the group 'group_1' has no images among these 2: take more of them$"):
        group_accuracy(correct, torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="the group 'c' has no images"):
        group_accuracy(correct, torch.tensor([0, 1]), ("a", "b", "c"))
    with pytest.raises(ValueError, match="expected a name for each of the 2 groups, got 1"):
        group_accuracy(correct, torch.tensor([0, 1]), ("a",))
    with pytest.raises(ValueError, match="expected at least one image in each group, got no images"):
        group_accuracy(correct[:0], torch.zeros(0, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"expected one group for each image, got \[2\] images and \[1\] groups"):
        group_accuracy(correct, torch.tensor([0]))


def test_data_set_without_groups():
    with pytest.raises(ValueError, match="worst_group needs a data set with groups, and this one has none"):
        worst_group(linear(), split(), device="cpu", batch_size=4)


def test_no_images():
    with pytest.raises(ValueError, match="there are no images for accuracy; expected at least one"):
        accuracy(linear(), dataclasses.replace(split()).first(0), device="cpu", batch_size=4)
