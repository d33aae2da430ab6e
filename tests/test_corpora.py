"""Corpora: what each of them promises, and the figures that the literature gives for them."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import random
import sys
import time
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from equilibria.lm.corpora import (
    PENN_TREEBANK_CHARACTER_COUNTS,
    PENN_TREEBANK_COUNTS,
    SYMBOLS,
    WIKITEXT103_COUNTS,
    Corpus,
    PrefixSums,
    Segments,
    Stream,
    Vocabulary,
    copying,
    memoryless_optimum,
    penn_treebank,
    penn_treebank_characters,
    prefix_sums,
    python_docs,
    text_file,
    text_folder,
    wikitext103,
    witten_bell,
)

DATA = os.environ.get("EQUILIBRIA_DATA")
needs_data = pytest.mark.skipif(DATA is None, reason="EQUILIBRIA_DATA names no folder with the Penn Treebank in ptb/")

TEXTS = {
    "train": "the cat sat on the mat\n\nthe  dog sat <unk>\n",
    "valid": "the bird sat\n",
    "test": "on the mat sat\na cat",
}


def write(folder: Path, texts: dict[str, str] = TEXTS, name: str = "{}.txt") -> Path:
    folder.mkdir(exist_ok=True)
    for split, text in texts.items():
        (folder / name.format(split)).write_bytes(text.encode())
    return folder


@pytest.fixture(scope="module")
def docs() -> Corpus:
    return python_docs()


@pytest.fixture(
    scope="module", params=["python_docs", "words", "characters", "wikitext", "copying-paper", "copying-tcn"]
)
def corpus(request, tmp_path_factory, docs) -> Corpus:
    """One of every kind."""
    if request.param == "python_docs":
        return docs
    if request.param.startswith("copying"):
        return copying(blank=30, train=12, valid=8, test=4, variant=request.param.removeprefix("copying-"))
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "wikitext":
        with pytest.MonkeyPatch.context() as patch:
            for name, count in {"train": 13, "valid": 4, "test": 8, "vocabulary": 8}.items():
                patch.setitem(WIKITEXT103_COUNTS, name, count)
            return wikitext103(write(folder, name="wiki.{}.tokens"))
    if request.param == "words":
        return text_folder(write(folder))
    return text_folder(write(folder, {**TEXTS, "valid": "the cat"}), unit="character")


def test_every_corpus_decodes_to_what_it_encodes(corpus):
    for stream in (corpus.train, corpus.valid, corpus.test):
        text = corpus.vocabulary.decode(stream.tokens[:5000])
        again = corpus.vocabulary.encode(text, finish=False)
        assert torch.equal(again, stream.tokens[:5000])


def test_every_text_asks_for_the_next_token(corpus):
    for stream in (corpus.train, corpus.valid, corpus.test):
        if stream.episode is None:
            assert torch.equal(stream.targets[:-1], stream.tokens[1:])
            assert torch.equal(stream.ids[:-1], stream.tokens)
            assert len(stream.ids) == len(stream) + 1


def test_ranks_partition_every_corpus(corpus):
    for stream in (corpus.train, corpus.valid, corpus.test):
        readers = [
            Segments(stream, batch_size=1, length=1 + len(stream) // 50, rank=rank, world_size=2) for rank in range(2)
        ]
        rows = [torch.cat([piece.tokens for piece in reader.one_epoch()], dim=1) for reader in readers]
        read = torch.cat(rows).flatten()
        assert torch.equal(read, stream.tokens[: len(read)])
        assert 0 <= len(stream) - len(read) < 2 * (stream.episode or 1)


def test_every_corpus_resumes(corpus):
    segments = Segments(corpus.train, batch_size=2, length=1 + len(corpus.train) // 50)
    for position in (1, len(segments) - 1, len(segments), len(segments) + 1):
        resumed = dataclasses.replace(segments, position=position)
        for first, second in itertools.islice(
            zip(itertools.islice(segments, position, None), resumed, strict=False), 4
        ):
            assert torch.equal(first.tokens, second.tokens)
            assert torch.equal(first.targets, second.targets)
            assert (first.resets, first.epoch, first.index, first.position) == (
                second.resets,
                second.epoch,
                second.index,
                second.position,
            )


# Text folders


def test_words_of_a_folder(tmp_path):
    corpus = text_folder(write(tmp_path / "mine"))
    assert corpus.name == "mine"
    assert corpus.vocabulary.tokens == ("<eos>", "the", "sat", "cat", "on", "mat", "dog", "<unk>")
    assert corpus.train.ids.tolist() == [1, 3, 2, 4, 1, 5, 0, 0, 1, 6, 2, 7, 0]
    assert corpus.valid.ids.tolist() == [1, 7, 2, 0]  # "bird" is not in the training text
    assert corpus.test.ids.tolist() == [4, 1, 5, 2, 0, 7, 3, 0]  # the last line ends, its line break missing or not


@pytest.mark.parametrize("name", ["ptb.{}.txt", "wiki.{}.tokens"])
def test_other_file_names(tmp_path, name):
    assert torch.equal(text_folder(write(tmp_path, name=name)).train.ids, text_folder(write(tmp_path)).train.ids)


def test_lower_case_marks_and_line_ends(tmp_path):
    folder = write(tmp_path, {"train": "\ufeffThe cat\r\nsat\r\n", "valid": "THE", "test": "sat CAT"})
    corpus = text_folder(folder, lowercase=True)
    assert corpus.vocabulary.tokens == ("<eos>", "the", "cat", "sat")
    assert text_folder(write(tmp_path, dict.fromkeys(TEXTS, "a\r\nb")), unit="character").vocabulary.tokens == (
        "\n",
        "a",
        "b",
    )


def test_a_missing_folder_or_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist, and a corpus is a folder with train\.txt"):
        text_folder(tmp_path / "nowhere")
    write(tmp_path, {"train": "a b", "test": "a b"})
    with pytest.raises(FileNotFoundError, match=r"no file for valid: it holds test\.txt, train\.txt"):
        text_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"train\.txt is a file, and a corpus is a folder"):
        text_folder(tmp_path / "train.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="it holds nothing"):
        text_folder(tmp_path / "empty")


@pytest.mark.parametrize("text", ["", " \n\n"])
def test_an_empty_file_is_named(tmp_path, text):
    with pytest.raises(ValueError, match=r"valid\.txt: the file is empty"):
        text_folder(write(tmp_path, {**TEXTS, "valid": text}))


def test_undecodable_text_is_located(tmp_path):
    (write(tmp_path) / "test.txt").write_bytes("ein\ngrüner Baum".encode("latin-1"))
    with pytest.raises(ValueError, match=r"test\.txt: not UTF-8: byte 0xfc at byte offset 6, line 2,"):
        text_folder(tmp_path)


@pytest.mark.parametrize(("order", "place"), [("LE", 1), ("BE", 0)])
def test_a_text_with_nul_characters_is_refused(tmp_path, order, place):
    (write(tmp_path) / "valid.txt").write_bytes("the cat\n".encode(f"utf-16-{order}"))
    said = rf"valid\.txt: a NUL character at byte offset {place}, line 1, .* iconv -f UTF-16{order} "
    with pytest.raises(ValueError, match=said):
        text_folder(tmp_path)


@pytest.mark.parametrize("code", ["UTF-16", "UTF-32"])
def test_a_text_of_a_wide_encoding_is_called_so(tmp_path, code):
    (write(tmp_path) / "valid.txt").write_bytes("the cat\n".encode(code))
    with pytest.raises(ValueError, match=rf"valid\.txt: not UTF-8: .* iconv -f {code} -t UTF-8\.$"):
        text_folder(tmp_path)


def test_a_path_may_be_a_text_and_a_flag_may_not(tmp_path, unhooked):
    folder = write(tmp_path)
    (folder / "one.txt").write_text("the cat\n" * 20)
    assert text_folder(str(folder)).name == folder.name
    assert text_file(str(folder / "one.txt")).name == "one.txt"
    for read, path in ((text_folder, folder), (text_file, folder / "one.txt")):
        with pytest.raises(ValueError, match="lowercase is True or False"):
            read(path, lowercase="no")
    with pytest.raises(FileNotFoundError, match=r"two\.txt does not exist; check the path"):
        text_file(folder / "two.txt")
    with pytest.raises(FileNotFoundError, match=r"is no file; .* read a folder with text_folder"):
        text_file(folder)


def test_a_text_that_was_cut_inside_a_character_says_where(tmp_path):
    """As ``head -c`` cuts; to read it as LATIN1 would spoil every other such character."""
    whole = "the cat\nthe cät".encode()
    (write(tmp_path) / "valid.txt").write_bytes(whole[:-2])
    with pytest.raises(ValueError, match=r"valid\.txt: not UTF-8: .* keep what stands before with head -c 13\.$"):
        text_folder(tmp_path)
    (tmp_path / "valid.txt").write_bytes(whole[:13])
    text_folder(tmp_path, unit="character")


def test_a_token_the_training_text_lacks_is_named_with_its_file(tmp_path):
    with pytest.raises(ValueError, match=r"valid\.txt: The word 'bird' \(position 1, line 1\)"):
        text_folder(write(tmp_path, {**TEXTS, "train": "the cat sat"}))
    with pytest.raises(ValueError, match=r"train\.txt: Stream\.of_text: the text has 1 token"):
        text_folder(write(tmp_path, dict.fromkeys(TEXTS, "a")), unit="character")


def test_a_folder_that_is_not_the_penn_treebank_is_refused(tmp_path):
    with pytest.raises(ValueError, match="13 tokens in train, <eos> included, instead of 929,589"):
        penn_treebank(write(tmp_path))
    with pytest.raises(ValueError, match="Treebank by characters: it has 4 characters in train instead of 5,101,618"):
        penn_treebank_characters(write(tmp_path, dict.fromkeys(TEXTS, "a b\n")))


def test_penn_treebank_by_characters_spells_everything(tmp_path, monkeypatch):
    for part, count in {"train": 24, "valid": 7, "test": 5, "vocabulary": 15}.items():
        monkeypatch.setitem(PENN_TREEBANK_CHARACTER_COUNTS, part, count)
    texts = {"train": " mr. <unk> is N \n rose \n", "valid": " is N \n", "test": " ros\r\n"}
    corpus = penn_treebank_characters(write(tmp_path, texts))
    assert (corpus.name, corpus.unit) == ("penn_treebank_characters", "character")
    assert "".join(corpus.vocabulary.tokens) == "\n .<>Neikmnorsu"
    assert corpus.vocabulary.decode(corpus.train.ids) == texts["train"]


@needs_data
def test_penn_treebank_has_its_published_counts():
    folder = Path(str(DATA)) / "ptb"
    began = time.perf_counter()
    corpus = penn_treebank(folder)
    assert time.perf_counter() - began < 10  # about half a second on a free core
    assert [len(corpus.train.ids), len(corpus.valid.ids), len(corpus.test.ids), len(corpus.vocabulary)] == list(
        PENN_TREEBANK_COUNTS.values()
    )
    assert corpus.vocabulary.tokens[:5] == ("<eos>", "the", "<unk>", "N", "of")
    lines = (folder / "valid.txt").read_text(encoding="utf-8").splitlines()
    assert corpus.vocabulary.decode(corpus.valid.ids) == "".join(" ".join(line.split()) + "\n" for line in lines)


@needs_data
def test_penn_treebank_by_characters_has_the_counts_of_its_files():
    folder = Path(str(DATA)) / "ptb"
    corpus = penn_treebank_characters(folder)
    streams = {"train": corpus.train, "valid": corpus.valid, "test": corpus.test}
    found = {split: len(stream.ids) for split, stream in streams.items()}
    assert found | {"vocabulary": len(corpus.vocabulary)} == PENN_TREEBANK_CHARACTER_COUNTS
    assert "".join(corpus.vocabulary.tokens) == "\n #$&'*-./0123456789<>N\\abcdefghijklmnopqrstuvwxyz"
    # The published counts, in thousands, are of files with one blank fewer a line.
    lines = {split: int((stream.ids == 0).sum()) for split, stream in streams.items()}
    assert [(found[split] - lines[split]) // 1000 for split in lines] == [5_059, 396, 446]
    text = corpus.vocabulary.decode(corpus.valid.ids)
    assert text == (folder / "valid.txt").read_text(encoding="utf-8")
    assert all(line.startswith(" ") and line.endswith(" ") for line in text.splitlines())


@needs_data
def test_a_folder_with_two_of_three_files_says_which_is_missing():
    with pytest.raises(FileNotFoundError, match=r"no file for train: it holds test\.txt, valid\.txt"):
        text_folder(Path(str(DATA)) / "wikitext-2")


# Python's own documentation


def test_python_docs_is_the_text_of_help_in_twentieths(docs):
    from pydoc_data.topics import topics

    text = "".join(topics[key] for key in sorted(topics))
    parts = [docs.vocabulary.decode(stream.ids) for stream in (docs.train, docs.valid, docs.test)]
    assert "".join(parts) == text
    assert [round(20 * len(part) / len(text), 2) for part in parts] == [18, 1, 1]
    assert set(docs.vocabulary.tokens) == set(text)


def test_python_docs_that_are_missing_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(ValueError, match=r"lacks the module pydoc_data\.topics"):
        python_docs()


# Copy memory


@pytest.mark.parametrize(("variant", "after"), [("paper", 0), ("tcn", 9)])
def test_copying_follows_its_definition(variant, after):
    corpus = copying(blank=5, train=50, valid=3, test=2, variant=variant)
    assert (corpus.train.episode, len(corpus.train), len(corpus.valid), len(corpus.test)) == (25, 1250, 75, 50)
    tokens, targets = corpus.train.tokens.view(50, 25), corpus.train.targets.view(50, 25)
    symbols = tokens[:, :SYMBOLS]
    assert symbols.unique().tolist() == list(range(1, 9))
    assert torch.equal(tokens[0, SYMBOLS:], torch.tensor([0] * 4 + [9] + [after] * 10))
    assert (tokens[:, SYMBOLS:] == tokens[0, SYMBOLS:]).all()
    assert (targets[:, :-SYMBOLS] == 0).all()
    assert torch.equal(targets[:, -SYMBOLS:], symbols)
    assert (len(corpus.vocabulary), corpus.unit) == (10, "symbol")


def test_copying_sets_are_seeded_and_independent():
    first, again = copying(blank=5, train=4, valid=4, test=4), copying(blank=5, train=40, valid=4, test=4)
    assert torch.equal(first.valid.tokens, again.valid.tokens)
    assert not torch.equal(first.valid.tokens, first.test.tokens)
    assert not torch.equal(first.valid.tokens, copying(blank=5, train=4, valid=4, test=4, seed=1).valid.tokens)


def test_the_yardstick_of_copying_is_the_loss_of_constant_predictions():
    corpus = copying(blank=400, train=1, valid=200, test=1)
    place = torch.arange(len(corpus.valid)) % 420
    recall = place >= 410
    nats = torch.where(recall, math.log(8), 0.0)  # certain of the blank, undecided between eight symbols
    assert ((corpus.valid.targets > 0) == recall).all()
    assert nats.mean().item() == pytest.approx(memoryless_optimum(400), rel=1e-6)
    assert memoryless_optimum(400) == pytest.approx(0.0495, abs=5e-5)


def test_prefix_sums_follow_their_definition():
    corpus = prefix_sums(length=6, train=50, valid=3, test=2)
    assert (corpus.train.episode, len(corpus.train), len(corpus.valid), len(corpus.test)) == (6, 300, 18, 12)
    bits, sums = corpus.train.tokens.view(50, 6), corpus.train.targets.view(50, 6)
    assert bits.unique().tolist() == [0, 1]
    assert all(int(sums[e, i]) == sum(bits[e, : i + 1].tolist()) % 2 for e in range(50) for i in range(6))
    assert torch.equal(corpus.valid.tokens, prefix_sums(length=6, train=1, valid=3, test=1).valid.tokens)
    assert (len(corpus.vocabulary), corpus.unit, corpus.train.answers) == (2, "symbol", None)
    assert PrefixSums(length=4).memoryless_nll() == pytest.approx(0.75 * math.log(2))
    with pytest.raises(ValueError, match=r"prefix_sums\(length=0\): it must be at least 1"):
        prefix_sums(length=0)


def test_answers_are_the_last_targets_of_an_episode():
    assert copying(blank=5, train=1, valid=1, test=1).train.answers == SYMBOLS
    ids = torch.zeros(8, dtype=torch.int64)
    for episode, answers in ((4, 5), (4, 0), (None, 1)):
        with pytest.raises(ValueError, match=rf"answers={answers}\): the answers are the last targets of an episode"):
            Stream(tokens=ids, targets=ids, episode=episode, answers=answers)


@pytest.mark.parametrize("size", ["blank", "train"])
def test_copying_sizes_below_one_are_refused(size):
    with pytest.raises(ValueError, match=rf"copying\({size}=0\): it must be at least 1"):
        copying(**{size: 0})  # pyright: ignore


@pytest.mark.usefixtures("unhooked")
def test_names_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(ValueError, match="variants are 'paper' and 'tcn'"):
        copying(variant="papers")  # pyright: ignore
    with pytest.raises(ValueError, match="unit='words': a token of text is a 'word' or a 'character'"):
        text_folder(tmp_path, unit="words")  # pyright: ignore


# Witten–Bell


def reference(train: list[int], vocabulary_size: int):
    """p(w | h) by the recursion as it is written, with dictionaries."""
    counts = defaultdict(lambda: defaultdict(int))
    for end in range(len(train)):
        for start in range(end + 1):
            counts[tuple(train[start:end])][train[end]] += 1

    def p(w: int, h: tuple[int, ...]) -> float:
        shorter = p(w, h[1:]) if h else 1 / vocabulary_size
        after = counts.get(h)
        if after is None:
            return shorter
        return (after.get(w, 0) + len(after) * shorter) / (sum(after.values()) + len(after))

    return p


@pytest.mark.parametrize("order", [0, 1, 2, 3, 40])
def test_witten_bell_follows_its_recursion(order):
    draw, size = random.Random(order), 4
    train = [draw.choice([0, 0, 1, 2]) for _ in range(60)]  # 3 is never seen
    valid = [draw.randrange(size) for _ in range(30)]
    p = reference(train, size)
    contexts = [tuple(valid[max(0, i - order) : i]) for i in range(len(valid))]
    assert all(sum(p(w, h) for w in range(size)) == pytest.approx(1) for h in contexts)
    nats = [-math.log(p(w, h)) for w, h in zip(valid, contexts, strict=True)][1:]
    found = witten_bell(torch.tensor(train), torch.tensor(valid), order, size)
    assert found == pytest.approx(sum(nats) / len(nats), rel=1e-12)


def test_witten_bell_does_not_overflow_with_large_vocabularies():
    ids = torch.arange(1000) * 1_000_000_007
    assert witten_bell(ids, ids, 5, 2_000_000_000_000) < 2  # every context is seen once


@pytest.mark.parametrize("ids", [[0, 5, 1], [0, -1, 1]])
def test_witten_bell_refuses_ids_that_its_vocabulary_does_not_have(ids, unhooked):
    """Their n-grams would be counted as others."""
    few, wrong = torch.tensor([0, 1, 1]), torch.tensor(ids)
    for texts in ((few, wrong), (wrong, few)):
        with pytest.raises(ValueError, match=r"vocabulary_size=3\): the ids reach from"):
            witten_bell(*texts, 1, 3)
    with pytest.raises(ValueError, match=r"witten_bell\(order=1.5\)"):
        witten_bell(few, few, 1.5, 3)


# Bits per character of orders 1 to 4, and what a later release of the same Python may change: the text is Python's own
# and grows with it. The tight band on 3.11 tells a slightly wrong estimate from a right one.
DOCS_BITS = {
    (3, 11): ((3.433, 2.560, 2.143, 2.056), 0.03),
    (3, 12): ((3.525, 2.687, 2.276, 2.208), 0.15),
    (3, 13): ((3.593, 2.760, 2.332, 2.258), 0.15),
}


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_witten_bell_on_python_docs(docs, order):
    bits, tolerance = DOCS_BITS.get(sys.version_info[:2], (DOCS_BITS[3, 13][0], 0.3))
    began = time.perf_counter()
    nats = witten_bell(docs.train.ids, docs.valid.ids, order, len(docs.vocabulary))
    assert time.perf_counter() - began < 10  # a tenth of a second on a free core
    assert nats / math.log(2) == pytest.approx(bits[order - 1], abs=tolerance)


@pytest.mark.parametrize(
    ("order", "valid", "sentence"), [(-1, [0, 1], "order is at least 0"), (1, [0], "and 1 validation tokens")]
)
def test_witten_bell_refuses_what_cannot_be_scored(order, valid, sentence):
    with pytest.raises(ValueError, match=sentence):
        witten_bell(torch.tensor([0, 1]), torch.tensor(valid), order, 2)


# Streams


@pytest.mark.usefixtures("unhooked")
@pytest.mark.parametrize(
    ("tokens", "targets", "episode", "sentence"),
    [
        (torch.zeros(4), torch.zeros(4).long(), None, "torch.int64 tensor with one axis"),
        (torch.zeros(2, 2).long(), torch.zeros(4).long(), None, "torch.int64 tensor with one axis"),
        (torch.zeros(4).long(), torch.zeros(3).long(), None, "4 tokens and 3 targets"),
        (torch.zeros(0).long(), torch.zeros(0).long(), None, "0 tokens and 0 targets"),
        (torch.zeros(4).long(), torch.zeros(4).long(), 3, "whole number of episodes"),
        (torch.zeros(4).long(), torch.zeros(4).long(), 0, "whole number of episodes"),
    ],
)
def test_streams_that_cannot_be_are_refused(tokens, targets, episode, sentence):
    with pytest.raises(ValueError, match=sentence):
        Stream(tokens=tokens, targets=targets, episode=episode)


def test_a_corpus_with_ids_outside_its_vocabulary_is_refused():
    good, bad = Stream.of_text(torch.tensor([0, 1, 1])), Stream.of_text(torch.tensor([0, 1, 2]))
    with pytest.raises(
        ValueError, match=r"'mine': the targets of valid hold the id 2, and its vocabulary has the ids 0 … 1"
    ):
        Corpus(
            name="mine",
            train=good,
            valid=bad,
            test=good,
            vocabulary=Vocabulary.of_text("ab", "character"),
            unit="symbol",
        )
