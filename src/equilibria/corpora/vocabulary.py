"""Vocabulary: the tokens of a language, text to ids and back.

Letters: L length of a stream of tokens.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
import typing
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

TextUnit = Literal["word", "character"]
"""What one token of a text is."""

END = "<eos>"
"""The token that ends a line of words."""
UNKNOWN = "<unk>"
"""The token that stands for every word outside the vocabulary; an ordinary word in corpora that already contain it."""


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The tokens of a language; the id of a token is its place.

    Characters: ``decode(encode(text)) == text``. Words are separated by whitespace and keep their case, and every line
    ends in ``<eos>``, blank ones included; ``decode`` then returns the same words with single spaces between them and
    each ``<eos>`` as a line break.
    """

    tokens: tuple[str, ...]
    """All tokens, each once."""
    unit: TextUnit
    """What a token is: a ``word`` or a ``character``."""

    def __post_init__(self) -> None:
        check_unit(self.unit)
        if not self.tokens:
            raise ValueError(
                "Vocabulary(tokens=()): a vocabulary has at least one token; give it the tokens of a text."
            )
        if len(self._ids) < len(self.tokens):
            token, count = Counter(self.tokens).most_common(1)[0]
            raise ValueError(
                f"Vocabulary: the token {token!r} occurs {count} times and may occur once; remove the others."
            )
        for token in self.tokens:
            if self.unit == "character" and len(token) != 1 and token != UNKNOWN:
                raise ValueError(
                    f"Vocabulary(unit='character'): the token {token!r} has {len(token)} characters, and only one "
                    f"character or {UNKNOWN!r} is allowed; try unit='word'."
                )
            if self.unit == "word" and token.split() != [token]:
                raise ValueError(
                    f"Vocabulary(unit='word'): the token {token!r} is empty or contains whitespace, which separates "
                    "words; remove it, or try unit='character'."
                )

    @classmethod
    def of_text(cls, text: str, unit: TextUnit) -> Vocabulary:
        """The vocabulary of a text.

        Characters come in the order of their code points. Words come most frequent first, as adaptive softmaxes expect,
        ties by first appearance, after ``<eos>`` with id 0.
        """
        check_unit(unit)
        if unit == "character":
            return cls(tokens=tuple(sorted(set(text))), unit=unit)
        counts = Counter(text.split())
        return cls(tokens=(END, *(word for word, _ in counts.most_common() if word != END)), unit=unit)

    def __len__(self) -> int:
        """Number of tokens."""
        return len(self.tokens)

    @property
    def unknown(self) -> str | None:
        """The token for everything outside the vocabulary, or None if such tokens are errors."""
        return UNKNOWN if UNKNOWN in self._ids else None

    @property
    def end(self) -> str | None:
        """The token that ends a line; None if there is none, as with characters, whose lines end in a line break."""
        return END if self.unit == "word" and END in self._ids else None

    def encode(self, text: str, *, finish: bool = True) -> Int[Tensor, " L"]:
        """The ids of a text (int64).

        Args:
            text: lines end in a line feed.
            finish: end the last line too when its line break is missing; False for a prompt that is to be continued.
        """
        tokens, ids = self._split(text, finish=finish), self._ids
        if self.unknown is not None:
            unknown = ids[self.unknown]
            return torch.tensor([ids.get(token, unknown) for token in tokens], dtype=torch.int64)
        try:
            return torch.tensor([ids[token] for token in tokens], dtype=torch.int64)
        except KeyError:
            raise ValueError(self._unknown_token(tokens)) from None

    def decode(self, ids: Int[Tensor, " L"]) -> str:
        """The text of the ids."""
        places = ids.tolist()
        if places and not (min(places) >= 0 and max(places) < len(self)):
            wrong = next(place for place in places if not 0 <= place < len(self))
            raise ValueError(
                f"Vocabulary.decode: the id {wrong} is outside 0 … {len(self) - 1}; "
                "decode with the vocabulary that the ids were encoded with."
            )
        tokens = [self.tokens[place] for place in places]
        if self.unit == "character":
            return "".join(tokens)
        return re.sub(" ?\n ?", "\n", " ".join("\n" if token == self.end else token for token in tokens))

    def to_json(self) -> dict[str, Any]:
        """Itself as a plain dictionary."""
        return {"unit": self.unit, "tokens": list(self.tokens)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Vocabulary:
        """The vocabulary that ``to_json`` described."""
        tokens = value.get("tokens")
        if set(value) != {"unit", "tokens"} or not (
            isinstance(tokens, list) and all(isinstance(token, str) for token in tokens)
        ):
            raise ValueError(
                f"Vocabulary.from_json: the fields are {', '.join(sorted(map(str, value))) or 'none'}, and must be "
                "'unit' (a string) and 'tokens' (a list of strings); pass what to_json returned."
            )
        return cls(tokens=tuple(tokens), unit=value["unit"])

    @functools.cached_property
    def _ids(self) -> dict[str, int]:
        return {token: place for place, token in enumerate(self.tokens)}

    def _split(self, text: str, *, finish: bool) -> Sequence[str]:
        if self.unit == "character":
            return text
        if self.end is None:
            return text.split()
        if finish and text and not text.endswith("\n"):
            text += "\n"
        return text.replace("\n", f" {self.end} ").split()

    def _unknown_token(self, tokens: Sequence[str]) -> str:
        """The sentence about the first token that the vocabulary lacks."""
        position, token = next((place, token) for place, token in enumerate(tokens) if token not in self._ids)
        place = f"position {position}"
        if self.unit == "character" or self.end is not None:
            place += f", line {1 + tokens[:position].count(self.end or chr(10))}"
        near = ", ".join(map(repr, _nearest(token, self.tokens, self.unit)))
        return (
            f"The {self.unit} {token!r} ({place}) is not among the {len(self)} {self.unit}s of the vocabulary, which "
            f"has no {UNKNOWN!r}{f'; the nearest are {near}' if near else ''}; "
            f"replace it in the text, or take a vocabulary that contains it or {UNKNOWN!r}."
        )


def check_unit(unit: str) -> None:
    """Refuses what is not the name of a text unit."""
    if unit not in typing.get_args(TextUnit):
        raise ValueError(f"unit={unit!r}: a token of text is a 'word' or a 'character'; try unit='word'.")


def _nearest(token: str, tokens: tuple[str, ...], unit: TextUnit) -> list[str]:
    """Up to three tokens like this one: words by spelling, characters by base letter and then by code point."""
    if unit == "word":
        return difflib.get_close_matches(token, tokens)

    def distance(other: str) -> tuple[bool, int]:
        return _base(other) != _base(token), abs(ord(other) - ord(token))

    return sorted(tokens, key=distance)[:3]


def _base(character: str) -> str:
    return unicodedata.normalize("NFKD", character)[0].casefold()
