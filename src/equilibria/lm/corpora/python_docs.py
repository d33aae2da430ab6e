"""python_docs: the English reference text inside every CPython, by characters. Nothing is downloaded."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from equilibria.lm.corpora.corpus import Corpus, Stream
from equilibria.lm.corpora.source import Source
from equilibria.lm.corpora.vocabulary import Vocabulary


def python_docs() -> Corpus:
    """The topics of ``help()``, about half a million characters, in the order of their keys.

    The first 90 % are for training, the next 5 % for validation, the last 5 % for the test. The vocabulary is that of
    the whole text. The text differs a little between Python versions, and so do all scores on it.

    Raises:
        ValueError: this Python has no such text.
    """
    text = _text()
    vocabulary = Vocabulary.of_text(text, "character")
    ids = vocabulary.encode(text)
    first, second = len(ids) * 18 // 20, len(ids) * 19 // 20
    return Corpus(
        name="python_docs",
        train=Stream.of_text(ids[:first]),
        valid=Stream.of_text(ids[first:second]),
        test=Stream.of_text(ids[second:]),
        vocabulary=vocabulary,
        unit="character",
    )


def _text() -> str:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise ValueError(
            "python_docs: this Python lacks the module pydoc_data.topics, the text of help(); use a complete CPython, "
            "or text_folder with files of your own."
        ) from None
    return "".join(topics[key] for key in sorted(topics))


@dataclasses.dataclass(frozen=True)
class PythonDocs(Source):
    """Characters of the English documentation inside every CPython (``pydoc_data.topics``); no download."""

    unit: ClassVar = "character"
    """The unit of a token."""

    def load(self) -> Corpus:
        """The corpus: 90 % for training, 5 % for validation, 5 % for the test."""
        return python_docs()
