"""The common part of rules around one f(z*): an identity whose backward pass replaces the gradient.

Letters: B batch, N flattened state. Cotangent ``g``, adjoint solution ``u`` = (I − J)⁻ᵀ g.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import forward_ad

from equilibria.core.graph import refused
from equilibria.core.maps import AffineMap, Linearised, Map
from equilibria.core.solve import Solution, solve_from
from equilibria.core.solver import ForwardSolve, Solver
from equilibria.core.state import Layout, State
from equilibria.core.stop import Stop, is_heard, row_norm
from equilibria.core.tracing import untraced
from equilibria.core.trees import map_tensors, tensors_in, with_tensors
from equilibria.gradients.repeats import check_value
from equilibria.torch_private import by_older_vmap, is_forward_mode, is_last, is_many, is_transformed

Edge = Any
"""A node of autograd's graph and the number of one of its outputs, as in ``next_functions``."""

Adjoint = Callable[["Point", Float[Tensor, "B N"]], Float[Tensor, "B N"]]
"""Maps the cotangent g of the output to the cotangent that f(z*) receives, both as rows in float32 or wider."""


@dataclasses.dataclass(frozen=True, eq=False)
class Point:
    """f linearised at z*, as it acts on rows."""

    linearised: Linearised
    layout: Layout
    f: Map
    copies: int | None = None
    """Number of cotangents that arrive at once (``is_grads_batched``), with their rows stacked; None for one."""
    alike: bool = True
    """False if f was compiled: its graph then leads to all tensors that f was given, used or not."""
    tangent: list[Tensor] = dataclasses.field(default_factory=list)
    """The tangent of z* as rows, if f reads tangents of forward mode; otherwise empty."""

    def vjp(self, u: Float[Tensor, "B N"]) -> Float[Tensor, "B N"]:
        """Jᵀu; computed in the dtypes of the state, returned in the dtype of the rows."""
        if self.copies is None:
            return self._vjp(u)
        return torch.func.vmap(self._vjp)(u.unflatten(0, (self.copies, -1))).flatten(0, 1)

    @property
    def solved_layout(self) -> Layout:
        """The layout of the rows of an adjoint solve, which stacks all copies."""
        return self.layout if self.copies is None else self.layout.divisible()

    def _vjp(self, u: Float[Tensor, "B N"]) -> Float[Tensor, "B N"]:
        return self.layout.pack(self.linearised.vjp(self.layout.unpack(u)))


class Orders(ABC):
    """How a rule provides derivatives of higher order, and forward mode."""

    @abstractmethod
    def again(self, point: Point, z: Float[Tensor, "B N"], g: Float[Tensor, "B N"], below: Edge) -> Tensor:
        """The cotangent of f(z*), with graph; it also makes the gradients of all tensors that f reads differentiable.

        Args:
            point: f linearised at z*, a constant.
            z: the same z*, with its graph.
            g: the cotangent of z, with its graph and its tangent.
            below: the edge to the node that made f(z*).
        """

    @abstractmethod
    def tangent(self, point: Point, z: Float[Tensor, "B N"]) -> Float[Tensor, "B N"]:
        """w = Jw + h: the tangent of z*, where h ≠ 0 is the tangent of f(z*) for constant z*."""


def attached(
    f: Map,
    solution: Solution,
    adjoint: Adjoint,
    method: ForwardSolve,
    orders: Orders | None = None,
    *,
    checked: bool = True,
) -> Solution:
    """The solution with a differentiable z = f(z*): g goes through ``adjoint``, then through the graph of f(z*).

    Args:
        f: the map.
        solution: its fixed point, without graph.
        adjoint: the backward pass for first derivatives.
        method: settings of the solve.
        orders: provides derivatives of higher order and forward mode; None to refuse them.
        checked: report if f(z*), evaluated once more here, differs from its value in the solve.
    """
    dual = orders is not None and is_forward_mode()
    if not torch.is_grad_enabled() and not dual:
        return dataclasses.replace(solution, z=solution.fz)
    layout = Layout.of(solution.z, coupled=method.coupled)
    f = f.eager() if dual else f
    pinned = f if orders is None else f.eager().pinned()
    point = Point(f.linearise(solution.z), layout, pinned, alike=f.eager() is f)
    fz, constant = point.linearised.value, point.linearised.constant
    known = map_tensors(Tensor.detach, fz)
    if checked and is_heard(method.stop, method.on_failure):
        check_value(known, solution, method, layout)
    # The same bits as the f(z*) of the solve, whose memory is released.
    out = dataclasses.replace(solution, z=known, fz=known, evals=solution.evals + 1)
    primal, h = split_dual(fz, layout) if dual else (fz, None)
    if constant or not torch.is_grad_enabled():  # no graph is kept, no adjoint solved
        z = layout.pack(known) if h is not None else None
    else:
        z = _Replace.apply(layout.pack(primal), point, adjoint, orders)
    if z is None:
        return out
    if h is not None and orders is not None:
        point.tangent.append(orders.tangent(point, z))  # pyright: ignore
        z = forward_ad.make_dual(z, point.tangent[0])  # pyright: ignore
    return dataclasses.replace(out, z=layout.unpack(z))  # pyright: ignore


def split_dual(state: State, layout: Layout) -> tuple[State, Float[Tensor, "B N"] | None]:
    """The state without its tangents, and the tangents as rows, or None if no leaf has one."""
    pairs = [forward_ad.unpack_dual(leaf) for leaf in tensors_in(state)]
    primal = with_tensors(state, (pair.primal for pair in pairs))
    if all(pair.tangent is None for pair in pairs):
        return primal, None
    tangents = (torch.zeros_like(pair.primal) if pair.tangent is None else pair.tangent for pair in pairs)
    return primal, layout.pack(with_tensors(state, tangents))


@dataclasses.dataclass(frozen=True, eq=False)
class OnStates(Map):
    """A map of rows as a map of states."""

    rows_map: Map
    layout: Layout

    def __call__(self, z: State) -> State:
        """f(z)."""
        return self.layout.unpack(self.rows_map(self.layout.pack(z)))

    def jvp(self, z: State, v: State) -> State:
        """J(z)·v."""
        return self.layout.unpack(self.rows_map.jvp(self.layout.pack(z), self.layout.pack(v)))


class _Replace(torch.autograd.Function):
    """Identity forward; backward passes ``adjoint(point, g)`` on."""

    @staticmethod
    def forward(ctx: Any, fz: Tensor, point: Point, adjoint: Adjoint, orders: Orders | None) -> Tensor:
        ctx.point, ctx.adjoint, ctx.orders = point, adjoint, orders
        z = fz.view_as(fz)
        ctx.save_for_backward(z)
        ctx.set_materialize_grads(False)
        return z

    @staticmethod
    @untraced
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        point, orders, (g,) = ctx.point, ctx.orders, cotangents
        if g is None or not g.shape[1]:  # for a state without any number there is no system to solve
            return g, None, None, None
        (z,) = ctx.saved_tensors  # after the return above: in a checkpoint this is what computes everything again
        batched = is_many(g)
        if batched and (torch.is_grad_enabled() or (orders is not None and is_forward_mode())):
            raise RuntimeError(_BATCHED)
        point.linearised.saved.unpack()
        if orders is not None and (torch.is_grad_enabled() or is_forward_mode()):
            with point.linearised.autocast.off():
                return orders.again(point, z, g, ctx.next_functions[0]), None, None, None
        if is_last():  # free what f reads during the adjoint solve
            ctx.point = point = dataclasses.replace(point, f=_Released())
        with torch.no_grad(), point.linearised.autocast.off():
            there = dataclasses.replace(point, linearised=point.linearised.for_products())
            u = _solve_many(g, there, ctx.adjoint) if batched else ctx.adjoint(there, g)
        return *differentiated_once([u], behind=[z, g]), None, None, None


class _Released(Map):
    """Stands in for a map that no derivative will evaluate."""

    def __call__(self, z: State) -> State:
        raise RuntimeError(
            "The graph of this fixed point was released by a backward pass; pass retain_graph=True to that pass."
        )


_BATCHED = (
    "Many cotangents at once (is_grads_batched=True, vectorize=True) cannot be combined with create_graph=True or "
    "forward mode through a solve: take them one by one, or use torch.func and pass the tensors that f reads as "
    "operands."
)


def _solve_many(g: Tensor, point: Point, adjoint: Adjoint) -> Tensor:
    """``adjoint(point, g)`` for many cotangents at once, in one solve."""
    if is_transformed():
        return _Solve.apply(g, point, adjoint)  # pyright: ignore[reportReturnType]
    return by_older_vmap(lambda every: _together(every, point, adjoint), g)


def _together(g: Float[Tensor, "V B N"], point: Point, adjoint: Adjoint) -> Float[Tensor, "V B N"]:
    many = dataclasses.replace(point, copies=len(g))
    return adjoint(many, g.flatten(0, 1)).unflatten(0, (len(g), -1))


class _Solve(torch.autograd.Function):
    """``adjoint(point, g)`` inside ``torch.func.vmap``."""

    @staticmethod
    def forward(g: Tensor, point: Point, adjoint: Adjoint) -> Tensor:
        return adjoint(point, g)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Nothing is kept: there is no gradient."""

    @staticmethod
    def vmap(info: Any, in_dims: Any, g: Tensor, point: Point, adjoint: Adjoint) -> Any:  # pyright: ignore
        return _together(g.movedim(in_dims[0], 0), point, adjoint), 0


_ONCE = (
    "A gradient of this rule cannot be differentiated again: the second derivative would be wrong. Use "
    "gradient=Implicit() for derivatives of higher order, or stability.jacobian_penalty for a penalty on J."
)


def differentiated_once(tensors: Sequence[Tensor], *, behind: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The results of a backward pass, made to raise an error if they are differentiated.

    ``once_differentiable`` does so only if the cotangent requires a gradient, and the cotangent of a loss does not.
    ``behind`` holds the tensors on which the results depend, the cotangent included: autograd skips nodes that do not
    lead to the requested inputs, and this node must lie on the way to all of them.
    """
    if not torch.is_grad_enabled():
        return tuple(tensors)
    return refused(_ONCE, *(t.detach().requires_grad_() for t in tensors), *behind)[: len(tensors)]


def solve_adjoint(point: Point, g: Float[Tensor, "B N"], solver: Solver, stop: Stop) -> Solution:
    """u = Jᵀu + g; see ``solve_linear``."""
    return solve_linear(point.vjp, g, point.solved_layout, solver, stop)


def solve_linear(
    linear: Callable[[Tensor], Tensor], g: Float[Tensor, "B N"], layout: Layout, solver: Solver, stop: Stop
) -> Solution:
    """u = L(u) + g from u = g, solved for g/‖g‖ so that its atol is in units of ‖g‖; a solution of rows.

    u is kept in float32 or wider; half-precision products are rounded, u itself is not. A sample whose g is not finite
    gets NaN and does not affect the others.
    """
    size = row_norm(g)[:, None]
    sound = torch.isfinite(size)
    scale = torch.where(sound & (size > 0), size, 1.0).clamp(min=torch.finfo(g.dtype).tiny)  # 1/scale is finite
    start = [(g / scale).masked_fill_(~sound, 0.0)]  # which no frame holds during the solve
    solution = solve_rows(AffineMap(linear, g, 1 / scale), start, layout, solver, stop)
    u, fu = ((x * scale).masked_fill_(~sound, torch.nan) for x in (solution.z, solution.fz))
    return dataclasses.replace(solution, z=u, fz=fu, history=None)


def solve_rows(
    f: Map, start: list[Tensor], layout: Layout, solver: Solver, stop: Stop, *, keep: Sequence[int] = ()
) -> Solution:
    """``solve_from`` for rows; if the norm of ``stop`` needs the leaves of the state, the rows are unpacked for it."""
    if not needs_leaves(stop):
        return solve_from(start, f, solver, stop, keep=keep)
    wide = layout.widened()
    states = [wide.unpack(start.pop())]
    solution = solve_from(states, OnStates(f, wide), solver, stop, coupled=wide.coupled, keep=keep)
    rows = tuple(wide.pack(z) for z in solution.iterates)
    return dataclasses.replace(solution, z=wide.pack(solution.z), fz=wide.pack(solution.fz), iterates=rows)


def needs_leaves(stop: Stop) -> bool:
    """True if the norm is computed from the leaves of a state and not from its rows."""
    return stop.per_leaf or callable(stop.norm)


def as_state(point: Point, adjoint: Solution) -> Solution:
    """The adjoint solution with its rows unpacked into states, as ``Solution.adjoint`` keeps it."""
    layout = point.solved_layout
    return dataclasses.replace(adjoint, z=layout.unpack(adjoint.z), fz=layout.unpack(adjoint.fz))
