"""Where a training stands, its checkpoints and tables, and resuming interrupted runs."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from densreg.lab import config as configuration
from densreg.lab import data, runs
from densreg.lab.runs import RunError, TrainingError
from densreg.lab.training.monitor import Monitor
from densreg.lab.training.problem import Problem
from densreg.version import __version__


class State:
    """The progress of a run: all that a checkpoint holds, with what is written to the run directory."""

    def __init__(self, problem: Problem, monitor: Monitor, folder: Path) -> None:
        self.problem, self.monitor, self.folder = problem, monitor, folder
        self.config = problem.config
        self.dataset = problem.dataset.describe()
        self.epoch = 0  # whole epochs
        self.done = 0  # steps of the one that has begun
        self.step = 0
        self.seconds = 0.0  # of that epoch
        self.epoch_rows: list[dict[str, Any]] = []
        self.step_rows: list[dict[str, Any]] = []
        self.fresh = True  # no checkpoint in the directory is this run's

    def row(self) -> dict[str, Any]:
        """The row of steps.csv for the steps since the last one."""
        return self.monitor.row(self.step, self.epoch + bool(self.done))

    # ----------------------------------------------------------------------------------------------------------------
    # writing

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """TrainingError, in one line, for what cannot be written."""
        try:
            yield
        except OSError as error:
            reason = error.strerror or str(error)
            raise TrainingError(f"cannot write to {self.folder}: {reason}; {self.kept()}") from error

    def kept(self) -> str:
        """What messages say of the last checkpoint."""
        return "no checkpoint was saved yet" if self.fresh else "the last checkpoint is kept"

    def save(self) -> None:
        """Write the checkpoint; the one before stays as the previous one."""
        checkpoint = self._checkpoint()  # of all processes
        if self.monitor.first:
            runs.save_checkpoint(self.folder, checkpoint, keep=not self.fresh)
        self.fresh = False

    def write_tables(self, rows: Sequence[dict[str, Any]], over: bool = False) -> None:
        """Write config.json and the tables; where the run is over, with the steps since the last row too."""
        if self.monitor.first:
            tail = [self.row()] if over and self.monitor.window.samples else []
            runs.write_json(self.folder / runs.CONFIG, self._description())
            runs.write_csv(self.folder / runs.METRICS, rows)
            runs.write_csv(self.folder / runs.STEPS, [*self.step_rows, *tail])

    def _description(self) -> dict[str, Any]:
        versions = {"densreg": __version__, "torch": str(torch.__version__), "python": platform.python_version()}
        return {**self.config.describe(), **self.dataset, "note": self.problem.note, "versions": versions}

    # ----------------------------------------------------------------------------------------------------------------
    # checkpoints

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
            **self.monitor.state(),
            "epoch_rows": self.epoch_rows,
            "step_rows": self.step_rows,
            "rng": self._random_states(),
            "config": self._description(),
        }

    def _random_states(self) -> list[tuple[Tensor, Tensor | None]]:
        """The states of the generators for CPU and GPU, of each process."""
        device = self.problem.device
        mine = (torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None)
        if self.problem.processes == 1:
            return [mine]
        states: list[Any] = [None] * self.problem.processes
        torch.distributed.all_gather_object(states, mine)
        return states

    def resume(self) -> None:
        """Load the last checkpoint that can be read; where there is none, start from the beginning.

        Raises:
            RunError: it is of another training.
        """
        checkpoint, note = runs.load_checkpoint(self.folder, self.problem.device)
        if checkpoint is None:
            self.monitor.warn(f"no checkpoint in {self.folder}: starting from the beginning")
            return
        try:
            self._check_same(checkpoint)
            self._load(checkpoint)
        except RunError:
            raise
        except Exception as error:  # what is not ours can lack anything
            reason = str(error).splitlines()[0] if str(error) else ""
            raise RunError(
                f"the checkpoint in {self.folder} is of another kind: {type(error).__name__} {reason}"
            ) from error
        max_steps = self.config.max_steps
        if max_steps is not None and max_steps < self.step:
            raise RunError(f"the run in {self.folder} has done {self.step} steps; got max_steps {max_steps}")
        if note:
            self.monitor.warn(note)
            if self.monitor.first:
                (self.folder / runs.CHECKPOINT).unlink(missing_ok=True)  # or it would be kept as the previous one
        self.monitor.say(f"resuming {self.folder} after step {self.step}, {self.epoch} whole epochs")

    def _load(self, checkpoint: dict[str, Any]) -> None:
        problem = self.problem
        problem.model.load_state_dict(checkpoint["model"])
        problem.optimizer.load_state_dict(checkpoint["optimizer"])
        if problem.criterion is not None:
            problem.criterion.load_state_dict(checkpoint["criterion"])
        if problem.scaler is not None:
            problem.scaler.load_state_dict(checkpoint["scaler"])
        for name in ("epoch", "done", "step", "seconds", "epoch_rows", "step_rows"):
            setattr(self, name, checkpoint[name])
        self.monitor.load(checkpoint)
        cpu, cuda = checkpoint["rng"][problem.rank]
        torch.set_rng_state(cpu.cpu())
        if problem.device.type == "cuda" and cuda is not None:
            torch.cuda.set_rng_state(cuda.cpu(), problem.device)
        self.fresh = False

    def _check_same(self, checkpoint: dict[str, Any]) -> None:
        """Raise RunError unless the checkpoint is of this configuration, model and data."""
        config, where = checkpoint["config"], self.config.data_dir or self.config.data
        configuration.check_known(config, self.folder)
        unknown = sorted(checkpoint.keys() - self._checkpoint().keys())
        if unknown:
            raise RunError(configuration.newer(self.folder, config, f"the state {unknown[0]!r}"))

        def refuse(what: str) -> None:
            raise RunError(f"--resume: {what}")

        other = configuration.difference(config, self.config)
        if other:
            name, held, given = other
            refuse(f"the run in {self.folder} has {name} {held!r}, got {given!r}; give the same, or another --out")
        renamed = data.other_class(config["class_names"], self.problem.dataset.class_names)
        if renamed:
            refuse(f"the run in {self.folder} has other classes than {where}: {renamed}")
        if len(checkpoint["rng"]) != self.problem.processes:
            refuse(f"the run in {self.folder} has {len(checkpoint['rng'])} processes, got {self.problem.processes}")
        held, now = config["images"], self.dataset["images"]
        kept = (
            f"images than {where} has: other names, sizes, contents, labels or groups; give the same, or another --out"
        )
        if held["train"] != now["train"]:
            refuse(f"the run in {self.folder} had other training {kept}")
        # In a table of epochs all figures are of the same test images. A run that is over gets no more of them.
        if checkpoint["epoch_rows"] and self.config.val_size is None:
            if checkpoint["epoch"] < (self.config.epochs or 0) and held["test"] != now["test"]:
                refuse(f"the run in {self.folder} had other test {kept}")
            self.dataset["images"] = held
