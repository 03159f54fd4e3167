"""The choice of coefficients: the rule, for rows measured on held-out images, and the file with what was chosen."""

from __future__ import annotations

import json
import statistics
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from densreg.lab import runs
from densreg.lab.experiments import Measure

CHOSEN = "chosen.json"

WITHIN = 0.01
"""How much clean accuracy a chosen coefficient may cost, against the standard training."""


def attack_of(measures: Sequence[Measure], orders: Collection[float]) -> Measure | None:
    """The attack under which coefficients are compared; None where none is chosen.

    That is without PGD or clean accuracy, and with several orders of the norm, for which chosen.json has no place.
    """
    if len(orders) != 1 or not any(measure.metric == "accuracy" for measure in measures):
        return None
    return next((measure for measure in measures if measure.metric == "pgd"), None)


def choose(table: Sequence[Mapping[str, Any]], attack: Measure) -> dict[str, dict[str, dict[str, float]]]:
    """The best coefficients by "DATA MODEL" and method, of rows measured on held-out images.

    The best is the one with the highest accuracy under ``attack``, the mean over its budgets and over seeds. It is
    chosen twice: "gentle" among those whose clean accuracy is at most a point below the standard training's, absent
    where none is, and "best" among all.
    """
    if not table:
        return {}
    columns = [c for c in table[0] if any(fnmatchcase(c, attack.column(shown)) for shown in attack.shown)]
    measured: dict[tuple[str, str, float | str], list[tuple[float, float]]] = {}  # (under attack, clean), by seed
    for row in table:
        attacked = statistics.mean(row[column] for column in columns)
        key = (f"{row['data']} {row['model']}", row["method"], row["coeff"])
        measured.setdefault(key, []).append((attacked, row["accuracy clean"]))
    means = {key: tuple(map(statistics.mean, zip(*seeds, strict=True))) for key, seeds in measured.items()}
    result: dict[str, dict[str, dict[str, float]]] = {}
    for of, method in dict.fromkeys(key[:2] for key in means if key[2] != ""):
        tried = {float(coeff): found for (*own, coeff), found in means.items() if own == [of, method]}
        found = {"best": max(tried, key=lambda coeff: tried[coeff][0])}
        standard = means.get((of, "standard", ""))
        gentle = [coeff for coeff in tried if standard and tried[coeff][1] >= standard[1] - WITHIN - 1e-9]
        if gentle:
            found["gentle"] = max(gentle, key=lambda coeff: tried[coeff][0])
        result.setdefault(of, {})[method] = found
    return result


def write_chosen(folder: Path, table: Sequence[Mapping[str, Any]], attack: Measure) -> None:
    """Choose, see :func:`choose`, and write chosen.json."""
    runs.write_json(folder / CHOSEN, choose(table, attack))


def read_chosen(folder: str) -> dict[str, dict[str, tuple[float, ...]]]:
    """The coefficients that a ``reproduce --val-size`` chose, the smaller first, for its ``Budget``.

    Args:
        folder: its ``--out``.

    Raises:
        ValueError: there are none that can be read.
    """
    try:
        found = json.loads((Path(folder) / CHOSEN).read_text())
        return {
            of: {method: tuple(dict.fromkeys(sorted(own.values()))) for method, own in methods.items()}
            for of, methods in found.items()
        }
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(
            f"--coeff-from {folder}: expected the folder of a reproduce with --val-size, with {CHOSEN}: "
            f"{runs.first_line(error)}"
        ) from error
