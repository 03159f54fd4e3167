"""The benchmarks: that wrong results are not timed, that the report says what was measured, that the guard fails."""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import sys
import time
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import densreg
from benchmarks import __main__ as command
from benchmarks import (
    class_counts,
    compare,
    gpu,
    gpu_kernels,
    linear_head,
    records,
    report,
    startup,
    steps,
    test_epoch,
    test_growth,
    timing,
)
from densreg import _torch, graph_passes

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"


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
    assert sorted(timing.ratios(times, "b", "a"))[2] == pytest.approx(3, rel=0.5)


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
    times = {"slow": [2.0, 20.0, 2.0, 2.2], "fast": [1.0, 10.0, 1.0, 1.0]}  # a machine that was busy once
    found = timing.summarize(times, {"slow": "fast", "fast": "fast"})
    assert found["slow"]["ratio"] == 2
    assert found["slow"]["ratio_high"] == pytest.approx(2.15)
    assert found["slow"]["base"] == found["fast"]["base"] == "fast"
    assert found["fast"]["seconds"] == found["fast"]["ratio"] == 1


def test_the_context_of_a_candidate_is_entered_and_not_timed(monkeypatch):
    clock, active = [0.0], []
    monkeypatch.setattr(timing, "time", types.SimpleNamespace(perf_counter=lambda: clock[0]))

    @contextlib.contextmanager
    def inside(name):
        clock[0] += 10
        active.append(name)
        yield
        active.pop()

    def candidate(name):
        assert active == [name]
        clock[0] += 0.01

    times = timing.interleave({name: lambda name=name: candidate(name) for name in "ab"}, 0, inside)
    assert [value for values in times.values() for value in values] == pytest.approx([0.01] * 10)


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
    with pytest.raises(timing.WrongResult, match=r"taylor: expected a relative error .* at \[4, 10\]"):
        class_counts.measure(4, 10, 0)


def test_a_path_served_by_another_backend_is_not_timed(monkeypatch):
    right = class_counts.api

    def elsewhere(f, u):
        with densreg.backend("torch"):
            return right(f, u)

    monkeypatch.setattr(class_counts, "api", elsewhere)
    with pytest.raises(timing.WrongResult, match=r"api: expected \[.*softmax/cpu.*got .*softmax/torch"):
        class_counts.measure(4, 10, 0)


@pytest.fixture
def _without_inductor(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))


@pytest.mark.usefixtures("_without_inductor", "fresh_dynamo")
def test_linear_heads(monkeypatch, tmp_path):
    rows = [linear_head.measure("mlp", 3, classes, 0, features=8) for classes in (20, 40)]
    rows += [linear_head.measure("none", 3, 30, None, ["head"], features=8, dtype=torch.bfloat16, bound=0.05)]
    assert rows[0]["columns"].keys() == {*linear_head.COLUMNS, "products", "weight's gradient"}
    for name in linear_head.COLUMNS:
        assert rows[0]["columns"][name].keys() >= {"seconds", "ratio", "peak_bytes", "error"}
        assert rows[0]["columns"][name]["error"] < 1e-6
    assert "seconds" not in rows[2]["columns"]["head"]
    assert rows[2]["case"]["dtype"] == "bfloat16"
    assert "| mlp | 3 | 20 | 8 |" in "\n".join(records.tables(rows[:2]))
    assert linear_head.picture(rows[:2]).startswith(b"\x89PNG")
    # The gradient of the penalty alone lost: 1 of 3 terms of the weight's.
    monkeypatch.setattr(
        densreg, "linear_density_loss", lambda h, w, b, y, x, coeff: (F.cross_entropy(F.linear(h, w, b), y),)
    )
    with pytest.raises(timing.WrongResult, match=r"head: expected an error below 1e-04, got"):
        linear_head.measure("mlp", 3, 20, 0, ["head"], features=8)
    monkeypatch.setattr(linear_head, "free_bytes", lambda device: 30_000)
    columns = linear_head.measure("none", 3, 200, 0, ["taylor"], features=8)["columns"]
    assert columns["taylor"] == {"note": "B = 3, C = 200: left out, needs about 0 GiB"}


def test_an_overflow_that_is_not_naives_fails(monkeypatch):
    right = class_counts.api

    def overflows(f, u):
        return tuple(t + f.exp().sum() * 0 for t in right(f, u))

    monkeypatch.setattr(class_counts, "api", overflows)
    with pytest.raises(timing.WrongResult, match="logits times 100"):
        class_counts.measure(4, 10, 0, papers=True)


def test_steps_are_compared_with_float64():
    model, x, y = steps.problem(steps.CASES["mlp"]._replace(batch=4))
    references = steps.references(model, x, y)
    taylor = steps.step_of("taylor", model, x, y)()
    assert steps.require("taylor", taylor, references) < 1e-5
    with pytest.raises(timing.WrongResult, match="expected gradients within"):  # the penalty counts four times there
        steps.require("interval 4", taylor, references)
    with pytest.raises(timing.WrongResult, match="expected gradients within"):
        steps.require("plain", taylor, references)
    for rival in steps.RIVALS:
        assert steps.require(rival, steps.step_of(rival, model, x, y)(), references) is None
        with pytest.raises(timing.WrongResult, match="unlike those of a plain step"):
            steps.require(rival, references[0], references)


def test_a_step_that_fails_is_not_timed_and_costs_no_other(monkeypatch):
    right = steps.step_of

    def step_of(column, *problem):
        step = right(column, *problem)
        return step if column != "naive" else lambda: [0 * g for g in step()]

    monkeypatch.setattr(steps, "step_of", step_of)
    row = steps.measure("mlp", ["plain eager", "naive", "taylor"], 0, False, base="plain eager", batch=4)
    naive, taylor = row["columns"]["naive"], row["columns"]["taylor"]
    assert naive["note"].startswith("not timed: WrongResult: naive: expected gradients within")
    assert "seconds" not in naive
    assert taylor["ratio"] > 0
    assert taylor["error"] < 1e-5
    with pytest.raises(timing.WrongResult, match="mlp, naive: not timed"):  # there is nothing to divide by
        steps.measure("mlp", ["naive", "taylor"], 0, False, base="naive", batch=4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled")
def test_a_step_without_one_change_to_its_graph(fresh_dynamo):
    problem = steps.problem(steps.CASES["mlp-784"])
    references = steps.references(*problem)
    merged = []
    for column in ("without merge_products", "objective"):
        torch._dynamo.utils.counters["densreg"].clear()
        assert steps.require(column, steps.step_of(column, *problem)(), references) < 0.02
        merged.append(torch._dynamo.utils.counters["densreg"]["products merged"])
    assert merged[0] == 0 < merged[1]
    assert all(callable(getattr(graph_passes, name)) for name in steps.PASSES)


def test_first_steps_are_timed_in_processes_of_their_own(monkeypatch):
    monkeypatch.setattr(startup, "COLUMNS", ("plain eager",))
    found = startup.measure("mlp", threads=1)["columns"]
    assert list(found) == ["plain eager, cold", "plain eager, warm"]
    assert all(0 < of["first_call"] < 60 for of in found.values())
    monkeypatch.setattr(startup, "COLUMNS", ("no such column",))
    with pytest.raises(timing.WrongResult, match="mlp, no such column, cold: expected exit status 0, got 1"):
        startup.measure("mlp")


def test_epochs_are_summed_by_blocks():
    times = {"plain": [0.1] * 8, "interval 4": [0.4, 0.1, 0.1, 0.1] * 2, "per_class": [5.0]}
    found = test_epoch.summarize_blocks(times, 10)
    assert {name: of["seconds"] for name, of in found.items()} == pytest.approx(
        {"plain": 1, "interval 4": 1.75, "per_class": 50}
    )
    assert {name: of["ratio"] for name, of in found.items()} == pytest.approx(
        {"plain": 1, "interval 4": 1.75, "per_class": 50}
    )
    assert [name for name, of in found.items() if "ratio_low" in of] == ["plain", "interval 4"]


def _rows(epoch):
    shapes = [class_counts.measure(4, c, 0, papers=True, memory=True) for c in (1000, 2000)]
    head = class_counts.measure_head(4, 10, 0, memory=True)
    return [*shapes, head, *test_growth.measure("batch", (2, 4), 0), epoch]


@pytest.mark.long
def test_report(tmp_path):
    """Of real measurements at tiny sizes: what the CSV file, the page and the pictures hold."""
    columns = ("plain", "taylor", "per_class", "objective", "input_gradient")
    epoch, step = test_epoch.measure("blockmnist", 512, columns=columns)
    assert len(step()) == 6  # the objective's gradients
    about = timing.environment() | {"failed": ["test_head[4x10]: WrongResult: so it is"]}
    report.write("a machine", [{"environment": about, "rows": _rows(epoch)}], tmp_path)
    names = {"results.csv", "README.md", "time.png", "memory.png", "bandwidth.png", "epochs.png", "growth.png"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in names if name.endswith("png"))
    (run,) = records.read(tmp_path / "results.csv")
    assert run["environment"] == about
    for row in run["rows"][:2]:
        found = row["columns"]
        timed = {"api", "taylor", "raw", "aten", "compiled", "fallback", "naive", "max_shift", "stable"}
        timed |= {"log_density", "density_cross_entropy", "logsumexp"}
        assert found.keys() == timed | {"floor", "copy", "clone"}
        assert all({"seconds", "ratio", "ratio_high", "base", "peak_bytes"} <= of.keys() for of in found.values())
        assert [name for name, of in found.items() if "note" in of] == ["naive"]
        assert found["raw"]["bytes"] == pytest.approx(5 * 4 * row["case"]["B"] * row["case"]["C"], rel=1e-3)
        assert found["api"]["peak_bytes"] < found["taylor"]["peak_bytes"]
    assert run["rows"][-1]["case"]["source"].startswith("noise")
    assert set(run["rows"][-1]["columns"]) == set(columns)
    assert run["rows"][-1]["columns"]["taylor"]["images"] == 512
    text = (tmp_path / "README.md").read_text()
    for expected in (
        about["cpu"],
        about["torch"],
        "Failed, not timed:** test_head",
        "noise of its shape",
        "naive: not finite",
        "| time, batch 2 to 4 |",
    ):
        assert expected in text
    assert "| per_class |" in text.split("## Epochs")[1]


def test_csv_keeps_what_was_measured(tmp_path):
    column = {"seconds": 0.123456, "ratio": 1.0, "base": "b, the other", "bytes": 8192.0, "note": 'so "it" is'}
    row = {"suite": "epoch", "case": {"B": 3, "p": 1.5, "source": "noise: 2 of 3, a=b"}, "columns": {"a": column}}
    runs = [
        {"environment": {"torch": "2", "gpu": None}, "rows": [row, row | {"case": {"B": 4}}]},
        {"environment": {}, "rows": []},
    ]
    records.write_csv(tmp_path / "x.csv", runs)
    read = records.read(tmp_path / "x.csv")
    assert read[0]["rows"][0]["columns"]["a"] == column | {"seconds": 0.12346}
    assert [each["case"] for each in read[0]["rows"]] == [row["case"], {"B": 4}]
    assert [each["environment"] for each in read] == [{"torch": "2", "gpu": None}, {}]
    records.write_json(tmp_path / "x.json", [row], {"torch": "2"})
    assert records.read(tmp_path / "x.json") == [{"environment": {"torch": "2"}, "rows": [row]}]


def test_tables():
    columns = {
        "api": {"seconds": 2e-4, "ratio": 1.0, "base": "api"},
        "raw": {"seconds": 1e-3, "ratio": 1.0, "base": "raw", "bytes": 4e6},
        "taylor": {"seconds": 3e-4, "ratio": 1.5, "base": "api"},
    }
    rows = [{"suite": "logits", "case": {"B": 4, "C": c}, "columns": columns} for c in (10, 1000)]
    del rows[1]["columns"]
    rows[1]["columns"] = {"api": columns["api"]}
    text = "\n".join(records.tables(rows))
    assert "| B | C | api | raw | taylor |\n| --- | --- | --- | --- | --- |\n| 4 | 10 | 200 | 1,000 | 300 |" in text
    assert "| B | C | taylor / api |\n| --- | --- | --- |\n| 4 | 10 | 1.50 |\n| 4 | 1000 | - |" in text
    assert "| B | C | raw |\n| --- | --- | --- |\n| 4 | 10 | 4.0 |" in text  # GB/s
    assert "peak" not in text.lower()  # which nobody measured


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*/results.csv")), ids=lambda path: path.parent.name)
def test_committed_results(path):
    """Each names its machine, versions, commit and date; pages that are made of them are what is made of them now."""
    if "run" not in path.read_text().split("suite")[0]:
        return  # a table of the paper
    measured = records.read(path)
    page = path.with_name("README.md").read_text()
    for run in measured:
        assert run["environment"].keys() >= {"torch", "cpu", "date"}
        assert run["rows"]
    if "Made from `results.csv`" in page:
        assert page == report.page(path.parent.name, measured)


def test_results_are_small():
    assert sum(path.stat().st_size for path in RESULTS.rglob("*") if path.is_file()) < 400_000


@pytest.mark.parametrize("name", [name for name in command.COMMANDS if name != "triton-aot"])
def test_every_command_says_what_it_does(name, capsys):
    with pytest.raises(SystemExit, match="0"):
        command.main([name, "--help"])
    said = capsys.readouterr().out
    assert f"python -m benchmarks {name}" in said
    for option in importlib.import_module(f"benchmarks.{name.replace('-', '_')}").SHARED:
        assert f"--{option}" in said


def test_a_wrong_result_is_one_line_and_status_1(monkeypatch, capsys):
    def wrong(options):
        raise timing.WrongResult("api: expected 1, got 2")

    monkeypatch.setattr(steps, "run", wrong)
    threads = torch.get_num_threads()
    try:
        assert command.main(["steps", "--models", "mlp", "--threads", "2"]) == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert capsys.readouterr().err.splitlines()[-1] == "wrong, and not timed: api: expected 1, got 2"


@pytest.mark.slow
def test_suites_run_and_failures_are_named(monkeypatch):
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")  # in the suites' process: the columns are not what is tested
    # Of the second only what is on a device can fail there.
    options = ["--profile=tiny", "--seconds=0.01", "-k", "logits and 4x10 or batch", "--device=nowhere"]
    rows, failed = report.measure(options, report.SUITES[:2])
    assert [row["suite"] for row in rows] == ["logits"]
    assert len(failed) == 1
    assert "nowhere" in failed[0]


def test_what_is_faster_is_listed():
    def columns(base, **ratios):
        return {name: {"ratio": value, "base": base} for name, value in ratios.items()}

    logits = columns("api", api=1.0, taylor=0.8, naive=1.2, floor=0.2) | columns("raw", raw=1.0, compiled=0.5, aten=2.0)
    epoch = columns("plain", plain=1.0, taylor=1.5, objective=2.0)
    rows = [
        {"suite": "logits", "case": {"B": 4, "C": 10}, "columns": logits},
        {"suite": "epoch", "case": {"data": "noise", "model": "mlp"}, "columns": epoch},
    ]
    assert report.slower(rows) == [
        "logits, B 4, C 10: taylor takes 0.80 of api",
        "logits, B 4, C 10: compiled takes 0.50 of raw",
        "epoch, noise: taylor takes 0.75 of the objective",
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
    assert command.main(["compare", "--data", str(file)]) == status
    said = capsys.readouterr()
    assert ("worsened: " in said.out) == (status == 1)
    assert ("not measured now: plain/objective, mlp" in said.err) == (status == 2)


def test_compare_writes_what_it_reads(tmp_path, monkeypatch, capsys):
    file = tmp_path / "machine" / "ratios.json"
    monkeypatch.setattr(compare, "measure_repeatedly", lambda *args: COMMITTED)
    arguments = ["compare", "--write", "--data", str(file)]
    assert command.main(arguments) == 0
    about = timing.environment() | {"gpu": None}
    assert compare.committed(about, tmp_path) == file
    with pytest.raises(compare.CompareError, match="no committed ratios of a machine like this"):
        compare.committed(about | {"instruction_set": "another"}, tmp_path)
    monkeypatch.setattr(compare, "measure_repeatedly", lambda *args: {"a/b": [1.0, 5.0, 1.0, 5.0]})
    assert command.main(arguments) == 1
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


ROW = {"suite": "kernels", "case": {"C": 1}, "columns": {"cuda": {"seconds": 3}, "quack": {"note": "not installed"}}}


def fails() -> dict:
    raise ValueError("no such kernel")


def test_gpu_rows_that_are_there_are_not_measured_and_a_failure_costs_one(tmp_path, monkeypatch, capsys):
    work = [("a", fails), ("b", fails), ("c", lambda: ROW)]
    monkeypatch.setattr(gpu, "STAGES", {"small": gpu.Stage(lambda options: iter(work), 9)})
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps({"stages": {"small": {"rows": [{"key": "a", "code": 0}]}}}))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    gpu._work("small", types.SimpleNamespace(json=file))
    assert not torch.backends.cudnn.allow_tf32
    begun_b, b, begun_c, c = map(json.loads, capsys.readouterr().out.splitlines())
    assert (begun_b, begun_c) == ({"begun": "b"}, {"begun": "c"})
    assert b["row"] == {"key": "b", "code": 1, **gpu._failed_row("b", {"note": "failed: ValueError: no such kernel"})}
    assert c["row"] == {"key": "c", "code": 0, **ROW}


def be_python(tmp_path, monkeypatch, script: str) -> None:
    """Let this script be what is started as the interpreter."""
    file = tmp_path / "python"
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(file))


def run_stage(tmp_path, monkeypatch, script: str, seconds: float, of_row: float = 50) -> tuple[str, list[dict]]:
    """A stage whose worker is this script."""
    be_python(tmp_path, monkeypatch, script)
    monkeypatch.setattr(gpu, "STAGES", {"small": gpu.Stage(None, 1, of_row)})
    rows: list[dict] = []
    options = types.SimpleNamespace(json=tmp_path / "gpu.json", dry_run=False, data_dir=None)
    return gpu._run_stage("small", options, seconds, rows.append), rows


def dead(ended: str) -> dict:
    return {"key": "b", "code": 1, **gpu._failed_row("b", {"note": f"failed: {ended}"})}


HANGS = dead("out of time")


@pytest.mark.parametrize(
    ("script", "seconds", "ended", "rows"),
    [
        ("""echo '{"row": {"key": "a"}}'""", 30, "whole", [{"key": "a"}]),
        ("""echo '{"begun": "b"}'; exit 3""", 30, "exit code 3", [dead("exit code 3")]),
        ("""echo '{"begun": "b"}'; kill -9 $$""", 30, "exit code -9", [dead("exit code -9")]),
        ("""echo '{"begun": "b"}'; sleep 100""", 2, "out of time", [HANGS]),
        ("""echo '{"begun": "b"}'; sleep 100""", 0.9, "out of time", []),  # less than the stage takes
        ("""echo '{"row": {"key": "a"}}'; echo '{"begun": "b"}'; sleep 100""", 2, "out of time", [{"key": "a"}]),
    ],
)
def test_gpu_stage_that_dies_or_hangs(script, seconds, ended, rows, tmp_path, monkeypatch):
    assert run_stage(tmp_path, monkeypatch, script, seconds) == (ended, rows)


def test_gpu_row_that_hangs(tmp_path, monkeypatch):
    script = """echo '{"begun": "a"}'; echo '{"row": {"key": "a"}}'; echo '{"begun": "b"}'; sleep 100"""
    ended, rows = run_stage(tmp_path, monkeypatch, script, 60, of_row=2)
    assert ended == "no end after 2 s"
    assert rows == [{"key": "a"}, dead("no end after 2 s")]


def assert_ended(child: Path) -> None:
    """The process whose number this file has."""
    time.sleep(0.2)
    status = Path(f"/proc/{int(child.read_text())}/status")
    assert not status.exists() or "zombie" in status.read_text()


def test_gpu_stage_takes_what_it_started_with_it(tmp_path, monkeypatch):
    child = tmp_path / "child"
    run_stage(tmp_path, monkeypatch, f"sleep 100 & echo $! > {child}; wait", 4)
    assert_ended(child)


def test_gpu_warmer_compiles(fresh_dynamo, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)  # and put back
    gpu.warm("mlp", "plain", dry_run=True)
    assert _torch.compiled_graphs() == 1


@pytest.mark.parametrize("interrupted", [False, True])
def test_gpu_warmers_end(interrupted, tmp_path, monkeypatch):
    """One that takes too long is ended, with all that it has started."""
    child = tmp_path / "child"
    be_python(tmp_path, monkeypatch, f"sleep 600 & echo $! > {child}; wait")
    monkeypatch.setattr(gpu, "STEPS", {"mlp": 8})
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt) if interrupted else contextlib.nullcontext(), gpu._warmers(1.0):
        while not child.exists() or not child.read_text():
            time.sleep(0.05)
        if interrupted:
            raise KeyboardInterrupt
    assert time.monotonic() - begun < 60
    assert_ended(child)


def test_gpu_calls_go_on_where_the_last_one_stopped(tmp_path, monkeypatch, capsys):
    calls = []

    def run_stage(name, options, seconds, keep):
        calls.append((name, seconds))
        if name == "tests":
            keep({"key": "a", "code": 1, **ROW})
            return "whole"
        keep({"key": str(len(calls)), "code": 0, **ROW})
        return "whole" if len(calls) > 2 else "out of time"

    monkeypatch.setattr(gpu, "_run_stage", run_stage)
    file = tmp_path / "gpu.json"
    arguments = ["gpu", "--dry-run", "--json", str(file), "--stage", "tests", "small", "--minutes", "50"]
    assert command.main(arguments) == 1
    # Every stage has its turn, 1.5 times what it is expected to take; then what is unfinished has the rest.
    assert [name for name, _ in calls] == ["tests", "small", "small"]
    assert [seconds for _, seconds in calls] == [
        pytest.approx(270, abs=5),
        pytest.approx(135, abs=5),
        pytest.approx(3000, abs=60),
    ]
    stages = json.loads(file.read_text())["stages"]
    assert {name: stage["ended"] for name, stage in stages.items()} == {"tests": "failed", "small": "whole"}
    assert command.main(arguments) == 1
    assert len(calls) == 3
    command.main([*arguments, "--again"])
    assert len(calls) == 5


def test_gpu_stage_goes_on_after_what_killed_it(tmp_path, monkeypatch):
    """In another process; but not at once where the one before has not come to a row."""
    ends = iter(["exit code -6", "no end after 60 s", "exit code 1"])
    ended = []

    def run_stage(name, options, seconds, keep):
        ended.append(next(ends, "whole"))
        if ended[-1] != "exit code 1":
            keep({"key": str(len(ended)), "code": int(ended[-1] != "whole"), **ROW})
        return ended[-1]

    monkeypatch.setattr(gpu, "_run_stage", run_stage)
    file = tmp_path / "gpu.json"
    assert command.main(["gpu", "--dry-run", "--json", str(file), "--stage", "long_rows"]) == 1
    assert ended == ["exit code -6", "no end after 60 s", "exit code 1", "whole"]  # the last in the second turn
    (stage,) = json.loads(file.read_text())["stages"].values()
    assert stage["ended"] == "failed"
    assert [row["code"] for row in stage["rows"]] == [1, 1, 0]


SIZES = [(torch.float32, 40), (torch.bfloat16, 41), (torch.float16, 40)]


@pytest.mark.parametrize("name", gpu_kernels.OPERATORS)
def test_gpu_kernels_are_compared(name):
    """By plain torch: as wrong as it is, and the rows that are not finite are those of float64."""
    columns = gpu_kernels.right_row(name, "torch", SIZES, 0, 1)["columns"]
    assert list(columns) == ["40 float32", "41 bfloat16", "40 float16"]
    assert all(column.keys() == {"error"} for column in columns.values()), columns


def _elsewhere(outputs, calls):
    return tuple(t.roll(1, 0) for t in outputs)


def _not_the_same(outputs, calls):
    return tuple(t * (1 + 2**-20 * (calls > 3)) for t in outputs)


@pytest.mark.parametrize(
    ("change", "note"),
    [
        (_elsewhere, "other rows are finite than in float64"),
        (lambda outputs, calls: tuple(t * 1.001 for t in outputs), "expected a relative error of at most 2.0e-06"),
        (_not_the_same, "beside another stream: other bits"),
    ],
)
def test_gpu_kernel_that_is_wrong(change, note, monkeypatch):
    operator, calls = gpu_kernels.OPERATORS["softmax"], []

    def wrong(inputs):
        calls.append(1)
        return change(operator.ours(inputs), len(calls))

    monkeypatch.setitem(gpu_kernels.OPERATORS, "softmax", operator._replace(ours=wrong))
    (column,) = gpu_kernels.right_row("softmax", "torch", SIZES[:1], 0, 1)["columns"].values()
    assert note in column["note"]
    assert column["note"].startswith("failed: WrongResult")


def test_gpu_kernel_that_was_wrong_is_not_timed(tmp_path):
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps({"stages": {"long_rows": {"rows": [{"key": "pnorm by torch", "code": 1}]}}}))
    options = types.SimpleNamespace(json=file, dry_run=True)
    ours = {"torch": ("torch", contextlib.nullcontext())}
    short, long = (
        gpu_kernels._timed("kernels", "pnorm", 2, classes, torch.float32, options, ours)["columns"]
        for classes in (gpu_kernels.WHOLE, gpu_kernels.WHOLE + 1)
    )
    assert short["torch"]["seconds"] > 0
    assert short["torch"]["error"] < 2e-6
    assert long["torch"] == {"note": "not timed: long_rows found it wrong"}


@pytest.mark.parametrize(("model", "expected"), [("resnet20", 2.0), ("mlp", 7 / 3), ("vit_b_16", 2.04)])
def test_products_of_a_penalized_step(model, expected):
    """Twice a plain step's, and more where the first layer, of which a plain step needs no gradient in x, is large."""
    floors = steps.floors(steps.CASES[model])
    assert floors["operations"] == pytest.approx(expected, abs=0.01)
    assert floors["bytes"] >= 2
