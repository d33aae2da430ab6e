"""Where the text of an experiment comes from: one small frozen value a corpus, with ``load()``."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar, Literal

from equilibria import corpora
from equilibria.corpora import Corpus


class Source(ABC):
    """Names a corpus and how to read it. Subclasses are frozen dataclasses of options."""

    @abstractmethod
    def load(self) -> Corpus:
        """The corpus, read anew."""


@dataclasses.dataclass(frozen=True)
class PythonDocs(Source):
    """Characters of the English documentation that every CPython carries (``pydoc_data.topics``); no download."""

    unit: ClassVar = "character"
    """What one token is."""

    def load(self) -> Corpus:
        """The corpus: 18 twentieths for training, one for validation, one for testing."""
        return corpora.python_docs()


@dataclasses.dataclass(frozen=True)
class FolderSource(Source):
    """A corpus that is read from a folder with a file for training, one for validation and one for testing."""

    files: ClassVar[str] = "train.txt, valid.txt and test.txt"
    """What the folder holds."""
    origin: ClassVar[str] = ""
    """Where such a folder comes from, for the error when none was named."""
    root: Path | None = None
    """The folder."""

    def __post_init__(self) -> None:
        """Makes the folder's path absolute: a run may be continued from another working directory."""
        if self.root is not None:
            object.__setattr__(self, "root", self.root.expanduser().absolute())

    def folder(self) -> Path:
        """The folder; an error if none was named."""
        if self.root is None:
            raise ValueError(
                f"{type(self).__name__}(root=None): this corpus is read from a folder with {self.files}, and none was "
                f"named; give it with --corpus.root FOLDER or --data FOLDER{self.origin}."
            )
        return self.root


@dataclasses.dataclass(frozen=True)
class TextFolder(FolderSource):
    """A folder with train.txt, valid.txt and test.txt."""

    unit: Literal["word", "character"] = "word"
    """What one token is."""
    lowercase: bool = False
    """Whether capital letters are lowered first."""

    def load(self) -> Corpus:
        """The corpus; its vocabulary is that of train.txt."""
        return corpora.text_folder(self.folder(), unit=self.unit, lowercase=self.lowercase)


@dataclasses.dataclass(frozen=True)
class PennTreebank(FolderSource):
    """The Penn Treebank by words, as Mikolov prepared it: a folder with train.txt, valid.txt and test.txt."""

    unit: ClassVar = "word"
    """What one token is."""

    def load(self) -> Corpus:
        """The corpus, its token counts checked."""
        return corpora.penn_treebank(self.folder())


@dataclasses.dataclass(frozen=True)
class PennTreebankCharacters(FolderSource):
    """The Penn Treebank by characters, from the same three files as ``PennTreebank``."""

    unit: ClassVar = "character"
    """What one token is."""

    def load(self) -> Corpus:
        """The corpus, its counts checked."""
        return corpora.penn_treebank_characters(self.folder())


@dataclasses.dataclass(frozen=True)
class WikiText103(FolderSource):
    """WikiText-103 by words: a folder with its three token files."""

    unit: ClassVar = "word"
    """What one token is."""
    files: ClassVar[str] = "wiki.train.tokens, wiki.valid.tokens and wiki.test.tokens"
    """What the folder holds."""
    origin: ClassVar[str] = "; `equilibria prepare wikitext103` fetches one"
    """Where such a folder comes from."""

    def load(self) -> Corpus:
        """The corpus, its token counts checked; some half a minute."""
        return corpora.wikitext103(self.folder())


@dataclasses.dataclass(frozen=True)
class WikiText2(FolderSource):
    """WikiText-2 by words: a folder with its three token files."""

    unit: ClassVar = "word"
    """What one token is."""
    files: ClassVar[str] = WikiText103.files
    """What the folder holds."""
    origin: ClassVar[str] = "; `equilibria prepare wikitext2` fetches one"
    """Where such a folder comes from."""

    def load(self) -> Corpus:
        """The corpus, its token counts checked."""
        return corpora.wikitext2(self.folder())


@dataclasses.dataclass(frozen=True)
class Copying(Source):
    """The copy-memory task: ten symbols, a long blank, and the ten symbols are to be recalled."""

    unit: ClassVar = "symbol"
    """What one token is."""
    blank: int = 400
    """T: steps between the symbols and their recall; a sequence has T + 20 steps."""
    train: int = 20_000
    """Sequences to train on."""
    valid: int = 2_000
    """Sequences to validate on."""
    test: int = 2_000
    """Sequences to test on."""
    variant: Literal["paper", "tcn"] = "paper"
    """One delimiter (Bai, Kolter, Koltun 2019, appendix F) or eleven (Bai, Kolter, Koltun 2018)."""
    seed: int = 0
    """Draws the sequences."""

    def load(self) -> Corpus:
        """The corpus, drawn anew; the same seed gives the same sequences."""
        return corpora.copying(
            blank=self.blank,
            train=self.train,
            valid=self.valid,
            test=self.test,
            variant=self.variant,
            seed=self.seed,
        )


CATALOGUE = (PythonDocs, TextFolder, PennTreebank, PennTreebankCharacters, WikiText103, WikiText2, Copying)
