"""Corpora: text and made-up tasks as streams of tokens. They know nothing of models.

A corpus of one's own is a function that returns a ``Corpus``; pass it wherever one of these goes.
"""

from equilibria.corpora.copying import SYMBOLS, copying, memoryless_optimum
from equilibria.corpora.corpus import Corpus, Stream, Unit
from equilibria.corpora.fetch import fetch_wikitext
from equilibria.corpora.ngram import witten_bell
from equilibria.corpora.penn_treebank import (
    PENN_TREEBANK_CHARACTER_COUNTS,
    PENN_TREEBANK_COUNTS,
    penn_treebank,
    penn_treebank_characters,
)
from equilibria.corpora.python_docs import python_docs
from equilibria.corpora.segments import Segment, Segments
from equilibria.corpora.text_folder import text_folder
from equilibria.corpora.vocabulary import TextUnit, Vocabulary
from equilibria.corpora.wikitext import WIKITEXT2_COUNTS, WIKITEXT103_COUNTS, wikitext2, wikitext103

__all__ = [
    "PENN_TREEBANK_CHARACTER_COUNTS",
    "PENN_TREEBANK_COUNTS",
    "SYMBOLS",
    "WIKITEXT2_COUNTS",
    "WIKITEXT103_COUNTS",
    "Corpus",
    "Segment",
    "Segments",
    "Stream",
    "TextUnit",
    "Unit",
    "Vocabulary",
    "copying",
    "fetch_wikitext",
    "memoryless_optimum",
    "penn_treebank",
    "penn_treebank_characters",
    "python_docs",
    "text_folder",
    "wikitext2",
    "wikitext103",
    "witten_bell",
]
