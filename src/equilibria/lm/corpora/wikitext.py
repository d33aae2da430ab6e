"""wikitext103, wikitext2: articles of Wikipedia by words, long enough for memory to matter."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import ClassVar

from equilibria.lm.corpora.corpus import Corpus
from equilibria.lm.corpora.source import FolderSource
from equilibria.lm.corpora.text_folder import published

WIKITEXT103_COUNTS = {"train": 103_227_021, "valid": 217_646, "test": 245_569, "vocabulary": 267_735}
"""Tokens of WikiText-103 (Merity et al. 2017), one ``<eos>`` a line included, blank lines too, and its words."""
WIKITEXT2_COUNTS = {"train": 2_088_628, "valid": 217_646, "test": 245_569, "vocabulary": 33_278}
"""Tokens of WikiText-2, counted likewise; validation and test have the articles of WikiText-103."""


def wikitext103(root: Path) -> Corpus:
    """WikiText-103 from the folder with its token files ``wiki.train.tokens``, ``wiki.valid.tokens``, ….

    Words are what whitespace separates, in their case; every line ends in ``<eos>``, blank ones included; ``<unk>`` is
    a word like any other. The vocabulary is that of the training text, by decreasing frequency after ``<eos>`` = 0, as
    adaptive softmaxes expect. Other counts than the published are refused, those of the raw variant among them.

    Reading takes about half a minute and 1.5 GB of memory, of which the ids keep 0.8 GB.

    Reference: Merity, Xiong, Bradbury, Socher 2017, "Pointer sentinel mixture models".
    """
    return published(
        root,
        counts=WIKITEXT103_COUNTS,
        name="wikitext103",
        title="WikiText-103 of the literature",
        files="the token files of wikitext-103-v1",
    )


def wikitext2(root: Path) -> Corpus:
    """WikiText-2, a fiftieth of WikiText-103 with a vocabulary of its own, read in the same way."""
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
    """What one token is."""
    files: ClassVar[str] = "wiki.train.tokens, wiki.valid.tokens and wiki.test.tokens"
    """What the folder holds."""
    origin: ClassVar[str] = "; `equilibria prepare wikitext103` fetches one"
    """Where such a folder comes from."""

    def load(self) -> Corpus:
        """The corpus, its token counts checked; some half a minute."""
        return wikitext103(self.folder())


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
        return wikitext2(self.folder())
