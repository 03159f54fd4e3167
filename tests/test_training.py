"""The training step, the run directory, reproducibility, and that the penalty trains."""

from __future__ import annotations

import csv
import json
import math

import pytest
import torch
import torch.nn.functional as F

from benchmarks.second_order import problem, torch_penalty
from densreg import data, models, training
from densreg.paths import PATHS
from densreg.training import Config, TrainingError, fit, train_step


def _rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("path", PATHS)
def test_step_is_a_step_along_the_whole_gradient(path):
    model, x = problem(torch.float64)
    y = torch.tensor([0, 1, 2, 3, 4])
    parameters = list(model.parameters())
    logits = model(x)
    loss = F.cross_entropy(logits, y) + 0.7 * torch_penalty(3)(logits, x)
    expected = [w - 0.1 * g for w, g in zip(parameters, torch.autograd.grad(loss, parameters), strict=True)]
    model, x = problem(torch.float64)
    out = train_step(model, torch.optim.SGD(model.parameters(), 0.1), x.detach(), y, 0.7, 3, path)
    torch.testing.assert_close(out.loss, loss.detach())
    torch.testing.assert_close(out.ce + 0.7 * out.penalty, out.loss)
    assert out.correct == (logits.argmax(1) == y).sum()
    for w, e in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(w.detach(), e.detach())


def test_plain_step():
    model, x = problem(torch.float64)
    x = x.detach()
    y = torch.tensor([0, 1, 2, 3, 4])
    out = train_step(model, torch.optim.SGD(model.parameters(), 0.1), x, y, 0.0)
    assert out.penalty.isnan()
    assert torch.equal(out.loss, out.ce)
    assert not x.requires_grad


def test_run_directory(tmp_path):
    out = tmp_path / "deep" / "run"
    rows = fit(Config(str(out), epochs=2, train_size=256, test_size=100, log_every=2))
    assert sorted(p.name for p in out.iterdir()) == ["checkpoint.pt", "config.json", "metrics.csv", "steps.csv"]
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
    again = training.evaluate(model, data.load("digits").test.first(100), 2.0, 64, torch.device("cpu"))
    assert again["test_accuracy"] == rows[-1]["test_accuracy"]
    assert again["test_penalty"] == pytest.approx(rows[-1]["test_penalty"], rel=1e-6)


def test_evaluation_against_torch():
    digits = data.load("digits").test.first(50)
    model = models.build("mlp", 10, (1, 8, 8))
    metrics = training.evaluate(model, digits, 3.0, 16, torch.device("cpu"))
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
    recipe = training.Recipe(epochs=200, optimizer="sgd", lr=0.01, batch_size=64, milestones=(0.5, 0.875))
    monkeypatch.setitem(training.RECIPES, "digits", recipe)
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


def test_non_finite_loss_stops_the_run_and_keeps_the_last_checkpoint(tmp_path):
    with pytest.raises(TrainingError, match=r"the loss is (nan|inf) at or before step \d+ .*path naive"):
        fit(Config(str(tmp_path / "a"), path="naive", optimizer="sgd", lr=1e6, epochs=3), progress=False)
    assert not (tmp_path / "a" / "checkpoint.pt").exists()


def test_an_existing_run_is_kept(tmp_path):
    config = Config(str(tmp_path / "run"), epochs=1, train_size=64, test_size=20)
    fit(config, progress=False)
    with pytest.raises(training.RunError, match=r"already holds config\.json"):
        fit(config, progress=False)
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
    with pytest.raises(training.RunError, match="is a file; wanted a folder"):
        fit(Config(str(tmp_path / "file")), overwrite=True)
    assert (tmp_path / "file").read_text() == "mine"


def test_failed_write_keeps_the_old_file(tmp_path):
    file = tmp_path / "file"
    training.write_atomically(file, lambda f: f.write(b"old"))

    def fails(f):
        f.write(b"half of the n")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        training.write_atomically(file, fails)
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": "imagenet"}, "unknown data set 'imagenet'"),
        ({"path": "fast"}, "path must be one of"),
        ({"p": 0.5}, "p must be at least 1"),
        ({"coeff": -1.0}, "coeff must be finite and at least 0, got -1.0"),
        ({"coeff": math.inf}, "coeff must be finite"),
        ({"lr": 0.0}, "lr must be finite and above 0, got 0.0"),
        ({"weight_decay": -1.0}, "weight_decay must be finite"),
        ({"lr": 1e308}, "lr must be finite"),
        ({"epochs": 0}, r"epochs must lie in \[1, 2\^31\), got 0"),
        ({"batch_size": 10**24}, "batch_size must lie in"),
        ({"train_size": -1}, "train_size must lie in"),
        ({"seed": -1}, "seed must lie in"),
        ({"optimizer": "lion"}, "optimizer must be adam or sgd, got 'lion'"),
        ({"device": "tpu"}, "device must be cpu, cuda, cuda:N or auto, got 'tpu'"),
        ({"device": "cuda:256"}, "device 'cuda:256' is not there: torch sees"),
        ({"device": "cuda:99999999999999999999"}, "is not there: torch sees"),
    ],
)
def test_impossible_values(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        fit(Config(str(tmp_path / "run"), **options))
    assert not (tmp_path / "run").exists()
