"""The report as one HTML page that needs nothing beside itself: pictures inside, text escaped."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from equilibria.lm.report import formats
from equilibria.lm.report.record import Record
from equilibria.lm.report.summary import Row


@dataclasses.dataclass(frozen=True)
class Drawing:
    """A finished figure."""

    name: str
    """The file's name without .png."""
    caption: str
    """What it shows, in a sentence or two."""
    png: bytes
    """The picture."""


CSS = """
:root { color-scheme: light; --ink: #1d2127; --soft: #5b626d; --line: #e3e6ea; --blue: #0b62a4; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto,
  "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 40px 28px 64px; }
h1 { font-size: 32px; line-height: 1.2; margin: 0 0 6px; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { font-size: 20px; margin: 44px 0 12px; }
h3 { font-size: 15px; margin: 0 0 4px; }
p { margin: 0 0 8px; }
.soft { color: var(--soft); }
.notice { border-left: 4px solid #d1580b; background: #fdf4ee; padding: 10px 14px; margin: 16px 0 0; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: 7px 18px 7px 0; border-bottom: 1px solid var(--line); }
th { font-weight: 500; color: var(--soft); white-space: nowrap; }
td { overflow-wrap: anywhere; }
.summary td:nth-child(2) { font-weight: 600; white-space: nowrap; }
.summary td:nth-child(3) { color: var(--soft); }
.grid { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 34px 40px; }
figure { margin: 0; }
figure img { width: 100%; height: auto; display: block; }
figcaption { color: var(--soft); font-size: 14px; line-height: 1.45; margin-top: 6px; }
pre { margin: 0; padding: 18px 20px; background: #f6f7f9; border-radius: 6px; white-space: pre-wrap;
  overflow-wrap: anywhere; font: 13.5px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre b { color: var(--blue); font-weight: 600; }
.settings table { font-size: 14px; }
.settings th, .settings td { padding: 4px 14px 4px 0; }
.settings th { width: 42%; }
footer { margin-top: 48px; padding-top: 12px; border-top: 1px solid var(--line); font-size: 14px; }
@media (max-width: 760px) {
  main { padding: 24px 16px 40px; }
  h1 { font-size: 26px; }
  .grid { grid-template-columns: minmax(0, 1fr); }
  .summary tr { display: block; padding: 8px 0; border-bottom: 1px solid var(--line); }
  .summary th, .summary td { display: block; padding: 0; border: 0; white-space: normal; }
}
@media print { .grid, pre { break-inside: avoid; } }
"""


def render(
    record: Record, *, state: str, summary: Sequence[Row], drawings: Sequence[Drawing], sample: tuple[str, str] | None
) -> str:
    """The whole page. ``sample`` is a prompt and its continuation; whatever is empty or None is left out."""
    body = [
        f"<h1>{escape(record.name)}</h1>",
        f'<p class="soft">{escape(_what(record))}, in <code>{escape(str(record.path))}</code>.</p>',
        f'<p class="{"soft" if record.finished else "notice"}">{escape(state)}</p>',
        _summary(summary),
        _figures(drawings),
        _sample(sample),
        _settings(record.experiment),
    ]
    title = escape(f"{record.name} · equilibria")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in body if part)
        + '\n<footer class="soft">Written by <code>equilibria report</code>. The pictures lie beside this page as PNG '
        "files, too.</footer>\n</main>\n</body>\n</html>\n"
    )


def _what(record: Record) -> str:
    words = formats.network(record.experiment.get("model") or {})
    return words[0].upper() + words[1:]


def _summary(summary: Sequence[Row]) -> str:
    if not summary:
        return ""
    lines = "\n".join(
        f"<tr><th>{escape(row.label)}</th><td>{escape(row.value)}</td><td>{escape(row.beside)}</td></tr>"
        for row in summary
    )
    return f'<h2>Summary</h2>\n<table class="summary">\n{lines}\n</table>'


def _figures(drawings: Sequence[Drawing]) -> str:
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
            yield prefix + key, _words(value)


def _words(value: Any) -> str:
    """A value as one reads it: an object as Kind(field=value), None as "none"."""
    if isinstance(value, dict):
        words = {key: f"({_words(part)})" if isinstance(part, list) else _words(part) for key, part in value.items()}
        fields = ", ".join(f"{key}={part}" for key, part in words.items() if key != "kind")
        return f"{value.get('kind', '')}({fields})"
    if isinstance(value, list):
        return ", ".join(_words(part) for part in value)
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return str(value)
