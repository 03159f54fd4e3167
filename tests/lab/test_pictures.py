"""Pictures from made-up rows of table.csv: which runs make a line, and what it is called."""

from __future__ import annotations

import math

import pytest

from densreg.lab import pictures


def _row(p, coeff, value, method="density", model="mlp", seed=0):
    own = {"data": "blockmnist", "model": model, "method": method, "coeff": coeff, "p": p, "seed": seed}
    columns = ("leakage l2", "leakage share_l2", "pgd clean", "pgd l2_1", "pgd l2_2")
    return own | {column: value + i for i, column in enumerate(columns)}


def _standard(value, **options):
    return _row("", "", value, "standard", **options)


def _lines(axes):
    """x and y by name; and the heights of the dashed lines."""
    drawn = {line.get_label(): ([*line.get_xdata()], [*line.get_ydata()]) for line in axes.get_lines()}
    solid = {name: points for name, points in drawn.items() if not name.startswith("_")}
    return solid, [line.get_ydata()[0] for line in axes.get_lines() if line.get_linestyle() == "--"]


def test_norms_with_a_coefficient():
    """Means over seeds; where each order has one coefficient, as after --match-norms, they make one line."""
    of_one = [_row(1.0, 0.003, 10), _row(1.0, 0.003, 20, seed=1)]
    table = [_standard(40), *of_one, _row(2.0, 0.1, 30), _row(math.inf, 4.0, 50)]
    leakage, share, accuracy = pictures.draw_norms(table).axes
    assert _lines(leakage) == ({"leakage l2": ([0, 1, 2], [15, 30, 50])}, [40])
    assert _lines(share) == ({"leakage share_l2": ([0, 1, 2], [16, 31, 51])}, [41])
    columns = {"pgd clean": 2, "pgd l2_1": 3, "pgd l2_2": 4}
    expected = {name: ([0, 1, 2], [15 + i, 30 + i, 50 + i]) for name, i in columns.items()}
    assert _lines(accuracy) == (expected, [42, 43, 44])
    assert [text.get_text() for text in leakage.get_xticklabels()] == ["1", "2", "inf"]


@pytest.mark.parametrize("missing", [None, (2.0, 0.1)])
def test_norms_with_several_coefficients(missing):
    """A line for each, never a mean of two; it leaves out an order at which the training diverged."""
    rows = [_row(p, c, 100 * c + p) for p in (1.0, 2.0, 3.0) for c in (0.5, 0.1) if (p, c) != missing]
    leakage, _, accuracy = pictures.draw_norms([_standard(0), *rows]).axes
    solid, dashed = _lines(leakage)
    orders = [0, 1, 2] if missing is None else [0, 2]
    assert solid == {
        "leakage l2, coefficient 0.1": (orders, [11.0 + i for i in orders]),
        "leakage l2, coefficient 0.5": ([0, 1, 2], [51, 52, 53]),
    }
    assert dashed == [0]
    assert len(_lines(accuracy)[0]) == 6
    one, other = leakage.get_lines()[:2]
    assert one.get_marker() != other.get_marker()
    assert one.get_color() == other.get_color() == leakage.get_lines()[2].get_color()


def test_norms_with_scaled_coefficients():
    """With --match-norms no coefficient is at two orders."""
    rows = [_row(1.0, 0.02, 2), _row(1.0, 0.004, 1), _row(2.0, 0.1, 3), _row(2.0, 0.5, 4)]
    assert _lines(pictures.draw_norms(rows).axes[0])[0] == {
        "leakage l2, coefficient 0.004 to 0.1": ([0, 1], [1, 3]),
        "leakage l2, coefficient 0.02 to 0.5": ([0, 1], [2, 4]),
    }


def test_norms_of_several_models_and_methods():
    """Panels for each model, with its own standard training; a line for each method."""
    small = [_standard(9), _row(1.0, 0.1, 1), _row(2.0, 0.1, 2), _row(2.0, 0.1, 3, method="cure")]
    large = [_standard(8, model="vgg11"), _row(2.0, 0.1, 4, model="vgg11"), _standard(7, model="resnet18")]
    axes = pictures.draw_norms([*small, *large, _row("", "", 6, method="softplus")]).axes
    assert [panel.get_title() for panel in axes[::3]] == [
        f"leakage (L2), blockmnist, {model}" for model in ("mlp", "vgg11", "resnet18")
    ]
    assert [_lines(panel) for panel in axes[::3]] == [
        ({"leakage l2, density": ([0, 1], [1, 2]), "leakage l2, CURE": ([1], [3])}, [9]),
        ({"leakage l2": ([1], [4])}, [8]),
        ({"leakage l2": ([], [])}, [7]),
    ]


def test_a_panel_for_each_search():
    """Of those with several coefficients at one order; accuracies over the coefficient."""
    rows = [_row(p, c, 10 * c) | {"accuracy clean": c} for p, c in ((2.0, 0.5), (2.0, 0.1), (1.0, 0.1))]
    assert pictures.searched(rows) == {("blockmnist", "mlp", "density", 2.0): [0.1, 0.5]}
    (axes,) = pictures.draw_coefficients([_standard(7) | {"accuracy clean": 0.9}, *rows]).axes
    solid, dashed = _lines(axes)
    assert solid == {
        "accuracy clean": ([0.1, 0.5], [0.1, 0.5]),
        "pgd l2_1": ([0.1, 0.5], [4, 8]),
        "pgd l2_2": ([0.1, 0.5], [5, 9]),
    }
    assert dashed == [10, 11, 0.9]
    assert axes.get_title() == "density, p = 2, blockmnist, mlp"
