"""Range checks for the numbers in an experiment."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterator

import torch

from equilibria.checks import hints_of, members_of

LARGEST = torch.finfo(torch.float32).max
"""Settings multiply float32 weights, and PyTorch raises an error for factors that do not fit into float32."""
LARGEST_SEED = 2**63 - 1
"""The largest seed of PyTorch's generators."""


def finite(value: object) -> None:
    """Raise a ValueError if a float in a tree of dataclasses is not finite in float32: NaN, infinity, 1e39.

    The error names the field by its path from ``value``.
    """
    for path, number in _floats(value):
        if not abs(number) <= LARGEST:
            raise ValueError(
                f"{type(value).__name__}({path}={number}): it must be a finite number, at most {LARGEST:.1e} in "
                "magnitude; leave it out for its default."
            )


def _floats(value: object) -> Iterator[tuple[str, float]]:
    """All floats in the tree with their paths, such as "stages.0.penalty"."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    else:
        parts = [(str(place), part) for place, part in enumerate(value)] if isinstance(value, tuple) else []
    for name, part in parts:
        if isinstance(part, float):
            yield name, part
        else:
            yield from ((f"{name}.{path}", number) for path, number in _floats(part))


def at_most(value: object, most: float, name: str, *, advice: str) -> None:
    """Raise a ValueError with ``advice`` if a field of a dataclass is above ``most``; None is allowed."""
    number = getattr(value, name)
    if number is not None and number > most:
        largest = "2⁶³ − 1" if most == LARGEST_SEED else f"{most:,.0f}"
        raise ValueError(f"{type(value).__name__}({name}={number}): it must be at most {largest}; {advice}.")


def above_zero(value: object, *names: str) -> None:
    """Raise a ValueError unless the named fields of a dataclass are positive and finite; None is allowed."""
    for name in names:
        number = getattr(value, name)
        if number is not None and not 0 < number < float("inf"):
            kind, usual = type(value), getattr(type(value), name)
            none = ", or None" if types.NoneType in members_of(hints_of(kind)[name]) else ""
            raise ValueError(
                f"{kind.__name__}({name}={number}): it must be a finite number above 0{none}; try {usual}."
            )
