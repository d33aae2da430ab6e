"""Checks of arguments that several files share."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Mapping, Sequence
from typing import Any


def check_kind(name: str, value: Any, kind: type, example: str) -> None:
    """Raise a TypeError unless ``value`` is a ``kind``; the usual mistake is the class instead of an instance."""
    if not isinstance(value, kind):
        found = f"the class {value.__name__}" if isinstance(value, type) else f"{value!r}"
        raise TypeError(f"{name} is {found}; it must be a {kind.__name__}, for example {example}.")


def check_at_least(value: Any, **least: float) -> None:
    """Raise a ValueError if a field of ``value`` is below its bound."""
    for name, bound in least.items():
        if getattr(value, name) < bound:
            raise ValueError(f"{type(value).__name__}({name}={getattr(value, name)}): {name} is at least {bound}.")


def check_whole(call: str, **values: Any) -> None:
    """Raise a ValueError unless each of these arguments of ``call`` is None or a whole number."""
    for name, value in values.items():
        try:
            operator.index(0 if value is None else value)
        except TypeError:
            raise ValueError(f"{call}({name}={value!r}): {name} is a whole number, such as 8.") from None


def check_choices(value: Any, choices: Mapping[str, Sequence[Any]]) -> None:
    """Raise a ValueError if a field of ``value`` is not one of its choices."""
    for name, allowed in choices.items():
        if getattr(value, name) not in allowed:
            known = " or ".join(map(repr, allowed)) if len(allowed) == 2 else f"one of {', '.join(map(repr, allowed))}"
            raise ValueError(f"{type(value).__name__}({name}={getattr(value, name)!r}): {name} is {known}.")


FLAG = (True, False)
"""The choices of a flag; the text "no" would count as true."""


def check_keep(keep: Sequence[int]) -> None:
    """Raise a ValueError unless these are increasing numbers of steps."""
    increasing = all(a < b for a, b in itertools.pairwise(keep))
    if not increasing or any(not isinstance(step, int) or step < 1 for step in keep):
        raise ValueError(f"keep={tuple(keep)}: these must be increasing numbers of steps from 1 on; try keep=(5, 10).")
