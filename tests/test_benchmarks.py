"""The benchmarks: that wrong results are not timed, that the report says what was measured, that the guard fails."""

from __future__ import annotations

import contextlib
import json
import sys
import time
import types
from pathlib import Path

import pytest
import torch

import densreg
from benchmarks import class_counts, compare, gpu, report, steps, test_epoch, test_growth, timing


def test_exponent():
    sizes = [10, 100, 1000]
    assert timing.exponent(sizes, [3 * n**1.5 for n in sizes]) == pytest.approx(1.5)
    assert timing.exponent(sizes, [7, 7, 7]) == pytest.approx(0)
    for wrong in (([10, 10], [1, 2]), ([1, 2], [0, 1])):
        with pytest.raises(ValueError, match="two different sizes"):
            timing.exponent(*wrong)


def test_candidates_are_timed_in_turn():
    order = []
    sleeps = {"a": 0.004, "b": 0.012}

    def candidate(name):
        order.append(name)
        time.sleep(sleeps[name])

    times = timing.interleave({name: lambda name=name: candidate(name) for name in sleeps}, seconds=0)
    assert order[-10:] == ["a", "b"] * 5  # three warm-up calls each, then rounds
    assert [len(values) for values in times.values()] == [5, 5]
    assert timing.ratio(times, "b", "a") == pytest.approx(3, rel=0.5)


def test_what_a_candidate_finds_in_the_caches_is_its_own(monkeypatch):
    """The first call of a turn, which comes upon what the candidate before left, is not timed."""
    clock, last = [0.0], []
    monkeypatch.setattr(timing, "time", types.SimpleNamespace(perf_counter=lambda: clock[0]))

    def candidate(name):
        clock[0] += 0.0005 if last[-1:] == [name] else 0.02
        last.append(name)

    times = timing.interleave({name: lambda name=name: candidate(name) for name in "ab"}, seconds=0)
    assert [value for values in times.values() for value in values] == pytest.approx([0.0005] * 10)


def test_the_ratio_is_within_a_round():
    times = {"slow": [2.0, 20.0, 2.0], "fast": [1.0, 10.0, 1.0]}  # a machine that was busy once
    assert timing.ratio(times, "slow", "fast") == 2


def test_peak_memory():
    size = 1 << 20
    assert timing.peak_bytes(lambda: torch.empty(size)) == 4 * size
    assert timing.peak_bytes(lambda: [torch.empty(size).sum() for _ in range(3)]) < 5 * size  # freed in between
    assert timing.peak_bytes(lambda: [torch.empty(size) for _ in range(3)]) == 12 * size


def test_large_inputs_rotate_past_the_cache():
    assert timing.copies_past_cache(1000) == 1
    size = 4 << 20
    assert (timing.copies_past_cache(size) - 1) * size >= 2 * timing.last_level_cache()


def test_a_wrong_path_is_not_timed(monkeypatch):
    monkeypatch.setattr(class_counts, "taylor", lambda f, k, u: (torch.softmax(f, 1), u))  # without its second order
    with pytest.raises(timing.WrongResult, match=r"taylor: relative error .* at \[4, 10\]"):
        class_counts.measure(4, 10, 0)


def test_a_path_served_by_another_backend_is_not_timed(monkeypatch):
    right = class_counts.api

    def elsewhere(f, u):
        with densreg.backend("torch"):
            return right(f, u)

    monkeypatch.setattr(class_counts, "api", elsewhere)
    with pytest.raises(timing.WrongResult, match=r"api was served by .*softmax/torch"):
        class_counts.measure(4, 10, 0)


def test_an_overflow_that_is_not_naives_fails(monkeypatch):
    right = class_counts.api

    def overflows(f, u):
        return tuple(t + f.exp().sum() * 0 for t in right(f, u))

    monkeypatch.setattr(class_counts, "api", overflows)
    with pytest.raises(timing.WrongResult, match="logits times 100"):
        class_counts.measure(4, 10, 0, papers=True)


def test_steps_are_compared_with_float64():
    model, x, y = steps._problem(steps.CASES["mlp"]._replace(batch=4))
    references = steps.references(model, x, y)
    taylor = steps.step_of("taylor", model, x, y)()
    assert steps.require("taylor", taylor, references) < 1e-5
    with pytest.raises(timing.WrongResult, match="gradients off"):  # the penalty counts four times there
        steps.require("interval 4", taylor, references)
    with pytest.raises(timing.WrongResult, match="gradients off"):
        steps.require("plain", taylor, references)
    for rival in steps.RIVALS:
        assert steps.require(rival, steps.step_of(rival, model, x, y)(), references) is None
        with pytest.raises(timing.WrongResult, match="those of a plain step"):
            steps.require(rival, references[0], references)


def test_epochs_are_summed_by_blocks():
    times = {"plain": [1.0] * 8, "interval 4": [4.0, 1.0, 1.0, 1.0] * 2, "per_class": [10.0]}
    sizes = {"plain": 10, "interval 4": 10, "per_class": 2}
    summary = test_epoch._summary(times, sizes, 10)
    assert summary["seconds_per_image"] == {"plain": 0.1, "interval 4": 0.175, "per_class": 5}
    assert summary["over_plain"] == {"plain": 1, "interval 4": pytest.approx(1.75), "per_class": 50}
    assert set(summary["quartiles"]) == {"plain", "interval 4"}


def _rows(epoch):
    shapes = [{"kind": "logits", **class_counts.measure(4, c, 0, papers=True, memory=True)} for c in (1000, 2000)]
    head = {"kind": "head", **class_counts.measure_head(4, 10, 0, memory=True)}
    growth = {"kind": "growth", **test_growth.measure("batch", (2, 4), 0)}
    return [*shapes, head, growth, {"kind": "epoch", **epoch}]


@pytest.mark.long
def test_report(tmp_path):
    """Of real measurements at tiny sizes: what the JSON file, the tables and the pictures hold."""
    columns = ("plain", "taylor", "per_class", "objective", "input_gradient")
    epoch, step = test_epoch.measure("blockmnist", 512, columns=columns)
    assert len(step()) == 6  # the objective's gradients
    about = timing.environment()
    made = {"machine": report.machine_name(about), "profile": "tiny", "environment": about, "seconds": 1.0}
    made |= {"failed": ["test_head[4x10]: WrongResult: so it is"], "rows": _rows(epoch)}
    report.write(made, tmp_path)
    names = {"report.json", "report.md", "time.png", "memory.png", "bandwidth.png", "epochs.png", "growth.png"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in names if name.endswith("png"))
    read = json.loads((tmp_path / "report.json").read_text())
    assert read["rows"][0]["overflow"] == ["naive"]
    for row in read["rows"][:2]:
        timed = {"api", "taylor", "raw", "aten", "compiled", "fallback", "naive", "max_shift", "stable"}
        timed |= {"floor", "copy", "clone"}
        assert set(row["seconds"]) == set(row["quartiles"]) == set(row["peak_bytes"]) == timed
        assert row["raw_bytes_per_second"] == pytest.approx(5 * 4 * row["B"] * row["C"] / row["seconds"]["raw"])
        assert row["peak_bytes"]["api"] < row["peak_bytes"]["taylor"]
    assert read["rows"][-1]["source"].startswith("noise")
    assert set(read["rows"][-1]["over_plain"]) == set(columns)
    assert read["rows"][-1]["images_of"]["taylor"] == 512
    text = (tmp_path / "report.md").read_text()
    for wanted in (
        about["cpu"],
        about["torch"],
        "Failed, not timed:** test_head",
        "noise of its shape",
        "overflow in naive",
    ):
        assert wanted in text
    assert "| per_class |" in text.split("An epoch")[1]
    assert "to the power of" in text


@pytest.mark.slow
def test_suites_run_and_failures_are_named(monkeypatch):
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")  # in the suites' process: the columns are not what is tested
    # Of the second only what is on a device can fail there.
    options = ["--profile=tiny", "--seconds=0.01", "-k", "logits and 4x10 or batch", "--device=nowhere"]
    rows, failed = report.run(options, report.SUITES[:2])
    assert [row["kind"] for row in rows] == ["logits"]
    assert len(failed) == 1
    assert "nowhere" in failed[0]


def test_what_is_faster_is_listed():
    row = {"kind": "logits", "B": 4, "C": 10, "over_fused": {"taylor": 0.8, "naive": 1.2}, "aten/raw": 2.0}
    epoch = {"kind": "epoch", "data": "noise", "over_plain": {"plain": 1.0, "taylor": 1.5, "objective": 2.0}}
    found = report.slower({"rows": [{**row, "compiled/raw": 0.5}, epoch]})
    assert [line.split(" takes")[0] for line in found] == [
        *("logits, 4 x 10: taylor", "logits, 4 x 10: compiled", "epoch of noise: taylor")
    ]


@pytest.mark.parametrize(
    ("cpu", "gpu", "name"),
    [
        ("AMD EPYC", None, "epyc-avx2-2-cores"),
        ("Intel(R) Xeon(R) Platinum 8480+ CPU @ 2.00GHz", None, "xeon-platinum-8480-avx2-2-cores"),
        ("AMD EPYC", "NVIDIA H100 80GB HBM3", "nvidia-h100-80gb-hbm3"),
    ],
)
def test_machine_name(cpu, gpu, name):
    assert report.machine_name({"cpu": cpu, "gpu": gpu, "instruction_set": "avx2", "cores": 2}) == name


COMMITTED = {"taylor/api, 128 x 100": [2.0, 2.1, 1.9], "plain/objective, mlp": [0.50, 0.51, 0.50]}


@pytest.mark.parametrize(
    ("now", "status"),
    [
        (COMMITTED, 0),
        ({"taylor/api, 128 x 100": [1.82], "plain/objective, mlp": [0.48]}, 0),  # within their own spread
        ({"taylor/api, 128 x 100": [1.78], "plain/objective, mlp": [0.50]}, 1),
        ({"taylor/api, 128 x 100": [2.0], "plain/objective, mlp": [0.47]}, 1),
        ({"taylor/api, 128 x 100": [9.0], "plain/objective, mlp": [0.9]}, 0),  # better
        ({"taylor/api, 128 x 100": [float("nan")], "plain/objective, mlp": [0.5]}, 1),
        ({"taylor/api, 128 x 100": [2.0]}, 2),  # not measured
    ],
)
def test_compare(now, status, tmp_path, monkeypatch, capsys):
    file = tmp_path / "ratios.json"
    file.write_text(json.dumps({"environment": {}, "ratios": COMMITTED}))
    monkeypatch.setattr(compare, "measure_repeatedly", lambda *args: now)
    monkeypatch.setattr(sys, "argv", ["compare", "--data", str(file)])
    assert compare.main() == status
    said = capsys.readouterr()
    assert ("worsened: " in said.out) == (status == 1)
    assert ("not measured now: plain/objective, mlp" in said.err) == (status == 2)


def test_compare_writes_what_it_reads(tmp_path, monkeypatch, capsys):
    file = tmp_path / "machine" / "ratios.json"
    monkeypatch.setattr(compare, "measure_repeatedly", lambda *args: COMMITTED)
    monkeypatch.setattr(sys, "argv", ["compare", "--write", "--data", str(file)])
    assert compare.main() == 0
    about = timing.environment() | {"gpu": None}
    assert compare.committed(about, tmp_path) == file
    with pytest.raises(compare.CompareError, match="no committed ratios of a machine like this"):
        compare.committed(about | {"instruction_set": "another"}, tmp_path)
    monkeypatch.setattr(compare, "measure_repeatedly", lambda *args: {"a/b": [1.0, 5.0, 1.0, 5.0]})
    assert compare.main() == 1
    assert "too far spread" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_the_ratios_that_are_compared(compiler, monkeypatch, fresh_dynamo):
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile(f, **{**options, "backend": compiler}))
    monkeypatch.setattr(compare, "SHAPES", ((4, 10),))
    ratios = compare.measure(0.0)
    assert ratios.keys() == {
        "taylor/api, 4 x 10",
        "compiled/raw, 4 x 10",
        "plain/objective, mlp",
        "taylor/objective, mlp",
    }
    assert all(value > 0 for value in ratios.values())


# --------------------------------------------------------------------------------------------------------------------
# benchmarks.gpu: what a call leaves for the next


def fails() -> dict:
    raise ValueError("no such kernel")


def test_gpu_rows_that_are_there_are_not_measured_and_a_failure_costs_one(tmp_path, monkeypatch, capsys):
    work = [("a", fails), ("b", fails), ("c", lambda: {"seconds": 3})]
    monkeypatch.setattr(gpu, "STAGES", {"small": (lambda options: iter(work), 9)})
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps({"stages": {"small": {"rows": [{"key": "a", "code": 0}]}}}))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    gpu._work("small", types.SimpleNamespace(json=file))
    assert not torch.backends.cudnn.allow_tf32
    begun_b, b, begun_c, c = map(json.loads, capsys.readouterr().out.splitlines())
    assert (begun_b, begun_c) == ({"begun": "b"}, {"begun": "c"})
    assert b["row"] == {"key": "b", "code": 1, "failed": {"b": "ValueError: no such kernel"}}
    assert c["row"] == {"key": "c", "code": 0, "seconds": 3}


def run_stage(tmp_path, monkeypatch, script: str, seconds: float) -> tuple[str, list[dict]]:
    """A stage whose worker is this script."""
    worker = tmp_path / "worker"
    worker.write_text(f"#!/bin/sh\n{script}\n")
    worker.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(worker))
    monkeypatch.setattr(gpu, "STAGES", {"small": (None, 1)})
    rows: list[dict] = []
    options = types.SimpleNamespace(json=tmp_path / "gpu.json", dry_run=False, data_dir=None)
    return gpu._run_stage("small", options, seconds, rows.append), rows


HANGS = {"key": "b", "code": 1, "failed": {"b": "out of time"}}


@pytest.mark.parametrize(
    ("script", "seconds", "ended", "rows"),
    [
        ("""echo '{"row": {"key": "a"}}'""", 30, "whole", [{"key": "a"}]),
        ("""echo '{"begun": "b"}'; exit 3""", 30, "exit code 3", [HANGS | {"failed": {"b": "exit code 3"}}]),
        ("""echo '{"begun": "b"}'; kill -9 $$""", 30, "exit code -9", [HANGS | {"failed": {"b": "exit code -9"}}]),
        ("""echo '{"begun": "b"}'; sleep 100""", 2, "out of time", [HANGS]),
        ("""echo '{"begun": "b"}'; sleep 100""", 0.9, "out of time", []),  # less than the stage takes
        ("""echo '{"row": {"key": "a"}}'; echo '{"begun": "b"}'; sleep 100""", 2, "out of time", [{"key": "a"}]),
    ],
)
def test_gpu_stage_that_dies_or_hangs(script, seconds, ended, rows, tmp_path, monkeypatch):
    assert run_stage(tmp_path, monkeypatch, script, seconds) == (ended, rows)


def test_gpu_stage_takes_what_it_started_with_it(tmp_path, monkeypatch):
    child = tmp_path / "child"
    run_stage(tmp_path, monkeypatch, f"sleep 100 & echo $! > {child}; wait", 4)
    time.sleep(0.2)
    status = Path(f"/proc/{int(child.read_text())}/status")
    assert not status.exists() or "zombie" in status.read_text()


def test_gpu_warmer_compiles(fresh_dynamo, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)  # and put back
    gpu.warm("mlp", "plain", dry_run=True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("interrupted", [False, True])
def test_gpu_warmers_end(interrupted, tmp_path, monkeypatch):
    """One that takes too long is ended, with all that it has started."""
    child = tmp_path / "child"
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\nsleep 600 & echo $! > {child}; wait\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.setattr(gpu, "STEPS", {"mlp": 8})
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt) if interrupted else contextlib.nullcontext(), gpu._warmers(1.0):
        while not child.exists() or not child.read_text():
            time.sleep(0.05)
        if interrupted:
            raise KeyboardInterrupt
    assert time.monotonic() - begun < 60
    time.sleep(0.2)
    status = Path(f"/proc/{int(child.read_text())}/status")
    assert not status.exists() or "zombie" in status.read_text()


def test_gpu_calls_go_on_where_the_last_one_stopped(tmp_path, monkeypatch, capsys):
    calls = []

    def run_stage(name, options, seconds, keep):
        calls.append((name, seconds))
        if name == "tests":
            keep({"key": "a", "code": 1})
            return "whole"
        keep({"key": str(len(calls)), "code": 0})
        return "whole" if len(calls) > 2 else "out of time"

    monkeypatch.setattr(gpu, "_run_stage", run_stage)
    monkeypatch.setattr(gpu, "_table", lambda result: ())
    file = tmp_path / "gpu.json"
    command = ["gpu", "--dry-run", "--json", str(file), "--stage", "tests", "small", "--minutes", "50"]
    monkeypatch.setattr(sys, "argv", command)
    assert gpu.main() == 1
    # Every stage has its turn, 1.5 times what it is expected to take; then what is unfinished has the rest.
    assert [name for name, _ in calls] == ["tests", "small", "small"]
    assert [seconds for _, seconds in calls] == [270, 180, pytest.approx(3000, abs=60)]
    stages = json.loads(file.read_text())["stages"]
    assert {name: stage["ended"] for name, stage in stages.items()} == {"tests": "failed", "small": "whole"}
    assert gpu.main() == 1
    assert len(calls) == 3
    monkeypatch.setattr(sys, "argv", [*command, "--again"])
    gpu.main()
    assert len(calls) == 5
