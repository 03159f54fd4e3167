"""densreg evaluate: runs side by side, runs that do not fit, and the files that are left."""

from __future__ import annotations

import csv
import json

import pytest
import torch
from on_disk import write_folder, write_mnist
from torch import nn

import densreg
from densreg.lab import cli, evaluation, models, runs, training


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a few steps."""
    return _train(tmp_path_factory.mktemp("runs") / "short")


def _train(out, **options):
    config = {"model": "mlp", "train_size": 512, "test_size": 64, "epochs": 3, **options}
    training.fit(training.Config(str(out), **config), progress=False)
    return out


@pytest.fixture(scope="module")
def mnist_dir(tmp_path_factory):
    """scikit-learn's digits, three times as large, as torchvision lays MNIST out."""
    folder = tmp_path_factory.mktemp("mnist")
    digits = densreg.lab.data.load("digits")
    parts = []
    for part in (digits.train.first(300), digits.test.first(100)):
        large = part.images[:, 0].repeat_interleave(3, 1).repeat_interleave(3, 2)
        parts.append((nn.functional.pad(large, (2, 2, 2, 2)), part.labels))
    write_mnist(folder, *parts)
    return folder


def test_command(run, tmp_path, refused, capsys):
    """Two runs side by side: files, table and pictures; the numbers are those of the functions."""
    other = _train(tmp_path / "other", coeff=0.0)
    metrics = ["accuracy", "pgd", "pixel_perturbation", "noise_robustness", "insertion", "activation_maximisation"]
    command = ["evaluate", str(run), str(other), "--metrics", *metrics, "out_of_distribution"]
    command += ["--test-size", "20", "--out", str(tmp_path / "out"), "--set", "samples=2", "data=synthetic", "fit=true"]
    capsys.readouterr()
    assert cli.main([*command, "activation_maximisation.steps=5"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"results: {tmp_path / 'out'}"
    assert said[2:4] == ["| metric | quantity | short | other |", "| --- | --- | --- | --- |"]
    assert said[-1].startswith("| out_of_distribution | maximum_softmax | ")
    held = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert {key: held[key] for key in ("data", "images", "batch_size", "seed", "device")} == {
        "data": "digits",
        "images": 20,
        "batch_size": 64,
        "seed": 0,
        "device": "cpu",
    }
    assert held["options"]["insertion"]["samples"] == 2
    assert held["options"]["insertion"]["points"] == 50
    assert held["configs"]["other"]["coeff"] == 0
    assert held["versions"]["densreg"] == densreg.__version__
    model, _ = models.load_checkpoint(other)
    digits = densreg.lab.data.load("digits").test.first(20)
    expected = evaluation.metric("pixel_perturbation")(model, digits, device="cpu", batch_size=64, samples=2)
    assert held["results"]["other"]["pixel_perturbation"] == pytest.approx(expected)
    with (tmp_path / "out" / "evaluation.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows[0].keys() == {"metric", "quantity", "short", "other"}
    for row in rows:
        for name in ("short", "other"):
            assert float(row[name]) == held["results"][name][row["metric"]][row["quantity"]]
    assert len(rows) == len(said) - 4
    from matplotlib.image import imread

    drawn = {file.stem for file in (tmp_path / "out").glob("*.png")}
    assert drawn == set(metrics) - {"accuracy"}
    assert all(imread(tmp_path / "out" / f"{name}.png").std() > 0.05 for name in drawn)

    assert "already holds evaluation.json; choose another folder or add --overwrite" in refused(*command)
    assert cli.main([*command[:3], "--out", str(tmp_path / "out"), "--overwrite"]) == 0
    assert len(json.loads((tmp_path / "out" / "evaluation.json").read_text())["results"]["short"]) == 1


def test_groups_of_the_data_set(mnist_dir, tmp_path, refused):
    """By name, against counts by hand; a group without an image is an error."""
    grouped = _train(tmp_path / "grouped", data="spurious-mnist", data_dir=str(mnist_dir), epochs=1, test_size=None)
    assert cli.main(["evaluate", str(grouped), "--metrics", "worst_group"]) == 0
    held = json.loads((grouped / "evaluation" / "evaluation.json").read_text())["results"]["grouped"]["worst_group"]
    test = densreg.lab.data.load("spurious-mnist", mnist_dir).test
    model, _ = models.load_checkpoint(grouped)
    right = model(test.batch(torch.arange(100), torch.Generator())[0]).argmax(1) == test.labels
    names = ["0-4 on red", "0-4 on green", "5-9 on red", "5-9 on green"]
    expected = [right[test.groups == i].double().mean().item() for i in range(4)]
    assert held == {
        **dict(zip(names, map(pytest.approx, expected), strict=True)),
        "worst_group": pytest.approx(min(expected)),
        "group_mean": pytest.approx(sum(expected) / 4),
        "clean": pytest.approx(right.double().mean().item()),
    }
    assert len(set(expected)) > 1
    few = ["--test-size", "2", "--out", str(tmp_path / "out")]
    error = refused("evaluate", str(grouped), "--metrics", "worst_group", *few)
    assert "has no images among these 2: take more of them" in error


def test_held_out_images(run, tmp_path, refused):
    """The runs' own, with the accuracy that the training saw; none where they held out different ones."""
    held_out = _train(tmp_path / "held_out", val_size=100, test_size=None)
    results = evaluation.evaluate([held_out], val=True)
    with (held_out / "metrics.csv").open() as file:
        seen = float([*csv.DictReader(file)][-1]["test_accuracy"])
    assert results["held_out"]["accuracy"]["clean"] == pytest.approx(seen)
    assert results != evaluation.evaluate([held_out], overwrite=True)
    error = refused("evaluate", str(run), "--val")
    assert error.endswith("--val: the run short held out no images, expected some\n")
    error = refused("evaluate", str(held_out), str(run), "--val", "--out", str(tmp_path / "out"))
    assert error.endswith("--val: the run short held out no images, expected 100\n")


def test_default_folder(run, capsys):
    assert cli.main(["evaluate", str(run)]) == 0
    assert capsys.readouterr().out.startswith(f"results: {run / 'evaluation'}\n\n| metric | quantity | short |\n")
    held = json.loads((run / "evaluation" / "evaluation.json").read_text())
    assert held["images"] == 360
    assert held["results"]["short"]["accuracy"]["clean"] > 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "no run is given; expected a folder that densreg train has written"),
        ("nowhere", "no readable run in nowhere: there is no checkpoint.pt"),
        ("RUN --metrics lime", "unknown metric 'lime'; expected some of accuracy, worst_group, leakage"),
        ("RUN --metrics acuracy", "activation_maximisation; did you mean accuracy?\n"),
        ("RUN --metrics worst_group", "worst_group needs a data set with groups, and this one has none"),
        ("RUN RUN --out out", "is given twice"),
        ("RUN --test-size 0", "test_size must lie in [1, 2^31), got 0"),
        ("RUN --batch-size 0", "batch_size must lie in [1, 2^31), got 0"),
        ("RUN --seed -1", "seed must lie in [0, 2^63), got -1"),
        ("RUN --device cuda:99", "is not there"),
        ("RUN --out /dev/null", "--out /dev/null is a file; expected a folder"),
        ("RUN --metrics out_of_distribution", "out_of_distribution needs another data set"),
        ("RUN --metrics out_of_distribution --set data=synthetic", "the images of synthetic are 3x32x32, those of the"),
    ],
)
def test_bad_requests(arguments, message, run, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    given = [str(run) if word == "RUN" else word for word in arguments.split()]
    out = [] if "--out" in given else ["--out", "out"]
    assert message in refused("evaluate", *given, *out)


def test_data_is_no_short_form_of_data_dir(capsys):
    with pytest.raises(SystemExit):
        cli.main(["evaluate", "run", "--data", "mnist"])
    assert capsys.readouterr().err == "densreg: error: unrecognized arguments: --data mnist\n"


def test_several_runs_need_a_folder(run, tmp_path, refused):
    assert "--out is needed for several runs" in refused("evaluate", str(run), str(tmp_path))


def test_runs_of_different_data_sets(run, tmp_path, refused):
    other = _train(tmp_path / "noise", data="synthetic", max_steps=1)
    error = refused("evaluate", str(run), str(other), "--out", str(tmp_path / "out"))
    assert error == "densreg evaluate: error: the run noise was trained on synthetic, and short on digits\n"


def _retold(run, to, **config):
    """The run with another configuration: as if its data had changed since."""
    to.mkdir()
    checkpoint, _ = runs.load_checkpoint(run)
    checkpoint["config"] |= config
    runs.save_checkpoint(to, checkpoint)
    return to


def test_checkpoint_of_other_data(run, tmp_path, refused):
    noise = _train(tmp_path / "noise", data="synthetic", max_steps=1)
    of_ten = _retold(noise, tmp_path / "of_ten", classes=7)
    assert refused("evaluate", str(of_ten)).endswith("the model of of_ten has 10 classes, and synthetic here 7\n")
    of_digits = _retold(run, tmp_path / "of_digits", data="synthetic")
    error = refused("evaluate", str(of_digits))
    assert "the model of of_digits does not take the 3x32x32 images of synthetic: " in error


def _folder_run(tmp_path, name, values=(250, 0), side=4, **options):
    """Images of two classes, of one size in bytes, and a run of one step on them."""
    root = tmp_path / f"{name}-images"
    write_folder(root, dict(zip("ab", values, strict=True)), side)
    options = {"data": "folder", "data_dir": str(root), "coeff": 0.0, "max_steps": 1, "train_size": None, **options}
    return root, _train(tmp_path / name, test_size=None, lr=0.1, **options)


def test_runs_on_other_images(tmp_path):
    """Each is measured on its own images, or none is."""
    of = {"one": (250, 0), "same": (250, 0), "other": (0, 250)}
    (root, one), (_, same), (_, other) = (_folder_run(tmp_path, name, of[name]) for name in of)
    apart = {run.name: evaluation.evaluate([run])[run.name] for run in (one, same, other)}
    assert apart["other"] == apart["one"] == {"accuracy": {"clean": 1.0}}
    out = str(tmp_path / "out")
    assert evaluation.evaluate([one, same], out=out) == {name: apart[name] for name in ("one", "same")}
    message = r"test images in .*one-images are not those of the run other .*; measure it apart, or give --data-dir"
    with pytest.raises(ValueError, match=message):
        evaluation.evaluate([one, other], out=out, overwrite=True)
    together = evaluation.evaluate([one, other], out=out, data_dir=str(root), overwrite=True)
    assert [together[run]["accuracy"]["clean"] for run in ("one", "other")] == [1.0, 0.0], "as it is asked for"


def test_runs_on_images_of_another_shape(tmp_path):
    """A network that takes any shape would be measured at the first run's."""
    runs_ = [_folder_run(tmp_path, f"of{side}", side=side, model="vgg11")[1] for side in (8, 10)]
    with pytest.raises(ValueError, match=r"run of10 was trained on 3x10x10 images, and those in .*of8-.* are 3x8x8$"):
        evaluation.evaluate(runs_, out=str(tmp_path / "out"))


def test_images_and_classes_that_changed_since(tmp_path):
    root, run = _folder_run(tmp_path, "one", val_size=1, batch_size=1)
    image = root / "val" / "a" / "0.bmp"
    image.write_bytes(image.read_bytes()[:-1] + b"!")
    with pytest.raises(
        ValueError, match=r"test images in .* are not those of the run one \(other names, .*; give --data"
    ):
        evaluation.evaluate([run])
    evaluation.evaluate([run], data_dir=str(root))
    evaluation.evaluate([run], val=True, overwrite=True)  # the training images are as they were
    for part in ("train", "val"):
        (root / part / "a").rename(root / part / "z")
    for data_dir in (None, str(root)):
        with pytest.raises(
            ValueError, match=r"run one was trained on other classes than .* has: class 0 is 'a', got 'b'$"
        ):
            evaluation.evaluate([run], data_dir=data_dir, overwrite=True)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("config", "run newer has the option 'ema', which densreg .* does not know: take densreg 9.1, which wrote it$"),
        ("spec", "no readable run in .*newer: its model has the option 'ema', which densreg .* does not know$"),
    ],
)
def test_run_of_a_newer_version(run, tmp_path, where, message):
    newer = _retold(run, tmp_path / "newer", versions={"densreg": "9.1"})
    checkpoint, _ = runs.load_checkpoint(newer)
    checkpoint[where]["ema"] = 0.9
    runs.save_checkpoint(newer, checkpoint)
    with pytest.raises(ValueError, match=message):
        evaluation.evaluate([newer])


def test_what_is_not_finite_is_an_error(run, tmp_path, refused):
    broken = tmp_path / "broken"
    broken.mkdir()
    checkpoint, _ = runs.load_checkpoint(run)
    next(iter(value for key, value in checkpoint["model"].items() if key.endswith("weight"))).fill_(float("nan"))
    runs.save_checkpoint(broken, checkpoint)
    error = refused("evaluate", str(broken), "--metrics", "noise_robustness")
    assert error == "densreg evaluate: error: noise_robustness of broken: gradient_0.05 is nan\n"


def test_results_before_an_error_are_kept(run, tmp_path, refused):
    out = tmp_path / "out"
    refused("evaluate", str(run), "--metrics", "accuracy", "worst_group", "--out", str(out))
    assert [*json.loads((out / "evaluation.json").read_text())["results"]["short"]] == ["accuracy"]


@pytest.mark.parametrize("writes", ["write_csv", "save_picture"])
def test_full_disk(writes, run, tmp_path, monkeypatch, refused):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runs, writes, full)
    command = ["evaluate", str(run), "--metrics", "activation_maximisation", "--set", "steps=1"]
    error = refused(*command, "--out", str(tmp_path / "out"), status=1)
    assert error.endswith("out: No space left on device\n")


def test_names_of_runs(tmp_path):
    assert evaluation.names_of(["a/one", "b/two"]) == ["one", "two"]
    assert evaluation.names_of(["a/one", "b/one", "two"]) == ["a/one", "b/one", "two"]
    with pytest.raises(ValueError, match="the run a/one is given twice"):
        evaluation.names_of(["a/one", "a/one"])


def test_table():
    results = {"a|b": {"m": {"x": 0.123456}}, "c": {"m": {"x": 1234567.0}}}
    assert evaluation.markdown(results) == (
        "| metric | quantity | a\\|b | c |\n| --- | --- | --- | --- |\n| m | x | 0.1235 | 1.235e+06 |"
    )
