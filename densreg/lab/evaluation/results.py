"""The results of runs side by side: as rows, as a table, and as files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from densreg.lab import report, runs

RESULTS, TABLE = "evaluation.json", "evaluation.csv"

Results = dict[str, dict[str, dict[str, float]]]
"""By run, by metric, by quantity."""


def rows_of(results: Results) -> list[dict[str, Any]]:
    """A row for each quantity: metric, quantity, and a column for each run."""
    first = next(iter(results.values()))
    return [
        {"metric": name, "quantity": quantity} | {run: results[run][name][quantity] for run in results}
        for name, values in first.items()
        for quantity in values
    ]


def markdown(results: Results) -> str:
    """The rows as a table in Markdown, numbers to four digits."""
    rows = rows_of(results)
    if not rows:
        return ""
    cells = [[value if isinstance(value, str) else f"{value:.4g}" for value in row.values()] for row in rows]
    return report.markdown_table([[*rows[0]], *cells])


def write(folder: Path, about: Mapping[str, Any], results: Results) -> None:
    """Write evaluation.json, with what ``about`` says beside the results, and evaluation.csv.

    Raises:
        TrainingError: they cannot be written.
    """
    with runs.writing(folder):
        runs.write_json(folder / RESULTS, {**about, "results": results}, default=str)
        runs.write_csv(folder / TABLE, rows_of(results))
