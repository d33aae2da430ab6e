"""A run on byte-pair tokens: every command works on it, and it needs its corpus for scores alone."""

from __future__ import annotations

import json
import shutil

import pytest

import equilibria
from equilibria.__main__ import main
from equilibria.commands.sample import SAMPLE
from equilibria.lm.corpora import BytePairVocabulary, Language, Vocabulary, text_folder
from equilibria.lm.report.comparison import compared
from equilibria.lm.report.figures import draw_together
from equilibria.lm.report.record import read
from equilibria.lm.runs import Run
from small_run import furnish

pytestmark = pytest.mark.filterwarnings("ignore::equilibria.ConvergenceWarning")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with two runs on one text: of byte-pair tokens and of characters."""
    folder = tmp_path_factory.mktemp("bpe")
    furnish(folder)
    for split in ("train", "valid", "test"):
        file = folder / "text" / f"{split}.txt"
        file.write_text(file.read_text(encoding="utf-8").replace("d", "dé"), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setitem(SAMPLE, "bpe", 12)
        for unit, more in (("bpe", ["--vocabulary-size", "262"]), ("character", [])):
            words = ["train", "recipe.py:small", "--data", "text", "--quiet", "--out", unit, "--unit", unit, *more]
            assert main(words) == 0
    return folder


@pytest.fixture
def here(place, tmp_path, monkeypatch):
    """A copy of that folder, in which the test works."""
    shutil.copytree(place, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def said(capsys, *words):
    assert main(words) == 0
    return capsys.readouterr().out


def test_validations_have_bits_per_byte_of_their_text(here):
    run = Run.open(here / "bpe")
    start, *_ = run.events()
    assert start["corpus"]["unit"] == "bpe"
    assert start["corpus"]["bytes"] == {
        s: (here / "text" / f"{s}.txt").stat().st_size for s in ("train", "valid", "test")
    }
    for event in (event for event in run.events() if event["event"] == "valid"):
        assert event["bits_per_byte"] == pytest.approx(event["bits"] * event["tokens"] / event["bytes"])


def test_the_whole_validation_text_is_counted(here, capsys):
    found = json.loads(said(capsys, "evaluate", "bpe", "--json"))
    corpus = text_folder(here / "text", unit="bpe", vocabulary_size=262)
    text = (here / "text" / "valid.txt").read_bytes()
    assert found["bytes"] == len(text) - len(corpus.vocabulary.decode(corpus.valid.ids[:1]).encode())
    assert found["tokens"] == len(corpus.valid)
    assert found["bits_per_byte"] == pytest.approx(found["bits"] * found["tokens"] / found["bytes"])
    table = said(capsys, "evaluate", "bpe")
    assert "bits per BPE token" in table
    assert f"{found['bits_per_byte']:.4f}" in table


def test_it_generates_without_its_corpus_and_without_learning_again(here, capsys, monkeypatch):
    shutil.rmtree(here / "text")
    monkeypatch.setattr(BytePairVocabulary, "learnt", None)
    before = said(capsys, "generate", "bpe", "--prompt", "日 abc", "--length", "12", "--seed", "3")
    assert before.startswith("日 abc")
    trained = equilibria.load("bpe")
    assert before == "日 abc" + trained.generate("日 abc", length=12, seed=3) + "\n"
    assert isinstance(trained.vocabulary, BytePairVocabulary)
    assert "\n" not in trained.generate("abc", length=60, stop="\\n")


def test_report_export_and_doctor(here, capsys):
    said(capsys, "report", "bpe")
    page = (here / "bpe" / "report" / "index.html").read_text(encoding="utf-8")
    assert "perplexity per BPE token" in page
    assert "Bits per byte" in page
    found = json.loads(said(capsys, "report", "bpe", "--json"))["summary"]["validation"]
    assert found["bits_per_byte"] == read(here / "bpe").best["bits_per_byte"]
    assert "weights of step" in said(capsys, "export", "bpe")
    assert "262 BPE tokens, learnt by tokenizers" in said(capsys, "doctor", "bpe")


@pytest.mark.slow
def test_runs_of_different_tokens_are_compared_in_bits_per_byte(here):
    records = [read(here / name) for name in ("bpe", "character")]
    (drawing,) = draw_together(records)  # no training losses, which are per token
    assert drawing.name == "validation"
    page = compared(records, [])
    assert "the same text as different tokens, so compare their bits per byte" in page
    (here / "text" / "valid.txt").write_text("abc d\n" * 20)
    assert main(["train", "recipe.py:small", "--data", "text", "--quiet", "--out", "other"]) == 0
    assert "read different corpora" in compared([*records, read(here / "other")], [])


@pytest.mark.slow
def test_it_goes_on_with_the_merges_of_the_run_though_others_are_learnt_now(here, monkeypatch):
    before = Run.open(here / "bpe").language.vocabulary
    shutil.rmtree(here / "bpe" / "checkpoints" / "step-00000008")
    real = Vocabulary.of_lines

    def otherwise(lines, unit, *, size):
        return real(lines, unit, size=260)  # as another version of the library might

    monkeypatch.setattr(Vocabulary, "of_lines", staticmethod(otherwise))
    text = text_folder(here / "text", unit="bpe", vocabulary_size=262)
    assert text.vocabulary != before
    words = ["train", "recipe.py:small", "--data", "text", "--quiet", "--unit", "bpe", "--vocabulary-size", "262"]
    assert main([*words, "--out", "bpe", "--resume"]) == 0
    run = Run.open(here / "bpe")
    assert run.language.vocabulary == before
    assert run.newest().step == 8
    assert main(["evaluate", "bpe"]) == 0
    assert Language.of(text).changed(text) == []


def test_another_text_is_scored_with_the_merges_of_the_run(here, capsys):
    (here / "other.txt").write_text("zebra é\n" * 3, encoding="utf-8")
    found = json.loads(said(capsys, "evaluate", "bpe", "--data", "other.txt", "--json"))
    assert found["bytes"] == len("zebra é\n".encode()) * 3 - 1
    (here / "folder").mkdir()
    for split in ("train", "valid", "test"):
        (here / "folder" / f"{split}.txt").write_text("zebra é\n" * 3, encoding="utf-8")
    assert json.loads(said(capsys, "evaluate", "bpe", "--data", "folder", "--json"))["nats"] == found["nats"]


def test_prepare_shows_the_tokens(here, capsys):
    words = ["prepare", "text-folder", "--data", "text", "--unit", "bpe", "--vocabulary-size", "262"]
    found = json.loads(said(capsys, *words, "--json"))
    assert found["vocabulary"] == 262
    assert found["learnt_by"].startswith("tokenizers ")
    corpus = text_folder(here / "text", unit="bpe", vocabulary_size=262)
    first = len(corpus.vocabulary.decode(corpus.valid.ids[:1]).encode())
    assert found["splits"]["valid"]["predicted_bytes"] == (here / "text" / "valid.txt").stat().st_size - first
    assert "newline" in said(capsys, *words)
    assert main([*words[:-1], "20"]) == 2
    assert "256 bytes" in capsys.readouterr().err


def test_without_the_library_one_sentence_says_how_to_install_it(here, capsys, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert main(["train", "recipe.py:small", "--data", "text", "--unit", "bpe", "--out", "new"]) == 1
    assert "tokenizers is not installed" in (error := capsys.readouterr().err)
    assert 'pip install "equilibria[tokenizers]"' in error
    assert not (here / "new").exists()
    assert main(["report", "bpe"]) == 0
