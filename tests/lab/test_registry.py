"""What holds for every metric: its batches, its seed, its entry and picture; and its options as text."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from pathlib import Path

import pytest
import torch
from analytic import SMALLEST, curved, linear, split
from matplotlib.text import Text
from torch import nn

from densreg.lab import cli, evaluation, report
from densreg.lab.evaluation import METRICS, options_of, parse_options
from densreg.lab.evaluation.samples import Comparison

SHAPE = (3, 8, 8)
ON_ANY_DATA = [name for name in METRICS if name not in ("worst_group", "leakage", "autoattack")]


def _measure(name, model, batch_size=4, seed=0):
    return evaluation.metric(name)(
        model, split(7, SHAPE), device="cpu", batch_size=batch_size, seed=seed, **SMALLEST.get(name, {})
    )


@pytest.mark.parametrize("name", ON_ANY_DATA)
def test_batch_size_changes_nothing(name):
    """But rounding; and no batch is larger than it: the memory is bounded."""
    sizes = []

    class Watched(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = curved(4, SHAPE)

        def forward(self, x):
            sizes.append(len(x))
            return self.body(x)

    results = []
    for batch_size in (1, 3, 64):
        results.append(_measure(name, Watched().eval(), batch_size))
        assert max(sizes) <= batch_size
    for other in results[1:]:
        assert other == pytest.approx(results[0], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", ON_ANY_DATA)
def test_determinism(name):
    """Bit for bit for a seed, whatever else draws random numbers, which it leaves alone; nothing stays in the model."""
    model = curved(4, SHAPE)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    first = _measure(name, model)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    assert _measure(name, model) == first
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    random = name in ("pixel_perturbation", "noise_robustness", "insertion", "activation_maximisation")
    if random:
        assert _measure(name, model, seed=1) != first


@pytest.mark.parametrize("name", METRICS)
def test_metrics_have_one_shape(name):
    function = evaluation.metric(name)
    parameters = inspect.signature(function).parameters
    assert [*parameters][:2] == ["model", "split"]
    assert {"device", "batch_size", "seed"} <= {p.name for p in parameters.values() if p.kind is p.KEYWORD_ONLY}
    assert parameters["seed"].default == 0
    assert function.__doc__
    assert all(default is not inspect.Parameter.empty for default in options_of(name).values())
    assert {*METRICS[name].of_data} <= {*options_of(name)}


@pytest.mark.parametrize("name", METRICS)
def test_what_a_metric_needs(name):
    module, extra = METRICS[name].needs
    importlib.import_module(module)
    assert re.search(rf"^{extra} = ", (Path(__file__).parents[2] / "pyproject.toml").read_text(), re.M)


@pytest.mark.parametrize("name", [name for name in METRICS if METRICS[name].draw])
def test_pictures_show_each_run(name):
    """By its name; and of other models it is another picture."""
    by_hand = {"leakage": {}, "autoattack": {"clean": 0.75, "linf_0.1": 0.5}}
    options = {**options_of(name), **SMALLEST.get(name, {})}

    def draw(models):
        results = {run: by_hand[name] if name in by_hand else _measure(name, model) for run, model in models.items()}
        return METRICS[name].draw(Comparison(models, results, split(7, SHAPE), "cpu", 4, 0, options))

    one, other = curved(4, SHAPE), linear(4, SHAPE)
    picture = draw({"one": one, "other": other})
    assert {"one", "other"} <= {text.get_text() for text in picture.findobj(Text)}
    assert (report.png(picture) == report.png(draw({"one": one, "other": one}))) == (name == "autoattack")


def test_budgets_side_by_side():
    results = {"a": {"clean": 0.9, "l2_0.5": 0.5, "l2_1": 0.2}, "b": {"clean": 0.8, "l2_0.5": 0.7, "l2_1": 0.6}}
    comparison = Comparison({}, results, split(), "cpu", 4, 0, {})
    for name, attack in (("pgd", "PGD"), ("autoattack", "AutoAttack")):
        (axes,) = METRICS[name].draw(comparison).axes
        drawn = {line.get_label(): ([*line.get_xdata()], [*line.get_ydata()]) for line in axes.get_lines()}
        assert drawn == {"a": ([0, 0.5, 1], [90, 50, 20]), "b": ([0, 0.5, 1], [80, 70, 60])}
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("budget, L2", f"accuracy under {attack}, %")


@pytest.mark.parametrize(
    ("module", "metric", "message"),
    [
        ("captum.attr", "insertion", "captum is not installed: pip install 'densreg[evaluate]'"),
        ("pyautoattack", "autoattack", "pyautoattack is not installed: pip install 'densreg[autoattack]'"),
        ("sklearn.metrics", "out_of_distribution", "sklearn is not installed: pip install 'densreg[evaluate]'"),
        ("matplotlib.figure", "insertion", "matplotlib is not installed: pip install 'densreg[evaluate]'"),
        ("matplotlib.figure", "pgd", "matplotlib is not installed: pip install 'densreg[train]'"),
    ],
)
def test_missing_extras(module, metric, message, monkeypatch, refused):
    importlib.import_module(METRICS[metric].needs[0])  # captum is made with matplotlib
    monkeypatch.setitem(sys.modules, module, None)
    options = ("--set", "data=synthetic", "fit=true") if metric == "out_of_distribution" else ()
    assert refused("evaluate", "no-run", "--metrics", metric, *options) == f"densreg evaluate: error: {message}\n"
    if module != "matplotlib.figure":  # which pictures need
        with pytest.raises(ModuleNotFoundError, match=f"^{re.escape(message)}$"):
            _measure(metric, curved(4, SHAPE))


# --------------------------------------------------------------------------------------------------------------------
# options as text


def test_options_as_text():
    names = ["pixel_perturbation", "insertion", "out_of_distribution", "activation_maximisation", "accuracy"]
    texts = [
        "samples=3",
        "insertion.points=7",
        "fractions=1/4,1",
        "data=svhn",
        "fit=TRUE",
        "images=none",
        "classes=1,2",
    ]
    assert parse_options(texts, names) == {
        "pixel_perturbation": {"samples": 3, "fractions": (0.25, 1.0)},
        "insertion": {"samples": 3, "points": 7},
        "out_of_distribution": {"data": "svhn", "fit": True, "images": None},
        "activation_maximisation": {"classes": (1, 2)},
        "accuracy": {},
    }
    with pytest.raises(ValueError, match=r"; did you mean points\?$"):
        parse_options(["pionts=7"], names)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("points", "--set points: expected OPTION=VALUE"),
        ("point=3", "--set point=3: expected an option of the metrics (insertion: method, target, baseline, points,"),
        ("accuracy.points=3", "--set accuracy.points=3: expected an option of the metrics"),
        ("points=many", "--set points=many: expected a value of type int"),
        ("points=1.5", "--set points=1.5: expected a value of type int"),
        ("sigma=1/0", "--set sigma=1/0: expected a value of type float"),
    ],
)
def test_bad_option_texts(text, message, refused):
    error = refused("evaluate", "no-run", "--metrics", "insertion", "--set", text)
    assert error.startswith(f"densreg evaluate: error: {message}")


def test_list(capsys):
    assert cli.main(["evaluate", "--list"]) == 0
    said = capsys.readouterr().out
    assert all(f"{name}: " in said for name in METRICS)
    assert "    fractions=0.05,0.1,0.2,0.3,0.4,0.5\n" in said
    assert "    data=none\n" in said
    assert "not installed" not in said
