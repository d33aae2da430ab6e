"""`equilibria prepare CORPUS`: look at a corpus before training on it; WikiText is fetched first where it is missing.

Nothing else is copied or written.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from rich.console import Console

from equilibria.commands import formats
from equilibria.commands.arguments import parse
from equilibria.commands.display import summary_table
from equilibria.commands.errors import UsageError, unknown
from equilibria.commands.summary import NBSP, Row
from equilibria.corpora import Corpus, memoryless_optimum
from equilibria.corpora.fetch import DATASET, WikiText, fetch_wikitext, is_vacant
from equilibria.training.sources import (
    Copying,
    PennTreebank,
    PennTreebankCharacters,
    PythonDocs,
    Source,
    TextFolder,
    WikiText2,
    WikiText103,
)
from equilibria.training.yardstick import yardstick


@dataclasses.dataclass(frozen=True)
class Options:
    """Read a corpus, check it, and say what is in it."""

    corpus: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CORPUS")]
    """python-docs, ptb (words) or ptb-char (its characters), wikitext103, wikitext2, text-folder or copying. WikiText
    is fetched from the Hugging Face Hub if its folder is absent or empty, and written there as the three token files
    that it was published as; it needs pip install "equilibria[data]". Files that are there are read, and never
    overwritten."""
    data: Path | None = None
    """The folder with train.txt, valid.txt and test.txt, for ptb, ptb-char and text-folder, or with the token files,
    for wikitext103 and wikitext2; these are in data/wikitext-103 and data/wikitext-2 if no folder is named."""
    unit: Literal["word", "character"] = "word"
    """What one token of text-folder is."""
    lowercase: bool = False
    """Whether text-folder lowers capital letters."""
    blank: int = 400
    """Steps between the symbols and their recall, for copying."""


SOURCES: dict[str, Callable[[Options], Source]] = {
    "python-docs": lambda options: PythonDocs(),
    "ptb": lambda options: PennTreebank(root=_folder(options)),
    "ptb-char": lambda options: PennTreebankCharacters(root=_folder(options)),
    "wikitext103": lambda options: WikiText103(root=_fetched(options, "wikitext-103-v1")),
    "wikitext2": lambda options: WikiText2(root=_fetched(options, "wikitext-2-v1")),
    "text-folder": lambda options: TextFolder(root=_folder(options), unit=options.unit, lowercase=options.lowercase),
    "copying": lambda options: Copying(blank=options.blank),
}


def main(arguments: Sequence[str]) -> int:
    """Print what is in the corpus."""
    options = parse(Options, arguments, verb="prepare")
    if options.corpus not in SOURCES:
        raise unknown("corpus", options.corpus, SOURCES)
    if options.data is not None and options.corpus in ("python-docs", "copying"):
        raise UsageError(f"--data {options.data}: {options.corpus} is not read from a folder; leave --data out.")
    source = SOURCES[options.corpus](options)
    console = Console(highlight=False)
    with console.status(f"reading {options.corpus}"):
        corpus = source.load()
        rows = [*_splits(corpus), *_tokens(corpus), *_yardstick(corpus, options)]
    console.print(summary_table(rows, f"{corpus.name}, by {corpus.unit}s"))
    return 0


def _folder(options: Options) -> Path:
    if options.data is None:
        raise UsageError(
            f"{options.corpus} is read from a folder with train.txt, valid.txt and test.txt; give it with --data."
        )
    return options.data


def _fetched(options: Options, name: WikiText) -> Path:
    """The folder of WikiText, with the files in it."""
    root = (options.data or Path("data", name.removesuffix("-v1"))).expanduser()
    if is_vacant(root):
        print(f"Fetching {name} of {DATASET} into {root}, which is absent or empty.", file=sys.stderr)
        fetch_wikitext(name, root)
    elif options.data is None:
        print(f"Reading {root}; --data names another folder.", file=sys.stderr)
    return root


def _splits(corpus: Corpus) -> list[Row]:
    rows = []
    for name, stream in (("Training", corpus.train), ("Validation", corpus.valid), ("Test", corpus.test)):
        if stream.episode is None:
            rows.append(Row(name, f"{1 + len(stream):,} tokens"))
        else:
            number = len(stream) // stream.episode
            rows.append(Row(name, f"{len(stream):,} tokens", f"{number:,} sequences of {stream.episode:,}"))
    return rows


def _tokens(corpus: Corpus) -> list[Row]:
    vocabulary = corpus.vocabulary
    counts = torch.bincount(corpus.train.tokens, minlength=len(vocabulary))
    frequent = counts.argsort(descending=True, stable=True)[:10].tolist()
    total = counts.sum()
    words = "  ".join(f"{_shown(vocabulary.tokens[place])}{NBSP}{counts[place] / total:.1%}" for place in frequent)
    rows = [Row("Vocabulary", f"{len(vocabulary):,} {corpus.unit}s"), Row("Most frequent", "in training", words)]
    if vocabulary.unknown is not None:
        place = vocabulary.tokens.index(vocabulary.unknown)
        shares = [
            f"{name} {(stream.tokens == place).sum() / len(stream):.2%}"
            for name, stream in (("training", corpus.train), ("validation", corpus.valid), ("test", corpus.test))
        ]
        rows.append(Row("Unknown", vocabulary.unknown, ", ".join(shares)))
    return rows


def _yardstick(corpus: Corpus, options: Options) -> list[Row]:
    if corpus.unit == "character":
        rows = yardstick(corpus)
        name, shorts = formats.common(row["label"] for row in rows)
        beside = "  ".join(
            f"{short} {row['bits']:.2f}".replace(" ", NBSP) for short, row in zip(shorts, rows, strict=True)
        )
        return [Row("Yardstick", name, f"bits per character on validation: {beside}")]
    if corpus.unit == "symbol":
        return [
            Row("Yardstick", f"{formats.residual(memoryless_optimum(options.blank))} nats", "the best without memory")
        ]
    return []


def _shown(token: str) -> str:
    """A token that can be seen: spaces and line breaks by name."""
    return {" ": "space", "\n": "newline", "\t": "tab"}.get(token, token)
