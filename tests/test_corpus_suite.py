"""The laws of corpora, for the sources of the library and for a source that breaks them."""

import dataclasses
from pathlib import Path

import pytest
import torch

from equilibria.lm.corpora import (
    CATALOGUE,
    WIKITEXT2_COUNTS,
    WIKITEXT103_COUNTS,
    Copying,
    Corpus,
    PrefixSums,
    PythonDocs,
    Source,
    Stream,
    TextFolder,
    Vocabulary,
    WikiText2,
    WikiText103,
)
from equilibria.lm.testing import CorpusSuite

TEXTS = {
    "train": "the cat sat on the mat\n\nthe  dog sat <unk>\n",
    "valid": "the bird sat\n",
    "test": "on the mat sat\na cat",
}
COUNTS = {"train": 13, "valid": 4, "test": 8, "vocabulary": 8}


def written(folder: Path, name: str) -> Path:
    for split, text in TEXTS.items():
        (folder / name.format(split)).write_text(text, encoding="utf-8")
    return folder


class TestPythonDocs(CorpusSuite):
    def make(self):
        return PythonDocs()


class OfText(CorpusSuite):
    @pytest.fixture(autouse=True)
    def _text(self, tmp_path):
        self.folder = written(tmp_path, "{}.txt")


class TestWords(OfText):
    def make(self):
        return TextFolder(self.folder, unit="word")


class TestLowerCase(OfText):
    def make(self):
        return TextFolder(self.folder, unit="word", lowercase=True)


class TestBytePairs(OfText):
    @pytest.fixture(autouse=True)
    def _long(self, _text):
        for file in self.folder.iterdir():
            file.write_text(file.read_text(encoding="utf-8") * 9, encoding="utf-8")

    def make(self):
        return TextFolder(self.folder, unit="bpe", vocabulary_size=270)


class TestCharacters(CorpusSuite):
    @pytest.fixture(autouse=True)
    def _text(self, tmp_path):
        self.folder = tmp_path
        for split, text in {**TEXTS, "valid": "the cat", "test": "a mat"}.items():
            (tmp_path / f"{split}.txt").write_text(text, encoding="utf-8")

    def make(self):
        return TextFolder(self.folder, unit="character")


class OfWikiText(CorpusSuite):
    @pytest.fixture(autouse=True)
    def _text(self, tmp_path, monkeypatch):
        self.folder = written(tmp_path, "wiki.{}.tokens")
        for name, count in COUNTS.items():
            monkeypatch.setitem(WIKITEXT103_COUNTS, name, count)
            monkeypatch.setitem(WIKITEXT2_COUNTS, name, count)


class TestWikiText103(OfWikiText):
    def make(self):
        return WikiText103(self.folder)


class TestWikiText2(OfWikiText):
    def make(self):
        return WikiText2(self.folder)


class TestCopying(CorpusSuite):
    def make(self):
        return Copying(blank=30, train=12, valid=8, test=4)


class TestCopyingOfTCN(CorpusSuite):
    def make(self):
        return Copying(blank=30, train=12, valid=8, test=4, variant="tcn")


class TestPrefixSums(CorpusSuite):
    def make(self):
        return PrefixSums(length=7, train=20, valid=9, test=8)


def test_every_source_keeps_the_laws():
    tested = {PythonDocs, TextFolder, WikiText103, WikiText2, Copying, PrefixSums}
    # The two of the Penn Treebank need its files; tests/test_corpora.py reads them where they are.
    assert {kind.__name__ for kind in set(CATALOGUE) - tested} == {"PennTreebank", "PennTreebankCharacters"}


@dataclasses.dataclass(frozen=True)
class Broken(Source):
    """A corpus that breaks the law of this name."""

    law: str

    def load(self):
        vocabulary = Vocabulary.of_text("0123456789", "character")
        generator = None if self.law == "every_load" else torch.Generator().manual_seed(0)
        train, valid, test = torch.randint(10, (3, 60), generator=generator)
        if self.law == "splits":
            test = train
        first, second, third = map(Stream.of_text, (train, valid, test))
        if self.law == "next_token":
            second = Stream(tokens=valid[:-1], targets=valid[:-1])
        return Corpus("broken", first, second, third, vocabulary, unit="character")

    def memoryless_nll(self):
        return 3.0 if self.law == "guesses" else None


@pytest.mark.parametrize(
    ("law", "test"),
    [
        ("every_load", "test_every_load_gives_the_same_corpus"),
        ("splits", "test_the_splits_differ"),
        ("next_token", "test_text_asks_for_the_next_token"),
        ("guesses", "test_guesses_are_probabilities_and_losses"),
    ],
)
def test_a_broken_law_is_found(law, test):
    suite, whole = CorpusSuite(), CorpusSuite()
    suite.make, whole.make = lambda: Broken(law), lambda: Broken("none")
    getattr(whole, test)()
    with pytest.raises(AssertionError):
        getattr(suite, test)()
