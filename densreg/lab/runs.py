"""The run directory: atomically written files, locks, checkpoints, tables, and the picture of the curves."""

from __future__ import annotations

import contextlib
import csv
import difflib
import errno
import hashlib
import io
import json
import os
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from densreg.lab import report

CONFIG, METRICS, STEPS, CURVES = "config.json", "metrics.csv", "steps.csv", "curves.png"
CHECKPOINT, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"
FILES = (CONFIG, CHECKPOINT, PREVIOUS, METRICS, STEPS)
LOCK = ".lock"


class RunError(ValueError):
    """The run directory cannot be used; the message is one line for the user."""


class TrainingError(RuntimeError):
    """Training cannot go on; the message is one line for the user."""


class NotFiniteError(TrainingError):
    """A loss or gradient is not finite: the training diverged."""


def unknown(kind: str, name: str, known: Iterable[str], expected: str = "one") -> str:
    """The message about an unknown name of a kind; ``expected`` is how many of the known ones, "one" or "some"."""
    known = [*known]
    return f"unknown {kind} {name!r}; expected {expected} of {', '.join(known)}{did_you_mean(name, known)}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: "; did you mean X?", or nothing where none is like it."""
    near = difflib.get_close_matches(name, sorted(known), n=3)
    return f"; did you mean {' or '.join(near)}?" if near else ""


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


def write_text(path: Path, text: str) -> None:
    """Write a text file as a whole, see :func:`write_atomically`."""
    write_atomically(path, lambda file: file.write(text.encode()))


def write_json(path: Path, value: Any, **options: Any) -> None:
    """Write a value as JSON, as a whole; ``options`` are those of json.dumps."""
    write_text(path, json.dumps(value, **{"indent": 2, **options}) + "\n")


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """TrainingError, in one line, for what cannot be written to a folder."""
    try:
        yield
    except OSError as error:
        raise TrainingError(f"cannot write to {folder}: {error.strerror or error}") from error


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows with the same keys as a table; without rows there is no file."""
    if not rows:
        path.unlink(missing_ok=True)
        return
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


@contextlib.contextmanager
def open_run(out: str, reuse: bool = False, files: Sequence[str] = FILES, hint: str = "--overwrite") -> Iterator[Path]:
    """The run directory, made, tried and locked; what it holds is left as it is.

    Args:
        reuse: whether it may hold one of ``files`` already; ``hint`` says by which option.

    Raises:
        RunError: it is a file, cannot be written to, is in use, or holds what it may not.
    """
    if not out:
        raise RunError("--out is empty; expected a folder")
    run = Path(out)
    with contextlib.ExitStack() as held:
        try:
            if run.exists() and not run.is_dir():
                raise RunError(f"--out {run} is a file; expected a folder")
            run.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(run))
            there = [name for name in files if (run / name).exists()]
            if there and not reuse:
                raise RunError(f"--out {run} already holds {there[0]}; choose another folder or add {hint}")
            write_atomically(run / ".writable", lambda file: file.write(b""))
            (run / ".writable").unlink()
        except OSError as error:
            raise RunError(f"cannot write to --out {run}: {error.strerror}") from error
        yield run


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from writing to a folder; the system lets go of it when this one ends, in whichever way.

    The lock is on a file, which stays. Where the file system has no locks, a line says so.

    Raises:
        RunError: another one holds it.
        OSError: the folder is absent, or cannot be written to.
    """
    lock = FileLock(folder / LOCK, timeout=0, mode=0o666)
    try:
        lock.acquire()
    except Timeout:
        raise RunError(f"{folder} is in use by another process; wait for its end, or choose another folder") from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP):
            raise
        print(f"no lock on {folder} ({error.strerror}): let no second process write to it", file=sys.stderr)
    try:
        yield
    finally:
        lock.release()


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


def has_checkpoint(run: str | Path) -> bool:
    """Whether a folder has the file of a checkpoint, readable or not."""
    try:
        return any((Path(run) / name).exists() for name in (CHECKPOINT, PREVIOUS))
    except OSError:  # a name that is too long
        return False


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
    figure, (row_of_axes,) = report.panels(1, 3, 12, 3.4)
    epochs, marker = [row["epoch"] for row in rows], "." if len(rows) < 50 else None
    columns = {"cross-entropy": "ce", "penalty": "penalty", "accuracy": "accuracy"}
    for axes, (title, column) in zip(row_of_axes, columns.items(), strict=True):
        splits = {"training": f"train_{column}", "test": f"test_{column}"}
        lines = {label: (epochs, [row[name] for row in rows]) for label, name in splits.items()}
        report.draw_lines(axes, lines, marker, "medium", title=title, xlabel="epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
    save_picture(path, figure)


def save_picture(path: Path, figure: Any) -> None:
    """Write a matplotlib figure as PNG."""
    picture = report.png(figure)
    write_atomically(path, lambda file: file.write(picture))
