"""Every Triton kernel compiles for every target and dtype, without a GPU: no spills, loads of 16 bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

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
