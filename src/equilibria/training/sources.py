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
class TextFolder(Source):
    """A folder with train.txt, valid.txt and test.txt."""

    root: Path | None = None
    """The folder."""
    unit: Literal["word", "character"] = "word"
    """What one token is."""
    lowercase: bool = False
    """Whether capital letters are lowered first."""

    def __post_init__(self) -> None:
        _from_anywhere(self)

    def load(self) -> Corpus:
        """The corpus; its vocabulary is that of train.txt."""
        return corpora.text_folder(_required(self), unit=self.unit, lowercase=self.lowercase)


@dataclasses.dataclass(frozen=True)
class PennTreebank(Source):
    """The Penn Treebank by words, as Mikolov prepared it: a folder with train.txt, valid.txt and test.txt."""

    unit: ClassVar = "word"
    """What one token is."""
    root: Path | None = None
    """The folder."""

    def __post_init__(self) -> None:
        _from_anywhere(self)

    def load(self) -> Corpus:
        """The corpus, its token counts checked."""
        return corpora.penn_treebank(_required(self))


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


CATALOGUE = (PythonDocs, TextFolder, PennTreebank, Copying)


def _from_anywhere(source: TextFolder | PennTreebank) -> None:
    """Make the folder's path absolute: a run may be continued from another working directory."""
    if source.root is not None:
        object.__setattr__(source, "root", source.root.expanduser().absolute())


def _required(source: TextFolder | PennTreebank) -> Path:
    if source.root is None:
        raise ValueError(
            f"{type(source).__name__}(root=None): this corpus is read from a folder with train.txt, valid.txt and "
            "test.txt, and none was named; give it with --corpus.root FOLDER or --data FOLDER."
        )
    return source.root
