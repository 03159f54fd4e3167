"""Perturbations stay in their ball and in [0, 1], go where they should, and larger budgets never raise accuracy."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from analytic import NoGradient, curved, linear, pixels, split
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from densreg import attacks
from densreg.attacks import perturb, uniform_in_ball
from densreg.lab import models
from densreg.lab.evaluation.attacks import pgd

SHAPE = (2, 4, 3)
NORMS = (2, math.inf)


@settings(max_examples=40, deadline=None)
@given(
    norm=st.sampled_from(NORMS),
    eps=st.sampled_from([0.0, 1e-6, 0.05, 0.7, 30.0]),
    steps=st.integers(1, 4),
    size=st.sampled_from([0.0, 0.01, 5.0]),
    random_start=st.booleans(),
    normalised=st.booleans(),
    seed=st.integers(0, 2**31 - 1),
)
def test_in_the_ball_and_in_range(norm, eps, steps, size, random_start, normalised, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(5, *SHAPE, generator=generator).round(decimals=1)  # some pixels are 0 and 1
    y = torch.arange(5) % 4
    unit = torch.tensor([0.2, 0.5]).view(2, 1, 1) if normalised else 1.0
    attacked = perturb(curved(4, SHAPE), x, y, norm, eps, steps, size, random_start, generator, unit)
    far = ((attacked - x) / unit).flatten(1).norm(norm, dim=1).max()
    assert far <= eps * (1 + 1e-5) + 1e-6
    assert attacked.min() >= 0
    assert attacked.max() <= 1
    assert not attacked.requires_grad


@pytest.mark.parametrize("norm", NORMS)
def test_linear_classifier(norm):
    """Of two classes: the loss is highest eps along the direction from one weight to the other's, or its signs."""
    model = linear(2, SHAPE)
    x, y = torch.full((6, *SHAPE), 0.5), torch.arange(6) % 2
    w = model[1].weight.detach()
    towards = (w[1 - y] - w[y]).view(6, *SHAPE)
    length = towards.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    best = 0.2 * (towards / length if norm == 2 else towards.sign())
    for options in ({"random_start": False}, {"random_start": True}):
        attacked = perturb(model, x, y, norm, 0.2, 30, 0.05, **options)
        assert attacked == pytest.approx(x + best, abs=2e-3)
    fgsm = perturb(model, x, y, norm, 0.2, 1, 0.2, random_start=False)
    assert fgsm == pytest.approx(x + best, abs=1e-6)
    in_units = perturb(model, x, y, norm, 0.4, 1, 0.4, random_start=False, unit=torch.full((2, 1, 1), 0.5))
    assert in_units == pytest.approx(x + best, abs=1e-6)


def test_raises_the_loss_of_a_network():
    model, x = curved(4, SHAPE), torch.rand(20, *SHAPE)
    y = model(x).argmax(1)
    losses = [F.cross_entropy(model(perturb(model, x, y, 2, eps, 10, eps / 4)), y).item() for eps in (0.1, 0.3, 1.0)]
    assert F.cross_entropy(model(x), y).item() < losses[0] < losses[1] < losses[2]


def test_confident_classifier():
    """Its gradient is so small that the squares are zero in float32."""
    model = linear(2, SHAPE)
    x, y = torch.full((2, *SHAPE), 0.5), torch.tensor([0, 0])
    with torch.no_grad():
        model[1].bias.copy_(torch.tensor([65.0, 0.0]))
        gradient = model(x).softmax(1)[0, 1]
    assert 0 < gradient < 1e-25
    attacked = perturb(model, x, y, 2, 0.2, 1, 0.2, random_start=False)
    assert (attacked - x).flatten(1).norm(dim=1) == pytest.approx(torch.full((2,), 0.2), rel=1e-4)
    model[1].weight.data.zero_()
    assert torch.equal(perturb(model, x, y, 2, 0.2, 3, 0.2, random_start=False), x)


class Scaled(nn.Module):
    def __init__(self, model, factor):
        super().__init__()
        self.model, self.factor = model, factor

    def forward(self, x):
        return self.factor * self.model(x)


@pytest.mark.parametrize("norm", NORMS)
def test_confidence_is_no_robustness(norm):
    """The same decisions with logits 100,000 times as large: the cross-entropy's gradient is 0 in float32."""
    model, x = curved(4, SHAPE), torch.rand(20, *SHAPE)
    y = model(x).argmax(1)
    sure = Scaled(model, 1e5)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(sure(leaf), y, reduction="sum"), leaf)
    assert (gradient.flatten(1).norm(dim=1) == 0).any()
    attacked = perturb(sure, x, y, norm, 0.3, 5, 0.1, random_start=False)
    expected = perturb(Scaled(model.double(), 1e5), x.double(), y, norm, 0.3, 5, 0.1, random_start=False)
    assert attacked == pytest.approx(expected.float(), abs=2e-4)


@pytest.mark.parametrize("norm", ["2", "inf"])
def test_a_gradient_that_is_not_finite_is_no_robustness(norm):
    model, images = NoGradient(curved(4, SHAPE)), split(5, SHAPE)
    right = type(images)(images.images, model(pixels(images)).argmax(1))
    assert perturb(model, pixels(right), right.labels, float(norm), 0.1, 1, 0.1).isnan().any()
    for random_start in (True, False):
        with pytest.raises(ValueError, match="the model's gradient is not finite"):
            pgd(model, right, device="cpu", batch_size=5, eps=(1e-3,), norm=norm, random_start=random_start)


def test_log_odds():
    logits = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([0, 1, 2, 3, 4, 0])
    odds = attacks.log_odds(logits, y)
    p = logits.softmax(1).gather(1, y[:, None])[:, 0]
    torch.testing.assert_close(odds, ((1 - p) / p).log())
    torch.testing.assert_close(F.softplus(odds), F.cross_entropy(logits, y, reduction="none"))
    far = torch.tensor([[100.0, 0.0, -5.0]])
    assert attacks.log_odds(far, torch.tensor([0])).item() == pytest.approx(math.log1p(math.exp(-5)) - 100, rel=1e-6)
    assert attacks.log_odds(torch.ones(2, 1), torch.zeros(2, dtype=torch.int64)).tolist() == [0, 0]
    assert attacks.log_odds(far.half(), torch.tensor([0])).dtype == torch.float32


def test_nothing_stays_behind():
    model = curved(4, SHAPE).train()
    buffers = {name: value.clone() for name, value in model.eval().named_buffers()}
    with torch.no_grad():
        perturb(model, torch.rand(3, *SHAPE), torch.zeros(3, dtype=torch.int64), 2, 0.1, 2, 0.1)
    assert all(w.grad is None and w.requires_grad for w in model.parameters())
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())


@pytest.mark.parametrize("norm", NORMS)
def test_uniform_in_ball(norm):
    """Half of the points lie within the radius that holds half of the volume."""
    x = torch.zeros(4000, 3)
    points = uniform_in_ball(x, norm, 2.0, torch.Generator().manual_seed(1))
    length = points.norm(norm, dim=1)
    assert length.max() <= 2
    assert (length < 2 * 0.5 ** (1 / 3)).float().mean() == pytest.approx(0.5, abs=0.03)
    assert points.mean(0) == pytest.approx(torch.zeros(3), abs=0.06)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": 1}, "must be 2 or inf, got 1"),
        ({"eps": -1.0}, "eps of an attack must be finite and at least 0, got -1.0"),
        ({"eps": math.nan}, "eps of an attack"),
        ({"step_size": math.inf}, "step_size of an attack"),
        ({"steps": 0}, "steps of an attack must be finite and at least 1, got 0"),
    ],
)
def test_impossible_attacks(options, message):
    arguments = {"norm": 2, "eps": 0.1, "steps": 1, "step_size": 0.1, **options}
    with pytest.raises(ValueError, match=message):
        perturb(linear(2, SHAPE), torch.rand(2, *SHAPE), torch.zeros(2, dtype=torch.int64), **arguments)


# --------------------------------------------------------------------------------------------------------------------
# the metric


@settings(max_examples=15, deadline=None)
@given(
    norm=st.sampled_from(["2", "inf"]),
    eps=st.lists(st.floats(1e-3, 2), min_size=1, max_size=4),
    steps=st.integers(1, 3),
    step_size=st.sampled_from([None, 1e-3, 10.0]),
    restarts=st.integers(1, 2),
    random_start=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_larger_budgets_never_raise_accuracy(norm, eps, steps, step_size, restarts, random_start, seed):
    """Whatever the attack, also one whose steps are so long that it misses."""
    options = {"steps": steps, "step_size": step_size, "restarts": restarts, "random_start": random_start}
    data = split(12, SHAPE, seed=seed)
    values = pgd(curved(4, SHAPE), data, device="cpu", batch_size=5, seed=seed, eps=tuple(eps), norm=norm, **options)
    accuracies = list(values.values())
    assert next(iter(values)) == "clean"
    assert accuracies == sorted(accuracies, reverse=True)
    assert min(accuracies) >= 0


def test_accuracy_of_a_linear_classifier():
    """Of two classes: an image is broken when the budget exceeds its distance to the boundary."""
    model, data = linear(2, SHAPE), split(40, SHAPE, 2)
    # In the middle of the range, where no pixel meets 0 or 1.
    data = type(data)((data.images.float() * 0.2 + 100).to(torch.uint8), data.labels)
    x, y = pixels(data), data.labels
    with torch.no_grad():
        model[1].bias.copy_(-model[1].weight @ x.mean(0).flatten())  # the boundary goes through the middle of them
        logits = model(x)
        margin = logits.gather(1, y[:, None]) - logits.gather(1, 1 - y[:, None])
        w = model[1].weight
        distance = (margin / (w[0] - w[1]).norm()).flatten()
    right = distance[distance > 0].sort().values
    budgets = tuple(((right[1:] + right[:-1]) / 2)[[2, 6, 10]].tolist())
    assert max(budgets) < 0.2
    values = pgd(model, data, device="cpu", batch_size=16, eps=budgets, random_start=False)
    assert values["clean"] == (distance > 0).double().mean()
    for budget in budgets:
        assert values[f"l2_{budget:g}"] == (distance > budget).double().mean()


def test_normalised_space():
    """A budget in standard deviations is that of pixels times the deviation, with one for all channels."""
    body, data = curved(4, SHAPE), split(30, SHAPE)
    model = nn.Sequential(models.Normalize((0.5, 0.5), (0.25, 0.25), 2), body).eval()
    options = {"device": "cpu", "batch_size": 30, "steps": 5, "random_start": False}
    in_pixels = pgd(model, data, eps=(0.1,), **options)
    in_deviations = pgd(model, data, eps=(0.4,), space="normalised", **options)
    assert in_pixels["l2_0.1"] == in_deviations["l2_0.4"] < in_pixels["clean"]
    with pytest.raises(ValueError, match=r"first layer is densreg\.lab\.models\.Normalize"):
        pgd(body, data, space="normalised", **options)


def test_an_attack_that_leaves_its_ball_is_found(monkeypatch):
    monkeypatch.setattr(attacks, "project", lambda delta, norm, eps: delta)
    model, images = curved(4, SHAPE), split(5, SHAPE)
    right = type(images)(images.images, model(pixels(images)).argmax(1))
    with pytest.raises(RuntimeError, match="PGD left its ball"):
        pgd(model, right, device="cpu", batch_size=5, eps=(0.01,), step_size=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "1"}, "norm must be 2 or inf, got '1'"),
        ({"eps": ()}, "eps is empty"),
        ({"eps": (0.0,)}, "eps must be above 0"),
        ({"steps": 0}, "steps must be in"),
        ({"space": "feature"}, "space must be pixel or normalised"),
    ],
)
def test_impossible_options(options, message):
    with pytest.raises(ValueError, match=message):
        pgd(curved(4, SHAPE), split(5, SHAPE), device="cpu", batch_size=5, **options)


def test_default_step_size():
    """2.5 eps / steps, in the measurement as in adversarial training."""
    assert attacks.default_step_size(0.4, 20) == pytest.approx(0.05)
    model, images = curved(4, SHAPE), split(20, SHAPE)
    options = {"device": "cpu", "batch_size": 20, "eps": (0.2,), "steps": 2}
    results = [pgd(model, images, **options, step_size=size) for size in (None, 0.25, 0.01)]
    assert results[0] == results[1] != results[2]
