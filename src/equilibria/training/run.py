"""Run: the directory that a training writes and every other command reads."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from equilibria.training import checkpoint, metrics
from equilibria.training.checkpoint import Checkpoint, CheckpointError
from equilibria.training.experiment import Experiment
from equilibria.training.metrics import Event
from equilibria.training.serialise import from_json, kinds_in, to_json

WITHOUT_INFLUENCE = frozenset(
    {
        "corpus.root",
        "training.accumulate",
        "training.compile",
        "training.device",
        "training.keep",
        "training.log_every",
        "training.measure_memory",
        "training.memory_depths",
        "training.parallel",
        "training.rank_timeout",
        "training.tensorboard",
        "training.threads",
    }
)
"""Fields of an experiment that do not change what is trained; device and threads may change the last bits."""
FORMAT = 2
"""Of experiment.json; 0.1 wrote no number."""
_LOCK = ".lock"
_BESIDE = (".experiment.json.new", ".metrics.jsonl.new")
"""Files that are on their way to replace others."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A run directory: experiment.json, metrics.jsonl, checkpoints/ and report/."""

    path: Path
    """The directory."""

    @classmethod
    def start(cls, path: Path, experiment: Experiment, *, resume: bool = False, overwrite: bool = False) -> Run:
        """The run of ``experiment`` in the folder ``path``, new or, with ``resume``, the one that is there.

        With ``resume`` a folder without a run starts a new one, so that the same command can be given again whenever
        it was stopped; what has no influence on the weights may differ then, and experiment.json is rewritten. With
        ``overwrite`` the run that is there is removed first.

        Raises:
            ValueError: the folder already holds a run, or files of another kind, or the run of another experiment.
        """
        if resume and overwrite:
            raise ValueError("--resume goes on with a run and --overwrite removes it; give one of the two.")
        run = cls(path)
        if run.description.is_file() and resume:
            run._go_on(experiment)
            return run
        if run.description.is_file():
            if not overwrite:
                raise ValueError(
                    f"{path} already holds a run; continue it with --resume, choose another folder with --out, or "
                    "replace it with --overwrite."
                )
            run._remove()
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

    @classmethod
    @contextlib.contextmanager
    def locked(cls, path: Path) -> Iterator[None]:
        """Within it no other process can lock the run directory ``path``, which is made if there is none.

        The lock ends with the process, however that ends.

        Raises:
            ValueError: another process has it.
        """
        made = not path.exists()
        path.mkdir(parents=True, exist_ok=True)
        with (path / _LOCK).open("a+", encoding="utf-8") as file:
            if not _lock(file):
                file.seek(0)
                holder = file.read().strip() or "another process"
                raise ValueError(
                    f"{path} is in use by {holder}; wait until it ends, or choose another folder with --out."
                )
            file.truncate(0)
            file.write(f"process {os.getpid()}")
            file.flush()
            try:
                yield
            finally:
                if made and [entry.name for entry in path.iterdir()] == [_LOCK]:  # nothing was started in it
                    (path / _LOCK).unlink()
                    path.rmdir()

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
        return from_json(self.stored(), extra=extra)

    def stored(self) -> dict[str, Any]:
        """What experiment.json says: nested objects, each with its "kind".

        Raises:
            ValueError: it is damaged, or another version wrote it.
        """
        try:
            found = json.loads(self.description.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{self.description} is damaged ({error}); take it from a copy, or train again.") from None
        if not isinstance(found, dict):
            raise ValueError(f"{self.description} is damaged (no object); take it from a copy, or train again.")
        written = found.pop("format", None)
        if written != FORMAT:
            author = "version 0.1" if written is None else f"another version (its format is {written!r})"
            raise ValueError(
                f"{self.path} was written by {author} of equilibria, and this version reads format {FORMAT}; use the "
                "version that wrote it, or train again."
            )
        return found

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
        """The checkpoint with the best validation of the last stage, or of those before it that solve alike.

        Raises:
            CheckpointError: the run has no checkpoint yet, or the best one is damaged.
        """
        newest = self.newest()
        if newest is None:
            raise CheckpointError(f"{self.path} has no good checkpoint yet: continue the training with --resume.")
        best = newest.state["best"]
        if best is None or best["step"] == newest.step:
            return newest
        return checkpoint.load(self.checkpoints / checkpoint.name_of(best["step"]))

    def _describe(self, experiment: Experiment) -> None:
        beside = self.path / _BESIDE[0]
        checkpoint.write_text(beside, json.dumps({"format": FORMAT, **to_json(experiment)}, indent=2) + "\n")
        checkpoint.force(beside)
        beside.replace(self.description)
        checkpoint.force(self.path)

    def _remove(self) -> None:
        """Remove everything that a run has written, experiment.json last; nothing if anything else is there."""
        exported = self.path / "model.safetensors"
        written = (self.checkpoints, self.report, self.path / "tensorboard", exported, self.metrics, self.description)
        there = {entry.name for entry in self.path.iterdir() if not entry.name.startswith(".")}
        if foreign := sorted(there - {path.name for path in written}):
            raise ValueError(
                f"{self.path} holds {', '.join(foreign)} beside a run, and --overwrite removes runs only; move that "
                "away, or choose another folder with --out."
            )
        for path in (*(self.path / name for name in _BESIDE), *written):
            checkpoint.discard(path)

    def _go_on(self, experiment: Experiment) -> None:
        """Take over what may change in a run that goes on, and refuse the rest."""
        # Read as an experiment, since a run of an older version lacks fields, which have their defaults.
        before = to_json(self.experiment(extra=kinds_in(experiment)))
        stored, asked = dict(_leaves(before)), dict(_leaves(to_json(experiment)))
        changed = [name for name in sorted(stored.keys() | asked.keys()) if stored.get(name) != asked.get(name)]
        for name in changed:
            if ".".join(name.split(".")[:2]) not in WITHOUT_INFLUENCE:
                raise ValueError(
                    f"{self.path} was started with {name} = {stored.get(name)!r} and is to be continued with "
                    f"{asked.get(name)!r}; give it the value it had, or start a new run with another --out."
                )
        if changed:
            self._describe(experiment)


def _lock(file: IO[str]) -> bool:
    """Whether this process now has the file to itself."""
    if sys.platform == "win32":
        import msvcrt

        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _leaves(value: Any, name: str = "") -> Iterable[tuple[str, Any]]:
    """Every plain value of nested dicts and lists, with its path."""
    if not isinstance(value, dict | list):
        yield name, value
        return
    for key, part in value.items() if isinstance(value, dict) else enumerate(value):
        yield from _leaves(part, f"{name}.{key}" if name else str(key))
