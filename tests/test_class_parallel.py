"""densreg.distributed: several processes (gloo) against one with logits, in float64; what does not fit together."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from test_linear import arcface, by_logits, cosface, half_problem, head_problem
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import densreg
from benchmarks.second_order import parameter_gradient, relative_error, torch_penalty
from densreg import _torch, linear

ROOT = Path(__file__).parent.parent
inf, f64 = float("inf"), torch.float64
WORLD = 4

# --------------------------------------------------------------------------------------------------------------------
# processes


START = """
import os, sys
sys.path[:0] = [{root!r}, {tests!r}]
import test_class_parallel as tests  # what takes long is imported once

rank, others = 0, []
for other in range(1, tests.WORLD):
    if rank == 0:
        others.append(os.fork())
        rank = 0 if others[-1] else other
tests.start(rank, {what!r}, {out!r})
if rank == 0:
    for other in others:
        os.waitpid(other, 0)
os._exit(0)
"""


def start(rank: int, what: str, out: str) -> None:
    """One process: what every case reports, as JSON."""
    torch.set_num_threads(1)
    timeout = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=WORLD, timeout=timeout)
    report: dict[str, object] = {}
    for name, case in {"right": RIGHT, "errors": ERRORS}[what].items():
        try:
            report[name] = case()
        except Exception as error:
            report[name] = f"{type(error).__name__}: {error}"
        Path(out, f"{rank}.json").write_text(json.dumps(report))


def processes(what: str, out: Path) -> list[dict]:
    """The reports of all ranks."""
    script = START.format(root=str(ROOT), tests=str(ROOT / "tests"), what=what, out=str(out))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(WORLD)]


GROUPS: dict[int, object] = {}


def group_of(world: int):
    """The first processes, which all make; None for the others."""
    if not GROUPS:
        for n in (2, 3):
            GROUPS[n] = dist.new_group(range(n))
        GROUPS[WORLD] = dist.group.WORLD
    return GROUPS[world] if dist.get_rank() < world else None


# --------------------------------------------------------------------------------------------------------------------
# several processes against one


def off(ours, expected) -> float:
    return float((ours - expected).norm() / max(expected.norm(), 1e-3))


def mean_of(t: torch.Tensor, group) -> torch.Tensor:
    t = t.detach().clone()
    dist.all_reduce(t, group=group)
    return t / dist.get_world_size(group)


def loss_case(
    sizes, rows=2, masked=(), bias=True, tile=3, kind="plain", scale=1.0, ignored=(), targets=(), low=0.0, **options
):
    """The largest error of the loss, its terms, and the gradients of each, in trunk and shard.

    Args:
        masked: classes whose logit is -inf; the target of all rows is the first behind them, but
        targets: of the first rows.
        low: added to every logit.
    """

    def case():
        group = group_of(len(sizes))
        if group is None:
            return 0.0
        rank, world = dist.get_rank(group), len(sizes)
        trunk, weight, offset, x, y = head_problem(sum(sizes), rows=rows * world, bias=bias)
        with torch.no_grad():
            weight.mul_(scale)
            if low:
                offset.add_(low)
            for i in masked:
                offset[i] = -inf
        y = y % sum(sizes)
        if masked:
            y[:] = max(masked) + 1
        y[: len(targets)] = torch.tensor(targets, dtype=y.dtype)
        for i in ignored:
            y[i] = options.get("ignore_index", -100)
        shard = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        part = slice(rank * rows, (rank + 1) * rows)

        my_x = x[part].detach().clone().requires_grad_()
        head = [weight[shard]] if offset is None else [weight[shard], offset[shard]]
        head = [t.detach().clone().requires_grad_() for t in head]
        given = head
        if kind == "dtensor":
            mesh = dist.DeviceMesh.from_group(group, "cpu")
            whole = [weight] if offset is None else [weight, offset]
            head = given = [nn.Parameter(distribute_tensor(t.detach(), mesh, [Shard(0)])) for t in whole]
            assert [len(t.to_local()) for t in head] == [sizes[rank]] * len(head)
        arguments = {"p": 2, "tile": tile, "classes": sum(sizes)} | options
        if kind != "dtensor":
            arguments["group"] = group
        parameters = [*trunk.parameters(), *head]

        def terms(x):
            w, b = [*given, None][:2]
            return densreg.distributed.linear_density_loss(trunk(x), w, b, y[part], x, 0.3, **arguments)

        grad = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
        if kind == "compiled":

            def step(x):
                of = terms(x)
                return [(t, *torch.autograd.grad(t, parameters, **grad)) for t in of]

            compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
            with _torch.tracing_autograd():
                ours = compiled(my_x)
        else:
            ours = [(t, *torch.autograd.grad(t, parameters, **grad)) for t in terms(my_x)]
        options_of_torch = {k: v for k, v in options.items() if k in ("label_smoothing", "ignore_index", "margin")}
        p = options.get("p", 2)
        expected = by_logits(trunk(x), weight, offset, y, x, 0.3, p=p, **options_of_torch)
        inputs = [*trunk.parameters(), weight] + ([] if offset is None else [offset])
        errors = []
        for (value, *grads), right in zip(ours, expected, strict=True):
            errors.append(off(mean_of(value, group), right.detach()))
            wide = torch.autograd.grad(right, inputs, **grad)
            for i, (a, b) in enumerate(zip(grads, wide, strict=True)):
                if i < len(inputs) - len(head):
                    a = mean_of(a, group)
                elif kind == "dtensor":
                    assert isinstance(a, DTensor)
                    assert a.placements == (Shard(0),)
                    a = a.full_tensor()
                else:
                    b = b[shard]
                errors.append(off(a, b))
        return max(errors) if all(e == e for e in errors) else inf

    return case


def half_case(dtype, amp, narrow):
    """The medians of the penalty gradient's errors: class-parallel, and on one process."""

    def case():
        group, errors = group_of(2), {True: [], False: []}
        if group is None:
            return 0.0
        rank = dist.get_rank()
        right = linear.product_dtype
        if narrow:
            linear.product_dtype = lambda h, weight: dtype
        for seed in range(8):
            model, x = half_problem(f64, seed)
            expected = parameter_gradient(model, x, torch_penalty(2))
            for several in errors:
                model, x = half_problem(torch.float32 if amp else dtype, seed)
                last, trunk = model[-1], model[:-1]
                sizes = [20, 30] if several else [50]
                first = sum(sizes[:rank]) if several else 0
                shard = slice(first, first + sizes[rank if several else 0])
                part = slice(rank * 3, rank * 3 + 3) if several else slice(0, 6)
                x = x[part].detach().clone().requires_grad_()
                head = [t[shard].detach().clone().requires_grad_() for t in (last.weight, last.bias)]
                y = torch.zeros(len(x), dtype=torch.int64)
                with torch.autocast("cpu", dtype, enabled=amp):
                    f = densreg.distributed.linear_density_loss if several else densreg.linear_density_loss
                    more = {"group": group} if several else {}
                    penalty = f(trunk(x), *head, y, x, 1.0, tile=16, **more)[2]
                assert penalty.dtype == torch.float32
                of_trunk = list(trunk.parameters())
                grads = torch.autograd.grad(penalty, [*of_trunk, *head], materialize_grads=True, allow_unused=True)
                grads = [g.double() for g in grads]
                if several:
                    whole = [mean_of(g, group) for g in grads[: len(of_trunk)]]
                    for g, full in zip(grads[len(of_trunk) :], (last.weight, last.bias), strict=True):
                        all_rows = torch.zeros(full.shape, dtype=f64)
                        all_rows[shard] = g
                        dist.all_reduce(all_rows, group=group)
                        whole.append(all_rows)
                    grads = whole
                errors[several].append(relative_error(grads, expected))
        linear.product_dtype = right
        return statistics.median(errors[True]) / statistics.median(errors[False])

    return case


def rows_case():
    """Cross-entropy, log density and correct of :func:`densreg.distributed.linear_density_cross_entropy`."""
    sizes, rank = [3, 0, 5, 4], dist.get_rank()
    _, weight, bias, _, y = head_problem(12, rows=8)
    h = torch.randn(8, 7, dtype=f64)
    y[:4] = (h @ weight.T + bias).argmax(1)[:4]
    y[2] = -100
    shard, part = slice(sum(sizes[:rank]), sum(sizes[: rank + 1])), slice(2 * rank, 2 * rank + 2)
    h, w, b = (t.detach().clone().requires_grad_() for t in (h, weight, bias))
    ce, density, correct = densreg.distributed.linear_density_cross_entropy(h[part], w[shard], b[shard], y[part], 0.1)
    expected = densreg.linear_density_cross_entropy(h, w, b, y, 0.1)
    ours = torch.autograd.grad((ce + 0.5 * density).sum(), [h, w])
    theirs = torch.autograd.grad((expected[0] + 0.5 * expected[1]).sum(), [h, w])
    assert torch.equal(correct, expected[2][part])
    assert expected[2].sum() >= 3
    errors = [off(ce, expected[0][part]), off(density, expected[1][part]), off(ours[0][part], theirs[0][part])]
    return max(*errors, off(ours[1][shard] * WORLD, theirs[1][shard]))


def different_terms_case():
    """One process differentiates its cross-entropy, the others their penalty."""
    sizes, rank = [3, 4, 4, 1], dist.get_rank()
    trunk, weight, bias, x, y = head_problem(12, rows=8)
    shard, part = slice(sum(sizes[:rank]), sum(sizes[: rank + 1])), slice(2 * rank, 2 * rank + 2)
    my_x = x[part].detach().clone().requires_grad_()
    head = [t[shard].detach().clone().requires_grad_() for t in (weight, bias)]
    parameters = list(trunk.parameters())
    of = densreg.distributed.linear_density_loss(trunk(my_x), *head, y[part], my_x, 0.3, label_smoothing=0.1)
    grads = torch.autograd.grad(of[1 if rank == 0 else 2], parameters + head, materialize_grads=True, allow_unused=True)
    logits = torch.nn.functional.linear(trunk(x), weight, bias)
    (score,) = torch.autograd.grad(logits.logsumexp(1).sum(), x, create_graph=True)
    ce = torch.nn.functional.cross_entropy(logits[:2], y[:2], label_smoothing=0.1, reduction="sum")
    right = torch.autograd.grad((ce + score.norm(dim=1)[2:].sum()) / 8, [*parameters, weight, bias])
    right = [*right[:-2], right[-2][shard], right[-1][shard]]
    ours = [mean_of(g, None) for g in grads[: len(parameters)]] + list(grads[len(parameters) :])
    return max(map(off, ours, right))


def optimizer_case():
    """AdamW on a DTensor head trains it as one process does a plain one."""
    trunk, weight, _, x, y = head_problem(6, rows=8)
    rank, mesh = dist.get_rank(), init_device_mesh("cpu", (WORLD,))
    part = slice(2 * rank, 2 * rank + 2)
    results = []
    for sharded in (True, False):
        w = nn.Parameter(distribute_tensor(weight.detach(), mesh, [Shard(0)]) if sharded else weight.detach().clone())
        optimizer = torch.optim.AdamW([w], 0.1)
        for _ in range(2):
            my_x = (x[part] if sharded else x).detach().clone().requires_grad_()
            f = densreg.distributed.linear_density_loss if sharded else densreg.linear_density_loss
            f(trunk(my_x), w, None, y[part] if sharded else y, my_x, 0.3)[0].backward()
            torch.nn.utils.clip_grad_norm_([w], 0.01)
            optimizer.step()
            optimizer.zero_grad()
        results.append(w.full_tensor() if sharded else w)
    assert (results[1] - weight).norm() > 0.1
    return off(results[0].detach(), results[1].detach())


def repeated_case():
    """Two runs, bit by bit."""
    runs = []
    for _ in range(2):
        trunk, weight, bias, x, y = head_problem(8, rows=3, dtype=torch.float32)
        loss, *_ = densreg.distributed.linear_density_loss(trunk(x), weight, bias, y, x, 0.3)
        runs.append([loss, *torch.autograd.grad(loss, [weight, bias, *trunk.parameters()])])
    return 0.0 if all(torch.equal(a, b) for a, b in zip(*runs, strict=True)) else inf


RIGHT = {
    "even": loss_case([6, 6]),
    "a class, and the others": loss_case([1, 11], label_smoothing=0.1),
    "does not divide": loss_case([7, 7, 6], margin=arcface, label_smoothing=0.2),
    "an empty shard": loss_case([2, 2, 1, 0], ignore_index=3, ignored=(1, 4, 5)),
    "a process's targets all ignored": loss_case([4, 5, 6], ignored=(2, 3), label_smoothing=0.1),
    "masked class, p = 1": loss_case([1, 40, 31, 31], masked=(4,), p=1, tile=16),
    "masked shard": loss_case([3, 4], masked=(0, 1, 2), tile=2),
    "all but one masked": loss_case([3, 4], masked=range(6)),
    # Of these rows exp(-L) is infinite, and the sum over the shard's other classes is 0.
    "only the target in a shard": loss_case([1, 11], targets=(0, 4, 0, 11), low=-800.0),
    "all others of a shard masked": loss_case([3, 4], masked=(0, 1), targets=(2, 5, 2, 3), low=-800.0, tile=2),
    "no bias, margin, p = inf": loss_case([5, 1, 4], bias=False, margin=cosface, p=inf),
    "large logits": loss_case([5, 4], scale=50.0),
    "one row, tile by size": loss_case([3, 3, 3, 4], rows=1, tile=None, p=1.5),
    "DTensor": loss_case([3, 3, 3, 1], kind="dtensor"),
    "DTensor, no bias, a part of the processes": loss_case([4, 3], kind="dtensor", bias=False),
    "compiled": loss_case([5, 4], kind="compiled"),
    "rows": rows_case,
    "different terms": different_terms_case,
    "optimizer": optimizer_case,
    "repeated": repeated_case,
}
HALF = {
    f"{dtype!s}, amp {amp}, narrow {narrow}": half_case(dtype, amp, narrow)
    for dtype in (torch.bfloat16, torch.float16)
    for amp, narrow in ((True, False), (False, True))
}
RIGHT |= HALF


def test_several_processes_against_one(tmp_path):
    for rank, report in enumerate(processes("right", tmp_path)):
        assert list(report) == list(RIGHT)
        for name, error in report.items():
            assert isinstance(error, float), f"{name}, process {rank}: {error}"
            assert error < (1.25 if name in HALF else 1e-12), f"{name}, process {rank}"


# --------------------------------------------------------------------------------------------------------------------
# errors: the same case in all processes, one of which is given something else


def given(of_rank, **change):
    """A call in which the processes of ``of_rank`` are given something else."""

    def case():
        rank = dist.get_rank()
        mine = change if rank in of_rank else {}
        torch.manual_seed(0)
        dtype, rows, features = mine.get("dtype", f64), mine.get("rows", 2), mine.get("features", 5)
        x = torch.randn(rows, features, dtype=dtype, requires_grad=True)
        arguments = {
            "weight": torch.randn(3, mine.get("width", features), dtype=dtype, requires_grad=True),
            "bias": None,
            "target": torch.full((rows,), 11),
            "x": x,
            "coeff": 0.1,
        }
        arguments |= {k: v for k, v in mine.items() if k in (*arguments, "ignore_index", "classes", "label_smoothing")}
        if mine.get("kind") == "cross-entropy":
            return densreg.distributed.linear_density_cross_entropy(
                2 * x, arguments["weight"], None, torch.zeros(2).long()
            )
        loss, *_ = densreg.distributed.linear_density_loss(2 * x, **arguments)
        loss.backward(create_graph="create_graph" in mine)
        return "no error"

    return case


def placed(shape, placements, bias=False):
    """A call whose weight is a DTensor, and the bias, if there is one, a plain tensor."""

    def case():
        x = torch.randn(2, 5, requires_grad=True)
        weight = distribute_tensor(torch.randn(8, 5), init_device_mesh("cpu", shape), placements)
        plain = torch.zeros(2) if bias else None
        return str(densreg.distributed.linear_density_loss(2 * x, weight, plain, torch.zeros(2).long(), x, 0.1))

    return case


def outsider_case():
    group = dist.new_group([0, 1])
    x = torch.randn(2, 5, requires_grad=True)
    if dist.get_rank() < 2:
        return "no error"
    weight = torch.randn(2, 5)
    return str(densreg.distributed.linear_density_loss(2 * x, weight, None, torch.ones(2).long(), x, 0.1, group=group))


def nccl_alone_case():
    config = dist.get_backend_config
    dist.get_backend_config = lambda group: "cuda:nccl"
    try:
        return given([])()
    finally:
        dist.get_backend_config = config


def late_case():
    """The last one does not come within the group's timeout."""
    group = dist.new_group(range(WORLD), timeout=timedelta(seconds=2))
    x, weight = torch.randn(2, 5, requires_grad=True), torch.randn(2, 5)
    begin = time.monotonic()
    if dist.get_rank() == WORLD - 1:
        time.sleep(6)
        return "no error"
    try:
        densreg.distributed.linear_density_loss(2 * x, weight, None, torch.ones(2).long(), x, 0.1, group=group)
    finally:
        assert time.monotonic() - begin < 6, "longer than the timeout"
    return "no error"


def death_case():
    """The last one dies between forward and backward."""
    x, weight = torch.randn(2, 5, requires_grad=True), torch.randn(2, 5, requires_grad=True)
    loss, *_ = densreg.distributed.linear_density_loss(2 * x, weight, None, torch.ones(2).long(), x, 0.1)
    if dist.get_rank() == WORLD - 1:
        os._exit(0)
    loss.backward()
    return "no error"


ERRORS = {
    "rows": given([1], rows=3),
    "features": given([2, 3], features=6),
    "dtype": given([1], dtype=torch.float32),
    "do not fit": given([1], width=6),
    "bias": given([0], bias=torch.zeros(3, dtype=f64)),
    "target": given([2], target=torch.tensor([0, 12])),
    "negative target": given([0], target=torch.tensor([0, -1])),
    "ignore_index": given([3], ignore_index=-1),
    "label smoothing": given([3], label_smoothing=0.1),
    "classes": given(range(WORLD), classes=13),
    "classes of one": given([0], classes=12),
    "functions": given([1], kind="cross-entropy"),
    "coeff": given([3], coeff=-1.0),
    "create_graph": given(range(WORLD), create_graph=True),
    "placement": placed((WORLD,), [Replicate()]),
    "mesh": placed((2, 2), [Replicate(), Shard(0)]),
    "one of them plain": placed((WORLD,), [Shard(0)], bias=True),
    "outsider": outsider_case,
    "NCCL alone": nccl_alone_case,
    "as it should be": given([]),
    "late": late_case,
    "death": death_case,
}
IN_ALL = {
    "rows": "ValueError: h: shape: expected the same in all processes, got, in the order of their ranks, "
    "[2, 5], [3, 5], [2, 5], [2, 5]",
    "features": "ValueError: h: shape: expected the same in all processes, got",
    "dtype": "ValueError: h: dtype: expected the same in all processes, got, in the order of their ranks, "
    "torch.float64, torch.float32, torch.float64, torch.float64",
    "bias": "ValueError: bias: dtype: expected the same in all processes, got, in the order of their ranks, "
    "torch.float64, None, None, None",
    "target": "ValueError: target holds class 12; expected classes in [0, 12) or ignore_index=-100",
    "negative target": "ValueError: target holds class -1; expected classes in [0, 12) or ignore_index=-100",
    "ignore_index": "ValueError: ignore_index: expected the same",
    "label smoothing": "ValueError: label_smoothing > 0: expected the same",
    "classes": "ValueError: weight: expected 13 classes in all shards, got 3 + 3 + 3 + 3 = 12",
    "classes of one": "ValueError: classes: expected the same in all processes, got, in the order of their ranks, "
    "12, None, None, None",
    "functions": "ValueError: penalty: expected the same",
    "create_graph": "RuntimeError: the class-parallel head can be differentiated once",
    "placement": "ValueError: weight: expected a DTensor on a mesh of one dimension with placements [Shard(0)], got "
    "[Replicate()] on a mesh of shape [4]",
    "mesh": "ValueError: weight: expected a DTensor on a mesh of one dimension",
    "one of them plain": "TypeError: bias: expected a DTensor, as the other one of weight and bias, got a plain tensor",
    "NCCL alone": "RuntimeError: group: expected one that takes tensors in host memory too, as of init_process_group"
    '("cpu:gloo,cuda:nccl"), got cuda:nccl',
    "as it should be": "no error",
}
OF_ONE = {
    "do not fit": (1, "ValueError: weight: expected shape [classes, 5], got [3, 6]"),
    "coeff": (3, "ValueError: coeff must be at least 0, got -1.0"),
}


def test_one_clear_error_in_every_process(tmp_path):
    reports = processes("errors", tmp_path)
    for rank, report in enumerate(reports):
        assert list(report) == list(ERRORS)[: None if rank < WORLD - 1 else -1]
        for name, message in IN_ALL.items():
            assert report[name].startswith(message), f"{name}, process {rank}"
            assert "\n" not in report[name]
        for name, (where, message) in OF_ONE.items():
            other = f"RuntimeError: process {where} of {WORLD} failed: {message}"
            assert report[name] == (message if rank == where else other), f"{name}, process {rank}"
        belongs = "RuntimeError: group: expected one that this process belongs to, got another"
        assert report["outsider"] == ("no error" if rank < 2 else belongs)
        for name in ("late", "death"):
            if rank < WORLD - 1:
                assert report[name].startswith("RuntimeError: the class-parallel head's "), f"{name}, process {rank}"
                assert "another one has died, or did not come within the group's timeout" in report[name]


def test_without_a_process_group():
    x, weight = torch.randn(2, 5, requires_grad=True), torch.randn(3, 5)
    with pytest.raises(RuntimeError, match=r"expected a process group, got none: call .*init_process_group first"):
        densreg.distributed.linear_density_loss(2 * x, weight, None, torch.zeros(2).long(), x, 0.1)
