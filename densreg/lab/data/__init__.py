"""Image data sets: a registry (registry.py), splits and batches (splits.py), image files (images.py), the data sets."""

from densreg.lab.data import arrays, folders  # noqa: F401  # they register their data sets
from densreg.lab.data.blockmnist import null_tile, null_tiles, stack_null
from densreg.lab.data.images import DataError, Files, read_image
from densreg.lab.data.registry import DATA_SETS, Entry, Recipe, Request, entry, load, register, taking
from densreg.lab.data.splits import CONTENTS, CropAndFlip, DataSet, Split, batches, other_class, seeded

__all__ = [
    "CONTENTS",
    "DATA_SETS",
    "CropAndFlip",
    "DataError",
    "DataSet",
    "Entry",
    "Files",
    "Recipe",
    "Request",
    "Split",
    "batches",
    "entry",
    "load",
    "null_tile",
    "null_tiles",
    "other_class",
    "read_image",
    "register",
    "seeded",
    "stack_null",
    "taking",
]
