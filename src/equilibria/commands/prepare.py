"""`equilibria prepare CORPUS`: look at a corpus before training on it. Nothing is copied and nothing is written."""

from __future__ import annotations

import dataclasses
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
from equilibria.training.sources import Copying, PennTreebank, PythonDocs, Source, TextFolder
from equilibria.training.yardstick import yardstick


@dataclasses.dataclass(frozen=True)
class Options:
    """Read a corpus, check it, and say what is in it."""

    corpus: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CORPUS")]
    """python-docs, ptb, text-folder or copying."""
    data: Path | None = None
    """The folder with train.txt, valid.txt and test.txt, for ptb and text-folder."""
    unit: Literal["word", "character"] = "word"
    """What one token of text-folder is."""
    lowercase: bool = False
    """Whether text-folder lowers capital letters."""
    blank: int = 400
    """Steps between the symbols and their recall, for copying."""


SOURCES: dict[str, Callable[[Options], Source]] = {
    "python-docs": lambda options: PythonDocs(),
    "ptb": lambda options: PennTreebank(root=_folder(options)),
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
    console = Console(highlight=False)
    with console.status(f"reading {options.corpus}"):
        corpus = SOURCES[options.corpus](options).load()
        rows = [*_splits(corpus), *_tokens(corpus), *_yardstick(corpus, options)]
    console.print(summary_table(rows, f"{corpus.name}, by {corpus.unit}s"))
    return 0


def _folder(options: Options) -> Path:
    if options.data is None:
        raise UsageError(
            f"{options.corpus} is read from a folder with train.txt, valid.txt and test.txt; give it with --data."
        )
    return options.data


def _splits(corpus: Corpus) -> list[Row]:
    rows = []
    for name, stream in (("Training", corpus.train), ("Validation", corpus.valid), ("Test", corpus.test)):
        if stream.episode is None:
            rows.append(Row(name, f"{len(stream.ids):,} tokens"))
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
            f"{name} {(stream.tokens == place).double().mean():.2%}"
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
