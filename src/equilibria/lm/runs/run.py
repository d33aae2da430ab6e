"""Run: the directory that a training writes and every other command reads."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from equilibria.errors import UsageError
from equilibria.lm.corpora.language import Language
from equilibria.lm.experiments.experiment import Experiment
from equilibria.lm.experiments.serialise import from_json, kinds_in, to_json
from equilibria.lm.runs import checkpoint, events
from equilibria.lm.runs.checkpoint import Checkpoint, CheckpointError
from equilibria.lm.runs.events import Event
from equilibria.lm.runs.files import check_own, check_readable, discard, replace
from equilibria.lm.runs.folder import FILES, FOLDERS, GONE, LOCK, NEW, OLD, foreign_files
from equilibria.lm.suggestions import nearest

WITHOUT_INFLUENCE = ("corpus.root", "training.devices", "training.faults.keep", "training.log")
"""Settings and groups of them that do not change what is trained; those of the devices may change the last bits."""
FORMAT = 3
"""Of experiment.json; version 0.1 wrote no number."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A run directory: experiment.json, corpus.json, metrics.jsonl, checkpoints/ and report/."""

    path: Path
    """The directory."""
    replacing: bool = False
    """The run is written beside the one that is there, until ``settle`` puts it into its place."""

    @classmethod
    def start(cls, path: Path, experiment: Experiment, *, resume: bool = False, overwrite: bool = False) -> Run:
        """The run of ``experiment`` in the folder ``path``, new or, with ``resume``, the one that is there.

        With ``resume`` a folder without a run starts a new one, so that the same command can be given again whenever
        it was stopped; what has no influence on the weights may differ then, and experiment.json is rewritten. With
        ``overwrite`` the run that is there stays until ``settle`` puts the new one into its place.

        Raises:
            ValueError: the folder already holds a run, or files of another kind, or the run of another experiment; or
                something in it leads out of it.
        """
        if resume and overwrite:
            raise ValueError("--resume goes on with a run and --overwrite removes it; give one of the two.")
        run = cls(path)
        run.check_own()
        run._recover()
        run.give_up()  # left by a process that was killed before its first checkpoint
        if run.description.is_file() and resume:
            run._go_on(experiment)
            return run
        if run.description.is_file():
            if not overwrite:
                raise ValueError(
                    f"{path} already holds a run; continue it with --resume, choose another folder with --out, or "
                    "replace it with --overwrite."
                )
            run._check_replaceable()
            run = cls(path, replacing=True)
            (path / NEW).mkdir()
        elif path.exists() and (not path.is_dir() or any(not entry.name.startswith(".") for entry in path.iterdir())):
            raise ValueError(f"{path} exists and is no run; choose a folder that is new or empty with --out.")
        path.mkdir(parents=True, exist_ok=True)
        run._describe(experiment)
        return run

    @classmethod
    def open(cls, path: Path, *, replacing: bool = False) -> Run:
        """The run in the folder ``path``, or the one that is ``replacing`` it.

        Raises:
            FileNotFoundError: there is none.
        """
        run = cls(path, replacing)
        for name in (*FILES, *FOLDERS):
            check_readable(path / name)
        if not run.description.is_file():
            raise FileNotFoundError(f"{path} holds no run: it has no experiment.json; name one that `train` wrote.")
        return run

    @property
    def folder(self) -> Path:
        """Where its files are now."""
        beside = self.path / NEW
        return beside if self.replacing and beside.is_dir() else self.path

    def check_own(self) -> None:
        """Raise a ValueError if something that would be written leads out of the folder, or would be waited for."""
        for name in (*FILES, *FOLDERS, LOCK, NEW, OLD, GONE):
            check_own(self.path / name)

    def settle(self) -> None:
        """Put the run into the place of the one that it replaces, which goes; a crash on the way is recovered from."""
        if not (self.replacing and (self.path / NEW).is_dir()):
            return
        self._check_replaceable()
        (self.path / OLD).mkdir(exist_ok=True)
        self._recover()

    def give_up(self) -> None:
        """Forget a run that was to replace another one and has not done so."""
        if not (self.path / OLD).exists() and not (self.path / GONE).exists():
            discard(self.path / NEW)

    def _recover(self) -> None:
        """Take every step of ``settle`` that was not taken yet; which is next can be read from the names."""
        new, old, gone = (self.path / name for name in (NEW, OLD, GONE))
        if old.is_dir():
            for name in (*FOLDERS, *reversed(FILES)):
                if (self.path / name).exists():
                    (self.path / name).rename(old / name)
            old.rename(gone)
        if gone.is_dir():
            for entry in sorted(new.iterdir() if new.is_dir() else (), key=lambda entry: entry.name in FILES[:1]):
                entry.rename(self.path / entry.name)
            discard(new)
            discard(gone)

    @property
    def description(self) -> Path:
        """experiment.json."""
        return self.folder / "experiment.json"

    @property
    def metrics(self) -> Path:
        """metrics.jsonl."""
        return self.folder / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.folder / "checkpoints"

    @property
    def report(self) -> Path:
        """The folder of the report."""
        return self.folder / "report"

    @property
    def language(self) -> Language | None:
        """What is kept of the corpus in corpus.json; None in a run of a version that kept nothing.

        Raises:
            ValueError: it is damaged.
        """
        file = self.folder / "corpus.json"
        if not file.is_file():
            return None
        try:
            return Language.from_json(json.loads(file.read_text(encoding="utf-8")))
        except ValueError as error:
            raise ValueError(f"{file} is damaged ({error}); take it from a copy, or train again.") from None

    def keep(self, language: Language) -> None:
        """Write corpus.json."""
        replace(self.folder / "corpus.json", json.dumps(language.to_json(), ensure_ascii=False) + "\n", forced=True)

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
        events.append(self.metrics, event)

    def events(self) -> list[Event]:
        """The lines of metrics.jsonl."""
        return events.read(self.metrics)

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
        best = newest.state.get("best")
        if best is None or best["step"] == newest.step:
            return newest
        return checkpoint.load(self.checkpoints / checkpoint.name_of(best["step"]))

    def _describe(self, experiment: Experiment) -> None:
        replace(self.description, json.dumps({"format": FORMAT, **to_json(experiment)}, indent=2) + "\n", forced=True)

    def _check_replaceable(self) -> None:
        """Raise a ValueError unless the folder is a run of this library and holds no file of somebody else."""
        try:
            written = json.loads((self.path / "experiment.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            written = None
        if not isinstance(written, dict) or written.get("kind") != "Experiment":
            raise ValueError(
                f"{self.path}/experiment.json was not written by equilibria, and --overwrite replaces its runs only; "
                "choose another folder with --out."
            )
        if foreign := foreign_files(self.path):
            more = f" and {len(foreign) - 5} more" if len(foreign) > 5 else ""
            raise ValueError(
                f"{self.path} holds {', '.join(foreign[:5])}{more} beside a run, and --overwrite replaces runs only; "
                "move that away, or choose another folder with --out."
            )

    def _go_on(self, experiment: Experiment) -> None:
        """Take over what may change in a run that goes on, and refuse the rest."""
        # Read as an experiment, since a run of an older version lacks fields, which have their defaults.
        before = to_json(self.experiment(extra=kinds_in(experiment)))
        stored, asked = dict(_leaves(before)), dict(_leaves(to_json(experiment)))
        changed = [name for name in sorted(stored.keys() | asked.keys()) if stored.get(name) != asked.get(name)]
        for name in changed:
            if not f"{name}.".startswith(tuple(f"{free}." for free in WITHOUT_INFLUENCE)):
                raise ValueError(
                    f"{self.path} was started with {name} = {stored.get(name)!r} and is to be continued with "
                    f"{asked.get(name)!r}; give it the value it had, or start a new run with another --out."
                )
        if changed:
            self._describe(experiment)


OF_A_RANK = frozenset(
    {"corpus.root", "training.devices.device", "training.devices.threads", "training.log.tensorboard"}
)
"""Fields that may have different values in the processes of one training."""


def plain_values(experiment: Experiment) -> dict[str, Any]:
    """Every plain value of an experiment by its name, but those in which the processes of one training may differ."""
    return {name: value for name, value in _leaves(to_json(experiment)) if name not in OF_A_RANK}


def _leaves(value: Any, name: str = "") -> Iterable[tuple[str, Any]]:
    """Every plain value of nested dicts and lists, with its path."""
    if not isinstance(value, dict | list):
        yield name, value
        return
    for key, part in value.items() if isinstance(value, dict) else enumerate(value):
        yield from _leaves(part, f"{name}.{key}" if name else str(key))


def require(path: Path) -> Path:
    """``path``, if it is a run directory; otherwise one sentence that names the runs nearby."""
    if (path / "experiment.json").is_file():
        return path
    found = sorted(str(file.parent) for base in {path.parent, Path("runs")} for file in base.glob("*/experiment.json"))
    fault = "holds no run (no experiment.json)" if path.is_dir() else "does not exist"
    hint = nearest(str(path), found) or (f"there are the runs {', '.join(found[:5])}." if found else "")
    raise UsageError(f"{path} {fault}; {hint or 'a run is a folder that `equilibria train` has written.'}")
