"""The command line: ``densreg train``, ``evaluate``, ``reproduce``, ``stability`` and ``info``."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from densreg.lab.data import DATA_SETS
from densreg.lab.models import OWN_MODELS
from densreg.lab.runs import TrainingError
from densreg.paths import PATHS
from densreg.regularizers import REGULARIZERS
from densreg.version import __version__


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, without the usage: what was given and what is wanted."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def _add_task(parser: argparse.ArgumentParser) -> None:
    """What is trained, and how: the options that every training command has."""
    add = parser.add_argument
    add("--data-dir", metavar="DIR", help="folder of the data set, as torchvision lays it out")
    add("--download", action="store_true", help="let torchvision download what is absent")
    add("--p", type=float, default=2.0, metavar="P", help="order of the norm, 1 to inf")
    add("--coeff", type=float, default=0.1, metavar="X", help="weight of the penalty; 0 trains without it")
    add("--batch-size", type=int, metavar="N", help="images in a step; by default the data set's recipe, as the next")
    add("--lr", type=float, metavar="X", help="learning rate")
    add("--seed", type=int, default=0, metavar="N", help="of weights, shuffling, augmentation and random classes")
    add("--train-size", type=int, metavar="N", help="use the first N training images only")
    add("--device", default="auto", metavar="NAME", help="cpu, cuda or auto")
    add("--channels-last", action="store_true", help="memory format of images and weights")
    add("--threads", type=int, metavar="N", help="threads of torch on the CPU")
    add("--workers", type=int, default=0, metavar="N", help="processes that prepare the batches; 0: none")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="densreg", description="Training with a smooth input marginal density.")
    parser.add_argument("--version", action="version", version=f"densreg {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)

    train = commands.add_parser(
        "train",
        help="train a classifier with the density penalty",
        description="Train a classifier with cross-entropy + coeff * density penalty; writes a run directory.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _add_task(train)
    add = train.add_argument
    add("--data", default="digits", metavar="NAME", help=f"one of {', '.join(DATA_SETS)}")
    add("--classes", type=int, metavar="N", help="of the data set synthetic; by default 10")
    add("--image-size", type=int, metavar="N", help="side of the images of synthetic, folder, waterbirds, celeba-hair")
    add("--no-augment", dest="augment", action="store_false", help="do not crop and flip training images")
    add("--model", default="mlp", metavar="NAME", help=f"{', '.join(OWN_MODELS)} or any torchvision classifier")
    add("--regularizer", default="density", metavar="NAME", help=f"what is penalized: {', '.join(REGULARIZERS)}")
    add(
        "--regularizer-options",
        nargs="+",
        default=[],
        metavar="OPTION=VALUE",
        help="of the regularizer: densreg/regularizers.py",
    )
    add("--softplus", type=float, metavar="BETA", help="SoftPlus in place of every ReLU; by default ReLU")
    add("--adversarial", default="none", metavar="NAME", help="train on perturbed images: none, fgsm or pgd")
    add("--adversarial-eps", type=float, metavar="X", help="how far, in pixels in [0, 1]")
    add("--adversarial-norm", type=float, default=math.inf, metavar="P", help="in which norm, 2 or inf")
    add("--adversarial-steps", type=int, metavar="N", help="of pgd; by default 10")
    add("--adversarial-step-size", type=float, metavar="X", help="of pgd; by default 2.5 eps / steps")
    add("--group-dro", type=float, metavar="ETA", help="the worst group's cross-entropy; by default the mean")
    add("--balance-groups", action="store_true", help="draw training images of each group equally often")
    add("--path", default="fused", metavar="NAME", help=f"how the score is computed: {', '.join(PATHS)} or directional")
    add("--interval", type=int, default=1, metavar="N", help="the penalty on every N-th step only, N times as heavy")
    add("--fraction", type=float, default=1.0, metavar="X", help="the penalty of so large a part of the batch only")
    compiled = "compile the step as one graph; by default runs of 1000 steps and more"
    add("--compile", action=argparse.BooleanOptionalAction, default=None, help=compiled)
    add("--amp", default="none", metavar="NAME", help="autocast: none, bf16 or fp16")
    add("--coeff-warmup", type=float, default=0.0, metavar="X", help="epochs in which the weight rises from 0")
    add("--epochs", type=int, metavar="N", help="by default the data set's recipe, as the next four")
    add("--optimizer", metavar="NAME", help="sgd, adam or adamw")
    add("--weight-decay", type=float, metavar="X", help="weight decay")
    add("--schedule", metavar="NAME", help="of the learning rate: constant, step or cosine")
    add("--milestones", type=float, nargs="+", metavar="X", help="of step: parts of the epochs; /10 at each")
    add("--momentum", type=float, default=0.9, metavar="X", help="of sgd")
    add("--test-size", type=int, metavar="N", help="use the first N test images only")
    add("--val-size", type=int, metavar="N", help="hold the last N training images out, in place of the test images")
    add("--max-steps", type=int, metavar="N", help="stop after N steps")
    add("--log-every", type=int, default=50, metavar="N", help="steps between two rows of steps.csv")
    add("--checkpoint-every", type=int, metavar="N", help="steps between checkpoints; by default one an epoch")
    add("--on-nonfinite", default="stop", metavar="WHAT", help="a loss or gradient that is not finite: stop or record")
    add("--tensorboard", action="store_true", help="write events for TensorBoard too")
    add("--out", metavar="DIR", help="run directory; by default runs/DATA-MODEL-PATH-pP-cCOEFF-sSEED")
    add(
        "--resume",
        nargs="?",
        const=True,
        default=False,
        metavar="auto",
        help="go on with the run in the run directory; auto: from the beginning where there is none",
    )
    add("--overwrite", action="store_true", help="replace a run that is already in the run directory")

    stability = commands.add_parser(
        "stability",
        help="the norm of the penalty's gradient over training, by every path",
        description="Train a classifier by each path from the same seed, and measure the Frobenius norm of the "
        "penalty's gradient in the parameters, with the logits as trained and scaled up: a table and pictures.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _add_task(stability)
    add = stability.add_argument
    add("--data", nargs="+", default=["blockmnist", "cifar100"], metavar="NAME", help="data sets, one picture for each")
    add("--model", metavar="NAME", help="by default mlp for blockmnist, mnist and digits, otherwise resnet18")
    add(
        "--paths",
        nargs="+",
        default=[path for path in PATHS if path != "per_class"],
        metavar="NAME",
        help="paths, each training its own model",
    )
    add("--scales", type=float, nargs="+", default=[1.0, 100.0], metavar="X", help="factors of the measured logits")
    add("--steps", type=int, default=400, metavar="N", help="training steps of each path")
    add("--every", type=int, default=10, metavar="N", help="steps between two measurements")
    add("--out", default="runs/stability", metavar="DIR", help="folder for stability.csv and stability-DATA.png")
    add("--overwrite", action="store_true", help="replace what is already in the folder")

    evaluate = commands.add_parser(
        "evaluate",
        help="measure trained classifiers: robustness, attributions, out-of-distribution detection",
        description="Measure runs of densreg train on their test images; writes evaluation.json, evaluation.csv and "
        "pictures, and prints a table. Several runs are compared side by side if they were trained on the same images.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = evaluate.add_argument
    add("folders", nargs="*", metavar="RUN", help="folder that densreg train has written")
    add(
        "--metrics", nargs="+", default=["accuracy"], metavar="NAME", help="what is measured; --list says what there is"
    )
    add("--list", action="store_true", help="print the metrics with their options and defaults, and stop")
    add("--set", nargs="+", default=[], metavar="OPTION=VALUE", help="options of metrics; METRIC.OPTION=VALUE for one")
    add("--data", metavar="NAME", help="data set; by default the run's, and another one is an error")
    add("--data-dir", metavar="DIR", help="measure the images there; by default the run's, as they were in training")
    add("--out", metavar="DIR", help="folder for the results; by default RUN/evaluation")
    add("--test-size", type=int, metavar="N", help="use the first N test images only")
    add("--val", action="store_true", help="use the training images that the runs held out by --val-size instead")
    add("--batch-size", type=int, metavar="N", help="images at a time, which bounds the memory; by default the run's")
    add("--seed", type=int, default=0, metavar="N", help="of what is random in a metric")
    add("--device", default="auto", metavar="NAME", help="cpu, cuda or auto")
    add("--threads", type=int, metavar="N", help="threads of torch on the CPU")
    add("--overwrite", action="store_true", help="replace results that are already in the folder")

    reproduce = commands.add_parser(
        "reproduce",
        help="the paper's tables and figures: train what is missing, measure, compare",
        description="Train what is missing of an experiment of the paper, measure it, and write a table with the "
        "paper's figures beside ours. May be stopped at any time and called again.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = reproduce.add_argument
    add("experiment", metavar="NAME", help="table1, table3 to table7, fig2a, fig4 or fig7; list says what they are")
    add("--data-dir", metavar="DIR", help="folder of the data sets, as torchvision lays them out")
    add("--download", action="store_true", help="let torchvision download what is absent")
    add("--out", metavar="DIR", help="folder for the tables; by default runs/reproduce/NAME")
    add("--runs", default="runs/reproduce", metavar="DIR", help="folder of the run directories, for all experiments")
    add("--methods", nargs="+", metavar="NAME", help="some of the methods; by default the experiment's")
    add("--models", nargs="+", metavar="NAME", help="models; by default the experiment's")
    add("--seeds", type=int, nargs="+", default=[0], metavar="N", help="trainings of each method")
    add("--epochs", type=int, metavar="N", help="by default the paper's")
    add("--train-size", type=int, metavar="N", help="use the first N training images only")
    add("--val-size", type=int, metavar="N", help="hold the last N training images out, and measure these")
    add("--test-size", type=int, metavar="N", help="measure the first N images only")
    add("--coeff", nargs="+", default=[], metavar="METHOD=X[,X]", help="coefficients of a method; a row for each")
    add("--p", type=float, nargs="+", metavar="P", help="orders of the norm; by default the experiment's")
    add("--match-norms", action="store_true", help="coefficient times pixels^(1/2 - 1/p): penalties of equal size")
    add("--config", nargs="+", default=[], metavar="[METHOD.]OPTION=VALUE", help="options of densreg train")
    add("--set", nargs="+", default=[], metavar="METRIC.OPTION=VALUE", help="options of metrics, as densreg evaluate")
    add("--batch-size", type=int, default=250, metavar="N", help="images at a time in the measurements")
    add("--device", default="auto", metavar="NAME", help="cpu, cuda or auto")
    add("--threads", type=int, metavar="N", help="threads of torch on the CPU")

    commands.add_parser("info", help="say what is installed, and which backend serves which device")
    return parser


def _info() -> int:
    """Versions, backends by device, and why one is not available."""
    import platform
    import shutil
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


def _numbers(options: Sequence[str]) -> dict[str, float]:
    """OPTION=VALUE, of numbers and of true and false."""
    numbers: dict[str, float] = {}
    for option in options:
        name, _, value = option.partition("=")
        try:
            number = {"true": True, "false": False}.get(value.lower())
            numbers[name] = float(value) if number is None else number
        except ValueError as error:
            raise ValueError(f"--regularizer-options takes OPTION=NUMBER, got {option!r}") from error
    return numbers


def _train(options: dict) -> int:
    from densreg.lab import training

    overwrite, resume = options.pop("overwrite"), options.pop("resume")
    options["regularizer_options"] = _numbers(options["regularizer_options"])
    if options["out"] is None:
        o = options
        names = [o["data"], o["model"], o["path"] if o["regularizer"] == "density" else o["regularizer"]]
        names += [f"p{o['p']:g}", f"c{o['coeff']:g}"]
        names += [f"softplus{o['softplus']:g}"] if o["softplus"] is not None else []
        names += [f"{o['adversarial']}{o['adversarial_eps'] or 0:g}"] if o["adversarial"] != "none" else []
        names += [f"dro{o['group_dro']:g}"] if o["group_dro"] is not None else []
        names += ["balanced"] if o["balance_groups"] else []
        options["out"] = "runs/" + "-".join([*names, f"s{o['seed']}"])
    config = training.Config(**options)
    training.fit(config, overwrite=overwrite, resume=resume)
    print(f"run directory: {config.out}")
    return 0


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
    from densreg.lab import evaluation, reproduce

    name, out = options.pop("experiment"), options.pop("out")
    if name == "list":
        for known, experiment in reproduce.EXPERIMENTS.items():
            print(f"{known:8}{experiment.what}\n        methods: {', '.join(experiment.methods)}")
        print(f"fig2a   {reproduce.FIG2A}")
        return 0
    metrics = set() if name == "fig2a" else {measure.metric for measure in reproduce.experiment(name).measures}
    options["options"] = evaluation.parse_options(options.pop("set"), metrics)
    options["coeff"] = reproduce.parse_coeff(options["coeff"])
    options["config"] = reproduce.parse_config(options["config"])
    options["norms"] = options.pop("p")
    for key in ("methods", "models", "seeds", "norms"):
        options[key] = None if options[key] is None else tuple(options[key])
    for line in reproduce.run(name, reproduce.Budget(**options), out or f"runs/reproduce/{name}"):
        print(line, flush=True)
    return 0


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
        resume = {"train": "; add --resume to go on from the last checkpoint", "reproduce": "; call it again to go on"}
        return fail(f"interrupted{resume.get(command, '')}", 130)
