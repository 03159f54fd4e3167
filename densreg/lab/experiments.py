"""The paper's experiments as data: methods, what is measured of them, and the paper's own figures.

An experiment is some methods on some models and data sets, and what is measured of them. :mod:`densreg.lab.reproduce`
trains and measures it. The paper's budgets, coefficients and much else are not known: ratios between methods are what
can be compared, not values.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from densreg.lab import runs
from densreg.paths import PATHS


@dataclass(frozen=True)
class Method:
    """A row of a table.

    Attributes:
        label: its name there.
        options: of :class:`densreg.lab.training.Config`, that make the method what it is.
        defaults: further ones, which a budget may change.
    """

    label: str
    options: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)


_DENSITY: dict[str, Any] = {"regularizer": "density", "adversarial": "none"}
_PLAIN: dict[str, Any] = {**_DENSITY, "coeff": 0.0}


def _rival(label: str, name: str, **defaults: Any) -> Method:
    return Method(label, {"regularizer": name, "adversarial": "none"}, defaults)


METHODS = {
    "standard": Method("standard", _PLAIN),
    "density": Method("density", _DENSITY),
    "density_efficient": Method("density, stable & efficient", {**_DENSITY, "path": "taylor"}),
    "density_stable": Method("density, stable", {**_DENSITY, "path": "stable"}),
    "density_naive": Method("density, as first written", {**_DENSITY, "path": "naive"}),
    "input_gradient": _rival("InputGrad (label logit)", "input_gradient"),
    "loss_gradient": _rival("InputGrad (loss)", "loss_gradient"),
    "score_matching": _rival("score matching", "score_matching"),
    "ig_sum": _rival("IG-SUM", "ig_sum"),
    "hessian": _rival("Hessian", "hessian", softplus=10.0),  # that of a ReLU network is 0
    "cure": _rival("CURE", "cure"),
    "softplus": Method("SoftPlus activations", _PLAIN, {"softplus": 10.0}),
    "fgsm_training": Method("adversarial training, FGSM", {**_PLAIN, "adversarial": "fgsm"}, {"adversarial_eps": 0.1}),
    "pgd_training": Method("adversarial training, PGD", {**_PLAIN, "adversarial": "pgd"}, {"adversarial_eps": 0.1}),
}
"""Beside a Config's defaults. Assumed: the paper's InputGrad is the gradient of the label logit, the beta of SoftPlus,
adversarial training in Linf and its eps."""


BUDGETS: dict[str, Mapping[str, Any]] = {
    "paper": {},
    "30-epochs": {"epochs": 30, "lr": 0.1, "schedule": "warmup-cosine", "amp": "bf16", "channels_last": True},
}
"""Options of every training by the budget's name. All but the paper's are ours."""


@dataclass(frozen=True)
class Measure:
    """A metric of :data:`densreg.lab.evaluation.METRICS`, any of them, with its options.

    Attributes:
        shown: the quantities that table.md shows, as patterns (``l2_*``); table.csv has all.
        label: in the name of a column, where a metric is measured twice.
        ratio: a quantity that table.md also shows relative to the standard training's.
    """

    metric: str
    shown: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""
    ratio: str = ""

    @property
    def name(self) -> str:
        """How its columns begin."""
        return f"{self.metric} {self.label}".strip()

    def column(self, quantity: str) -> str:
        return f"{self.name} {quantity}"


@dataclass(frozen=True)
class Experiment:
    """A table or figure of the paper.

    Attributes:
        columns: of the paper; figures: its rows, by (data, model, method).
        norms: orders of the norm that are trained.
        picture: what is drawn: "budgets", "norms", the picture of a metric by the metric's name, or nothing.
    """

    what: str
    data: tuple[str, ...]
    models: tuple[str, ...]
    methods: tuple[str, ...]
    measures: tuple[Measure, ...]
    columns: tuple[str, ...] = ()
    figures: Mapping[tuple[str, str, str], tuple[float, ...]] = field(default_factory=dict)
    norms: tuple[float, ...] = (2.0,)
    picture: str = ""


def _figures(text: str) -> dict[tuple[str, str, str], tuple[float, ...]]:
    """From a line for each row: data, model, method, and a figure for each column."""
    lines = [line.split() for line in text.strip().splitlines()]
    return {(data, model, method): tuple(map(float, values)) for data, model, method, *values in lines}


def outside(name: str) -> Measure:
    """AUROC against another data set, whose folder is that of the command unless --set says another."""
    shown = ("log_density", "maximum_logit", "maximum_softmax")
    return Measure("out_of_distribution", shown, {"data": name}, name)


_CLEAN = Measure("accuracy", ("clean",))
_LEAKAGE = Measure("leakage", ("l2", "share_l2"), ratio="l2")
_PGD = Measure("pgd", ("l2_*", "linf_*"))
_PGD_CIFAR = dataclasses.replace(_PGD, options={"norm": "inf", "eps": (1 / 255, 2 / 255, 4 / 255)})
_PGD_CIFAR_2 = dataclasses.replace(_PGD, options={"norm": "2", "eps": (0.25, 0.5, 1.0)})
_PGD_ONE = dataclasses.replace(_PGD, options={"norm": "inf", "eps": (2 / 255,)})
_AUTOATTACK = dataclasses.replace(_PGD_ONE, metric="autoattack")

EXPERIMENTS = {
    "table1": Experiment(
        "Table 1: feature leakage, accuracy under PGD-20 and clean accuracy on BlockMNIST",
        ("blockmnist",),
        ("mlp",),
        (
            *("fgsm_training", "pgd_training", "standard", "softplus", "hessian", "input_gradient", "loss_gradient"),
            *("ig_sum", "density"),
        ),
        (_LEAKAGE, _PGD, _CLEAN),
        ("leakage", "PGD-20 gentler", "PGD-20 stronger", "clean"),
        _figures("""
            blockmnist mlp fgsm_training   3.324 87.48  0.00 99.02
            blockmnist mlp pgd_training    2.313 92.75 28.05 98.97
            blockmnist mlp standard        3.657 73.57  0.00 99.12
            blockmnist mlp softplus        3.533 67.95  0.02 98.52
            blockmnist mlp hessian         4.258 80.06  0.00 98.48
            blockmnist mlp input_gradient  3.461 83.46 21.14 94.56
            blockmnist mlp ig_sum          3.497 82.11 22.73 92.87
            blockmnist mlp density         2.259 85.41 29.36 93.05
        """),
        picture="budgets",
    ),
    "table3": Experiment(
        "Table 3: the density penalty by its paths, on three models and BlockMNIST",
        ("blockmnist",),
        ("mlp", "vgg11", "resnet18"),
        ("standard", "input_gradient", "density_efficient", "density_stable", "density_naive"),
        (_LEAKAGE, _PGD, _CLEAN),
        ("leakage", "adversarial", "clean"),
        _figures("""
            blockmnist mlp      standard           3.657 73.57 99.12
            blockmnist mlp      input_gradient     3.461 83.46 94.56
            blockmnist mlp      density_efficient  2.483 84.36 94.22
            blockmnist mlp      density_stable     2.289 85.71 93.45
            blockmnist mlp      density_naive      2.259 85.41 93.05
            blockmnist vgg11    standard           3.418 79.54 99.18
            blockmnist vgg11    input_gradient     3.792 84.72 97.35
            blockmnist vgg11    density_efficient  2.899 87.79 97.74
            blockmnist vgg11    density_stable     2.878 84.75 96.63
            blockmnist resnet18 standard           4.113 39.46 99.48
            blockmnist resnet18 input_gradient     3.969 89.69 97.94
            blockmnist resnet18 density_efficient  3.408 86.67 96.29
            blockmnist resnet18 density_stable     3.057 89.93 99.16
        """),
        picture="budgets",
    ),
    "table4": Experiment(
        "Table 4: clean accuracy and PGD-20 at three budgets on CIFAR-100",
        ("cifar100",),
        ("resnet18",),
        ("standard", "score_matching", "input_gradient", "density"),
        (_PGD_CIFAR, _CLEAN),
        ("clean", "PGD-20, first budget", "PGD-20, second", "PGD-20, third"),
        _figures("""
            cifar100 resnet18 standard        58.62 37.40 11.54  4.92
            cifar100 resnet18 score_matching  56.66 39.78 13.88  5.29
            cifar100 resnet18 input_gradient  57.94 40.94 14.88  5.70
            cifar100 resnet18 density         58.62 47.03 26.76 15.19
        """),
        picture="budgets",
    ),
    "table5": Experiment(
        "Table 5: PGD-20 at three budgets of the other norm on CIFAR-100",
        ("cifar100",),
        ("resnet18",),
        ("standard", "score_matching", "input_gradient", "density"),
        (_PGD_CIFAR_2, _CLEAN),
        ("PGD-20, first budget", "PGD-20, second", "PGD-20, third"),
        _figures("""
            cifar100 resnet18 standard        29.06 11.13  4.35
            cifar100 resnet18 score_matching  30.05 12.85  4.85
            cifar100 resnet18 input_gradient  30.95 13.49  5.16
            cifar100 resnet18 density         41.10 26.02 13.38
        """),
        picture="budgets",
    ),
    "table6": Experiment(
        "Table 6: clean accuracy, PGD-20 and AutoAttack on a Tiny ImageNet subset, CIFAR-10 and SVHN",
        ("tiny-imagenet", "cifar10", "svhn"),
        ("resnet18",),
        ("score_matching", "density"),
        (_PGD_ONE, _AUTOATTACK, _CLEAN),
        ("clean", "PGD-20", "AutoAttack"),
        _figures("""
            tiny-imagenet resnet18 score_matching  46.12 13.46 11.94
            tiny-imagenet resnet18 density         49.58 17.74 16.56
            cifar10       resnet18 score_matching  80.17 16.93 15.47
            cifar10       resnet18 density         80.86 25.30 24.42
            svhn          resnet18 score_matching  92.71 17.93 16.30
            svhn          resnet18 density         93.08 25.50 24.91
        """),
    ),
    "table7": Experiment(
        "Table 7: AUROC of telling CIFAR-10 from CIFAR-100 and from SVHN",
        ("cifar10",),
        ("resnet18",),
        ("standard", "score_matching", "input_gradient", "density", "density_efficient"),
        (outside("cifar100"), outside("svhn"), _CLEAN),
        ("CIFAR-100, output logit", "CIFAR-100, label logit", "SVHN, output logit", "SVHN, label logit"),
        _figures("""
            cifar10 resnet18 standard           0.218 0.511 0.163 0.531
            cifar10 resnet18 score_matching     0.203 0.523 0.322 0.496
            cifar10 resnet18 input_gradient     0.345 0.538 0.419 0.570
            cifar10 resnet18 density            0.372 0.507 0.339 0.570
            cifar10 resnet18 density_efficient  0.378 0.510 0.470 0.590
        """),
    ),
    "fig4": Experiment(
        "Figure 4: integrated gradients on BlockMNIST, side by side (assumed: what the figure shows is not on record)",
        ("blockmnist",),
        ("mlp",),
        ("standard", "input_gradient", "density"),
        (_LEAKAGE, _CLEAN),
        picture="leakage",
    ),
    "fig7": Experiment(
        "Figure 7: the order of the norm (the paper's range is not known)",
        ("blockmnist",),
        ("mlp",),
        ("standard", "density"),
        (_LEAKAGE, _PGD, _CLEAN),
        norms=(1.0, 1.5, 2.0, 3.0, 4.0, 5.0, math.inf),
        picture="norms",
    ),
}

FIG2A = "Figure 2a: the norm of the penalty's gradient over training by every path, as densreg stability"

STABILITY: dict[str, Any] = {
    "data": ("blockmnist", "cifar100"),
    "paths": tuple(path for path in PATHS if path != "per_class"),
    "scales": (1.0, 100.0),
    "steps": 400,
    "every": 10,
}
"""What Figure 2a measures, and what ``densreg stability`` does by default; see :func:`densreg.lab.stability.run`."""

NAMES = (*EXPERIMENTS, "fig2a")


def experiment(name: str) -> Experiment:
    """An experiment by name.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in EXPERIMENTS:
        raise ValueError(runs.unknown("experiment", name, NAMES))
    return EXPERIMENTS[name]
