"""Two processes (gloo) train as one does on the joined batch: one's own loop, and densreg train."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from densreg import RegularizedObjective
from densreg.lab import models

ROOT = Path(__file__).parent.parent

CASES = (  # compiled, path, head
    (False, "fused", None),
    (True, "fused", None),
    (False, "directional", None),
    (True, "fused", "3"),
)

LOOP = """
import os, sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
sys.path[:0] = [{root!r}, {tests!r}]
from densreg import RegularizedObjective
from test_distributed import CASES, batches, network

other = os.fork()  # what takes long is imported once
rank = int(other == 0)
dist.init_process_group("gloo", init_method="file://{out}/store", rank=rank, world_size=2)
for compiled, path, head in CASES:
    objective = RegularizedObjective(network(), 0.5, compile=compiled, backend="aot_eager", path=path, head=head)
    model = DDP(objective)
    optimizer = torch.optim.SGD(objective.parameters(), 0.1)
    for x, y in batches():
        optimizer.zero_grad()
        out = model(x[rank::2], y[rank::2])
        out.loss.backward()
        optimizer.step()
    if rank == 0:
        torch.save(objective.model.state_dict(), f"{out}/{{compiled}}-{{path}}-{{head}}.pt")
    del model, out
dist.destroy_process_group()
if rank == 0:
    sys.exit(os.waitpid(other, 0)[1] >> 8)
"""


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(144, 5)).double()


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(6, 3, 8, 8, generator=generator, dtype=torch.float64),
            torch.randint(5, (6,), generator=generator),
        )
        for _ in range(3)
    ]


def finished(*command: str, cwd: Path) -> subprocess.CompletedProcess:
    process = subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        stdout, stderr = process.communicate(timeout=600)
    except subprocess.TimeoutExpired:
        process.terminate()  # upon which torchrun stops its workers; a kill would leave them there
        stdout, stderr = process.communicate()
        pytest.fail(f"it hangs: {stderr[-3000:]}")
    assert process.returncode == 0, stderr[-3000:]
    return subprocess.CompletedProcess(command, 0, stdout, stderr)


def torchrun(*command: str, cwd: Path) -> subprocess.CompletedProcess:
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *command]
    return finished(*run, cwd=cwd)


def test_own_loop(tmp_path):
    values = {"root": str(ROOT), "tests": str(ROOT / "tests"), "out": str(tmp_path)}
    finished(sys.executable, "-c", LOOP.format(**values), cwd=tmp_path)
    for compiled, path, head in CASES:
        model = network()
        objective = RegularizedObjective(model, 0.5, compile=False, path=path)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        before = [w.clone() for w in model.parameters()]
        for x, y in batches():
            optimizer.zero_grad()
            objective(x, y).loss.backward()
            optimizer.step()
        weights = torch.load(tmp_path / f"{compiled}-{path}-{head}.pt", weights_only=True)
        assert list(weights) == list(model.state_dict()), "the bare model's keys"
        tolerance = 1e-13 if path == "fused" else 1e-6
        for w, old, other in zip(model.parameters(), before, weights.values(), strict=True):
            assert (w - old).abs().max() > 1e-3
            torch.testing.assert_close(w.detach(), other, rtol=tolerance, atol=tolerance)


SHARDED = """
import os, sys, torch, torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel as DDP
sys.path[:0] = [{root!r}, {tests!r}]
import densreg
from densreg import RegularizedObjective
from test_distributed import batches, network

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
(x, y), *_ = batches()

def gradients(model, encoder=None):
    leaf = x.clone().requires_grad_()
    given = leaf if encoder is None else encoder(leaf)
    logits = model(given)
    densreg.density_penalty(logits, given).backward()
    return [None if w.grad is None else w.grad.clone() for w in model.parameters()]

def sharded(part=False):
    model = network()
    inner = fully_shard(model[3] if part else model)
    inner.set_reshard_after_backward(False)
    return model

def parallel():
    model = nn.Sequential(network(), nn.Linear(5, 4).double(), nn.Linear(4, 5).double())
    return parallelize_module(model, mesh, {{"1": ColwiseParallel(), "2": RowwiseParallel()}})

def refused(kind, message, function):
    try:
        given = function()
    except kind as error:
        assert message in str(error), error
    else:
        raise SystemExit(f"no error: {{message}}, {{given}}")

refused(TypeError, "the model is sharded (FSDP)", lambda: RegularizedObjective(fully_shard(network()), 0.5)(x, y))
refused(TypeError, "the model is sharded (FSDP)", lambda: fully_shard(RegularizedObjective(network(), 0.5))(x, y))
refused(RuntimeError, "sharded (FSDP2, fully_shard)", lambda: gradients(sharded()))
refused(RuntimeError, "sharded (FSDP2, fully_shard)", lambda: gradients(sharded(part=True)))
refused(RuntimeError, "sharded (FSDP2, fully_shard)", lambda: densreg.density_loss(
    sharded()(x.requires_grad_()), y, x, 0.1))
refused(RuntimeError, "sharded (FSDP1)", lambda: gradients(
    FullyShardedDataParallel(network(), device_id=torch.device("cpu"))))
refused(RuntimeError, "weights are sharded DTensors", lambda: gradients(parallel()))
refused(RuntimeError, "static_graph=True", lambda: gradients(DDP(network(), static_graph=True)))

# Where the constructor does not see it.
def after(wrap, steps=0, **options):
    model = network()
    objective = RegularizedObjective(model, 0.5, compile=False, **options)
    for _ in range(steps):
        objective(x, y).loss.backward()
    wrapper = wrap(model)
    return objective(x, y)

def beside(**options):
    (part,) = options.values()
    objective = RegularizedObjective(network(), 0.5, compile=False, **options)
    fully_shard(part)
    return objective(x, y)

wrapped = DDP(network())
class Criterion(nn.Linear):
    def forward(self, logits, target):
        return nn.functional.cross_entropy(super().forward(logits), target)

for function in (lambda: after(DDP), lambda: after(lambda model: DDP(model[3])), lambda: after(DDP, interval=None),
                 lambda: after(DDP, steps=2), lambda: after(lambda model: DDP(model[3]), steps=1),
                 lambda: RegularizedObjective(wrapped.module, 0.5, path="directional")(x, y)):
    refused(TypeError, "is wrapped in DistributedDataParallel, which does not average", function)
for compiled, path in ((True, "fused"), (False, "directional")):
    refused(TypeError, "the model's weights are DTensors", lambda: RegularizedObjective(
        parallel(), 0.5, compile=compiled, backend="aot_eager", path=path)(x, y))
for options in ({{"criterion": Criterion(5, 5).double()}}, {{"output": nn.Linear(5, 5).double()}}):
    ((name, part),) = options.items()
    refused(TypeError, f"the {{name}} is wrapped", lambda: RegularizedObjective(network(), 0.5, **{{name: DDP(part)}}))
    refused(TypeError, "the model is sharded (FSDP)", lambda: beside(**options))
def delayed():
    model = network()
    delay = {{"delay_all_reduce_named_params": [("model.3.weight", model[3].weight)],
             "param_to_hook_all_reduce": model[0].weight}}
    return DDP(RegularizedObjective(model, 0.5, compile=False), **delay)(x, y)

refused(TypeError, "without delay_all_reduce_named_params", delayed)

def changed(change, again=False):
    model = network()
    model[0].requires_grad_(False)
    objective = RegularizedObjective(model, 0.5, compile=False)
    wrapper = DDP(objective, find_unused_parameters=True)
    for _ in range(2):
        wrapper(x.detach(), y).loss.backward()
    change(model)
    wrapper = DDP(objective) if again else wrapper
    wrapper(x.detach(), y).loss.backward()

for change in (lambda model: model[0].requires_grad_(), lambda model: setattr(model, "3", nn.Linear(144, 5).double()),
               lambda model: model.load_state_dict(network().state_dict(), assign=True)):
    refused(RuntimeError, "is trained only since DistributedDataParallel was made", lambda: changed(change))
    changed(change, again=True)
changed(lambda model: model[3].bias.requires_grad_(False))
changed(lambda model: model.load_state_dict(network().state_dict()))
DDP(RegularizedObjective(wrapped.module, 0.5, compile=False))(x.detach(), y).loss.backward()  # plain steps by another
distilled = Criterion(5, 5).double()
distilled.teacher = fully_shard(network().requires_grad_(False))
RegularizedObjective(network(), 0.5, compile=False, criterion=distilled)(x, y).loss.backward()
assert distilled.weight.grad.abs().max() > 1e-3

plain = distribute_tensor(x.detach(), mesh, [Replicate()])
refused(TypeError, "x must be a plain tensor, got a DTensor", lambda: densreg.density_penalty(
    network()(x), plain.requires_grad_()))
# What is right stays: a wrapper without sharding, and a sharded part that is before x.
expected = gradients(network())
for model, encoder in ((DDP(network()), None), (DDP(network(), find_unused_parameters=True), None),
                       (network(), fully_shard(nn.Identity()))):
    for a, b in zip(gradients(model, encoder), expected, strict=True):
        torch.testing.assert_close(a, b)
assert max(g.abs().max() for g in expected if g is not None) > 1e-3

class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = network(), nn.Linear(2, 2)

    def forward(self, x):
        return self.used(x)

def twice(compiled, find):
    objective = RegularizedObjective(Unused(), 0.5, compile=compiled, backend="aot_eager")
    model = DDP(objective, find_unused_parameters=find)
    for _ in range(2):
        model(x.detach(), y).loss.backward()
    return [w.grad for w in objective.model.unused.parameters()]

for compiled in (False, True):  # as in torch: an error, or no gradient, and no zeros that a weight decay goes by
    refused(RuntimeError, "Expected to have finished reduction", lambda: twice(compiled, False))
    assert twice(compiled, True) == [None, None]
print("refused", flush=True)
os._exit(0)  # taking FSDP's process group down has crashed on torch 2.11
"""


def test_what_loses_gradients_is_refused(tmp_path):
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED.format(root=str(ROOT), tests=str(ROOT / "tests")))
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "refused\n", done.stderr[-3000:]


@pytest.mark.long
def test_densreg_train_and_resume(tmp_path):
    def command(out: str, *more: str) -> list[str]:
        options = ["--train-size", "256", "--test-size", "50", "--batch-size", "32", "--epochs", "2", "--threads", "1"]
        return ["-m", "densreg", "train", *options, "--out", str(tmp_path / out), *more]

    done = torchrun(*command("two"), cwd=ROOT)
    assert done.stdout.count("epoch 1/2") == 1, "one process speaks"
    subprocess.run([sys.executable, *command("one")], cwd=ROOT, check=True, capture_output=True)
    one, two = (models.load_checkpoint(tmp_path / name)[0].state_dict() for name in ("one", "two"))
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=1e-4, atol=1e-6)
    torchrun(*command("parts", "--max-steps", "5"), cwd=ROOT)
    torchrun(*command("parts", "--resume"), cwd=ROOT)
    parts = models.load_checkpoint(tmp_path / "parts")[0].state_dict()
    assert all(torch.equal(parts[key], two[key]) for key in two)
    refused = subprocess.run([sys.executable, *command("parts", "--resume")], cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "has 2 processes, got 1" in refused.stderr
