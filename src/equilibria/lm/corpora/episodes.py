"""drawn: the corpus of a synthetic task, whose independent episodes are drawn from seeds."""

from __future__ import annotations

from collections.abc import Callable

import torch

from equilibria.lm.corpora.corpus import Corpus, Stream
from equilibria.lm.corpora.vocabulary import Vocabulary


def drawn(
    draw: Callable[[int, torch.Generator], Stream], *, name: str, symbols: str, sizes: tuple[int, int, int], seed: int
) -> Corpus:
    """The corpus whose streams are draws of so many episodes. Each set has its own seed: no size changes another set.

    Args:
        draw: the stream of a number of episodes, drawn with a generator.
        name: the name in reports.
        symbols: the symbols of the ids 0, 1, 2, …, a character each.
        sizes: numbers of episodes for training, validation and test.
        seed: seed of all three sets.
    """
    train, valid, test = (
        draw(episodes, torch.Generator().manual_seed(3 * seed + place)) for place, episodes in enumerate(sizes)
    )
    vocabulary = Vocabulary.of_tokens(symbols, "character")
    return Corpus(name=name, train=train, valid=valid, test=test, vocabulary=vocabulary, unit="symbol")


def check_counts(function: str, usual: str, **counts: int) -> None:
    """Raise a ValueError unless all counts are at least 1; ``usual`` is a choice of arguments that works."""
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{function}({name}={value}): it must be at least 1; try {usual}.")
