"""WordVocabulary: words are separated by whitespace, and every line ends in ``<eos>``.

Letters: L length of a sequence of tokens.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Sequence
from typing import ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from equilibria.lm.corpora.listed import ListedVocabulary
from equilibria.lm.corpora.vocabulary import END, Speller


@dataclasses.dataclass(frozen=True)
class WordVocabulary(ListedVocabulary):
    """The words of a text by decreasing frequency. They keep their case, and every line ends in ``<eos>``."""

    unit: ClassVar = "word"
    """The unit of a token."""
    _first: ClassVar[tuple[str, ...]] = (END,)

    @property
    def end(self) -> str | None:
        """``<eos>``, if the vocabulary has it."""
        return END if END in self._ids else None

    def decode(self, ids: Int[Tensor, " L"]) -> str:
        """The words separated by single spaces, with a line break for each ``<eos>``."""
        words = (self.tokens[place] for place in self._places(ids))
        return re.sub(" ?\n ?", "\n", " ".join("\n" if word == self.end else word for word in words))

    def speller(self, before: str) -> Speller:
        """Puts spaces between words, and line breaks at ends of lines."""
        return _Words(self, before)

    def byte_sizes(self, tokens: Int[Tensor, "*S"] | None, targets: Int[Tensor, "*S"]) -> Int[Tensor, "*S"]:
        """The bytes of each word and of the space before it; one byte for ``<eos>``."""
        end = -1 if self.end is None else self._ids[self.end]
        space = 0 if tokens is None else (tokens != end).long()
        return torch.where(targets == end, 1, self._bytes[targets] + space)

    def place_of(self, text: str) -> int | None:
        """The id of a word, or that of ``<eos>`` for a line feed; None if there is no such token."""
        return self._ids.get(END if text == "\n" else text)

    def remarks(self, prompts: Sequence[str]) -> list[str]:
        """A sentence about the words that the model reads as the unknown word."""
        words = dict.fromkeys(word for prompt in prompts for word in prompt.split() if word not in self._ids)
        if self.unknown is None or not words:
            return []
        listed = ", ".join(map(repr, list(words)[:8]))
        return [f"the model does not know {listed} and reads {self.unknown} instead."]

    @classmethod
    def _split(cls, line: str, *, end: str | None, finish: bool) -> Sequence[str]:
        words = line.split()
        if end is not None and (finish or line.endswith("\n")):
            words.append(end)
        return words

    @classmethod
    def _order(cls, tokens: tuple[str, ...], ids: Int[Tensor, " L"]) -> Int[Tensor, " _"]:
        counts = torch.bincount(ids, minlength=len(tokens))
        counts[0] = len(ids) + 1  # <eos> comes first, however often it occurs
        return counts.argsort(descending=True, stable=True)

    def _check(self, token: str) -> None:
        if token.split() != [token]:
            raise ValueError(
                f"Vocabulary(unit='word'): the token {token!r} is empty or contains whitespace, which separates "
                "words; remove it, or try unit='character'."
            )

    def _nearest(self, token: str) -> list[str]:
        """By spelling."""
        return difflib.get_close_matches(token, self.tokens)


class _Words(Speller):
    """Spells words, with what separates them."""

    def __init__(self, vocabulary: WordVocabulary, before: str) -> None:
        self._vocabulary, self._last = vocabulary, before[-1:]

    def piece(self, place: int) -> str:
        token, joined = self._vocabulary.tokens[place], self._last in ("", " ", "\n")
        token = "\n" if token == self._vocabulary.end else token if joined else f" {token}"
        self._last = token[-1:]
        return token
