"""The paper's tables and figures as commands: train what is missing, measure, and put the paper's figures beside ours.

An experiment is some methods on some models and data sets, and what is measured of them. Each training is a run
directory named for what it is, shared by all experiments; a run that was killed goes on, one that is done is only
measured, and a measurement that was made is read. The paper's budgets, coefficients and much else are not known:
ratios between methods are what can be compared, not values. A figure of the paper that is not known is a dash.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from densreg.lab import data as datasets
from densreg.lab import evaluation, models, runs, training
from densreg.lab.evaluation import samples
from densreg.version import __version__

TABLE, ROWS, CONFIG, MEASURED = "table.md", "table.csv", "config.json", "measured.json"

DASH = "-"
"""What stands for a figure of the paper that is not known."""

# --------------------------------------------------------------------------------------------------------------------
# what the paper compares


@dataclass(frozen=True)
class Method:
    """What a row of a table is.

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


@dataclass(frozen=True)
class Measure:
    """A metric of :mod:`densreg.lab.evaluation`.

    Attributes:
        shown: the quantities (or how they begin) that table.md shows; table.csv has all.
        label: in the name of a column, where a metric is measured twice.
    """

    metric: str
    shown: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""

    def column(self, quantity: str) -> str:
        return f"{self.metric}{f' {self.label}' if self.label else ''} {quantity}"


@dataclass(frozen=True)
class Experiment:
    """A table or figure of the paper.

    Attributes:
        columns: of the paper; figures: its rows, by (data, model, method).
        norms: orders of the norm that are trained.
        picture: what is drawn: "budgets", "norms", "maps" or nothing.
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


_CLEAN = Measure("accuracy", ("clean",))
_LEAKAGE = Measure("leakage", ("l2", "share_l2"))
_PGD = Measure("pgd", ("l2", "linf"))
_PGD_CIFAR = Measure("pgd", ("l2", "linf"), {"norm": "inf", "eps": (1 / 255, 2 / 255, 4 / 255)})
_PGD_CIFAR_2 = Measure("pgd", ("l2", "linf"), {"norm": "2", "eps": (0.25, 0.5, 1.0)})
_AUTOATTACK = Measure("autoattack", ("l2", "linf"), {"norm": "inf", "eps": (2 / 255,)})


def _on(data: str, model: str, rows: Mapping[str, tuple[float, ...]]) -> dict[tuple[str, str, str], tuple[float, ...]]:
    return {(data, model, method): figures for method, figures in rows.items()}


def _outside(name: str) -> Measure:
    """AUROC against another data set, whose folder is that of the command unless --set says another."""
    shown = ("log_density", "maximum_logit", "maximum_softmax")
    return Measure("out_of_distribution", shown, {"data": name}, name)


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
        _on(
            "blockmnist",
            "mlp",
            {
                "fgsm_training": (3.324, 87.48, 0.00, 99.02),
                "pgd_training": (2.313, 92.75, 28.05, 98.97),
                "standard": (3.657, 73.57, 0.00, 99.12),
                "softplus": (3.533, 67.95, 0.02, 98.52),
                "hessian": (4.258, 80.06, 0.00, 98.48),
                "input_gradient": (3.461, 83.46, 21.14, 94.56),
                "ig_sum": (3.497, 82.11, 22.73, 92.87),
                "density": (2.259, 85.41, 29.36, 93.05),
            },
        ),
        picture="budgets",
    ),
    "table3": Experiment(
        "Table 3: the density penalty by its paths, on three models and BlockMNIST",
        ("blockmnist",),
        ("mlp", "vgg11", "resnet18"),
        ("standard", "input_gradient", "density_efficient", "density_stable", "density_naive"),
        (_LEAKAGE, _PGD, _CLEAN),
        ("leakage", "adversarial", "clean"),
        {
            **_on(
                "blockmnist",
                "mlp",
                {
                    "standard": (3.657, 73.57, 99.12),
                    "input_gradient": (3.461, 83.46, 94.56),
                    "density_efficient": (2.483, 84.36, 94.22),
                    "density_stable": (2.289, 85.71, 93.45),
                    "density_naive": (2.259, 85.41, 93.05),
                },
            ),
            **_on(
                "blockmnist",
                "vgg11",
                {
                    "standard": (3.418, 79.54, 99.18),
                    "input_gradient": (3.792, 84.72, 97.35),
                    "density_efficient": (2.899, 87.79, 97.74),
                    "density_stable": (2.878, 84.75, 96.63),
                },
            ),
            **_on(
                "blockmnist",
                "resnet18",
                {
                    "standard": (4.113, 39.46, 99.48),
                    "input_gradient": (3.969, 89.69, 97.94),
                    "density_efficient": (3.408, 86.67, 96.29),
                    "density_stable": (3.057, 89.93, 99.16),
                },
            ),
        },
        picture="budgets",
    ),
    "table4": Experiment(
        "Table 4: clean accuracy and PGD-20 at three budgets on CIFAR-100",
        ("cifar100",),
        ("resnet18",),
        ("standard", "score_matching", "input_gradient", "density"),
        (_PGD_CIFAR, _CLEAN),
        ("clean", "PGD-20, first budget", "PGD-20, second", "PGD-20, third"),
        _on(
            "cifar100",
            "resnet18",
            {
                "standard": (58.62, 37.40, 11.54, 4.92),
                "score_matching": (56.66, 39.78, 13.88, 5.29),
                "input_gradient": (57.94, 40.94, 14.88, 5.70),
                "density": (58.62, 47.03, 26.76, 15.19),
            },
        ),
        picture="budgets",
    ),
    "table5": Experiment(
        "Table 5: PGD-20 at three budgets of the other norm on CIFAR-100",
        ("cifar100",),
        ("resnet18",),
        ("standard", "score_matching", "input_gradient", "density"),
        (_PGD_CIFAR_2, _CLEAN),
        ("PGD-20, first budget", "PGD-20, second", "PGD-20, third"),
        _on(
            "cifar100",
            "resnet18",
            {
                "standard": (29.06, 11.13, 4.35),
                "score_matching": (30.05, 12.85, 4.85),
                "input_gradient": (30.95, 13.49, 5.16),
                "density": (41.10, 26.02, 13.38),
            },
        ),
        picture="budgets",
    ),
    "table6": Experiment(
        "Table 6: clean accuracy, PGD-20 and AutoAttack on a Tiny ImageNet subset, CIFAR-10 and SVHN",
        ("tiny-imagenet", "cifar10", "svhn"),
        ("resnet18",),
        ("score_matching", "density"),
        (dataclasses.replace(_PGD_CIFAR, options={"norm": "inf", "eps": (2 / 255,)}), _AUTOATTACK, _CLEAN),
        ("clean", "PGD-20", "AutoAttack"),
        {
            ("tiny-imagenet", "resnet18", "score_matching"): (46.12, 13.46, 11.94),
            ("tiny-imagenet", "resnet18", "density"): (49.58, 17.74, 16.56),
            ("cifar10", "resnet18", "score_matching"): (80.17, 16.93, 15.47),
            ("cifar10", "resnet18", "density"): (80.86, 25.30, 24.42),
            ("svhn", "resnet18", "score_matching"): (92.71, 17.93, 16.30),
            ("svhn", "resnet18", "density"): (93.08, 25.50, 24.91),
        },
    ),
    "table7": Experiment(
        "Table 7: AUROC of telling CIFAR-10 from CIFAR-100 and from SVHN",
        ("cifar10",),
        ("resnet18",),
        ("standard", "score_matching", "input_gradient", "density", "density_efficient"),
        (_outside("cifar100"), _outside("svhn"), _CLEAN),
        ("CIFAR-100, output logit", "CIFAR-100, label logit", "SVHN, output logit", "SVHN, label logit"),
        _on(
            "cifar10",
            "resnet18",
            {
                "standard": (0.218, 0.511, 0.163, 0.531),
                "score_matching": (0.203, 0.523, 0.322, 0.496),
                "input_gradient": (0.345, 0.538, 0.419, 0.570),
                "density": (0.372, 0.507, 0.339, 0.570),
                "density_efficient": (0.378, 0.510, 0.470, 0.590),
            },
        ),
    ),
    "fig4": Experiment(
        "Figure 4: integrated gradients on BlockMNIST, side by side (assumed: what the figure shows is not on record)",
        ("blockmnist",),
        ("mlp",),
        ("standard", "input_gradient", "density"),
        (_LEAKAGE, _CLEAN),
        picture="maps",
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

_NEEDS = {
    "accuracy": ("tqdm", "train"),
    "pgd": ("tqdm", "train"),
    "leakage": ("captum.attr", "evaluate"),
    "autoattack": ("pyautoattack", "autoattack"),
    "out_of_distribution": ("sklearn.metrics", "evaluate"),
}
"""What a metric imports, and the extra with it: better said now than after hours."""

FIG2A = "Figure 2a: the norm of the penalty's gradient over training by every path, as densreg stability"

NAMES = (*EXPERIMENTS, "fig2a")


def experiment(name: str) -> Experiment:
    """An experiment by name.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in EXPERIMENTS:
        raise ValueError(
            f"unknown experiment {name!r}; wanted one of {', '.join(NAMES)}{runs.did_you_mean(name, NAMES)}"
        )
    return EXPERIMENTS[name]


# --------------------------------------------------------------------------------------------------------------------
# what is asked for


@dataclass(frozen=True)
class Budget:
    """How much of an experiment is done, and where; see ``densreg reproduce --help``.

    Attributes:
        methods, models: some of the experiment's; None: all.
        coeff: by method, the coefficients that are trained; where there is none, Config's.
        config: by method ("" for all), options of Config.
        options: by metric, options of the metric.
        norms: orders of the norm; None: the experiment's.
        match_norms: the coefficient is that of p = 2; for others it is multiplied by pixels^(1/2 - 1/p), which makes
            the penalty of a score with entries of one size the same for every p.
        val_size: so many of the last training images are held out and measured, instead of the test images.
        test_size: measure the first so many images.
        batch_size: of the measurements.
    """

    data_dir: str | None = None
    runs: str = "runs/reproduce"
    methods: tuple[str, ...] | None = None
    models: tuple[str, ...] | None = None
    seeds: tuple[int, ...] = (0,)
    epochs: int | None = None
    train_size: int | None = None
    val_size: int | None = None
    test_size: int | None = None
    batch_size: int = 250
    norms: tuple[float, ...] | None = None
    match_norms: bool = False
    coeff: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    config: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    device: str = "auto"
    threads: int | None = None
    download: bool = False


@dataclass(frozen=True)
class Row:
    """One training of an experiment."""

    method: str
    config: training.Config  # complete

    @property
    def key(self) -> tuple[str, str, str]:
        return self.config.data, self.config.model, self.method

    @property
    def penalized(self) -> bool:
        return self.config.coeff > 0


def rows_of(name: str, budget: Budget) -> list[Row]:
    """The trainings of an experiment, complete and checked.

    Raises:
        ValueError: a method, model or option that is not there.
    """
    wanted = experiment(name)
    for kind, given, known in (("method", budget.methods, METHODS), ("seed", budget.seeds, None)):
        if given is not None and not given:
            raise ValueError(f"no {kind} is given; wanted at least one")
        unknown = [value for value in given or () if known is not None and value not in known]
        if unknown:
            near = runs.did_you_mean(str(unknown[0]), METHODS)
            raise ValueError(f"unknown {kind} {unknown[0]!r}; wanted some of {', '.join(METHODS)}{near}")
    strange = [method for method in (*budget.coeff, *budget.config) if method and method not in METHODS]
    if strange:
        near = runs.did_you_mean(strange[0], METHODS)
        raise ValueError(f"unknown method {strange[0]!r}; wanted some of {', '.join(METHODS)}{near}")
    rows: dict[str, Row] = {}
    for data, model in itertools.product(wanted.data, budget.models or wanted.models):
        for method in budget.methods or wanted.methods:
            for p, coeff, seed in itertools.product(
                budget.norms or wanted.norms, budget.coeff.get(method, (None,)), budget.seeds
            ):
                row = _row(budget, data, model, method, p, coeff, seed)
                rows.setdefault(row.config.out, row)  # without a penalty every p is the same run
    return [*rows.values()]


def _row(budget: Budget, data: str, model: str, method: str, p: float, coeff: float | None, seed: int) -> Row:
    defined = METHODS[method].options
    asked = {**budget.config.get(method, {}), **({} if coeff is None else {"coeff": coeff})}
    for key, value in asked.items():
        if defined.get(key, value) != value:
            raise ValueError(f"{key} of the method {method} is {defined[key]!r}, got {value!r}: that is another method")
    own = {**budget.config.get("", {}), **budget.config.get(method, {})}
    others = ("path",) if defined.get("regularizer", "density") != "density" else ()  # that is the density's alone
    own = {key: value for key, value in own.items() if key not in (*defined, *others)}
    values: dict[str, Any] = {"data": data, "model": model, "p": p, "seed": seed}
    values |= {**METHODS[method].defaults, **own, **asked, **defined}
    for name in ("data_dir", "epochs", "train_size", "val_size", "device", "threads", "download"):
        if getattr(budget, name) is not None:
            values[name] = getattr(budget, name)
    known = {entry.name for entry in dataclasses.fields(training.Config)}
    unknown = [name for name in values if name not in known]
    if unknown:
        near = runs.did_you_mean(unknown[0], known)
        raise ValueError(f"unknown option {unknown[0]!r} of method {method}; wanted options of densreg train{near}")
    config = training.Config(out="", **values)
    if budget.match_norms and config.coeff > 0 and p != 2:
        config = dataclasses.replace(config, coeff=float(f"{config.coeff * _match(budget, data, p):.3g}"))
    if config.coeff == 0:
        config = dataclasses.replace(config, p=training.Config.p)  # one run, whichever norm is asked for first
    config = config.complete()
    parts = [data, model, method]
    if config.coeff > 0:
        parts += [f"p{config.p:g}", f"c{config.coeff:g}"]
    parts += [f"e{config.epochs}"]
    parts += [f"n{config.train_size}"] if config.train_size else []
    parts += [f"v{budget.val_size}"] if budget.val_size else []
    parts += [f"{key}={value}" for key, value in own.items()] + [f"s{seed}"]
    return Row(method, dataclasses.replace(config, out=str(Path(budget.runs) / "-".join(parts))))


def _match(budget: Budget, data: str, p: float) -> float:
    """The L2 norm of an image's score in parts of its Lp norm, if all its entries are of one size."""
    shape = datasets.load(data, budget.data_dir, budget.download).image_shape
    return math.prod(shape) ** (1 / 2 - 1 / p)


def parse_coeff(texts: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """Coefficients by method from METHOD=X[,X...].

    Raises:
        ValueError: it is of another form.
    """
    result = {}
    for text in texts:
        method, equals, values = text.partition("=")
        try:
            result[method] = tuple(float(value) for value in values.split(","))
        except ValueError:
            equals = ""
        if not equals:
            raise ValueError(f"--coeff {text}: wanted METHOD=NUMBER, or several numbers with commas")
    return result


def parse_config(texts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Options of Config by method from METHOD.OPTION=VALUE, or OPTION=VALUE for all methods (under "").

    Raises:
        ValueError: it is of another form.
    """
    result: dict[str, dict[str, Any]] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        method, _, option = name.rpartition(".")
        if not equals or not option:
            raise ValueError(f"--config {text}: wanted METHOD.OPTION=VALUE or OPTION=VALUE")
        try:
            parsed = json.loads(value)
        except json.JSONDecodeError:
            parsed = value
        result.setdefault(method, {})[option] = math.inf if value == "inf" else parsed
    return result


# --------------------------------------------------------------------------------------------------------------------
# training and measuring


def run(name: str, budget: Budget, out: str) -> Iterator[str]:
    """Do an experiment: leaves table.md, table.csv (a row for each training), config.json and NAME.png in ``out``.

    Returns:
        Lines that say what is done, while it goes on; the table is the last of them.

    Raises:
        As :func:`densreg.lab.training.fit` and the metrics.
    """
    if name == "fig2a":
        yield from _fig2a(budget, out)
        return
    wanted = experiment(name)
    rows = rows_of(name, budget)
    # Before hours of training:
    for data in wanted.data:
        datasets.load(data, budget.data_dir, budget.download)
    for measure in wanted.measures:
        _outside_images(_options(measure, budget), budget.download)
    for module, extra in (("matplotlib.figure", "train"), *(_NEEDS[m.metric] for m in wanted.measures)):
        samples.require(module, extra)
    table: list[dict[str, Any]] = []
    with runs.open_run(out, True) as folder:
        for i, row in enumerate(rows, 1):
            yield f"{i}/{len(rows)}: {row.config.out}"
            begun = any((Path(row.config.out) / file).exists() for file in runs.FILES)
            torch.compiler.reset()  # or the limit of compilations of one function is met
            training.fit(row.config, resume="auto" if begun else False)
            table.append(_describe(row) | measured(row, wanted.measures, budget))
            paper = wanted.figures.get(row.key, (None,) * len(wanted.columns))
            table[-1] |= {f"paper: {column}": value for column, value in zip(wanted.columns, paper, strict=True)}
            _write(folder, name, wanted, budget, table, rows)
        if wanted.picture:
            runs.save_picture(folder / f"{name}.png", _PICTURES[wanted.picture](wanted, rows, table, budget))
    yield f"results: {folder}"
    yield markdown(wanted, table)


def _describe(row: Row) -> dict[str, Any]:
    config, penalized = row.config, row.penalized
    return {
        "data": config.data,
        "model": config.model,
        "method": row.method,
        "coeff": config.coeff if penalized else "",
        "p": config.p if penalized else "",
        "epochs": config.epochs,
        "train_size": config.train_size or "all",
        "seed": config.seed,
    }


def _options(measure: Measure, budget: Budget) -> dict[str, Any]:
    """All options of a metric, as they are measured with.

    Raises:
        ValueError: one is asked for that makes the column what it is.
    """
    asked = budget.options.get(measure.metric, {})
    if measure.label and asked.get("data", measure.options["data"]) != measure.options["data"]:
        raise ValueError(
            f"--set {measure.metric}.data={asked['data']}: the columns {measure.column('').strip()} are of other images"
        )
    folder = {"data_dir": budget.data_dir} if measure.metric == "out_of_distribution" else {}
    return {**evaluation.options_of(measure.metric), **folder, **measure.options, **asked}


def _outside_images(options: Mapping[str, Any], download: bool = False) -> datasets.Split | None:
    """The images that out_of_distribution compares with; None for other metrics."""
    if "data" not in options:
        return None
    return datasets.load(options["data"], options["data_dir"], download, augment=False).test.first(options["images"])


def measured(row: Row, measures: Sequence[Measure], budget: Budget) -> dict[str, float]:
    """The quantities of a trained run by column; what was measured before is read from its directory.

    It counts if the weights, the images with their labels and this version of densreg are those of now.
    """
    folder = Path(row.config.out)
    model, _ = models.load_checkpoint(folder, row.config.device)
    split = training.Problem(row.config).test.first(budget.test_size)
    of = f"{runs.digest(*model.state_dict().values())} on {split.digest()}, densreg {__version__}"
    known: dict[str, Any] = {"of": of}
    result: dict[str, float] = {}
    with runs.locked(folder):
        with contextlib.suppress(OSError, ValueError):
            found = json.loads((folder / MEASURED).read_text())
            known = found if found.get("of") == of else known
        for measure in measures:
            options = _options(measure, budget)
            said = {key: value for key, value in options.items() if key != "data_dir"}
            outside = _outside_images(options)
            if outside is not None:
                said["of"] = outside.digest()
            key = json.dumps([measure.metric, said, budget.test_size, budget.batch_size])
            if key not in known:
                with training.threads(row.config.threads):
                    values = evaluation.metric(measure.metric)(
                        model, split, device=torch.device(row.config.device), batch_size=budget.batch_size, **options
                    )
                for quantity, value in values.items():
                    if not math.isfinite(value):
                        raise ValueError(f"{measure.metric} of {folder}: {quantity} is {value}")
                known[key] = values
                text = json.dumps(known, indent=2) + "\n"
                runs.write_atomically(folder / MEASURED, lambda file, text=text: file.write(text.encode()))  # type: ignore[misc]
            result |= {measure.column(quantity): value for quantity, value in known[key].items()}
    return result


_FIG2A = ("data_dir", "download", "seeds", "train_size", "device", "threads", "config")


def _fig2a(budget: Budget, out: str) -> Iterator[str]:
    from densreg.lab import stability
    from densreg.paths import PATHS

    ignored = [
        f.name for f in dataclasses.fields(budget) if f.name not in _FIG2A and getattr(budget, f.name) != f.default
    ]
    ignored = [name for name in ignored if getattr(budget, name)] + [m for m in budget.config if m]
    if ignored or len(budget.seeds) != 1:
        raise ValueError(
            f"fig2a does not take {ignored[0] if ignored else 'several seeds'}; wanted some of {', '.join(_FIG2A)}"
        )
    options: dict[str, Any] = {"seed": budget.seeds[0], "train_size": budget.train_size, "device": budget.device}
    options |= {"data_dir": budget.data_dir, "download": budget.download, "threads": budget.threads}
    options |= budget.config.get("", {})
    steps = {"steps": options.pop("steps", 400), "every": options.pop("every", 10)}
    names = [path for path in PATHS if path != "per_class"]
    for data in ("blockmnist", "cifar100"):
        datasets.load(data, budget.data_dir, budget.download)
    yield from stability.run(
        ("blockmnist", "cifar100"), names, (1.0, 100.0), **steps, out=out, overwrite=True, **options
    )


# --------------------------------------------------------------------------------------------------------------------
# tables


_SAME = ("data", "model", "method", "coeff", "p", "epochs", "train_size")
"""Runs that differ in nothing else, but the seed, are a row of table.md."""


def markdown(wanted: Experiment, table: Sequence[Mapping[str, Any]]) -> str:
    """A row for each method, coefficient and norm: our mean over the seeds and standard deviation, and the paper's."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in table:
        groups.setdefault(tuple(row[name] for name in _SAME), []).append(row)
    shown = {
        column: measure
        for measure in wanted.measures
        for column in next(iter(table))
        if any(column.startswith(measure.column(quantity)) for quantity in measure.shown)
        and not column.endswith("_sum")
    }
    paper = [f"paper: {column}" for column in wanted.columns]
    several = [name for name in ("data", "model") if len({row[name] for row in table}) > 1]
    ratio = "leakage l2" in shown
    lines = [[*several, "method", "coefficient", "p", "epochs", "seeds", *shown, *paper]]
    if ratio:
        lines[0].insert(len(several) + 5, "leakage / standard")
        if "leakage" in wanted.columns:
            lines[0].append("paper: leakage / standard")
    lines.append(["---"] * len(lines[0]))
    for rows in groups.values():
        first = rows[0]
        cells = [*(first[name] for name in several), METHODS[first["method"]].label]
        cells += [_number(first["coeff"], "g"), _number(first["p"], "g"), first["epochs"], len(rows)]
        if ratio:
            cells.append(_ratio(rows, table, "leakage l2"))
        cells += [_cell([row[column] for row in rows], measure.metric) for column, measure in shown.items()]
        cells += [DASH if first[column] is None else f"{first[column]:g}" for column in paper]
        if ratio and "leakage" in wanted.columns:
            cells.append(_ratio(rows, table, "paper: leakage"))
        lines.append([str(cell) for cell in cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _number(value: Any, form: str) -> str:
    return DASH if value in ("", None) else format(value, form)


def _cell(values: Sequence[float], metric: str) -> str:
    """Mean and standard deviation, accuracies in percent."""
    percent = metric in ("accuracy", "pgd", "autoattack", "worst_group")
    values = [value * 100 if percent else value for value in values]
    digits = 2 if percent else 3
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def _ratio(rows: Sequence[Mapping[str, Any]], table: Sequence[Mapping[str, Any]], column: str) -> str:
    """Of the mean to that of the standard training of the same data, model, epochs and images."""
    same = ("data", "model", "epochs", "train_size")
    standard = [
        row[column] for row in table if row["method"] == "standard" and all(row[name] == rows[0][name] for name in same)
    ]
    values = [row[column] for row in rows]
    if not standard or None in (*values, *standard):
        return DASH
    return f"{statistics.mean(values) / statistics.mean(standard):.3f}"


def _plain(value: Any) -> Any:
    """As JSON can hold it, which has no infinity."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, float) and math.isinf(value) else value


def _write(
    folder: Path,
    name: str,
    wanted: Experiment,
    budget: Budget,
    table: Sequence[dict[str, Any]],
    rows: Sequence[Row],
) -> None:
    local = ("data_dir", "out", "download")
    configs = [{k: v for k, v in row.config.describe().items() if k not in local} for row in rows[: len(table)]]
    asked = {k: v for k, v in dataclasses.asdict(budget).items() if k not in (*local, "runs")}
    about = {
        "experiment": name,
        "what": wanted.what,
        "asked": asked,
        "metrics": {
            measure.column("").strip(): {
                **evaluation.options_of(measure.metric),
                **measure.options,
                **budget.options.get(measure.metric, {}),
            }
            for measure in wanted.measures
        },
        "versions": {"densreg": __version__, "torch": str(torch.__version__)},
        "runs": dict(zip((Path(row.config.out).name for row in rows), configs, strict=False)),
    }
    text = json.dumps(_plain(about), indent=2) + "\n"
    page = f"# {wanted.what}\n\n{markdown(wanted, table)}\n"
    try:
        runs.write_atomically(folder / CONFIG, lambda file: file.write(text.encode()))
        runs.write_atomically(folder / TABLE, lambda file: file.write(page.encode()))
        runs.write_csv(folder / ROWS, [{k: DASH if v is None else v for k, v in row.items()} for row in table])
    except OSError as error:
        raise runs.TrainingError(f"cannot write to {folder}: {error.strerror or error}") from error


# --------------------------------------------------------------------------------------------------------------------
# pictures


def _label(row: Mapping[str, Any], table: Sequence[Mapping[str, Any]]) -> str:
    name = METHODS[row["method"]].label
    for column, sign in (("coeff", "coefficient"), ("p", "p")):
        if len({other[column] for other in table if other["method"] == row["method"]}) > 1:
            name += f", {sign} {_number(row[column], 'g')}"
    return name


def _draw_budgets(wanted: Experiment, rows: Sequence[Row], table: Sequence[Mapping[str, Any]], budget: Budget) -> Any:
    """Accuracy over the budgets of PGD, one panel for each data set and model."""
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys((row["data"], row["model"]) for row in table))
    figure = Figure(figsize=(6.5 * len(panels), 4.2), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        curves: dict[str, list[list[float]]] = {}
        budgets = [0.0]
        for row in table:
            if (row["data"], row["model"]) == panel:
                columns = [column for column in row if column.startswith("pgd l")]
                budgets = [0.0, *(float(column.rpartition("_")[2]) for column in columns)]
                values = [row["pgd clean"], *(row[column] for column in columns)]
                curves.setdefault(_label(row, table), []).append([100 * value for value in values])
        for name, seeds in curves.items():
            axes.plot(budgets, [statistics.mean(values) for values in zip(*seeds, strict=True)], marker=".", label=name)
        norm = "inf" if any(column.startswith("pgd linf") for column in table[0]) else "2"
        axes.set(title=", ".join(panel), xlabel=f"budget, L{norm}", ylabel="accuracy under PGD, %")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    return figure


def _draw_norms(wanted: Experiment, rows: Sequence[Row], table: Sequence[Mapping[str, Any]], budget: Budget) -> Any:
    """Leakage, its share, and accuracies over the order of the norm; without the penalty: the dashed line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 3.8), layout="constrained")
    penalized = [row for row in table if row["p"] != ""]
    orders = sorted({row["p"] for row in penalized})
    pgd = [column for column in table[0] if column.startswith("pgd l")]
    panels = (
        ("leakage (L2)", ["leakage l2"]),
        ("share of the attribution (L2)", ["leakage share_l2"]),
        ("accuracy, clean and under PGD", ["pgd clean", *pgd]),
    )
    for axes, (title, columns) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for column in columns:
            means = [statistics.mean(row[column] for row in penalized if row["p"] == p) for p in orders]
            (line,) = axes.plot(range(len(orders)), means, marker=".", label=column)
            plain = [row[column] for row in table if row["p"] == ""]
            if plain:
                axes.axhline(statistics.mean(plain), linestyle="--", linewidth=0.8, color=line.get_color())
        axes.set(title=title, xlabel="p (dashed: without the penalty)")
        axes.set_xticks(range(len(orders)), [f"{p:g}" for p in orders])
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small")
    return figure


def _draw_maps(wanted: Experiment, rows: Sequence[Row], table: Sequence[Mapping[str, Any]], budget: Budget) -> Any:
    """Integrated gradients of the label's logit of the first test images, a row for each method; one scale an image."""
    from matplotlib.figure import Figure

    from densreg.lab.evaluation.attribution import attribute

    first = list({row.key: row for row in reversed(rows)}.values())[::-1]
    split = training.Problem(first[0].config).test.first(8)
    x, y = split.batch(torch.arange(len(split)), torch.Generator())
    figure = Figure(figsize=(1.1 * len(x), 2.2 * (1 + len(first))), layout="constrained")
    grid = figure.subplots(1 + len(first), len(x), squeeze=False)
    for axes, image in zip(grid[0], x, strict=True):
        axes.imshow(image[0].numpy(), cmap="gray")
    for line, row in zip(grid[1:], first, strict=True):
        model, _ = models.load_checkpoint(row.config.out)
        maps = attribute(model, x, y, torch.arange(len(x)), "integrated_gradients")
        for axes, values in zip(line, maps.sum(1), strict=True):
            largest = float(values.abs().max()) or 1.0
            axes.imshow(values.cpu().numpy(), cmap="seismic", vmin=-largest, vmax=largest)
        line[0].set_ylabel(METHODS[row.method].label)
    for axes in grid.flat:
        axes.set_xticks([])
        axes.set_yticks([])
    return figure


_PICTURES = {"budgets": _draw_budgets, "norms": _draw_norms, "maps": _draw_maps}
