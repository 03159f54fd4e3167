"""The paper's tables and figures as commands: train what is missing, measure, and put the paper's figures beside ours.

:mod:`densreg.lab.experiments` says what is trained and measured. Each training is a run directory named for what it
is, shared by all experiments; a run that was interrupted is resumed, one that is done is only measured, and a
measurement that was made is read. A figure of the paper that is not known is a dash.
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
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from densreg.lab import coefficients, evaluation, models, pictures, report, runs, training
from densreg.lab import data as datasets
from densreg.lab.evaluation import ood, samples
from densreg.lab.experiments import (
    BUDGETS,
    EXPERIMENTS,
    FIG2A,
    METHODS,
    NAMES,
    STABILITY,
    Experiment,
    Measure,
    experiment,
)
from densreg.lab.options import assignments
from densreg.version import __version__

__all__ = ["EXPERIMENTS", "FIG2A", "METHODS", "NAMES", "Budget", "Row", "experiment", "measured", "rows_of", "run"]

TABLE, ROWS, CONFIG, MEASURED = "table.md", "table.csv", "config.json", "measured.json"
SEARCH = "coefficients.png"

# --------------------------------------------------------------------------------------------------------------------
# what is asked for


@dataclass(frozen=True)
class Budget:
    """How much of an experiment is done, and where; see ``densreg reproduce --help``.

    Attributes:
        methods, models, data: None: the experiment's.
        coeff: by method, the coefficients that are trained; where there is none, those of
        chosen: by "DATA MODEL" and method, see :func:`densreg.lab.coefficients.read_chosen`; where there is none
            either, Config's.
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
    data: tuple[str, ...] | None = None
    seeds: tuple[int, ...] = (0,)
    epochs: int | None = None
    train_size: int | None = None
    val_size: int | None = None
    test_size: int | None = None
    batch_size: int = 250
    norms: tuple[float, ...] | None = None
    match_norms: bool = False
    coeff: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    chosen: Mapping[str, Mapping[str, tuple[float, ...]]] = field(default_factory=dict)
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


_ELSEWHERE = {"seed": "--seeds", "p": "--p", "model": "--models", "data": "--data", "out": "--runs"}
"""Options of densreg train that reproduce sets by itself, and what sets them."""


def rows_of(name: str, budget: Budget) -> list[Row]:
    """The trainings of an experiment, complete and checked.

    Raises:
        ValueError: a method, model or option that is not there.
    """
    chosen = experiment(name)
    for options in budget.config.values():
        for option, instead in _ELSEWHERE.items():
            if option in options:
                raise ValueError(f"--config {option}: expected options of densreg train; that one is {instead} here")
    for kind, given in (("method", budget.methods), ("seed", budget.seeds)):
        if given is not None and not given:
            raise ValueError(f"expected at least one {kind}, got none")
    for method in (*(budget.methods or ()), *budget.coeff, *filter(None, budget.config)):
        if method not in METHODS:
            raise ValueError(runs.unknown("method", method, METHODS, "some"))
    rows: dict[str, Row] = {}
    for data, model in itertools.product(budget.data or chosen.data, budget.models or chosen.models):
        for method in budget.methods or chosen.methods:
            coeffs = budget.coeff.get(method) or budget.chosen.get(f"{data} {model}", {}).get(method) or (None,)
            if budget.chosen and coeffs == (None,) and METHODS[method].options.get("coeff") != 0:
                raise ValueError(f"--coeff-from has no coefficient of {method} for {data} and {model}: add --coeff")
            for p, coeff, seed in itertools.product(budget.norms or chosen.norms, coeffs, budget.seeds):
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
        raise ValueError(f"unknown option {unknown[0]!r} of method {method}; expected options of densreg train{near}")
    config = training.Config(out="", **values)
    if budget.match_norms and config.coeff > 0 and p != 2:
        config = dataclasses.replace(config, coeff=float(f"{config.coeff * _match(budget, data, p):.3g}"))
    if config.coeff == 0:
        config = dataclasses.replace(config, p=training.Config.p)  # one run, whichever norm is asked for first
    config = config.complete()
    parts = [data, model, method]
    if config.coeff > 0:
        parts += [f"p{_digits(config.p)}", f"c{_digits(config.coeff)}"]
    parts += [f"e{config.epochs}"]
    parts += [f"n{config.train_size}"] if config.train_size else []
    parts += [f"v{budget.val_size}"] if budget.val_size else []
    parts += [f"{key}={value}" for key, value in sorted(own.items())] + [f"s{seed}"]
    return Row(method, dataclasses.replace(config, out=str(Path(budget.runs) / "-".join(parts))))


def _digits(number: float) -> str:
    """Six significant digits, or all of them where six are another number's."""
    return short if float(short := f"{number:g}") == number else repr(number)


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
    form = "METHOD=NUMBER, or several numbers with commas"
    for text, method, values in assignments(texts, "--coeff", form):
        try:
            result[method] = tuple(float(value) for value in values.split(","))
        except ValueError:
            raise ValueError(f"--coeff {text}: expected {form}") from None
    return result


def parse_config(texts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Options of Config by method from METHOD.OPTION=VALUE, or OPTION=VALUE for all methods (under "").

    Raises:
        ValueError: it is of another form.
    """
    result: dict[str, dict[str, Any]] = {}
    for _, key, value in assignments(texts, "--config", "METHOD.OPTION=VALUE or OPTION=VALUE"):
        method, _, option = key.rpartition(".")
        try:
            parsed = json.loads(value)
        except json.JSONDecodeError:
            parsed = value
        result.setdefault(method, {})[option] = math.inf if value == "inf" else parsed
    return result


def preset(name: str, config: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """``config`` as of :class:`Budget`, on top of the options of a named one.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in BUDGETS:
        raise ValueError(runs.unknown("budget", name, BUDGETS))
    return {**{method: dict(own) for method, own in config.items()}, "": {**BUDGETS[name], **config.get("", {})}}


# --------------------------------------------------------------------------------------------------------------------
# training and measuring


def check(name: str, budget: Budget) -> list[Row]:
    """The trainings of an experiment, after all that can be checked before hours of training: data, extras, options.

    Raises:
        As :func:`rows_of`, the data sets and the metrics.
    """
    if name == "fig2a":
        _fig2a_options(budget)
        return []
    chosen = experiment(name)
    rows = rows_of(name, budget)
    samples.require("matplotlib.figure", "train")
    for measure in chosen.measures:
        evaluation.require(measure.metric, picture=measure.metric == chosen.picture)
    for data in budget.data or chosen.data:
        datasets.load(data, budget.data_dir, budget.download)
    for measure in chosen.measures:
        _outside_images(_options(measure, budget), budget.download)
    return rows


def run(name: str, budget: Budget, out: str) -> Iterator[str]:
    """Do an experiment: leaves table.md, table.csv (a row for each training), config.json and NAME.png in ``out``.

    And coefficients.png, where a method was trained with several; with held-out images chosen.json.

    Returns:
        Lines that say what is done, while it goes on; the table is the last of them.

    Raises:
        As :func:`densreg.lab.training.fit` and the metrics; one that diverges has no row, but a line in table.md.
    """
    if name == "fig2a":
        yield from _fig2a(budget, out)
        return
    chosen = experiment(name)
    rows = check(name, budget)
    table: list[dict[str, Any]] = []
    done: list[Row] = []
    diverged: dict[str, str] = {}
    with runs.open_run(out, True) as folder:
        for file in (coefficients.CHOSEN, SEARCH, f"{name}.png"):  # of an earlier call
            (folder / file).unlink(missing_ok=True)
        for i, row in enumerate(rows, 1):
            yield f"{i}/{len(rows)}: {row.config.out}"
            try:
                found = _trained_and_measured(row, chosen, budget)
            # One of several coefficients may be too large: the loss is not finite, or the model ignores its input.
            except (runs.NotFiniteError, samples.Unmeasurable) as error:
                diverged[Path(row.config.out).name] = str(error)
                yield f"diverged, without a row: {error}"
            else:
                done.append(row)
                table.append(found)
            if table:
                _write(folder, name, chosen, budget, table, done, diverged)
        if not table:
            raise runs.NotFiniteError(f"every training diverged, the last: {[*diverged.values()][-1]}")
        attack = coefficients.attack_of(chosen.measures, {row.config.p for row in rows if row.penalized})
        if budget.val_size and attack:
            coefficients.write_chosen(folder, _whole(rows, done, table), attack)
        if chosen.picture:
            runs.save_picture(folder / f"{name}.png", _draw(chosen, done, table, budget))
        if pictures.searched(table):
            runs.save_picture(folder / SEARCH, pictures.draw_coefficients(table))
    yield f"results: {folder}"
    yield markdown(chosen, table)


def _trained_and_measured(row: Row, chosen: Experiment, budget: Budget) -> dict[str, Any]:
    """The row of table.csv for a training, which goes on if it has begun."""
    begun = any((Path(row.config.out) / file).exists() for file in runs.FILES)
    torch.compiler.reset()  # or the limit of compilations of one function is met
    training.fit(row.config, resume="auto" if begun else False)
    found = measured(row, chosen.measures, budget)
    paper = chosen.figures.get(row.key, (None,) * len(chosen.columns))
    figures = {f"paper: {column}": value for column, value in zip(chosen.columns, paper, strict=True)}
    return _describe(row) | found | figures


def _whole(rows: Sequence[Row], done: Sequence[Row], table: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those rows of the table, of ``done``, whose coefficient has a row for each of its seeds."""
    unfinished = {(row.key, row.config.coeff) for row in rows if row not in done}
    return [found for row, found in zip(done, table, strict=True) if (row.key, row.config.coeff) not in unfinished]


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
        raise ValueError(f"--set {measure.metric}.data={asked['data']}: the columns {measure.name} are of other images")
    options = evaluation.options_of(measure.metric)
    folder = {"data_dir": budget.data_dir} if "data_dir" in options else {}
    return {**options, **folder, **measure.options, **asked}


def _outside_images(options: Mapping[str, Any], download: bool = False) -> datasets.Split | None:
    """The test images that a metric with the options data, data_dir and images compares with; None for other ones."""
    if "data" not in options:
        return None
    return ood.outside(options["data"], options["data_dir"], options["images"], download)


def measured(row: Row, measures: Sequence[Measure], budget: Budget) -> dict[str, float]:
    """The quantities of a trained run by column; what was measured before is read from its directory.

    It counts if the weights, the images with their labels and this version of densreg are those of now.
    """
    folder = Path(row.config.out)
    model, _ = models.load_checkpoint(folder, row.config.device)
    problem = training.Problem(row.config)
    split = problem.test.first(budget.test_size)
    of = f"{runs.digest(*model.state_dict().values())} on {split.digest()}, densreg {__version__}"
    known: dict[str, Any] = {"of": of}
    result: dict[str, float] = {}
    with runs.locked(folder):
        with contextlib.suppress(OSError, ValueError):
            found = json.loads((folder / MEASURED).read_text())
            known = found if found.get("of") == of else known
        for measure in measures:
            options = evaluation.with_data(measure.metric, _options(measure, budget), problem.dataset)
            said = {key: value for key, value in options.items() if key != "data_dir"}
            outside = _outside_images(options)
            if outside is not None:
                said["of"] = outside.digest()
            key = json.dumps([measure.metric, said, budget.test_size, budget.batch_size])
            if key not in known:
                common = {"device": torch.device(row.config.device), "batch_size": budget.batch_size}
                with training.threads(row.config.threads):
                    known[key] = evaluation.measure(measure.metric, model, split, folder, common, options)
                runs.write_json(folder / MEASURED, known)
            result |= {measure.column(quantity): value for quantity, value in known[key].items()}
    return result


def _draw(chosen: Experiment, rows: Sequence[Row], table: Sequence[Mapping[str, Any]], budget: Budget) -> Any:
    """The experiment's picture; that of a metric is of the first training of each method, on the first data set."""
    if chosen.picture in pictures.PICTURES:
        return pictures.PICTURES[chosen.picture](table)
    measure = next(measure for measure in chosen.measures if measure.metric == chosen.picture)
    several = len({row.config.model for row in rows}) > 1
    loaded, results = {}, {}
    for row, values in zip(rows, table, strict=True):
        name = METHODS[row.method].label + (f", {row.config.model}" if several else "")
        if row.config.data == rows[0].config.data and name not in loaded:
            loaded[name], _ = models.load_checkpoint(row.config.out, row.config.device)
            results[name] = pictures.means([values], f"{measure.name} ")
    problem = training.Problem(rows[0].config)
    options = evaluation.with_data(measure.metric, _options(measure, budget), problem.dataset)
    draw = evaluation.METRICS[measure.metric].draw
    assert draw is not None
    device = torch.device(rows[0].config.device)
    return draw(samples.Comparison(loaded, results, problem.test, device, budget.batch_size, 0, options))


_FIG2A = ("data_dir", "download", "seeds", "train_size", "device", "threads", "config")


def _fig2a_options(budget: Budget) -> dict[str, Any]:
    """Options of densreg stability; raises ValueError where others are asked for, or data is missing."""
    ignored = [
        f.name for f in dataclasses.fields(budget) if f.name not in _FIG2A and getattr(budget, f.name) != f.default
    ]
    ignored = [name for name in ignored if getattr(budget, name)] + [m for m in budget.config if m]
    if ignored or len(budget.seeds) != 1:
        raise ValueError(
            f"fig2a does not take {ignored[0] if ignored else 'several seeds'}; expected some of {', '.join(_FIG2A)}"
        )
    options: dict[str, Any] = {"seed": budget.seeds[0], "train_size": budget.train_size, "device": budget.device}
    options |= {"data_dir": budget.data_dir, "download": budget.download, "threads": budget.threads}
    options |= budget.config.get("", {})
    for data in STABILITY["data"]:
        datasets.load(data, budget.data_dir, budget.download)
    return options


def _fig2a(budget: Budget, out: str) -> Iterator[str]:
    from densreg.lab import stability

    data, paths, scales = STABILITY["data"], STABILITY["paths"], STABILITY["scales"]
    options = {name: STABILITY[name] for name in ("steps", "every")} | _fig2a_options(budget)
    yield from stability.run(data, paths, scales, **options, out=out, overwrite=True)


# --------------------------------------------------------------------------------------------------------------------
# tables


_SAME = ("data", "model", "method", "coeff", "p", "epochs", "train_size")
"""Runs that differ in nothing else, but the seed, are a row of table.md."""


def markdown(chosen: Experiment, table: Sequence[Mapping[str, Any]]) -> str:
    """A row for each method, coefficient and norm: our mean over the seeds and standard deviation, and the paper's."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in table:
        groups.setdefault(tuple(row[name] for name in _SAME), []).append(row)
    shown = {
        column: measure.metric
        for measure in chosen.measures
        for column in table[0]
        if any(fnmatchcase(column, measure.column(quantity)) for quantity in measure.shown)
    }
    paper = [f"paper: {column}" for column in chosen.columns]
    ratios = {f"{m.metric} / standard": m.column(m.ratio) for m in chosen.measures if m.ratio}
    paper_ratios = {f"{column} / standard": column for column in paper if f"{column[7:]} / standard" in ratios}
    several = [name for name in ("data", "model") if len({row[name] for row in table}) > 1]
    head = ["method", "coefficient", "p", "epochs", "seeds"]
    lines: list[list[Any]] = [[*several, *head, *ratios, *shown, *paper, *paper_ratios]]
    for rows in groups.values():
        first = rows[0]
        line = [*(first[name] for name in several), METHODS[first["method"]].label]
        line += [report.number(first["coeff"]), report.number(first["p"]), first["epochs"], len(rows)]
        line += [_ratio(rows, table, column) for column in ratios.values()]
        line += [_cell([row[column] for row in rows], metric) for column, metric in shown.items()]
        line += [report.number(first[column]) for column in paper]
        line += [_ratio(rows, table, column) for column in paper_ratios.values()]
        lines.append(line)
    return report.markdown_table(lines)


def _cell(values: Sequence[float], metric: str) -> str:
    """Mean and standard deviation of a metric, in percent where its entry says so."""
    percent = evaluation.METRICS[metric].percent
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
        return report.DASH
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
    chosen: Experiment,
    budget: Budget,
    table: Sequence[dict[str, Any]],
    rows: Sequence[Row],
    diverged: Mapping[str, str],
) -> None:
    local = ("data_dir", "out", "download")
    configs = [{k: v for k, v in row.config.describe().items() if k not in local} for row in rows]
    asked = {k: v for k, v in dataclasses.asdict(budget).items() if k not in (*local, "runs")}
    about = {
        "experiment": name,
        "what": chosen.what,
        "asked": asked,
        "metrics": {
            measure.name: {
                **evaluation.options_of(measure.metric),
                **measure.options,
                **budget.options.get(measure.metric, {}),
            }
            for measure in chosen.measures
        },
        "versions": {"densreg": __version__, "torch": str(torch.__version__)},
        "runs": dict(zip((Path(row.config.out).name for row in rows), configs, strict=True)),
        "diverged": diverged,
    }
    notes = "".join(f"\n{run}: {error}\n" for run, error in diverged.items())
    first = f"The first {budget.test_size}" if budget.test_size else "All"
    images = f"of {budget.val_size} held-out training" if budget.val_size else "test"
    of = ", ".join(budget.data or chosen.data)
    page = f"# {chosen.what}\n\n{first} {images} images of {of}.\n\n{markdown(chosen, table)}\n{notes}"
    with runs.writing(folder):
        runs.write_json(folder / CONFIG, _plain(about))
        runs.write_text(folder / TABLE, page)
        runs.write_csv(folder / ROWS, [{k: report.DASH if v is None else v for k, v in row.items()} for row in table])
