"""Gradient norms over training: against float64, without a trace in the training, and where the paths overflow."""

from __future__ import annotations

import csv
import dataclasses
import math
import sys

import pytest
import torch

from benchmarks.second_order import problem
from densreg.lab import cli, stability, training
from densreg.lab.training import Config
from densreg.paths import PATHS


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("path", PATHS)
def test_norm_against_float64(path, scale):
    model, x = problem(torch.float64)
    logits = scale * model(x)
    (g,) = torch.autograd.grad(torch.logsumexp(logits, 1).sum(), x, create_graph=True)
    penalty = g.flatten(1).norm(3, dim=1).mean()
    gradients = torch.autograd.grad(penalty, list(model.parameters()), allow_unused=True)
    expected = math.sqrt(sum(g.square().sum().item() for g in gradients if g is not None))
    model, x = problem(torch.float32)
    norms = stability.gradient_norm(model, x, 3, path, scale)
    assert norms["gradient_norm"] == pytest.approx(expected, rel=1e-5)
    assert norms["penalty"] == pytest.approx(penalty.item(), rel=1e-5)
    assert norms["largest_logit"] == pytest.approx(logits.max().item(), rel=1e-5)


def test_measuring_leaves_no_trace(tmp_path, monkeypatch):
    """The training is that of ``fit``, whatever is measured: BatchNorm's statistics and random classes included."""
    config = Config(str(tmp_path / "fit"), path="stable", model="resnet18", batch_size=16, train_size=32, test_size=8)
    config = dataclasses.replace(config, epochs=2)
    training.fit(config, progress=False)
    fitted = torch.load(tmp_path / "fit" / "checkpoint.pt", weights_only=True)["model"]
    problems = []
    build = training.Problem
    monkeypatch.setattr(training, "Problem", lambda config: problems.append(build(config)) or problems[-1])
    rows = list(stability.measure(config, (1.0, 50.0), steps=4, every=2))
    assert [(row["step"], row["scale"]) for row in rows] == [(s, f) for s in (0, 2, 3) for f in (1.0, 50.0)]
    assert all(torch.equal(w, fitted[k]) for k, w in problems[0].model.state_dict().items())


def test_command(tmp_path, monkeypatch, refused, capsys):
    """Trained alike, the paths agree; with the logits scaled up only those without a shift are lost."""
    monkeypatch.chdir(tmp_path)
    command = ["stability", "--data", "digits", "--scales", "1", "100", "--steps", "31", "--out", "out"]
    assert cli.main(command) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 13
    assert said[0].startswith("digits, logits x 1, naive: finite; norm ")
    assert said[1].startswith("digits, logits x 100, naive: not finite in ")
    assert said[-1] == "table and picture: out/stability.csv, out/stability-digits.png"
    with (tmp_path / "out" / "stability.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["path"] for row in rows} == set(PATHS) - {"per_class"}
    norms = {(row["path"], float(row["scale"]), int(row["step"])): float(row["gradient_norm"]) for row in rows}
    assert {step for *_, step in norms} == {0, 10, 20, 30}
    for (path, scale, step), norm in norms.items():
        if path in ("naive", "inverse") and scale == 100:
            assert math.isfinite(norm) == (step == 0), (path, step)
        else:
            assert norm == pytest.approx(norms["fused", scale, step], rel=1e-2)
    assert all(row["finite"] == str(int(math.isfinite(float(row["gradient_norm"])))) for row in rows)
    from matplotlib.image import imread

    assert imread(tmp_path / "out" / "stability-digits.png").std() > 0.05

    assert "already holds stability.csv; choose another folder or add --overwrite" in refused(*command)


def test_training_that_overflows_goes_on(tmp_path):
    config = Config(str(tmp_path), path="naive", optimizer="sgd", lr=1e3, test_size=8)
    rows = list(stability.measure(config, (1.0,), steps=20, every=1))
    assert rows[0]["finite"] == 1
    assert rows[-1]["finite"] == 0
    assert len(rows) == 20
    assert "not finite in " in stability._verdict(rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--data imagenet", "unknown data set 'imagenet'"),
        ("--data digits --paths fast", "path must be one of naive"),
        ("--data digits --scales 0", "scales must be finite and above 0, got 0.0"),
        ("--data digits --steps 0", "steps must lie in [1, 2^31), got 0"),
        ("--data digits --model resnet19", "unknown model 'resnet19'"),
        ("", "--data blockmnist needs --data-dir"),
    ],
)
def test_bad_requests(arguments, message, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in refused("stability", *arguments.split())


def test_missing_matplotlib_is_said_before_anything_is_trained(tmp_path, monkeypatch, refused):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    error = refused("stability", "--data", "digits", "--out", str(tmp_path / "out"))
    assert error == ("densreg stability: error: matplotlib.figure is not installed: pip install 'densreg[train]'\n")
    assert not (tmp_path / "out").exists()
