"""Every door that takes a path: what is no path is refused, "~" is the home, and nothing is left behind."""

import dataclasses
import os

import pytest

import equilibria
from equilibria.commands.main import run
from equilibria.hf import export, from_run
from equilibria.lm.convert import convert
from equilibria.lm.corpora import TextFolder
from equilibria.lm.corpora.fetch import fetch_wikitext
from equilibria.lm.corpora.text_folder import text_file, text_folder
from equilibria.lm.recipes import RECIPES
from equilibria.lm.report.record import read
from equilibria.lm.runs import Run

DOORS = {
    "load": lambda value: equilibria.load(value),
    "load data": lambda value: equilibria.load("tiny", data=value),
    "Run.open": lambda value: Run.open(value),
    "Run.start": lambda value: Run.start(value, RECIPES["tiny"]()),
    "TextFolder": lambda value: TextFolder(root=value),
    "text_folder": lambda value: text_folder(value),
    "text_file": lambda value: text_file(value),
    "fetch_wikitext": lambda value: fetch_wikitext("wikitext-2-v1", value),
    "convert": lambda value: convert(value, RECIPES["ptb"]()),
    "convert criterion": lambda value: convert("there.pt", RECIPES["ptb"](), criterion=value),
    "export": lambda value: export("tiny", value),
    "export run": lambda value: export(value, "new"),
    "from_run": lambda value: from_run(value),
    "read": lambda value: read(value),
}


pytestmark = pytest.mark.usefixtures("unhooked")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """A working directory and a home of their own."""
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("value", [5, b"runs/tiny", ["runs"], 3.5, True], ids=repr)
def test_what_is_no_path_is_refused(door, value):
    with pytest.raises(TypeError, match=r"a path is a text or a pathlib\.Path, such as"):
        DOORS[door](value)
    assert os.listdir() == []


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    ("value", "said"), [("", "the empty text is no path"), ("a\0b", "holds a zero byte")], ids=["empty", "zero"]
)
def test_a_text_that_names_nothing_is_refused(door, value, said):
    with pytest.raises(ValueError, match=said):
        DOORS[door](value)
    assert os.listdir() == []


@pytest.mark.parametrize("door", sorted(DOORS.keys() - {"load data", "TextFolder", "convert criterion"}))
def test_none_is_no_path(door):
    with pytest.raises(TypeError, match="a path is a text"):
        DOORS[door](None)


def test_the_home_is_meant_by_a_tilde(elsewhere):
    experiment = RECIPES["tiny"]()
    started = Run.start("~/run", experiment)
    assert started.path == elsewhere / "home" / "run"
    assert Run.open("~/run").path == started.path
    assert read("~/run").path == started.path
    with pytest.raises(equilibria.EquilibriaError, match="no good checkpoint yet"):
        equilibria.load("~/run")
    export("tiny", "~/hf")
    assert (elsewhere / "home" / "hf" / "config.json").is_file()
    assert os.listdir() == []


class Named:
    """A path of another library, as ``os.DirEntry`` and pytest's ``tmpdir`` are."""

    def __init__(self, name):
        self.name = name

    def __fspath__(self):
        return self.name


def test_a_path_of_another_library_is_read_as_its_text(elsewhere):
    run = Run.start(Named("~/run"), RECIPES["tiny"]())
    with os.scandir(elsewhere / "home") as entries:
        (entry,) = entries
        assert Run.open(entry).path == run.path
    with pytest.raises(TypeError, match=r"a path is a text or a pathlib\.Path, such as"):
        Run.open(Named(b"run"))
    with pytest.raises(ValueError, match="the empty text is no path"):
        Run.open(Named(""))


def test_a_file_and_a_broken_link_are_no_folders_of_runs(elsewhere):
    (elsewhere / "here" / "file").write_text("mine")
    (elsewhere / "here" / "link").symlink_to("nowhere")
    for name in ("file", "link"):
        with pytest.raises(ValueError, match="exists and is not a run; choose a new or empty folder"):
            Run.start(name, RECIPES["tiny"]())
        with pytest.raises(ValueError, match="exists and is not an empty folder; name a new one"):
            export("tiny", name)
    assert (elsewhere / "here" / "file").read_text() == "mine"
    assert sorted(os.listdir()) == ["file", "link"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["report", ""], "the empty text is no path"),
        (["evaluate", ""], "the empty text is no path"),
        (["train", "tiny", "--out", ""], "the empty text is no path"),
        (["train", "tiny", "--out="], "the empty text is no path"),
        (["train", "ptb", "--data", ""], "the empty text is no path"),
        (["train", "ptb", "--corpus.root", ""], "the empty text is no path"),
        (["export", "tiny", "--out", ""], "the empty text is no path"),
        (["convert", "", "--recipe", "ptb"], "the empty text is no path"),
        (["doctor", "~/absent"], "/home/absent does not exist"),
        (["report", "~/absent"], "/home/absent does not exist"),
        (["train", "ptb", "--data=~/absent"], "/home/absent does not exist"),
    ],
    ids=lambda given: given.replace(" ", "_") if isinstance(given, str) else "_".join(given),
)
def test_the_command_line_reads_paths_in_the_same_way(capsys, words, said):
    """An empty variable, --out "$OUT", would train in the current folder, and --out=~/x in a folder called "~"."""
    assert run(words) in (1, 2)
    shown = capsys.readouterr().err
    assert said in " ".join(shown.split())
    assert "Traceback" not in shown
    assert os.listdir() == []


def test_the_command_line_writes_below_the_home(elsewhere, capsys):
    assert run(["export", "tiny", "--out=~/weights.safetensors"]) == 0
    assert (elsewhere / "home" / "weights.safetensors").is_file()
    assert os.listdir() == []


def test_settings_that_hold_a_path_stay_as_they_were(elsewhere):
    source = TextFolder(root="~/text")
    assert source.root == elsewhere / "home" / "text"
    assert dataclasses.replace(source) == source
