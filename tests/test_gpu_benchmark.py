"""benchmarks/gpu.py: what it keeps, continues and refuses, and that all of it runs on a CPU with small sizes."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch):
    """The script as a module; afterwards the modules beside it, whose names are common words, are forgotten."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu  # pyright: ignore

    yield gpu
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(BENCHMARKS)):
            del sys.modules[name]


def results_of(gpu, folder, **cases):
    """The file of a part with these cases."""
    return gpu.Results(gpu.Part("part", lambda _: cases), gpu.Setting(torch.device("cpu"), dry=True), folder)


def stored(results):
    return json.loads(results.path.read_text(encoding="utf-8"))


def test_a_failed_case_is_kept_and_measured_again(gpu, tmp_path):
    broken, count = [True], [0]

    def sometimes():
        if broken:
            raise ArithmeticError("not today")
        return 2

    def counted():
        count[0] += 1
        return 1

    cases = {"counted": counted, "sometimes": sometimes}
    gpu.measure(results_of(gpu, tmp_path, **cases), seconds=60)
    found = stored(results_of(gpu, tmp_path, **cases))["rows"]
    assert not found["complete"]
    assert found["cases"]["counted"]["value"] == 1
    assert "not today" in found["cases"]["sometimes"]["error"]
    broken.clear()
    gpu.measure(results_of(gpu, tmp_path, **cases), seconds=60)
    found = stored(results_of(gpu, tmp_path, **cases))["rows"]
    assert found["complete"]
    assert found["cases"]["sometimes"]["value"] == 2
    assert count == [1]
    assert not results_of(gpu, tmp_path, **cases).missing()


def test_a_case_that_cannot_run_says_why_and_too_little_memory_is_a_result(gpu, tmp_path):
    def not_here():
        raise gpu.NotRun("no second device")

    def too_large():
        raise torch.OutOfMemoryError("tried to allocate much")

    results = results_of(gpu, tmp_path, here=not_here, large=too_large)
    gpu.measure(results, seconds=60)
    found = stored(results)["rows"]
    assert found["complete"]
    assert found["cases"]["here"]["not run"] == "no second device"
    assert found["cases"]["large"]["out of memory"] == "tried to allocate much"


def test_no_case_is_begun_after_the_time_is_over(gpu, tmp_path):
    results = results_of(gpu, tmp_path, first=lambda: 1)
    gpu.measure(results, seconds=-1)
    assert stored(results)["rows"] == {"dry": True, "complete": False, "cases": {}}


def test_results_of_another_machine_are_not_continued(gpu, tmp_path):
    gpu.measure(results_of(gpu, tmp_path, first=lambda: 1), seconds=60)
    path = tmp_path / "part.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    found["machine"]["gpu"] = "another card"
    path.write_text(json.dumps(found), encoding="utf-8")
    with pytest.raises(SystemExit, match=r"another machine.*--again"):
        results_of(gpu, tmp_path, first=lambda: 1)


def test_the_gaps_between_kernels(gpu):
    from device import between  # pyright: ignore

    events = [(10.0, 20.0, "a"), (12.0, 14.0, "within"), (25.0, 30.0, "b"), (30.0, 40.0, "c"), (60.0, 110.0, "d")]
    found = between(reversed(events))
    assert (found["kernels"], found["span_us"], found["idle_share"]) == (5, 100.0, 0.25)
    assert found["longest"] == [
        {"us": 20.0, "after": "c", "before": "d"},
        {"us": 5.0, "after": "a", "before": "b"},
    ]
    with pytest.raises(ValueError, match="no kernel"):
        between([])


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_gpu_only_a_dry_run_begins(gpu):
    with pytest.raises(SystemExit, match="--dry"):
        gpu.main(["--minutes", "1"])


def test_all_parts_have_cases_of_a_dry_run(gpu):
    names = [part.name for part in gpu.PARTS]
    assert names[:4] == ["tests", "solves", "memory", "steps"]
    assert len(set(names)) == len(names)
    for part in gpu.PARTS:
        assert part.cases(gpu.Setting(torch.device("cpu"), dry=True)), part.name
        assert 0 < part.share <= 1
    assert "devices" in names
    if torch.cuda.device_count() < 2:
        assert gpu.PARTS[names.index("devices")].cases(gpu.Setting(torch.device("cuda"))) == {}


def dry(gpu, folder, *choices):
    """What a dry run of some parts wrote; each part ran in a process of its own."""
    assert gpu.main(["--dry", "--minutes", "30", "--out", str(folder), *choices]) == 0
    return {path.stem: json.loads(path.read_text(encoding="utf-8"))["rows"] for path in folder.glob("*.json")}


def test_a_part_of_a_dry_run(gpu, tmp_path, monkeypatch):
    found = dry(gpu, tmp_path, "--only", "attention")
    assert found["attention"]["complete"]
    assert found["attention"]["dry"]
    assert found["attention"]["cases"]["small"]["value"]["difference"] < 1e-5
    monkeypatch.setattr(gpu, "ends", None)  # nothing is measured twice
    assert dry(gpu, tmp_path, "--only", "attention") == found


def test_a_part_that_takes_too_long_is_ended_and_keeps_what_it_has(gpu, tmp_path, monkeypatch, capsys):
    def ends(command, seconds):
        results_of(gpu, tmp_path, first=lambda: 1).write()
        return False

    monkeypatch.setattr(gpu, "ends", ends)
    monkeypatch.setattr(gpu, "PARTS", (gpu.Part("part", lambda _: {"first": lambda: 1}),))
    assert gpu.main(["--dry", "--out", str(tmp_path), "--minutes", "1"]) == 0
    assert "ended after 60 seconds" in capsys.readouterr().out
    assert gpu.main(["--dry", "--out", str(tmp_path), "--minutes", "0.1"]) == 0
    assert "not begun" in capsys.readouterr().out


def test_a_process_that_takes_too_long_is_killed_with_those_that_it_started(gpu, tmp_path):
    mark = tmp_path / "mark"
    assert gpu.ends(["sh", "-c", "true"], 60)
    assert not gpu.ends(["sh", "-c", f"(sleep 1; touch {mark}) & wait"], 0.3)
    time.sleep(1.5)
    assert not mark.exists()


@pytest.mark.slow
def test_a_dry_run_measures_everything(gpu, tmp_path):
    found = dry(gpu, tmp_path)
    assert len(found) == 10
    assert all(rows["complete"] for rows in found.values())
    sizes = {name: case["value"]["bytes"] for name, case in found["memory"]["cases"].items()}
    assert sizes["tiny, unrolled, depth 4"] > 1.3 * sizes["tiny, unrolled, depth 2"]
    assert sizes["tiny, equilibrium, depth 4"] < 1.1 * sizes["tiny, equilibrium, depth 2"]
