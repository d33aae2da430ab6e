"""The graph that autograd makes: its nodes, the tensors that it saves, and nodes that refuse a backward pass."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from equilibria.core.trees import map_tensors, tensors_in
from equilibria.torch_private import at_the_end, hooks_on_saved_tensors, own_parametrizations, tracking_functions

_T = TypeVar("_T")


def leaves_below(values: Sequence[Tensor]) -> Iterator[Tensor]:
    """The leaves that can receive a gradient from one of ``values``, in the order in which they are met."""
    yield from (value for value in values if value.requires_grad and value.is_leaf)
    for node in nodes_below(values):
        variable = getattr(node, "variable", None)
        if variable is not None:
            yield variable


def nodes_below(values: Sequence[Tensor]) -> Iterator[Any]:
    """The nodes of the graph of ``values``, in the order in which they are met."""
    pending: list[Any] = [value.grad_fn for value in values]
    seen = set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        pending.extend(following for following, _ in node.next_functions)


def kept() -> contextlib.AbstractContextManager[Any]:
    """A context in which a graph keeps the tensors that it saves, past all hooks; for VJPs that follow at once."""
    return contextlib.nullcontext() if hooks_on_saved_tensors() is None else saved_tensors_hooks(_same, _same)


@contextlib.contextmanager
def without_graph() -> Iterator[None]:
    """``torch.no_grad`` for evaluations of f before others that have a graph.

    The caches of ``parametrize.cached()`` and of autocast would hand those the weights that were made without one.
    """
    try:
        with torch.no_grad(), own_parametrizations():
            yield
    finally:
        torch.clear_autocast_cache()


def _same(tensor: Tensor) -> Tensor:
    return tensor


class _Handle:
    """The stand-in for a tensor that a graph saves."""

    def __init__(self, packed: Any) -> None:
        self.packed = packed
        self.tensor: Tensor | None = None


class SavedTensors:
    """The tensors that one graph saves, packed by the hooks that were active when it was made.

    With hooks, such as those of torch.utils.checkpoint, each is unpacked once per backward pass. The adjoint solve goes
    through the graph of f(z*) once per VJP. Autograd unpacks the tensors of the graph each time, and for a checkpoint
    each of these times is another forward pass: 14 evaluations of f became 196.
    """

    def __init__(self) -> None:
        # Weak, since autograd frees what a backward pass no longer needs node by node.
        self._handles: list[weakref.ref[_Handle]] = []
        self._unpack: Callable[[Any], Tensor] = _same

    def recorded(self) -> contextlib.AbstractContextManager[Any]:
        """A context for making the graph; without hooks from outside it changes nothing."""
        hooks = hooks_on_saved_tensors()
        if hooks is None:
            return contextlib.nullcontext()
        pack, self._unpack = hooks

        def packed(tensor: Tensor) -> _Handle:
            handle = _Handle(pack(tensor))
            self._handles.append(weakref.ref(handle))
            return handle

        return saved_tensors_hooks(packed, self._unpacked)

    def _unpacked(self, handle: _Handle) -> Tensor:
        return self._unpack(handle.packed) if handle.tensor is None else handle.tensor

    def unpack(self) -> None:
        """Unpack all tensors for the rest of the running backward pass; VJPs within it then find them."""
        for handle in self._alive():
            handle.tensor = self._unpack(handle.packed)
        if self._handles:
            at_the_end(self._release)

    def _release(self) -> None:
        for handle in self._alive():
            handle.tensor = None

    def _alive(self) -> Iterator[_Handle]:
        for weak in self._handles:
            handle = weak()
            if handle is not None:
                yield handle


class _Refused(torch.autograd.Function):
    """Returns its tensors unchanged. A backward pass through them raises a RuntimeError."""

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
    """The tree unchanged, except in the forward pass of an autograd function: there its tensors refuse a backward pass.

    They raise a RuntimeError in it. ``torch.utils.checkpoint`` with ``use_reentrant=True`` is such a function: it runs
    a region without a graph, and then tracks the tensors, and the tuples of tensors, that the region returns. In any
    other result, such as a dataclass or a dict, the tensors would silently be constants. A tensor that the function
    does return gets its graph as ever, since PyTorch then replaces the node that raises. Tensors that have a graph, and
    those that could not get one, such as all under ``no_grad``, stay as they are.
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


def recordable(tree: _T) -> _T:
    """The tree; outside of inference mode, copies replace the tensors made in it, because a graph cannot save those."""
    if torch.is_inference_mode_enabled() or not any(tensor.is_inference() for tensor in tensors_in(tree)):
        return tree
    return map_tensors(lambda tensor: tensor.clone() if tensor.is_inference() else tensor, tree)


def refused_if_lacking(sentence: str, value: Tensor) -> Tensor:
    """The value. Its backward pass raises if an operation in its graph has no derivative (a fused kernel, twice)."""
    lacking = any(node.name().endswith("NotImplemented") for node in nodes_below([value]))
    return refused(sentence, value)[0] if lacking else value
