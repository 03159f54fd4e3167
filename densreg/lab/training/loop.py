"""Training a classifier over its epochs, and leaving a run directory."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

from densreg.lab import runs
from densreg.lab.config import Config
from densreg.lab.runs import RunError
from densreg.lab.training.distributed import process_group, threads
from densreg.lab.training.monitor import Monitor, Running, summary
from densreg.lab.training.problem import Problem, evaluate
from densreg.lab.training.state import State


def fit(
    config: Config,
    overwrite: bool = False,
    progress: bool | None = None,
    resume: bool | str = False,
    quiet: bool = False,
) -> list[dict[str, Any]]:
    """Train a classifier, and leave a run directory.

    It holds checkpoint.pt (and checkpoint.previous.pt, the one before), config.json, metrics.csv (a row for each
    epoch), steps.csv and curves.png. Every file is written atomically, at the end of each epoch and every
    ``config.checkpoint_every`` steps; curves.png at the end and at most once a minute.

    Under torchrun its processes train together by DistributedDataParallel: ``config.batch_size`` is that of the joint
    batch, and the first process writes.

    A resumed run ends with the weights of an uninterrupted one: bit for bit on the CPU, with the same torch and the
    same number of threads.

    Args:
        config: what to do; see :class:`Config`.
        overwrite: whether a run already in ``config.out`` is replaced, at its first checkpoint.
        progress: whether to show a progress bar; None shows it on a terminal.
        resume: continue from the last checkpoint in ``config.out``. Where there is none, True is an error, and "auto"
            starts from the beginning.
        quiet: print nothing but warnings.

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
        raise RunError("--resume continues a run and --overwrite replaces it: choose one")
    if resume is True and not runs.has_checkpoint(config.out):
        beside = [run.name for run in Path(config.out).parent.glob("*") if runs.has_checkpoint(run)]
        raise RunError(
            f"--resume: there is no checkpoint in --out {config.out}; --resume auto starts from the beginning"
            f"{runs.did_you_mean(Path(config.out).name, beside)}"
        )
    with threads(config.threads), process_group(config.device):
        return _fit_here(config, overwrite, progress, bool(resume), quiet)


def _fit_here(
    config: Config, overwrite: bool, progress: bool | None, resume: bool, quiet: bool
) -> list[dict[str, Any]]:
    """A frame of its own, so that the model and its DistributedDataParallel are gone before the process group."""
    problem = Problem(config)
    with contextlib.ExitStack() as held:
        folder = Path(config.out)
        monitor = Monitor(problem, folder, progress, quiet)
        if config.head == "fused":
            monitor.say("head fused: there are no logits, so the largest one in steps.csv is NaN")
        if problem.note:
            monitor.say(f"{config.data}: {problem.note}")
        if problem.rank == 0:
            held.enter_context(runs.open_run(config.out, overwrite or resume, hint="--resume or --overwrite"))
        held.callback(monitor.close)
        state = State(problem, monitor, folder)
        if resume:
            state.resume()
        monitor.open_events(state.step)
        held.enter_context(monitor.logged())
        return _train(problem, state, monitor)


def _train(problem: Problem, state: State, monitor: Monitor) -> list[dict[str, Any]]:
    config, per_epoch = problem.config, problem.steps_per_epoch
    assert config.epochs is not None
    rows = state.epoch_rows
    while state.epoch < config.epochs and (state.done or state.step != config.max_steps):
        epoch, start = state.epoch + 1, time.perf_counter() - state.seconds
        problem.model.train()
        until = per_epoch if config.max_steps is None else min(per_epoch, state.done + config.max_steps - state.step)
        with monitor.bar(epoch, state.done) as bar:
            for x, y in problem.batches(epoch, range(state.done, until)):
                out = problem.step(state.step, x, y)
                state.step += 1
                state.done += 1
                images = len(y) * problem.processes
                monitor.see(state.step, out, images)
                bar.update(images)
                if state.step % config.log_every == 0:
                    monitor.check_finite(state.kept())
                    row = state.row()
                    state.step_rows.append(row)
                    with state.writing():
                        monitor.scalars(row)
                    bar.set_postfix({k: f"{row[k]:.4g}" for k in ("loss", "penalty", "accuracy") if row[k] == row[k]})
                    monitor.window = Running(problem.device)
                if config.checkpoint_every is not None and state.step % config.checkpoint_every == 0:
                    monitor.check_finite(state.kept())
                    state.seconds = time.perf_counter() - start
                    with state.writing():
                        state.save()
                        state.write_tables(state.epoch_rows)
        monitor.check_finite(state.kept())
        state.seconds = time.perf_counter() - start
        rows = [*state.epoch_rows, _row(problem, state, monitor)]
        if state.done == per_epoch:  # else max_steps: the row is of a part, and a continued run replaces it
            state.epoch, state.done, state.seconds, state.epoch_rows = epoch, 0, 0.0, rows
            monitor.whole = Running(problem.device)
        with state.writing():
            state.save()
            state.write_tables(rows)
            monitor.scalars(rows[-1])
            monitor.draw(rows)
        monitor.say(summary(rows[-1], config))
        if state.step == config.max_steps:
            break
    with state.writing():
        state.write_tables(rows, over=True)
        monitor.draw(rows, now=True)
    return rows


def _row(problem: Problem, state: State, monitor: Monitor) -> dict[str, Any]:
    """The row of metrics.csv for the epoch that has begun."""
    row: dict[str, Any] = {"epoch": state.epoch + 1, "step": state.step}
    row |= {f"train_{name}": value for name, value in monitor.whole.means().items()}
    row |= evaluate(
        problem.objective,
        problem.test,
        problem.batch_size,
        problem.device,
        problem.config.workers,
        problem.memory_format,
    )
    row |= problem.rates(max(state.step - 1, 0))
    return {**row, "seconds": state.seconds, "images_per_second": monitor.whole.samples / state.seconds}
