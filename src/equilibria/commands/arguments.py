"""Words of the command line into frozen dataclasses: tyro reads them, errors become one sentence.

tyro draws its errors as a box on stderr, and the message is taken from that box. Its recent releases also have the
errors as values, in ``tyro._errors``; but that module calls itself private, unstable and to be used with one exact
version, and earlier releases do not have it. A message in words that are not known here is passed on as tyro says it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import math
import os
import re
import typing
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from equilibria.commands.readers import READERS, NoPathError
from equilibria.commands.terminal import complain
from equilibria.errors import UsageError
from equilibria.lm.runs.shipped import is_shipped, require
from equilibria.lm.suggestions import nearest

Options = TypeVar("Options")

Run = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
"""A positional argument: the folder of a run, or the name of a model that ships with the library."""
Runs = Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN …]")]
"""Positional arguments: the folders of runs."""


def found(run: Path) -> Path:
    """The run directory that an argument names; where it is not the folder of that name, stderr says which it is.

    Raises:
        UsageError: there is none.
    """
    path = require(run)
    if path != run:
        where = "the model of that name inside the library" if is_shipped(path) else f"the run {path}"
        complain(f"note: {run} is {where}.")
    return path


def parse(kind: type[Options], arguments: Sequence[str], *, verb: str, default: Options | None = None) -> Options:
    """``arguments`` as a value of the dataclass ``kind``.

    Flags change numbers; kinds stay what ``default`` says. Parts of a flag may be left out where one flag only is left:
    --batch-size or --training.batch-size for --training.batches.batch-size.

    Raises:
        UsageError: an unknown flag (names the nearest), a missing or an impossible value.
        SystemExit: the words contain --help, which has been printed.
    """
    known = flags(default) if default is not None else _plain_flags(kind)
    positional = _positional(kind)
    known = {flag: value for flag, value in known.items() if flag not in positional}
    words = [_full(word, known) for word in arguments]
    typed = {full.partition("=")[0]: word.partition("=")[0] for full, word in zip(words, arguments, strict=True)}
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors), READERS:
            value, rest = tyro.cli(
                kind,
                prog=f"equilibria {verb}",
                args=words,
                default=tyro.MISSING_NONPROP if default is None else default,  # pyright: ignore
                return_unknown_args=True,
                config=(tyro.conf.AvoidSubcommands,),
            )
    except SystemExit as exit_:
        if exit_.code in (0, None):
            raise
        raise UsageError(_as_typed(_sentence(errors.getvalue(), verb), typed)) from None
    except NoPathError as error:
        raise UsageError(f"The command line has '' where a path is expected, and {error}") from None
    except ValueError as error:  # of the outermost dataclass; tyro catches those of the inner ones
        raise UsageError(str(error)) from None
    if rest:
        raise _unknown(rest[0], known, verb)
    _check_numbers(flags(value))
    if flags(value).get(THREADS) != known.get(THREADS):
        _check_threads(flags(value)[THREADS])
    return value


THREADS = "--training.devices.threads"
"""The one number that depends on the machine; it is checked where it is changed, as a run may come from another one."""


def _check_threads(threads: int | None) -> None:
    most = 8 * (os.cpu_count() or 1)
    if threads is not None and threads > most:
        raise UsageError(
            f"{THREADS} {threads}: this machine takes from 1 to {most}, 8 for each core; try {os.cpu_count() or 1}."
        )


LARGEST = 2**63 - 1
"""The largest whole number that a tensor can hold."""


def _check_numbers(given: dict[str, Any]) -> None:
    """Refuse what is no setting anywhere: NaN, infinity, and whole numbers that no tensor can hold."""
    for flag, value in given.items():
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float) and not math.isfinite(number):
                raise UsageError(f"{flag} {number}: it takes a finite number; leave it out for the default.")
            if isinstance(number, int) and abs(number) > LARGEST:
                raise UsageError(
                    f"{flag} {str(number)[:40]}…: whole numbers reach from −2⁶³ + 1 to 2⁶³ − 1; give a smaller one."
                )


def flags(value: Any, prefix: str = "") -> dict[str, Any]:
    """Every flag that a tree of dataclasses offers, with its present value."""
    found: dict[str, Any] = {}
    items = enumerate(value) if isinstance(value, tuple) else _fields(value)
    for name, part in items:
        path = f"{prefix}{name}".replace("_", "-")
        if part is None and _holds_dataclass(value, name):
            continue  # kinds are the recipe's to choose, so there is no flag
        if dataclasses.is_dataclass(part) or (isinstance(part, tuple) and any(map(dataclasses.is_dataclass, part))):
            found |= flags(part, "" if path in TRANSPARENT else f"{path}.")
        else:
            found[f"--{path}"] = part
    return found


def _holds_dataclass(value: Any, name: Any) -> bool:
    """Whether the field may hold a dataclass instead of None."""
    if not dataclasses.is_dataclass(value):
        return False
    return any(map(dataclasses.is_dataclass, typing.get_args(typing.get_type_hints(type(value))[name])))


TRANSPARENT = ("experiment",)
"""Fields whose own name is no part of their flags: --training.seed, not --experiment.training.seed."""


def _fields(value: Any) -> list[tuple[str, Any]]:
    return [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]


def _plain_flags(kind: Any) -> dict[str, Any]:
    return {f"--{field.name.replace('_', '-')}": None for field in dataclasses.fields(kind)}


def _positional(kind: Any) -> list[str]:
    """The fields of a dataclass that are words of their own, such as RUN, as if they were flags."""
    hints = typing.get_type_hints(kind, include_extras=True)
    marked = (name for name, hint in hints.items() if tyro.conf.Positional in getattr(hint, "__metadata__", ()))
    return [f"--{name.replace('_', '-')}" for name in marked]


def _full(word: str, known: dict[str, Any]) -> str:
    """The full name of a flag that was given by its last part; other words as they are."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    name = name.replace("_", "-")
    name = next((full for full in SHORT.get(name, ()) if full in known), name)
    if name in known or name == "--help":
        return name + equals + value
    ends = [flag for flag in known if _abbreviates(name, flag)]
    if len(ends) > 1:
        raise UsageError(f"{name} could be {', '.join(ends)}; give the full name.")
    return (ends[0] if ends else name) + equals + value


SHORT = {
    "--lr": ("--training.optimisation.learning-rate",),
    "--seed": ("--training.seed",),
    "--keep": ("--training.faults.keep",),
}
"""Flags that everybody types, where the last name of the flag is too long, or occurs twice."""


def shortest(flag: str, known: Iterable[str]) -> str:
    """The last name of a flag, if it is enough to tell it from the others; else the flag."""
    last = f"--{flag[2:].rpartition('.')[2]}"
    return last if last not in known and sum(_abbreviates(last, other) for other in known) == 1 else flag


def _as_typed(sentence: str, typed: dict[str, str]) -> str:
    """The sentence with the flags as they were typed."""
    return re.sub(r"--[\w.\-]+", lambda flag: typed.get(flag[0], flag[0]), sentence)


def _abbreviates(name: str, flag: str) -> bool:
    """True if ``name`` is ``flag`` without some of its parts: its last one, and others in their order."""
    given, full = name[2:].split("."), flag[2:].split(".")
    rest = iter(full)
    return given[-1] == full[-1] and all(part in rest for part in given)


def _unknown(word: str, known: dict[str, Any], verb: str) -> UsageError:
    if not word.startswith("-"):
        return UsageError(f"There is no place for {word!r} here; `equilibria {verb} --help` shows what is expected.")
    name = word.partition("=")[0]
    hint = nearest(f"--{name.rpartition('.')[2].lstrip('-')}", {shortest(flag, known) for flag in known})
    return UsageError(f"There is no flag {name}; {hint or f'`equilibria {verb} --help` lists them all.'}")


def _sentence(panel: str, verb: str) -> str:
    """The message inside the box that tyro draws, as one sentence."""
    lines = [re.sub(r"[│╭╮╰╯]", "", line).strip() for line in panel.splitlines()]
    # The box has a title, the message, a rule and hints; without Unicode it is drawn with hyphens, one rule more.
    inside = itertools.takewhile(lambda line: not _is_rule(line), itertools.dropwhile(_is_rule, lines[1:]))
    message = " ".join(" ".join(inside).split())
    for pattern, words in _PATTERNS:
        if found := re.match(pattern, message):
            return words(*found.groups())
    return f"{message or 'The command line could not be read.'} `equilibria {verb} --help` shows what is expected."


def _is_rule(line: str) -> bool:
    return len(line) > 2 and not line.strip("─-")


def _choice(got: str, flag: str, choices: str) -> str:
    known = re.findall(r"'([^']*)'", choices)
    return f"{flag} is one of {', '.join(known)}, and not {got!r}; {nearest(got, known) or 'choose one of them.'}"


_PATTERNS: tuple[tuple[str, Callable[..., str]], ...] = (
    (
        r"Error parsing (--\S+): no type matching .*\|INT could be instantiated from \['(.*?)'\]",
        "{} takes a whole number, and {!r} is none.".format,
    ),
    (
        r"Error parsing (--\S+): no type matching .*\|FLOAT could be instantiated from \['(.*?)'\]",
        "{} takes a number, and {!r} is none.".format,
    ),
    (r"Error parsing (--\S+): invalid literal for int.*: '(.*)'", "{} takes a whole number, and {!r} is none.".format),
    (r"Error parsing (--\S+): could not convert string to .*: '(.*)'", "{} takes a number, and {!r} is none.".format),
    (r"Error parsing (?!--)[\w.\-]+: (.*)", "{}".format),
    (r"invalid choice '(.*)' for argument '(.*)'. Expected one of (\(.*\))", _choice),
    (r"Missing value for argument '(.*)'. Expected 1 values", "{} needs a value after it.".format),
    (r"Missing value for argument '(.*)'. Expected (\d+) values", "{} needs {} values after it.".format),
    (r"Missing from equilibria (\S+): (--\S+) \[.*\]\] (.*?) ?\(required\)", "{} needs {}: {}".format),
    (r"Missing from equilibria (\S+): ((?:--\S+ )?\S+) (.*?) ?\(required\)", "{} needs {}: {}".format),
)
"""tyro's messages, and how they are said here."""
