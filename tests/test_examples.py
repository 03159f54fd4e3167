"""The examples run as they are, and what they compute is right."""

from __future__ import annotations

import difflib
import functools
import runpy
import socket
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from densreg import _torch

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def run(monkeypatch):
    """Runs an example in this process, and gives the names that it has at its end."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        return types.SimpleNamespace(**runpy.run_path(str(EXAMPLES / name), run_name="__main__"))

    return run


def test_each_is_short_listed_and_run_here():
    here, readme = Path(__file__).read_text(), (EXAMPLES / "README.md").read_text()
    for example in EXAMPLES.glob("*.py"):
        assert len(example.read_text().splitlines()) < 60, example.name
        assert f'"{example.name}"' in here, example.name
        assert example.name in readme, example.name
    assert len(readme.splitlines()) <= 40


def test_plain_loop(run):
    penalized, plain = (run("plain_loop.py", "--coeff", coeff) for coeff in (0.1, 0))
    for example in (penalized, plain):
        assert example.accuracy > 0.8
    assert penalized.objective.penalty(penalized.x) < 0.7 * plain.objective.penalty(plain.x)


def test_cifar100(run, tmp_path):
    files = tmp_path / "plain.pt", tmp_path / "penalized.pt"
    plain = run("cifar100_plain.py", "--batch-size", 2, "--out", files[0])
    penalized = run("cifar100.py", "--batch-size", 2, "--out", files[1])
    assert penalized.objective.calls == 2
    assert penalized.loss.isfinite()
    a, b = (torch.load(file, weights_only=True) for file in files)
    assert a.keys() == b.keys() == plain.model.state_dict().keys()  # the objective leaves no trace in them
    assert not torch.equal(a["fc.weight"], b["fc.weight"])  # the same seed and the same batches


def test_cifar100_differs_as_the_readme_says():
    a, b = ((EXAMPLES / name).read_text().splitlines()[1:] for name in ("cifar100_plain.py", "cifar100.py"))
    changed = [line for line in difflib.ndiff(a, b) if line[0] in "+-" and line[2:].strip()]
    assert "\n".join(["```diff", *changed, "```"]) in (EXAMPLES / "README.md").read_text()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_amp(run, dtype):
    example = run("amp.py", "--dtype", dtype)
    assert example.out.ce < 1
    assert example.scaler.get_scale() == (65536 if dtype == "float16" else 1)  # no step was skipped


@pytest.fixture
def _one_process(monkeypatch):
    """What torchrun says to the only process."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    values = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.usefixtures("_one_process")
def test_ddp_of_one_process(run, tmp_path):
    example = run("ddp.py", "--out", tmp_path / "model.pt")
    assert example.out.ce < 1
    example.model.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))


@pytest.mark.usefixtures("_one_process")
def test_million_identities_in_one_process(run):
    example = run("million_identities.py", "--classes", 500, "--seen", 20, "--steps", 20)
    assert example.ce < 3  # 28 in the first step
    assert example.shard.shape == (500, 64)


LAUNCH = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.mark.slow
@pytest.mark.long
def test_ddp_of_two_processes(tmp_path):
    output = script(*LAUNCH, EXAMPLES / "ddp.py", "--out", tmp_path / "model.pt")
    assert output.count("epoch 3") == 1
    assert (tmp_path / "model.pt").exists()


@pytest.mark.slow
@pytest.mark.long
def test_million_identities_in_two_processes():
    output = script(*LAUNCH, EXAMPLES / "million_identities.py", "--classes", "501", "--steps", "2")
    assert output.count("step 2: cross-entropy") == 1


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize(
    "compiler", ["aot_eager", pytest.param("inductor", marks=[pytest.mark.slow, pytest.mark.long])]
)
def test_compiled_step(run, monkeypatch, compiler):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=compiler))
    example = run("compiled_step.py")
    x, y, parameters = example.x.detach().requires_grad_(), example.y, example.parameters
    with _torch.tracing_autograd():
        gradients = example.compiled(x, y)[2]
    logits = example.model(x)
    (score,) = torch.autograd.grad(logits.logsumexp(1).sum(), x, create_graph=True)
    penalty = torch.autograd.grad(score.flatten(1).norm(dim=1).mean(), parameters, retain_graph=True, allow_unused=True)
    plain = torch.autograd.grad(F.cross_entropy(logits, y), parameters)
    for gradient, of_penalty, of_ce in zip(gradients, penalty, plain, strict=True):
        if of_penalty is not None:  # the last bias has none
            torch.testing.assert_close((gradient - of_ce) / 0.1, of_penalty, rtol=1e-3, atol=1e-4)


def test_timm(run):
    example = run("timm_mixup.py")
    assert example.accuracy > 0.6
    assert example.y.shape == (297,)


def test_own_regularizer(run):
    example = run("own_regularizer.py")
    assert example.out.ce < 1
    x, weight = torch.randn(2, 6, requires_grad=True), torch.randn(4, 6)
    regularizer = example.JacobianNorm(projections=4000)
    values = regularizer(None, x @ weight.T, (x,), None)
    torch.testing.assert_close(values, weight.square().sum().expand(2), rtol=0.05, atol=0)


@pytest.mark.parametrize("step", ["cross-entropy", "functions", "objective", "interval 4"])
def test_benchmark(run, step):
    once = types.SimpleNamespace(pedantic=lambda function, **_: function())
    run("epoch_benchmark.py").test_epoch(once, step)


@pytest.mark.slow
@pytest.mark.long
def test_benchmark_as_it_is():
    assert "4 passed" in script("-m", "pytest", "-p", "no:xdist", EXAMPLES / "epoch_benchmark.py")


def test_accelerate(run):
    example = run("accelerate_loop.py")
    assert example.out.ce < 1
    assert example.objective.calls == 3 * len(example.loader)  # saved, and read again


@pytest.mark.slow
@pytest.mark.long
def test_lightning():
    assert "accuracy" in script(EXAMPLES / "lightning_module.py")


@pytest.mark.slow
@pytest.mark.long
def test_hugging_face_trainer(run):
    example = run("huggingface_trainer.py")
    assert example.trainer.evaluate()["eval_accuracy"] > 0.6
    saved, trained = example.model.state_dict(), example.objective.model.state_dict()
    assert all(torch.equal(saved[name], trained[name]) for name in trained)


@pytest.mark.slow
@pytest.mark.long
def test_hugging_face_text(run):
    example = run("huggingface_text.py")
    assert example.correct > 900  # of 1024
    assert example.embedding.weight.grad.abs().sum() > 0


def script(*arguments):
    """What a command says, of this interpreter."""
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=EXAMPLES.parent, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
