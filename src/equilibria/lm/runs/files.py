"""Safe reading and writing in a run's folder, which may come from a stranger: nothing outside is touched, or blocks.

A file is written under a temporary name beside its final place and then renamed. So it is always complete, either new
or old, and a symbolic link in its place is replaced instead of followed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from equilibria.errors import EquilibriaError


class ForeignFileError(EquilibriaError, ValueError):
    """A path is a symbolic link, pipe, socket or device instead of a file or folder; the message gives advice."""


def replace(path: Path, content: str | bytes, *, forced: bool = False) -> None:
    """Write ``content`` to ``path``, replacing whatever was there; text as UTF-8 with Unix line ends.

    Args:
        path: the file. Its folder exists, and was checked by ``check_own``.
        content: the new content.
        forced: wait until the file is on the disk.
    """
    data = content.encode() if isinstance(content, str) else content
    beside = path.with_name(f".{path.name}.new")
    discard(beside)
    try:
        with beside.open("xb") as file:  # "x": never follows a link
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
    """Raise a ForeignFileError if ``path`` exists and is neither a regular file nor a folder."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if stat.S_ISLNK(mode):
        raise ForeignFileError(
            f"{path} is a symbolic link to {os.readlink(path)}, and a run is written inside its own folder only; "
            "replace the link by a copy, or choose another folder with --out."
        )
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise ForeignFileError(_WAITS.format(path=path))


_WAITS = (
    "{path} is neither a file nor a folder but a pipe, socket or device, and reading it could block forever; remove "
    "it, or choose another folder."
)


def check_readable(path: Path) -> None:
    """Raise a ForeignFileError if reading ``path``, or the target of a link, could block forever."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise ForeignFileError(_WAITS.format(path=path))


@contextlib.contextmanager
def undamaged(file: Path) -> Iterator[None]:
    """Within it, a ValueError about the content of ``file`` says that it is damaged, and what to do."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}); take it from a copy, or train again.") from None


def discard(path: Path) -> None:
    """Remove the file, link or folder ``path``, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def errors_of_the_disk(folder: Path) -> Iterator[None]:
    """A context for writing into ``folder``: it raises the operating system's error behind an error of a library."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        number = _number_of(error)
        if number is None and shutil.disk_usage(folder).free < 2**20:
            number = errno.ENOSPC
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(folder)) from error


def _number_of(error: BaseException | None) -> int | None:
    """The number of the system's error behind an error: safetensors writes it out, torch.save raises after it."""
    while error is not None:
        told = re.search(r"\(os error (\d+)\)", str(error))
        number = error.errno if isinstance(error, OSError) else int(told.group(1)) if told else None
        if number is not None:
            return number
        error = error.__cause__ or error.__context__
    return None


def force(path: Path) -> None:
    """Wait until the file or folder ``path`` is on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open folders, and need not
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
