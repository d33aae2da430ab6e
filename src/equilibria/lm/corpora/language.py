"""What a run keeps of its corpus: the vocabulary, and a sum of each split by which the same text is known again.

So a run generates without its corpus, and no other text is taken for the one that it was trained on.
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
"""Of corpus.json."""


@dataclasses.dataclass(frozen=True, eq=False)
class Language:
    """What the tokens of a run mean, and the sums of the text that it was trained, validated and tested on."""

    name: str
    """Of the corpus."""
    unit: Unit
    """What one token is."""
    vocabulary: Vocabulary
    """What the ids mean."""
    sums: dict[str, str]
    """The SHA-256 of each split as ids of that vocabulary; empty in a run of a version that kept none."""

    @classmethod
    def of(cls, corpus: Corpus) -> Language:
        """That of a corpus; it reads all of it."""
        sums = {split: _sum(getattr(corpus, split)) for split in SPLITS}
        return cls(name=corpus.name, unit=corpus.unit, vocabulary=corpus.vocabulary, sums=sums)

    @classmethod
    def without_sums(cls, corpus: Corpus) -> Language:
        """That of a corpus which nothing can be compared with."""
        return cls(name=corpus.name, unit=corpus.unit, vocabulary=corpus.vocabulary, sums={})

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "format": FORMAT,
            "name": self.name,
            "unit": self.unit,
            "sha256": {**self.sums, "vocabulary": _digest(self.vocabulary)},
            "vocabulary": self.vocabulary.to_json(),
        }

    @classmethod
    def from_json(cls, value: Any) -> Language:
        """Back from plain values.

        Raises:
            ValueError: they are not what ``to_json`` gave.
        """
        known = isinstance(value, dict) and value.get("format") == FORMAT
        if not known or value.get("unit") not in ("word", "character", "symbol"):
            raise ValueError("it is not what this version writes")
        name, sums, vocabulary = value.get("name"), value.get("sha256"), value.get("vocabulary")
        if not isinstance(name, str) or not isinstance(sums, dict) or not isinstance(vocabulary, dict):
            raise ValueError("a name, the sums or the vocabulary is missing")
        known = Vocabulary.from_json(vocabulary)
        if set(sums) != {*SPLITS, "vocabulary"} or sums.pop("vocabulary") != _digest(known):
            raise ValueError("its vocabulary was changed after it was written")
        if not all(isinstance(part, str) for part in sums.values()):
            raise ValueError("a sum is no text")
        return cls(name=name, unit=value["unit"], vocabulary=known, sums=sums)

    def changed(self, corpus: Corpus, sums: dict[str, str] | None = None) -> list[str]:
        """The splits in which a corpus is another text than that of the run.

        Args:
            corpus: over any vocabulary.
            sums: those of ``Language.of(corpus)``, if they are known already.
        """
        if not self.sums:
            return []
        if corpus.vocabulary.tokens != self.vocabulary.tokens:
            sums = {split: _sum(stream) for split, stream in self._translated(corpus).items()}
        found = sums or {split: _sum(getattr(corpus, split)) for split in SPLITS}
        return [split for split in SPLITS if found[split] != self.sums.get(split)]

    def check_same(self, corpus: Corpus, language: Language, *, run: str) -> None:
        """Raise a ValueError if ``corpus``, of which ``language`` was made, is not the text with which a run began."""
        if changed := self.changed(corpus, language.sums):
            raise ValueError(
                f"The text of {', '.join(changed)} is not the one with which {run} began (their SHA-256 differ), and "
                "the run would continue with another text without a word: bring the old one back, or start a new run "
                "with another --out."
            )

    def encoded(self, corpus: Corpus) -> Corpus:
        """The corpus as ids of the run's own vocabulary.

        Raises:
            ValueError: its unit is another one, or it has a token that the run does not know, and the run has no token
                for the unknown.
        """
        streams = self._translated(corpus)
        known = set(self.vocabulary.tokens)
        missing = [token for token in corpus.vocabulary.tokens if token not in known]
        if self.vocabulary.unknown is None and missing:
            raise ValueError(
                f"{corpus.name} holds {', '.join(map(repr, missing[:5]))}, of which the run knows nothing, and its "
                "vocabulary has no token for the unknown: take these out, or train on a text that has them."
            )
        return dataclasses.replace(corpus, vocabulary=self.vocabulary, **streams)

    def _translated(self, corpus: Corpus) -> dict[str, Stream]:
        """Its streams as ids of the run's vocabulary; a token without one has the id after the last."""
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
    """The SHA-256 of the tokens in their order."""
    return hashlib.sha256("\0".join(vocabulary.tokens).encode("utf-8", "surrogatepass")).hexdigest()


def _sum(stream: Stream) -> str:
    """The SHA-256 of a stream: its tokens, its targets where they are not the next tokens, and its episodes."""
    digest = hashlib.sha256(f"{stream.episode} {len(stream)}\n".encode())
    continuous = torch.equal(stream.tokens[1:], stream.targets[:-1])
    for ids in (stream.tokens, stream.targets[-1:] if continuous else stream.targets):
        digest.update(ids.to(torch.int64).contiguous().numpy().astype("<i8", copy=False).data)
    return digest.hexdigest()
