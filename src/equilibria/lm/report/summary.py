"""The table at the end of a training, the same in the terminal and in the report."""

from __future__ import annotations

import dataclasses
import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from equilibria.lm.corpora.vocabulary import noun
from equilibria.lm.report import formats
from equilibria.lm.report.record import DIRECTIONS, PARTS, Event, Record
from equilibria.lm.runs.files import check_own

NBSP = "\N{NO-BREAK SPACE}"
"""Holds a number and what it counts on one line."""
LONGEST_HEADER = 100_000_000
"""Bytes of the header of a safetensors file at most."""
FIXED = "no tolerance, fixed depth"
"""The words for solves that always spend their budget."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table."""

    label: str
    """The quantity."""
    value: str
    """The number with its unit."""
    beside: str = ""
    """A comparison, or how it was measured."""


def rows(record: Record) -> list[Row]:
    """The table of the run, without the lines of quantities that were not measured."""
    parts = (_model, _validation, _solves, _radius, _memory, _time)
    return [row for part in parts for row in part(record)]


def data(record: Record) -> dict[str, Any]:
    """The content of ``rows`` as numbers, with their names in metrics.jsonl; None where nothing was measured."""
    start, best, radius = record.last("start") or {}, record.best, record.last("spectral_radius")
    scores = ("step", "stage", "nats", "bits", "bits_per_byte", "perplexity", "accuracy", "bytes", "setting")
    return {
        "parameters": _parameters(record),
        "corpus": start.get("corpus"),
        "unit": record.unit,
        "validation": None if best is None else {name: best.get(name) for name in scores},
        "baseline": (record.last("baseline") or {}).get("rows", []),
        "stage": record.log.trained,
        **{name: _solve(record, name) for name in DIRECTIONS},
        "spectral_radius": None if radius is None else {name: radius.get(name) for name in ("step", "mean", "max")},
        "memory": (record.last("memory") or {}).get("rows", []),
        "seconds": record.log.seconds,
        "tokens_per_second": record.tokens_per_second,
    }


def _solve(record: Record, name: str) -> dict[str, float] | None:
    """The means over the newest stage of one of DIRECTIONS; None if nothing was solved there."""
    return {part: record.mean(f"{name} {part}") for part in PARTS} if record.count(f"{name} evals") else None


def _parameters(record: Record) -> int | None:
    return (record.last("start") or {}).get("parameters") or parameters(record.path)


def parameters(run: Path) -> int | None:
    """The number of trained parameters in the newest checkpoint, None before the first one."""
    files = sorted((run / "checkpoints").glob("*/model.safetensors"), key=lambda file: file.lstat().st_mtime)
    if not files:
        return None
    check_own(files[-1])
    try:
        with files[-1].open("rb") as file:  # a safetensors file begins with the length of its JSON header
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, LONGEST_HEADER)))
        return sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
    except (AttributeError, KeyError, TypeError, ValueError, struct.error):
        return None  # damaged: what needs the weights says so


def _model(record: Record) -> Iterator[Row]:
    start = record.last("start") or {}
    number = _parameters(record)
    if number is not None:
        corpus = start.get("corpus") or {}
        known = ""
        if corpus:
            size = f"{formats.count(corpus['vocabulary'])} different {noun(corpus['unit'])}s"
            known = f"{corpus['name']}, {size}"
        yield Row("Parameters", formats.count(number), known)


def _validation(record: Record) -> Iterator[Row]:
    best, baseline = record.best, record.last("baseline")
    if best is not None:
        conditions = formats.conditions(best)
        beside = f"step {formats.count(best['step'])}, the best" + (f"; {conditions}" if conditions else "")
        yield Row("Validation", formats.score(best, record.unit), beside)
        if found := formats.per_byte(best):
            size = f"of {formats.count(best['bytes'])} bytes of text; comparable between vocabularies"
            yield Row("Bits per byte", found.removesuffix(" bits per byte"), size)
        if best.get("accuracy") is not None:
            guesses = "" if record.chance is None else f"; guessing gets {formats.percent(record.chance)}"
            beside = f"of those that the task asks for{guesses}"
            yield Row("Right answers", formats.percent(best["accuracy"]), beside)
    marks = (baseline or {}).get("rows", [])
    if marks:
        name, shorts = formats.common(row["label"] for row in marks)
        numbers = [formats.number(row, record.unit) for row in marks]
        beside = ", ".join(
            f"{short} {number}".strip().replace(" ", NBSP) for short, number in zip(shorts, numbers, strict=True)
        )
        yield Row("Baseline", name, beside)


def _solves(record: Record) -> Iterator[Row]:
    for name in DIRECTIONS:
        if not record.count(f"{name} evals"):
            continue
        evals, residual, share = (record.mean(f"{name} {part}") for part in PARTS)
        stage = record.log.trained
        goal = f"{formats.percent(share)} of samples converged" if record.has_tolerance(stage) else FIXED
        beside = f"residual {formats.residual(residual)}, {goal} (means of stage {stage})"
        yield Row(f"{name.capitalize()} solve", f"{evals:.1f} evaluations", beside)


def _radius(record: Record) -> Iterator[Row]:
    event = record.last("spectral_radius")
    if event is not None:
        mean, largest = (f"{formats.plain(event[name]):.2f}" for name in ("mean", "max"))
        beside = f"of ∂f/∂z at the equilibrium after step {formats.count(event['step'])}: the largest; mean {mean}"
        yield Row("Spectral radius", largest, beside)


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
    if record.last("step") is None:
        return
    speed = record.tokens_per_second
    steps = f"{formats.count(record.step)} steps" + ("" if speed is None else f" at {formats.count(speed)} tokens/s")
    beside = f"{steps}, and the validations, checkpoints and measurements between them"
    yield Row("Time", formats.duration(record.log.seconds), beside)


def state(record: Record) -> str:
    """One sentence: finished, stopped or under way, and where."""
    steps = f"{formats.count(record.step)} of {formats.count(record.total_steps)} steps"
    stopped: Event | None = record.last("stopped")
    converted: Event | None = record.last("converted")
    if converted is not None:
        return f"Converted from {converted.get('file')}, weights of {converted.get('format')}: there is no history."
    if record.finished:
        return f"Finished after {formats.count(record.step)} steps."
    if stopped is not None and stopped is record.log.final:
        return f"Stopped at step {formats.count(stopped.get('step', record.step))} by a non-finite loss or gradient."
    return f"Unfinished: {steps} so far. This page shows what was written down until now."
