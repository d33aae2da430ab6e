"""`equilibria prepare CORPUS`: look at a corpus before training on it; WikiText is fetched first where it is missing.

Nothing else is copied or written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console

from equilibria.commands.arguments import parse
from equilibria.commands.errors import unknown
from equilibria.commands.terminal import complain
from equilibria.errors import UsageError
from equilibria.lm.corpora import (
    Copying,
    Corpus,
    PennTreebank,
    PennTreebankCharacters,
    PrefixSums,
    PythonDocs,
    Source,
    Stream,
    TextFolder,
    WikiText2,
    WikiText103,
)
from equilibria.lm.corpora.fetch import DATASET, WikiText, fetch_wikitext, is_vacant
from equilibria.lm.corpora.vocabulary import BPE_SIZE, noun
from equilibria.lm.report import formats
from equilibria.lm.report.display import summary_table, waiting
from equilibria.lm.report.summary import NBSP, Row
from equilibria.lm.training.measure import ngram_baseline


@dataclasses.dataclass(frozen=True)
class Options:
    """Read a corpus, check it, and say what is in it."""

    corpus: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CORPUS")]
    """python-docs, ptb (words) or ptb-char (its characters), wikitext103, wikitext2, text-folder, copying or
    prefix-sums. WikiText is fetched from the Hugging Face Hub if its folder is absent or empty, and written there as
    the three token files that it was published as; it needs pip install "equilibria[data]". Files that are there are
    read, and never overwritten."""
    data: Path | None = None
    """The folder with train.txt, valid.txt and test.txt, for ptb, ptb-char and text-folder, which reads a single file,
    too, or with the token files, for wikitext103 and wikitext2; these are in data/wikitext-103 and data/wikitext-2 if
    no folder is named."""
    unit: Literal["word", "character", "bpe"] = "word"
    """The kind of a token of text-folder; "bpe" is byte-pair encoding, learnt from the training text."""
    vocabulary_size: int = BPE_SIZE
    """Number of tokens that byte-pair encoding learns, for text-folder with --unit bpe."""
    lowercase: bool = False
    """Whether text-folder lowers capital letters."""
    blank: int = 400
    """Steps between the symbols and their recall, for copying."""
    length: int = 32
    """Bits per sequence, for prefix-sums."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print one JSON object instead of the table."""


SPLITS = {"train": "Training", "valid": "Validation", "test": "Test"}
"""The parts of a corpus, and what the table calls them."""

SOURCES: dict[str, Callable[[Options], Source]] = {
    "python-docs": lambda options: PythonDocs(),
    "ptb": lambda options: PennTreebank(root=_folder(options)),
    "ptb-char": lambda options: PennTreebankCharacters(root=_folder(options)),
    "wikitext103": lambda options: WikiText103(root=_fetched(options, "wikitext-103-v1")),
    "wikitext2": lambda options: WikiText2(root=_fetched(options, "wikitext-2-v1")),
    "text-folder": lambda options: _text(options),
    "copying": lambda options: Copying(blank=options.blank),
    "prefix-sums": lambda options: PrefixSums(length=options.length),
}


def main(arguments: Sequence[str]) -> int:
    """Print what is in the corpus."""
    options = parse(Options, arguments, verb="prepare")
    if options.corpus not in SOURCES:
        raise unknown("corpus", options.corpus, SOURCES)
    if options.data is not None and options.corpus in ("python-docs", "copying", "prefix-sums"):
        raise UsageError(f"--data {options.data}: {options.corpus} is not read from a folder; leave --data out.")
    if options.unit == "bpe" and options.corpus != "text-folder":
        raise UsageError(
            f"--unit bpe: the tokens of {options.corpus} are given; text-folder has a choice of tokens, and reads any "
            "file or folder of text."
        )
    if options.blank < 1:
        raise UsageError(f"--blank {options.blank}: it counts steps and is at least 1; try 400.")
    if options.length < 1:
        raise UsageError(f"--length {options.length}: it counts bits and is at least 1; try 32.")
    source = SOURCES[options.corpus](options)
    with waiting(f"reading {options.corpus}"):
        corpus = source.load()
        found = _object(corpus, source)
    if options.json:
        print(formats.strict_json(found))
        return 0
    rows = [*_splits(found), *_tokens(found), *_baseline(found)]
    Console(highlight=False).print(summary_table(rows, f"{corpus.name}, by {noun(corpus.unit)}s"))
    return 0


def _text(options: Options) -> TextFolder:
    """The text of a folder; a UsageError if its options contradict each other."""
    root = _folder(options)
    try:
        return TextFolder(
            root=root, unit=options.unit, lowercase=options.lowercase, vocabulary_size=options.vocabulary_size
        )
    except ValueError as error:
        raise UsageError(str(error)) from None


def _folder(options: Options) -> Path:
    if options.data is None:
        raise UsageError(
            f"{options.corpus} is read from a folder with train.txt, valid.txt and test.txt; give it with --data."
        )
    return options.data


def _fetched(options: Options, name: WikiText) -> Path:
    """The folder of WikiText, with the files in it."""
    root = options.data or Path("data", name.removesuffix("-v1"))
    if is_vacant(root):
        complain(f"Fetching {name} of {DATASET} into {root}, which is absent or empty.")
        fetch_wikitext(name, root)
    elif options.data is None:
        complain(f"Reading {root}; --data names another folder.")
    return root


def _object(corpus: Corpus, source: Source) -> dict[str, Any]:
    """The content of the corpus, as --json prints it: numbers of tokens, shares between 0 and 1, bits and nats."""
    counts = torch.bincount(corpus.train.tokens, minlength=len(corpus.vocabulary))
    frequent = counts.argsort(descending=True, stable=True)[:10].tolist()
    shares = (counts / counts.sum()).tolist()
    return {
        "corpus": corpus.name,
        "unit": corpus.unit,
        "vocabulary": len(corpus.vocabulary),
        "learnt_by": corpus.vocabulary.origin,
        "unknown": corpus.vocabulary.unknown,
        "splits": {name: _split(corpus, getattr(corpus, name)) for name in SPLITS},
        "most_frequent": [{"token": corpus.vocabulary.spelling(place), "share": shares[place]} for place in frequent],
        "baseline": ngram_baseline(corpus) if corpus.unit == "character" else [],
        "memoryless_nats": source.memoryless_nll(),
    }


def _split(corpus: Corpus, stream: Stream) -> dict[str, Any]:
    """The size of one part of the corpus; of sequences that stand alone the number too."""
    unknown, spelling = corpus.vocabulary.unknown, corpus.spelling
    place = None if unknown is None else corpus.vocabulary.tokens.index(unknown)
    return {
        "tokens": len(stream) + (stream.episode is None),  # the first token of a text is read, but not predicted
        "predicted_bytes": None if spelling is None else spelling.byte_count(stream.tokens, stream.targets),
        "sequences": None if stream.episode is None else len(stream) // stream.episode,
        "sequence_length": stream.episode,
        "unknown_share": None if place is None else float((stream.tokens == place).sum() / len(stream)),
    }


def _splits(found: dict[str, Any]) -> list[Row]:
    rows = []
    for name, label in SPLITS.items():
        split = found["splits"][name]
        number, length = split["sequences"], split["sequence_length"]
        text = "" if split["predicted_bytes"] is None else f"{split['predicted_bytes']:,} bytes after the first token"
        beside = text if number is None else f"{number:,} sequences of {length:,}"
        rows.append(Row(label, f"{split['tokens']:,} tokens", beside))
    return rows


def _tokens(found: dict[str, Any]) -> list[Row]:
    words = "  ".join(f"{_shown(one['token'])}{NBSP}{one['share']:.1%}" for one in found["most_frequent"])
    size = f"{found['vocabulary']:,} {noun(found['unit'])}s"
    learnt = f"learnt by {found['learnt_by']} from the training text" if found["learnt_by"] else ""
    rows = [Row("Vocabulary", size, learnt), Row("Most frequent", "in training", words)]
    if found["unknown"] is not None:
        shares = [f"{label.lower()} {found['splits'][name]['unknown_share']:.2%}" for name, label in SPLITS.items()]
        rows.append(Row("Unknown", found["unknown"], ", ".join(shares)))
    return rows


def _baseline(found: dict[str, Any]) -> list[Row]:
    rows, least = found["baseline"], found["memoryless_nats"]
    if rows:
        name, shorts = formats.common(row["label"] for row in rows)
        beside = "  ".join(
            f"{short} {row['bits']:.2f}".replace(" ", NBSP) for short, row in zip(shorts, rows, strict=True)
        )
        return [Row("Baseline", name, f"bits per character on validation: {beside}")]
    if least is not None:
        return [Row("Baseline", f"{formats.residual(least)} nats", "the best without memory")]
    return []


def _shown(token: str) -> str:
    """A token that can be seen: spaces and line breaks by name, and the space before a word as a sign."""
    return {" ": "space", "\n": "newline", "\t": "tab"}.get(token, token.replace(" ", "␣"))
