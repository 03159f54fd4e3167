"""One report of a machine: the suites run, and a CSV file, a page and pictures made of what they measured.

    python -m benchmarks report [--profile quick] [--data-dir DIR] [--images N] [--threads N] [--out DIR]

It runs test_class_counts.py, test_epoch.py and test_growth.py under pytest and writes results.csv, README.md and five
pictures to benchmarks/results/<machine>/; the pictures there are not committed. "quick" takes a minute and a half on 2
cores; "full" adds the ResNets. A benchmark that fails, because what it timed was wrong, is named in the report, and the
exit status is 1. ``--from FILE`` makes all of it anew from a results.csv, or from the JSON file of a GPU's session.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from densreg.lab.report import panels, png
from densreg.lab.runs import write_atomically, write_text
from densreg.paths import PATHS

from .records import Row, Run, by_axis, exponents, read, tables, write_csv
from .timing import environment

HERE = Path(__file__).parent
SUITES = ("test_class_counts.py", "test_growth.py", "test_epoch.py")


def machine_name(about: Row) -> str:
    """A folder's name for a machine: "epyc-avx2-2-cores", "nvidia-h100"."""
    if about["gpu"]:
        words = about["gpu"]
    else:
        cpu = re.sub(r"\(.*?\)|@.*|\b(AMD|Intel|CPU|Processor|\d+-Core)\b", " ", about["cpu"], flags=re.IGNORECASE)
        words = f"{cpu} {about['instruction_set']} {about['cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def measure(options: Sequence[str], suites: Iterable[str] = SUITES) -> tuple[list[Row], list[str]]:
    """(rows, failures) of the suites under pytest, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        measured, outcome = Path(folder, "benchmarks.json"), Path(folder, "outcome.xml")
        command = [sys.executable, "-m", "pytest", *(str(HERE / suite) for suite in suites), "-q", "--no-header"]
        command += ["--benchmark-columns=median,iqr,rounds", "-p", "no:cacheprovider", "--import-mode=importlib"]
        command += [f"--benchmark-json={measured}", f"--junitxml={outcome}", *options]
        # In a process of pytest-xdist's, pytest-benchmark would measure nothing.
        alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
        status = subprocess.run(command, env=alone).returncode
        if status not in (0, 1) or not outcome.exists():
            raise SystemExit(f"expected pytest to end with status 0 or 1, got {status}")
        cases = ElementTree.parse(outcome).iter("testcase")
        failed = [
            f"{case.get('name')}: {problem.get('message', '').splitlines()[0]}"
            for case in cases
            for problem in [*case.findall("failure"), *case.findall("error")]
        ]
        text = measured.read_text() if measured.exists() else ""  # empty where every benchmark failed
        benchmarks = json.loads(text)["benchmarks"] if text else []
        return [row for each in benchmarks for row in each["extra_info"]["rows"]], failed


# --------------------------------------------------------------------------------------------------------------------
# the page


def slower(rows: Iterable[Row]) -> list[str]:
    """Every place where something else is faster than densreg's own, by the medians of the ratios."""
    found = []
    for row in rows:
        columns, case = row["columns"], ", ".join(f"{name} {value}" for name, value in row["case"].items())
        if row["suite"] in ("logits", "head"):
            for name, of in columns.items():
                if of.get("ratio", 1) < 1 and name not in ("floor", "copy", "clone"):
                    found.append(f"{row['suite']}, {case}: {name} takes {of['ratio']:.2f} of {of['base']}")
        if row["suite"] in ("epoch", "steps") and "objective" in columns:
            ours = columns["objective"]["ratio"]
            for name, of in columns.items():
                cheaper = name.startswith(("plain", "interval", "fraction", "objective"))
                if not cheaper and of.get("ratio", ours) < ours:
                    case = row["case"].get("data", row["case"]["model"])
                    found.append(f"{row['suite']}, {case}: {name} takes {of['ratio'] / ours:.2f} of the objective")
    return found


def page(name: str, runs: Sequence[Run]) -> str:
    """What was measured on a machine, as Markdown."""
    parts = [f"# {name}\n", "Made from `results.csv`; [how it is measured](../../README.md).\n"]
    for number, run in enumerate(runs, 1):
        about = {key: value for key, value in run["environment"].items() if value is not None and key != "failed"}
        head = ", ".join(f"{key} {value}" for key, value in about.items())
        parts.append(f"**Run {number}:** {head}.\n" if len(runs) > 1 else f"{head}.\n")
        parts += [f"**Failed, not timed:** {failure}\n" for failure in run["environment"].get("failed", [])]
        parts += tables(run["rows"])
    parts.append("## Where densreg is not the fastest\n")
    found = list(dict.fromkeys(line for run in runs for line in slower(run["rows"])))
    parts.append("\n".join(f"- {line}" for line in found) + "\n" if found else "Nowhere in these runs.\n")
    return "\n".join(parts)


# --------------------------------------------------------------------------------------------------------------------
# pictures

COLOURS = {
    **{"api": "tab:blue", "raw": "tab:cyan", "compiled": "tab:green", "taylor": "tab:orange", "stable": "tab:red"},
    **{"naive": "tab:brown", "max_shift": "tab:pink", "per_class": "tab:purple", "fallback": "tab:gray"},
    **{"copy": "black", "clone": "tab:gray", "log_density": "tab:olive", "logsumexp": "tab:gray"},
}
LABELS = {
    **{"api": "densreg, fused (eager)", "raw": "densreg, operators", "compiled": "closed formula, torch.compile"},
    **{"fallback": "densreg in plain torch"},
}
Lines = dict[str, list[tuple[int, float]]]


def _together(values: Lines) -> Lines:
    """Lines that lie on each other (within 5%, where both are) as one, under both names; the longer one is kept."""
    kept: Lines = {}
    for name, points in sorted(values.items(), key=lambda item: -len(item[1])):
        for names, others in kept.items():
            if all(abs(dict(others)[c] / value - 1) < 0.05 for c, value in points if c >= 100):
                kept[f"{names}, {LABELS.get(name, name)}"] = kept.pop(names)
                break
        else:
            kept[LABELS.get(name, name)] = points
    return kept


def _over_classes(axes: Any, rows: list[Row], values: Lines, title: str, ylabel: str) -> None:
    for name, points in values.items():
        bold = {"linewidth": 2.5, "zorder": 3} if name in ("api", "raw") else {"linewidth": 1.3}
        style = "--" if name in ("copy", "clone") else "-"
        axes.loglog(*zip(*points, strict=True), style, marker="o", markersize=4, color=COLOURS.get(name), **bold)
        axes.lines[-1].set_label(LABELS.get(name, name))
    batches = sorted({row["case"]["B"] for row in rows}, reverse=True)
    axes.set_xlabel(f"classes C (batch {', '.join(map(str, batches))})")
    axes.set_ylabel(ylabel)
    axes.set_title(title, fontsize=11)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _bar(column: str) -> str:
    if column.startswith(("plain", "objective", "interval")):
        return "tab:gray" if column.startswith("plain") else "tab:blue"
    return "tab:orange" if column in PATHS else "tab:red"


def _epoch(axes: Any, row: Row) -> None:
    columns = [*row["columns"]][::-1]
    seconds = [row["columns"][c]["seconds"] for c in columns]
    bars = axes.barh(columns, seconds, color=[_bar(c) for c in columns])
    ratios = [row["columns"][c]["ratio"] for c in columns]
    labels = [f"{s:,.0f} s, {r:.1f}x" for s, r in zip(seconds, ratios, strict=True)]
    axes.bar_label(bars, labels, padding=3, fontsize=8)
    axes.set_xscale("log")
    low, high = min(seconds) / 2, max(seconds)
    axes.set_xlim(low, high * (high / low) ** 0.6)  # room for the longest bar's label
    case = row["case"]
    axes.set_xlabel(f"seconds for {case['epoch_images']:,} images; {case['images']:,} timed")
    noise = "" if case["source"].startswith(("the published", "a subset")) else ", noise"
    axes.set_title(f"{case['model']}, {case['data']}{noise}", fontsize=11)


def _growth(axes: Any, axis: str, rows: list[Row]) -> None:
    for column, fit in exponents(rows, "seconds").items():
        mine = [row for row in rows if column in row["columns"]]
        times = [1e3 * row["columns"][column]["seconds"] for row in mine]
        sizes = [row["case"]["size"] for row in mine]
        axes.loglog(sizes, times, marker="o", markersize=4, label=f"{column}: {fit:.2f}")
    sizes = [row["case"]["size"] for row in rows]
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.minorticks_off()
    axes.set_xlabel(axis)
    axes.set_ylabel("ms, a step")
    axes.grid(alpha=0.3)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * (high / low) ** 0.5)  # room for the legend
    axes.legend(fontsize=7, title="exponent", title_fontsize=7, loc="upper left")


def draw(run: Run, folder: Path) -> None:
    """The pictures that the rows of a run allow."""
    from PIL import Image

    about = run["environment"]
    machine = about.get("gpu") or f"{about['cpu']}, {about['instruction_set']}, {about['threads']} threads"

    def save(name: str, width: float, height: float, draws: Sequence[Callable[[Any], None]]) -> None:
        figure, all_axes = panels(1, len(draws), width, height)
        for axes, draw_one in zip(all_axes[0], draws, strict=True):
            draw_one(axes)
        figure.supxlabel(f"{machine}; torch {about['torch']}; {about['date']}", fontsize=7, color="dimgray")
        picture = Image.open(io.BytesIO(png(figure))).convert("RGB")
        content = io.BytesIO()  # with a palette: a fifth of the bytes
        picture.quantize(64, Image.Quantize.MAXCOVERAGE).save(content, "PNG", optimize=True)
        write_atomically(folder / name, lambda file: file.write(content.getvalue()))

    rows = sorted((row for row in run["rows"] if row["suite"] == "logits"), key=lambda row: row["case"]["C"])
    if rows:
        names = ("api", "raw", "compiled", "taylor", "stable", "naive", "max_shift", "per_class", "fallback")

        def points(names: Iterable[str], value: Callable[[dict[str, Any]], float | None]) -> Lines:
            found = {n: [(r["case"]["C"], value(r["columns"].get(n, {}))) for r in rows] for n in names}
            there = {n: [(c, v) for c, v in each if v is not None] for n, each in found.items()}
            return {n: each for n, each in there.items() if each}

        def scaled(field: str, factor: float) -> Callable[[dict[str, Any]], float | None]:
            return lambda column: column[field] * factor if field in column else None

        times = points(names, scaled("seconds", 1e6))
        memory = _together(points(names, scaled("peak_bytes", 2**-20)))
        moved = ("raw", "compiled", "copy", "clone")
        rates = points(moved, lambda column: column["bytes"] / column["seconds"] / 1e9 if "bytes" in column else None)
        for name, values, title, ylabel in (
            ("time.png", times, "Forward and double backward at the logits", "time, us"),
            ("memory.png", memory, "Peak memory of forward and double backward", "MiB allocated"),
            ("bandwidth.png", rates, "Bandwidth; copy: into memory that is there, clone: into new", "GB/s"),
        ):
            if values:
                draw_it = functools.partial(_over_classes, rows=rows, values=values, title=title, ylabel=ylabel)
                save(name, 7, 4.6, [draw_it])
    epochs = [functools.partial(_epoch, row=row) for row in run["rows"] if row["suite"] == "epoch"]
    if epochs:
        save("epochs.png", 4.2 * len(epochs) + 1, 4.6, epochs)
    growth = by_axis(row for row in run["rows"] if row["suite"] == "growth")
    if growth:
        draws = [functools.partial(_growth, axis=axis, rows=mine) for axis, mine in growth.items()]
        save("growth.png", 3.2 * len(growth) + 0.5, 3.4, draws)


def write(name: str, runs: Sequence[Run], folder: Path) -> None:
    """results.csv, the page, and the pictures of the first run."""
    write_csv(folder / "results.csv", runs)
    draw(runs[0], folder)
    write_text(folder / "README.md", page(name, runs))


SHARED = {"threads": None, "seconds": None, "data-dir": None, "device": "cpu"}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--profile", choices=("tiny", "quick", "full"), default="quick")
    parser.add_argument("--images", help="of an epoch that are timed: a number, or whole")
    parser.add_argument("--machine", help="name of the folder in benchmarks/results; by default the processor's")
    parser.add_argument("--out", type=Path, help="folder, in place of benchmarks/results/<machine>")
    parser.add_argument(
        "--from", dest="source", type=Path, metavar="FILE", help="a results.csv or gpu.json: measure nothing"
    )


def run(options: argparse.Namespace) -> int:
    if options.source:
        write(
            options.machine or options.source.parent.name,
            read(options.source),
            options.out or options.source.parent,
        )
        return 0
    about = environment() | {"profile": options.profile}
    if options.device == "cpu":
        about["gpu"] = None  # there, but not what was measured
    options.threads = about["threads"]
    given = {name: getattr(options, name) for name in ("data_dir", "images", "seconds", "threads", "device")}
    passed = [f"--{name.replace('_', '-')}={value}" for name, value in given.items() if value is not None]
    start = time.perf_counter()
    rows, failed = measure([f"--profile={options.profile}", *passed])
    about |= {"took_seconds": round(time.perf_counter() - start), "failed": failed}
    name = options.machine or machine_name(about)
    folder = options.out or Path("benchmarks", "results", name)
    write(name, [{"environment": about, "rows": rows}], folder)
    print(f"{folder / 'README.md'}: {len(rows)} rows in {about['took_seconds']} s, {len(failed)} failed")
    for line in slower(rows):
        print(f"not the fastest: {line}")
    return 1 if failed else 0
