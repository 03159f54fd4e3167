"""Checks on the environment that would otherwise show as puzzling failures; and the backends."""

import collections
import shutil

import pytest
import torch

try:
    import densreg.kernels
except ModuleNotFoundError as error:
    raise pytest.UsageError(
        "densreg is being imported from the checkout, which lacks densreg.kernels unless it is installed in editable "
        "mode: pip install -e '.[test]'"
    ) from error

from densreg import ops

if not (shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")):
    raise pytest.UsageError("torch.compile needs a C++ compiler: apt-get install g++ python3-dev")

if ops.MISSING is not None:
    raise pytest.UsageError(f"the tests need the C++ extension, which is missing: {ops.MISSING}")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def fresh_dynamo():
    """Dynamo without anything compiled, before and after."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        through_dispatcher = metafunc.definition.get_closest_marker("dispatcher")
        metafunc.parametrize("backend", ["cpu"] if through_dispatcher else ops.BACKENDS, indirect=True)


@pytest.fixture
def backend(request):
    """Forces each backend in turn, and fails if anything was served by another, or nothing by this one."""
    before = ops.calls()
    with densreg.backend(request.param):
        yield request.param
    served = collections.Counter(ops.calls())
    served.subtract(before)
    by = {key.split("/")[1] for key, n in served.items() if n}
    assert by <= {"torch" if request.param == "torch" else f"cpu-{ops.instruction_set()}"}
    assert by or request.node.get_closest_marker("no_call"), "no operator was called"
