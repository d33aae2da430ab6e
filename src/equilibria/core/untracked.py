"""Results that were made in the forward pass of an autograd function, and may leave it without their graph.

``torch.utils.checkpoint`` with ``use_reentrant=True`` is such a function: it runs a region without a graph, and then
tracks the tensors, and the tuples of tensors, that the region returns. In any other result, such as a dataclass or a
dict, the tensors would silently be constants.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from equilibria.core.trees import map_tensors
from equilibria.torch_private import tracking_functions


def refusing(tree: Any) -> Any:
    """The tree; inside an autograd function, with tensors whose backward pass raises a RuntimeError.

    A tensor that the function returns gets its graph as ever, since PyTorch then replaces the node that raises. Tensors
    that have a graph, and those that could not get one, such as all under ``no_grad``, stay as they are.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or not tracking_functions():
        return tree
    return map_tensors(_refusing, tree)


def _refusing(tensor: Tensor) -> Tensor:
    if tensor.requires_grad or not tensor.is_floating_point():
        return tensor
    with torch.enable_grad():
        return _Refused.apply(torch.zeros((), requires_grad=True), tensor)  # pyright: ignore


class _Refused(torch.autograd.Function):
    """The identity; its backward pass raises. The first argument gives the result a graph."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, tensor: Tensor) -> Tensor:
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        raise RuntimeError(
            "This tensor has lost its graph: it left checkpoint(…, use_reentrant=True), or another autograd function, "
            "inside an object or a container, and such functions track tensors and tuples of tensors alone. Pass "
            "use_reentrant=False, or checkpoint a function that returns the tensor, such as lambda x: layer(x).z."
        )
