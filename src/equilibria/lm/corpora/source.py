"""Source: names a corpus and how to read it, as a small frozen value that an experiment holds."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

from equilibria.lm.corpora.corpus import Corpus


class Source(ABC):
    """Names a corpus and how to read it. Subclasses are frozen dataclasses of options."""

    @abstractmethod
    def load(self) -> Corpus:
        """The corpus, read anew."""


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
