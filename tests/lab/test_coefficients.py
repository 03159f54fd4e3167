"""The choice of coefficients on made-up rows; tests/lab/test_reproduce.py has the commands."""

from __future__ import annotations

from densreg.lab import coefficients
from densreg.lab.experiments import Measure


def test_the_choice_of_a_coefficient():
    def row(method, coeff, seed, clean, *attacked):
        budgets = {f"pgd l2_{i}": value for i, value in enumerate(attacked)}
        return {"data": "d", "model": "m", "method": method, "coeff": coeff, "accuracy clean": clean, **budgets}

    standard = [row("standard", "", 0, 0.90, 0.1, 0.0), row("standard", "", 1, 0.92, 0.1, 0.0)]
    mild = [row("density", 0.1, 0, 0.90, 0.4, 0.2), row("density", 0.1, 1, 0.91, 0.4, 0.2)]
    middle = [row("density", 0.3, 0, 0.90, 0.5, 0.5), row("density", 0.3, 1, 0.90, 0.3, 0.1)]
    strong = [row("density", 1.0, 0, 0.80, 0.7, 0.7), row("density", 1.0, 1, 0.80, 0.1, 0.7)]
    rival = [row("hessian", 0.1, 0, 0.10, 0.1, 0.1)]
    attack = Measure("pgd", ("l2_*",))
    table = [*standard, *mild, *middle, *strong, *rival]
    assert coefficients.choose(table, attack) == {
        "d m": {"density": {"best": 1.0, "gentle": 0.3}, "hessian": {"best": 0.1}}
    }
    assert coefficients.choose([*mild, *strong], attack) == {"d m": {"density": {"best": 1.0}}}, (
        "nothing to compare with"
    )
