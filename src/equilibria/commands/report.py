"""`equilibria report RUN …`: one HTML page and its pictures about a run, or one page that compares several."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro

from equilibria.commands.arguments import Runs, found, parse
from equilibria.errors import UsageError
from equilibria.lm.report import formats, page, summary
from equilibria.lm.report.comparison import compared
from equilibria.lm.report.record import Record, read
from equilibria.lm.report.visible import visible
from equilibria.lm.runs.files import check_own, replace
from equilibria.lm.runs.shipped import check_writable


@dataclasses.dataclass(frozen=True)
class Options:
    """One page about a run: report/index.html, with the pictures inside it and beside it as PNG files. Several runs are
    compared on one page, comparison.html beside the first of them.

    With --json, stdout gets one object: "run", "name", "state" (a sentence), "finished", "step", "total_steps",
    "summary" and "report" (the path of the page). The summary has "parameters", "corpus", "unit", "validation",
    "baseline", "stage" (the newest one), "forward" and "backward" (means over its steps), "spectral_radius", "memory",
    "seconds" (of the whole training) and "tokens_per_second" (the tokens of all steps over the time of the steps
    alone), named and in the units as in metrics.jsonl; what was not measured is null or empty.
    """

    runs: Runs
    """The folders that `equilibria train` has written, finished or not."""
    out: Path | None = None
    """The page that compares several runs; None for comparison.html beside the first run."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print one JSON object instead of the sentences."""


def main(arguments: Sequence[str]) -> int:
    """Write the report and say where it is."""
    options = parse(Options, arguments, verb="report")
    if not options.runs:
        raise UsageError("report needs RUN: the folder that `equilibria train` has written, or several to compare.")
    records = [read(found(run)) for run in options.runs]
    if len(records) > 1:
        return _compare(records, options)
    if options.out is not None:
        raise UsageError(f"--out {options.out}: the page about one run is in its folder; name several runs to compare.")
    (record,) = records
    page_file = write(record)
    if options.json:
        print(formats.strict_json(_object(record, page_file)))
        return 0
    print(summary.state(record))
    print(visible(f"report: {page_file}"))
    return 0


def _compare(records: Sequence[Record], options: Options) -> int:
    if options.out is None:
        check_writable(records[0].path, advice="name the page with --out.")
    target = options.out or records[0].path.parent / "comparison.html"
    _check_page(target)
    from equilibria.lm.report import figures  # matplotlib takes a second to load

    text = compared(records, figures.draw_together(records))
    target.parent.mkdir(parents=True, exist_ok=True)
    replace(target, text.encode(errors="replace"))
    if options.json:
        found = [{"run": str(record.path), "name": record.name, "summary": summary.data(record)} for record in records]
        print(formats.strict_json({"runs": found, "report": str(target)}))
        return 0
    for record in records:
        print(visible(f"{record.path}: {summary.state(record)}"))
    print(visible(f"report: {target}"))
    return 0


def _check_page(target: Path) -> None:
    """Raise an error if another file than an older page would be replaced."""
    check_own(target)
    if target.is_dir() or (
        target.is_file() and page.GENERATOR not in target.read_bytes()[:2000].decode(errors="replace")
    ):
        raise UsageError(f"{target} is there already and was not written by this command; name another one with --out.")


def _object(record: Record, page_file: Path) -> dict[str, Any]:
    """The object that --json prints."""
    return {
        "run": str(record.path),
        "name": record.name,
        "state": summary.state(record),
        "finished": record.finished,
        "step": record.step,
        "total_steps": record.total_steps,
        "summary": summary.data(record),
        "report": str(page_file),
    }


def write(record: Record) -> Path:
    """Write the page and the pictures of ``record``, each beside its place and renamed; returns the path of the page.

    Raises:
        ForeignFileError: the folder of the report is a symbolic link; nothing was written.
    """
    from equilibria.lm.report import figures  # matplotlib takes a second to load

    folder = _folder(record.path)
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
    replace(target, text.encode(errors="replace"))  # half a surrogate pair, which JSON may hold, becomes a "?"
    return target


def _folder(run: Path) -> Path:
    """The folder of the report, made if it is not there."""
    check_writable(run, advice="reports are about runs of your own.")
    folder = run / "report"
    check_own(folder)
    folder.mkdir(exist_ok=True)
    return folder


def read_sample(run: Path) -> tuple[str, str] | None:
    """The prompt and the continuation that `train` kept for the report; None if there is none."""
    file = run / "report" / "sample.json"
    try:
        check_own(file.parent)
        check_own(file)
        sample = json.loads(file.read_text(encoding="utf-8"))
        return str(sample["prompt"]), str(sample["text"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def write_sample(run: Path, *, prompt: str, text: str) -> None:
    """Keep a sample for the report."""
    sample = json.dumps({"prompt": prompt, "text": text}, ensure_ascii=False, indent=1)
    replace(_folder(run) / "sample.json", sample.encode(errors="replace"))
