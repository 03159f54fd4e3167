"""Image data sets as tensors, and loaders that give whole batches.

Images are uint8 in memory and float32 in [0, 1] in a batch; normalisation belongs to the model, so that the score and
its norm are taken in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Transform = Callable[[Tensor, torch.Generator], Tensor]


class DataError(ValueError):
    """The data set is unknown, absent or not what it should be; the message is one line for the user."""


@dataclass(frozen=True)
class Split:
    """One split of a data set.

    Attributes:
        images: [N, channels, H, W] uint8.
        labels: [N] int64.
        transform: from a float batch in [0, 1] and a random generator to what the model sees.
    """

    images: Tensor
    labels: Tensor
    transform: Transform | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, index: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Images [n, channels, H', W'] float32 in [0, 1], labels [n]."""
        images = self.images[index].to(torch.float32).div_(255)
        if self.transform is not None:
            images = self.transform(images, generator)
        return images, self.labels[index]

    def first(self, n: int | None) -> Split:
        """The first n samples; all of them for None."""
        return self if n is None else Split(self.images[:n], self.labels[:n], self.transform)


@dataclass(frozen=True)
class DataSet:
    """A data set for classification, both splits in memory.

    Attributes:
        classes: number of classes.
        mean, std: per channel, of pixels in [0, 1], for the model's normalisation; 0 and 1 for none.
    """

    name: str
    train: Split
    test: Split
    classes: int
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(channels, H, W) of what the model sees."""
        images, _ = self.test.batch(torch.arange(1), torch.Generator())
        return tuple(images.shape[1:])


def batches(
    split: Split, batch_size: int, generator: torch.Generator | None = None, drop_last: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of a split: shuffled and transformed by the generator, or in order where there is none."""
    order = torch.arange(len(split)) if generator is None else torch.randperm(len(split), generator=generator)
    for index in order.split(batch_size):
        if drop_last and len(index) < batch_size:
            return
        yield split.batch(index, generator or torch.Generator().manual_seed(0))


# --------------------------------------------------------------------------------------------------------------------
# BlockMNIST


def null_tile(size: int = 28) -> Tensor:
    """The null tile of BlockMNIST, [size, size] in {0, 1}: an 11x11 outline with both diagonals, 57 pixels."""
    tile = torch.zeros(size, size)
    first, last = 9, 19
    tile[[first, last], first : last + 1] = 1
    tile[first : last + 1, [first, last]] = 1
    diagonal = torch.arange(first, last + 1)
    tile[diagonal, diagonal] = 1
    tile[diagonal, first + last - diagonal] = 1
    return tile


def stack_null(images: Tensor, null_below: Tensor) -> Tensor:
    """Digits [n, 1, 28, 28] and the null tile, stacked to [n, 1, 56, 28].

    Args:
        null_below: [n] bool, whether the null tile is the lower one.
    """
    null = null_tile(images.shape[-1]).expand_as(images)
    below = null_below.view(-1, 1, 1, 1)
    return torch.cat([torch.where(below, images, null), torch.where(below, null, images)], 2)


def _random_null(images: Tensor, generator: torch.Generator) -> Tensor:
    return stack_null(images, torch.rand(len(images), generator=generator) < 0.5)


def _null_below(images: Tensor, generator: torch.Generator) -> Tensor:
    return stack_null(images, torch.ones(len(images), dtype=torch.bool))


# --------------------------------------------------------------------------------------------------------------------
# augmentation


def _crop_and_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Random crop after padding by 4, and horizontal flip, drawn for each image: CIFAR's standard augmentation."""
    from torchvision.transforms import v2

    transform = v2.Compose([v2.RandomCrop(images.shape[-2:], padding=4), v2.RandomHorizontalFlip()])
    # torchvision draws from the global generator; what a batch looks like must not depend on what else draws from it.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(torch.randint(2**63 - 1, (), generator=generator)))
        return torch.stack([transform(image) for image in images])


# --------------------------------------------------------------------------------------------------------------------
# the data sets


def _digits(data_dir: Path | None, download: bool) -> DataSet:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = torch.from_numpy(digits.images * (255 / 16)).round().to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(digits.target).long()
    train, test = train_test_split(range(len(labels)), test_size=0.2, random_state=0, stratify=digits.target)
    return DataSet("digits", Split(images[train], labels[train]), Split(images[test], labels[test]), 10)


def _torchvision(name: str, data_dir: Path | None, download: bool) -> tuple[Split, Split]:
    """Train and test split of a torchvision data set."""
    from torchvision import datasets

    if data_dir is None:
        raise DataError(f"--data {name} needs --data-dir: the folder with (or for, with --download) its files")
    cls = getattr(datasets, name)
    try:
        if not data_dir.is_dir() and not download:
            raise DataError(f"--data-dir {data_dir} is not a folder")
        loaded = [cls(data_dir, train=train, download=download) for train in (True, False)]
    except DataError:
        raise
    except Exception as error:  # torchvision and pickle raise all sorts for files that are absent or damaged
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"no usable {name} in {data_dir} ({reason}); give its folder, or add --download") from error
    train, test = (_as_split(d) for d in loaded)
    return train, test


def _as_split(dataset: Any) -> Split:
    images = torch.as_tensor(dataset.data)
    images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
    return Split(images, torch.as_tensor(dataset.targets).long())


def _mnist(data_dir: Path | None, download: bool) -> DataSet:
    train, test = _torchvision("MNIST", data_dir, download)
    return DataSet("mnist", train, test, classes=10)


def _blockmnist(data_dir: Path | None, download: bool) -> DataSet:
    train, test = _torchvision("MNIST", data_dir, download)
    return DataSet(
        "blockmnist",
        Split(train.images, train.labels, _random_null),
        Split(test.images, test.labels, _null_below),
        classes=10,
    )


def _cifar100(data_dir: Path | None, download: bool) -> DataSet:
    train, test = _torchvision("CIFAR100", data_dir, download)
    return DataSet(
        "cifar100",
        Split(train.images, train.labels, _crop_and_flip),
        test,
        classes=100,
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
    )


DATA_SETS: dict[str, Callable[[Path | None, bool], DataSet]] = {
    "digits": _digits,
    "mnist": _mnist,
    "blockmnist": _blockmnist,
    "cifar100": _cifar100,
}


def load(name: str, data_dir: str | Path | None = None, download: bool = False) -> DataSet:
    """A data set by name.

    Args:
        name: "digits" (scikit-learn's, 8x8, needs no files), "mnist", "blockmnist" (MNIST digits stacked with a null
            tile, 56x28: above or below at random in training, below in test) or "cifar100" (cropped and flipped at
            random in training).
        data_dir: the folder that torchvision would download into; not for "digits".
        download: let torchvision download what is absent.

    Raises:
        DataError: unknown name, or files that are absent or damaged.
    """
    if name not in DATA_SETS:
        raise DataError(f"unknown data set {name!r}; wanted one of {', '.join(DATA_SETS)}")
    return DATA_SETS[name](None if data_dir is None else Path(data_dir), download)
