"""Language: the part of a corpus that a run stores, namely the vocabulary and a checksum of each split.

With it a run can generate without its corpus, and notices if another text is given as the one of its training.
"""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import torch
from torch import Tensor

from equilibria.lm.corpora.corpus import Corpus, Stream, Unit
from equilibria.lm.corpora.vocabulary import Vocabulary

SPLITS = ("train", "valid", "test")
FORMAT = 1
"""Format version of corpus.json."""


@dataclasses.dataclass(frozen=True, eq=False)
class Language:
    """The vocabulary of a run, and checksums of the text on which it was trained, validated and tested."""

    name: str
    """The name of the corpus."""
    unit: Unit
    """The unit of a token."""
    vocabulary: Vocabulary
    """The tokens of the ids."""
    sums: dict[str, str]
    """The SHA-256 of each split as ids of that vocabulary; empty in runs of versions that stored none."""

    @classmethod
    def of(cls, corpus: Corpus) -> Language:
        """The language of a corpus; computes the checksums, which reads the whole corpus."""
        sums = {split: _sum(getattr(corpus, split)) for split in SPLITS}
        return cls(name=corpus.name, unit=corpus.unit, vocabulary=corpus.vocabulary, sums=sums)

    @classmethod
    def without_sums(cls, corpus: Corpus) -> Language:
        """The language of a corpus without checksums, so that every text is accepted as the same."""
        return cls(name=corpus.name, unit=corpus.unit, vocabulary=corpus.vocabulary, sums={})

    def to_json(self) -> dict[str, Any]:
        """The language as plain values for JSON."""
        return {
            "format": FORMAT,
            "name": self.name,
            "unit": self.unit,
            "sha256": {**self.sums, "vocabulary": _digest(self.vocabulary)},
            "vocabulary": self.vocabulary.to_json(),
        }

    @classmethod
    def from_json(cls, value: Any) -> Language:
        """The language from the plain values of ``to_json``.

        Raises:
            ValueError: ``to_json`` does not give such values, or they were changed afterwards.
        """
        known = isinstance(value, dict) and value.get("format") == FORMAT
        if not known or value.get("unit") not in ("word", "character", "symbol"):
            raise ValueError("this version does not write such a file")
        name, sums, vocabulary = value.get("name"), value.get("sha256"), value.get("vocabulary")
        if not isinstance(name, str) or not isinstance(sums, dict) or not isinstance(vocabulary, dict):
            raise ValueError("the name, the checksums or the vocabulary is missing")
        known = Vocabulary.from_json(vocabulary)
        if set(sums) != {*SPLITS, "vocabulary"} or sums.pop("vocabulary") != _digest(known):
            raise ValueError("the vocabulary was changed after it was written")
        if not all(isinstance(part, str) for part in sums.values()):
            raise ValueError("a checksum is not a string")
        return cls(name=name, unit=value["unit"], vocabulary=known, sums=sums)

    def changed(self, corpus: Corpus, sums: dict[str, str] | None = None) -> list[str]:
        """The names of the splits whose text in ``corpus`` differs from that of the run.

        Args:
            corpus: a corpus over any vocabulary.
            sums: the checksums of ``Language.of(corpus)``, if they are already known.
        """
        if not self.sums:
            return []
        if corpus.vocabulary.tokens != self.vocabulary.tokens:
            sums = {split: _sum(stream) for split, stream in self._translated(corpus).items()}
        found = sums or {split: _sum(getattr(corpus, split)) for split in SPLITS}
        return [split for split in SPLITS if found[split] != self.sums.get(split)]

    def is_split(self, split: str, stream: Stream) -> bool:
        """True if the stream, as ids of this vocabulary, is that split of the text of the run."""
        return self.sums.get(split) == _sum(stream)

    def check_same(self, corpus: Corpus, language: Language, *, run: str) -> None:
        """Raise a ValueError if the corpus is not the text with which the run began.

        Args:
            corpus: the corpus to check.
            language: ``Language.of(corpus)``.
            run: the name of the run, for the error.
        """
        if changed := self.changed(corpus, language.sums):
            raise ValueError(
                f"The text of {', '.join(changed)} is not the one with which {run} began (their SHA-256 differ); "
                "restore the old text, or start a new run with another --out."
            )

    def encoded(self, corpus: Corpus) -> Corpus:
        """The corpus as ids of the run's vocabulary.

        Raises:
            ValueError: the corpus has another unit, or has tokens that are not in the run's vocabulary while this has
                no token for unknown words.
        """
        streams = self._translated(corpus)
        known = set(self.vocabulary.tokens)
        missing = [token for token in corpus.vocabulary.tokens if token not in known]
        if self.vocabulary.unknown is None and missing:
            raise ValueError(
                f"{corpus.name} holds {', '.join(map(repr, missing[:5]))}, which the run's vocabulary does not have, "
                "and it has no token for unknown words: remove these, or train on a text that has them."
            )
        return dataclasses.replace(corpus, vocabulary=self.vocabulary, **streams)

    def _translated(self, corpus: Corpus) -> dict[str, Stream]:
        """The streams of the corpus as ids of the run's vocabulary; unknown tokens without <unk> get the id V."""
        if corpus.unit != self.unit:
            raise ValueError(f"{corpus.name} consists of {corpus.unit}s, and the run was trained on {self.unit}s.")
        own = self.vocabulary
        places = {token: place for place, token in enumerate(own.tokens)}
        absent = len(own) if own.unknown is None else places[own.unknown]
        table = torch.tensor([places.get(token, absent) for token in corpus.vocabulary.tokens])
        return {split: _replaced(getattr(corpus, split), table) for split in SPLITS}


def _replaced(stream: Stream, table: Tensor) -> Stream:
    return dataclasses.replace(stream, tokens=table[stream.tokens], targets=table[stream.targets])


def _digest(vocabulary: Vocabulary) -> str:
    """The SHA-256 of the tokens in order."""
    return hashlib.sha256("\0".join(vocabulary.tokens).encode("utf-8", "surrogatepass")).hexdigest()


def _sum(stream: Stream) -> str:
    """The SHA-256 of a stream: tokens, episode length, and the targets unless they are the next tokens."""
    digest = hashlib.sha256(f"{stream.episode} {len(stream)}\n".encode())
    continuous = torch.equal(stream.tokens[1:], stream.targets[:-1])
    for ids in (stream.tokens, stream.targets[-1:] if continuous else stream.targets):
        digest.update(ids.to(torch.int64).contiguous().numpy().astype("<i8", copy=False).data)
    return digest.hexdigest()
