"""Vocabulary: the tokens of a corpus; converts text to ids and back. One class per unit stands behind it.

Letters: L length of a sequence of tokens, V size of the vocabulary.
"""

from __future__ import annotations

import io
import typing
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Int
from torch import Tensor

TextUnit = Literal["word", "character", "bpe"]
"""The unit of a token of text: a word, a character, or a piece of bytes that byte-pair encoding has learnt."""

END = "<eos>"
"""The token at the end of a line of words."""
UNKNOWN = "<unk>"
"""The token for every word outside the vocabulary; in corpora that contain it, it is an ordinary word there."""
BPE_SIZE = 4096
"""Tokens of a byte-pair vocabulary unless another number is given."""
_CHUNK = 1 << 20
"""Tokens whose bytes are counted at once."""


class Speller(ABC):
    """Spells the tokens of one text one after the other, for showing it while it is made."""

    @abstractmethod
    def piece(self, place: int) -> str:
        """The text that the next token adds; may be empty, if only the tokens after it complete a character."""

    def rest(self) -> str:
        """The text of what was held back, once no more tokens follow."""
        return ""


class Vocabulary(ABC):
    """The tokens of a corpus; the id of a token is its index.

    ``decode(encode(text))`` is ``text`` for characters and byte-pair tokens. Words are separated by whitespace, so they
    come back separated by single spaces, with a line break for each ``<eos>``.
    """

    unit: ClassVar[TextUnit]
    """The unit of a token."""
    spells_everything: ClassVar[bool] = False
    """True if every text can be encoded, whatever the vocabulary was learnt from."""
    tokens: tuple[str, ...]
    """All tokens, each once."""
    _kinds: ClassVar[dict[str, type[Vocabulary]]] = {}

    def __init_subclass__(cls) -> None:
        if "unit" in vars(cls):
            cls._kinds[cls.unit] = cls

    @staticmethod
    def of_text(text: str, unit: TextUnit, *, size: int = BPE_SIZE) -> Vocabulary:
        """The vocabulary of a text; the arguments are those of ``of_lines``."""
        vocabulary, _ = Vocabulary.of_lines(lines_in(text), unit, size=size)
        return vocabulary

    @staticmethod
    def of_lines(lines: Iterable[str], unit: TextUnit, *, size: int = BPE_SIZE) -> tuple[Vocabulary, Int[Tensor, " L"]]:
        """The vocabulary of a text, and the ids of the text (int32 or int64).

        Characters are in the order of their code points. Words follow ``<eos>``, which has id 0, by decreasing
        frequency, as adaptive softmaxes expect; words of equal frequency are in the order of first appearance.
        Byte-pair tokens are the 256 bytes, and then the merges in the order in which they were learnt.

        Args:
            lines: lines with their line feeds, which the last one may lack; for example an open text file.
            unit: the unit of a token.
            size: the number of byte-pair tokens to learn; other units have those that occur in the text.
        """
        check_lines("Vocabulary.of_lines", lines)
        return kind_of(unit).learnt(lines, size=size)

    @staticmethod
    def of_tokens(tokens: Iterable[str], unit: TextUnit) -> Vocabulary:
        """The vocabulary with these words or characters, in this order.

        Raises:
            ValueError: a token cannot be one of this unit, or occurs twice; or the unit is "bpe", which has merges.
        """
        return kind_of(unit).listed(tuple(tokens))

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Vocabulary:
        """The vocabulary from the dictionary of ``to_json``.

        Raises:
            ValueError: the dictionary has other fields.
        """
        unit = value.get("unit") if isinstance(value, Mapping) else None
        if not isinstance(unit, str):
            raise wrong_fields(value, "'tokens' (a list of strings)")
        return kind_of(unit).stored(value)

    @classmethod
    @abstractmethod
    def learnt(cls, lines: Iterable[str], *, size: int) -> tuple[Vocabulary, Int[Tensor, " L"]]:
        """As ``of_lines``, of this unit."""

    @classmethod
    @abstractmethod
    def listed(cls, tokens: tuple[str, ...]) -> Vocabulary:
        """As ``of_tokens``, of this unit."""

    @classmethod
    @abstractmethod
    def stored(cls, value: Mapping[str, Any]) -> Vocabulary:
        """As ``from_json``, of this unit."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """The vocabulary as a plain dictionary with its "unit"."""

    @property
    @abstractmethod
    def digest(self) -> str:
        """A SHA-256 of everything on which the ids of a text depend."""

    def __len__(self) -> int:
        """Number of tokens."""
        return len(self.tokens)

    @property
    def origin(self) -> str | None:
        """The library that learnt the tokens, with its version; None if they are simply those of the text."""
        return None

    @property
    def unknown(self) -> str | None:
        """The token for all tokens outside the vocabulary; None if there is none."""
        return None

    @property
    def end(self) -> str | None:
        """The token at the end of a line; None if lines end in a line feed, which is text like any other."""
        return None

    def encode(self, text: str, *, finish: bool = True) -> Int[Tensor, " L"]:
        """The ids of a text (int64).

        Args:
            text: the text; its lines end in line feeds.
            finish: also end a last line of words without line feed; False for a prompt that will be continued.

        Raises:
            ValueError: the text has a token outside the vocabulary, which has no ``<unk>``.
        """
        return self.encode_lines(lines_in(text), finish=finish)

    @abstractmethod
    def encode_lines(self, lines: Iterable[str], *, finish: bool = True) -> Int[Tensor, " L"]:
        """As ``encode``, for a text given line by line as in ``of_lines``, which need not fit into memory."""

    @abstractmethod
    def decode(self, ids: Int[Tensor, " L"]) -> str:
        """The text of the ids.

        Raises:
            ValueError: an id is outside 0 … V − 1.
        """

    @abstractmethod
    def speller(self, before: str) -> Speller:
        """Spells the tokens that follow the text ``before``, one by one."""

    @abstractmethod
    def spelling(self, place: int) -> str:
        """The text of one token, for people."""

    @abstractmethod
    def byte_sizes(self, tokens: Int[Tensor, "*S"] | None, targets: Int[Tensor, "*S"]) -> Int[Tensor, "*S"]:
        """The UTF-8 bytes of the text that each target adds after its token, or at the beginning of a text (None).

        What ``decode`` returns is counted: of words the word and the space before it, which the first word of a line
        lacks; one byte for ``<eos>``, the line feed; five for ``<unk>``, which is what was predicted.
        """

    def byte_count(self, tokens: Int[Tensor, "*S"], targets: Int[Tensor, "*S"]) -> int:
        """The sum of ``byte_sizes``."""
        pairs = zip(tokens.reshape(-1).split(_CHUNK), targets.reshape(-1).split(_CHUNK), strict=True)
        return sum(int(self.byte_sizes(*pair).sum()) for pair in pairs)

    def text_bytes(self, ids: Int[Tensor, " L"]) -> int:
        """The UTF-8 bytes of the text of these ids, without making the text: ``len(decode(ids).encode())``."""
        return int(self.byte_sizes(None, ids[:1]).sum()) + self.byte_count(ids[:-1], ids[1:])

    def place_of(self, text: str) -> int | None:
        """The id of the token with this text; None if no single token has it."""
        return self.tokens.index(text) if text in self.tokens else None

    def translation(self, other: Vocabulary) -> Int[Tensor, " _"] | None:
        """The id here of each token of ``other``, V for those that are missing here.

        None if texts have to be decoded and encoded again, since the tokens do not correspond one by one.
        """
        return None

    def remarks(self, prompts: Sequence[str]) -> list[str]:
        """Sentences about what the model reads differently from how these prompts look."""
        return []

    def _places(self, ids: Tensor) -> list[int]:
        """The ids as numbers; a ValueError if one is outside the vocabulary."""
        ids = torch.as_tensor(ids)
        if ids.ndim != 1 or (len(ids) and (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)):
            raise ValueError(
                f"Vocabulary.decode: the ids are {ids.dtype} of shape {list(ids.shape)}, and must be whole numbers "
                "along one axis; try ids.flatten().long()."
            )
        places = ids.tolist()
        if places and not (min(places) >= 0 and max(places) < len(self)):
            wrong = next(place for place in places if not 0 <= place < len(self))
            raise ValueError(
                f"Vocabulary.decode: the id {wrong} is outside 0 … {len(self) - 1}; "
                "decode with the vocabulary that the ids were encoded with."
            )
        return places


def kind_of(unit: str) -> type[Vocabulary]:
    """The class of the vocabularies of a unit; a ValueError if there is no such unit."""
    check_unit(unit)
    return Vocabulary._kinds[unit]


def check_unit(unit: str) -> None:
    """Raise a ValueError unless ``unit`` is one of ``TextUnit``."""
    if unit not in typing.get_args(TextUnit):
        raise ValueError(
            f"unit={unit!r}: a token of text is a 'word' or a 'character', or one of 'bpe' (byte-pair encoding); try "
            "unit='word'."
        )


def noun(unit: str) -> str:
    """One token in words: the unit, except that of ``bpe`` it is a "BPE token"."""
    return "BPE token" if unit == "bpe" else unit


def lines_in(text: str) -> Iterable[str]:
    """The lines of a text, each with its line feed; no other character ends a line.

    Raises:
        TypeError: ``text`` is not a str.
    """
    if not isinstance(text, str):
        raise TypeError(
            f"{text!r:.60} is a {type(text).__name__}, and only a text (str) is encoded; decode bytes first."
        )
    return io.StringIO(text, newline="\n")


def check_lines(call: str, lines: Iterable[str]) -> None:
    """Raise a TypeError if ``lines`` is one str: a loop over it gives characters and not lines."""
    if isinstance(lines, str):
        raise TypeError(
            f"{call}({lines!r:.60}): lines are an iterable of texts, such as an open file; give one text to "
            f"{'encode' if 'encode' in call else 'of_text'}."
        )


def as_tensor(ids: array[int]) -> Int[Tensor, " L"]:
    """The numbers of an array("i") as a tensor (int32) that shares its memory."""
    return torch.frombuffer(ids, dtype=torch.int32) if ids else torch.empty(0, dtype=torch.int32)


def wrong_fields(value: Mapping[str, Any], wanted: str) -> ValueError:
    """The error for a stored vocabulary with other fields than it has to have."""
    fields = ", ".join(sorted(map(str, value))) if isinstance(value, Mapping) else ""
    return ValueError(
        f"Vocabulary.from_json: the fields are {fields or 'none'}, and must be 'unit' (a "
        f"string) and {wanted}; pass what to_json returned."
    )
