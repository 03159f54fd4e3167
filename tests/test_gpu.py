"""What only a GPU can show; and the same checks of whole steps on whatever device the tests run on.

``DENSREG_TEST_DEVICE=cuda python -m pytest tests/test_gpu.py`` (``python -m benchmarks gpu`` does so). Without it the
steps run on the CPU, and what needs CUDA is skipped, and says so.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from conftest import DEVICE, available_backends
from reference import by_autograd, double, error, gradients, nothing
from torch import nn

import densreg
from benchmarks.second_order import problem, reference, relative_error
from densreg import _torch, ops

cuda_only = pytest.mark.skipif(DEVICE == "cpu", reason="needs DENSREG_TEST_DEVICE=cuda")
GPU_BACKENDS = [name for name, one in ops.BACKENDS.items() if "cuda" in one.devices and name in available_backends()]


def _small_convnet(dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.Flatten()
    )
    model.append(nn.Linear(8 * 3 * 3, 11))
    return model.to(DEVICE, dtype), torch.rand(6, 3, 8, 8).to(DEVICE, dtype), torch.randint(11, (6,)).to(DEVICE)


@pytest.mark.parametrize("p", [1, 1.5, 2, 4, math.inf])
def test_second_order_of_the_penalty_alone(backend, p):
    model, x = problem(torch.float64)
    model, x = model.to(DEVICE), x.detach().to(DEVICE).requires_grad_()
    grads = torch.autograd.grad(
        densreg.density_penalty(model(x), x, p), list(model.parameters()), allow_unused=True, materialize_grads=True
    )
    assert relative_error([g.cpu() for g in grads], [r.cpu() for r in reference(p)]) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize(
    "mode",  # on the CPU test_objective.py and test_second_order.py have them by inductor
    [pytest.param(mode, marks=pytest.mark.long if DEVICE == "cpu" else ()) for mode in (None, "reduce-overhead")],
)
def test_the_compiled_objective(mode, fresh_dynamo):
    """The penalty alone, by inductor: its gradient, three steps in a row, as CUDA graphs replay them."""
    model, x, y = _small_convnet(torch.float64)
    twin = copy.deepcopy(model)
    objective = densreg.RegularizedObjective(model, 1.0, criterion=nothing, mode=mode)
    for step in range(3):
        batch = x + step
        objective(batch, y).loss.backward()
        ours = [g.clone() for g in gradients(model)]
        model.zero_grad()
        assert relative_error(ours, by_autograd(twin, batch, y, 1.0, criterion=nothing)[1]) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, fresh_dynamo):
    model, x, y = _small_convnet()
    expected = by_autograd(copy.deepcopy(model).double(), x.double(), y, 1.0, criterion=nothing)[1]
    # Inductor's own C++ for a reduction in half precision did not compile with AVX2 (torch 2.14).
    compiler = "aot_eager" if DEVICE == "cpu" else "inductor"
    objective = densreg.RegularizedObjective(model, 1.0, criterion=nothing, backend=compiler)
    with torch.autocast(DEVICE, dtype):
        out = objective(x, y, loss_scale=torch.full((), 1024.0, device=DEVICE))
    (out.loss * 1024).backward()
    grads = [g / 1024 for g in gradients(model)]
    assert relative_error(grads, expected) < 0.1


@cuda_only
@pytest.mark.parametrize("name", GPU_BACKENDS)
def test_no_synchronisation(name):
    model, x, y = _small_convnet()

    def step():
        leaf = x.detach().requires_grad_()
        densreg.density_loss(model(leaf), y, leaf, 0.1)[0].backward()

    with densreg.backend(name):
        step()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def _all_operators(f, u, y):
    outputs = ops.softmax(f, y, 0.1)
    a = torch.ones_like(outputs[0])
    backward = ops.softmax_backward(f, outputs[3], y, a, a, u, 0.1)
    double = ops.softmax_double_backward(f, outputs[3], y, a, a, u)
    norm, peak, total = ops.pnorm(u, 2.0)
    return (
        *outputs, backward, *double, norm, peak, total, ops.pnorm_backward(a, u, peak, total, 2.0),
    )  # fmt: skip


@cuda_only
@pytest.mark.parametrize("classes", [10, 1000, 50_000, 400_000])
@pytest.mark.parametrize("name", GPU_BACKENDS)
def test_cuda_graph_and_side_stream(name, classes):
    """Captured and replayed on other data, and on another stream: what a plain call gives, to the last bit."""
    f, u = torch.randn(8, classes), torch.randn(8, classes)
    y = torch.randint(classes, (8,))
    with densreg.backend(name):
        _all_operators(f, u, y)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = _all_operators(f, u, y)
        for _ in range(2):
            f.normal_()
            u.normal_()
            graph.replay()
            plain = _all_operators(f, u, y)
            for a, b in zip(captured, plain, strict=True):
                assert torch.equal(a, b)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            _torch.occupy(20_000_000)  # a kernel on another stream would not wait for it
            f.normal_()
            u.normal_()
            there = _all_operators(f, u, y)
        stream.synchronize()
        for a, b in zip(there, _all_operators(f, u, y), strict=True):
            assert torch.equal(a, b)


@cuda_only
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", GPU_BACKENDS)
def test_offsets_beyond_two_to_the_31(name, dtype):
    rows, classes = 2200, 1_000_000
    if torch.cuda.mem_get_info()[0] < 4.5 * rows * classes * dtype.itemsize:
        pytest.skip("not enough memory on this GPU")
    f = torch.zeros(rows, classes, dtype=dtype)
    f[-1] = torch.randn(classes).to(dtype)
    y = torch.zeros(rows, dtype=torch.int64)
    with densreg.backend(name):
        log_density, ce, p, statistics = ops.softmax(f, y)
        wide = f[-1:].double()
        assert error(log_density[-1:], torch.logsumexp(wide, 1)) < 2e-6
        assert error(p[-1:], torch.softmax(wide, 1)) < (2e-6 if dtype == torch.float32 else 2**-7)
        del p
        grad = ops.softmax_backward(f, statistics, y, torch.ones_like(ce), None, None)
        assert error(grad[-1:], torch.softmax(wide, 1)) < (2e-6 if dtype == torch.float32 else 2**-7)
        del grad
        norm, peak, total = ops.pnorm(f, 2.0)
        dual = ops.pnorm_backward(torch.ones_like(norm), f, peak, total, 2.0)
        assert error(norm[-1:], wide.norm(dim=1)) < 2e-6
        assert error(dual[-1:], wide / wide.norm(dim=1, keepdim=True)) < (2e-6 if dtype == torch.float32 else 2**-7)
        assert not norm[:-1].any()


@cuda_only
@pytest.mark.parametrize("classes", [1000, 100_000, 1_000_000])
@pytest.mark.parametrize("name", GPU_BACKENDS)
def test_memory_is_inputs_and_outputs(name, classes):
    f = torch.randn(16, classes)
    with densreg.backend(name):
        norm, peak, total = ops.pnorm(f, 2.0)
        for call in (
            lambda: ops.softmax(f),
            lambda: ops.softmax_backward(f, None, None, None, None, f),
            lambda: ops.pnorm(f, 2.0),
            lambda: ops.pnorm_backward(norm, f, peak, total, 2.0),
        ):
            call()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            outputs = call()
            kept = torch.cuda.memory_allocated() - before
            beyond = torch.cuda.max_memory_allocated() - before - kept
            assert beyond <= 0.05 * f.numel() * 4 + (1 << 20)
            del outputs


@cuda_only
def test_the_preferred_backend_serves_compiled_and_eager_steps():
    before = ops.calls()
    x = torch.randn(4, 5, requires_grad=True)
    densreg.density_penalty(x @ torch.randn(5, 7), x).backward()
    (score,) = torch.autograd.grad(densreg.log_density(x).sum(), x, create_graph=True)
    score.sum().backward()
    served = {tuple(key.split("/")) for key, n in ops.calls().items() if n > before.get(key, 0)}
    assert served == {(name, ops.preferred(name, "cuda").name) for name in ops.OPERATORS}
    assert {name for _, name in served} <= set(GPU_BACKENDS)


@cuda_only
def test_more_than_one_gpu():
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    f = torch.randn(4, 9, device="cuda:1")
    for name in GPU_BACKENDS:
        with densreg.backend(name):
            assert error(ops.softmax(f)[2], torch.softmax(double(f), 1)) < 2e-6
