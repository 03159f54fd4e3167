"""Checks on the environment that would otherwise show as puzzling failures."""

import shutil

import pytest
import torch

try:
    import densreg.kernels  # noqa: F401
except ModuleNotFoundError as error:
    raise pytest.UsageError(
        "densreg is being imported from the checkout, which lacks densreg.kernels unless it is installed in editable "
        "mode: pip install -e '.[test]'"
    ) from error

if not (shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")):
    raise pytest.UsageError("torch.compile needs a C++ compiler: apt-get install g++ python3-dev")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def fresh_dynamo():
    """Dynamo without anything compiled, before and after."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
