"""`equilibria doctor RUN`: whether a run is whole, and what to do if it is not. It changes nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.text import Text

from equilibria.commands.arguments import Run as Folder
from equilibria.commands.arguments import found, parse
from equilibria.commands.errors import explain
from equilibria.lm.corpora.vocabulary import noun
from equilibria.lm.report.record import read
from equilibria.lm.report.visible import visible
from equilibria.lm.runs import checkpoint, events
from equilibria.lm.runs.checkpoint import CheckpointError
from equilibria.lm.runs.files import ForeignFileError, check_own, check_readable
from equilibria.lm.runs.folder import FILES, FOLDERS, GONE, LOCK, NEW, OLD, foreign_files, holder
from equilibria.lm.runs.run import Run
from equilibria.lm.runs.shipped import TEXTS


@dataclasses.dataclass(frozen=True)
class Options:
    """Look whether a run is whole: its description, log, text, checkpoints and lock. Nothing is changed.

    The exit code is 0 if it is, and 1 if something is damaged or missing.
    """

    run: Folder
    """The folder that `equilibria train` has written."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the screen."""

    part: str
    """The part of the run that was checked."""
    said: str
    """The result of the check."""
    advice: str = ""
    """Advice; empty if nothing is wrong."""
    remark: bool = False
    """Worth knowing, and no damage."""

    @property
    def mark(self) -> tuple[str, str]:
        """A sign and its colour."""
        return ("note", "yellow") if self.remark else ("bad", "red") if self.advice else ("good", "green")


def main(arguments: Sequence[str]) -> int:
    """Print one line per part; returns 1 if one of them is bad."""
    run = Run(found(parse(Options, arguments, verb="doctor").run))
    console, findings = Console(highlight=False), list(examined(run))
    for finding in findings:
        sign, colour = finding.mark
        line = Text.assemble((f"{sign:4} ", colour), (f"{finding.part:14} ", "bold"), visible(finding.said))
        if finding.advice:
            line.append(f"\n{'':20}{visible(finding.advice)}", "dim")
        console.print(line, soft_wrap=True)
    return int(any(finding.mark[0] == "bad" for finding in findings))


def examined(run: Run) -> Iterator[Finding]:
    """Every part of a run, as it is found."""
    yield from _folder(run)
    for part, look in PARTS:
        try:
            yield from look(run)
        except (OSError, ValueError, CheckpointError) as error:
            yield Finding(part, explain(error)[0], "see above what it says; nothing was changed.")


def _folder(run: Run) -> Iterator[Finding]:
    for name in (*FILES, *FOLDERS, LOCK, NEW, OLD, GONE):
        for check, remark in ((check_readable, False), (check_own, True)):
            try:
                check(run.path / name)
            except ForeignFileError as error:
                yield Finding("folder", str(error), "nothing that writes into this run will follow it.", remark=remark)
                break
    if foreign := foreign_files(run.path):
        listed = ", ".join(foreign[:5]) + (f" and {len(foreign) - 5} more" if len(foreign) > 5 else "")
        advice = "the library leaves them alone; `train --overwrite` refuses the folder."
        yield Finding("folder", f"files that no training writes: {listed}", advice, remark=True)
    unsettled = [name for name in (OLD, GONE) if (run.path / name).exists()]
    if unsettled:
        advice = "`equilibria train … --resume` completes that."
        yield Finding("folder", "one run was replacing another one when it was stopped", advice)
    elif (run.path / NEW).exists():
        advice = "it has no checkpoint; the next `train` removes it, and this run is whole without it."
        yield Finding("folder", "a run was to replace this one, and was stopped before it could", advice, remark=True)


def _description(run: Run) -> Iterator[Finding]:
    stored = run.stored()
    run.experiment()
    yield Finding("description", f"experiment.json: {stored.get('name')}")


def _log(run: Run) -> Iterator[Finding]:
    if not run.metrics.is_file():
        yield Finding("log", "there is no metrics.jsonl", "the report will be empty; weights are not affected.")
        return
    lines, version = 0, ""
    for event in events.stream(run.metrics):
        lines += 1
        if event.get("event") == "start":
            version = str(event.get("torch", ""))
    if _is_described(run):
        read(run.path)  # which refuses events that no training writes, as `report` and --resume do
    if _is_cut(run.metrics):
        advice = "nothing: --resume writes it again."
        yield Finding("log", f"{lines:,} lines, and one that was cut", advice, remark=True)
    else:
        yield Finding("log", f"{lines:,} lines")
    if version and version != torch.__version__:
        said = f"trained with torch {version}, here are torch {torch.__version__}, Python {platform.python_version()}"
        yield Finding("versions", said, "the last bits may differ.", remark=True)


def _is_described(run: Run) -> bool:
    """True if experiment.json can be read; otherwise its own line says so."""
    with contextlib.suppress(ValueError):
        return bool(run.stored())
    return False


def _is_cut(file: Path) -> bool:
    """True if the last line has no end."""
    with file.open("rb") as log:
        size = log.seek(0, os.SEEK_END)
        log.seek(max(0, size - 1))
        return log.read() not in (b"", b"\n")


def _text(run: Run) -> Iterator[Finding]:
    known = run.language
    if known is None:
        advice = "keep the corpus: this run was written by a version that did not keep its vocabulary."
        yield Finding("text", "there is no corpus.json", advice, remark=True)
        return
    learnt = f", learnt by {known.vocabulary.origin}" if known.vocabulary.origin else ""
    yield Finding("text", f"the vocabulary of {known.name}: {len(known.vocabulary):,} {noun(known.unit)}s{learnt}")
    try:
        changed = known.changed(run.experiment().corpus.load())
    except (OSError, ValueError) as error:
        advice = "generating needs no corpus; evaluating and continuing do: --data FOLDER says where it is."
        yield Finding("corpus", " ".join(str(error).split()), advice, remark=True)
        return
    if changed and (run.path / TEXTS).is_dir():
        said = f"another text than that of the training: {', '.join(changed)}"
        yield Finding("corpus", said, "evaluating uses the text that the run keeps.", remark=True)
    elif changed:
        advice = "bring the old text back; `evaluate --data` scores another one."
        yield Finding("corpus", f"another text than that of the training: {', '.join(changed)}", advice)
    else:
        yield Finding("corpus", "the text of the training, by its SHA-256")


def _checkpoints(run: Run) -> Iterator[Finding]:
    folders = checkpoint.all_in(run.checkpoints)
    good = []
    for folder in folders:
        try:
            checkpoint.load(folder)
            good.append(folder.name)
        except CheckpointError as error:
            yield Finding("checkpoint", " ".join(str(error).split()), "--resume uses the newest good one.")
    if good:
        yield Finding("checkpoints", f"{len(good)} good: {', '.join(good[-3:])}")
    else:
        advice = "continue the training with --resume, which begins again, or take a checkpoint from a copy."
        yield Finding("checkpoints", "there is no good one", advice)
    if any(run.checkpoints.glob(".unfinished-*")):
        advice = "the next checkpoint removes it."
        yield Finding("checkpoints", "one was not finished when the process ended", advice, remark=True)


def _lock(run: Run) -> Iterator[Finding]:
    process = holder(run.path)
    if process is not None:
        yield Finding("lock", f"in use by {process}", "wait until it ends before you train here.", remark=True)
    if not os.access(run.path, os.W_OK):
        yield Finding("lock", "the folder cannot be written", "copy it to continue the training.", remark=True)


PARTS: tuple[tuple[str, Callable[[Run], Iterator[Finding]]], ...] = (
    ("description", _description),
    ("log", _log),
    ("text", _text),
    ("checkpoints", _checkpoints),
    ("lock", _lock),
)
