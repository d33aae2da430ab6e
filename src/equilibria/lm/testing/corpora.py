"""CorpusSuite: the laws that every corpus must keep. It needs pytest."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
import pickle

import pytest
import torch

from equilibria.lm.corpora import Corpus, Language, Segments, Source, Stream
from equilibria.lm.experiments import part_from_json, part_to_json

LENGTH = 5000
"""Number of tokens of each split that are spelled."""
LAST_WORD = 32
"""Byte-pair tokens at the end of these that may come back as others, since a cut can divide a word."""


class CorpusSuite:
    """Inherit it in a class ``TestMine`` and supply ``make``: pytest then runs every law on the corpus.

    ``class TestMine(CorpusSuite): make = lambda self: Mine(numbers=500)``

    Every law loads the corpus, so a small one is best.
    """

    def make(self) -> Source:
        """The source of the corpus to be tested."""
        raise NotImplementedError

    def _corpus(self) -> Corpus:
        return self.make().load()

    def test_the_source_is_a_value(self) -> None:
        """It is a frozen dataclass, and can be compared, hashed, copied and pickled."""
        source = self.make()
        assert dataclasses.is_dataclass(source)
        with pytest.raises(dataclasses.FrozenInstanceError):
            source.name = ""  # pyright: ignore
        for other in (self.make(), copy.deepcopy(source), pickle.loads(pickle.dumps(source))):
            assert other == source
            assert hash(other) == hash(source)

    def test_an_experiment_stores_the_source(self) -> None:
        """It comes back from the JSON of an experiment as it was."""
        source = self.make()
        stored = json.loads(json.dumps(part_to_json(source)))
        assert part_from_json(stored, type(source), extra=[type(source)]) == source

    def test_every_load_gives_the_same_corpus(self) -> None:
        """It also draws no random numbers from PyTorch's global generator."""
        before = torch.get_rng_state()
        first, second = self._corpus(), self._corpus()
        assert Language.of(first).to_json() == Language.of(second).to_json()
        for one, other in zip(_streams(first), _streams(second), strict=True):
            assert torch.equal(one.tokens, other.tokens)
            assert torch.equal(one.targets, other.targets)
            assert (one.episode, one.answers) == (other.episode, other.answers)
        assert torch.equal(torch.get_rng_state(), before)

    def test_the_splits_differ(self) -> None:
        """No split is a copy of another one."""
        for one, other in itertools.combinations(_streams(self._corpus()), 2):
            assert not torch.equal(one.tokens, other.tokens)

    def test_text_asks_for_the_next_token(self) -> None:
        """The target of each token of a continuous text is the token after it."""
        for stream in _streams(self._corpus()):
            if stream.episode is None:
                assert torch.equal(stream.targets[:-1], stream.tokens[1:])

    def test_ids_are_those_of_their_text(self) -> None:
        """The text of the ids, encoded again, has the same ids."""
        corpus = self._corpus()
        for stream in _streams(corpus):
            ids = stream.tokens[:LENGTH]
            again = corpus.vocabulary.encode(corpus.vocabulary.decode(ids), finish=False)
            kept = max(0, len(ids) - LAST_WORD) if corpus.unit == "bpe" else max(len(ids), len(again))
            assert torch.equal(again[:kept], ids[:kept])

    def test_a_run_knows_its_text_again(self) -> None:
        """Vocabulary and checksums of the corpus are the same after a run has stored and read them."""
        corpus = self._corpus()
        kept = Language.from_json(json.loads(json.dumps(Language.of(corpus).to_json())))
        assert kept.vocabulary == corpus.vocabulary
        assert kept.unit == corpus.unit
        assert kept.changed(corpus) == []

    def test_segments_read_every_token_once(self) -> None:
        """One epoch of segments is the training stream, from its beginning, in its order."""
        stream = self._corpus().train
        pieces = list(Segments(stream, batch_size=1, length=1 + len(stream) // 10).one_epoch())
        assert torch.equal(torch.cat([piece.tokens[0] for piece in pieces]), stream.tokens)
        assert torch.equal(torch.cat([piece.targets[0] for piece in pieces]), stream.targets)

    def test_guesses_are_probabilities_and_losses(self) -> None:
        """``chance`` is a share, and ``memoryless_nll`` at most the loss of equal probabilities; None for text."""
        source, corpus = self.make(), self._corpus()
        nll = source.memoryless_nll()
        if corpus.spelling is not None:
            assert source.chance is None
            assert nll is None
        assert source.chance is None or 0 < source.chance < 1
        assert nll is None or 0 <= nll <= math.log(len(corpus.vocabulary))


def _streams(corpus: Corpus) -> tuple[Stream, Stream, Stream]:
    return corpus.train, corpus.valid, corpus.test
