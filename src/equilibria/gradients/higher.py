"""Derivatives of higher order and forward mode of a fixed point: each is a linear fixed point itself.

The gradient u = Jᵀu + g and the tangent w = Jw + h are fixed points of maps that are made of f. So they are solved and
differentiated as z = f(z) was, and that again, as often as one likes.

Letters: B batch, N flattened state. Cotangent ``g``, adjoint solution ``u``; tangent ``w`` of z*, ``h`` of f(z*).
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.autograd.variable import Variable

from equilibria.core.failure import OnFailure
from equilibria.core.maps import Linearised, Map, linearised_through
from equilibria.core.state import Layout
from equilibria.gradients.linearise import Edge


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
    """w ↦ Jw + h, on rows: Jw is the derivative of u ↦ Jᵀu, so that f needs no derivative of forward mode."""

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
    """f linearised at a z* that keeps its graph and is given its tangent."""
    if tangent:
        z = forward_ad.make_dual(z, tangent[0])
    return linearised_through(f.eager(), layout.unpack(z), like.autocast)


@dataclasses.dataclass(frozen=True, eq=False)
class RowsMethod:
    """How a linear system of rows is solved, as a rule reads it."""

    solver: Any
    stop: Any
    on_failure: OnFailure
    coupled: bool = False
    keep: tuple[int, ...] = ()


def deliver(there: Linearised, layout: Layout, u: Float[Tensor, "B N"], below: Edge) -> Tensor:
    """Make a backward pass that goes through one graph of f(z*) hand on the gradients of another one.

    The graph of the forward pass begins at a z* that is a constant, so what it gives cannot be differentiated by z*.
    The other one begins at the differentiable z*. Both lead to the tensors that f reads, by the same edges; where the
    running backward pass crosses one, a hook puts the gradient of the other graph in the place of its own.

    Args:
        there: f linearised at the differentiable z*.
        layout: of the state.
        u: the cotangent of f(z*), differentiable.
        below: the edge to the graph that the running backward pass goes through.

    Returns:
        The cotangent for that graph.
    """
    with torch.enable_grad():
        value = layout.pack(there.value)
    if not value.requires_grad:
        return u
    root = tuple(get_gradient_edge(value))
    own, seen = _nodes(below[0], ()), _nodes(root[0], [edge.node for edge in there.start])
    shared = own & seen
    wanted = {edge for node in seen - shared for _, edge in _edges(node) if edge[0] in shared}
    if root[0] in shared:
        wanted.add(root)
    crossings = [(node, i, edge) for node in own - shared for i, edge in _edges(node) if edge[0] in shared]
    if not wanted <= {edge for _, _, edge in crossings} | {tuple(below)}:
        raise RuntimeError(
            "f was evaluated again for a derivative of higher order and read other tensors than before; f must compute "
            "the same each time that it is called."
        )
    edges = list(wanted)
    there.arrival.passed_on = False  # the partial gradients are wanted, and z* itself depends on what f reads
    found = torch.autograd.grad(
        value,
        [GradientEdge(*edge) for edge in edges],
        u,
        retain_graph=True,
        create_graph=torch.is_grad_enabled(),
        allow_unused=True,
    )
    there.arrival.passed_on = True
    gradients = {edge: gradient for edge, gradient in zip(edges, found, strict=True) if gradient is not None}
    direct = gradients.pop(tuple(below), None)
    _Delivery(gradients).hook(crossings)
    return u.detach() if direct is None else direct


class _Delivery:
    """Gradients on their way; it lives as long as the backward pass that is running."""

    def __init__(self, gradients: dict[Edge, Tensor]) -> None:
        self._gradients = gradients
        self._handles: list[Any] = []

    def hook(self, crossings: Sequence[tuple[Any, int, Edge]]) -> None:
        """Replace what these nodes hand on along these edges, once."""
        inputs: dict[Any, dict[int, Edge]] = {}
        for node, i, edge in crossings:
            inputs.setdefault(node, {})[i] = edge
        this = weakref.ref(self)  # a node must not keep what keeps the node

        def hook_of(edges: dict[int, Edge]) -> Any:
            def hook(handed: tuple[Tensor | None, ...], _: Any) -> tuple[Tensor | None, ...] | None:
                delivery = this()
                return None if delivery is None else delivery.instead(handed, edges)

            return hook

        self._handles = [node.register_hook(hook_of(edges)) for node, edges in inputs.items()]
        Variable._execution_engine.queue_callback(self.end)

    def instead(self, handed: tuple[Tensor | None, ...], edges: dict[int, Edge]) -> tuple[Tensor | None, ...]:
        """The gradient goes along the first of the edges that reach a tensor, zeros along the others."""
        replaced = list(handed)
        for i, edge in edges.items():
            own = handed[i]
            if own is not None:
                gradient = self._gradients.pop(edge, None)
                replaced[i] = torch.zeros_like(own) if gradient is None else gradient
        return tuple(replaced)

    def end(self) -> None:
        """Called when the backward pass is over."""
        for handle in self._handles:
            handle.remove()
        self._gradients.clear()


def _nodes(root: Any, barrier: Sequence[Any]) -> set[Any]:
    """All nodes below and including ``root``, down to the ``barrier``."""
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
