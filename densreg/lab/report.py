"""How results are shown: tables in Markdown, and pictures by matplotlib, which is imported here and nowhere else."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

DASH = "-"
"""What stands for a number that is not known."""


def markdown_table(rows: Sequence[Sequence[Any]]) -> str:
    """A table in Markdown, without a newline at its end.

    Args:
        rows: of equal length, the first one the header; a cell is its ``str``, in which ``|`` is escaped.

    Raises:
        ValueError: there is no header, or a row has another length.
    """
    if not rows:
        raise ValueError("expected a table with a header, got no rows")
    for row in rows:
        if len(row) != len(rows[0]):
            raise ValueError(f"expected a row of {len(rows[0])} cells, got {len(row)}: {row}")
    lines = [[str(cell).replace("|", r"\|") for cell in row] for row in rows]
    lines.insert(1, ["---"] * len(rows[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float | str | None) -> str:
    """A cell of a table: the number in six digits, or a dash for one that is not there, None or ""."""
    return DASH if value in ("", None) else format(value, "g")


def panels(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    """A matplotlib Figure and its axes, an array [rows, columns].

    Args:
        width, height: of the whole figure, in inches.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def draw_lines(
    axes: Any,
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    marker: str | None = ".",
    legend: str | None = "small",
    **labels: Any,
) -> None:
    """Draw lines on a grid.

    Args:
        lines: x and y of each, by its name in the legend.
        legend: the size of its font; None leaves it out.
        labels: title, xlabel, ylabel and what else ``axes.set`` takes.
    """
    for name, (x, y) in lines.items():
        axes.plot(x, y, marker=marker, label=name)
    axes.set(**labels)
    axes.grid(alpha=0.3)
    if legend:
        axes.legend(fontsize=legend)


def draw_image(axes: Any, image: Tensor, title: str = "", cmap: str = "gray", low: float = 0, high: float = 1) -> None:
    """Draw an image [1 or 3, H, W], or a map [H, W], without ticks; the colours go from ``low`` to ``high``."""
    pixels = image.permute(1, 2, 0).squeeze(2) if image.ndim == 3 else image
    axes.imshow(pixels.cpu().numpy(), cmap=cmap, vmin=low, vmax=high)
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, fontsize="small")


def png(figure: Any) -> bytes:
    """A matplotlib figure as the content of a PNG file."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    return picture.getvalue()
