"""CharacterVocabulary: every character of a text is a token.

Letters: L length of a sequence of tokens.
"""

from __future__ import annotations

import dataclasses
import unicodedata
from collections.abc import Sequence
from typing import ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from equilibria.lm.corpora.listed import ListedVocabulary
from equilibria.lm.corpora.vocabulary import UNKNOWN, Speller


@dataclasses.dataclass(frozen=True)
class CharacterVocabulary(ListedVocabulary):
    """The characters of a text, in the order of their code points."""

    unit: ClassVar = "character"
    """The unit of a token."""

    def decode(self, ids: Int[Tensor, " L"]) -> str:
        """The text of the ids."""
        return "".join(self.tokens[place] for place in self._places(ids))

    def speller(self, before: str) -> Speller:
        """Spells one character per token."""
        return _Characters(self.tokens)

    def byte_sizes(self, tokens: Int[Tensor, "*S"] | None, targets: Int[Tensor, "*S"]) -> Int[Tensor, "*S"]:
        """The bytes of each character."""
        return self._bytes[targets]

    @classmethod
    def _split(cls, line: str, *, end: str | None, finish: bool) -> Sequence[str]:
        return line

    @classmethod
    def _order(cls, tokens: tuple[str, ...], ids: Int[Tensor, " L"]) -> Int[Tensor, " _"]:
        return torch.tensor(sorted(range(len(tokens)), key=tokens.__getitem__), dtype=torch.int64)

    def _check(self, token: str) -> None:
        if len(token) != 1 and token != UNKNOWN:
            raise ValueError(
                f"Vocabulary(unit='character'): the token {token!r} has {len(token)} characters, and only one "
                f"character or {UNKNOWN!r} is allowed; try unit='word'."
            )

    def _nearest(self, token: str) -> list[str]:
        """By base letter and then by code point."""

        def distance(other: str) -> tuple[bool, int]:
            return _base(other) != _base(token), abs(ord(other) - ord(token))

        return sorted(self.tokens, key=distance)[:3]


class _Characters(Speller):
    """Spells characters."""

    def __init__(self, tokens: tuple[str, ...]) -> None:
        self._tokens = tokens

    def piece(self, place: int) -> str:
        return self._tokens[place]


def _base(character: str) -> str:
    return unicodedata.normalize("NFKD", character)[0].casefold()
