"""Bits per byte: the bits of the scored tokens over the UTF-8 bytes of the text that they spell."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equilibria.cells import TransformerConfig
from equilibria.lm.corpora import Segments, Stream, Vocabulary, copying
from equilibria.lm.evaluation import evaluate
from equilibria.lm.model import Explicit, LanguageConfig

ASCII = "the cat sat on the mat,\n\n  the other hat\n" * 8
TEXT = "the cât sat on the mat, 😀\n\n  the other hât\n" * 8


def uniform(vocabulary):
    """A model to which all tokens are equally likely."""
    config = LanguageConfig(
        cell=TransformerConfig(width=8, heads=2, inner=8, memory=8), explicit=Explicit(depth=1), tied=False
    )
    model = config.build(len(vocabulary))
    with torch.no_grad():
        model.head.weight.zero_()
    return model


def scored(text, unit, **reading):
    vocabulary = Vocabulary.of_text(text, unit, size=280)
    stream = Stream.of_text(vocabulary.encode(text))
    found = evaluate(uniform(vocabulary), stream, **{"segment_length": 16, **reading}, vocabulary=vocabulary)
    return vocabulary, stream, found


def after_the_first(vocabulary, stream):
    """The text of the targets."""
    return vocabulary.decode(stream.ids).encode()[len(vocabulary.decode(stream.ids[:1]).encode()) :]


@pytest.mark.parametrize("reading", [{}, {"overlap": 5}, {"segment_length": 7, "overlap": 3}])
@pytest.mark.parametrize("unit", ["character", "word", "bpe"])
@pytest.mark.parametrize("text", [ASCII, TEXT])
def test_the_bytes_are_those_of_the_scored_text(text, unit, reading):
    vocabulary, stream, found = scored(text, unit, **reading)
    assert found.tokens == len(stream)
    assert found.bytes == len(after_the_first(vocabulary, stream))
    assert found.bits_per_byte == pytest.approx(found.tokens * math.log2(len(vocabulary)) / found.bytes)


def test_of_ascii_characters_it_is_bits_per_character():
    _, _, found = scored(ASCII, "character")
    assert found.bits_per_byte == found.bits
    _, _, other = scored(TEXT, "character")
    assert other.bits_per_byte < other.bits


def test_uniform_models_of_characters_and_byte_pairs_by_hand():
    vocabulary = Vocabulary.of_text("ab", "character")
    stream = Stream.of_text(vocabulary.encode("abba"))
    found = evaluate(uniform(vocabulary), stream, segment_length=4, vocabulary=vocabulary)
    assert (found.bytes, found.bits_per_byte) == (3, pytest.approx(1.0))  # three letters of one bit each

    pairs = Vocabulary.of_text("abab", "bpe", size=257)  # one merge: ab
    stream = Stream.of_text(pairs.encode("aabé"))  # a, ab, and é as two bytes
    assert [pairs.spelling(place) for place in stream.ids.tolist()] == ["a", "ab", "0xc3", "0xa9"]
    found = evaluate(uniform(pairs), stream, segment_length=4, vocabulary=pairs)
    assert (found.tokens, found.bytes) == (3, 4)
    assert found.bits_per_byte == pytest.approx(3 * math.log2(257) / 4)


def test_streams_side_by_side_count_what_they_score():
    vocabulary, stream, found = scored(TEXT, "bpe", batch_size=3)
    _, targets = Segments(stream, batch_size=3, length=len(stream))._table
    assert found.tokens == 3 * (len(stream) // 3)
    assert found.bytes == sum(len(vocabulary.tokens[place]) for place in targets.flatten().tolist())  # a sign is a byte


@given(st.text(alphabet=st.sampled_from("ab é\n😀")), st.sampled_from(["word", "character", "bpe"]))
@settings(deadline=None, max_examples=60)
def test_a_text_has_the_bytes_of_what_is_decoded(text, unit):
    if unit == "character" and not text:
        return
    vocabulary = Vocabulary.of_text(text, unit, size=256)
    ids = vocabulary.encode(text)
    assert vocabulary.text_bytes(ids) == len(vocabulary.decode(ids).encode())


def test_words_count_their_spaces_and_line_feeds_and_unknown_words_as_they_are_written():
    vocabulary = Vocabulary.of_text("the cat <unk>\n", "word")
    ids = vocabulary.encode("the   zebra\n\ncat")
    assert vocabulary.decode(ids) == "the <unk>\n\ncat\n"
    sizes = vocabulary.byte_sizes(ids[:-1], ids[1:]).tolist()
    assert sizes == [6, 1, 1, 3, 1]  # " <unk>", "\n", "\n", "cat", "\n"
    plain = Vocabulary.of_tokens(["a", "b"], "word")  # without <eos> every word has its space
    assert plain.text_bytes(plain.encode("a b\nb")) == len(b"a b b")


def test_what_is_no_text_has_none():
    corpus = copying(blank=5, train=2, valid=2, test=2)
    assert corpus.spelling is None
    found = evaluate(uniform(corpus.vocabulary), corpus.valid, vocabulary=corpus.spelling)
    assert (found.bytes, found.bits_per_byte) == (None, None)
    assert dataclasses.replace(corpus, unit="character").spelling is corpus.vocabulary
