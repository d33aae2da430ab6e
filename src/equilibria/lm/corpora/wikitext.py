"""wikitext103, wikitext2: articles of Wikipedia by words, long enough for a memory to help."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import ClassVar

from equilibria.lm.corpora.corpus import Corpus
from equilibria.lm.corpora.source import FolderSource
from equilibria.lm.corpora.text_folder import published

WIKITEXT103_COUNTS = {"train": 103_227_021, "valid": 217_646, "test": 245_569, "vocabulary": 267_735}
"""Tokens of each split of WikiText-103 (Merity et al. 2017), with one ``<eos>`` per line, and different words."""
WIKITEXT2_COUNTS = {"train": 2_088_628, "valid": 217_646, "test": 245_569, "vocabulary": 33_278}
"""The same numbers for WikiText-2; its validation and test texts are those of WikiText-103."""


def wikitext103(root: Path) -> Corpus:
    """WikiText-103 from the folder with its token files ``wiki.train.tokens``, ``wiki.valid.tokens``, ….

    Words are separated by whitespace and keep their case; every line ends in ``<eos>``, also a blank one; ``<unk>`` is
    an ordinary word. The vocabulary is that of the training text, by decreasing frequency after ``<eos>`` = 0, as
    adaptive softmaxes expect.

    Reading takes about half a minute and 1.5 GB of memory, of which the ids keep 0.8 GB.

    Reference: Merity, Xiong, Bradbury, Socher 2017, "Pointer sentinel mixture models".

    Args:
        root: the folder.

    Raises:
        ValueError: the token counts are not the published ones, for example those of the raw variant.
    """
    return published(
        root,
        counts=WIKITEXT103_COUNTS,
        name="wikitext103",
        title="WikiText-103 of the literature",
        files="the token files of wikitext-103-v1",
    )


def wikitext2(root: Path) -> Corpus:
    """WikiText-2, a fiftieth of WikiText-103 with its own vocabulary, read in the same way as WikiText-103.

    Args:
        root: the folder.

    Raises:
        ValueError: the token counts are not the published ones.
    """
    return published(
        root,
        counts=WIKITEXT2_COUNTS,
        name="wikitext2",
        title="WikiText-2 of the literature",
        files="the token files of wikitext-2-v1",
    )


@dataclasses.dataclass(frozen=True)
class WikiText103(FolderSource):
    """WikiText-103 by words: a folder with its three token files."""

    unit: ClassVar = "word"
    """The unit of a token."""
    files: ClassVar[str] = "wiki.train.tokens, wiki.valid.tokens and wiki.test.tokens"
    """The names of the files, for errors."""
    origin: ClassVar[str] = "; `equilibria prepare wikitext103` fetches one"
    """How to get such a folder, for the error when none was named."""

    def load(self) -> Corpus:
        """The corpus; takes about half a minute. A ValueError if its token counts are not the published ones."""
        return wikitext103(self.folder())


@dataclasses.dataclass(frozen=True)
class WikiText2(FolderSource):
    """WikiText-2 by words: a folder with its three token files."""

    unit: ClassVar = "word"
    """The unit of a token."""
    files: ClassVar[str] = WikiText103.files
    """The names of the files, for errors."""
    origin: ClassVar[str] = "; `equilibria prepare wikitext2` fetches one"
    """How to get such a folder, for the error when none was named."""

    def load(self) -> Corpus:
        """The corpus; a ValueError if its token counts are not the published ones."""
        return wikitext2(self.folder())
