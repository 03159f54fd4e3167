"""Splits of a data set, their batches, and augmentation.

Images are 0 to 255 and become float32 in [0, 1] in a batch; normalization is the model's, so that the score and its
norm are taken in pixels. What is random in a batch follows from (seed, epoch, number of the batch) alone, so a resumed
run can start at any batch, and worker processes change nothing.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from densreg.lab import runs
from densreg.lab.data.images import DataError, Files

CONTENTS = 1000
"""A run's digest covers the contents of at most so many files of a split: enough to notice replaced images."""

Transform = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class Split:
    """One split of a data set.

    Attributes:
        images: [N, channels, H, W] in 0 to 255, uint8 in memory, or in files.
        labels: [N] int64.
        transform: from a float batch in [0, 1] and a random generator to what the model sees.
        groups: [N] int64, where the data set has groups.
    """

    images: Tensor | Files
    labels: Tensor
    transform: Transform | None = None
    groups: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: tuple[Tensor, tuple[int, ...]]) -> tuple[Tensor, Tensor]:
        """The batch of an index and of the numbers that seed its generator: what a DataLoader asks for."""
        index, numbers = key
        return self.batch(index, seeded(*numbers))

    def batch(self, index: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Images [n, channels, H', W'] float32 in [0, 1], labels [n]."""
        images = self.images[index].to(torch.float32).div_(255)
        if self.transform is not None:
            images = self.transform(images, generator)
        return images, self.labels[index]

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(channels, H, W) of what the model sees."""
        images, _ = self.batch(torch.arange(1), torch.Generator())
        return tuple(images.shape[1:])

    def digest(self, contents: int | None = None) -> str:
        """Hash of images, labels and groups, as 16 hexadecimal digits; ``contents``: see :meth:`Files.digest`."""
        images = runs.digest(self.images) if isinstance(self.images, Tensor) else self.images.digest(contents)
        numbers = runs.digest(self.labels, *([] if self.groups is None else [self.groups]))
        return hashlib.sha256(f"{images} {numbers}".encode()).hexdigest()[:16]

    def first(self, n: int | None) -> Split:
        """The first n samples; all of them for None."""
        return self if n is None else self._part(slice(n))

    def _part(self, part: slice) -> Split:
        groups = None if self.groups is None else self.groups[part]
        return replace(self, images=self.images[part], labels=self.labels[part], groups=groups)

    def check_groups(self, count: int, what: str) -> Tensor:
        """The groups [N]; raises DataError unless each of the ``count`` groups has an image."""
        assert self.groups is not None
        sizes = torch.bincount(self.groups, minlength=count).tolist()
        if 0 in sizes:
            raise DataError(
                f"{what}: group {sizes.index(0)} of {count} has no images among these {len(self)}: take more of them"
            )
        return self.groups


@dataclass(frozen=True)
class DataSet:
    """A data set for classification.

    Attributes:
        classes: number of classes.
        mean, std: per channel, of pixels in [0, 1], for the model's normalisation; 0 and 1 for none.
        note: what a user must know, such as that it is a subset.
        class_names: names of the classes, where the files determine them.
        groups: names of the groups, where there are some: a class together with an attribute.
    """

    name: str
    train: Split
    test: Split
    classes: int
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    note: str = ""
    class_names: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()

    @property
    def image_shape(self) -> tuple[int, ...]:
        return self.test.image_shape

    def describe(self) -> dict[str, Any]:
        """What identifies this data set among others of its name, for config.json."""
        images = {name: split.digest(CONTENTS) for name, split in (("train", self.train), ("test", self.test))}
        return {"class_names": list(self.class_names), "image_shape": list(self.image_shape), "images": images}

    def held_out(self, n: int) -> DataSet:
        """The last n training images as the test images, seen as test images are, and no longer trained on.

        Raises:
            DataError: none would be left to train on.
        """
        left = len(self.train) - n
        if left < 1:
            raise DataError(f"val_size {n} leaves none of {self.name}'s {len(self.train)} training images")
        val = replace(self.train._part(slice(left, None)), transform=self.test.transform)
        return replace(self, train=self.train.first(left), test=val)


def other_class(held: Sequence[str], got: Sequence[str]) -> str:
    """The first class whose name is another one: "class 0 is 'a', got 'b'"; "" where none is."""
    for i, (a, b) in enumerate(itertools.zip_longest(held, got)):
        if a != b:
            return f"class {i} is {a!r}, got {b!r}"  # None: there are fewer
    return ""


def seeded(*numbers: int) -> torch.Generator:
    """A generator that follows from these numbers, which are >= 0, in their order."""
    # torch's generator on the CPU takes 32 bits of a seed; SeedSequence mixes all numbers into them.
    return torch.Generator().manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))


def batches(
    split: Split,
    batch_size: int,
    seed: int | None = None,
    epoch: int = 0,
    numbers: range | None = None,
    workers: int = 0,
    pin_memory: bool = False,
    balanced: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of a split, ``(images, labels)`` as :meth:`Split.batch` gives them; only the last may be smaller.

    Args:
        seed, epoch: what the order and the random transforms follow from; in order for a seed of None.
        numbers: which batches; all of them for None.
        workers: processes that prepare batches; with 0 this one does.
        pin_memory: see :class:`torch.utils.data.DataLoader`.
        balanced: draw as many images as the split has, with replacement, each group as likely as any other.

    Raises:
        DataError: a file is damaged; it is named.
    """
    if seed is None:
        order = torch.arange(len(split))
    elif balanced:
        assert split.groups is not None
        weights = 1 / torch.bincount(split.groups).double()
        order = torch.multinomial(weights[split.groups], len(split), replacement=True, generator=seeded(seed, epoch))
    else:
        order = torch.randperm(len(split), generator=seeded(seed, epoch))
    parts = order.split(batch_size)
    keys = [(parts[i], (seed or 0, epoch, i + 1)) for i in (range(len(parts)) if numbers is None else numbers)]
    loader: DataLoader[tuple[Tensor, Tensor]] = DataLoader(
        split,  # type: ignore[arg-type]  # a data set by its methods
        batch_size=None,
        sampler=keys,
        num_workers=workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # or it would draw from the global one, which random classes come from
    )
    try:
        yield from loader
    except DataError as error:  # a worker sends its traceback along
        raise DataError(str(error).rstrip().rpartition(f"{DataError.__module__}.DataError: ")[2]) from error


@dataclass(frozen=True)
class CropAndFlip:
    """Random crop after padding, and horizontal flip where ``flip``, drawn for each image: the usual augmentation.

    The padding is an eighth of the side: CIFAR's 4 of 32.
    """

    flip: bool = True

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        # All images at once: torchvision's transforms, one call for each image, took ten times as long.
        count, _, height, width = images.shape
        padding = max(height, width) // 8
        top, left = torch.randint(2 * padding + 1, (2, count), generator=generator)
        crops = F.pad(images, (padding,) * 4).unfold(2, height, 1).unfold(3, width, 1)  # a view, by corner
        images = crops[torch.arange(count), :, top, left]
        if not self.flip:
            return images
        flipped = torch.rand(count, generator=generator) < 0.5
        return torch.where(flipped[:, None, None, None], images.flip(3), images)
