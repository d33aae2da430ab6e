"""Byte-level byte-pair encoding by the library ``tokenizers``: functions that learn, read and check its tokenizers."""

from __future__ import annotations

from collections.abc import Iterable
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

from equilibria.checks import check_whole
from equilibria.lm.corpora.byte_symbols import BYTES

LARGEST = 1 << 20
"""Tokens of a vocabulary at most."""
_TWICE = 2
"""A pair that occurs less often is not merged."""


def trained_tokenizer(lines: Iterable[str], *, size: int) -> tuple[str, str]:
    """The tokenizer that is learnt from the lines of a text, as JSON, and the library with its version.

    Raises:
        ValueError: ``size`` is out of its range.
        ModuleNotFoundError: ``tokenizers`` is not installed.
    """
    check_size(size)
    library = _library()
    tokenizer = library.Tokenizer(library.models.BPE())
    lines_apart = library.pre_tokenizers.Split("\n", "isolated")
    words = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = library.pre_tokenizers.Sequence([lines_apart, words])
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=size, min_frequency=_TWICE, show_progress=False, initial_alphabet=sorted(BYTES)
    )
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer.to_str(), f"tokenizers {library.__version__}"


def tokenizer_of(text: str) -> Tokenizer:
    """The tokenizer of a JSON that ``check_tokenizer`` has accepted.

    Raises:
        ValueError: this version of ``tokenizers`` cannot read it.
        ModuleNotFoundError: ``tokenizers`` is not installed.
    """
    library = _library()
    try:
        return library.Tokenizer.from_str(text)
    except Exception as error:  # the library raises plain Exception
        raise ValueError(
            f"tokenizers {library.__version__} cannot read the tokenizer of this vocabulary ({error}); install the "
            "version that corpus.json names as its library."
        ) from None


def check_size(size: int) -> None:
    """Raise a ValueError if a byte-pair vocabulary cannot have so many tokens."""
    check_whole("byte-pair encoding", vocabulary_size=size)
    if not len(BYTES) <= size <= LARGEST:
        raise ValueError(
            f"vocabulary_size={size}: byte-pair encoding has a token for each of the {len(BYTES)} bytes, and at most "
            f"{LARGEST:,} tokens; try 4096."
        )


def check_tokenizer(tokenizer: Any) -> dict[str, int]:
    """The ids of the tokens, if the JSON is a tokenizer as ``trained_tokenizer`` makes them.

    Raises:
        ValueError: it is another one, with which texts might not come back as they were.
    """
    places: dict[str, int] = {}
    try:
        model, (lines, words) = tokenizer["model"], tokenizer["pre_tokenizer"]["pretokenizers"]
        places, merges = model["vocab"], model["merges"]
        right = (
            model["type"] == "BPE"
            and not any(tokenizer[name] for name in ("truncation", "padding", "normalizer", "post_processor"))
            and not tokenizer["added_tokens"]
            and not any(model[name] for name in ("dropout", "unk_token", "byte_fallback", "ignore_merges"))
            and not any(model[name] for name in ("continuing_subword_prefix", "end_of_word_suffix"))
            and lines["type"] == "Split"
            and lines["pattern"] == {"String": "\n"}
            and lines["behavior"] == "Isolated"
            and words["type"] == "ByteLevel"
            and words["add_prefix_space"] is False
            and sorted(places.values()) == list(range(len(places)))
            and all(token and BYTES.keys() >= set(token) for token in places)
            and BYTES.keys() <= places.keys()
            and all(left in places and right in places and left + right in places for left, right in merges)
        )
    except (AttributeError, KeyError, TypeError, ValueError):
        right = False
    if not right:
        raise ValueError(
            "The tokenizer is not one of bytes and their merges alone, as this version learns it, so texts might not "
            "come back as they were; learn the vocabulary with Vocabulary.of_text(text, 'bpe')."
        )
    return places


def _library() -> ModuleType:
    """The library ``tokenizers``."""
    try:
        import tokenizers
        import tokenizers.decoders
        import tokenizers.models
        import tokenizers.pre_tokenizers
        import tokenizers.trainers
    except ModuleNotFoundError as error:
        message = 'Byte-pair encoding (unit="bpe") needs tokenizers: pip install "equilibria[tokenizers]"'
        raise ModuleNotFoundError(message, name=error.name) from None
    return tokenizers
