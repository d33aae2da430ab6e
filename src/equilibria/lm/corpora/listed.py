"""ListedVocabulary: what vocabularies of characters and of words share; their tokens are those of a text.

Letters: L length of a sequence of tokens, V size of the vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import typing
from abc import abstractmethod
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from equilibria.lm.corpora.vocabulary import UNKNOWN, Vocabulary, as_tensor, check_lines, noun, wrong_fields


@dataclasses.dataclass(frozen=True)
class ListedVocabulary(Vocabulary):
    """A vocabulary that is its list of tokens."""

    tokens: tuple[str, ...]
    """All tokens, each once."""

    def __post_init__(self) -> None:
        if not self.tokens:
            raise ValueError(
                "Vocabulary(tokens=()): a vocabulary has at least one token; give it the tokens of a text."
            )
        if wrong := [token for token in self.tokens if not isinstance(token, str)]:
            raise ValueError(f"Vocabulary: the token {wrong[0]!r} is no text (str); give tokens as they are spelt.")
        if len(self._ids) < len(self.tokens):
            token, count = Counter(self.tokens).most_common(1)[0]
            raise ValueError(
                f"Vocabulary: the token {token!r} occurs {count} times and may occur only once; remove the others."
            )
        for token in self.tokens:
            self._check(token)

    @classmethod
    def learnt(cls, lines: Iterable[str], *, size: int) -> tuple[ListedVocabulary, Int[Tensor, " L"]]:
        """The vocabulary of a text, and the ids of the text (int32); ``size`` is not used.

        The text is read once and needs about twelve bytes per token: every new token gets the next free id, and the
        ids are renumbered at the end.
        """
        places, ids = _Places({token: place for place, token in enumerate(cls._first)}), array("i")
        end = cls._first[0] if cls._first else None
        for line in lines:
            ids.extend(map(places.__getitem__, cls._split(line, end=end, finish=True)))
        tokens, first = tuple(places), as_tensor(ids)
        order = cls._order(tokens, first)
        renumbered = torch.empty_like(order)
        renumbered[order] = torch.arange(len(order))
        ordered = tuple(tokens[place] for place in order.tolist())
        return cls(tokens=ordered), renumbered.index_select(0, first)

    @classmethod
    def listed(cls, tokens: tuple[str, ...]) -> ListedVocabulary:
        """The vocabulary with these tokens."""
        return cls(tokens=tokens)

    @classmethod
    def stored(cls, value: Mapping[str, Any]) -> ListedVocabulary:
        """The vocabulary from the dictionary of ``to_json``; a ValueError if it has other fields."""
        tokens = value.get("tokens")
        strings = isinstance(tokens, list) and all(isinstance(token, str) for token in tokens)
        if set(value) != {"unit", "tokens"} or not strings:
            raise wrong_fields(value, "'tokens' (a list of strings)")
        return cls(tokens=tuple(typing.cast(list[str], tokens)))

    def to_json(self) -> dict[str, Any]:
        """The unit and the tokens."""
        return {"unit": self.unit, "tokens": list(self.tokens)}

    @property
    def digest(self) -> str:
        """The SHA-256 of the tokens in order."""
        return hashlib.sha256("\0".join(self.tokens).encode("utf-8", "surrogatepass")).hexdigest()

    @property
    def unknown(self) -> str | None:
        """``<unk>``, if the vocabulary has it; without it unknown tokens raise an error."""
        return UNKNOWN if UNKNOWN in self._ids else None

    def encode_lines(self, lines: Iterable[str], *, finish: bool = True) -> Int[Tensor, " L"]:
        """The ids of the lines of a text (int64)."""
        check_lines("encode_lines", lines)
        ids, place = array("i"), self._known.__getitem__
        for number, line in enumerate(lines, 1):
            try:
                ids.extend(map(place, self._split(line, end=self.end, finish=finish)))
            except KeyError as error:  # ids holds exactly the tokens before it
                raise ValueError(self._unknown_token(error.args[0], position=len(ids), line=number)) from None
        return as_tensor(ids).long()

    def spelling(self, place: int) -> str:
        """The token itself."""
        return self.tokens[place]

    def place_of(self, text: str) -> int | None:
        """The id of a token; None if there is no such token."""
        return self._ids.get(text)

    def translation(self, other: Vocabulary) -> Int[Tensor, " _"] | None:
        """The id here of each token of ``other``: that of ``<unk>``, or V, for those that are missing here."""
        absent = len(self) if self.unknown is None else self._ids[self.unknown]
        return torch.tensor([self._ids.get(token, absent) for token in other.tokens])

    _first: ClassVar[tuple[str, ...]] = ()
    """Tokens that every learnt vocabulary has."""

    @classmethod
    @abstractmethod
    def _split(cls, line: str, *, end: str | None, finish: bool) -> Sequence[str]:
        """The tokens of one line, with the token ``end`` of its line feed if that is not None."""

    @classmethod
    @abstractmethod
    def _order(cls, tokens: tuple[str, ...], ids: Int[Tensor, " L"]) -> Int[Tensor, " _"]:
        """The order of the tokens of a text, which are numbered by first appearance."""

    @abstractmethod
    def _check(self, token: str) -> None:
        """Raise a ValueError if this cannot be a token of this unit."""

    @abstractmethod
    def _nearest(self, token: str) -> list[str]:
        """Up to three similar tokens."""

    @functools.cached_property
    def _ids(self) -> dict[str, int]:
        return {token: place for place, token in enumerate(self.tokens)}

    @functools.cached_property
    def _known(self) -> dict[str, int]:
        """The id of every token, and that of ``<unk>`` for all others if there is ``<unk>``."""
        return self._ids if self.unknown is None else _Known(self._ids)

    @functools.cached_property
    def _bytes(self) -> Int[Tensor, " V"]:
        """UTF-8 bytes of each token."""
        return torch.tensor([len(token.encode("utf-8", "surrogatepass")) for token in self.tokens])

    def _unknown_token(self, token: str, *, position: int, line: int) -> str:
        """The error sentence for a token outside the vocabulary."""
        place = f"position {position}"
        if self.unit == "character" or self.end is not None:
            place += f", line {line}"
        near = ", ".join(map(repr, self._nearest(token)))
        one = noun(self.unit)
        return (
            f"The {one} {token!r} ({place}) is not among the {len(self)} {one}s of the vocabulary, which "
            f"has no {UNKNOWN!r}{f'; the nearest are {near}' if near else ''}; "
            f"replace it in the text, or use a vocabulary that contains it or {UNKNOWN!r}."
        )


class _Places(dict[str, int]):
    """Ids of tokens in the order of first appearance: a new token gets the next id."""

    def __missing__(self, token: str) -> int:
        self[token] = place = len(self)
        return place


class _Known(dict[str, int]):
    """Ids of known tokens; all other tokens have the id of ``<unk>`` and are not stored."""

    def __missing__(self, token: str) -> int:
        return self[UNKNOWN]
