"""WikiText: read line by line, counted, and fetched as the files that it was published as."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
import tracemalloc
import types
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equilibria.__main__ import main
from equilibria.lm.corpora import (
    WIKITEXT2_COUNTS,
    WIKITEXT103_COUNTS,
    Vocabulary,
    WikiText2,
    WikiText103,
    fetch_wikitext,
    wikitext2,
    wikitext103,
)
from equilibria.lm.corpora.fetch import is_vacant
from equilibria.lm.experiments import from_json, to_json
from small_experiment import experiment
from small_run import fails

TEXTS = {
    "train": " \n = Title = \n \n The <unk> cat , the cat \u2028 and\x85 a <unk> . \n \n",
    "valid": " \n = The dog = \n \n",
    "test": " \n = = A cat = = \n \n the 7 @.@ 5 cats \n",
}
COUNTS = {"train": 18, "valid": 7, "test": 15, "vocabulary": 11}
FILES = ["wiki.test.tokens", "wiki.train.tokens", "wiki.valid.tokens"]


def write(folder: Path, texts: dict[str, str] = TEXTS) -> Path:
    folder.mkdir()
    for split, text in texts.items():
        (folder / f"wiki.{split}.tokens").write_bytes(text.encode())
    return folder


@pytest.fixture
def counted(monkeypatch):
    """The counts of the texts above in the place of the published ones."""
    for published in (WIKITEXT103_COUNTS, WIKITEXT2_COUNTS):
        for name, count in COUNTS.items():
            monkeypatch.setitem(published, name, count)


# Reading


def reference(text: str) -> list[str]:
    """The words of a text as they were defined before it was read line by line: all at once."""
    if text and not text.endswith("\n"):
        text += "\n"
    return text.replace("\n", " <eos> ").split()


def by_frequency(text: str) -> tuple[str, ...]:
    counts = Counter(text.split())
    return ("<eos>", *(word for word, _ in counts.most_common() if word != "<eos>"))


ODD = st.lists(st.sampled_from(["<eos>", "<unk>", *"abé \n\t\r\v\f\x1c\x85\u2028\u3000"])).map("".join)
"""Text with all sorts of white space, of which only the line feed ends a line."""


@given(ODD)
@settings(deadline=None)
def test_reading_line_by_line_is_reading_at_once(text):
    vocabulary, ids = Vocabulary.of_lines(io.StringIO(text, newline="\n"), "word")
    assert vocabulary.tokens == by_frequency(text)
    assert vocabulary == Vocabulary.of_text(text, "word")
    assert [vocabulary.tokens[place] for place in ids.tolist()] == reference(text)
    assert ids.dtype == torch.int64
    assert torch.equal(vocabulary.encode(text), ids)


@given(ODD, ODD)
@settings(deadline=None)
def test_unknown_words_are_unk_or_named_with_their_place(train, text):
    vocabulary, words = Vocabulary.of_text(train, "word"), reference(text)
    missing = [place for place, word in enumerate(words) if word not in vocabulary.tokens]
    if missing and vocabulary.unknown is None:
        with pytest.raises(ValueError, match=rf"\(position {missing[0]}, line \d+\) is not among"):
            vocabulary.encode(text)
    else:
        known = [word if word in vocabulary.tokens else "<unk>" for word in words]
        assert [vocabulary.tokens[place] for place in vocabulary.encode(text).tolist()] == known


def test_a_text_that_is_read_takes_a_few_bytes_a_token():
    lines = [" the cat sat on the mat . \n"] * 10_000
    tracemalloc.start()
    try:
        vocabulary, ids = Vocabulary.of_lines(lines, "word")
        assert torch.equal(vocabulary.encode_lines(lines), ids)
        _, peak = tracemalloc.get_traced_memory()  # without what torch allocates: eight bytes a token
    finally:
        tracemalloc.stop()
    assert peak < 6 * len(ids)  # the words of a text at once, as a list: eight bytes a token and some fifty a word


@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize(("read", "name"), [(wikitext103, "wikitext103"), (wikitext2, "wikitext2")])
def test_words_are_sorted_by_frequency_and_every_line_ends(tmp_path, read, name):
    corpus = read(write(tmp_path / "mine"))
    assert (corpus.name, corpus.unit) == (name, "word")
    assert corpus.vocabulary.tokens == (
        *("<eos>", "=", "<unk>", "cat"),  # the two that occur twice in the order of their first
        *("Title", "The", ",", "the", "and", "a", "."),
    )


@pytest.mark.parametrize(
    ("read", "title", "expected"),
    [(wikitext103, "WikiText-103", "103,227,021"), (wikitext2, "WikiText-2", "2,088,628")],
)
def test_other_files_are_refused_and_text_folder_named(tmp_path, read, title, expected):
    with pytest.raises(
        ValueError,
        match=rf"mine is not {title} of the literature: it has 18 tokens in train.* {expected};.*text_folder",
    ):
        read(write(tmp_path / "mine"))


@pytest.mark.usefixtures("counted")
def test_every_count_is_checked(tmp_path, monkeypatch):
    folder = write(tmp_path / "mine")
    for part in COUNTS:
        with monkeypatch.context() as patch:
            patch.setitem(WIKITEXT103_COUNTS, part, 1_000_000)
            with pytest.raises(ValueError, match=rf"it has {COUNTS[part]} .*{part}.* instead of 1,000,000"):
                wikitext103(folder)


def test_a_missing_split_is_named(tmp_path):
    folder = write(tmp_path / "mine")
    (folder / "wiki.valid.tokens").unlink()
    with pytest.raises(FileNotFoundError, match=r"no file for valid: it holds wiki\.test\.tokens, wiki\.train\.tokens"):
        wikitext103(folder)


def test_validation_and_test_have_their_published_counts(data):
    with (data / "wikitext-2" / "valid.txt").open(encoding="utf-8", newline="\n") as lines:
        vocabulary, valid = Vocabulary.of_lines(lines, "word")
    with (data / "wikitext-2" / "test.txt").open(encoding="utf-8", newline="\n") as lines:
        test = vocabulary.encode_lines(lines)
    for counts in (WIKITEXT103_COUNTS, WIKITEXT2_COUNTS):
        assert (len(valid), len(test)) == (counts["valid"], counts["test"])
    assert vocabulary.tokens[:4] == ("<eos>", "the", "<unk>", ",")


# Fetching


@dataclasses.dataclass
class Rows:
    """One split, which is read in batches."""

    lines: list[str]

    def iter(self, batch_size: int):
        for start in range(0, len(self.lines), batch_size):
            yield {"text": self.lines[start : start + batch_size]}


class Hub(types.ModuleType):
    """A module in the place of ``datasets``, with the texts above cut to rows as the real data set is."""

    def __init__(self) -> None:
        super().__init__("datasets")
        self.asked: list[tuple[str, str]] = []

    def load_dataset(self, path: str, name: str) -> dict[str, object]:
        self.asked.append((path, name))
        return {split: self.rows(TEXTS["valid" if split == "validation" else split]) for split in self.splits}

    splits = ("test", "train", "validation")

    def rows(self, text: str) -> Rows:
        return Rows([line + "\n" if line.strip() else "" for line in text.removesuffix("\n").split("\n")])


@pytest.fixture
def hub(monkeypatch) -> Hub:
    hub = Hub()
    monkeypatch.setitem(sys.modules, "datasets", hub)
    return hub


def test_what_is_fetched_is_the_published_files_byte_for_byte(tmp_path, hub):
    fetch_wikitext("wikitext-103-v1", tmp_path / "new" / "folder")
    assert hub.asked == [("Salesforce/wikitext", "wikitext-103-v1")]
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == FILES
    for split, text in TEXTS.items():
        assert (tmp_path / "new" / "folder" / f"wiki.{split}.tokens").read_bytes() == text.encode()


@pytest.mark.parametrize("error", [OSError(28, "No space left"), KeyboardInterrupt()])
def test_a_fetch_that_dies_leaves_no_part_of_a_file_and_can_be_repeated(tmp_path, hub, monkeypatch, error):
    def dying(rows: Rows, batch_size: int):
        yield {"text": rows.lines}
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(Rows, "iter", dying)
        with pytest.raises(type(error)):
            fetch_wikitext("wikitext-2-v1", tmp_path / "mine")
    assert list((tmp_path / "mine").iterdir()) == []
    (tmp_path / "mine" / "wiki.train.tokens.partial").write_text("left by a fetch that was killed")
    fetch_wikitext("wikitext-2-v1", tmp_path / "mine")
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == FILES


def test_a_failed_download_is_one_sentence_and_leaves_nothing(tmp_path, hub, monkeypatch):
    def unreachable(path: str, name: str):
        raise RuntimeError("Couldn't reach the Hub")

    monkeypatch.setattr(hub, "load_dataset", unreachable)
    with pytest.raises(
        ConnectionError, match=r"wikitext-2-v1, could not .*Couldn't reach the Hub.*into .*mine yourself"
    ):
        fetch_wikitext("wikitext-2-v1", tmp_path / "mine")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(tmp_path, hub):
    (tmp_path / "wiki.valid.tokens").write_text("mine\n")
    with pytest.raises(FileExistsError, match="is not empty"):
        fetch_wikitext("wikitext-103-v1", tmp_path)
    assert (tmp_path / "wiki.valid.tokens").read_text() == "mine\n"
    assert hub.asked == []
    assert not is_vacant(tmp_path / "wiki.valid.tokens")


# The command line


@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize("name", ["wikitext103", "wikitext2"])
@pytest.mark.parametrize("data", [[], ["--data", "mine"]])
def test_prepare_fetches_once_and_says_what_is_there(tmp_path, monkeypatch, capsys, hub, name, data):
    monkeypatch.chdir(tmp_path)
    folder = Path(*(data[1:] or ("data", name.replace("text", "text-"))))
    assert main(["prepare", name, *data]) == 0
    first = capsys.readouterr()
    assert f"Fetching {hub.asked[0][1]} of Salesforce/wikitext into {folder}" in first.err
    assert "18 tokens" in first.out
    assert "11 words" in first.out
    assert "training 11.76%" in first.out  # <unk>: two of the seventeen tokens before the last
    assert sorted(path.name for path in folder.iterdir()) == FILES
    assert main(["prepare", name, *data]) == 0
    second = capsys.readouterr()
    assert second.out == first.out
    assert second.err == ("" if data else f"Reading {folder}; --data names another folder.\n")
    assert len(hub.asked) == 1


def test_prepare_says_what_to_install_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert main(["prepare", "wikitext103"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert 'pip install "equilibria[data]"' in captured.err
    assert list(tmp_path.iterdir()) == []


def test_prepare_refuses_other_files(tmp_path, capsys, hub):
    folder = write(tmp_path / "mine")
    assert "is not WikiText-103" in fails(capsys, "prepare", "wikitext103", "--data", str(folder), code=1)
    assert hub.asked == []


# Sources


@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize("source", [WikiText103, WikiText2])
def test_sources_read_the_folder_and_survive_json(tmp_path, monkeypatch, source):
    write(tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    value = dataclasses.replace(experiment(), corpus=source(root=Path("mine")))
    again = from_json(json.loads(json.dumps(to_json(value))))
    assert again == value
    assert again.corpus == source(root=tmp_path / "mine")
    assert again.corpus.load().name == source.__name__.lower()
    with pytest.raises(
        ValueError, match=rf"wiki\.train\.tokens.*--data FOLDER; `equilibria prepare {source.__name__.lower()}`"
    ):
        source().load()
