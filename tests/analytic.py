"""Classifiers of which everything is known, and splits of a few images: what tests of metrics compute by hand."""

from __future__ import annotations

import torch
from torch import nn

from densreg.lab.data import Split


class Quadratic(nn.Module):
    """f_c(x) = -|x - center_c|^2 / 2, whose gradient is center_c - x."""

    def __init__(self, centers):
        super().__init__()
        self.centers = nn.Parameter(centers.flatten(1))

    def forward(self, x):
        return -(x.flatten(1).unsqueeze(1) - self.centers).square().sum(2) / 2


def linear(classes=4, shape=(1, 4, 3), seed=0):
    """f(x) = W x + b, with W [classes, pixels] of both signs, and b."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(torch.Size(shape).numel(), classes))
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(model[1].weight.shape, generator=generator))
        model[1].bias.copy_(torch.randn(classes, generator=generator))
    return model.eval()


def curved(classes=4, shape=(1, 4, 3)):
    """A network with a convolution, BatchNorm and dropout, in eval mode."""
    torch.manual_seed(3)
    conv = nn.Sequential(nn.Conv2d(shape[0], 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(), nn.Flatten())
    model = nn.Sequential(conv, nn.Linear(6 * shape[1] * shape[2], classes))
    return model.eval()


def split(images=7, shape=(1, 4, 3), classes=4, seed=0):
    """Random images, labels by turns."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (images, *shape), generator=generator, dtype=torch.uint8)
    return Split(pixels, torch.arange(images) % classes)


def pixels(split):
    """All images of a split, float32 in [0, 1]."""
    return split.images.float() / 255


class NoGradient(nn.Module):
    """The logits of a model, whose gradient becomes NaN: what is added is 0, and so is the root's argument."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x) + (0 * x).flatten(1).square().sum(1, keepdim=True).sqrt()


SMALLEST = {
    "leakage": {"steps": 2},
    "pgd": {"eps": (0.5,), "steps": 1},
    "autoattack": {"eps": (0.1,), "version": "custom", "attacks": ("apgd-ce",)},
    "pixel_perturbation": {"fractions": (0.1,), "samples": 2},
    "noise_robustness": {"sigmas": (0.1,), "samples": 1},
    "out_of_distribution": {"data": "synthetic", "fit": True, "images": 4},
    "insertion": {"points": 2, "samples": 2},
    "activation_maximisation": {"steps": 2},
}
"""Options of the metrics, by name, with which they take no time."""
