"""penn_treebank, penn_treebank_characters: a million words of the Wall Street Journal as prepared by Mikolov."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import ClassVar

from equilibria.lm.corpora.corpus import Corpus
from equilibria.lm.corpora.source import FolderSource
from equilibria.lm.corpora.text_folder import published

PENN_TREEBANK_COUNTS = {"train": 929_589, "valid": 73_760, "test": 82_430, "vocabulary": 10_000}
"""Tokens of each split as prepared by Mikolov et al. (2010), with one ``<eos>`` per line, and different words."""
PENN_TREEBANK_CHARACTER_COUNTS = {"train": 5_101_618, "valid": 399_782, "test": 449_945, "vocabulary": 50}
"""Characters of the same three files, and size of their alphabet."""

_FILES = "the files that Mikolov prepared"


def penn_treebank(root: Path) -> Corpus:
    """The Penn Treebank by words, from the folder with its three files.

    Reference: Mikolov, Karafiát, Burget, Černocký, Khudanpur 2010, "Recurrent neural network based language model".

    Args:
        root: the folder.

    Raises:
        ValueError: the token counts are not the published ones.
    """
    return published(
        root,
        counts=PENN_TREEBANK_COUNTS,
        name="penn_treebank",
        title="the Penn Treebank of the literature",
        files=_FILES,
    )


def penn_treebank_characters(root: Path) -> Corpus:
    """The Penn Treebank by characters, from the same three files of words.

    Every character of the files is a token, including blanks (each line begins and ends with one), the letters of
    ``<unk>`` and ``N``, and the end of a line, which is one symbol like the ``<eos>`` of the words. The code of
    TrellisNet (Bai, Kolter, Koltun 2019) reads the files in the same way.

    Publications count 5,059K, 396K and 446K characters in Mikolov's files ``ptb.char.*.txt``: one fewer per line,
    namely one of the two blanks around the end of a line. That blank is certain and so lowers the mean: the same model
    has 0.8 % fewer bits per character here.

    Args:
        root: the folder with the files of words.

    Raises:
        ValueError: the character counts are not those of the three files.
    """
    return published(
        root,
        counts=PENN_TREEBANK_CHARACTER_COUNTS,
        name="penn_treebank_characters",
        title="the Penn Treebank by characters",
        files=f"{_FILES}, the ones of words",
        unit="character",
    )


@dataclasses.dataclass(frozen=True)
class PennTreebank(FolderSource):
    """The Penn Treebank by words, as prepared by Mikolov: a folder with train.txt, valid.txt and test.txt."""

    unit: ClassVar = "word"
    """The unit of a token."""

    def load(self) -> Corpus:
        """The corpus; a ValueError if its token counts are not the published ones."""
        return penn_treebank(self.folder())


@dataclasses.dataclass(frozen=True)
class PennTreebankCharacters(FolderSource):
    """The Penn Treebank by characters, from the same three files as ``PennTreebank``."""

    unit: ClassVar = "character"
    """The unit of a token."""

    def load(self) -> Corpus:
        """The corpus; a ValueError if its character counts are not those of the files."""
        return penn_treebank_characters(self.folder())
