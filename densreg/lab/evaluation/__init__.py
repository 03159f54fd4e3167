"""What a trained classifier is worth: the paper's measurements, of one run or of several side by side.

A metric is a function ``name(model, split, *, device, batch_size, seed=0, ...options) -> dict[str, float]`` in a module
of this package. Its entry in :data:`METRICS` is all that this module and the paper's experiments know of it. The model
takes pixels in [0, 1] and is in eval mode. What is random in a metric follows from the seed and the number of the
image: the size of the batches changes nothing but rounding.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import math
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from densreg.lab import data, models, report, runs, training
from densreg.lab import data as datasets
from densreg.lab.evaluation import accuracy, activation, attacks, attribution, autoattack, leakage, noise, ood, samples
from densreg.lab.options import assignments, parse
from densreg.version import __version__

RESULTS, TABLE = "evaluation.json", "evaluation.csv"


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

Results = dict[str, dict[str, dict[str, float]]]
"""By run, by metric, by quantity."""


def metric(name: str) -> Callable[..., dict[str, float]]:
    """The function of a metric.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in METRICS:
        near = runs.did_you_mean(name, METRICS)
        raise ValueError(f"unknown metric {name!r}; expected some of {', '.join(METRICS)}{near}")
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


# --------------------------------------------------------------------------------------------------------------------
# runs


def names_of(folders: Sequence[str | Path]) -> list[str]:
    """A name for each run: its folder's, or the whole path where two folders have the same.

    Raises:
        ValueError: a run is given twice.
    """
    names = [Path(folder).resolve().name for folder in folders]
    names = [str(folder) if names.count(name) > 1 else name for name, folder in zip(names, folders, strict=True)]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"the run {twice[0]} is given twice")
    return names


def load_runs(
    folders: Sequence[str | Path], device: str | torch.device = "cpu", name: str | None = None
) -> tuple[dict[str, nn.Module], dict[str, dict[str, Any]]]:
    """The models and the configurations of runs, by the runs' names.

    Args:
        name: the data set that they must have been trained on.

    Raises:
        ModelError: a folder holds no readable run.
        RunError: a newer densreg wrote a run, with an option that this one lacks.
        ValueError: a run was trained on another data set.
    """
    if not folders:
        raise ValueError("no run is given; expected a folder that densreg train has written")
    names = names_of(folders)
    loaded = [models.load_checkpoint(folder, device) for folder in folders]
    configs = dict(zip(names, (config for _, config in loaded), strict=True))
    first = next(iter(configs))
    for run, config in configs.items():
        training.check_known(config, run)
        trained = config.get("data")
        if trained != (name or configs[first].get("data")):
            other = f"expected {name}" if name else f"and {first} on {configs[first].get('data')}"
            raise ValueError(f"the run {run} was trained on {trained}, {other}")
    return dict(zip(names, (model for model, _ in loaded), strict=True)), configs


def _check_fits(run: str, model: nn.Module, dataset: data.DataSet, device: torch.device) -> None:
    """Raise ValueError unless a model takes a data set's images and has its classes."""
    size = "x".join(map(str, dataset.image_shape))
    try:
        with torch.no_grad():
            count = model(torch.zeros(1, *dataset.image_shape, device=device)).shape[1]
    except RuntimeError as error:
        raise ValueError(
            f"the model of {run} does not take the {size} images of {dataset.name}: {runs.first_line(error)}"
        ) from error
    if count != dataset.classes:
        raise ValueError(f"the model of {run} has {count} classes, and {dataset.name} here {dataset.classes}")


def _check_trained_on(
    configs: Mapping[str, Mapping[str, Any]], dataset: data.DataSet, split: str, data_dir: str | None
) -> None:
    """Raise ValueError unless a data set, the first run's, is what each of the runs was trained on.

    Args:
        split: the one that is measured, "train" or "test".
        data_dir: as the user gave it: other images of these classes and this shape are accepted then.
    """
    (first, config), *_ = configs.items()
    where, shape = data_dir or config.get("data_dir") or dataset.name, list(dataset.image_shape)
    now = getattr(dataset, split).digest(datasets.CONTENTS) if data_dir is None else None
    for run, held in configs.items():
        classes, image_shape, images = held.get("class_names"), held["image_shape"], held.get("images", {}).get(split)
        if images is None and held.get("data_dir") != config.get("data_dir") and data_dir is None:  # an older run
            own = _dataset(held, None)
            classes, images = own.class_names, getattr(own, split).digest(datasets.CONTENTS)
        other = datasets.other_class(classes, dataset.class_names)
        if other:
            raise ValueError(f"the run {run} was trained on other classes than {where} has: {other}")
        if image_shape != shape:
            trained, given = ("x".join(map(str, sides)) for sides in (image_shape, shape))
            raise ValueError(f"the run {run} was trained on {trained} images, and those in {where} are {given}")
        if now is not None and images not in (None, now):
            apart = "" if run == first else "measure it apart, or "
            raise ValueError(
                f"the {split} images in {where} are not those of the run {run} (other names, sizes, contents, labels "
                f"or groups); {apart}give --data-dir to measure these all the same"
            )


def evaluate(
    folders: Sequence[str | Path],
    metrics: Sequence[str] = ("accuracy",),
    out: str | None = None,
    data: str | None = None,
    data_dir: str | None = None,
    test_size: int | None = None,
    val: bool = False,
    batch_size: int | None = None,
    seed: int = 0,
    device: str = "auto",
    threads: int | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    overwrite: bool = False,
) -> Results:
    """Measure runs on the test images of the data set that they were trained on.

    Leaves evaluation.json (results, options and configurations), evaluation.csv (a row for each quantity, a column for
    each run) and METRIC.png for the metrics that have a picture. The files are written as a whole, after each metric.

    Args:
        folders: what ``densreg train --out`` wrote; all trained on the same images of one data set.
        metrics: names in :data:`METRICS`.
        out: the folder for the files; by default ``evaluation`` in the run's own, where there is only one.
        data: by default that of the runs; another one is an error.
        data_dir: by default the runs', with the images as they were then: others are an error. Images in a folder that
            is given here are measured as they are; they must have the runs' classes and shape.
        test_size: use the first so many test images.
        val: use the training images that the runs held out (``val_size`` in their configuration) in place of the test
            images: to choose a coefficient, for one.
        batch_size: by default the first run's; it bounds the memory.
        seed: of what is random in a metric.
        options: by metric; see the metrics.
        overwrite: whether results already in the folder are replaced.

    Returns:
        The quantities by run and metric. Every one is finite.

    Raises:
        DataError, ModelError, RunError, ValueError: a bad request, or what cannot be computed, in one line.
        ModuleNotFoundError: a metric's extra is not installed; the message names it.
    """
    metrics = [*dict.fromkeys(metrics)]
    chosen = {name: {**options_of(name), **(options or {}).get(name, {})} for name in metrics}
    for name in metrics:  # what is missing is said before anything is computed
        require(name)
    if not folders:
        raise ValueError("no run is given; expected a folder that densreg train has written")
    if out is None:
        if len(folders) != 1:
            raise ValueError("--out is needed for several runs: the folder for their comparison")
        out = str(Path(folders[0]) / "evaluation")
    # Its checks are those of these options too.
    checked = training.Config(
        out, device=device, batch_size=batch_size, seed=seed, threads=threads, test_size=test_size
    ).complete()
    on = torch.device(checked.device)
    loaded, configs = load_runs(folders, on, data)
    config = next(iter(configs.values()))
    dataset = _dataset(config, data_dir)
    for run, model in loaded.items():
        _check_fits(run, model, dataset, on)
    _check_trained_on(configs, dataset, "train" if val else "test", data_dir)
    if val:
        dataset = dataset.held_out(_val_size(configs))
    chosen = {name: with_data(name, given, dataset) for name, given in chosen.items()}
    common: dict[str, Any] = {"device": on, "batch_size": batch_size or config["batch_size"], "seed": seed}
    split = dataset.test.first(test_size)
    results: Results = {run: {} for run in loaded}
    about = {
        "data": dataset.name,
        "note": dataset.note,
        "split": "val" if val else "test",
        "images": len(split),
        "batch_size": common["batch_size"],
        "seed": seed,
        "device": str(on),
        "options": chosen,
        "configs": configs,
        "versions": {"densreg": __version__, "torch": str(torch.__version__)},
    }
    with runs.open_run(out, overwrite, [RESULTS]) as folder, training.threads(threads):
        for name in METRICS:  # of results that are overwritten
            (folder / f"{name}.png").unlink(missing_ok=True)
        for name in metrics:
            for run, model in loaded.items():
                results[run][name] = measure(name, model, split, run, common, chosen[name])
            _write(folder, about, results)
            draw = METRICS[name].draw
            if draw is not None:
                of_metric = {run: results[run][name] for run in loaded}
                figure = draw(samples.Comparison(loaded, of_metric, split, **common, options=chosen[name]))
                with _writing(folder):
                    runs.save_picture(folder / f"{name}.png", figure)
    return results


def _dataset(config: Mapping[str, Any], data_dir: str | None) -> data.DataSet:
    """The data set of a run's configuration, images of the test split without augmentation."""
    known: dict[str, Any] = {name: config.get(name) for name in ("classes", "image_size")}
    return data.load(config["data"], data_dir or config.get("data_dir"), augment=False, **known)


def _val_size(configs: Mapping[str, Mapping[str, Any]]) -> int:
    """How many images all the runs held out; raises ValueError where that is not one number."""
    sizes = {run: config.get("val_size") or 0 for run, config in configs.items()}
    first = next(iter(sizes.values()))
    for run, size in sizes.items():
        if size == 0 or size != first:
            raise ValueError(f"--val: the run {run} held out {size or 'no'} images, expected {first or 'some'}")
    return first


# --------------------------------------------------------------------------------------------------------------------
# tables


def rows_of(results: Results) -> list[dict[str, Any]]:
    """A row for each quantity: metric, quantity, and a column for each run."""
    first = next(iter(results.values()))
    return [
        {"metric": name, "quantity": quantity} | {run: results[run][name][quantity] for run in results}
        for name, values in first.items()
        for quantity in values
    ]


def markdown(results: Results) -> str:
    """The rows as a table in Markdown, numbers to four digits."""
    rows = rows_of(results)
    if not rows:
        return ""
    cells = [[value if isinstance(value, str) else f"{value:.4g}" for value in row.values()] for row in rows]
    return report.markdown_table([[*rows[0]], *cells])


def _write(folder: Path, about: Mapping[str, Any], results: Results) -> None:
    text = json.dumps({**about, "results": results}, indent=2, default=str) + "\n"
    with _writing(folder):
        runs.write_atomically(folder / RESULTS, lambda file: file.write(text.encode()))
        runs.write_csv(folder / TABLE, rows_of(results))


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise runs.TrainingError(f"cannot write to {folder}: {error.strerror or error}") from error
