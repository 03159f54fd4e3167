"""Accuracy under AutoAttack."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from densreg.lab import data
from densreg.lab.evaluation.accuracy import is_right, logits_of
from densreg.lab.evaluation.attacks import accuracies, check_attacked, check_budgets
from densreg.lab.evaluation.attacks import draw as draw_budgets
from densreg.lab.evaluation.samples import Comparison, batches, check_one_of, require

NORMS = {"2": "L2", "inf": "Linf"}


def autoattack(
    model: nn.Module,
    split: data.Split,
    *,
    device: torch.device | str,
    batch_size: int,
    seed: int = 0,
    eps: tuple[float, ...] = (8 / 255,),
    norm: str = "inf",
    version: str = "standard",
    attacks: tuple[str, ...] = (),
) -> dict[str, float]:
    """Accuracy under AutoAttack (Croce and Hein, ICML 2020), by pyautoattack: Table 6 of the paper.

    Its noise is drawn for a batch as a whole, so that the result depends a little on batch_size, unlike the other
    metrics'. What a budget breaks counts as broken for the larger ones too: its perturbation lies in their ball.

    Args:
        model: takes pixels in [0, 1]; in eval mode.
        eps: budgets, in pixels of [0, 1]. Assumed: the paper's are not known.
        norm: of the budgets, "2" or "inf" (assumed).
        version: "standard", "plus" or "rand" of AutoAttack, or "custom" with
        attacks: such as apgd-ce, apgd-dlr, apgd-t, fab, fab-t, square.

    Returns:
        clean, and lNORM_EPS for each budget (l2_1.5, linf_0.1), as :func:`densreg.lab.evaluation.attacks.pgd`.

    Raises:
        ValueError: fewer than 4 classes, for which the targeted attacks have no loss.
        ModuleNotFoundError: pyautoattack is not installed.
        RuntimeError: an attack has left the ball or [0, 1].
    """
    check_one_of("norm", norm, [*NORMS])
    check_one_of("version", version, ["standard", "plus", "rand", "custom"])
    if (version == "custom") != bool(attacks):
        raise ValueError(f"attacks are for version=custom, which needs some; got version {version}, attacks {attacks}")
    for name in attacks:
        check_one_of("attacks", name, ["apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square"])
    budgets = check_budgets(eps)
    package = require("pyautoattack", "autoattack")
    right = torch.zeros(1 + len(budgets), dtype=torch.int64)
    on = torch.device(device)
    trace = sys.gettrace()  # it sets one of its own, and leaves none
    with torch.random.fork_rng(devices=[on] if on.type == "cuda" else []):
        try:
            for index, x, y in batches(split, batch_size, device, "autoattack"):
                with torch.no_grad():
                    logits = model(x)
                _check_classes(logits.shape[1], version, attacks)
                robust = is_right(model, x, y)
                right[0] += robust.sum().item()
                for i, budget in enumerate(budgets):
                    if robust.any():
                        # One seed would give the images at the same place of every batch the same noise.
                        mixed = int(data.seeded(seed, int(index[0])).initial_seed())
                        options: dict[str, Any] = {"attacks": [*attacks]} if attacks else {}
                        options |= {"norm": NORMS[norm], "seed": mixed, "version": version}
                        attack = package.AutoAttack(partial(logits_of, model), device=on, eps=budget, **options)
                        targets = min(9, logits.shape[1] - 1)
                        attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = targets
                        robust[robust.clone()] = _withstands(model, attack, x[robust], y[robust], budget, norm)
                    right[1 + i] += robust.sum().item()
        finally:
            sys.settrace(trace)
    return accuracies(right, len(split), norm, budgets)


def _check_classes(count: int, version: str, attacks: tuple[str, ...]) -> None:
    if count < 4 and (version != "custom" or {"apgd-dlr", "apgd-t"} & {*attacks}):
        raise ValueError(
            f"AutoAttack's DLR loss needs at least 4 classes, and the model has {count}: "
            "version=custom attacks=apgd-ce,fab-t,square"
        )


def _withstands(model: nn.Module, attack: object, x: Tensor, y: Tensor, eps: float, norm: str) -> Tensor:
    """[n] bool: whether the model is right about each attacked image, which must lie in the ball and in [0, 1]."""
    attacked, _ = attack.run_standard_evaluation(x, y, batch_size=len(x))  # type: ignore[attr-defined]
    check_attacked("AutoAttack", attacked, x, float(norm), eps)
    return is_right(model, attacked, y)


def draw(of: Comparison) -> Any:
    """A matplotlib figure: the accuracy over the budgets of the attack, a line for each run."""
    return draw_budgets(of, "AutoAttack")
