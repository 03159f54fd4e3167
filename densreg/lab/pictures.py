"""The pictures of the paper's experiments that are drawn from the rows of table.csv."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from densreg.lab import report
from densreg.lab.evaluation.attacks import draw_accuracy
from densreg.lab.experiments import METHODS

Rows = Sequence[Mapping[str, Any]]


def label(row: Mapping[str, Any], table: Rows) -> str:
    """The method of a row, with the coefficient and the order of the norm where the method has several."""
    name = METHODS[row["method"]].label
    for column, sign in (("coeff", "coefficient"), ("p", "p")):
        if len({other[column] for other in table if other["method"] == row["method"]}) > 1:
            name += f", {sign} {report.number(row[column])}"
    return name


def means(rows: Rows, start: str) -> dict[str, float]:
    """The means over rows of the columns that begin in some way, by the rest of the column's name."""
    columns = [column for column in rows[0] if column.startswith(start)]
    return {column.removeprefix(start): statistics.mean(row[column] for row in rows) for column in columns}


def draw_budgets(table: Rows) -> Any:
    """Accuracy over the budgets of PGD, one panel for each data set and model."""
    panels: dict[tuple[str, str], dict[str, list[Mapping[str, Any]]]] = {}
    for row in table:
        panels.setdefault((row["data"], row["model"]), {}).setdefault(label(row, table), []).append(row)
    figure, (row_of_axes,) = report.panels(1, len(panels), 6.5 * len(panels), 4.2)
    for axes, (panel, methods) in zip(row_of_axes, panels.items(), strict=True):
        results = {name: means(seeds, "pgd ") for name, seeds in methods.items()}
        draw_accuracy(axes, results, title=", ".join(panel))
    return figure


def _draw_standard(axes: Any, columns: Sequence[str], plain: Rows) -> None:
    """Dashed, in the colour of each column's first line, what the training without the penalty has."""
    for line, column in zip(axes.get_lines()[: len(columns)], columns, strict=True):
        if plain:
            height = statistics.mean(row[column] for row in plain)
            axes.axhline(height, linestyle="--", linewidth=0.8, color=line.get_color())


def _over_orders(rows: Rows) -> dict[str, Rows]:
    """Penalized rows of one data set and model, for each method and coefficient those that make a line over the orders.

    A coefficient is found again at another order by its value. Where no value is at two, as after --match-norms, which
    scales it for each, it is by its place among those of the order.

    Returns:
        By what a legend says of the line, "" if there is one line only.
    """
    lines: dict[str, Rows] = {}
    methods = dict.fromkeys(row["method"] for row in rows)
    for method in methods:
        own = [row for row in rows if row["method"] == method]
        tried = {p: sorted({row["coeff"] for row in own if row["p"] == p}) for p in {row["p"] for row in own}}
        values = {coeff for coeffs in tried.values() for coeff in coeffs}
        scaled = len(values) == sum(map(len, tried.values())) and len({*map(len, tried.values())}) == 1
        found: dict[float, list[Mapping[str, Any]]] = {}
        for row in own:
            found.setdefault(tried[row["p"]].index(row["coeff"]) if scaled else row["coeff"], []).append(row)
        for _, line in sorted(found.items()):
            coeffs = sorted(row["coeff"] for row in line)
            ends = dict.fromkeys((coeffs[0], coeffs[-1]))
            said = [METHODS[method].label] if len(methods) > 1 else []
            said += [f"coefficient {' to '.join(map(report.number, ends))}"] if len(found) > 1 else []
            lines[", ".join(said)] = line
    return lines


def draw_norms(table: Rows) -> Any:
    """Leakage, its share, and accuracies over the order of the norm, a row of panels for each data set and model.

    Colours are columns, and markers methods and coefficients. The dashed lines are those of the standard training.
    """
    orders = sorted({row["p"] for row in table if row["p"] != ""})
    pgd = [column for column in table[0] if column.startswith("pgd l")]
    panels = {
        "leakage (L2)": ["leakage l2"],
        "share of the attribution (L2)": ["leakage share_l2"],
        "accuracy, clean and under PGD": ["pgd clean", *pgd],
    }
    subjects = dict.fromkeys((row["data"], row["model"]) for row in table)
    figure, grid = report.panels(len(subjects), len(panels), 15, 3.8 * len(subjects))
    for (data, model), row_of_axes in zip(subjects, grid, strict=True):
        own = [row for row in table if (row["data"], row["model"]) == (data, model)]
        plain = [row for row in own if row["method"] == "standard"]
        drawn = _over_orders([row for row in own if row["p"] != ""]) or {"": []}
        where = f", {data}, {model}" if len(subjects) > 1 else ""
        for axes, (title, columns) in zip(row_of_axes, panels.items(), strict=True):
            for marker, (name, rows) in zip(itertools.cycle(".sx^vD"), drawn.items(), strict=False):
                there = [p for p in orders if any(row["p"] == p for row in rows)]
                places = [orders.index(p) for p in there]
                lines = {
                    f"{column}, {name}" if name else column: (
                        places,
                        [statistics.mean(row[column] for row in rows if row["p"] == p) for p in there],
                    )
                    for column in columns
                }
                axes.set_prop_cycle(None)  # each column its colour again
                report.draw_lines(axes, lines, marker, "x-small", title=title + where)
            _draw_standard(axes, columns, plain)
            axes.set_xlabel("p (dashed: without the penalty)")
            axes.set_xticks(range(len(orders)), [f"{p:g}" for p in orders])
    return figure


def searched(table: Rows) -> dict[tuple[str, str, str, float], list[float]]:
    """The coefficients of each (data, model, method, p) that was trained with several."""
    found: dict[tuple[str, str, str, float], set[float]] = {}
    for row in table:
        if row["coeff"] != "":
            found.setdefault((row["data"], row["model"], row["method"], row["p"]), set()).add(row["coeff"])
    return {key: sorted(coeffs) for key, coeffs in found.items() if len(coeffs) > 1}


def draw_coefficients(table: Rows) -> Any:
    """Accuracies over the coefficient, clean and under PGD, one panel for each method that was trained with several.

    The dashed lines are those of the training without a penalty.
    """
    panels = searched(table)
    columns = [column for column in table[0] if column == "accuracy clean" or column.startswith("pgd l")]
    figure, (row_of_axes,) = report.panels(1, len(panels), 5 * len(panels), 3.8)
    for axes, ((data, model, method, p), coeffs) in zip(row_of_axes, panels.items(), strict=True):
        own = [row for row in table if (row["data"], row["model"]) == (data, model)]
        own_p = [row for row in own if (row["method"], row["p"]) == (method, p)]
        of_coeff = [[row for row in own_p if row["coeff"] == coeff] for coeff in coeffs]
        plain = [row for row in own if row["method"] == "standard"]
        lines = {
            column: (coeffs, [statistics.mean(row[column] for row in rows) for rows in of_coeff]) for column in columns
        }
        title = f"{METHODS[method].label}, p = {report.number(p)}, {data}, {model}"
        report.draw_lines(axes, lines, legend="x-small", title=title, xlabel="coefficient (dashed: standard)")
        _draw_standard(axes, columns, plain)
        axes.set_xscale("log")
    return figure


PICTURES: dict[str, Callable[[Rows], Any]] = {"budgets": draw_budgets, "norms": draw_norms}
