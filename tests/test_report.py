"""The report: what is drawn and said about runs that are finished, unfinished, empty, damaged or hostile."""

from __future__ import annotations

import base64
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from equilibria.commands import figures, formats, page, report, summary
from equilibria.commands.errors import UsageError
from equilibria.commands.record import read

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
        "training": {"kind": "Training", "batch_size": 8, "betas": [0.9, 0.99], "clip": None},
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


def valid(number: int, nats: float) -> dict[str, Any]:
    name = "implicit" if number > 50 else "shallow"
    scores = {"nats": nats, "bits": nats / math.log(2), "perplexity": math.exp(nats)}
    return {"event": "valid", "step": number, "stage": name, "tokens": 1000, "forward": solve(15), **scores}


def events() -> list[dict[str, Any]]:
    orders = [{"label": f"Witten–Bell order {order}", "bits": 4.0 - 0.5 * order} for order in (1, 2, 3, 4)]
    unrolled = [{"label": "unrolled", "depth": depth, "peak_bytes": depth << 20} for depth in (8, 16, 32, 64)]
    equilibrium = {"label": "equilibrium", "depth": None, "peak_bytes": 5 << 20, "evals": 14}
    return [
        {"event": "yardstick", "step": 0, "rows": orders},
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
    described = {"format": 2, **experiment(**changes)}
    (path / "experiment.json").write_text(json.dumps(described), encoding="utf-8")
    text = "".join(json.dumps(line) + "\n" for line in lines) + tail
    (path / "metrics.jsonl").write_text(text, encoding="utf-8")
    return path


def page_of(run: Path) -> str:
    return report.write(read(run)).read_text(encoding="utf-8")


def test_a_finished_run_gets_every_figure_inside_the_page_and_beside_it(tmp_path):
    run = write(tmp_path / "run", events())
    text = page_of(run)
    pictures = [base64.b64decode(data) for data in re.findall(r"data:image/png;base64,([^\"]+)", text)]
    assert re.findall(r'<figure id="(\w+)">', text) == NAMES
    assert pictures == [(run / "report" / f"{name}.png").read_bytes() for name in NAMES]
    assert all(picture.startswith(b"\x89PNG") for picture in pictures)
    assert "Finished after 100 steps." in text


def test_the_page_needs_nothing_from_elsewhere(tmp_path):
    text = page_of(write(tmp_path / "run", events()))
    assert not re.findall(r"<(?:script|link|iframe)|https?://|(?:src|href)=\"(?!data:)", text)


def test_the_summary_says_what_was_measured(tmp_path):
    rows = {row.label: row for row in summary.rows(read(write(tmp_path / "run", events())))}
    assert rows["Validation"].value == "2.020 bits per character"  # the best of the last stage, not of the first
    assert (
        rows["Yardstick"].beside.replace(summary.NBSP, " ") == "order 1 3.50, order 2 3.00, order 3 2.50, order 4 2.00"
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


def test_right_answers_stand_beside_a_loss_that_says_little(tmp_path):
    rows = summary.rows(read(write(tmp_path / "run", [*events(), {**valid(100, 1.0), "accuracy": 0.125}])))
    assert [row.value for row in rows if row.label == "Right answers"] == ["12.5 %"]


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


def test_an_unfinished_run_says_so_and_leaves_out_what_is_not_there(tmp_path):
    text = page_of(write(tmp_path / "run", events()[:20], tail='{"event": "step", "st'))
    assert "Unfinished: 18 of 100 steps so far." in text
    assert re.findall(r'<figure id="(\w+)">', text) == ["loss", "evaluations", "residual"]


def test_a_run_that_has_written_nothing_yet_still_gets_a_page(tmp_path):
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
def test_every_unit_has_its_own_measure(tmp_path, corpus):
    record = read(write(tmp_path / "run", events(), corpus=corpus))
    value = next(row.value for row in summary.rows(record) if row.label == "Validation")
    words = {"Copying": "1.400 nats per symbol"}.get(corpus["kind"], "4.055 perplexity per word")
    assert value == words
    assert [drawing.name for drawing in figures.draw(record)] == NAMES


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


def test_numbers_that_are_not_finite_do_not_stop_the_report(tmp_path):
    lines = [{**event, "loss": math.nan, "bits": math.nan} if event.get("step") == 7 else event for event in events()]
    lines.append({**valid(100, 1.0), "nats": math.nan, "bits": math.nan, "perplexity": math.nan})
    run = write(tmp_path / "run", lines)
    assert "Finished" in page_of(run)
    assert summary.rows(read(run))[0].value == "2.020 bits per character"


def test_nulls_do_not_stop_the_report(tmp_path):
    """What metrics.jsonl says of numbers that are not finite."""
    null = {"residual": None}
    lines = [*events(), {"event": "spectral_radius", "step": 100, "mean": None, "max": None}]
    for event in lines:
        if event.get("step") in (7, 60) and event["event"] == "step":
            event |= {"loss": None, "bits": None, "forward": solve(9) | null, "backward": solve(9) | null}
    lines.append({**valid(100, 1.0), "nats": None, "bits": None, "perplexity": None, "forward": solve(15) | null})
    for corpus in ("PythonDocs", "PennTreebank", "Copying"):
        run = write(tmp_path / corpus, lines, corpus={"kind": corpus})
        assert re.findall(r'<figure id="(\w+)">', page_of(run)) == NAMES
        rows = {row.label: row for row in summary.rows(read(run))}
        assert rows["Validation"].beside == "step 100, the best"
        assert "residual 8.0e-03" in rows["Forward solve"].beside


def test_a_run_whose_numbers_were_never_finite_still_gets_a_page(tmp_path):
    lines = [{**step(1), "loss": None, "bits": None, "forward": solve(9) | {"residual": None}}]
    assert 'id="residual"' in page_of(write(tmp_path / "run", lines))


def test_a_run_that_stopped_right_after_its_first_validation_is_drawn(tmp_path):
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
