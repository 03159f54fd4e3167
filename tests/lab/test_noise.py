"""Robustness against noise: the closed form of quadratic and linear models, with the noise drawn here."""

from __future__ import annotations

import pytest
import torch
from analytic import Quadratic, linear, pixels, split

from densreg.lab.data import Split, seeded
from densreg.lab.evaluation.noise import noise_robustness

SHAPE = (1, 4, 3)


def _draws(number, seed, samples):
    generator = seeded(seed, number)
    return [torch.randn(SHAPE, generator=generator).double() for _ in range(samples)]


@pytest.mark.parametrize("of_each", ["image", "mean"])
def test_quadratic_by_hand(of_each):
    """The gradient of the logit is center - x: noise d moves it by |d|, whatever the image."""
    centers, images = torch.rand(4, *SHAPE), split()
    result = noise_robustness(
        Quadratic(centers), images, device="cpu", batch_size=3, seed=5, sigmas=(0.1, 0.3), samples=2, relative=of_each
    )
    x = pixels(images).double()
    for sigma in (0.1, 0.3):
        moved, relative, nats, sizes = [], [], [], []
        for number, label in enumerate(images.labels.tolist()):

            def log_p(image):
                return torch.logsumexp(-(image - centers.double()).flatten(1).square().sum(1) / 2, 0)

            for unit in _draws(number, 5, 2):
                noisy = x[number] + sigma * unit
                moved.append((sigma * unit).norm() / (centers[label] - x[number]).norm())
                nats.append((log_p(noisy) - log_p(x[number])).abs())
                sizes.append(log_p(x[number]).abs())
                relative.append(nats[-1] / sizes[-1])
        if of_each == "mean":
            relative = [nats_ / torch.stack(sizes).mean() for nats_ in nats]
        for name, values in (("gradient", moved), ("density", relative), ("density_nats", nats)):
            assert result[f"{name}_{sigma}"] == pytest.approx(torch.stack(values).mean().item(), rel=1e-5)
    assert len(result) == 6


def test_linear_gradient_does_not_move():
    result = noise_robustness(linear(), split(), device="cpu", batch_size=4)
    assert result["gradient_0.2"] == 0
    assert result["density_nats_0.2"] > result["density_nats_0.05"] > 0


@pytest.mark.parametrize(("of", "factor"), [("loss", 1), ("density", 1), ("loss", 8)])
def test_other_gradients(of, factor):
    """Of a linear model: W^T softmax, less the label's row for the loss; also where P_y is 1 in float32."""
    model, images = linear(), split()
    model[1].weight.data.mul_(factor)
    result = noise_robustness(model, images, device="cpu", batch_size=4, sigmas=(0.2,), samples=3, of=of)
    w, b = model[1].weight.double(), model[1].bias.double()

    def gradient(image, label):
        g = w.T @ torch.softmax(w @ image.flatten() + b, 0)
        return g - w[label] if of == "loss" else g

    ratios = []
    for number, (x, y) in enumerate(zip(pixels(images).double(), images.labels, strict=True)):
        clean = gradient(x, y)
        ratios += [(gradient(x + 0.2 * unit, y) - clean).norm() / clean.norm() for unit in _draws(number, 0, 3)]
    assert result["gradient_0.2"] == pytest.approx(torch.stack(ratios).mean().item(), rel=1e-5)


def test_zero_gradient_is_named():
    """An image at the centre of its class."""
    image = torch.full(SHAPE, 255, dtype=torch.uint8)
    images = Split(torch.stack([image // 5, image]), torch.zeros(2, dtype=torch.int64))
    model = Quadratic(torch.stack([torch.ones(SHAPE), torch.zeros(SHAPE)]))
    with pytest.raises(ValueError, match="the gradient of image 1 is zero: there is nothing relative to it"):
        noise_robustness(model, images, device="cpu", batch_size=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigmas": (0.1, 0.0)}, r"sigmas must be above 0 and at most 1000, got 0\.0"),
        ({"samples": 0}, "samples must be in"),
        ({"relative": "sum"}, "relative must be mean or image, got 'sum'"),
        ({"of": "score"}, "of must be logit, loss or density, got 'score'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        noise_robustness(linear(), split(), device="cpu", batch_size=4, **options)
