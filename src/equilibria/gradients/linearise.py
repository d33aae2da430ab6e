"""What the rules around one f(z*) share: an identity whose backward pass replaces the gradient.

Letters: B batch, N flattened state. Cotangent ``g``, adjoint solution ``u`` = (I − J)⁻ᵀ g.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from equilibria.core.failure import OnFailure, check_repeats, is_heard
from equilibria.core.gradient import ForwardSolve
from equilibria.core.maps import AffineMap, Linearised, Map
from equilibria.core.progress import relative, row_norm
from equilibria.core.solve import Solution, Solver, solve
from equilibria.core.state import Layout, State
from equilibria.core.stop import Stop
from equilibria.core.trees import map_tensors, tensors_in, with_tensors

Adjoint = Callable[["Point", Float[Tensor, "B N"]], Float[Tensor, "B N"]]
"""Maps the cotangent g of the output to the cotangent that f(z*) receives, both as rows in float32 or wider."""


@dataclasses.dataclass(frozen=True, eq=False)
class Point:
    """f linearised at z*, as it acts on rows."""

    linearised: Linearised
    layout: Layout

    def vjp(self, u: Float[Tensor, "B N"]) -> Float[Tensor, "B N"]:
        """Jᵀu; computed in the dtypes of the state, returned in that of the rows."""
        return self.layout.pack(self.linearised.vjp(self.layout.unpack(u)))


def attached(f: Map, solution: Solution, adjoint: Adjoint, method: ForwardSolve) -> Solution:
    """The solution with a differentiable z = f(z*): g goes through ``adjoint``, then through that f."""
    if not torch.is_grad_enabled():
        return dataclasses.replace(solution, z=solution.fz)
    layout = Layout.of(solution.z, coupled=method.coupled)
    point = Point(f.linearise(solution.z), layout)
    fz = point.linearised.value
    if is_heard(method.stop, method.on_failure):
        with torch.no_grad():
            check_again(method, change(layout.pack(fz), recorded(solution, layout), method.stop, layout), fz)
    # The same bits as the f(z*) without graph, whose memory is released.
    out = dataclasses.replace(solution, z=fz, fz=map_tensors(Tensor.detach, fz), evals=solution.evals + 1)
    if point.linearised.constant:  # all is frozen: no graph is kept, no adjoint solved
        return dataclasses.replace(out, z=out.fz)
    return dataclasses.replace(out, z=layout.unpack(_Replace.apply(layout.pack(fz), point, adjoint)))  # pyright: ignore


def check_again(method: ForwardSolve, changed: Float[Tensor, " B"], state: State) -> None:
    """Say that f(z*), evaluated once more after the solve, differs from what it was there."""
    eps = rounding(tensors_in(state))
    of, coupled = "The forward solve", method.coupled
    check_repeats(changed, method.stop, method.on_failure, eps=eps, coupled=coupled, of=of)


def recorded(solution: Solution, layout: Layout) -> Solution:
    """The solution with rows in the place of states."""
    return dataclasses.replace(solution, z=layout.pack(solution.z), fz=layout.pack(solution.fz))


def change(again: Float[Tensor, "B N"], solved: Solution, stop: Stop, layout: Layout) -> Float[Tensor, " B"]:
    """How far f(z), evaluated again, is from a solve of rows: in its value or in its residual, relative to f(z).

    Both are needed: the value that is recorded of a sample is from the last evaluation, its residual from the one at
    which it was done.
    """
    value = relative(row_norm(again - solved.fz), row_norm(solved.fz))
    residual = relative(stop.norms(again - solved.z, layout), stop.norms(again, layout))
    return torch.maximum(value, (residual - solved.residual).abs())


def check_arrival(
    point: Point, g: Float[Tensor, "B N"], solved: Solution, stop: Stop, on_failure: OnFailure, *, of: str
) -> None:
    """Say at the end of the backward pass, where Jᵀu arrives, that Jᵀu + g is not what it was in the solve."""
    if not is_heard(stop, on_failure):
        return
    layout, value, wide = point.layout, point.linearised.value, point.layout.widened()

    def check(products: tuple[Tensor, ...]) -> None:
        with torch.no_grad():
            changed = change(layout.pack(with_tensors(value, products)) + g, solved, stop, wide)
        check_repeats(changed, stop, on_failure, eps=rounding(products), coupled=layout.coupled, of=of)

    point.linearised.arrival.awaited = check


def rounding(tensors: Sequence[Tensor]) -> float:
    """The largest eps of their dtypes, and of the dtype that autocast computes in."""
    dtypes = {tensor.dtype for tensor in tensors}
    kind = next(iter(tensors)).device.type
    if torch.is_autocast_enabled(kind):
        dtypes.add(torch.get_autocast_dtype(kind))
    return max(torch.finfo(dtype).eps for dtype in dtypes)


@dataclasses.dataclass(frozen=True, eq=False)
class OnStates(Map):
    """A map of rows as one of states."""

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
    def forward(ctx: Any, fz: Tensor, point: Point, adjoint: Adjoint) -> Tensor:
        ctx.point, ctx.adjoint = point, adjoint
        return fz.view_as(fz)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        point = ctx.point
        with torch.no_grad(), point.linearised.autocast.off():
            u = ctx.adjoint(dataclasses.replace(point, linearised=point.linearised.for_products()), cotangents[0])
        value = point.layout.pack(point.linearised.value)
        return *differentiated_once([u], behind=[value, cotangents[0]]), None, None


class _Refuse(torch.autograd.Function):
    """Identity forward; an error backward."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        raise RuntimeError(
            "A gradient found by a solve cannot be differentiated again: the second derivative would be wrong. Use "
            "gradient=Unroll() with Stop(rtol=0, max_evals=…, best=False) for derivatives of higher order, or "
            "stability.jacobian_penalty for a penalty on J."
        )


def differentiated_once(tensors: Sequence[Tensor], *, behind: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The results of a backward pass, made to refuse a second one.

    ``once_differentiable`` does so only where the cotangent requires a gradient, which that of a loss does not.
    ``behind`` holds what the results depend on, the cotangent included: autograd passes over nodes that do not lead to
    what it is asked for, and this one must lie on the way to all of them.
    """
    if not torch.is_grad_enabled():
        return tuple(tensors)
    refusing = _Refuse.apply(*(t.detach().requires_grad_() for t in tensors), *behind)
    return refusing[: len(tensors)]


def solve_adjoint(point: Point, g: Float[Tensor, "B N"], solver: Solver, stop: Stop) -> Solution:
    """u = Jᵀu + g from u = g, solved for g/‖g‖ so that its tolerances are in units of ‖g‖; a solution of rows.

    u is kept in float32 or wider; half-precision VJPs are rounded, u itself is not. A sample whose g is not finite
    gets NaN and leaves the others alone.
    """
    size = row_norm(g)[:, None]
    sound = torch.isfinite(size)
    scale = torch.where(sound & (size > 0), size, 1.0)
    system = AffineMap(point.vjp, g, 1 / scale)
    # The start is held by nothing but the solve, which releases it after the first step.
    if stop.per_leaf or callable(stop.norm):  # a norm that has to see the leaves
        wide = point.layout.widened()
        start = wide.unpack((g / scale).masked_fill_(~sound, 0.0))
        solution = solve(OnStates(system, wide), start, solver, stop, coupled=wide.coupled)
        solution = dataclasses.replace(solution, z=wide.pack(solution.z), fz=wide.pack(solution.fz))
    else:
        solution = solve(system, (g / scale).masked_fill_(~sound, 0.0), solver, stop)
    u, fu = ((x * scale).masked_fill_(~sound, torch.nan) for x in (solution.z, solution.fz))
    return dataclasses.replace(solution, z=u, fz=fu, history=None)


def as_state(point: Point, adjoint: Solution) -> Solution:
    """The adjoint solution with states in the place of rows, as ``Solution.adjoint`` keeps it."""
    return dataclasses.replace(adjoint, z=point.layout.unpack(adjoint.z), fz=point.layout.unpack(adjoint.fz))
