"""The package: what it exports, and that what it says of itself is true."""

from __future__ import annotations

import ast
import runpy
from pathlib import Path

import pytest
import setuptools
import torch

import densreg
from densreg import ops

ROOT = Path(__file__).parent.parent

LAYERS = (
    *("version", "ops", "functional", "paths", "penalty", "attacks", "second_order", "regularizers", "directional"),
    *("merge", "objective", "groups", "runs", "data", "models", "training", "stability", "evaluation", "reproduce"),
    "cli",
)


def test_public_names():
    for name in densreg.__all__:
        assert getattr(densreg, name).__doc__ or name == "__version__"


def test_every_operator_has_schema_fake_and_fallback():
    names = [
        name.removeprefix("densreg::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("densreg::")
    ]
    wanted = set(ops.OPERATORS)
    assert wanted | {f"{name}.{overload}" for name in wanted for overload in ("cuda", "triton")} == set(names)
    for name in wanted:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"densreg::{name}", "CompositeExplicitAutograd")
        assert callable(getattr(ops, name))


def test_nothing_lower_imports_anything_higher():
    for depth, layer in enumerate(LAYERS):
        files = [ROOT / "densreg" / f"{layer}.py"]
        if not files[0].exists():  # a package, whose modules are of one layer
            files = sorted((ROOT / "densreg" / layer).glob("*.py"))
        for node in (node for file in files for node in ast.walk(ast.parse(file.read_text()))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "densreg":
                parts = node.module.split(".")
                used = parts[1:2] or [alias.name for alias in node.names]
                assert all(LAYERS.index(name) < depth for name in used if name in LAYERS and name != layer), (
                    layer,
                    used,
                )
    listed = {p.stem for p in (ROOT / "densreg").glob("*.py")} - {"__init__"}
    listed |= {p.parent.name for p in (ROOT / "densreg").glob("*/__init__.py")}
    assert listed == set(LAYERS)


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
