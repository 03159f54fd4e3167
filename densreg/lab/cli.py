"""The command line: ``densreg train``, ``evaluate``, ``reproduce``, ``stability`` and ``info``."""

from __future__ import annotations

import argparse
import ctypes
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from densreg.lab import config
from densreg.lab.experiments import STABILITY
from densreg.lab.options import assignments, parse
from densreg.lab.runs import TrainingError
from densreg.version import __version__


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, without the usage: what was given and what was expected."""
        self.exit(2, f"{self.prog}: error: {message}\n")


class _Help(argparse.HelpFormatter):
    """Adds the default to the help of an option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default, text = action.default, action.help
        if text is None or default in (None, [], argparse.SUPPRESS) or isinstance(default, bool):
            return text
        shown = " ".join(map(str, default)) if isinstance(default, (list, tuple)) else f"{default}"
        return f"{text} (default: {shown})"


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="densreg", description="Training with a smooth input marginal density.")
    parser.add_argument("--version", action="version", version=f"densreg {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)

    train = commands.add_parser(
        "train",
        help="train a classifier with the density penalty",
        description="Train a classifier with cross-entropy + coeff * density penalty; writes a run directory.",
        formatter_class=_Help,
    )
    add = config.add_options(train)["run"].add_argument
    add("--out", metavar="DIR", help="run directory; by default runs/DATA-MODEL-PATH-pP-cCOEFF-sSEED")
    resume = "continue the run in the run directory; auto: start from the beginning where there is none"
    add("--resume", nargs="?", const=True, default=False, metavar="auto", help=resume)
    add("--overwrite", action="store_true", help="replace a run that is already in the run directory")
    add("--quiet", action="store_true", help="print the run directory alone, and warnings")

    stability = commands.add_parser(
        "stability",
        help="the norm of the penalty's gradient over training, by every path",
        description="Train a classifier by each path from the same seed, and measure the Frobenius norm of the "
        "penalty's gradient in the parameters, with the logits as trained and scaled up: a table and pictures.",
        formatter_class=_Help,
    )
    config.add_options(
        stability,
        *("data_dir", "download", "p", "coeff", "batch_size", "lr", "seed", "train_size"),
        *("device", "channels_last", "threads", "workers"),
    )
    add = stability.add_argument
    add("--data", nargs="+", metavar="NAME", help="data sets, one picture for each")
    add("--model", metavar="NAME", help="by default one that suits the data set")
    add("--paths", nargs="+", metavar="NAME", help="paths, each training its own model")
    add("--scales", type=float, nargs="+", metavar="X", help="factors of the measured logits")
    add("--steps", type=int, metavar="N", help="training steps of each path")
    add("--every", type=int, metavar="N", help="steps between two measurements")
    stability.set_defaults(**STABILITY)
    add("--out", default="runs/stability", metavar="DIR", help="folder for stability.csv and stability-DATA.png")
    add("--overwrite", action="store_true", help="replace what is already in the folder")

    evaluate = commands.add_parser(
        "evaluate",
        help="measure trained classifiers: robustness, attributions, out-of-distribution detection",
        description="Measure runs of densreg train on their test images; writes evaluation.json, evaluation.csv and "
        "pictures, and prints a table. Several runs are compared side by side if they were trained on the same images.",
        formatter_class=_Help,
        allow_abbrev=False,  # or --data NAME, as densreg train has it, would be --data-dir
    )
    config.add_options(evaluate, "test_size", "device", "threads")
    add = evaluate.add_argument
    add("folders", nargs="*", metavar="RUN", help="folder that densreg train has written")
    add(
        "--metrics", nargs="+", default=["accuracy"], metavar="NAME", help="what is measured; --list says what there is"
    )
    add("--list", action="store_true", help="print the metrics with their options and defaults, and stop")
    add("--set", nargs="+", default=[], metavar="OPTION=VALUE", help="options of metrics; METRIC.OPTION=VALUE for one")
    add("--data-dir", metavar="DIR", help="measure the images there; by default the run's, as they were in training")
    add("--out", metavar="DIR", help="folder for the results; by default RUN/evaluation")
    add("--val", action="store_true", help="use the training images that the runs held out by --val-size instead")
    add("--batch-size", type=int, metavar="N", help="images at a time, which bounds the memory; by default the run's")
    add("--seed", type=int, default=0, metavar="N", help="of what is random in a metric")
    add("--overwrite", action="store_true", help="replace results that are already in the folder")

    reproduce = commands.add_parser(
        "reproduce",
        help="the paper's tables and figures: train what is missing, measure, compare",
        description="Train what is missing of an experiment of the paper, measure it, and write a table with the "
        "paper's figures beside ours. May be stopped at any time and called again.",
        formatter_class=_Help,
    )
    config.add_options(
        reproduce, *("data_dir", "download", "epochs", "train_size", "val_size", "test_size", "device", "threads")
    )
    add = reproduce.add_argument
    add(
        "experiments",
        nargs="+",
        metavar="NAME",
        help="table1, table3 to table7, fig2a, fig4 or fig7, done in turn; list says what they are",
    )
    add("--budget", default="paper", metavar="NAME", help="paper, or 30-epochs, which is ours: see docs/paper.md")
    add("--out", metavar="DIR", help="folder for the tables, NAME in it for several; by default runs/reproduce/NAME")
    add("--runs", default="runs/reproduce", metavar="DIR", help="folder of the run directories, for all experiments")
    add("--methods", nargs="+", metavar="NAME", help="some of the methods; by default the experiment's")
    add("--models", nargs="+", metavar="NAME", help="models; by default the experiment's")
    add("--data", nargs="+", metavar="NAME", help="data sets; by default the experiment's")
    add("--seeds", type=int, nargs="+", default=[0], metavar="N", help="trainings of each method")
    add("--coeff", nargs="+", default=[], metavar="METHOD=X[,X]", help="coefficients of a method; a row for each")
    add("--coeff-from", metavar="DIR", help="those that a call with --val-size and several --coeff found, in its --out")
    add("--p", type=float, nargs="+", metavar="P", help="orders of the norm; by default the experiment's")
    add("--match-norms", action="store_true", help="coefficient times pixels^(1/2 - 1/p): penalties of equal size")
    add("--config", nargs="+", default=[], metavar="[METHOD.]OPTION=VALUE", help="options of densreg train")
    add("--set", nargs="+", default=[], metavar="METRIC.OPTION=VALUE", help="options of metrics, as densreg evaluate")
    add("--batch-size", type=int, default=250, metavar="N", help="images at a time in the measurements")

    commands.add_parser("info", help="say what is installed, and which backend serves which device")
    return parser


def _info() -> int:
    """Versions, backends by device, and why one is not available."""
    import platform
    import subprocess
    from importlib import metadata

    import torch

    from densreg import ops

    def version(package: str) -> str:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return "not installed"

    build = ops.build_info()
    extension = f"loaded, built with {build.get('compiler', 'an unknown compiler')}"
    if "cuda" in build:
        extension += f", CUDA kernels for {build['cuda']['targets']} with nvcc {build['cuda']['nvcc']}"
    if (reason := ops.unavailable_reason("cpu")) is not None:
        extension = f"not available: {reason}"

    nvcc = shutil.which("nvcc")
    if nvcc:
        said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout.split("release ")
        nvcc = f"{nvcc}, release {said[1].split(',')[0]}" if len(said) > 1 else nvcc
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    for name, value in (
        ("densreg", __version__),
        ("python", platform.python_version()),
        ("torch", f"{torch.__version__} (CUDA {torch.version.cuda})" if torch.version.cuda else torch.__version__),
        ("torchvision", version("torchvision")),
        ("triton", version("triton")),
        ("extension", extension),
        ("CPU tensors", f"{ops.describe('cpu')}, {torch.get_num_threads()} threads"),
        ("CUDA tensors", ops.describe("cuda")),
        ("nvcc", nvcc or "not found"),
        ("GPU", ", ".join(gpus) or "none"),
    ):
        print(f"{name:15}{value}")
    return 0


def _numbers(texts: Sequence[str]) -> dict[str, float]:
    """The options of a regularizer, numbers or true and false."""
    option, form = "--regularizer-options", "OPTION=NUMBER"
    numbers = {}
    for text, name, value in assignments(texts, option, form):
        try:
            numbers[name] = parse(value, float | bool)
        except ValueError:
            raise ValueError(f"{option} {text}: expected {form}") from None
    return numbers


def _train(options: dict) -> int:
    from densreg.lab import training

    if options["regularizer_options"] is not None:
        options["regularizer_options"] = _numbers(options["regularizer_options"])
    overwrite, resume, quiet = options.pop("overwrite"), options.pop("resume"), options.pop("quiet")
    out = options.pop("out")
    request = config.Config(out or "", **options)
    if out is None:
        request = replace(request, out=f"runs/{request.name()}")
    training.fit(request, overwrite=overwrite, resume=resume, quiet=quiet)
    if os.environ.get("RANK", "0") != "0":  # torchrun's first process speaks for all
        return 0
    if request == config.Config(request.out) and not quiet:
        print(_next_steps(request))
    print(f"run directory: {request.out}")
    return 0


def _next_steps(demo: config.Config) -> str:
    """What the demo's numbers mean, and the commands that show what the penalty buys."""
    found = shutil.which("densreg")
    command = sys.argv[0] if Path(sys.argv[0]).name == "densreg" else "python -m densreg"
    command = "densreg" if found and Path(found) == Path(command) else command
    plain = f"runs/{replace(demo, coeff=0.0).name()}"
    return f"""
The penalty is the mean length of the gradient of log p(x) in the image's pixels. Where it is small, small changes of
an image change little. To see what that buys, train without it and attack both models (about a minute):
  {command} train --coeff 0
  {command} evaluate {shlex.quote(demo.out)} {plain} --metrics pgd --set eps=0.25,0.5,0.75,1 --out runs/demo
The table is the accuracy (clean, and under attacks of growing size); the picture is runs/demo/pgd.png.
"""


def _stability(options: dict) -> int:
    from densreg.lab import stability

    for line in stability.run(**options):
        print(line, flush=True)
    return 0


def _evaluate(options: dict) -> int:
    from densreg.lab import evaluation

    if options.pop("list"):
        print(evaluation.describe())
        return 0
    options["options"] = evaluation.parse_options(options.pop("set"), options["metrics"])
    out = options["out"]
    results = evaluation.evaluate(**options)
    print(f"results: {out or Path(options['folders'][0]) / 'evaluation'}\n\n{evaluation.markdown(results)}")
    return 0


def _reproduce(options: dict) -> int:
    from densreg.lab import coefficients, evaluation, reproduce

    names, out = list(dict.fromkeys(options.pop("experiments"))), options.pop("out")
    if "list" in names:
        for known, experiment in reproduce.EXPERIMENTS.items():
            print(f"{known:8}{experiment.what}\n        methods: {', '.join(experiment.methods)}")
        print(f"fig2a   {reproduce.FIG2A}")
        return 0
    experiments = [reproduce.experiment(name) for name in names if name != "fig2a"]
    metrics = {measure.metric for experiment in experiments for measure in experiment.measures}
    options["options"] = evaluation.parse_options(options.pop("set"), metrics)
    options["coeff"] = reproduce.parse_coeff(options["coeff"])
    options["config"] = reproduce.preset(options.pop("budget"), reproduce.parse_config(options["config"]))
    folder = options.pop("coeff_from")
    options["chosen"] = {} if folder is None else coefficients.read_chosen(folder)
    options["norms"] = options.pop("p")
    for key in ("methods", "models", "data", "seeds", "norms"):
        options[key] = None if options[key] is None else tuple(options[key])
    budget = reproduce.Budget(**options)
    for name in names[1:]:  # the first one checks itself
        reproduce.check(name, budget)
    for name in names:
        folder = f"runs/reproduce/{name}" if out is None else out if len(names) == 1 else f"{out}/{name}"
        for line in reproduce.run(name, budget, folder):
            print(line, flush=True)
    return 0


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's mallopt


def keep_freed_memory() -> None:
    """Let malloc keep what is freed, where it is glibc's and no MALLOC_ variable says otherwise.

    By default a training step on a CPU gives the memory of its images back to the system, which clears it for the next
    one: a tenth of a ResNet-20's step.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None and not any(name.startswith("MALLOC_") for name in os.environ):
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_MMAP_THRESHOLD, 32 << 20)  # the most that it takes


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 1 for a training that broke off, 2 for a bad request."""
    options = vars(_parser().parse_args(argv))
    command = options.pop("command")
    if command == "info":
        return _info()

    def fail(message: str, status: int) -> int:
        print(f"densreg {command}: error: {message}", file=sys.stderr)
        return status

    try:
        keep_freed_memory()
        run = {"train": _train, "evaluate": _evaluate, "reproduce": _reproduce, "stability": _stability}[command]
        return run(options)
    except ModuleNotFoundError as error:
        extra = "evaluate" if command in ("evaluate", "reproduce") else "train"
        named = "pip install" in str(error)
        return fail(str(error) if named else f"{error.name} is not installed: pip install 'densreg[{extra}]'", 2)
    except (ValueError, TypeError) as error:
        return fail(str(error), 2)
    except TrainingError as error:
        return fail(str(error), 1)
    except KeyboardInterrupt:
        resume = {
            "train": "; add --resume to continue from the last checkpoint",
            "reproduce": "; call it again to go on",
        }
        return fail(f"interrupted{resume.get(command, '')}", 130)
