"""The table at the end of a training, the same in the terminal and in the report."""

from __future__ import annotations

import dataclasses
import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path

from equilibria.commands import formats
from equilibria.commands.record import Event, Record

NBSP = "\N{NO-BREAK SPACE}"
"""Holds a number and what it counts on one line."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table."""

    label: str
    """What was measured."""
    value: str
    """The number with its unit."""
    beside: str = ""
    """What to compare it with, or how it was measured."""


def rows(record: Record) -> list[Row]:
    """What is known of the run; lines about things that were not measured are left out."""
    return [*_model(record), *_validation(record), *_solves(record), *_memory(record), *_time(record)]


def parameters(run: Path) -> int | None:
    """The number of trained parameters in the newest checkpoint, None before the first one."""
    files = sorted((run / "checkpoints").glob("*/model.safetensors"), key=lambda file: file.stat().st_mtime)
    if not files:
        return None
    with files[-1].open("rb") as file:  # a safetensors file begins with the length of its JSON header
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    return sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")


def _model(record: Record) -> Iterator[Row]:
    start = record.last("start") or {}
    number = start.get("parameters") or parameters(record.path)
    if number is not None:
        corpus = start.get("corpus") or {}
        known = f"{corpus['name']}, {formats.count(corpus['vocabulary'])} different {corpus['unit']}s" if corpus else ""
        yield Row("Parameters", formats.count(number), known)


def _validation(record: Record) -> Iterator[Row]:
    best, yardstick = record.best, record.last("yardstick")
    if best is not None:
        conditions = formats.conditions(best)
        beside = f"step {formats.count(best['step'])}, the best" + (f"; {conditions}" if conditions else "")
        yield Row("Validation", formats.score(best, record.unit), beside)
        if best.get("accuracy") is not None:
            yield Row("Right answers", formats.percent(best["accuracy"]), "of those asked for at the end of a sequence")
    marks = (yardstick or {}).get("rows", [])
    if marks:
        name, shorts = formats.common(row["label"] for row in marks)
        numbers = [formats.number(row, record.unit) for row in marks]
        beside = ", ".join(
            f"{short} {number}".strip().replace(" ", NBSP) for short, number in zip(shorts, numbers, strict=True)
        )
        yield Row("Yardstick", name, beside)


def _solves(record: Record) -> Iterator[Row]:
    steps = record.last_stage
    for name in ("forward", "backward"):
        solves = [event[name] for event in steps if event.get(name)]
        if not solves:
            continue
        evals = formats.mean(solve["evals"] for solve in solves)
        residual = formats.residual(formats.mean(solve["residual"] for solve in solves))
        share = f"{formats.percent(formats.mean(solve['converged'] for solve in solves))} of samples converged"
        stage = steps[-1]["stage"]
        goal = share if record.has_tolerance(stage) else "no tolerance, fixed depth"
        beside = f"residual {residual}, {goal} (means of stage {stage})"
        yield Row(f"{name.capitalize()} solve", f"{evals:.1f} evaluations", beside)


def _memory(record: Record) -> Iterator[Row]:
    event = record.last("memory")
    if event is None:
        return
    ours = [row for row in event["rows"] if row.get("depth") is None]
    others = [
        f"{row['depth']}{NBSP}layers{NBSP}{formats.size(row['peak_bytes']).replace(' ', NBSP)}"
        for row in event["rows"]
        if row.get("depth")
    ]
    if ours:
        beside = "of one training step"
        if others:
            beside += f"; the same cell unrolled: {', '.join(others)}"
        yield Row("Peak memory", formats.size(ours[0]["peak_bytes"]), beside)


def _time(record: Record) -> Iterator[Row]:
    seconds = max((float(event.get("seconds") or 0) for event in record.events), default=0.0)
    steps = record.of("step")
    if not steps:
        return
    speeds = [event["tokens_per_second"] for event in record.last_stage if event.get("tokens_per_second")]
    beside = f"{formats.count(record.step)} steps"
    if speeds:
        beside += f", {formats.count(formats.mean(speeds))} tokens/s in stage {steps[-1]['stage']}"
    yield Row("Time", formats.duration(seconds), beside)


def state(record: Record) -> str:
    """One sentence: finished, stopped or under way, and where."""
    steps = f"{formats.count(record.step)} of {formats.count(record.total_steps)} steps"
    stopped: Event | None = record.last("stopped")
    if record.finished:
        return f"Finished after {formats.count(record.step)} steps."
    if stopped is not None and stopped is record.events[-1]:
        return f"Stopped at step {formats.count(stopped.get('step', record.step))} by a non-finite loss or gradient."
    return f"Unfinished: {steps} so far. This page shows what was written down until now."
