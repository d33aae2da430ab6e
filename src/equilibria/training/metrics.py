"""The log of a run: one JSON object a line, each with its "event" and its "step"; a number that is not finite is null.

Letters: B batch, K evaluations of f.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from equilibria.core.solve import Solution

Event = dict[str, Any]
"""One line of metrics.jsonl."""
ENDING = frozenset({"memory", "done", "stopped"})
"""Events that a run writes when it ends, and writes anew when it goes on."""


def append(file: Path, event: Event) -> None:
    """Add one line to ``file``; a reader never sees lines mixed."""
    with file.open("a", encoding="utf-8", newline="\n") as stream:
        stream.write(_line(event))


def read(file: Path) -> list[Event]:
    """The events in ``file``, oldest first; a last line without its end is left out.

    Raises:
        ValueError: another line is not a JSON object; names it.
    """
    lines = file.read_bytes().split(b"\n")[:-1] if file.is_file() else []
    events = []
    for number, line in enumerate(lines, start=1):
        try:
            event = json.loads(line)
        except ValueError:
            event = None
        if not isinstance(event, dict):
            raise ValueError(f"{file}, line {number} is no JSON object: {line[:40]!r}; remove that line.")
        events.append(event)
    return events


def cut(file: Path, step: int) -> None:
    """Rewrite ``file`` as it was when the checkpoint of ``step`` was written: the run goes on from there."""
    kept = [event for event in read(file) if event.get("step", 0) <= step and event.get("event") not in ENDING]
    beside = file.with_name(f".{file.name}.new")
    with beside.open("w", encoding="utf-8", newline="\n") as stream:
        stream.writelines(map(_line, kept))
        stream.flush()
        os.fsync(stream.fileno())
    beside.replace(file)


def summary(solution: Solution) -> Event:
    """Cost and success of a solve as plain numbers; reading them waits for the device.

    The residual is the mean of the samples that have a finite one, NaN if none has.
    """
    residual = solution.residual.double()
    return {
        "evals": solution.evals,
        "residual": float(residual[residual.isfinite()].mean()),
        "converged": float(solution.converged.double().mean()),
        "steps": float(solution.steps.double().mean()),
    }


def mean_summary(solutions: Sequence[Solution]) -> dict[str, float] | None:
    """The mean of their summaries, None of none."""
    found = [summary(solution) for solution in solutions]
    return {name: statistics.fmean(one[name] for one in found) for name in found[0]} if found else None


def _line(event: Event) -> str:
    return json.dumps(_finite(event), allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    """The same value with null for each number that JSON cannot say: NaN and the infinities."""
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
