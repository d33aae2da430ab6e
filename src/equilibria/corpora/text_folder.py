"""text_folder: a corpus from a folder with one text file for training, one for validation and one for test."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from equilibria.corpora.corpus import Corpus, Stream
from equilibria.corpora.vocabulary import TextUnit, Vocabulary, check_unit

FILE_NAMES = ("{split}.txt", "ptb.{split}.txt", "wiki.{split}.tokens")
"""What the file of a split may be called; the first that is there is read."""

PENN_TREEBANK_COUNTS = {"train": 929589, "valid": 73760, "test": 82430, "vocabulary": 10000}
"""Tokens of the Penn Treebank as Mikolov et al. (2010) prepared it, one ``<eos>`` a line included, and its words."""


def text_folder(root: Path, *, unit: TextUnit = "word", lowercase: bool = False) -> Corpus:
    """The corpus in the files ``train.txt``, ``valid.txt`` and ``test.txt`` (UTF-8) of a folder.

    The vocabulary is that of the training text only. A word of the other two that it lacks becomes ``<unk>`` if the
    training text contains ``<unk>``, and is an error otherwise.

    Args:
        root: the folder; ``ptb.train.txt`` and ``wiki.train.tokens`` are other names that are understood.
        unit: what a token is.
        lowercase: fold the case. Corpora that are in lower case already lose by it: Penn Treebank's number token ``N``
            would become the word ``n``.
    """
    check_unit(unit)
    paths = {split: _find(root.expanduser(), split) for split in ("train", "valid", "test")}
    texts = {split: _read(path) for split, path in paths.items()}
    if lowercase:
        texts = {split: text.lower() for split, text in texts.items()}
    vocabulary = Vocabulary.of_text(texts["train"], unit)
    return Corpus(
        name=root.expanduser().resolve().name,
        **{split: _stream(text, vocabulary, paths[split]) for split, text in texts.items()},
        vocabulary=vocabulary,
        unit=unit,
    )


def penn_treebank(root: Path) -> Corpus:
    """The Penn Treebank by words, from the folder with its three files; other counts than the published are refused.

    Reference: Mikolov, Karafiát, Burget, Černocký, Khudanpur 2010, "Recurrent neural network based language model".
    """
    corpus = text_folder(root)
    counts = {
        split: 1 + len(getattr(corpus, split)) for split in ("train", "valid", "test")
    }  # 1: the first is no target
    counts["vocabulary"] = len(corpus.vocabulary)
    for name, expected in PENN_TREEBANK_COUNTS.items():
        if counts[name] != expected:
            what = "words in its vocabulary" if name == "vocabulary" else f"tokens in {name}"
            raise ValueError(
                f"{root} is not the Penn Treebank of the literature: it has {counts[name]} {what}, <eos> included, "
                f"instead of {expected}; get the files that Mikolov prepared, or read these with text_folder."
            )
    return dataclasses.replace(corpus, name="penn_treebank")


def _find(root: Path, split: str) -> Path:
    """The file of a split."""
    if not root.is_dir():
        state = "is a file" if root.exists() else "does not exist"
        raise FileNotFoundError(
            f"{root} {state}, and a corpus is a folder with train.txt, valid.txt and test.txt; check the path."
        )
    names = [name.format(split=split) for name in FILE_NAMES]
    for name in names:
        if (root / name).is_file():
            return root / name
    present = ", ".join(sorted(path.name for path in root.iterdir())[:8])
    raise FileNotFoundError(
        f"{root} has no file for {split}: it holds {present or 'nothing'}, and {' or '.join(names)} is read; "
        "rename or add the file."
    )


def _read(path: Path) -> str:
    """The text of a file: UTF-8, any line ends, not blank."""
    data = path.read_bytes()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path} is not UTF-8: byte 0x{data[error.start]:02x} at byte offset {error.start}, line {line}, cannot be "
            "decoded; convert the file, for example with iconv -f LATIN1 -t UTF-8."
        ) from None
    text = text.removeprefix("\ufeff").replace("\r\n", "\n")
    if not text.strip():
        raise ValueError(
            f"{path} is empty ({len(data)} bytes, no word), and a split needs text; check how it was made."
        )
    return text


def _stream(text: str, vocabulary: Vocabulary, path: Path) -> Stream:
    """The stream of a text; what is wrong with it is said with the name of the file."""
    try:
        return Stream.of_text(vocabulary.encode(text))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
