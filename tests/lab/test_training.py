"""The training step, the run directory, reproducibility, going on after a kill, and that the penalty trains."""

from __future__ import annotations

import csv
import functools
import json
import logging
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from on_disk import write_folder
from torch import nn

from benchmarks.second_order import problem, torch_penalty
from densreg import _torch, attacks
from densreg.lab import data, models, runs, training
from densreg.lab.training import Config, TrainingError, fit, loop, monitor, train_step
from densreg.lab.training.problem import _optimizer
from densreg.objective import RegularizedObjective


def _rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_step_is_a_step_along_the_whole_gradient():
    model, x = problem(torch.float64)
    y = torch.tensor([0, 1, 2, 3, 4])
    parameters = list(model.parameters())
    logits = model(x)
    loss = F.cross_entropy(logits, y) + 0.7 * torch_penalty(3)(logits, x)
    expected = [w - 0.1 * g for w, g in zip(parameters, torch.autograd.grad(loss, parameters), strict=True)]
    model, x = problem(torch.float64)
    objective = RegularizedObjective(model, 0.7, 3, compile=False)
    out = train_step(objective, torch.optim.SGD(model.parameters(), 0.1), x.detach(), y)
    torch.testing.assert_close(out.loss, loss.detach())
    torch.testing.assert_close(out.ce + 0.7 * out.penalty, out.loss)
    assert out.correct == (logits.argmax(1) == y).sum()
    assert out.largest == logits.max()
    for w, e in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(w.detach(), e.detach())


@pytest.mark.parametrize("quiet", [False, True])
def test_the_first_step_says_that_it_compiles(quiet, tmp_path, monkeypatch, capsys, fresh_dynamo):
    """And whoever shows what densreg logs is left as they were."""
    monkeypatch.setattr(_torch, "compiler_backend", lambda backend, mode: lambda graph, inputs: graph.forward)
    config = Config(str(tmp_path), compile=True, epochs=1, train_size=64, test_size=20, max_steps=2)
    logger = logging.getLogger("densreg")
    before = (logger.level, list(logger.handlers))
    fit(config, progress=True, quiet=quiet)
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if line.startswith("the first training step")]
    assert len(lines) == (0 if quiet else 2)
    assert (logger.level, logger.handlers) == before


def test_run_directory(tmp_path):
    out = tmp_path / "deep" / "run"
    rows = fit(Config(str(out), epochs=2, train_size=256, test_size=100, log_every=2))
    assert sorted(p.name for p in out.iterdir()) == sorted([*runs.FILES, runs.CURVES, runs.LOCK])
    config = json.loads((out / "config.json").read_text())
    assert (config["data"], config["lr"], config["optimizer"]) == ("digits", 1e-3, "adam")
    assert config["versions"]["torch"] == torch.__version__
    written = _rows(out / "metrics.csv")
    assert [{k: float(v) for k, v in row.items()} for row in written] == rows
    assert [row["step"] for row in rows] == [4, 8]
    steps = _rows(out / "steps.csv")
    assert [int(row["step"]) for row in steps] == [2, 4, 6, 8]
    # The epoch's means are those of its steps.
    assert float(written[0]["train_loss"]) == pytest.approx(sum(float(s["loss"]) for s in steps[:2]) / 2)

    model, loaded = models.load_checkpoint(out)
    assert loaded == config
    assert not model.training
    objective = RegularizedObjective(model, 0.1, compile=False)
    again = training.evaluate(objective, data.load("digits").test.first(100), 64, torch.device("cpu"))
    assert again["test_accuracy"] == rows[-1]["test_accuracy"]
    assert again["test_penalty"] == pytest.approx(rows[-1]["test_penalty"], rel=1e-6)


def test_evaluation_against_torch():
    digits = data.load("digits").test.first(50)
    model = models.build("mlp", 10, (1, 8, 8))
    objective = RegularizedObjective(model, 0.1, 3.0, compile=False)
    metrics = training.evaluate(objective, digits, 16, torch.device("cpu"))
    x, y = digits.batch(torch.arange(50), torch.Generator())
    logits = model(x.requires_grad_())
    assert metrics["test_ce"] == pytest.approx(F.cross_entropy(logits, y).item(), rel=1e-5)
    assert metrics["test_accuracy"] == (logits.argmax(1) == y).double().mean()
    assert metrics["test_penalty"] == pytest.approx(torch_penalty(3)(logits, x).item(), rel=1e-5)


def test_same_seed_same_run_and_same_data_for_every_path(tmp_path):
    def run(name, **options):
        fit(Config(str(tmp_path / name), epochs=2, train_size=256, test_size=50, **options), progress=False)
        return models.load_checkpoint(tmp_path / name)[0].state_dict()

    one, same, other = run("one"), run("same"), run("other", seed=1)
    assert all(torch.equal(one[k], same[k]) for k in one)
    assert not all(torch.equal(one[k], other[k]) for k in one)
    # "stable" draws its classes from the global generator: what it is trained on stays the same.
    for path in ("stable", "taylor", "max_shift"):
        weights = run(path, path=path)
        for k in one:
            torch.testing.assert_close(weights[k], one[k], rtol=1e-3, atol=1e-4)


def test_the_penalty_trains(tmp_path):
    """Without it, the penalty of the trained network is several times larger; accuracy stays."""
    rows = {}
    for coeff in (0.0, 0.3):
        rows[coeff] = fit(Config(str(tmp_path / str(coeff)), coeff=coeff, epochs=10), progress=False)[-1]
    assert math.isnan(rows[0.0]["train_penalty"])
    assert rows[0.3]["test_penalty"] < 0.5 * rows[0.0]["test_penalty"]
    assert rows[0.3]["test_accuracy"] > 0.9
    assert rows[0.0]["test_accuracy"] > 0.9


def test_learning_rate_of_short_runs(monkeypatch, tmp_path):
    """The milestones are parts of the epochs; with one epoch there is nothing to divide."""
    recipe = data.Recipe(epochs=200, optimizer="sgd", lr=0.01, batch_size=64, schedule="step", milestones=(0.5, 0.875))
    monkeypatch.setitem(data.DATA_SETS, "digits", replace(_digits, recipe=recipe))
    for epochs, expected in ((1, [0.01]), (2, [0.01, 0.001]), (4, [0.01, 0.01, 0.001, 0.001])):
        out = str(tmp_path / str(epochs))
        rows = fit(Config(out, epochs=epochs, train_size=64, test_size=20), progress=False)
        assert [row["lr"] for row in rows] == pytest.approx(expected)


def test_max_steps(tmp_path):
    rows = fit(Config(str(tmp_path / "run"), max_steps=30, epochs=5, test_size=20, log_every=10), progress=False)
    assert [row["step"] for row in rows] == [22, 30]
    assert [row["step"] for row in _rows(tmp_path / "run" / "steps.csv")] == ["10", "20", "30"]


def test_infinite_order_is_valid_json(tmp_path):
    fit(Config(str(tmp_path), p=math.inf, epochs=1, train_size=64, test_size=20), progress=False)
    assert json.loads((tmp_path / "config.json").read_text(), parse_constant=pytest.fail)["p"] == "inf"
    assert len(_rows(tmp_path / "steps.csv")) == 1  # the last step, whatever log_every is


@pytest.mark.parametrize("path", ["naive", "inverse"])
def test_the_first_step_that_is_not_finite_is_named(tmp_path, path, capsys):
    """However seldom the device is asked; with "record" the run goes on and its rows count such steps."""
    options = {"path": path, "optimizer": "sgd", "lr": 1e3, "epochs": 2, "test_size": 20}
    for every in (1, 7, 50):
        with pytest.raises(TrainingError) as caught:
            fit(Config(str(tmp_path / str(every)), log_every=every, **options), progress=False)
        assert not (tmp_path / str(every) / "checkpoint.pt").exists()
        if every == 1:
            first = str(caught.value)
            step = int(first.split()[1])
            assert step > 1
            assert first.startswith(f"step {step} is the first whose loss or gradient is not finite (loss ")
            assert f", path {path}): lower --lr or --coeff, or use --path fused; no checkpoint was saved" in first
            assert float(first.split("largest logit ")[1].split(",")[0]) > 88
        assert str(caught.value) == first
    rows = fit(Config(str(tmp_path / "on"), on_nonfinite="record", log_every=5, **options), progress=False)
    assert [row["step"] for row in rows] == [22, 44]
    assert math.isnan(rows[-1]["train_loss"])
    bad = [int(row["nonfinite_steps"]) for row in _rows(tmp_path / "on" / "steps.csv")]
    assert sum(bad) == 44 - step + 1, "weights that are not finite stay so"
    said = capsys.readouterr().err
    assert said.count("is the first whose") == 1
    assert said.endswith(f"path {path}); going on\n")


class _Rootless(nn.Module):
    """A weight whose gradient is NaN while the loss is finite."""

    def __init__(self, model):
        super().__init__()
        self.model, self.w = model, nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return self.model(x) + (0 * self.w).sqrt()


def test_float16_whose_every_step_is_skipped_stops(tmp_path, monkeypatch):
    build = models.build
    monkeypatch.setattr(models, "build", lambda **spec: _Rootless(build(**spec)))
    options = {"amp": "fp16", "coeff": 0.0, "train_size": 64, "test_size": 8, "epochs": 28}
    with pytest.raises(TrainingError, match=r"not finite at any loss scale \(no penalty\): lower --lr"):
        fit(Config(str(tmp_path), **options), progress=False)


def test_a_gradient_that_is_not_finite_counts_as_much_as_a_loss():
    watch = monitor.Watch(torch.device("cpu"))
    w = torch.zeros(3, requires_grad=True)
    unused = torch.zeros(2, requires_grad=True)
    for step, (loss, gradient) in enumerate(((1.0, 1e38), (1.0, math.inf), (math.nan, 1.0), (2.0, 3.0)), 1):
        out = training.StepOutput(*(torch.tensor(loss) for _ in range(3)), torch.tensor(1), torch.tensor(9.5))
        w.grad = torch.tensor([0.0, -gradient, gradient])
        assert watch.see(step, out, [w, unused]) == (step in (2, 3))
    assert watch.report("path fused") == (
        "step 2 is the first whose loss or gradient is not finite "
        "(loss 1, largest gradient inf, largest logit 9.5, path fused)"
    )
    assert monitor.Watch(torch.device("cpu")).report("fused") == ""


def test_an_existing_run_is_kept(tmp_path):
    config = Config(str(tmp_path / "run"), epochs=1, train_size=64, test_size=20)
    fit(config, progress=False)
    with pytest.raises(training.RunError, match=r"already holds config\.json; .* or add --resume or --overwrite"):
        fit(config, progress=False)
    with pytest.raises(training.RunError, match="choose one"):
        fit(config, progress=False, overwrite=True, resume=True)
    # A request that fails, and a run that breaks off before its first epoch, leave the old run alone.
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    with pytest.raises(models.ModelError, match="cannot be trained"):
        fit(Config(config.out, model="resnet18", batch_size=1), overwrite=True, progress=False)
    with pytest.raises(TrainingError):
        fit(Config(config.out, optimizer="sgd", lr=1e9), overwrite=True, progress=False)
    assert {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()} == before
    fit(Config(config.out, epochs=1, train_size=64, test_size=20, seed=1), overwrite=True, progress=False)
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() != before["checkpoint.pt"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "metrics.csv").write_text("mine")
    with pytest.raises(training.RunError, match=r"already holds metrics\.csv"):
        fit(Config(str(tmp_path / "other")), progress=False)
    with pytest.raises(training.RunError, match="--out is empty"):
        fit(Config(""))
    (tmp_path / "file").write_text("mine")
    with pytest.raises(training.RunError, match="is a file; expected a folder"):
        fit(Config(str(tmp_path / "file")), overwrite=True)
    assert (tmp_path / "file").read_text() == "mine"


# --------------------------------------------------------------------------------------------------------------------
# optimizer, schedule, warm-up, memory format


def test_schedules_are_torchs():
    for options, scheduler in (
        ({"schedule": "cosine"}, lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 30)),
        ({"schedule": "constant"}, lambda o: torch.optim.lr_scheduler.ConstantLR(o, 1.0)),
        (
            {"schedule": "step", "milestones": (0.3, 0.8)},
            lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [9, 24]),
        ),
        (
            {"schedule": "warmup-cosine"},
            lambda o: torch.optim.lr_scheduler.SequentialLR(
                o,
                [
                    torch.optim.lr_scheduler.LinearLR(o, 1 / 6, total_iters=5),
                    torch.optim.lr_scheduler.CosineAnnealingLR(o, 24),
                ],
                [6],
            ),
        ),
    ):
        config = Config("", lr=0.5, epochs=10, **options).complete()
        optimizer = torch.optim.SGD([torch.zeros(1)], 0.5)
        schedule = scheduler(optimizer)
        for step in range(30):
            assert training.learning_rate(config, step, 3) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
            optimizer.step()
            schedule.step()


def test_the_papers_schedule_is_the_default_for_cifar():
    for name in ("cifar10", "cifar100", "svhn", "tiny-imagenet", "folder"):
        config = Config("", data=name).complete()
        rates = [training.learning_rate(config, epoch, 1) for epoch in range(config.epochs)]
        assert len(rates) == 200
        assert rates[:100] == [0.01] * 100
        assert rates[100:175] == pytest.approx([0.001] * 75)
        assert rates[175:] == pytest.approx([0.0001] * 25)
        optimizer = _optimizer(nn.Linear(1, 1), config)
        group = optimizer.param_groups[0]
        assert isinstance(optimizer, torch.optim.SGD)
        assert (group["momentum"], group["weight_decay"], config.batch_size) == (0.9, 5e-4, 128)


def test_optimizers():
    for name, cls in (("sgd", torch.optim.SGD), ("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)):
        optimizer = _optimizer(nn.Linear(1, 1), Config("", optimizer=name, weight_decay=0.25, momentum=0.5).complete())
        assert type(optimizer) is cls
        assert optimizer.param_groups[0]["weight_decay"] == 0.25
        assert name != "sgd" or optimizer.param_groups[0]["momentum"] == 0.5


def test_warm_up_of_the_coefficient(tmp_path):
    config = Config(str(tmp_path), coeff=0.4, coeff_warmup=1.5, epochs=3, train_size=256, test_size=20, log_every=1)
    fit(config, progress=False)
    steps = [float(row["coeff"]) for row in _rows(tmp_path / "steps.csv")]
    assert steps == pytest.approx([min(0.4, 0.4 * i / 6) for i in range(1, 13)])
    first = _rows(tmp_path / "steps.csv")[0]
    assert float(first["loss"]) == pytest.approx(float(first["ce"]) + 0.4 / 6 * float(first["penalty"]), rel=1e-5)


def test_channels_last_threads_and_workers(tmp_path):
    def run(name, **options):
        common = {"model": "resnet18", "optimizer": "sgd", "max_steps": 2, "batch_size": 8, "test_size": 8}
        fit(Config(str(tmp_path / name), train_size=32, **common, **options), progress=False)
        return models.load_checkpoint(tmp_path / name)[0].state_dict()

    before = torch.get_num_threads()
    plain = run("plain")
    other = run("other", channels_last=True, threads=1, workers=1)
    assert torch.get_num_threads() == before
    for k, w in plain.items():
        torch.testing.assert_close(other[k], w, rtol=1e-3, atol=1e-5)
    saved = torch.load(tmp_path / "other" / "checkpoint.pt", weights_only=True)["model"]
    assert saved["1.conv1.weight"].is_contiguous(memory_format=torch.channels_last)


def test_threads_are_those_asked_for(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(loop, "_train", lambda *args: seen.append(torch.get_num_threads()) or [])
    for n in (1, 3, None):
        fit(Config(str(tmp_path), threads=n), overwrite=True)
    assert seen == [1, 3, torch.get_num_threads()]


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = Config(str(tmp_path), epochs=2, train_size=256, test_size=20, log_every=2, tensorboard=True)
    rows = fit(config, progress=False)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("test/accuracy")] == [
        (row["step"], pytest.approx(row["test_accuracy"])) for row in rows
    ]
    assert [e.step for e in events.Scalars("penalty")] == [2, 4, 6, 8]


def test_missing_packages_say_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(training.RunError, match=r"tensorboard is not installed: pip install 'densreg\[tensorboard\]'"):
        fit(Config(str(tmp_path / "a"), tensorboard=True))
    fit(Config(str(tmp_path / "b"), max_steps=1, test_size=20), progress=False)
    assert "no curves.png: matplotlib.figure is not installed" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------------------
# going on


def _noisy(request):
    """Digits with everything that is random: augmented images, to go with a model that drops units."""
    digits = _digits.read(request)
    return replace(digits, train=replace(digits.train, transform=data.CropAndFlip()))


_digits = data.DATA_SETS["digits"]

_TIMES = ("seconds", "images_per_second")


def _untimed(rows):
    return [{k: v for k, v in row.items() if k not in _TIMES} for row in rows]


def _same_run(one, other):
    """That two run directories hold the same weights, optimizer state and tables, bit for bit."""
    a, b = (torch.load(run / "checkpoint.pt", weights_only=True) for run in (one, other))
    assert a["model"].keys() == b["model"].keys()
    assert all(torch.equal(w, b["model"][k]) for k, w in a["model"].items())
    for key, state in a["optimizer"]["state"].items():
        assert all(
            torch.equal(torch.as_tensor(v), torch.as_tensor(b["optimizer"]["state"][key][k])) for k, v in state.items()
        )
    assert all(torch.equal(one[0], other[0]) for one, other in zip(a["rng"], b["rng"], strict=True))
    assert (a["epoch"], a["done"], a["step"]) == (b["epoch"], b["done"], b["step"])
    for table in ("metrics.csv", "steps.csv"):
        assert _untimed(_rows(one / table)) == _untimed(_rows(other / table))


@pytest.mark.parametrize(("path", "workers"), [("stable", 1), ("fused", 0)])
def test_resumed_run_is_the_same_run(tmp_path, monkeypatch, path, workers):
    """Stopped within an epoch, at its end and within a window of steps.csv; with dropout and random classes."""
    monkeypatch.setitem(data.DATA_SETS, "digits", replace(_digits, read=_noisy))
    build = models.mlp
    monkeypatch.setattr(models, "mlp", lambda *args: nn.Sequential(nn.Dropout(0.2), *build(*args)))
    options = {"path": path, "epochs": 3, "train_size": 640, "test_size": 50, "log_every": 4, "schedule": "cosine"}
    options |= {"coeff_warmup": 2.0, "optimizer": "adamw"}
    fit(Config(str(tmp_path / "whole"), **options), progress=False)
    for steps in (3, 10, 17, 20, 30):
        torch.manual_seed(steps)  # whatever another process would start from
        config = Config(str(tmp_path / "parts"), max_steps=steps, workers=workers, **options)
        rows = fit(config, progress=False, resume="auto")
        assert rows[-1]["step"] == steps
        assert [int(row["step"]) for row in _rows(tmp_path / "parts" / "metrics.csv")] == [row["step"] for row in rows]
    _same_run(tmp_path / "whole", tmp_path / "parts")
    # What is finished stays as it is.
    before = (tmp_path / "parts" / "checkpoint.pt").read_bytes()
    rows = fit(Config(str(tmp_path / "parts"), **options), progress=False, resume=True)
    assert len(rows) == 3
    assert (tmp_path / "parts" / "checkpoint.pt").read_bytes() == before
    with pytest.raises(training.RunError, match="has done 30 steps; got max_steps 3"):
        fit(Config(str(tmp_path / "parts"), max_steps=3, **options), resume=True)


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
@pytest.mark.parametrize("options", [{}, {"interval": 2, "fraction": 0.5}], ids=["plain", "cheaper"])
def test_compiled_and_resumed_run_is_the_same_run(tmp_path, options, compiler, fresh_dynamo, monkeypatch):
    with_backend = functools.partialmethod(RegularizedObjective.__init__, backend=compiler)
    monkeypatch.setattr(RegularizedObjective, "__init__", with_backend)
    options = {"epochs": 1, "train_size": 640, "test_size": 50, "log_every": 4, "compile": True, **options}
    fit(Config(str(tmp_path / "whole"), **options), progress=False)
    for steps in (3, 10):
        torch.compiler.reset()  # as in a new process
        fit(Config(str(tmp_path / "parts"), max_steps=steps, **options), progress=False, resume="auto")
    _same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("options", [{"amp": "fp16"}, {"amp": "bf16"}, {"interval": 3}, {"fraction": 0.25}])
def test_amp_and_cheaper_steps(tmp_path, options):
    """They train, and go on where they were stopped: the scaler's state, and whose turn it is."""
    options = {"epochs": 2, "train_size": 640, "test_size": 50, "log_every": 4, **options}
    rows = fit(Config(str(tmp_path / "whole"), **options), progress=False)
    assert rows[-1]["train_loss"] < 0.9 * rows[0]["train_loss"]
    assert rows[-1]["train_penalty"] > 0
    for steps in (7, 20):
        fit(Config(str(tmp_path / "parts"), max_steps=steps, **options), progress=False, resume="auto")
    _same_run(tmp_path / "whole", tmp_path / "parts")
    scaler = runs.load_checkpoint(tmp_path / "parts", torch.device("cpu"))[0]["scaler"]
    assert (scaler is not None) == (options.get("amp") == "fp16")


def test_when_a_run_is_compiled(tmp_path):
    def compiled(**options) -> bool:
        config = Config(str(tmp_path), train_size=640, **options)
        return training.Problem(config.complete()).objective.compiled

    assert not compiled(epochs=1)
    assert compiled(epochs=100)  # 1000 steps
    assert not compiled(epochs=99)
    assert not compiled(epochs=100, compile=False)
    assert not compiled(epochs=100, path="per_class")
    assert compiled(epochs=1, compile=True)


def test_a_run_in_parts_is_compiled_as_a_whole_one_is(tmp_path, monkeypatch):
    """Or its weights would be others, in the last digits."""
    decisions, compiles = [], training.Problem._compiles

    def decides(problem):
        decisions.append(compiles(problem))
        return False  # that takes no time

    monkeypatch.setattr(training.Problem, "_compiles", decides)
    monkeypatch.setattr(training.problem, "COMPILE_STEPS", 4)
    options = {"epochs": 2, "train_size": 128, "test_size": 20}  # four steps
    for out, steps in (("whole", None), ("parts", 1), ("parts", 3), ("parts", None)):
        fit(Config(str(tmp_path / out), max_steps=steps, **options), progress=False, resume="auto")
    assert decisions == [True] * 4


def test_the_head_without_logits(tmp_path, capsys):
    """It trains the same weights, is resumed bit for bit, and is measured as any run is."""
    options = {"epochs": 2, "train_size": 128, "test_size": 40, "log_every": 1}
    rows = fit(Config(str(tmp_path / "logits"), **options), progress=False)
    capsys.readouterr()
    ours = fit(Config(str(tmp_path / "whole"), head="fused", **options), progress=False)
    assert capsys.readouterr().out.startswith(
        "head fused: there are no logits, so the largest one in steps.csv is NaN\n"
    )
    for name in ("train_loss", "train_penalty", "test_ce", "test_penalty"):
        assert ours[-1][name] == pytest.approx(rows[-1][name], rel=1e-4)
    for name in ("train_accuracy", "test_accuracy"):
        assert ours[-1][name] == pytest.approx(rows[-1][name], abs=0.02)
    assert {row["largest_logit"] for row in _rows(tmp_path / "whole" / "steps.csv")} == {"nan"}
    fit(Config(str(tmp_path / "parts"), head="fused", max_steps=3, **options), progress=False)
    fit(Config(str(tmp_path / "parts"), head="fused", **options), progress=False, resume=True)
    _same_run(tmp_path / "whole", tmp_path / "parts")
    with pytest.raises(training.RunError, match="head"):
        fit(Config(str(tmp_path / "logits"), head="fused", **options), progress=False, resume=True)


def test_a_model_whose_last_layer_is_not_linear(tmp_path):
    config = Config(str(tmp_path), data="synthetic", image_size=64, model="squeezenet1_1", head="fused")
    with pytest.raises(models.ModelError, match=r"returns the output of an nn\.Linear, got 'squeezenet1_1'$"):
        training.Problem(config.complete())


def test_resume_without_a_checkpoint(tmp_path, capsys):
    """It is an error that leaves no folder behind, unless it is said that both are meant."""
    config = Config(str(tmp_path / "run"), epochs=1, train_size=64, test_size=20)
    with pytest.raises(training.RunError, match=r"in --out .*run; --resume auto starts from the beginning$"):
        fit(config, progress=False, resume=True)
    assert not (tmp_path / "run").exists()
    assert len(fit(config, progress=False, resume="auto")) == 1
    assert "starting from the beginning" in capsys.readouterr().err
    with pytest.raises(training.RunError, match=r"starts from the beginning; did you mean run\?$"):
        fit(Config(str(tmp_path / "runn")), resume=True)
    with pytest.raises(training.RunError, match=r"--resume takes auto or nothing, got 'run'"):
        fit(config, resume="run")


def test_checkpoints_between_epochs(tmp_path, monkeypatch):
    steps = []
    save = runs.save_checkpoint
    monkeypatch.setattr(runs, "save_checkpoint", lambda run, c, keep: steps.append(c["step"]) or save(run, c, keep))
    fit(Config(str(tmp_path), epochs=2, train_size=640, test_size=20, checkpoint_every=4), progress=False)
    assert steps == [4, 8, 10, 12, 16, 20, 20]


def test_checkpoint_of_another_configuration(tmp_path):
    given = {"epochs": 2, "train_size": 64, "test_size": 20}
    fit(Config(str(tmp_path), **given), progress=False)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    for options, message in [
        ({"lr": 0.5}, r"has lr 0\.001, got 0\.5; give the same, or another --out"),
        ({"path": "taylor"}, "has path 'fused', got 'taylor'"),
        ({"p": math.inf}, "has p 2.0, got 'inf'"),
        ({"seed": 1}, "has seed 0, got 1"),
        ({"epochs": 3}, "has epochs 2, got 3"),
        ({"batch_size": 32}, "has batch_size 64, got 32"),
        ({"train_size": 65}, "has train_size 64, got 65"),
        ({"schedule": "step", "milestones": (0.5,)}, "has schedule 'constant', got 'step'"),
        ({"augment": False}, "has augment True, got False"),
        ({"model": "vgg11"}, "has model 'mlp', got 'vgg11'"),
    ]:
        with pytest.raises(training.RunError, match=message):
            fit(Config(str(tmp_path), **{**given, **options}), progress=False, resume=True)
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_checkpoint_from_before_some_options(tmp_path, capsys):
    """It is as if they had been there at their defaults, infinity among them."""
    options = {"epochs": 1, "train_size": 128, "test_size": 20}
    fit(Config(str(tmp_path), max_steps=1, **options), progress=False)
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    for name in ("adversarial_norm", "regularizer", "val_size"):
        del checkpoint["config"][name]
    torch.save(checkpoint, tmp_path / "checkpoint.pt")
    fit(Config(str(tmp_path), **options), progress=False, resume=True)
    assert "after step 1," in capsys.readouterr().out


def test_checkpoint_of_other_data_or_of_another_kind(tmp_path, monkeypatch):
    config = Config(str(tmp_path), epochs=2, test_size=20, max_steps=1)
    fit(config, progress=False)

    def fewer(request):
        loaded = _digits.read(request)
        return replace(loaded, train=loaded.train.first(99))

    monkeypatch.setitem(data.DATA_SETS, "digits", replace(_digits, read=fewer))
    with pytest.raises(training.RunError, match="had other training images than digits has: other names, sizes"):
        fit(config, progress=False, resume=True)
    torch.save({"weights": 1}, tmp_path / "checkpoint.pt")
    with pytest.raises(training.RunError, match=r"checkpoint in .* is of another kind: KeyError 'config'"):
        fit(config, progress=False, resume=True)


@pytest.fixture
def folder(tmp_path):
    """Images of one size in bytes, of two classes, and the configuration of a run on them that has done one epoch."""
    root = tmp_path / "images"
    write_folder(root, {"a": 250, "b": 0})
    options = {"data": "folder", "data_dir": str(root), "augment": False}
    config = Config(str(tmp_path / "run"), coeff=0.0, epochs=2, max_steps=1, **options)
    fit(config, progress=False)
    return root, replace(config, max_steps=2)


def _swapped(root):
    """With equal names, sizes and labels."""
    (root / "a").rename(root / "c")
    (root / "b").rename(root / "a")
    (root / "c").rename(root / "b")


def _retold(config, change):
    """The run's checkpoint as another densreg would have written it."""
    file = Path(config.out) / "checkpoint.pt"
    checkpoint = torch.load(file, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, file)


def test_resumed_on_the_same_images_elsewhere(folder, tmp_path):
    root, config = folder
    held = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (held["class_names"], held["image_shape"]) == (["a", "b"], [3, 4, 4])
    root.rename(tmp_path / "moved")
    assert len(fit(replace(config, data_dir=str(tmp_path / "moved")), progress=False, resume=True)) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: [(root / s / "a").rename(root / s / "z") for s in ("train", "val")], "class 0 is 'a', got 'b'$"),
        (
            lambda root: (shutil.rmtree(root), write_folder(root, {"a": 250, "b": 0}, side=5)),
            "had other training images than .*images has: other names, sizes",
        ),
        (lambda root: _swapped(root / "train"), "had other training images than .*: other names, sizes, contents"),
        (lambda root: _swapped(root / "val"), "had other test images than .*: other names, sizes, contents"),
    ],
)
def test_resumed_on_other_images(folder, change, message):
    """With equal labels."""
    root, config = folder
    before = {file.name: file.read_bytes() for file in Path(config.out).iterdir()}
    change(root)
    with pytest.raises(training.RunError, match=message):
        fit(config, progress=False, resume=True)
    assert {file.name: file.read_bytes() for file in Path(config.out).iterdir()} == before


def test_other_test_images_mix_with_no_figures(folder):
    """Where the run is over there are no more figures, and where images are held out they were not measured."""
    root, config = folder
    fit(config, progress=False, resume=True)
    held = json.loads((Path(config.out) / "config.json").read_text())["images"]
    other = replace(config, out=config.out + "2", max_steps=1, val_size=1, batch_size=1)
    fit(other, progress=False)
    _swapped(root / "val")
    fit(config, progress=False, resume=True)
    assert json.loads((Path(config.out) / "config.json").read_text())["images"] == held
    fit(replace(other, max_steps=2), progress=False, resume=True)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda checkpoint: checkpoint["config"].update(ema=0.9), "the option 'ema'"),
        (lambda checkpoint: checkpoint.update(average={}), "the state 'average'"),
    ],
)
def test_checkpoint_of_a_newer_version(folder, change, what):
    _, config = folder
    _retold(config, change)
    _retold(config, lambda checkpoint: checkpoint["config"]["versions"].update(densreg="9.1"))
    message = rf"has {what}, which densreg .* does not know: take densreg 9\.1, which wrote it$"
    with pytest.raises(training.RunError, match=message):
        fit(config, progress=False, resume=True)


def test_two_processes_on_one_run(folder):
    _, config = folder
    before = {file.name: file.read_bytes() for file in Path(config.out).iterdir()}
    with runs.locked(Path(config.out)):
        for options in ({"resume": True}, {"overwrite": True}, {}):
            with pytest.raises(training.RunError, match="is in use by another process"):
                fit(config, progress=False, **options)
    assert {file.name: file.read_bytes() for file in Path(config.out).iterdir()} == before


def test_truncated_checkpoint_goes_back_to_the_previous_one(tmp_path, capsys):
    options = {"epochs": 3, "train_size": 640, "test_size": 20}
    fit(Config(str(tmp_path / "whole"), **options), progress=False)
    fit(Config(str(tmp_path / "run"), max_steps=25, checkpoint_every=5, **options), progress=False)
    file = tmp_path / "run" / "checkpoint.pt"
    file.write_bytes(file.read_bytes()[:5000])
    (tmp_path / "run" / "checkpoint.previous.pt").rename(tmp_path / "kept")
    with pytest.raises(training.RunError, match=r"^[^\n]*checkpoint\.pt cannot be read [^\n]*$"):
        fit(Config(str(tmp_path / "run"), **options), progress=False, resume=True)
    (tmp_path / "kept").rename(tmp_path / "run" / "checkpoint.previous.pt")
    capsys.readouterr()
    fit(Config(str(tmp_path / "run"), **options), progress=False, resume=True)
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    assert "checkpoint.pt cannot be read (" in said.err
    assert "going back to checkpoint.previous.pt" in said.err
    assert "after step 25" in said.out, "written twice: after 25 steps, and when max_steps ended the run there"
    _same_run(tmp_path / "whole", tmp_path / "run")


def test_full_disk_keeps_the_last_checkpoint(tmp_path):
    """A limit on the size of files stands for the full disk."""
    options = {"epochs": 3, "train_size": 640, "test_size": 20}
    fit(Config(str(tmp_path / "whole"), **options), progress=False)
    run = tmp_path / "run"
    fit(Config(str(run), max_steps=5, **options), progress=False)
    before = {p.name: p.read_bytes() for p in run.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(TrainingError, match=r"cannot write to .*: File too large; the last checkpoint is kept"):
            fit(Config(str(run), **options), progress=False, resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {p.name: p.read_bytes() for p in run.iterdir()} == before
    fit(Config(str(run), **options), progress=False, resume=True)
    _same_run(tmp_path / "whole", run)


_FORKS = """
import os, sys
from densreg.lab import cli

for line in sys.stdin:
    said, *arguments = line.split()
    child = os.fork()
    if child == 0:
        for number, name in enumerate((".out", ".err"), 1):
            os.dup2(os.open(said + name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
        sys.exit(cli.main(arguments))
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_weights(tmp_path):
    """Each run is a process, forked from one that has imported what takes long."""
    command = ["train", "--path", "stable", "--epochs", "6", "--test-size", "50", "--threads", "1"]
    command += ["--checkpoint-every", "3", "--log-every", "5", "--train-size", "700"]
    out, err = tmp_path / "said.out", tmp_path / "said.err"

    def start(run, *options):
        """The process, once its first line is there."""
        out.write_text("")
        forks.stdin.write(" ".join([str(tmp_path / "said"), *command, "--out", str(run), *options]) + "\n")
        forks.stdin.flush()
        process = int(forks.stdout.readline())
        deadline = time.monotonic() + 120
        while "\n" not in out.read_text():
            assert time.monotonic() < deadline, err.read_text()
            time.sleep(0.01)
        return process

    def ended():
        return int(forks.stdout.readline())

    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", _FORKS], **pipes) as forks:
        start(tmp_path / "whole")
        begun = time.perf_counter()
        assert ended() == 0
        assert err.read_text() == ""
        lasts = time.perf_counter() - begun
        draw = random.Random(0)
        after = 0
        for killed in range(3):
            process = start(tmp_path / "run", "--resume", "auto")  # at first until its first epoch is over
            if killed:
                step = int(out.read_text().split("after step ")[1].split(",")[0])
                assert step >= after
                after = step
            time.sleep(draw.uniform(0, lasts / 4))
            os.kill(process, signal.SIGKILL)
            assert ended() == signal.SIGKILL, "it was still at work"
        start(tmp_path / "run", "--resume", "auto")
        assert ended() == 0
        assert "resuming" in out.read_text()
        forks.stdin.close()
    assert after > 0
    _same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coeff": math.inf}, "coeff must be finite"),
        ({"lr": 0.0}, "lr must be finite and above 0, got 0.0"),
        ({"weight_decay": -1.0}, "weight_decay must be finite"),
        ({"lr": 1e308}, "lr must be finite"),
        ({"batch_size": 10**24}, "batch_size must lie in"),
        ({"train_size": -1}, "train_size must lie in"),
        ({"seed": -1}, "seed must lie in"),
        ({"optimizer": "lion"}, "optimizer must be sgd, adam or adamw, got 'lion'"),
        ({"schedule": "step"}, "the schedule step needs milestones"),
        ({"schedule": "step", "milestones": (0.5, 1.5)}, r"milestones must be parts of the epochs.*got \(0\.5, 1\.5\)"),
        ({"momentum": 1.0}, r"momentum must lie in \[0, 1\), got 1.0"),
        ({"coeff_warmup": -1.0}, "coeff_warmup must be finite and at least 0"),
        ({"workers": -1}, r"workers must lie in \[0, 1024\], got -1"),
        ({"threads": 0}, r"threads must lie in \[1, 2\^31\), got 0"),
        ({"checkpoint_every": 0}, "checkpoint_every must lie in"),
        ({"classes": 5}, "--classes is for --data synthetic; digits has its own"),
        ({"device": "tpu"}, "device must be cpu, cuda, cuda:N or auto, got 'tpu'"),
        ({"device": "cuda:256"}, "device 'cuda:256' is not there: torch sees"),
        ({"device": "cuda:99999999999999999999"}, "is not there: torch sees"),
        ({"adversarial": "cw"}, "adversarial must be none, fgsm or pgd, got 'cw'"),
        ({"adversarial": "pgd"}, "adversarial pgd needs an adversarial_eps that is finite and above 0, got None"),
        ({"adversarial_eps": 0.1}, "adversarial_eps is for adversarial fgsm or pgd, got adversarial 'none'"),
        ({"adversarial": "fgsm", "adversarial_eps": 0.1, "adversarial_steps": 3}, "adversarial_steps is for .* pgd"),
        ({"adversarial": "pgd", "adversarial_eps": 0.1, "adversarial_norm": 1}, "must be 2 or inf, got 1"),
        ({"regularizer": "nothing"}, "regularizer must be one of density, input_gradient"),
        ({"regularizer": "cure", "regularizer_options": {"k": 1}}, "regularizer cure has no option 'k': expected h"),
        ({"regularizer": "cure", "p": 1}, "regularizer cure has its own norm, got p=1"),
        ({"regularizer": "cure", "path": "directional"}, "path directional is for the density penalty"),
        ({"val_size": 0}, "val_size must lie in"),
    ],
)
def test_impossible_values(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        fit(Config(str(tmp_path / "run"), **options))
    assert not (tmp_path / "run").exists()


# --------------------------------------------------------------------------------------------------------------------
# rivals


@pytest.mark.parametrize(
    ("options", "steps", "size", "start"),
    [
        ({"adversarial": "fgsm", "adversarial_eps": 0.1}, 1, 0.1, False),
        (
            {"adversarial": "pgd", "adversarial_eps": 0.5, "adversarial_norm": 2.0, "adversarial_steps": 4},
            4,
            0.3125,
            True,
        ),
    ],
)
def test_adversarial_training(tmp_path, options, steps, size, start):
    """The step's loss is that on the perturbed images, on which it is higher, and which are in [0, 1]."""
    config = Config(str(tmp_path), coeff=0.0, compile=False, train_size=64, **options).complete()
    problem = training.Problem(config)
    x, y = next(problem.batches(1, range(1)))
    plain = F.cross_entropy(problem.model.eval()(x), y)
    eps, norm = config.adversarial_eps, config.adversarial_norm
    torch.manual_seed(3)
    seen = attacks.perturb(problem.model, x, y, norm, eps, steps, size, random_start=start)
    wanted = F.cross_entropy(problem.model.train()(seen), y)
    torch.manual_seed(3)
    out = problem.step(0, x, y)
    torch.testing.assert_close(out.loss, wanted.detach())
    assert out.loss > plain
    assert (seen - x).flatten(1).norm(norm, dim=1).max() <= eps * (1 + 1e-5)
    assert seen.min() >= 0
    assert seen.max() <= 1
    assert problem.model.training


@pytest.mark.parametrize(
    "regularizer", ["input_gradient", "loss_gradient", "score_matching", "ig_sum", "hessian", "cure"]
)
def test_each_rival_trains(tmp_path, monkeypatch, regularizer):
    """Its penalty on the held-out images is smaller than without it, and the accuracy stays."""
    build = models.mlp
    monkeypatch.setattr(models, "mlp", lambda *args: build(*args, width=64))
    coeff = {"score_matching": 1e-2, "hessian": 3e-3, "ig_sum": 1.0, "cure": 3.0}.get(regularizer, 0.5)
    rows = {}
    for weight in (1e-12, coeff):  # with a coefficient of 0 nothing would be known of the penalty
        options = {"regularizer": regularizer, "coeff": weight, "softplus": 5.0, "epochs": 4, "lr": 1e-2, "threads": 1}
        options["regularizer_options"] = {"eps": 0.03, "steps": 2} if regularizer == "ig_sum" else None
        rows[weight] = fit(Config(str(tmp_path / str(weight)), val_size=200, **options), progress=False)[-1]
    without, with_it = rows.values()
    if regularizer == "score_matching":  # which may be negative
        assert with_it["test_penalty"] < without["test_penalty"]
    else:
        assert with_it["test_penalty"] < 0.8 * without["test_penalty"]
    assert with_it["test_accuracy"] > 0.8
    assert json.loads((tmp_path / str(coeff) / "config.json").read_text())["regularizer"] == regularizer
