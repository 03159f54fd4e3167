"""Accuracy under AutoAttack."""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

from densreg.lab import data
from densreg.lab.evaluation.samples import batches, check_one_of, check_range, require

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
        clean, and lNORM_EPS for each budget, as :func:`densreg.lab.evaluation.attacks.pgd` has them: l2_1.5, linf_0.1.

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
    if not eps:
        raise ValueError("eps is empty; expected at least one budget")
    for budget in eps:
        check_range("eps", budget, 0, 1e3, above=True)
    package = require("pyautoattack", "autoattack")
    budgets = sorted(set(eps))
    right = torch.zeros(1 + len(budgets), dtype=torch.int64)
    on = torch.device(device)
    trace = sys.gettrace()  # it sets one of its own, and leaves none
    with torch.random.fork_rng(devices=[on] if on.type == "cuda" else []):
        try:
            for index, x, y in batches(split, batch_size, device, "autoattack"):
                with torch.no_grad():
                    logits = model(x)
                _check_classes(logits.shape[1], version, attacks)
                robust = logits.argmax(1) == y
                right[0] += robust.sum().item()
                for i, budget in enumerate(budgets):
                    if robust.any():
                        # One seed would give the images at the same place of every batch the same noise.
                        mixed = int(data.seeded(seed, int(index[0])).initial_seed())
                        options = {"attacks": [*attacks]} if attacks else {}
                        attack = package.AutoAttack(
                            model, device=on, eps=budget, norm=NORMS[norm], seed=mixed, version=version, **options
                        )
                        targets = min(9, logits.shape[1] - 1)
                        attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = targets
                        robust[robust.clone()] = _withstands(model, attack, x[robust], y[robust], budget, norm)
                    right[1 + i] += robust.sum().item()
        finally:
            sys.settrace(trace)
    parts = (right.double() / len(split)).tolist()
    return {"clean": parts[0], **{f"l{norm}_{e:g}": part for e, part in zip(budgets, parts[1:], strict=True)}}


def _check_classes(count: int, version: str, attacks: tuple[str, ...]) -> None:
    if count < 4 and (version != "custom" or {"apgd-dlr", "apgd-t"} & {*attacks}):
        raise ValueError(
            f"AutoAttack's DLR loss needs at least 4 classes, and the model has {count}: "
            "version=custom attacks=apgd-ce,fab-t,square"
        )


def _withstands(model: nn.Module, attack: object, x: Tensor, y: Tensor, eps: float, norm: str) -> Tensor:
    """[n] bool: whether the model is right about each attacked image, which must lie in the ball and in [0, 1]."""
    attacked, _ = attack.run_standard_evaluation(x, y, batch_size=len(x))  # type: ignore[attr-defined]
    far = (attacked - x).flatten(1).norm(float(norm), dim=1).max().item()
    if far > eps * (1 + 1e-4) + 1e-6 or attacked.min() < 0 or attacked.max() > 1:
        raise RuntimeError(f"AutoAttack left its ball: distance {far} of {eps}, or pixels outside of [0, 1]")
    with torch.no_grad():
        return model(attacked).argmax(1) == y
