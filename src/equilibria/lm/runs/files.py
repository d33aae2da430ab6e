"""Writing into a run's folder, which may come from a stranger: nothing outside it is read, changed or waited for.

A file is written beside its place and renamed, so that it is complete or as it was, and so that a symbolic link in its
place is replaced and not followed.
"""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

from equilibria.errors import EquilibriaError


class ForeignFileError(EquilibriaError, ValueError):
    """Something in a folder is no file or folder of its own; the message says what, and what to do."""


def replace(path: Path, content: str | bytes, *, forced: bool = False) -> None:
    """``path`` with this content, whatever was there; text as UTF-8 with Unix line ends.

    Args:
        path: the file. Its folder exists, and was checked by ``check_own``.
        content: what it will hold.
        forced: wait until it is on the disk.
    """
    data = content.encode() if isinstance(content, str) else content
    beside = path.with_name(f".{path.name}.new")
    discard(beside)
    try:
        with beside.open("xb") as file:  # a new file: no link is followed
            file.write(data)
            if forced:
                file.flush()
                os.fsync(file.fileno())
        beside.replace(path)
    finally:
        discard(beside)
    if forced:
        force(path.parent)


def check_own(path: Path) -> None:
    """Raise a ForeignFileError if ``path`` is there and is neither a plain file nor a plain folder."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if stat.S_ISLNK(mode):
        raise ForeignFileError(
            f"{path} is a symbolic link, to {os.readlink(path)}, and what it leads to is left alone: a run is written "
            "inside its own folder only; put a copy in its place, or choose another folder with --out."
        )
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise ForeignFileError(_WAITS.format(path=path))


_WAITS = (
    "{path} is neither a file nor a folder but a pipe, socket or device, and reading it could wait for ever; remove "
    "it, or choose another folder."
)


def check_readable(path: Path) -> None:
    """Raise a ForeignFileError if reading ``path``, or what it is a link to, could wait for ever."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise ForeignFileError(_WAITS.format(path=path))


def discard(path: Path) -> None:
    """Remove the file, link or folder ``path``, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def force(path: Path) -> None:
    """Wait until the file or folder ``path`` is on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open folders, and needs not
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
