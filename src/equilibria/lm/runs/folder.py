"""The folder of a run: the names of its files, foreign files in it, and its lock."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from equilibria.lm.ranks import Ranks
from equilibria.lm.runs.files import check_own

FILES = ("experiment.json", "corpus.json", "metrics.jsonl", "model.safetensors")
"""The files of a run; a folder with the first one is a run."""
FOLDERS = ("checkpoints", "report", "tensorboard", "texts", "hf")
"""The folders of a run."""
LOCK, NEW, OLD, GONE = ".lock", ".new", ".old", ".replaced"
"""The lock; a run that will replace this one; the replaced run while its files are moved, and until it is removed."""
FIGURES = ("loss", "evaluations", "residual", "converged", "spectral_radius", "memory")
"""The pictures of a report."""
_WRITTEN = re.compile(
    r"experiment\.json|corpus\.json|metrics\.jsonl|model\.safetensors"
    r"|checkpoints/(step-\d{8,}|\.unfinished-[\w.-]+)/(model\.safetensors|memory\.safetensors|optimiser\.pt|state\.json)"
    r"|checkpoints/(step-\d{8,}|\.unfinished-[\w.-]+)/shards/(\.metadata|[\w.-]+\.(safetensors|json|distcp))"
    rf"|report/\.?(index\.html|sample\.json|({'|'.join(FIGURES)})\.png)(\.new)?"
    r"|hf/(README\.md|equilibrium\.py|(generation_|tokenizer_)?config\.json|tokenizer\.json)"
    r"|hf/model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?"
    r"|texts/(valid|test)\.txt"
    r"|tensorboard/events\.out\.tfevents\.[\w.-]+"
)
"""Matches the path, relative to the run, of every file that this library writes."""


def foreign_files(folder: Path) -> list[str]:
    """Files in a run's folder that this library has not written, except hidden ones at the top level."""
    names = []
    for entry in folder.iterdir():
        if entry.name in FOLDERS and entry.is_dir() and not entry.is_symlink():
            inside = (path for path in entry.rglob("*") if path.is_symlink() or not path.is_dir())
            names += [path.relative_to(folder).as_posix() for path in inside]
        elif not entry.name.startswith("."):
            names.append(entry.name if entry.is_file() and not entry.is_symlink() else f"{entry.name}/")
    return sorted(name for name in names if not _WRITTEN.fullmatch(name))


def check_shared(folder: Path | None, ranks: Ranks) -> None:
    """Raise a ValueError on every rank if a rank does not see the folder of the run. Every rank must call it.

    Every rank writes its shards into this folder and reads the checkpoints in it. If the ranks had separate disks, a
    checkpoint would lack shards, and the ranks would continue from different weights.
    """
    if ranks.alone:
        return
    name = ranks.of_first(f".ranks-{uuid.uuid4().hex}")  # new, so that no disk of a network has it in a cache
    try:
        if ranks.first and folder is not None:
            (folder / name).touch()
        ranks.wait()
        seen = ranks.of_all(None if folder is None else (folder / name).is_file())
    finally:
        if ranks.first and folder is not None:
            (folder / name).unlink(missing_ok=True)
    lost = [str(rank) for rank, theirs in enumerate(seen) if theirs != seen[0]]
    if lost:
        raise ValueError(
            f"Rank {', '.join(lost)} does not see the folder {folder} that rank 0 writes: all processes of a training "
            "need one folder, on a disk that they share; name it by its whole path with --out."
        )


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Within it, no other process can lock the run directory ``path``, which is created if necessary.

    The operating system releases the lock when the process ends for any reason. If no run is started, the folder is
    left as it was.

    Raises:
        ValueError: another process has the lock.
    """
    made = not path.exists()
    path.mkdir(parents=True, exist_ok=True)
    check_own(path / LOCK)
    new = not (path / LOCK).exists()
    with _opened(path / LOCK) as file:
        if not _lock(file):
            file.seek(0)
            holder = file.read(200).strip() or "another process"
            raise ValueError(f"{path} is in use by {holder}; wait until it ends, or choose another folder with --out.")
        started = False
        try:
            _sign(file)
            yield
            started = (path / FILES[0]).is_file()
        finally:
            if new and not started:  # no run was started: leave the folder as it was
                (path / LOCK).unlink(missing_ok=True)
                if made and not any(path.iterdir()):
                    path.rmdir()


def withdraw(path: Path) -> None:
    """Remove the description of a run whose training has not begun, so that another one may take its folder.

    Call it before the lock is released.
    """
    if not any((path / name).exists() for name in (*FILES[1:], *FOLDERS)):
        (path / FILES[0]).unlink(missing_ok=True)


def holder(path: Path) -> str | None:
    """The process that has locked the run directory ``path``, such as "process 123"; None if it is not locked."""
    if (path / LOCK).is_symlink() or not (path / LOCK).is_file():
        return None
    try:
        with (path / LOCK).open("r+", encoding="utf-8", errors="replace") as file:
            return None if _lock(file) else file.read(200).strip() or "another process"
    except OSError:
        return None


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[IO[str]]:
    """The opened lock file, created if necessary; a link in its place is not followed."""
    handle = os.open(file, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
    with os.fdopen(handle, "r+", encoding="utf-8", errors="replace") as stream:
        yield stream


def _lock(file: IO[str]) -> bool:
    """Try to lock the file without waiting; True if this process now has the lock."""
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


def _sign(file: IO[str]) -> None:
    file.truncate(0)
    file.write(f"process {os.getpid()}")
    file.flush()
