"""Run: the directory that a training writes and all other commands read."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from equilibria.errors import UsageError
from equilibria.lm.corpora.language import Language
from equilibria.lm.experiments.experiment import Experiment
from equilibria.lm.experiments.serialise import from_json, kinds_in, to_json
from equilibria.lm.paths import path_of
from equilibria.lm.runs import checkpoint, events
from equilibria.lm.runs.checkpoint import Checkpoint, CheckpointError
from equilibria.lm.runs.events import Event
from equilibria.lm.runs.files import check_own, check_readable, discard, replace, undamaged
from equilibria.lm.runs.folder import FILES, FOLDERS, GONE, LOCK, NEW, OLD, foreign_files
from equilibria.lm.runs.shipped import check_writable

WITHOUT_INFLUENCE = ("corpus.root", "training.devices", "training.faults.keep", "training.log")
"""Settings, or groups of them, that may change when a run continues; those of the devices may change the last bits."""
Which = Literal["best", "last"]
"""The checkpoint with the best validation (see ``Run.best``), or the newest one."""
_NO_RUN = "{path} exists and is not a run; choose a new or empty folder with --out."
FORMAT = 3
"""The version of the format of experiment.json, which is written there; equilibria 0.1 wrote no version."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A run directory: experiment.json, corpus.json, metrics.jsonl, checkpoints/ and report/."""

    path: Path
    """The directory."""
    replacing: bool = False
    """True while the run is written beside an old one, which ``settle`` replaces."""

    @classmethod
    def start(cls, path: Path | str, experiment: Experiment, *, resume: bool = False, overwrite: bool = False) -> Run:
        """A new run of ``experiment`` in the folder ``path``, or, with ``resume``, the existing one.

        With ``resume`` and no run in the folder, a new run starts, so that the same command can be repeated whenever it
        was stopped. Settings without influence on the weights may then differ; ``go_on`` stores them. With
        ``overwrite`` an existing run stays until ``settle`` replaces it by the new one.

        Raises:
            UsageError: the folder is part of the library.
            ValueError: the folder contains a run, the run of another experiment, other files, or a symbolic link.
        """
        if resume and overwrite:
            raise ValueError("--resume continues a run and --overwrite replaces it; give one of the two.")
        path = path_of("Run.start", path=path)
        check_writable(path, advice="train into another folder with --out.")
        if (path.exists() or path.is_symlink()) and not path.is_dir():
            raise ValueError(_NO_RUN.format(path=path))
        run = cls(path)
        run.check_own()
        run._recover()
        run.give_up()  # removes the remains of a process that was killed before its first checkpoint
        if run.description.is_file() and resume:
            run._changed(experiment)
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
        elif path.exists() and any(not entry.name.startswith(".") for entry in path.iterdir()):
            raise ValueError(_NO_RUN.format(path=path))
        path.mkdir(parents=True, exist_ok=True)
        run._describe(experiment)
        return run

    @classmethod
    def open(cls, path: Path | str, *, replacing: bool = False) -> Run:
        """The run in the folder ``path``, or the new run that is ``replacing`` it.

        Raises:
            FileNotFoundError: the folder contains no run.
        """
        path = path_of("Run.open", path=path)
        run = cls(path, replacing)
        for name in (*FILES, *FOLDERS):
            check_readable(path / name)
        if not run.description.is_file():
            raise FileNotFoundError(f"{path} holds no run: it has no experiment.json; name one that `train` wrote.")
        return run

    @property
    def folder(self) -> Path:
        """The folder that contains its files at the moment."""
        beside = self.path / NEW
        return beside if self.replacing and beside.is_dir() else self.path

    def check_own(self) -> None:
        """Raise a ValueError if a file or folder of the run is a symbolic link, a pipe, a socket or a device."""
        for name in (*FILES, *FOLDERS, LOCK, NEW, OLD, GONE):
            check_own(self.path / name)

    def settle(self) -> None:
        """Replace the old run by this one; after a crash, the next ``start`` completes the replacement."""
        if not (self.replacing and (self.path / NEW).is_dir()):
            return
        self._check_replaceable()
        (self.path / OLD).mkdir(exist_ok=True)
        self._recover()

    def give_up(self) -> None:
        """Remove an unfinished run that would have replaced another one."""
        if not (self.path / OLD).exists() and not (self.path / GONE).exists():
            discard(self.path / NEW)

    def _recover(self) -> None:
        """Do all steps of ``settle`` that are not done yet; the names of the folders tell which step is next."""
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
        """The language of the run, from corpus.json; None in runs of versions that did not write this file.

        Raises:
            ValueError: the file is damaged.
        """
        file = self.folder / "corpus.json"
        if not file.is_file():
            return None
        with undamaged(file):
            return Language.from_json(json.loads(file.read_text(encoding="utf-8")))

    def keep(self, language: Language) -> None:
        """Write corpus.json."""
        replace(self.folder / "corpus.json", json.dumps(language.to_json(), ensure_ascii=False) + "\n", forced=True)

    def experiment(self, *, extra: Iterable[type] = ()) -> Experiment:
        """The experiment of the run; ``extra`` are the dataclasses from outside the library that it uses."""
        return from_json(self.stored(), extra=extra)

    def stored(self) -> dict[str, Any]:
        """The content of experiment.json: nested objects, each with its "kind".

        Raises:
            ValueError: the file is damaged, or another version wrote it.
        """
        with undamaged(self.description):
            found = json.loads(self.description.read_text(encoding="utf-8"))
            if not isinstance(found, dict):
                raise ValueError("not a JSON object")
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
        """The newest good checkpoint, None if there are no checkpoints; a warning names damaged newer ones."""
        return checkpoint.newest(self.checkpoints)

    def best(self) -> Checkpoint:
        """The checkpoint with the best validation of the last stage and the stages before it that solve alike.

        The training has chosen it, and says so in every checkpoint; it is the newest one if none has a finite score.
        Raises the errors of ``chosen``.
        """
        newest = self.chosen("last")
        best = newest.state.get("best")
        if best is None or best["step"] == newest.step:
            return newest
        return checkpoint.load(self.checkpoints / checkpoint.name_of(best["step"]))

    def chosen(self, which: Which) -> Checkpoint:
        """The best or the newest good checkpoint.

        Raises:
            CheckpointError: the run has no checkpoint yet, or the chosen one is damaged.
            UsageError: ``which`` is neither of the two.
        """
        if which not in typing.get_args(Which):
            raise UsageError(f"checkpoint={which!r}: it is 'best' or 'last'; try 'best'.")
        found = self.best() if which == "best" else self.newest()
        if found is None:
            raise CheckpointError(f"{self.path} has no good checkpoint yet: continue the training with --resume.")
        return found

    def _describe(self, experiment: Experiment) -> None:
        replace(self.description, json.dumps({"format": FORMAT, **to_json(experiment)}, indent=2) + "\n", forced=True)

    def _check_replaceable(self) -> None:
        """Raise a ValueError unless the folder is a run of this library without foreign files."""
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
                "move these elsewhere, or choose another folder with --out."
            )

    def go_on(self, experiment: Experiment) -> None:
        """Store the settings that may change when a run continues; a ValueError if other settings have changed."""
        if self._changed(experiment):
            self._describe(experiment)

    def _changed(self, experiment: Experiment) -> bool:
        """True if a setting differs from the stored one; a ValueError if it influences the weights."""
        # Read as an experiment, because runs of older versions lack fields, which then get their defaults.
        before = to_json(self.experiment(extra=kinds_in(experiment)))
        stored, asked = dict(_leaves(before)), dict(_leaves(to_json(experiment)))
        changed = [name for name in sorted(stored.keys() | asked.keys()) if stored.get(name) != asked.get(name)]
        for name in sorted(changed, key=lambda name: (not name.endswith(".kind"), name)):  # a part before its fields
            if not f"{name}.".startswith(tuple(f"{free}." for free in WITHOUT_INFLUENCE)):
                raise ValueError(
                    f"{self.path} was started with {name} = {stored.get(name)!r} and cannot be continued with "
                    f"{asked.get(name)!r}; give the old value, or start a new run with another --out."
                )
        return bool(changed)


OF_A_RANK = frozenset(
    {
        "corpus.root",
        "training.devices.device",
        "training.devices.threads",
        "training.log.tracker",
        "training.log.tensorboard",
    }
)
"""Fields whose values may differ between the processes of one training."""


def plain_values(experiment: Experiment) -> dict[str, Any]:
    """All plain values of an experiment by path, except those that may differ between processes of one training."""
    return {name: value for name, value in _leaves(to_json(experiment)) if name not in OF_A_RANK}


def _leaves(value: Any, name: str = "") -> Iterable[tuple[str, Any]]:
    """All plain values in nested dicts and lists, with their paths."""
    if not isinstance(value, dict | list):
        yield name, value
        return
    for key, part in value.items() if isinstance(value, dict) else enumerate(value):
        yield from _leaves(part, f"{name}.{key}" if name else str(key))
