"""Models by name: shapes, normalisation, what can be trained with the penalty, checkpoints."""

from __future__ import annotations

import pytest
import torch

import densreg
from densreg import models


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (1, 56, 28), (3, 32, 32), (3, 64, 64)])
@pytest.mark.parametrize("name", models.OWN_MODELS)
def test_own_models_take_every_data_sets_images(name, shape):
    model = models.build(name, 7, shape)
    x = torch.rand(2, *shape, requires_grad=True)
    logits = model(x)
    assert logits.shape == (2, 7)
    densreg.density_penalty(logits, x).backward()
    weights = [w for n, w in model.named_parameters() if n.endswith("weight")]
    assert all(w.grad is not None and w.grad.isfinite().all() for w in weights)
    assert any(w.grad.abs().sum() > 0 for w in weights)


def test_resnet18_has_the_small_stem_for_small_images():
    small, large = models.build("resnet18", 10, (3, 32, 32))[1], models.build("resnet18", 10, (3, 96, 96))[1]
    assert (small.conv1.kernel_size, small.conv1.stride) == ((3, 3), (1, 1))
    assert isinstance(small.maxpool, torch.nn.Identity)
    assert (large.conv1.kernel_size, large.conv1.stride) == ((7, 7), (2, 2))


def test_normalisation_is_in_the_model():
    model = models.build("mlp", 10, (3, 4, 4), mean=(0.1, 0.2, 0.3), std=(2.0, 4.0, 5.0))
    x = torch.rand(2, 3, 4, 4)
    expected = torch.stack([(x[:, c] - m) / s for c, (m, s) in enumerate(zip((0.1, 0.2, 0.3), (2, 4, 5)))], 1)  # noqa: B905
    torch.testing.assert_close(model[0](x), expected)


@pytest.mark.parametrize("name", ["squeezenet1_1", "resnet34", "mnasnet0_5"])
def test_any_torchvision_classifier(name):
    model = models.build(name, 5, (1, 56, 56))  # grey: repeated in three channels
    models.check_trainable(model, name, (1, 56, 56), "fused")
    assert model(torch.rand(2, 1, 56, 56)).shape == (2, 5)


def test_check_changes_nothing():
    model = models.build("resnet18", 5, (3, 16, 16))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    rng = torch.get_rng_state()
    models.check_trainable(model, "resnet18", (3, 16, 16), "taylor")
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(w.grad is None for w in model.parameters())


@pytest.mark.parametrize(
    ("name", "shape", "path", "message"),
    [
        ("inception_v3", (3, 32, 32), "fused", "cannot be trained with the penalty on 3x32x32 images"),
        ("inception_v3", (3, 32, 32), None, "cannot be trained on 3x32x32 images"),
        ("googlenet", (3, 64, 64), "fused", "returns GoogLeNetOutputs in training; wanted a tensor of logits"),
        ("mobilenet_v3_small", (3, 32, 32), "fused", "hardsigmoid_backward is not implemented"),
    ],
)
def test_what_cannot_be_trained_says_so(name, shape, path, message):
    model = models.build(name, 5, shape)
    with pytest.raises(models.ModelError, match=message):
        models.check_trainable(model, name, shape, path)


def test_unknown_name():
    with pytest.raises(models.ModelError, match=r"unknown model 'resnet19'; .* did you mean .*resnet18"):
        models.build("resnet19", 5, (3, 32, 32))


def test_load_checkpoint_errors(tmp_path):
    with pytest.raises(models.ModelError, match="no readable run in"):
        models.load_checkpoint(tmp_path)
    (tmp_path / models.CONFIG).write_text("{}")
    (tmp_path / models.CHECKPOINT).write_bytes(b"PK not a checkpoint")
    with pytest.raises(models.ModelError, match="no readable run in"):
        models.load_checkpoint(tmp_path)
