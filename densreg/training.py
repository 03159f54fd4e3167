"""Training a classifier with the density penalty: the step, the epochs, and the run directory."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import platform
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from densreg import data, functional, models, paths
from densreg.penalty import density_loss, density_penalty
from densreg.version import __version__

METRICS, STEPS = "metrics.csv", "steps.csv"

PENALTY_SAMPLES = 1000
"""Test images over which the epoch's test penalty is the mean: it costs three forwards, accuracy one."""


class RunError(ValueError):
    """The run directory cannot be used; the message is one line for the user."""


class TrainingError(RuntimeError):
    """Training cannot go on; the message is one line for the user."""


@dataclass(frozen=True)
class Recipe:
    """Defaults of a data set. The paper's where it gives them (lr, epochs, milestones), else the field's usual."""

    epochs: int
    optimizer: str
    lr: float
    batch_size: int
    weight_decay: float = 0.0
    milestones: tuple[float, ...] = ()  # in parts of the epochs; the learning rate is divided by 10 at each


_MNIST_RECIPE = Recipe(epochs=80, optimizer="adam", lr=1e-4, batch_size=128)
RECIPES = {
    "digits": Recipe(epochs=30, optimizer="adam", lr=1e-3, batch_size=64),
    "mnist": _MNIST_RECIPE,
    "blockmnist": _MNIST_RECIPE,
    "cifar100": Recipe(
        epochs=200, optimizer="sgd", lr=0.01, batch_size=128, weight_decay=5e-4, milestones=(0.5, 0.875)
    ),
}


@dataclass(frozen=True)
class Config:
    """What a run is. ``None`` stands for the data set's recipe; :meth:`complete` fills it in.

    Attributes:
        data, data_dir, download: see :func:`densreg.data.load`.
        model: see :func:`densreg.models.build`.
        path, p, coeff: the penalty; with coeff 0 it is not computed at all.
        out: the run directory.
        seed: of weights, shuffling, augmentation and random classes.
        train_size, test_size: use only so many images of a split.
        max_steps: stop after so many steps of the optimizer, in the middle of an epoch if need be.
        log_every: steps between two rows of steps.csv.
        device: "auto" is CUDA where there is one.
    """

    out: str
    data: str = "digits"
    model: str = "mlp"
    path: str = "fused"
    p: float = 2.0
    coeff: float = 0.1
    epochs: int | None = None
    seed: int = 0
    data_dir: str | None = None
    download: bool = False
    batch_size: int | None = None
    optimizer: str | None = None
    lr: float | None = None
    weight_decay: float | None = None
    train_size: int | None = None
    test_size: int | None = None
    max_steps: int | None = None
    log_every: int = 50
    device: str = "auto"

    def complete(self) -> Config:
        """This configuration with the recipe filled in and every value checked.

        Raises:
            ValueError: an impossible value, in one line.
        """
        if self.data not in RECIPES:
            raise data.DataError(f"unknown data set {self.data!r}; wanted one of {', '.join(RECIPES)}")
        recipe = RECIPES[self.data]
        values = asdict(self)
        for name in ("epochs", "batch_size", "optimizer", "lr", "weight_decay"):
            if values[name] is None:
                values[name] = getattr(recipe, name)
        if values["device"] == "auto":
            values["device"] = "cuda" if torch.cuda.is_available() else "cpu"
        paths.check_path(values["path"])
        functional.check_order(values["p"])
        for name in ("epochs", "batch_size", "train_size", "test_size", "max_steps", "log_every"):
            if values[name] is not None and not 1 <= values[name] < 2**31:
                raise ValueError(f"{name} must lie in [1, 2^31), got {values[name]}")
        for name, positive in (("coeff", False), ("weight_decay", False), ("lr", True)):
            value = values[name]
            if not 0 <= value < 1e38 or (positive and value == 0):  # 1e38: float32
                raise ValueError(f"{name} must be finite and {'above' if positive else 'at least'} 0, got {value}")
        if not 0 <= values["seed"] < 2**63:
            raise ValueError(f"seed must lie in [0, 2^63), got {values['seed']}")
        if values["optimizer"] not in ("adam", "sgd"):
            raise ValueError(f"optimizer must be adam or sgd, got {values['optimizer']!r}")
        match = re.fullmatch(r"cpu|cuda(?::(\d+))?", values["device"])
        if not match:
            raise ValueError(f"device must be cpu, cuda, cuda:N or auto, got {values['device']!r}")
        if values["device"] != "cpu" and int(match[1] or 0) >= torch.cuda.device_count():
            raise ValueError(f"device {values['device']!r} is not there: torch sees {torch.cuda.device_count()} GPUs")
        return Config(**values)


class StepOutput(NamedTuple):
    """What a training step saw, without graph: means over the batch, and the number of right answers."""

    loss: Tensor
    ce: Tensor
    penalty: Tensor
    correct: Tensor


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    y: Tensor,
    coeff: float,
    p: float = 2,
    path: str = "fused",
) -> StepOutput:
    """One step of ``cross_entropy + coeff * penalty``; with coeff 0 a plain step, and a penalty of NaN (not computed).

    Args:
        x: [B, ...], a leaf; y: [B] int64.
    """
    optimizer.zero_grad(set_to_none=True)
    x.requires_grad_(coeff > 0)
    logits = model(x)
    if coeff == 0:
        loss = ce = F.cross_entropy(logits, y)
        penalty = torch.full_like(ce, math.nan)
    elif path == "fused":
        loss, ce, penalty = density_loss(logits, y, x, coeff, p)
    else:
        ce = F.cross_entropy(logits, y)
        penalty = density_penalty(logits, x, p, path)
        loss = ce + coeff * penalty
    # Only the parameters: the gradient in x would be computed for nothing.
    loss.backward(inputs=[w for w in model.parameters() if w.requires_grad])
    optimizer.step()
    correct = (logits.detach().argmax(1) == y).sum()
    return StepOutput(loss.detach(), ce.detach(), penalty.detach(), correct)


def evaluate(model: nn.Module, split: data.Split, p: float, batch_size: int, device: torch.device) -> dict[str, float]:
    """Cross-entropy and accuracy on a split, and the mean penalty (path "fused") of its first 1000 images.

    The model is put into eval mode, and back.
    """
    training = model.training
    model.eval()
    ce = correct = penalty = 0.0
    with torch.no_grad():
        for x, y in data.batches(split, batch_size):
            logits = model(x.to(device))
            y = y.to(device)
            ce += F.cross_entropy(logits, y, reduction="sum").item()
            correct += (logits.argmax(1) == y).sum().item()
    some = split.first(PENALTY_SAMPLES)
    for x, _ in data.batches(some, batch_size):
        x = x.to(device).requires_grad_()
        penalty += density_penalty(model(x), x, p, reduction="sum").item()
    model.train(training)
    return {"test_ce": ce / len(split), "test_accuracy": correct / len(split), "test_penalty": penalty / len(some)}


# --------------------------------------------------------------------------------------------------------------------
# the run directory


def write_atomically(path: Path, write: Callable[[io.BufferedWriter], Any]) -> None:
    """Write a file so that it is either the old one or the whole new one, whenever the machine stops."""
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, rows[0].keys() if rows else (), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))


_FILES = (models.CONFIG, models.CHECKPOINT, METRICS, STEPS)


def _open_run(out: str, overwrite: bool) -> Path:
    """The run directory, which can be written to; what it holds stays until the first epoch is saved."""
    if not out:
        raise RunError("--out is empty; wanted a folder")
    run = Path(out)
    try:
        if run.exists() and not run.is_dir():
            raise RunError(f"--out {run} is a file; wanted a folder")
        held = [name for name in _FILES if (run / name).exists()]
        if held and not overwrite:
            raise RunError(f"--out {run} already holds {held[0]}; choose another folder or add --overwrite")
        run.mkdir(parents=True, exist_ok=True)
        write_atomically(run / ".writable", lambda file: file.write(b""))
        (run / ".writable").unlink()
    except OSError as error:
        raise RunError(f"cannot write to --out {run}: {error.strerror}") from error
    return run


def _optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    assert config.lr is not None
    assert config.weight_decay is not None
    if config.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), config.lr, weight_decay=config.weight_decay)
    return torch.optim.SGD(model.parameters(), config.lr, momentum=0.9, weight_decay=config.weight_decay)


class _Running:
    """Sums of step outputs, kept on the device; reading the means is what synchronises."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(4, device=device, dtype=torch.float64)
        self.samples = 0

    def add(self, out: StepOutput, samples: int) -> None:
        means = torch.stack([out.loss, out.ce, out.penalty]).to(self.sums.dtype)
        self.sums[:3] += means * samples
        self.sums[3] += out.correct
        self.samples += samples

    def means(self) -> dict[str, float]:
        """Means per sample since the start; the penalty of a plain step is NaN."""
        loss, ce, penalty, correct = (self.sums / max(self.samples, 1)).tolist()
        return {"loss": loss, "ce": ce, "penalty": penalty, "accuracy": correct}


def _check_finite(means: dict[str, float], config: Config, step: int) -> None:
    if not math.isfinite(means["loss"]):
        raise TrainingError(
            f"the loss is {means['loss']} at or before step {step} (cross-entropy {means['ce']:.4g}, "
            f"penalty {means['penalty']:.4g}, path {config.path}): lower --lr or --coeff, or use --path fused"
        )


def fit(config: Config, overwrite: bool = False, progress: bool | None = None) -> list[dict[str, Any]]:
    """Train a classifier, and leave a run directory: config.json, metrics.csv, steps.csv and checkpoint.pt.

    Every file is replaced as a whole, at the end of each epoch.

    Args:
        config: what to do; see :class:`Config`.
        overwrite: whether a run already in ``config.out`` is replaced, at the end of the first epoch.
        progress: whether to show a progress bar; None shows it on a terminal.

    Returns:
        The rows of metrics.csv, one for each epoch. train_* are means over the epoch's steps, as trained; seconds
        are those of the training steps with their data, without the evaluation.

    Raises:
        DataError, ModelError, RunError, TypeError, ValueError: a bad request, in one line.
        TrainingError: the loss is not finite, or the disk is full.
    """
    config = config.complete()
    assert config.epochs is not None
    assert config.batch_size is not None
    device = torch.device(config.device)
    models.check_name(config.model)
    dataset = data.load(config.data, config.data_dir, config.download)
    train, test = dataset.train.first(config.train_size), dataset.test.first(config.test_size)

    torch.manual_seed(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    spec: dict[str, Any] = {
        "name": config.model,
        "classes": dataset.classes,
        "image_shape": dataset.image_shape,
        "mean": dataset.mean,
        "std": dataset.std,
    }
    model = models.build(**spec).to(device)
    path = config.path if config.coeff > 0 else None
    smallest = min(2, config.batch_size, len(train))  # BatchNorm cannot take one sample
    models.check_trainable(model, config.model, dataset.image_shape, path, smallest)
    optimizer = _optimizer(model, config)
    milestones = [max(1, round(part * config.epochs)) for part in RECIPES[config.data].milestones]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones)

    run = _open_run(config.out, overwrite)
    epoch_rows: list[dict[str, Any]] = []
    step_rows: list[dict[str, Any]] = []
    step = 0
    # A last batch of one sample cannot go through BatchNorm in training mode.
    drop_last = len(train) >= config.batch_size
    per_epoch = len(train) // config.batch_size * config.batch_size if drop_last else len(train)
    for epoch in range(1, config.epochs + 1):
        if step == config.max_steps:
            break
        model.train()
        whole, window = _Running(device), _Running(device)
        start = time.perf_counter()
        bar = tqdm(
            total=per_epoch,
            desc=f"epoch {epoch}/{config.epochs}",
            unit="img",
            disable=None if progress is None else not progress,
            leave=False,
        )
        with bar:
            for x, y in data.batches(train, config.batch_size, generator, drop_last):
                x, y = x.to(device), y.to(device)
                out = train_step(model, optimizer, x, y, config.coeff, config.p, config.path)
                step += 1
                whole.add(out, len(y))
                window.add(out, len(y))
                bar.update(len(y))
                if step % config.log_every == 0:
                    means = window.means()
                    _check_finite(means, config, step)
                    step_rows.append({"step": step, "epoch": epoch, **means})
                    bar.set_postfix({k: f"{v:.4g}" for k, v in means.items() if k != "ce" and v == v})
                    window = _Running(device)
                if step == config.max_steps:
                    break
        means = whole.means()
        seconds = time.perf_counter() - start
        _check_finite(means, config, step)
        row = {"epoch": epoch, "step": step, **{f"train_{k}": v for k, v in means.items()}}
        row |= evaluate(model, test, config.p, config.batch_size, device)
        row |= {"lr": optimizer.param_groups[0]["lr"], "seconds": seconds, "images_per_second": whole.samples / seconds}
        schedule.step()
        epoch_rows.append(row)
        checkpoint = {
            "spec": spec,
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
            "epoch": epoch,
            "step": step,
        }
        last = epoch == config.epochs or step == config.max_steps
        tail = [{"step": step, "epoch": epoch, **window.means()}] if last and window.samples else []
        _save(run, config, checkpoint, epoch_rows, step_rows + tail)
        print(_summary(row, config.epochs), flush=True)
    return epoch_rows


def _summary(row: dict[str, Any], epochs: int) -> str:
    penalty = f"penalty {row['train_penalty']:.4f}, " if row["train_penalty"] == row["train_penalty"] else ""
    return (
        f"epoch {row['epoch']}/{epochs}: loss {row['train_loss']:.4f}, {penalty}"
        f"accuracy {row['train_accuracy']:.4f}; test accuracy {row['test_accuracy']:.4f}, "
        f"penalty {row['test_penalty']:.4f}; {row['seconds']:.1f} s, {row['images_per_second']:.0f} images/s"
    )


def _save(
    run: Path,
    config: Config,
    checkpoint: dict[str, Any],
    epoch_rows: list[dict[str, Any]],
    step_rows: list[dict[str, Any]],
) -> None:
    versions = {"densreg": __version__, "torch": torch.__version__, "python": platform.python_version()}
    # JSON has no infinity; p may be one.
    values = {k: str(v) if isinstance(v, float) and math.isinf(v) else v for k, v in asdict(config).items()}
    text = json.dumps({**values, "versions": versions}, indent=2) + "\n"
    try:
        write_atomically(run / models.CHECKPOINT, lambda file: torch.save(checkpoint, file))
        write_atomically(run / models.CONFIG, lambda file: file.write(text.encode()))
        _write_csv(run / METRICS, epoch_rows)
        _write_csv(run / STEPS, step_rows)
    except OSError as error:
        raise TrainingError(f"cannot write to {run}: {error.strerror}; what was written last is kept") from error
