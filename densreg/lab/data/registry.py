"""The registry of data sets: what is known of each, and :func:`load`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from densreg.lab import runs
from densreg.lab.data.images import DataError
from densreg.lab.data.splits import CropAndFlip, DataSet, Transform


@dataclass(frozen=True)
class Recipe:
    """Training defaults: the paper's where it gives them (lr, epochs, milestones), else the field's usual ones."""

    epochs: int
    optimizer: str
    lr: float
    batch_size: int
    weight_decay: float = 0.0
    schedule: str = "constant"
    milestones: tuple[float, ...] = ()


CIFAR_RECIPE = Recipe(
    epochs=200,
    optimizer="sgd",
    lr=0.01,
    batch_size=128,
    weight_decay=5e-4,
    schedule="step",
    milestones=(0.5, 0.875),  # 100 and 175 of 200
)


@dataclass(frozen=True)
class Request:
    """The arguments of :func:`load`."""

    name: str
    data_dir: Path | None
    download: bool
    augment: bool
    classes: int | None
    image_size: int | None

    def folder(self) -> Path:
        """The data directory, which is there unless it may be downloaded to."""
        if self.data_dir is None:
            raise DataError(f"--data {self.name} needs --data-dir: the folder with (or for, with --download) its files")
        try:
            if not self.data_dir.is_dir() and not self.download:
                raise DataError(f"--data-dir {self.data_dir} is not a folder")
        except OSError as error:
            raise DataError(f"--data-dir {self.data_dir} cannot be read: {error.strerror}") from error
        return self.data_dir

    def local_folder(self, contents: str) -> Path:
        """The data directory of a data set that cannot be downloaded."""
        folder = self.folder()
        if self.download:
            raise DataError(f"--data {self.name} cannot be downloaded; give the folder that contains {contents}")
        return folder

    def transform(self, flip: bool = True) -> Transform | None:
        """The usual augmentation of training images; None with --no-augment."""
        return CropAndFlip(flip) if self.augment else None


@dataclass(frozen=True)
class Entry:
    """What is registered of a data set.

    Attributes:
        read: gives the data set; DataError in one line for files that are absent or damaged.
        recipe: training defaults.
        classes, image_size: whether it takes --classes and --image-size.
        groups: names of the groups, where it has some; group ``2 y + a`` is class y with attribute a.
        model: what ``densreg stability`` trains on it.
    """

    read: Callable[[Request], DataSet]
    recipe: Recipe
    classes: bool = False
    image_size: bool = False
    groups: tuple[str, ...] = ()
    model: str = "resnet18"


DATA_SETS: dict[str, Entry] = {}


def taking(option: str) -> str:
    """The data sets that take an option, ``classes`` or ``image_size``, in one line."""
    return ", ".join(name for name, its in DATA_SETS.items() if getattr(its, option))


def register(
    name: str, recipe: Recipe, **known: Any
) -> Callable[[Callable[[Request], DataSet]], Callable[[Request], DataSet]]:
    """Register the decorated function as the reader of a data set; the arguments are those of :class:`Entry`."""

    def add(read: Callable[[Request], DataSet]) -> Callable[[Request], DataSet]:
        DATA_SETS[name] = Entry(read, recipe, **known)
        return read

    return add


def entry(name: str) -> Entry:
    """The entry of a data set; raises DataError if there is none of that name."""
    if name not in DATA_SETS:
        raise DataError(runs.unknown("data set", name, DATA_SETS))
    return DATA_SETS[name]


def load(
    name: str,
    data_dir: str | Path | None = None,
    download: bool = False,
    augment: bool = True,
    classes: int | None = None,
    image_size: int | None = None,
) -> DataSet:
    """A data set by name; see the table in docs/training.md.

    Images in files are read batch by batch. Those of folder and tiny-imagenet come in turn from each class, those of
    waterbirds and celeba-hair in a fixed random order, so that the first N are of all classes and groups.

    Args:
        data_dir: the folder that torchvision would download into; for tiny-imagenet the one that contains
            tiny-imagenet-200, for folder the one that contains train/, for waterbirds and celeba-hair the one that
            contains metadata.csv or list_attr_celeba.txt.
        download: let torchvision download what is absent.
        augment: whether training images are cropped and flipped.
        classes: of synthetic; 10 for None.
        image_size: side of the images of synthetic (32 for None), waterbirds and celeba-hair (224 for None), and folder
            (None: as they are, all of one size); images in files are scaled, and cropped in the middle.

    Raises:
        DataError: unknown name, or files that are absent or damaged, in one line that names them.
    """
    known = entry(name)
    for option, value, takes in (("classes", classes, "classes"), ("image-size", image_size, "image_size")):
        if value is not None and not getattr(known, takes):
            raise DataError(f"--{option} is for --data {taking(takes)}; {name} has its own")
    request = Request(name, None if data_dir is None else Path(data_dir), download, augment, classes, image_size)
    return replace(known.read(request), groups=known.groups)
