"""Corpora: text and made-up tasks as streams of tokens. They know nothing of models.

A corpus of one's own is a function that returns a ``Corpus``; pass it wherever one of these goes.
"""

from equilibria.corpora.copying import SYMBOLS, copying, memoryless_optimum
from equilibria.corpora.corpus import Corpus, Stream, Unit
from equilibria.corpora.ngram import witten_bell
from equilibria.corpora.python_docs import python_docs
from equilibria.corpora.segments import Segment, Segments
from equilibria.corpora.text_folder import PENN_TREEBANK_COUNTS, penn_treebank, text_folder
from equilibria.corpora.vocabulary import TextUnit, Vocabulary

__all__ = [
    "PENN_TREEBANK_COUNTS",
    "SYMBOLS",
    "Corpus",
    "Segment",
    "Segments",
    "Stream",
    "TextUnit",
    "Unit",
    "Vocabulary",
    "copying",
    "memoryless_optimum",
    "penn_treebank",
    "python_docs",
    "text_folder",
    "witten_bell",
]
