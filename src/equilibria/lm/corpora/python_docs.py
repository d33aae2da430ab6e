"""python_docs: the English reference text that every CPython carries, by characters. Nothing is downloaded."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from equilibria.lm.corpora.corpus import Corpus, Stream
from equilibria.lm.corpora.source import Source
from equilibria.lm.corpora.vocabulary import Vocabulary


def python_docs() -> Corpus:
    """The topics of ``help()``, about half a million characters, in the order of their keys.

    The first 18 twentieths are for training, the next for validation, the last for test. The alphabet is that of the
    whole text. The text, and every figure with it, differs a little from one Python version to the next.
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
    """Characters of the English documentation that every CPython carries (``pydoc_data.topics``); no download."""

    unit: ClassVar = "character"
    """What one token is."""

    def load(self) -> Corpus:
        """The corpus: 18 twentieths for training, one for validation, one for testing."""
        return python_docs()
