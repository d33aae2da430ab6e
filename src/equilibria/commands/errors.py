"""Errors as one sentence each, with the exit code that goes with them."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable

from equilibria.errors import EquilibriaError, UsageError
from equilibria.lm.suggestions import nearest_or_all

EXTRAS = {
    "tyro": "train",
    "rich": "train",
    "safetensors": "train",
    "numpy": "train",
    "matplotlib": "train",
    "tensorboard": "tensorboard",
    "trackio": "trackio",
    "wandb": "wandb",
    "datasets": "data",
    "tokenizers": "tokenizers",
}
"""Which extra brings which library."""


def unknown(what: str, name: str, known: Iterable[str]) -> UsageError:
    """The error for a name that does not exist: the nearest ones, or all that do."""
    return UsageError(f"There is no {what} {name!r}; {nearest_or_all(name, known)}")


def debugging() -> bool:
    """Whether tracebacks are wanted: EQUILIBRIA_DEBUG is set to something other than 0."""
    return os.environ.get("EQUILIBRIA_DEBUG", "0") not in ("", "0")


def explain(error: BaseException) -> tuple[str, int]:
    """One sentence for the user and the exit code: 2 for a wrong command line, 1 for everything else."""
    if isinstance(error, UsageError):
        return _line(error), 2
    if isinstance(error, ModuleNotFoundError) and _root(error) in EXTRAS:
        return missing_extra(error), 1
    if _too_large(error):
        return "Out of memory: try a smaller --training.batch-size or --training.segment-length.", 1
    if _lost_a_rank(error):
        return LOST, 1
    if isinstance(error, OSError) and error.errno is not None:
        return _system(error), 1
    if isinstance(error, EquilibriaError | ValueError | OSError):
        return _line(error), 1
    hint = "set EQUILIBRIA_DEBUG=1 or add --debug to see where"
    return f"Unexpected {type(error).__name__}: {_line(error) or 'no message'} ({hint}).", 1


_TOO_LARGE = ("can't allocate memory", "not enough memory", "Storage size calculation overflowed", "integer multiplic")
"""Parts of PyTorch's messages on a CPU, where it raises a plain RuntimeError."""


def _too_large(error: BaseException) -> bool:
    """Whether memory was short, or a tensor was to have more numbers than any memory has."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _TOO_LARGE)


LOST = (
    "Another process of this training was lost, or did not answer within --training.rank-timeout; its own message says "
    "why. Continue with --resume, or let torchrun do so with --max-restarts."
)


def _lost_a_rank(error: BaseException) -> bool:
    """Whether a collective failed: NCCL has errors of its own, and gloo signs its messages."""
    return isinstance(error, RuntimeError) and (type(error).__name__.startswith("Dist") or "/gloo/" in str(error))


def missing_extra(error: ModuleNotFoundError) -> str:
    """Which library is missing, and the command that installs it."""
    name = _root(error)
    return f'{name} is not installed, and this command needs it: pip install "equilibria[{EXTRAS[name]}]"'


def _root(error: ModuleNotFoundError) -> str:
    return (error.name or "").split(".")[0]


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())


_ADVICE = {
    errno.ENOSPC: "there is no space left on the disk; free some, then continue with --resume.",
    errno.EDQUOT: "the disk quota is used up; free some space, then continue with --resume.",
    errno.EFBIG: "the file is larger than the disk or `ulimit -f` allows; raise that, then continue with --resume.",
    errno.EACCES: "permission denied; choose a folder that you may use.",
    errno.EPERM: "permission denied; choose a folder that you may use.",
    errno.EROFS: "the disk is read-only; choose another folder.",
    errno.ENOENT: "there is no such file or folder.",
    errno.EISDIR: "this is a folder, where a file is needed.",
    errno.ENOTDIR: "this is a file, where a folder is needed.",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one.",
    errno.EEXIST: "this exists already; choose another name.",
}


def _system(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename is not None else ""
    sentence = _ADVICE.get(error.errno or 0, f"{error.strerror or error}.")
    return where + sentence if where else sentence[0].upper() + sentence[1:]
