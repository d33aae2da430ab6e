"""text_folder, text_file: a corpus from a folder with one text file per split, or from one file cut into splits."""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from equilibria.checks import check_fields, check_flag
from equilibria.lm.corpora.byte_level import check_size
from equilibria.lm.corpora.corpus import Corpus, Stream
from equilibria.lm.corpora.source import FolderSource
from equilibria.lm.corpora.vocabulary import BPE_SIZE, TextUnit, Vocabulary, kind_of, noun
from equilibria.lm.paths import path_of

FILE_NAMES = ("{split}.txt", "ptb.{split}.txt", "wiki.{split}.tokens")
"""Possible names of the file of a split; the first one that exists is read."""


def text_folder(
    root: Path | str, *, unit: TextUnit = "word", lowercase: bool = False, vocabulary_size: int = BPE_SIZE
) -> Corpus:
    """The corpus in the files ``train.txt``, ``valid.txt`` and ``test.txt`` (UTF-8) of a folder.

    The vocabulary is that of the training text only. Other words in the validation or test text become ``<unk>`` if
    the training text contains ``<unk>``, and raise an error otherwise; byte-pair tokens spell every text.

    Args:
        root: the folder; names such as ``ptb.train.txt`` and ``wiki.train.tokens`` are also accepted.
        unit: the unit of a token.
        lowercase: convert to lower case. Not for corpora that are already in lower case: the number token ``N`` of the
            Penn Treebank would become the word ``n``.
        vocabulary_size: the number of byte-pair tokens to learn; other units have those of the training text.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: a file is empty or not UTF-8, or has unknown words; names the file.
    """
    kind_of(unit)
    check_flag("text_folder", lowercase=lowercase)
    root = path_of("text_folder", root=root)
    train, valid, test = (_find(root, split) for split in ("train", "valid", "test"))
    with _naming(train):
        vocabulary, ids = Vocabulary.of_lines(lines_of(train, lowercase=lowercase), unit, size=vocabulary_size)
        learnt = Stream.of_text(ids)

    def encoded(path: Path) -> Stream:
        with _naming(path):
            return Stream.of_text(vocabulary.encode_lines(lines_of(path, lowercase=lowercase)))

    return Corpus(
        name=root.resolve().name,
        train=learnt,
        valid=encoded(valid),
        test=encoded(test),
        vocabulary=vocabulary,
        unit=unit,
    )


def text_file(
    file: Path | str, *, unit: TextUnit = "character", lowercase: bool = False, vocabulary_size: int = BPE_SIZE
) -> Corpus:
    """The corpus in one text file (UTF-8): the first 90 % for training, then 5 % for validation and 5 % for the test.

    The vocabulary of words or characters is that of the whole file, so that the whole text can be scored. Byte-pair
    tokens are learnt from the training part alone, and their file is cut at the same characters as one of characters.

    Args:
        file: the text file.
        unit: the unit of a token.
        lowercase: convert to lower case.
        vocabulary_size: the number of byte-pair tokens to learn; other units have those of the text.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not UTF-8, empty, or too short for three splits.
    """
    kind, file = kind_of(unit), path_of("text_file", file=file)
    check_flag("text_file", lowercase=lowercase)
    if not file.is_file():
        state = "is no file" if file.exists() else "does not exist"
        raise FileNotFoundError(f"{file} {state}; check the path, or read a folder with text_folder.")
    with _naming(file):
        lines = lines_of(file, lowercase=lowercase)
        if kind.spells_everything:
            train, valid, test = _cut("".join(lines))
            vocabulary = Vocabulary.of_text(train, unit, size=vocabulary_size)
            parts = [vocabulary.encode(part) for part in (train, valid, test)]
        else:
            vocabulary, ids = Vocabulary.of_lines(lines, unit)
            parts = _cut(ids)
        if any(len(part) < 2 for part in parts):
            raise ValueError(
                f"the text has {sum(map(len, parts))} {noun(unit)}s, and 5 % of it are for validation; give a text of "
                "at least 40."
            )
        learnt, chosen, kept = map(Stream.of_text, parts)
    return Corpus(name=file.name, train=learnt, valid=chosen, test=kept, vocabulary=vocabulary, unit=unit)


def _cut(text: Any) -> tuple[Any, Any, Any]:
    """The first 90 % of a string or of ids, the next 5 % and the last 5 %."""
    first, second = len(text) * 18 // 20, len(text) * 19 // 20
    return text[:first], text[first:second], text[second:]


def published(
    root: Path, *, counts: Mapping[str, int], name: str, title: str, files: str, unit: TextUnit = "word"
) -> Corpus:
    """The corpus in a folder, after checking that it is the one of the literature.

    Args:
        root: the folder, as for ``text_folder``.
        counts: the published numbers of tokens in ``train``, ``valid``, ``test`` and the ``vocabulary``; word counts
            include ``<eos>``.
        name: the name of the corpus in reports.
        title: the name of the corpus in errors.
        files: the right files, for errors.
        unit: the unit of a token.

    Raises:
        ValueError: a count differs.
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
        state = "is a file" if root.is_file() else "is no folder" if root.exists() else "does not exist"
        raise FileNotFoundError(
            f"{root} {state}, and a corpus is a folder with train.txt, valid.txt and test.txt; check the path."
        )
    names = [name.format(split=split) for name in FILE_NAMES]
    for name in names:
        if (root / name).is_file():
            return root / name
    present = ", ".join(sorted(path.name for path in root.iterdir())[:8])
    raise FileNotFoundError(
        f"{root} has no file for {split}: it holds {present or 'nothing'}, and the file must be called "
        f"{' or '.join(names)}; rename or add it."
    )


def lines_of(path: Path, *, lowercase: bool) -> Iterator[str]:
    r"""The lines of a UTF-8 file, one at a time; "\r\n" becomes "\n", and "\r" alone is a character, no line end.

    Raises:
        ValueError: the file is not UTF-8, has a NUL character, or has only blank lines.
    """
    offset, blank = 0, True
    with path.open("rb") as file:
        for number, data in enumerate(file, 1):
            try:
                line = data.decode("utf-8")
            except UnicodeDecodeError as error:
                place, code = offset + error.start, _encoding(data) if offset == 0 else "LATIN1"
                # Only the end of the file can be the middle of a character.
                cut = error.reason == "unexpected end of data"
                how = f"; if it was cut inside a character, keep what stands before with head -c {place}" if cut else ""
                raise ValueError(
                    f"not UTF-8: byte 0x{data[error.start]:02x} at byte offset {place}, line {number}, cannot be "
                    f"decoded; convert the file, for example with iconv -f {code} -t UTF-8{how}."
                ) from None
            if "\0" in line:  # UTF-16 of English is valid UTF-8 with one after, or before, each letter
                place = offset + data.index(0)
                raise ValueError(
                    f"a NUL character at byte offset {place}, line {number}, which no text has: the file may be "
                    f"UTF-16, which iconv -f UTF-16{'LE' if place % 2 else 'BE'} -t UTF-8 converts, or binary; "
                    "tr -d '\\000' removes the characters."
                )
            if number == 1:
                line = line.removeprefix("\ufeff")
            if line.endswith("\r\n"):
                line = line[:-2] + "\n"
            offset, blank = offset + len(data), blank and not line.strip()
            yield line.lower() if lowercase else line
    if blank:
        raise ValueError(f"the file is empty ({offset} bytes, no word), and a split needs text; check the file.")


def _encoding(start: bytes) -> str:
    """The name, for iconv, of the encoding that a file which is not UTF-8 may have, by the mark at its beginning."""
    if start.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "UTF-32"
    return "UTF-16" if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "LATIN1"


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Put the name of the file in front of any ValueError raised within it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


@dataclasses.dataclass(frozen=True)
class TextFolder(FolderSource):
    """Text of your own: a folder with train.txt, valid.txt and test.txt, or one file that is split 90 : 5 : 5."""

    unit: Literal["word", "character", "bpe"] = "word"
    """The unit of a token; "bpe" is byte-pair encoding, learnt from the training text."""
    lowercase: bool = False
    """True to convert the text to lower case."""
    vocabulary_size: int = BPE_SIZE
    """Number of tokens that byte-pair encoding learns; only for unit="bpe"."""

    def __post_init__(self) -> None:
        """Check the settings, and make the path absolute."""
        check_fields(self)
        super().__post_init__()
        if self.unit != "bpe" and self.vocabulary_size != BPE_SIZE:
            raise ValueError(
                f"TextFolder(unit={self.unit!r}, vocabulary_size={self.vocabulary_size}): the {self.unit}s are those "
                "of the text, and only byte-pair encoding has a size; give unit='bpe', or leave it out."
            )
        check_size(self.vocabulary_size)

    def load(self) -> Corpus:
        """The corpus; its vocabulary is that of train.txt, or of the whole file, or learnt from the training part."""
        root = self.folder()
        if not root.exists():
            raise FileNotFoundError(
                f"{root} does not exist; give a text file, which is cut into its three parts, or a folder with "
                "train.txt, valid.txt and test.txt."
            )
        read = text_file if root.is_file() else text_folder
        return read(root, unit=self.unit, lowercase=self.lowercase, vocabulary_size=self.vocabulary_size)
