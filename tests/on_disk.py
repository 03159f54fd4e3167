"""Data sets of made-up images, in files as they are published."""

from __future__ import annotations

import pickle
import struct

import numpy as np
from PIL import Image


def write_mnist(root, train, test):
    """MNIST as torchvision lays it out; gives the folder of its files.

    Args:
        train, test: images [n, 28, 28] uint8, and labels [n].
    """
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix, (images, labels) in (("train", train), ("t10k", test)):
        n = len(labels)
        header = struct.pack(">iiii", 2051, n, 28, 28)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(header + np.asarray(images).tobytes())
        header = struct.pack(">ii", 2049, n)
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(header + np.asarray(labels).astype(np.uint8).tobytes())
    return raw


def write_folder(root, reds, side=4, images=2):
    """Images of one size in bytes, in a folder for each class, training and test.

    Args:
        reds: how red the images of each class are.
    """
    for split in ("train", "val"):
        for name, red in reds.items():
            (root / split / name).mkdir(parents=True)
            for i in range(images):
                Image.new("RGB", (side, side), (red, i, 0)).save(root / split / name / f"{i}.bmp")


def write_cifar(folder, sizes, key, classes, meta, names):
    """CIFAR in Python's version; the labels are 0, 1, 2 and so on, and begin again after the last class.

    Args:
        sizes: how many images each file has.
        key: of the labels.
        meta, names: the file with the classes' names, and their key.
    """
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, n in sizes.items():
        pixels = rng.integers(0, 256, (n, 3072), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": pixels, key: [i % classes for i in range(n)]}))
    (folder / meta).write_bytes(pickle.dumps({names: [str(i) for i in range(classes)]}))


def write_cifar100(root, train, test):
    sizes = {"train": train, "test": test}
    write_cifar(root / "cifar-100-python", sizes, "fine_labels", 100, "meta", "fine_label_names")
