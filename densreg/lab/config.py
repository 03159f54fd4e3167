"""The configuration of a training run: one dataclass, whose fields carry what the command line says and checks."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import types
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from densreg import attacks, functional, paths, regularizers
from densreg.lab import data, runs
from densreg.lab.data import taking
from densreg.lab.models import OWN_MODELS
from densreg.lab.runs import RunError
from densreg.version import __version__

COMPILE_STEPS = 1000
"""By default a run is compiled from so many steps on: a compilation takes as long as some hundreds of them."""

PGD_STEPS = 10

AMP = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}

Bound = tuple[Callable[[Any], bool], str]
"""A test of a value, and what it must do: "NAME must ..., got VALUE"."""

_COUNT: Bound = (lambda n: 1 <= n < 2**31, "lie in [1, 2^31)")
_WORKERS: Bound = (lambda n: 0 <= n <= 1024, "lie in [0, 1024]")
_SEED: Bound = (lambda n: 0 <= n < 2**63, "lie in [0, 2^63)")
_MOMENTUM: Bound = (lambda x: 0 <= x < 1, "lie in [0, 1)")
_FRACTION: Bound = (lambda x: 0 < x <= 1, "lie in (0, 1]")
_NONNEGATIVE: Bound = (lambda x: 0 <= x < 1e38, "be finite and at least 0")  # 1e38: float32
_POSITIVE: Bound = (lambda x: 0 < x < 1e38, "be finite and above 0")


def _option(
    default: Any,
    group: str,
    help: str,
    metavar: str | None = None,
    bound: Bound | None = None,
    choices: Collection[str] | None = None,
    free: bool = False,
) -> Any:
    """A field of :class:`Config`.

    Args:
        group: the argument group of ``--help``.
        free: whether it may differ between a run and its continuation: what is trained does not follow from it (up to
            rounding, which device, channels_last, compile and threads change).
    """
    metadata = {"group": group, "help": help, "metavar": metavar, "bound": bound, "choices": choices, "free": free}
    return field(default=default, metadata=metadata)


_DATA, _MODEL, _PENALTY, _ADVERSARIAL = "data", "model", "penalty", "adversarial training"
_OPTIMIZATION, _SPEED, _RUN = "optimization (by default the data set's recipe)", "speed", "run"
GROUPS = (_DATA, _MODEL, _PENALTY, _ADVERSARIAL, _OPTIMIZATION, _SPEED, _RUN)


@dataclass(frozen=True)
class Config:
    """A training run: ``Config(out, data="digits", model="mlp", ...)``.

    The fields are the options of ``densreg train``, whose ``--help`` says what each one is: ``--batch-size 64`` is
    ``batch_size=64``, ``--no-augment`` is ``augment=False``. Every field but ``out`` has a default. ``None`` stands for
    the data set's recipe, or for what the help says; :meth:`complete` fills in the recipe.
    """

    out: str = field(metadata={"group": _RUN, "metavar": "DIR", "free": True, "help": "run directory"})
    data: str = _option("digits", _DATA, f"one of {', '.join(data.DATA_SETS)}")
    model: str = _option("mlp", _MODEL, f"{', '.join(OWN_MODELS)} or any torchvision classifier")
    regularizer: str = _option("density", _PENALTY, "what is penalized", choices=regularizers.REGULARIZERS)
    regularizer_options: Mapping[str, float] | None = _option(
        None, _PENALTY, "options of the regularizer: see docs/rivals.md", "OPTION=VALUE"
    )
    path: str = _option("fused", _PENALTY, "how the density's score is computed", choices=(*paths.PATHS, "directional"))
    p: float = _option(2.0, _PENALTY, "order of the norm, 1 to inf", "P")
    coeff: float = _option(0.1, _PENALTY, "weight of the penalty; 0 trains without it", bound=_NONNEGATIVE)
    head: str = _option(
        "logits",
        _MODEL,
        "the last layer, linear: fused takes it without logits, for 20000 classes and more",
        choices=("logits", "fused"),
    )
    softplus: float | None = _option(None, _MODEL, "beta of a SoftPlus in place of every ReLU; by default ReLU", "BETA")
    adversarial: str = _option(
        "none",
        _ADVERSARIAL,
        "train on perturbed images, made by the model in eval mode",
        choices=("none", "fgsm", "pgd"),
    )
    adversarial_eps: float | None = _option(None, _ADVERSARIAL, "radius of the ball, in pixels in [0, 1]")
    adversarial_norm: float = _option(math.inf, _ADVERSARIAL, "norm of the ball, 2 or inf", "P")
    adversarial_steps: int | None = _option(None, _ADVERSARIAL, f"steps of pgd; by default {PGD_STEPS}", bound=_COUNT)
    adversarial_step_size: float | None = _option(None, _ADVERSARIAL, "step size of pgd; by default 2.5 eps / steps")
    group_dro: float | None = _option(
        None, _DATA, "step size of group DRO, the worst group's cross-entropy; by default the mean", "ETA"
    )
    balance_groups: bool = _option(
        False, _DATA, "draw training images with replacement, each group as likely as any other"
    )
    coeff_warmup: float = _option(
        0.0, _PENALTY, "epochs in which the weight rises from 0, step by step", bound=_NONNEGATIVE
    )
    interval: int = _option(1, _PENALTY, "the penalty on every N-th step only, N times as heavy", bound=_COUNT)
    fraction: float = _option(1.0, _PENALTY, "the penalty of this part of the batch only", bound=_FRACTION)
    epochs: int | None = _option(None, _OPTIMIZATION, "passes over the training images", bound=_COUNT)
    seed: int = _option(0, _OPTIMIZATION, "seed of weights, shuffling, augmentation and random classes", bound=_SEED)
    data_dir: str | None = _option(None, _DATA, "folder of the data set, as torchvision lays it out", "DIR", free=True)
    download: bool = _option(False, _DATA, "let torchvision download what is absent", free=True)
    augment: bool = _option(True, _DATA, "do not crop and flip training images")
    classes: int | None = _option(None, _DATA, f"classes of {taking('classes')}; by default 10", bound=_COUNT)
    image_size: int | None = _option(None, _DATA, f"side of the images of {taking('image_size')}", bound=_COUNT)
    batch_size: int | None = _option(
        None, _OPTIMIZATION, "images in a step, those of all processes together", bound=_COUNT
    )
    optimizer: str | None = _option(None, _OPTIMIZATION, "the optimizer", choices=("sgd", "adam", "adamw"))
    lr: float | None = _option(None, _OPTIMIZATION, "learning rate", bound=_POSITIVE)
    momentum: float = _option(0.9, _OPTIMIZATION, "momentum of sgd", bound=_MOMENTUM)
    weight_decay: float | None = _option(None, _OPTIMIZATION, "weight decay", bound=_NONNEGATIVE)
    schedule: str | None = _option(
        None, _OPTIMIZATION, "how the learning rate changes", choices=("constant", "step", "cosine", "warmup-cosine")
    )
    milestones: tuple[float, ...] | None = _option(
        None, _OPTIMIZATION, "of the schedule step: parts of the epochs, 0 to 1; the learning rate / 10 at each"
    )
    train_size: int | None = _option(None, _DATA, "use the first N training images only", bound=_COUNT)
    test_size: int | None = _option(None, _DATA, "use the first N test images only", bound=_COUNT)
    val_size: int | None = _option(
        None, _DATA, "hold the last N training images out, in place of the test images", bound=_COUNT
    )
    max_steps: int | None = _option(
        None, _OPTIMIZATION, "stop after N steps, within an epoch if need be", bound=_COUNT, free=True
    )
    log_every: int = _option(
        50, _RUN, "steps between two rows of steps.csv, and two checks that all is finite", bound=_COUNT, free=True
    )
    checkpoint_every: int | None = _option(
        None, _RUN, "steps between checkpoints; one at the end of each epoch in any case", bound=_COUNT, free=True
    )
    on_nonfinite: str = _option(
        "stop",
        _RUN,
        "what a loss or gradient that is not finite does",
        "WHAT",
        choices=("stop", "record"),
        free=True,
    )
    device: str = _option("auto", _SPEED, "cpu, cuda or auto: cuda where there is a GPU", "NAME", free=True)
    compile: bool | None = _option(
        None,
        _SPEED,
        f"compile the step as one graph; by default runs of {COMPILE_STEPS} steps and more, whatever max_steps is, but "
        "not per_class, directional and ig_sum",
        free=True,
    )
    amp: str = _option("none", _SPEED, "autocast; fp16 with a scaled loss", choices=AMP)
    channels_last: bool = _option(False, _SPEED, "memory format of images and weights", free=True)
    threads: int | None = _option(None, _SPEED, "threads of torch on the CPU", bound=_COUNT, free=True)
    workers: int = _option(0, _SPEED, "processes that prepare the batches; 0: none", bound=_WORKERS, free=True)
    tensorboard: bool = _option(False, _RUN, "write events for TensorBoard too", free=True)

    def complete(self) -> Config:
        """This configuration with the recipe filled in and every value checked.

        Raises:
            ValueError: an impossible value, in one line.
        """
        values = asdict(self)
        recipe = asdict(data.entry(self.data).recipe)
        milestones = recipe.pop("milestones")
        values |= {name: default for name, default in recipe.items() if values[name] is None}
        for entry in fields(self):
            _check(entry, values[entry.name])
        _complete_penalty(values)
        _complete_attack(values)
        _complete_schedule(values, milestones)
        _complete_device(values)
        return Config(**values)

    def describe(self) -> dict[str, Any]:
        """The configuration as config.json has it; JSON has no infinity, which is "inf"."""
        values = {k: str(v) if isinstance(v, float) and math.isinf(v) else v for k, v in asdict(self).items()}
        return json.loads(json.dumps(values))

    def name(self) -> str:
        """The name of the run directory where none is given."""
        names = [self.data, self.model, self.path if self.regularizer == "density" else self.regularizer]
        names += [f"p{self.p:g}", f"c{self.coeff:g}"]
        names += ["fused-head"] if self.head == "fused" else []
        names += [f"softplus{self.softplus:g}"] if self.softplus is not None else []
        names += [f"{self.adversarial}{self.adversarial_eps or 0:g}"] if self.adversarial != "none" else []
        names += [f"dro{self.group_dro:g}"] if self.group_dro is not None else []
        names += ["balanced"] if self.balance_groups else []
        return "-".join([*names, f"s{self.seed}"])


def _check(entry: Field, value: Any) -> None:
    """Raise ValueError unless a field's value is within its bound and one of its choices."""
    choices, bound = entry.metadata.get("choices"), entry.metadata.get("bound")
    if choices is not None and value not in choices:
        near = runs.did_you_mean(str(value), choices)
        raise ValueError(f"{entry.name} must be {_one_of(choices)}, got {value!r}{near}")
    if bound is not None and value is not None and not bound[0](value):
        raise ValueError(f"{entry.name} must {bound[1]}, got {value}")


def _one_of(choices: Collection[str]) -> str:
    *others, last = choices
    return f"{'one of ' if len(choices) > 4 else ''}{', '.join(others)} or {last}"


def _complete_penalty(values: dict[str, Any]) -> None:
    if values["regularizer_options"] == {}:
        values["regularizer_options"] = None
    if values["path"] == "directional" and values["regularizer"] != "density":
        raise ValueError(f"path directional is for the density penalty, got regularizer {values['regularizer']!r}")
    if values["path"] != "directional":
        regularizers.make(values["regularizer"], values["p"], values["path"], **values["regularizer_options"] or {})
    functional.check_order(values["p"])


def _complete_attack(values: dict[str, Any]) -> None:
    kind = values["adversarial"]
    given = [name for name in ("eps", "steps", "step_size") if values[f"adversarial_{name}"] is not None]
    if kind == "none" and given:
        raise ValueError(f"adversarial_{given[0]} is for adversarial fgsm or pgd, got adversarial 'none'")
    if kind == "fgsm" and len(given) > 1:
        raise ValueError(f"adversarial_{given[1]} is for adversarial pgd; fgsm is one step of size eps")
    attacks.check_norm(values["adversarial_norm"])
    if kind == "none":
        return
    eps = values["adversarial_eps"]
    if eps is None or not 0 < eps < math.inf:
        raise ValueError(f"adversarial {kind} needs an adversarial_eps that is finite and above 0, got {eps}")
    if kind == "pgd":
        steps = values["adversarial_steps"] = values["adversarial_steps"] or PGD_STEPS
        size = values["adversarial_step_size"]
        size = values["adversarial_step_size"] = attacks.default_step_size(eps, steps) if size is None else size
        if not 0 < size < math.inf:
            raise ValueError(f"adversarial_step_size must be finite and above 0, got {size}")


def _complete_schedule(values: dict[str, Any], milestones: tuple[float, ...]) -> None:
    if values["milestones"] is None:
        values["milestones"] = milestones if values["schedule"] == "step" else ()
    elif values["milestones"] and values["schedule"] != "step":
        raise ValueError(f"milestones are for the schedule step, got the schedule {values['schedule']!r}")
    values["milestones"] = tuple(values["milestones"])
    if not all(0 < part <= 1 for part in values["milestones"]):
        raise ValueError(f"milestones must be parts of the epochs, above 0 to 1, got {values['milestones']}")
    if values["schedule"] == "step" and not values["milestones"]:
        raise ValueError("the schedule step needs milestones, in parts of the epochs: 0.5 0.875")


def _complete_device(values: dict[str, Any]) -> None:
    if values["device"] == "auto":
        values["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    if values["device"] == "cuda" and "LOCAL_RANK" in os.environ:  # by torchrun
        values["device"] = f"cuda:{os.environ['LOCAL_RANK']}"
    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", values["device"])
    if not match:
        raise ValueError(f"device must be cpu, cuda, cuda:N or auto, got {values['device']!r}")
    if values["device"] != "cpu" and int(match[1] or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {values['device']!r} is not there: torch sees {torch.cuda.device_count()} GPUs")


# --------------------------------------------------------------------------------------------------------------------
# the command line


def add_options(parser: argparse.ArgumentParser, *names: str) -> dict[str, Any]:
    """Add the fields of :class:`Config` to a parser as options, all but ``out`` or those that are named.

    Returns:
        The argument groups by title.
    """
    hints = typing.get_type_hints(Config)
    groups = {}
    for title in GROUPS:
        entries = [f for f in fields(Config) if f.metadata["group"] == title and f.name in (names or hints)]
        groups[title] = parser.add_argument_group(title)
        for entry in entries:
            if entry.name != "out":
                _add_option(groups[title], entry, hints[entry.name])
    return groups


def _add_option(group: Any, entry: Field, hint: Any) -> None:
    about, flag = entry.metadata, f"--{entry.name.replace('_', '-')}"
    choices = f": {_one_of(about['choices'])}" if about["choices"] else ""
    options: dict[str, Any] = {"dest": entry.name, "default": entry.default, "help": f"{about['help']}{choices}"}
    if hint is bool:
        action = "store_false" if entry.default else "store_true"
        group.add_argument(flag.replace("--", "--no-") if entry.default else flag, action=action, **options)
        return
    kinds = [kind for kind in typing.get_args(hint) if kind is not types.NoneType] if _is_union(hint) else [hint]
    (kind,) = kinds
    if kind is bool:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
        return
    if typing.get_origin(kind) in (tuple, Mapping):
        kind = typing.get_args(kind)[0]
        options["nargs"] = "+"
    metavar = about["metavar"] or {int: "N", float: "X", str: "NAME"}[kind]
    group.add_argument(flag, type=kind, metavar=metavar, **options)


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


# --------------------------------------------------------------------------------------------------------------------
# the configurations of runs

ABOUT = ("class_names", "image_shape", "images", "note", "versions")
"""What config.json holds beside the configuration: what was trained on, and with which versions."""


def check_known(config: Mapping[str, Any], run: str | Path) -> None:
    """Raise RunError where the configuration of a run has an option that this version lacks: a newer one wrote it."""
    unknown = sorted(config.keys() - {entry.name for entry in fields(Config)} - {*ABOUT})
    if unknown:
        raise RunError(newer(run, config, f"the option {unknown[0]!r}"))


def newer(run: str | Path, config: Mapping[str, Any], what: str) -> str:
    """The message about a run that a newer version wrote."""
    wrote = config.get("versions", {}).get("densreg", "another version")
    return f"the run {run} has {what}, which densreg {__version__} does not know: take densreg {wrote}, which wrote it"


def difference(held: Mapping[str, Any], config: Config) -> tuple[str, Any, Any] | None:
    """The first option that makes another training of a run: its name, the run's value and the one that was given.

    Args:
        held: the run's configuration; an option that it lacks had its default.
    """
    default, given = Config(out="").describe(), config.describe()
    for entry in fields(Config):
        before, now = held.get(entry.name, default[entry.name]), given[entry.name]
        if not entry.metadata["free"] and before != now:
            return entry.name, before, now
    return None
