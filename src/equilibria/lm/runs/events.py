"""The log of a run: one JSON object a line, each with its "event" and its "step"; a number that is not finite is null.

Letters: B batch, K evaluations of f.
"""

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
"""Events that a run writes when it ends, and writes anew when it goes on."""


_decode = json.JSONDecoder().decode
"""As json.loads, which asks for the encoding of each line."""


def append(file: Path, event: Event) -> None:
    """Add one line to ``file``; a reader never sees lines mixed."""
    with file.open("a", encoding="utf-8", newline="\n") as log:
        log.write(_line(event))


def stream(file: Path) -> Iterator[Event]:
    """The events in ``file``, oldest first and one at a time; a last line without its end is left out.

    Raises:
        ForeignFileError: the file is a symbolic link, a pipe or a device, which could be waited for for ever.
        ValueError: another line is not a JSON object; names it.
    """
    check_own(file)
    if not file.is_file():
        return
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.endswith(b"\n"):
                return  # a run that continues may write the rest of it at this moment
            yield _event(line, f"{file}, line {number}")


def read(file: Path) -> list[Event]:
    """The events in ``file`` as a list, with the errors of ``stream``."""
    return list(stream(file))


def cut(file: Path, step: int) -> None:
    """Rewrite ``file`` as it was when the checkpoint of ``step`` was written: the run goes on from there."""
    kept = (event for event in stream(file) if event.get("step", 0) <= step and event.get("event") not in ENDING)
    beside = file.with_name(f".{file.name}.new")
    discard(beside)
    try:
        with beside.open("x", encoding="utf-8", newline="\n") as copy:  # a new file: no link is followed
            copy.writelines(map(_line, kept))
            copy.flush()
            os.fsync(copy.fileno())
        beside.replace(file)
    finally:
        discard(beside)


def _event(line: bytes, where: str) -> Event:
    try:
        event = _decode(line.decode())
    except (ValueError, RecursionError):  # the latter for brackets inside brackets
        event = None
    if not isinstance(event, dict):
        start = line.removesuffix(b"\n")[:40]
        raise ValueError(f"{where} is no JSON object: {start!r}; remove that line.")
    return event


def _line(event: Event) -> str:
    return json.dumps(_finite(event), allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    """The same value with null for each number that JSON cannot say: NaN and the infinities."""
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
