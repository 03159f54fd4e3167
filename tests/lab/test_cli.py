"""The command as a user types it: a run, and one line with exit code 2 for a bad request."""

from __future__ import annotations

import ctypes
import dataclasses
import math
import os
import platform
import subprocess
import sys

import pytest
from on_disk import write_folder

import densreg
from densreg import ops
from densreg.lab import cli, evaluation, training
from densreg.lab.config import GROUPS, Config


def test_run(tmp_path):
    command = [sys.executable, "-m", "densreg", "train", "--epochs", "2", "--coeff", "0.2", "--p", "inf"]
    command += ["--train-size", "256", "--test-size", "50"]
    done = subprocess.run([*command, "--out", "run"], cwd=tmp_path, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[0].startswith("epoch 1/2: loss ")
    assert "penalty" in lines[0]
    assert lines[-1] == "run directory: run"
    assert (tmp_path / "run" / "checkpoint.pt").exists()
    assert "Warning" not in done.stderr


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_is_kept(monkeypatch):
    """What that does to the resident size depends on what else lies in the heap; what glibc is told does not."""
    told = []
    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        monkeypatch.delenv(name)
    mallopt = ctypes.CDLL(None).mallopt

    class Libc:
        def __init__(self, name):
            assert name is None, "the process's own"

        def mallopt(self, option, value):
            told.append((option, value, mallopt(option, value)))

    monkeypatch.setattr(ctypes, "CDLL", Libc)
    cli.keep_freed_memory()
    assert told == [(-1, 2**31 - 1, 1), (-3, 32 << 20, 1)], "M_TRIM_THRESHOLD and M_MMAP_THRESHOLD; 1: accepted"
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1000000")
    cli.keep_freed_memory()
    assert len(told) == 2, "the user's own settings stay"


def test_default_run_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "--epochs", "1", "--train-size", "64", "--test-size", "20", "--path", "taylor"]) == 0
    assert (tmp_path / "runs" / "digits-mlp-taylor-p2-c0.1-s0" / "metrics.csv").exists()


def test_the_demo_says_what_to_run_next(tmp_path, monkeypatch, capsys):
    """Its commands train the same without the penalty and compare both runs; other trainings and --quiet have none."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["bin/densreg"])
    trained = []
    monkeypatch.setattr(training, "fit", lambda config, **options: trained.append(config))
    assert cli.main(["train"]) == 0
    *said, last = capsys.readouterr().out.splitlines()
    assert last == "run directory: runs/digits-mlp-fused-p2-c0.1-s0"
    train, evaluate = (line.split()[1:] for line in said if line.startswith("  bin/densreg "))
    assert cli.main(train) == 0
    assert trained == [Config(last.split()[-1]), Config("runs/digits-mlp-fused-p2-c0-s0", coeff=0.0)]
    options = cli._parser().parse_args(evaluate)
    assert options.folders == [config.out for config in trained]
    assert options.out in next(line for line in said if "picture" in line)
    metrics = evaluation.parse_options(options.set, options.metrics)
    assert metrics == {"pgd": {"eps": (0.25, 0.5, 0.75, 1.0)}}
    assert capsys.readouterr().out == "run directory: runs/digits-mlp-fused-p2-c0-s0\n"
    assert cli.main(["train", "--quiet"]) == 0
    assert capsys.readouterr().out == f"{last}\n"


def test_quiet(tmp_path, capsys):
    command = ["train", "--epochs", "1", "--train-size", "64", "--test-size", "20", "--quiet", "--out", str(tmp_path)]
    assert cli.main(command) == 0
    assert capsys.readouterr() == (f"run directory: {tmp_path}\n", "")


def test_options_are_the_configuration():
    """Every field is an option with its default, in a group of --help."""
    parser = next(action for action in cli._parser()._actions if action.dest == "command").choices["train"]
    options = vars(parser.parse_args([]))
    for name in ("out", "resume", "overwrite", "quiet"):
        options.pop(name)
    assert Config("", **options) == Config("")
    assert options.keys() | {"out"} == {field.name for field in dataclasses.fields(Config)}
    given = "--no-augment --compile --milestones 0.25 0.5 --p inf --epochs 3 --softplus 2 --balance-groups --amp bf16"
    changed = vars(parser.parse_args(given.split()))
    expected = {"augment": False, "compile": True, "milestones": [0.25, 0.5], "p": math.inf, "epochs": 3}
    expected |= {"softplus": 2.0, "balance_groups": True, "amp": "bf16"}
    assert {name: changed[name] for name in options if changed[name] != options[name]} == expected
    text = " ".join(parser.format_help().split())
    for group in (*GROUPS, "(default: digits)", "stop or record (default: stop)"):
        assert group in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "--data imagenet",
            "unknown data set 'imagenet'; expected one of digits, mnist, blockmnist, cifar10, cifar100",
        ),
        ("--data mnist", "--data mnist needs --data-dir"),
        ("--data tiny-imagenet --data-dir .", "wnids.txt: [Errno 2] No such file or directory"),
        ("--data folder --data-dir .", ". has no folders train and val (or test)"),
        ("--data svhn --data-dir .", "no usable SVHN in train_32x32.mat (there is no such file)"),
        ("--image-size 5", "--image-size is for --data synthetic, folder, waterbirds, celeba-hair"),
        ("--schedule linear", "schedule must be constant, step, cosine or warmup-cosine, got 'linear'"),
        ("--milestones 0.5", "milestones are for the schedule step"),
        ("--on-nonfinite skip", "on_nonfinite must be stop or record"),
        ("--resume --overwrite", "--resume continues a run and --overwrite replaces it: choose one"),
        ("--data mnist --data-dir /nowhere", "--data-dir /nowhere is not a folder"),
        ("--model resnet19", "unknown model 'resnet19'"),
        ("--model inception_v3", "cannot be trained with the penalty on 1x8x8 images"),
        ("--path fast", "path must be one of naive"),
        ("--p 0.5", "p must be at least 1 (inf included), got 0.5"),
        ("--regularizer cure --regularizer-options h", "--regularizer-options h: expected OPTION=NUMBER"),
        ("--regularizer cure --regularizer-options h=x", "--regularizer-options h=x: expected OPTION=NUMBER"),
        ("--p two", "argument --p: invalid float value: 'two'"),
        ("--coeff -1", "coeff must be finite and at least 0, got -1.0"),
        ("--epochs 0", "epochs must lie in [1, 2^31), got 0"),
        ("--out /dev/null", "--out /dev/null is a file; expected a folder"),
        ("--out /dev/null/run", "cannot write to --out /dev/null/run: Not a directory"),
        ("--out " + "x" * 300, "File name too long"),
        ("--data mnist --data-dir " + "x" * 300, "File name too long"),
        ("--model resnet18 --batch-size 1", "cannot be trained with the penalty"),
        ("--device cuda:999", "is not there"),
        ("--data cifra100", "; did you mean cifar100 or cifar10?\n"),
        ("--model resnet81", "; did you mean resnet18 or "),
        ("--path taylr", "or directional, got 'taylr'; did you mean taylor?\n"),
        ("--regularizer densty", "hessian or cure, got 'densty'; did you mean density?\n"),
        ("--optimizer adamm", "got 'adamm'; did you mean adam or adamw?\n"),
        (
            "--resume --out runs/mine",
            "no checkpoint in --out runs/mine; --resume auto starts from the beginning",
        ),
        ("--resume mine", "--resume takes auto or nothing, got 'mine'"),
    ],
)
def test_bad_requests(arguments, message, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in refused("train", *arguments.split())


def test_broken_off_training_has_status_one(refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    error = refused("train", "--optimizer", "sgd", "--lr", "1e9", "--epochs", "3", status=1)
    assert error.startswith("densreg train: error: step ")
    assert "largest logit" in error


def test_image_that_is_damaged_in_training_has_status_two(refused, tmp_path, monkeypatch):
    """It is found when a batch wants it, here in a worker."""
    write_folder(tmp_path, {"a": 0, "b": 0}, side=8)
    (tmp_path / "train" / "b" / "1.bmp").write_bytes(b"no image")
    monkeypatch.chdir(tmp_path)
    options = ["--batch-size", "2", "--epochs", "1", "--workers", "1"]
    error = refused("train", "--data", "folder", "--data-dir", ".", *options)
    assert error.startswith("densreg train: error: cannot read the image train/b/1.bmp: ")


def test_resume(refused, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["train", "--epochs", "2", "--train-size", "128", "--test-size", "20", "--out", "run"]
    assert cli.main([*command, "--max-steps", "1"]) == 0
    assert "run already holds config.json; choose another folder or add --resume" in refused(*command)
    assert cli.main([*command, "--resume"]) == 0
    assert "resuming run after step 1, 0 whole epochs" in capsys.readouterr().out
    assert refused(*command, "--resume", "--coeff", "1") == (
        "densreg train: error: --resume: the run in run has coeff 0.1, got 1.0; give the same, or another --out\n"
    )


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"densreg {densreg.__version__}\n"


def test_info(capsys):
    assert cli.main(["info"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["densreg"] == densreg.__version__
    assert lines["extension"].startswith("loaded, built with ")
    assert "C++" in lines["CPU"]
    assert (ops.unavailable_reason("cuda") or "CUDA kernels") in lines["CUDA"]
