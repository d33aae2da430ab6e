"""numbered: a corpus whose words have the numbers that another code gave them.

Letters: N tokens, V words.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from equilibria.lm.convert.tensors import ConversionError
from equilibria.lm.corpora import Corpus, Vocabulary
from equilibria.lm.corpora.language import SPLITS, Language

Numbering = Literal["train", "all", "appearance"]
"""By frequency in the training text, as here; by frequency in all three texts; or by first appearance."""


def numbered(corpus: Corpus, numbering: Numbering) -> Corpus:
    """The corpus with its words in another order. Of words of the same frequency the one that appears first is first.

    Args:
        corpus: a corpus of words or characters, numbered as this library does.
        numbering: "train" leaves it as it is. "all" counts the words of all three texts, with ``<eos>`` first, as the
            loader of Transformer-XL does; "appearance" takes the order in which they appear, as that of TrellisNet.

    Raises:
        ConversionError: the tokens are no words or characters, whose order has a meaning.
    """
    if numbering == "train":
        return corpus
    if corpus.unit not in ("word", "character"):
        raise ConversionError(
            f"--ids {numbering}: {corpus.name} has tokens of the unit {corpus.unit!r}, and only words and characters "
            "are numbered by their text; give --ids train."
        )
    ids = torch.cat([getattr(corpus, split).ids for split in SPLITS])
    size = len(corpus.vocabulary)
    first = torch.full((size,), len(ids)).scatter_reduce(0, ids, torch.arange(len(ids)), "amin")
    order = first.argsort(stable=True)
    if numbering == "all":
        counts = torch.bincount(ids, minlength=size)
        end = None if corpus.vocabulary.end is None else corpus.vocabulary.place_of(corpus.vocabulary.end)
        if end is not None:
            counts[end] = len(ids) + 1
        order = order[counts[order].argsort(descending=True, stable=True)]
    return _reordered(corpus, order)


def _reordered(corpus: Corpus, order: Int[Tensor, " V"]) -> Corpus:
    tokens = tuple(corpus.vocabulary.tokens[place] for place in order.tolist())
    vocabulary = Vocabulary.of_tokens(tokens, corpus.unit)  # pyright: ignore (the unit has been checked)
    language = dataclasses.replace(Language.without_sums(corpus), vocabulary=vocabulary)
    return language.encoded(corpus)
