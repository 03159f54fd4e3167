"""Data sets: shapes, ranges, determinism, BlockMNIST's tiles, and one line that names the file for what is wrong."""

from __future__ import annotations

import gzip
import os
import pickle
import re
import shutil
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from on_disk import write_cifar, write_cifar100, write_mnist
from PIL import Image

from densreg.lab import data


@pytest.fixture
def mnist_dir(tmp_path):
    """A folder as torchvision lays MNIST out, with 40 and 20 images that hold their own number."""
    parts = []
    for n in (40, 20):
        images = np.zeros((n, 28, 28), np.uint8)
        images[:, 14, 14] = np.arange(1, n + 1)
        parts.append((images, np.arange(n) % 10))
    for file in [*write_mnist(tmp_path, *parts).iterdir()]:
        Path(f"{file}.gz").write_bytes(gzip.compress(file.read_bytes()))
    return tmp_path


def test_digits():
    digits = data.load("digits")
    assert (len(digits.train), len(digits.test), digits.classes) == (1437, 360, 10)
    assert digits.image_shape == (1, 8, 8)
    x, y = digits.train.batch(torch.arange(1437), torch.Generator())
    assert x.dtype == torch.float32
    assert (x.min(), x.max()) == (0, 1)
    assert sorted(set(y.tolist())) == list(range(10))
    again = data.load("digits")
    assert torch.equal(again.test.labels, digits.test.labels)


def test_mnist(mnist_dir):
    mnist = data.load("mnist", mnist_dir)
    assert (len(mnist.train), len(mnist.test)) == (40, 20)
    x, y = mnist.test.batch(torch.tensor([3]), torch.Generator())
    assert x.shape == (1, 1, 28, 28)
    assert x[0, 0, 14, 14] == pytest.approx(4 / 255)
    assert y.tolist() == [3]


def test_null_tile():
    tile = data.null_tile()
    assert tile.shape == (28, 28)
    assert tile.sum() == 57
    box = tile[9:20, 9:20]
    assert box.sum() == 57
    assert torch.equal(box, box.t())
    assert torch.equal(box, box.flip(1))
    assert box[0].all()
    assert box[5].tolist() == [1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1]


def test_blockmnist(mnist_dir):
    blocks = data.load("blockmnist", mnist_dir)
    assert blocks.image_shape == (1, 56, 28)
    tile = data.null_tile()
    x, y = blocks.test.batch(torch.arange(20), torch.Generator())
    assert torch.equal(x[:, 0, 28:], tile.expand(20, 28, 28)), "in test the null tile is below"
    assert x[4, 0, 14, 14] == pytest.approx(5 / 255)
    assert y.tolist() == [i % 10 for i in range(20)]

    generator = torch.Generator().manual_seed(0)
    index = torch.zeros(400, dtype=torch.int64)
    x, _ = blocks.train.batch(index, generator)
    below = (x[:, 0, 28:] == tile).all(2).all(1)
    above = (x[:, 0, :28] == tile).all(2).all(1)
    assert torch.equal(below, ~above)
    assert 150 < below.sum() < 250, "in training it is above or below at random"
    pickle.loads(pickle.dumps(blocks.train))  # as workers that are not forked want it


@pytest.mark.parametrize("flip", [True, False])
def test_augmentation_draws_for_each_image_and_not_from_the_global_generator(flip):
    images = torch.zeros(512, 3, 32, 32)
    images[:, :, 16, 8] = 1
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one = data.CropAndFlip(flip)(images, torch.Generator().manual_seed(1))
    assert torch.equal(torch.get_rng_state(), before)
    same = data.CropAndFlip(flip)(images, torch.Generator().manual_seed(1))
    assert torch.equal(one, same)
    places = {tuple(image.nonzero()[0].tolist()) for image in one}
    assert len(places) > 30
    assert {column < 16 for _, _, column in places} == ({True, False} if flip else {True}), "flipped and not"
    assert {row for _, row, _ in places} == {*range(12, 21)}
    columns = {*range(4, 13)}
    assert {column for _, _, column in places} == (columns | {31 - column for column in columns} if flip else columns)
    upright = data.CropAndFlip(flip)(torch.arange(32.0).expand(9, 1, 24, 32), torch.Generator().manual_seed(1))
    steps = upright[:, 0, 12, 4:28].diff()  # where nothing is padded
    assert steps.abs().unique().tolist() == [1], "columns stay in order, or are all reversed"


def _numbered(n, transform=None):
    return data.Split(torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1), torch.arange(n), transform)


def test_batches():
    split = _numbered(10)
    in_order = [y.tolist() for _, y in data.batches(split, 4)]
    assert in_order == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    shuffled = [y.tolist() for _, y in data.batches(split, 4, seed=0, epoch=1)]
    assert sorted(i for part in shuffled for i in part) == list(range(10))
    assert shuffled != in_order
    assert shuffled == [y.tolist() for _, y in data.batches(split, 4, seed=0, epoch=1)]
    assert shuffled != [y.tolist() for _, y in data.batches(split, 4, seed=0, epoch=2)], "another epoch"
    assert shuffled != [y.tolist() for _, y in data.batches(split, 4, seed=1, epoch=1)], "another seed"
    x, y = next(data.batches(split, 4))
    assert torch.equal(x.flatten(), y / 255)
    assert len(split.first(3)) == 3
    assert split.first(None) is split


def _add_noise(images, generator):
    return images + torch.rand(images.shape, generator=generator)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_from_the_middle_and_from_workers_are_the_same(workers):
    split = _numbered(20, _add_noise)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    whole = list(data.batches(split, 4, seed=5, epoch=3))
    middle = list(data.batches(split, 4, seed=5, epoch=3, numbers=range(2, 5), workers=workers))
    assert len(whole) == 5
    assert len(middle) == 3
    for (x, y), (x2, y2) in zip(whole[2:], middle, strict=True):
        assert torch.equal(x, x2)
        assert torch.equal(y, y2)
    assert len({round(float((x - y.view(-1, 1, 1, 1) / 255)[0]), 6) for x, y in whole}) == 5, "noise of its own each"
    assert torch.equal(torch.get_rng_state(), before), "random classes come from the global generator"


def test_cifar100(tmp_path, unchecked):
    folder = tmp_path / "cifar-100-python"
    write_cifar100(tmp_path, 12, 6)
    cifar = data.load("cifar100", tmp_path)
    assert (len(cifar.train), len(cifar.test), cifar.classes) == (12, 6, 100)
    assert cifar.image_shape == (3, 32, 32)
    x, y = cifar.test.batch(torch.arange(6), torch.Generator())
    pixels = pickle.loads((folder / "test").read_bytes())["data"].reshape(6, 3, 32, 32)
    torch.testing.assert_close(x, torch.from_numpy(pixels).float() / 255)
    assert y.tolist() == list(range(6))
    plain = data.load("cifar100", tmp_path, augment=False).train
    x, _ = plain.batch(torch.arange(12), torch.Generator())
    assert torch.equal(x, plain.images / 255)
    x, _ = cifar.train.batch(torch.arange(12), torch.Generator())
    assert not torch.equal(x, plain.images / 255)

    labels = [0, 100, *range(10)]
    (folder / "train").write_bytes(pickle.dumps({"data": np.zeros((12, 3072), np.uint8), "fine_labels": labels}))
    with pytest.raises(data.DataError, match="cifar-100-python holds the label 100; expected 0 to 99"):
        data.load("cifar100", tmp_path)


def test_cifar10(tmp_path, unchecked):
    sizes = {**{f"data_batch_{i}": 12 for i in range(1, 6)}, "test_batch": 6}
    write_cifar(tmp_path / "cifar-10-batches-py", sizes, "labels", 10, "batches.meta", "label_names")
    cifar = data.load("cifar10", tmp_path)
    assert (len(cifar.train), len(cifar.test), cifar.classes) == (60, 6, 10)
    assert cifar.image_shape == (3, 32, 32)


def test_svhn(tmp_path, unchecked):
    from scipy.io import savemat

    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 11), dtype=np.uint8)
    for name in ("train", "test"):
        savemat(tmp_path / f"{name}_32x32.mat", {"X": pixels, "y": np.arange(11)[:, None] % 10 + 1})
    svhn = data.load("svhn", tmp_path)
    assert (len(svhn.train), svhn.classes, svhn.image_shape) == (11, 10, (3, 32, 32))
    assert svhn.test.labels.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1], "10 stands for 0"
    assert torch.equal(svhn.test.images[2], torch.from_numpy(pixels[..., 2]).permute(2, 0, 1))
    (tmp_path / "test_32x32.mat").write_bytes(b"MATLAB 5.0 MAT-file")
    with pytest.raises(data.DataError, match=r"no usable SVHN in .*test_32x32\.mat \("):
        data.load("svhn", tmp_path)


def _write_image(path, size=(64, 64), value=0, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size[::-1], (value,) * 3 if mode == "RGB" else value).save(path, format="PNG")


@pytest.fixture
def tiny_dir(tmp_path):
    """Tiny ImageNet as published, with three classes; PNGs named JPEG, so that pixels are exact."""
    root = tmp_path / "tiny-imagenet-200"
    names = ("n01", "n02", "n03")
    for i, name in enumerate(names):
        for j in range(i + 1):
            _write_image(root / "train" / name / "images" / f"{name}_{j}.JPEG", value=10 * i + j)
    lines = []
    for i, name in enumerate(reversed(names)):
        _write_image(root / "val" / "images" / f"val_{i}.JPEG", value=100 + i, mode="RGB" if i else "L")
        lines.append(f"val_{i}.JPEG\t{name}\t0\t0\t62\t62\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    (root / "wnids.txt").write_text("".join(f"{name}\n" for name in names))
    return tmp_path


def test_tiny_imagenet(tiny_dir):
    tiny = data.load("tiny-imagenet", tiny_dir, augment=False)
    assert tiny.note == (
        "a subset of Tiny ImageNet: 3 of 200 classes, 6 of 100000 training images, 3 of 10000 validation images"
    )
    assert (tiny.classes, tiny.image_shape) == (3, (3, 64, 64))
    x, y = tiny.train.batch(torch.arange(6), torch.Generator())
    assert y.tolist() == [0, 1, 2, 1, 2, 2], "classes in turn"
    assert (x[:, 0, 0, 0] * 255).round().tolist() == [0, 10, 20, 11, 21, 22]
    x, y = tiny.test.batch(torch.arange(3), torch.Generator())
    assert y.tolist() == [0, 1, 2]
    assert (x[:, 2, 5, 5] * 255).round().tolist() == [102, 101, 100], "the classes are those of val_annotations.txt"
    assert len(tiny.train.first(2)) == 2
    assert [y.tolist() for _, y in data.batches(tiny.train.first(4), 2, workers=1)] == [[0, 1], [2, 1]]


@pytest.mark.parametrize(
    ("damage", "message", "workers"),
    [
        (lambda file: file.write_bytes(b"no image"), "cannot identify image file", 0),
        (lambda file: file.write_bytes(file.read_bytes()[:120]), "truncated", 1),
        (lambda file: file.unlink(), "No such file", 0),
        (lambda file: file.write_bytes(b""), "cannot identify image file", 1),
    ],
)
def test_damaged_image_is_named(tiny_dir, damage, message, workers):
    file = tiny_dir / "tiny-imagenet-200" / "train" / "n02" / "images" / "n02_1.JPEG"
    tiny = data.load("tiny-imagenet", tiny_dir)
    damage(file)
    with pytest.raises(data.DataError) as caught:
        list(data.batches(tiny.train, 2, seed=0, workers=workers))
    assert str(caught.value).startswith(f"cannot read the image {file}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_tiny_imagenet_errors(tiny_dir, tmp_path):
    root = tiny_dir / "tiny-imagenet-200"
    annotations = root / "val" / "val_annotations.txt"
    good = annotations.read_text()
    for text, message in (
        (good + "val_3.JPEG\tn09\t0\t0\t1\t1\n", r"val_annotations\.txt, line 4: 'val_3.* a class of wnids\.txt"),
        ("val_0.JPEG n01\n", r"val_annotations\.txt, line 1: 'val_0\.JPEG n01'; expected a file name, a tab"),
        ("", r"val_annotations\.txt is empty"),
    ):
        annotations.write_text(text)
        with pytest.raises(data.DataError, match=message):
            data.load("tiny-imagenet", tiny_dir)
    annotations.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(data.DataError, match="no usable Tiny ImageNet in"):
        data.load("tiny-imagenet", tiny_dir)
    annotations.write_text(good)
    (root / "wnids.txt").write_text("n01\nn04\n")
    with pytest.raises(data.DataError, match=r"n04.images is not a folder"):
        data.load("tiny-imagenet", tiny_dir)
    (root / "wnids.txt").unlink()
    with pytest.raises(data.DataError, match=r"wnids\.txt: .*No such file"):
        data.load("tiny-imagenet", tiny_dir)
    with pytest.raises(data.DataError, match="cannot be downloaded"):
        data.load("tiny-imagenet", tiny_dir, download=True)


@pytest.fixture
def image_folder(tmp_path):
    for split in ("train", "test"):
        for i, name in enumerate(("cat", "dog", "emu")):
            for j in range(2):
                _write_image(tmp_path / split / name / f"{j}.png", (20, 24), 50 * i + j)
    return tmp_path


def test_folder(image_folder):
    folder = data.load("folder", image_folder, augment=False)
    assert (folder.classes, folder.image_shape, len(folder.test)) == (3, (3, 20, 24), 6)
    x, y = folder.test.batch(torch.arange(6), torch.Generator())
    assert y.tolist() == [0, 1, 2, 0, 1, 2]
    assert (x[:, 0, 3, 3] * 255).round().tolist() == [0, 50, 100, 1, 51, 101]
    sized = data.load("folder", image_folder, image_size=16)
    x, _ = sized.train.batch(torch.arange(6), torch.Generator())
    assert x.shape == (6, 3, 16, 16)


def test_the_digest_of_a_folder(image_folder, tmp_path_factory):
    """It is that of a copy elsewhere, and another one for each thing that makes other images of them."""

    def digests(contents=None, root=image_folder, **options):
        loaded = data.load("folder", root, **options)
        return tuple(split.digest(contents) for split in (loaded.train, loaded.test))

    before = digests()
    copy = tmp_path_factory.mktemp("elsewhere") / "deeper"
    assert digests(root=shutil.copytree(image_folder, copy)) == before
    assert digests(image_size=16) != before
    (copy / "train" / "cat" / "0.png").rename(copy / "train" / "cat" / "0a.png")
    assert digests(root=copy)[0] != before[0], "another name"
    file = image_folder / "train" / "emu" / "1.png"
    whole = file.read_bytes()
    for part in (None, 1, 2, 6, 100):
        found = digests(part)
        file.write_bytes(whole + b"0")
        assert digests(part)[0] != found[0], "another size, however few are read"
        file.write_bytes(whole[:-1] + b"0")
        assert (digests(part)[0] != found[0]) == (part in (None, 6, 100)), "another content: the last of six files"
        assert digests(part)[1] == found[1], "the other split"
        file.write_bytes(whole)
    split = data.load("folder", image_folder).train
    file.unlink()
    with pytest.raises(data.DataError, match=r"cannot read the image .*emu.1\.png: No such file"):
        split.digest()


def test_the_digest_of_images_in_memory():
    split = data.Split(torch.zeros(4, 1, 2, 2, dtype=torch.uint8), torch.arange(4), groups=torch.tensor([0, 1, 0, 1]))
    other = [
        replace(split, images=split.images + 1),
        replace(split, labels=split.labels.flip(0)),
        replace(split, groups=1 - split.groups),
        split.first(3),
    ]
    assert len({part.digest() for part in (split, *other)}) == 5
    assert replace(split, images=split.images.clone()).digest() == split.digest()


def test_class_names(image_folder, tiny_dir):
    assert data.load("folder", image_folder).class_names == ("cat", "dog", "emu")
    assert data.load("tiny-imagenet", tiny_dir).class_names == ("n01", "n02", "n03")
    assert data.other_class(["a", "b"], ("a", "b")) == ""
    assert data.other_class(["a", "b"], ("b", "a")) == "class 0 is 'a', got 'b'"
    assert data.other_class(["a", "b"], ("a",)) == "class 1 is 'b', got None"
    assert data.other_class(["a"], ("a", "b")) == "class 1 is None, got 'b'"


def test_scaled_images_are_cropped_in_the_middle(image_folder):
    """A wide image with a white middle: its margins are cut off, however it is scaled."""
    image = Image.new("RGB", (40, 20))
    image.paste((255, 255, 255), (8, 0, 32, 20))
    image.save(image_folder / "train" / "cat" / "0.png")
    files = data.load("folder", image_folder, image_size=10, augment=False).train.images
    assert files[torch.tensor([0])].shape == (1, 3, 10, 10)
    assert files[torch.tensor([0])].min() > 250


def test_folder_errors(image_folder):
    with pytest.raises(
        data.DataError,
        match=r"--image-size is for --data synthetic, folder, waterbirds, celeba-hair; digits has its own",
    ):
        data.load("digits", image_size=4)
    with pytest.raises(data.DataError, match="--classes is for --data synthetic; folder has its own"):
        data.load("folder", image_folder, classes=4)
    _write_image(image_folder / "train" / "dog" / "1.png", (21, 24))
    with pytest.raises(data.DataError, match=r"dog.1\.png: expected 20x24 pixels, as the others have, got 21x24"):
        list(data.batches(data.load("folder", image_folder).train, 2))
    (image_folder / "test" / "fox").mkdir()
    with pytest.raises(data.DataError, match=r"test has the class 'fox', which .*train lacks"):
        data.load("folder", image_folder)
    (image_folder / "train" / "fox").mkdir()
    with pytest.raises(data.DataError, match=r"train.fox holds no images \(\.jpg"):
        data.load("folder", image_folder)
    empty = image_folder / "empty"
    (empty / "val").mkdir(parents=True)
    with pytest.raises(data.DataError, match=r"empty has no folders train and val \(or test\)"):
        data.load("folder", empty)
    (empty / "train").mkdir()
    with pytest.raises(data.DataError, match="train is empty; expected a folder for each class"):
        data.load("folder", empty)
    _write_image(empty / "train" / "a" / "1.png")
    with pytest.raises(data.DataError, match="val has no classes"):
        data.load("folder", empty)


def test_synthetic():
    noise = data.load("synthetic", classes=1000, image_size=48)
    assert (noise.classes, noise.image_shape) == (1000, (3, 48, 48))
    assert noise.train.labels.max() < 1000
    assert len(set(noise.train.labels.tolist())) > 500
    assert torch.equal(noise.train.images, data.load("synthetic", classes=1000, image_size=48).train.images)
    with pytest.raises(data.DataError, match="no memory for 1024 images of 10000000x10000000 pixels"):
        data.load("synthetic", image_size=10**7)


def test_errors(tmp_path):
    with pytest.raises(data.DataError, match="unknown data set 'imagenet'; expected one of digits, mnist"):
        data.load("imagenet")
    with pytest.raises(data.DataError, match=r"waterbirds, celeba-hair; did you mean cifar10 or cifar100\?$"):
        data.load("cifra10")
    with pytest.raises(data.DataError, match="needs --data-dir"):
        data.load("mnist")
    with pytest.raises(data.DataError, match="nowhere is not a folder"):
        data.load("mnist", tmp_path / "nowhere")
    for name, file in (
        ("mnist", "train-images-idx3-ubyte"),
        ("blockmnist", "train-images-idx3-ubyte"),
        ("cifar10", "data_batch_1"),
        ("cifar100", "train"),
        ("svhn", r"train_32x32\.mat"),
    ):
        message = rf"no usable \w+ in .*{file} \(there is no such file\); give its folder, or add --download"
        with pytest.raises(data.DataError, match=message):
            data.load(name, tmp_path)


def test_wrong_checksum_names_the_file(tmp_path):
    write_cifar100(tmp_path, 12, 6)
    with pytest.raises(data.DataError, match=r"cifar-100-python.train \(its checksum is not the published one\)"):
        data.load("cifar100", tmp_path)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("train-images-idx3-ubyte", lambda b: b[:-100], r"no usable MNIST in .*train-images-idx3-ubyte \("),
        ("t10k-images-idx3-ubyte", lambda b: b"", r"no usable MNIST in .*t10k-images-idx3-ubyte \("),
        ("t10k-labels-idx1-ubyte", lambda b: b[:8] + bytes([12]) + b[9:], "holds the label 12; expected 0 to 9"),
        (
            "train-labels-idx1-ubyte",
            lambda b: struct.pack(">ii", 2049, 39) + b[9:],
            r"train-labels-idx1-ubyte holds 39 labels; expected 40, one for each image",
        ),
        (
            "t10k-images-idx3-ubyte",
            lambda b: struct.pack(">iiii", 2051, 20, 14, 56) + b[16:],
            r"t10k-images-idx3-ubyte holds images of shape \[1, 14, 56\]; expected \[1, 28, 28\]",
        ),
        ("train-images-idx3-ubyte", lambda b: struct.pack(">iiii", 2051, 0, 28, 28), "holds no images|no usable MNIST"),
    ],
)
def test_damaged_mnist_file(mnist_dir, file, change, message):
    path = mnist_dir / "MNIST" / "raw" / file
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(data.DataError, match=message) as caught:
        data.load("mnist", mnist_dir)
    assert file in str(caught.value)


# --------------------------------------------------------------------------------------------------------------------
# groups, and images that are held out


def test_held_out_images_take_the_place_of_the_test_images(mnist_dir):
    blocks = data.load("blockmnist", mnist_dir)
    held = blocks.held_out(10)
    assert (len(held.train), len(held.test)) == (30, 10)
    assert torch.equal(held.test.labels, blocks.train.labels[30:])
    x, _ = held.test.batch(torch.arange(10), torch.Generator())
    assert torch.equal(x[:, 0, 28:], data.null_tile().expand(10, 28, 28)), "seen as test images are"
    assert x[9, 0, 14, 14] == pytest.approx(40 / 255)
    with pytest.raises(data.DataError, match="val_size 40 leaves none of blockmnist's 40 training images"):
        blocks.held_out(40)


def test_spurious_mnist(mnist_dir):
    spurious = data.load("spurious-mnist", mnist_dir)
    digits = data.load("mnist", mnist_dir)
    assert (spurious.classes, len(spurious.groups), spurious.image_shape) == (2, 4, (3, 28, 28))
    for split, plain in ((spurious.train, digits.train), (spurious.test, digits.test)):
        assert torch.equal(split.labels, (plain.labels >= 5).long())
        attribute = (split.images[:, 1, 0, 0] == 128).long()
        assert torch.equal(split.groups, 2 * split.labels + attribute)
        assert torch.equal(split.images[:, 2], plain.images[:, 0]), "no background in blue"
    same = data.load("spurious-mnist", mnist_dir)
    assert torch.equal(same.train.images, spurious.train.images)
    part = spurious.train.first(7)
    assert len(part.groups) == 7
    assert len(spurious.held_out(5).test.groups) == 5


def test_spurious_mnist_agrees_with_the_class_in_training_only(monkeypatch):
    digits = torch.arange(8000) % 10
    split = data.Split(torch.zeros(8000, 1, 28, 28, dtype=torch.uint8), digits)
    monkeypatch.setattr(data.arrays, "_mnist_splits", lambda request: (split, split))
    spurious = data.load("spurious-mnist", "anywhere")
    for part, agree in ((spurious.train, 0.95), (spurious.test, 0.5)):
        agrees = (part.groups % 2 == part.labels).double().mean()
        assert agrees == pytest.approx(agree, abs=0.02)
        assert part.check_groups(4, "here") is part.groups


ROWS = [(i % 2, i // 2 % 2, (0, 0, 1, 2)[i // 4]) for i in range(16)]
"""(class, attribute, split) of 16 images: each group in each split."""


@pytest.fixture
def waterbirds_dir(tmp_path):
    root = tmp_path / "waterbird_complete95_forest2water2"
    lines = ["img_id,img_filename,y,split,place,place_filename"]
    for i, (y, place, split) in enumerate(ROWS):
        _write_image(root / f"{i:03}.Bird" / f"{i}.png", (50, 60), 10 * i)
        lines.append(f"{i},{i:03}.Bird/{i}.png,{y},{split},{place},/o/ocean/{i}.jpg")
    (root / "metadata.csv").write_text("\n".join(lines))
    return tmp_path


@pytest.fixture
def celeba_dir(tmp_path):
    root = tmp_path / "celeba"
    attributes, partition = ["16", "Bald Blond_Hair Male Young"], []
    for i, (blond, male, split) in enumerate(ROWS):
        name = f"{i:06}.png"
        _write_image(root / "img_align_celeba" / name, (50, 60), 10 * i)
        attributes.append(f"{name} -1 {2 * blond - 1} {2 * male - 1}  1")
        partition.append(f"{name} {split}")
    (root / "list_attr_celeba.txt").write_text("\n".join(attributes) + "\n")
    (root / "list_eval_partition.txt").write_text("\n".join(partition) + "\n")
    return tmp_path


FOLDERS = {
    **{"folder": "image_folder", "tiny-imagenet": "tiny_dir"},
    **{"waterbirds": "waterbirds_dir", "celeba-hair": "celeba_dir"},
}
"""The fixtures of data sets that are files."""


@pytest.mark.parametrize("name", ["waterbirds", "celeba-hair"])
def test_published_groups(name, request):
    folder = request.getfixturevalue(FOLDERS[name])
    inside = next(path for path in folder.iterdir() if path.is_dir())
    for place in (folder, inside):
        grouped = data.load(name, place, augment=False, image_size=32)
        assert (len(grouped.train), len(grouped.test), grouped.classes) == (8, 4, 2)
        assert len(grouped.groups) == 4
        assert grouped.image_shape == (3, 32, 32)
        for split, numbers in ((grouped.train, range(8)), (grouped.test, range(12, 16))):
            x, y = split.batch(torch.arange(len(split)), torch.Generator())
            image = (x[:, 0, 0, 0] * 25.5).round().long().tolist()
            assert sorted(image) == list(numbers)
            assert y.tolist() == [ROWS[i][0] for i in image]
            assert split.groups.tolist() == [2 * ROWS[i][0] + ROWS[i][1] for i in image]
            assert image != sorted(image), "not in the order of the table"
    assert data.load(name, folder).image_shape == (3, 224, 224)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (
            "metadata.csv",
            lambda s: s.replace(",place,", ",where,"),
            "has no column place; expected img_filename, y, sp",
        ),
        ("metadata.csv", lambda s: s.replace(",0,0,/o", ",7,0,/o", 1), "line 2: expected y and place of 0 or 1"),
        ("metadata.csv", lambda s: s.replace("Bird/", "Birds/"), r"lists .*Birds/.*, and there is no "),
        ("metadata.csv", lambda s: "\n".join(s.splitlines()[:13]), r"lists no test images \(split 2\)"),
        ("metadata.csv", lambda s: "\n".join(s.splitlines()[:16]), "group 3 of 4 has no images among these 3"),
        ("list_attr_celeba.txt", lambda s: s.replace("Male", "Female"), "has no attribute Male in its second line"),
        ("list_attr_celeba.txt", lambda s: s + "x.png 1\n", "line 19: expected a file name and 4 attributes"),
        ("list_eval_partition.txt", lambda s: s.replace("03.png 0\n", ""), "has no split of 0, 1 or 2 for 000003.png"),
    ],
)
def test_errors_of_published_groups(file, change, message, request):
    name = "waterbirds" if file == "metadata.csv" else "celeba-hair"
    folder = request.getfixturevalue(FOLDERS[name])
    (table,) = folder.rglob(file)
    table.write_text(change(table.read_text()))
    where = "test images" if "group 3" in message else re.escape(file)
    with pytest.raises(data.DataError, match=f"{where}.*{message}"):
        data.load(name, folder)
    table.unlink()
    with pytest.raises(data.DataError, match=rf"cannot read .*{file}: No such file or directory"):
        data.load(name, folder)


# --------------------------------------------------------------------------------------------------------------------
# what image files hold

RAMP = np.arange(0, 65536, 257, dtype=np.uint16).reshape(8, 32)
"""Greys of 16 bits, and in steps of 257 those of 8 bits: 0 to 255."""


def _retag(path, **tags):
    """Change tags of a TIFF, SHORT or LONG, from one value to another."""
    content = path.read_bytes()
    for tag, (old, new) in tags.items():
        found = [entry for kind in (3, 4) if (entry := struct.pack("<HHIH", int(tag[1:]), kind, 1, old)) in content]
        assert len(found) == 1
        content = content.replace(found[0], found[0][:8] + struct.pack("<H", new))
    path.write_bytes(content)


def _twelve_bits(path):
    """8 pixels of 12 bits are the bytes of 6 of 16."""
    numbers = [0, 1, 255, 256, 2047, 2048, 4094, 4095]
    packed = int("".join(f"{number:03x}" for number in numbers), 16).to_bytes(12, "big")
    Image.frombytes("I;16", (6, 1), packed).save(path)
    _retag(path, t256=(6, 8), t258=(16, 12))
    return np.array([numbers]) / 4095


def _saved(path, array, mode=None, **options):
    image = Image.fromarray(array) if mode is None else Image.frombytes(mode, array.shape[::-1], array.tobytes())
    image.save(path, **options)
    return array / 65535 if array.dtype.kind == "u" else array


def _white_is_zero(path):
    _saved(path, RAMP)
    _retag(path, t262=(1, 0))
    return 1 - RAMP / 65535


def _transparent(path):
    wanted = _saved(path, RAMP, transparency=int(RAMP[1, 1]))
    wanted[1, 1] = 1
    return wanted


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("16.png", lambda path: _saved(path, RAMP)),
        ("16-fine.png", lambda path: _saved(path, np.arange(256, dtype=np.uint16).reshape(8, 32) + 30000)),
        ("16.pgm", lambda path: _saved(path, RAMP)),
        ("16.tif", lambda path: _saved(path, RAMP)),
        ("16-packed.tif", lambda path: _saved(path, RAMP, compression="tiff_lzw")),
        ("16-big-endian.tif", lambda path: _saved(path, RAMP.astype(">u2"), "I;16B")),
        ("16-white-is-zero.tif", _white_is_zero),
        ("16-transparent.png", _transparent),
        ("12.tif", _twelve_bits),
        ("float.tif", lambda path: _saved(path, (RAMP / 65535).astype(np.float32))),
    ],
)
def test_grey_of_more_than_8_bits_keeps_its_values(tmp_path, name, write):
    wanted = torch.from_numpy(np.asarray(write(tmp_path / name), np.float64))
    image = data.read_image(tmp_path / name)
    assert image.shape == (3, *wanted.shape)
    batch, _ = data.Split(data.Files([tmp_path / name], wanted.shape), torch.zeros(1)).batch(torch.arange(1), None)
    assert 0 <= batch.min() <= batch.max() <= 1
    torch.testing.assert_close(batch[0].double(), wanted.expand(3, -1, -1), rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("array", "tags", "message"),
    [
        (RAMP.astype(np.int32), {}, "it holds signed integers"),
        (RAMP.astype(np.int32), {"t339": (2, 1)}, "it holds integers of 32 bits"),
        (RAMP.astype(np.uint8), {"t339": (1, 2)}, "it holds signed integers"),
        (RAMP.astype(np.float32), {}, "it holds floats from 0 to 65535"),
        (RAMP.astype(np.float32) / 65535 - 0.25, {}, r"it holds floats from -0\.25 to 0\.75"),
        (np.full((2, 2), np.nan, np.float32), {}, "it holds floats from nan to nan"),
    ],
)
def test_greys_of_which_white_is_not_known_are_refused(tmp_path, array, tags, message):
    path = tmp_path / "image.tif"
    Image.fromarray(array).save(path, **({"tiffinfo": {339: 1}} if array.dtype == np.uint8 else {}))
    _retag(path, **tags)
    with pytest.raises(data.DataError) as caught:
        data.read_image(path)
    expected = "expected 8 or 16 bits without a sign, or floats in [0, 1]"
    assert re.fullmatch(
        rf"cannot read the image {re.escape(str(path))}: {message}; {re.escape(expected)}", str(caught.value)
    )


@pytest.mark.parametrize(
    "name", ["1.png", "L.png", "L.jpg", "P.png", "RGB.png", "RGB.jpg", "CMYK.jpg", "YCbCr.tif", "LAB.tif"]
)
def test_8_bits_are_read_as_pillow_reads_them(tmp_path, name):
    mode, path = name.split(".")[0], tmp_path / name
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 12, 3), np.uint8))
    (image if mode == "RGB" else image.convert(mode)).save(path)
    with Image.open(path) as file:
        assert file.mode == mode
        wanted = np.array(file.convert("RGB"))
    given = data.read_image(path)
    assert given.dtype == torch.uint8
    assert np.array_equal(given.permute(1, 2, 0), wanted)


def _palette(alpha):
    image = Image.new("P", (3, 1))
    image.putpalette([200, 100, 40] * 3)
    image.putdata([0, 1, 2])
    return image, {"transparency": bytes(alpha)}


def _premultiplied(path):
    Image.merge("LA", [Image.new("L", (3, 1), 0), _alpha()]).save(path)
    _retag(path, t338=(2, 1))


def _alpha():
    return Image.frombytes("L", (3, 1), bytes([0, 51, 255]))


def _with_alpha(mode):
    bands = [Image.new("L", (3, 1), value) for value in ((200, 100, 40) if mode == "RGBA" else (200,))]
    return Image.merge(mode, [*bands, _alpha()])


@pytest.mark.parametrize("name", ["RGBA.png", "RGBA.tif", "LA.png", "LA.tif", "PA.tif", "P.png", "La.tif"])
def test_what_is_transparent_lies_on_white(tmp_path, name):
    """Of an opacity of 0, a fifth and 1; with a colour below that the opacity of 0 hides."""
    mode, path = name.split(".")[0], tmp_path / name
    colour = {"LA": (200, 200, 200), "La": (0, 0, 0)}.get(mode, (200, 100, 40))
    if mode == "La":
        _premultiplied(path)
    elif mode == "P":
        image, options = _palette([0, 51, 255])
        image.save(path, **options)
    elif mode == "PA":
        image = _palette([])[0].convert("PA")
        image.putalpha(_alpha())
        image.save(path)
    else:
        _with_alpha(mode).save(path)
    with Image.open(path) as file:
        assert file.mode == mode
    wanted = [[255, 204 + round(c / 5), c] for c in colour]
    assert data.read_image(path)[:, 0].tolist() == wanted


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_transparent_colour_lies_on_white(tmp_path, mode):
    image = Image.new(mode, (2, 1), 0)
    image.putpixel((1, 0), 7 if mode == "L" else (7, 7, 7))
    image.save(tmp_path / "image.png", transparency=7 if mode == "L" else (7, 7, 7))
    assert data.read_image(tmp_path / "image.png")[:, 0].tolist() == [[0, 255]] * 3


@pytest.mark.parametrize("name", ["RGB.jpg", "RGB.png", "RGB.webp", "RGB.tif", "L.tif", "I;16.tif", "I;16.png"])
def test_images_are_turned_as_exif_says(tmp_path, name):
    mode, path = name.split(".")[0], tmp_path / name
    upright = np.zeros((32, 48), np.uint16 if mode == "I;16" else np.uint8)
    upright[:8, :8], upright[:8, 8:16] = (51400, 25700) if mode == "I;16" else (200, 100)
    wanted = torch.from_numpy(upright / (257.0 if mode == "I;16" else 1.0)).float()
    turn = Image.Transpose
    stored = [None, turn.FLIP_LEFT_RIGHT, turn.ROTATE_180, turn.FLIP_TOP_BOTTOM, turn.TRANSPOSE]
    stored += [turn.ROTATE_90, turn.TRANSVERSE, turn.ROTATE_270]
    for orientation, method in enumerate(stored, 1):
        image = Image.fromarray(upright).convert("RGB") if mode == "RGB" else Image.fromarray(upright)
        image = image if method is None else image.transpose(method)
        exif = Image.Exif()
        exif[0x112] = orientation
        image.save(path, exif=exif, **({"lossless": True} if path.suffix == ".webp" else {}))
        given = data.read_image(path).float()
        assert given.shape == (3, 32, 48), orientation
        atol = 3 if path.suffix == ".jpg" else 1e-4
        torch.testing.assert_close(given, wanted.expand(3, -1, -1), rtol=0, atol=atol)


@pytest.mark.parametrize("name", FOLDERS)
def test_every_data_set_of_files_reads_16_bits(name, request):
    """One image of the first batch among those of 8 bits, scaled and cropped where the data set does so."""
    split = data.load(name, request.getfixturevalue(FOLDERS[name]), augment=False).train
    path = split.images.paths[1]
    before, _ = split.batch(torch.arange(3), torch.Generator())
    with Image.open(path) as file:
        size = file.size
    Image.new("I;16", size, 30001).save(path, format="PNG")
    after, _ = split.batch(torch.arange(3), torch.Generator())
    torch.testing.assert_close(after[1], torch.full_like(after[1], 30001 / 65535), rtol=0, atol=1e-6)
    assert torch.equal(after[[0, 2]], before[[0, 2]])


def test_hidden_folders_and_files_are_no_classes_and_no_images(image_folder):
    wanted = data.load("folder", image_folder)
    for place in ("train", "train/cat", "test", "test/dog/deeper"):
        for name in (".ipynb_checkpoints", ".git", "@eaDir", "__MACOSX"):
            _write_image(image_folder / place / name / "cat" / "a.png")
            (image_folder / place / name / "b.png").write_bytes(b"no image")
    (image_folder / "train" / "emu" / "._0.png").write_bytes(b"a Mac's")
    given = data.load("folder", image_folder)
    assert (given.classes, given.train.images.paths) == (3, wanted.train.images.paths)
    assert given.test.images.paths == wanted.test.images.paths
    assert torch.equal(given.train.labels, wanted.train.labels)


def test_a_data_directory_may_be_hidden_itself(image_folder):
    hidden = image_folder / ".cache" / "train"
    hidden.parent.mkdir()
    (image_folder / "train").rename(hidden)
    (image_folder / "test").rename(hidden.with_name("test"))
    assert len(data.load("folder", hidden.parent).train) == 6


def test_linked_folders_are_followed(image_folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    _write_image(elsewhere / "more" / "deeper" / "2.png", (20, 24), 7)
    cat = image_folder / "train" / "cat"
    (cat / "linked").symlink_to(elsewhere / "more")
    (image_folder / "train" / "emu").rename(elsewhere / "emu")
    (image_folder / "train" / "emu").symlink_to(elsewhere / "emu")
    given = data.load("folder", image_folder).train
    assert len(given) == 7
    assert cat / "linked" / "deeper" / "2.png" in given.images.paths
    assert given.labels.bincount().tolist() == [3, 2, 2]

    (cat / "again").symlink_to(image_folder / "train")
    with pytest.raises(
        data.DataError, match=r"cat.again is a link to a folder that it lies in, .*train; remove the link"
    ):
        data.load("folder", image_folder)
    (cat / "again").unlink()
    (elsewhere / "more" / "deeper" / "round").symlink_to(elsewhere / "more")
    with pytest.raises(data.DataError, match=r"deeper.round is a link to a folder that it lies in, .*more; remove"):
        data.load("folder", image_folder)
    (elsewhere / "more").rename(elsewhere / "moved")
    with pytest.raises(data.DataError, match=r"cat.linked is a link to .*elsewhere.*more, which is not there"):
        data.load("folder", image_folder)


def test_a_folder_that_cannot_be_read_is_named(image_folder, monkeypatch):
    def scandir(folder, real=os.scandir):
        if Path(folder).name == "dog":
            raise PermissionError(13, "Permission denied")
        return real(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(data.DataError, match=r"cannot read the folder .*train.dog: Permission denied"):
        data.load("folder", image_folder)
