"""Which kernel runs: forcing, counting, instruction sets, threads, memory that is not written, and what is absent."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys

import pytest
import torch
from reference import DTYPES, ORDERS

import densreg
from benchmarks.second_order import measure
from densreg import ops

KERNEL_TESTS = ["tests/test_softmax.py", "tests/test_pnorm.py"]


def _run(code_or_arguments, **environment):
    arguments = code_or_arguments if isinstance(code_or_arguments, list) else ["-c", code_or_arguments]
    return subprocess.run(  # a run that hangs is a failure, not silence
        [sys.executable, *arguments], env={**os.environ, **environment}, capture_output=True, text=True, timeout=900
    )


def test_cpu_tensors_are_served_by_the_extension():
    before = ops.calls()
    x = torch.randn(3, 4, requires_grad=True)
    densreg.density_penalty(x @ torch.randn(4, 5), x).backward()
    after = ops.calls()
    for op in ("softmax", "softmax_backward", "pnorm", "pnorm_backward"):
        key = f"{op}/cpu-{ops.instruction_set()}"
        assert after[key] - before.get(key, 0) == 1
    assert all(n == before.get(key, 0) for key, n in after.items() if key.endswith("/torch"))


def test_forcing_a_backend():
    logits = torch.randn(3, 4)
    with densreg.backend("torch"):
        before = ops.calls().get("softmax/torch", 0)
        densreg.log_density(logits)
        assert ops.calls()["softmax/torch"] == before + 1
        with densreg.backend("cpu"):
            densreg.log_density(logits)
        densreg.log_density(logits)
    assert ops.calls()["softmax/torch"] == before + 2
    with (
        pytest.raises(ValueError, match=r"backend must be one of cpu, cuda, triton, .*torch, got 'tpu'"),
        densreg.backend("tpu"),
    ):
        pass
    with densreg.backend("cpu"), pytest.raises(RuntimeError, match="does not implement softmax for tensors on meta"):
        densreg.log_density(logits.to("meta"))


def test_plain_torch_in_a_compiled_step_with_a_target(fresh_dynamo, recwarn):
    """The check of the target's classes looks at values, which a compiler cannot: it stays inside of the operator."""
    model, x, target = torch.nn.Linear(4, 5), torch.randn(3, 4), torch.tensor([0, 4, -100])
    objective = densreg.RegularizedObjective(model, coeff=1, backend="aot_eager")
    expected = densreg.RegularizedObjective(model, coeff=1, compile=False)(x, target)
    with densreg.backend("torch"):
        out = objective(x, target)
    before = ops.calls()["softmax/torch"]
    torch.testing.assert_close(objective(x, target).loss, expected.loss)  # what was compiled inside keeps it
    assert ops.calls()["softmax/torch"] == before + 1
    torch.testing.assert_close(out.loss, expected.loss)
    with pytest.raises(ValueError, match=r"expected classes in \[0, 5\)"):
        objective(x, target + 1)
    assert not [w for w in recwarn if "plain torch" in str(w.message)]


class _SoftmaxAlone(ops.registry.Backend):
    """A backend of one operator, which it counts."""

    def __init__(self, reason=None):
        super().__init__("alone", "softmax alone", ("cpu",))
        self.reason, self.served = reason, 0

    def unavailable_reason(self):
        return self.reason

    def implementation(self, operator, device):
        return self._softmax if (operator, device) == ("softmax", "cpu") else None

    def _softmax(self, *args):
        self.served += 1
        return torch.ops.densreg.softmax.default(*args)


@pytest.fixture
def registered(monkeypatch):
    """Puts a backend before all others."""

    def register(backend):
        monkeypatch.setattr(ops.registry, "BACKENDS", {backend.name: backend, **ops.BACKENDS})
        ops.registry.preferred.cache_clear()
        ops.registry._route.cache_clear()

    yield register
    ops.registry.preferred.cache_clear()
    ops.registry._route.cache_clear()


def test_a_backend_of_one_operator(registered):
    """It serves that one; what it lacks goes to the next in order, or, where it is forced, is an error."""
    alone = _SoftmaxAlone()
    registered(alone)

    def served_elsewhere():
        before = ops.calls()
        densreg.density_penalty(x @ torch.randn(4, 5), x).backward()
        return {key for key, n in ops.calls().items() if n > before.get(key, 0) and not key.startswith("softmax/")}

    x = torch.randn(3, 4, requires_grad=True)
    by_cpu = {f"{name}/cpu-{ops.instruction_set()}" for name in ("softmax_backward", "pnorm", "pnorm_backward")}
    assert served_elsewhere() == by_cpu
    assert alone.served == 1
    with densreg.backend("alone", fall_through=True):
        assert served_elsewhere() == by_cpu
    assert alone.served == 2
    with densreg.backend("alone"):
        ops.softmax(x.detach())
        with pytest.raises(RuntimeError, match="'alone' is forced, and does not implement pnorm for tensors on cpu"):
            ops.pnorm(x.detach(), 2.0)
    kernels = f"C++ kernels ({ops.instruction_set()})"
    assert {"softmax: softmax alone", f"pnorm: {kernels}"} < set(ops.describe("cpu").split(", "))


def test_a_backend_that_is_not_available(registered):
    alone = _SoftmaxAlone(reason="it is Sunday")
    registered(alone)
    ops.softmax(torch.randn(3, 4))
    assert not alone.served
    assert ops.describe("cpu") == f"C++ kernels ({ops.instruction_set()}) (alone: it is Sunday)"
    with pytest.raises(RuntimeError, match="'alone' is not available: it is Sunday"), densreg.backend("alone"):
        pass


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [1, 7, 16, 31, 32, 33, 47, 64, 100, 1023, 2049, 270_000])
def test_every_element_is_written(dtype, classes):
    """Each operator again, in memory that was full of NaN just before: to the last bit the same, and no NaN."""
    logits = torch.rand(3, classes).to(dtype)
    target = torch.zeros(3, dtype=torch.int64)

    poisoned = []

    def in_poisoned_memory(operator, *arguments):
        first = operator(*arguments)
        single = isinstance(first, torch.Tensor)
        outputs = (first,) if single else first
        poison = [torch.full_like(t, math.nan) for t in outputs for _ in range(20)]
        del poison
        poisoned.append(torch.empty_like(outputs[-1]).isnan().any())
        again = operator(*arguments)
        for a, b in zip(outputs, (again,) if single else again, strict=True):
            assert not b.isnan().any()
            assert torch.equal(a, b)
        return first

    with densreg.backend("cpu"):
        outputs = in_poisoned_memory(ops.softmax, logits, target, 0.1)
        a = torch.ones(3)
        for source, statistics in ((outputs[2], None), (logits, outputs[3])):
            in_poisoned_memory(ops.softmax_backward, source, statistics, target, a, a, logits, 0.1)
            in_poisoned_memory(ops.softmax_double_backward, source, statistics, target, a, a, logits)
        for p in ORDERS:
            norm, peak, total = in_poisoned_memory(ops.pnorm, logits, p)
            in_poisoned_memory(ops.pnorm_backward, norm, logits, peak, total, p)
    if classes > 1000:  # small blocks come from elsewhere, as it happens
        assert any(poisoned), "the allocator never gave the poisoned memory again"


def test_target_changed_behind_autograd():
    """The kernel writes at the target: one that is out of range by then must not become a write out of bounds."""
    for classes in (5, 40):
        target = torch.tensor([0, 1, 2])
        logits = torch.randn(3, classes, requires_grad=True)
        ce, _ = densreg.density_cross_entropy(logits, target)
        target.numpy()[1] = 10**12  # as a data loader reuses its buffer: autograd's version counter does not see it
        with pytest.raises(ValueError, match="target, got class 1000000000000"):
            ce.sum().backward()


@pytest.mark.dispatcher
def test_kernels_check_shapes_and_dtypes(operator):
    """What would make a kernel read past a buffer is an error, however the operator is reached."""
    f, three, two = torch.randn(3, 40), torch.zeros(3), torch.zeros(2)
    y = torch.zeros(3, dtype=torch.int64)
    statistics = torch.ones(2, 3)
    options = (0.0, -100, 1.0)
    norm, peak, total = ops.pnorm(f, 2.0)
    for name, arguments in [
        ("softmax", (f[None], None, 0.0, -100, True, 1.0)),
        ("softmax", (f, y[:2], 0.0, -100, True, 1.0)),
        ("softmax", (f, y.int(), 0.0, -100, True, 1.0)),
        ("softmax", (f, y[None], 0.0, -100, True, 1.0)),
        ("softmax_backward", (f, statistics[:, :2], None, three, None, None, *options)),
        ("softmax_backward", (f, statistics, None, two, None, None, *options)),
        ("softmax_backward", (f, statistics, y, None, two, None, *options)),
        ("softmax_backward", (f, statistics, y[:2], None, three, None, *options)),
        ("softmax_backward", (f, statistics, None, None, None, f[:2], *options)),
        ("softmax_backward", (f, statistics, None, None, None, f.double(), *options)),
        ("softmax_double_backward", (f, statistics, y, two, None, f, -100)),
        ("softmax_double_backward", (f, statistics, y, three, three, f[:2], -100)),
        ("softmax_double_backward", (f, statistics, y, three, three, f.double(), -100)),
        ("pnorm", (three, 2.0)),
        ("pnorm_backward", (norm[:2], f, peak, total, 2.0)),
        ("pnorm_backward", (norm, f, peak[:2], total, 2.0)),
    ]:
        with pytest.raises(RuntimeError, match=rf"densreg::{name}: .* must "):
            operator(name)(*arguments)


def test_half_subnormals_survive_flushing():
    """Torch's own conversions keep them under set_flush_denormal; so do ours."""
    g = torch.full((1, 40), 6e-6, dtype=torch.float16)
    expected = ops.pnorm(g, 2.0)[0]
    assert expected > 3e-5
    torch.set_flush_denormal(True)
    try:
        assert torch.equal(ops.pnorm(g, 2.0)[0], expected)
    finally:
        torch.set_flush_denormal(False)


def test_streamed_rows_are_exact_in_every_vector():
    """Rows longer than L2: their first, unaligned vector too, where f - m rounds most."""
    classes = 131_073
    logits = -(60 + torch.rand(4, classes) * 27)
    logits[:, 5000] = torch.rand(4) * 3
    p = ops.softmax(logits)[2].double()
    expected = torch.softmax(logits.double(), 1)
    normal = expected > torch.finfo(torch.float32).tiny
    assert ((p - expected)[normal] / expected[normal]).abs().max() < 3e-7


@pytest.mark.parametrize("classes", [10, 1000, 200_000])
def test_threads_do_not_change_a_bit(classes):
    logits, u = torch.randn(40, classes), torch.randn(40, classes)

    def everything():
        outputs = ops.softmax(logits, torch.arange(40) % classes)
        norm = ops.pnorm(u, 3)
        backward = ops.softmax_backward(outputs[2], None, None, None, None, u)
        return (*outputs, backward, *norm, ops.pnorm_backward(norm[0], u, *norm[1:], 3))

    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(everything())
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


_PYTEST = """
import pytest
sys.exit(pytest.main(["-q", "-x", "-W", "ignore::RuntimeWarning", *sys.argv[2:]]))
"""


@pytest.mark.parametrize("isa", [isa for isa in ("scalar", "avx2") if isa != ops.instruction_set()])
def test_lesser_instruction_sets(isa):
    """The core tests again, in a process that is held to it; the one that runs here is tested there."""
    shown = "import sys; from densreg import ops; print(ops.instruction_set())"
    arguments = ["-c", shown + _PYTEST, "", "-m", "core", "-k", "cpu", *KERNEL_TESTS]
    done = _run(arguments, DENSREG_CPU_CAPABILITY=isa)
    assert done.returncode == 0, done.stdout[-3000:]
    assert done.stdout.split()[0] in (isa, "scalar")  # scalar on a processor without AVX2
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 200


def test_an_instruction_set_that_is_not_known():
    done = _run(["-c", "import densreg"], DENSREG_CPU_CAPABILITY="AVX2")
    assert done.returncode == 1
    assert "ImportError: DENSREG_CPU_CAPABILITY: expected avx512, avx2 or scalar, got 'AVX2'" in done.stderr


_SMALL_TILES = """
import sys
from densreg.kernels import rows

assert rows.INTERPRETED
block = int(sys.argv[1])
if block:  # longer rows over programs of so many entries
    rows.TILES.update(dict.fromkeys(rows.TILES, (rows.Tile(block, 4, 1),)))
    for split in (rows.SPLIT, rows.SPLIT_PAIRS):
        split.update(dict.fromkeys(split, rows.Tile(block, 1, 1)))
"""

# The interpreter takes some 10 ms a launch of a program: rows of many parts are left to the long run.
_LONG = "long_rows or fill_a_tile or million or 50000 or 100000 or 1-n200000 or strides"
# Without the longest rows, which would be thousands of programs there.
_SPLIT = "not (1000 or 50000 or 40003 or n200000 or long_rows or long_part)"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("block", "select", "least"),
    [
        # What is compiled does not depend on the order of the norm.
        (0, f"not ({_LONG}) and not (aot_eager and not 1.5)", 100),
        # Over split rows, as a million classes are on a GPU. Of 4 entries: whole parts of -inf, of zeros, with the NaN.
        (2, "extreme_rows and (dtype1 or dtype2)", 12),
        pytest.param(0, _LONG, 90, marks=pytest.mark.long),
        pytest.param(0, "aot_eager", len(ORDERS), marks=pytest.mark.long),
        pytest.param(2, f"extreme_rows and (dtype0 or dtype3) and {_SPLIT}", 12, marks=pytest.mark.long),
        pytest.param(
            *(16, f"(values or memory_formats or strides or second_order or written) and {_SPLIT}", 30),
            marks=pytest.mark.long,
        ),
    ],
    ids=["short rows", "split rows", "long rows", "compiled", "other dtypes on split rows", "split rows of 16"],
)
def test_triton_kernels_interpreted(block, select, least):
    """On CPU tensors in Triton's interpreter: the core tests, the penalty alone against float64 at every order of the
    norm, and tests/emulation/interpreted.py. One process: its start takes seconds.
    """
    pytest.importorskip("triton")
    arguments = ["-m", "core or compile", "-k", f"(triton or interpreted) and ({select})", *KERNEL_TESTS]
    arguments += ["tests/test_backends.py", "tests/emulation/interpreted.py"]
    done = _run(["-c", _SMALL_TILES + _PYTEST, str(block), *arguments], TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= least


_WITHOUT = """
import os, pathlib, sys, warnings
import torch

real = pathlib.Path.exists
pathlib.Path.exists = lambda self: False if self.name == "_C.so" else real(self)
child = os.fork()
os.environ["DENSREG_REQUIRE_EXTENSION"] = "1" if child == 0 else "0"
import densreg  # in the child an error
print(os.waitpid(child, 0)[1] >> 8)

from benchmarks.second_order import measure
from densreg import ops

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        densreg.log_density(torch.randn(2, 3))
print(len(caught), caught[0].message)
print(ops.calls(), ops.instruction_set())
try:
    with densreg.backend("cpu"):
        pass
except RuntimeError as error:
    print(error)
for p in (1.0, 1.5, 2.0, 4.0, float("inf")):
    for compiler in sys.argv[2:]:
        if compiler == "None" or p == 1.5 or "all" in sys.argv[1]:
            print(measure("fused", p, torch.float64, None if compiler == "None" else compiler))
in_training = ("softmax", "softmax_backward", "pnorm", "pnorm_backward")
assert set(ops.calls()) == {f"{op}/torch" for op in in_training}, ops.calls()
"""


@pytest.mark.slow
@pytest.mark.compile
@pytest.mark.parametrize(
    ("orders", "compilers"),
    [
        ("one compiled", ("None", "aot_eager")),
        pytest.param("all compiled", ("aot_eager",), marks=pytest.mark.long),
        pytest.param("one compiled", ("inductor",), marks=pytest.mark.long),
    ],
)
def test_without_the_extension(orders, compilers):
    """As devices without kernels have it: what is said, and the penalty alone against float64, eager and compiled."""
    done = _run(["-c", _WITHOUT, orders, *compilers])
    assert done.returncode == 0, done.stderr[-3000:]
    required, *said = done.stdout.splitlines()
    assert required == "1"
    assert "ImportError: DENSREG_REQUIRE_EXTENSION=1, and densreg's C++ extension is not available" in done.stderr
    assert said[:3] == [
        "1 densreg runs in plain torch, several times slower (cpu: _C.so was not built)",
        "{'softmax/torch': 3} None",
        "the backend 'cpu' is not available: _C.so was not built",
    ]
    errors = [float(line) for line in said[3:]]
    assert len(errors) == (5 if "None" in compilers or "all" in orders else 0) + (orders == "one compiled")
    assert max(errors) < 1e-10


@pytest.mark.compile
@pytest.mark.parametrize("compiler", [None, "aot_eager"])
@pytest.mark.parametrize("p", ORDERS)
def test_second_order_on_each_backend(backend, p, compiler, fresh_dynamo):
    assert measure("fused", p, torch.float64, compiler) < 1e-10
