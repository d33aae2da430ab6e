"""Checks of arguments that several files share."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import numbers
import operator
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor


def check_kind(name: str, value: Any, kind: type, example: str) -> None:
    """Raise a TypeError unless ``value`` is a ``kind``; the usual mistake is the class instead of an instance."""
    if not isinstance(value, kind):
        found = f"the class {value.__name__}" if isinstance(value, type) else f"{value!r}"
        raise TypeError(f"{name} is {found}; it must be a {kind.__name__}, for example {example}.")


def check_at_least(settings: Any, **least: float) -> None:
    """Raise a ValueError if a field of a dataclass is below its bound; None is allowed."""
    for name, bound in least.items():
        value = getattr(settings, name)
        if value is not None and value < bound:
            raise _refused(settings, name, f"at least {bound}")


def check_whole(call: str, *, optional: bool = False, **values: Any) -> None:
    """Raise a ValueError unless each of these arguments of ``call`` is a whole number, or, if ``optional``, None."""
    _check_arguments(call, values, _is_whole, "a whole number, such as 8", optional=optional)


def _is_whole(value: Any) -> bool:
    """True for a number that Python takes as an index, such as a tensor with one; a flag is not a number."""
    try:
        operator.index(value)
    except TypeError:
        return False
    return not isinstance(value, bool)


def check_number(call: str, *, optional: bool = False, **values: Any) -> None:
    """Raise a ValueError unless each of these arguments of ``call`` is a real number, or, if ``optional``, None."""
    _check_arguments(call, values, _is_real, "a number, such as 0.8", optional=optional)


def check_flag(call: str, **values: Any) -> None:
    """Raise a ValueError unless each of these arguments of ``call`` is True or False."""
    _check_arguments(call, values, _is_flag, "True or False", optional=False)


def _check_arguments(
    call: str, values: Mapping[str, Any], fits: Callable[[Any], bool], kind: str, *, optional: bool
) -> None:
    for name, value in values.items():
        if not (fits(value) or (optional and value is None)):
            raise ValueError(f"{call}({name}={value!r}): {name} is {kind}.")


def _is_real(value: Any) -> bool:
    return _is_number(value, numbers.Real)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def range_of(*ids: Tensor) -> tuple[int, int]:
    """The smallest and the largest number in all of the tensors."""
    bounds = [int(bound) for tensor in ids for bound in tensor.aminmax()]
    return min(bounds), max(bounds)


def check_fields(settings: Any) -> None:
    """Raise a ValueError if a field of a dataclass is not of its annotated type.

    Without it, the text "no" would count as true, and a width of 1.5 would fail far from its cause. The types are
    flags, numbers, texts, choices, dtypes, tuples of these, and unions. Fields with further types are left to their
    class, and so is everything where an annotation cannot be read, as in code that torch.compile traces.
    """
    if torch.compiler.is_compiling():
        return
    for name, members in _simple_fields(type(settings)):
        value = getattr(settings, name)
        if not any(_is_a(value, member) for member in members):
            raise _refused(settings, name, " or ".join(map(_named, members)))


def _refused(settings: Any, name: str, allowed: str) -> ValueError:
    """The error for a field with a value that is not ``allowed``, with its default as advice."""
    usual = {field.name: field.default for field in dataclasses.fields(settings)}[name]
    advice = "" if usual is dataclasses.MISSING else f"; try {usual!r}"
    return ValueError(f"{type(settings).__name__}({name}={getattr(settings, name)!r}): {name} is {allowed}{advice}.")


@functools.cache
def _simple_fields(kind: type) -> tuple[tuple[str, tuple[Any, ...]], ...]:
    """The fields that ``check_fields`` checks, with the alternatives of their types."""
    try:
        hints = hints_of(kind)
    except NameError:  # a name that only the file of the class knows, or only its type checker
        return ()
    found = ((name, members_of(hint)) for name, hint in hints.items())
    return tuple((name, members) for name, members in found if all(map(_is_simple, members)))


def _is_simple(member: Any) -> bool:
    if typing.get_origin(member) is tuple:
        return all(map(_is_simple, _entries(member)))
    return member in _NAMES or typing.get_origin(member) is Literal


def _entries(member: Any) -> tuple[Any, ...]:
    """The types of a tuple's entries, without the … of tuples of any length."""
    return tuple(entry for entry in typing.get_args(member) if entry is not ...)


def _is_a(value: Any, member: Any) -> bool:
    """True if the value is of this simple type; a flag is not a number, and NaN and infinity are none."""
    if typing.get_origin(member) is Literal:
        return isinstance(value, str | int) and value in typing.get_args(member)
    if typing.get_origin(member) is tuple:
        entries = typing.get_args(member)
        length = len(value) if isinstance(value, tuple | list) else -1
        entries = entries[:1] * length if entries[1:] == (...,) else entries
        return length == len(entries) and all(map(_is_a, value, entries))
    if member is float:
        return _is_number(value, numbers.Real) and _is_finite(value)
    if member is int:
        return _is_number(value, numbers.Integral)
    return isinstance(value, member)


def _is_number(value: Any, kind: type) -> bool:
    """True for a number that PyTorch computes with: no flag, and no fraction of whole numbers."""
    fraction = isinstance(value, numbers.Rational) and not isinstance(value, numbers.Integral)
    return isinstance(value, kind) and not isinstance(value, bool) and not fraction


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number above the largest float
        return False


_NAMES = {
    bool: "True or False",
    int: "a whole number",
    float: "a finite number",
    str: "a text",
    torch.dtype: "a dtype, such as torch.float32",
    type(None): "None",
}


def _named(member: Any) -> str:
    if member in _NAMES:
        return _NAMES[member]
    if typing.get_origin(member) is tuple:
        return f"a tuple, each entry {' or '.join(dict.fromkeys(map(_named, _entries(member))))}"
    choices = [repr(choice) for choice in typing.get_args(member)]
    return " or ".join(choices) if len(choices) <= 2 else f"one of {', '.join(choices)}"


def hints_of(kind: type) -> dict[str, Any]:
    """The types of a dataclass's fields, by name."""
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def members_of(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a union, or the one type."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def check_keep(keep: Any) -> None:
    """Raise a ValueError unless these are increasing numbers of steps."""
    whole = isinstance(keep, Sequence) and all(isinstance(step, numbers.Integral) for step in keep)
    if not whole or any(a >= b for a, b in itertools.pairwise((0, *keep))):
        raise ValueError(f"keep={keep!r}: these must be increasing numbers of steps from 1 on; try keep=(5, 10).")
