"""Run: the directory that a training writes and every other command reads."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from equilibria.training import checkpoint, metrics
from equilibria.training.checkpoint import Checkpoint, CheckpointError
from equilibria.training.experiment import Experiment
from equilibria.training.metrics import Event
from equilibria.training.serialise import from_json, to_json


@dataclasses.dataclass(frozen=True)
class Run:
    """A run directory: experiment.json, metrics.jsonl, checkpoints/ and report/."""

    path: Path
    """The directory."""

    @classmethod
    def start(cls, path: Path, experiment: Experiment, *, resume: bool = False) -> Run:
        """The run of ``experiment`` in the folder ``path``, new or, with ``resume``, the one that is there.

        With ``resume`` a folder without a run starts a new one, so that the same command can be given again whenever
        it was stopped.

        Raises:
            ValueError: the folder already holds a run, or files of another kind, or the run of another experiment.
        """
        run = cls(path)
        if run.description.is_file():
            if not resume:
                raise ValueError(
                    f"{path} already holds a run; continue it with --resume, or choose another folder with --out."
                )
            run._refuse_changes(experiment)
            return run
        if path.exists() and (not path.is_dir() or any(not entry.name.startswith(".") for entry in path.iterdir())):
            raise ValueError(f"{path} exists and is no run; choose a folder that is new or empty with --out.")
        path.mkdir(parents=True, exist_ok=True)
        run._describe(experiment)
        return run

    @classmethod
    def open(cls, path: Path) -> Run:
        """The run in the folder ``path``.

        Raises:
            FileNotFoundError: there is none.
        """
        run = cls(path)
        if not run.description.is_file():
            raise FileNotFoundError(f"{path} holds no run: it has no experiment.json; name one that `train` wrote.")
        return run

    @property
    def description(self) -> Path:
        """experiment.json."""
        return self.path / "experiment.json"

    @property
    def metrics(self) -> Path:
        """metrics.jsonl."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def report(self) -> Path:
        """The folder of the report."""
        return self.path / "report"

    def experiment(self, *, extra: Iterable[type] = ()) -> Experiment:
        """What is trained; ``extra`` holds the dataclasses from outside the library that it uses."""
        return from_json(self._stored(), extra=extra)

    def append(self, event: Event) -> None:
        """Add one line to metrics.jsonl."""
        metrics.append(self.metrics, event)

    def events(self) -> list[Event]:
        """The lines of metrics.jsonl."""
        return metrics.read(self.metrics)

    def newest(self) -> Checkpoint | None:
        """The newest good checkpoint, None if there is none yet; damaged newer ones are named in a warning."""
        return checkpoint.newest(self.checkpoints)

    def best(self) -> Checkpoint:
        """The checkpoint with the best validation of the last stage.

        Raises:
            CheckpointError: the run has no checkpoint yet, or the best one is damaged.
        """
        newest = self.newest()
        if newest is None:
            raise CheckpointError(f"{self.path} has no good checkpoint yet: continue the training with --resume.")
        best = newest.state["best"]
        if best is None or best["step"] == newest.step:
            return newest
        return checkpoint.load(self.checkpoints / f"step-{best['step']:08d}")

    def _describe(self, experiment: Experiment) -> None:
        beside = self.path / ".experiment.json.new"
        checkpoint.write_text(beside, json.dumps(to_json(experiment), indent=2) + "\n")
        checkpoint.force(beside)
        beside.replace(self.description)
        checkpoint.force(self.path)

    def _stored(self) -> dict[str, Any]:
        try:
            return json.loads(self.description.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{self.description} is damaged ({error}); take it from a copy, or train anew.") from None

    def _refuse_changes(self, experiment: Experiment) -> None:
        stored, asked = dict(_leaves(self._stored())), dict(_leaves(to_json(experiment)))
        for name in sorted(stored.keys() | asked.keys()):
            if stored.get(name) != asked.get(name):
                raise ValueError(
                    f"{self.path} was started with {name} = {stored.get(name)!r} and is to be continued with "
                    f"{asked.get(name)!r}; give it the value it had, or start a new run with another --out."
                )


def _leaves(value: Any, name: str = "") -> Iterable[tuple[str, Any]]:
    """Every plain value of nested dicts and lists, with its path."""
    if not isinstance(value, dict | list):
        yield name, value
        return
    for key, part in value.items() if isinstance(value, dict) else enumerate(value):
        yield from _leaves(part, f"{name}.{key}" if name else str(key))
