"""The package: what it exports, and that what it says of itself is true."""

from __future__ import annotations

import ast
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools
import torch

import densreg
from densreg import _torch, distributed, linear, ops

ROOT = Path(__file__).parent.parent

# Each imports only what stands before it; the lab comes after the whole library.
LIBRARY = (
    "_torch",
    "version",
    "ops",
    "functional",
    "paths",
    "penalty",
    "tiles",
    "linear",
    "distributed",
    "attacks",
    "second_order",
    "check",
    "regularizers",
    "wrapped",
    "batch",
    "directional",
    "graph_passes",
    "step",
    "head",
    "compiling",
    "results",
    "objective",
)
LAB = (
    "groups",
    "report",
    "runs",
    "options",
    "data",
    "models",
    "config",
    "training",
    "stability",
    "evaluation",
    "experiments",
    "coefficients",
    "pictures",
    "reproduce",
    "cli",
)


def test_public_names():
    for name in densreg.__all__:
        assert getattr(densreg, name).__doc__ or name == "__version__"


def test_every_operator_has_schema_fake_and_fallback():
    names = [
        name.removeprefix("densreg::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("densreg::")
    ]
    of_linear = (*linear.OPERATORS, *distributed.OPERATORS)
    for name in of_linear:  # in plain torch and the device's matrix products, on every device
        assert _torch.has_kernel(f"densreg::{name}", "CompositeExplicitAutograd")
    overloads = {one.overload for one in ops.BACKENDS.values()}
    every = {f"{name}.{overload}".rstrip(".") for name in ops.OPERATORS for overload in overloads}
    assert every | set(of_linear) == set(names)
    for name in ops.OPERATORS:
        assert _torch.has_kernel(f"densreg::{name}", "CompositeExplicitAutograd")
        assert callable(getattr(ops, name))


def _modules(package: Path) -> set[str]:
    """The names of a package's modules, and of its packages."""
    names = {path.stem for path in package.glob("*.py")} | {path.parent.name for path in package.glob("*/__init__.py")}
    return names - {"__init__", "__main__"}


def _imported(file: Path) -> set[str]:
    """The full names of what a file imports of densreg, anywhere in it."""
    nodes = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom)]
    names = {f"{node.module}.{alias.name}" for node in nodes for alias in node.names if node.module}
    return {name for name in names if name.split(".")[0] == "densreg"}


def test_nothing_lower_imports_anything_higher():
    order = [f"densreg.{name}" for name in LIBRARY] + [f"densreg.lab.{name}" for name in LAB]
    assert _modules(ROOT / "densreg") == {*LIBRARY, "lab"}
    assert _modules(ROOT / "densreg" / "lab") == set(LAB)
    for depth, layer in enumerate(order):
        path = ROOT / layer.replace(".", "/")
        for file in sorted(path.glob("*.py")) if path.is_dir() else [path.with_suffix(".py")]:
            for name in _imported(file):
                below = [other for other in order[: depth + 1] if f"{name}.".startswith(f"{other}.")]
                assert below, f"{file.name} imports {name}, which is not below {layer}"


def test_the_library_needs_torch_and_numpy_alone():
    heavy = "torchvision sklearn matplotlib PIL densreg.lab"
    script = f"import sys, densreg; print([name for name in {heavy.split()} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize(
    ("listed", "environment", "expected"),
    [
        ("9.0\n9.0\n8.6\n", {}, "8.6 9.0"),
        ("10.0\n7.5\n", {}, "10.0"),
        ("7.5\n", {}, None),
        ("[N/A]\n", {}, None),
        (None, {}, None),
        (None, {"DENSREG_CUDA": "require"}, "8.0 9.0 10.0+PTX"),
        ("8.6\n", {"TORCH_CUDA_ARCH_LIST": "12.0"}, "12.0"),
    ],
)
def test_cuda_kernels_are_built_for_the_gpus_that_are_there(listed, environment, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    build = runpy.run_path(str(ROOT / "setup.py"))
    if listed is not None:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\nprintf '{listed}'\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    for variable in ("DENSREG_CUDA", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in {"PATH": str(tmp_path), **environment}.items():
        monkeypatch.setenv(variable, value)
    mode = build["mode_of"]("DENSREG_CUDA")
    if expected is None:
        with pytest.raises(RuntimeError, match=r"no GPU of compute capability 8\.0 or later was found"):
            build["cuda_targets"](mode)
    else:
        assert build["cuda_targets"](mode) == expected


def test_a_source_tree_does_not_hide_an_installation(tmp_path):
    """Started in a checkout, Python finds the source tree first, which has no kernels unless it was built."""
    tree, installed = tmp_path / "checkout" / "densreg", tmp_path / "site" / "densreg"
    shutil.copytree(
        ROOT / "densreg", tree, ignore=shutil.ignore_patterns("*.so", "_build_info.json", "lab", "__pycache__")
    )
    shutil.copytree(tree, installed)
    (installed / "_build_info.json").write_text("{}")

    def run(*places):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, places)), "DENSREG_REQUIRE_EXTENSION": "0"}
        command = [sys.executable, "-c", "from densreg import ops; print(ops.__file__)"]
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)

    hidden = run(tree.parent, installed.parent).stderr.splitlines()[-1]
    assert hidden.startswith(f"ImportError: densreg is imported from its source tree, {tree}, which was not built and ")
    assert f"installed in {installed}: start Python in another folder, or install with pip install -e" in hidden
    assert run(installed.parent, tree.parent).stdout.strip() == str(installed / "ops" / "__init__.py")
