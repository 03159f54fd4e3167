"""The run directory: files that are whole, checkpoints with a second one to go back to, and what is damaged."""

from __future__ import annotations

import os
import resource

import pytest
import torch

from densreg import runs


def test_failed_write_keeps_the_old_file(tmp_path):
    file = tmp_path / "file"
    runs.write_atomically(file, lambda f: f.write(b"old"))

    def fails(f):
        f.write(b"half of the n")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        runs.write_atomically(file, fails, tmp_path / "previous")
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("links", [True, False])
def test_the_old_file_gets_a_second_name(tmp_path, monkeypatch, links):
    if not links:

        def no_links(*args):
            raise OSError(95, "Operation not supported")

        monkeypatch.setattr(os, "link", no_links)
    file, previous = tmp_path / "file", tmp_path / "previous"
    for text in (b"one", b"two", b"three"):
        runs.write_atomically(file, lambda f, text=text: f.write(text), previous)
    assert (file.read_bytes(), previous.read_bytes()) == (b"three", b"two")
    assert sorted(tmp_path.iterdir()) == [file, previous]


def test_checkpoints(tmp_path):
    assert runs.load_checkpoint(tmp_path) == (None, "")
    for step in (1, 2, 3):
        runs.save_checkpoint(tmp_path, {"step": step, "w": torch.full((1000,), float(step))})
    newest, note = runs.load_checkpoint(tmp_path)
    assert (newest["step"], note) == (3, "")
    runs.save_checkpoint(tmp_path, {"step": 0}, keep=False)
    assert not (tmp_path / runs.PREVIOUS).exists(), "of another run"


def _flip_a_bit(data):
    """In the numbers themselves, which torch would load as they are."""
    at = data.find(torch.full((4,), 3.0).numpy().tobytes())
    assert at > 0
    return data[: at + 1] + bytes([data[at + 1] ^ 1]) + data[at + 2 :]


@pytest.mark.parametrize("damage", [lambda d: d[:-100], lambda d: d[: len(d) // 2], lambda d: b"", _flip_a_bit])
def test_damaged_checkpoint(tmp_path, damage):
    for step in (2, 3):
        runs.save_checkpoint(tmp_path, {"step": step, "w": torch.full((1000,), float(step))})
    file, previous = tmp_path / runs.CHECKPOINT, tmp_path / runs.PREVIOUS
    file.write_bytes(damage(file.read_bytes()))
    older, note = runs.load_checkpoint(tmp_path)
    assert older["step"] == 2
    assert note.startswith(f"{file} cannot be read (")
    assert note.endswith("); going back to checkpoint.previous.pt")
    assert "\n" not in note
    previous.write_bytes(b"")
    with pytest.raises(runs.RunError, match=r"checkpoint\.pt cannot be read .*; .*previous\.pt cannot be read"):
        runs.load_checkpoint(tmp_path)


def test_missing_checkpoint_beside_a_previous_one(tmp_path):
    """Where the file system has no links, a kill between two renames leaves this."""
    runs.save_checkpoint(tmp_path, {"step": 1})
    (tmp_path / runs.CHECKPOINT).rename(tmp_path / runs.PREVIOUS)
    assert runs.load_checkpoint(tmp_path)[0] == {"step": 1}


def test_checkpoint_that_does_not_fit_on_the_disk(tmp_path):
    """A limit on the size of files stands for the full disk: the write itself fails, in the middle."""
    runs.save_checkpoint(tmp_path, {"step": 1})
    runs.save_checkpoint(tmp_path, {"step": 2})
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            runs.save_checkpoint(tmp_path, {"step": 3, "w": torch.zeros(200_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_open_run(tmp_path, monkeypatch):
    run = runs.open_run(str(tmp_path / "deep" / "run"))
    assert list(run.iterdir()) == []
    (run / runs.STEPS).write_text("mine")
    with pytest.raises(runs.RunError, match=r"already holds steps\.csv; choose another folder or add --overwrite$"):
        runs.open_run(str(run))
    assert runs.open_run(str(run), reuse=True) == run
    assert runs.open_run(str(run), files=["other"]) == run
    with pytest.raises(runs.RunError, match="--out is empty"):
        runs.open_run("")

    def read_only(*args, **options):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(type(run), "open", read_only)
    with pytest.raises(runs.RunError, match=r"cannot write to --out .*: Read-only file system$"):
        runs.open_run(str(run), reuse=True)


def test_curves(tmp_path):
    rows = [
        {f"{split}_{name}": i / 2 for split in ("train", "test") for name in ("ce", "penalty", "accuracy")}
        | {"epoch": i}
        for i in (1, 2, 3)
    ]
    rows[1]["train_penalty"] = float("nan")
    runs.draw_curves(tmp_path / runs.CURVES, rows)
    from matplotlib.image import imread

    picture = imread(tmp_path / runs.CURVES)
    assert picture.shape[1] > 1000
    assert picture[..., :3].min() < 0.5, "something is drawn"


def test_tables(tmp_path):
    file = tmp_path / runs.METRICS
    runs.write_csv(file, [{"a": 1, "b": "x"}, {"a": 2.5, "b": "y,z"}])
    assert file.read_bytes() == b'a,b\n1,x\n2.5,"y,z"\n'
    runs.write_csv(file, [])
    assert not file.exists(), "what lay there is of another run"
