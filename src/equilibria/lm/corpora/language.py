"""Language: the part of a corpus that a run stores, namely the vocabulary and a checksum of each split.

With it a run can generate without its corpus, and notices if another text is given as the one of its training.
"""

from __future__ import annotations

import dataclasses
import hashlib
import typing
from typing import Any

import torch
from torch import Tensor

from equilibria.lm.corpora.corpus import Corpus, Stream, Unit
from equilibria.lm.corpora.vocabulary import Vocabulary, noun

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
            "sha256": {**self.sums, "vocabulary": self.vocabulary.digest},
            "vocabulary": self.vocabulary.to_json(),
        }

    @classmethod
    def from_json(cls, value: Any) -> Language:
        """The language from the plain values of ``to_json``.

        Raises:
            ValueError: ``to_json`` does not give such values, or they were changed afterwards.
        """
        known = isinstance(value, dict) and value.get("format") == FORMAT
        if not known or value.get("unit") not in typing.get_args(Unit):
            raise ValueError("this version does not write such a file")
        name, sums, vocabulary = value.get("name"), value.get("sha256"), value.get("vocabulary")
        if not isinstance(name, str) or not isinstance(sums, dict) or not isinstance(vocabulary, dict):
            raise ValueError("the name, the checksums or the vocabulary is missing")
        known = Vocabulary.from_json(vocabulary)
        if set(sums) != {*SPLITS, "vocabulary"} or sums.pop("vocabulary") != known.digest:
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
        if corpus.vocabulary != self.vocabulary:
            sums = {split: _sum(stream) for split, stream in self._translated(corpus).items()}
        found = sums or {split: _sum(getattr(corpus, split)) for split in SPLITS}
        return [split for split in SPLITS if found[split] != self.sums.get(split)]

    def is_split(self, split: str, stream: Stream) -> bool:
        """True if the stream, as ids of this vocabulary, is that split of the text of the run."""
        return self.sums.get(split) == _sum(stream)

    def check_same(self, corpus: Corpus, language: Language, *, run: str) -> None:
        """Raise a ValueError if the corpus is not the text with which the run began, by the same vocabulary.

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
        if corpus.vocabulary.digest != self.vocabulary.digest:
            raise ValueError(
                f"The vocabulary of {corpus.name} is not the one with which {run} began, though its text is; encode it "
                "with that vocabulary: Run.language.adopted(corpus)."
            )

    def adopted(self, corpus: Corpus) -> Corpus:
        """The corpus as ids of the run's vocabulary if its text is that of the run; otherwise the corpus as it is.

        Another version of ``tokenizers`` might learn other merges from the same text.
        """
        if corpus.vocabulary == self.vocabulary or corpus.unit != self.unit or self.changed(corpus):
            return corpus
        return self.encoded(corpus)

    def encoded(self, corpus: Corpus) -> Corpus:
        """The corpus as ids of the run's vocabulary.

        Raises:
            ValueError: the corpus has another unit, or has tokens that are not in the run's vocabulary while this has
                no token for unknown words.
        """
        streams, table = self._translated(corpus), self.vocabulary.translation(corpus.vocabulary)
        absent = [] if table is None else (table == len(self.vocabulary)).nonzero().flatten().tolist()
        if absent:
            missing = [corpus.vocabulary.tokens[place] for place in absent]
            raise ValueError(
                f"{corpus.name} holds {', '.join(map(repr, missing[:5]))}, which the run's vocabulary does not have, "
                "and it has no token for unknown words: remove these, or train on a text that has them."
            )
        return dataclasses.replace(corpus, vocabulary=self.vocabulary, **streams)

    @property
    def spelling(self) -> Vocabulary | None:
        """The vocabulary if the ids spell a text; None for a synthetic task, whose symbols have no bytes."""
        return None if self.unit == "symbol" else self.vocabulary

    def _translated(self, corpus: Corpus) -> dict[str, Stream]:
        """The streams of the corpus as ids of the run's vocabulary; unknown tokens without <unk> get the id V."""
        if corpus.unit != self.unit:
            ours, theirs = noun(self.unit), noun(corpus.unit)
            raise ValueError(f"{corpus.name} consists of {theirs}s, and the run was trained on {ours}s.")
        own, other = self.vocabulary, corpus.vocabulary
        table = own.translation(other)
        if table is not None:
            return {split: _replaced(getattr(corpus, split), table) for split in SPLITS}
        return {split: _respelt(getattr(corpus, split), other, own) for split in SPLITS}


def _replaced(stream: Stream, table: Tensor) -> Stream:
    return dataclasses.replace(stream, tokens=table[stream.tokens], targets=table[stream.targets])


def _respelt(stream: Stream, before: Vocabulary, after: Vocabulary) -> Stream:
    """The text of the stream as ids of another vocabulary."""
    if not _is_continuous(stream):
        raise ValueError(
            "A stream whose targets are not its next tokens cannot be encoded with another vocabulary, since there "
            "tokens and targets would not correspond; load the corpus with the vocabulary of the run."
        )
    return Stream.of_text(after.encode(before.decode(stream.ids)))


def _is_continuous(stream: Stream) -> bool:
    return torch.equal(stream.tokens[1:], stream.targets[:-1])


def _sum(stream: Stream) -> str:
    """The SHA-256 of a stream: tokens, episode length, and the targets unless they are the next tokens."""
    digest = hashlib.sha256(f"{stream.episode} {len(stream)}\n".encode())
    for ids in (stream.tokens, stream.targets[-1:] if _is_continuous(stream) else stream.targets):
        digest.update(ids.to(torch.int64).contiguous().numpy().astype("<i8", copy=False).data)
    return digest.hexdigest()
