"""Measurements as they are kept: a line of CSV for each thing that was measured, and the Markdown tables made of them.

A *run* is the environment of one call and its rows. A row is what one suite measured of one case: a dict with "suite",
"case" (a dict of scalars) and "columns", for each thing that was measured a dict with some of :data:`FIELDS`.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from densreg.lab.report import markdown_table
from densreg.lab.runs import write_text

from .timing import exponent

Row = dict[str, Any]
Run = dict[str, Any]

FIELDS = {
    **{"seconds": float, "seconds_low": float, "seconds_high": float},
    **{"ratio": float, "ratio_low": float, "ratio_high": float, "base": str},
    **{"bytes": float, "peak_bytes": float, "error": float, "first_call": float, "images": float, "note": str},
}
"""Median seconds with quartiles; how many times longer than ``base``, the median over the rounds with quartiles; the
fewest bytes that must be moved; the allocator's peak; the relative error against float64; seconds of the first call."""

DIGITS = {"bytes": 10, "peak_bytes": 4, "seconds_low": 4, "seconds_high": 4, "error": 2, "first_call": 3}
"""Significant digits in a CSV file; five for the others."""


def write_csv(path: Path, runs: Sequence[Run]) -> None:
    """A comment with the environment of each run, and then a line for each column."""
    text = io.StringIO()
    for number, run in enumerate(runs, 1):
        text.write(f"# run {number}: {json.dumps(run['environment'])}\n")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", "suite", "case", "column", *FIELDS])
    for number, run in enumerate(runs, 1):
        for row in run["rows"]:
            case = "; ".join(f"{name}={value}" for name, value in row["case"].items())
            for name, column in row["columns"].items():
                values = ((field, column.get(field)) for field in FIELDS)
                cells = (f"{v:.{DIGITS.get(f, 5)}g}" if isinstance(v, float) else v for f, v in values)
                writer.writerow([number, row["suite"], case, name, *cells])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text.getvalue())


def read(path: Path) -> list[Run]:
    """The runs in a file of :func:`write_csv`, of :func:`write_json`, or of a GPU's session."""
    if path.suffix == ".json":
        run = json.loads(path.read_text())
        rows = run["rows"] if "rows" in run else [row for stage in run["stages"].values() for row in stage["rows"]]
        return [{"environment": run["environment"], "rows": rows}]
    lines = path.read_text().splitlines()
    comments = [line for line in lines if line.startswith("# run ")]
    runs: list[Run] = [{"environment": json.loads(line.split(": ", 1)[1]), "rows": []} for line in comments]
    for line in csv.DictReader(line for line in lines if not line.startswith("#")):
        case = dict(part.split("=", 1) for part in line["case"].split("; "))
        row = {"suite": line["suite"], "case": {name: _number(value) for name, value in case.items()}, "columns": {}}
        rows = runs[int(line["run"]) - 1]["rows"]
        if not rows or (rows[-1]["suite"], rows[-1]["case"]) != (row["suite"], row["case"]):
            rows.append(row)
        rows[-1]["columns"][line["column"]] = {f: kind(line[f]) for f, kind in FIELDS.items() if line[f]}
    return runs


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def write_json(path: Path | None, rows: Sequence[Row], about: dict[str, Any]) -> None:
    """One run as JSON, every digit kept; nothing where no path is given."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps({"environment": about, "rows": rows}, indent=1, allow_nan=False) + "\n")


# --------------------------------------------------------------------------------------------------------------------
# tables


class Suite(NamedTuple):
    """How the rows of a suite are shown."""

    title: str
    says: str
    detailed: bool = False  # a table for each case, and not one of all cases for each quantity


SUITES = {
    "logits": Suite(
        "At the logits: forward and double backward",
        "Through autograd, in eager mode: api (`densreg.input_score` and its double backward), fallback (the same in "
        "plain torch) and triton, log_density, density_cross_entropy and torch's logsumexp differentiated twice, the "
        "paper's paths, and floor (a pair of empty autograd Functions). Without autograd: "
        "raw (the two operators), aten and compiled (the same closed formula), copy and clone of as many values.",
    ),
    "head": Suite(
        "Through a linear head",
        "The whole penalty of 64 features through a linear layer: logits, score, norm, and the penalty's gradient in "
        "the weights. fused is densreg's in eager mode; compiled is the formula by hand, with no autograd left in it.",
    ),
    "linear-head": Suite(
        "A linear head of many classes, whole steps",
        "Cross-entropy, penalty and all gradients: from logits by naive, taylor and fused, in eager, and compiled; and "
        "without logits, head. products: the linear head's own matrix products and nothing else.",
    ),
    "yardsticks": Suite(
        "Moving memory", "Triton kernels that copy, or read two tensors and write one; copy: torch's `copy_`."
    ),
    "right": Suite(
        "Rows that several blocks share: whether they are right",
        "Against float64, beside rows with NaN and infinities; the same bits in calls one after the other, beside "
        "another stream's work, and in a CUDA graph.",
    ),
    "kernels": Suite(
        "Operators",
        "p = 2, on tensors past the caches, in CUDA graphs; copy: of one such tensor, by `copy_`; yardstick: a Triton "
        "kernel that copies one, or reads two and writes one where the operator does.",
    ),
    "lags": Suite(
        "Triton, rows that several blocks share: the lag",
        "How many programs that reduce come before the first that writes.",
    ),
    "tiles": Suite(
        "Triton, rows that several blocks share: the tile",
        "Entries / warps of one program (`SPLIT`, `SPLIT_PAIRS` in kernels/rows.py).",
    ),
    "eager": Suite(
        "Small calls in eager", "softmax and its backward once, without autograd, launches included; no CUDA graph."
    ),
    "small": Suite(
        "Compiled steps of a small MLP", "28 x 28 pixels; times include launches and Python."
    ),  # until 2026-11
    "steps": Suite("Whole training steps", "Forward, loss and all gradients on one batch; no optimizer.", True),
    "startup": Suite(
        "The first step of a process", "cold: torch's caches on disk are empty; warm: filled, over cold.", True
    ),
    "epoch": Suite("Epochs", "Seconds are those of the whole training set; loading is not timed.", True),
    "training": Suite("Trainings by `densreg train`", "Seconds of the last epoch, loading included.", True),
    "growth": Suite(
        "Growth",
        "A small convolutional network in eager mode, one size varied: exponents fitted to time and to memory.",
    ),
    "second-order": Suite(
        "The penalty's own gradient", "Relative to float64 in plain torch; torch: its own expression."
    ),
    "tests": Suite("Builds and tests", "Of the operators, on CUDA tensors, by every backend that is there.", True),
}


class Quantity(NamedTuple):
    """One number of a column, as a table shows it."""

    caption: str
    value: Callable[[dict[str, Any]], float | None]
    style: str


def _scaled(field: str, factor: float) -> Callable[[dict[str, Any]], float | None]:
    return lambda column: column[field] * factor if column.get(field) is not None else None


def _rate(column: dict[str, Any]) -> float | None:
    return column["bytes"] / column["seconds"] / 1e9 if column.get("bytes") else None


QUANTITIES = (
    Quantity("Microseconds, medians:", _scaled("seconds", 1e6), ",.4g"),
    Quantity(
        "How many times longer than what is behind the stroke, medians over the rounds:", _scaled("ratio", 1), ".2f"
    ),
    Quantity("GB/s, by the fewest bytes that must be moved:", _rate, ",.1f"),
    Quantity("Peak memory in MiB, by torch's allocator:", _scaled("peak_bytes", 2**-20), ",.4g"),
    Quantity("Relative error:", _scaled("error", 1), ".0e"),
)


def _names(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row["columns"]))


def _style(value: float | None, style: str) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if style == ",.4g" and value >= 1000 else format(value, style)


def _pivot(rows: list[Row], quantity: Quantity) -> str | None:
    """Cases down, columns across; None where no column has this quantity."""
    found: dict[str, list[str]] = {}
    for name in _names(rows):
        bases = {of["base"] for row in rows if "base" in (of := row["columns"].get(name, {}))}
        relative = quantity.value({"ratio": 1.0}) == 1.0
        if relative and bases == {name}:
            continue
        values = [quantity.value(row["columns"].get(name, {})) for row in rows]
        if any(value is not None for value in values):
            found[f"{name} / {bases.pop()}" if relative else name] = [_style(v, quantity.style) for v in values]
    if not found:
        return None
    cases = list(dict.fromkeys(name for row in rows for name in row["case"]))
    lines = [[*(row["case"].get(c, "") for c in cases), *(found[n][i] for n in found)] for i, row in enumerate(rows)]
    return markdown_table([[*cases, *found], *lines]) + "\n"


DETAILS = (
    Quantity("s", _scaled("seconds", 1), ",.4g"),
    Quantity("over base", _scaled("ratio", 1), ".2f"),
    Quantity("first quartile", _scaled("ratio_low", 1), ".2f"),
    Quantity("third quartile", _scaled("ratio_high", 1), ".2f"),
    Quantity("images timed", _scaled("images", 1), ",.0f"),
    Quantity("MiB", _scaled("peak_bytes", 2**-20), ",.0f"),
    Quantity("first call, s", _scaled("first_call", 1), ".1f"),
    Quantity("gradient's error", _scaled("error", 1), ".0e"),
)


def _details(row: Row) -> Iterator[str]:
    yield ", ".join(f"{name} {value}" for name, value in row["case"].items()) + "\n"
    shown = [d for d in DETAILS if any(d.value(column) is not None for column in row["columns"].values())]
    notes = any(column.get("note") for column in row["columns"].values())
    lines = [
        [name, *(_style(d.value(column), d.style) for d in shown), *([column.get("note", "-")] if notes else [])]
        for name, column in row["columns"].items()
    ]
    yield markdown_table([["column", *(d.caption for d in shown), *(["note"] if notes else [])], *lines]) + "\n"


def exponents(rows: Iterable[Row], field: str) -> dict[str, float]:
    """Of each column of the growth along one axis: the exponent of time ("seconds") or memory ("peak_bytes")."""
    rows = list(rows)
    fits = {}
    for name in _names(rows):
        points = [(row["case"]["size"], row["columns"][name][field]) for row in rows if name in row["columns"]]
        if len(points) > 1:
            fits[name] = exponent(*zip(*points, strict=True))
    return fits


def by_axis(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The rows of the growth, by what was varied."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["case"]["axis"], []).append(row)
    return found


def _growth(rows: list[Row]) -> str:
    lines = []
    for axis, mine in by_axis(rows).items():
        sizes = [row["case"]["size"] for row in mine]
        for what, field in (("time", "seconds"), ("memory", "peak_bytes")):
            fits = exponents(mine, field)
            cells = (_style(fits.get(name), ".2f") for name in _names(rows))
            lines.append([f"{what}, {axis} {min(sizes)} to {max(sizes)}", *cells])
    return markdown_table([["", *_names(rows)], *lines]) + "\n"


def tables(rows: Sequence[Row]) -> Iterator[str]:
    """Markdown of all that was measured, suite by suite."""
    for suite, (title, says, detailed) in SUITES.items():
        mine = [row for row in rows if row["suite"] == suite]
        if not mine:
            continue
        yield f"## {title}\n"
        yield f"{says}\n"
        if detailed:
            for row in mine:
                yield from _details(row)
        elif suite == "growth":
            yield _growth(mine)
        else:
            for quantity in QUANTITIES:
                text = _pivot(mine, quantity)
                if text is not None:
                    yield f"{quantity.caption}\n"
                    yield text
            notes = [(name, c.get("note")) for row in mine for name, c in row["columns"].items()]
            yield from dict.fromkeys(f"- {name}: {note}\n" for name, note in notes if note)
