"""What densreg measures of itself, one command for each suite; `python -m benchmarks COMMAND --help` describes each."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .timing import WrongResult, environment

COMMANDS = {
    "class-counts": "the kernels alone, across class counts",
    "linear-head": "steps through a linear head of many classes, with logits and without",
    "steps": "whole training steps of several models on one batch",
    "startup": "the first step of a process, with torch's caches empty and filled",
    "second-order": "no times: the penalty's own gradient against float64",
    "compare": "has a ratio worsened, against the committed ones of this kind of machine?",
    "report": "class counts, epochs and growth: tables and pictures of this machine",
    "gpu": "build, tests, kernels, steps, epochs and trainings on a GPU, in stages",
    "triton-aot": "the Triton kernels compiled ahead of time: registers, spills, vector loads",
}

SHARED: dict[str, dict[str, Any]] = {
    "threads": {"type": int, "metavar": "N", "help": "of torch on the CPU"},
    "seconds": {"type": float, "help": "of interleaved rounds for each case"},
    "json": {"type": Path, "metavar": "FILE", "help": "write the rows there too"},
    "data-dir": {"type": Path, "metavar": "DIR", "help": "folder of the data sets; without it images are noise"},
    "device": {"choices": ("cpu", "cuda"), "help": "what is measured"},
}
"""Options that several commands have. A command's ``SHARED`` names its own, with their defaults."""


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog=f"python -m {__package__}", description=__doc__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, what in COMMANDS.items():
        command = commands.add_parser(name, help=what, formatter_class=argparse.RawDescriptionHelpFormatter)
        if [name] == list(arguments[:1]):  # only the chosen module is imported: another may need what is not installed
            module = importlib.import_module(f".{name.replace('-', '_')}", __package__)
            command.description = module.__doc__
            for option, default in module.SHARED.items():
                command.add_argument(f"--{option}", default=default, **SHARED[option])
            module.arguments(command)
    options = parser.parse_args(arguments)
    if getattr(options, "threads", None):
        torch.set_num_threads(options.threads)
    print(", ".join(f"{key} {value}" for key, value in environment().items()), file=sys.stderr, flush=True)
    try:
        return module.run(options)
    except WrongResult as error:
        print(f"wrong, and not timed: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
