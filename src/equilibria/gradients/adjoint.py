"""What the rules around one f(z*) share: an identity whose backward pass replaces the gradient.

Letters: B batch, N flattened state. Cotangent ``g``, adjoint solution ``u`` = (I − J)⁻ᵀ g.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch._functorch.config as functorch_config
from jaxtyping import Float
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from equilibria.solve import (
    AffineMap,
    Autocast,
    CompilableMap,
    Map,
    Solution,
    Solver,
    Stop,
    algebra_dtype,
    row_norm,
    solve,
)

Adjoint = Callable[["Linearised", Float[Tensor, "B *state"]], Float[Tensor, "B *state"]]
"""Maps the cotangent g of the output to the cotangent that one f(z*) is to receive."""


@dataclasses.dataclass(frozen=True, eq=False)
class Linearised:
    """One graph-carrying evaluation of f at z*, of which only products with Jᵀ are asked."""

    z: GradientEdge
    """Where z enters the graph, which keeps z itself only if f needs it again."""
    fz: Float[Tensor, "B *state"]
    autocast: Autocast
    compiled: bool = False
    again: Callable[[], Linearised] | None = None
    """Of a compiled f: one more evaluation, for products alone."""

    def for_products(self) -> Linearised:
        """Where products with Jᵀ compute nothing else; to be let go when there are enough of them."""
        return self if self.again is None else self.again()

    def vjp(self, u: Float[Tensor, "B *state"]) -> Float[Tensor, "B *state"]:
        """Jᵀu: z's gradient alone, without that of the parameters, in the dtype of u."""
        with self.autocast.on(), _kept_whole() if self.compiled else nullcontext():
            (product,) = torch.autograd.grad(self.fz, self.z, u.to(self.fz.dtype), retain_graph=True, allow_unused=True)
        return torch.zeros_like(u) if product is None else product.to(u.dtype)


def attached(f: Map, solution: Solution, adjoint: Adjoint) -> Solution:
    """The solution with a differentiable z = f(z*): g goes through ``adjoint``, then through that f."""
    if not torch.is_grad_enabled():
        return dataclasses.replace(solution, z=solution.fz)
    autocast = Autocast(solution.z.device.type)
    anchor = torch.zeros((), device=solution.z.device, requires_grad=True)
    z, alone = _Begin.apply(solution.z.detach(), anchor), None
    if isinstance(f, CompilableMap):
        alone = f.of_z_alone()
        f = f.eager() if alone is None else f
    fz = f(z).to(z.dtype)
    # The same bits as the f(z*) without graph, whose memory is let go.
    out = dataclasses.replace(solution, z=fz, fz=fz.detach(), evals=solution.evals + 1)
    if all(leaf is anchor for leaf in leaves_below(fz)):  # all is frozen: no graph is kept, no adjoint solved
        return dataclasses.replace(out, z=fz.detach())
    again = None if alone is None else partial(_linearised, alone, solution.z.detach(), autocast)
    point = Linearised(z=get_gradient_edge(z), fz=fz, autocast=autocast, again=again)
    return dataclasses.replace(out, z=_Replace.apply(fz, point, adjoint))


def _kept_whole() -> AbstractContextManager[Any]:
    """What a compiled f keeps for its backward pass may not be overwritten by it, since there are several products.

    The setting is read when f is compiled and at each backward pass, in the thread where that runs.
    """
    return functorch_config.patch(donated_buffer=False)


def _linearised(f: Map, z: Tensor, autocast: Autocast) -> Linearised:
    with torch.enable_grad(), autocast.on(), _kept_whole():
        leaf = z.requires_grad_()
        return Linearised(z=get_gradient_edge(leaf), fz=f(leaf).to(z.dtype), autocast=autocast, compiled=True)


class _Begin(torch.autograd.Function):
    """z as the beginning of a graph; its own gradient is asked for by products only, and goes nowhere."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, anchor: Tensor) -> Tensor:
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[None, None]:
        return None, None


class _Replace(torch.autograd.Function):
    """Identity forward; backward hands ``adjoint(point, g)`` on."""

    @staticmethod
    def forward(ctx: Any, fz: Tensor, point: Linearised, adjoint: Adjoint) -> Tensor:
        ctx.point, ctx.adjoint = point, adjoint
        return fz.view_as(fz)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        with torch.no_grad(), ctx.point.autocast.off():
            u = ctx.adjoint(ctx.point.for_products(), cotangents[0])
        return *differentiated_once([u], behind=[ctx.point.fz]), None, None


class _Refuse(torch.autograd.Function):
    """Identity forward; an error backward."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        raise RuntimeError(
            "A gradient found by a solve cannot be differentiated again: the second derivative would be wrong. Use the "
            "Unroll() or Phantom(…) rule for double backward, or stability.jacobian_penalty for a penalty on J."
        )


def differentiated_once(tensors: Sequence[Tensor], *, behind: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The results of a backward pass, made to refuse a second one.

    ``once_differentiable`` does so only where the cotangent requires a gradient, which that of a loss does not.
    ``behind`` holds what the results depend on: autograd passes over nodes that do not lead to what it is asked for,
    and this one must lie on the way to all of them.
    """
    if not torch.is_grad_enabled():
        return tuple(tensors)
    refusing = _Refuse.apply(*(t.detach().requires_grad_() for t in tensors), *behind)
    return refusing[: len(tensors)]


def leaves_below(value: Tensor, known: Iterable[Tensor] = ()) -> Iterator[Tensor]:
    """The leaves that can receive a gradient from ``value``, as they are met; none behind the ``known`` tensors."""
    pending, seen = [value.grad_fn], {tensor.grad_fn for tensor in known}
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None:
            yield variable
        pending.extend(following for following, _ in node.next_functions)


def solve_adjoint(point: Linearised, g: Float[Tensor, "B *state"], solver: Solver, stop: Stop) -> Solution:
    """u = Jᵀu + g from u = g, solved for g/‖g‖ so that its tolerances are in units of ‖g‖.

    u is kept in float32 or wider; half-precision products are rounded, u itself is not. A sample whose g is not finite
    gets NaN and leaves the others alone.
    """
    wide = g.to(algebra_dtype(g.dtype))
    size = row_norm(wide.reshape(len(g), -1)).view(-1, *[1] * (g.ndim - 1))
    sound = torch.isfinite(size)
    scale = torch.where(sound & (size > 0), size, 1.0)
    solution = solve(AffineMap(point.vjp, wide, 1 / scale), (wide / scale).masked_fill_(~sound, 0.0), solver, stop)
    u, fu = ((x * scale).masked_fill_(~sound, torch.nan).to(g.dtype) for x in (solution.z, solution.fz))
    return dataclasses.replace(solution, z=u, fz=fu, history=None)
