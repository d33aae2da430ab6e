"""A run directory as the commands read it: experiment.json and metrics.jsonl, nothing else.

A log may have millions of lines: it is read once, line by line, and what is kept of it hardly grows.
"""

from __future__ import annotations

import dataclasses
import math
from array import array
from collections.abc import MutableSequence
from pathlib import Path
from typing import Any

import numpy as np

from equilibria.lm.corpora import CATALOGUE
from equilibria.lm.corpora.source import Source
from equilibria.lm.paths import path_of
from equilibria.lm.report import formats
from equilibria.lm.report.curve import Curve
from equilibria.lm.runs import events
from equilibria.lm.runs.events import Event
from equilibria.lm.runs.files import check_own
from equilibria.lm.runs.run import Run
from equilibria.lm.runs.shipped import require

CHUNK = 1024
"""Training steps that are read before they are added up."""
DIRECTIONS = ("forward", "backward")
"""The solves of a training step."""
PARTS = ("evals", "residual", "converged")
"""The numbers of a solve of which the report draws a curve and gives the mean."""
COLUMNS = ("loss", *(f"{name} {part}" for name in DIRECTIONS for part in PARTS))
"""The numbers of a training step of which the report draws a curve or gives the mean."""
ABSURD = (ArithmeticError, AttributeError, KeyError, StopIteration, TypeError, ValueError)
"""Errors that reading a foreign event can raise."""

Dots = dict[Any, MutableSequence[float]]
"""Points that are few enough to be drawn each: of every stage step and value in turn."""


class Contents:
    """The content of a log: its rare events, and for its training steps the sums of each stage and thinned curves.

    Args:
        experiment: as in experiment.json.
        unit: what one token is.
    """

    def __init__(self, experiment: dict[str, Any], unit: str) -> None:
        self.experiment, self.unit = experiment, unit
        self.step, self.seconds = 0, 0.0
        self.tokens, self.step_seconds = 0.0, 0.0  # of all training steps whose time is known
        self.final: Event | None = None
        self.newest: dict[Any, Event] = {}
        self.stages: list[Event] = []
        self.best: Event | None = None
        self.trained: Any = None  # the newest stage with a training step
        self.dots: dict[str, Dots] = {"valid": {}, "per byte": {}, "mean": {}, "max": {}}
        self.curves = {name: Curve() for name in COLUMNS}
        self.sums: dict[Any, dict[str, tuple[int, int, float]]] = {}
        self._rows: list[tuple[float, ...]] = []
        self._counted = 0.0  # the last training step

    def add(self, event: Event) -> None:
        """Take in the next event of the log; ``close`` follows the last one."""
        kind = event.get("event")
        self.newest[kind] = self.final = event
        self.step = max(self.step, int(event.get("step", 0)))
        self.seconds = max(self.seconds, float(event.get("seconds") or 0))
        if kind == "step":
            self._add_step(event)
        elif kind == "valid":
            self._add_valid(event)
        elif kind == "spectral_radius":
            for name in ("mean", "max"):
                self._dot(name, event, formats.plain(event[name]))
        elif kind == "stage":
            self.stages.append({**event, "step": float(event["step"]), "stage": str(event["stage"])})
        elif kind in ("baseline", "memory"):
            for row in event["rows"]:
                row["label"].split()
                float(formats.quantity(row, self.unit) if kind == "baseline" else row["peak_bytes"])
        elif kind == "start":
            unit = _unit(self.experiment, event)
            self.unit = self.unit if self.sums or self.dots["valid"] else unit

    def _add_step(self, event: Event) -> None:
        stage = event.get("stage")
        if len(self._rows) == CHUNK or stage != self.trained:
            self.close()
        self.trained = stage
        self.sums.setdefault(stage, {})
        self._rows.append(_row(event, self.unit))
        self._add_time(event)

    def _add_time(self, event: Event) -> None:
        """Add the tokens and the time of the steps since the last step event.

        Older runs do not say the time: there every step counts with the tokens of the last one.
        """
        speed, steps = float(event.get("tokens_per_second") or 0), float(event["step"]) - self._counted
        self._counted = float(event["step"])
        if not 0 < speed < math.inf:
            return
        seconds = event.get("step_seconds")
        seconds = steps * float(event["tokens"]) / speed if seconds is None else float(seconds)
        self.tokens, self.step_seconds = self.tokens + speed * seconds, self.step_seconds + seconds

    def _add_valid(self, event: Event) -> None:
        self._dot("valid", event, formats.quantity(event, self.unit))
        if formats.per_byte(event):
            self._dot("per byte", event, formats.plain(event["bits_per_byte"]))
            float(event["bytes"])
        if event.get("best"):
            self.best = event

    def _dot(self, name: str, event: Event, value: float) -> None:
        self.dots[name].setdefault(event.get("stage"), array("d")).extend((float(event["step"]), value))

    def close(self) -> None:
        """Add up the training steps that were read since the last time, which are all of one stage."""
        if not self._rows:
            return
        rows = np.array(self._rows)
        self._rows.clear()
        aimed = has_tolerance(self.experiment, self.trained)
        for name, there, values in zip(COLUMNS, rows[:, 1::2].T, rows[:, 2::2].T, strict=True):
            steps, values = rows[there == 1, 0], values[there == 1]
            count, finite, total = self.sums[self.trained].get(name, (0, 0, 0.0))
            kept = values[np.isfinite(values)].tolist()
            self.sums[self.trained][name] = (count + len(values), finite + len(kept), sum(kept, total))
            if not name.endswith("converged") or aimed:
                self.curves[name].extend(steps, values, self.trained)


def _row(event: Event, unit: str) -> tuple[float, ...]:
    """The step, and for each of COLUMNS whether the event has it, and its value."""
    numbers: tuple[float, ...] = (float(event["step"]), 1.0, formats.quantity(event, unit))
    for name in DIRECTIONS:
        solve = event.get(name)
        for part in PARTS:
            numbers += (1.0, formats.plain(solve.get(part))) if solve else (0.0, math.nan)
    return numbers


@dataclasses.dataclass(frozen=True)
class Record:
    """The experiment and the log of a run so far."""

    path: Path
    """The run directory."""
    experiment: dict[str, Any]
    """experiment.json: nested objects, each with its "kind"."""
    log: Contents
    """metrics.jsonl."""

    def last(self, kind: str) -> Event | None:
        """The newest event of one kind, None if there is none."""
        return self.log.newest.get(kind)

    def count(self, column: str) -> int:
        """How many training steps of the newest stage have a number, one of COLUMNS."""
        return self.log.sums.get(self.log.trained, {}).get(column, (0, 0, 0.0))[0]

    def mean(self, column: str) -> float:
        """The mean of a number, one of COLUMNS, over the training steps of the newest stage; NaN if none is finite."""
        _, finite, total = self.log.sums.get(self.log.trained, {}).get(column, (0, 0, 0.0))
        return total / finite if finite else math.nan

    @property
    def name(self) -> str:
        """The name of the experiment; without one, of the folder."""
        return str(self.experiment.get("name") or self.path.resolve().name)

    @property
    def unit(self) -> str:
        """The kind of a token: "character", "word" or "symbol"."""
        return self.log.unit

    @property
    def chance(self) -> float | None:
        """The share of answers that are right by guessing, if the corpus is a synthetic task of the library."""
        return getattr(_source(self.experiment), "chance", None)

    @property
    def tokens_per_second(self) -> float | None:
        """The tokens of all training steps divided by the time that these took; None if no time was written down."""
        log = self.log
        return log.tokens / log.step_seconds if log.step_seconds > 0 else None

    @property
    def total_steps(self) -> int:
        """Steps of all stages together, as planned."""
        return sum(int(stage.get("steps", 0)) for stage in self.experiment.get("stages", []))

    @property
    def step(self) -> int:
        """The last step that was written down; 0 before the first."""
        return self.log.step

    @property
    def finished(self) -> bool:
        """Whether the training ran to its end."""
        return self.last("done") is not None

    @property
    def best(self) -> Event | None:
        """The validation of ``Run.best``: the last one that was the best so far; None if none had a finite score."""
        return self.log.best

    def has_tolerance(self, stage: str) -> bool:
        """Whether the solves of a stage aim at a tolerance; a network of fixed depth does not."""
        return has_tolerance(self.experiment, stage)


def has_tolerance(experiment: dict[str, Any], stage: Any) -> bool:
    """As ``Record.has_tolerance``, of the content of experiment.json."""
    parts = [part for part in experiment.get("stages", []) if part.get("name") == stage]
    stops = [part["method"].get("stop") or {} for part in parts if part.get("method")]
    return not parts or any(stop.get("rtol", 1) > 0 or stop.get("atol", 1) > 0 for stop in stops)


def read(path: Path | str) -> Record:
    """The record of the run in folder ``path``.

    Raises:
        UsageError: the folder is missing, or holds no run; names the nearest ones.
        ForeignFileError: a file in it is a symbolic link, a pipe or a device.
        ValueError: a file in it is damaged; names the file and the line.
    """
    path = path_of("read", path=path)
    run = Run(require(path))
    check_own(run.description)
    experiment = run.stored()
    contents = _contents(run.metrics, experiment, _unit(experiment, None))
    unit = _unit(experiment, contents.newest.get("start"))
    if unit != contents.unit:  # it was said late
        contents = _contents(run.metrics, experiment, unit)
    return Record(path=path, experiment=experiment, log=contents)


def _contents(file: Path, experiment: dict[str, Any], unit: str) -> Contents:
    contents = Contents(experiment, unit)
    for number, event in enumerate(events.stream(file), start=1):
        try:
            contents.add(event)
        except ABSURD as error:
            fault = f"{type(error).__name__}: {error}"
            raise ValueError(
                f"{file}, line {number} is no event that a training writes ({fault}); remove that line."
            ) from None
    contents.close()
    return contents


def _unit(experiment: dict[str, Any], start: Event | None) -> str:
    """The kind of a token: as the start of the log says, or else as the corpus says."""
    if start is not None:
        return str(start["corpus"]["unit"])
    corpus = experiment.get("corpus") or {}
    return str(corpus.get("unit") or getattr(_source(experiment), "unit", "token"))


def _source(experiment: dict[str, Any]) -> type[Source] | None:
    """The kind of the corpus, if it is one of the library."""
    kind = (experiment.get("corpus") or {}).get("kind")
    return next((source for source in CATALOGUE if source.__name__ == kind), None)
