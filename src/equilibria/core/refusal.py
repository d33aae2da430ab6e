"""Tensors whose backward pass raises an error, where it would be wrong, or fail in words that name no cure."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from equilibria.core.capture import nodes_below
from equilibria.core.trees import map_tensors
from equilibria.torch_private import tracking_functions


class _Refused(torch.autograd.Function):
    """The identity; its backward pass raises a RuntimeError."""

    @staticmethod
    def forward(ctx: Any, sentence: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.sentence = sentence
        return tuple(tensor.detach() for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        raise RuntimeError(ctx.sentence)


def refused(sentence: str, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, with a graph in which a backward pass raises a RuntimeError with this sentence.

    At least one of them requires a gradient.
    """
    with torch.enable_grad():
        return _Refused.apply(sentence, *tensors)  # pyright: ignore


def refused_if_untracked(tree: Any) -> Any:
    """The tree; in the forward pass of an autograd function, with tensors whose backward pass raises a RuntimeError.

    ``torch.utils.checkpoint`` with ``use_reentrant=True`` is such a function: it runs a region without a graph, and
    then tracks the tensors, and the tuples of tensors, that the region returns. In any other result, such as a
    dataclass or a dict, the tensors would silently be constants. A tensor that the function does return gets its graph
    as ever, since PyTorch then replaces the node that raises. Tensors that have a graph, and those that could not get
    one, such as all under ``no_grad``, stay as they are.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or not tracking_functions():
        return tree
    return map_tensors(_untracked, tree)


def _untracked(tensor: Tensor) -> Tensor:
    if tensor.requires_grad or not tensor.is_floating_point():
        return tensor
    return refused(_UNTRACKED, tensor.detach().requires_grad_())[0]


_UNTRACKED = (
    "This tensor has lost its graph: it left checkpoint(…, use_reentrant=True), or another autograd function, inside "
    "an object or a container, and such functions track tensors and tuples of tensors alone. Pass use_reentrant=False, "
    "or checkpoint a function that returns the tensor, such as lambda x: layer(x).z."
)


def refused_if_lacking(sentence: str, value: Tensor) -> Tensor:
    """The value; its backward pass raises if an operation in its graph has no derivative (a fused kernel, twice)."""
    lacking = any(node.name().endswith("NotImplemented") for node in nodes_below([value]))
    return refused(sentence, value)[0] if lacking else value
