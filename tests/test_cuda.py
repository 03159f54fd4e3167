"""The CUDA kernels without a GPU: what was built, and their logic compiled for the CPU (tests/emulation)."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from densreg import ops

ROOT = Path(__file__).parent.parent
SOURCES = ("csrc/cuda/softmax.cu", "csrc/cuda/pnorm.cu", "csrc/cuda/register.cpp", "tests/emulation/emulation.cpp")

built_with_cuda = pytest.mark.skipif("cuda" not in ops.build_info(), reason="the extension was built without CUDA")


def _cuobjdump() -> str | None:
    """The toolkit's, or the one that comes with Triton."""
    found = importlib.util.find_spec("triton")
    beside = Path(found.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump" if found and found.origin else None
    return shutil.which("cuobjdump") or (str(beside) if beside and beside.exists() else None)


def _targets() -> set[str]:
    """The targets of the build, as the assembler names them: sm_80."""
    listed = ops.build_info()["cuda"]["targets"].replace(";", " ").replace("+PTX", "").split()
    return {f"sm_{target.replace('.', '')}" for target in listed}


@built_with_cuda
def test_no_kernel_spills():
    """By the assembler's own account: no local memory in any kernel, for any of the targets, and all targets there."""
    cuobjdump = _cuobjdump()
    if cuobjdump is None:
        pytest.skip("no cuobjdump: it comes with the CUDA toolkit and with Triton")
    listing = subprocess.run(
        [cuobjdump, "-res-usage", str(ROOT / "densreg" / "_C.so")], capture_output=True, text=True, check=True
    ).stdout
    kernels: dict[str, dict[str, tuple[int, int]]] = {}
    target = name = ""
    for line in listing.splitlines():
        if found := re.search(r"arch = (sm_\w+)", line):
            target = found[1]
        if found := re.search(r"Function (\S+):", line):
            name = found[1]
        if found := re.search(r"REG:(\d+) STACK:(\d+)", line):
            kernels.setdefault(target, {})[name] = (int(found[1]), int(found[2]))
    assert set(kernels) == _targets()
    one, *others = (set(by_name) for by_name in kernels.values())
    assert all(other == one for other in others)
    for operation in ("softmax", "softmax_backward", "pnorm"):
        assert all(any(f"{operation}_{kind}" in name for name in one) for kind in ("rows", "fronts"))
    assert any("pnorm_backward_chunks" in name for name in one)
    spilled = [(target, name) for target, all_of in kernels.items() for name, (_, stack) in all_of.items() if stack]
    assert not spilled


@built_with_cuda
def test_every_operator_is_registered():
    for name in ops.OPERATORS:
        assert ops.BACKENDS["cuda"].implementation(name, "cuda") is not None
    if not torch.cuda.is_available():
        assert ops.unavailable_reason("cuda") == "there is no GPU"


# Each with its own tile configurations, so that rows of a few classes take every way through the kernels.
TILES = {
    "as built": [],
    # No row of more than one float32 fits on chip: chunks of 64 threads, at most three a row, of several tiles.
    "split": ["-DDENSREG_CUDA_TILES={{1,4}}", "-DDENSREG_CUDA_SPLIT={64,4}", "-DDENSREG_CUDA_MAX_CHUNKS=3"],
}


def _emulation(folder: Path, *options: str) -> str:
    """The CUDA sources compiled for the CPU, as a library that serves `softmax.cuda` and the others there."""
    torch_folder = Path(torch.__file__).parent
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or "clang++"
    library = str(folder / "emulation.so")
    # Without optimization: it would take longer than it saves.
    command = [compiler, "-std=c++20", "-O0", "-fPIC", "-fvisibility=hidden", "-w", *options]
    command += ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DTORCH_STABLE_ONLY", "-DDENSREG_CUDA_KEY=CPU"]
    command += ["-DDENSREG_CUDA_LEAD=emulation::options.lead", "-pthread"]
    command += ["-I", "tests/emulation", "-isystem", str(torch_folder / "include"), "-x", "c++", *SOURCES]
    command += ["-shared", "-o", library, f"-L{torch_folder / 'lib'}", "-Wl,--no-as-needed", "-ltorch_cpu"]
    done = subprocess.run([*command, "-Wl,-Bsymbolic"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return library


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tiles", "left_out", "least"),
    [
        # What is compiled, and opcheck, do not depend on how a row is held.
        ("as built", "aot_eager and not 1.5", 200),
        ("split", "aot_eager or opcheck", 200),
    ],
)
def test_emulated_kernels(tiles, left_out, least, tmp_path):
    """On the CUDA sources, by the same counters: the core tests, opcheck, the penalty alone against float64 at every
    order of the norm, eager and compiled, and tests/emulation/checks.py. One process: its start takes seconds.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "core or dispatcher or compile"]
    command += ["-k", f"(cuda or checks) and not ({left_out})"]
    command += ["tests/test_softmax.py", "tests/test_pnorm.py", "tests/test_backends.py", "tests/emulation/checks.py"]
    environment = {"OMP_NUM_THREADS": "1", "DENSREG_TEST_EMULATION": _emulation(tmp_path, *TILES[tiles])}
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    passed = re.fullmatch(r"(\d+) passed, \d+ deselected.*", done.stdout.splitlines()[-1])
    assert passed is not None, "a test was skipped"
    assert int(passed[1]) > least
