"""Image data sets, and loaders that give whole batches.

Images are 0 to 255 and become float32 in [0, 1] in a batch; normalisation is the model's, so that the score and its
norm are taken in pixels. What is random in a batch follows from (seed, epoch, number of the batch) alone: a run that is
resumed in the middle of an epoch skips to its batch, and workers change nothing.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from densreg.lab import runs
from densreg.lab.runs import first_line

CONTENTS = 1000
"""Of so many files of a split the content is in a run's digest: enough to tell that the images were replaced."""

Transform = Callable[[Tensor, torch.Generator], Tensor]


class DataError(ValueError):
    """The data set is unknown, absent or not what it should be; the message is one line for the user."""


class Files:
    """Image files, read when a batch wants them; indexed like a tensor [N, 3, H, W] in 0 to 255, of :func:`read_image`.

    Args:
        size: (H, W). A file of another size is an error, or scaled and cropped in the middle where ``fit`` is set.
    """

    def __init__(self, paths: Sequence[Path], size: tuple[int, int], fit: bool = False) -> None:
        self.paths, self.size, self.fit = paths, size, fit

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: Tensor | slice) -> Any:
        if isinstance(index, slice):
            return Files(self.paths[index], self.size, self.fit)
        return torch.stack([self._read(self.paths[i]) for i in index.tolist()])

    def digest(self, contents: int | None = None) -> str:
        """16 hexadecimal digits that tell other files: of all names below their common folder, and of all sizes.

        Args:
            contents: and of the content of at most so many, evenly spread; of all of them for None.

        Raises:
            DataError: a file is absent or cannot be read.
        """
        names, found = [str(path) for path in self.paths], hashlib.sha256(f"{self.size}{self.fit}".encode())
        root = len(os.path.commonpath({str(path.parent) for path in self.paths}))
        every = 1 if contents is None else -(-len(names) // contents)
        for i, name in enumerate(names):
            try:
                found.update(f"{name[root:].lstrip(os.sep)} {Path(name).stat().st_size}\n".encode())
                if i % every == 0:
                    found.update(Path(name).read_bytes())
            except OSError as error:
                raise DataError(f"cannot read the image {name}: {error.strerror}") from error
        return found.hexdigest()[:16]

    def _read(self, path: Path) -> Tensor:
        image = read_image(path)
        if self.fit:
            from torchvision.transforms.v2 import functional

            h, w = image.shape[1:]
            scale = max(self.size[0] / h, self.size[1] / w)
            image = functional.resize(image, [round(h * scale), round(w * scale)], antialias=True)
            image = functional.center_crop(image, list(self.size))
        if tuple(image.shape[1:]) != self.size:
            given, wanted = ("x".join(map(str, size)) for size in (image.shape[1:], self.size))
            raise DataError(f"{path} is {given} pixels; wanted {wanted} as the others (--data folder: or --image-size)")
        return image


def read_image(path: Path) -> Tensor:
    """An image file as [3, H, W] in 0 to 255: uint8, or float32 where it is grey with more than 8 bits.

    It is turned as its EXIF orientation says, and what is transparent lies on white. 16 bits are scaled by their full
    range, so that 65535 is white, and floats are taken to be in [0, 1]. Pillow's reading holds for the rest: the first
    of several pages, the upper 8 bits of 16-bit colour, colour profiles are not applied.

    Raises:
        DataError: the file is absent, damaged or no image, or which of its values is white is not known.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            file.filename = ""  # or Pillow maps the file into memory, with height and width exchanged where a TIFF lies
            ImageOps.exif_transpose(file, in_place=True)
            if getattr(file, "tag_v2", {}).get(_SAMPLE_FORMAT, (1,))[0] == 2:
                raise ValueError(f"it holds signed integers; {_EXPECTED}")
            if file.mode.startswith(("I", "F")):
                return torch.from_numpy(_deep_grey(file)).expand(3, -1, -1)
            image: Image.Image = file
            if file.has_transparency_data:
                image = Image.new("RGB", file.size, "white")
                colours = (file.convert("LA") if file.mode == "La" else file).convert("RGBA")
                image.paste(colours, mask=colours)
            image = image if image.mode == "RGB" else image.convert("RGB")
            return torch.from_numpy(np.array(image)).permute(2, 0, 1)
    except Exception as error:  # Pillow raises all sorts for damaged files
        raise DataError(f"cannot read the image {path}: {first_line(error)}") from error


_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # tags of a TIFF
_EXPECTED = "expected 8 or 16 bits without a sign, or floats in [0, 1]"


def _deep_grey(file: Any) -> np.ndarray:
    """A Pillow image of one channel of more than 8 bits as [H, W] float32 in 0 to 255; raises ValueError."""
    tags, values = getattr(file, "tag_v2", {}), np.asarray(file).astype(np.float64)
    if file.mode == "F":
        white, low, high = 1, values.min(), values.max()
        if not (low >= 0 and high <= 1):  # nor NaN
            raise ValueError(f"it holds floats from {low:g} to {high:g}; {_EXPECTED}")
    elif file.mode.startswith("I;16") or file.format in ("PNG", "PPM"):  # which some Pillows read to 32 bits
        white = 2 ** tags.get(_BITS, (16,))[0] - 1
    else:
        raise ValueError(f"it holds integers of 32 bits; {_EXPECTED}")
    if tags.get(_PHOTOMETRIC) == 0:  # white is 0, which Pillow minds with 8 bits only
        values = white - values
    if "transparency" in file.info:
        values[values == file.info["transparency"]] = white
    return (values * (255 / white)).astype(np.float32)


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

    def digest(self, contents: int | None = None) -> str:
        """16 hexadecimal digits that tell other images, labels or groups; ``contents``: see :meth:`Files.digest`."""
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
        """The groups [N]; raises DataError unless there are some, and each of the count has an image."""
        if self.groups is None:
            raise DataError(f"{what} needs a data set with groups: {', '.join(_GROUPED)}")
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
        note: what a user must know of it: that it is a subset, for one.
        groups: names of the groups, where it has some: what is classified, and what goes along with it.
        class_names: of the classes in their order, where it is the files that say them.
    """

    name: str
    train: Split
    test: Split
    classes: int
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    note: str = ""
    groups: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(channels, H, W) of what the model sees."""
        images, _ = self.test.batch(torch.arange(1), torch.Generator())
        return tuple(images.shape[1:])

    def describe(self) -> dict[str, Any]:
        """What tells this data set from another of its name, as JSON can hold it: it is written into a run."""
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


def other_class(held: Sequence[str] | None, got: Sequence[str]) -> str:
    """The first class whose name is another one: "class 0 is 'a', got 'b'"; "" where none is, or none is known."""
    for i, (a, b) in enumerate(itertools.zip_longest(held or got, got)):
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
        raise DataError(str(error).rstrip().rpartition("densreg.lab.data.DataError: ")[2]) from error


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


def null_tiles(images: Tensor) -> Tensor:
    """Where the null tile is in images of BlockMNIST [n, 1, 56, 28]: a mask of that shape, a half of each image.

    Raises:
        DataError: an image has no null tile.
    """
    if images.shape[1:] != (1, 56, 28):
        given = "x".join(map(str, images.shape[1:]))
        raise DataError(f"BlockMNIST's images are 1x56x28, a digit and the null tile; got {given}")
    tiles = images.reshape(-1, 2, 28, 28)  # no digit has this outline, so that the tile is where its pixels are
    found = (tiles == null_tile().to(images)).flatten(2).all(2)
    if not (found.sum(1) == 1).all():
        raise DataError("an image has no null tile, or two; wanted images of BlockMNIST, in [0, 1]")
    return found.view(-1, 2, 1, 1).expand_as(tiles).reshape(images.shape)


def _random_null(images: Tensor, generator: torch.Generator) -> Tensor:
    return stack_null(images, torch.rand(len(images), generator=generator) < 0.5)


def _null_below(images: Tensor, generator: torch.Generator) -> Tensor:
    return stack_null(images, torch.ones(len(images), dtype=torch.bool))


# --------------------------------------------------------------------------------------------------------------------
# augmentation


@dataclass(frozen=True)
class CropAndFlip:
    """Random crop after padding, and horizontal flip where ``flip``, drawn for each image: the usual augmentation.

    The padding is an eighth of the side: CIFAR's 4 of 32.
    """

    flip: bool = True

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        from torchvision.transforms import v2

        size = list(images.shape[-2:])
        steps = [v2.RandomCrop(size, padding=max(size) // 8), *([v2.RandomHorizontalFlip()] if self.flip else [])]
        transform = v2.Compose(steps)
        # torchvision draws from the global generator; a batch must not depend on what else draws from it.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(torch.randint(2**63 - 1, (), generator=generator)))
            return torch.stack([transform(image) for image in images])


# --------------------------------------------------------------------------------------------------------------------
# the data sets


@dataclass(frozen=True)
class _Request:
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

    def transform(self, flip: bool = True) -> Transform | None:
        return CropAndFlip(flip) if self.augment else None


def _check(
    images: Any, labels: Any, shape: tuple[int, ...], classes: int, images_file: Path, labels_file: Path
) -> Split:
    """A split in memory; raises DataError, naming the file, unless number, shapes and labels are right."""
    images, labels = torch.as_tensor(images), torch.as_tensor(labels).long()
    if len(images) == 0:
        raise DataError(f"{images_file} holds no images")
    if tuple(images.shape[1:]) != shape:
        raise DataError(f"{images_file} holds images of shape {list(images.shape[1:])}; wanted {list(shape)}")
    if labels.shape != images.shape[:1]:
        raise DataError(f"{labels_file} holds {len(labels)} labels; wanted {len(images)}, one for each image")
    wrong = labels[(labels < 0) | (labels >= classes)]
    if len(wrong):
        raise DataError(f"{labels_file} holds the label {wrong[0]}; wanted 0 to {classes - 1}")
    return Split(images, labels)


def _digits(request: _Request) -> DataSet:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = torch.from_numpy(digits.images * (255 / 16)).round().to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(digits.target).long()
    train, test = train_test_split(range(len(labels)), test_size=0.2, random_state=0, stratify=digits.target)
    return DataSet("digits", Split(images[train], labels[train]), Split(images[test], labels[test]), 10)


def _read(kind: str, file: Path, read: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """What a reader gives; raises DataError, naming the file, for whatever it raises."""
    try:
        return read(*args, **options)
    except Exception as error:  # readers and pickle raise all sorts for files that are absent or damaged
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else first_line(error)
        raise DataError(f"no usable {kind} in {file} ({reason}); give its folder, or add --download") from error


def _mnist_splits(request: _Request) -> tuple[Split, Split]:
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
        splits.append(_check(images.unsqueeze(1), labels, (1, 28, 28), 10, images_file, labels_file))
    return splits[0], splits[1]


def _mnist(request: _Request) -> DataSet:
    return DataSet("mnist", *_mnist_splits(request), classes=10)


def _blockmnist(request: _Request) -> DataSet:
    train, test = _mnist_splits(request)
    return DataSet(
        "blockmnist", replace(train, transform=_random_null), replace(test, transform=_null_below), classes=10
    )


def _checksums(kind: str, folder: Path, files: Sequence[Sequence[str]]) -> None:
    """Raise DataError unless each file, given as (name, md5), is the published one."""
    from torchvision.datasets.utils import check_integrity

    for name, md5 in files:
        file = folder / name
        if not check_integrity(file, md5):
            reason = "its checksum is not the published one" if file.exists() else "there is no such file"
            raise DataError(f"no usable {kind} in {file} ({reason}); give its folder, or add --download")


def _cifar(request: _Request, kind: str, classes: int, mean: tuple[float, ...], std: tuple[float, ...]) -> DataSet:
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
        splits.append(_check(images, loaded.targets, (3, 32, 32), classes, folder, folder))
    train_split = replace(splits[0], transform=request.transform())
    return DataSet(request.name, train_split, splits[1], classes, mean, std)


def _cifar10(request: _Request) -> DataSet:
    return _cifar(request, "CIFAR10", 10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))


def _cifar100(request: _Request) -> DataSet:
    return _cifar(request, "CIFAR100", 100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))


def _svhn(request: _Request) -> DataSet:
    from torchvision import datasets

    root, splits = request.folder(), []
    for name in ("train", "test"):
        _, file, md5 = datasets.SVHN.split_list[name]
        if request.download:
            _read("SVHN", root / file, datasets.SVHN, root, name, download=True)
        _checksums("SVHN", root, [(file, md5)])
        loaded = _read("SVHN", root / file, datasets.SVHN, root, name)
        images = torch.from_numpy(np.ascontiguousarray(loaded.data))
        splits.append(_check(images, loaded.labels, (3, 32, 32), 10, root / file, root / file))
    train = replace(splits[0], transform=request.transform(flip=False))  # a mirrored digit is another one, or none
    return DataSet("svhn", train, splits[1], 10, (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970))


def _by_turns(files: dict[int, list[Path]]) -> tuple[list[Path], Tensor]:
    """Files of classes in turn, the first of each class, then the second, so that the first N are of all classes."""
    turns = sorted((turn, label) for label, paths in files.items() for turn in range(len(paths)))
    return [files[label][turn] for turn, label in turns], torch.tensor([label for _, label in turns])


def _image_files(folder: Path) -> list[Path]:
    """The image files below a folder, in the order of their names.

    Raises:
        DataError: there are none.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS

    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; wanted a folder with the images of a class")
    files = sorted(file for file in _files(folder, folder.resolve().parents) if file.suffix.lower() in IMG_EXTENSIONS)
    if not files:
        raise DataError(f"{folder} holds no images ({', '.join(IMG_EXTENSIONS)})")
    return files


def _files(folder: Path, above: Sequence[Path]) -> Iterator[Path]:
    """The files below a folder, in linked folders too; hidden ones are left out."""
    here = folder.resolve()
    if here in above:
        raise DataError(f"{folder} is a link to a folder that it lies in, {here}; remove the link")
    for entry in _visible(folder):
        if entry.is_dir():
            yield from _files(folder / entry.name, [*above, here])
        else:
            yield folder / entry.name


def _visible(folder: Path) -> list[os.DirEntry[str]]:
    """What a folder holds but for what systems and editors put there; raises DataError for a link to nothing."""
    try:
        with os.scandir(folder) as found:
            entries = [entry for entry in found if not entry.name.startswith(".") and entry.name not in _NOT_DATA]
    except OSError as error:
        raise DataError(f"cannot read the folder {folder}: {error.strerror}") from error
    for entry in entries:
        if entry.is_symlink() and not Path(entry).exists():
            raise DataError(f"{entry.path} is a link to {Path(entry).readlink()}, which is not there")
    return entries


_NOT_DATA = ("__MACOSX", "@eaDir", "@Recycle", "#recycle", "$RECYCLE.BIN")


def _classes(folder: Path) -> list[str]:
    """The names of a folder's folders."""
    return sorted(entry.name for entry in _visible(folder) if entry.is_dir())


_TINY_CLASSES, _TINY_TRAIN, _TINY_VAL = 200, 100_000, 10_000


def _tiny_imagenet(request: _Request) -> DataSet:
    root = request.folder()
    if request.download:
        raise DataError("--data tiny-imagenet cannot be downloaded; give the folder with tiny-imagenet-200 in it")
    root = root / "tiny-imagenet-200"
    try:
        names = (root / "wnids.txt").read_text().split()
        annotations = (root / "val" / "val_annotations.txt").read_text().splitlines()
    except (OSError, UnicodeError) as error:
        where = getattr(error, "filename", None) or root
        raise DataError(f"no usable Tiny ImageNet in {root} ({where}: {first_line(error)})") from error
    label_of = {name: label for label, name in enumerate(names)}
    train, train_labels = _by_turns({i: _image_files(root / "train" / name / "images") for name, i in label_of.items()})
    val: dict[int, list[Path]] = {}
    for number, line in enumerate(annotations, 1):
        columns = line.split("\t")
        if len(columns) < 2 or columns[1] not in label_of:
            raise DataError(
                f"{root / 'val' / 'val_annotations.txt'}, line {number}: {line[:80]!r}; "
                "wanted a file name, a tab and a class of wnids.txt"
            )
        val.setdefault(label_of[columns[1]], []).append(root / "val" / "images" / columns[0])
    if not val:
        raise DataError(f"{root / 'val' / 'val_annotations.txt'} is empty; wanted a line for each image")
    test, test_labels = _by_turns(val)
    counts = ((len(names), _TINY_CLASSES), (len(train), _TINY_TRAIN), (len(test), _TINY_VAL))
    note = "a subset of Tiny ImageNet: {} of {} classes, {} of {} training images, {} of {} validation images"
    return DataSet(
        "tiny-imagenet",
        Split(Files(train, (64, 64)), train_labels, request.transform()),
        Split(Files(test, (64, 64)), test_labels),
        len(names),
        (0.4802, 0.4481, 0.3975),
        (0.2770, 0.2691, 0.2821),
        "" if all(a == b for a, b in counts) else note.format(*(n for pair in counts for n in pair)),
        class_names=tuple(names),
    )


def _folder(request: _Request) -> DataSet:
    root = request.folder()
    if request.download:
        raise DataError("--data folder cannot be downloaded; give a folder with train/ and val/ or test/ in it")
    held_out = next((root / name for name in ("val", "test") if (root / name).is_dir()), None)
    if held_out is None or not (root / "train").is_dir():
        raise DataError(f"{root} has no folders train and val (or test); wanted both, with a folder for each class")
    names = _classes(root / "train")
    if not names:
        raise DataError(f"{root / 'train'} is empty; wanted a folder for each class")
    label_of = {name: label for label, name in enumerate(names)}
    held_out_names = _classes(held_out)
    unknown = [name for name in held_out_names if name not in label_of]
    if unknown or not held_out_names:
        what = f"the class {unknown[0]!r}, which {root / 'train'} lacks" if unknown else "no classes"
        raise DataError(f"{held_out} has {what}; wanted folders named as those of the training images")
    train, train_labels = _by_turns({label_of[name]: _image_files(root / "train" / name) for name in names})
    test, test_labels = _by_turns({label_of[name]: _image_files(held_out / name) for name in held_out_names})
    fit = request.image_size is not None
    height, width = read_image(train[0]).shape[1:]
    size = (request.image_size, request.image_size) if request.image_size else (height, width)
    return DataSet(
        "folder",
        Split(Files(train, size, fit), train_labels, request.transform()),
        Split(Files(test, size, fit), test_labels),
        len(names),
        (0.485, 0.456, 0.406),  # ImageNet's
        (0.229, 0.224, 0.225),
        class_names=tuple(names),
    )


def _synthetic(request: _Request) -> DataSet:
    """Noise with random labels, 1024 and 256 images."""
    classes, side = request.classes or 10, request.image_size or 32
    generator = torch.Generator().manual_seed(0)

    def noise(n: int) -> Split:
        try:
            images = torch.randint(256, (n, 3, side, side), dtype=torch.uint8, generator=generator)
        except (RuntimeError, MemoryError) as error:
            raise DataError(f"--data synthetic: no memory for {n} images of {side}x{side} pixels") from error
        return Split(images, torch.randint(classes, (n,), generator=generator))

    return DataSet("synthetic", noise(1024), noise(256), classes)


# --------------------------------------------------------------------------------------------------------------------
# data sets with groups: group 2 y + a of class y and attribute a, which goes along with the class in training


_GROUPED = ("spurious-mnist", "waterbirds", "celeba-hair")

_AGREE = 0.95
"""Part of spurious-mnist's training images whose background agrees with the class; of Waterbirds it is the same."""


def _spurious_mnist(request: _Request) -> DataSet:
    splits = []
    for number, (split, agree) in enumerate(zip(_mnist_splits(request), (_AGREE, 0.5), strict=True)):
        assert isinstance(split.images, Tensor)
        y = (split.labels >= 5).long()
        differs = torch.rand(len(y), generator=seeded(0, number)) >= agree
        a = torch.where(differs, 1 - y, y)
        background = torch.tensor([[128, 0, 0], [0, 128, 0]], dtype=torch.uint8)[a].view(-1, 3, 1, 1)
        splits.append(Split(torch.maximum(split.images, background), y, groups=2 * y + a))
    names = ("0-4 on red", "0-4 on green", "5-9 on red", "5-9 on green")
    return DataSet("spurious-mnist", splits[0], splits[1], classes=2, groups=names)


def _grouped(
    request: _Request, folder: Path, table: Path, rows: Sequence[tuple[str, int, int, int]], names: tuple[str, ...]
) -> DataSet:
    """A data set of image files from rows of (file, class, attribute, split); split 0 is for training, 2 for test."""
    side, splits = request.image_size or 224, []
    for number, kind in ((0, "training"), (2, "test")):
        part = [row for row in rows if row[3] == number]
        if not part:
            raise DataError(f"{table} lists no {kind} images (split {number})")
        # Shuffled, as Waterbirds' are in the order of species: the first N and the last N are to be of all groups.
        part = [part[i] for i in torch.randperm(len(part), generator=seeded(0)).tolist()]
        files = [folder / row[0] for row in part]
        if not files[0].is_file():
            raise DataError(f"{table} lists {part[0][0]}, and there is no {files[0]}")
        y, a = torch.tensor([row[1] for row in part]), torch.tensor([row[2] for row in part])
        transform = request.transform() if number == 0 else None
        split = Split(Files(files, (side, side), fit=True), y, transform, 2 * y + a)
        split.check_groups(4, f"{table}, {kind} images")
        splits.append(split)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
    return DataSet(request.name, splits[0], splits[1], 2, mean, std, groups=names)


def _table(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except (OSError, UnicodeError) as error:
        raise DataError(f"cannot read {path}: {getattr(error, 'strerror', None) or first_line(error)}") from error


def _waterbirds(request: _Request) -> DataSet:
    root = request.folder()
    if request.download:
        raise DataError("--data waterbirds cannot be downloaded; give the folder with its metadata.csv")
    inside = [root / name for name in ("waterbird_complete95_forest2water2", "waterbirds_v1.0")]
    folder = next((f for f in inside if (f / "metadata.csv").is_file()), root)
    table, wanted = folder / "metadata.csv", ("img_filename", "y", "split", "place")
    reader = csv.DictReader(_table(table))
    missing = [name for name in wanted if name not in (reader.fieldnames or ())]
    if missing:
        raise DataError(f"{table} has no column {missing[0]}; wanted {', '.join(wanted)}")
    rows = []
    for number, row in enumerate(reader, 2):
        try:
            y, a, split = (int(row[name]) for name in ("y", "place", "split"))
        except (TypeError, ValueError):
            y = a = split = -1
        if y not in (0, 1) or a not in (0, 1) or split not in (0, 1, 2):
            raise DataError(f"{table}, line {number}: wanted y and place of 0 or 1, and a split of 0, 1 or 2")
        rows.append((row["img_filename"], y, a, split))
    names = ("landbird on land", "landbird on water", "waterbird on land", "waterbird on water")
    return _grouped(request, folder, table, rows, names)


def _celeba_hair(request: _Request) -> DataSet:
    root = request.folder()
    if request.download:
        raise DataError("--data celeba-hair cannot be downloaded; give the folder with list_attr_celeba.txt")
    folder = root / "celeba" if (root / "celeba" / "list_attr_celeba.txt").is_file() else root
    attributes, partition = folder / "list_attr_celeba.txt", folder / "list_eval_partition.txt"
    lines = _table(attributes)
    columns = lines[1].split() if len(lines) > 1 else []
    for name in ("Blond_Hair", "Male"):
        if name not in columns:
            raise DataError(f"{attributes} has no attribute {name} in its second line")
    blond, male = columns.index("Blond_Hair") + 1, columns.index("Male") + 1
    split_of = dict(line.split()[:2] for line in _table(partition) if len(line.split()) >= 2)
    rows = []
    for number, line in enumerate(lines[2:], 3):
        values = line.split()
        if len(values) != len(columns) + 1:
            raise DataError(f"{attributes}, line {number}: wanted a file name and {len(columns)} attributes")
        if split_of.get(values[0]) not in ("0", "1", "2"):
            raise DataError(f"{partition} has no split of 0, 1 or 2 for {values[0]}")
        rows.append((values[0], int(values[blond] == "1"), int(values[male] == "1"), int(split_of[values[0]])))
    names = ("not blond, female", "not blond, male", "blond, female", "blond, male")
    return _grouped(request, folder / "img_align_celeba", attributes, rows, names)


DATA_SETS: dict[str, Callable[[_Request], DataSet]] = {
    "digits": _digits,
    "mnist": _mnist,
    "blockmnist": _blockmnist,
    "cifar10": _cifar10,
    "cifar100": _cifar100,
    "svhn": _svhn,
    "tiny-imagenet": _tiny_imagenet,
    "folder": _folder,
    "spurious-mnist": _spurious_mnist,
    "waterbirds": _waterbirds,
    "celeba-hair": _celeba_hair,
    "synthetic": _synthetic,
}


def load(
    name: str,
    data_dir: str | Path | None = None,
    download: bool = False,
    augment: bool = True,
    classes: int | None = None,
    image_size: int | None = None,
) -> DataSet:
    """A data set by name.

    ============= ============================================================================= ======================
    name          what                                                                          training images are
    ============= ============================================================================= ======================
    digits        scikit-learn's, 8x8, needs no files
    mnist         MNIST
    blockmnist    MNIST digits stacked with a null tile, 56x28; below the digit in test         null above or below
    cifar10       CIFAR-10                                                                      cropped and flipped
    cifar100      CIFAR-100                                                                     cropped and flipped
    svhn          Street View House Numbers                                                     cropped
    tiny-imagenet Tiny ImageNet as published: train/, wnids.txt, val/val_annotations.txt        cropped and flipped
    folder        any: a folder for each class in train/, and in val/ or test/                  cropped and flipped
    spurious-mnist MNIST, 5 and more or less, on red or green; in test half on either; 4 groups 95% on their class's
    waterbirds    as published, or by WILDS: metadata.csv and images; 4 groups                  cropped and flipped
    celeba-hair   CelebA as published, blond or not, and male or not; 4 groups                  cropped and flipped
    synthetic     noise with random labels, any number of classes and image size: for timing
    ============= ============================================================================= ======================

    The images of folder, tiny-imagenet, waterbirds and celeba-hair are read from their files batch by batch; of the
    first two classes by turns, of the others in a random order that is always the same, without the validation images.

    Args:
        data_dir: the folder that torchvision would download into; for tiny-imagenet the one that holds
            tiny-imagenet-200, for folder the one that holds train/, for waterbirds and celeba-hair the one that holds
            metadata.csv or list_attr_celeba.txt.
        download: let torchvision download what is absent.
        augment: whether training images are cropped and flipped.
        classes: of synthetic; 10 for None.
        image_size: side of the images of synthetic (32 for None), waterbirds and celeba-hair (224 for None), and folder
            (None: as they are, all of one size); images in files are scaled, and cropped in the middle.

    Raises:
        DataError: unknown name, or files that are absent or damaged: named in one line.
    """
    if name not in DATA_SETS:
        near = runs.did_you_mean(name, DATA_SETS)
        raise DataError(f"unknown data set {name!r}; wanted one of {', '.join(DATA_SETS)}{near}")
    for option, value, users in (("classes", classes, ("synthetic",)), ("image-size", image_size, _SIZED)):
        if value is not None and name not in users:
            raise DataError(f"--{option} is for --data {', '.join(users)}; {name} has its own")
    request = _Request(name, None if data_dir is None else Path(data_dir), download, augment, classes, image_size)
    return DATA_SETS[name](request)


_SIZED = ("synthetic", "folder", "waterbirds", "celeba-hair")
