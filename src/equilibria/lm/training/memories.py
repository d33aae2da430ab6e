"""Memories as named tensors: a cell's memory is any tree of values, and a checkpoint stores named tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from equilibria.layers.sequence import Memory


def flatten(memory: Memory) -> dict[str, Tensor]:
    """The tensors in nested dataclasses, tuples, lists and dicts by path: {"0.z": …, "0.u": …}."""
    found: dict[str, Tensor] = {}
    _map(memory, found.setdefault, path="")
    return found


def rebuild(template: Memory, tensors: Mapping[str, Tensor]) -> Memory:
    """A memory with the structure of ``template`` and the tensors of ``flatten``, on the devices of the template.

    Raises:
        KeyError: the two structures differ.
    """
    if set(flatten(template)) != set(tensors):
        raise KeyError(f"a memory of {sorted(flatten(template))} cannot be filled with {sorted(tensors)}")
    return _map(template, lambda path, tensor: tensors[path].to(tensor.device), path="")


def _map(value: Any, change: Callable[[str, Tensor], Tensor], *, path: str) -> Any:
    if isinstance(value, Tensor):
        return change(path or "memory", value)
    parts = {name: _map(part, change, path=f"{path}.{name}" if path else name) for name, part in _parts(value).items()}
    if isinstance(value, tuple | list):
        return type(value)(parts.values())
    if isinstance(value, dict):
        return dict(zip(value, parts.values(), strict=True))
    return dataclasses.replace(value, **parts) if parts else value


def _parts(value: Any) -> dict[str, Any]:
    """The parts of a value by name; a plain value has no parts."""
    if isinstance(value, tuple | list):
        return {str(index): part for index, part in enumerate(value)}
    if isinstance(value, dict):
        return {str(name): part for name, part in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
    return {}
