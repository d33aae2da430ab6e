"""Trackers: where the numbers of a training go besides metrics.jsonl, one class per service."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from equilibria.errors import EquilibriaError
from equilibria.lm.runs.events import Event
from equilibria.lm.runs.run import Run

PROJECT = "equilibria"
"""The project of the runs at Trackio and Weights & Biases."""
_MODULES = {"tensorboard": "torch.utils.tensorboard", "trackio": "trackio", "wandb": "wandb"}
"""The module of each tracker."""


class TrackerError(EquilibriaError):
    """A tracker could not begin."""


class Tracker(ABC):
    """Receives the numbers of a training, in the order of its events."""

    @abstractmethod
    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take the numbers of one event, named event/field. Several events may have one step."""

    @abstractmethod
    def close(self) -> None:
        """Send what was not sent yet; nothing is logged afterwards."""


class TensorBoard(Tracker):
    """Writes scalars for TensorBoard into the folder ``tensorboard`` of the run.

    Args:
        folder: the folder that contains the files of the run at the moment.
        step: TensorBoard hides what was written there for later steps.
    """

    def __init__(self, folder: Path, *, step: int) -> None:
        writer = module_of("tensorboard").SummaryWriter
        self._writer = writer(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Add the numbers."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


class Trackio(Tracker):
    """Logs to Trackio, which keeps its files where it always does (``TRACKIO_DIR``); the run has the folder's name.

    Args:
        path: the run directory.
        config: the experiment as plain values.
        step: 0 begins a run at Trackio; otherwise the one of this name continues, if there is one.
    """

    def __init__(self, path: Path, config: Mapping[str, Any], *, step: int) -> None:
        resume = "allow" if step else "never"
        self._run = module_of("trackio").init(project=PROJECT, name=path.name, config=dict(config), resume=resume)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log the numbers."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Send the rest."""
        self._run.finish()


class WeightsAndBiases(Tracker):
    """Logs to Weights & Biases, which keeps its files where it always does (``WANDB_DIR``, ``WANDB_MODE``).

    Each process that trains is a run there; those that continue one training are in one group. Their axis is
    ``training_step``, since the service ignores a step that is smaller than the one before, as after a rollback.

    Args:
        path: the run directory.
        config: the experiment as plain values.
    """

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        wandb = module_of("wandb")
        settings = wandb.Settings(console="off")  # the display of the command is not for a log
        group = str(path.absolute())[-120:]
        self._run = wandb.init(project=PROJECT, name=path.name, group=group, config=dict(config), settings=settings)
        self._run.define_metric("*", step_metric="training_step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log the numbers."""
        self._run.log({"training_step": step, **values})

    def close(self) -> None:
        """Send the rest."""
        self._run.finish()


def tracker_of(name: str, run: Run, config: Mapping[str, Any], *, step: int) -> Tracker | None:
    """The tracker with this name, which takes the events after ``step``; None if the name is "none".

    Args:
        name: a value of ``Logging.tracker``.
        run: the run directory.
        config: the experiment as plain values.
        step: the step after which the training continues; 0 at the beginning.

    Raises:
        ModuleNotFoundError: its package is not installed.
        TrackerError: it cannot begin, for example without network or account.
    """
    if name == "none":
        return None
    module_of(name)
    try:
        if name == "tensorboard":
            return TensorBoard(run.folder, step=step)
        return Trackio(run.path, config, step=step) if name == "trackio" else WeightsAndBiases(run.path, config)
    except Exception as error:  # each package raises errors of its own
        hint = "; WANDB_MODE=offline needs neither network nor account" if name == "wandb" else ""
        raise TrackerError(
            f"The tracker {name} could not begin ({type(error).__name__}: {error}){hint}; correct that, or leave "
            "--training.tracker out."
        ) from error


def require(name: str) -> None:
    """Raise a ModuleNotFoundError if the package of a tracker is not installed; "none" needs none."""
    if name != "none":
        module_of(name)


def module_of(name: str) -> ModuleType:
    """The module of a tracker.

    Raises:
        ModuleNotFoundError: its package is not installed.
    """
    try:
        module = importlib.import_module(_MODULES[name])
        if module.__spec__ is not None and module.__spec__.origin is None:
            raise ModuleNotFoundError(name)  # a folder of that name, such as wandb leaves in the working directory
    except ModuleNotFoundError:
        message = f'--training.tracker {name} needs a package that is not installed: pip install "equilibria[{name}]"'
        raise ModuleNotFoundError(message, name=name) from None
    return module


def numbers_of(event: Event) -> dict[str, float]:
    """The numbers of an event, named event/field; those of nested objects event/field/part."""
    return {f"{event['event']}/{name}": value for name, value in _numbers(event)}


def _numbers(event: Event, prefix: str = "") -> Iterable[tuple[str, float]]:
    for name, value in event.items():
        if isinstance(value, dict) and name != "setting":  # settings are not measurements
            yield from _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and name != "step":
            yield prefix + name, float(value)
