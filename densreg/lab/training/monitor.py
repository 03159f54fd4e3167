"""What a run reports: means, the first step that is not finite, the progress bar, curves and TensorBoard's events."""

from __future__ import annotations

import contextlib
import logging
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from densreg.lab import runs
from densreg.lab.config import Config
from densreg.lab.runs import NotFiniteError, RunError
from densreg.lab.training.problem import Problem, StepOutput

_PICTURE_SECONDS = 60.0
"""The curves are drawn at most so often, and at the end."""


LEAST_SCALE = 2.0**-10
"""Below it float16's loss scale is no longer looking for gradients that fit: it began at 2^16, and halves when one does
not."""


class Running:
    """Sums of step outputs, and the largest logit, kept on the device: reading them is what synchronizes."""

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


class Watch:
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


class Monitor:
    """Observes the steps of a run and reports them; in the first process only, where several train together.

    Args:
        progress: whether to show a progress bar; None shows it on a terminal.
        quiet: print nothing but warnings.
    """

    def __init__(self, problem: Problem, folder: Path, progress: bool | None, quiet: bool) -> None:
        self.problem, self.config, self.folder = problem, problem.config, folder
        self.progress, self.quiet, self.first = progress, quiet, problem.rank == 0
        self.whole, self.window = Running(problem.device), Running(problem.device)  # of the epoch, since the last row
        self.watch = Watch(problem.device)
        # With a scaler, gradients that overflow are its business: it skips the step.
        self.parameters = [*problem.model.parameters()] if problem.scaler is None else []
        self.warned = False  # of a first bad step, which is recorded
        self.drawn = time.monotonic()
        self.events: Any = None

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {"whole": self.whole.state(), "window": self.window.state(), "first_bad": self.watch.first}

    def load(self, state: dict[str, Any]) -> None:
        self.whole.load(state["whole"])
        self.window.load(state["window"])
        self.watch.first = state["first_bad"]

    def say(self, line: str) -> None:
        if self.first and not self.quiet:
            print(line, flush=True)

    def warn(self, line: str) -> None:
        if self.first:
            print(line, file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def logged(self) -> Iterator[None]:
        """Context in which what the library logs, that the first step compiles, is said, above the progress bar."""
        logger, handler = logging.getLogger("densreg"), logging.Handler()
        level = logger.level
        if self.first and not self.quiet:
            handler.emit = lambda record: tqdm.write(record.getMessage())  # type: ignore[method-assign]
        else:
            handler = logging.NullHandler()
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        try:
            yield
        finally:
            logger.setLevel(level)
            logger.removeHandler(handler)

    def bar(self, epoch: int, done: int) -> tqdm:
        """The progress bar of an epoch of which so many steps are done."""
        return tqdm(
            total=self.problem.steps_per_epoch * self.problem.batch_size,
            initial=done * self.problem.batch_size,
            desc=f"epoch {epoch}/{self.config.epochs}",
            unit="img",
            disable=not self.first or (None if self.progress is None else not self.progress),
            leave=False,
        )

    def see(self, step: int, out: StepOutput, images: int) -> None:
        """Take up a step (from 1), without a synchronization."""
        bad = self.watch.see(step, out, self.parameters)
        self.whole.add(out, images, bad)
        self.window.add(out, images, bad)

    def row(self, step: int, epoch: int) -> dict[str, Any]:
        """The row of steps.csv for the steps since the last one."""
        seen = {"largest_logit": self.window.largest.item(), "nonfinite_steps": int(self.window.sums[4].item())}
        return {"step": step, "epoch": epoch, **self.window.means(), **seen, **self.problem.rates(max(step - 1, 0))}

    def check_finite(self, kept: str) -> None:
        """Raise NotFiniteError for a step that was not finite, or warn of it once, as on_nonfinite says.

        Args:
            kept: what the message says of the last checkpoint.
        """
        config = self.config
        rival = config.regularizer if config.regularizer != "density" else None
        penalty = (f"regularizer {rival}" if rival else f"path {config.path}") if config.coeff > 0 else "no penalty"
        report, scaler = self.watch.report(penalty), self.problem.scaler
        if not report and scaler is not None and scaler.get_scale() < LEAST_SCALE:
            report = f"step after step is skipped, as its gradients are not finite at any loss scale ({penalty})"
        if report and config.on_nonfinite == "stop":
            other = "" if rival or config.path == "fused" or config.coeff == 0 else ", or use --path fused"
            raise NotFiniteError(f"{report}: lower --lr or --coeff{other}; {kept}")
        if report and not self.warned:
            self.warn(f"{report}; going on")
            self.warned = True

    def draw(self, rows: Sequence[dict[str, Any]], now: bool = False) -> None:
        """Draw the curves: now, or if a minute has passed since the last time."""
        if self.first and rows and (now or time.monotonic() - self.drawn > _PICTURE_SECONDS):
            self.drawn = time.monotonic()
            try:
                runs.draw_curves(self.folder / runs.CURVES, rows)
            except ModuleNotFoundError as error:
                self.warn(f"no {runs.CURVES}: {error.name} is not installed: pip install 'densreg[train]'")

    def open_events(self, step: int) -> None:
        """TensorBoard's writer, if it is asked for; what it wrote after this step is no longer shown."""
        if not (self.config.tensorboard and self.first):
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError as error:
            raise RunError(f"{error.name} is not installed: pip install 'densreg[tensorboard]'") from error
        self.events = SummaryWriter(str(self.folder / "tensorboard"), purge_step=step + 1)

    def scalars(self, row: dict[str, Any]) -> None:
        """A row for TensorBoard."""
        if self.events is not None:
            for name, value in row.items():
                if name not in ("step", "epoch"):
                    tag = name.replace("train_", "train/").replace("test_", "test/")
                    self.events.add_scalar(tag, value, row["step"])
            self.events.flush()

    def close(self) -> None:
        if self.events is not None:
            self.events.close()


def summary(row: dict[str, Any], config: Config) -> str:
    """A row of metrics.csv in one line."""
    penalty = f"penalty {row['train_penalty']:.4f}, " if row["train_penalty"] == row["train_penalty"] else ""
    measured = "held-out" if config.val_size else "test"
    return (
        f"epoch {row['epoch']}/{config.epochs}: loss {row['train_loss']:.4f}, {penalty}"
        f"accuracy {row['train_accuracy']:.4f}; {measured} accuracy {row['test_accuracy']:.4f}, "
        f"penalty {row['test_penalty']:.4f}; {row['seconds']:.1f} s, {row['images_per_second']:.0f} images/s"
    )
