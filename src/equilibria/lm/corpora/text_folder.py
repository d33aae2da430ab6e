"""text_folder, text_file: a corpus from a folder with one text file per split, or from one file that is cut."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

from equilibria.lm.corpora.corpus import Corpus, Stream
from equilibria.lm.corpora.source import FolderSource
from equilibria.lm.corpora.vocabulary import TextUnit, Vocabulary, check_unit

FILE_NAMES = ("{split}.txt", "ptb.{split}.txt", "wiki.{split}.tokens")
"""What the file of a split may be called; the first that is there is read."""


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
    train, valid, test = (_find(root.expanduser(), split) for split in ("train", "valid", "test"))
    with _naming(train):
        vocabulary, ids = Vocabulary.of_lines(lines_of(train, lowercase=lowercase), unit)
        learnt = Stream.of_text(ids)

    def encoded(path: Path) -> Stream:
        with _naming(path):
            return Stream.of_text(vocabulary.encode_lines(lines_of(path, lowercase=lowercase)))

    return Corpus(
        name=root.expanduser().resolve().name,
        train=learnt,
        valid=encoded(valid),
        test=encoded(test),
        vocabulary=vocabulary,
        unit=unit,
    )


def text_file(file: Path, *, unit: TextUnit = "character", lowercase: bool = False) -> Corpus:
    """The corpus in one text file (UTF-8): its first 90 % for training, then 5 % for validation and 5 % for test.

    The vocabulary is that of the whole file, so that all of it can be scored.

    Args:
        file: the text.
        unit: what a token is.
        lowercase: fold the case.

    Raises:
        ValueError: the file is not UTF-8, empty, or too short to be cut.
    """
    check_unit(unit)
    with _naming(file):
        vocabulary, ids = Vocabulary.of_lines(lines_of(file, lowercase=lowercase), unit)
        first, second = len(ids) * 18 // 20, len(ids) * 19 // 20
        if second - first < 2:
            raise ValueError(
                f"the text has {len(ids)} {unit}s, and a twentieth of it is for validation: give one of at least 40."
            )
        train, valid, test = (Stream.of_text(part) for part in (ids[:first], ids[first:second], ids[second:]))
    return Corpus(name=file.name, train=train, valid=valid, test=test, vocabulary=vocabulary, unit=unit)


def published(
    root: Path, *, counts: Mapping[str, int], name: str, title: str, files: str, unit: TextUnit = "word"
) -> Corpus:
    """The text of a folder, which must be that of the literature.

    Args:
        root: the folder, as for ``text_folder``.
        counts: the tokens of ``train``, ``valid`` and ``test`` and of the ``vocabulary``; of words with ``<eos>``.
        name: what reports call the corpus.
        title: what an error calls it.
        files: what to get instead, for an error.
        unit: what a token is.
    """
    corpus = text_folder(root, unit=unit)
    streams = {"train": corpus.train, "valid": corpus.valid, "test": corpus.test}
    found = {split: 1 + len(stream) for split, stream in streams.items()}  # 1: the first token is no target
    found["vocabulary"] = len(corpus.vocabulary)
    tokens, end = ("tokens", ", <eos> included,") if unit == "word" else ("characters", "")
    for part, expected in counts.items():
        if found[part] != expected:
            what = f"{unit}s in its vocabulary" if part == "vocabulary" else f"{tokens} in {part}"
            raise ValueError(
                f"{root} is not {title}: it has {found[part]:,} {what}{end} instead of {expected:,}; get {files}, or "
                "read these with text_folder."
            )
    return dataclasses.replace(corpus, name=name)


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


def lines_of(path: Path, *, lowercase: bool) -> Iterator[str]:
    """The lines of a file: UTF-8, any line ends, not all blank. It is never in memory as a whole."""
    offset, blank = 0, True
    with path.open("rb") as file:
        for number, data in enumerate(file, 1):
            try:
                line = data.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"not UTF-8: byte 0x{data[error.start]:02x} at byte offset {offset + error.start}, line {number}, "
                    "cannot be decoded; convert the file, for example with iconv -f LATIN1 -t UTF-8."
                ) from None
            if number == 1:
                line = line.removeprefix("\ufeff")
            if line.endswith("\r\n"):
                line = line[:-2] + "\n"
            offset, blank = offset + len(data), blank and not line.strip()
            yield line.lower() if lowercase else line
    if blank:
        raise ValueError(f"the file is empty ({offset} bytes, no word), and a split needs text; check how it was made.")


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Whatever is wrong with a text is said with the name of its file."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


@dataclasses.dataclass(frozen=True)
class TextFolder(FolderSource):
    """Text of your own: a folder with train.txt, valid.txt and test.txt, or one file that is cut 90 : 5 : 5."""

    unit: Literal["word", "character"] = "word"
    """What one token is."""
    lowercase: bool = False
    """Whether capital letters are lowered first."""

    def load(self) -> Corpus:
        """The corpus; its vocabulary is that of train.txt, or of the whole file."""
        root = self.folder()
        read = text_file if root.is_file() else text_folder
        return read(root, unit=self.unit, lowercase=self.lowercase)
