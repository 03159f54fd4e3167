"""The norm of the penalty's gradient over training, by every path: Figures 2a and 10 of the paper.

Each path trains a model of its own, from the same seed on the same batches, with its own penalty in the loss. What is
measured is the Frobenius norm of that penalty's gradient in the parameters (no cross-entropy beside it) on the batch of
the step, by the same path, for the logits as trained and multiplied by each scale. The scale is in the measurement
only: one training gives every curve of a path. Nothing stops where a gradient is not finite; the paths are one
function, so curves that lie apart show rounding or overflow.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from densreg.lab import report, runs, training
from densreg.lab.data import entry
from densreg.penalty import density_penalty

TABLE = "stability.csv"


def gradient_norm(model: nn.Module, x: Tensor, p: float, path: str, scale: float = 1.0) -> dict[str, float]:
    """Norm of the penalty's gradient in the parameters; changes nothing in the model and draws from no generator.

    Args:
        x: [B, ...], images.
        scale: factor of the logits.

    Returns:
        penalty, gradient_norm (Frobenius, over all parameters, summed in float64) and largest_logit (scaled).
    """
    model = copy.deepcopy(model)  # BatchNorm's statistics would move
    with torch.random.fork_rng(devices=[x.device] if x.device.type == "cuda" else []):
        x = x.detach().clone().requires_grad_()
        logits = scale * model(x)
        penalty = density_penalty(logits, x, p, path)
        gradients = torch.autograd.grad(penalty, list(model.parameters()), allow_unused=True)
    norms = [torch.linalg.vector_norm(g, dtype=torch.float64) for g in gradients if g is not None]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    return {"penalty": penalty.item(), "gradient_norm": norm.item(), "largest_logit": logits.max().item()}


def measure(config: training.Config, scales: Sequence[float], steps: int, every: int) -> Iterator[dict[str, Any]]:
    """Train by ``config.path``, and give a row for each scale before every ``every``-th step and the last."""
    config = config.complete()
    problem = training.Problem(config)
    problem.model.train()
    step = 0
    while step < steps:
        epoch, first = divmod(step, problem.steps_per_epoch)
        for x, y in problem.batches(epoch + 1, range(first, min(problem.steps_per_epoch, first + steps - step))):
            if step % every == 0 or step == steps - 1:
                for scale in scales:
                    row = {"data": config.data, "model": config.model, "path": config.path, "scale": scale}
                    norms = gradient_norm(problem.model, x, config.p, config.path, scale)
                    yield {**row, "step": step, **norms, "finite": int(math.isfinite(norms["gradient_norm"]))}
            problem.step(step, x, y)
            step += 1


def run(
    data: Sequence[str],
    paths: Sequence[str],
    scales: Sequence[float],
    steps: int,
    every: int,
    out: str,
    model: str | None = None,
    overwrite: bool = False,
    **options: Any,
) -> Iterator[str]:
    """Measure every path on every data set; leaves stability.csv and a picture stability-DATA.png for each.

    Args:
        data, paths: names; see :func:`densreg.lab.data.load` and :mod:`densreg.paths`.
        scales: factors of the logits; 1 is as trained.
        steps, every: of each training, and between two measurements.
        model: by default that of the data set's entry.
        options: of :class:`densreg.lab.config.Config`.

    Returns:
        One line for each data set, scale and path, while it goes on.

    Raises:
        As :func:`densreg.lab.training.fit`.
    """
    report.panels(1, 1, 1, 1)  # where matplotlib is missing, better said now than after an hour

    for name, value in (("steps", steps), ("every", every)):
        if not 1 <= value < 2**31:
            raise ValueError(f"{name} must lie in [1, 2^31), got {value}")
    for scale in scales:
        if not 0 < scale < 1e38:
            raise ValueError(f"scales must be finite and above 0, got {scale}")
    configs = {
        name: [
            # Not compiled: too short, and a graph for each path.
            training.Config(out, name, model or entry(name).model, path=path, compile=False, **options).complete()
            for path in dict.fromkeys(paths)
        ]
        for name in dict.fromkeys(data)
    }
    rows: list[dict[str, Any]] = []
    with runs.open_run(out, overwrite, [TABLE]) as folder, training.threads(options.get("threads")):
        for name, of_paths in configs.items():
            for config in of_paths:
                rows += measure(config, scales, steps, every)
                _write(folder, rows, name)
                for scale in scales:
                    mine = [r for r in rows if (r["data"], r["path"], r["scale"]) == (name, config.path, scale)]
                    yield f"{name}, logits x {scale:g}, {config.path}: {_verdict(mine)}"
            yield f"table and picture: {folder / TABLE}, {folder / f'stability-{name}.png'}"


def _verdict(rows: Sequence[dict[str, Any]]) -> str:
    bad = [row for row in rows if not row["finite"]]
    if bad:
        first = bad[0]
        return (
            f"not finite in {len(bad)} of {len(rows)} measurements, the first before step {first['step']} "
            f"(largest logit {first['largest_logit']:.4g})"
        )
    norms = [row["gradient_norm"] for row in rows]
    largest = max(row["largest_logit"] for row in rows)
    return f"finite; norm {min(norms):.4g} to {max(norms):.4g}, largest logit {largest:.4g}"


def _write(folder: Any, rows: Sequence[dict[str, Any]], name: str) -> None:
    with runs.writing(folder):
        runs.write_csv(folder / TABLE, rows)
        _draw(folder / f"stability-{name}.png", [row for row in rows if row["data"] == name])


def _draw(path: Any, rows: Sequence[dict[str, Any]]) -> None:
    """One panel for each scale; a measurement that is not finite is a cross at the top."""
    scales, paths = (list(dict.fromkeys(row[column] for row in rows)) for column in ("scale", "path"))
    figure, (row_of_axes,) = report.panels(1, len(scales), 8 * len(scales), 4.2)
    for axes, scale in zip(row_of_axes, scales, strict=True):
        for i, name in enumerate(paths):
            mine = [row for row in rows if (row["path"], row["scale"]) == (name, scale)]
            finite = [row for row in mine if row["finite"]]
            bad = [row for row in mine if not row["finite"]]
            # The paths are one function: each line is thinner than the one below it, so that all are seen.
            width = 1.0 + 1.3 * (len(paths) - 1 - i)
            (line,) = axes.plot(
                [row["step"] for row in finite],
                [row["gradient_norm"] for row in finite],
                linewidth=width,
                label=f"{name}: not finite in {len(bad)} of {len(mine)}" if bad else name,
            )
            axes.plot(
                [row["step"] for row in bad],
                [0.97 - 0.04 * i] * len(bad),
                "x",
                color=line.get_color(),
                transform=axes.get_xaxis_transform(),  # the height in parts of the panel
                markersize=4,
            )
        scaled = "as trained (scale 1)" if scale == 1 else f"scaled up (scale {scale:g})"
        axes.set_title(f"{rows[0]['data']}, {rows[0]['model']}: logits {scaled}")
        axes.margins(y=0.4)
        axes.set(xlabel="step", ylabel="Frobenius norm of the penalty's gradient", yscale="log")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    runs.save_picture(path, figure)
