"""The registry of metrics: what each is and needs, its options, also as text, and its value for one model."""

from __future__ import annotations

import inspect
import math
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from densreg.lab import data, runs
from densreg.lab.evaluation import accuracy, activation, attacks, attribution, autoattack, leakage, noise, ood, samples
from densreg.lab.options import assignments, parse


@dataclass(frozen=True)
class Metric:
    """An entry of :data:`METRICS`: all that the rest of the lab knows of a metric.

    Attributes:
        function: what measures.
        paper: where the paper has it.
        what: one line for the user.
        draw: what draws the picture METRIC.png from a :class:`densreg.lab.evaluation.samples.Comparison`, and gives a
            matplotlib figure; None: there is no picture.
        percent: whether its quantities are fractions that tables show as percentages.
        needs: a module that must be installed for it, and the extra of densreg that installs the module.
        of_data: options that are an attribute of the data set where they are not given.
    """

    function: Callable[..., dict[str, float]]
    paper: str
    what: str
    draw: Callable[[samples.Comparison], Any] | None = None
    percent: bool = False
    needs: tuple[str, str] = ("tqdm", "train")
    of_data: tuple[str, ...] = ()


_MAPS = ("captum.attr", "evaluate")

METRICS = {
    "accuracy": Metric(accuracy.accuracy, "Tables 1, 3", "clean accuracy", percent=True),
    "worst_group": Metric(
        accuracy.worst_group,
        "CelebA-Hair, Waterbirds",
        "accuracy of each group, and of the worst",
        percent=True,
        of_data=("groups",),
    ),
    "leakage": Metric(
        leakage.leakage, "Table 1, Eq. 9", "integrated gradients over BlockMNIST's null tile", leakage.draw, needs=_MAPS
    ),
    "pgd": Metric(
        attacks.pgd, "Tables 1, 3 to 6", "accuracy under projected gradient descent", attacks.draw, percent=True
    ),
    "autoattack": Metric(
        autoattack.autoattack,
        "Table 6",
        "accuracy under AutoAttack (extra autoattack)",
        autoattack.draw,
        percent=True,
        needs=("pyautoattack", "autoattack"),
    ),
    "pixel_perturbation": Metric(
        attribution.pixel_perturbation,
        "Fig. 6a",
        "change of the output without the top and bottom pixels",
        attribution.draw_pixel_perturbation,
        needs=_MAPS,
    ),
    "noise_robustness": Metric(
        noise.noise_robustness, "Fig. 6b, 9", "change of gradient and log density under noise", noise.draw
    ),
    "out_of_distribution": Metric(
        ood.out_of_distribution,
        "Table 7",
        "AUROC of log density, maximum logit, maximum softmax",
        needs=("sklearn.metrics", "evaluate"),
    ),
    "insertion": Metric(
        attribution.insertion,
        "Fig. 1, 13-15",
        "insertion game, with the attribution maps",
        attribution.draw_insertion,
        needs=_MAPS,
    ),
    "activation_maximisation": Metric(
        activation.activation_maximisation, "Fig. 11, 12", "images that maximise a class's logit", activation.draw
    ),
}

_COMMON = ("device", "batch_size", "seed")


def metric(name: str) -> Callable[..., dict[str, float]]:
    """The function of a metric.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in METRICS:
        raise ValueError(runs.unknown("metric", name, METRICS, "some"))
    return METRICS[name].function


def require(name: str, picture: bool = True) -> None:
    """Check that what a metric needs is installed, and what its picture needs.

    Raises:
        ModuleNotFoundError: it is not; the message names the extra.
    """
    entry = METRICS[name]
    samples.require(*entry.needs)
    if picture and entry.draw:
        samples.require("matplotlib.figure", entry.needs[1])


def options_of(name: str) -> dict[str, Any]:
    """The options of a metric and their defaults."""
    parameters = inspect.signature(metric(name)).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in _COMMON}


def with_data(name: str, options: Mapping[str, Any], dataset: data.DataSet) -> dict[str, Any]:
    """Options of a metric, those that were not given taken from the data set where it has them."""
    return {**options, **{key: options[key] or getattr(dataset, key) for key in METRICS[name].of_data}}


def measure(
    name: str,
    model: nn.Module,
    split: data.Split,
    run: str | Path,
    common: Mapping[str, Any],
    options: Mapping[str, Any],
) -> dict[str, float]:
    """What a metric gives.

    Args:
        run: whose model it is, for messages.
        common: device, batch_size and maybe seed; options: of the metric.

    Raises:
        ValueError: a quantity is not finite.
    """
    values = metric(name)(model, split, **common, **options)
    for quantity, value in values.items():
        if not math.isfinite(value):
            raise ValueError(f"{name} of {run}: {quantity} is {value}")
    return {quantity: float(value) for quantity, value in values.items()}


# --------------------------------------------------------------------------------------------------------------------
# options as text


def parse_options(texts: Iterable[str], names: Collection[str]) -> dict[str, dict[str, Any]]:
    """The options of metrics from texts, OPTION=VALUE for all metrics that have it or METRIC.OPTION=VALUE for one.

    Values are of the type of the option; several are separated by commas, and a number may be a fraction (8/255).

    Args:
        names: the metrics.

    Returns:
        By metric, only what was given.

    Raises:
        ValueError: no such option, or a value of another type.
    """
    known = {name: options_of(name) for name in names}
    hints = {name: typing.get_type_hints(metric(name)) for name in names}
    given: dict[str, dict[str, Any]] = {name: {} for name in names}
    for text, key, value in assignments(texts, "--set"):
        where, dot, option = key.rpartition(".")
        users = [name for name in names if option in known[name] and (not dot or name == where)]
        if not users:
            there = "; ".join(f"{name}: {', '.join(options) or 'none'}" for name, options in known.items())
            near = runs.did_you_mean(option, {option for options in known.values() for option in options})
            raise ValueError(f"--set {text}: expected an option of the metrics ({there}){near}")
        for name in users:
            try:
                given[name][option] = parse(value, hints[name][option])
            except ValueError:
                kind = inspect.formatannotation(hints[name][option])
                raise ValueError(f"--set {text}: expected a value of type {kind}") from None
    return given


def describe() -> str:
    """Every metric with its options and their defaults, for a user to read."""
    lines = []
    for name, entry in METRICS.items():
        lines.append(f"{name}: {entry.what} ({entry.paper})")
        lines += [f"    {option}={_text(default)}" for option, default in options_of(name).items()]
    return "\n".join(lines)


def _text(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return ",".join(map(_text, value))
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return f"{value:.6g}" if isinstance(value, float) else str(value)
