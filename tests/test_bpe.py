"""Byte-pair encoding: every text comes back, merges are those of the training text, a run keeps them."""

from __future__ import annotations

import copy
import json
import pickle
import re
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equilibria.lm.corpora import BytePairVocabulary, Corpus, Language, Stream, TextFolder, Vocabulary, text_file
from equilibria.lm.corpora.byte_symbols import BYTES
from equilibria.lm.runs.continuation import Detokeniser

TEXT = "the cat sat on the mat,\n\n  the other cat's hat é 😀\tthe end\n" * 6
VOCABULARY = Vocabulary.of_text(TEXT, "bpe", size=300)
TOKENS = len(VOCABULARY)


@given(st.text())
@settings(deadline=None)
def test_every_text_comes_back(text):
    ids = VOCABULARY.encode(text)
    assert VOCABULARY.decode(ids) == text
    assert ids.dtype == torch.int64
    assert VOCABULARY.text_bytes(ids) == len(text.encode())


@pytest.mark.parametrize(
    "text", ["", "\n", "\r\n\r", "  \n \n\n", "\x00\x1f\ufeff", "日本語 😀\u200d", "a" * 5000, "\u2028"]
)
def test_texts_that_tokenizers_like_to_change_come_back(text):
    assert VOCABULARY.decode(VOCABULARY.encode(text)) == text


@given(st.lists(st.text(alphabet=st.sampled_from(" \n\tthe é"))))
@settings(deadline=None)
def test_lines_are_encoded_by_themselves_so_any_way_of_reading_gives_the_same_ids(parts):
    text = "".join(parts)
    whole = VOCABULARY.encode(text)
    assert VOCABULARY.tokenizer.encode(text).ids == whole.tolist()
    lines = [line for line in re.split("(?<=\n)", text) if line]
    assert torch.equal(torch.cat([whole[:0], *map(VOCABULARY.encode, lines)]), whole)


def test_a_line_feed_is_always_one_token():
    assert VOCABULARY.encode(TEXT).eq(VOCABULARY.place_of("\n")).sum() == TEXT.count("\n")
    assert sum("Ċ" in token for token in VOCABULARY.tokens) == 1


def test_tokens_are_the_bytes_and_then_the_merges():
    assert set(VOCABULARY.tokens[:256]) == set(BYTES)
    assert len({*BYTES.values()}) == 256
    assert VOCABULARY.tokens[256:259] == ("at", "he", "the")  # at five times in a line, he and then t + he four times
    assert VOCABULARY.spelling(VOCABULARY.tokens.index("Ġthe")) == " the"
    assert VOCABULARY.spelling(VOCABULARY.tokens.index("ð")) == "0xf0"
    assert (VOCABULARY.end, VOCABULARY.unknown, VOCABULARY.unit) == (None, None, "bpe")
    assert 256 < TOKENS <= 300


def test_pairs_that_occur_once_are_not_merged():
    assert len(Vocabulary.of_text("abcdefg", "bpe")) == 256


def test_the_symbols_of_bytes_are_those_of_the_library():
    from tokenizers import pre_tokenizers

    assert set(pre_tokenizers.ByteLevel.alphabet()) == set(BYTES)
    for byte in range(128):
        ((symbol, _),) = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(chr(byte))
        assert BYTES[symbol] == byte


@pytest.mark.slow
def test_the_same_text_gives_the_same_merges_in_every_process():
    program = (
        "import sys; sys.path[:0] = sys.argv[1:]; from test_bpe import TEXT; "
        "from equilibria.lm.corpora import Vocabulary; "
        "print(Vocabulary.of_text(TEXT, 'bpe', size=300).digest)"
    )
    for _ in range(2):  # hash seeds differ
        done = subprocess.run([sys.executable, "-c", program, *sys.path], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == VOCABULARY.digest


def test_json_and_back_gives_the_same_ids():
    stored = json.dumps(VOCABULARY.to_json())
    again = Vocabulary.from_json(json.loads(stored))
    assert again == VOCABULARY
    assert again.tokens == VOCABULARY.tokens
    assert torch.equal(again.encode(TEXT), VOCABULARY.encode(TEXT))
    assert again.origin.startswith("tokenizers ")
    for twin in (copy.deepcopy(VOCABULARY), pickle.loads(pickle.dumps(VOCABULARY))):
        assert twin == VOCABULARY
        assert torch.equal(twin.encode(TEXT), VOCABULARY.encode(TEXT))


@pytest.mark.usefixtures("unhooked")
@pytest.mark.parametrize(
    "change",
    [
        lambda tokenizer: tokenizer.update(normalizer={"type": "Lowercase"}),
        lambda tokenizer: tokenizer["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True),
        lambda tokenizer: tokenizer["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed"),
        lambda tokenizer: tokenizer["model"]["vocab"].pop("!"),
        lambda tokenizer: tokenizer["model"]["vocab"].update({"!": 1}),
        lambda tokenizer: tokenizer["model"]["vocab"].update({"€": TOKENS}),
        lambda tokenizer: tokenizer["model"]["merges"].append(["t", "€"]),
        lambda tokenizer: tokenizer["model"].update(dropout=0.5),
        lambda tokenizer: tokenizer["model"].update(type="WordPiece"),
        lambda tokenizer: tokenizer["added_tokens"].append({"id": 0, "content": "a"}),
        lambda tokenizer: tokenizer.pop("model"),
        lambda tokenizer: tokenizer.update(model=3),
    ],
)
def test_another_tokenizer_is_refused(change):
    value = VOCABULARY.to_json()
    change(value["tokenizer"])
    with pytest.raises(ValueError, match="bytes and their merges alone"):
        Vocabulary.from_json(value)


@pytest.mark.usefixtures("unhooked")
@pytest.mark.parametrize(
    "value", [{"unit": "bpe"}, {"unit": "bpe", "tokens": ["a"]}, {"unit": "bpe", "tokenizer": "{}", "library": "x"}]
)
def test_json_without_a_tokenizer_is_refused(value):
    with pytest.raises(ValueError, match="fields are"):
        Vocabulary.from_json(value)


@pytest.mark.parametrize("size", [0, 255, 1 << 40])
def test_sizes_out_of_range_are_refused(size):
    with pytest.raises(ValueError, match=rf"vocabulary_size={size}.*256 bytes.*try 4096"):
        Vocabulary.of_text(TEXT, "bpe", size=size)


def test_a_list_of_tokens_is_no_byte_pair_vocabulary():
    with pytest.raises(ValueError, match="have merges besides"):
        Vocabulary.of_tokens(["a", "b"], "bpe")


@pytest.mark.parametrize("learn", [False, True])
def test_half_a_surrogate_pair_is_refused_with_its_place(learn):
    with pytest.raises(ValueError, match=r"'\\udc80' \(position 1, line 2\).*UTF-8"):
        Vocabulary.of_text("a\nb\udc80", "bpe") if learn else VOCABULARY.encode("a\nb\udc80")


def test_ids_outside_the_vocabulary_are_refused():
    with pytest.raises(ValueError, match=rf"id {TOKENS} is outside"):
        VOCABULARY.decode(torch.tensor([0, TOKENS]))


def test_without_the_library_the_command_that_installs_it_is_named(monkeypatch):
    stored = VOCABULARY.to_json()
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "equilibria\[tokenizers\]"'):
        Vocabulary.of_text(TEXT, "bpe")
    again = Vocabulary.from_json(stored)  # which a report, or a score of ids, does not need it for
    assert again.decode(torch.tensor([again.tokens.index("Ġthe")])) == " the"
    with pytest.raises(ModuleNotFoundError, match="tokenizers"):
        again.encode("a")


class TestSpelling:
    def pieces(self, ids, stop=None):
        text = Detokeniser(VOCABULARY, "before", stop)
        return [*(text.piece(place) for place in ids), text.rest()]

    @given(st.text(alphabet=st.sampled_from("the é😀日\n")))
    @settings(deadline=None)
    def test_pieces_are_whole_characters_and_together_the_text(self, text):
        ids = VOCABULARY.encode(text).tolist()
        pieces = self.pieces(ids)
        assert "".join(pieces) == text
        assert "\ufffd" not in "".join(pieces)
        assert pieces[-1] == ""

    @given(st.lists(st.integers(0, TOKENS - 1)))
    @settings(deadline=None)
    def test_any_ids_are_spelt_as_they_are_decoded(self, ids):
        assert "".join(self.pieces(ids)) == VOCABULARY.decode(torch.tensor(ids, dtype=torch.int64))

    def test_bytes_wait_for_their_character(self):
        ids = [place for byte in "日".encode() for place in [self.place(byte)]]
        assert self.pieces(ids) == ["", "", "日", ""]
        assert self.pieces(ids[:2]) == ["", "", "\ufffd"]  # nothing follows any more

    def test_a_token_that_ends_the_text_is_not_shown_nor_what_follows(self):
        ids = [*VOCABULARY.encode("the").tolist(), VOCABULARY.place_of("\n"), *VOCABULARY.encode("cat").tolist()]
        assert "".join(self.pieces(ids, stop=VOCABULARY.place_of("\n"))) == "the"

    def place(self, byte):
        return VOCABULARY.tokens.index(next(symbol for symbol, value in BYTES.items() if value == byte))


class TestFile:
    def corpus(self, folder, text, **options):
        (folder / "text.txt").write_text(text, encoding="utf-8", newline="")
        return text_file(folder / "text.txt", unit="bpe", **options)

    def test_it_is_cut_at_the_same_characters_as_one_of_characters(self, tmp_path):
        corpus = self.corpus(tmp_path, TEXT, vocabulary_size=300)
        characters = text_file(tmp_path / "text.txt", unit="character")
        for split in ("train", "valid", "test"):
            text = characters.vocabulary.decode(getattr(characters, split).ids)
            assert corpus.vocabulary.decode(getattr(corpus, split).ids) == text

    def test_merges_are_learnt_from_the_training_part_alone(self, tmp_path):
        text = TEXT * 4
        first = len(text) * 18 // 20
        corpus = self.corpus(tmp_path, text, vocabulary_size=300)
        assert corpus.vocabulary == Vocabulary.of_text(text[:first], "bpe", size=300)
        other = self.corpus(tmp_path, text[:first] + "zyzyzyzy " * ((len(text) - first) // 9) + "!" * 9)
        assert not any("zy" in token for token in other.vocabulary.tokens)

    def test_a_short_text_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match=r"text\.txt: the text has 6 BPE tokens, and 5 % of it"):
            self.corpus(tmp_path, "a" * 39)

    def test_a_folder_is_read_with_the_merges_of_its_training_text(self, tmp_path):
        for split, text in (("train", TEXT), ("valid", "ünseen\n"), ("test", "日本\n")):
            (tmp_path / f"{split}.txt").write_text(text, encoding="utf-8")
        corpus = TextFolder(tmp_path, unit="bpe", vocabulary_size=300).load()
        assert corpus.vocabulary == VOCABULARY
        assert corpus.vocabulary.decode(corpus.test.ids) == "日本\n"

    @pytest.mark.usefixtures("unhooked")
    def test_sizes_that_mean_nothing_are_refused(self):
        with pytest.raises(ValueError, match=r"vocabulary_size=300.*the words are those of the text"):
            TextFolder(unit="word", vocabulary_size=300)
        with pytest.raises(ValueError, match=r"vocabulary_size=100.*256 bytes"):
            TextFolder(unit="bpe", vocabulary_size=100)


class TestLanguage:
    def corpus(self, vocabulary=VOCABULARY, text=TEXT):
        stream = Stream.of_text(vocabulary.encode(text))
        return Corpus("text", stream, stream, stream, vocabulary, unit="bpe")

    def test_it_comes_back_and_notices_a_change(self):
        language = Language.of(self.corpus())
        stored = json.loads(json.dumps(language.to_json()))
        assert stored["vocabulary"]["library"].startswith("tokenizers ")
        again = Language.from_json(json.loads(json.dumps(stored)))
        assert again.vocabulary == VOCABULARY
        assert again.changed(self.corpus()) == []
        assert again.changed(self.corpus(text=TEXT + "!")) == ["train", "valid", "test"]
        stored["vocabulary"]["tokenizer"]["model"]["merges"].pop()
        with pytest.raises(ValueError, match="changed after it was written"):
            Language.from_json(stored)

    def test_the_same_text_with_other_merges_is_the_same_text_and_gets_the_merges_of_the_run(self):
        language, other = Language.of(self.corpus()), self.corpus(Vocabulary.of_text(TEXT, "bpe", size=270))
        assert language.changed(other) == []
        for found in (language.encoded(other), language.adopted(other)):
            assert found.vocabulary == VOCABULARY
            assert torch.equal(found.valid.tokens, self.corpus().valid.tokens)
        with pytest.raises(ValueError, match="vocabulary of text is not the one with which here began"):
            language.check_same(other, Language.of(other), run="here")

    def test_another_text_is_not_adopted(self):
        other = self.corpus(Vocabulary.of_text(TEXT, "bpe", size=270), text=TEXT + "!")
        assert Language.of(self.corpus()).adopted(other) is other

    def test_targets_that_are_no_next_tokens_cannot_be_encoded_again(self):
        corpus = self.corpus(Vocabulary.of_text(TEXT, "bpe", size=270))
        stream = Stream(corpus.train.tokens, corpus.train.tokens.flip(0))
        with pytest.raises(ValueError, match="cannot be encoded with another vocabulary"):
            Language.of(self.corpus()).encoded(Corpus("text", stream, stream, stream, corpus.vocabulary, unit="bpe"))


def test_a_prompt_that_ends_in_a_space_gets_a_remark():
    assert "ends in a space" in VOCABULARY.remarks(["the", "the "])[0]
    assert VOCABULARY.remarks(["the"]) == []
    assert isinstance(VOCABULARY, BytePairVocabulary)
