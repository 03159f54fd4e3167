"""Compiled steps: torch's caches of them, compiling anew, what does not compile, and what the first step says."""

from __future__ import annotations

import copy
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference import Layer, Net, Sine, by_autograd, gradients, nothing
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils import prune

import densreg
from benchmarks.second_order import relative_error
from densreg import RegularizedObjective, _torch, compiling, functional, second_order
from densreg.compiling import CheckedBackend, explanation

pytestmark = pytest.mark.compile

TESTS = Path(__file__).parent
Y = torch.tensor([0, 1, 2, 3, 4])

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


def test_no_silent_eager(fresh_dynamo):
    """What cannot be one graph is an error that says so, and leaves the model as it was."""

    def breaks(x):
        torch._dynamo.graph_break()
        return x

    model = nn.Sequential(nn.BatchNorm2d(3), Layer(breaks), nn.Flatten(), nn.Linear(192, 7))
    with pytest.raises(RuntimeError, match=r"could not be compiled as one graph.*compile=False"):
        RegularizedObjective(model, 0.5, backend="aot_eager")(torch.randn(5, 3, 8, 8), Y)
    assert int(model[0].num_batches_tracked) == 0
    assert torch.equal(model[0].running_mean, torch.zeros(3))


# --------------------------------------------------------------------------------------------------------------------
# compiling again and again


def _mixup(logits: Tensor, target: Any) -> Tensor:
    ya, yb, lam = target
    return lam * F.cross_entropy(logits, ya) + (1 - lam) * F.cross_entropy(logits, yb)


def test_numbers_in_a_target_do_not_compile_anew(fresh_dynamo):
    model, x = Net(nn.Tanh()).double(), torch.randn(5, 4, dtype=torch.float64)
    twin = copy.deepcopy(model)
    counter = CompileCounterWithBackend("eager")
    objective = RegularizedObjective(model, 0.5, backend=counter, criterion=_mixup)
    for lam in (0.25, 0.75, np.float32(0.1)):
        model.zero_grad()
        objective(x, (Y, Y.flip(0), lam)).loss.backward()
        _, expected = by_autograd(twin, x, (Y, Y.flip(0), float(lam)), 0.5, criterion=_mixup)
        assert relative_error(gradients(model), expected) < 1e-10
    assert counter.frame_count == 1


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_compiling_again_and_again_is_told_once(fresh_dynamo, monkeypatch):
    """A number that is no float may choose what the criterion does, and stays what it is."""
    monkeypatch.setitem(compiling.DYNAMO_OPTIONS, "recompile_limit", 8)
    model = Net(nn.Tanh())
    objective = RegularizedObjective(model, 0.5, backend="eager", criterion=_mixup)
    x, told = torch.randn(5, 4), r"compiled 6 times, the last time because of: .*target.* == 4.*tensors for numbers"
    for number in range(5):
        objective(x, (Y, Y, number))
    with pytest.warns(RuntimeWarning, match=told):
        objective(x, (Y, Y, 5))
    for number in (6, 7):
        objective(x, (Y, Y, number))
    with pytest.raises(RuntimeError, match=r"compiled 8 times, .*target.*compile=False"):
        objective(x, (Y, Y, 9))


# --------------------------------------------------------------------------------------------------------------------
# what does not compile


class _Keeps(nn.Module):
    def __init__(self, kept=None):
        super().__init__()
        self.kept = kept

    def forward(self, x):
        y = x.tanh()
        self.kept = y if self.kept is None else [y]
        return y


def _pruned(layer):
    prune.l1_unstructured(layer, "weight", 0.3)
    return layer


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (
            lambda: nn.utils.weight_norm(nn.Linear(6, 6)),
            r"\(Linear\).*attribute 'weight'.*parametrizations\.weight_norm",
        ),
        (lambda: nn.utils.spectral_norm(nn.Linear(6, 6)), r"\(Linear\).*'weight'.*parametrizations\.spectral_norm"),
        (lambda: _pruned(nn.Linear(6, 6)), r"\(Linear\).*'weight'.*prune\.remove"),
        (_Keeps, r"\(_Keeps\).*attribute 'kept'.*keep it detached"),
        (lambda: nn.BatchNorm1d(6, momentum=None), r"\(BatchNorm1d\): momentum=None.*give it a momentum"),
        (lambda: _Keeps([]), r"\(_Keeps\).*attribute 'kept'.*keep it detached"),
        (lambda: Layer(lambda x: print(x.sum()) or x), r"\(Layer\): it calls a builtin of Python.*leave it out"),
        (
            lambda: Layer(lambda x: x.tanh() if x.sum() > 0 else x.sin()),
            r"\(Layer\).*a tensor's value decides.*torch\.where",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
def test_what_does_not_compile_is_named(layer, words, fresh_dynamo):
    """Layer, reason and remedy; in eager the step runs."""
    model, x = Net(nn.Sequential(nn.Tanh(), layer())), torch.randn(5, 4)
    with pytest.raises(RuntimeError, match=rf"one graph: body\.1 {words}.*compile=False"):
        RegularizedObjective(model, 0.5, backend="aot_eager")(x, Y)
    RegularizedObjective(model, 0.5, compile=False)(x, Y)


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (lambda: torch.jit.script(nn.Tanh()), r"(ScriptModules|torch\.jit\.script/freeze modules) unsupported"),
        (lambda: Layer(BY_NAME), "(hardsigmoid_backward is not implemented|RuntimeError when making fake tensor call)"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated")
def test_why_something_does_not_compile(layer, words, fresh_dynamo):
    model, x = Net(layer()), torch.randn(5, 4)
    with pytest.raises(RuntimeError, match=rf"one graph: .*{words}.*compile=False"):
        RegularizedObjective(model, 0.5, backend="aot_eager")(x, Y)
    RegularizedObjective(model, 0.5, compile=False)(x, Y)


BY_NAME = F.hardsigmoid  # as "from torch.nn.functional import hardsigmoid" has it


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled", "ignore:Error detected in")
def test_anomaly_detection_is_named(fresh_dynamo):
    with (
        torch.autograd.detect_anomaly(),
        pytest.raises(RuntimeError, match=r"one graph: .*detect_anomaly.*leave it out"),
    ):
        RegularizedObjective(Net(nn.Tanh()), 0.5, backend="aot_eager")(torch.randn(5, 4), Y)


def test_a_subclass_of_tensor_is_named():
    class Image(Tensor):
        pass

    x = torch.randn(5, 4).as_subclass(Image)
    assert explanation(RuntimeError("no"), nn.Tanh(), (x,)) == (
        "x is of Image, a subclass of Tensor: give x.as_subclass(torch.Tensor)"
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.long)])
@pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled")
def test_two_results_of_one_reduction_compile(dtype, fresh_dynamo):
    """inductor's own C++ declares one name twice there, and is not compiled."""

    def twice(x):
        return x.sum(0), x.sum(0).view(4, 8)

    x = torch.randint(-4, 4, (64, 32)).to(dtype)
    compiled = torch.compile(twice, backend=CheckedBackend(None, "inductor", penalized=True))
    with torch._inductor.config.patch(force_disable_caches=True):
        for a, b in zip(compiled(x), twice(x), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.slow
def test_bfloat16_compiles_on_the_cpu(fresh_dynamo):
    conv = (nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.SiLU(), nn.AdaptiveAvgPool2d(1))
    model, x = nn.Sequential(*conv, nn.Flatten(), nn.Linear(16, 7)), torch.randn(5, 3, 8, 8)
    _, expected = by_autograd(copy.deepcopy(model).double(), x.double(), Y, 1.0, criterion=nothing)
    with torch.autocast("cpu", torch.bfloat16):
        out = RegularizedObjective(model, 1.0, criterion=nothing)(x, Y)
    out.loss.backward()
    assert relative_error(gradients(model), expected) < 0.05


# --------------------------------------------------------------------------------------------------------------------
# the first step says that it compiles


FIRST = (
    r"the first training step compiles, .*compile=False",
    r"the first training step took \d+\.\d s with its compil",
)


@pytest.mark.parametrize("level", ["NOTSET", "INFO", "WARNING"])
def test_the_first_step_says_that_it_compiles(level, fresh_dynamo, monkeypatch, caplog):
    """On a terminal, unless logging shows it or hides it; and once."""
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    caplog.set_level(level, logger="densreg")
    objective, x = RegularizedObjective(Net(nn.Tanh()), 0.5, backend="eager"), torch.randn(5, 4)
    for _ in range(2):
        objective(x, Y)
    RegularizedObjective(Net(nn.Tanh()), 0.5, compile=False)(x, Y)
    logged = [record.getMessage() for record in caplog.records if record.name == "densreg"]
    shown = terminal.getvalue().splitlines()
    assert (len(logged), len(shown)) == {"NOTSET": (0, 2), "INFO": (2, 0), "WARNING": (0, 0)}[level]
    for line, expected in zip(logged or shown, FIRST, strict=False):
        assert re.search(expected, line)


def test_the_first_step_writes_nothing_into_a_file(fresh_dynamo, capsys):
    RegularizedObjective(Net(nn.Tanh()), 0.5, backend="eager")(torch.randn(5, 4), Y)
    assert capsys.readouterr() == ("", "")
