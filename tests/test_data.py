"""Data sets: shapes, ranges, determinism, BlockMNIST's tiles, errors."""

from __future__ import annotations

import gzip
import pickle
import struct

import numpy as np
import pytest
import torch

from densreg import data


@pytest.fixture
def mnist_dir(tmp_path):
    """A folder as torchvision lays MNIST out, with 40 and 20 images that hold their own number."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix, n in (("train", 40), ("t10k", 20)):
        images = np.zeros((n, 28, 28), np.uint8)
        images[:, 14, 14] = np.arange(1, n + 1)
        labels = (np.arange(n) % 10).astype(np.uint8)
        for name, header, array in (
            (f"{prefix}-images-idx3-ubyte", struct.pack(">iiii", 2051, n, 28, 28), images),
            (f"{prefix}-labels-idx1-ubyte", struct.pack(">ii", 2049, n), labels),
        ):
            (raw / name).write_bytes(header + array.tobytes())
            with gzip.open(raw / f"{name}.gz", "wb") as file:
                file.write(header + array.tobytes())
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


def test_augmentation_draws_for_each_image_and_not_from_the_global_generator():
    images = torch.zeros(64, 3, 32, 32)
    images[:, :, 16, 8] = 1
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one = data._crop_and_flip(images, torch.Generator().manual_seed(1))
    assert torch.equal(torch.get_rng_state(), before)
    same = data._crop_and_flip(images, torch.Generator().manual_seed(1))
    assert torch.equal(one, same)
    places = {tuple(image.nonzero()[0].tolist()) for image in one}
    assert len(places) > 30
    assert {column < 16 for _, _, column in places} == {True, False}, "flipped and not"
    assert all(12 <= row <= 20 for _, row, _ in places)


def test_batches():
    split = data.Split(torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1), torch.arange(10))
    in_order = [y.tolist() for _, y in data.batches(split, 4)]
    assert in_order == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    shuffled = [y.tolist() for _, y in data.batches(split, 4, torch.Generator().manual_seed(0), drop_last=True)]
    assert [len(y) for y in shuffled] == [4, 4]
    assert shuffled != in_order[:2]
    generator = torch.Generator().manual_seed(0)
    assert shuffled == [y.tolist() for _, y in data.batches(split, 4, generator, drop_last=True)]
    assert shuffled != [y.tolist() for _, y in data.batches(split, 4, generator, drop_last=True)], "another epoch"
    x, y = next(data.batches(split, 4))
    assert torch.equal(x.flatten(), y / 255)
    assert len(split.first(3)) == 3
    assert split.first(None) is split


def test_cifar100(tmp_path, monkeypatch):
    """torchvision's own reader on a folder of our making (its checksums are those of the whole data set)."""
    from torchvision import datasets

    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, n in (("train", 12), ("test", 6)):
        pixels = rng.integers(0, 256, (n, 3072), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "fine_labels": list(range(n))}))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [str(i) for i in range(100)]}))
    monkeypatch.setattr(datasets.CIFAR100, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *a: True)
    cifar = data.load("cifar100", tmp_path)
    assert (len(cifar.train), len(cifar.test), cifar.classes) == (12, 6, 100)
    assert cifar.image_shape == (3, 32, 32)
    x, y = cifar.test.batch(torch.arange(6), torch.Generator())
    pixels = pickle.loads((folder / "test").read_bytes())["data"].reshape(6, 3, 32, 32)
    torch.testing.assert_close(x, torch.from_numpy(pixels).float() / 255)
    assert y.tolist() == list(range(6))


def test_errors(tmp_path):
    with pytest.raises(data.DataError, match="unknown data set 'imagenet'; wanted one of digits, mnist"):
        data.load("imagenet")
    with pytest.raises(data.DataError, match="needs --data-dir"):
        data.load("mnist")
    with pytest.raises(data.DataError, match="nowhere is not a folder"):
        data.load("mnist", tmp_path / "nowhere")
    for name in ("mnist", "blockmnist", "cifar100"):
        with pytest.raises(data.DataError, match=r"no usable \w+ in .*; give its folder, or add --download"):
            data.load(name, tmp_path)


def test_damaged_file(mnist_dir):
    file = mnist_dir / "MNIST" / "raw" / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(data.DataError, match="no usable MNIST"):
        data.load("mnist", mnist_dir)
