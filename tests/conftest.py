"""Checks on the environment that would otherwise show as puzzling failures; and the backends."""

import collections
import ctypes
import importlib.util
import os
import shutil

# pytest -n: each process has its share of the cores, so that they do not wait for one another. Set before torch is
# imported, and for the processes that tests start.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    _share = max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    os.environ.setdefault("OMP_NUM_THREADS", str(_share))
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(_share))

import pytest
import torch

if importlib.util.find_spec("densreg.kernels") is None:
    raise pytest.UsageError(
        "densreg is being imported from the checkout, which lacks densreg.kernels unless it is installed in editable "
        "mode: pip install -e '.[test]'"
    )

import densreg
from densreg import ops

if not (shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")):
    raise pytest.UsageError("torch.compile needs a C++ compiler: apt-get install g++ python3-dev")

# The CUDA kernels compiled for the CPU (tests/emulation), in the processes that tests/test_cuda.py starts.
EMULATION = os.environ.get("DENSREG_TEST_EMULATION")
if EMULATION:
    torch.ops.load_library(EMULATION)
    _emulation = ctypes.CDLL(EMULATION)
    _emulation.densreg_calls.restype = ctypes.c_int64
    ops._extensions.append(_emulation)

if ops.MISSING is not None:
    raise pytest.UsageError(f"the tests need the C++ extension, which is missing: {ops.MISSING}")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def fresh_dynamo():
    """Dynamo without anything compiled or counted, before and after."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


# Tests of operators make their tensors on this device; `python -m benchmarks gpu` runs them again with "cuda".
DEVICE = os.environ.get("DENSREG_TEST_DEVICE", "cpu")
if DEVICE != "cpu":
    torch.set_default_device(DEVICE)
    torch.backends.cudnn.allow_tf32 = False  # float32 is compared with float64


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        backends = [name for name in ops.BACKENDS if ops.missing(name) is None and ops._serves(name, DEVICE)]
        if metafunc.definition.get_closest_marker("dispatcher"):
            backends.remove("torch")
        if metafunc.definition.get_closest_marker("host_checks"):
            backends = [name for name in backends if name != "cuda" and DEVICE == "cpu"]
        metafunc.parametrize("backend", backends, indirect=True)


@pytest.fixture
def backend(request):
    """Forces each backend in turn, and fails if anything was served by another, or nothing by this one."""
    before = ops.calls()
    with densreg.backend(request.param):
        yield request.param
    served = collections.Counter(ops.calls())
    served.subtract(before)
    by = {key.split("/")[1] for key, n in served.items() if n}
    assert by <= {f"cpu-{ops.instruction_set()}" if request.param == "cpu" else request.param}
    assert by or request.node.get_closest_marker("no_call"), "no operator was called"


@pytest.fixture
def operator(backend):
    """The operator of a name as the dispatcher has it, served by the backend."""
    overload = "default" if backend == "cpu" else backend
    return lambda name: getattr(getattr(torch.ops.densreg, name), overload)
