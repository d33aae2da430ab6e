"""Fixed points inside ``torch.func``: grad, vjp, jvp, jacrev, jacfwd, hessian, vmap and their compositions.

A transform sees only the arguments of a function, so here every tensor that f reads is an argument. The gradient and
the tangent of a fixed point are fixed points of linear maps, which go through the same ``Function`` again.

Letters: B batch, N flattened state, V copies under vmap. Map ``F`` on rows, its operands, its Jacobian ``J`` by x.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from equilibria.core.capture import Unknown
from equilibria.core.diagnosis import ADJOINT, FORWARD, TANGENT, Solve
from equilibria.core.failure import report
from equilibria.core.graph import without_graph
from equilibria.core.maps import FunctionMap, Map
from equilibria.core.outcome import Residuals
from equilibria.core.solve import Solution
from equilibria.core.solver import ForwardSolve, Solver
from equilibria.core.state import Layout, State
from equilibria.core.stop import OnFailure, Stop, is_heard
from equilibria.core.tracing import untraced
from equilibria.gradients.linearise import solve_linear, solve_rows
from equilibria.torch_private import forward_modes, is_batched, own_parametrizations, without_forward_mode


def solved(f: Map, z0: State, method: ForwardSolve, *, solver: Solver, stop: Stop) -> Solution:
    """The solution of z = f(z) inside a transform; its z can be transformed again.

    Args:
        f: the map.
        z0: the start.
        method: settings of the forward solve.
        solver: for the linear systems.
        stop: for the linear systems.

    Raises:
        RuntimeError: two forward modes are nested, or f reads a tensor that it was not given.
    """
    _check_levels()
    f = f.eager()
    layout, reads = Layout.of(z0, coupled=method.coupled), f.reads()
    with without_graph():
        _check_given(f, z0, reads)

    def function(x: Float[Tensor, "B N"], *operands: Tensor) -> Float[Tensor, "B N"]:
        with own_parametrizations():  # each level of the transforms has its own operands
            value = f.given(operands)(layout.unpack(x))
        return layout.pack(layout.cast(layout.aligned(value)))

    system = System(
        function=function,
        layout=layout,
        solver=method.solver,
        stop=method.stop,
        on_failure=method.on_failure if is_batched() else "ignore",  # outside vmap ``Method.run`` reports
        of=FORWARD,
        keep=method.keep,
        keep_point=method.keep_point,
        linear_solver=solver,
        linear_stop=stop,
        linear_on_failure=method.on_failure,
    )
    z, residual, status, steps, trace, *kept = _Solved.apply(system, layout.pack(z0), *reads)  # pyright: ignore
    state, states = layout.unpack(z), [layout.unpack(x) for x in kept]
    point = states.pop() if method.keep_point else None
    return Solution(
        z=state,
        fz=state,
        residual=residual,
        status=status,
        steps=steps,
        evals=system.evals[0],
        residuals=tuple((Residuals(row),) for row in trace),
        iterates=tuple(states),
        point=point,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class System:
    """x = F(x; operands), or x = L(x; operands) + x0, on rows."""

    function: Callable[..., Tensor]
    """F, or L."""
    layout: Layout
    solver: Solver
    stop: Stop
    on_failure: OnFailure
    of: Solve
    """Which solve it is, for messages."""
    linear_solver: Solver
    linear_stop: Stop
    linear_on_failure: OnFailure
    keep: tuple[int, ...] = ()
    keep_point: bool = False
    linear: bool = False
    """True if ``function`` is L; the start x0 is then the offset as well."""
    evals: list[int] = dataclasses.field(default_factory=list)
    """Each solve appends its number of evaluations, at whatever depth of transforms it runs."""

    def solve(self, x0: Float[Tensor, "B N"], operands: Sequence[Tensor]) -> Solution:
        """The solution as rows, without graph or tangents."""

        def f(x: Tensor) -> Tensor:
            return self.function(x, *operands)

        if self.linear:
            found = solve_linear(f, x0, self.layout, self.solver, self.stop)
        else:
            found = solve_rows(FunctionMap(f), [x0], self.layout, self.solver, self.stop, keep=self.keep)
        self.evals.append(found.evals)
        if is_heard(self.stop, self.on_failure):
            state = dataclasses.replace(found, z=self.layout.unpack(found.z))  # in the dtypes of f
            report(state, self.stop, self.on_failure, of=self.of)
        return found

    def adjoint(self) -> System:
        """u = Jᵀu + g, with the operands (x, *operands)."""

        def product(u: Tensor, x: Tensor, *operands: Tensor) -> Tensor:
            return torch.func.vjp(lambda x: self.function(x, *operands), x)[1](u)[0]

        return self._linear(product, ADJOINT)

    def tangent(self) -> System:
        """w = Jw + h, with the operands (x, *operands)."""

        def product(w: Tensor, x: Tensor, *operands: Tensor) -> Tensor:
            return jvp(lambda x: self.function(x, *operands), (x,), (w,))

        return self._linear(product, TANGENT)

    def _linear(self, product: Callable[..., Tensor], of: Solve) -> System:
        return dataclasses.replace(
            self,
            function=product,
            solver=self.linear_solver,
            stop=self.linear_stop,
            on_failure=self.linear_on_failure,
            of=of,
            keep=(),
            keep_point=False,
            linear=True,
            evals=[],
        )

    def copies(self, count: int, dims: tuple[int | None, ...]) -> System:
        """``count`` such systems as one; operands with 0 in ``dims`` have a first axis for them, others are shared."""
        many = torch.func.vmap(self.function, in_dims=(0, *dims))

        def function(x: Float[Tensor, "VB N"], *operands: Tensor) -> Float[Tensor, "VB N"]:
            return many(_apart(x, count, 0), *operands).flatten(0, 1)

        return dataclasses.replace(self, function=function, layout=self.layout.divisible())


class _Solved(torch.autograd.Function):
    """x* of a system, its residual, status, steps and trace, and the states that are kept: iterates, then z*."""

    @staticmethod
    def forward(system: System, x0: Tensor, *operands: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad(), without_forward_mode():
            found = system.solve(x0.detach(), [operand.detach() for operand in operands])
        x = found.z if system.linear else found.fz
        kept = (*found.iterates, found.z) if system.keep_point else found.iterates
        # A tensor may not be two outputs of one Function.
        return x.clone(), found.residual, found.status, found.steps, found.trace, *(state.clone() for state in kept)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        system, _, *operands = inputs
        ctx.system, ctx.outputs = system, len(output)
        ctx.save_for_backward(output[0], *operands)
        ctx.save_for_forward(output[0], *operands)
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    @untraced
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        system, (x, *operands) = ctx.system, ctx.saved_tensors
        u = _Solved.apply(system.adjoint(), cotangents[0], x, *operands)[0]  # pyright: ignore
        chosen = [i for i, needed in enumerate(ctx.needs_input_grad[2:]) if needed and _has_derivative(operands[i])]
        gradients: list[Tensor | None] = [None] * len(operands)
        if chosen:
            pull: Any = torch.func.vjp(_partly(system.function, x, operands, chosen), *[operands[i] for i in chosen])[1]
            for i, gradient in zip(chosen, pull(u), strict=True):
                gradients[i] = gradient
        return None, u if system.linear else None, *gradients

    @staticmethod
    @untraced
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        system, (x, *operands) = ctx.system, ctx.saved_tensors
        _, along_start, *along = tangents
        chosen = [i for i, t in enumerate(along) if t is not None and _has_derivative(operands[i])]
        h = along_start if system.linear and along_start is not None else torch.zeros_like(x)
        if chosen:
            primals = tuple(operands[i] for i in chosen)
            h = h + jvp(_partly(system.function, x, operands, chosen), primals, tuple(along[i] for i in chosen))
        w = _Solved.apply(system.tangent(), h, x, *operands)[0]  # pyright: ignore
        return w, *[None] * (ctx.outputs - 1)

    @staticmethod
    @untraced
    def vmap(  # pyright: ignore[reportIncompatibleMethodOverride]
        info: Any, in_dims: Any, system: System, x0: Tensor, *operands: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        count = info.batch_size
        _, start, *dims = in_dims
        x0 = x0.expand(count, *x0.shape) if start is None else x0.movedim(start, 0)
        given = [t if dim is None else t.movedim(dim, 0) for t, dim in zip(operands, dims, strict=True)]
        many = system.copies(count, tuple(None if dim is None else 0 for dim in dims))
        x, residual, status, steps, trace, *states = _Solved.apply(many, x0.flatten(0, 1), *given)  # pyright: ignore
        system.evals.append(many.evals[-1])
        first = [_apart(t, count, 0) for t in (x, residual, status, steps)]
        kept = [_apart(t, count, 0) for t in states]
        return (*first, _apart(trace, count, 1), *kept), (0, 0, 0, 0, 1, *[0] * len(kept))


def jvp(f: Callable[..., Tensor], primals: tuple[Tensor, ...], tangents: tuple[Any, ...]) -> Tensor:
    """The derivative of f along ``tangents``, by two VJPs, since two forward modes do not nest."""
    value, pull = torch.func.vjp(f, *primals)[:2]
    return torch.func.vjp(pull, torch.zeros_like(value))[1](tangents)[0]


def _has_derivative(operand: Tensor) -> bool:
    """False for integers and flags; a complex operand of a real state has one, like any other."""
    return operand.is_floating_point() or operand.is_complex()


def _partly(f: Callable[..., Tensor], x: Tensor, operands: Sequence[Tensor], chosen: Sequence[int]) -> Any:
    """f at x as a function of the chosen operands."""

    def partly(*some: Tensor) -> Tensor:
        every = list(operands)
        for i, operand in zip(chosen, some, strict=True):
            every[i] = operand
        return f(x, *every)

    return partly


def _apart(tensor: Tensor, count: int, dim: int) -> Tensor:
    return tensor.unflatten(dim, (count, tensor.shape[dim] // count if count else math.prod(tensor.shape)))


def _check_levels() -> None:
    if forward_modes() > 1:
        raise RuntimeError(
            "Two nested forward modes (torch.func.jvp in jvp, jacfwd in jacfwd) give 0 for custom functions in "
            "PyTorch; nest forward in reverse mode instead: torch.func.hessian, jacfwd(jacrev(f)), jvp of grad."
        )


def _check_given(f: Map, z0: State, reads: Sequence[Tensor]) -> None:
    """Raise a RuntimeError if f closes over a tensor that a transform tracks or that requires a gradient."""
    unknown = Unknown.read_by(f.given(reads), z0, reads)
    if unknown is not None:
        raise RuntimeError(
            f"f closes over a tensor of shape {tuple(unknown.shape)}, and inside torch.func gradients and "
            "batches reach only the arguments of f: pass it as an operand, fixed_point(f, z0, x, weight) "
            "with f(z, x, weight), or use an Equilibrium with torch.func.functional_call."
        )
