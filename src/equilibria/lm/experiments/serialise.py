"""Experiments as plain JSON values: every dataclass becomes {"kind": "Anderson", "window": 6, …}."""

from __future__ import annotations

import dataclasses
import functools
import json
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from equilibria import gradients, solvers
from equilibria.checks import hints_of, members_of
from equilibria.core.stop import Stop
from equilibria.fixed_point import Method
from equilibria.lm import corpora
from equilibria.lm.experiments import decay
from equilibria.lm.experiments.experiment import Experiment
from equilibria.lm.experiments.stage import Stage
from equilibria.lm.experiments.training import Training
from equilibria.lm.model import LanguageConfig
from equilibria.lm.suggestions import nearest_or_all

JSON = Any
"""None, bool, int, float, str, or lists and string-keyed dicts of them."""
Part = TypeVar("Part")
"""A dataclass inside an experiment."""


def to_json(experiment: Experiment) -> dict[str, JSON]:
    """The experiment as nested dicts, ready for ``json.dumps``."""
    return _encode(experiment)


def from_json(data: Mapping[str, JSON], *, extra: Iterable[type] = ()) -> Experiment:
    """The experiment that ``to_json`` wrote.

    Kinds are looked up in the library's catalogues of sources, solvers, gradient rules, decays and configurations;
    nothing is imported by name.

    Args:
        data: nested dicts; missing fields have their defaults.
        extra: dataclasses from outside the library that the experiment uses.

    Raises:
        ValueError: a kind or a field is unknown, or a value has the wrong type; suggests similar names.
    """
    kinds = {**_kinds(), **{kind.__name__: kind for kind in extra}}
    experiment = _decode(data, Experiment, kinds, where="experiment")
    if not isinstance(experiment, Experiment):
        raise ValueError(f'The outermost kind is {type(experiment).__name__!r}; it must be "Experiment".')
    return experiment


def part_to_json(part: Any) -> dict[str, JSON]:
    """A part of an experiment, such as a cell, a method or a stop, as nested dicts with kinds."""
    return _encode(part)


def part_from_json(data: Mapping[str, JSON], kind: type[Part], *, extra: Iterable[type] = ()) -> Part:
    """The part that ``part_to_json`` wrote, which must be a ``kind``; the rest is as in ``from_json``."""
    kinds = {**_kinds(), **{other.__name__: other for other in extra}}
    return _decode(data, kind, kinds, where=kind.__name__)


def kinds_in(value: Any) -> set[type]:
    """All dataclasses in an experiment, including those from outside the library."""
    if isinstance(value, tuple):
        return set().union(*map(kinds_in, value))
    if not dataclasses.is_dataclass(value):
        return set()
    parts = (kinds_in(getattr(value, field.name)) for field in dataclasses.fields(value))
    return {type(value)}.union(*parts)


@functools.cache
def _kinds() -> dict[str, type]:
    """All dataclasses of the library that an experiment can contain, by name."""
    kinds: dict[str, type] = {}
    pending = [Experiment, Stage, Method, Training, Stop, LanguageConfig]
    pending += [*corpora.CATALOGUE, *solvers.CATALOGUE, *gradients.CATALOGUE, *decay.CATALOGUE]
    while pending:
        kind = pending.pop()
        if kind.__name__ not in kinds:
            kinds[kind.__name__] = kind
            pending += [part for hint in hints_of(kind).values() for part in _dataclasses(hint)]
    return kinds


def _encode(value: Any) -> JSON:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: _encode(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"kind": type(value).__name__, **fields}
    if isinstance(value, tuple | list):
        return [_encode(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(
        f"{value!r} of type {type(value).__name__} cannot be written as JSON; use frozen dataclasses, tuples, paths, "
        "numbers, strings and None."
    )


def _decode(data: JSON, hint: Any, kinds: Mapping[str, type], *, where: str) -> Any:
    """The value of type ``hint`` that ``data`` represents; ``where`` is its path, for errors."""
    if isinstance(data, Mapping):
        return _decode_dataclass(data, hint, kinds, where=where)
    for member in members_of(hint):
        if isinstance(data, list) and typing.get_origin(member) is tuple:
            return _decode_tuple(data, member, kinds, where=where)
        if typing.get_origin(member) is typing.Literal and data in typing.get_args(member):
            return data
        if isinstance(member, type) and type(data) is member:
            return data
        if (type(data), member) in _WIDER:
            return member(data)
        if member is torch.dtype and isinstance(data, str) and data in DTYPES:
            return DTYPES[data]
    possible = [member for member in members_of(hint) if typing.get_origin(member) is not Callable]  # never in JSON
    allowed = " or ".join(map(_named, possible))
    raise ValueError(f"{where} is {data!r}; it must be {allowed}.")


DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64}
"""The dtypes that an experiment can contain, by their names in JSON."""
_WIDER = {(int, float), (str, Path)}
"""Allowed conversions of a JSON value: its type, and the type that is expected."""


def _decode_dataclass(data: Mapping[str, JSON], hint: Any, kinds: Mapping[str, type], *, where: str) -> Any:
    kind = _kind_of(data, hint, kinds, where=where)
    hints = hints_of(kind)
    fields = {name: value for name, value in data.items() if name != "kind"}
    for name in fields:
        if name not in hints:
            raise ValueError(f"{where} has the unknown field {name!r}; {nearest_or_all(name, hints)}")
    missing = [f.name for f in dataclasses.fields(kind) if f.name not in fields and _required(f)]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}; a {kind.__name__} has the fields {', '.join(hints)}.")
    return kind(**{name: _decode(v, hints[name], kinds, where=f"{where}.{name}") for name, v in fields.items()})


def _kind_of(data: Mapping[str, JSON], hint: Any, kinds: Mapping[str, type], *, where: str) -> type:
    """The dataclass that the data name, which is one of those that ``hint`` allows."""
    allowed = tuple(member for member in members_of(hint) if isinstance(member, type))
    possible = sorted(name for name, kind in kinds.items() if issubclass(kind, allowed))
    if "kind" not in data:
        raise ValueError(
            f'{where} has no "kind", which says what its fields belong to; give {{"kind": '
            f"{' or '.join(map(json.dumps, possible))}, …}}."
        )
    named = data["kind"]
    kind = kinds.get(named) if isinstance(named, str) else None
    if kind is None:
        raise ValueError(
            f"{where} has the unknown kind {named!r}; {nearest_or_all(str(named), possible)} Name a dataclass of your "
            "own with --recipe FILE.py:FUNCTION, or in from_json(…, extra=[…])."
        )
    if not issubclass(kind, allowed):
        raise ValueError(f"{where} is a {kind.__name__}; it must be {' or '.join(map(_named, allowed))}.")
    return kind


def _decode_tuple(data: list[JSON], hint: Any, kinds: Mapping[str, type], *, where: str) -> tuple[Any, ...]:
    parts = typing.get_args(hint)
    if len(parts) == 2 and parts[1] is ...:
        parts = (parts[0],) * len(data)
    if len(parts) != len(data):
        raise ValueError(f"{where} has {len(data)} entries; it must have {len(parts)}.")
    pairs = enumerate(zip(data, parts, strict=True))
    return tuple(_decode(item, part, kinds, where=f"{where}.{index}") for index, (item, part) in pairs)


def _dataclasses(hint: Any) -> list[type]:
    parts = [part for member in members_of(hint) for part in (member, *typing.get_args(member))]
    return [part for part in parts if isinstance(part, type) and dataclasses.is_dataclass(part)]


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _named(hint: Any) -> str:
    if hint is types.NoneType:
        return "null"
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(repr(value) for value in typing.get_args(hint))
    if hint is torch.dtype:
        return " or ".join(map(repr, DTYPES))
    return "a list" if typing.get_origin(hint) is tuple else f"a {getattr(hint, '__name__', hint)}"
