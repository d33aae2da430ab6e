"""A text of one's own, from a file to a model in Python: the recipe, the short flags, load, and runs compared."""

import json
import shutil

import pytest

import equilibria
from equilibria.__main__ import main
from equilibria.commands.interrupt import command
from equilibria.errors import UsageError
from equilibria.lm.corpora import TextFolder, text_file
from equilibria.lm.report.comparison import differences, rows
from equilibria.lm.report.record import read
from small_run import fails

QUICK = ["--steps", "6", "--threads", "1", "--width", "16", "--heads", "2", "--inner", "16", "--valid-segments", "2"]
QUIET = ["--measure-memory", "False", "--spectral-radius", "0", "--quiet"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a text, a run on it and its explicit baseline."""
    place = tmp_path_factory.mktemp("own")
    (place / "My text.txt").write_text("The fixed point of a map is where the map leaves it.\n" * 60)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        text = ["train", "text", "--data", "My text.txt", *QUICK, *QUIET, "--lr", "5e-3", "--seed", "3"]
        assert main(text) == 0
        assert main([*text, "--explicit", "4"]) == 0
    return place


@pytest.fixture
def place(trained, tmp_path, monkeypatch, one_figure):
    shutil.copytree(trained, tmp_path / "own")
    monkeypatch.chdir(tmp_path / "own")
    return tmp_path / "own"


def test_a_run_is_called_as_its_text_and_short_flags_reach_the_settings(place):
    assert sorted(path.name for path in (place / "runs").iterdir()) == ["My-text", "My-text-4-layers"]
    found = equilibria.load("runs/My-text").experiment
    assert (found.training.optimisation.learning_rate, found.training.seed) == (5e-3, 3)
    assert (found.training.devices.threads, found.total_steps) == (1, 6)
    assert [stage.steps for stage in found.stages] == [4, 2]  # each keeps its share
    assert found.training.optimisation.warmup == 6


@pytest.mark.filterwarnings("ignore::equilibria.ConvergenceWarning")  # after so few steps
def test_a_trained_model_comes_back_in_one_line(place):
    run = equilibria.load("runs/My-text")
    assert set("The fixedpointmaw.\n ") >= set(run.vocabulary.tokens) - set("hslrvuk")
    text = run.generate("The ", length=12, temperature=0)
    assert (len(text), text) == (12, equilibria.load(place / "runs" / "My-text").generate("The ", 12, temperature=0))
    assert run.evaluate("test").tokens == len(run.corpus.test)
    assert not run.model.training
    with pytest.raises(ValueError, match="The prompt is empty"):
        run.generate("")
    with pytest.raises(UsageError, match="did you mean runs/My-text"):
        equilibria.load("runs/My-txt")
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        equilibria.laod  # noqa: B018


def test_a_text_that_has_moved_still_has_its_splits_and_another_one_has_none(place):
    before = equilibria.load("runs/My-text").evaluate("test")
    (place / "My text.txt").rename(place / "moved.txt")
    moved = equilibria.load("runs/My-text", data="moved.txt")
    assert not moved.is_file
    found = moved.evaluate("test")
    assert (found.tokens, found.nll_per_token) == (before.tokens, before.nll_per_token)
    (place / "other.txt").write_text("The fixed point.\n" * 20)
    other = equilibria.load("runs/My-text", data="other.txt")
    assert other.is_file
    assert other.evaluate("test").tokens == 17 * 20 - 1


def test_a_second_training_says_where_it_goes_and_how_to_continue_the_first(place, capsys):
    words = [word for word in QUIET if word != "--quiet"]
    assert main(["train", "text", "--data", "My text.txt", *QUICK, *words]) == 0
    said = capsys.readouterr().out
    assert "in runs/My-text-2" in said
    assert "runs/My-text is there already: --resume continues the last run, and --overwrite replaces it" in said
    for named in ([], ["--data", "My text.txt"]):  # the text need not be named again
        assert main(["train", "text", "--resume", "--out", "runs/My-text", *named]) == 0
    assert equilibria.load("runs/My-text").experiment.name == "My-text"


@pytest.mark.parametrize(("steps", "shares"), [("2", [1, 1]), ("3", [2, 1]), ("2000", [1250, 750])])
def test_steps_are_shared_by_the_stages(steps, shares):
    from equilibria.commands.train import _options

    options, _ = _options("tiny", ["--steps", steps])
    assert [stage.steps for stage in options.experiment.stages] == shares


def test_too_few_steps_are_refused(capsys):
    assert "--steps 1: tiny has 2 stages" in fails(capsys, "train", "tiny", "--steps", "1")


def test_a_file_is_cut_in_three(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("abcdefghij" * 20)
    corpus = TextFolder(root=file, unit="character").load()
    assert [len(stream) + 1 for stream in (corpus.train, corpus.valid, corpus.test)] == [180, 10, 10]
    assert corpus.vocabulary.tokens == tuple("abcdefghij")
    file.write_text("one two three four\n" * 30 + "a word that occurs in no other line\n")
    assert "occurs" in text_file(file, unit="word").vocabulary.tokens
    file.write_text("abc")
    with pytest.raises(ValueError, match=r"text\.txt: the text has 3 characters"):
        text_file(file)


def test_runs_are_compared_on_one_page(place, capsys):
    assert main(["report", "runs/My-text", "runs/My-text-4-layers", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["report"] == "runs/comparison.html"
    page = (place / "runs" / "comparison.html").read_text()
    assert page.count("<img ") == 2
    assert "My-text-4-layers" in page
    records = [read(place / "runs" / name) for name in ("My-text", "My-text-4-layers")]
    table = {row[0]: row[1:] for row in rows(records)}
    assert all(len(cells) == 2 for cells in table.values())
    assert table["Forward solve"][1] == "–"
    changed = {row[0]: row[1:] for row in differences(records)}
    assert changed["model.explicit"][0] == "none"
    assert "depth=4" in changed["model.explicit"][1]
    assert "training.seed" not in changed
    assert main(["report", "runs/My-text", "runs/My-text-4-layers"]) == 0  # its own page may be replaced
    capsys.readouterr()
    (place / "mine.html").write_text("mine")
    said = fails(capsys, "report", "runs/My-text", "runs/My-text-4-layers", "--out", "mine.html")
    assert "was not written by this command" in said
    assert (place / "mine.html").read_text() == "mine"
    assert "name several runs" in fails(capsys, "report", "runs/My-text", "--out", "page.html")


def test_a_long_command_is_broken_before_its_flags():
    words = ["equilibria", "train", "text", "--explicit", "12", "--out", "runs/a folder", "--resume"]
    assert command(words, width=200) == "equilibria train text --explicit 12 --out 'runs/a folder' --resume"
    lines = command(words, width=50).split(" \\\n")
    assert all(len(line) < 50 for line in lines)
    assert " ".join(line.strip() for line in lines) == command(words, width=200)
