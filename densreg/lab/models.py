"""Classifiers by name, and the checkpoints of a run."""

from __future__ import annotations

import copy
import functools
import inspect
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from densreg.check import check_model
from densreg.lab import runs
from densreg.objective import RegularizedObjective
from densreg.regularizers import Regularizer
from densreg.version import __version__

SMALL_IMAGE = 64
"""Up to this size ResNets get the stem of the CIFAR papers: a 3x3 convolution of stride 1 and no pooling."""


class ModelError(ValueError):
    """The model is unknown or does not fit the images; the message is one line for the user."""


class Normalize(nn.Module):
    """``(x - mean) / std`` per channel, as the model's first layer: its inputs, and so their scores, are pixels.

    One-channel images are repeated for models that want ``channels``.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float], channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return ((x - self.mean) / self.std).expand(-1, self.channels, -1, -1)


class SoftPlus(nn.Sequential):
    """Modules in a row, as one model in which SoftPlus stands in for every ReLU, module or function.

    ``log(1 + exp(beta x)) / beta``, which has a second derivative; ReLU6 is left as it is. The parameters and their
    names are those of the model with ReLU.

    Args:
        beta: the larger, the nearer to ReLU; above 0.
    """

    def __init__(self, *modules: nn.Module, beta: float) -> None:
        super().__init__(*modules)
        if not 0 < beta < math.inf:
            raise ModelError(f"softplus must be finite and above 0, got {beta}")
        self.beta = float(beta)

    def forward(self, x: Tensor) -> Tensor:
        with _ReLUAsSoftPlus(self.beta):
            return super().forward(x)

    def extra_repr(self) -> str:
        return f"SoftPlus in place of ReLU, beta={self.beta:g}"


_RELU = (F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_)


class _ReLUAsSoftPlus(TorchFunctionMode):
    # A mode, as torchvision's models call ReLU as module, function and method: what is replaced must not depend on it.
    def __init__(self, beta: float) -> None:
        super().__init__()
        self.beta = beta

    def __torch_function__(self, func, _types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _RELU:
            return F.softplus(args[0] if args else kwargs["input"], self.beta)
        return func(*args, **kwargs)


class _Seen(TorchFunctionMode):
    """Whether a function was called."""

    def __init__(self, function: Callable) -> None:
        super().__init__()
        self.function, self.seen = function, False

    def __torch_function__(self, func, _types, args=(), kwargs=None):
        self.seen |= func is self.function
        return func(*args, **(kwargs or {}))


def mlp(classes: int, image_shape: Sequence[int], width: int = 512) -> nn.Module:
    """Multilayer perceptron with two hidden layers of ``width`` ReLU units."""
    pixels = int(torch.Size(image_shape).numel())
    hidden = [nn.Linear(pixels, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, classes))


def vgg11(classes: int, image_shape: Sequence[int]) -> nn.Module:
    """torchvision's VGG11 for small images: as many poolings as they allow, global pooling, one linear layer."""
    from torchvision.models.vgg import make_layers

    layers: list[str | int] = []
    side = min(image_shape[1:])
    widths: list[str | int] = [64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"]
    for layer in widths:
        if layer == "M":
            if side < 2:
                continue
            side //= 2
        layers.append(layer)
    features = make_layers(layers)
    if image_shape[0] != 3:
        features[0] = nn.Conv2d(image_shape[0], 64, 3, padding=1)
    model = nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, classes))
    _kaiming(model)
    return model


def resnet(name: str, classes: int, image_shape: Sequence[int]) -> nn.Module:
    """torchvision's ResNet of that name; for images up to 64x64 with the stem of the CIFAR papers."""
    from torchvision.models import get_model

    model = get_model(name, weights=None, num_classes=classes)
    channels = image_shape[0]
    if max(image_shape[1:]) <= SMALL_IMAGE:
        model.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
        model.maxpool = nn.Identity()
    elif channels != 3:
        model.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
    if model.conv1.in_channels != 3 or model.conv1.stride == (1, 1):
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    return model


class _WideBlock(nn.Module):
    """BatchNorm, ReLU and 3x3 convolution, twice, beside a shortcut: the pre-activation block of Wide ResNets."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(width_in), nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(width_in, width, 1, stride, bias=False) if width_in != width else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x).relu()
        # Where the width changes the shortcut starts after the activation, as in the authors' code.
        short = x if self.shortcut is None else self.shortcut(y)
        return short + self.conv2(self.norm2(self.conv1(y)).relu())


def _kaiming(model: nn.Module) -> None:
    """He initialization of the convolutions, for the signal backwards, as torchvision's VGG has it."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def wrn28_10(classes: int, image_shape: Sequence[int]) -> nn.Module:
    """WRN-28-10 without dropout (Zagoruyko and Komodakis, Wide Residual Networks, BMVC 2016), pooled globally."""
    layers: list[nn.Module] = [nn.Conv2d(image_shape[0], 16, 3, padding=1, bias=False)]
    width = 16
    for wide, stride in ((160, 1), (320, 2), (640, 2)):
        for i in range(4):  # (28 - 4) / 6 blocks in each group
            layers.append(_WideBlock(width, wide, stride if i == 0 else 1))
            width = wide
    layers += [nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes)]
    model = nn.Sequential(*layers)
    _kaiming(model)
    nn.init.zeros_(layers[-1].bias)  # type: ignore[arg-type]
    return model


class _Subsample(nn.Module):
    """Every second pixel, and channels of zeros up to ``width``: the shortcut without parameters (option A)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        more = self.width - x.shape[1]
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, more // 2, more - more // 2))


def resnet20(classes: int, image_shape: Sequence[int]) -> nn.Module:
    """ResNet-20 for 32x32 images, 0.27 M parameters (He et al., Deep Residual Learning, CVPR 2016, section 4.2)."""
    from torchvision.models.resnet import BasicBlock

    layers: list[nn.Module] = [nn.Conv2d(image_shape[0], 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    width = 16
    for wide in (16, 32, 64):
        for _ in range(3):
            layers.append(
                BasicBlock(width, wide, 1 if wide == width else 2, _Subsample(wide) if wide != width else None)
            )
            width = wide
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))
    _kaiming(model)
    return model


_OWN: dict[str, Callable[[int, Sequence[int]], nn.Module]] = {
    "mlp": mlp,
    "vgg11": vgg11,
    "resnet18": functools.partial(resnet, "resnet18"),
    "resnet20": resnet20,
    "resnet34": functools.partial(resnet, "resnet34"),
    "wrn28-10": wrn28_10,
}
OWN_MODELS = tuple(_OWN)


def torchvision_names() -> list[str]:
    """Names of torchvision's classifiers."""
    from torchvision import models

    return models.list_models(module=models)


def check_name(name: str) -> str:
    """The name of a model that :func:`build` knows.

    Raises:
        ModelError: there is none of that name.
    """
    if name in OWN_MODELS:
        return name
    known = torchvision_names()
    if name not in known:
        near = runs.did_you_mean(name, {*OWN_MODELS, *known})
        raise ModelError(f"unknown model {name!r}; expected {', '.join(OWN_MODELS)} or a torchvision classifier{near}")
    return name


def build(
    name: str,
    classes: int,
    image_shape: Sequence[int],
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
    softplus: float | None = None,
) -> nn.Module:
    """A classifier with fresh weights that takes pixels in [0, 1].

    Args:
        name: one of :data:`OWN_MODELS`, for small images, or the name of any torchvision classifier, which is built as
            it is; grey images are repeated in its three channels.
        classes: number of classes.
        image_shape: (channels, H, W).
        mean, std: of the pixels, per channel, for the first layer.
        softplus: beta of the SoftPlus in place of every ReLU; None leaves ReLU. The initial weights are the same.

    Raises:
        ModelError: unknown name, impossible beta.
    """
    check_name(name)
    channels = image_shape[0]
    if name in OWN_MODELS:
        body = _OWN[name](classes, image_shape)
    else:
        from torchvision.models import get_model

        channels = 3
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # GoogLeNet and Inception announce a change of their initialisation
            body = get_model(name, weights=None, num_classes=classes)
    layers = (Normalize(mean, std, channels), body)
    return nn.Sequential(*layers) if softplus is None else SoftPlus(*layers, beta=softplus)


def check_trainable(
    model: nn.Module,
    name: str,
    image_shape: Sequence[int],
    path: str | None,
    samples: int = 2,
    regularizer: str | Regularizer = "density",
) -> None:
    """Raise ModelError unless a model takes such images and can be trained with the penalty; changes nothing in it.

    Runs a step of :class:`densreg.RegularizedObjective` on a few random images; a plain one for ``path=None``.
    """
    device = next(model.parameters()).device
    model = copy.deepcopy(model)  # BatchNorm's statistics would move
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        x = torch.rand(samples, *image_shape, device=device)
        y = torch.zeros(samples, dtype=torch.int64, device=device)
        interval = None if path is None else 1
        try:
            objective = RegularizedObjective(
                model, 1.0, path=path or "fused", compile=False, interval=interval, regularizer=regularizer
            )
            with _Seen(F.softplus) as softplus:
                objective(x, y)
        except Exception as error:
            try:
                findings = [] if path in (None, "directional") else check_model(model, x)
            except Exception:  # the model cannot even be run; the first error says more
                findings = []
            size = "x".join(map(str, image_shape))
            raise ModelError(
                f"model {name!r} cannot be trained{' with the penalty' if path else ''} on {size} images: "
                f"{findings[0] if findings else runs.first_line(error)}"
            ) from error
    if isinstance(model, SoftPlus) and not softplus.seen:
        raise ModelError(f"softplus: model {name!r} has no ReLU to be replaced")


def load_checkpoint(run_dir: str | Path, device: str | torch.device = "cpu") -> tuple[nn.Module, dict[str, Any]]:
    """The model of a run, in eval mode, and the run's configuration (that of config.json).

    Where the last checkpoint is damaged it is the one before, with a warning that says so.

    Args:
        run_dir: what ``densreg train --out`` wrote.
        device: where to put the model.

    Raises:
        ModelError: there is no run, or its files cannot be read.
    """
    try:
        saved, note = runs.load_checkpoint(Path(run_dir), device)
        if saved is None:
            raise runs.RunError(f"there is no {runs.CHECKPOINT}")
        spec, config = saved["spec"], saved["config"]
        unknown = sorted(spec.keys() - inspect.signature(build).parameters.keys())
        if unknown:
            raise runs.RunError(f"its model has the option {unknown[0]!r}, which densreg {__version__} does not know")
        model = build(**spec)
        model.load_state_dict(saved["model"])
    except ModelError:
        raise
    except Exception as error:  # what is not ours can lack anything
        reason = runs.first_line(error)
        raise ModelError(f"no readable run in {run_dir}: {reason}") from error
    if note:
        warnings.warn(note, stacklevel=2)
    return model.to(device).eval(), config
