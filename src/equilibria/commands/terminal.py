"""Text on its way to a terminal: what would steer the terminal, or hide what is written, is made visible."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator

from equilibria.lm.report.visible import visible

LONGEST = 2000
"""Characters of one sentence; a longer one, such as with a path of 100,000 letters, loses its middle."""


def sentence(text: str) -> str:
    """``text`` as it may be printed as an error or a note: visible, and of a length that can be read."""
    text = visible(text)
    half = LONGEST // 2
    return text if len(text) <= LONGEST else f"{text[:half]} … {text[-half:]}"


def complain(text: str) -> None:
    """Print ``text`` on stderr as a sentence; a closed stream is ignored."""
    with contextlib.suppress(OSError, ValueError):
        print(sentence(text), file=sys.stderr, flush=True)


@contextlib.contextmanager
def readable_warnings() -> Iterator[None]:
    """Within it a warning, and a line of a log that no other handler takes, is one sentence without a line of code."""

    def written(message: Warning | str, *place: object) -> str:
        return f"{_warning(message)}\n"

    before, handler = warnings.formatwarning, logging.lastResort
    formatter = handler and handler.formatter
    warnings.formatwarning = written  # pyright: ignore[reportAttributeAccessIssue]
    if handler is not None:
        handler.setFormatter(_Line())
    try:
        yield
    finally:
        warnings.formatwarning = before
        if handler is not None:
            handler.setFormatter(formatter)


class _Line(logging.Formatter):
    """A line of a log as a warning."""

    def format(self, record: logging.LogRecord) -> str:
        return _warning(record.getMessage())


def _warning(message: Warning | str) -> str:
    return f"equilibria: warning: {sentence(' '.join(str(message).split()))}"


def open_streams() -> None:
    """Make stdout and stderr fit to print to: a closed one, as after ``>&-``, swallows what it is given.

    The null device takes the number of a descriptor that is closed, so that no file of a run gets that number and
    with it what a library prints. A terminal without Unicode shows a question mark, and no error.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            _occupy(number)
            if number:
                setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif number and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _occupy(number: int) -> None:
    """Open the null device as descriptor ``number``, unless something else has it by now."""
    try:
        os.fstat(number)
    except OSError:
        null = os.open(os.devnull, os.O_RDWR)
        if null != number:
            os.dup2(null, number)
            os.close(null)


def release() -> None:
    """Print what stdout and stderr still hold; what cannot be printed is dropped, so that the exit code stays."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, stream.fileno())
                os.close(null)
