"""What is trained: data, model and optimizer of a configuration, one step of it, and its evaluation on a split."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from densreg import attacks, regularizers
from densreg.batch import Batch
from densreg.head import find_head
from densreg.lab import data, groups, models
from densreg.lab.config import AMP, COMPILE_STEPS, Config
from densreg.lab.training.distributed import processes
from densreg.objective import RegularizedObjective
from densreg.regularizers import Regularizer
from densreg.results import HeadOutput

PENALTY_SAMPLES = 1000
"""The test penalty is the mean over so many test images: it costs three forward passes, accuracy one."""


class StepOutput(NamedTuple):
    """Results of a training step, detached: means over the batch, the number of correct answers, the largest logit.

    Without logits the largest one is NaN.
    """

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
    loss, ce, penalty = (t.detach() for t in (out.loss, out.ce, out.penalty))
    if isinstance(out, HeadOutput):
        return StepOutput(loss, ce, penalty, out.correct.sum(), torch.full_like(loss, math.nan))
    largest, best = out.logits.detach().max(1)
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

    The model is in eval mode meanwhile.
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
            correct = out.correct if isinstance(out, HeadOutput) else out.logits.argmax(1) == y
            right.append(correct.double().cpu())
    some = split.first(PENALTY_SAMPLES)
    for x, y in data.batches(some, batch_size, workers=workers):
        penalty += objective.penalty(x.to(device, memory_format=memory_format), y.to(device)).item() * len(x)
    objective.train(training)
    correct = torch.cat(right)
    metrics = {"test_ce": ce / len(split), "test_accuracy": correct.mean().item()}
    if split.groups is not None:
        metrics["test_worst_group"] = groups.group_accuracy(correct, split.groups)["worst_group"]
    return {**metrics, "test_penalty": penalty / len(some)}


class Problem:
    """Data, a model with fresh weights and its optimizer, as a configuration says.

    Seeds torch's global generator: the weights come from it and, in training, random classes and dropout.

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
        for what, needed in (("group_dro", config.group_dro is not None), ("balance_groups", config.balance_groups)):
            if needed and not dataset.groups:
                grouped = [name for name, entry in data.DATA_SETS.items() if entry.groups]
                raise data.DataError(f"{what} needs a data set with groups: {', '.join(grouped)}")
            if needed:
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
        if config.head == "fused":
            self.objective.head = self._last_layer(smallest)
        self.module: nn.Module = self.objective
        if self.processes > 1:
            self.module = nn.parallel.DistributedDataParallel(self.objective)
            torch.manual_seed((config.seed + self.rank * 0x9E3779B97F4A7C15) % 2**63)  # each draws its own
        self.amp = AMP[config.amp]
        self.scaler = torch.amp.GradScaler(self.device.type) if self.amp == torch.float16 else None

    def _last_layer(self, samples: int) -> str:
        """The name of the linear layer whose output the model returns."""
        x = torch.zeros(samples, *self.dataset.image_shape, device=self.device)
        name = find_head(self.objective._spec(), Batch((x,), (0,), {}))
        if name is None:
            raise models.ModelError(
                f"head fused: expected a model that returns the output of an nn.Linear, got {self.config.model!r}"
            )
        return name

    def _compiles(self) -> bool:
        """Whether the step is compiled: as the configuration says, or where that is likely to pay."""
        config = self.config
        assert config.epochs is not None
        if config.compile is not None:
            return config.compile
        steps = config.epochs * self.steps_per_epoch  # whatever max_steps is: a run in parts is the same run
        compiler = self.device.type == "cuda" or any(map(shutil.which, ("c++", "g++", "clang++")))
        rival = config.coeff > 0 and regularizers.trait(regularizers.REGULARIZERS[config.regularizer], "unrolled")
        unrolled = config.path in ("per_class", "directional") or rival
        return steps >= COMPILE_STEPS and bool(compiler) and not unrolled

    @property
    def batch_size(self) -> int:
        assert self.config.batch_size is not None
        return min(self.config.batch_size, len(self.train))

    @property
    def steps_per_epoch(self) -> int:
        """Full batches only: a last batch of one sample could not go through BatchNorm in training mode."""
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
        rates = self.rates(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rates["lr"]
        self.objective.coeff.fill_(rates["coeff"])
        x = self._perturbed(x, groups.classes(y))
        self.objective.calls = step  # decides whether interval's step is on: no state to save
        out = train_step(self.module, self.optimizer, x, y, self.amp, self.scaler)
        return out if self.processes == 1 else _of_all_processes(out)

    def rates(self, step: int) -> dict[str, float]:
        """Learning rate and coefficient of a step."""
        per_epoch = self.steps_per_epoch
        return {
            "lr": learning_rate(self.config, step, per_epoch),
            "coeff": coefficient(self.config, step, per_epoch),
        }

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


def _of_all_processes(out: StepOutput) -> StepOutput:
    """The step of the joint batch, of which each process had an equal part."""
    means = torch.stack([out.loss, out.ce, out.penalty]) / torch.distributed.get_world_size()
    correct, largest = out.correct.clone(), out.largest.clone()
    torch.distributed.all_reduce(means)
    torch.distributed.all_reduce(correct)
    torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
    loss, ce, penalty = means.unbind()
    return StepOutput(loss, ce, penalty, correct, largest)


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


WARMUP = 0.2
"""The part of the steps in which the learning rate rises, with the schedule warmup-cosine."""


def learning_rate(config: Config, step: int, steps_per_epoch: int) -> float:
    """The learning rate of a step (from 0): a function of the step, so that there is no state to save."""
    assert config.lr is not None
    assert config.epochs is not None
    total = config.epochs * steps_per_epoch
    if config.schedule == "cosine":
        return config.lr * 0.5 * (1 + math.cos(math.pi * step / total))
    if config.schedule == "warmup-cosine":
        rising = max(1, round(WARMUP * total))
        if step < rising:
            return config.lr * (step + 1) / rising
        return config.lr * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, total - rising)))
    passed = [
        part for part in config.milestones or () if step // steps_per_epoch >= max(1, round(part * config.epochs))
    ]
    return config.lr * 0.1 ** len(passed)


def coefficient(config: Config, step: int, steps_per_epoch: int) -> float:
    """The penalty's coefficient in a step (from 0); in the warm-up it is above 0 from the first step on."""
    rising = config.coeff_warmup * steps_per_epoch
    return config.coeff * min(1.0, (step + 1) / rising) if rising else config.coeff
