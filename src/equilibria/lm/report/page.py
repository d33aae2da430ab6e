"""The report as one HTML page that needs nothing beside itself: pictures inside, text escaped."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources
from string import Template
from typing import Any

from equilibria.lm.report import formats
from equilibria.lm.report.record import Record
from equilibria.lm.report.summary import Row

GENERATOR = '<meta name="generator" content="equilibria">'
"""Occurs in every page."""


@dataclasses.dataclass(frozen=True)
class Drawing:
    """A finished figure."""

    name: str
    """The file's name without .png."""
    caption: str
    """Its content, in a sentence or two."""
    png: bytes
    """The picture."""


def render(
    record: Record, *, state: str, summary: Sequence[Row], drawings: Sequence[Drawing], sample: tuple[str, str] | None
) -> str:
    """The whole page. ``sample`` is a prompt and its continuation; whatever is empty or None is left out."""
    body = [
        f"<h1>{escape(record.name)}</h1>",
        f'<p class="soft">{escape(_what(record))}, in <code>{escape(str(record.path))}</code>.</p>',
        f'<p class="{"soft" if record.finished else "notice"}">{escape(state)}</p>',
        table([[row.label, row.value, row.beside] for row in summary], title="Summary", style="summary"),
        figures(drawings),
        _sample(sample),
        _settings(record.experiment),
    ]
    return filled(record.name, body, remark=" The pictures lie beside this page as PNG files, too.")


def filled(title: str, body: Iterable[str], *, remark: str = "") -> str:
    """The page of page.html; ``body`` and ``remark`` are HTML, and empty parts are left out."""
    text = resources.files(__package__ or "").joinpath("page.html").read_text(encoding="utf-8")
    parts = "\n".join(part for part in body if part)
    return Template(text).substitute(title=escape(title), body=parts, remark=remark)


def table(rows: Sequence[Sequence[str]], *, title: str, style: str, heads: Sequence[str] = ()) -> str:
    """A titled table as HTML, the first cell of each row being its name; nothing without rows."""
    if not rows:
        return ""
    lines = [f"<tr><td></td>{''.join(f'<th>{escape(head)}</th>' for head in heads)}</tr>"] if heads else []
    for name, *cells in rows:
        lines.append(f"<tr><th>{escape(name)}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>")
    inside = "\n".join(lines)
    return f'<h2>{escape(title)}</h2>\n<div class="wide"><table class="{style}">\n{inside}\n</table></div>'


def _what(record: Record) -> str:
    text = formats.network(record.experiment.get("model") or {})
    return text[0].upper() + text[1:]


def figures(drawings: Sequence[Drawing]) -> str:
    """The figures as HTML; nothing without any."""
    if not drawings:
        return ""
    return '<h2>Figures</h2>\n<div class="grid">\n' + "\n".join(_figure(drawing) for drawing in drawings) + "\n</div>"


def _figure(drawing: Drawing) -> str:
    data = base64.b64encode(drawing.png).decode("ascii")
    caption = escape(drawing.caption)
    picture = f'<img src="data:image/png;base64,{data}" width="1080" height="680" alt="{caption}">'
    return f'<figure id="{escape(drawing.name)}">{picture}<figcaption>{caption}</figcaption></figure>'


def _sample(sample: tuple[str, str] | None) -> str:
    if sample is None:
        return ""
    prompt, text = sample
    return f"<h2>A sample of its text</h2>\n<pre><b>{escape(prompt)}</b>{escape(text)}</pre>"


def _settings(experiment: dict[str, Any]) -> str:
    groups = list(groups_of(experiment))
    if not groups:
        return ""
    parts = []
    for title, settings in groups:
        lines = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in settings)
        parts.append(f"<section><h3>{escape(title)}</h3><table>{lines}</table></section>")
    return '<h2>Settings</h2>\n<div class="grid settings">\n' + "\n".join(parts) + "\n</div>"


def groups_of(experiment: dict[str, Any]) -> Iterable[tuple[str, list[tuple[str, str]]]]:
    """The experiment as titled lists of names and values: one for the corpus, the model, each stage, the training."""
    for key, value in experiment.items():
        members = value if isinstance(value, list) else [value]
        for number, member in enumerate(members, start=1):
            if not isinstance(member, dict):
                continue
            title = f"{key.rstrip('s')} {number}" if isinstance(value, list) else key
            name = member.get("name") or (member.get("kind") if key == "corpus" else None)
            settings = list(_flat(_ungrouped(member) if key == "training" else member))
            yield f"{title}: {name}" if name else title, settings or [("no options", "")]


def _ungrouped(training: dict[str, Any]) -> dict[str, Any]:
    """The settings of a training without their groups: every name occurs in one group only."""
    found: dict[str, Any] = {}
    for name, value in training.items():
        found |= value if isinstance(value, dict) else {name: value}
    return found


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in tree.items():
        if key in ("kind", "name"):
            continue
        if isinstance(value, dict) and prefix == "" and any(isinstance(part, dict) for part in value.values()):
            yield prefix + key, str(value.get("kind", ""))
            yield from _flat(value, f"{key}.")
        else:
            yield prefix + key, words(value)


def words(value: Any) -> str:
    """A value as one reads it: an object as Kind(field=value), None as "none"."""
    if isinstance(value, dict):
        parts = {key: f"({words(part)})" if isinstance(part, list) else words(part) for key, part in value.items()}
        fields = ", ".join(f"{key}={part}" for key, part in parts.items() if key != "kind")
        return f"{value.get('kind', '')}({fields})"
    if isinstance(value, list):
        return ", ".join(words(part) for part in value)
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return str(value)
