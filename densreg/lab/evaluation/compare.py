"""Runs side by side: that they fit one another and the data, their measurements, pictures and files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from densreg.lab import data as datasets
from densreg.lab import models, runs, training
from densreg.lab.evaluation.registry import METRICS, measure, options_of, require, with_data
from densreg.lab.evaluation.results import RESULTS, Results, write
from densreg.lab.evaluation.samples import Comparison
from densreg.version import __version__


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
    folders: Sequence[str | Path], device: str | torch.device = "cpu"
) -> tuple[dict[str, nn.Module], dict[str, dict[str, Any]]]:
    """The models and the configurations of runs, by the runs' names.

    Raises:
        ModelError: a folder holds no readable run.
        RunError: a newer densreg wrote a run, with an option that this one lacks.
        ValueError: no run is given, or two were trained on different data sets.
    """
    if not folders:
        raise ValueError("no run is given; expected a folder that densreg train has written")
    names = names_of(folders)
    loaded = [models.load_checkpoint(folder, device) for folder in folders]
    configs = dict(zip(names, (config for _, config in loaded), strict=True))
    first = next(iter(configs))
    for run, config in configs.items():
        training.check_known(config, run)
        if config["data"] != configs[first]["data"]:
            raise ValueError(f"the run {run} was trained on {config['data']}, and {first} on {configs[first]['data']}")
    return dict(zip(names, (model for model, _ in loaded), strict=True)), configs


def _check_fits(run: str, model: nn.Module, dataset: datasets.DataSet, device: torch.device) -> None:
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
    configs: Mapping[str, Mapping[str, Any]], dataset: datasets.DataSet, split: str, data_dir: str | None
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
        other = datasets.other_class(held["class_names"], dataset.class_names)
        if other:
            raise ValueError(f"the run {run} was trained on other classes than {where} has: {other}")
        if held["image_shape"] != shape:
            trained, given = ("x".join(map(str, sides)) for sides in (held["image_shape"], shape))
            raise ValueError(f"the run {run} was trained on {trained} images, and those in {where} are {given}")
        if now is not None and held["images"][split] != now:
            apart = "" if run == first else "measure it apart, or "
            raise ValueError(
                f"the {split} images in {where} are not those of the run {run} (other names, sizes, contents, labels "
                f"or groups); {apart}give --data-dir to measure these all the same"
            )


def evaluate(
    folders: Sequence[str | Path],
    metrics: Sequence[str] = ("accuracy",),
    out: str | None = None,
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
    if out is None:
        if len(folders) > 1:
            raise ValueError("--out is needed for several runs: the folder for their comparison")
        out = str(Path(*folders, "evaluation"))
    # Its checks are those of these options too.
    checked = training.Config(
        out, device=device, batch_size=batch_size, seed=seed, threads=threads, test_size=test_size
    ).complete()
    on = torch.device(checked.device)
    loaded, configs = load_runs(folders, on)
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
            write(folder, about, results)
            draw = METRICS[name].draw
            if draw is not None:
                of_metric = {run: results[run][name] for run in loaded}
                figure = draw(Comparison(loaded, of_metric, split, **common, options=chosen[name]))
                with runs.writing(folder):
                    runs.save_picture(folder / f"{name}.png", figure)
    return results


def _dataset(config: Mapping[str, Any], data_dir: str | None) -> datasets.DataSet:
    """The data set of a run's configuration, images of the test split without augmentation."""
    known: dict[str, Any] = {name: config.get(name) for name in ("classes", "image_size")}
    return datasets.load(config["data"], data_dir or config.get("data_dir"), augment=False, **known)


def _val_size(configs: Mapping[str, Mapping[str, Any]]) -> int:
    """How many images all the runs held out; raises ValueError where that is not one number."""
    sizes = {run: config.get("val_size") or 0 for run, config in configs.items()}
    first = next(iter(sizes.values()))
    for run, size in sizes.items():
        if size == 0 or size != first:
            raise ValueError(f"--val: the run {run} held out {size or 'no'} images, expected {first or 'some'}")
    return first
