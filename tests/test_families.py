"""Families of classifiers through the objective, all of torchvision as one graph too: exact second order.

The networks are the families' own classes, as small as these allow, in training mode and float64. The reference is
eager autograd with torch's own layers, but for those that torch cannot differentiate twice: there it takes the plain
formulas.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from reference import by_autograd, gradients, nothing
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchvision import models
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.efficientnet import FusedMBConvConfig, MBConvConfig
from torchvision.models.mobilenetv3 import InvertedResidualConfig
from torchvision.models.resnet import BasicBlock
from torchvision.models.vgg import make_layers

import densreg
from benchmarks.second_order import relative_error
from densreg import RegularizedObjective, _torch

N = {"num_classes": 7}


def mobilenet_v3() -> nn.Module:
    block = functools.partial(InvertedResidualConfig, width_mult=1.0)
    return models.MobileNetV3([block(16, 3, 16, 16, True, "RE", 2, 1), block(16, 3, 24, 24, True, "HS", 1, 1)], 32, **N)


def resnet() -> nn.Module:
    model = models.ResNet(BasicBlock, [1, 1, 1, 1], **N)
    model.layer3 = model.layer4 = nn.Identity()  # as the second, which shrinks too
    model.fc = nn.Linear(128, 7)
    return model


def vgg_bn() -> nn.Module:
    features = make_layers([8, "M", 16, "M", 32, 32, "M", 32, "M", 32, "M"], batch_norm=True)
    return nn.Sequential(features, nn.Flatten(), nn.Linear(32, 7))


def efficientnet() -> nn.Module:
    blocks = [FusedMBConvConfig(2, 3, 1, 8, 8, 1), MBConvConfig(2, 3, 2, 8, 16, 1)]
    return models.EfficientNet(blocks, 0.2, last_channel=32, **N)


FAMILIES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet": (resnet, 32),
    "vgg_bn": (vgg_bn, 32),
    "convnext": (lambda: models.ConvNeXt([CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)], **N), 32),
    "swin": (lambda: models.SwinTransformer([4, 4], 16, [1, 2], [2, 2], [4, 4], **N), 32),
    "vit": (lambda: models.VisionTransformer(32, 8, 2, 2, 16, 32, **N), 32),
    "mobilenet_v3": (mobilenet_v3, 32),
    "efficientnet": (efficientnet, 32),
}


def googlenet() -> nn.Module:
    model = models.googlenet(init_weights=False, **N)
    for name in ("inception4b", "inception4c", "inception5a"):  # nine alike compile for long
        setattr(model, name, nn.Identity())
    return model


OTHERS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "densenet": (lambda: models.DenseNet(4, (2, 2), 8, **N), 32),
    "googlenet": (googlenet, 64),
    "maxvit": (lambda: models.MaxVit((32, 32), 16, 4, [8, 16], [1, 1], 8, 0.2, **N), 32),
    "mobilenet_v2": (lambda: models.MobileNetV2(inverted_residual_setting=[[1, 8, 1, 1], [2, 8, 2, 2]], **N), 32),
    "shufflenet": (lambda: models.ShuffleNetV2([2, 1, 1], [8, 16, 16, 16, 32], **N), 64),
    "squeezenet": (lambda: models.squeezenet1_1(**N), 32),
}


def build(make: Callable[[], nn.Module]) -> nn.Module:
    """In float64, nothing random, and no weights of zero, with which a fresh ViT's penalty vanishes."""
    torch.manual_seed(0)
    model = make().double()
    with torch.no_grad():
        for w in model.parameters():
            w.add_(torch.randn_like(w), alpha=0.02)
    for module in model.modules():
        if isinstance(module, nn.Dropout) or type(module).__name__ == "StochasticDepth":
            module.p = 0.0
    return model


def reference(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The penalty's gradient in the parameters by torch alone."""
    hardsigmoid = mock.patch.object(F, "hardsigmoid", lambda t, inplace=False: (t + 3).clamp(0, 6) / 6)
    with sdpa_kernel(SDPBackend.MATH), hardsigmoid:
        return by_autograd(model, x, None, 1.0, criterion=nothing)[1]


@pytest.mark.parametrize("name", [*FAMILIES, *(pytest.param(n, marks=pytest.mark.long) for n in OTHERS)])
def test_family(name, fresh_dynamo):
    make, size = (FAMILIES | OTHERS)[name]
    model = build(make)
    x = torch.rand(3, 3, size, size, dtype=torch.float64)
    y = torch.tensor([0, 1, 2])
    twin = copy.deepcopy(model)
    expected = reference(twin, x)
    assert sum(float(g.square().sum()) for g in expected) > 0
    for compiled in (False, True):
        torch._dynamo.utils.counters.clear()
        mine = copy.deepcopy(model)
        objective = RegularizedObjective(mine, 1.0, criterion=nothing, compile=compiled, backend="aot_eager")
        objective(x, y).loss.backward()
        assert relative_error(gradients(mine), expected) < 1e-10
        for a, b in zip(mine.buffers(), twin.buffers(), strict=True):  # the statistics of one plain step
            torch.testing.assert_close(a, b)
        if compiled:
            assert _torch.compiled_graphs() == 1
            assert not torch._dynamo.utils.counters["graph_break"]
    assert densreg.check_model(model, x) == []


SMALL_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}

TIMM: dict[str, dict] = {  # options that make it small; those named test_ are
    "test_vit": {},  # fused attention
    "test_nfnet": {},  # scaled weight standardization
    "test_mambaout": {},
    "eva02_tiny_patch14_224": SMALL_VIT,  # rotary embeddings, SwiGLU
    "lcnet_035": {},  # hardswish and hardsigmoid
    "swinv2_cr_tiny_224": {"img_size": 32, "embed_dim": 8, "depths": (1, 1), "num_heads": (2, 2), "window_size": 4},
}

MORE_TIMM: dict[str, dict] = {
    "test_byobnet": {},
    "test_convnext": {},
    "test_efficientnet": {},
    "test_maxvit": {},
    "test_resnet": {},
    "test_vit_relpos": {},
    "beit_base_patch16_224": SMALL_VIT,
    "cait_xxs24_224": SMALL_VIT,
    "xcit_nano_12_p8_224": SMALL_VIT,
    "densenet121": {"growth_rate": 4, "block_config": (2, 2)},
    "ghostnet_050": {},
    "mobilenetv3_small_050": {},
    "pvt_v2_b0": {},
    "regnety_002": {},
    "repvit_m0_9": {},
}


@pytest.mark.parametrize("name", [*TIMM, *(pytest.param(n, marks=pytest.mark.long) for n in MORE_TIMM)])
def test_timm(name):
    """In eager; the compiled step is that of the families above."""
    import timm

    options = (TIMM | MORE_TIMM)[name]
    model = build(lambda: timm.create_model(name, num_classes=7, drop_rate=0.0, **options)).train()
    size = options.get("img_size", 160 if "vit" in name else 64)
    x = torch.rand(2, 3, size, size, dtype=torch.float64)
    expected = reference(copy.deepcopy(model), x)
    assert sum(float(g.square().sum()) for g in expected) > 1e-6
    RegularizedObjective(model, 1.0, criterion=nothing, compile=False)(x, torch.tensor([0, 1])).loss.backward()
    assert relative_error(gradients(model), expected) < 1e-10


@pytest.mark.long
@pytest.mark.parametrize("name", ["ViT", "Swin", "ConvNextV2", "ResNet", "MobileViT", "Bert", "DistilBert", "Roberta"])
def test_hugging_face(name):
    """By keyword, beside an attention mask where there is one; of text the embeddings are penalized."""
    import transformers

    images, text = {"num_channels": 3, "image_size": 32}, {"vocab_size": 11, "max_position_embeddings": 16}
    still = {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0, "attention_dropout": 0, "drop_path_rate": 0}
    narrow = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    options = {
        "ViT": {**images, **narrow, "patch_size": 8},
        "Swin": {**images, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4},
        "ConvNextV2": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
        "ResNet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
        "MobileViT": {**images, "hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 16, 24, 32, 40, 48, 64]},
        "Bert": {**text, **narrow},
        "DistilBert": {**text, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32},
        "Roberta": {**text, **narrow},
    }[name]
    config = getattr(transformers, f"{name}Config")(**options, **still, num_labels=7)
    kind = "ForSequenceClassification" if options.keys() & text else "ForImageClassification"
    model = build(lambda: getattr(transformers, name + kind)(config)).train()
    if options.keys() & text:
        mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
        inputs = {"inputs_embeds": torch.randn(2, 6, 16, dtype=torch.float64), "attention_mask": mask}
    else:
        inputs = {"pixel_values": torch.rand(2, 3, 32, 32, dtype=torch.float64)}
    first, *_ = inputs

    class Positional(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = copy.deepcopy(model)

        def forward(self, x):
            return self.inner(**{**inputs, first: x}).logits

    expected = reference(Positional(), inputs[first])
    assert sum(float(g.square().sum()) for g in expected) > 1e-6
    options = {"criterion": nothing, "compile": False, "output": lambda output: output.logits}
    RegularizedObjective(model, 1.0, **options)(inputs, torch.tensor([0, 1])).loss.backward()
    assert relative_error(gradients(model), expected) < 1e-10


@pytest.mark.long
def test_attention_by_inductor(fresh_dynamo):
    size = 32
    model = build(lambda: models.VisionTransformer(size, 8, 1, 2, 16, 32, **N))
    x = torch.rand(3, 3, size, size, dtype=torch.float64)
    expected = reference(copy.deepcopy(model), x)
    RegularizedObjective(model, 1.0, criterion=nothing)(x, torch.tensor([0, 1, 2])).loss.backward()
    assert relative_error(gradients(model), expected) < 1e-10


@pytest.mark.slow
def test_swin_v2_with_keys_of_zero(fresh_dynamo):
    """It normalises keys; at a key of zero torch's second derivative is NaN."""
    model = build(lambda: models.SwinTransformer([4, 4], 16, [2], [2], [4, 4], block=swin_v2_block(), **N))
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "qkv"):
                third = module.qkv.weight.shape[0] // 3
                module.qkv.weight[third : 2 * third] = 0
                module.qkv.bias[third : 2 * third] = 0
    x, y = torch.rand(3, 3, 32, 32, dtype=torch.float64), torch.tensor([0, 1, 2])
    assert not all(g.isfinite().all() for g in reference(copy.deepcopy(model), x))
    grads = []
    for compiled in (False, True):
        mine = copy.deepcopy(model)
        RegularizedObjective(mine, 1.0, compile=compiled, backend="aot_eager")(x, y).loss.backward()
        grads.append(gradients(mine))
        assert all(g.isfinite().all() for g in grads[-1])
    assert relative_error(grads[1], grads[0]) < 1e-10


def swin_v2_block() -> Callable[..., nn.Module]:
    from torchvision.models.swin_transformer import SwinTransformerBlockV2

    return SwinTransformerBlockV2
