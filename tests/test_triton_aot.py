"""Every Triton kernel compiles for every target and dtype, without a GPU: no spills, loads of 16 bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: there are no Triton kernels to compile")

KERNELS = {
    *("softmax_rows", "softmax_parts"),
    *("softmax_backward_rows", "softmax_backward_parts"),
    *("pnorm_rows", "pnorm_parts", "pnorm_backward_tiles"),
}


def _report(path, *arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks", "triton-aot", "--json", str(path), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)
    return json.loads(path.read_text())["rows"]


@pytest.mark.long
def test_no_spills_and_vector_loads(tmp_path):
    """Each dtype's smallest, middle and largest tile (float16: the largest), and the split rows."""
    rows = _report(tmp_path / "report.json")
    compiled = {(row["kernel"], row["dtype"], row["target"]) for row in rows}
    dtypes = ("float16", "bfloat16", "float32", "float64")
    assert compiled == {(kernel, dtype, sm) for kernel in KERNELS for dtype in dtypes for sm in (80, 90, 100)}
    assert [row for row in rows if row["spills"] or row["stack"]] == []
    assert [row for row in rows if row["vectors_expected"] and not row["vectors"]] == []
    # What fails above must be able to: rows of 1000 and of a power of two want vectors, in every dtype.
    assert {row["dtype"] for row in rows if row["vectors_expected"]} == set(dtypes)
    assert {row["kernel"] for row in rows if row["vectors_expected"]} == KERNELS
    # Reductions take a few; a row's number, broadcast in the wrong layout, took 2051, and up to 16 times the time.
    assert max(row["shared_stores"] for row in rows) <= 32
    # A program has the registers that its warps may use.
    assert all(row["registers"] * 32 * row["warps"] <= 65536 for row in rows)


def test_every_kernel_is_reported():
    """A kernel added to kernels/ is compiled too: those with a launch of their own are the ones named here."""
    from benchmarks.triton_aot import launches

    if "TRITON_INTERPRET" in os.environ:
        pytest.skip("interpreted kernels record no launches")
    assert {launch.kernel for launch in launches("float32")} == KERNELS


def test_what_is_not_there_compiles():
    """Without labels, P and U: what the interpreter never looks at must still compile."""
    from benchmarks.triton_aot import compile_for, launches

    if "TRITON_INTERPRET" in os.environ:
        pytest.skip("interpreted kernels are not compiled")
    bare = [launch for launch in launches("float32") if launch.case.endswith("bare")]
    assert {launch.kernel for launch in bare} == {kernel for kernel in KERNELS if kernel.startswith("softmax")}
    assert not any(compile_for((launch, 90)).spills for launch in bare)


def test_one_thread_waits_for_each_number():
    """A number that several threads load may be there for one and not yet for another."""
    from benchmarks.triton_aot import launches

    if "TRITON_INTERPRET" in os.environ:
        pytest.skip("interpreted kernels record no launches")
    split = [launch for launch in launches("float32") if launch.constant("PARTS", 1) > 1]
    assert split
    assert all(launch.constant("PARTS") >= 32 * dict(launch.options)["num_warps"] for launch in split)


def test_what_is_compiled_is_found_again_where_it_fits():
    """By dtype, alignment, absence, constants, warps, and integers of more than 32 bits; not by other numbers."""
    from densreg.kernels import rows

    calls = []

    class Compiled:
        def __getitem__(self, grid):
            return lambda *arguments: calls.append(("again", grid, arguments))

    class Kernel:
        __name__ = "a kernel of this test"

        def __getitem__(self, grid):
            def first(*arguments, **options):
                calls.append(("compiled", grid, arguments))
                return Compiled()

            return first

    def launch(tensor, other=None, numbers=(3, 0.5), warps=4, **constants):
        rows.launch(Kernel(), 7, (tensor, other), numbers, warps, **{"BLOCK": 16, "SMOOTH": False} | constants)
        return calls[-1][0]

    x = torch.zeros(9)
    assert launch(x) == "compiled"
    assert launch(x) == launch(x.clone()) == launch(x, numbers=(2**31 - 1, 0.25)) == "again"
    assert calls[-1][1:] == ((7, 1, 1), (x, None, 2**31 - 1, 0.25, 16, False))
    for changed in (
        {"tensor": x.double()},
        {"tensor": x[1:]},
        {"other": x},
        {"numbers": (2**31, 0.5)},
        {"warps": 8},
        {"BLOCK": 32},
        {"SMOOTH": True},
    ):
        assert launch(**{"tensor": x} | changed) == "compiled", changed
        assert launch(**{"tensor": x} | changed) == "again", changed
