"""Private names of torch stay in densreg/_torch.py, but for the few that are allowed elsewhere by name."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parent.parent
HOMES = (ROOT / "densreg" / "_torch.py", Path(__file__))  # this file has names to be found


def _files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


LIBRARY = _files("densreg", "kernels")

ALLOWED = {
    # to() and load_state_dict() of a module above; no public name, and they cannot be overridden elsewhere
    "densreg": {
        f"{owner}.{name}"
        for owner in ("RegularizedObjective", "super()")
        for name in ("_apply", "_load_from_state_dict")
    },
    "benchmarks": {"torch._softmax_backward_data"},  # a rival: what torch itself computes
    "examples": {"torch._dynamo.config.patch"},  # as the documentation tells users, who have no other name for it
    "tests": {
        "torch._dynamo.utils.counters",  # graph breaks, hits of the cache, what densreg's passes did
        "torch._dynamo.testing.CompileCounterWithBackend",  # graphs of one compiled function
        "torch._functorch._aot_autograd.autograd_cache",  # what torch's cache takes
        "torch._dynamo.graph_break",  # where a user's model has one
        "torch._inductor.config",  # its caches, its random numbers and the pass that a user may have set
        "torch._C._dispatch_get_all_op_names",  # that no operator of densreg is forgotten
        "torch.overrides._get_current_function_mode_stack",  # that no mode is left behind
        "torch._higher_order_ops",  # what a user's model may call, which has no public name yet
        "torch._foreach_mul_",  # a change in place that must be seen, as is the next
        "o.model._modules.update",
        "cli._parser()._actions",  # argparse's: the parser of one command
    },
}
"""By folder; "densreg" with the kernels. A name stands also for what begins with it and a dot."""

PUBLIC = {"_asdict", "_fields", "_make", "_replace", "_exit"}
"""Of named tuples and os, documented under these names."""


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


def _own(files: list[Path]) -> set[str]:
    """The names of files, and of all that they define."""
    defined = (_defined(ast.parse(path.read_text())) for path in files)
    return {path.stem for path in files}.union(*defined) - TORCH | PUBLIC


OWN = _own(LIBRARY)


def private_names(source: str, own: set[str] = OWN) -> list[str]:
    """The private names of others that a source uses: densreg's own, and those of named tuples, are not among them.

    - what it imports, but from densreg;
    - every attribute, of whatever it may be, that densreg gives to nothing of its own, with all the dotted name that
      it is in; ``self._buffers`` is torch's;
    - the name that getattr and the like are given, and every string that is the name of something of torch;
    - a method that overrides one of torch's;
    - what torch calls the nodes of its autograd graphs.
    """
    found = []
    tree = ast.parse(source)
    above = {node.value: node for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if _private(alias.name)]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] not in ("", "densreg"):
            found += [name for alias in node.names if _private(name := f"{node.module}.{alias.name}")]
        elif isinstance(node, ast.Attribute) and _private(node.attr) and node.attr not in own:
            whole = node
            while whole in above:
                whole = above[whole]
            found.append(ast.unparse(whole))
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


@pytest.mark.parametrize("folder", ALLOWED)
def test_private_names_of_torch_are_in_one_module(folder):
    """And what is allowed elsewhere is in use there."""
    files = LIBRARY if folder == "densreg" else _files(folder)
    own = OWN if folder == "densreg" else OWN | _own([*files, *_files("benchmarks")])
    used = set()
    for path in files:
        for name in [] if path in HOMES else private_names(path.read_text(), own):
            allowed = {one for one in ALLOWED[folder] if f"{name}.".startswith(f"{one}.")}
            assert allowed, f"{path}: expected a function of densreg/_torch.py for {name}"
            used |= allowed
    assert used == ALLOWED[folder]


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import torch._dynamo", "torch._dynamo"),
        ("from torch.utils._pytree import tree_map", "torch.utils._pytree.tree_map"),
        ("from torch import _foreach_mul", "torch._foreach_mul"),
        ("import torch\ndef f(x):\n    return torch._C._x(x)", "torch._C._x"),
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
        "from __future__ import annotations\nfrom densreg.functional import _Function\nself._steps = self.__dict__\n"
        "batch._replace(xs=())\n'see torch._dynamo.config'\ntorch.compiler.allow_in_graph(f)\n'_'"
    )
    assert private_names(source, OWN | {"_steps"}) == []
