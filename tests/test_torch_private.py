"""Private names of torch stay in densreg/_torch.py."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parent.parent
FILES = sorted([*(ROOT / "densreg").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])
HOME = ROOT / "densreg" / "_torch.py"

OVERRIDDEN = {
    f"{owner}.{name}"
    for owner in ("RegularizedObjective", "super()")
    for name in ("_apply", "_load_from_state_dict")  # to() and load_state_dict() of a module above; no public name
}
"""Methods of torch's that a class overrides, which cannot be done elsewhere."""

PUBLIC = {"_asdict", "_fields", "_make", "_replace"}
"""Of named tuples."""


def _private(name: str) -> bool:
    """Whether a part of a dotted name begins with one underscore."""
    return any(re.fullmatch(r"_[^\W_]\w*", part) for part in name.split("."))


TORCH = {
    name for owner in (nn.Module(), torch.Tensor, torch.autograd.Function) for name in dir(owner) if _private(name)
}
"""What is torch's also where densreg defines it too: that overrides it."""


def _defined(tree: ast.AST) -> Iterator[str]:
    """Every name that a file gives to something."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.id if isinstance(node, ast.Name) else node.attr


OWN = {path.stem for path in FILES}.union(*(_defined(ast.parse(path.read_text())) for path in FILES)) - TORCH | PUBLIC


def private_names(source: str, own: set[str] = OWN) -> list[str]:
    """The private names of others that a source uses: densreg's own, and those of named tuples, are not among them.

    - what it imports, but from densreg;
    - every attribute, of whatever it may be, that densreg gives to nothing of its own; ``self._buffers`` is torch's;
    - the name that getattr and the like are given, and every string that is the name of something of torch;
    - a method that overrides one of torch's;
    - what torch calls the nodes of its autograd graphs.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if _private(alias.name)]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] not in ("", "densreg"):
            found += [name for alias in node.names if _private(name := f"{node.module}.{alias.name}")]
        elif isinstance(node, ast.Attribute) and _private(node.attr) and node.attr not in own:
            found.append(ast.unparse(node))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            dotted = re.fullmatch(r"torch(\.\w+)+", node.value) and _private(node.value)
            if dotted or node.value in TORCH or re.fullmatch(r"torch::\S+|\w*Backward\d*", node.value):
                found.append(repr(node.value))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr", "hasattr", "delattr"):
            name = getattr(node.args[1], "value", "")
            if _private(str(name)) and name not in own:
                found.append(repr(name))
        elif isinstance(node, ast.ClassDef):
            methods = [each.name for each in node.body if isinstance(each, ast.FunctionDef)]
            found += [f"{node.name}.{name}" for name in methods if name in TORCH]
    return found


@pytest.mark.parametrize("path", [path for path in FILES if path != HOME], ids=lambda path: path.name)
def test_private_names_of_torch_are_in_one_module(path):
    found = set(private_names(path.read_text())) - OVERRIDDEN
    assert not found, f"expected a function of densreg/_torch.py for {', '.join(found)}"


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import torch._dynamo", "torch._dynamo"),
        ("from torch.utils._pytree import tree_map", "torch.utils._pytree.tree_map"),
        ("from torch import _foreach_mul", "torch._foreach_mul"),
        ("import torch\ndef f(x):\n    return torch._C._x(x)", "torch._C"),
        ("x._version", "x._version"),
        ("self._buffers", "self._buffers"),
        ("getattr(model, '_orig_mod', model)", "'_orig_mod'"),
        ("patch('torch._inductor.config')", "'torch._inductor.config'"),
        ("class A(nn.Module):\n    def _apply(self, fn): pass", "A._apply"),
        ("node.name() == 'AddBackward0'", "'AddBackward0'"),
        ("node.name() == 'torch::autograd::Error'", "'torch::autograd::Error'"),
    ],
)
def test_each_kind_is_found(source, name):
    assert name in private_names(source)


def test_what_is_public_is_not_found():
    source = (
        "from __future__ import annotations\nfrom densreg.penalty import _norm\nself._steps = self.__dict__\n"
        "batch._replace(xs=())\n'see torch._dynamo.config'\ntorch.compiler.allow_in_graph(f)\n'_'"
    )
    assert private_names(source, OWN | {"_steps"}) == []
