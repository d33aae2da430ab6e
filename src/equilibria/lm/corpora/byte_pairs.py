"""BytePairVocabulary: byte-level byte-pair encoding (BPE), which spells every text with a vocabulary of chosen size.

Letters: L length of a sequence of tokens, V size of the vocabulary.
"""

from __future__ import annotations

import codecs
import dataclasses
import functools
import hashlib
import itertools
import json
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from equilibria.lm.corpora.byte_level import check_tokenizer, tokenizer_of, trained_tokenizer
from equilibria.lm.corpora.byte_symbols import BYTES
from equilibria.lm.corpora.vocabulary import Speller, Vocabulary, as_tensor, check_lines, wrong_fields

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_BATCH = 1024
"""Lines that are encoded at once."""


@dataclasses.dataclass(frozen=True)
class BytePairVocabulary(Vocabulary):
    """The 256 bytes and their merges, as the library ``tokenizers`` has learnt them from a training text.

    A text is cut at line feeds, which are tokens of their own, then into words with the space before them, runs of
    digits, of signs and of whitespace, as for GPT-2 (Radford et al. 2019); within each piece pairs of tokens are
    merged in the order in which they were learnt (Sennrich, Haddow, Birch 2016). Nothing is normalised, so
    ``decode(encode(text)) == text`` for every text, also of other languages, signs and bytes than the training text.

    Encoding needs ``pip install "equilibria[tokenizers]"``; reading and decoding do not.
    """

    unit: ClassVar = "bpe"
    """The unit of a token."""
    spells_everything: ClassVar[bool] = True
    """True: the tokens include all bytes."""
    tokenizer_json: str = dataclasses.field(repr=False)
    """The tokenizer as ``tokenizers`` writes it, a JSON object, with sorted keys and without spaces."""
    library: str = dataclasses.field(compare=False)
    """The library that learnt it, with its version: "tokenizers 0.23.3"."""
    tokens: tuple[str, ...] = dataclasses.field(init=False, compare=False, repr=False)
    """All tokens, each byte as one printable character, as ``tokenizers`` writes them: "Ġthe" is " the"."""

    def __post_init__(self) -> None:
        try:
            tokenizer = json.loads(self.tokenizer_json)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"BytePairVocabulary: the tokenizer is not JSON ({error}); take it from a copy.") from None
        places = check_tokenizer(tokenizer)
        object.__setattr__(self, "tokenizer_json", _canonical(tokenizer))
        object.__setattr__(self, "tokens", tuple(sorted(places, key=places.__getitem__)))

    @classmethod
    def learnt(cls, lines: Iterable[str], *, size: int) -> tuple[BytePairVocabulary, Int[Tensor, " L"]]:
        """The vocabulary of at most ``size`` tokens that is learnt from a text, and the ids of the text (int64).

        The same text gives the same merges. There are fewer tokens than ``size`` if no other pair occurs twice.

        Raises:
            ValueError: ``size`` is below 256, the number of bytes, or far too large.
            ModuleNotFoundError: ``tokenizers`` is not installed.
        """
        lines = list(lines)
        for number, line in enumerate(lines, 1):
            check_utf8(line, number)
        tokenizer, library = trained_tokenizer(lines, size=size)
        vocabulary = cls(tokenizer_json=tokenizer, library=library)
        return vocabulary, vocabulary.encode_lines(lines)

    @classmethod
    def listed(cls, tokens: tuple[str, ...]) -> BytePairVocabulary:
        """Raises a ValueError: a list of tokens does not say how they are merged."""
        raise ValueError(
            "Vocabulary.of_tokens(unit='bpe'): byte-pair tokens have merges besides; use Vocabulary.of_text(text, "
            "'bpe') or Vocabulary.from_json."
        )

    @classmethod
    def stored(cls, value: Mapping[str, Any]) -> BytePairVocabulary:
        """The vocabulary from the dictionary of ``to_json``; a ValueError if it has other fields or cannot be one."""
        tokenizer, library = value.get("tokenizer"), value.get("library")
        if (
            set(value) != {"unit", "tokenizer", "library"}
            or not isinstance(tokenizer, dict)
            or not isinstance(library, str)
        ):
            raise wrong_fields(value, "'tokenizer' (an object) and 'library' (a string)")
        return cls(tokenizer_json=_canonical(tokenizer), library=library)

    def to_json(self) -> dict[str, Any]:
        """The unit, the tokenizer and the library that learnt it."""
        return {"unit": self.unit, "library": self.library, "tokenizer": json.loads(self.tokenizer_json)}

    @property
    def digest(self) -> str:
        """The SHA-256 of ``tokenizer_json``."""
        return hashlib.sha256(self.tokenizer_json.encode()).hexdigest()

    @property
    def origin(self) -> str | None:
        """The library that learnt the merges, with its version."""
        return self.library

    @property
    def tokenizer(self) -> Tokenizer:
        """A new ``tokenizers.Tokenizer`` that encodes and decodes as this vocabulary does.

        Raises:
            ModuleNotFoundError: ``tokenizers`` is not installed.
        """
        return tokenizer_of(self.tokenizer_json)

    def encode_lines(self, lines: Iterable[str], *, finish: bool = True) -> Int[Tensor, " L"]:
        """The ids of the lines of a text (int64); ``finish`` changes nothing, since a line feed is text.

        Raises:
            ValueError: a line has half a surrogate pair, which UTF-8 cannot represent.
            ModuleNotFoundError: ``tokenizers`` is not installed.
        """
        check_lines("encode_lines", lines)
        ids, rest, number = array("i"), iter(lines), 1
        while batch := list(itertools.islice(rest, _BATCH)):
            for place, line in enumerate(batch):
                check_utf8(line, number + place)
            for encoding in self._encoder.encode_batch_fast(batch, add_special_tokens=False):
                ids.extend(encoding.ids)
            number += len(batch)
        return as_tensor(ids).long()

    def decode(self, ids: Int[Tensor, " L"]) -> str:
        """The text of the ids; bytes that are no UTF-8, as at a cut through a character, become U+FFFD."""
        return b"".join(self._bytes[place] for place in self._places(ids)).decode("utf-8", errors="replace")

    def speller(self, before: str) -> Speller:
        """Spells whole characters: bytes wait until the tokens after them complete their character."""
        return _ByteSpeller(self._bytes)

    def spelling(self, place: int) -> str:
        """The text of the token; the bytes in hexadecimal digits if they are not whole characters."""
        data = self._bytes[place]
        try:
            return data.decode()
        except UnicodeDecodeError:
            return f"0x{data.hex()}"

    def byte_sizes(self, tokens: Int[Tensor, "*S"] | None, targets: Int[Tensor, "*S"]) -> Int[Tensor, "*S"]:
        """The bytes of each token."""
        return self._sizes[targets]

    def place_of(self, text: str) -> int | None:
        """The id of the token that the text is encoded to; None if these are several, or none."""
        ids = self.encode(text)
        return int(ids) if len(ids) == 1 else None

    def remarks(self, prompts: Sequence[str]) -> list[str]:
        """A sentence about prompts that end in a space, which the next word would bring along."""
        if not any(prompt.endswith(" ") for prompt in prompts):
            return []
        return ["a prompt ends in a space, and the tokens of this run begin with theirs; leave it out for better text."]

    @functools.cached_property
    def _encoder(self) -> Tokenizer:
        return self.tokenizer

    @functools.cached_property
    def _bytes(self) -> tuple[bytes, ...]:
        """The bytes of each token."""
        return tuple(bytes(map(BYTES.__getitem__, token)) for token in self.tokens)

    @functools.cached_property
    def _sizes(self) -> Int[Tensor, " V"]:
        return torch.tensor([len(token) for token in self.tokens])


class _ByteSpeller(Speller):
    """Spells bytes as soon as they are whole characters."""

    def __init__(self, tokens: Sequence[bytes]) -> None:
        self._tokens, self._decoder = tokens, codecs.getincrementaldecoder("utf-8")(errors="replace")

    def piece(self, place: int) -> str:
        return self._decoder.decode(self._tokens[place])

    def rest(self) -> str:
        return self._decoder.decode(b"", final=True)


def check_utf8(line: str, number: int) -> None:
    """Raise a ValueError if UTF-8 cannot represent the line."""
    try:
        line.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"The character {line[error.start]!r} (position {error.start}, line {number}) is half a surrogate pair, "
            "which UTF-8 cannot represent; remove it, or decode the text as what it is."
        ) from None


def _canonical(tokenizer: Mapping[str, Any]) -> str:
    """The same text for the same tokenizer, whatever the order of its keys."""
    return json.dumps(tokenizer, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
