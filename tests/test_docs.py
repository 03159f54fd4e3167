"""The README and docs/: they name what there is, their links lead somewhere, and their code runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import densreg
from densreg import paths, regularizers
from densreg.lab import data, evaluation, models, reproduce

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def code(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(
    ("page", "names"),
    [
        ("evaluation.md", evaluation.METRICS),
        ("training.md", (*data.DATA_SETS, *models.OWN_MODELS)),
        ("rivals.md", regularizers.REGULARIZERS),
        ("paths.md", (*paths.PATHS, "directional")),
        ("paper.md", ("table1", "table3", "table7", *(name for name in reproduce.NAMES if name.startswith("fig")))),
        ("loops.md", set(densreg.__all__) - {"__version__", "HeadOutput", "ObjectiveOutput", "check_model"}),
    ],
)
def test_what_is_registered_is_documented(page, names):
    text = (DOCS / page).read_text()
    assert [name for name in names if not re.search(rf"`{name}[`(]|`densreg\.{name}", text)] == []


def test_readme_is_one_page():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 130
    assert lines.index("```python") < 25
    for marker in ("<!-- run -->", "<!-- test -->"):  # .ci/run runs the line after it
        assert lines[lines.index(marker) + 1].startswith("    python3 -m venv .venv")


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", (ROOT / page).read_text()):
        file, _, anchor = target.partition("#")
        assert (ROOT / file).is_file(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", (ROOT / file).read_text(), re.MULTILINE)
            known = {re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in headings}
            assert anchor in known, target


@pytest.mark.parametrize("page", ["README.md", "docs/objective.md", "docs/loops.md", "docs/paths.md", "docs/rivals.md"])
def test_code_runs(page):
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten())
    model.add_module("fc", nn.Linear(12, 4))
    x, y = torch.rand(3, 1, 4, 4), torch.tensor([0, 3, 1])
    names = {"torch": torch, "F": F, "densreg": densreg, "model": model, "x": x, "y": y, "loader": [(x, y)]}
    names["optimizer"] = torch.optim.SGD(model.parameters(), 0.1)
    before = model[3].weight.clone()
    with torch.compiler.set_stance("force_eager"):
        for block in code(ROOT / page):
            exec(compile(block, page, "exec"), names)
    trained = "optimizer.step()" in "".join(code(ROOT / page))
    assert torch.equal(model[3].weight, before) != trained


def test_own_rival_runs():
    block = code(DOCS / "contributing.md")[0]
    model, x, y = nn.Linear(5, 4).double(), torch.rand(3, 5, dtype=torch.float64), torch.tensor([0, 3, 1])
    names = {"model": model, "__name__": __name__}
    with torch.compiler.set_stance("force_eager"):
        exec(compile(block, "contributing.md", "exec"), names)
        torch.manual_seed(0)
        out = names["objective"](x, y)
    torch.manual_seed(0)
    v = torch.randn_like(out.logits)  # the gradient of a linear model is v W
    torch.testing.assert_close(out.penalty, (v @ model.weight).square().sum(1).mean() / 4)


@pytest.mark.compile
def test_the_trap_is_as_described(capsys, fresh_dynamo):
    script = next(block for block in code(DOCS / "how-it-works.md") if "allow_in_graph" in block)
    exec(compile(script, "how-it-works.md", "exec"), {"__name__": __name__})
    eager, compiled, marked = (float(line.split()[-1]) for line in capsys.readouterr().out.splitlines())
    assert eager < 1e-14
    assert marked < 1e-14
    assert compiled > 0.1  # or torch has mended it
