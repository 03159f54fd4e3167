"""Training a classifier with the density penalty: the step, the epochs, and going on where a run was killed."""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from densreg import attacks, functional, paths, regularizers
from densreg.lab import data, groups, models, runs
from densreg.lab.runs import RunError, TrainingError
from densreg.objective import RegularizedObjective
from densreg.regularizers import Regularizer
from densreg.version import __version__

PENALTY_SAMPLES = 1000
"""Test images over which the epoch's test penalty is the mean: it costs three forwards, accuracy one."""

COMPILE_STEPS = 1000
"""A run of so many steps is compiled if nothing else is said: a compilation takes as long as some hundreds of them."""

AMP = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}

ADVERSARIAL, PGD_STEPS = ("none", "fgsm", "pgd"), 10

OPTIMIZERS, SCHEDULES, ON_NONFINITE = ("sgd", "adam", "adamw"), ("constant", "step", "cosine"), ("stop", "record")


@dataclass(frozen=True)
class Recipe:
    """Defaults of a data set. The paper's where it gives them (lr, epochs, milestones), else the field's usual."""

    epochs: int
    optimizer: str
    lr: float
    batch_size: int
    weight_decay: float = 0.0
    schedule: str = "constant"
    milestones: tuple[float, ...] = ()


_MNIST_RECIPE = Recipe(epochs=80, optimizer="adam", lr=1e-4, batch_size=128)
_GROUPS_RECIPE = Recipe(epochs=300, optimizer="sgd", lr=1e-4, batch_size=128, weight_decay=1e-4)
_CIFAR_RECIPE = Recipe(
    epochs=200,
    optimizer="sgd",
    lr=0.01,
    batch_size=128,
    weight_decay=5e-4,
    schedule="step",
    milestones=(0.5, 0.875),  # 100 and 175 of 200
)
RECIPES = {
    "digits": Recipe(epochs=30, optimizer="adam", lr=1e-3, batch_size=64),
    "mnist": _MNIST_RECIPE,
    "blockmnist": _MNIST_RECIPE,
    "cifar10": _CIFAR_RECIPE,
    "cifar100": _CIFAR_RECIPE,
    "svhn": _CIFAR_RECIPE,
    "tiny-imagenet": _CIFAR_RECIPE,
    "folder": _CIFAR_RECIPE,
    "spurious-mnist": replace(_MNIST_RECIPE, epochs=20),
    "waterbirds": _GROUPS_RECIPE,
    "celeba-hair": replace(_GROUPS_RECIPE, epochs=50),
    "synthetic": Recipe(epochs=1, optimizer="sgd", lr=0.01, batch_size=128),
}


@dataclass(frozen=True)
class Config:
    """What a run is. ``None`` stands for the data set's recipe; :meth:`complete` fills it in.

    Attributes:
        data, data_dir, download, augment, classes, image_size: see :func:`densreg.lab.data.load`.
        model: see :func:`densreg.lab.models.build`.
        regularizer: what the penalty is, see :mod:`densreg.regularizers`.
        regularizer_options: of its class.
        path, p, coeff: the penalty; with coeff 0 it is not computed at all. The path is the density's.
        softplus: beta of the SoftPlus in place of every ReLU; None leaves ReLU.
        adversarial: what the model is trained on: "none", the images; "fgsm" or "pgd", such perturbations of them, made
            in float32 by the model in eval mode. The training accuracy is then that on these.
        adversarial_eps, adversarial_norm: the ball in which they are, in pixels, its norm 2 or inf.
        adversarial_steps, adversarial_step_size: of pgd; None is 10, and 2.5 eps / steps.
        group_dro: eta of :class:`densreg.lab.groups.GroupDRO` in place of the mean cross-entropy; None leaves it.
        balance_groups: draw the training images with replacement, each group as likely as any other.
        coeff_warmup: epochs in which the coefficient rises from 0 to coeff, a step at a time.
        interval, fraction: of :class:`densreg.RegularizedObjective`; they make steps cheaper, and another optimization.
        out: the run directory.
        seed: of weights, shuffling, augmentation and random classes.
        optimizer: "sgd", "adam" or "adamw".
        momentum: of sgd.
        schedule: of the learning rate: "constant", "step" (divided by 10 at each milestone) or "cosine" (down to 0).
        milestones: in parts of the epochs, 0 to 1.
        train_size, test_size: use only so many images of a split.
        val_size: the last so many training images are held out, and take the place of the test images.
        max_steps: stop after so many steps of the optimizer, in the middle of an epoch if need be.
        log_every: steps between two rows of steps.csv, and between two looks at whether all was finite.
        checkpoint_every: steps between two checkpoints; there is one at the end of each epoch in any case.
        on_nonfinite: what a loss or gradient that is not finite does: "stop" the run, or "record" it and go on.
        device: "auto" is CUDA where there is one.
        compile: whether the step is compiled as one graph; None: from 1000 steps on, but for per_class, directional
            and ig_sum.
        amp: "none", or "bf16" or "fp16" for autocast, the latter with a scaled loss.
        channels_last: memory format of images and weights.
        threads: of torch on the CPU, as long as the run lasts; None leaves them as they are.
        workers: processes that prepare the batches; 0 for none.
        tensorboard: write events for TensorBoard too.
    """

    out: str
    data: str = "digits"
    model: str = "mlp"
    regularizer: str = "density"
    regularizer_options: dict[str, float] | None = None
    path: str = "fused"
    p: float = 2.0
    coeff: float = 0.1
    softplus: float | None = None
    adversarial: str = "none"
    adversarial_eps: float | None = None
    adversarial_norm: float = math.inf
    adversarial_steps: int | None = None
    adversarial_step_size: float | None = None
    group_dro: float | None = None
    balance_groups: bool = False
    coeff_warmup: float = 0.0
    interval: int = 1
    fraction: float = 1.0
    epochs: int | None = None
    seed: int = 0
    data_dir: str | None = None
    download: bool = False
    augment: bool = True
    classes: int | None = None
    image_size: int | None = None
    batch_size: int | None = None
    optimizer: str | None = None
    lr: float | None = None
    momentum: float = 0.9
    weight_decay: float | None = None
    schedule: str | None = None
    milestones: tuple[float, ...] | None = None
    train_size: int | None = None
    test_size: int | None = None
    val_size: int | None = None
    max_steps: int | None = None
    log_every: int = 50
    checkpoint_every: int | None = None
    on_nonfinite: str = "stop"
    device: str = "auto"
    compile: bool | None = None
    amp: str = "none"
    channels_last: bool = False
    threads: int | None = None
    workers: int = 0
    tensorboard: bool = False

    def complete(self) -> Config:
        """This configuration with the recipe filled in and every value checked.

        Raises:
            ValueError: an impossible value, in one line.
        """
        if self.data not in RECIPES:
            near = runs.did_you_mean(self.data, RECIPES)
            raise data.DataError(f"unknown data set {self.data!r}; wanted one of {', '.join(RECIPES)}{near}")
        recipe = RECIPES[self.data]
        values = asdict(self)
        for name in ("epochs", "batch_size", "optimizer", "lr", "weight_decay", "schedule"):
            if values[name] is None:
                values[name] = getattr(recipe, name)
        if values["device"] == "auto":
            values["device"] = "cuda" if torch.cuda.is_available() else "cpu"
        if values["device"] == "cuda" and "LOCAL_RANK" in os.environ:  # by torchrun
            values["device"] = f"cuda:{os.environ['LOCAL_RANK']}"
        for name, known in (
            ("path", (*paths.PATHS, "directional")),
            ("regularizer", (*regularizers.REGULARIZERS,)),
            ("adversarial", ADVERSARIAL),
            ("optimizer", OPTIMIZERS),
            ("schedule", SCHEDULES),
            ("on_nonfinite", ON_NONFINITE),
            ("amp", (*AMP,)),
        ):
            if values[name] not in known:
                wanted = f"{'one of ' if len(known) > 4 else ''}{', '.join(known[:-1])} or {known[-1]}"
                near = runs.did_you_mean(str(values[name]), known)
                raise ValueError(f"{name} must be {wanted}, got {values[name]!r}{near}")
        if values["regularizer_options"] == {}:
            values["regularizer_options"] = None
        if values["path"] == "directional" and values["regularizer"] != "density":
            raise ValueError(f"path directional is for the density penalty, got regularizer {values['regularizer']!r}")
        if values["path"] != "directional":
            regularizers.make(values["regularizer"], values["p"], values["path"], **values["regularizer_options"] or {})
        _complete_attack(values)
        if not 0 < values["fraction"] <= 1:
            raise ValueError(f"fraction must lie in (0, 1], got {values['fraction']}")
        functional.check_order(values["p"])
        for name in (
            *(
                "epochs",
                "batch_size",
                "train_size",
                "test_size",
                "val_size",
                "max_steps",
                "log_every",
                "checkpoint_every",
            ),
            *("threads", "classes", "image_size", "interval", "adversarial_steps"),
        ):
            if values[name] is not None and not 1 <= values[name] < 2**31:
                raise ValueError(f"{name} must lie in [1, 2^31), got {values[name]}")
        if not 0 <= values["workers"] <= 1024:
            raise ValueError(f"workers must lie in [0, 1024], got {values['workers']}")
        for name, positive in (("coeff", False), ("coeff_warmup", False), ("weight_decay", False), ("lr", True)):
            value = values[name]
            if not 0 <= value < 1e38 or (positive and value == 0):  # 1e38: float32
                raise ValueError(f"{name} must be finite and {'above' if positive else 'at least'} 0, got {value}")
        if not 0 <= values["momentum"] < 1:
            raise ValueError(f"momentum must lie in [0, 1), got {values['momentum']}")
        if not 0 <= values["seed"] < 2**63:
            raise ValueError(f"seed must lie in [0, 2^63), got {values['seed']}")
        if values["milestones"] is None:
            values["milestones"] = recipe.milestones if values["schedule"] == "step" else ()
        elif values["milestones"] and values["schedule"] != "step":
            raise ValueError(f"milestones are for the schedule step, got the schedule {values['schedule']!r}")
        values["milestones"] = tuple(values["milestones"])
        if not all(0 < part <= 1 for part in values["milestones"]):
            raise ValueError(f"milestones must be parts of the epochs, above 0 to 1, got {values['milestones']}")
        if values["schedule"] == "step" and not values["milestones"]:
            raise ValueError("the schedule step needs milestones, in parts of the epochs: 0.5 0.875")
        match = re.fullmatch(r"cpu|cuda(?::(\d+))?", values["device"])
        if not match:
            raise ValueError(f"device must be cpu, cuda, cuda:N or auto, got {values['device']!r}")
        if values["device"] != "cpu" and int(match[1] or 0) >= torch.cuda.device_count():
            raise ValueError(f"device {values['device']!r} is not there: torch sees {torch.cuda.device_count()} GPUs")
        return Config(**values)

    def describe(self) -> dict[str, Any]:
        """The configuration as JSON can hold it."""
        # JSON has no infinity; p may be one.
        values = {k: str(v) if isinstance(v, float) and math.isinf(v) else v for k, v in asdict(self).items()}
        return json.loads(json.dumps(values))


def _complete_attack(values: dict[str, Any]) -> None:
    kind, given = (
        values["adversarial"],
        [n for n in ("eps", "steps", "step_size") if values[f"adversarial_{n}"] is not None],
    )
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


class StepOutput(NamedTuple):
    """What a training step saw, without graph: means over the batch, the number of right answers, the largest logit."""

    loss: Tensor
    ce: Tensor
    penalty: Tensor
    correct: Tensor
    largest: Tensor


def train_step(
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    y: Tensor,
    amp: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> StepOutput:
    """One step of an optimizer on the penalized loss; the penalty is NaN where the objective leaves it out.

    Args:
        objective: :class:`densreg.RegularizedObjective`, or DistributedDataParallel around it.
        x: [B, ...]; y: [B] int64, or what the objective's criterion takes, [B, 2] int64 of classes and groups.
        amp: dtype of autocast.
        scaler: of the loss, for float16.
    """
    optimizer.zero_grad(set_to_none=True)
    scale = None if scaler is None else scaler.scale(torch.ones((), device=x.device))
    with torch.autocast(x.device.type, amp, enabled=amp is not None):
        out = objective(x, y, scale)
    if scaler is None:
        out.loss.backward()
        optimizer.step()
    else:
        scaler.scale(out.loss).backward()
        scaler.step(optimizer)
        scaler.update()
    loss, logits, ce, penalty = (t.detach() for t in out)
    largest, best = logits.max(1)
    return StepOutput(loss, ce, penalty, (best == groups.classes(y)).sum(), largest.max())


def evaluate(
    objective: RegularizedObjective,
    split: data.Split,
    batch_size: int,
    device: torch.device,
    workers: int = 0,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> dict[str, float]:
    """Cross-entropy and accuracy on a split, the worst group's where it has groups, and the penalty of its first 1000.

    The model is put into eval mode, and back.
    """
    training = objective.model.training
    objective.eval()
    ce = penalty = 0.0
    right = []
    with torch.no_grad():
        for x, y in data.batches(split, batch_size, workers=workers):
            y = y.to(device)
            out = objective(x.to(device, memory_format=memory_format), y)
            ce += out.ce.item() * len(y)
            right.append((out.logits.argmax(1) == y).double().cpu())
    some = split.first(PENALTY_SAMPLES)
    for x, y in data.batches(some, batch_size, workers=workers):
        penalty += objective.penalty(x.to(device, memory_format=memory_format), y.to(device)).item() * len(x)
    objective.train(training)
    correct = torch.cat(right)
    metrics = {"test_ce": ce / len(split), "test_accuracy": correct.mean().item()}
    if split.groups is not None:
        metrics["test_worst_group"] = groups.group_accuracy(correct, split.groups)["worst_group"]
    return {**metrics, "test_penalty": penalty / len(some)}


# --------------------------------------------------------------------------------------------------------------------
# what is trained


class Problem:
    """What a configuration stands for: data, a model with fresh weights, and its optimizer.

    Seeds torch's global generator, which the weights come from, and in training the random classes and dropout.

    Args:
        config: complete.

    Raises:
        DataError, ModelError: in one line.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.device = torch.device(config.device)
        self.memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
        models.check_name(config.model)
        dataset = data.load(
            config.data, config.data_dir, config.download, config.augment, config.classes, config.image_size
        )
        self.note, self.dataset = dataset.note, dataset
        if config.val_size is not None:
            dataset = dataset.held_out(config.val_size)
        self.train, self.test = dataset.train.first(config.train_size), dataset.test.first(config.test_size)
        for what, wanted in (("group_dro", config.group_dro is not None), ("balance_groups", config.balance_groups)):
            if wanted:
                self.train.check_groups(len(dataset.groups), what)
        if dataset.groups:
            self.test.check_groups(len(dataset.groups), "the test images")
        self.criterion = None
        if config.group_dro is not None:
            assert self.train.groups is not None
            self.train = replace(self.train, labels=torch.stack([self.train.labels, self.train.groups], 1))
        self.spec: dict[str, Any] = {
            "name": config.model,
            "classes": dataset.classes,
            "image_shape": dataset.image_shape,
            "mean": dataset.mean,
            "std": dataset.std,
        }
        if config.softplus is not None:
            self.spec["softplus"] = config.softplus
        self.rank, self.processes = processes()
        if self.batch_size % self.processes:
            raise ValueError(f"batch_size {self.batch_size} does not divide by the {self.processes} processes")
        if config.group_dro is not None:
            if self.processes > 1:
                raise ValueError(
                    f"group_dro trains in one process, whose batch the group weights see: got {self.processes}"
                )
            self.criterion = groups.GroupDRO(len(dataset.groups), config.group_dro).to(self.device)
        torch.manual_seed(config.seed)
        self.model = models.build(**self.spec).to(self.device, memory_format=self.memory_format)  # type: ignore[call-overload]
        path = config.path if config.coeff > 0 else None
        smallest = min(2, self.batch_size, len(self.train))  # BatchNorm cannot take one sample
        regularizer = _regularizer(config)
        models.check_trainable(self.model, config.model, dataset.image_shape, path, smallest, regularizer)
        self.optimizer = _optimizer(self.model, config)
        self.objective = RegularizedObjective(
            self.model,
            config.coeff,
            config.p,
            config.path,
            compile=self._compiles(),
            interval=config.interval if config.coeff > 0 else None,
            fraction=config.fraction,
            regularizer=regularizer,
            criterion=self.criterion,
            labels=groups.classes,
        )
        self.module: nn.Module = self.objective
        if self.processes > 1:
            self.module = nn.parallel.DistributedDataParallel(self.objective)
            torch.manual_seed((config.seed + self.rank * 0x9E3779B97F4A7C15) % 2**63)  # each draws its own
        self.amp = AMP[config.amp]
        self.scaler = torch.amp.GradScaler(self.device.type) if self.amp == torch.float16 else None

    def _compiles(self) -> bool:
        """Whether the step is compiled: as the configuration says, or where that is likely to pay."""
        config = self.config
        assert config.epochs is not None
        if config.compile is not None:
            return config.compile
        steps = config.epochs * self.steps_per_epoch
        compiler = self.device.type == "cuda" or any(map(shutil.which, ("c++", "g++", "clang++")))
        long = min(steps, config.max_steps or steps) >= COMPILE_STEPS
        rival = regularizers.trait(regularizers.REGULARIZERS[config.regularizer], "unrolled") and config.coeff > 0
        unrolled = config.path in ("per_class", "directional") or rival
        return long and bool(compiler) and not unrolled

    @property
    def batch_size(self) -> int:
        assert self.config.batch_size is not None
        return min(self.config.batch_size, len(self.train))

    @property
    def steps_per_epoch(self) -> int:
        """A last batch that is not full is left out: one sample cannot go through BatchNorm in training mode."""
        return len(self.train) // self.batch_size

    def batches(self, epoch: int, numbers: range) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of an epoch (from 1) by their numbers (from 0), on the device."""
        pin = self.device.type == "cuda"
        for x, y in data.batches(
            self.train,
            self.batch_size,
            self.config.seed,
            epoch,
            numbers,
            self.config.workers,
            pin,
            self.config.balance_groups,
        ):
            # Of the joint batch, which is the same for any number of processes, this one's part.
            x, y = x[self.rank :: self.processes], y[self.rank :: self.processes]
            yield (
                x.to(self.device, non_blocking=True, memory_format=self.memory_format),
                y.to(self.device, non_blocking=True),
            )

    def step(self, step: int, x: Tensor, y: Tensor) -> StepOutput:
        """Step number ``step`` (from 0) with the learning rate and coefficient that belong to it."""
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, step, self.steps_per_epoch)
        self.objective.coeff.fill_(coefficient(config, step, self.steps_per_epoch))
        x = self._perturbed(x, groups.classes(y))
        self.objective.calls = step  # which tells whether interval's turn is on: no state to save
        out = train_step(self.module, self.optimizer, x, y, self.amp, self.scaler)
        return out if self.processes == 1 else _of_all_processes(out)

    def _perturbed(self, x: Tensor, y: Tensor) -> Tensor:
        """What the model is trained on: the images, or perturbations that raise its loss."""
        config = self.config
        if config.adversarial == "none":
            return x
        eps, fgsm = config.adversarial_eps, config.adversarial == "fgsm"
        assert eps is not None
        steps, size = (1, eps) if fgsm else (config.adversarial_steps or 0, config.adversarial_step_size or 0.0)
        self.model.eval()  # or BatchNorm's running statistics would move with each step of the attack
        try:
            return attacks.perturb(self.model, x, y, config.adversarial_norm, eps, steps, size, random_start=not fgsm)
        finally:
            self.model.train()


def processes() -> tuple[int, int]:
    """(this one's number, how many) of the processes that train together."""
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if together else (0, 1)


@contextlib.contextmanager
def _process_group(device: str) -> Iterator[None]:
    """The group of the processes that torchrun started; none where it did not."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or processes()[1] > 1:
        yield
        return
    torch.distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield
    finally:
        # Whatever holds the group goes first: if a Reducer is the last to let go of it, gloo's threads and this one can
        # wait for each other for ever (torch 2.11: the destructor joins them without giving up the GIL).
        gc.collect()
        torch.distributed.destroy_process_group()


def _of_all_processes(out: StepOutput) -> StepOutput:
    """The step of the joint batch, of which each process had an equal part."""
    means = torch.stack([out.loss, out.ce, out.penalty]) / torch.distributed.get_world_size()
    correct, largest = out.correct.clone(), out.largest.clone()
    torch.distributed.all_reduce(means)
    torch.distributed.all_reduce(correct)
    torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
    loss, ce, penalty = means.unbind()
    return StepOutput(loss, ce, penalty, correct, largest)


@contextlib.contextmanager
def threads(n: int | None) -> Iterator[None]:
    """Let torch use n threads on the CPU; as many as before for None."""
    before = torch.get_num_threads()
    torch.set_num_threads(n or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _regularizer(config: Config) -> str | Regularizer:
    if config.regularizer == "density":
        return "density"
    return regularizers.make(config.regularizer, config.p, config.path, **config.regularizer_options or {})


def _optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    assert config.lr is not None
    assert config.weight_decay is not None
    if config.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay)
    cls = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    # Fused: one pass over the weights instead of ten.
    return cls(model.parameters(), config.lr, weight_decay=config.weight_decay, fused=True)


def learning_rate(config: Config, step: int, steps_per_epoch: int) -> float:
    """The learning rate of a step (from 0): a function of the step, so that there is no state to save."""
    assert config.lr is not None
    assert config.epochs is not None
    if config.schedule == "cosine":
        return config.lr * 0.5 * (1 + math.cos(math.pi * step / (config.epochs * steps_per_epoch)))
    passed = [
        part for part in config.milestones or () if step // steps_per_epoch >= max(1, round(part * config.epochs))
    ]
    return config.lr * 0.1 ** len(passed)


def coefficient(config: Config, step: int, steps_per_epoch: int) -> float:
    """The penalty's coefficient in a step (from 0); in the warm-up it is above 0 from the first step on."""
    rising = config.coeff_warmup * steps_per_epoch
    return config.coeff * min(1.0, (step + 1) / rising) if rising else config.coeff


# --------------------------------------------------------------------------------------------------------------------
# what is seen on the way: kept on the device, because reading it is what synchronises


class _Running:
    """Sums of step outputs, and the largest logit."""

    def __init__(self, device: torch.device) -> None:
        # loss, ce, penalty, right answers, bad steps, samples whose penalty was computed
        self.sums = torch.zeros(6, device=device, dtype=torch.float64)
        self.largest = torch.full((), -math.inf, device=device)
        self.samples = 0

    def add(self, out: StepOutput, samples: int, bad: Tensor) -> None:
        absent = out.penalty.isnan()  # in a plain step, or with a loss that is not finite either
        penalty = out.penalty.masked_fill(absent, 0)
        self.sums[:3] += torch.stack([out.loss, out.ce, penalty]).to(self.sums.dtype) * samples
        self.sums[3] += out.correct
        self.sums[4] += bad
        self.sums[5] += ~absent * samples
        self.largest = torch.maximum(self.largest, out.largest)
        self.samples += samples

    def means(self) -> dict[str, float]:
        """Means per sample since the start, the penalty's over those that have one; NaN if none has."""
        loss, ce, penalty, correct, _, penalized = self.sums.tolist()
        n = max(self.samples, 1)
        mean = penalty / penalized if penalized else math.nan
        return {"loss": loss / n, "ce": ce / n, "penalty": mean, "accuracy": correct / n}

    def state(self) -> dict[str, Any]:
        return dict(vars(self))

    def load(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


class _Watch:
    """Finds the first step whose loss or gradient is not finite."""

    def __init__(self, device: torch.device) -> None:
        self.first = torch.zeros(4, device=device, dtype=torch.float64)  # step (0: none), loss, gradient, logit

    def see(self, step: int, out: StepOutput, parameters: Sequence[Tensor]) -> Tensor:
        """Whether this step (from 1) is not finite, on the device: called after the step, with its gradients."""
        gradient = _largest([w.grad for w in parameters if w.grad is not None])
        number = torch.full_like(self.first[0], step)
        seen = torch.stack([number, *(value.to(number) for value in (out.loss, gradient, out.largest))])
        bad = ~seen[1:3].isfinite().all()
        self.first = torch.where(bad & (self.first[0] == 0), seen, self.first)
        return bad

    def report(self, penalty: str) -> str:
        """One line on the first bad step; "" where there is none."""
        step, loss, gradient, logit = self.first.tolist()
        if not step:
            return ""
        return (
            f"step {step:.0f} is the first whose loss or gradient is not finite (loss {loss:.4g}, "
            f"largest gradient {gradient:.4g}, largest logit {logit:.4g}, {penalty})"
        )


def _largest(gradients: Sequence[Tensor]) -> Tensor:
    """The largest absolute value, or NaN; the Euclidean norm's sum of squares might overflow."""
    if not gradients or gradients[0].device.type != "cpu":
        return torch.nn.utils.get_total_norm(gradients, math.inf)
    # That norm is not vectorised on the CPU: for an MLP's million weights it takes as long as a fifth of the step.
    return torch.stack([bound.abs() for g in gradients for bound in torch.aminmax(g)]).max()


# --------------------------------------------------------------------------------------------------------------------
# a run


_FREE = (
    *("out", "data_dir", "download", "device", "channels_last", "compile", "threads", "workers"),
    *("max_steps", "log_every", "checkpoint_every", "on_nonfinite", "tensorboard"),
)
"""What may differ between a run and its continuation: what is trained follows from the rest (up to rounding, which
device, channels_last, compile and threads change)."""

_ABOUT = ("class_names", "image_shape", "images", "note", "versions")
"""What config.json holds beside the configuration: what was trained on, and with which versions."""

_PICTURE_SECONDS = 60.0


def check_known(config: Mapping[str, Any], run: str | Path) -> None:
    """Raise RunError where the configuration of a run has an option that this version lacks: a newer one wrote it."""
    unknown = sorted(config.keys() - {entry.name for entry in fields(Config)} - {*_ABOUT})
    if unknown:
        raise RunError(_newer(run, config, f"the option {unknown[0]!r}"))


def _newer(run: str | Path, config: Mapping[str, Any], what: str) -> str:
    wrote = config.get("versions", {}).get("densreg", "another version")
    return f"the run {run} has {what}, which densreg {__version__} does not know: take densreg {wrote}, which wrote it"


class _Run:
    """A run directory and where its training stands: all that a checkpoint holds."""

    def __init__(self, problem: Problem, run: Path, resume: bool) -> None:
        self.problem = problem
        self.config = problem.config
        self.dataset = problem.dataset.describe()
        self.epoch = 0  # whole epochs
        self.done = 0  # steps of the one that has begun
        self.step = 0
        self.seconds = 0.0  # of that epoch
        self.whole, self.window = _Running(problem.device), _Running(problem.device)
        self.watch = _Watch(problem.device)
        self.told = False  # of a first bad step, which is recorded
        self.epoch_rows: list[dict[str, Any]] = []
        self.step_rows: list[dict[str, Any]] = []
        self.first = problem.rank == 0  # of the processes: the one that writes and speaks
        self.run = run
        self.fresh = True  # no checkpoint in the directory is this run's
        self.drawn = time.monotonic()
        if resume:
            self._resume()
        self.events = _events(self.run, self.step) if self.config.tensorboard and self.first else None

    def _resume(self) -> None:
        checkpoint, note = runs.load_checkpoint(self.run, self.problem.device)
        if checkpoint is None:
            self.say(f"no checkpoint in {self.run}: starting from the beginning", sys.stderr)
            return
        try:
            self._check_same(checkpoint)
            self._load(checkpoint)
        except RunError:
            raise
        except Exception as error:  # what is not ours can lack anything
            reason = str(error).splitlines()[0] if str(error) else ""
            raise RunError(
                f"the checkpoint in {self.run} is of another kind: {type(error).__name__} {reason}"
            ) from error
        if self.config.max_steps is not None and self.config.max_steps < self.step:
            raise RunError(f"the run in {self.run} has done {self.step} steps; got max_steps {self.config.max_steps}")
        if note:
            self.say(note, sys.stderr)
            if self.first:
                (self.run / runs.CHECKPOINT).unlink(missing_ok=True)  # or it would be kept as the previous one
        self.say(f"resuming {self.run} after step {self.step}, {self.epoch} whole epochs")

    def say(self, line: str, file: Any = None) -> None:
        """Print a line, in one of the processes."""
        if self.first:
            print(line, file=file, flush=True)

    def _load(self, checkpoint: dict[str, Any]) -> None:
        problem = self.problem
        problem.model.load_state_dict(checkpoint["model"])
        problem.optimizer.load_state_dict(checkpoint["optimizer"])
        if problem.criterion is not None:
            problem.criterion.load_state_dict(checkpoint["criterion"])
        for name in ("epoch", "done", "step", "seconds", "epoch_rows", "step_rows"):
            setattr(self, name, checkpoint[name])
        self.whole.load(checkpoint["whole"])
        self.window.load(checkpoint["window"])
        self.watch.first = checkpoint["first_bad"]
        if problem.scaler is not None:
            problem.scaler.load_state_dict(checkpoint["scaler"])
        cpu, cuda = checkpoint["rng"][problem.rank]
        torch.set_rng_state(cpu.cpu())
        if problem.device.type == "cuda" and cuda is not None:
            torch.cuda.set_rng_state(cuda.cpu(), problem.device)
        self.fresh = False

    def _check_same(self, checkpoint: dict[str, Any]) -> None:
        config, where = checkpoint["config"], self.config.data_dir or self.config.data
        check_known(config, self.run)
        unknown = sorted(checkpoint.keys() - self._checkpoint().keys())
        if unknown:
            raise RunError(_newer(self.run, config, f"the state {unknown[0]!r}"))
        default = Config(out="").describe()  # of options that a run from before them does not have
        for name, value in self.config.describe().items():
            held = config.get(name, default[name])
            if name not in _FREE and held != value:
                raise RunError(
                    f"--resume: the run in {self.run} has {name} {held!r}, got {value!r}; "
                    "give the same, or another --out"
                )
        other = data.other_class(config.get("class_names"), self.problem.dataset.class_names)
        if other:
            raise RunError(f"--resume: the run in {self.run} has other classes than {where}: {other}")
        for name in {**checkpoint["spec"], **self.problem.spec}:
            held, value = checkpoint["spec"].get(name), self.problem.spec.get(name)
            if held != value:
                raise RunError(
                    f"--resume: the model of the run in {self.run} has {name} {held}, got {value} from {where}"
                )
        if len(checkpoint["rng"]) != self.problem.processes:
            raise RunError(
                f"--resume: the run in {self.run} has {len(checkpoint['rng'])} processes, got {self.problem.processes}"
            )
        if checkpoint["train_images"] != len(self.problem.train):
            raise RunError(
                f"--resume: the run in {self.run} has {checkpoint['train_images']} training images, "
                f"got {len(self.problem.train)} from {where}"
            )
        if checkpoint.get("train_labels") not in (None, runs.digest(self.problem.train.labels)):  # None: an older run's
            raise RunError(f"--resume: the run in {self.run} had other labels than the training images from {where}")
        held, now = config.get("images", {}), self.dataset["images"]  # none: an older run's
        kept = "other names, sizes, contents, labels or groups; give the same, or another --out"
        if held and held["train"] != now["train"]:
            raise RunError(f"--resume: the run in {self.run} had other training images than {where} has: {kept}")
        # In a table of epochs all figures are of the same test images. A run that is over gets no more of them.
        tested, going_on = checkpoint["epoch_rows"], checkpoint["epoch"] < (self.config.epochs or 0)
        if held and tested and self.config.val_size is None:
            if going_on and held["test"] != now["test"]:
                raise RunError(f"--resume: the run in {self.run} had other test images than {where} has: {kept}")
            self.dataset["images"] = held

    def _checkpoint(self) -> dict[str, Any]:
        problem = self.problem
        return {
            "spec": problem.spec,
            "model": problem.model.state_dict(),
            "optimizer": problem.optimizer.state_dict(),
            "criterion": None if problem.criterion is None else problem.criterion.state_dict(),
            "scaler": None if problem.scaler is None else problem.scaler.state_dict(),
            "epoch": self.epoch,
            "done": self.done,
            "step": self.step,
            "seconds": self.seconds,
            "whole": self.whole.state(),
            "window": self.window.state(),
            "first_bad": self.watch.first,
            "epoch_rows": self.epoch_rows,
            "step_rows": self.step_rows,
            "rng": self._random_states(),
            "train_images": len(problem.train),
            "train_labels": runs.digest(problem.train.labels),
            "config": self._description(),
        }

    def _random_states(self) -> list[tuple[Tensor, Tensor | None]]:
        """Of the generators for CPU and GPU, of each process."""
        device = self.problem.device
        mine = (torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None)
        if self.problem.processes == 1:
            return [mine]
        states: list[Any] = [None] * self.problem.processes
        torch.distributed.all_gather_object(states, mine)
        return states

    def _description(self) -> dict[str, Any]:
        versions = {"densreg": __version__, "torch": str(torch.__version__), "python": platform.python_version()}
        return {**self.config.describe(), **self.dataset, "note": self.problem.note, "versions": versions}

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = error.strerror or str(error)
            raise TrainingError(f"cannot write to {self.run}: {reason}; {self._kept()}") from error

    def _kept(self) -> str:
        return "no checkpoint was saved yet" if self.fresh else "the last checkpoint is kept"

    def save(self) -> None:
        """Write the checkpoint; the one before stays as the previous one."""
        checkpoint = self._checkpoint()
        if self.first:
            with self._writing():
                runs.save_checkpoint(self.run, checkpoint, keep=not self.fresh)
        self.fresh = False

    def write_tables(self, rows: Sequence[dict[str, Any]], over: bool = False) -> None:
        """Write what follows from the checkpoint; where the run is over, with the steps since the last row too."""
        if not self.first:
            return
        tail = [self.window_row()] if over and self.window.samples else []
        text = json.dumps(self._description(), indent=2) + "\n"
        with self._writing():
            runs.write_atomically(self.run / runs.CONFIG, lambda file: file.write(text.encode()))
            runs.write_csv(self.run / runs.METRICS, rows)
            runs.write_csv(self.run / runs.STEPS, [*self.step_rows, *tail])

    def draw(self, rows: Sequence[dict[str, Any]], now: bool = False) -> None:
        """Draw the curves: now, or if a minute has passed since the last time."""
        if self.first and rows and (now or time.monotonic() - self.drawn > _PICTURE_SECONDS):
            self.drawn = time.monotonic()
            try:
                with self._writing():
                    runs.draw_curves(self.run / runs.CURVES, rows)
            except ModuleNotFoundError as error:
                print(f"no {runs.CURVES}: {error.name} is not installed: pip install 'densreg[train]'", file=sys.stderr)

    def scalars(self, row: dict[str, Any]) -> None:
        """A row for TensorBoard."""
        if self.events is not None:
            with self._writing():
                for name, value in row.items():
                    if name not in ("step", "epoch"):
                        self.events.add_scalar(
                            name.replace("train_", "train/").replace("test_", "test/"), value, row["step"]
                        )
                self.events.flush()

    def check_finite(self) -> None:
        """Read what the watch has seen: raise TrainingError, or tell of it once, as on_nonfinite says."""
        config = self.config
        rival = config.regularizer if config.regularizer != "density" else None
        penalty = (f"regularizer {rival}" if rival else f"path {config.path}") if config.coeff > 0 else "no penalty"
        report = self.watch.report(penalty)
        if report and config.on_nonfinite == "stop":
            other = "" if rival or config.path == "fused" or config.coeff == 0 else ", or use --path fused"
            raise TrainingError(f"{report}: lower --lr or --coeff{other}; {self._kept()}")
        if report and not self.told:
            self.say(f"{report}; going on", sys.stderr)
            self.told = True

    def rates(self) -> dict[str, float]:
        """Learning rate and coefficient of the last step."""
        last, per_epoch = max(self.step - 1, 0), self.problem.steps_per_epoch
        return {
            "lr": learning_rate(self.config, last, per_epoch),
            "coeff": coefficient(self.config, last, per_epoch),
        }

    def window_row(self) -> dict[str, Any]:
        """The row of steps.csv for the steps since the last one."""
        seen = {"largest_logit": self.window.largest.item(), "nonfinite_steps": int(self.window.sums[4].item())}
        return {"step": self.step, "epoch": self.epoch + bool(self.done), **self.window.means(), **seen, **self.rates()}

    def close(self) -> None:
        if self.events is not None:
            self.events.close()


def _events(run: Path, step: int) -> Any:
    """TensorBoard's writer, in whose directory what lies after a step is no longer shown."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        raise RunError(f"{error.name} is not installed: pip install 'densreg[tensorboard]'") from error
    return SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)


def fit(
    config: Config, overwrite: bool = False, progress: bool | None = None, resume: bool | str = False
) -> list[dict[str, Any]]:
    """Train a classifier, and leave a run directory.

    checkpoint.pt (and checkpoint.previous.pt, the one before), config.json, metrics.csv (a row for each epoch),
    steps.csv and curves.png. Every file is replaced as a whole, at the end of each epoch and every
    ``config.checkpoint_every`` steps; curves.png at the end and at most once a minute.

    Under torchrun its processes train together by DistributedDataParallel: ``config.batch_size`` is that of the joint
    batch, and the first process writes.

    A resumed run ends with the weights of one that was never interrupted: bit for bit on the CPU, with the same torch
    and the same number of threads.

    Args:
        config: what to do; see :class:`Config`.
        overwrite: whether a run already in ``config.out`` is replaced, at its first checkpoint.
        progress: whether to show a progress bar; None shows it on a terminal.
        resume: go on from the last checkpoint in ``config.out``. Where there is none, True is an error, and "auto"
            starts from the beginning.

    Returns:
        The rows of metrics.csv, one for each epoch. train_* are means over the epoch's steps, as trained; seconds
        are those of the training steps with their data, without the evaluation.

    Raises:
        DataError, ModelError, RunError, TypeError, ValueError: a bad request, in one line.
        TrainingError: the loss or a gradient is not finite, or the disk is full.
    """
    config = config.complete()
    if resume not in (False, True, "auto"):
        raise RunError(f"--resume takes auto or nothing, got {resume!r}")
    if overwrite and resume:
        raise RunError("--resume goes on with a run and --overwrite replaces it: choose one")
    if resume is True and not runs.has_checkpoint(config.out):
        beside = [run.name for run in Path(config.out).parent.glob("*") if runs.has_checkpoint(run)]
        raise RunError(
            f"--resume: there is no checkpoint in --out {config.out}; --resume auto starts from the beginning"
            f"{runs.did_you_mean(Path(config.out).name, beside)}"
        )
    with threads(config.threads), _process_group(config.device):
        return _fit_here(config, overwrite, progress, bool(resume))


def _fit_here(config: Config, overwrite: bool, progress: bool | None, resume: bool) -> list[dict[str, Any]]:
    """A frame of its own, with which the model and its DistributedDataParallel go: see :func:`_process_group`."""
    problem = Problem(config)
    if problem.note and problem.rank == 0:
        print(f"{config.data}: {problem.note}", flush=True)
    with contextlib.ExitStack() as held:
        folder = Path(config.out)
        if problem.rank == 0:
            hint = "--resume or --overwrite"
            folder = held.enter_context(runs.open_run(config.out, overwrite or resume, hint=hint))
        run = held.enter_context(contextlib.closing(_Run(problem, folder, resume)))
        return _fit(problem, run, progress)


def _fit(problem: Problem, run: _Run, progress: bool | None) -> list[dict[str, Any]]:
    config, per_epoch = problem.config, problem.steps_per_epoch
    assert config.epochs is not None
    # With a scaler, gradients that overflow are its business: it skips the step.
    parameters = list(problem.model.parameters()) if problem.scaler is None else []
    rows = run.epoch_rows
    while run.epoch < config.epochs and (run.done or run.step != config.max_steps):
        epoch = run.epoch + 1
        problem.model.train()
        until = per_epoch if config.max_steps is None else min(per_epoch, run.done + config.max_steps - run.step)
        start = time.perf_counter() - run.seconds
        bar = tqdm(
            total=per_epoch * problem.batch_size,
            initial=run.done * problem.batch_size,
            desc=f"epoch {epoch}/{config.epochs}",
            unit="img",
            disable=not run.first or (None if progress is None else not progress),
            leave=False,
        )
        with bar:
            for x, y in problem.batches(epoch, range(run.done, until)):
                out = problem.step(run.step, x, y)
                run.step += 1
                run.done += 1
                bad = run.watch.see(run.step, out, parameters)
                images = len(y) * problem.processes
                run.whole.add(out, images, bad)
                run.window.add(out, images, bad)
                bar.update(images)
                if run.step % config.log_every == 0:
                    run.check_finite()
                    row = run.window_row()
                    run.step_rows.append(row)
                    run.scalars(row)
                    bar.set_postfix({k: f"{row[k]:.4g}" for k in ("loss", "penalty", "accuracy") if row[k] == row[k]})
                    run.window = _Running(problem.device)
                if config.checkpoint_every is not None and run.step % config.checkpoint_every == 0:
                    run.check_finite()
                    run.seconds = time.perf_counter() - start
                    run.save()
                    run.write_tables(run.epoch_rows)
        run.check_finite()
        run.seconds = seconds = time.perf_counter() - start
        row = {"epoch": epoch, "step": run.step, **{f"train_{k}": v for k, v in run.whole.means().items()}}
        row |= evaluate(
            problem.objective,
            problem.test,
            problem.batch_size,
            problem.device,
            config.workers,
            problem.memory_format,
        )
        row |= {**run.rates(), "seconds": seconds, "images_per_second": run.whole.samples / seconds}
        rows = [*run.epoch_rows, row]
        if run.done == per_epoch:  # else max_steps: the row is not of a whole epoch, and a continued run replaces it
            run.epoch, run.done, run.seconds, run.epoch_rows = epoch, 0, 0.0, rows
            run.whole = _Running(problem.device)
        run.save()
        run.write_tables(rows)
        run.scalars(row)
        run.draw(rows)
        run.say(_summary(row, config.epochs))
        if run.step == config.max_steps:
            break
    run.write_tables(rows, over=True)
    run.draw(rows, now=True)
    return rows


def _summary(row: dict[str, Any], epochs: int) -> str:
    penalty = f"penalty {row['train_penalty']:.4f}, " if row["train_penalty"] == row["train_penalty"] else ""
    return (
        f"epoch {row['epoch']}/{epochs}: loss {row['train_loss']:.4f}, {penalty}"
        f"accuracy {row['train_accuracy']:.4f}; test accuracy {row['test_accuracy']:.4f}, "
        f"penalty {row['test_penalty']:.4f}; {row['seconds']:.1f} s, {row['images_per_second']:.0f} images/s"
    )
