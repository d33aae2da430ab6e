"""Source: the name and the options of a corpus, as a small frozen value inside an experiment."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

from equilibria.lm.corpora.corpus import Corpus
from equilibria.lm.paths import path_of


class Source(ABC):
    """Names a corpus and loads it. Subclasses are frozen dataclasses, whose fields are the options of the loader."""

    chance: ClassVar[float | None] = None
    """The share of answers that are right by guessing, in a synthetic task; None for text."""

    @abstractmethod
    def load(self) -> Corpus:
        """The corpus; every call reads or draws it again."""

    def memoryless_nll(self) -> float | None:
        """The mean loss of the best model without memory, in nats per token, of a synthetic task; None for text."""
        return None


@dataclasses.dataclass(frozen=True)
class FolderSource(Source):
    """A corpus in a folder with one file for training, one for validation and one for the test."""

    files: ClassVar[str] = "train.txt, valid.txt and test.txt"
    """The names of the files, for errors."""
    origin: ClassVar[str] = ""
    """How to get such a folder, for the error when none was named."""
    root: Path | None = None
    """The folder."""

    def __post_init__(self) -> None:
        """Make the path absolute: a run may be continued from another working directory."""
        if self.root is not None:
            object.__setattr__(self, "root", path_of(type(self).__name__, root=self.root).absolute())

    def folder(self) -> Path:
        """The folder; a ValueError if none was named."""
        if self.root is None:
            raise ValueError(
                f"{type(self).__name__}(root=None): this corpus is read from a folder with {self.files}, and no "
                f"folder was named; give it with --corpus.root FOLDER or --data FOLDER{self.origin}."
            )
        return self.root
