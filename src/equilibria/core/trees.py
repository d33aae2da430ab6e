"""Functions on trees of tensors.

A tree is a tensor, or a dict, tuple, named tuple, list or dataclass of trees; other leaves stay as they are.

Letters: R chosen samples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from equilibria.torch_private import tree_leaves, tree_map


def map_tensors(change: Callable[[Tensor], Tensor], tree: Any, *, strict: bool = False) -> Any:
    """The tree with every tensor in it changed, also inside dataclasses; all other leaves stay as they are.

    Args:
        change: maps each tensor to its replacement.
        tree: dicts, tuples, lists, dataclasses and other containers that PyTorch knows.
        strict: raise a TypeError for a leaf of unknown type, which may hide tensors.
    """

    def changed(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return change(leaf)
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            fields = [field.name for field in dataclasses.fields(leaf)]
            parts = {name: map_tensors(change, getattr(leaf, name), strict=strict) for name in fields}
            return dataclasses.replace(leaf, **parts)
        if strict and not (leaf is None or isinstance(leaf, _PLAIN)):
            raise TypeError(
                f"a tree whose samples are chosen holds a {type(leaf).__name__}; it may hold tensors, numbers, strings "
                "and None, in dicts, tuples, lists and dataclasses."
            )
        return leaf

    return changed(tree) if isinstance(tree, Tensor) else tree_map(changed, tree)


_PLAIN = (bool, int, float, str, torch.dtype, torch.device)


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors of a tree, in order."""
    found: list[Tensor] = []
    for leaf in [tree] if isinstance(tree, Tensor) else tree_leaves(tree):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            found.extend(tensors_in([getattr(leaf, field.name) for field in dataclasses.fields(leaf)]))
    return found


def with_tensors(tree: Any, tensors: Iterable[Tensor]) -> Any:
    """The tree with its tensors replaced by ``tensors``, in order."""
    following = iter(tensors)
    return map_tensors(lambda _: next(following), tree)


def map_pairs(combine: Callable[[Tensor, Tensor], Tensor], a: Any, b: Any) -> Any:
    """The tree of ``combine(a, b)`` for each pair of tensors of two trees with the same structure."""
    return combine(a, b) if isinstance(a, Tensor) else tree_map(combine, a, b)


def take_rows(tree: Any, index: Int[Tensor, " R"]) -> Any:
    """The samples ``index`` of every tensor in the tree, in this order; each keeps the order of its axes in memory.

    Raises:
        TypeError: the tree holds a value of unknown type, which may hide tensors.
    """
    return map_tensors(lambda tensor: _rows_of(tensor, index), tree, strict=True)


def _rows_of(tensor: Tensor, index: Int[Tensor, " R"]) -> Tensor:
    if tensor.is_contiguous():
        return tensor.index_select(0, index)
    order = memory_order(tensor, range(tensor.ndim))
    chosen = tensor.permute(order).index_select(order.index(0), index)
    return chosen.permute(inverse(order))


def memory_order(tensor: Tensor, axes: Sequence[int]) -> tuple[int, ...]:
    """These axes by decreasing stride; axes of equal stride keep their order."""
    return tuple(sorted(axes, key=lambda axis: -tensor.stride(axis)))


def inverse(order: Sequence[int]) -> tuple[int, ...]:
    """The permutation that undoes ``order``."""
    return tuple(sorted(range(len(order)), key=order.__getitem__))


class DifferentTrees(Exception):
    """Two trees are built differently."""


def in_order_of(skeleton: Any, value: Any) -> Any:
    """The tree ``value`` with the entries of its dicts in the order of the skeleton, whose leaves are numbers.

    Raises:
        DifferentTrees: they are built differently.
    """
    if isinstance(skeleton, int):
        if isinstance(value, Tensor):
            return value
        raise DifferentTrees
    if isinstance(skeleton, dict) and isinstance(value, dict) and skeleton.keys() == value.keys():
        return type(skeleton)((key, in_order_of(part, value[key])) for key, part in skeleton.items())
    same = type(skeleton) is type(value) and isinstance(skeleton, tuple | list) and len(skeleton) == len(value)
    if not same:
        raise DifferentTrees
    parts = [in_order_of(part, other) for part, other in zip(skeleton, value, strict=True)]
    return type(skeleton)(*parts) if hasattr(skeleton, "_fields") else type(skeleton)(parts)
