"""Data sets of made-up images, in files as they are published."""

from __future__ import annotations

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
