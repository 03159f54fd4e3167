"""BlockMNIST: MNIST digits stacked with a tile that carries no information."""

from __future__ import annotations

import torch
from torch import Tensor

from densreg.lab.data.images import DataError


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
        raise DataError(f"expected BlockMNIST's images of 1x56x28, a digit and the null tile; got {given}")
    tiles = images.reshape(-1, 2, 28, 28)  # no digit has this outline, so that the tile is where its pixels are
    found = (tiles == null_tile().to(images)).flatten(2).all(2)
    if not (found.sum(1) == 1).all():
        raise DataError("an image has no null tile, or two; expected images of BlockMNIST, in [0, 1]")
    return found.view(-1, 2, 1, 1).expand_as(tiles).reshape(images.shape)


def random_null(images: Tensor, generator: torch.Generator) -> Tensor:
    """Training images: the null tile is above or below at random."""
    return stack_null(images, torch.rand(len(images), generator=generator) < 0.5)


def null_below(images: Tensor, generator: torch.Generator) -> Tensor:
    """Test images: the null tile is below."""
    return stack_null(images, torch.ones(len(images), dtype=torch.bool))
