"""Rules by which the command line reads settings of types that tyro does not know."""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Any

import torch
import tyro

from equilibria.core.stop import NORMS, Stop
from equilibria.errors import EquilibriaError
from equilibria.lm.experiments.serialise import DTYPES
from equilibria.lm.paths import expanded

READERS = tyro.constructors.ConstructorRegistry()


@READERS.primitive_rule
def _read_dtype(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[Any] | None:
    """A dtype by its name, without the "torch."."""
    if info.type is not torch.dtype:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=f"{{{','.join(DTYPES)}}}",
        instance_from_str=lambda words: DTYPES[words[0]],
        is_instance=lambda value: isinstance(value, torch.dtype),
        str_from_instance=lambda value: [str(value).removeprefix("torch.")],
        choices=tuple(DTYPES),
    )


@READERS.primitive_rule
def _read_norm(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[Any] | None:
    """The norm of a ``Stop`` by its name; a norm that is a function has none."""
    if info.type != _NORM:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=f"{{{','.join(NORMS)}}}",
        instance_from_str=lambda words: words[0],
        is_instance=lambda value: value in NORMS or callable(value),
        str_from_instance=lambda value: [str(value)],
        choices=NORMS,
    )


_NORM = typing.get_type_hints(Stop)["norm"]


@READERS.primitive_rule
def _read_path(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[Any] | None:
    """A path. Shells leave the "~" of --out=~/runs as it is, and an empty variable gives the empty text."""
    if info.type is not Path:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda words: _path(words[0]),
        is_instance=lambda value: isinstance(value, Path),
        str_from_instance=lambda value: [str(value)],
    )


def _path(word: str) -> Path:
    try:
        return expanded(word)
    except ValueError as error:
        raise NoPathError(str(error)) from None


class NoPathError(EquilibriaError):
    """A path of the command line is none; tyro passes this on, while it draws a ValueError into its box."""
