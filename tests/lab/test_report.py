"""Tables in Markdown, and what pictures are made of."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import densreg
from densreg.lab import report


def test_table():
    rows = [["metric", "a|b"], ["x", 0.5], ["y", None]]
    assert report.markdown_table(rows) == "| metric | a\\|b |\n| --- | --- |\n| x | 0.5 |\n| y | None |"
    assert report.markdown_table([["head"]]) == "| head |\n| --- |"
    with pytest.raises(ValueError, match=r"expected a row of 2 cells, got 1: \['x'\]"):
        report.markdown_table([["a", "b"], ["x"]])
    with pytest.raises(ValueError, match="expected a table with a header, got no rows"):
        report.markdown_table([])


def test_numbers():
    assert [report.number(value) for value in (None, "", 0.0, 93.05, 1e-7)] == ["-", "-", "0", "93.05", "1e-07"]


def test_lines():
    figure, axes = report.panels(2, 3, 6, 4)
    assert axes.shape == (2, 3)
    assert figure.get_size_inches().tolist() == [6, 4]
    report.draw_lines(axes[0, 0], {"one": ([0, 1], [2, 3]), "two": ([0, 1], [5, 4])}, title="t", xlabel="x")
    assert [(line.get_label(), [*line.get_ydata()]) for line in axes[0, 0].get_lines()] == [
        ("one", [2, 3]),
        ("two", [5, 4]),
    ]
    assert [text.get_text() for text in axes[0, 0].get_legend().get_texts()] == ["one", "two"]
    assert (axes[0, 0].get_title(), axes[0, 0].get_xlabel()) == ("t", "x")
    report.draw_lines(axes[0, 1], {"one": ([0], [1])}, legend=None)
    assert axes[0, 1].get_legend() is None
    assert report.png(figure).startswith(b"\x89PNG")


def test_images():
    _, axes = report.panels(1, 3, 3, 1)
    images = (torch.rand(1, 2, 5), torch.rand(3, 2, 5), torch.rand(2, 5) - 0.5)
    for panel, image in zip(axes[0], images, strict=True):
        report.draw_image(panel, image, "title", low=-1, high=2)
        drawn = torch.as_tensor(panel.get_images()[0].get_array())
        assert torch.equal(drawn, image.permute(1, 2, 0) if len(image) == 3 else image.view(2, 5))
        assert panel.get_images()[0].get_clim() == (-1, 2)
        assert not panel.get_xticks().size


def test_one_module_imports_matplotlib():
    package = Path(densreg.__file__).parent
    files = [
        file for file in package.rglob("*.py") if re.search(r"^\s*(import|from) matplotlib", file.read_text(), re.M)
    ]
    assert files == [package / "lab" / "report.py"]
