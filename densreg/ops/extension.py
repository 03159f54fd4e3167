"""The C++ extension ``densreg/_C.so``: loading it, what it says of its build, and how often its kernels were called."""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parents[1]


def build_info() -> dict[str, Any]:
    """What the build wrote of itself; empty where there was none."""
    try:
        return json.loads((FOLDER / "_build_info.json").read_text())
    except (OSError, ValueError):
        return {}


_libraries: list[ctypes.CDLL] = []


def load(path: str | Path) -> ctypes.CDLL:
    """Load a library of kernels, which register themselves with torch's dispatcher; their calls are counted."""
    torch.ops.load_library(str(path))
    library = ctypes.CDLL(str(path))
    library.densreg_counter.restype = ctypes.c_char_p
    _libraries.append(library)
    return library


def counted_calls() -> Iterator[tuple[str, int]]:
    """Operator and kernel ("softmax/cpu-avx2"), and the number of calls since the library was loaded."""
    for library in _libraries:
        calls = ctypes.c_int64()
        for index in itertools.count():
            name = library.densreg_counter(index, ctypes.byref(calls))
            if name is None:
                break
            yield name.decode(), calls.value


def _load() -> tuple[ctypes.CDLL | None, str | None]:
    """The extension, or why there is none."""
    path = FOLDER / "_C.so"
    if not path.exists():
        _refuse_to_hide_an_installation()
        return None, build_info().get("reason", f"{path.name} was not built")
    try:
        return load(path), None
    except OSError as error:
        return None, f"{path.name} does not load: {error}"


def _refuse_to_hide_an_installation() -> None:
    """Raise where this is a source tree that was never built, found before the densreg that is installed."""
    if (FOLDER / "_build_info.json").exists():
        return
    for other in (Path(place, "densreg").resolve() for place in sys.path):
        if other != FOLDER.resolve() and (other / "_build_info.json").exists():
            raise ImportError(
                f"densreg is imported from its source tree, {FOLDER}, which was not built and hides the densreg "
                f"installed in {other}: start Python in another folder, or install with pip install -e"
            )


_extension, UNAVAILABLE = _load()
"""The C++ extension, and why it is not available: None where it is."""

if UNAVAILABLE is not None and os.environ.get("DENSREG_REQUIRE_EXTENSION") == "1":
    raise ImportError(f"DENSREG_REQUIRE_EXTENSION=1, and densreg's C++ extension is not available: {UNAVAILABLE}")


_asked = os.environ.get("DENSREG_CPU_CAPABILITY")
if _asked not in (None, "avx512", "avx2", "scalar"):
    raise ImportError(f"DENSREG_CPU_CAPABILITY: expected avx512, avx2 or scalar, got {_asked!r}")


def instruction_set() -> str | None:
    """What the C++ kernels use: "avx512", "avx2" or "scalar"; None without the extension.

    The environment variable DENSREG_CPU_CAPABILITY names a lesser one than the processor has.
    """
    if _extension is None:
        return None
    _extension.densreg_instruction_set.restype = ctypes.c_char_p
    return _extension.densreg_instruction_set().decode()
