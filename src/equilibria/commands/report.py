"""`equilibria report RUN`: one HTML page and its pictures, from what a run has written down."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from equilibria.commands import page, summary
from equilibria.commands.arguments import Run, parse
from equilibria.commands.record import Record, read


@dataclasses.dataclass(frozen=True)
class Options:
    """One page about a run: report/index.html, with the pictures inside it and beside it as PNG files."""

    run: Run
    """The folder that `equilibria train` has written, finished or not."""


def main(arguments: Sequence[str]) -> int:
    """Write the report and say where it is."""
    options = parse(Options, arguments, verb="report")
    record = read(options.run)
    print(f"{summary.state(record)}")
    print(f"report: {write(record)}")
    return 0


def write(record: Record) -> Path:
    """Write the page and the pictures of ``record``; returns the path of the page."""
    from equilibria.commands import figures  # matplotlib takes a second to load

    folder = record.path / "report"
    folder.mkdir(exist_ok=True)
    drawings = figures.draw(record)
    figures.save(drawings, folder)
    text = page.render(
        record,
        state=summary.state(record),
        summary=summary.rows(record),
        drawings=drawings,
        sample=read_sample(record.path),
    )
    target = folder / "index.html"
    target.write_text(text, encoding="utf-8")
    return target


def read_sample(run: Path) -> tuple[str, str] | None:
    """The prompt and the continuation that `train` kept for the report; None if there is none."""
    file = run / "report" / "sample.json"
    try:
        sample = json.loads(file.read_text(encoding="utf-8"))
        return str(sample["prompt"]), str(sample["text"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_sample(run: Path, *, prompt: str, text: str) -> None:
    """Keep a sample for the report."""
    file = run / "report" / "sample.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({"prompt": prompt, "text": text}, ensure_ascii=False, indent=1), encoding="utf-8")
