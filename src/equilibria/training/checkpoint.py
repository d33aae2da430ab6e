"""Checkpoints: one folder each, complete or not there, and refused when damaged before anything is unpickled.

    checkpoints/step-00000500/model.safetensors      the weights
                              memory.safetensors     what the streams remember of their last segment
                              optimiser.pt           optimiser and random generators, read with weights_only=True
                              state.json             step, position, best value, and the SHA-256 of the other files

A checkpoint is written under a temporary name, each file and the folder are forced to the disk, and then it is renamed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FORMAT = "equilibria checkpoint 1"
_MODEL, _MEMORY, _OPTIMISER, _STATE = "model.safetensors", "memory.safetensors", "optimiser.pt", "state.json"
_NAME = re.compile(r"step-(\d{8,})")
_TEMPORARY = ".unfinished-"
_log = logging.getLogger(__name__)


class CheckpointError(Exception):
    """A checkpoint is damaged, or is none; the message is one sentence that names what to use instead."""


@dataclasses.dataclass(frozen=True, eq=False)
class Checkpoint:
    """Everything that a run needs to go on as if it had never stopped."""

    step: int
    """Training steps done."""
    model: Mapping[str, Tensor]
    """The weights by name, each tensor once."""
    memory: Mapping[str, Tensor]
    """The memory of the streams as named tensors; empty if there is none."""
    optimiser: Mapping[str, Any]
    """The optimiser's ``state_dict`` and the states of the random generators: tensors and plain values."""
    state: Mapping[str, Any]
    """Plain values: stage, position in the stream, best validation, seconds."""


def save(folder: Path, checkpoint: Checkpoint) -> Path:
    """The folder ``step-…`` inside ``folder`` that now holds the checkpoint, whatever stood there before."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"step-{checkpoint.step:08d}"
    unfinished = folder / f"{_TEMPORARY}{target.name}-{os.getpid()}"
    discard(unfinished)
    unfinished.mkdir()
    save_file(_plain(checkpoint.model), unfinished / _MODEL)
    save_file(_plain(checkpoint.memory), unfinished / _MEMORY)
    torch.save(dict(checkpoint.optimiser), unfinished / _OPTIMISER)
    state = {"format": FORMAT, "step": checkpoint.step, **checkpoint.state}
    state["files"] = {name: _sha256(unfinished / name) for name in (_MODEL, _MEMORY, _OPTIMISER)}
    write_text(unfinished / _STATE, json.dumps({"state": state, "sha256": _digest(state)}, indent=1))
    for file in unfinished.iterdir():
        force(file)
    force(unfinished)
    discard(target)  # a damaged one, left of a run that had to go back further
    unfinished.rename(target)
    force(folder)
    return target


def load(folder: Path) -> Checkpoint:
    """The checkpoint in ``folder``, its files checked against their SHA-256 before any of them is opened.

    Raises:
        CheckpointError: a file is missing or changed, or the folder is no checkpoint; names the newest good one.
    """
    from safetensors.torch import load_file

    try:
        state = verify(folder)
    except CheckpointError as error:
        others = (other for other in reversed(all_in(folder.parent)) if other != folder and _is_good(other))
        other = next(others, None)
        hint = f"the newest good one is {other}" if other else "there is no good one beside it: start a new run"
        raise CheckpointError(f"{error}; {hint}.") from None
    return Checkpoint(
        step=state["step"],
        model=load_file(folder / _MODEL),
        memory=load_file(folder / _MEMORY),
        optimiser=torch.load(folder / _OPTIMISER, weights_only=True, map_location="cpu"),
        state={name: value for name, value in state.items() if name not in ("format", "step", "files")},
    )


def verify(folder: Path) -> dict[str, Any]:
    """What state.json says, once every file of the checkpoint was found unchanged."""
    try:
        outer = json.loads((folder / _STATE).read_text(encoding="utf-8"))
    except OSError:
        raise CheckpointError(f"{folder} is no checkpoint of this library: it has no readable {_STATE}") from None
    except ValueError:
        raise CheckpointError(f"The checkpoint {folder} is damaged: {_STATE} is not JSON") from None
    state = outer.get("state") if isinstance(outer, dict) else None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{folder} is no checkpoint of this library: {_STATE} does not say {FORMAT!r}")
    if outer.get("sha256") != _digest(state):
        raise CheckpointError(f"The checkpoint {folder} is damaged: {_STATE} was changed after it was written")
    for name in (_MODEL, _MEMORY, _OPTIMISER):
        if not (folder / name).is_file():
            raise CheckpointError(f"The checkpoint {folder} is damaged: {name} is missing")
        if _sha256(folder / name) != state["files"].get(name):
            raise CheckpointError(f"The checkpoint {folder} is damaged: {name} was changed after it was written")
    return state


def newest(folder: Path) -> Checkpoint | None:
    """The newest good checkpoint in ``folder``, None if there is none at all; a damaged one is skipped with a warning.

    Raises:
        CheckpointError: all that there are are damaged.
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
    """The folders in ``folder`` that are named like checkpoints, oldest first."""
    found = [entry for entry in folder.iterdir() if _NAME.fullmatch(entry.name)] if folder.is_dir() else []
    return sorted(found, key=lambda entry: int(entry.name.removeprefix("step-")))


def prune(folder: Path, *, newest: int, best: int | None) -> None:
    """Remove all but the ``newest`` last checkpoints and the one of step ``best``, and what unfinished writing left."""
    for entry in folder.glob(f"{_TEMPORARY}*"):
        discard(entry)
    for entry in all_in(folder)[:-newest]:
        if best is None or entry.name != f"step-{best:08d}":
            _remove(entry)


def discard_after(folder: Path, step: int) -> None:
    """Remove the checkpoints of later steps than ``step``."""
    for entry in all_in(folder):
        if int(entry.name.removeprefix("step-")) > step:
            _remove(entry)


def discard(path: Path) -> None:
    """Remove the file or folder ``path``, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write ``path`` as UTF-8 with Unix line ends, on every system."""
    path.write_text(text, encoding="utf-8", newline="\n")


def force(path: Path) -> None:
    """Wait until the file or folder ``path`` is on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open folders, and needs not
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(entry: Path) -> None:
    """Remove a checkpoint; it is renamed first, since a checkpoint is complete or not there."""
    discard(entry.rename(entry.with_name(f"{_TEMPORARY}{entry.name}")))


def _is_good(folder: Path) -> bool:
    try:
        return bool(verify(folder))
    except CheckpointError:
        return False


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _digest(state: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
