"""The trained model inside the library: found by its name, the same on every machine, and never written to."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
import shutil
from pathlib import Path

import pytest

import equilibria
from equilibria.__main__ import main
from equilibria.errors import UsageError
from equilibria.lm.recipes import RECIPES
from equilibria.lm.runs import shipped
from small_run import fails

CARD = (shipped.FOLDER / "README.md").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def empty(tmp_path, monkeypatch):
    """A working directory without runs."""
    monkeypatch.chdir(tmp_path)


def content(folder):
    """Every file of a folder with its checksum."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def own_run(place):
    """A copy of the model as a run of the user's own, with another name in its experiment.json."""
    shutil.copytree(shipped.FOLDER / "tiny", place)
    described = place / "experiment.json"
    described.write_text(described.read_text().replace('"name": "tiny"', '"name": "mine"', 1))
    return place


def test_the_model_is_the_one_of_the_recipe():
    assert shipped.names() == ["tiny"]
    trained = equilibria.load("tiny")
    assert trained.experiment == RECIPES["tiny"]()
    assert trained.path == shipped.FOLDER / "tiny"
    assert trained.step == 2000
    assert re.search(rf"\| parameters \| {sum(p.numel() for p in trained.model.parameters()):,},", CARD)


def test_it_is_about_a_megabyte():
    assert sum(file.stat().st_size for file in (shipped.FOLDER / "tiny").rglob("*") if file.is_file()) < 1.3 * 2**20


def test_generate_works_at_once(capsys):
    assert main(["generate", "tiny", "--length", "40"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("The ")
    assert len(captured.out) == 4 + 40 + 1
    assert captured.err == "note: tiny is the model of that name inside the library.\n"


def test_evaluate_uses_the_text_of_the_training(capsys):
    assert main(["evaluate", "tiny", "--split", "test", "--max-segments", "12", "--json"]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert found["run"] == str(shipped.FOLDER / "tiny")
    assert found["tokens"] == 12 * 64
    assert 1 < found["bits"] < 2.5
    assert "inside the library" in captured.err


def test_a_python_with_another_text_gives_the_same_score(monkeypatch, capsys):
    """The topics of help() change with every release of Python, and the numbers of the card must not."""
    before = equilibria.load("tiny").evaluate("valid", max_segments=4).nll_per_token
    source = importlib.import_module("equilibria.lm.corpora.python_docs")
    text = source._text()
    monkeypatch.setattr(source, "_text", lambda: text[1000:])
    trained = equilibria.load("tiny")
    assert trained.evaluate("valid", max_segments=4).nll_per_token == before
    with pytest.raises(ValueError, match="is not the one that this run was trained"):
        trained.evaluate("train")
    assert main(["doctor", "tiny"]) == 0
    assert "evaluating uses the text that the run keeps" in capsys.readouterr().out


def test_a_kept_text_that_was_changed_is_an_error():
    place = own_run(Path("mine"))
    file = place / "texts" / "valid.txt"
    file.write_bytes(file.read_bytes().replace(b"the", b"eht", 1))
    with pytest.raises(ValueError, match=r"valid\.txt is not the valid text of this run"):
        equilibria.load(place).evaluate("valid", max_segments=1)


def test_a_folder_of_that_name_comes_first(capsys):
    own_run(Path("tiny"))
    assert equilibria.load("tiny").experiment.name == "mine"
    assert main(["generate", "tiny", "--length", "3"]) == 0
    assert capsys.readouterr().err == ""


def test_a_folder_of_that_name_without_a_run_is_not_passed_over(capsys):
    """Such as what ``export tiny --format hf --out tiny`` has written."""
    Path("tiny").mkdir()
    with pytest.raises(UsageError, match=r"is not a run .* comes before the model tiny of the library") as error:
        equilibria.load("tiny")
    assert str(Path.cwd() / "tiny") in str(error.value)
    assert "is not a run" in fails(capsys, "evaluate", "tiny")
    named = re.search(r"by its path, (.*)\.$", str(error.value))
    assert named
    assert equilibria.load(named.group(1)).step == 2000


def test_a_model_and_a_score_print_one_short_line():
    trained = equilibria.load("tiny")
    shown, place = "Transformer, 265,575 parameters, 103 characters, step 2,000", str(shipped.FOLDER / "tiny")
    assert repr(trained) == f"Trained('tiny': {shown}, {place!r})"
    found = trained.evaluate(max_segments=2)
    assert repr(found) == str(found)
    assert str(found).startswith(f"{found.bits:.3f} bits per character, {found.bits_per_byte:.3f} bits per byte")
    assert "\n" not in str(found)


def test_a_run_of_that_name_comes_before_the_library(capsys):
    own_run(Path("runs", "tiny"))
    assert equilibria.load("tiny").experiment.name == "mine"
    assert main(["generate", "tiny", "--length", "3"]) == 0
    assert capsys.readouterr().err == f"note: tiny is the run {Path('runs', 'tiny')}.\n"


def test_a_name_that_is_nearly_right_is_told():
    with pytest.raises(UsageError, match="did you mean tiny"):
        equilibria.load("tinny")


def test_nothing_is_written_into_the_library(capsys):
    before = content(shipped.FOLDER)
    assert main(["generate", "tiny", "--length", "3"]) == 0
    assert main(["doctor", "tiny"]) == 0
    assert main(["export", "tiny", "--out", "weights.safetensors"]) == 0
    capsys.readouterr()
    own_run(Path("runs", "mine"))
    inside = str(shipped.FOLDER / "tiny")
    for words in (["report", inside], ["report", inside, "runs/mine"], ["export", inside]):
        assert "nothing is written there" in fails(capsys, *words)
    for how in ("--resume", "--overwrite"):
        assert "nothing is written there" in fails(capsys, "train", "tiny", "--out", inside, how)
    assert content(shipped.FOLDER) == before


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="no folder is read-only for the superuser")
def test_a_read_only_installation_is_enough(monkeypatch, capsys):
    shutil.copytree(shipped.FOLDER, "copy")
    copied = [Path("copy"), *Path("copy").rglob("*")]
    monkeypatch.setattr(shipped, "FOLDER", Path("copy").resolve())
    for path in copied:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        assert main(["generate", "tiny", "--length", "3"]) == 0
        assert main(["evaluate", "tiny", "--max-segments", "1"]) == 0
    finally:
        for path in copied:
            path.chmod(0o755)


def test_a_run_without_a_sample_needs_a_prompt(capsys):
    place = own_run(Path("mine"))
    shutil.rmtree(place / "report")
    assert "generate needs --prompt" in fails(capsys, "generate", str(place))


@pytest.mark.slow
@pytest.mark.parametrize("split", ["valid", "test"])
def test_the_card_has_the_scores(split):
    bits = equilibria.load("tiny").evaluate(split).bits
    name = {"valid": "validation", "test": "test"}[split]
    (shown,) = re.findall(rf"\| {name} \| ([\d.]+) bits per character", CARD)
    assert bits == pytest.approx(float(shown), abs=2e-4)
