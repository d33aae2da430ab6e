"""Checkpoints: one folder each, which is either complete or absent, and is verified before anything is unpickled.

    checkpoints/step-00000500/model.safetensors      the weights
                              memory.safetensors     the memory of the streams after their last segment
                              optimiser.pt           optimiser and random generators, read with weights_only=True
                              state.json             step, position, best value, and the SHA-256 of the other files

A checkpoint is written under a temporary name; it is renamed after all files and the folder have reached the disk.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import pickle
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from equilibria.errors import EquilibriaError
from equilibria.lm.runs.files import discard, errors_of_the_disk, force
from equilibria.lm.runs.pieces import Piece, whole
from equilibria.lm.runs.state import check_kind, check_state

FORMAT = "equilibria checkpoint 1"
_MODEL, _MEMORY, _OPTIMISER, _STATE = "model.safetensors", "memory.safetensors", "optimiser.pt", "state.json"
_NAME = re.compile(r"step-(\d{8,})")
SHARDS = "shards"
"""The folder that replaces model.safetensors in a checkpoint that several ranks have written together."""
_TEMPORARY = ".unfinished-"
_log = logging.getLogger(__name__)


class CheckpointError(EquilibriaError):
    """A checkpoint is damaged, or the folder contains none; the message names the checkpoint to use instead."""


@dataclasses.dataclass(frozen=True, eq=False)
class Checkpoint:
    """Everything that a run needs to continue as if it had never stopped."""

    step: int
    """Number of training steps done."""
    model: Mapping[str, Tensor | Piece]
    """The weights by name, each tensor once; a sharded checkpoint has pieces, which are read on demand."""
    memory: Mapping[str, Tensor]
    """The memory of the streams as named tensors; empty if there is none."""
    optimiser: Mapping[str, Any]
    """The optimiser's ``state_dict`` and the states of the random generators: tensors and plain values."""
    state: Mapping[str, Any]
    """Plain values: stage, position in the stream, best validation, seconds."""


def name_of(step: int) -> str:
    """The name of the folder of a step's checkpoint."""
    return f"step-{step:08d}"


def save(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write the checkpoint to a folder ``step-…`` inside ``folder``, replacing an old one; returns its path."""
    from safetensors.torch import save_file

    with being_written(folder, checkpoint) as unfinished:
        save_file(_plain(checkpoint.model), unfinished / _MODEL)
        write_rest(unfinished, checkpoint.memory, checkpoint.optimiser)
    return folder / name_of(checkpoint.step)


@contextlib.contextmanager
def being_written(folder: Path, checkpoint: Checkpoint) -> Iterator[Path]:
    """Yield a temporary folder for the checkpoint's tensors; it becomes the checkpoint, or is removed on an error."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / name_of(checkpoint.step)
    unfinished = folder / f"{_TEMPORARY}{target.name}-{os.getpid()}"
    discard(unfinished)
    unfinished.mkdir()
    try:
        with errors_of_the_disk(folder):
            yield unfinished
            state = {"format": FORMAT, "step": checkpoint.step, **checkpoint.state}
            state["files"] = {name: sha256_of(unfinished / name) for name in _files_in(unfinished)}
            text = json.dumps({"state": state, "sha256": _digest(state)}, indent=1)
            (unfinished / _STATE).write_text(text, encoding="utf-8", newline="\n")
            for entry in [*unfinished.rglob("*"), unfinished]:
                force(entry)
            discard(target)  # a damaged one, if the run returned to an earlier checkpoint
            unfinished.rename(target)
    except Exception:
        shutil.rmtree(unfinished, ignore_errors=True)  # frees space on a full disk
        raise
    force(folder)


def write_rest(unfinished: Path, memory: Mapping[str, Tensor], optimiser: Mapping[str, Any]) -> None:
    """Write the memory and the optimiser: all tensors except the weights."""
    from safetensors.torch import save_file

    save_file(_plain(memory), unfinished / _MEMORY)
    with (unfinished / _OPTIMISER).open("wb") as file:  # for a path torch.save hides the system's error
        torch.save(dict(optimiser), file)


def load(folder: Path, *, verified: bool = False) -> Checkpoint:
    """The checkpoint in ``folder``; the SHA-256 of all files are checked before any file is opened.

    Args:
        folder: a folder that ``save`` has written.
        verified: skip the SHA-256, since another process has just checked them.

    Raises:
        CheckpointError: a file is missing or changed, or the folder is not a checkpoint; names the newest good one.
    """
    try:
        return _load(folder, verify(folder, sums=not verified))
    except CheckpointError as error:
        others = (other for other in reversed(all_in(folder.parent)) if other != folder and _is_good(other))
        other = next(others, None)
        hint = f"the newest good one is {other}" if other else "there is no good one in this run: start a new run"
        raise CheckpointError(f"{error}; {hint}.") from None


def _load(folder: Path, state: Mapping[str, Any]) -> Checkpoint:
    """The checkpoint, with its content checked: right sums prove nothing about a checkpoint from a stranger."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    reading = _OPTIMISER
    try:
        optimiser = torch.load(folder / _OPTIMISER, weights_only=True, map_location="cpu")
        check_kind(optimiser, dict, "names")
        if _MODEL in state["files"]:
            reading = _MODEL
            model = load_file(folder / _MODEL)
        else:
            from equilibria.lm.runs.shards import load_sharded

            reading = SHARDS
            model, optimiser = load_sharded(folder / SHARDS, optimiser)
        reading = _MEMORY
        memory = load_file(folder / _MEMORY)
        reading = _STATE
        check_state(state)
        return Checkpoint(
            step=check_kind(state["step"], int, "a number of steps"),
            model=model,
            memory=memory,
            optimiser=optimiser,
            state={name: value for name, value in state.items() if name not in ("format", "step", "files")},
        )
    except pickle.UnpicklingError:
        raise CheckpointError(
            _ABSURD.format(folder, reading, "something other than tensors and plain values")
        ) from None
    except (SafetensorError, OSError, *_RAISED) as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise  # of the system, such as permission denied; of a file that was cut PyTorch raises one without name
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise CheckpointError(_ABSURD.format(folder, reading, f"content of the wrong kind ({reason})")) from None


_ABSURD = "{} is not a checkpoint of this library: {} holds {}"
_RAISED = (RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError)
"""Errors that reading a file with content of the wrong kind can raise."""


def verify(folder: Path, *, sums: bool = True) -> dict[str, Any]:
    """The content of state.json, after checking that all files exist and, with ``sums``, are unchanged.

    Raises:
        CheckpointError: a file is missing or changed, or the folder is not a checkpoint.
    """
    try:
        outer = json.loads((folder / _STATE).read_text(encoding="utf-8"))
    except OSError:
        raise CheckpointError(f"{folder} is not a checkpoint of this library: it has no readable {_STATE}") from None
    except ValueError:
        raise CheckpointError(f"The checkpoint {folder} is damaged: {_STATE} is not JSON") from None
    state = outer.get("state") if isinstance(outer, dict) else None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{folder} is not a checkpoint of this library: {_STATE} does not say {FORMAT!r}")
    if outer.get("sha256") != _digest(state):
        raise CheckpointError(f"The checkpoint {folder} is damaged: {_STATE} was changed after it was written")
    files = state.get("files")
    if not isinstance(files, dict) or not {_MEMORY, _OPTIMISER} < files.keys() or not all(map(_is_inside, files)):
        raise CheckpointError(f"{folder} is not a checkpoint of this library: {_STATE} does not name its files")
    if unlisted := sorted(set(_files_in(folder)) - files.keys() - {_STATE}):
        raise CheckpointError(f"{folder} is not a checkpoint of this library: {_STATE} does not list {unlisted[0]}")
    for name, expected in files.items():
        if not (folder / name).is_file():
            raise CheckpointError(f"The checkpoint {folder} is damaged: {name} is missing")
        if sums and sha256_of(folder / name) != expected:
            raise CheckpointError(f"The checkpoint {folder} is damaged: {name} was changed after it was written")
    return state


def newest(folder: Path) -> Checkpoint | None:
    """The newest good checkpoint in ``folder``; None if there are no checkpoints. A warning names each damaged one.

    Raises:
        CheckpointError: all checkpoints are damaged.
    """
    candidates = all_in(folder)
    for candidate in reversed(candidates):
        try:
            return load(candidate)
        except CheckpointError as error:
            if candidate == candidates[0]:
                raise
            _log.warning("%s", error)
    return None


def all_in(folder: Path) -> list[Path]:
    """The folders in ``folder`` with names of checkpoints, oldest first."""
    found = [entry for entry in folder.iterdir() if _NAME.fullmatch(entry.name)] if folder.is_dir() else []
    return sorted(found, key=lambda entry: int(entry.name.removeprefix("step-")))


def prune(folder: Path, *, newest: int, best: int | None) -> None:
    """Remove all checkpoints except the ``newest`` last ones and that of step ``best``, and all unfinished ones."""
    for entry in folder.glob(f"{_TEMPORARY}*"):
        discard(entry)
    for entry in all_in(folder)[:-newest]:
        if best is None or entry.name != name_of(best):
            _remove(entry)


def discard_after(folder: Path, step: int) -> None:
    """Remove the checkpoints of steps after ``step``."""
    for entry in all_in(folder):
        if int(entry.name.removeprefix("step-")) > step:
            _remove(entry)


def _remove(entry: Path) -> None:
    """Remove a checkpoint; it is renamed first, so that no incomplete folder has the name of a checkpoint."""
    discard(entry.rename(entry.with_name(f"{_TEMPORARY}{entry.name}")))


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and "\\" not in name


def _files_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _is_good(folder: Path) -> bool:
    try:
        return bool(verify(folder))
    except CheckpointError:
        return False


def _plain(tensors: Mapping[str, Tensor | Piece]) -> dict[str, Tensor]:
    return {name: whole(tensor).detach().cpu().contiguous() for name, tensor in tensors.items()}


def sha256_of(file: Path) -> str:
    """The SHA-256 of the bytes of a file."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _digest(state: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
