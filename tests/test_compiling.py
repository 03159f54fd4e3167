"""torch's caches of compiled steps: what they take, and that nothing is taken from them that has changed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from reference import Sine
from torch import nn

import densreg
from densreg import _torch, compiling, functional, second_order
from densreg.compiling import CheckedBackend

pytestmark = pytest.mark.compile

TESTS = Path(__file__).parent

STEPS = """
import json, sys, torch
from reference import by_autograd, gradients, nothing
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from densreg import RegularizedObjective, compiling

def step(p=2.0):
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    attention = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, activation="gelu", batch_first=True)
    layers = nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(2), attention, nn.Flatten(), nn.Linear(8, 3)
    model = nn.Sequential(*layers).double()
    x, y = torch.randn(2, 1, 3, 3, dtype=torch.float64), torch.tensor([0, 2])
    with sdpa_kernel(SDPBackend.MATH):
        expected = by_autograd(model, x, y, 1.0, p, nothing)[1]
    RegularizedObjective(model, 1.0, p=p, criterion=nothing)(x, y).loss.backward()
    pairs = zip(gradients(model), expected, strict=True)
    error = max(float((g - e).norm()) for g, e in pairs) / max(float(e.norm()) for e in expected)
    return dict(torch._dynamo.utils.counters["aot_autograd"]), error

steps = [step()]
if sys.argv[1] == "changes":
    steps.append(step(p=1.0))
    compiling._sources = lambda: "another version"
    steps.append(step())
print(json.dumps(steps))
"""


@pytest.mark.long
def test_another_process_takes_the_step_from_the_cache(tmp_path):
    """Unless the order of the norm or densreg's code is another; and what it takes has the right second order."""
    environment = {"PYTHONPATH": os.pathsep.join((str(TESTS.parent), str(TESTS))), "PYTHONHASHSEED": "random"}
    found = []
    for what in ("first", "changes"):
        done = subprocess.run(
            [sys.executable, "-c", STEPS, what],
            env={**os.environ, **environment, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == 0, done.stderr
        found += json.loads(done.stdout.splitlines()[-1])
    outcomes = [
        {word for word in ("hit", "miss", "bypass") if f"autograd_cache_{word}" in counts} for counts, _ in found
    ]
    assert outcomes == [{"miss"}, {"hit"}, {"miss"}, {"miss"}]
    assert max(error for _, error in found) < 1e-10


@torch.compiler.allow_in_graph
class _Users(Sine):
    """Marked, as a user's has to be."""


def test_only_densregs_functions_are_said_to_be_cacheable(fresh_dynamo):
    """And the key says which backend serves them; a Function of the user's may change at any time."""
    seen = []

    def keep(graph, inputs):
        targets = {node.target for node in graph.graph.nodes if node.op == "call_function"}
        seen.append((targets, torch._inductor.config.unsafe_marked_cacheable_functions))
        return graph.forward

    conv, x = nn.Conv2d(1, 2, 2), torch.randn(2, 1, 3, 3)

    def step(x):
        with densreg.fast_second_order():
            return densreg.log_density(_Users.apply(conv(x)).flatten(1))

    for backend in ("cpu", "torch"):
        torch.compiler.reset()
        with densreg.backend(backend):
            torch.compile(step, backend=CheckedBackend(None, keep, True), fullgraph=True)(x)
    (targets, marked), (_, otherwise) = seen
    ours = {second_order._Conv.in_graph, functional._Softmax.in_graph}
    assert ours <= targets
    assert set(marked) == {f"{f.__module__}.{f.__name__}" for f in ours}
    assert any("trampoline" in target.__name__ for target in targets)
    assert set(marked) == set(otherwise)
    assert not set(marked.values()) & set(otherwise.values())


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Flatten(), nn.Linear(32, 3)),
        nn.Sequential(nn.Conv1d(4, 4, 3), nn.Hardsigmoid(), nn.Flatten(), nn.Linear(24, 3)),
        nn.Sequential(nn.Flatten(), nn.BatchNorm1d(32), nn.GELU(), nn.Dropout(), nn.Linear(32, 3)),
    ],
    ids=["attention", "convolution", "dropout"],
)
def test_torchs_cache_takes_the_step(fresh_dynamo, model):
    """Or a new process would trace and differentiate it anew; it has no error for what it does not take."""
    taken = []

    def inner(graph, inputs):
        taken.append(torch._functorch._aot_autograd.autograd_cache.check_cacheable(graph))  # raises
        return graph.forward

    densreg.RegularizedObjective(model, 0.1, backend=inner)(torch.randn(2, 4, 8), torch.tensor([0, 2]))
    assert taken


def test_the_key_does_not_depend_on_the_order_of_a_set():
    keys = []
    for functions in ([second_order._Conv, functional._Softmax], [functional._Softmax, second_order._Conv]):
        with _torch.cacheable([function.in_graph for function in functions], "key"):
            keys.append(list(torch._inductor.config.unsafe_marked_cacheable_functions))
    assert keys[0] == keys[1]


def test_the_key_has_the_sources_of_what_a_graph_is_made_of(monkeypatch):
    monkeypatch.setattr(compiling._torch, "get_hash_for_files", lambda files: "\n".join(files).encode())
    names = {Path(file).name for file in bytes.fromhex(compiling._sources.__wrapped__()).decode().splitlines()}
    assert {"functional.py", "second_order.py", "linear.py", "step.py", "softmax.py", "pnorm.py"} <= names
