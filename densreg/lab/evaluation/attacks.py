"""Accuracy under projected gradient ascent, and its picture, which is AutoAttack's too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from densreg import attacks
from densreg.lab import data, report
from densreg.lab.evaluation.accuracy import is_right
from densreg.lab.evaluation.samples import Comparison, Unmeasurable, batches, check_one_of, check_range
from densreg.lab.models import Normalize

SPACES = ("pixel", "normalised")


def pgd(
    model: nn.Module,
    split: data.Split,
    *,
    device: torch.device | str,
    batch_size: int,
    seed: int = 0,
    eps: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0, 3.0),
    norm: str = "2",
    steps: int = 20,
    step_size: float | None = None,
    restarts: int = 1,
    random_start: bool = True,
    space: str = "pixel",
) -> dict[str, float]:
    """Accuracy under PGD (Madry et al., ICLR 2018), the paper's PGD-20: Tables 1 and 3 to 6.

    An image counts as broken if it is misclassified, clean or at the end of the attack with any restart at this budget
    or a smaller one, whose ball is a part of this one's: no budget has a higher accuracy than a smaller one.

    Args:
        model: takes pixels in [0, 1]; in eval mode.
        seed: of the random starts.
        eps: budgets, the radii of the ball (assumed: the paper's are not known).
        norm: of the ball, "2" or "inf".
        steps: 20 in the paper.
        step_size: in the budgets' unit; by default 2.5 eps / steps (Madry et al.; the paper's is not known).
        restarts: attacks of each image.
        random_start: begin at a random point of the ball (the paper does) instead of at the image.
        space: of eps: "pixel", in [0, 1], or "normalised", in standard deviations of the model's first layer (assumed:
            pixel).

    Returns:
        clean, and lNORM_EPS for each budget (l2_1.5, linf_0.1).

    Raises:
        ValueError: an impossible budget, no normalisation in the model, or a gradient of it that is not finite, which
            would pass for robustness.
        RuntimeError: an attack has left the ball or [0, 1].
    """
    check_one_of("norm", norm, ["2", "inf"])
    check_one_of("space", space, SPACES)
    for name, value in (("steps", steps), ("restarts", restarts)):
        check_range(name, value, 1, 2**31)
    budgets = check_budgets(eps)
    if step_size is not None:
        check_range("step_size", step_size, 0, 1e3, above=True)
    unit, order = _unit(model, space), float(norm)
    right = torch.zeros(1 + len(budgets), dtype=torch.int64)
    for index, x, y in batches(split, batch_size, device, "pgd"):
        robust = is_right(model, x, y)
        right[0] += robust.sum().item()
        for i, budget in enumerate(budgets):
            for restart in range(restarts):
                left = robust.nonzero().flatten()  # what is broken already needs no attack
                if len(left) == 0:
                    break
                clean, labels = x[left], y[left]
                numbers = [(seed, i, restart, number) for number in index[left.cpu()].tolist()]
                start = _starts(clean, order, budget, numbers) if random_start else torch.zeros_like(clean)
                size = attacks.default_step_size(budget, steps) if step_size is None else step_size
                attacked = attacks.perturb(model, clean, labels, order, budget, steps, size, unit=unit, start=start)
                if attacked.isnan().any():
                    raise Unmeasurable("the model's gradient is not finite: an attack along it would say nothing")
                check_attacked("PGD", attacked, clean, order, budget, unit)
                robust[left] = is_right(model, attacked, labels)
            right[1 + i] += robust.sum().item()
    return accuracies(right, len(split), norm, budgets)


def check_budgets(eps: Sequence[float]) -> list[float]:
    """The budgets of an attack in order, each once; raises ValueError for none, or an impossible one."""
    if not eps:
        raise ValueError("eps is empty; expected at least one budget")
    for budget in eps:
        check_range("eps", budget, 0, 1e3, above=True)
    return sorted(set(eps))


def accuracies(right: Tensor, images: int, norm: str, budgets: Sequence[float]) -> dict[str, float]:
    """clean, and lNORM_EPS for each budget, of how many images were classified right, [1 + budgets]."""
    clean, *parts = (right.double() / images).tolist()
    return {"clean": clean, **{f"l{norm}_{eps:g}": part for eps, part in zip(budgets, parts, strict=True)}}


def _unit(model: nn.Module, space: str) -> Tensor | float:
    """How many pixels the unit of eps is, in each channel."""
    if space == "pixel":
        return 1.0
    layer = next(model.children(), None)
    if not isinstance(layer, Normalize):
        raise ValueError("space normalised needs a model whose first layer is densreg.lab.models.Normalize: use pixel")
    return layer.std


def _starts(x: Tensor, norm: float, eps: float, numbers: Sequence[tuple[int, ...]]) -> Tensor:
    """A random point of the ball for each image, drawn on the CPU from its own numbers: batches do not matter."""
    one = torch.zeros(1, *x.shape[1:])
    return torch.cat([attacks.uniform_in_ball(one, norm, eps, data.seeded(*number)) for number in numbers]).to(x)


def check_attacked(
    attack: str, attacked: Tensor, x: Tensor, norm: float, eps: float, unit: Tensor | float = 1.0
) -> None:
    """Raise RuntimeError unless attacked images are in the ball, up to rounding, and in [0, 1]."""
    far = ((attacked - x) / unit).flatten(1).norm(norm, dim=1).max().item()
    if not far <= eps * (1 + 1e-4) + 1e-6 or attacked.min() < 0 or attacked.max() > 1:
        raise RuntimeError(f"{attack} left its ball: distance {far} of {eps}, or pixels outside of [0, 1]")


def draw(of: Comparison, attack: str = "PGD") -> Any:
    """A matplotlib figure: the accuracy over the budgets of an attack, a line for each run."""
    figure, ((axes,),) = report.panels(1, 1, 6.5, 4.2)
    draw_accuracy(axes, of.results, attack)
    return figure


def draw_accuracy(axes: Any, results: Mapping[str, Mapping[str, float]], attack: str = "PGD", **labels: Any) -> None:
    """Draw a line for each result of :func:`pgd` or autoattack, by name: its accuracies over the budgets."""
    (budgets, *_), lines = [[name for name in values if name != "clean"] for values in results.values()], {}
    for name, values in results.items():
        accuracies = [100 * values[quantity] for quantity in ("clean", *budgets)]
        lines[name] = ([0.0, *(float(budget.rpartition("_")[2]) for budget in budgets)], accuracies)
    norm = budgets[0][1:].partition("_")[0]
    report.draw_lines(axes, lines, xlabel=f"budget, L{norm}", ylabel=f"accuracy under {attack}, %", **labels)
