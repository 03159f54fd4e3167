"""Models by name: shapes, normalisation, what can be trained with the penalty, checkpoints."""

from __future__ import annotations

import pytest
import torch
from reference import Layer, Once

import densreg
from densreg import regularizers
from densreg.lab import data, models, runs, training


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (1, 56, 28), (3, 32, 32), (3, 64, 64)])
@pytest.mark.parametrize("name", [name for name in models.OWN_MODELS if name != "wrn28-10"])
def test_own_models_take_every_data_sets_images(name, shape):
    model = models.build(name, 7, shape)
    x = torch.rand(2, *shape, requires_grad=True)
    logits = model(x)
    assert logits.shape == (2, 7)
    densreg.density_penalty(logits, x).backward()
    weights = [w for n, w in model.named_parameters() if n.endswith("weight")]
    assert all(w.grad is not None and w.grad.isfinite().all() for w in weights)
    assert any(w.grad.abs().sum() > 0 for w in weights)


@pytest.mark.parametrize("name", ["resnet18", "resnet34"])
def test_resnets_have_the_small_stem_for_small_images(name):
    with torch.device("meta"):
        small, medium, large = (models.resnet(name, 10, (3, side, side)) for side in (32, 64, 96))
    for model in (small, medium):
        assert (model.conv1.kernel_size, model.conv1.stride) == ((3, 3), (1, 1))
        assert isinstance(model.maxpool, torch.nn.Identity)
    assert (large.conv1.kernel_size, large.conv1.stride) == ((7, 7), (2, 2))
    blocks = sum(len(getattr(small, f"layer{i}")) for i in (1, 2, 3, 4))
    assert blocks == {"resnet18": 8, "resnet34": 16}[name]


def test_wrn28_10_is_the_published_one():
    """36.5M parameters (Table 4 of the paper), 28 convolutions with those of the shortcuts, an 8x8 map at the end."""
    with torch.device("meta"):
        model = models.wrn28_10(10, (3, 32, 32))
        assert sum(w.numel() for w in model.parameters()) == 36_479_194
        sizes = [m.kernel_size for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
        assert (sizes.count((3, 3)), sizes.count((1, 1))) == (25, 3)
        assert model[:-3](torch.rand(2, 3, 32, 32)).shape == (2, 640, 8, 8)


def test_resnet20_is_the_published_one():
    """0.27M parameters (Table 6 of the paper, 10 classes), 19 convolutions and a linear layer, bare shortcuts."""
    model = models.resnet20(10, (3, 32, 32))
    assert sum(w.numel() for w in model.parameters()) == 269_722
    assert sum(isinstance(m, torch.nn.Conv2d) for m in model.modules()) == 19
    assert model[:-3](torch.rand(2, 3, 32, 32)).shape == (2, 64, 8, 8)
    x = torch.rand(2, 16, 4, 4)
    shortcut = model[6].downsample(x)
    assert torch.equal(shortcut[:, 8:24], x[:, :, ::2, ::2])
    assert not shortcut[:, [*range(8), *range(24, 32)]].any()


def test_wide_block_is_differentiated_twice_and_keeps_its_input():
    block = models._WideBlock(4, 4, 1)
    wider = models._WideBlock(4, 6, 2)
    x = torch.randn(3, 4, 6, 6, requires_grad=True)
    y = wider(block(x))
    assert y.shape == (3, 6, 3, 3)
    densreg.density_penalty(y.mean((2, 3)), x).backward()
    assert all(w.grad is not None and w.grad.isfinite().all() for w in wider.parameters())
    with torch.no_grad():
        for w in (block.conv2.weight, wider.conv2.weight):
            w.zero_()
        assert torch.equal(block(x), x), "nothing lies on the shortcut"
        assert torch.equal(wider(x), wider.shortcut(wider.norm1(x).relu()))


def test_wrn28_10_trains():
    model = models.build("wrn28-10", 10, (3, 8, 8))
    models.check_trainable(model, "wrn28-10", (3, 8, 8), "fused")


def test_normalisation_is_in_the_model():
    model = models.build("mlp", 10, (3, 4, 4), mean=(0.1, 0.2, 0.3), std=(2.0, 4.0, 5.0))
    x = torch.rand(2, 3, 4, 4)
    expected = torch.stack([(x[:, c] - m) / s for c, (m, s) in enumerate(zip((0.1, 0.2, 0.3), (2, 4, 5)))], 1)  # noqa: B905
    torch.testing.assert_close(model[0](x), expected)


@pytest.mark.parametrize("name", ["squeezenet1_1", "resnet34", "mnasnet0_5", "mobilenet_v3_small"])
def test_any_torchvision_classifier(name):
    model = models.build(name, 5, (1, 56, 56))  # grey: repeated in three channels
    models.check_trainable(model, name, (1, 56, 56), "fused")
    assert model(torch.rand(2, 1, 56, 56)).shape == (2, 5)


def test_the_layer_in_the_way_is_named():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 8), Layer(Once.apply), torch.nn.Linear(8, 5))
    with pytest.raises(models.ModelError, match=r"2 \(Layer\): .*directional"):
        models.check_trainable(model, "mine", (3, 4, 4), "fused")
    models.check_trainable(model, "mine", (3, 4, 4), "directional")


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
    with pytest.raises(models.ModelError, match=r"no readable run in .*: there is no checkpoint\.pt"):
        models.load_checkpoint(tmp_path)
    (tmp_path / runs.CHECKPOINT).write_bytes(b"PK not a checkpoint")
    with pytest.raises(models.ModelError, match=r"no readable run in .*checkpoint\.pt cannot be read"):
        models.load_checkpoint(tmp_path)
    torch.save({"model": {}}, tmp_path / runs.CHECKPOINT)
    with pytest.raises(models.ModelError, match=r"no readable run in .*: 'spec'"):
        models.load_checkpoint(tmp_path)


def test_load_checkpoint_executes_nothing(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "opened"), "w"))

    torch.save({"spec": Evil()}, tmp_path / runs.CHECKPOINT)
    with pytest.raises(models.ModelError, match="no readable run in"):
        models.load_checkpoint(tmp_path)
    assert not (tmp_path / "opened").exists()


def test_load_checkpoint_goes_back_to_the_previous_one(tmp_path):
    spec = {"name": "mlp", "classes": 3, "image_shape": (1, 2, 2)}
    model = models.build(**spec)
    for seed in (1, 2):
        runs.save_checkpoint(tmp_path, {"spec": spec, "model": model.state_dict(), "config": {"seed": seed}})
    assert models.load_checkpoint(tmp_path)[1]["seed"] == 2
    file = tmp_path / runs.CHECKPOINT
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.warns(UserWarning, match=r"checkpoint\.pt cannot be read .*; going back to checkpoint\.previous\.pt"):
        again, config = models.load_checkpoint(tmp_path)
    assert config["seed"] == 1
    assert all(torch.equal(w, model.state_dict()[k]) for k, w in again.state_dict().items())


class _EveryReLU(torch.nn.Module):
    """ReLU as module, functions and method."""

    def forward(self, x):
        f = torch.nn.functional
        for relu in (torch.nn.ReLU(inplace=True), f.relu, torch.relu, torch.Tensor.relu, lambda x: x.clone().relu_()):
            x = relu(x - 0.3)
        return f.relu(x - 0.3, inplace=True) + torch.relu_(x - 0.1)


def test_softplus_stands_for_every_relu():
    x = torch.randn(4, 3)
    smooth = models.SoftPlus(_EveryReLU(), beta=3)

    def wanted(x):
        def softplus(x):
            return torch.log1p((3 * x).exp()) / 3

        for _ in range(5):
            x = softplus(x - 0.3)
        return softplus(x - 0.3) + softplus(x - 0.1)

    torch.testing.assert_close(smooth(x.clone()), wanted(x))
    assert "beta=3" in repr(smooth)


@pytest.mark.parametrize(
    ("name", "shape"), [("mlp", (1, 8, 8)), ("resnet18", (3, 16, 16)), ("densenet121", (3, 32, 32))]
)
def test_softplus_models_are_those_with_modules_replaced(name, shape, monkeypatch):
    torch.manual_seed(0)
    plain = models.build(name, 5, shape).eval()
    torch.manual_seed(0)
    smooth = models.build(name, 5, shape, softplus=4.0).eval()
    assert plain.state_dict().keys() == smooth.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), smooth.parameters(), strict=True))
    x = torch.rand(2, *shape)
    before = plain(x)
    for module in list(plain.modules()):
        for child, layer in module.named_children():
            if isinstance(layer, torch.nn.ReLU):
                setattr(module, child, torch.nn.Softplus(4.0))
    with monkeypatch.context() as patch:  # DenseNet's last one is a function
        patch.setattr(torch.nn.functional, "relu", lambda x, inplace=False: torch.nn.functional.softplus(x, 4.0))
        torch.testing.assert_close(smooth(x), plain(x))
    assert not torch.allclose(smooth(x), before)


@pytest.mark.parametrize("regularizer", ["density", "hessian"])
def test_softplus_in_a_compiled_step(regularizer, fresh_dynamo):
    x, y = torch.rand(3, 1, 8, 8), torch.tensor([0, 1, 2])
    grads = []
    for compiled, coeff in ((False, 1.0), (True, 1.0), (False, 0.0)):
        torch.manual_seed(0)
        model = models.build("mlp", 3, (1, 8, 8), softplus=2.0)
        objective = densreg.RegularizedObjective(
            model, coeff, compile=compiled, backend="aot_eager", regularizer=regularizer
        )
        torch.manual_seed(1)
        objective(x, y).loss.backward()
        grads.append(torch.cat([w.grad.flatten() for w in model.parameters()]))
    eager, compiled, plain = grads
    torch.testing.assert_close(eager, compiled)
    # The penalty is in both, and is what the agreement is about.
    assert (eager - plain).norm() > 1e-3 * plain.norm()


def test_softplus_of_a_checkpoint(tmp_path):
    config = training.Config(str(tmp_path), softplus=2.5, epochs=1, train_size=64, test_size=50)
    rows = training.fit(config, progress=False)
    model, saved = models.load_checkpoint(tmp_path)
    assert isinstance(model, models.SoftPlus)
    assert (model.beta, saved["softplus"]) == (2.5, 2.5)
    x, y = data.load("digits").test.first(50).batch(torch.arange(50), torch.Generator())
    assert (model(x).argmax(1) == y).double().mean().item() == rows[-1]["test_accuracy"]


def test_softplus_errors():
    with pytest.raises(models.ModelError, match="softplus must be finite and above 0, got 0"):
        models.build("mlp", 3, (1, 8, 8), softplus=0.0)
    no_relu = models.SoftPlus(torch.nn.Flatten(), torch.nn.Linear(12, 3), beta=1.0)
    with pytest.raises(models.ModelError, match="softplus: model 'mine' has no ReLU to be replaced"):
        models.check_trainable(no_relu, "mine", (3, 2, 2), "fused")
    with pytest.raises(models.ModelError, match=r"model 'mlp' cannot be .* Hessian of the model is 0, .*--softplus"):
        models.check_trainable(
            models.build("mlp", 3, (1, 8, 8)), "mlp", (1, 8, 8), "fused", regularizer=regularizers.Hessian()
        )
