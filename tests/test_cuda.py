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
from reference import ORDERS

from densreg import ops

ROOT = Path(__file__).parent.parent
KERNEL_TESTS = ["tests/test_softmax.py", "tests/test_pnorm.py"]
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
    for operation in ("softmax_rows", "softmax_finish", "softmax_backward_rows", "pnorm_rows", "pnorm_backward_chunks"):
        assert any(operation in name for name in one)
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
    command = [compiler, "-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-w", *options]
    command += ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DTORCH_STABLE_ONLY", "-DDENSREG_CUDA_KEY=CPU"]
    command += ["-I", "tests/emulation", "-isystem", str(torch_folder / "include"), "-x", "c++", *SOURCES]
    command += ["-shared", "-o", library, f"-L{torch_folder / 'lib'}", "-Wl,--no-as-needed", "-ltorch_cpu"]
    done = subprocess.run([*command, "-Wl,-Bsymbolic"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return library


@pytest.fixture(scope="module", params=TILES.values(), ids=TILES)
def emulation(request, tmp_path_factory):
    return _emulation(tmp_path_factory.mktemp("emulation"), *request.param)


def _run(*arguments, **environment):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_emulated_kernels(emulation):
    """The core tests on the CUDA sources, by the same counters: nothing but them may serve a call."""
    command = ["-m", "pytest", "-q", "-x", "-m", "core", "-k", "cuda", *KERNEL_TESTS]
    done = _run(*command, DENSREG_TEST_EMULATION=emulation)
    assert done.returncode == 0, done.stdout[-3000:]
    passed = re.fullmatch(r"(\d+) passed, \d+ deselected.*", done.stdout.splitlines()[-1])
    assert passed is not None, "a test was skipped"
    assert int(passed[1]) > 200


@pytest.mark.slow
@pytest.mark.parametrize("emulation", [TILES["as built"]], ids=["as built"], indirect=True)
def test_emulated_operators_keep_their_schema(emulation):
    """opcheck, which does not depend on how a row is held."""
    command = ["-m", "pytest", "-q", "-x", "-k", "cuda and opcheck", *KERNEL_TESTS]
    done = _run(*command, DENSREG_TEST_EMULATION=emulation)
    assert re.match(r"8 passed, \d+ deselected", done.stdout.splitlines()[-1]), done.stdout[-3000:]


@pytest.mark.slow
def test_second_order_by_emulated_kernels(emulation):
    """The penalty alone against float64, at every order of the norm: eager, and compiled as one graph."""
    select = "test_second_order_on_each_backend and cuda"
    done = _run("-m", "pytest", "-q", "-x", "-k", select, "tests/test_backends.py", DENSREG_TEST_EMULATION=emulation)
    assert done.returncode == 0, done.stdout[-3000:]
    assert re.search(rf"\b{2 * len(ORDERS)} passed", done.stdout), done.stdout[-300:]


_IN_ANY_ORDER = """
import ctypes, os, torch
import densreg
from densreg import ops
torch.ops.load_library(os.environ["DENSREG_TEST_EMULATION"])
torch.manual_seed(0)
with densreg.backend("cuda"):
    for dtype in (torch.float32, torch.bfloat16):
        for classes in (3, 10, 100, 1000, 9000, 33_000):
            logits, u = torch.randn(5, classes).to(dtype), torch.randn(5, classes).to(dtype)
            outputs = ops.softmax(logits, torch.arange(5) % classes, 0.1)
            backward = ops.softmax_backward(logits, outputs[3], None, torch.ones(5), None, u)
            norms = ops.pnorm(u, 3.0)
            for t in (*outputs, backward, *norms, ops.pnorm_backward(norms[0], u, *norms[1:], 3.0)):
                print(t.double().sum().item().hex(), t.double().abs().max().item().hex())
"""


def test_threads_in_any_order(emulation):
    """What a missing barrier lets through in one order shows in the other; the sums are the same to the last bit."""
    one, other = (
        _run("-c", _IN_ANY_ORDER, DENSREG_TEST_EMULATION=emulation, **order)
        for order in ({}, {"DENSREG_EMULATION_ORDER": "reverse"})
    )
    assert one.returncode == 0, one.stderr[-3000:]
    assert one.stdout.count("\n") == 2 * 6 * 9
    assert other.stdout == one.stdout


_OUT_OF_RANGE = """
import os, torch
import densreg
from densreg import ops
torch.ops.load_library(os.environ["DENSREG_TEST_EMULATION"])
with densreg.backend("cuda"):
    ops.softmax(torch.randn(3, 4), torch.tensor([0, -100, 3]))
    print("in range")
    CALL
"""


@pytest.mark.parametrize(
    "call",
    [
        "ops.softmax(torch.randn(3, 4), torch.tensor([0, 4, 3]))",
        "ops.softmax_backward(torch.ones(3, 4), None, torch.tensor([0, -1, 3]), None, torch.ones(3), None)",
    ],
)
def test_class_out_of_range_is_a_device_assert(emulation, call):
    done = _run("-c", _OUT_OF_RANGE.replace("CALL", call), DENSREG_TEST_EMULATION=emulation)
    assert done.stdout == "in range\n"
    assert "a target is out of range" in done.stderr


_SHAPES = """
import os, torch
import densreg
from densreg import ops
torch.ops.load_library(os.environ["DENSREG_TEST_EMULATION"])
f, y, three = torch.randn(3, 40), torch.zeros(3, dtype=torch.int64), torch.zeros(3)
statistics = torch.ones(2, 3)
options = (0.0, -100, 1.0)
with densreg.backend("cuda"):
    norm, peak, total = ops.pnorm(f, 2.0)
k = torch.ops.densreg
for operator, arguments in [
    (k.softmax, (f[None], None, 0.0, -100, True, 1.0)),
    (k.softmax, (f, y[:2], 0.0, -100, True, 1.0)),
    (k.softmax, (f, y.int(), 0.0, -100, True, 1.0)),
    (k.softmax_backward, (f, statistics[:, :2], None, three, None, None, *options)),
    (k.softmax_backward, (f, statistics, None, three[:2], None, None, *options)),
    (k.softmax_backward, (f, statistics, y, None, three[:2], None, *options)),
    (k.softmax_backward, (f, statistics, None, None, None, f[:2], *options)),
    (k.softmax_backward, (f, statistics, None, None, None, f.double(), *options)),
    (k.pnorm, (three, 2.0)),
    (k.pnorm_backward, (norm[:2], f, peak, total, 2.0)),
]:
    try:
        operator.cuda(*arguments)
    except RuntimeError as error:
        assert " must " in str(error), error
    else:
        raise SystemExit(f"{operator} took {[getattr(a, 'shape', a) for a in arguments]}")
print("checked")
"""


def test_kernels_check_shapes_and_dtypes(emulation):
    done = _run("-c", _SHAPES, DENSREG_TEST_EMULATION=emulation)
    assert done.stdout == "checked\n", done.stderr[-2000:]
