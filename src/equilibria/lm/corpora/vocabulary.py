"""Vocabulary: the tokens of a corpus; converts text to ids and back.

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
"""The unit of a token of text."""

END = "<eos>"
"""The token at the end of a line of words."""
UNKNOWN = "<unk>"
"""The token for every word outside the vocabulary; in corpora that contain it, it is an ordinary word there."""


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The tokens of a corpus; the id of a token is its index.

    Characters: ``decode(encode(text)) == text``. Words are separated by whitespace and keep their case, and every line
    ends in ``<eos>``, also a blank one; ``decode`` then returns the same words separated by single spaces, with a line
    break for each ``<eos>``.
    """

    tokens: tuple[str, ...]
    """All tokens, each once."""
    unit: TextUnit
    """The unit of a token: "word" or "character"."""

    def __post_init__(self) -> None:
        check_unit(self.unit)
        if not self.tokens:
            raise ValueError(
                "Vocabulary(tokens=()): a vocabulary has at least one token; give it the tokens of a text."
            )
        if len(self._ids) < len(self.tokens):
            token, count = Counter(self.tokens).most_common(1)[0]
            raise ValueError(
                f"Vocabulary: the token {token!r} occurs {count} times and may occur only once; remove the others."
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

        Characters are in the order of their code points. Words follow ``<eos>``, which has id 0, by decreasing
        frequency, as adaptive softmaxes expect; words of equal frequency are in the order of first appearance.
        """
        vocabulary, _ = cls.of_lines(_lines(text), unit)
        return vocabulary

    @classmethod
    def of_lines(cls, lines: Iterable[str], unit: TextUnit) -> tuple[Vocabulary, Int[Tensor, " L"]]:
        """The vocabulary of a text, as from ``of_text``, and the ids of the text (int64).

        The text is read once and needs about twelve bytes per token: every new token gets the next free id, and the
        ids are renumbered at the end.

        Args:
            lines: lines with their line feeds, which the last one may lack; for example an open text file.
            unit: the unit of a token.
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
        """The token for all tokens outside the vocabulary; None if these raise an error."""
        return UNKNOWN if UNKNOWN in self._ids else None

    @property
    def end(self) -> str | None:
        """The token at the end of a line; None if there is none, as for characters, whose lines end in a line feed."""
        return END if self.unit == "word" and END in self._ids else None

    def encode(self, text: str, *, finish: bool = True) -> Int[Tensor, " L"]:
        """The ids of a text (int64).

        Args:
            text: the text; its lines end in line feeds.
            finish: also end a last line without line feed; False for a prompt that will be continued.

        Raises:
            ValueError: the text has a token outside the vocabulary, which has no ``<unk>``.
        """
        return self.encode_lines(_lines(text), finish=finish)

    def encode_lines(self, lines: Iterable[str], *, finish: bool = True) -> Int[Tensor, " L"]:
        """As ``encode``, for a text given line by line as in ``of_lines``, which need not fit into memory."""
        ids, place = array("i"), self._places.__getitem__
        for number, line in enumerate(lines, 1):
            try:
                ids.extend(map(place, _tokens(line, unit=self.unit, end=self.end, finish=finish)))
            except KeyError as error:  # ids holds exactly the tokens before it
                raise ValueError(self._unknown_token(error.args[0], position=len(ids), line=number)) from None
        return _tensor(ids).long()

    def decode(self, ids: Int[Tensor, " L"]) -> str:
        """The text of the ids.

        Raises:
            ValueError: an id is outside 0 … V − 1.
        """
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
        """The vocabulary as a plain dictionary."""
        return {"unit": self.unit, "tokens": list(self.tokens)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Vocabulary:
        """The vocabulary from the dictionary of ``to_json``.

        Raises:
            ValueError: the dictionary has other fields.
        """
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
        """The id of every token, and that of ``<unk>`` for all others if there is ``<unk>``."""
        return self._ids if self.unknown is None else _Known(self._ids)

    def _unknown_token(self, token: str, *, position: int, line: int) -> str:
        """The error sentence for a token outside the vocabulary."""
        place = f"position {position}"
        if self.unit == "character" or self.end is not None:
            place += f", line {line}"
        near = ", ".join(map(repr, _nearest(token, self.tokens, self.unit)))
        return (
            f"The {self.unit} {token!r} ({place}) is not among the {len(self)} {self.unit}s of the vocabulary, which "
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


def _lines(text: str) -> Iterable[str]:
    """The lines of a text with their line feeds; no other character ends a line."""
    return io.StringIO(text, newline="\n")


def _tokens(line: str, *, unit: TextUnit, end: str | None, finish: bool) -> Sequence[str]:
    """The tokens of one line: its characters, or its words and the token ``end``, if that is not None."""
    if unit == "character":
        return line
    words = line.split()
    if end is not None and (finish or line.endswith("\n")):
        words.append(end)
    return words


def _tensor(ids: array[int]) -> Int[Tensor, " L"]:
    """The numbers of an array("i") as a tensor (int32) that shares its memory."""
    return torch.frombuffer(ids, dtype=torch.int32) if ids else torch.empty(0, dtype=torch.int32)


def check_unit(unit: str) -> None:
    """Raise a ValueError unless ``unit`` is "word" or "character"."""
    if unit not in typing.get_args(TextUnit):
        raise ValueError(f"unit={unit!r}: a token of text is a 'word' or a 'character'; try unit='word'.")


def _nearest(token: str, tokens: tuple[str, ...], unit: TextUnit) -> list[str]:
    """Up to three similar tokens: words by spelling, characters by base letter and then by code point."""
    if unit == "word":
        return difflib.get_close_matches(token, tokens)

    def distance(other: str) -> tuple[bool, int]:
        return _base(other) != _base(token), abs(ord(other) - ord(token))

    return sorted(tokens, key=distance)[:3]


def _base(character: str) -> str:
    return unicodedata.normalize("NFKD", character)[0].casefold()
