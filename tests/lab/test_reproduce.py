"""The paper's experiments end to end, on an MNIST of a few made-up images: tables, going on, what is missing."""

from __future__ import annotations

import csv
import dataclasses
import functools
import json
import math
import shutil
import sys

import pytest
import torch
from analytic import SMALLEST
from on_disk import write_cifar100, write_folder, write_mnist

from densreg.lab import cli, coefficients, evaluation, experiments, reproduce, runs, training
from densreg.lab.reproduce import EXPERIMENTS, METHODS, Budget, rows_of

SMALL = ("--epochs", "1", "--train-size", "256", "--test-size", "20", "--threads", "1")


@pytest.fixture(scope="module")
def mnist(tmp_path_factory):
    """A folder with an MNIST of blurred class patterns, in the published format."""
    root = tmp_path_factory.mktemp("data")
    generator = torch.Generator().manual_seed(0)
    patterns = torch.rand(10, 28, 28, generator=generator)
    parts = []
    for n in (320, 40):
        labels = torch.arange(n) % 10
        noise = torch.rand(n, 28, 28, generator=generator)
        parts.append((((0.8 * patterns[labels] + 0.2 * noise) * 255).to(torch.uint8), labels))
    write_mnist(root, *parts)
    return root


@pytest.fixture
def command(mnist, tmp_path, monkeypatch, capsys):
    """``densreg reproduce``: status and what it says."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        status = cli.main(["reproduce", *arguments, "--data-dir", str(mnist)])
        said = capsys.readouterr()
        return status, said.out + said.err

    return run


def _table(folder):
    with (folder / "table.csv").open() as file:
        return list(csv.DictReader(file))


def test_table(command, tmp_path):
    coeff = ("--coeff", "density=0.1,0.5")
    sizes = ("--set", "pgd.eps=0.5,2", "pgd.steps=3", "leakage.steps=4")
    arguments = ("table1", *SMALL, "--methods", "standard", "density", "--seeds", "0", "1", *coeff, *sizes)
    status, said = command(*arguments)
    assert status == 0
    folder = tmp_path / "runs" / "reproduce" / "table1"
    files = {"table.md", "table.csv", "config.json", "table1.png", "coefficients.png", runs.LOCK}
    assert {path.name for path in folder.iterdir()} == files
    rows = _table(folder)
    assert [(row["method"], row["coeff"], row["seed"]) for row in rows] == [
        *(("standard", "", seed) for seed in "01"),
        *(("density", coeff, seed) for coeff in ("0.1", "0.5") for seed in "01"),
    ]
    for row in rows:
        assert float(row["leakage l2"]) > 0
        assert 0 <= float(row["pgd l2_2"]) <= float(row["pgd l2_0.5"]) <= float(row["pgd clean"])
        assert row["pgd clean"] == row["accuracy clean"]
    assert [row["paper: leakage"] for row in rows] == ["3.657"] * 2 + ["2.259"] * 4
    table = (folder / "table.md").read_text()
    assert table.strip().endswith(said.strip().splitlines()[-1])
    lines = [line.split(" | ") for line in table.splitlines() if line.startswith("| ")]
    assert len(lines) == 5
    header, _, standard, weak, _ = lines
    column = header.index("leakage l2")
    values = [float(row["leakage l2"]) for row in rows[:2]]
    mean, spread = (float(value) for value in standard[column].split(" ± "))
    assert mean == pytest.approx(sum(values) / 2, abs=6e-4)
    assert spread == pytest.approx(abs(values[0] - values[1]) / math.sqrt(2), abs=6e-4)
    ratio = sum(float(row["leakage l2"]) for row in rows[2:4]) / sum(values)
    assert float(weak[header.index("leakage / standard")]) == pytest.approx(ratio, abs=6e-4)
    assert weak[-1].strip(" |") == "0.618"
    about = json.loads((folder / "config.json").read_text())
    assert about["metrics"]["pgd"]["eps"] == [0.5, 2]
    assert len(about["runs"]) == 6
    assert str(tmp_path) not in json.dumps(about)


def test_coefficients_are_chosen_on_held_out_images_and_measured_on_others(command, tmp_path):
    """Two experiments in a call share their trainings; the second call takes what the first one chose."""
    sizes = ("--set", "pgd.eps=0.5", "pgd.steps=2", "leakage.steps=2", "--methods", "standard", "density")
    tried = ("--coeff", "density=0.1,0.2", "--config", "amp=none", "--budget", "30-epochs")
    status, said = command("table1", *SMALL, *sizes, *tried, "--val-size", "40", "--out", "search")
    assert status == 0, said
    chosen = json.loads((tmp_path / "search" / "chosen.json").read_text())
    best = chosen["blockmnist mlp"]["density"]["best"]
    rows = {row["coeff"]: float(row["pgd l2_0.5"]) for row in _table(tmp_path / "search") if row["coeff"]}
    assert rows[f"{best:g}"] == max(rows.values())
    config = next(iter(json.loads((tmp_path / "search" / "config.json").read_text())["runs"].values()))
    assert (config["schedule"], config["lr"], config["epochs"], config["amp"]) == ("warmup-cosine", 0.1, 1, "none")

    status, said = command(
        "table1", "table3", "--models", "mlp", *SMALL, *sizes, "--coeff-from", "search", "--out", "o"
    )
    assert status == 0, said
    for name in ("table1", "table3"):
        found = {(row["method"], row["coeff"]) for row in _table(tmp_path / "o" / name)}
        assert found == {
            ("standard", ""),
            *(("density", f"{c:g}") for c in chosen["blockmnist mlp"]["density"].values()),
        }


@pytest.mark.slow
def test_the_tables_of_cifar100_with_the_small_budget(unchecked, tmp_path, monkeypatch, capsys):
    """The command of docs/paper.md for a GPU, at its smallest: search, trainings and measurements, interrupted once."""
    monkeypatch.chdir(tmp_path)
    write_cifar100(tmp_path, 24, 8)
    common = (*("--budget", "30-epochs", "--models", "resnet20", "--data-dir", ".", "--config", "batch_size=8"),)
    common += (*("--set", "pgd.steps=1"), "--epochs", "1", "--threads", "1")

    def reproduce(*arguments):
        status = cli.main(["reproduce", *arguments, *common])
        said = capsys.readouterr()
        assert status == 0, said
        return said.out

    methods = ("standard", "density", "input_gradient", "loss_gradient", "score_matching")
    tried = [f"{method}=0.1,1" for method in methods[1:]]
    reproduce("table4", "--val-size", "8", "--methods", *methods, "--coeff", *tried, "--out", "search")
    chosen = ("--coeff-from", "search", "--methods", *methods)
    evaluate, epochs = training.loop.evaluate, []

    def third_is_interrupted(*args):
        epochs.append(len(epochs) + 1)
        if epochs[-1] == 3:
            raise KeyboardInterrupt
        return evaluate(*args)

    monkeypatch.setattr(training.loop, "evaluate", third_is_interrupted)
    assert cli.main(["reproduce", "table4", "table5", *chosen, *common]) == 130
    first = tmp_path / "runs" / "reproduce" / "table4"
    assert len(_table(first)) == 2, "whole rows"
    reproduce("table4", "table5", *chosen)
    assert len(epochs) == len(_table(first)) + 1, "the tables share their trainings"
    for folder, norm in ((first, "linf"), (first.with_name("table5"), "l2")):
        rows = _table(folder)
        assert {row["method"] for row in rows} == set(methods)
        assert all(sum(column.startswith(f"pgd {norm}_") for column in row) == 3 for row in rows)


def test_a_coefficient_that_diverges_has_no_row(command, tmp_path):
    sizes = ("--set", "pgd.eps=0.5", "pgd.steps=2", "leakage.steps=2", "--val-size", "40", "--out", "search")
    arguments = ("table1", *SMALL, *sizes, "--methods", "density", "--config", "optimizer=sgd", "--coeff")
    status, said = command(*arguments, "density=0.1,1e30")
    assert status == 0, said
    assert "diverged, without a row: step 2 is the first" in said
    assert [row["coeff"] for row in _table(tmp_path / "search")] == ["0.1"]
    assert "c1e+30-e1-n256-v40-optimizer=sgd-s0: step 2 is" in (tmp_path / "search" / "table.md").read_text()
    about = json.loads((tmp_path / "search" / "config.json").read_text())
    assert ([len(about[kind]) for kind in ("runs", "diverged")]) == [1, 1]
    assert json.loads((tmp_path / "search" / "chosen.json").read_text())["blockmnist mlp"]["density"]["best"] == 0.1

    status, said = command(*arguments, "density=1e30")
    assert status == 1
    assert "every training diverged, the last: step 2 is" in said


def test_a_model_that_ignores_its_input_has_no_row(command, tmp_path):
    """And a coefficient of which one seed has none is not chosen."""
    arguments = ("table1", *SMALL, "--methods", "density", "--val-size", "40", "--out", "search", "--seeds", "0", "1")
    fit = training.fit

    def collapses(config, **options):
        fit(config, **options)
        if config.coeff == 0.5 and config.seed == 1:
            raise evaluation.samples.Unmeasurable("the model ignores it")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "fit", collapses)
        status, said = command(*arguments, "--coeff", "density=0.5,0.1", "--set", "pgd.steps=1", "leakage.steps=2")
    assert status == 0, said
    assert "diverged, without a row: the model ignores it" in said
    assert [(row["coeff"], row["seed"]) for row in _table(tmp_path / "search")] == [
        *(("0.5", "0"), ("0.1", "0"), ("0.1", "1"))
    ]
    assert json.loads((tmp_path / "search" / "chosen.json").read_text())["blockmnist mlp"]["density"]["best"] == 0.1
    assert (
        "The first 20 of 40 held-out training images of blockmnist." in (tmp_path / "search" / "table.md").read_text()
    )
    found = coefficients.read_chosen(str(tmp_path / "search"))
    with pytest.raises(ValueError, match="--coeff-from has no coefficient of hessian for blockmnist and mlp"):
        rows_of("table1", Budget(methods=("density", "hessian"), chosen=found))


def test_going_on(command, tmp_path, monkeypatch):
    """What is trained is not trained again, what is measured not measured again; what was killed goes on."""
    arguments = ("table1", *SMALL, "--methods", "density", "--set", "pgd.steps=2")
    run = tmp_path / "runs" / "reproduce" / "blockmnist-mlp-density-p2-c0.1-e1-n256-s0"
    (row,) = rows_of("table1", Budget(methods=("density",), epochs=1, train_size=256, threads=1))
    assert row.config.out == str(run.relative_to(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(training.loop, "evaluate", _interrupted)
        patch.setattr(reproduce, "rows_of", lambda name, budget: _every_step(rows_of(name, budget)))
        status, said = command(*arguments)
    assert status == 130
    assert "interrupted; call it again to go on" in said
    status, said = command(*arguments)
    assert status == 0
    assert f"resuming {row.config.out} after step 2, 0 whole epochs" in said
    first = _table(tmp_path / "runs" / "reproduce" / "table1")
    weights = (run / "checkpoint.pt").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(training.problem, "train_step", None)
        metric = evaluation.metric
        patch.setattr(evaluation.registry, "metric", lambda name: functools.wraps(metric(name))(_never))
        assert command(*arguments)[0] == 0
    assert (run / "checkpoint.pt").read_bytes() == weights
    assert _table(tmp_path / "runs" / "reproduce" / "table1") == first
    status, said = command(*arguments[:-1], "pgd.steps=3")
    assert status == 0
    assert len(json.loads((run / "measured.json").read_text())) == 5  # one more than of, leakage, pgd and accuracy


def test_figures_of_other_weights_do_not_count(command, tmp_path):
    arguments = ("table1", *SMALL, "--methods", "standard", "--set", "pgd.steps=1", "leakage.steps=2")
    assert command(*arguments)[0] == 0
    (first,) = _table(tmp_path / "runs" / "reproduce" / "table1")
    (run,) = (path for path in (tmp_path / "runs" / "reproduce").iterdir() if path.name.startswith("blockmnist"))
    saved = torch.load(run / "checkpoint.pt", weights_only=True)
    for tensor in saved["model"].values():
        tensor.mul_(0.5)
    torch.save(saved, run / "checkpoint.pt")
    status, said = command(*arguments)
    assert status == 0, said
    (again,) = _table(tmp_path / "runs" / "reproduce" / "table1")
    assert 0 < float(again["leakage l2"]) < 0.5 * float(first["leakage l2"])


def test_figures_of_other_images_do_not_count(mnist, tmp_path, monkeypatch):
    """With equal labels: what is measured are the images that are there now."""
    monkeypatch.chdir(tmp_path)
    root = shutil.copytree(mnist, tmp_path / "mnist")
    command = ["reproduce", "table1", *SMALL, "--methods", "standard", "--data-dir", str(root), "--set", "pgd.steps=1"]
    command += ["leakage.steps=2", "--config", "lr=0.001", "batch_size=16"]
    assert cli.main(command) == 0
    (first,) = _table(tmp_path / "runs" / "reproduce" / "table1")
    file = root / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
    content = bytearray(file.read_bytes())
    content[16:] = bytes(255 - value for value in content[16:])
    file.write_bytes(content)
    assert cli.main(command) == 0
    (again,) = _table(tmp_path / "runs" / "reproduce" / "table1")
    (run,) = (path for path in (tmp_path / "runs" / "reproduce").iterdir() if path.name.startswith("blockmnist"))
    wanted = evaluation.evaluate([run], data_dir=str(root), test_size=20)[run.name]["accuracy"]["clean"]
    assert float(again["accuracy clean"]) == wanted < float(first["accuracy clean"])


def test_figures_against_other_images_do_not_count(tmp_path, monkeypatch):
    """The folder of the out-of-distribution images, its content, and one of its own, are in what is kept."""
    for name, value in (("one", 9), ("two", 200)):
        write_folder(tmp_path / name, {"a": value}, side=8, images=3)
    config = training.Config(str(tmp_path / "run"), train_size=64, test_size=20, epochs=1).complete()
    training.fit(config, progress=False)
    measures = (experiments.outside("folder"),)

    def measured(folder, **options):
        options = {"out_of_distribution": {"fit": True, **options}}
        budget = Budget(data_dir=str(tmp_path / folder), options=options)
        return reproduce.measured(reproduce.Row("standard", config), measures, budget)

    one, two = measured("one"), measured("two")
    assert one != two
    assert measured("one", data_dir=str(tmp_path / "two")) == two, "the one that is asked for"
    with monkeypatch.context() as patch:
        metric = evaluation.metric
        patch.setattr(evaluation.registry, "metric", lambda name: functools.wraps(metric(name))(_never))
        assert (measured("one"), measured("two")) == (one, two), "both are kept"
    shutil.rmtree(tmp_path / "one")
    (tmp_path / "two").rename(tmp_path / "one")
    assert measured("one") == two
    with pytest.raises(ValueError, match=r"data=digits: the columns out_of_distribution folder are of other images$"):
        measured("one", data="digits")


def test_other_labels_are_no_resumption(command, mnist, tmp_path):
    arguments = ("table1", *SMALL, "--methods", "standard", "--set", "pgd.steps=1", "leakage.steps=2")
    assert command(*arguments)[0] == 0
    other = shutil.copytree(mnist, tmp_path / "other")
    file = other / "MNIST" / "raw" / "train-labels-idx1-ubyte"
    data = file.read_bytes()
    file.write_bytes(data[:8] + bytes(9 - label for label in data[8:]))
    assert cli.main(["reproduce", *arguments, "--data-dir", str(other)]) == 2


def test_a_method_stays_what_it_is():
    budget = Budget(config={"": {"coeff": 0.3, "lr": 0.01, "softplus": 5.0}, "fgsm_training": {"adversarial_eps": 0.2}})
    configs = {row.method: row.config for row in rows_of("table1", budget)}
    assert {method: configs[method].coeff for method in ("standard", "density")} == {"standard": 0, "density": 0.3}
    assert {config.lr for config in configs.values()} == {0.01}
    assert configs["fgsm_training"].adversarial_eps == 0.2
    assert configs["softplus"].softplus == configs["hessian"].softplus == 5
    assert configs["hessian"].regularizer == "hessian"
    budget = Budget(config={"": {"path": "stable", "regularizer": "cure", "adversarial": "fgsm"}})
    configs = {row.method: row.config for row in rows_of("table1", budget)}
    assert (configs["density"].path, configs["density"].regularizer) == ("stable", "density")
    assert (configs["hessian"].path, configs["standard"].adversarial) == ("fused", "none")
    for wrong in (Budget(coeff={"standard": (0.1,)}), Budget(config={"standard": {"coeff": 0.1}})):
        with pytest.raises(ValueError, match=r"coeff of the method standard is 0\.0, got 0\.1: that is another"):
            rows_of("table1", wrong)


def test_every_coefficient_has_a_run_of_its_own():
    coeffs = (0.1, 0.1000001, 100000.0, 1000001.0, 1000002.0)
    for budget in (Budget(coeff={"density": coeffs}), Budget(norms=tuple(1 + c for c in coeffs))):
        rows = rows_of("table1", dataclasses.replace(budget, methods=("density",)))
        assert len({row.config.out for row in rows}) == len(rows) == len(coeffs)
    assert "-p1.1-c0.1-" in rows[0].config.out


def test_a_coefficient_of_zero_has_a_label(command, tmp_path):
    sizes = ("--set", "pgd.steps=1", "leakage.steps=2", "pgd.eps=1,2")
    assert command("table1", *SMALL, "--methods", "density", "--coeff", "density=0,0.1", *sizes)[0] == 0
    assert (tmp_path / "runs" / "reproduce" / "table1" / "table1.png").exists()


def _never(*args, **options):
    raise AssertionError("this was not to be done")


def _interrupted(*args, **options):
    raise KeyboardInterrupt


def _every_step(rows):
    return [dataclasses.replace(row, config=dataclasses.replace(row.config, checkpoint_every=1)) for row in rows]


def test_norms(command, tmp_path):
    """Figure 7: standard is trained once, and --match-norms scales the coefficient by the number of pixels."""
    arguments = ("fig7", *SMALL, "--p", "1", "2", "inf", "--set", "pgd.steps=1", "pgd.eps=1", "leakage.steps=2")
    assert command(*arguments, "--match-norms", "--coeff", "density=0.2")[0] == 0
    folder = tmp_path / "runs" / "reproduce" / "fig7"
    rows = [(row["method"], row["p"], row["coeff"]) for row in _table(folder)]
    root = math.sqrt(56 * 28)
    assert rows == [
        ("standard", "", ""),
        ("density", "1.0", f"{0.2 / root:.3g}"),
        ("density", "2.0", "0.2"),
        ("density", "inf", f"{0.2 * root:.3g}"),
    ]
    assert (folder / "fig7.png").exists()
    assert json.loads((folder / "config.json").read_text())["asked"]["norms"][-1] == "inf"


def test_maps(command, tmp_path):
    arguments = ("fig4", *SMALL, "--methods", "standard", "density", "--set", "leakage.steps=2")
    assert command(*arguments)[0] == 0
    assert (tmp_path / "runs" / "reproduce" / "fig4" / "fig4.png").stat().st_size > 10_000


def test_every_method_of_a_table_can_be_trained(command, tmp_path):
    """Without options of one's own; the Hessian of a ReLU network, for one, is 0 and refused."""
    sizes = ("--train-size", "32", "--epochs", "1", "--test-size", "4", "--threads", "1")
    status, said = command("table1", *sizes, "--set", "pgd.eps=0.5", "pgd.steps=1", "leakage.steps=2")
    assert status == 0, said
    assert {row["method"] for row in _table(tmp_path / "runs/reproduce/table1")} == set(EXPERIMENTS["table1"].methods)


def test_unknown_figures_are_dashes(command, tmp_path):
    """The paper has no figure for this model, and none for this method."""
    arguments = ("table1", *SMALL, "--methods", "standard", "density_stable", "--set", "pgd.steps=1", "leakage.steps=2")
    assert command(*arguments)[0] == 0
    standard, stable = _table(tmp_path / "runs" / "reproduce" / "table1")
    assert standard["paper: clean"] == "99.12"
    assert {value for key, value in stable.items() if key.startswith("paper: ")} == {"-"}
    line = (tmp_path / "runs" / "reproduce" / "table1" / "table.md").read_text().splitlines()[-1]
    assert line.endswith("| - | - | - | - | - |")


@pytest.mark.parametrize("name", evaluation.METRICS)
def test_every_metric_makes_a_column_and_a_picture(name, command, tmp_path, monkeypatch):
    """In an experiment of its own, by its entry alone: what it needs, whether it is a percentage, how it is drawn."""
    data = {"leakage": "blockmnist", "worst_group": "spurious-mnist"}.get(name, "digits")
    measure = experiments.Measure(name, ("*",), SMALLEST.get(name, {}))
    entry = evaluation.METRICS[name]
    picture = name if entry.draw else ""
    asked = experiments.Experiment("one metric", (data,), ("mlp",), ("standard",), (measure,), picture=picture)
    monkeypatch.setitem(EXPERIMENTS, "one", asked)
    few = ("--test-size", "4") if name != "worst_group" else ()
    status, said = command("one", "--epochs", "1", "--train-size", "32", "--threads", "1", *few)
    assert status == 0, said
    folder = tmp_path / "runs" / "reproduce" / "one"
    (row,) = _table(folder)
    head, _, line = [text.strip("| ").split(" | ") for text in (folder / "table.md").read_text().splitlines()[4:]]
    columns = [column for column in row if column.startswith(f"{name} ")]
    assert columns == head[5:]
    for column, cell in zip(columns, line[5:], strict=True):
        value = float(row[column])
        assert cell == (f"{100 * value:.2f}" if entry.percent else f"{value:.3f}")
    assert (folder / "one.png").exists() == bool(entry.draw)
    if name == "worst_group":
        assert columns[0] == "worst_group 0-4 on red", "the data set's names"


def test_what_is_missing_is_said_before_anything_is_trained(command, tmp_path, monkeypatch):
    for module, extra in (("captum.attr", "evaluate"), ("matplotlib.figure", "train")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            status, said = command("table1", *SMALL)
        name = module.partition(".")[0]
        assert (status, said) == (
            2,
            f"densreg reproduce: error: {name} is not installed: pip install 'densreg[{extra}]'\n",
        )
    monkeypatch.setitem(
        EXPERIMENTS,
        "table1",
        dataclasses.replace(EXPERIMENTS["table1"], measures=(experiments.Measure("out_of_distribution", ("*",)),)),
    )
    status, said = command("table1", *SMALL)
    assert status == 2
    assert "out_of_distribution needs another data set" in said
    assert not (tmp_path / "runs").exists()


def test_missing_data_is_said_before_anything_is_trained(mnist, tmp_path, monkeypatch, capsys):
    """Also that of the last of several experiments, and the other images of a metric: one line, nothing written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training, "fit", _never)
    measures = (experiments.outside("cifar10"),)
    other = dataclasses.replace(EXPERIMENTS["table1"], measures=measures, figures={}, columns=())
    monkeypatch.setitem(EXPERIMENTS, "outside", other)
    for names, folder, message in [
        (("table1",), "nowhere", "--data-dir nowhere is not a folder"),
        (("table1", "table7"), mnist, "no usable CIFAR10 in"),
        (("outside",), mnist, "no usable CIFAR10 in"),
    ]:
        assert cli.main(["reproduce", *names, *SMALL, "--data-dir", str(folder)]) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.startswith(f"densreg reproduce: error: {message}")
        assert said.err.count("\n") == 1
        assert not [*tmp_path.iterdir()]


def test_files_of_an_earlier_call_do_not_stay(command, tmp_path):
    """What this call may not write again, even if it is interrupted: the choice and pictures were of other rows."""
    folder = tmp_path / "out"
    folder.mkdir()
    earlier = ("chosen.json", "coefficients.png", "table1.png")
    for name in (*earlier, "notes.txt"):
        (folder / name).write_text("of an earlier call")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reproduce, "measured", _interrupted)
        assert command("table1", *SMALL, "--methods", "density", "--out", "out")[0] == 130
    assert {path.name for path in folder.iterdir()} == {"notes.txt", runs.LOCK}


def test_a_run_of_another_configuration_is_not_gone_on_with(command, tmp_path, monkeypatch):
    """Of a name that does not tell coefficients apart."""
    monkeypatch.setattr(reproduce, "_digits", "{:g}".format)
    arguments = ("table1", *SMALL, "--methods", "density", "--set", "pgd.steps=1", "leakage.steps=2", "--coeff")
    assert command(*arguments, "density=0.12345671")[0] == 0
    first = _table(tmp_path / "runs" / "reproduce" / "table1")
    status, said = command(*arguments, "density=0.12345672")
    assert status == 2
    assert "has coeff 0.12345671, got 0.12345672; give the same, or another --out" in said
    assert _table(tmp_path / "runs" / "reproduce" / "table1") == first


def test_figures_of_the_paper():
    """Each belongs to a row that is trained, and there is one for each column."""
    for experiment in EXPERIMENTS.values():
        for (data, model, method), figures in experiment.figures.items():
            assert data in experiment.data
            assert model in experiment.models
            assert method in experiment.methods
            assert len(figures) == len(experiment.columns)
        assert all(measure.metric in evaluation.METRICS for measure in experiment.measures)
        assert all(method in METHODS for method in experiment.methods)


def test_a_training_without_penalty_is_one_run():
    """Whichever norm comes first, its configuration is the same: another experiment goes on with it."""
    for p in (1.0, math.inf):
        (row,) = rows_of("fig7", Budget(methods=("standard",), norms=(p,)))
        (other,) = rows_of("table1", Budget(methods=("standard",)))
        assert row == other


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_can_be_asked_for(name):
    """All of its trainings are complete configurations, each in a folder of its own."""
    experiment = EXPERIMENTS[name]
    rows = rows_of(name, Budget(seeds=(0, 1)))
    assert len({row.config.out for row in rows}) == len(rows)
    assert {row.method for row in rows} == set(experiment.methods)


def test_some_of_the_data_sets():
    """Also one that the paper's table does not have."""
    rows = rows_of("table6", Budget(data=("tiny-imagenet", "cifar100"), methods=("density",)))
    assert [row.key for row in rows] == [(data, "resnet18", "density") for data in ("tiny-imagenet", "cifar100")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("fig9", "unknown experiment 'fig9'; expected one of table1, table3"),
        ("table7", "no usable CIFAR10 in"),
        ("table6", "wnids.txt"),
        ("fig2a", "no usable CIFAR100 in"),
        ("fig2a --methods standard", "fig2a does not take methods; expected some of data_dir, download, seeds"),
        ("fig2a --seeds 0 1", "fig2a does not take several seeds"),
        ("fig2a --epochs 3", "fig2a does not take epochs"),
        ("fig2a --config density.lr=1", "fig2a does not take density"),
        ("fig2a --set pgd.eps=1", "--set pgd.eps=1: expected an option of the metrics"),
        ("table1 --methods magic", "unknown method 'magic'; expected some of standard, density"),
        ("table1 --methods densty", "; did you mean density or "),
        ("table1 --coeff magic=1", "unknown method 'magic'"),
        ("table1 --coeff density", "--coeff density: expected METHOD=NUMBER"),
        ("table1 --coeff density=low", "--coeff density=low: expected METHOD=NUMBER"),
        ("table1 --config magic=1", "unknown option 'magic' of method"),
        ("table1 --config seed=1", "--config seed: expected options of densreg train; that one is --seeds here"),
        ("table1 --config density.p=1", "--config p: expected options of densreg train; that one is --p here"),
        ("table1 --config nothing", "--config nothing: expected METHOD.OPTION=VALUE"),
        ("table1 --set pgd.magic=1", "--set pgd.magic=1: expected an option of the metrics"),
        ("table1 --epochs 0", "epochs must lie in [1, 2^31), got 0"),
        ("table1 --models magic", "unknown model 'magic'"),
        ("table1 --data magic", "unknown data set 'magic'"),
        ("table6 --data svhn", "SVHN"),
        ("table1 --out /dev/null", "--out /dev/null is a file"),
        ("table1 --budget 40-epochs", "unknown budget '40-epochs'; expected one of paper, 30-epochs"),
        ("table1 --coeff-from nowhere", "--coeff-from nowhere: expected the folder of a reproduce with --val-size"),
        ("table1 fig9", "unknown experiment 'fig9'"),
    ],
)
def test_bad_requests(command, arguments, message):
    status, said = command(*arguments.split())
    assert status == 2
    lines = [line for line in said.splitlines() if not line[0].isdigit()]  # "1/9: runs/..."
    assert len(lines) == 1
    assert lines[0].startswith("densreg reproduce: error: ")
    assert message in lines[0]


def test_list(command):
    status, said = command("list")
    assert status == 0
    assert all(name in said for name in reproduce.NAMES)
