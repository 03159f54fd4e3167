"""Fixtures of the lab's tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from densreg.lab import cli


@pytest.fixture
def unchecked(monkeypatch):
    """torchvision's own readers on files of our making: its checksums are those of the whole data sets."""
    for place in ("utils", "cifar", "svhn"):
        monkeypatch.setattr(f"torchvision.datasets.{place}.check_integrity", lambda file, md5=None: Path(file).exists())
    monkeypatch.setattr("torchvision.datasets.CIFAR10._check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.SVHN._check_integrity", lambda self: True)


@pytest.fixture
def refused(capsys):
    """Runs a command that must end with status 2, or another one, and one line of error, which it gives."""

    def run(*arguments, status=2):
        capsys.readouterr()
        try:
            found = cli.main([*arguments])
        except SystemExit as stop:
            found = stop.code
        error = capsys.readouterr().err
        assert found == status, error
        assert error.startswith(f"densreg {arguments[0]}: error: ")
        assert error.count("\n") == 1
        return error

    return run
