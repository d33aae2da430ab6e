"""Corpora: text and synthetic tasks as streams of tokens. They know nothing of models.

For a corpus of your own, write a function that returns a ``Corpus`` and pass the result wherever one is expected.
"""

from equilibria.lm.corpora.byte_pairs import BytePairVocabulary
from equilibria.lm.corpora.characters import CharacterVocabulary
from equilibria.lm.corpora.copying import SYMBOLS, Copying, copying, memoryless_optimum
from equilibria.lm.corpora.corpus import Corpus, Stream, Unit
from equilibria.lm.corpora.fetch import fetch_wikitext
from equilibria.lm.corpora.language import Language
from equilibria.lm.corpora.ngram import witten_bell
from equilibria.lm.corpora.penn_treebank import (
    PENN_TREEBANK_CHARACTER_COUNTS,
    PENN_TREEBANK_COUNTS,
    PennTreebank,
    PennTreebankCharacters,
    penn_treebank,
    penn_treebank_characters,
)
from equilibria.lm.corpora.prefix_sums import PrefixSums, prefix_sums
from equilibria.lm.corpora.python_docs import PythonDocs, python_docs
from equilibria.lm.corpora.segments import Segment, Segments
from equilibria.lm.corpora.source import FolderSource, Source
from equilibria.lm.corpora.text_folder import TextFolder, text_file, text_folder
from equilibria.lm.corpora.vocabulary import TextUnit, Vocabulary
from equilibria.lm.corpora.wikitext import (
    WIKITEXT2_COUNTS,
    WIKITEXT103_COUNTS,
    WikiText2,
    WikiText103,
    wikitext2,
    wikitext103,
)
from equilibria.lm.corpora.words import WordVocabulary

CATALOGUE: tuple[type[Source], ...] = (
    PythonDocs,
    TextFolder,
    PennTreebank,
    PennTreebankCharacters,
    WikiText103,
    WikiText2,
    Copying,
    PrefixSums,
)
"""All sources of the library."""

__all__ = [
    "CATALOGUE",
    "PENN_TREEBANK_CHARACTER_COUNTS",
    "PENN_TREEBANK_COUNTS",
    "SYMBOLS",
    "WIKITEXT2_COUNTS",
    "WIKITEXT103_COUNTS",
    "BytePairVocabulary",
    "CharacterVocabulary",
    "Copying",
    "Corpus",
    "FolderSource",
    "Language",
    "PennTreebank",
    "PennTreebankCharacters",
    "PrefixSums",
    "PythonDocs",
    "Segment",
    "Segments",
    "Source",
    "Stream",
    "TextFolder",
    "TextUnit",
    "Unit",
    "Vocabulary",
    "WikiText2",
    "WikiText103",
    "WordVocabulary",
    "copying",
    "fetch_wikitext",
    "memoryless_optimum",
    "penn_treebank",
    "penn_treebank_characters",
    "prefix_sums",
    "python_docs",
    "text_file",
    "text_folder",
    "wikitext2",
    "wikitext103",
    "witten_bell",
]
