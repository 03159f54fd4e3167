"""The run directory: files that are whole, checkpoints with a second one to go back to, and what is damaged."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal

import pytest
import torch

from densreg.lab import runs


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


def test_open_run(tmp_path, monkeypatch):
    with runs.open_run(str(tmp_path / "deep" / "run")) as run:
        assert [file.name for file in run.iterdir()] == [runs.LOCK]
    assert list(run.iterdir()) == [run / runs.LOCK]
    (run / runs.STEPS).write_text("mine")

    def refused(message, out=run, **options):
        with pytest.raises(runs.RunError, match=message), runs.open_run(str(out), **options):
            pytest.fail("it was opened")

    refused(r"already holds steps\.csv; choose another folder or add --overwrite$")
    for options in ({"reuse": True}, {"files": ["other"]}):
        with runs.open_run(str(run), **options) as again:
            assert again == run
    refused("--out is empty", "")

    def read_only(*args, **options):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(type(run), "open", read_only)
    refused(r"cannot write to --out .*: Read-only file system$", reuse=True)


# --------------------------------------------------------------------------------------------------------------------
# the lock


def _child(work):
    """A process that does some work, says so, and waits; its number."""
    here, there = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with work():
                os.write(there, b".")
                signal.pause()
        finally:
            os._exit(1)
    os.close(there)
    said = os.read(here, 1)
    os.close(here)
    return child, said


def _kill(child):
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_two_processes_on_one_folder(tmp_path):
    """The second is refused; after a kill nothing is in its way."""
    child, said = _child(lambda: runs.locked(tmp_path))
    try:
        assert said == b"."
        message = "is in use by another process; wait for its end, or choose another folder$"
        with pytest.raises(runs.RunError, match=message), runs.open_run(str(tmp_path)):
            pytest.fail("both are in")
    finally:
        _kill(child)
    with runs.open_run(str(tmp_path)):
        other, said = _child(lambda: runs.locked(tmp_path))
        _kill(other)
        assert said == b"", "it holds against others, with the file that the killed one left"


def test_a_lock_ends_with_its_process_and_not_with_its_workers(tmp_path):
    """A worker of a data loader outlives a killed process by some seconds."""

    @contextlib.contextmanager
    def with_a_worker():
        with runs.locked(tmp_path):
            worker, _ = _child(contextlib.nullcontext)
            (tmp_path / "worker").write_text(str(worker))
            yield

    child, _ = _child(with_a_worker)
    worker = int((tmp_path / "worker").read_text())
    _kill(child)
    try:
        with runs.locked(tmp_path):
            os.kill(worker, 0)  # it is there
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys):
    def none(*args):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with runs.locked(tmp_path):
        pass
    said = capsys.readouterr().err
    assert said == f"no lock on {tmp_path} (No locks available): let no second process write to it\n"


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
