"""compared: several runs on one page, with what differs between their settings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from equilibria.lm.report import page, summary
from equilibria.lm.report.page import Drawing
from equilibria.lm.report.record import Record
from equilibria.lm.report.summary import Row

NOTHING = "–"
"""Stands for a number that a run has not measured, and for a setting that it does not have."""
_MISSING = object()


def compared(records: Sequence[Record], drawings: Sequence[Drawing]) -> str:
    """The page about several runs: one column per run, the figures, and the settings that are not the same."""
    names = [record.name for record in records]
    heads = [str(record.path) for record in records]
    body = [
        f"<h1>{escape(', '.join(dict.fromkeys(names)))}</h1>",
        f'<p class="soft">{len(records)} runs side by side.</p>',
        _warning(records),
        page.table(rows(records), title="Summary", style="comparison", heads=heads),
        page.figures(drawings),
        page.table(differences(records), title="Settings that differ", style="comparison", heads=heads),
    ]
    return page.filled("Runs compared", body)


def rows(records: Sequence[Record]) -> list[list[str]]:
    """The rows of the summaries of all runs, each with one cell per run."""
    columns = [{row.label: row for row in summary.rows(record)} for record in records]
    labels = dict.fromkeys(label for column in columns for label in column)
    found = [["State", *(summary.state(record) for record in records)]]
    for label in labels:
        found.append([label, *(_cell(column.get(label)) for column in columns)])
    return found


def _cell(row: Row | None) -> str:
    if row is None:
        return NOTHING
    return f"{row.value} ({row.beside})" if row.beside else row.value


def differences(records: Sequence[Record]) -> list[list[str]]:
    """The settings in which the experiments differ, by their paths, with one cell per run."""
    return list(_differing([record.experiment for record in records]))


def _warning(records: Sequence[Record]) -> str:
    """A notice if the losses are not those of the same text, or not of the same tokens."""
    corpora = [(record.last("start") or {}).get("corpus") or {} for record in records]
    if len({str(corpus) for corpus in corpora}) < 2:
        return ""
    texts = [(corpus.get("name"), corpus.get("bytes")) for corpus in corpora]
    if texts[0][1] and all(text == texts[0] for text in texts):
        return (
            '<p class="notice">These runs read the same text as different tokens, so compare their bits per byte; '
            "the other losses are per token.</p>"
        )
    return '<p class="notice">These runs read different corpora, so their losses cannot be compared.</p>'


def _differing(values: Sequence[Any], name: str = "") -> Iterator[list[str]]:
    """One row for each part that differs: a field of objects of one kind, or a whole object where the kinds differ."""
    parts = [_parts(value) for value in values]
    if all(parts) and len({part.get("kind") for part in parts}) == 1:
        for key in dict.fromkeys(key for part in parts for key in part):
            yield from _differing([part.get(key, _MISSING) for part in parts], f"{name}.{key}" if name else key)
    elif any(value != values[0] for value in values):
        yield [name, *(NOTHING if value is _MISSING else page.words(value) for value in values)]


def _parts(value: Any) -> dict[str, Any]:
    """The fields of an object, or the objects of a list by their places; empty for a value without parts."""
    if isinstance(value, list) and any(isinstance(part, dict) for part in value):
        return {str(place): part for place, part in enumerate(value)}
    return value if isinstance(value, dict) else {}
