"""The folder of a run: nothing in it is lost, nothing outside it is touched, and no other text is taken for its own."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from equilibria.__main__ import main
from equilibria.lm.corpora import Vocabulary
from equilibria.lm.corpora.language import Language
from equilibria.lm.report import figures
from equilibria.lm.runs import CheckpointError, Run, checkpoint
from equilibria.lm.runs.files import replace
from equilibria.lm.runs.folder import FIGURES, foreign_files, locked
from equilibria.lm.training import Trainer
from small_experiment import corpus, experiment, whole
from small_run import fails, furnish

COMMAND = [sys.executable, "-c", "import sys, equilibria_command; sys.exit(equilibria_command.main())"]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder but its lock."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


@pytest.fixture
def place(tmp_path, monkeypatch, one_figure):
    furnish(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory):
    """A folder with a corpus and a run on it."""
    folder, before = tmp_path_factory.mktemp("once"), Path.cwd()
    furnish(folder)
    os.chdir(folder)
    try:
        assert main(["train", "recipe.py:small", "--data", "text", "--quiet"]) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def run(trained_once, place):
    """A copy of that run beside a corpus of its own."""
    path = place / "runs" / "small"
    shutil.copytree(trained_once / "runs" / "small", path)
    description = path / "experiment.json"
    description.write_text(description.read_text().replace(str(trained_once), str(place)))
    return path


# Replacing a run


@pytest.mark.parametrize("wrong", [["--training.batch-size", "3000"], ["--training.accumulate", "3"]])
def test_a_run_that_cannot_start_does_not_cost_the_old_one(run, capsys, wrong):
    before = contents(run)
    assert main(["train", "recipe.py:small", "--data", "text", "--overwrite", "--quiet", *wrong]) != 0
    assert "Unexpected" not in capsys.readouterr().err
    assert contents(run) == before
    assert not (run / ".new").exists()


def test_the_old_run_goes_with_the_first_checkpoint_of_the_new_one(tmp_path):
    path = tmp_path / "run"
    whole(path)
    before, value = contents(path), experiment(seed=7)
    run, seen = Run.start(path, value, overwrite=True), []

    def look(event):
        if event["event"] == "step" and event["step"] < 4:
            seen.append({name: data for name, data in contents(path).items() if not name.startswith(".new/")})

    Trainer(value, run, corpus(), on_event=look).fit()
    assert len(seen) == 3
    assert all(there == before for there in seen)
    assert Run.open(path).experiment() == value
    assert Run.open(path).newest().step == 18
    assert [event["step"] for event in run.events() if event["event"] == "step"] == list(range(1, 19))
    assert not [entry for entry in path.iterdir() if entry.name in (".new", ".old", ".replaced")]


def test_what_a_killed_process_has_begun_is_removed_by_the_next_start(tmp_path):
    path = tmp_path / "run"
    whole(path)
    Run.start(path, experiment(seed=7), overwrite=True)
    before = {name: data for name, data in contents(path).items() if not name.startswith(".new/")}
    Run.start(path, experiment(), resume=True)
    assert contents(path) == before
    assert not (path / ".new").exists()


def test_a_crash_while_one_run_replaces_another_leaves_one_of_them(tmp_path, monkeypatch):
    """Interrupted at each of its renames, the replacement is completed by whoever starts the run next."""
    new, crashes = experiment(seed=7), 0
    rename = Path.rename
    whole(tmp_path / "old")
    for number in range(30):
        path = tmp_path / f"run{number}"
        shutil.copytree(tmp_path / "old", path)
        run = Run.start(path, new, overwrite=True)
        (run.checkpoints / "step-00000001").mkdir(parents=True)
        left = [number]

        def failing(self, target, left=left):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", failing)
        try:
            run.settle()
        except KeyboardInterrupt:
            crashes += 1
        monkeypatch.setattr(Path, "rename", rename)
        Run.start(path, new, resume=True)
        assert Run.open(path).experiment() == new
        assert (path / "checkpoints" / "step-00000001").is_dir()
        assert {entry.name for entry in path.iterdir()} == {"experiment.json", "checkpoints"}
        if left[0] >= 0:
            break
    assert crashes > 4


def test_only_what_this_library_wrote_is_replaced(run, capsys):
    again = ["train", "recipe.py:small", "--data", "text", "--overwrite", "--quiet"]
    others = ("report/thesis.pdf", "tensorboard/x", "hf/training_args.bin", "hf/checkpoint-5/config.json")
    for name in ("checkpoints/step-00000008/notes.txt", "checkpoints/mine.pt", *others):
        mine = run / name
        mine.parent.mkdir(exist_ok=True, parents=True)
        mine.write_text("mine")
        before = contents(run)
        assert f"holds {name} beside a run" in fails(capsys, *again, code=1)
        assert contents(run) == before
        mine.unlink()
    assert foreign_files(run) == []
    assert main(again) == 0


def test_a_folder_of_another_tool_is_no_run(place, capsys):
    folder = place / "runs" / "small"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "experiment.json").write_text('{"name": "somebody\'s"}')
    (folder / "checkpoints" / "epoch1.ckpt").write_text("weights")
    before = contents(folder)
    words = ["train", "recipe.py:small", "--data", "text", "--overwrite", "--quiet"]
    assert "was not written by equilibria" in fails(capsys, *words, code=1)
    assert contents(folder) == before
    assert not (folder / ".lock").exists()


def test_the_pictures_of_a_report_are_known():
    assert {name for name, *_ in figures.FIGURES} == set(FIGURES)


# Links and pipes


@pytest.mark.parametrize("name", [".lock", "metrics.jsonl", "experiment.json", "checkpoints", "report", ".new"])
def test_nothing_is_written_through_a_link(run, capsys, name):
    outside = run.parent.parent / "outside"
    if (run / name).is_dir() or (run / name).exists():
        (run / name).rename(outside)
    elif name == ".new":
        outside.mkdir()
    else:
        outside.write_text("mine")
    (run / name).symlink_to(outside)
    before = contents(run.parent.parent)
    for more in (["--resume"], ["--overwrite"]):
        words = ["train", "recipe.py:small", "--data", "text", "--quiet", *more]
        assert "is a symbolic link" in fails(capsys, *words, code=1)
        assert contents(run.parent.parent) == before


def test_what_stands_in_the_way_of_a_file_is_replaced_and_not_followed(tmp_path):
    (tmp_path / "mine").write_text("mine")
    for name in ("a.json", ".a.json.new"):
        (tmp_path / name).symlink_to(tmp_path / "mine")
    replace(tmp_path / "a.json", "theirs\n", forced=True)
    assert (tmp_path / "mine").read_text() == "mine"
    assert (tmp_path / "a.json").read_text() == "theirs\n"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.json", "mine"]


def test_a_pipe_in_a_run_is_refused_and_not_waited_for(run, capsys):
    (run / "metrics.jsonl").unlink()
    os.mkfifo(run / "metrics.jsonl")
    for words in (["evaluate", "runs/small"], ["train", "recipe.py:small", "--data", "text", "--resume", "--quiet"]):
        assert "could block forever" in fails(capsys, *words, code=1)


def test_a_lock_that_nobody_needs_is_not_left(tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="not a run"), locked(mine):
        Run.start(mine, experiment())
    assert [entry.name for entry in mine.iterdir()] == ["thesis.tex"]


# The text of a run


def test_a_run_generates_without_its_corpus(run, place, capsys):
    def text() -> str:
        assert main(["generate", "runs/small", "--prompt", "abc", "--length", "20"]) == 0
        return capsys.readouterr().out

    before = text()
    (place / "text").rename(place / "gone")
    assert text() == before
    assert "text does not exist" in fails(capsys, "evaluate", "runs/small", code=1)
    (place / "other.txt").write_text("bad cab\n" * 20)
    assert main(["evaluate", "runs/small", "--data", "other.txt"]) == 0
    said = capsys.readouterr().out
    assert "other.txt" in said
    assert "valid" not in said
    assert "159 of 159" in said
    assert main(["evaluate", "runs/small", "--data", "gone"]) == 0


def test_another_text_is_not_taken_for_that_of_the_training(run, place, capsys, caplog):
    with (place / "text" / "valid.txt").open("a") as file:
        file.write("dab\n")
    assert "The text of valid is not the one" in fails(capsys, "evaluate", "runs/small", code=1)
    words = ["train", "recipe.py:small", "--data", "text", "--resume", "--quiet"]
    assert "The text of valid is not the one with which" in fails(capsys, *words, code=1)
    assert main(["evaluate", "runs/small", "--data", "text"]) == 0
    assert "is not the text of the training" in caplog.text


def test_a_text_with_other_letters_keeps_the_vocabulary_of_the_run(run, place, capsys):
    """One letter replaced, and every id after it meant another letter."""
    for split in ("train", "valid", "test"):
        file = place / "text" / f"{split}.txt"
        file.write_text(file.read_text().replace("a", "b"))
    assert "The text of train, valid, test is not the one" in fails(capsys, "evaluate", "runs/small", code=1)
    assert main(["evaluate", "runs/small", "--data", "text"]) == 0
    capsys.readouterr()
    for split in ("train", "valid", "test"):
        file = place / "text" / f"{split}.txt"
        file.write_text(file.read_text().replace("b", "z"))
    assert "'z', which the run's vocabulary" in fails(capsys, "evaluate", "runs/small", "--data", "text", code=1)


def test_the_language_of_a_run_comes_back(tmp_path):
    known = Language.of(corpus())
    again = Language.from_json(json.loads(json.dumps(known.to_json())))
    assert again.changed(corpus()) == []
    assert again.vocabulary == known.vocabulary
    foreign = Vocabulary.of_tokens(
        (*known.vocabulary.tokens[:-1], "Z"), "character"
    )  # a letter that the run does not know
    assert again.changed(dataclasses.replace(corpus(), vocabulary=foreign)) != []
    for damaged in ([], {}, {**known.to_json(), "unit": "byte"}, {**known.to_json(), "sha256": 3}):
        with pytest.raises(ValueError, match=r"."):
            Language.from_json(damaged)


# Checkpoints with true sums


def rewritten(folder: Path, change) -> None:
    """Changes a checkpoint and computes its sums again, as whoever wrote it could."""
    state = json.loads((folder / "state.json").read_text())["state"]
    change(folder, state)
    state["files"] = {name: checkpoint.sha256_of(folder / name) for name in state["files"]}
    (folder / "state.json").write_text(json.dumps({"state": state, "sha256": checkpoint._digest(state)}))


def cut(file: Path) -> None:
    """Keeps the first 5,000 bytes, whose end PyTorch looks for before their beginning."""
    file.write_bytes(file.read_bytes()[:5000])


ABSURD = {
    "no safetensors": lambda folder, state: (folder / "model.safetensors").write_bytes(b"\xff" * 64),
    "empty weights": lambda folder, state: (folder / "model.safetensors").write_bytes(b""),
    "no dict": lambda folder, state: torch.save([1], folder / "optimiser.pt"),
    "an optimiser that was cut": lambda folder, state: cut(folder / "optimiser.pt"),
    "no step": lambda folder, state: state.pop("step"),
    "a step in words": lambda folder, state: state.update(step="ten"),
    "losses that are none": lambda folder, state: state.update(validated={"losses": 0, "divisions": 0}),
    "divisions in words": lambda folder, state: state.update(validated={"losses": [], "divisions": "two"}),
    "memory of another kind": lambda folder, state: (folder / "memory.safetensors").write_text("{}"),
}


@pytest.mark.parametrize("absurd", ABSURD)
def test_absurd_content_with_true_sums_is_a_sentence_and_the_one_before_is_used(tmp_path, absurd, caplog):
    whole(tmp_path / "run")
    folders = checkpoint.all_in(tmp_path / "run" / "checkpoints")
    rewritten(folders[-1], ABSURD[absurd])
    with pytest.raises(CheckpointError, match=rf"{folders[-1].name} is not a checkpoint of this library: .* holds "):
        checkpoint.load(folders[-1])
    found = Run.open(tmp_path / "run").newest()
    assert found is not None
    assert found.step < 18
    assert folders[-1].name in caplog.text


def test_a_checkpoint_without_its_seconds_and_its_best_goes_on(tmp_path):
    whole(tmp_path / "run")
    folder = checkpoint.all_in(tmp_path / "run" / "checkpoints")[-1]
    rewritten(folder, lambda folder, state: (state.pop("seconds"), state.pop("best")))
    assert Trainer(experiment(), Run.open(tmp_path / "run"), corpus()).resume() == 18


@pytest.mark.parametrize("step", ["18", [], None])
def test_a_line_of_the_log_without_a_number_of_its_step_is_named_and_stays(tmp_path, step):
    whole(tmp_path / "run")
    run = Run.open(tmp_path / "run")
    run.append({"event": "step", "step": step})
    before = run.metrics.read_bytes()
    with pytest.raises(ValueError, match=r"has a line whose step is .*; remove that line"):
        Trainer(experiment(), run, corpus()).resume()
    assert run.metrics.read_bytes() == before


def test_a_file_that_the_state_does_not_list_is_refused(tmp_path):
    whole(tmp_path / "run")
    folder = checkpoint.all_in(tmp_path / "run" / "checkpoints")[-1]
    (folder / "shards").mkdir()
    (folder / "shards" / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"state\.json does not list shards/shard-00001"):
        checkpoint.load(folder)


# The doctor


def test_the_doctor_finds_nothing_in_a_whole_run_and_changes_nothing(run, capsys):
    before = contents(run)
    assert main(["doctor", "runs/small"]) == 0
    said = capsys.readouterr().out
    for words in ("experiment.json: small", "the vocabulary of text: 6 characters", "good: step-"):
        assert words in said
    assert "bad " not in said
    assert contents(run) == before


def test_the_doctor_says_what_is_wrong(run, place, capsys):
    folders = checkpoint.all_in(run / "checkpoints")
    (folders[-1] / "model.safetensors").write_bytes(b"")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join([*lines[:3], "oops\n", *lines[3:]]))
    (place / "text" / "valid.txt").write_text("dab\n" * 20)
    (run / "notes.txt").write_text("mine")
    assert main(["doctor", "runs/small"]) == 1
    said = capsys.readouterr().out
    for words in (
        "line 4 is not a JSON object",
        f"{folders[-1].name} is damaged",
        "another text than that of the training: valid",
        "files that no training writes: notes.txt",
    ):
        assert words in said


@pytest.mark.parametrize(
    "line",
    ['{"event": "step"}', '{"event": "step", "step": "a"}', '{"event": "start", "step": 0}', '{"event": 5, "step": 1}'],
)
def test_the_doctor_calls_a_log_bad_that_the_report_refuses(run, capsys, line):
    with (run / "metrics.jsonl").open("a") as log:
        log.write(f"{line}\n")
    codes = [main([verb, "runs/small"]) for verb in ("report", "doctor")]
    captured = capsys.readouterr()
    assert codes in ([1, 1], [0, 0])
    assert ("bad  log" in captured.out) == (codes == [1, 1]) == ("is no event that a training writes" in captured.err)
    assert "Unexpected" not in captured.err


# Signals


@contextlib.contextmanager
def started(place: Path, *more: str) -> Iterator[subprocess.Popen[str]]:
    """A long training in a process of its own, which hears Ctrl-C even if the tests run in the background.

    It is handed over once Python has started and loaded the command: a traceback before that is Python's own.
    """
    python, option, code = COMMAND
    words = ["train", "recipe.py:small", "--data", "text", "--quiet", "--stages.1.steps", "100000", *more]
    hears = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [python, option, code.replace("; ", "; print('up', flush=True); "), *words]
    process = subprocess.Popen(command, **pipes, cwd=place, preexec_fn=hears)
    try:
        assert process.stdout.readline() == "up\n"
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_a_checkpoint(place, number, code):
    metrics = place / "runs" / "small" / "metrics.jsonl"
    with started(place, "--training.checkpoint-every", "100000", "--training.valid-every", "100000") as process:
        while not metrics.is_file() or metrics.read_text().count('"step"') < 40:
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in said
    step = int(checkpoint.all_in(place / "runs" / "small" / "checkpoints")[-1].name.removeprefix("step-"))
    assert step > 10
    assert f"from the checkpoint step-{step:08d}" in said


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.15, 0.5, 1.0, 1.5, 2.5])
def test_ctrl_c_in_the_first_seconds_is_no_traceback(place, delay):
    with started(place) as process:
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode in (130, -signal.SIGINT)
    assert "Traceback" not in said
