"""Vocabulary: decode(encode(text)) is the text, words are sorted by frequency, every line ends in <eos>."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equilibria.lm.corpora import Vocabulary

TEXT = "b a b\n\nc <unk> b a\n"


@given(st.text(min_size=1))
@settings(deadline=None)
def test_characters_come_back_as_they_were(text):
    vocabulary = Vocabulary.of_text(text, "character")
    assert vocabulary.decode(vocabulary.encode(text)) == text
    assert len(vocabulary.encode(text)) == len(text)
    assert list(vocabulary.tokens) == sorted(set(text))


@given(st.text(alphabet=st.sampled_from("ab é\t\n"), min_size=1))
@settings(deadline=None)
def test_words_come_back_with_single_spaces(text):
    vocabulary = Vocabulary.of_text(text, "word")
    lines = text.removesuffix("\n").split("\n")
    expected = "".join(" ".join(line.split()) + "\n" for line in lines)
    assert vocabulary.decode(vocabulary.encode(text)) == expected


@given(st.text(alphabet=st.sampled_from("ab \n"), min_size=1), st.text(alphabet=st.sampled_from("ab \n")))
@settings(deadline=None)
def test_a_prompt_is_a_prefix_of_what_continues_it(prompt, rest):
    vocabulary = Vocabulary.of_text("a b ab\n", "word")
    vocabulary = dataclasses.replace(vocabulary, tokens=(*vocabulary.tokens, "<unk>"))
    start = vocabulary.encode(prompt, finish=False)
    whole = vocabulary.encode(prompt + " " + rest)
    assert torch.equal(whole[: len(start)], start)


def test_words_are_sorted_by_frequency_after_the_end_of_line():
    vocabulary = Vocabulary.of_text(TEXT, "word")
    assert vocabulary.tokens == ("<eos>", "b", "a", "c", "<unk>")  # c before <unk>: ties by first appearance
    assert (vocabulary.end, vocabulary.unknown, len(vocabulary)) == ("<eos>", "<unk>", 5)


def test_every_line_ends_blank_ones_included_and_case_is_kept():
    vocabulary = Vocabulary.of_text(TEXT, "word")
    assert vocabulary.encode(TEXT).tolist() == [1, 2, 1, 0, 0, 3, 4, 1, 2, 0]
    assert vocabulary.encode(TEXT.removesuffix("\n")).tolist() == [1, 2, 1, 0, 0, 3, 4, 1, 2, 0]
    assert vocabulary.encode("a", finish=False).tolist() == [2]
    assert vocabulary.encode("").tolist() == []
    assert vocabulary.encode("B zebra").tolist() == [4, 4, 0]  # both unknown
    assert vocabulary.encode(TEXT).dtype == torch.int64


def test_a_character_vocabulary_may_hold_unk():
    vocabulary = Vocabulary.of_tokens(("a", "<unk>"), "character")
    assert vocabulary.encode("a?").tolist() == [0, 1]
    assert vocabulary.end is None


def test_json_and_back():
    vocabulary = Vocabulary.of_text(TEXT, "word")
    assert Vocabulary.from_json(json.loads(json.dumps(vocabulary.to_json()))) == vocabulary


@pytest.mark.parametrize(
    ("unit", "text", "parts"),
    [
        ("word", "the cat\nsat on the mats", ["'mats'", "position 6, line 2", "'mat'", "'<unk>'"]),
        ("character", "the\nçat", ["'ç'", "position 4, line 2", "nearest are 'c'", "'<unk>'"]),
    ],
)
def test_an_unknown_token_is_named_with_its_place_and_its_neighbours(unit, text, parts):
    vocabulary = Vocabulary.of_text("the cat sat on the mat\n", unit)
    with pytest.raises(ValueError, match="is not among") as error:
        vocabulary.encode(text)
    assert all(part in str(error.value) for part in parts)
    assert "\n" not in str(error.value)


def test_without_an_end_token_lines_are_whitespace_and_are_not_counted():
    vocabulary = Vocabulary.of_tokens(("a", "b"), "word")
    assert vocabulary.encode("a\nb\n").tolist() == [0, 1]
    with pytest.raises(ValueError, match=r"\(position 1\)"):
        vocabulary.encode("a\nx")


@pytest.mark.usefixtures("unhooked")
@pytest.mark.parametrize(
    ("tokens", "unit", "sentence"),
    [
        ((), "word", "at least one token"),
        (("a", "b", "a"), "word", "'a' occurs 2 times"),
        (("a", "b c"), "word", "contains whitespace"),
        (("a", ""), "word", "is empty"),
        (("a", "bc"), "character", "'bc' has 2 characters"),
        (("a",), "letter", "'word' or a 'character'"),
    ],
)
def test_tokens_that_cannot_be_are_refused(tokens, unit, sentence):
    with pytest.raises(ValueError, match=sentence):
        Vocabulary.of_tokens(tokens, unit)


@pytest.mark.parametrize("ids", [[0, 5], [-1]])
def test_ids_outside_the_vocabulary_are_refused(ids):
    with pytest.raises(ValueError, match=f"id {ids[-1]} is outside 0 … 4"):
        Vocabulary.of_text(TEXT, "word").decode(torch.tensor(ids))


@pytest.mark.parametrize("value", [{}, {"unit": "word", "tokens": "ab"}, {"unit": "word", "tokens": ["a"], "more": 1}])
def test_json_that_is_no_vocabulary_is_refused(value):
    with pytest.raises(ValueError, match="fields are"):
        Vocabulary.from_json(value)


def test_one_text_is_not_taken_for_lines_nor_nothing_for_a_text(unhooked):
    """The characters of a text would be its lines, each with an end, and None an empty text."""
    words = Vocabulary.of_text("a b\nc\n", "word")
    with pytest.raises(TypeError, match="give one text to encode"):
        words.encode_lines("a b")
    with pytest.raises(TypeError, match="give one text to of_text"):
        Vocabulary.of_lines("a b", "word")
    for wrong in (None, b"a b", 3, ["a"]):
        with pytest.raises(TypeError, match="only a text \\(str\\) is encoded"):
            words.encode(wrong)


def test_ids_and_tokens_of_another_kind_are_refused_in_a_sentence(unhooked):
    words = Vocabulary.of_text("a b\nc\n", "word")
    assert words.decode([1, 2]) == words.decode(torch.tensor([1, 2])) == "a b"
    assert words.decode([]) == ""
    for wrong in (torch.tensor([0.0, 1.0]), torch.tensor([[0, 1]]), torch.tensor(1), torch.tensor([True])):
        with pytest.raises(ValueError, match="must be whole numbers along one axis"):
            words.decode(wrong)
    with pytest.raises(ValueError, match="the token 1 is no text"):
        Vocabulary.of_tokens([1, 2], "word")
    for wrong in (None, [1]):
        with pytest.raises(ValueError, match="the fields are none"):
            Vocabulary.from_json(wrong)
    with pytest.raises(ValueError, match="vocabulary_size is a whole number"):
        Vocabulary.of_text("a b", "bpe", size="300")
