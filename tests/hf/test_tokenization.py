"""The tokenizer of a vocabulary gives its ids and its text, and names what it lacks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers")

from equilibria.hf import EDGE, EquilibriumTokenizer, tokenizer_of
from equilibria.lm.corpora import Vocabulary

LEARNT = "a b the cat\n sat <unk> on\n\n the mat, déjà vu 3\t4\n"
UNITS = {
    "character": Vocabulary.of_text(LEARNT, "character"),
    "word": Vocabulary.of_text(LEARNT, "word"),
    "bpe": Vocabulary.of_text(LEARNT * 9, "bpe", size=270),
}
TOKENIZERS = {unit: tokenizer_of(vocabulary) for unit, vocabulary in UNITS.items()}
PARTS = ["a", "b", "the", "cat", "déjà", "x", "<eos>", "<unk>", "", *" \n\t\r\x0b\x0c\x1c\x85\xa0\u2003\u3000"]
SPACED = st.lists(st.sampled_from(PARTS), max_size=14).map("".join)
KNOWN = st.text(alphabet=sorted(set(LEARNT)), max_size=20)
ANY = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=20)


@pytest.mark.parametrize(("unit", "texts"), [("character", KNOWN), ("word", SPACED), ("bpe", ANY)])
def test_ids_and_text_are_those_of_the_vocabulary(unit, texts):
    vocabulary, tokenizer = UNITS[unit], TOKENIZERS[unit]

    @settings(max_examples=200, deadline=None)
    @given(texts)
    def same(text):
        ids = vocabulary.encode(text, finish=False)
        assert tokenizer.encode(text) == ids.tolist()
        assert tokenizer.decode(ids) == vocabulary.decode(ids)

    same()


@pytest.mark.parametrize("unit", UNITS)
def test_it_comes_back_from_its_folder(unit, tmp_path):
    vocabulary = UNITS[unit]
    TOKENIZERS[unit].save_pretrained(tmp_path)
    found = EquilibriumTokenizer.from_pretrained(tmp_path)
    assert len(found) == len(vocabulary) + 1
    assert found.pad_token_id == found.eos_token_id == found.bos_token_id == len(vocabulary)
    assert found.encode("the cat\n") == vocabulary.encode("the cat\n", finish=False).tolist()
    padded = found(["a", "the cat"], padding=True)
    assert padded["input_ids"][0][0] == len(vocabulary)
    assert padded["attention_mask"][0][0] == 0
    assert found.decode(padded["input_ids"][0], skip_special_tokens=True) == "a"
    assert EDGE in found.decode(padded["input_ids"][0])


def test_missing_characters_are_named():
    with pytest.raises(ValueError, match=r"has no 'Q', '!', and no token for unknown"):
        tokenizer_of(Vocabulary.of_text("abc\n", "character"))("aQ!b")
    with pytest.raises(ValueError, match="has no 'dog'"):
        tokenizer_of(Vocabulary.of_text("the cat\n", "word"))(["the cat", "the dog"])


def test_special_tokens_are_no_words():
    tokenizer = TOKENIZERS["word"]
    assert tokenizer.decode(tokenizer.encode("the cat"), skip_special_tokens=True) == "the cat"


def test_a_word_that_is_called_like_the_edge_of_a_text_is_refused():
    with pytest.raises(ValueError, match="stands for the edges of texts"):
        tokenizer_of(Vocabulary.of_text(f"the {EDGE} cat\n", "word"))


@pytest.mark.parametrize("unit", UNITS)
def test_what_has_no_text_or_no_ids_is_refused_as_by_the_vocabulary(unit):
    tokenizer, size = TOKENIZERS[unit], len(UNITS[unit]) + 1
    for text in ("a \ud800 b", ["a", "\udfff"]):
        with pytest.raises(ValueError, match="half a surrogate pair"):
            tokenizer(text)
    for ids in ([0, size], [-100, 0], size):
        with pytest.raises(ValueError, match=rf"outside 0 … {size - 1}"):
            tokenizer.decode(ids)
    with pytest.raises(ValueError, match=r"the id -100 is outside"):
        tokenizer.batch_decode([[0, 1], [0, -100]])
    assert tokenizer.decode(0) == UNITS[unit].decode(torch.tensor([0]))
