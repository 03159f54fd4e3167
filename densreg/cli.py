"""The command line: ``densreg train``, ``densreg stability`` and ``densreg info``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from densreg.data import DATA_SETS
from densreg.models import OWN_MODELS
from densreg.paths import PATHS
from densreg.runs import TrainingError
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
    add("--image-size", type=int, metavar="N", help="side of the images of synthetic and folder")
    add("--no-augment", dest="augment", action="store_false", help="do not crop and flip training images")
    add("--model", default="mlp", metavar="NAME", help=f"{', '.join(OWN_MODELS)} or any torchvision classifier")
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
    add("--max-steps", type=int, metavar="N", help="stop after N steps")
    add("--log-every", type=int, default=50, metavar="N", help="steps between two rows of steps.csv")
    add("--checkpoint-every", type=int, metavar="N", help="steps between checkpoints; by default one an epoch")
    add("--on-nonfinite", default="stop", metavar="WHAT", help="a loss or gradient that is not finite: stop or record")
    add("--tensorboard", action="store_true", help="write events for TensorBoard too")
    add("--out", metavar="DIR", help="run directory; by default runs/DATA-MODEL-PATH-pP-cCOEFF-sSEED")
    add("--resume", action="store_true", help="go on with the run in the run directory")
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

    commands.add_parser("info", help="say what is installed, and which backend serves which device")
    return parser


def _info() -> int:
    """Versions, backends by device, and why one is missing."""
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
    if ops.MISSING is not None:
        extension = f"missing: {ops.MISSING}"
    nvcc = shutil.which("nvcc")
    if nvcc:
        said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout.split("release ")
        nvcc = f"{nvcc}, release {said[1].split(',')[0]}" if len(said) > 1 else nvcc
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    cpu = (
        "plain torch"
        if ops.MISSING is not None
        else f"C++ ({ops.instruction_set()}), {torch.get_num_threads()} threads"
    )
    cuda = {"cuda": "CUDA kernels", "triton": "Triton kernels", "torch": "plain torch"}[ops._preferred("cuda")]
    reasons = "; ".join(f"{name}: {ops.missing(name)}" for name in ops.ORDER["cuda"] if ops.missing(name))
    for name, value in (
        ("densreg", __version__),
        ("python", platform.python_version()),
        ("torch", f"{torch.__version__} (CUDA {torch.version.cuda})" if torch.version.cuda else torch.__version__),
        ("torchvision", version("torchvision")),
        ("triton", version("triton")),
        ("extension", extension),
        ("CPU tensors", cpu),
        ("CUDA tensors", f"{cuda} ({reasons})" if reasons else cuda),
        ("nvcc", nvcc or "not found"),
        ("GPU", ", ".join(gpus) or "none"),
    ):
        print(f"{name:13}{value}")
    return 0


def _train(options: dict) -> int:
    from densreg import training

    overwrite, resume = options.pop("overwrite"), options.pop("resume")
    if options["out"] is None:
        o = options
        options["out"] = f"runs/{o['data']}-{o['model']}-{o['path']}-p{o['p']:g}-c{o['coeff']:g}-s{o['seed']}"
    config = training.Config(**options)
    training.fit(config, overwrite=overwrite, resume=resume)
    print(f"run directory: {config.out}")
    return 0


def _stability(options: dict) -> int:
    from densreg import stability

    for line in stability.run(**options):
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
        return {"train": _train, "stability": _stability}[command](options)
    except ModuleNotFoundError as error:
        return fail(f"{error.name} is not installed: pip install 'densreg[train]'", 2)
    except (ValueError, TypeError) as error:
        return fail(str(error), 2)
    except TrainingError as error:
        return fail(str(error), 1)
    except KeyboardInterrupt:
        resume = "; add --resume to go on from the last checkpoint" if command == "train" else ""
        return fail(f"interrupted{resume}", 130)


if __name__ == "__main__":
    sys.exit(main())
