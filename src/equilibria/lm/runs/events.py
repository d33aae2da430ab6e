"""The log of a run: one JSON object per line, with its "event" and "step"; numbers that are not finite are null."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from equilibria.lm.runs.files import check_own, discard

Event = dict[str, Any]
"""One line of metrics.jsonl."""
ENDING = frozenset({"memory", "done", "stopped"})
"""Events at the end of a run; a run that continues removes them and writes them again."""


_decode = json.JSONDecoder().decode
"""Like json.loads, but without detecting the encoding of each line."""


def append(file: Path, event: Event) -> None:
    """Add one line to ``file`` in a single write, so that a reader never sees two lines mixed."""
    with file.open("a", encoding="utf-8", newline="\n") as log:
        log.write(_line(event))


def stream(file: Path) -> Iterator[Event]:
    """The events in ``file``, oldest first and one at a time, without an incomplete last line.

    Raises:
        ForeignFileError: the file is a symbolic link, a pipe or a device, from which reading could block forever.
        ValueError: a line before the last one is not a JSON object; the message names the line.
    """
    check_own(file)
    if not file.is_file():
        return
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.endswith(b"\n"):
                return  # a running training may be writing the rest
            yield _event(line, f"{file}, line {number}")


def read(file: Path) -> list[Event]:
    """The events in ``file`` as a list; raises the errors of ``stream``."""
    return list(stream(file))


def cut(file: Path, step: int) -> None:
    """Rewrite ``file`` as it was when the checkpoint of ``step`` was written, so that the run can continue there.

    Raises the errors of ``stream``, and a ValueError for a line whose step is no number; the file is then as it was.
    """
    kept = (event for event in stream(file) if _step_of(event, file) <= step and event.get("event") not in ENDING)
    beside = file.with_name(f".{file.name}.new")
    discard(beside)
    try:
        with beside.open("x", encoding="utf-8", newline="\n") as copy:  # "x": never follows a link
            copy.writelines(map(_line, kept))
            copy.flush()
            os.fsync(copy.fileno())
        beside.replace(file)
    finally:
        discard(beside)


def _step_of(event: Event, file: Path) -> int:
    step = event.get("step", 0)
    if not isinstance(step, int):
        raise ValueError(f"{file} has a line whose step is {step!r:.40}, where a number should be; remove that line.")
    return step


def _event(line: bytes, where: str) -> Event:
    try:
        event = _decode(line.decode())
    except (ValueError, RecursionError):  # RecursionError: deeply nested brackets
        event = None
    if not isinstance(event, dict):
        start = line.removesuffix(b"\n")[:40]
        raise ValueError(f"{where} is not a JSON object: {start!r}; remove that line.")
    return event


def _line(event: Event) -> str:
    return json.dumps(_finite(event), allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    """The value with None instead of each number that JSON cannot represent: NaN and the infinities."""
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
