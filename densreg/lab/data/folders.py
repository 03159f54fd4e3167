"""Data sets of image files: Tiny ImageNet, folders of classes, and two with groups, Waterbirds and CelebA-Hair."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from densreg.lab.data.images import DataError, Files, read_image
from densreg.lab.data.registry import CIFAR_RECIPE, Recipe, Request, register
from densreg.lab.data.splits import DataSet, Split, seeded
from densreg.lab.runs import first_line

_GROUPS_RECIPE = Recipe(epochs=300, optimizer="sgd", lr=1e-4, batch_size=128, weight_decay=1e-4)

_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation of ImageNet's pixels."""


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
        raise DataError(f"{folder} is not a folder; expected a folder with the images of a class")
    files = sorted(file for file in _files(folder) if file.suffix.lower() in IMG_EXTENSIONS)
    if not files:
        raise DataError(f"{folder} holds no images ({', '.join(IMG_EXTENSIONS)})")
    return files


def _files(folder: Path, above: Sequence[Path] = ()) -> Iterator[Path]:
    """The files below a folder, in linked folders too; hidden ones are left out."""
    here = folder.resolve()
    above = above or here.parents
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


@register("tiny-imagenet", CIFAR_RECIPE)
def tiny_imagenet(request: Request) -> DataSet:
    """Tiny ImageNet as published: train/, wnids.txt, val/val_annotations.txt."""
    root = request.local_folder("tiny-imagenet-200")
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
                "expected a file name, a tab and a class of wnids.txt"
            )
        val.setdefault(label_of[columns[1]], []).append(root / "val" / "images" / columns[0])
    if not val:
        raise DataError(f"{root / 'val' / 'val_annotations.txt'} is empty; expected a line for each image")
    test, test_labels = _by_turns(val)
    counts = ((len(names), _TINY_CLASSES), (len(train), _TINY_TRAIN), (len(test), _TINY_VAL))
    note = "a subset of Tiny ImageNet: {} of {} classes, {} of {} training images, {} of {} validation images"
    return DataSet(
        request.name,
        Split(Files(train, (64, 64)), train_labels, request.transform()),
        Split(Files(test, (64, 64)), test_labels),
        len(names),
        (0.4802, 0.4481, 0.3975),
        (0.2770, 0.2691, 0.2821),
        "" if all(a == b for a, b in counts) else note.format(*(n for pair in counts for n in pair)),
        class_names=tuple(names),
    )


@register("folder", CIFAR_RECIPE, image_size=True)
def folder(request: Request) -> DataSet:
    """Any images: a folder for each class in train/, and in val/ or test/."""
    root = request.local_folder("train/ and val/ or test/")
    held_out = next((root / name for name in ("val", "test") if (root / name).is_dir()), None)
    if held_out is None or not (root / "train").is_dir():
        raise DataError(f"{root} has no folders train and val (or test); expected both, with a folder for each class")
    names = _classes(root / "train")
    if not names:
        raise DataError(f"{root / 'train'} is empty; expected a folder for each class")
    label_of = {name: label for label, name in enumerate(names)}
    held_out_names = _classes(held_out)
    unknown = [name for name in held_out_names if name not in label_of]
    if unknown or not held_out_names:
        what = f"the class {unknown[0]!r}, which {root / 'train'} lacks" if unknown else "no classes"
        raise DataError(f"{held_out} has {what}; expected folders named as those of the training images")
    train, train_labels = _by_turns({label_of[name]: _image_files(root / "train" / name) for name in names})
    test, test_labels = _by_turns({label_of[name]: _image_files(held_out / name) for name in held_out_names})
    fit = request.image_size is not None
    height, width = read_image(train[0]).shape[1:]
    size = (request.image_size, request.image_size) if request.image_size else (height, width)
    return DataSet(
        request.name,
        Split(Files(train, size, fit), train_labels, request.transform()),
        Split(Files(test, size, fit), test_labels),
        len(names),
        *_IMAGENET,
        class_names=tuple(names),
    )


def _grouped(request: Request, folder: Path, table: Path, rows: Sequence[tuple[str, int, int, int]]) -> DataSet:
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
    return DataSet(request.name, splits[0], splits[1], 2, *_IMAGENET)


def _table(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except (OSError, UnicodeError) as error:
        raise DataError(f"cannot read {path}: {getattr(error, 'strerror', None) or first_line(error)}") from error


@register(
    "waterbirds",
    _GROUPS_RECIPE,
    image_size=True,
    groups=("landbird on land", "landbird on water", "waterbird on land", "waterbird on water"),
)
def waterbirds(request: Request) -> DataSet:
    """Waterbirds as published, or as WILDS has it: metadata.csv and images."""
    root = request.local_folder("metadata.csv")
    inside = [root / name for name in ("waterbird_complete95_forest2water2", "waterbirds_v1.0")]
    folder = next((f for f in inside if (f / "metadata.csv").is_file()), root)
    table, columns = folder / "metadata.csv", ("img_filename", "y", "split", "place")
    reader = csv.DictReader(_table(table))
    missing = [name for name in columns if name not in (reader.fieldnames or ())]
    if missing:
        raise DataError(f"{table} has no column {missing[0]}; expected {', '.join(columns)}")
    rows = []
    for number, row in enumerate(reader, 2):
        try:
            y, a, split = (int(row[name]) for name in ("y", "place", "split"))
        except (TypeError, ValueError):
            y = a = split = -1
        if y not in (0, 1) or a not in (0, 1) or split not in (0, 1, 2):
            raise DataError(f"{table}, line {number}: expected y and place of 0 or 1, and a split of 0, 1 or 2")
        rows.append((row["img_filename"], y, a, split))
    return _grouped(request, folder, table, rows)


@register(
    "celeba-hair",
    replace(_GROUPS_RECIPE, epochs=50),
    image_size=True,
    groups=("not blond, female", "not blond, male", "blond, female", "blond, male"),
)
def celeba_hair(request: Request) -> DataSet:
    """CelebA as published, by hair, blond or not, and gender."""
    root = request.local_folder("list_attr_celeba.txt")
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
            raise DataError(f"{attributes}, line {number}: expected a file name and {len(columns)} attributes")
        if split_of.get(values[0]) not in ("0", "1", "2"):
            raise DataError(f"{partition} has no split of 0, 1 or 2 for {values[0]}")
        rows.append((values[0], int(values[blond] == "1"), int(values[male] == "1"), int(split_of[values[0]])))
    return _grouped(request, folder / "img_align_celeba", attributes, rows)
