"""Vocabulary: the tokens of a language, text to ids and back.

Letters: L length of a stream of tokens.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import io
import re
import typing
import unicodedata
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
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
        vocabulary, _ = cls.of_lines(_lines(text), unit)
        return vocabulary

    @classmethod
    def of_lines(cls, lines: Iterable[str], unit: TextUnit) -> tuple[Vocabulary, Int[Tensor, " L"]]:
        """The vocabulary of a text, as of ``of_text``, and the ids of the text (int64).

        The text is read once and takes at most some twelve bytes a token: every new token gets the next free id, and
        the ids are renumbered at the end.

        Args:
            lines: each with its line feed, which the last one may lack; what iterating over a text file returns.
            unit: what a token is.
        """
        check_unit(unit)
        places, ids = _Places(), array("i")
        if unit == "word":
            places[END] = 0
        for line in lines:
            ids.extend(map(places.__getitem__, _tokens(line, unit=unit, end=END, finish=True)))
        tokens, first = tuple(places), _tensor(ids)
        if unit == "character":
            order = torch.tensor(sorted(range(len(tokens)), key=tokens.__getitem__), dtype=torch.int64)
        else:
            counts = torch.bincount(first, minlength=len(tokens))
            counts[0] = len(first) + 1  # <eos> comes first, however often it occurs
            order = counts.argsort(descending=True, stable=True)
        renumbered = torch.empty_like(order)
        renumbered[order] = torch.arange(len(order))
        ordered = tuple(tokens[place] for place in order.tolist())
        return cls(tokens=ordered, unit=unit), renumbered.index_select(0, first)

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
        return self.encode_lines(_lines(text), finish=finish)

    def encode_lines(self, lines: Iterable[str], *, finish: bool = True) -> Int[Tensor, " L"]:
        """As ``encode``, of a text that is given line by line, as to ``of_lines``, and never held as a whole."""
        ids, place = array("i"), self._places.__getitem__
        for number, line in enumerate(lines, 1):
            try:
                ids.extend(map(place, _tokens(line, unit=self.unit, end=self.end, finish=finish)))
            except KeyError as error:  # the ids before it are there already
                raise ValueError(self._unknown_token(error.args[0], position=len(ids), line=number)) from None
        return _tensor(ids).long()

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
        tokens, unit = value.get("tokens"), value.get("unit")
        strings = isinstance(tokens, list) and all(isinstance(token, str) for token in tokens)
        if set(value) != {"unit", "tokens"} or not strings or not isinstance(unit, str):
            raise ValueError(
                f"Vocabulary.from_json: the fields are {', '.join(sorted(map(str, value))) or 'none'}, and must be "
                "'unit' (a string) and 'tokens' (a list of strings); pass what to_json returned."
            )
        check_unit(unit)
        return cls(tokens=tuple(typing.cast(list[str], tokens)), unit=typing.cast(TextUnit, unit))

    @functools.cached_property
    def _ids(self) -> dict[str, int]:
        return {token: place for place, token in enumerate(self.tokens)}

    @functools.cached_property
    def _places(self) -> dict[str, int]:
        """The id of every token; of ``<unk>`` for all others, if there is ``<unk>``."""
        return self._ids if self.unknown is None else _Known(self._ids)

    def _unknown_token(self, token: str, *, position: int, line: int) -> str:
        """The sentence about the first token that the vocabulary lacks."""
        place = f"position {position}"
        if self.unit == "character" or self.end is not None:
            place += f", line {line}"
        near = ", ".join(map(repr, _nearest(token, self.tokens, self.unit)))
        return (
            f"The {self.unit} {token!r} ({place}) is not among the {len(self)} {self.unit}s of the vocabulary, which "
            f"has no {UNKNOWN!r}{f'; the nearest are {near}' if near else ''}; "
            f"replace it in the text, or take a vocabulary that contains it or {UNKNOWN!r}."
        )


class _Places(dict[str, int]):
    """The ids of tokens in the order of their first appearance: a new one gets the next."""

    def __missing__(self, token: str) -> int:
        self[token] = place = len(self)
        return place


class _Known(dict[str, int]):
    """The ids of known tokens; the others have that of ``<unk>``, and are not remembered."""

    def __missing__(self, token: str) -> int:
        return self[UNKNOWN]


def _lines(text: str) -> Iterable[str]:
    """The lines of a text, each with its line feed; nothing else ends a line."""
    return io.StringIO(text, newline="\n")


def _tokens(line: str, *, unit: TextUnit, end: str | None, finish: bool) -> Sequence[str]:
    """The tokens of one line: its characters, or its words and the end of the line if the vocabulary has one."""
    if unit == "character":
        return line
    words = line.split()
    if end is not None and (finish or line.endswith("\n")):
        words.append(end)
    return words


def _tensor(ids: array[int]) -> Int[Tensor, " L"]:
    """The numbers of an array("i"), not copied (int32)."""
    return torch.frombuffer(ids, dtype=torch.int32) if ids else torch.empty(0, dtype=torch.int32)


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
