"""The command line: ``densreg train`` and ``densreg info``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from densreg.paths import PATHS
from densreg.version import __version__


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, without the usage: what was given and what is wanted."""
        self.exit(2, f"{self.prog}: error: {message}\n")


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
    add = train.add_argument
    add("--data", default="digits", metavar="NAME", help="digits, mnist, blockmnist or cifar100")
    add("--data-dir", metavar="DIR", help="folder of the data set, as torchvision lays it out")
    add("--download", action="store_true", help="let torchvision download what is absent")
    add("--model", default="mlp", metavar="NAME", help="mlp, vgg11, resnet18 or any torchvision classifier")
    add("--path", default="fused", metavar="NAME", help=f"how the score is computed: {', '.join(PATHS)}")
    add("--p", type=float, default=2.0, metavar="P", help="order of the norm, 1 to inf")
    add("--coeff", type=float, default=0.1, metavar="X", help="weight of the penalty; 0 trains without it")
    add("--epochs", type=int, metavar="N", help="by default the data set's recipe, as the next four")
    add("--batch-size", type=int, metavar="N", help="images in a step")
    add("--optimizer", metavar="NAME", help="adam or sgd (momentum 0.9)")
    add("--lr", type=float, metavar="X", help="learning rate")
    add("--weight-decay", type=float, metavar="X", help="weight decay")
    add("--seed", type=int, default=0, metavar="N", help="of weights, shuffling, augmentation and random classes")
    add("--train-size", type=int, metavar="N", help="use the first N training images only")
    add("--test-size", type=int, metavar="N", help="use the first N test images only")
    add("--max-steps", type=int, metavar="N", help="stop after N steps")
    add("--log-every", type=int, default=50, metavar="N", help="steps between two rows of steps.csv")
    add("--device", default="auto", metavar="NAME", help="cpu, cuda or auto")
    add("--out", metavar="DIR", help="run directory; by default runs/DATA-MODEL-PATH-pP-cCOEFF-sSEED")
    add("--overwrite", action="store_true", help="replace a run that is already in the run directory")
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
    for name, value in (
        ("densreg", __version__),
        ("python", platform.python_version()),
        ("torch", f"{torch.__version__} (CUDA {torch.version.cuda})" if torch.version.cuda else torch.__version__),
        ("torchvision", version("torchvision")),
        ("triton", version("triton")),
        ("extension", extension),
        ("CPU tensors", cpu),
        ("CUDA tensors", "plain torch: there are no GPU kernels yet"),
        ("nvcc", nvcc or "not found"),
        ("GPU", ", ".join(gpus) or "none"),
    ):
        print(f"{name:13}{value}")
    return 0


def _train(options: dict) -> int:
    try:
        from densreg import training
    except ModuleNotFoundError as error:
        return _fail(f"{error.name} is not installed: pip install 'densreg[train]'", 2)
    overwrite = options.pop("overwrite")
    if options["out"] is None:
        o = options
        options["out"] = f"runs/{o['data']}-{o['model']}-{o['path']}-p{o['p']:g}-c{o['coeff']:g}-s{o['seed']}"
    config = training.Config(**options)
    try:
        training.fit(config, overwrite=overwrite)
    except (ValueError, TypeError) as error:
        return _fail(str(error), 2)
    except training.TrainingError as error:
        return _fail(str(error), 1)
    except KeyboardInterrupt:
        return _fail("interrupted; what the last whole epoch wrote is kept", 130)
    print(f"run directory: {config.out}")
    return 0


def _fail(message: str, status: int) -> int:
    print(f"densreg train: error: {message}", file=sys.stderr)
    return status


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 1 for a training that broke off, 2 for a bad request."""
    options = vars(_parser().parse_args(argv))
    return _info() if options.pop("command") == "info" else _train(options)


if __name__ == "__main__":
    sys.exit(main())
