"""Sharded modules: their results hide their maps from FSDP, and its false alarm is silenced.

FSDP looks through dataclasses for tensors with a graph, and registers a hook on each at every forward pass. The map in
a ``LayerOutput`` holds parameters: their hooks would become more with every step, and keep the model alive.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

from torch import nn

from equilibria.core.maps import Map


class _Hidden:
    """A map that FSDP does not look into."""

    def __init__(self, content: Map) -> None:
        self.content = content


def without_maps(module: nn.Module, shard: Callable[[nn.Module], Any]) -> None:
    """Shard the module; its results are without their maps while FSDP's hooks see them."""
    module.register_forward_hook(lambda _, given, output: _changed(output, Map, _Hidden))
    shard(module)
    module.register_forward_hook(lambda _, given, output: _changed(output, _Hidden, lambda hidden: hidden.content))


def without_false_alarm(model: nn.Module) -> Callable[..., Any]:
    """The sharded model as a function that silences FSDP's warning of views: no code changes the outputs in place."""

    def called(*args: Any, **options: Any) -> Any:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
            return model(*args, **options)

    return called


def _changed(tree: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """The tree of dataclasses with each value of this kind changed."""
    if isinstance(tree, kind):
        return change(tree)
    if not dataclasses.is_dataclass(tree) or isinstance(tree, type):
        return tree
    before = {field.name: getattr(tree, field.name) for field in dataclasses.fields(tree)}
    after = {name: _changed(value, kind, change) for name, value in before.items()}
    parts = {name: value for name, value in after.items() if value is not before[name]}
    return dataclasses.replace(tree, **parts) if parts else tree
