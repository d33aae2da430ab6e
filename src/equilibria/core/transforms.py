"""Queries about the running transforms of ``torch.func``, the older vmap of ``torch.autograd``, and backward passes.

PyTorch has no public functions for them. Tested with 2.13.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import Node

_functorch: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]


def is_transformed() -> bool:
    """True while a transform of torch.func (grad, vjp, jvp, vmap or a composition) is running."""
    return _functorch.peek_interpreter_stack() is not None


def is_batched() -> bool:
    """True inside torch.func.vmap, where no decision can depend on a value."""
    return _count(_functorch.TransformType.Vmap) > 0


def forward_modes() -> int:
    """The number of nested torch.func.jvp that are running."""
    return _count(_functorch.TransformType.Jvp)


def _count(kind: Any) -> int:
    return sum(level.key() == kind for level in _functorch.get_interpreter_stack() or [])


def is_of_transform(tensor: Tensor) -> bool:
    """True for a tensor that a transform of torch.func tracks."""
    return _functorch.is_functorch_wrapped_tensor(tensor)


def is_forward_mode() -> bool:
    """True inside ``torch.autograd.forward_ad.dual_level`` and torch.func.jvp."""
    return forward_ad._current_level >= 0


def is_many(cotangent: Tensor) -> bool:
    """True if a backward pass runs for many cotangents at once, under either vmap."""
    return is_transformed() or _functorch.is_legacy_batchedtensor(cotangent)


def by_older_vmap(of_all: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """Apply ``of_all`` to a tensor of ``is_grads_batched=True``, unwrapped so that the axis of its copies is first."""
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    copies = torch._remove_batch_dim(tensor, level, 1, 0)  # pyright: ignore[reportPrivateImportUsage]
    return torch._add_batch_dim(of_all(copies), 0, level)  # pyright: ignore[reportPrivateImportUsage]


def task() -> int:
    """The number of the running backward pass; -1 if none is running."""
    return torch._C._current_graph_task_id()


def is_last() -> bool:
    """True if the running backward pass releases the graph, so that no other can follow."""
    return not torch._C._autograd._get_current_graph_task_keep_graph()  # pyright: ignore[reportAttributeAccessIssue]


def will_run(node: Node) -> bool:
    """True if the backward pass that is running goes through this node, which is not a leaf."""
    return torch._C._will_engine_execute_node(node)


def at_the_end(call: Callable[[], None]) -> None:
    """Run ``call`` at the end of the running backward pass; it is dropped if that pass fails."""
    torch.autograd.Variable._execution_engine.queue_callback(call)  # pyright: ignore[reportAttributeAccessIssue]
