"""path_of: the path that a caller names."""

from __future__ import annotations

import os
from pathlib import Path


def path_of(call: str, **given: os.PathLike[str] | str) -> Path:
    """The one path in ``given``, with the home of a user for a leading "~".

    A "~" that names no user stays in the path, because a file may have such a name. The empty text is refused: it would
    mean the current folder, and it usually comes from a variable that was not set.

    Args:
        call: what the argument is given to, for errors.
        given: the argument by its name.

    Raises:
        TypeError: it is neither a text nor a path.
        ValueError: it is the empty text, or holds a zero byte, which no path does.
    """
    ((name, value),) = given.items()
    text = os.fspath(value) if isinstance(value, os.PathLike) else value  # also an os.DirEntry
    if not isinstance(text, str):
        raise TypeError(f"{call}({name}={value!r}): a path is a text or a pathlib.Path, such as 'runs/tiny'.")
    try:
        return expanded(text)
    except ValueError as error:
        raise ValueError(f"{call}({name}={value!r}): {error}") from None


def expanded(path: Path | str) -> Path:
    """The path as ``path_of`` reads it.

    Raises:
        ValueError: it names nothing.
    """
    if path == "":
        raise ValueError("the empty text is no path; give '.' for the current folder.")
    if "\0" in str(path):
        raise ValueError("it holds a zero byte, and no path does; give one without it.")
    path = Path(path)
    try:
        return path.expanduser()
    except RuntimeError:
        return path
