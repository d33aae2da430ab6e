"""The report: what is drawn and said about runs that are finished, unfinished, empty, damaged or hostile."""

from __future__ import annotations

import base64
import errno
import itertools
import json
import math
import os
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from equilibria.commands import report
from equilibria.errors import UsageError
from equilibria.lm.report import curve as curve_module
from equilibria.lm.report import figures, formats, page, summary
from equilibria.lm.report.axes import Figure, spell
from equilibria.lm.report.comparison import differences
from equilibria.lm.report.record import read
from equilibria.lm.runs import events as log
from equilibria.lm.runs.files import ForeignFileError
from slow_cases import some_slow

NAMES = ["loss", "evaluations", "residual", "converged", "spectral_radius", "memory"]


def stage(name: str, *, rtol: float) -> dict[str, Any]:
    stop = {"kind": "Stop", "rtol": rtol, "atol": rtol, "max_evals": 30, "best": True}
    solver = {"kind": "Anderson", "window": 6}
    method = {"kind": "Method", "solver": solver, "stop": stop}
    return {"kind": "Stage", "name": name, "steps": 50, "method": method, "eval_stop": None}


def experiment(**changes: Any) -> dict[str, Any]:
    return {
        "kind": "Experiment",
        "name": "small",
        "corpus": {"kind": "PythonDocs"},
        "model": {"kind": "LanguageConfig", "cell": {"kind": "TransformerConfig", "width": 32}, "tied": True},
        "stages": [stage("shallow", rtol=0.0), stage("implicit", rtol=1e-2)],
        "training": {
            "kind": "Training",
            "batches": {"kind": "Batches", "batch_size": 8},
            "optimisation": {"kind": "Optimisation", "betas": [0.9, 0.99], "clip": None},
        },
        **changes,
    }


def solve(evals: int, converged: float = 1.0) -> dict[str, float]:
    return {"evals": evals, "residual": 8e-3, "converged": converged, "steps": evals - 1.0}


def step(number: int) -> dict[str, Any]:
    implicit, loss = number > 50, 2.0 + 1 / number
    return {
        "event": "step",
        "step": number,
        "stage": "implicit" if implicit else "shallow",
        "loss": loss,
        "bits": loss / math.log(2),
        "tokens": 512,
        "seconds": 0.1 * number,
        "tokens_per_second": 5000.0,
        "forward": solve(14) if implicit else solve(4, converged=0.0),
        "backward": solve(12, converged=0.9) if implicit else None,
    }


def valid(number: int, nats: float | None, *, best: bool = True) -> dict[str, Any]:
    name = "implicit" if number > 50 else "shallow"
    scores = {"nats": nats, "bits": nats and nats / math.log(2), "perplexity": nats and math.exp(nats), "best": best}
    return {"event": "valid", "step": number, "stage": name, "tokens": 1000, "forward": solve(15), **scores}


def events() -> list[dict[str, Any]]:
    orders = [{"label": f"Witten–Bell order {order}", "bits": 4.0 - 0.5 * order} for order in (1, 2, 3, 4)]
    unrolled = [{"label": "unrolled", "depth": depth, "peak_bytes": depth << 20} for depth in (8, 16, 32, 64)]
    equilibrium = {"label": "equilibrium", "depth": None, "peak_bytes": 5 << 20, "evals": 14}
    return [
        {"event": "baseline", "step": 0, "rows": orders},
        {"event": "stage", "step": 0, "stage": "shallow", "from": None},
        *map(step, range(1, 51)),
        valid(50, 1.2),
        {"event": "stage", "step": 50, "stage": "implicit", "from": "shallow"},
        *map(step, range(51, 101)),
        valid(75, 1.5),
        valid(100, 1.4),
        {"event": "spectral_radius", "step": 75, "mean": 0.8, "max": 0.95},
        {"event": "spectral_radius", "step": 100, "mean": 0.85, "max": 1.02},
        {"event": "memory", "step": 100, "rows": [equilibrium, *unrolled]},
        {"event": "done", "step": 100, "seconds": 10.0},
    ]


def write(path: Path, lines: list[dict[str, Any]], *, tail: str = "", **changes: Any) -> Path:
    path.mkdir(parents=True)
    described = {"format": 3, **experiment(**changes)}
    (path / "experiment.json").write_text(json.dumps(described), encoding="utf-8")
    text = "".join(json.dumps(line) + "\n" for line in lines) + tail
    (path / "metrics.jsonl").write_text(text, encoding="utf-8")
    return path


def page_of(run: Path) -> str:
    return report.write(read(run)).read_text(encoding="utf-8")


ALL = {name: (name, caption, paint) for name, caption, paint in figures.FIGURES}
assert list(ALL) == NAMES


@pytest.fixture(autouse=True)
def draw(monkeypatch):
    """A function that chooses the figures; the tests of words choose none, since drawing takes most of the time."""

    def choose(*names: str) -> None:
        monkeypatch.setattr(figures, "FIGURES", tuple(ALL[name] for name in names))

    choose()
    return choose


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run with a report, in which every figure is drawn."""
    run = write(tmp_path_factory.mktemp("finished") / "run", events())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "FIGURES", tuple(ALL.values()))
        page_of(run)
    return run


def test_a_finished_run_gets_every_figure_inside_the_page_and_beside_it(finished):
    run, text = finished, (finished / "report" / "index.html").read_text(encoding="utf-8")
    pictures = [base64.b64decode(data) for data in re.findall(r"data:image/png;base64,([^\"]+)", text)]
    assert re.findall(r'<figure id="(\w+)">', text) == NAMES
    assert pictures == [(run / "report" / f"{name}.png").read_bytes() for name in NAMES]
    assert all(picture.startswith(b"\x89PNG") for picture in pictures)
    assert "Finished after 100 steps." in text


def test_the_page_needs_nothing_from_elsewhere(finished):
    text = (finished / "report" / "index.html").read_text(encoding="utf-8")
    assert not re.findall(r"<(?:script|link|iframe)|https?://|(?:src|href)=\"(?!data:)", text)


def test_the_summary_says_what_was_measured(tmp_path):
    rows = {row.label: row for row in summary.rows(read(write(tmp_path / "run", events())))}
    assert rows["Validation"].value == "2.020 bits per character"  # the best of the last stage, not of the first
    assert (
        rows["Baseline"].beside.replace(summary.NBSP, " ") == "order 1 3.50, order 2 3.00, order 3 2.50, order 4 2.00"
    )
    assert rows["Forward solve"].value == "14.0 evaluations"
    assert "90.0 % of samples converged" in rows["Backward solve"].beside
    assert rows["Peak memory"].value == "5.0 MiB"
    assert rows["Peak memory"].beside.replace(summary.NBSP, " ").endswith("64 layers 64.0 MiB")


def test_a_run_without_the_newer_settings_shows_those_it_has(tmp_path):
    old = {"batch_size": 8, "segment_length": 64, "max_segments": None}
    lines = [{**event, "setting": old} if event["event"] == "valid" else event for event in events()]
    rows = {row.label: row for row in summary.rows(read(write(tmp_path / "run", lines)))}
    assert rows["Validation"].beside == "step 100, the best; segments of 64, 8 streams"


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"memory_length": 64, "overlap": 0}, "memory 64, segments of 110"),
        ({"memory_length": 0, "overlap": 0}, "no memory, segments of 110"),
        ({"memory_length": None, "overlap": 0}, "segments of 110"),  # a memory, which has no length
        ({"memory_length": None, "overlap": 58}, "segments of 110 (58 repeat the one before)"),
        ({"memory_length": 0, "overlap": 58}, "no memory, segments of 110 (58 repeat the one before)"),
        ({"memory_length": 64}, "memory 64, segments of 110"),  # of an older run
    ],
)
def test_memory_and_overlap_are_told_apart(setting, words):
    assert formats.conditions({"setting": {**setting, "segment_length": 110}}) == words


@pytest.mark.parametrize(
    ("corpus", "beside"),
    [
        ({"kind": "Copying"}, "of those that the task asks for; guessing gets 12.5 %"),
        ({"kind": "PrefixSums"}, "of those that the task asks for; guessing gets 50.0 %"),
        ({"kind": "MyOwn"}, "of those that the task asks for"),
    ],
)
def test_right_answers_stand_beside_a_loss_that_says_little(tmp_path, corpus, beside):
    lines = [*events(), {**valid(100, 1.0), "accuracy": 0.99}]
    rows = summary.rows(read(write(tmp_path / "run", lines, corpus=corpus)))
    assert [(row.value, row.beside) for row in rows if row.label == "Right answers"] == [("99.0 %", beside)]


def row_of(run: Path, label: str) -> summary.Row:
    (row,) = [row for row in summary.rows(read(run)) if row.label == label]
    return row


def test_the_newest_spectral_radius_has_a_row(tmp_path):
    row = row_of(write(tmp_path / "run", events()), "Spectral radius")
    assert (row.value, row.beside) == ("1.02", "of ∂f/∂z at the equilibrium after step 100: the largest; mean 0.85")
    numbers = summary.data(read(tmp_path / "run"))
    assert numbers["spectral_radius"] == {"step": 100, "mean": 0.85, "max": 1.02}
    without = [event for event in events() if event["event"] != "spectral_radius"]
    run = write(tmp_path / "other", without)
    assert "Spectral radius" not in [row.label for row in summary.rows(read(run))]
    assert summary.data(read(run))["spectral_radius"] is None


def test_the_speed_is_all_tokens_over_the_time_of_their_steps(tmp_path):
    """A slow first step and a fast stage: 100 tokens in 1 s, 900 in 1 s, 1000 in 0.5 s. The mean rate says 1000."""
    rates = [(1, "shallow", 1.0, 100.0), (10, "shallow", 1.0, 900.0), (20, "implicit", 0.5, 2000.0)]
    lines = [
        step(number)
        | {"stage": name, "step_seconds": seconds, "tokens_per_second": rate, "tokens": 100, "seconds": 7.0}
        for number, name, seconds, rate in rates
    ]
    run = write(tmp_path / "run", lines)
    assert read(run).tokens_per_second == 800.0
    row = row_of(run, "Time")
    assert (row.value, row.beside) == (
        "7 s",
        "20 steps at 800 tokens/s, and the validations, checkpoints and measurements between them",
    )
    for line in lines:  # as an older run wrote it: the steps in between have the tokens of the last one
        del line["step_seconds"]
    assert read(write(tmp_path / "older", lines)).tokens_per_second == pytest.approx(800.0)
    for line in lines:
        line["tokens_per_second"] = None
    run = write(tmp_path / "none", lines)
    assert read(run).tokens_per_second is None
    assert row_of(run, "Time").beside.startswith("20 steps, and the validations")


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({}, "A deep equilibrium model, in"),
        (
            {"explicit": {"depth": 12, "tied": True}},
            "An explicit network of 12 layers with the weights of one cell, in",
        ),
        ({"explicit": {"depth": 1, "tied": False}}, "An explicit network of 1 layer with weights of their own, in"),
        ({"kind": "RecurrentConfig", "network": "lstm", "hidden": 57}, "A recurrent network (LSTM) of 57 channels, in"),
        (
            {"kind": "ConvolutionalConfig", "levels": 8, "channels": 10},
            "A convolutional network (TCN) of 8 blocks and 10 channels, in",
        ),
    ],
)
def test_the_page_says_what_kind_of_network_it_is(tmp_path, model, words):
    assert words in page_of(write(tmp_path / "run", events(), model=model))


def test_parameters_are_counted_in_the_header_of_the_weights(tmp_path):
    torch, safetensors = pytest.importorskip("torch"), pytest.importorskip("safetensors.torch")
    run = write(tmp_path / "run", events())
    folder = run / "checkpoints" / "step-00000100"
    folder.mkdir(parents=True)
    safetensors.save_file({"a": torch.zeros(3, 4), "b": torch.zeros(5)}, folder / "model.safetensors")
    assert summary.rows(read(run))[0] == summary.Row("Parameters", "17")


def test_an_unfinished_run_says_so_and_leaves_out_what_is_not_there(tmp_path, draw):
    draw(*NAMES)
    text = page_of(write(tmp_path / "run", events()[:20], tail='{"event": "step", "st'))
    assert "Unfinished: 18 of 100 steps so far." in text
    assert re.findall(r'<figure id="(\w+)">', text) == ["loss", "evaluations", "residual"]


def test_a_run_that_has_written_nothing_yet_still_gets_a_page(tmp_path, draw):
    draw(*NAMES)
    run = write(tmp_path / "run", [])
    assert "Unfinished: 0 of 100 steps so far." in page_of(run)
    (run / "metrics.jsonl").unlink()
    assert "Settings" in page_of(run)


def test_a_stopped_run_says_where(tmp_path):
    lines = [*events()[:20], {"event": "stopped", "step": 19}]
    assert "Stopped at step 19" in page_of(write(tmp_path / "run", lines))


@pytest.mark.parametrize(
    "corpus", [{"kind": "PennTreebank"}, {"kind": "Copying"}, {"kind": "TextFolder", "unit": "word"}]
)
def test_every_unit_has_its_own_measure(tmp_path, draw, corpus):
    draw("loss")  # no other figure knows the unit
    record = read(write(tmp_path / "run", events(), corpus=corpus))
    value = next(row.value for row in summary.rows(record) if row.label == "Validation")
    words = {"Copying": "1.400 nats per symbol"}.get(corpus["kind"], "4.055 perplexity per word")
    assert value == words
    assert [drawing.name for drawing in figures.draw(record)] == ["loss"]


def test_everything_from_files_is_escaped(tmp_path):
    evil = "<script>alert('x')</script>"
    lines = [{**event, "stage": evil} if "stage" in event else event for event in events()]
    run = write(tmp_path / evil.replace("/", "_"), lines, name=evil, corpus={"kind": evil, "root": evil})
    report.write_sample(run, prompt=evil, text=evil)
    assert "<script" not in page_of(run)
    assert "&lt;script&gt;" in page_of(run)


def test_the_sample_is_on_the_page(tmp_path):
    run = write(tmp_path / "run", events())
    report.write_sample(run, prompt="The ", text="value of é ∂ 中")
    assert "<b>The </b>value of é ∂ 中" in page_of(run)


def test_a_damaged_sample_is_left_out(tmp_path):
    run = write(tmp_path / "run", events())
    report.write_sample(run, prompt="The ", text="value")
    (run / "report" / "sample.json").write_text("[1]")
    assert "A sample" not in page_of(run)


def test_numbers_that_are_not_finite_do_not_stop_the_report(tmp_path, draw):
    draw("loss")
    lines = [{**event, "loss": math.nan, "bits": math.nan} if event.get("step") == 7 else event for event in events()]
    lines.append(valid(100, math.nan, best=False))
    run = write(tmp_path / "run", lines)
    assert "Finished" in page_of(run)
    assert summary.rows(read(run))[0].value == "2.020 bits per character"


def test_nulls_do_not_stop_the_report(tmp_path, draw):
    """What metrics.jsonl says of numbers that are not finite."""
    null = {"residual": None}
    lines = [*events(), {"event": "spectral_radius", "step": 100, "mean": None, "max": None}]
    for event in lines:
        if event.get("step") in (7, 60) and event["event"] == "step":
            event |= {"loss": None, "bits": None, "forward": solve(9) | null, "backward": solve(9) | null}
    lines.append(valid(100, None, best=False) | {"forward": solve(15) | null})
    for corpus, names in (("PythonDocs", NAMES), ("PennTreebank", ["loss"]), ("Copying", ["loss"])):
        run = write(tmp_path / corpus, lines, corpus={"kind": corpus})
        draw(*names)
        assert re.findall(r'<figure id="(\w+)">', page_of(run)) == names
        rows = {row.label: row for row in summary.rows(read(run))}
        assert rows["Validation"].beside == "step 100, the best"
        assert "residual 8.0e-03" in rows["Forward solve"].beside


def test_a_run_whose_numbers_were_never_finite_still_gets_a_page(tmp_path, draw):
    draw(*NAMES)
    lines = [{**step(1), "loss": None, "bits": None, "forward": solve(9) | {"residual": None}}]
    assert 'id="residual"' in page_of(write(tmp_path / "run", lines))


def test_a_run_that_stopped_right_after_its_first_validation_is_drawn(tmp_path, draw):
    draw(*NAMES)
    radius = {"event": "spectral_radius", "step": 50, "mean": 0.0, "max": 0.0}
    stopped = {"event": "stopped", "step": 51, "stage": "implicit", "loss": math.inf}
    assert 'id="spectral_radius"' in page_of(write(tmp_path / "run", [*events()[1:3], radius, stopped]))


def test_settings_name_every_value(tmp_path):
    groups = dict(page.groups_of(experiment()))
    assert list(groups) == ["corpus: PythonDocs", "model", "stage 1: shallow", "stage 2: implicit", "training"]
    assert ("cell", "TransformerConfig(width=32)") in groups["model"]
    assert ("method.solver", "Anderson(window=6)") in groups["stage 2: implicit"]
    assert ("clip", "none") in groups["training"]
    assert ("betas", "0.9, 0.99") in groups["training"]


def test_a_stage_has_a_tolerance_unless_it_says_otherwise(tmp_path):
    """As a field that is left out has its default; a stage without a method solves nothing."""
    stages = [stage("shallow", rtol=0.0), stage("implicit", rtol=1e-2)]
    stages += [{"name": "bare", "method": {"kind": "Method"}}, {"name": "none", "method": None}, {"name": "missing"}]
    record = read(write(tmp_path / "run", [], stages=stages))
    found = {name: record.has_tolerance(name) for name in ("shallow", "implicit", "bare", "none", "missing", "unknown")}
    expected = {"shallow": False, "implicit": True, "bare": True, "none": False, "missing": False, "unknown": True}
    assert found == expected


def test_runs_differ_in_fields_of_one_kind_and_in_whole_objects_of_two(tmp_path):
    """An explicit baseline has no method, which is one difference and not one for each field of the method."""
    explicit = {**stage("explicit", rtol=0.0), "method": None}
    stages = {
        "implicit": [stage("shallow", rtol=0.0), stage("implicit", rtol=1e-2)],
        "explicit": [stage("shallow", rtol=1e-3), explicit],
        "short": [stage("shallow", rtol=0.0)],
    }
    records = [read(write(tmp_path / name, [], stages=stages[name])) for name in stages]
    method = "Method(solver=Anderson(window=6), stop=Stop(rtol=0.01, atol=0.01, max_evals=30, best=yes))"
    assert differences(records[:2]) == [
        ["stages.0.method.stop.rtol", "0.0", "0.001"],
        ["stages.0.method.stop.atol", "0.0", "0.001"],
        ["stages.1.name", "implicit", "explicit"],
        ["stages.1.method", method, "none"],
    ]
    whole = f"Stage(name=implicit, steps=50, method={method}, eval_stop=none)"
    assert differences([records[0], records[2]]) == [["stages.1", whole, "–"]]
    assert differences([records[0], records[0]]) == []


def test_a_folder_without_a_run_names_the_runs_nearby(tmp_path):
    write(tmp_path / "tiny", [])
    with pytest.raises(UsageError, match=r"does not exist; did you mean .*tiny\?"):
        read(tmp_path / "tinny")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="holds no run"):
        read(tmp_path / "empty")


def test_damaged_files_are_named(tmp_path):
    run = write(tmp_path / "a", events())
    (run / "experiment.json").write_text("{")
    with pytest.raises(ValueError, match=r"experiment\.json is damaged"):
        read(run)
    (run / "experiment.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"experiment\.json is damaged"):
        read(run)
    other = write(tmp_path / "b", [*events()[:2]], tail="nonsense\n{}\n")
    with pytest.raises(ValueError, match="line 3"):
        read(other)


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (43 << 20, "43.0 MiB"), (409 << 20, "409 MiB")]
)
def test_sizes(value, text):
    assert formats.size(value) == text


@pytest.mark.parametrize(("value", "text"), [(0.03, "0.03 s"), (7.4, "7 s"), (187, "3 min 07 s"), (7500, "2 h 05 min")])
def test_durations(value, text):
    assert formats.duration(value) == text


def test_shares_are_100_only_if_it_is_all():
    assert formats.percent(1.0) == "100 %"
    assert formats.percent(0.99999) == "99.9 %"
    assert formats.percent(0.5) == "50.0 %"


def long_events(number: int) -> list[dict[str, Any]]:
    """Steps with numbers that differ, in two stages, the second of which starts in the middle."""
    lines = []
    for count in range(1, number + 1):
        line = step(count) | {
            "stage": "implicit" if 2 * count > number else "shallow",
            "tokens_per_second": 1.0 + count,
        }
        line["forward"] = solve(5 + count % 7, converged=(count % 11) / 10) | {"residual": 1e-3 * (1 + count % 13)}
        lines.append(line)
    return lines


def test_means_are_those_of_all_steps_and_not_of_a_thinned_curve(tmp_path):
    lines = long_events(3 * curve_module.BINS)
    lines[-5]["forward"]["residual"] = None
    record = read(write(tmp_path / "run", lines))
    last = [line for line in lines if line["stage"] == "implicit"]
    assert record.count("forward evals") == len(last)
    for part in ("evals", "residual", "converged"):
        expected = formats.mean(line["forward"][part] for line in last)
        assert record.mean(f"forward {part}") == pytest.approx(expected, rel=1e-12)
    assert record.step == len(lines)
    assert record.log.seconds == lines[-1]["seconds"]


def test_a_long_log_is_not_kept_in_memory(tmp_path):
    run = write(tmp_path / "run", long_events(8_000))  # 3 MiB in the file, and 14 as dicts
    tracemalloc.start()
    try:
        read(run)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8 << 20


def test_a_log_is_cut_line_by_line(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in long_events(5_000)))
    tracemalloc.start()
    try:
        log.cut(file, 4_000)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20
    assert [line["step"] for line in log.read(file)] == list(range(1, 4_001))


def curve_of(values: list[float], *, borders: tuple[int, ...] = ()) -> curve_module.Curve:
    """A curve over the steps 0, 1, …, that grew by three points at a time, with a new stage at each border."""
    curve = curve_module.Curve()
    for start, end in itertools.pairwise([0, *borders, len(values)]):
        for place in range(start, end, 3):
            x = np.arange(place, min(place + 3, end), dtype=float)
            curve.extend(x, np.array(values[place : min(place + 3, end)]), start)
    return curve


def test_a_short_curve_is_exact():
    values = [math.sin(place) for place in range(50)]
    values[7] = values[30] = math.nan
    curve = curve_of(values, borders=(20,))
    x, y = curve.line()
    assert x.tolist() == list(range(50))
    assert np.array_equal(y, values, equal_nan=True)
    expected = [
        formats.mean(values[max(start, place - 3) : place + 1])
        for place, start in zip(range(50), [0] * 20 + [20] * 30, strict=True)
    ]
    found = np.concatenate([means for _, means in curve.means(4)])
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("number", [64, 65, 200, 1000, 1001])
def test_a_long_curve_keeps_its_ends_its_peaks_and_its_means(number, monkeypatch):
    monkeypatch.setattr(curve_module, "BINS", 64)
    monkeypatch.setattr(curve_module, "DRAWN", 40)
    values = [math.sin(0.37 * place) + place / number for place in range(number)]
    values[5], values[17], values[number - 9] = 9.0, math.nan, -9.0
    curve = curve_of(values, borders=(number // 2,))
    (x, y), (sample, weights) = curve.line(), curve.sample()
    assert curve.count == weights.sum() == number
    assert len(x) <= 4 * 40
    assert (x[0], y[0], x[-1], y[-1]) == (0, values[0], number - 1, values[-1])
    assert x.tolist() == sorted(x)
    assert x[np.nanargmax(y)] == 5
    assert x[np.nanargmin(y)] == number - 9
    for place, value in zip(x, y, strict=True):
        assert value == values[int(place)] or math.isnan(value)
    assert set(sample) <= {*values}
    parts = [means for _, means in curve.means(number)]  # of all values before, in each of two stages
    assert len(parts) == 2
    assert parts[0][-1] == pytest.approx(formats.mean(values[: number // 2]), abs=0.25)


def test_drawing_takes_as_many_points_however_long_the_log_is(tmp_path, monkeypatch):
    monkeypatch.setattr(curve_module, "BINS", 64)
    lines = [*long_events(1000), *(valid(count, 1.0) for count in range(1, 90))]
    record = read(write(tmp_path / "run", lines))
    axes = Figure().add_subplot()
    assert ALL["loss"][2](axes, record)
    lengths = [np.size(line.get_xdata()) for line in axes.get_lines()]
    assert max(lengths) <= 4 * 64
    assert 50 in lengths  # validations are all there: of the stage "shallow"
    assert 39 in lengths


def test_the_start_says_the_unit_wherever_it_stands(tmp_path):
    start = {"event": "start", "step": 0, "parameters": 3, "corpus": {"name": "x", "unit": "word", "vocabulary": 9}}
    for number, lines in enumerate(([start, *events()], [*events(), start])):
        record = read(write(tmp_path / str(number), lines))
        assert record.unit == "word"
        assert record.log.dots["valid"]["shallow"][1] == pytest.approx(math.exp(1.2))
        assert record.log.curves["loss"].line()[1][0] == pytest.approx(math.exp(3.0))


@pytest.mark.parametrize(
    "line",
    [
        '{"event": "step", "step": 4, "stage": "a", "loss": [1]}',
        '{"event": "step", "step": null}',
        '{"event": "step", "step": 1e999, "loss": 1}',
        '{"event": "step", "step": 4, "loss": 1, "forward": [3]}',
        '{"event": "step", "step": 4}',
        '{"event": "valid", "step": 4}',
        '{"event": {}, "step": 4}',
        '{"event": "stage", "step": 4}',
        '{"event": "start", "step": 0}',
        '{"event": "memory", "step": 4, "rows": [3]}',
    ],
)
def test_a_line_that_no_training_writes_is_named(tmp_path, line, unhooked):
    run = write(tmp_path / "run", events()[:2], tail=f"{line}\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 3 .*; remove that line"):
        read(run)


def test_brackets_inside_brackets_are_a_damaged_line(tmp_path):
    run = write(tmp_path / "run", [], tail="[" * 100_000 + "\n")
    with pytest.raises(ValueError, match=r"line 1 is not a JSON object: b'\[\[\[.*'; remove that line"):
        read(run)


def test_a_report_is_whole_or_as_it_was(tmp_path, monkeypatch, draw):
    draw("loss")
    run = write(tmp_path / "run", events())
    before = page_of(run)
    with (run / "metrics.jsonl").open("a") as log:
        log.write(json.dumps(valid(100, 0.5)) + "\n")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            report.write(read(run))
    assert (run / "report" / "index.html").read_text(encoding="utf-8") == before
    assert not list((run / "report").glob(".*"))
    assert page_of(run) != before


needs_links = pytest.mark.skipif(os.name == "nt", reason="Windows asks for a right to make links")


@needs_links
def test_a_link_in_the_place_of_a_file_of_the_report_is_replaced_and_its_target_left_alone(tmp_path, draw):
    draw("loss", "memory")
    run, outside = write(tmp_path / "run", events()), tmp_path / "outside"
    outside.write_text("mine")
    (run / "report").mkdir()
    names = ["index.html", "sample.json", "loss.png", "memory.png"]
    for name in names:
        (run / "report" / name).symlink_to(outside)
        (run / "report" / f".{name}.new").symlink_to(outside)
    report.write_sample(run, prompt="a", text="b")
    report.write(read(run))
    assert outside.read_text() == "mine"
    assert sorted(path.name for path in (run / "report").iterdir()) == sorted(names)
    assert not any((run / "report" / name).is_symlink() for name in names)


@needs_links
def test_a_report_folder_elsewhere_is_refused(tmp_path):
    run, outside = write(tmp_path / "run", events()), tmp_path / "outside"
    outside.mkdir()
    (run / "report").symlink_to(outside)
    for act in (lambda: report.write(read(run)), lambda: report.write_sample(run, prompt="a", text="b")):
        with pytest.raises(ForeignFileError, match="is a symbolic link"):
            act()
    assert not list(outside.iterdir())
    (outside / "sample.json").write_text('{"prompt": "a", "text": "b"}')
    assert report.read_sample(run) is None


@needs_links
def test_a_log_that_is_a_link_or_a_pipe_is_refused(tmp_path):
    run = write(tmp_path / "run", events())
    moved = (run / "metrics.jsonl").rename(tmp_path / "log")
    (run / "metrics.jsonl").symlink_to(moved)
    with pytest.raises(ForeignFileError, match="is a symbolic link"):
        read(run)
    (run / "metrics.jsonl").unlink()
    os.mkfifo(run / "metrics.jsonl")
    with pytest.raises(ForeignFileError, match="block forever"):
        read(run)
    with pytest.raises(ForeignFileError, match="block forever"):
        log.cut(run / "metrics.jsonl", 3)


@needs_links
def test_nothing_is_written_through_a_link_beside_the_log(tmp_path):
    run, outside = write(tmp_path / "run", events()), tmp_path / "outside"
    outside.write_text("mine")
    (run / ".metrics.jsonl.new").symlink_to(outside)
    log.cut(run / "metrics.jsonl", 3)
    assert outside.read_text() == "mine"
    assert read(run).step == 3


@needs_links
def test_weights_that_are_a_pipe_are_not_waited_for(tmp_path):
    run = write(tmp_path / "run", events())
    (run / "checkpoints" / "step-00000100").mkdir(parents=True)
    os.mkfifo(run / "checkpoints" / "step-00000100" / "model.safetensors")
    with pytest.raises(ForeignFileError, match="block forever"):
        summary.rows(read(run))


@pytest.mark.parametrize("name", ["$x^$", r"$\frac{$", "_^", "$" * 200, "\ud800\x1b[31m"])
def test_names_are_no_formulas(tmp_path, draw, name):
    draw("loss", "memory")  # the names of stages, of baselines, and of what memory was measured for
    lines = [{**event, "stage": name} if "stage" in event else event for event in events()]
    for line in lines:
        if line["event"] in ("baseline", "memory"):
            line["rows"] = [{**row, "label": f"{name} {number}"} for number, row in enumerate(line["rows"])]
    corpus = {"name": name, "unit": name, "vocabulary": 9}
    lines.insert(0, {"event": "start", "step": 0, "parameters": 3, "corpus": corpus})
    run = write(tmp_path / "run", lines, name=name, stages=[stage(name, rtol=1e-2)])
    assert re.findall(r'<figure id="(\w+)">', page_of(run)) == ["loss", "memory"]


def test_a_name_is_drawn_as_it_is(tmp_path):
    lines = [{**event, "stage": "$x$"} if "stage" in event else event for event in events()]
    record = read(write(tmp_path / "run", lines, stages=[stage("$x$", rtol=1e-2)]))
    axes = Figure().add_subplot()
    assert ALL["loss"][2](axes, record)
    spell(axes)
    (text, *_) = (text for text in axes.texts if "$x$" in text.get_text())
    assert not text.get_parse_math()


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", *some_slow("nonsense")])
def test_a_backend_that_is_not_there_is_not_asked_for(tmp_path, backend):
    """Jupyter sets MPLBACKEND for what is started in it."""
    run = write(tmp_path / "run", events()[:3])
    code = (
        f"import os; from equilibria.commands.main import run; code = run(['report', {str(run)!r}]); "
        "print(code, os.environ['MPLBACKEND'])"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, env={**os.environ, "MPLBACKEND": backend}, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == f"0 {backend}"
    assert (run / "report" / "loss.png").is_file()
    assert not done.stderr


def test_the_report_for_programs_is_one_strict_object(tmp_path, capsys):
    lines = [*events(), valid(100, math.nan, best=False)]
    for line in lines[60:80]:
        line["forward"] = solve(14) | {"residual": math.nan}
    run = write(tmp_path / "run", lines)
    assert report.main([str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert found["report"] == str(run / "report" / "index.html")
    assert Path(found["report"]).is_file()
    assert (found["finished"], found["step"], found["total_steps"], found["name"]) == (True, 100, 100, "small")
    assert found["state"] == "Finished after 100 steps."
    numbers = found["summary"]
    assert numbers["validation"]["nats"] == 1.4
    assert numbers["backward"] == {"evals": 12.0, "residual": pytest.approx(8e-3), "converged": pytest.approx(0.9)}
    assert numbers["forward"]["evals"] == 14.0
    assert next(row["peak_bytes"] for row in numbers["memory"]) == 5 << 20
    assert numbers["tokens_per_second"] == pytest.approx(5000.0)
    assert (numbers["seconds"], numbers["stage"], numbers["parameters"]) == (10.0, "implicit", None)


def test_the_report_of_an_empty_run_for_programs(tmp_path, capsys):
    assert report.main([str(write(tmp_path / "run", [])), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["summary"]["forward"] is None
    assert found["summary"]["validation"] is None
    assert not found["finished"]
