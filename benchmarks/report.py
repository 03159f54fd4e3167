"""One report of a machine: the suites run, and a JSON file, tables and pictures made of what they measured.

    python -m benchmarks.report [--profile quick] [--data-dir DIR] [--images N] [--threads N] [--out DIR]

It runs test_class_counts.py, test_epoch.py and test_growth.py under pytest and writes report.json, report.md and five
pictures to benchmarks/results/<machine>/. "quick" takes a minute and a half on 2 cores; "full" adds the ResNets. A
benchmark that fails, because what it timed was wrong, is named in the report, and the exit status is 1.
``--from FILE`` draws tables and pictures anew from a report.json.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from densreg.lab.runs import write_atomically
from densreg.paths import PATHS

from .timing import environment, exponent

HERE = Path(__file__).parent
SUITES = ("test_class_counts.py", "test_growth.py", "test_epoch.py")
Row = dict[str, Any]


# --------------------------------------------------------------------------------------------------------------------
# running


def machine_name(about: Row) -> str:
    """A folder's name for a machine: "epyc-avx2-2-cores", "nvidia-h100"."""
    if about["gpu"]:
        words = about["gpu"]
    else:
        cpu = re.sub(r"\(.*?\)|@.*|\b(AMD|Intel|CPU|Processor|\d+-Core)\b", " ", about["cpu"], flags=re.IGNORECASE)
        words = f"{cpu} {about['instruction_set']} {about['cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def run(options: Sequence[str], suites: Iterable[str] = SUITES) -> tuple[list[Row], list[str]]:
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
            raise SystemExit(f"pytest ended with status {status}")
        cases = ElementTree.parse(outcome).iter("testcase")
        failed = [
            f"{case.get('name')}: {problem.get('message', '').splitlines()[0]}"
            for case in cases
            for problem in [*case.findall("failure"), *case.findall("error")]
        ]
        text = measured.read_text() if measured.exists() else ""  # empty where every benchmark failed
        return [b["extra_info"] for b in json.loads(text)["benchmarks"]] if text else [], failed


# --------------------------------------------------------------------------------------------------------------------
# tables


def _table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def _of(report: Row, kind: str) -> list[Row]:
    return [row for row in report["rows"] if row["kind"] == kind]


def _times(row: Row, name: str) -> str:
    return f"{row['over_fused'][name]:.2f}" if name in row["over_fused"] else "-"


def _memory(row: Row, names: Iterable[str], unit: int) -> Iterable[str]:
    return (f"{row['peak_bytes'][n] / unit:.1f}" if n in row["peak_bytes"] else "-" for n in names)


def _shape(row: Row) -> str:
    return f"{row['B']} x {row['C']:,}"


def _micro(seconds: float) -> str:
    return f"{seconds * 1e6:,.1f}" if seconds < 1e-3 else f"{seconds * 1e6:,.0f}"


def _logits(rows: list[Row]) -> Iterable[str]:
    paths = ("taylor", "naive", "max_shift", "stable", "per_class", "fallback")
    yield "## At the logits: forward and double backward\n"
    yield (
        "Through autograd, in eager: microseconds of `densreg.input_score` and its double backward, and how many times "
        "longer the paper's paths take; fallback is densreg's own plain torch, floor a pair of empty autograd "
        "Functions.\n"
    )
    yield _table(
        ["B x C", "fused, us", *paths, "floor"],
        [[_shape(r), _micro(r["seconds"]["api"]), *(_times(r, p) for p in (*paths, "floor"))] for r in rows],
    )
    yield (
        "Without autograd: the two operators against the same closed formula in ATen calls and under torch.compile; "
        "bandwidth by the fewest bytes, beside a copy in the same rounds.\n"
    )
    yield _table(
        ["B x C", "raw, us", "aten/raw", "compiled/raw", "raw, GB/s", "compiled, GB/s", "copy, GB/s", "raw/copy"],
        [
            [
                *(_shape(r), _micro(r["seconds"]["raw"]), f"{r['aten/raw']:.2f}", f"{r['compiled/raw']:.2f}"),
                *(f"{r[f'{n}_bytes_per_second'] / 1e9:.1f}" for n in ("raw", "compiled", "copy")),
                f"{r['raw_bytes_per_second'] / r['copy_bytes_per_second']:.2f}",
            ]
            for r in rows
        ],
    )
    names = ["api", *paths, "raw", "aten", "compiled"]
    yield "What a call allocates at its peak, in sizes of the logits (its two results are 2.0):\n"
    yield _table(
        ["B x C", *("fused" if n == "api" else n for n in names)],
        [[_shape(r), *_memory(r, names, 4 * r["B"] * r["C"])] for r in rows],
    )
    overflow = sorted({name for r in rows for name in r["overflow"]})
    errors = {
        n: max(r["error"][n] for r in rows if n in r["error"]) for n in names if any(n in r["error"] for r in rows)
    }
    yield (
        f"Largest relative error against float64: {', '.join(f'{n} {e:.0e}' for n, e in errors.items())}. With the "
        f"logits times 100: overflow in {', '.join(overflow) or 'none'}, all others right.\n"
    )
    large = [r for r in rows if r["C"] >= 1000]
    if len({r["C"] for r in large}) > 1:
        sizes = [r["B"] * r["C"] for r in large]
        fits = {n: exponent(sizes, [r["seconds"][n] for r in large]) for n in ("raw", "compiled", "api", "taylor")}
        fitted = ", ".join(f"{n} {a:.2f}" for n, a in fits.items())
        yield f"From 1,000 classes on, time grows with B x C to the power of: {fitted}.\n"


def _head(rows: list[Row]) -> Iterable[str]:
    names = ("compiled", "taylor", "naive", "max_shift", "stable", "per_class")
    yield "## Through a linear head\n"
    yield (
        f"The whole penalty of {rows[0]['width']} features through a linear layer: logits, score, norm, and the "
        "penalty's gradient in the weights. Times longer than densreg's fused path in eager; compiled is the formula "
        "by hand, with no autograd left in it.\n"
    )
    yield _table(
        ["B x C", "fused, us", *names],
        [[_shape(r), _micro(r["seconds"]["fused"]), *(_times(r, n) for n in names)] for r in rows],
    )
    yield "Peak memory in MiB:\n"
    yield _table(
        ["B x C", "fused", *names],
        [[_shape(r), *_memory(r, ["fused", *names], 2**20)] for r in rows],
    )


def _epoch(row: Row) -> Iterable[str]:
    yield f"## An epoch: {row['model']} on {row['data']}\n"
    yield (
        f"{row['images']:,} images timed of {row['epoch_images']:,} ({row['source']}), batches of {row['batch']}, "
        f"{row['classes']} classes, {row['device']}. Seconds are those of {row['epoch_images']:,} images; loading is "
        "not timed.\n"
    )
    lines = []
    for column, each in row["seconds_per_image"].items():
        low, high = row["quartiles"].get(column, (float("nan"),) * 2)
        between = f"{low:.2f} to {high:.2f}" if low == low else "-"
        error = f"{row['error'][column]:.0e}" if row["error"][column] is not None else "-"
        cells = [column, f"{each * row['epoch_images']:,.1f}", f"{row['over_plain'][column]:.2f}", between]
        lines.append([*cells, f"{row['images_of'][column]:,}", f"{row['peak_bytes'][column] / 2**20:.0f}", error])
    heads = ["step", "s per epoch", "over plain", "quartiles", "images timed", "MiB", "gradient's error"]
    yield _table(heads, lines)


def _growth(rows: list[Row]) -> Iterable[str]:
    yield "## Growth\n"
    base = ", ".join(f"{name} {value}" for name, value in rows[0]["base"].items())
    yield f"A small convolutional network in eager ({base}), one size varied: exponents fitted to time and to memory.\n"
    columns = list(dict.fromkeys(c for r in rows for c in r["time_exponent"]))
    lines = []
    for r in rows:
        for what in ("time", "memory"):
            fits = r[f"{what}_exponent"]
            sizes = next(iter(r["sizes"].values()))
            cells = (f"{fits[c]:.2f}" if c in fits else "-" for c in columns)
            lines.append([f"{what}, {r['axis']} {sizes[0]} to {sizes[-1]}", *cells])
    yield _table(["", *columns], lines)


def slower(report: Row) -> list[str]:
    """Every place where something else is faster than densreg's own, by the medians of the ratios."""
    found = []
    for r in _of(report, "logits"):
        for name in ("taylor", "naive", "max_shift", "stable", "per_class", "fallback"):
            if r["over_fused"].get(name, 1) < 1:
                found.append(f"logits, {_shape(r)}: {name} takes {r['over_fused'][name]:.2f} of fused (API)")
        for name in ("aten", "compiled"):
            if r[f"{name}/raw"] < 1:
                found.append(f"logits, {_shape(r)}: {name} takes {r[f'{name}/raw']:.2f} of the raw operators")
    for r in _of(report, "head"):
        for name, times in r["over_fused"].items():
            if times < 1:
                found.append(f"linear head, {_shape(r)}: {name} takes {times:.2f} of fused")
    for r in _of(report, "epoch"):
        ours = r["over_plain"].get("objective", float("inf"))
        for name, times in r["over_plain"].items():
            if times < ours and not name.startswith(("plain", "interval", "objective")):
                found.append(f"epoch of {r['data']}: {name} takes {times / ours:.2f} of the objective")
    return found


def markdown(report: Row) -> str:
    about = report["environment"]
    where = f"{about['gpu']}, " if about["gpu"] else ""
    parts = [
        f"# {report['machine']}, profile {report['profile']}\n",
        f"{where}{about['cpu']}, {about['cores']} cores, {about['threads']} threads, {about['instruction_set']}; "
        f"densreg {about['densreg']} ({about['commit']}), torch {about['torch']}, Python {about['python']}; "
        f"{about['date']}, {report['seconds']:.0f} s. [How it is measured](../../README.md).\n",
    ]
    for failure in report["failed"]:
        parts.append(f"**Failed, not timed:** {failure}\n")
    for row_kind, tables in (("logits", _logits), ("head", _head)):
        if _of(report, row_kind):
            parts += tables(_of(report, row_kind))
    for row in _of(report, "epoch"):
        parts += _epoch(row)
    if _of(report, "growth"):
        parts += _growth(_of(report, "growth"))
    parts.append("## Where densreg is not the fastest\n")
    found = slower(report)
    parts.append("\n".join(f"- {line}" for line in found) + "\n" if found else "Nowhere in this report.\n")
    parts += [f"![{path.stem.replace('_', ' ')}]({path.name})\n" for path in report.get("pictures", [])]
    return "\n".join(parts)


# --------------------------------------------------------------------------------------------------------------------
# pictures

COLOURS = {
    **{"api": "tab:blue", "fused": "tab:blue", "raw": "tab:cyan", "compiled": "tab:green", "aten": "tab:olive"},
    **{"taylor": "tab:orange", "stable": "tab:red", "naive": "tab:brown", "max_shift": "tab:pink"},
    **{"per_class": "tab:purple", "fallback": "tab:gray", "copy": "black", "clone": "tab:gray"},
}
LABELS = {
    **{"api": "densreg, fused (eager)", "raw": "densreg, operators", "compiled": "closed formula, torch.compile"},
    **{"fallback": "densreg in plain torch"},
}


def _together(values: dict[str, list[tuple[int, float]]]) -> dict[str, list[tuple[int, float]]]:
    """Lines that lie on each other (within 5%, where both are) as one, under both names; the longer one is kept."""
    kept: dict[str, list[tuple[int, float]]] = {}
    for name, points in sorted(values.items(), key=lambda item: -len(item[1])):
        for names, others in kept.items():
            if all(abs(dict(others)[c] / value - 1) < 0.05 for c, value in points if c >= 100):
                kept[f"{names}, {LABELS.get(name, name)}"] = kept.pop(names)
                break
        else:
            kept[LABELS.get(name, name)] = points
    return kept


def _lines(axes: Any, rows: list[Row], values: dict[str, list[tuple[int, float]]], ylabel: str) -> None:
    for name, points in values.items():
        bold = {"linewidth": 2.5, "zorder": 3} if name in ("api", "raw") else {"linewidth": 1.3}
        style = "--" if name in ("copy", "clone") else "-"
        axes.plot(*zip(*points, strict=True), style, marker="o", markersize=4, color=COLOURS.get(name), **bold)
        axes.lines[-1].set_label(LABELS.get(name, name))
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("classes C (batch " + ", ".join(sorted({str(r["B"]) for r in rows}, key=int)[::-1]) + ")")
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _bar(column: str) -> str:
    if column.startswith(("plain", "objective", "interval")):
        return "tab:gray" if column.startswith("plain") else "tab:blue"
    return "tab:orange" if column in PATHS else "tab:red"


def draw(report: Row, folder: Path) -> list[Path]:
    """The pictures that the rows allow; their files."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    about = report["environment"]
    machine = about["gpu"] or f"{about['cpu']}, {about['instruction_set']}, {about['threads']} threads"
    files = []

    def save(name: str, figure: Figure) -> None:
        figure.supxlabel(f"{machine}; torch {about['torch']}; {about['date']}", fontsize=7, color="dimgray")
        FigureCanvasAgg(figure)
        write_atomically(folder / name, lambda file: figure.savefig(file, format="png", dpi=120))
        files.append(folder / name)

    rows = sorted(_of(report, "logits"), key=lambda r: r["C"])
    if rows:
        names = ("api", "raw", "compiled", "taylor", "stable", "naive", "max_shift", "per_class", "fallback")

        def points(value: Any) -> dict[str, list[tuple[int, float]]]:
            found = {n: [(r["C"], value(r, n)) for r in rows if n in r["seconds"]] for n in names}
            return {n: p for n, p in found.items() if p}

        def picture(file: str, title: str, ylabel: str, values: dict[str, list[tuple[int, float]]]) -> None:
            figure = Figure(figsize=(7, 4.6), layout="constrained")
            axes = figure.subplots()
            _lines(axes, rows, values, ylabel)
            axes.set_title(title, fontsize=11)
            save(file, figure)

        times = points(lambda r, n: r["seconds"][n] * 1e6)
        picture("time.png", "Forward and double backward at the logits", "time, us", times)
        memory = _together(points(lambda r, n: r["peak_bytes"][n] / 2**20))
        picture("memory.png", "Peak memory of forward and double backward", "MiB allocated", memory)
        rates = {
            n: [(r["C"], r[f"{n}_bytes_per_second"] / 1e9) for r in rows] for n in ("raw", "compiled", "copy", "clone")
        }
        title = "Bandwidth at the logits; copy: into memory that is there, clone: into new"
        picture("bandwidth.png", title, "GB/s by the fewest bytes", rates)
    epochs = _of(report, "epoch")
    if epochs:
        figure = Figure(figsize=(4.2 * len(epochs) + 1, 4.6), layout="constrained")
        for axes, row in zip(figure.subplots(1, len(epochs), squeeze=False)[0], epochs, strict=True):
            columns = [*row["over_plain"]][::-1]
            seconds = [row["seconds_per_image"][c] * row["epoch_images"] for c in columns]
            bars = axes.barh(columns, seconds, color=[_bar(c) for c in columns])
            labels = [f"{s:,.0f} s, {row['over_plain'][c]:.1f}x" for s, c in zip(seconds, columns, strict=True)]
            axes.bar_label(bars, labels, padding=3, fontsize=8)
            axes.set_xscale("log")
            low, high = min(seconds) / 2, max(seconds)
            axes.set_xlim(low, high * (high / low) ** 0.6)  # room for the longest bar's label
            axes.set_xlabel(f"seconds for {row['epoch_images']:,} images; {row['images']:,} timed")
            noise = "" if row["source"].startswith(("the published", "a subset")) else ", noise"
            axes.set_title(f"{row['model']}, {row['data']}{noise}", fontsize=11)
        save("epochs.png", figure)
    growth = _of(report, "growth")
    if growth:
        figure = Figure(figsize=(3.2 * len(growth) + 0.5, 3.4), layout="constrained")
        for axes, row in zip(figure.subplots(1, len(growth), squeeze=False)[0], growth, strict=True):
            sizes = sorted({size for each in row["sizes"].values() for size in each})
            for column, seconds in row["seconds"].items():
                label = f"{column}: {row['time_exponent'][column]:.2f}"
                axes.loglog(row["sizes"][column], [1e3 * s for s in seconds], marker="o", markersize=4, label=label)
            axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
            axes.minorticks_off()
            axes.set_xlabel(row["axis"])
            axes.set_ylabel("ms, a step")
            axes.grid(alpha=0.3)
            low, high = axes.get_ylim()
            axes.set_ylim(low, high * (high / low) ** 0.5)  # room for the legend
            axes.legend(fontsize=7, title="exponent", title_fontsize=7, loc="upper left")
        save("growth.png", figure)
    return files


def write(report: Row, folder: Path) -> None:
    """report.json, the pictures and report.md, each as a whole."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report, indent=2, allow_nan=False) + "\n"
    write_atomically(folder / "report.json", lambda file: file.write(text.encode()))
    tables = markdown({**report, "pictures": draw(report, folder)})
    write_atomically(folder / "report.md", lambda file: file.write(tables.encode()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", choices=("tiny", "quick", "full"), default="quick")
    parser.add_argument("--data-dir", help="folder of the data sets; without it epochs are of noise")
    parser.add_argument("--images", help="of an epoch that are timed: a number, or whole")
    parser.add_argument("--seconds", type=float, help="of interleaved rounds for each benchmark")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu", help="of epochs and growth: cpu or cuda")
    parser.add_argument("--machine", help="name of the folder in benchmarks/results; by default the processor's")
    parser.add_argument("--out", type=Path, help="folder, in place of benchmarks/results/<machine>")
    parser.add_argument("--from", dest="source", type=Path, metavar="FILE", help="a report.json: measure nothing")
    options = parser.parse_args()
    if options.source:
        report = json.loads(options.source.read_text())
        write(report, options.out or options.source.parent)
        return 0
    torch.set_num_threads(options.threads)
    about = environment()
    if options.device == "cpu":
        about["gpu"] = None  # there, but not what was measured
    given = {name: getattr(options, name) for name in ("data_dir", "images", "seconds", "threads", "device")}
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in given.items() if value is not None]
    start = time.perf_counter()
    rows, failed = run([f"--profile={options.profile}", *arguments])
    report = {
        "machine": options.machine or machine_name(about),
        "profile": options.profile,
        "environment": about,
        "seconds": time.perf_counter() - start,
        "failed": failed,
        "rows": rows,
    }
    folder = options.out or Path("benchmarks", "results", report["machine"])
    write(report, folder)
    print(f"{folder / 'report.md'}: {len(rows)} benchmarks in {report['seconds']:.0f} s, {len(failed)} failed")
    for line in slower(report):
        print(f"not the fastest: {line}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
