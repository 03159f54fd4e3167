"""Checks on the environment that would otherwise show as puzzling failures; and the backends."""

import collections
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
    ops.extension.load(EMULATION)

if (_reason := ops.unavailable_reason("cpu")) is not None:
    raise pytest.UsageError(f"the tests need the C++ extension, which is not available: {_reason}")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def fresh_dynamo():
    """Dynamo without anything compiled or counted, before and after."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.reset()


# Tests of operators make their tensors on this device; `python -m benchmarks gpu` runs them again with "cuda".
DEVICE = os.environ.get("DENSREG_TEST_DEVICE", "cpu")
if DEVICE != "cpu":
    torch.set_default_device(DEVICE)
    torch.backends.cudnn.allow_tf32 = False  # float32 is compared with float64


def available_backends(operators=ops.OPERATORS):
    """Those that implement any of the operators for the tests' device."""
    there = [name for name in ops.BACKENDS if ops.unavailable_reason(name) is None]
    return [name for name in there if any(ops.BACKENDS[name].implementation(one, DEVICE) for one in operators)]


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        tested = metafunc.definition.get_closest_marker("operators")
        backends = available_backends(tested.args if tested else ops.OPERATORS)
        if metafunc.definition.get_closest_marker("dispatcher"):
            backends.remove("torch")
        if metafunc.definition.get_closest_marker("host_checks"):
            backends = [name for name in backends if name != "cuda" and DEVICE == "cpu"]
        metafunc.parametrize("backend", backends, indirect=True)


@pytest.fixture
def backend(request):
    """Forces each backend in turn. Fails if another served what this one implements, or nothing was served by this."""
    before = ops.calls()
    with densreg.backend(request.param, fall_through=True):
        yield request.param
    counts = collections.Counter(ops.calls())
    counts.subtract(before)
    served = [key.split("/") for key, n in counts.items() if n]
    forced = ops.BACKENDS[request.param]
    by = {kernels for operator, kernels in served if forced.implementation(operator, DEVICE)}
    assert by <= {forced.counted_as}
    assert by or request.node.get_closest_marker("no_call"), "no operator was called"


@pytest.fixture
def operator(backend):
    """The operator of a name as the dispatcher has it, served by the backend."""
    default = torch.ops.densreg
    return lambda name: ops.BACKENDS[backend].implementation(name, DEVICE) or getattr(default, name).default
