"""A run directory as the commands read it: experiment.json and metrics.jsonl, nothing else."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from equilibria.commands import formats
from equilibria.commands.errors import UsageError
from equilibria.training.experiment import SOLVES
from equilibria.training.metrics import Event
from equilibria.training.names import nearest
from equilibria.training.run import Run
from equilibria.training.sources import CATALOGUE


@dataclasses.dataclass(frozen=True)
class Record:
    """What a run has written so far."""

    path: Path
    """The run directory."""
    experiment: dict[str, Any]
    """experiment.json: nested objects, each with its "kind"."""
    events: tuple[Event, ...]
    """metrics.jsonl, in the order in which things happened."""

    def of(self, kind: str) -> list[Event]:
        """The events of one kind, oldest first."""
        return [event for event in self.events if event.get("event") == kind]

    def last(self, kind: str) -> Event | None:
        """The newest event of one kind, None if there is none."""
        return next((event for event in reversed(self.events) if event.get("event") == kind), None)

    @property
    def name(self) -> str:
        """The name of the experiment; without one, of the folder."""
        return str(self.experiment.get("name") or self.path.resolve().name)

    @property
    def unit(self) -> str:
        """What one token is: "character", "word" or "symbol"."""
        start = self.last("start")
        if start is not None:
            return str(start["corpus"]["unit"])
        corpus = self.experiment.get("corpus") or {}  # a run that has not begun does not say it itself
        source = next((source for source in CATALOGUE if source.__name__ == corpus.get("kind")), None)
        return str(corpus.get("unit") or getattr(source, "unit", "token"))

    @property
    def total_steps(self) -> int:
        """Steps of all stages together, as planned."""
        return sum(int(stage.get("steps", 0)) for stage in self.experiment.get("stages", []))

    @property
    def step(self) -> int:
        """The last step that was written down; 0 before the first."""
        return max((int(event.get("step", 0)) for event in self.events), default=0)

    @property
    def finished(self) -> bool:
        """Whether the training ran to its end."""
        return self.last("done") is not None

    @property
    def best(self) -> Event | None:
        """The validation with the fewest nats in the newest stage that has one, or in those before that solve alike."""
        valid = [event for event in self.of("valid") if math.isfinite(formats.plain(event["nats"]))]
        alike = self._alike(valid[-1].get("stage")) if valid else set()
        return min((event for event in valid if event.get("stage") in alike), key=lambda e: e["nats"], default=None)

    def _alike(self, stage: Any) -> set[Any]:
        """The stage, and the ones before it with the same solver, stop and gradient rule."""
        names, how = {stage}, None
        for part in reversed(self.experiment.get("stages", [])):
            mine = [part.get(name) for name in SOLVES]
            if part.get("name") == stage:
                how = mine
            elif how is not None and mine != how:
                break
            elif how is not None:
                names.add(part.get("name"))
        return names

    @property
    def last_stage(self) -> list[Event]:
        """The training steps of the newest stage that has any."""
        steps = self.of("step")
        return [event for event in steps if event.get("stage") == steps[-1].get("stage")] if steps else []

    def has_tolerance(self, stage: str) -> bool:
        """Whether the solves of a stage aim at a tolerance; a network of fixed depth does not."""
        parts = [part for part in self.experiment.get("stages", []) if part.get("name") == stage]
        stops = [part["method"].get("stop") or {} for part in parts if part.get("method")]
        return not parts or any(stop.get("rtol", 1) > 0 or stop.get("atol", 1) > 0 for stop in stops)


def read(path: Path) -> Record:
    """The record of the run in folder ``path``.

    Raises:
        UsageError: the folder is missing, or holds no run; names the nearest ones.
        ValueError: a file in it is damaged; names the file and the line.
    """
    run = Run(require(path))
    return Record(path=path, experiment=run.stored(), events=tuple(run.events()))


def require(path: Path) -> Path:
    """``path``, if it is a run directory; otherwise one sentence that names the runs nearby."""
    if (path / "experiment.json").is_file():
        return path
    found = sorted(str(file.parent) for base in {path.parent, Path("runs")} for file in base.glob("*/experiment.json"))
    fault = "holds no run (no experiment.json)" if path.is_dir() else "does not exist"
    hint = nearest(str(path), found) or (f"there are the runs {', '.join(found[:5])}." if found else "")
    raise UsageError(f"{path} {fault}; {hint or 'a run is a folder that `equilibria train` has written.'}")
