"""Image files: reading one, and many as if they were a tensor."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from densreg.lab.runs import first_line


class DataError(ValueError):
    """The data set is unknown, absent or not what it should be; the message is one line for the user."""


class Files:
    """Image files that are read when a batch needs them, indexed like a tensor [N, 3, H, W] in 0 to 255.

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
        """Hash of all names below the common folder, all file sizes and some contents, as 16 hexadecimal digits.

        Args:
            contents: at most so many files are read, evenly spread; all of them for None.

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
            expected, given = ("x".join(map(str, size)) for size in (self.size, image.shape[1:]))
            raise DataError(f"{path}: expected {expected} pixels, as the others have, got {given}; see --image-size")
        return image


def read_image(path: Path) -> Tensor:
    """An image file as [3, H, W] in 0 to 255: uint8, or float32 where it is grey with more than 8 bits.

    The EXIF orientation is applied, and transparent pixels lie on white. 16 bits are scaled by their full
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
