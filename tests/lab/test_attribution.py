"""Attributions of models with a known gradient, and the tests that take pixels away or put them in, pixel by pixel."""

from __future__ import annotations

import itertools

import pytest
import torch
from analytic import NoGradient, Quadratic, curved, linear, pixels, split

from densreg.lab.data import Split, seeded
from densreg.lab.evaluation.attribution import (
    METHODS,
    attribute,
    baseline_of,
    insertion,
    insertion_curve,
    pixel_perturbation,
    ranking,
    replace_pixels,
)

SHAPE = (3, 4, 5)
INDEX = torch.arange(7)


def test_linear_attributions():
    """The gradient is the row of the class; from black, integrated gradients are x times that."""
    model, x, target = linear(shape=SHAPE), pixels(split(shape=SHAPE)), torch.arange(7) % 4
    row = model[1].weight[target].view(7, *SHAPE)
    assert torch.allclose(attribute(model, x, target, INDEX, "gradient"), row)
    assert torch.allclose(attribute(model, x, target, INDEX, "smoothgrad"), row)
    assert torch.allclose(attribute(model, x, target, INDEX, "integrated_gradients"), row * x, atol=1e-6)


def test_smoothgrad_by_hand():
    centers, x, target = torch.rand(4, *SHAPE), pixels(split(shape=SHAPE)), torch.arange(7) % 4
    model = Quadratic(centers)
    result = attribute(model, x, target, INDEX, "smoothgrad", seed=2, samples=3, sigma=0.5)
    for i in range(7):
        generator = seeded(2, i)
        noise = sum(torch.randn(SHAPE, generator=generator) for _ in range(3)) / 3
        assert torch.allclose(result[i], centers[target[i]] - x[i] - 0.5 * noise, atol=1e-5)
    part = attribute(model, x[4:], target[4:], INDEX[4:], "smoothgrad", seed=2, samples=3, sigma=0.5)
    assert torch.equal(part, result[4:])


def test_smoothgrad_is_captums_noise_tunnel():
    """For one image, whose noise captum draws from the global generator as we do from the image's."""
    from captum.attr import NoiseTunnel, Saliency

    model, x = curved(shape=SHAPE), pixels(split(1, shape=SHAPE))
    target = torch.tensor([2])
    torch.manual_seed(seeded(0, 0).initial_seed())
    tunnel = NoiseTunnel(Saliency(model))
    theirs = tunnel.attribute(x, nt_samples=8, nt_samples_batch_size=1, stdevs=0.3, target=target, abs=False)
    assert torch.allclose(attribute(model, x, target, INDEX[:1], samples=8, sigma=0.3), theirs, atol=1e-6)
    assert not torch.allclose(attribute(model, x, target, INDEX[:1], "gradient"), theirs, atol=1e-3)


def test_integrated_gradients_are_complete():
    """They add up to f(x) - f(black)."""
    model, x = curved(shape=SHAPE), pixels(split(shape=SHAPE))
    target = torch.arange(7) % 4
    total = attribute(model, x, target, INDEX, "integrated_gradients", steps=400).flatten(1).sum(1)
    difference = (model(x) - model(torch.zeros_like(x))).gather(1, target[:, None]).squeeze(1)
    assert torch.allclose(total, difference, atol=2e-3)


def test_ranking():
    """By the sum of |attribution| over the channels; ties in the order of the pixels."""
    map_ = torch.tensor([[[[1.0, -3.0], [0.0, 2.0]], [[-1.0, 0.0], [2.0, 0.5]]]])  # sums 2, 3, 2, 2.5
    assert ranking(map_).tolist() == [[1, 3, 0, 2]]
    assert ranking(torch.zeros(2, 3, 2, 2)).tolist() == [[0, 1, 2, 3]] * 2


def test_replaced_pixels_and_baselines():
    x = torch.arange(12.0).view(1, 2, 2, 3)
    out = replace_pixels(x, torch.tensor([[5, 0]]), torch.full_like(x, -1))
    assert out.flatten(2).tolist() == [[[-1, 1, 2, 3, 4, -1], [-1, 7, 8, 9, 10, -1]]]
    assert baseline_of(x, "black").abs().max() == 0
    assert baseline_of(x, "mean").flatten(2).tolist() == [[[2.5] * 6, [8.5] * 6]]
    blurred = baseline_of(x, "blur")
    assert blurred.shape == x.shape
    assert blurred.std((2, 3)).max() < x.std((2, 3)).min() / 2
    assert torch.allclose(baseline_of(torch.full((1, 3, 32, 32), 0.3), "blur"), torch.tensor(0.3))


@pytest.mark.parametrize("target", ["prediction", "label"])
@pytest.mark.parametrize("relative", ["mean", "image"])
@pytest.mark.parametrize("baseline", ["black", "mean"])
def test_pixel_perturbation_by_hand(target, relative, baseline):
    """Of a linear model, pixel by pixel: what a pixel adds to the logit, less what the baseline would."""
    model, images = linear(shape=SHAPE), split(shape=SHAPE)
    result = pixel_perturbation(
        model,
        images,
        device="cpu",
        batch_size=4,
        fractions=(0.1, 0.25),
        target=target,
        relative=relative,
        baseline=baseline,
    )
    w, b, x = model[1].weight.double().view(4, 3, 20), model[1].bias.double(), pixels(images).double().flatten(2)
    for fraction, k in ((0.1, 2), (0.25, 5)):
        changes = {"top": [], "bottom": []}
        sizes = []
        for i in range(7):
            f = [(w[j] * x[i]).sum() + b[j] for j in range(4)]
            c = max(range(4), key=lambda j, f=f: f[j]) if target == "prediction" else int(images.labels[i])
            weight = w[c].abs().sum(0).tolist()
            order = sorted(range(20), key=lambda pixel, weight=weight: -weight[pixel])
            sizes.append(abs(f[c].item()))
            for name, gone in (("top", order[:k]), ("bottom", order[-k:])):
                there = x[i].mean(1) if baseline == "mean" else torch.zeros(3).double()
                lost = sum((w[c][:, pixel] * (x[i][:, pixel] - there)).sum() for pixel in gone)
                changes[name].append(lost.item() / (sizes[-1] if relative == "image" else 1))
        total = 7 if relative == "image" else sum(sizes)
        top, bottom = sum(changes["top"]) / total, sum(changes["bottom"]) / total
        assert result[f"top_{fraction}"] == pytest.approx(top, rel=1e-4)
        assert result[f"bottom_{fraction}"] == pytest.approx(bottom, rel=1e-4)
        assert result[f"difference_{fraction}"] == pytest.approx(top - bottom, rel=1e-4)
    assert result["difference"] == pytest.approx((result["difference_0.1"] + result["difference_0.25"]) / 2)


def test_images_all_equal():
    """Black ones lose nothing when they are blackened, and have nothing to insert."""
    model = linear(shape=SHAPE)
    black = Split(torch.zeros(5, *SHAPE, dtype=torch.uint8), torch.zeros(5, dtype=torch.int64))
    result = pixel_perturbation(model, black, device="cpu", batch_size=2)
    assert set(result.values()) == {0.0}
    softmax = model(torch.zeros(1, *SHAPE)).softmax(1)[0, 0].item()
    assert insertion(model, black, device="cpu", batch_size=2, target="label")["auc"] == pytest.approx(softmax)


def test_zero_logits_are_named():
    model, images = linear(shape=SHAPE), split(shape=SHAPE)
    torch.nn.init.zeros_(model[1].weight)
    torch.nn.init.zeros_(model[1].bias)
    with pytest.raises(ValueError, match="the output logits of all images are zero: there is no change relative"):
        pixel_perturbation(model, images, device="cpu", batch_size=2)
    with pytest.raises(ValueError, match="the output logit of image 0 is zero: there is no change relative to it"):
        pixel_perturbation(model, images, device="cpu", batch_size=2, relative="image")


@pytest.mark.parametrize("method", METHODS)
def test_attributions_that_are_not_finite_have_no_order(method):
    model, images = NoGradient(linear(shape=SHAPE)), split(shape=SHAPE)
    for metric in (pixel_perturbation, insertion):
        with pytest.raises(ValueError, match="the attributions of image 0 are not finite"):
            metric(model, images, device="cpu", batch_size=7, method=method)


def test_insertion_by_hand():
    """Every pixel of every image, one after the other."""
    model, images = linear(shape=SHAPE), split(3, shape=SHAPE)
    result = insertion(model, images, device="cpu", batch_size=2, baseline="mean", points=100)
    areas = []
    for image in pixels(images):
        with torch.no_grad():
            c = model(image[None]).argmax().item()
            weight = model[1].weight[c].view(3, 20).abs().sum(0).tolist()
            canvas = image.mean((1, 2), keepdim=True).expand(SHAPE).clone()
            curve = [model(canvas[None]).softmax(1)[0, c].item()]
            for pixel in sorted(range(20), key=lambda pixel, weight=weight: -weight[pixel]):
                canvas[:, pixel // 5, pixel % 5] = image[:, pixel // 5, pixel % 5]
                curve.append(model(canvas[None]).softmax(1)[0, c].item())
        areas.append(sum(a + b for a, b in itertools.pairwise(curve)) / 2 / 20)
    assert result == {"auc": pytest.approx(sum(areas) / 3, rel=1e-5)}


def test_insertion_curve_begins_and_ends():
    model, x = curved(shape=SHAPE), pixels(split(shape=SHAPE))
    target, by = torch.arange(7) % 4, torch.zeros(7, *SHAPE)
    parts, curve = insertion_curve(model, x, target, torch.arange(20).expand(7, 20), by, 7)
    assert parts.tolist() == pytest.approx([0, 0.15, 0.3, 0.45, 0.55, 0.7, 0.85, 1])
    with torch.no_grad():
        for place, image in ((0, by), (-1, x)):
            expected = model(image).softmax(1).gather(1, target[:, None]).squeeze(1)
            assert torch.allclose(curve[:, place].float(), expected)


def test_the_best_order_has_the_largest_area():
    """Of a model that looks at one pixel."""
    model = linear(2)
    with torch.no_grad():
        model[1].weight.zero_()[0, 5] = 8.0
        model[1].bias.zero_()
    x = torch.ones(1, 1, 4, 3)
    target, by = torch.zeros(1, dtype=torch.int64), torch.zeros_like(x)
    order = ranking(attribute(model, x, target, torch.tensor([0]), "gradient"))
    assert order[0, 0] == 5
    _, first = insertion_curve(model, x, target, order, by, 12)
    _, last = insertion_curve(model, x, target, order.flip(1), by, 12)
    assert (first[0, 1] > 0.99) & (last[0, -2] == 0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fractions": (0.1, 1.5)}, r"fractions must be above 0 and at most 1, got 1\.5"),
        ({"fractions": ()}, "fractions is empty"),
        ({"method": "lime"}, "method must be gradient, smoothgrad or integrated_gradients, got 'lime'"),
        ({"baseline": "white"}, "baseline must be black, mean or blur, got 'white'"),
        ({"target": "worst"}, "target must be prediction or label, got 'worst'"),
        ({"relative": "sum"}, "relative must be mean or image, got 'sum'"),
        ({"samples": 0}, "samples must be in"),
        ({"sigma": -1.0}, "sigma must be in"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        pixel_perturbation(linear(shape=SHAPE), split(shape=SHAPE), device="cpu", batch_size=4, **options)
