"""A text of one's own, from a file to a model in Python: the recipe, the short flags, load, and runs compared."""

import json
import shutil

import pytest
import torch

import equilibria
from equilibria.__main__ import main
from equilibria.commands.interrupt import command
from equilibria.commands.sample import prompt_of
from equilibria.commands.train import _options
from equilibria.errors import UsageError
from equilibria.lm.corpora import Corpus, Stream, TextFolder, Vocabulary, text_file
from equilibria.lm.evaluation import evaluate
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


def test_a_text_with_another_name_continues_its_run(place, capsys):
    (place / "My text.txt").rename(place / "moved.txt")
    again = ["train", "text", "--out", "runs/My-text", "--resume", "--quiet"]
    assert main([*again, "--data", "moved.txt"]) == 0
    assert main(again) == 0  # the new place is stored
    assert equilibria.load("runs/My-text").experiment.name == "My-text"
    said = fails(capsys, *again, "--explicit", "4")
    assert "runs/My-text is a run of 'My-text', not of 'text-4-layers'" in said


def test_another_text_does_not_change_the_run_that_it_cannot_continue(place, capsys):
    (place / "other.txt").write_text("The fixed point.\n" * 20)
    before = (place / "runs" / "My-text" / "experiment.json").read_bytes()
    again = ["train", "text", "--out", "runs/My-text", "--resume", "--quiet"]
    assert "is not the one with which" in fails(capsys, *again, "--data", "other.txt", code=1)
    assert (place / "runs" / "My-text" / "experiment.json").read_bytes() == before


def test_a_name_that_is_given_stays(place):
    options, _ = _options("text", ["--data", "My text.txt", "--name", "mine"])
    assert options.experiment.name == "mine"


@pytest.mark.parametrize(
    ("unit", "valid", "prompt"),
    [
        ("character", "abc d\n \n\n.", "abc d\n \n\n"),  # nothing follows the first line
        ("character", "abc d\nba cad\n", "ba cad"),
        ("word", f"a b c d e f g {'x' * 60} h\n", f"a b c d e f g {'x' * 60}"),  # a part would be another word
        ("word", "\n\na b\n", "a b"),
        ("bpe", f"a\nb {'x' * 60}\n", f"b {'x' * 40}"),
    ],
)
def test_the_sample_begins_with_text_that_the_vocabulary_has(unit, valid, prompt):
    vocabulary = Vocabulary.of_text(valid, unit)
    ids = Stream.of_text(vocabulary.encode(valid))
    assert prompt_of(Corpus("own", ids, ids, ids, vocabulary, unit)) == prompt


def test_a_validation_text_that_is_too_short_is_refused_before_the_training(place, capsys):
    (place / "short.txt").write_text("ab" * 50)
    said = fails(capsys, "train", "text", "--data", "short.txt", *QUICK, *QUIET, code=1)
    assert "The validation text has 4 tokens to predict" in said
    assert "try --training.eval-batch-size 4" in said


def test_a_model_is_not_scored_on_what_it_cannot_read(place, unhooked):
    run = equilibria.load("runs/My-text")
    stream, size = run.stream("valid"), len(run.vocabulary)
    cases = (
        ({"warm": "no"}, "warm is True or False"),
        ({"depth": 3}, "the layer of this model is an Equilibrium"),
        ({"vocabulary": Vocabulary.of_text("ab", "character")}, f"the vocabulary has 2 tokens and the model {size}"),
        ({"stream": "a text"}, "it must be a Stream, for example"),
        ({"stream": Stream.of_text(torch.arange(size + 1))}, f"the id {size}, and the model knows 0 … {size - 1}"),
        ({"stream": Stream.of_text(torch.arange(-1, 9))}, "the id -1, and the model knows"),
    )
    for options, sentence in cases:
        with pytest.raises((ValueError, TypeError), match=sentence):
            evaluate(run.model, **({"stream": stream, "segment_length": 8} | options))


@pytest.mark.parametrize(
    ("use", "sentence"),
    [
        (lambda: equilibria.load("runs/My-text", checkpoint="bset"), "checkpoint='bset': it is 'best' or 'last'"),
        (lambda: equilibria.load("runs/My-text", memory_length=2.5), r"load\(memory_length=2.5\): .* whole number"),
        (lambda: equilibria.load("runs/My-text", memory_length=2, segment=0), "segment=0"),
        (lambda: equilibria.load("runs/My-text").evaluate("tset"), "There is no split 'tset'"),
        (lambda: equilibria.load("runs/My-text").evaluate(segment_length=0), r"Segments\(length=0\)"),
        (lambda: equilibria.load("runs/My-text").evaluate(overlap=1.5), r"overlap=1.5\): overlap is a whole number"),
        (lambda: equilibria.load("runs/My-text").evaluate(max_segments=1.5), "max_segments is a whole number"),
        (lambda: equilibria.load("runs/My-text").generate(["The "]), "The prompt is a list"),
        (lambda: equilibria.load("runs/My-text").generate("The ", 2.5), "length is a whole number"),
        (lambda: equilibria.load("runs/My-text").generate("The ", 2, top_k=2.5), "top_k is a whole number"),
        (lambda: equilibria.load("runs/My-text").generate("The ", None), r"generate\(length=None\)"),
        (lambda: equilibria.load("runs/My-text").generate("The ", 2, stop=5), "stop is a text"),
        (lambda: equilibria.load("runs/My-text").pieces("The "), r"a list of texts; try \['The '\]"),
        (lambda: equilibria.load("runs/My-text").evaluate(batch_size=True), "batch_size is a whole number"),
        (lambda: equilibria.load("runs/My-text", segment=0), "segment=0"),
        (lambda: equilibria.load("My text.txt"), "My text.txt is a file, and a run is a folder"),
        (lambda: equilibria.load("runs/My-text", data="~nobody at all"), "does not exist"),
    ],
)
def test_what_python_cannot_mean_is_refused(place, unhooked, use, sentence):
    with pytest.raises((ValueError, TypeError, UsageError), match=sentence):
        use()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["report"], "report needs RUN"),
        (["generate", "runs/My-text", "--prompt", "a", "--prompt", "b"], "give all prompts after one"),
        (["train", "tiny", "--memory-depths", "-1"], "a depth counts layers"),
        (["generate", "runs/My-text", "--run", "x"], "There is no flag --run; `equilibria generate --help`"),
        (["generate", "runs/My-text", "--prompt", "--length", "3"], "--prompt needs a text after it"),
        (["generate", "runs/My-text", "--prompt", "-a"], "There is no flag -a"),
    ],
)
def test_what_a_command_cannot_mean_is_refused(place, capsys, words, sentence):
    assert sentence in fails(capsys, *words)


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


def test_the_advice_about_a_short_text_can_be_followed_in_the_same_folder(tmp_path, monkeypatch, capsys, one_figure):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("The fixed point of a map is where the map")
    words = ["train", "text", "--data", "short.txt", "--out", "short", *QUICK, *QUIET]
    assert "try --training.eval-batch-size 1, or a longer text" in fails(capsys, *words, code=1)
    assert not (tmp_path / "short").exists()
    assert main([*words, "--training.eval-batch-size", "1"]) == 0
    assert "already holds a run" in fails(capsys, *words, code=1)
