"""Derivatives of higher order and forward mode of a fixed point: each is a linear fixed point itself.

The gradient u = Jᵀu + g and the tangent w = Jw + h are fixed points of maps made from f, so they are solved and
differentiated like z = f(z) itself, to any order.

Letters: B batch, N flattened state. Cotangent ``g``, adjoint solution ``u``; tangent ``w`` of z*, ``h`` of f(z*).
"""

from __future__ import annotations

import dataclasses
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import GradientEdge, get_gradient_edge

from equilibria.core.maps import Linearised, Map, linearised_through
from equilibria.core.solver import Solver
from equilibria.core.state import Layout
from equilibria.core.stop import OnFailure, Stop
from equilibria.core.tracing import untraced
from equilibria.gradients.linearise import Edge
from equilibria.torch_private import at_the_end, task

_Crossing = tuple[Any, int, Edge]
"""A node, the number of one of its edges, and the target of that edge."""


@dataclasses.dataclass(frozen=True, eq=False)
class AdjointMap(Map):
    """u ↦ Jᵀu + g, on rows, with the J of one linearisation of f."""

    linearised: Linearised
    layout: Layout
    g: Float[Tensor, "B N"]

    def __call__(self, z: Float[Tensor, "B N"]) -> Float[Tensor, "B N"]:
        """Jᵀz + g."""
        return self.layout.pack(self.linearised.vjp(self.layout.unpack(z))) + self.g


class TangentMap(Map):
    """w ↦ Jw + h, on rows: Jw is the derivative of u ↦ Jᵀu, so f needs no forward-mode derivative."""

    def __init__(self, linearised: Linearised, layout: Layout, h: Float[Tensor, "B N"]) -> None:
        self._h = h
        with torch.enable_grad():
            self._u = torch.zeros_like(h, requires_grad=True)
            self._product = layout.pack(linearised.vjp(layout.unpack(self._u)))

    def linear(self, w: Float[Tensor, "B N"]) -> Float[Tensor, "B N"]:
        """Jw."""
        if not self._product.requires_grad:  # f does not depend on z
            return torch.zeros_like(w)
        (found,) = torch.autograd.grad(
            self._product,
            self._u,
            w,
            retain_graph=True,
            create_graph=torch.is_grad_enabled(),
            materialize_grads=True,
        )
        return found

    def __call__(self, z: Float[Tensor, "B N"]) -> Float[Tensor, "B N"]:
        """Jz + h."""
        return self.linear(z) + self._h


def through(f: Map, z: Float[Tensor, "B N"], tangent: Sequence[Tensor], layout: Layout, like: Linearised) -> Linearised:
    """f linearised at z*, which keeps its graph and gets its tangent, if there is one."""
    if tangent:
        z = forward_ad.make_dual(z, tangent[0])
    return linearised_through(f.eager(), layout.unpack(z), like.autocast)


@dataclasses.dataclass(frozen=True, eq=False)
class RowsMethod:
    """The settings of a linear solve on rows, with the fields that a rule reads (``ForwardSolve``)."""

    solver: Solver
    stop: Stop
    on_failure: OnFailure
    coupled: bool = False
    keep: tuple[int, ...] = ()
    keep_point: bool = False


def deliver(there: Linearised, layout: Layout, u: Float[Tensor, "B N"], below: Edge, *, alike: bool) -> Tensor:
    """Make the running backward pass, which goes through one graph of f(z*), pass on the gradients of another graph.

    The graph of the forward pass begins at a constant z*, so its gradients cannot be differentiated by z*. The other
    graph begins at the differentiable z*. Both lead to the tensors that f reads, along the same edges; where the
    running backward pass crosses such an edge, a hook replaces its gradient by that of the other graph.

    Args:
        there: f linearised at the differentiable z*.
        layout: the layout of the state.
        u: the cotangent of f(z*), with graph.
        below: the edge to the graph that the running backward pass goes through.
        alike: True if both graphs lead to the same tensors; otherwise the running one may lead to more.

    Returns:
        The cotangent for the running graph.
    """
    with torch.enable_grad():
        value = layout.pack(there.value)
    if not value.requires_grad:
        return u
    root = tuple(get_gradient_edge(value))
    own, seen = _nodes(below[0], ()), _nodes(root[0], [edge.node for edge in there.start])
    shared = own & seen
    if root[0] in shared:  # f returns a tensor that it reads
        wanted, gradients = {root}, {root: u}
    else:
        leaving = _crossings(seen - shared, shared)
        wanted, gradients = {edge for _, _, edge in leaving}, _partial(there, value, leaving, u)
    crossings = _crossings(own - shared, shared)
    crossed = {edge for _, _, edge in crossings} | ({tuple(below)} if below[0] in shared else set())
    changed = any(isinstance(getattr(node, "variable", None), torch.nn.Parameter) for node in own ^ seen)
    if changed or not (wanted == crossed if alike else wanted <= crossed):
        raise RuntimeError(
            "f was evaluated again for a derivative of higher order and read other tensors than before, so that its "
            "gradient cannot be differentiated; f must compute the same each time that it is called, and between the "
            "two passes no weight may be frozen, unfrozen or replaced."
        )
    direct = gradients.pop(tuple(below), None)
    _Delivery(gradients, crossings)
    return u.detach() if direct is None else direct


def _partial(there: Linearised, value: Tensor, leaving: Sequence[_Crossing], u: Tensor) -> dict[Edge, Tensor]:
    """The gradients along the edges that leave the graph of f(z*): partial derivatives by the tensors that f reads.

    The tensors that f reads may depend on each other, and z* depends on all of them. So a hook takes each gradient out
    of the backward pass where it leaves the graph.
    """
    if not leaving:
        return {}
    there.arrival.passed_on = False
    try:
        with _Taker(value, leaving) as taker:
            torch.autograd.grad(
                value,
                [GradientEdge(*edge) for edge in {edge for _, _, edge in leaving}],
                u,
                retain_graph=True,
                create_graph=torch.is_grad_enabled(),
                allow_unused=True,
            )
    finally:  # left False, it would drop a term of every later derivative
        there.arrival.passed_on = True
    return taker.found


class _Crossed(ABC):
    """Changes the gradients that nodes pass on along some of their edges, in one backward pass.

    If one fixed point is nested in another, both may change the gradients of the same node. The inner one acts first.
    """

    _active: ClassVar[list[weakref.ref[_Crossed]]] = []
    _lock: ClassVar[threading.Lock] = threading.Lock()
    """Held while ``_active`` is read or changed: backward passes of several threads share it."""

    def __init__(self, crossings: Sequence[_Crossing]) -> None:
        self._edges = _by_node(crossings)
        self._handles: dict[Any, Any] = {}
        self._task: int | None = None
        """The backward pass to change; VJPs of a solve inside it run through the same nodes and stay unchanged."""

    @abstractmethod
    def changed(self, outgoing: list[Tensor | None], edges: dict[int, Edge]) -> None:
        """Change the gradients that a node passes on, in place; ``edges`` maps edge numbers to their targets."""

    def begin(self) -> None:
        """Register with all nodes."""
        with self._lock:
            active = [outer() for outer in reversed(self._active)]
            self._active.append(weakref.ref(self))
        for node in self._edges:
            self._register(node)
            for crossed in active:
                if crossed is not None and node in crossed._handles:
                    crossed._handles.pop(node).remove()
                    crossed._register(node)

    def end(self) -> None:
        """Remove all hooks."""
        with self._lock:
            self._active[:] = [other for other in self._active if other() not in (self, None)]
        for handle in self._handles.values():
            handle.remove()
        self._handles = {}

    def _register(self, node: Any) -> None:
        this, edges = weakref.ref(self), self._edges[node]  # weak, since this object keeps the nodes alive

        @untraced
        def hook(outgoing: tuple[Tensor | None, ...], _: Any) -> tuple[Tensor | None, ...] | None:
            crossed = this()
            if crossed is None or crossed._task != task():
                return None
            replaced = list(outgoing)
            crossed.changed(replaced, edges)
            return tuple(replaced)

        self._handles[node] = node.register_hook(hook)


class _Taker(_Crossed):
    """Takes gradients out of the backward pass that begins at ``value``."""

    def __init__(self, value: Tensor, leaving: Sequence[_Crossing]) -> None:
        super().__init__(leaving)
        self.found: dict[Edge, Tensor] = {}
        self._root = get_gradient_edge(value).node

    def changed(self, outgoing: list[Tensor | None], edges: dict[int, Edge]) -> None:
        """Take the gradients along these edges, so that none reaches the nodes below."""
        for i, edge in edges.items():
            gradient, outgoing[i] = outgoing[i], None
            if gradient is not None:
                self.found[edge] = self.found[edge] + gradient if edge in self.found else gradient

    def __enter__(self) -> _Taker:
        self.begin()
        self._at_root = self._root.register_prehook(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._at_root.remove()
        self.end()

    def _note(self, _: Any) -> None:
        if self._task is None:
            self._task = task()


class _Delivery(_Crossed):
    """Puts gradients into the running backward pass, and ends with it."""

    def __init__(self, gradients: dict[Edge, Tensor], crossings: Sequence[_Crossing]) -> None:
        super().__init__(crossings)
        self._gradients = gradients
        self._task = task()
        self.begin()
        at_the_end(self.end)

    def changed(self, outgoing: list[Tensor | None], edges: dict[int, Edge]) -> None:
        """The first of the edges that reach a tensor gets its gradient, and the others get zeros."""
        for i, edge in edges.items():
            own = outgoing[i]
            if own is not None:
                gradient = self._gradients.pop(edge, None)
                outgoing[i] = torch.zeros_like(own) if gradient is None else gradient


def _crossings(nodes: set[Any], shared: set[Any]) -> list[_Crossing]:
    """The edges that lead from ``nodes`` to ``shared`` ones."""
    return [(node, i, edge) for node in nodes for i, edge in _edges(node) if edge[0] in shared]


def _by_node(crossings: Sequence[_Crossing]) -> dict[Any, dict[int, Edge]]:
    found: dict[Any, dict[int, Edge]] = {}
    for node, i, edge in crossings:
        found.setdefault(node, {})[i] = edge
    return found


def _nodes(root: Any, barrier: Sequence[Any]) -> set[Any]:
    """All nodes from ``root`` down to the ``barrier``, which is excluded."""
    found, pending = set(barrier), [root]
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending.extend(edge[0] for _, edge in _edges(node))
    return found - set(barrier)


def _edges(node: Any) -> Iterator[tuple[int, Edge]]:
    for i, edge in enumerate(node.next_functions):
        if edge[0] is not None:
            yield i, edge
