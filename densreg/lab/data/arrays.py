"""Data sets that are held in memory: scikit-learn's digits, MNIST and what is made of it, CIFAR, SVHN, noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from densreg.lab.data.blockmnist import null_below, random_null
from densreg.lab.data.images import DataError
from densreg.lab.data.registry import CIFAR_RECIPE, Recipe, Request, register
from densreg.lab.data.splits import DataSet, Split, seeded
from densreg.lab.runs import first_line

_MNIST_RECIPE = Recipe(epochs=80, optimizer="adam", lr=1e-4, batch_size=128)


def _split(
    images: Any, labels: Any, shape: tuple[int, ...], classes: int, images_file: Path, labels_file: Path
) -> Split:
    """A split in memory; raises DataError, naming the file, unless number, shapes and labels are right."""
    images, labels = torch.as_tensor(images), torch.as_tensor(labels).long()
    if len(images) == 0:
        raise DataError(f"{images_file} holds no images")
    if tuple(images.shape[1:]) != shape:
        raise DataError(f"{images_file} holds images of shape {list(images.shape[1:])}; expected {list(shape)}")
    if labels.shape != images.shape[:1]:
        raise DataError(f"{labels_file} holds {len(labels)} labels; expected {len(images)}, one for each image")
    wrong = labels[(labels < 0) | (labels >= classes)]
    if len(wrong):
        raise DataError(f"{labels_file} holds the label {wrong[0]}; expected 0 to {classes - 1}")
    return Split(images, labels)


@register("digits", Recipe(epochs=30, optimizer="adam", lr=1e-3, batch_size=64), model="mlp")
def digits(request: Request) -> DataSet:
    """scikit-learn's digits, 8x8, which need no files."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = torch.from_numpy(digits.images * (255 / 16)).round().to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(digits.target).long()
    train, test = train_test_split(range(len(labels)), test_size=0.2, random_state=0, stratify=digits.target)
    return DataSet(request.name, Split(images[train], labels[train]), Split(images[test], labels[test]), 10)


def _read(kind: str, file: Path, read: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """What a reader gives; raises DataError, naming the file, for whatever it raises."""
    try:
        return read(*args, **options)
    except Exception as error:  # readers and pickle raise all sorts for files that are absent or damaged
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else first_line(error)
        raise DataError(f"no usable {kind} in {file} ({reason}); give its folder, or add --download") from error


def _mnist_splits(request: Request) -> tuple[Split, Split]:
    from torchvision import datasets
    from torchvision.datasets.mnist import read_image_file, read_label_file

    root = request.folder()
    raw = root / "MNIST" / "raw"
    if request.download:
        _read("MNIST", raw, datasets.MNIST, root, download=True)
    splits = []
    for prefix in ("train", "t10k"):
        images_file, labels_file = raw / f"{prefix}-images-idx3-ubyte", raw / f"{prefix}-labels-idx1-ubyte"
        images = _read("MNIST", images_file, read_image_file, str(images_file))
        labels = _read("MNIST", labels_file, read_label_file, str(labels_file))
        splits.append(_split(images.unsqueeze(1), labels, (1, 28, 28), 10, images_file, labels_file))
    return splits[0], splits[1]


@register("mnist", _MNIST_RECIPE, model="mlp")
def mnist(request: Request) -> DataSet:
    """MNIST."""
    return DataSet(request.name, *_mnist_splits(request), classes=10)


@register("blockmnist", _MNIST_RECIPE, model="mlp")
def blockmnist(request: Request) -> DataSet:
    """MNIST's digits stacked with a null tile, 56x28."""
    train, test = _mnist_splits(request)
    return DataSet(request.name, replace(train, transform=random_null), replace(test, transform=null_below), classes=10)


def _checksums(kind: str, folder: Path, files: Sequence[Sequence[str]]) -> None:
    """Raise DataError unless each file, given as (name, md5), is the published one."""
    from torchvision.datasets.utils import check_integrity

    for name, md5 in files:
        file = folder / name
        if not check_integrity(file, md5):
            reason = "its checksum is not the published one" if file.exists() else "there is no such file"
            raise DataError(f"no usable {kind} in {file} ({reason}); give its folder, or add --download")


def _cifar(request: Request, kind: str, classes: int, mean: tuple[float, ...], std: tuple[float, ...]) -> DataSet:
    from torchvision import datasets

    root, cls = request.folder(), getattr(datasets, kind)
    folder = root / cls.base_folder
    if request.download:
        _read(kind, folder, cls, root, download=True)
    _checksums(kind, folder, [*cls.train_list, *cls.test_list, (cls.meta["filename"], cls.meta["md5"])])
    splits = []
    for train in (True, False):
        loaded = _read(kind, folder, cls, root, train=train)
        images = torch.as_tensor(loaded.data).permute(0, 3, 1, 2).contiguous()
        splits.append(_split(images, loaded.targets, (3, 32, 32), classes, folder, folder))
    train_split = replace(splits[0], transform=request.transform())
    return DataSet(request.name, train_split, splits[1], classes, mean, std)


@register("cifar10", CIFAR_RECIPE)
def cifar10(request: Request) -> DataSet:
    """CIFAR-10."""
    return _cifar(request, "CIFAR10", 10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))


@register("cifar100", CIFAR_RECIPE)
def cifar100(request: Request) -> DataSet:
    """CIFAR-100."""
    return _cifar(request, "CIFAR100", 100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))


@register("svhn", CIFAR_RECIPE)
def svhn(request: Request) -> DataSet:
    """Street View House Numbers."""
    from torchvision import datasets

    root, splits = request.folder(), []
    for name in ("train", "test"):
        _, file, md5 = datasets.SVHN.split_list[name]
        if request.download:
            _read("SVHN", root / file, datasets.SVHN, root, name, download=True)
        _checksums("SVHN", root, [(file, md5)])
        loaded = _read("SVHN", root / file, datasets.SVHN, root, name)
        images = torch.from_numpy(np.ascontiguousarray(loaded.data))
        splits.append(_split(images, loaded.labels, (3, 32, 32), 10, root / file, root / file))
    train = replace(splits[0], transform=request.transform(flip=False))  # a mirrored digit is another one, or none
    return DataSet(request.name, train, splits[1], 10, (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970))


@register("synthetic", Recipe(epochs=1, optimizer="sgd", lr=0.01, batch_size=128), classes=True, image_size=True)
def synthetic(request: Request) -> DataSet:
    """Noise with random labels, 1024 and 256 images."""
    classes, side = request.classes or 10, request.image_size or 32
    generator = torch.Generator().manual_seed(0)

    def noise(n: int) -> Split:
        try:
            images = torch.randint(256, (n, 3, side, side), dtype=torch.uint8, generator=generator)
        except (RuntimeError, MemoryError) as error:
            raise DataError(f"--data synthetic: no memory for {n} images of {side}x{side} pixels") from error
        return Split(images, torch.randint(classes, (n,), generator=generator))

    return DataSet(request.name, noise(1024), noise(256), classes)


_AGREE = 0.95
"""Part of spurious-mnist's training images whose background agrees with the class; of Waterbirds it is the same."""


@register(
    "spurious-mnist",
    replace(_MNIST_RECIPE, epochs=20),
    groups=("0-4 on red", "0-4 on green", "5-9 on red", "5-9 on green"),
)
def spurious_mnist(request: Request) -> DataSet:
    """MNIST by digits below 5 or not, on a background that agrees with the class in training and is random in test."""
    splits = []
    for number, (split, agree) in enumerate(zip(_mnist_splits(request), (_AGREE, 0.5), strict=True)):
        assert isinstance(split.images, Tensor)
        y = (split.labels >= 5).long()
        differs = torch.rand(len(y), generator=seeded(0, number)) >= agree
        a = torch.where(differs, 1 - y, y)
        background = torch.tensor([[128, 0, 0], [0, 128, 0]], dtype=torch.uint8)[a].view(-1, 3, 1, 1)
        splits.append(Split(torch.maximum(split.images, background), y, groups=2 * y + a))
    return DataSet(request.name, splits[0], splits[1], classes=2)
