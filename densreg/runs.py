"""The run directory: files that are whole at any moment, checkpoints, tables, and the picture of the curves."""

from __future__ import annotations

import csv
import hashlib
import io
import os
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

CONFIG, METRICS, STEPS, CURVES = "config.json", "metrics.csv", "steps.csv", "curves.png"
CHECKPOINT, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"
FILES = (CONFIG, CHECKPOINT, PREVIOUS, METRICS, STEPS)


class RunError(ValueError):
    """The run directory cannot be used; the message is one line for the user."""


class TrainingError(RuntimeError):
    """Training cannot go on; the message is one line for the user."""


def digest(*tensors: torch.Tensor) -> str:
    """16 hexadecimal digits, of the values, dtypes and shapes of tensors on any device: to tell other ones."""
    found = hashlib.sha256()
    for t in tensors:
        found.update(f"{t.dtype}{list(t.shape)}".encode())
        found.update(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


def write_atomically(path: Path, write: Callable[[io.BufferedWriter], Any], previous: Path | None = None) -> None:
    """Write a file so that it is either the old one or the whole new one, whenever the machine stops.

    Args:
        previous: the name under which the old file is kept, once the new one is on the disk.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            _second_name(path, previous)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows with the same keys as a table; without rows there is no file."""
    if not rows:
        path.unlink(missing_ok=True)
        return
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))


def open_run(out: str, reuse: bool = False, files: Sequence[str] = FILES, hint: str = "--overwrite") -> Path:
    """The run directory, made and tried; what it holds is left as it is.

    Args:
        reuse: whether it may hold one of ``files`` already; ``hint`` says by which option.

    Raises:
        RunError: it is a file, cannot be written to, or holds what it may not.
    """
    if not out:
        raise RunError("--out is empty; wanted a folder")
    run = Path(out)
    try:
        if run.exists() and not run.is_dir():
            raise RunError(f"--out {run} is a file; wanted a folder")
        held = [name for name in files if (run / name).exists()]
        if held and not reuse:
            raise RunError(f"--out {run} already holds {held[0]}; choose another folder or add {hint}")
        run.mkdir(parents=True, exist_ok=True)
        write_atomically(run / ".writable", lambda file: file.write(b""))
        (run / ".writable").unlink()
    except OSError as error:
        raise RunError(f"cannot write to --out {run}: {error.strerror}") from error
    return run


def _second_name(path: Path, name: Path) -> None:
    link = name.with_name(f".{name.name}.part")
    link.unlink(missing_ok=True)
    try:
        os.link(path, link)  # a link, so that path is there all the time
    except OSError:  # a file system without links
        path.replace(link)
    link.replace(name)


def save_checkpoint(run: Path, checkpoint: dict[str, Any], keep: bool = True) -> None:
    """Write checkpoint.pt; the one before stays as checkpoint.previous.pt, unless not ``keep``: it is another run's.

    Raises:
        OSError: it cannot be written; both old files are as they were.
    """

    def write(file: io.BufferedWriter) -> None:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:  # torch's writer stumbles over what a failed write left, and says only that
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None

    write_atomically(run / CHECKPOINT, write, run / PREVIOUS if keep else None)
    if not keep:
        (run / PREVIOUS).unlink(missing_ok=True)


def load_checkpoint(run: Path, device: str | torch.device = "cpu") -> tuple[dict[str, Any] | None, str]:
    """The last checkpoint of a run that can be read, with weights_only; None where there is no checkpoint file.

    Returns:
        (checkpoint, note): the note is "" or one line that says why it is not the last one that was written.

    Raises:
        RunError: there are checkpoint files, and none can be read.
    """
    reasons = []
    for name in (CHECKPOINT, PREVIOUS):
        if not (run / name).exists():
            continue
        try:
            with zipfile.ZipFile(run / name) as archive:  # torch writes checksums and does not read them
                damaged = archive.testzip()
            if damaged:
                raise RunError(f"{damaged} in it is damaged")
            checkpoint = torch.load(run / name, map_location=device, weights_only=True)
            if not isinstance(checkpoint, dict):
                raise TypeError(f"holds {type(checkpoint).__name__}")
        except Exception as error:  # a damaged file can raise anything
            reasons.append(f"{run / name} cannot be read ({first_line(error)})")
        else:
            return checkpoint, f"{reasons[0]}; going back to {name}" if reasons else ""
    if reasons:
        raise RunError("; ".join(reasons))
    return None, ""


def first_line(error: Exception) -> str:
    """What an error says, in one line; its type where it says nothing."""
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__


def draw_curves(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Draw the rows of metrics.csv: loss, penalty and accuracy over the epochs. Needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.4), layout="constrained")
    epochs = [row["epoch"] for row in rows]
    panels = {
        "cross-entropy": {"training": "train_ce", "test": "test_ce"},
        "penalty": {"training": "train_penalty", "test": "test_penalty"},
        "accuracy": {"training": "train_accuracy", "test": "test_accuracy"},
    }
    for axes, (title, curves) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for label, column in curves.items():
            axes.plot(epochs, [row[column] for row in rows], marker="." if len(rows) < 50 else None, label=label)
        axes.set(title=title, xlabel="epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    save_picture(path, figure)


def save_picture(path: Path, figure: Any) -> None:
    """Write a matplotlib figure as PNG."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    write_atomically(path, lambda file: file.write(picture.getbuffer()))
